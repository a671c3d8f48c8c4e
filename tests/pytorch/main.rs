//! Tests of files of `torch.save`: they are read value by value, hostile ones are refused without harm, and Python
//! reads the written ones.

#[path = "../common/mod.rs"]
mod common;
#[path = "../../examples/conformance/interop.rs"]
mod interop;

mod averages;
mod grad_scaler;
mod layouts;
mod libraries;
mod lightning;
mod memory;
mod mnist1d;
mod packages;
mod pretrained;
mod schedulers;
mod script_module;
mod whole_sets;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use tch::nn::{self, VarStore};
use tch::{Device, Kind, Tensor};
use tch_ignite::checkpoint::Stateful;
use tch_ignite::optim::{Optimizer, OptimizerBuilder, lr};
use tch_ignite::pytorch::{
    self, DType, Dict, Loaded, Names, Reader, StoredTensor, Value, Weights, load_weights,
    save_weights,
};

use common::serial;

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/interop")
}

/// The golden files whose names begin with `kind`.
fn fixtures(kind: &str) -> Result<Vec<PathBuf>> {
    let mut files = vec![];
    for entry in fs::read_dir(golden())? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if name.starts_with(kind) && name.ends_with(".pt") {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

/// A random number generator, xorshift.
struct Random(u64);

impl Random {
    fn below(&mut self, below: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % below.max(1) as u64) as usize
    }
}

/// Makes a zip archive of these files, uncompressed and without checksums.
fn archive(files: &[(&str, &[u8])]) -> Vec<u8> {
    let (mut bytes, mut directory) = (vec![], vec![]);
    for (name, content) in files {
        let header = bytes.len() as u32;
        let name = format!("a/{name}");
        let length = (content.len() as u32).to_le_bytes();
        let common = [&[0; 12][..], &length, &length, &(name.len() as u16).to_le_bytes(), &[0; 2]];
        bytes.extend([b"PK\x03\x04", &[20, 0][..], &common.concat(), name.as_bytes()].concat());
        bytes.extend(*content);
        directory.extend([b"PK\x01\x02", &[20, 0, 20, 0][..], &common.concat(), &[0; 10]].concat());
        directory.extend(header.to_le_bytes());
        directory.extend(name.as_bytes());
    }
    let (count, begin) = ((files.len() as u16).to_le_bytes(), bytes.len() as u32);
    let length = (directory.len() as u32).to_le_bytes();
    bytes.extend(directory);
    bytes.extend(b"PK\x05\x06\0\0\0\0");
    bytes.extend([count, count].concat());
    bytes.extend([length, begin.to_le_bytes()].concat());
    bytes.extend([0; 2]);
    bytes
}

/// Reads an archive with this pickle, and bytes of storages.
fn read_pickle(pickle: &[u8], storages: &[(&str, &[u8])]) -> tch_ignite::Result<Value> {
    let files: Vec<_> =
        [("data.pkl", pickle)].into_iter().chain(storages.iter().copied()).collect();
    Reader::new().read_bytes(archive(&files))
}

fn refused(pickle: &[u8]) -> String {
    read_pickle(pickle, &[]).expect_err("it was read").to_string()
}

#[test]
fn each_path_of_each_file_of_python_is_there() -> Result<()> {
    let mut paths = 0;
    for file in fixtures("tensors-")? {
        for (path, result) in interop::tensors(&file)? {
            assert_eq!(result, Ok(()), "{} {path}", file.display());
            paths += 1;
        }
    }
    assert_eq!(paths, 103);
    Ok(())
}

#[test]
fn hostile_files_are_refused_or_plain_data() -> Result<()> {
    let files = fixtures("hostile-")?;
    assert_eq!(files.len(), 10);
    for file in files {
        interop::hostile(&file).with_context(|| file.display().to_string())?;
    }
    let why = |name: &str| match pytorch::read(golden().join(name)) {
        Ok(value) => format!("read: {value}"),
        Err(error) => error.to_string(),
    };
    for (name, reason) in [
        ("hostile-system.pt", "posix.system"),
        ("hostile-system-legacy.pt", "posix.system"),
        ("hostile-open.pt", "io.open"),
        ("hostile-claims.pt", "storage '0' should have 508 bytes and has 16"),
        ("hostile-outside.pt", "[127] lies outside its storage of 4 elements"),
        ("hostile-deep.pt", "deep in each other"),
        ("hostile-truncated.pt", "cut off"),
        ("hostile-memo.pt", "read: 1"),
    ] {
        assert!(why(name).contains(reason), "{name}: {}", why(name));
    }
    Ok(())
}

#[test]
fn tensors_of_one_storage_share_their_memory() -> Result<()> {
    for name in ["tensors-views.pt", "tensors-views-legacy.pt", "tensors-protocol4.pt"] {
        let value = pytorch::read(golden().join(name))?;
        let tensor = |name: &str| value.get(name).and_then(Value::as_tensor).context("a tensor");
        assert!(tensor("whole")?.shares_storage_with(tensor("tied")?));
        assert!(!tensor("whole")?.shares_storage_with(tensor("expanded")?));
        assert_eq!(tensor("transposed")?.stride(), [1, 6]);
        let (mut whole, view) = (tensor("whole")?.tensor()?, tensor("view")?.tensor()?);
        let _ = whole.fill_(7.);
        assert_eq!(Vec::<f64>::try_from(view.flatten(0, -1))?, [7.; 8]);
        assert_eq!(tensor("expanded")?.tensor()?.stride(), [1, 0]);
        assert_eq!(tensor("channels_last")?.tensor()?.stride(), [12, 1, 6, 3]);
    }
    Ok(())
}

#[test]
fn values_are_the_same_after_they_are_written() -> Result<()> {
    let folder = tempfile::tempdir()?;
    for file in fixtures("tensors-")? {
        let copy = folder.path().join(file.file_name().context("a name")?);
        pytorch::write(&copy, &pytorch::read(&file)?)?;
        fs::copy(file.with_extension("json"), copy.with_extension("json"))?;
        for (path, result) in interop::tensors(&copy)? {
            assert_eq!(result, Ok(()), "{} {path}", copy.display());
        }
        // Writing the same value gives the same bytes, and a value may be written over the file that it was read
        // from.
        let bytes = fs::read(&copy)?;
        pytorch::write(&copy, &pytorch::read(&copy)?)?;
        assert!(fs::read(&copy)? == bytes, "{}", copy.display());
    }
    let left = fs::read_dir(folder.path())?.count();
    assert_eq!(left, 2 * fixtures("tensors-")?.len(), "a file was left over");
    Ok(())
}

#[test]
fn memory_that_tensors_of_the_program_share_is_written_once() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("shared.pt");
    let large = Tensor::arange(1_000_000, (Kind::Float, Device::Cpu));
    let rows = large.narrow(0, 100, 60).view([6, 10]);
    let mut dict = Dict::new();
    for (name, tensor) in [
        ("columns", rows.tr()),
        ("rows", rows.shallow_clone()),
        ("row", rows.get(2)),
        ("apart", large.narrow(0, 900, 3)),
        ("empty", Tensor::zeros([0, 3], (Kind::Int64, Device::Cpu))),
        ("complex", Tensor::complex(&rows, &rows).conj()),
    ] {
        dict.insert(name, Value::tensor(&tensor)?);
    }
    pytorch::write(&path, &dict.into())?;
    assert!(fs::metadata(&path)?.len() < 5000, "parts that no tensor has were written");
    let value = pytorch::read(&path)?;
    let stored = |name: &str| value.get(name).and_then(Value::as_tensor).context("a tensor");
    assert!(stored("rows")?.shares_storage_with(stored("columns")?));
    assert!(stored("rows")?.shares_storage_with(stored("row")?));
    assert!(!stored("rows")?.shares_storage_with(stored("apart")?));
    assert_eq!(stored("columns")?.stride(), [1, 10]);
    assert_eq!(Vec::<f64>::try_from(stored("row")?.tensor()?)?[0], 120.);
    assert_eq!(Vec::<f64>::try_from(stored("apart")?.tensor()?)?, [900., 901., 902.]);
    assert_eq!(stored("empty")?.size(), [0, 3]);
    assert_eq!(
        f64::try_from(stored("complex")?.tensor()?.imag().sum(Kind::Double))?,
        -(100..160).sum::<i64>() as f64
    );
    let undefined = Value::tensor(&Tensor::new()).unwrap_err().to_string();
    assert!(undefined.contains("undefined"), "{undefined}");
    Ok(())
}

#[test]
fn containers_that_are_shared_stay_shared() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("shared.pt");
    // The pickle is [a, a, (a,)] with a = [1].
    let value = read_pickle(b"\x80\x02](]q\x00K\x01ah\x00h\x00\x85e.", &[])?;
    pytorch::write(&path, &value)?;
    for value in [value, pytorch::read(&path)?] {
        assert_eq!(value.to_string(), "[[1], [1], ([1],)]");
        let parts = value.as_slice().context("a list")?;
        let [Value::List(one), Value::List(two), Value::Tuple(three)] = parts else {
            panic!("{value}");
        };
        assert!(std::sync::Arc::ptr_eq(one, two));
        assert!(matches!(&three[0], Value::List(list) if std::sync::Arc::ptr_eq(one, list)));
    }
    Ok(())
}

#[test]
fn a_list_and_a_tuple_of_one_memory_are_written_as_two_values() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("both.pt");
    let one = std::sync::Arc::new(vec![Value::Int(1)]);
    let both = Value::list([Value::List(one.clone()), Value::Tuple(one.clone()), Value::Set(one)]);
    pytorch::write(&path, &both)?;
    assert_eq!(pytorch::read(&path)?.to_string(), both.to_string());
    Ok(())
}

#[test]
fn keys_are_told_apart_as_in_python() -> Result<()> {
    // The pickle is {2**63 - 1: 1, 2.0**63: 2}.
    let pickle =
        b"\x80\x02}(\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7fK\x01G\x43\xe0\0\0\0\0\0\0K\x02u.";
    let value = read_pickle(pickle, &[])?;
    assert_eq!(value.as_dict().context("a dict")?.len(), 2);
    // The pickle is {nan: 1, nan: 1}: no NaN equals another.
    let nan = b"G\x7f\xf8\0\0\0\0\0\0K\x01";
    let value = read_pickle(&[b"\x80\x02}(", &nan[..], nan, b"u."].concat(), &[])?;
    assert_eq!(value.to_string(), "{nan: 1, nan: 1}");
    // The pickle is {2.0**63: 1, 2**63: 2}, and {1+0j: 1, True: 2}.
    let value = read_pickle(
        b"\x80\x02}(G\x43\xe0\0\0\0\0\0\0K\x01\x8a\x09\0\0\0\0\0\0\0\x80\0K\x02u.",
        &[],
    )?;
    assert_eq!(value.to_string(), "{9.223372036854776e+18: 2}");
    let value = read_pickle(
        b"\x80\x02}(c__builtin__\ncomplex\nG\x3f\xf0\0\0\0\0\0\0G\0\0\0\0\0\0\0\0\x86RK\x01\x88K\x02u.",
        &[],
    )?;
    assert_eq!(value.to_string(), "{(1+0j): 2}");
    Ok(())
}

#[test]
fn names_that_are_no_plain_data_are_all_listed() -> Result<()> {
    // The pickle is a list of an argparse.Namespace with a state, and builtins.eval("1").
    let pickle = b"\x80\x02](cargparse\nNamespace\n)\x81}X\x02\x00\x00\x00lrG?\x50\x62\x4d\xd2\xf1\xa9\xfcsbc__builtin__\neval\nX\x01\x00\x00\x001\x85Re.";
    let error = refused(pickle);
    assert!(error.contains("argparse.Namespace, builtins.eval"), "{error}");

    let allowing = Reader::new().allow("argparse.Namespace").allow("builtins.eval");
    let value = allowing.read_bytes(archive(&[("data.pkl", pickle)]))?;
    assert_eq!(
        value.to_string(),
        "[argparse.Namespace().__setstate__({'lr': 0.001}), builtins.eval('1',)]"
    );
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("objects.pt");
    pytorch::write(&path, &value)?;
    assert_eq!(allowing.read(&path)?.to_string(), value.to_string());
    Ok(())
}

#[test]
fn pickles_that_are_no_plain_data_are_refused() {
    let nested = |depth: usize, open: &[u8], close: &[u8]| {
        let closed = depth - usize::from(open == b"]");
        [b"\x80\x02".to_vec(), open.repeat(depth), close.repeat(closed), b".".to_vec()].concat()
    };
    // Each list holds the one before ten times, so whoever walks over it meets 10^30 values.
    let mut bomb = b"\x80\x02]q\x00".to_vec();
    for level in 1..=30u8 {
        bomb.extend(
            [b"](".to_vec(), [b'h', level - 1].repeat(10), b"eq".to_vec(), vec![level]].concat(),
        );
    }
    bomb.extend(b"\x85.");
    let bomb = [&b"\x80\x02("[..], &bomb[2..bomb.len() - 2], b"t."].concat();
    // Many sets are made from one long list, and each would be a copy of it.
    let mut copies = b"\x80\x02]q\x00(".to_vec();
    (0..60_000u32).for_each(|int| copies.extend([&b"J"[..], &int.to_le_bytes()].concat()));
    copies.extend(b"ec__builtin__\nset\nq\x010(");
    let copies =
        [&copies[..copies.len() - 2], b"\x85q\x02(", &b"h\x01h\x02R".repeat(10_000), b"t."]
            .concat();
    let tuple = |depth: usize| {
        let mut pickle = b"\x80\x02)q\x00".to_vec();
        (0..depth).for_each(|_| pickle.extend(b"h\x00\x86q\x00"));
        pickle
    };
    for (pickle, reason) in [
        (b"\x80\x02]q\x00h\x00a.".to_vec(), "within itself"),
        (b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s.".to_vec(), "within itself"),
        (nested(300, b"]", b"a"), "deep in each other"),
        (nested(300, b"(", b"t"), "deep in each other"),
        (nested(1000, b"(", b"t"), "deep in each other"),
        (bomb, "so often"),
        (copies, "damaged"),
        (
            [b"\x80\x02}".to_vec(), tuple(20)[2..].to_vec(), b"Ns.".to_vec()].concat(),
            "a key is too large",
        ),
        (b"\x80\x02}]Ns.".to_vec(), "a list cannot be a key"),
        (b"\x80\x02]}a]aK\x01K\x02.".to_vec(), "leaves values over"),
        (b"\x80\x02N".to_vec(), "ends too early"),
        (b"\x80\x02X\xff\xff\xff\xff.".to_vec(), "4294967295 bytes are claimed"),
        (b"\x80\x02\x8d\xff\xff\xff\xff\xff\xff\xff\xff.".to_vec(), "bytes are claimed"),
        (b"\x80\x02X\x01\x00\x00\x00\xff.".to_vec(), "UTF-8"),
        (b"\x80\x02h\x00.".to_vec(), "nothing was put at 0"),
        (b"\x80\x02a.".to_vec(), "a value is missing"),
        (b"\x80\x02N(a.".to_vec(), "a value is missing"),
        (b"\x80\x02K\x01K\x02a.".to_vec(), "no container"),
        (b"\x80\x02t.".to_vec(), "a mark is missing"),
        (b"\x80\x02(K\x01u.".to_vec(), "no value"),
        (b"\x80\x01N.".to_vec(), "protocol 1"),
        (b"\x80\x02N}b.".to_vec(), "what is no container"),
        (b"\x80\x02K\x05)R.".to_vec(), "no name"),
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.".to_vec(), "_rebuild_tensor_v2 is used"),
        (b"\x80\x02K\x05Q.".to_vec(), "a tuple is expected"),
        ([b"\x80\x02c".to_vec(), vec![b'x'; 5000], b"\n.".to_vec()].concat(), "too long"),
    ] {
        let shown = String::from_utf8_lossy(&pickle[..pickle.len().min(60)]).into_owned();
        let error = refused(&pickle);
        assert!(error.contains(reason), "{shown:?}: {error}");
    }
}

#[test]
fn small_files_that_stand_for_much_memory_are_refused() -> Result<()> {
    // Every 5 bytes of this pickle join two names of 1 kB.
    let name = "a".repeat(1000);
    let text = [b"X\xe8\x03\x00\x00", name.as_bytes()].concat();
    let mut pickle = [b"\x80\x04(", &text[..], b"q\x00", &text, b"q\x01"].concat();
    pickle.extend(b"h\x00h\x01\x93".repeat(40_000));
    pickle.extend(b"t.");
    let reader = Reader::new().allow(&format!("{name}.{name}"));
    let error = reader.read_bytes(archive(&[("data.pkl", &pickle)])).unwrap_err().to_string();
    assert!(error.contains("copies more than it holds"), "{error}");
    let error = refused(&pickle);
    assert!(error.contains("not plain data") && error.len() < 1000, "{error}");

    // The file has one element, which a tensor of 8 GB repeats.
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("expanded.pt");
    let huge = Tensor::zeros([1], (Kind::Uint8, Device::Cpu)).expand([1 << 33], false);
    pytorch::write(&path, &Value::tensor(&huge)?)?;
    let value = pytorch::read(&path)?;
    let stored = value.as_tensor().context("a tensor")?;
    assert_eq!(stored.tensor()?.size(), [1 << 33]);
    let error = stored.to_bytes().unwrap_err().to_string();
    assert!(error.contains("copies of a storage of 1"), "{error}");
    Ok(())
}

/// A pickle of a dict of one tensor "w". The numbers are the elements of its storage, and the tensor's offset, length
/// and stride.
fn one_tensor(class: &str, elements: u8, offset: u8, length: u8, stride: u8) -> Vec<u8> {
    let mut pickle =
        b"\x80\x02}X\x01\x00\x00\x00wctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storage"
            .to_vec();
    pickle.extend(format!("ctorch\n{class}\n").bytes());
    pickle.extend(b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpu");
    pickle
        .extend([b'K', elements, b't', b'Q', b'K', offset, b'K', length, 0x85, b'K', stride, 0x85]);
    pickle.extend(b"\x89ccollections\nOrderedDict\n)RtRs.");
    pickle
}

#[test]
fn tensors_reach_no_further_than_their_storages() -> Result<()> {
    let storage = [1f32, 2., 3., 4.].map(f32::to_le_bytes).concat();
    let read = |pickle: Vec<u8>| read_pickle(&pickle, &[("data/0", &storage)]);
    let values = |value: Value| -> Result<Vec<f64>> {
        let tensor = value.get("w").and_then(Value::as_tensor).context("a tensor")?.tensor()?;
        Ok(Vec::try_from(tensor)?)
    };
    assert_eq!(values(read(one_tensor("FloatStorage", 4, 1, 3, 1))?)?, [2., 3., 4.]);
    assert_eq!(values(read(one_tensor("FloatStorage", 4, 3, 2, 0))?)?, [4., 4.]);
    assert_eq!(values(read(one_tensor("FloatStorage", 4, 4, 0, 1))?)?, [0f64; 0]);
    for (pickle, reason) in [
        (one_tensor("FloatStorage", 4, 2, 3, 1), "outside its storage"),
        (one_tensor("FloatStorage", 4, 0, 4, 2), "outside its storage"),
        (one_tensor("FloatStorage", 4, 5, 0, 1), "outside its storage"),
        (one_tensor("FloatStorage", 5, 0, 4, 1), "should have 20 bytes and has 16"),
        (one_tensor("DoubleStorage", 4, 0, 4, 1), "should have 32 bytes and has 16"),
        (one_tensor("NoStorage", 4, 0, 4, 1), "torch.NoStorage"),
    ] {
        let error = read(pickle).unwrap_err().to_string();
        assert!(error.contains(reason), "{error}");
    }
    // Bools other than 0 and 1 are undefined behaviour for libtorch.
    let value = read_pickle(&one_tensor("BoolStorage", 2, 0, 2, 1), &[("data/0", &[1, 2])])?;
    let stored = value.get("w").and_then(Value::as_tensor).context("a tensor")?;
    let error = stored.tensor().unwrap_err().to_string();
    assert!(error.contains("true and false"), "{error}");
    Ok(())
}

#[test]
fn files_of_machines_with_the_other_byte_order_are_read() -> Result<()> {
    let storage = [1f32, -2.5].map(f32::to_be_bytes).concat();
    for (class, count, expected) in
        [("FloatStorage", 2, vec![1., -2.5]), ("ComplexFloatStorage", 1, vec![1., -2.5])]
    {
        let pickle = one_tensor(class, count, 0, count, 1);
        let files: [(&str, &[u8]); 3] =
            [("data.pkl", &pickle), ("byteorder", b"big"), ("data/0", &storage)];
        let value = Reader::new().read_bytes(archive(&files))?;
        let tensor = value.get("w").and_then(Value::as_tensor).context("a tensor")?.tensor()?;
        let tensor =
            if tensor.is_complex() { tensor.view_as_real().flatten(0, -1) } else { tensor };
        assert_eq!(Vec::<f64>::try_from(tensor)?, expected);
    }
    Ok(())
}

#[test]
fn archives_whose_parts_overlap_are_refused() -> Result<()> {
    // Two entries of the directory point to one file. Such entries could make many storages of a few bytes.
    let good = archive(&[("data.pkl", b"\x80\x02N."), ("data/0", &[0; 1000])]);
    assert!(matches!(Reader::new().read_bytes(good.clone())?, Value::None));
    let begin = good.windows(4).position(|bytes| bytes == b"PK\x01\x02").context("a directory")?;
    let end = good.windows(4).position(|bytes| bytes == b"PK\x05\x06").context("an end")?;
    let entry =
        good[begin..].windows(4).skip(1).position(|bytes| bytes == b"PK\x01\x02").context("two")?
            + 1;
    let mut bad = good[..end].to_vec();
    bad.extend(&good[begin + entry..end]);
    bad.extend(b"PK\x05\x06\0\0\0\0\x03\0\x03\0");
    bad.extend([(2 * end - 2 * begin - entry) as u32, begin as u32].map(u32::to_le_bytes).concat());
    bad.extend([0; 2]);
    let error = Reader::new().read_bytes(bad).unwrap_err().to_string();
    assert!(error.contains("two files"), "{error}");
    for (name, content) in [("constants.pkl", &b"\x80\x02N."[..]), ("other", b"")] {
        let error = Reader::new().read_bytes(archive(&[(name, content)])).unwrap_err().to_string();
        let reason = if name == "other" { "it has no 'data.pkl'" } else { "TorchScript" };
        assert!(error.contains(reason), "{error}");
    }
    for (bytes, reason) in [
        (&b""[..], "empty"),
        (b"PK\x03\x04", "cut off"),
        (b"hello", "no file of torch.save"),
        (b"\x08\0\0\0\0\0\0\0{      }", "safetensors"),
    ] {
        let error = Reader::new().read_bytes(bytes.to_vec()).unwrap_err().to_string();
        assert!(error.contains(reason), "{error}");
    }
    Ok(())
}

#[test]
fn a_damaged_storage_is_noticed_by_its_checksum() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("weights.pt");
    let vs = VarStore::new(Device::Cpu);
    let _weight = vs.root().ones("weight", &[100]);
    save_weights(&vs, &path, &Names::new())?;
    let mut bytes = fs::read(&path)?;
    let ones = 1f32.to_le_bytes().repeat(100);
    let at = bytes.windows(400).position(|window| window == ones).context("the storage")?;
    assert_eq!(at % 64, 0, "storages are aligned");
    bytes[at + 200] ^= 1;
    fs::write(&path, bytes)?;
    let error = load_weights(&vs, &path, &Names::new()).unwrap_err().to_string();
    assert!(error.contains("'weight'") && error.contains("checksum"), "{error}");
    let value = pytorch::read(&path)?;
    let stored = value.get("weight").and_then(Value::as_tensor).context("a tensor")?;
    assert!(stored.tensor().unwrap_err().to_string().contains("checksum"));
    Ok(())
}

#[test]
fn values_go_from_thread_to_thread() -> Result<()> {
    let value = std::sync::Arc::new(pytorch::read(golden().join("tensors-views.pt"))?);
    let tensors: Vec<_> = (0..4)
        .map(|_| {
            let value = value.clone();
            std::thread::spawn(move || {
                value.get("whole").and_then(Value::as_tensor).map(|t| t.tensor())
            })
        })
        .map(|thread| thread.join().ok().flatten().context("a tensor"))
        .collect::<Result<_>>()?;
    let addresses: Vec<_> =
        tensors.into_iter().map(|tensor| Ok(tensor?.data_ptr())).collect::<Result<_>>()?;
    assert!(addresses.windows(2).all(|pair| pair[0] == pair[1]), "it is read once");
    Ok(())
}

/// Calls everything that can be called on a value.
fn use_all(value: &Value) {
    let mut tensors: Vec<&StoredTensor> = vec![];
    value.walk(&mut |_, value| tensors.extend(value.as_tensor()));
    for tensor in tensors {
        // A hostile shape may claim any number of elements, so large tensors are left alone. The storage that is read
        // is no larger than the file.
        if tensor.tensor().is_ok() && tensor.numel() < 1 << 20 {
            let _ = tensor.to_bytes();
        }
    }
    let _ = Weights::of(value).map(|weights| format!("{weights:?}"));
    let _ = value.to_string();
}

#[test]
fn no_change_of_a_file_makes_a_panic_a_file_or_much_memory() -> Result<()> {
    let mut files = fixtures("tensors-")?;
    files.extend(fixtures("hostile-")?);
    let folder = tempfile::tempdir()?;
    let list = |folder: &Path| -> Result<usize> { Ok(fs::read_dir(folder)?.count()) };
    let here = list(Path::new("."))?;
    let mut outcomes = [0; 2];
    for (number, file) in files.iter().enumerate() {
        let whole = fs::read(file)?;
        // Without checksums, changed bytes reach the code behind that check.
        let mut open = whole.clone();
        let heads: Vec<_> = open
            .windows(4)
            .enumerate()
            .filter(|(_, w)| w.starts_with(b"PK\x01\x02"))
            .map(|(at, _)| at)
            .collect();
        heads.iter().for_each(|at| open[at + 16..at + 20].fill(0));
        // The one large file is tried less often, because reading it takes longer.
        let times = if whole.len() > 100_000 { 300 } else { 4000 };
        let mut random = Random(0x9e37_79b9_7f4a_7c15 ^ (number as u64 + 1));
        for time in 0..times {
            let mut bytes = if time % 8 == 0 { whole.clone() } else { open.clone() };
            for _ in 0..1 + random.below(4) {
                let (at, length) = (random.below(bytes.len()), bytes.len());
                match random.below(8) {
                    0 => bytes.truncate(at.max(1)),
                    1 => bytes[at] ^= 1 << random.below(8),
                    2 => bytes[at] = 0xff,
                    3 => {
                        bytes[at] =
                            b"(.]}\x85\x86\x87tabesuqhRQc)\x81\x94\x93\x95"[random.below(23)]
                    }
                    4 => {
                        let end = (at + 1 + random.below(16)).min(length);
                        let part = bytes[at..end].to_vec();
                        let to = random.below(length);
                        bytes.splice(to..to, part);
                    }
                    5 => {
                        let end = (at + 1 + random.below(16)).min(length);
                        bytes.drain(at..end);
                        if bytes.is_empty() {
                            bytes.push(0);
                        }
                    }
                    _ => bytes[at] = random.below(256) as u8,
                }
            }
            let most = 2 * bytes.len() as i64 + (1 << 20);
            let (result, peak) = memory::read(&Reader::new(), bytes);
            assert!(
                peak <= most,
                "{}: {peak} bytes, and {most} are twice the file",
                file.display()
            );
            match result {
                Ok(value) => {
                    let ((), peak) = memory::counted(|| use_all(&value));
                    assert!(peak < 48 << 20, "{}: {peak} bytes to use it", file.display());
                    outcomes[0] += 1;
                }
                Err(error) => {
                    assert!(!error.to_string().is_empty());
                    outcomes[1] += 1;
                }
            }
        }
    }
    println!("{} read, {} refused", outcomes[0], outcomes[1]);
    assert!(outcomes[0] > 1000 && outcomes[1] > 1000, "{outcomes:?}");
    assert_eq!((list(folder.path())?, list(Path::new("."))?), (0, here), "a file was made");
    assert!(!Path::new("pwned").exists());
    Ok(())
}

// These tests are about weights and names.

pub(crate) fn small(root: &nn::Path) {
    let _conv = nn::conv2d(root / "0", 1, 4, 3, Default::default());
    let _norm = nn::batch_norm2d(root / "1", 4, Default::default());
    let _linear = nn::linear(root / "4", 144, 3, Default::default());
}

pub(crate) fn values(vs: &VarStore) -> Vec<(String, Vec<f64>)> {
    let mut values: Vec<_> = vs
        .variables()
        .into_iter()
        .map(|(name, tensor)| {
            (name, Vec::try_from(tensor.detach().flatten(0, -1).to_kind(Kind::Double)).unwrap())
        })
        .collect();
    values.sort_by(|(a, _), (b, _)| a.cmp(b));
    values
}

#[test]
fn a_store_is_loaded_from_a_state_dict_of_python() -> Result<()> {
    let _guard = serial();
    let vs = VarStore::new(Device::Cpu);
    small(&vs.root());
    let loaded = load_weights(&vs, golden().join("tensors-state-dict.pt"), &Names::new())?;
    assert_eq!(loaded.unexpected, ["1.num_batches_tracked"]);
    assert_eq!(
        loaded.to_string(),
        "8 variables loaded\n  without a place in the store: 1.num_batches_tracked"
    );
    let text = fs::read_to_string(golden().join("tensors-state-dict.json"))?;
    let json: serde_json::Value = serde_json::from_str(&text)?;
    for (name, values) in values(&vs) {
        let data: Vec<f64> = serde_json::from_value(json[format!("/{name}")]["data"].clone())?;
        assert_eq!(values, data, "{name}");
    }
    // Gradients are recorded as before.
    assert!(vs.trainable_variables().iter().all(Tensor::requires_grad));
    assert_eq!(vs.trainable_variables().len(), 6);
    // The numbers are converted to the store's type.
    let mut double = VarStore::new(Device::Cpu);
    small(&double.root());
    double.double();
    load_weights(&double, golden().join("tensors-state-dict.pt"), &Names::new())?;
    assert_eq!(values(&double), values(&vs));
    Ok(())
}

#[test]
fn names_are_mapped_and_misfits_are_listed() -> Result<()> {
    let _guard = serial();
    let file = golden().join("tensors-module-prefix.pt");
    let vs = VarStore::new(Device::Cpu);
    small(&vs.root());
    let before = values(&vs);

    let error = Weights::read(&file).unwrap_err().to_string();
    assert!(
        error.contains("'epoch' is a int") || error.contains("weights are in 'state_dict'"),
        "{error}"
    );
    let checkpoint = pytorch::read(&file)?;
    let weights = Weights::of(checkpoint.require("state_dict")?)?;
    let error = weights.load(&vs).unwrap_err().to_string();
    assert!(error.starts_with("16 of 17 do not fit"), "{error}");
    assert!(error.contains("not in the file: 0.bias, 0.weight, 1.bias"), "{error}");
    assert!(error.contains(r#"Names::new().strip_prefix("module._orig_mod.")"#), "{error}");
    assert_eq!(values(&vs), before, "refused means untouched");

    let names = Names::new().strip_prefix("module.").strip_prefix("_orig_mod.");
    let fitting = weights.clone().rename(&names)?;
    assert_eq!(fitting.compare(&vs).loaded.len(), 8);
    let loaded = fitting.load(&vs)?;
    assert!(loaded.fits() && loaded.missing.is_empty());
    let expected = VarStore::new(Device::Cpu);
    small(&expected.root());
    load_weights(&expected, golden().join("tensors-state-dict.pt"), &Names::new())?;
    assert_eq!(values(&vs), values(&expected));

    // The store has another head, whose shape the error tells; the rest can be loaded.
    let other = VarStore::new(Device::Cpu);
    let root = other.root();
    let _parts = (
        nn::conv2d(&root / "0", 1, 4, 3, Default::default()),
        nn::linear(&root / "4", 144, 10, Default::default()),
        nn::linear(&root / "new", 2, 2, Default::default()),
    );
    let error = fitting.load(&other).unwrap_err().to_string();
    assert!(error.starts_with("8 of 11 do not fit"), "{error}");
    assert!(error.contains("4.bias is [10] here and [3] in the file"), "{error}");
    let loaded = fitting.load_partial(&other)?;
    assert_eq!(loaded.loaded, ["0.bias", "0.weight"]);
    assert_eq!(loaded.missing, ["new.bias", "new.weight"]);
    assert_eq!(loaded.mismatched.len(), 2);
    let without_head = fitting.clone().rename(&Names::new().skip("4.*"))?;
    assert_eq!(without_head.compare(&other).skipped, ["4.weight", "4.bias"]);
    let both =
        Weights::rename(fitting, &Names::new().map(|_| "same".into())).unwrap_err().to_string();
    assert!(both.contains("would both be named 'same'"), "{both}");
    assert_ne!(Loaded::default().to_string(), "");
    Ok(())
}

#[test]
fn variables_of_any_layout_are_loaded() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("views.pt");
    // The tensors are parts of one storage and have other strides than the store's, one of which has channels last.
    let all = Tensor::arange(48, (Kind::Float, Device::Cpu));
    let mut state = Dict::ordered();
    state.insert("image", Value::tensor(&all.narrow(0, 0, 24).view([2, 3, 2, 2]))?);
    state.insert("turned", Value::tensor(&all.narrow(0, 12, 24).view([4, 6]).tr())?);
    state.insert("half", Value::tensor(&all.narrow(0, 40, 4).to_kind(Kind::Half))?);
    pytorch::write(&path, &state.into())?;
    let vs = VarStore::new(Device::Cpu);
    let root = vs.root();
    let channels_last =
        Tensor::empty_strided([2, 3, 2, 2], [12, 1, 6, 3], (Kind::Float, Device::Cpu));
    let image = root.add("image", channels_last, true);
    let (turned, half) = (root.zeros("turned", &[6, 4]), root.zeros("half", &[4]));
    load_weights(&vs, &path, &Names::new())?;
    assert_eq!(image.stride(), [12, 1, 6, 3]);
    assert_eq!(
        Vec::<f64>::try_from(image.detach().flatten(0, -1))?,
        (0..24).map(f64::from).collect::<Vec<_>>()
    );
    assert_eq!(f64::try_from(turned.get(1).get(2))?, 25.);
    assert_eq!(Vec::<f64>::try_from(half.detach())?, [40., 41., 42., 43.]);
    Ok(())
}

/// A store in float64 whose last layer has the embedding's weight. The weight's second name, `lm_head.weight`, comes
/// before its first, `wte.weight`, in the alphabet.
fn tied() -> VarStore {
    let mut vs = VarStore::new(Device::Cpu);
    let root = vs.root();
    let wte = (&root / "wte").ones("weight", &[4, 3]);
    let _fc = nn::linear(&root / "fc", 3, 2, Default::default());
    let _weight = (&root / "lm_head").add("weight", wte, true);
    let _bias = (&root / "lm_head").zeros("bias", &[4]);
    vs.double();
    vs
}

/// The names in the order in which Python's `state_dict()` of that model has them.
const TIED: [&str; 5] = ["wte.weight", "fc.weight", "fc.bias", "lm_head.weight", "lm_head.bias"];

#[test]
fn a_tied_tensor_is_saved_and_loaded_under_all_its_names() -> Result<()> {
    let _guard = serial();
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("tied.pt");
    let vs = tied();
    let expected = ["lm_head.weight", "wte.weight", "fc.weight", "fc.bias", "lm_head.bias"];
    for _ in 0..10 {
        assert_eq!(Weights::of_store(&tied())?.names(), expected);
    }
    tch::no_grad(|| vs.variables().values().for_each(|v| drop(v.shallow_clone().fill_(3.))));
    save_weights(&vs, &path, &Names::new())?;
    let weights = Weights::read(&path)?;
    assert_eq!(weights.names(), expected);
    let get = |name: &str| weights.get(name).context("a tensor");
    assert!(get("wte.weight")?.shares_storage_with(get("lm_head.weight")?));
    let other = tied();
    let loaded = weights.load(&other)?;
    assert_eq!(loaded.loaded.len(), 5);
    assert_eq!(values(&other), values(&vs));
    let script = r#"
state = torch.load(sys.argv[1], weights_only=True)
print(json.dumps([list(state), state["wte.weight"].data_ptr() == state["lm_head.weight"].data_ptr()]))
"#;
    let Some(output) = python(script, &[&path])? else { return Ok(()) };
    let read: (Vec<String>, bool) = serde_json::from_str(&output)?;
    assert_eq!(read, (expected.map(str::to_owned).to_vec(), true));
    Ok(())
}

#[test]
fn moments_of_tied_parameters_go_to_the_right_parameters() -> Result<()> {
    let _guard = serial();
    let (vs, other) = (tied(), tied());
    let optimizer = Optimizer::adam(&vs).build()?;
    let all = vs.trainable_variables();
    let loss = all.iter().map(|v| v.square().sum(Kind::Double)).sum::<Tensor>();
    optimizer.backward_step(&loss)?;
    let saved = pytorch::optimizer_value(&optimizer, &TIED)?;
    let shape = |number: &str| {
        let moment = saved.get("state")?.get(number)?.get("exp_avg")?.as_tensor()?;
        Some(moment.size().to_vec())
    };
    let shapes: Vec<_> = ["0", "1", "2", "3"].map(shape).into_iter().flatten().collect();
    assert_eq!(shapes, [vec![4, 3], vec![2, 3], vec![2], vec![4]]);
    assert!(shape("4").is_none());

    let mut loaded = Optimizer::adam(&other).build()?;
    pytorch::load_optimizer(&mut loaded, &saved, &TIED)?;
    let states = |optimizer: &Optimizer| -> Result<Vec<(String, String)>> {
        let state = optimizer.state_dict()?;
        Ok(state
            .tensors()
            .map(|(name, tensor)| (name.into(), tensor.to_string(20).unwrap_or_default()))
            .collect())
    };
    let expected = states(&optimizer)?;
    assert_eq!(expected.len(), 8);
    assert_eq!(states(&loaded)?, expected);

    // A state whose parts do not belong together is refused before anything is copied.
    let with = |part: &str, value: Value| -> Result<Value> {
        let state = saved.require("state")?;
        let mut parts = state.require("2")?.as_dict().context("a dict")?.clone();
        parts.insert(part, value);
        let (mut states, mut changed) = (Dict::new(), saved.as_dict().context("a dict")?.clone());
        states.push(2, parts);
        changed.insert("state", states);
        Ok(changed.into())
    };
    let huge = Tensor::zeros([1], (Kind::Double, Device::Cpu)).expand([1 << 33], false);
    for (part, value, reason) in [
        ("step", Value::None, "'fc.bias' has tensors but no step"),
        ("exp_avg", Value::tensor(&huge)?, "'fc.bias/exp_avg' is of shape [8589934592]"),
    ] {
        let error = pytorch::load_optimizer(&mut loaded, &with(part, value)?, &TIED);
        let error = error.unwrap_err().to_string();
        assert!(error.contains(reason), "{error}");
    }

    // Python's optimizer may have names itself, the first one for a tied parameter.
    let group = |names: &[&str]| -> Result<Value> {
        let groups = saved.require("param_groups")?.as_slice().context("groups")?;
        let mut group = groups[0].as_dict().context("a group")?.clone();
        group.insert("param_names", Value::list(names.iter().copied()));
        let mut named = saved.as_dict().context("a dict")?.clone();
        named.insert("param_groups", Value::list([group]));
        Ok(named.into())
    };
    let mut loaded = Optimizer::adam(&other).build()?;
    let python = ["wte.weight", "fc.weight", "fc.bias", "lm_head.bias"];
    pytorch::load_optimizer(&mut loaded, &group(&python)?, &[])?;
    assert_eq!(states(&loaded)?, expected);
    let twice = ["wte.weight", "lm_head.weight", "fc.bias", "lm_head.bias"];
    let error = pytorch::load_optimizer(&mut loaded, &group(&twice)?, &[]).unwrap_err().to_string();
    assert!(error.contains("'lm_head.weight' is in group") && error.contains("twice"), "{error}");
    Ok(())
}

#[test]
fn a_run_of_python_goes_on_here_as_it_would_have_there() -> Result<()> {
    let _guard = serial();
    let mut runs = 0;
    for file in fixtures("handover-")? {
        let results = interop::handover(&file)?.context("an optimizer that is not here")?;
        assert!(results.len() >= 4);
        for (path, result) in results {
            assert_eq!(result, Ok(()), "{} {path}", file.display());
        }
        runs += 1;
    }
    assert_eq!(runs, 8);
    Ok(())
}

/// A network with two groups, in float64.
fn grouped(name: &str) -> Result<(VarStore, Optimizer, nn::Sequential)> {
    let mut vs = VarStore::new(Device::Cpu);
    let net = nn::seq()
        .add(nn::linear(vs.root() / "base", 3, 5, Default::default()))
        .add_fn(|x| x.tanh())
        .add(nn::linear(vs.root() / "fc", 5, 2, Default::default()));
    vs.double();
    fn two_groups<T: nn::OptimizerConfig>(
        builder: OptimizerBuilder<'_, T>,
    ) -> tch_ignite::Result<Optimizer> {
        builder
            .group("base", |name| name.starts_with("base"), lr(0.01).weight_decay(0.1))
            .group("fc", |name| name.starts_with("fc"), lr(0.05))
            .build()
    }
    let optimizer = match name {
        "Adam" => two_groups(Optimizer::adam(&vs))?,
        "Adagrad" => two_groups(Optimizer::adagrad(&vs))?,
        "ASGD" => two_groups(Optimizer::asgd(&vs))?,
        "Adafactor" => two_groups(Optimizer::adafactor(&vs))?,
        _ => two_groups(Optimizer::builder(nn::sgd(0.9, 0., 0., false), &vs))?,
    };
    Ok((vs, optimizer, net))
}

fn step(optimizer: &Optimizer, net: &nn::Sequential, iteration: i64) -> Result<f64> {
    let x = Tensor::arange(12, (Kind::Double, Device::Cpu)).view([4, 3]) * 0.1
        + iteration as f64 * 0.01;
    let loss = x.apply(net).square().mean(Kind::Double);
    optimizer.backward_step(&loss)?;
    Ok(f64::try_from(loss)?)
}

#[test]
fn states_of_another_optimizer_are_refused_and_change_nothing() -> Result<()> {
    let _guard = serial();
    let read = |name: &str| pytorch::read(golden().join(format!("handover-{name}.pt")));
    let (_vs, mut optimizer, net) = grouped("Adam")?;
    step(&optimizer, &net, 0)?;
    let before = format!("{:?}", optimizer);
    let adam = read("adam")?;
    for (saved, names, reason) in [
        (read("sgd")?, vec![], "group 'base' has no amsgrad"),
        (read("adamw")?, vec![], "it is of AdamW, and this is Adam"),
        (
            adam.clone(),
            vec!["base.weight", "base.bias", "fc.weight"],
            "'fc.bias' is not among the names",
        ),
        (
            adam.clone(),
            vec!["base.bias", "base.weight", "fc.weight", "fc.bias"],
            "base.bias/exp_avg",
        ),
    ] {
        let error = pytorch::load_optimizer(&mut optimizer, saved.require("optimizer")?, &names);
        let error = error.unwrap_err().to_string();
        assert!(error.contains(reason), "{error}");
        assert_eq!(format!("{optimizer:?}"), before);
    }
    let loaded = pytorch::load_optimizer(&mut optimizer, adam.require("optimizer")?, &[])?;
    assert_eq!(loaded.loaded, ["base.bias", "base.weight", "fc.bias", "fc.weight"]);
    assert_eq!(
        loaded.to_string(),
        "state of 4 parameters loaded; ignored: base.initial_lr, fc.initial_lr"
    );
    assert!(optimizer.group("base")?.amsgrad()?);
    Ok(())
}

// These tests let Python's torch read our files and write files for us.

#[test]
fn a_run_that_begins_here_goes_on_in_python_and_back() -> Result<()> {
    let _guard = serial();
    let folder = tempfile::tempdir()?;
    let (path, back) = (folder.path().join("run.pt"), folder.path().join("back.pt"));
    // NAdam is not among them: Python makes its mu_product float64 when it loads a state, and rounds differently then.
    for name in ["Adam", "SGD", "Adagrad", "ASGD", "Adafactor"] {
        let (vs, optimizer, net) = grouped(name)?;
        for iteration in 0..5 {
            step(&optimizer, &net, iteration)?;
        }
        let mut checkpoint = Dict::new();
        checkpoint.insert("model", Weights::of_store(&vs)?.to_value());
        checkpoint.insert("optimizer", pytorch::optimizer_value(&optimizer, &[])?);
        pytorch::write(&path, &checkpoint.into())?;
        let uninterrupted: Vec<f64> =
            (5..15).map(|iteration| step(&optimizer, &net, iteration)).collect::<Result<_>>()?;
        let script = r#"
saved = torch.load(sys.argv[1], weights_only=True, mmap=True)
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.base, self.fc = torch.nn.Linear(3, 5, dtype=torch.float64), torch.nn.Linear(5, 2, dtype=torch.float64)
    def forward(self, x):
        return self.fc(self.base(x).tanh())
net = Net()
net.load_state_dict(saved["model"])
optimizer = getattr(torch.optim, sys.argv[3])([{"params": net.base.parameters()}, {"params": net.fc.parameters()}], lr=7.0)
optimizer.load_state_dict(saved["optimizer"])
losses = []
for iteration in range(5, 10):
    x = torch.arange(12, dtype=torch.float64).view(4, 3) * 0.1 + iteration * 0.01
    loss = net(x).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, sys.argv[2])
print(json.dumps(losses))
"#;
        let Some(output) = python(script, &[&path, &back, Path::new(name)])? else { return Ok(()) };
        let mut losses: Vec<f64> = serde_json::from_str(&output)?;
        let (vs, mut optimizer, net) = grouped(name)?;
        let saved = pytorch::read(&back)?;
        Weights::of(saved.require("model")?)?.load(&vs)?;
        pytorch::load_optimizer(&mut optimizer, saved.require("optimizer")?, &[])?;
        for iteration in 10..15 {
            losses.push(step(&optimizer, &net, iteration)?);
        }
        for (ours, expected) in losses.iter().zip(&uninterrupted) {
            assert!(
                (ours - expected).abs() <= 1e-12,
                "{name}: {losses:?} instead of {uninterrupted:?}"
            );
        }
    }
    Ok(())
}

/// Runs Python with this script and these arguments; `None` where it has no torch.
fn python(script: &str, arguments: &[&Path]) -> Result<Option<String>> {
    python_with("TORCH_PYTHON", "torch, ignite, safetensors", script, arguments)
}

/// Runs the Python that a variable names; `None` where it has not all of these modules.
fn python_with(
    variable: &str,
    modules: &str,
    script: &str,
    arguments: &[&Path],
) -> Result<Option<String>> {
    let name = std::thread::current().name().unwrap_or_default().to_owned();
    let Some(python) = common::python(&name, variable, modules) else {
        return Ok(None);
    };
    let script = format!("{HELPERS}\n{script}");
    let output = Command::new(&python).arg("-c").arg(script).args(arguments).output()?;
    let errors = String::from_utf8_lossy(&output.stderr);
    anyhow::ensure!(output.status.success(), "Python: {errors}");
    Ok(Some(String::from_utf8(output.stdout)?))
}

/// Runs a Python that has these modules of libraries on top of torch: that of `TRANSFORMERS_PYTHON`, or of `TORCH_PYTHON`.
fn python_of_libraries(modules: &str, script: &str, arguments: &[&Path]) -> Result<Option<String>> {
    let own = std::env::var_os("TRANSFORMERS_PYTHON").is_some();
    let variable = if own { "TRANSFORMERS_PYTHON" } else { "TORCH_PYTHON" };
    python_with(variable, modules, script, arguments)
}

const HELPERS: &str = r#"
import sys, json, zipfile, collections, warnings
warnings.filterwarnings("ignore")
import torch

def same(a, b, path="", seen=None):
    """Whether two values are the same in Python, also in what they share."""
    seen = {} if seen is None else seen
    assert type(a) is type(b) or isinstance(a, tuple) and isinstance(b, tuple), (path, type(a), type(b))
    if isinstance(a, torch.Tensor):
        assert (a.dtype, a.shape, a.layout, a.requires_grad) == (b.dtype, b.shape, b.layout, b.requires_grad), path
        if a.layout is torch.strided and not a.is_quantized:
            assert (a.stride(), a.storage_offset(), a.is_conj()) == (b.stride(), b.storage_offset(), b.is_conj()), path
            key = a.untyped_storage()._cdata
            assert seen.setdefault(("storage", key), b.untyped_storage()._cdata) == b.untyped_storage()._cdata, path
            if a.dtype in (torch.uint16, torch.uint32, torch.uint64, torch.complex32) or "float8" in str(a.dtype):
                a, b = a.view(torch.uint8), b.view(torch.uint8)
        a, b = (a.dequantize(), b.dequantize()) if a.is_quantized else (a.to_dense(), b.to_dense())
        assert torch.equal(a.resolve_conj().nan_to_num(7), b.resolve_conj().nan_to_num(7)) if a.is_floating_point() else torch.equal(a, b), path
    elif isinstance(a, dict):
        assert list(a) == list(b), path
        for key in a:
            same(a[key], b[key], f"{path}/{key}", seen)
        if hasattr(a, "__dict__"):
            same(a.__dict__, b.__dict__, f"{path}.__dict__", seen)
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        assert seen.setdefault(id(a), id(b)) == id(b) or isinstance(a, tuple), path
        for index, (x, y) in enumerate(zip(a, b)):
            same(x, y, f"{path}/{index}", seen)
    elif isinstance(a, float):
        assert a == b or a != a and b != b, path
    else:
        assert a == b, (path, a, b)
"#;

#[test]
fn python_reads_what_is_written_as_what_it_wrote() -> Result<()> {
    let folder = tempfile::tempdir()?;
    for file in fixtures("tensors-")? {
        let copy = folder.path().join(file.file_name().context("a name")?);
        pytorch::write(&copy, &pytorch::read(&file)?)?;
    }
    let script = r#"
import pathlib
for copy in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    assert zipfile.ZipFile(copy).testzip() is None
    original = torch.load(pathlib.Path(sys.argv[2]) / copy.name, weights_only="protocol4" not in copy.name)
    for mmap in (False, True):
        same(original, torch.load(copy, weights_only=True, mmap=mmap))
    reader = torch._C.PyTorchFileReader(str(copy))
    for record in reader.get_all_records():
        assert reader.get_record_offset(record) % 64 == 0, record
    print(copy.name)
"#;
    if let Some(output) = python(script, &[folder.path(), &golden()])? {
        assert_eq!(output.lines().count(), 8, "{output}");
    }
    Ok(())
}

#[test]
fn all_plain_data_of_python_comes_back() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (one, two) = (folder.path().join("one.pt"), folder.path().join("two.pt"));
    let script = r#"
x = torch.arange(6.).view(2, 3)
parameter = torch.nn.Parameter(x.clone())
parameter.note = 3
shared = [1, 2]
values = {
    "set": {3}, "empty_set": set(), "bytes": b"\xff\x00'a", "bytearray": bytearray(b"ab"),
    "complex": [1 + 2j, -0.5j], "dtype": torch.float32, "layout": torch.strided,
    "device": torch.device("cuda:1"), "cpu": torch.device("cpu"), "size": torch.Size([2, 3]),
    "counter": collections.Counter("aab"), "ordered": collections.OrderedDict(b=1, a=2),
    "ints": [0, 255, 256, 65535, 65536, -1, -2**31, 2**31, 2**63 - 1, -2**63, 2**63, -2**200],
    "floats": [0.1, 1e300, -0.0, float("inf"), float("nan")], "text": "\u00fc\n'\U0001f600", "none": None,
    (1, "a"): {2.5: True, None: False}, "shared": [shared, shared],
    "tensors": {str(dtype): torch.ones(3).to(dtype) for dtype in (
        torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2,
        torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float16, torch.bfloat16, torch.complex32, torch.bool)},
    "conjugate": torch.complex(x, x).conj(), "parameter": parameter, "grad": x.clone().requires_grad_(),
    "scalar": torch.tensor(2.5), "large": torch.arange(100_000),
    "frozen": torch.nn.Parameter(x.clone(), requires_grad=False),
    "sparse": torch.eye(3).to_sparse(), "csr": torch.eye(3).to_sparse_csr(),
    "quantized": torch.quantize_per_tensor(x, 0.1, 2, torch.qint8),
}
torch.save(values, sys.argv[1])
torch.load(sys.argv[1], weights_only=True)
torch.serialization.set_crc32_options(False)
torch.save(values, sys.argv[2])
texts = {str(k): str(v) for k, v in values.items() if not isinstance(v, torch.Tensor)}
del texts["tensors"], texts["ordered"], texts["counter"]
print(json.dumps(texts))
"#;
    let Some(output) = python(script, &[&one, &two])? else { return Ok(()) };
    let texts: serde_json::Map<String, serde_json::Value> = serde_json::from_str(&output)?;
    for path in [&one, &two] {
        let value = pytorch::read(path)?;
        let dict = value.as_dict().context("a dict")?;
        for (key, text) in &texts {
            let found =
                dict.iter().find(|(k, _)| k.as_str().map_or(k.to_string(), str::to_owned) == *key);
            let (_, found) = found.context(key.clone())?;
            let (text, shown) = (text.as_str().context("a text")?, found.to_string());
            let shown = match (key.as_str(), found) {
                ("text", Value::Str(text)) => text.to_string(),
                ("size", _) => format!("torch.Size({})", shown.replace('(', "[").replace(')', "]")),
                ("bytearray", _) => format!("bytearray({shown})"),
                _ => shown,
            };
            assert_eq!(shown, text, "{key}");
        }
        for name in ["sparse", "csr", "quantized"] {
            let object = value.require(name)?;
            assert!(matches!(object, Value::Object(_)), "{name}: {object}");
        }
        let tensors = value.require("tensors")?.as_dict().context("a dict")?;
        for (name, tensor) in tensors.iter() {
            let tensor = tensor.as_tensor().context("a tensor")?;
            assert_eq!(Some(tensor.dtype().name()), name.as_str());
            match tensor.dtype().kind() {
                Some(_) => assert_eq!(tensor.tensor()?.size(), [3]),
                None => {
                    assert!(tensor.tensor().unwrap_err().to_string().contains("tch has no type"))
                }
            }
            assert_eq!(tensor.to_bytes()?.len() as u64, 3 * tensor.dtype().size());
        }
        let uint16 = tensors.get("torch.uint16").and_then(Value::as_tensor).context("uint16")?;
        assert_eq!((uint16.dtype(), uint16.to_bytes()?), (DType::UInt16, vec![1, 0, 1, 0, 1, 0]));
        let conjugate = value.require("conjugate")?.as_tensor().context("a tensor")?.tensor()?;
        assert_eq!(f64::try_from(conjugate.imag().sum(Kind::Double))?, -15.);
        // Python finds the same values in a file that we write again.
        pytorch::write(folder.path().join("again.pt"), &value)?;
        let script = r#"
one, two = (torch.load(path, weights_only=True) for path in sys.argv[1:])
vars(one["parameter"]).clear()
one["bytearray"], two["bytearray"] = bytes(one["bytearray"]), bytes(two["bytearray"])
same(one, two)
same(one, torch.load(sys.argv[2], weights_only=True, mmap=True) | {"bytearray": one["bytearray"]})
"#;
        python(script, &[path, &folder.path().join("again.pt")])?;
    }
    Ok(())
}

#[test]
fn python_goes_on_with_weights_of_a_store() -> Result<()> {
    let _guard = serial();
    let folder = tempfile::tempdir()?;
    let (path, back) = (folder.path().join("model.pt"), folder.path().join("back.pt"));
    let vs = VarStore::new(Device::Cpu);
    small(&vs.root());
    save_weights(&vs, &path, &Names::new().add_prefix("net."))?;
    let script = r#"
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(144, 3))
    def forward(self, x):
        return self.net(x)
net = Net()
net.load_state_dict(torch.load(sys.argv[1], weights_only=True, mmap=True))
net(torch.rand(5, 1, 8, 8)).sum().backward()
torch.optim.SGD(net.parameters(), 0.5).step()
torch.save(net.state_dict(), sys.argv[2])
print(json.dumps({name: tensor.flatten().double().tolist() for name, tensor in net.state_dict().items()}))
"#;
    let Some(output) = python(script, &[&path, &back])? else { return Ok(()) };
    let expected: std::collections::BTreeMap<String, Vec<f64>> = serde_json::from_str(&output)?;
    let before = values(&vs);
    load_weights(&vs, &back, &Names::new().strip_prefix("net."))?;
    assert_ne!(values(&vs), before);
    for (name, values) in values(&vs) {
        assert_eq!(Some(&values), expected.get(&format!("net.{name}")), "{name}");
    }
    Ok(())
}

/// Sizes and positions in this file need more than 32 bits. Run it with `--ignored`.
#[test]
#[ignore = "takes 5 GB of disk and memory: cargo test --release --features distributed,mlflow --test pytorch files_of_more_than_4_gb -- --ignored"]
fn files_of_more_than_4_gb_are_read_by_both() -> Result<()> {
    let folder = tempfile::tempdir_in("target")?;
    let path = folder.path().join("large.pt");
    let large = Tensor::zeros([(1 << 32) + 1000], (Kind::Uint8, Device::Cpu));
    let _ = large.narrow(0, 1 << 32, 1000).fill_(3);
    let mut state = Dict::ordered();
    state.insert("large", Value::tensor(&large)?);
    drop(large);
    state.insert("behind", Value::tensor(&Tensor::from_slice(&[1.5, 2.5]))?);
    pytorch::write(&path, &state.into())?;
    let value = pytorch::read(&path)?;
    let stored = |name: &str| value.get(name).and_then(Value::as_tensor).context("a tensor");
    assert_eq!(Vec::<f64>::try_from(stored("behind")?.tensor()?)?, [1.5, 2.5]);
    let large = stored("large")?.tensor()?;
    assert_eq!(i64::try_from(large.narrow(0, (1 << 32) - 5, 1005).sum(Kind::Int64))?, 3000);
    let script = r#"
state = torch.load(sys.argv[1], weights_only=True, mmap=True)
assert state["behind"].tolist() == [1.5, 2.5] and state["large"][2**32 - 5:].sum().item() == 3000
print(zipfile.ZipFile(sys.argv[1]).infolist()[-1].filename)
"#;
    python(script, &[&path])?;
    Ok(())
}
