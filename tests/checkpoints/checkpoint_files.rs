//! Tests of files that are damaged, hostile or large: reading them must give an error or a state, and never panic,
//! hang or take much more memory than the file has bytes.

use std::io::Write;
use std::path::Path;
use std::process::Command;

use tch::nn::VarStore;
use tch::{Device, Kind, Tensor};
use tch_ignite::Result;
use tch_ignite::checkpoint::{
    Checkpoint, StateDict, load_part, load_weights, read_state, save_weights, verify, write_state,
};
use tch_ignite::engine::{Engine, Until};
use tch_ignite::metrics::Mean;

use crate::common;
use crate::common::serial;

fn store() -> VarStore {
    let vs = VarStore::new(Device::Cpu);
    let root = vs.root();
    let _variables = (root.ones("weight", &[2, 3]), root.zeros_no_train("buffer", &[4]));
    vs
}

type Small = Engine<'static, (), i64, f64>;

fn small(vs: &VarStore) -> Small {
    let mut trainer = Engine::new(|_: &mut (), _, batch: i64| Ok(batch as f64));
    trainer.track("model", vs).track_output().metric("mean", Mean::new());
    trainer
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

/// Corrects the checksum, if there is one, and the length of the header.
fn mend(bytes: &mut [u8]) {
    let key = b"\"crc32c\":\"";
    let place = bytes.windows(key.len()).position(|window| window == key);
    let Some(digits) = place.and_then(|at| bytes.get_mut(at + key.len()..at + key.len() + 8))
    else {
        return;
    };
    digits.copy_from_slice(b"00000000");
    let crc = format!("{:08x}", crc32c::crc32c(&bytes[8..]));
    let at = place.unwrap() + key.len();
    bytes[at..at + 8].copy_from_slice(crc.as_bytes());
}

/// Changes bytes at random, as a faulty disk or an attacker could.
fn mutate(bytes: &mut Vec<u8>, random: &mut Random) {
    let len = bytes.len();
    match random.below(9) {
        0 | 1 => bytes[random.below(len)] ^= 1 << random.below(8),
        2 => bytes[random.below(len)] = random.below(256) as u8,
        3 => bytes.truncate(random.below(len)),
        4 => {
            let from = random.below(len);
            bytes.drain(from..(from + 1 + random.below(20)).min(len));
        }
        5 => {
            let at = random.below(len);
            let new: Vec<_> = (0..=random.below(20)).map(|_| random.below(256) as u8).collect();
            bytes.splice(at..at, new);
        }
        6 => {
            let (from, to) = (random.below(len), random.below(len));
            let block = bytes[from..(from + random.below(40)).min(len)].to_vec();
            bytes.splice(to..to, block);
        }
        7 => {
            // Changes a digit of the JSON, where shapes, positions and counts are.
            let digits: Vec<_> = (8..len).filter(|at| bytes[*at].is_ascii_digit()).collect();
            if let Some(at) = digits.get(random.below(digits.len())) {
                bytes[*at] = b'0' + random.below(10) as u8;
            }
        }
        _ => {
            let zeros = random.below(len)..len;
            bytes[zeros].fill(0);
        }
    }
}

/// Replaces a file by a new one, because some file systems wait for the disk when a file is overwritten.
fn rewrite(path: &Path, bytes: &[u8]) {
    std::fs::remove_file(path).unwrap();
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn ten_thousand_corrupted_files_are_errors_or_whole_but_never_panics() -> Result<()> {
    let _serial = serial();
    let folder = tempfile::tempdir().unwrap();
    let mut trainer = small(&store());
    trainer.attach(Checkpoint::new(folder.path()).n_saved(1));
    trainer.run(&mut (), vec![1, 2], Until::epochs(1))?;
    let path = folder.path().join("checkpoint_2.safetensors");
    let whole = std::fs::read(&path).unwrap();
    let weights = folder.path().join("weights");
    save_weights(&store(), &weights)?;
    let plain = std::fs::read(&weights).unwrap();
    let rounds = if std::env::var_os("TCH_IGNITE_LONG_TESTS").is_some() { 300_000 } else { 10_000 };
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let (vs, mut read, mut refused) = (store(), 0, 0);
    for round in 0..rounds {
        let is_plain = round % 4 == 3;
        let original = if is_plain { &plain } else { &whole };
        let mut bytes = original.clone();
        for _ in 0..=random.below(3) {
            if !bytes.is_empty() {
                mutate(&mut bytes, &mut random);
            }
        }
        // Every other file gets a right checksum, so that the code behind that check is reached too.
        let mended = round % 2 == 0;
        if mended {
            mend(&mut bytes);
        }
        let outcome = if is_plain {
            rewrite(&weights, &bytes);
            load_weights(&vs, &weights)
        } else {
            rewrite(&path, &bytes);
            let mut next = small(&vs);
            next.attach(Checkpoint::new(folder.path()));
            let strict = round % 3 != 0;
            assert!(verify(&path).is_err() == read_state(&path).is_err() || mended);
            next.resume_with(&mut (), folder.path(), strict).map(drop)
        };
        match outcome {
            Ok(()) => read += 1,
            Err(error) => {
                assert!(!error.to_string().contains("panicked"), "{error}");
                refused += 1;
            }
        }
        assert!(mended || bytes == *original || is_plain || read_state(&path).is_err(), "{round}");
    }
    println!("{read} could be read, {refused} were refused");
    assert!(refused > rounds / 2 && read > 0);
    Ok(())
}

/// Writes a file with this header and `data` bytes of tensors.
fn file(path: &Path, header: &str, data: u64) {
    let mut file = std::io::BufWriter::new(std::fs::File::create(path).unwrap());
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(header.as_bytes()).unwrap();
    file.flush().unwrap();
    file.get_ref().set_len(8 + header.len() as u64 + data).unwrap();
}

/// A header that claims a tensor of this many bytes, in the part `model` under this name.
fn claim(bytes: u64, listed: &str) -> String {
    format!(
        r#"{{"__metadata__":{{"crc32c":"00000000","state":"{{\"parts\":{{\"model\":{{\"tensors\":[\"{listed}\"]}}}}}}","tch-ignite":"1"}},"model/weight":{{"data_offsets":[0,{bytes}],"dtype":"U8","shape":[{bytes}]}}}}"#
    )
}

/// More bytes than any machine has.
const HUGE: u64 = 1 << 42;

#[test]
fn a_claim_of_huge_tensors_takes_no_memory() {
    let _serial = serial();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("checkpoint_1.safetensors");
    let vs = store();
    let refused = |what: &str, result: Result<()>, why: &str| {
        let error = result.unwrap_err().to_string();
        assert!(error.contains(why), "{what}: {error}");
    };
    let resumed = || small(&vs).resume(&mut (), folder.path()).map(drop);
    // The file is shorter than its header says.
    file(&path, &claim(HUGE, "weight"), 8);
    let why = "bytes of tensors, and holds 8";
    refused("read_state", read_state(&path).map(drop), why);
    refused("verify", verify(&path), why);
    refused("load_weights", load_weights(&vs, &path), why);
    refused("load_part", load_part(&vs, &path, "model"), why);
    refused("load_checkpoint", small(&vs).load_checkpoint(&mut (), &path, true).map(drop), why);
    refused("resume", resumed(), why);
    // The file is as long as it says, though nothing of it is on the disk.
    file(&path, &claim(HUGE, "weight"), HUGE);
    refused("load_weights", load_weights(&vs, &path), "it is a training checkpoint");
    refused("load_part", load_part(&vs, &path, "model"), "'buffer' is missing");
    refused("resume", resumed(), "'buffer' is missing");
    file(&path, &claim(HUGE, "other"), HUGE);
    refused("read_state", read_state(&path).map(drop), "belongs to no part");
    // The file has weights without a state.
    let header = claim(HUGE, "weight");
    let tensors = &header[header.rfind("\"model/weight\"").unwrap()..];
    file(&path, &format!("{{{tensors}"), HUGE);
    refused("load_weights", load_weights(&vs, &path), "'buffer' is missing");
}

/// About the longest header that the reader accepts.
const LENGTH: usize = 27_900_000;

/// JSON of nearly that length: `begin`, then as many numbered `part`s as fit, then `end`.
fn filled(begin: &str, part: &str, end: &str, escapes: bool) -> String {
    let most = LENGTH - begin.len() - end.len();
    let mut text = String::with_capacity(LENGTH);
    text += begin;
    let part = if escapes { part.replace('"', "\\\"") } else { part.to_owned() };
    for number in 0.. {
        let part = part.replace('#', &format!("{number:x}"));
        if text.len() + part.len() > most {
            break;
        }
        text += &part;
    }
    text + end
}

const VARIANT: &str = "TCH_IGNITE_TEST_HEADER";

/// The most memory that the process has had so far, in MB.
#[cfg(target_os = "linux")]
fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() / 1024
}

#[cfg(target_os = "linux")]
#[test]
fn a_hostile_header_takes_150_mb_at_most() {
    const NAME: &str = "a_hostile_header_takes_150_mb_at_most";
    if let Some(path) = std::env::var_os(VARIANT) {
        let warm = std::path::Path::new(&path).with_extension("warm");
        write_state(&warm, &StateDict::new()).unwrap();
        read_state(&warm).unwrap();
        let before = peak();
        let refused = read_state(&path).err().map_or_else(String::new, |error| error.to_string());
        println!("\ntook {} {refused:.300}", peak() - before);
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("hostile");
    let state = |begin: &str| {
        format!(r#"{{"__metadata__":{{"tch-ignite":"1","crc32c":"00000000","state":"{begin}"#)
    };
    // These states have nearly as many values or tensors as a state may have.
    let many = |begin: &str, part: &str, end: &str, count: usize| {
        let numbered = (0..count).map(|number| part.replace('#', &format!("{number:x}")));
        let parts = numbered.collect::<String>().replace('"', "\\\"");
        format!("{}{parts}{end}", state(begin))
    };
    let tensors = |count: usize| {
        let names: String = (0..count).map(|number| format!(r#"\"{number:x}\","#)).collect();
        let tensors = (0..count).map(|number| {
            format!(r#""{number:x}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}},"#)
        });
        let state = format!(r#"{{\"tensors\":[{}]}}"#, names.trim_end_matches(','));
        format!(
            r#"{{{}"__metadata__":{{"tch-ignite":"1","crc32c":"00000000","state":"{state}"}}}}"#,
            tensors.collect::<String>()
        )
    };
    let headers: [(&str, &dyn Fn() -> String); 13] = [
        ("tensors", &|| {
            filled(
                "{",
                r##""#":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"##,
                r#""z":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}"#,
                false,
            )
        }),
        ("dimensions", &|| {
            filled(r#"{"a":{"dtype":"U8","shape":["#, "0,", r#"0],"data_offsets":[0,0]}}"#, false)
        }),
        ("metadata", &|| filled(r#"{"__metadata__":{"#, r##""#":"","##, r#""z":""}}"#, false)),
        ("values", &|| filled(&state(r#"{\"values\":{\"a\":["#), "0,", r#"0]}}"}}"#, true)),
        ("keys", &|| filled(&state(r#"{\"values\":{"#), r##""#":0,"##, r#"\"z\":0}}"}}"#, true)),
        ("parts", &|| filled(&state(r#"{\"parts\":{"#), r##""#":{},"##, r#"\"z\":{}}}"}}"#, true)),
        ("names", &|| filled(&state(r#"{\"tensors\":["#), r##""","##, r#"\"\"]}"}}"#, true)),
        ("some keys", &|| many(r#"{\"values\":{"#, r##""#":0,"##, r#"\"z\":0}}"}}"#, 780_000)),
        ("some texts", &|| many(r#"{\"values\":{\"a\":["#, r##""#","##, r#"0]}}"}}"#, 780_000)),
        ("some lists", &|| many(r#"{\"values\":{\"a\":["#, "[0],", r#"0]}}"}}"#, 400_000)),
        ("some objects", &|| many(r#"{\"values\":{\"a\":["#, r#"{"":0},"#, r#"0]}}"}}"#, 120_000)),
        ("some parts", &|| {
            many(r#"{\"parts\":{"#, r##""#":{"parts":{"":{}}},"##, r#"\"z\":{}}}"}}"#, 45_000)
        }),
        ("some tensors", &|| tensors(115_000)),
    ];
    for (what, header) in headers {
        file(&path, &header(), 0);
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", &common::exact(module_path!(), NAME)])
            .args(["--nocapture", "--test-threads=1"])
            .env(VARIANT, &path)
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        let line = text.lines().find(|line| line.starts_with("took")).unwrap_or_else(|| {
            panic!("{what}: {text} {}", String::from_utf8_lossy(&output.stderr))
        });
        let took: u64 = line.split(' ').nth(1).unwrap().parse().unwrap();
        println!(
            "{what}: {took} MB of {} MB: {line:.200}",
            std::fs::metadata(&path).unwrap().len() / 1_000_000
        );
        assert!(took < 150, "{what}: {line}");
        // Cases named "some" stay below the limits and must be read; the others may be refused for a limit.
        let is_read = !line.contains("the limit");
        assert!(is_read || !what.starts_with("some"), "{what}: {line}");
    }
}

#[test]
fn too_many_values_are_refused_when_they_are_written() {
    let _serial = serial();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state");
    let mut state = StateDict::new();
    state.set_value("few", vec!["a, b, c, [ \"d\", { \\"; 300_000]).unwrap();
    write_state(&path, &state).unwrap();
    let few: Vec<String> = read_state(&path).unwrap().value("few").unwrap();
    assert_eq!(few.len(), 300_000);
    state.set_value("many", vec![0; 1_500_000]).unwrap();
    let error = format!("{:#}", anyhow::Error::from(write_state(&path, &state).unwrap_err()));
    assert!(error.contains("put long lists into tensors"), "{error}");
}

#[test]
fn names_that_would_meet_in_the_file_are_kept_apart() -> Result<()> {
    let _serial = serial();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state");
    let number = |value: f64| Tensor::from_slice(&[value]).to_kind(Kind::Double);
    let part = |name: &str, value| {
        let mut part = StateDict::new();
        part.set_tensor(name, number(value));
        part
    };
    let mut state = part("a/b/c", 1.);
    state.set_tensor("a/b/c'", number(2.));
    state.set_tensor("__metadata__", number(3.));
    state.set_part("a/b", part("c", 4.));
    let mut outer = part("b/c", 5.);
    outer.set_part("b", part("c", 6.));
    state.set_part("a", outer);
    write_state(&path, &state)?;
    let read = read_state(&path)?;
    let value = |state: &StateDict, name: &str| state.tensor(name).unwrap().double_value(&[0]);
    let (a, b) = (read.part("a")?, read.part("a/b")?);
    let all = [
        value(&read, "a/b/c"),
        value(&read, "a/b/c'"),
        value(&read, "__metadata__"),
        value(b, "c"),
        value(a, "b/c"),
        value(a.part("b")?, "c"),
    ];
    assert_eq!(all, [1., 2., 3., 4., 5., 6.]);
    Ok(())
}

#[test]
fn hostile_strides_and_names_are_errors() {
    let _serial = serial();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state");
    for state in [
        r#"{\"tensors\":[\"a\"],\"strides\":{\"a\":[9223372036854775807,1]}}"#,
        r#"{\"tensors\":[\"a\"],\"strides\":{\"a\":[1,1]}}"#,
        r#"{\"tensors\":[\"a\"],\"strides\":{\"a\":[-1,2]}}"#,
        r#"{\"tensors\":[\"a\"],\"strides\":{\"a\":[1]}}"#,
        r#"{\"tensors\":[\"a\"],\"renamed\":{\"a\":\"b\"}}"#,
        r#"{\"tensors\":[\"a\",\"a\"]}"#,
        r#"{\"tensors\":[]}"#,
    ] {
        let header = format!(
            r#"{{"__metadata__":{{"crc32c":"00000000","state":"{state}","tch-ignite":"1"}},"a":{{"data_offsets":[0,4],"dtype":"U8","shape":[2,2]}}}}"#
        );
        file(&path, &header, 4);
        let mut bytes = std::fs::read(&path).unwrap();
        mend(&mut bytes);
        std::fs::write(&path, &bytes).unwrap();
        verify(&path).unwrap();
        assert!(read_state(&path).is_err(), "{state}");
    }
    for header in [
        r#"{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}"#,
        r#"{"__metadata__":{},"__metadata__":{}}"#,
        r#"{"__metadata__":{"tch-ignite":"1","tch-ignite":"1"}}"#,
    ] {
        file(&path, header, 0);
        let error = load_weights(&store(), &path).unwrap_err().to_string();
        assert!(error.contains("two") || error.contains("twice"), "{error}");
    }
}

#[test]
fn damaged_weights_are_noticed() -> Result<()> {
    let _serial = serial();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("weights.safetensors");
    save_weights(&store(), &path)?;
    load_weights(&store(), &path)?;
    let mut bytes = std::fs::read(&path).unwrap();
    save_weights(&store(), &path)?;
    assert_eq!(bytes, std::fs::read(&path).unwrap(), "the same weights are the same bytes");
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&path, bytes).unwrap();
    let error = load_weights(&store(), &path).unwrap_err().to_string();
    assert!(error.contains("the file is damaged"), "{error}");
    Ok(())
}

/// One matrix under the names `emb.weight` and `head.weight`, and a bias.
fn tied(value: f64, kind: Kind) -> (VarStore, Tensor) {
    let mut vs = VarStore::new(Device::Cpu);
    vs.set_kind(kind);
    let root = vs.root();
    let w = (&root / "head").var("weight", &[2, 3], tch::nn::Init::Const(value));
    let _ = (&root / "emb").add("weight", w.shallow_clone(), true);
    let _ = (&root / "head").var("bias", &[2], tch::nn::Init::Const(value));
    (vs, w)
}

const TIED_MODEL: &str = r#"
import sys, torch
from safetensors import safe_open
from safetensors.torch import load_file, load_model, save_model

class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.head = torch.nn.Embedding(2, 3), torch.nn.Linear(3, 2)
        self.head.weight = self.emb.weight

ours, theirs, checkpoint = sys.argv[1:]
model = Tied()
load_model(model, ours)
print(sorted(load_file(ours)), sorted(load_file(checkpoint)))
print(model.head.weight is model.emb.weight, model.head.weight.flatten().tolist(), model.head.bias.tolist())
with torch.no_grad():
    model.emb.weight.copy_(torch.arange(6.).view(2, 3))
save_model(model, theirs)
print(safe_open(theirs, "pt").metadata())
"#;

/// Lazily negated tensors have other values than their bytes say.
#[test]
fn lazily_negated_tensors_keep_their_signs() -> Result<()> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state.safetensors");
    let real = Tensor::arange(4, (Kind::Double, Device::Cpu)) + 1.;
    let mut state = StateDict::new();
    state.set_tensor("negated", real.internal_neg_view());
    state.set_tensor("imaginary", Tensor::complex(&real, &(&real * 3.)).conj().imag());
    assert!(state.tensor("negated")?.is_neg() && state.tensor("imaginary")?.is_neg());
    write_state(&path, &state)?;
    let state = read_state(&path)?;
    assert_eq!(state.tensor("negated")?, &-&real);
    assert_eq!(state.tensor("imaginary")?, &(&real * -3.));
    Ok(())
}

#[test]
fn a_tied_tensor_is_written_once_and_found_under_both_names() -> Result<()> {
    let _serial = serial();
    let folder = tempfile::tempdir().unwrap();
    let (path, checkpoint) = (folder.path().join("a.safetensors"), folder.path().join("b"));
    let (vs, w) = tied(0.1, Kind::Float);
    save_weights(&vs, &path)?;
    // The file must hold the matrix once: two matrices would be 48 bytes.
    let data = |path: &Path| {
        let bytes = std::fs::read(path).unwrap();
        bytes.len() as u64 - 8 - u64::from_le_bytes(bytes[..8].try_into().unwrap())
    };
    assert_eq!(data(&path), 24 + 8);
    let (other, v) = tied(0., Kind::Float);
    load_weights(&other, &path)?;
    assert_eq!(v, w);
    assert_eq!(other.variables()["emb.weight"].data_ptr(), v.data_ptr());

    // The file loads into a store that has one of the two names, and into one whose two names are separate tensors.
    let one = VarStore::new(Device::Cpu);
    let emb = (one.root() / "emb").zeros("weight", &[2, 3]);
    let _ = (one.root() / "head").zeros("bias", &[2]);
    load_weights(&one, &path)?;
    assert_eq!(emb, w);
    let apart = VarStore::new(Device::Cpu);
    let (emb, head) = (
        (apart.root() / "emb").zeros("weight", &[2, 3]),
        (apart.root() / "head").zeros("weight", &[2, 3]),
    );
    let _ = (apart.root() / "head").zeros("bias", &[2]);
    load_weights(&apart, &path)?;
    assert_eq!((&emb, &head), (&w, &w));
    // Two equal tensors of a file can be loaded into one tied variable, two different ones cannot.
    let untied = folder.path().join("untied.safetensors");
    save_weights(&apart, &untied)?;
    assert_eq!(data(&untied), 24 + 24 + 8);
    load_weights(&other, &untied)?;
    assert_eq!(v, w);
    tch::no_grad(|| drop(head.shallow_clone().fill_(7.)));
    save_weights(&apart, &untied)?;
    let error = load_weights(&other, &untied).unwrap_err().to_string();
    for part in ["'emb.weight'", "'head.weight'", "one variable here"] {
        assert!(error.contains(part), "{error}");
    }
    assert_eq!(v, w);
    save_weights(&one, &untied)?;
    load_weights(&other, &untied)?;

    let mut state = StateDict::new();
    let mut model = StateDict::new();
    for (name, tensor) in vs.variables() {
        model.set_tensor(&name, tensor);
    }
    state.set_part("model", model);
    write_state(&checkpoint, &state.copy()?)?;
    assert_eq!(data(&checkpoint), 24 + 8);
    let read = read_state(&checkpoint)?;
    let model = read.part("model")?;
    assert_eq!(model.tensor("head.weight")?, &w);
    assert_eq!(model.tensor("head.weight")?.data_ptr(), model.tensor("emb.weight")?.data_ptr());

    let python = std::env::var("TORCH_PYTHON").unwrap_or_else(|_| "python3".into());
    let theirs = folder.path().join("theirs.safetensors");
    let output =
        Command::new(python).args(["-c", TIED_MODEL]).args([&path, &theirs, &checkpoint]).output();
    match output {
        Ok(output) if output.status.success() => {
            let tenth = 0.1f32 as f64;
            let matrix = vec![tenth; 6];
            let expected = format!(
                "['emb.weight', 'head.bias'] ['model/emb.weight', 'model/head.bias']\nTrue {matrix:?} {:?}\n{}\n",
                &matrix[..2],
                "{'head.weight': 'emb.weight'}"
            );
            assert_eq!(String::from_utf8_lossy(&output.stdout), expected);
            load_weights(&other, &theirs)?;
            assert_eq!(
                Vec::<f32>::try_from(&v.detach().view([-1])).unwrap(),
                [0., 1., 2., 3., 4., 5.]
            );
        }
        _ => eprintln!(
            "SKIPPED: there is no Python with torch and safetensors to read the file (TORCH_PYTHON)"
        ),
    }
    Ok(())
}

/// A name that means something in the metadata must not be mistaken for metadata.
#[test]
fn a_tied_tensor_may_have_any_names() -> Result<()> {
    let _serial = serial();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state");
    let names = [
        "a",
        "crc32c",
        "format",
        "kept",
        "state",
        "tch-ignite",
        "written",
        "x\"crc32c",
        "z/y",
        "__metadata__",
    ];
    let vs = VarStore::new(Device::Cpu);
    let w = vs.root().ones("a", &[2]);
    let mut state = StateDict::new();
    for name in names {
        state.set_tensor(name, w.shallow_clone());
        if name != "a" && !name.starts_with('_') {
            let _ = vs.root().add(name, w.shallow_clone(), false);
        }
    }
    write_state(&path, &state)?;
    verify(&path)?;
    let read = read_state(&path)?;
    assert_eq!(read.tensors().count(), names.len());
    assert!(read.tensors().all(|(_, tensor)| *tensor == w));
    save_weights(&vs, &path)?;
    tch::no_grad(|| drop(w.shallow_clone().fill_(5.)));
    load_weights(&vs, &path)?;
    assert_eq!(w, w.ones_like());
    Ok(())
}

#[test]
fn other_names_that_a_hostile_file_gives_do_no_harm() {
    let _serial = serial();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("weights.safetensors");
    let a = r#""a":{"data_offsets":[0,0],"dtype":"F32","shape":[0]}"#;
    for (texts, names) in [
        (r#""b":"a","c":"b","d":"none","a":"a","":"a""#, vec!["", "a", "b"]),
        (r#""b":"a","b":"a""#, vec!["a", "b"]),
    ] {
        file(&path, &format!(r#"{{"__metadata__":{{{texts}}},{a}}}"#), 0);
        let vs = VarStore::new(Device::Cpu);
        for name in &names {
            let _ = vs.root().zeros(name, &[0]);
        }
        load_weights(&vs, &path).unwrap();
        let _ = vs.root().zeros("c", &[0]);
        assert!(load_weights(&vs, &path).unwrap_err().to_string().contains("'c' is missing"));
    }
}
