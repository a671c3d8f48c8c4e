//! Folders of Hugging Face: read whole and in shards, and written so that safetensors reads them.

use std::fs;
use std::path::Path;

use anyhow::Result;
use tch::nn::VarStore;
use tch::{Device, Kind, Tensor};
use tch_ignite::pytorch::{Names, SavePretrained, Weights, read_pretrained};

use super::{python, serial, small, values};

fn names(folder: &Path) -> Result<Vec<String>> {
    let mut names: Vec<_> = fs::read_dir(folder)?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect::<Result<_>>()?;
    names.sort();
    Ok(names)
}

#[test]
fn a_store_is_written_in_shards_and_read_again() -> Result<()> {
    let _guard = serial();
    let temporary = tempfile::tempdir()?;
    let (folder, from) = (temporary.path().join("to"), temporary.path().join("from"));
    fs::create_dir(&from)?;
    for name in
        ["config.json", "tokenizer.json", "vocab.txt", "model.safetensors.index.json", "notes.bin"]
    {
        fs::write(from.join(name), name)?;
    }
    let vs = VarStore::new(Device::Cpu);
    small(&vs.root());
    let save = SavePretrained::new().names(Names::new().add_prefix("net.")).like(&from);
    let load = |folder: &Path| -> Result<Vec<(String, Vec<f64>)>> {
        let other = VarStore::new(Device::Cpu);
        small(&other.root());
        read_pretrained(folder)?.rename(&Names::new().strip_prefix("net."))?.load(&other)?;
        Ok(values(&other))
    };
    let rest = ["config.json", "tokenizer.json", "vocab.txt"];

    save.save(&vs, &folder)?;
    assert_eq!(names(&folder)?, ["config.json", "model.safetensors", rest[1], rest[2]]);
    assert_eq!(load(&folder)?, values(&vs));
    assert_eq!(read_pretrained(folder.join("model.safetensors"))?.names().len(), 8);

    // Fewer bytes than the largest tensor has: it has a shard of its own. What was there before goes.
    save.clone().max_shard_size(200).save(&vs, &folder)?;
    let shards = names(&folder)?;
    assert!(
        shards.len() > 5 && shards.contains(&"model.safetensors.index.json".into()),
        "{shards:?}"
    );
    assert!(!shards.contains(&"model.safetensors".into()), "{shards:?}");
    assert_eq!(load(&folder)?, values(&vs));
    // Weights that are read may be written over the files that they come from.
    let weights = read_pretrained(&folder)?;
    SavePretrained::new().max_shard_size(1000).save_weights(&weights, &folder)?;
    assert_eq!(load(&folder)?, values(&vs));
    let script = r#"
import pathlib
from safetensors import safe_open
from safetensors.torch import load_file
folder = pathlib.Path(sys.argv[1])
index = json.loads((folder / "model.safetensors.index.json").read_text())
loaded = {}
for file in sorted(set(index["weight_map"].values())):
    with safe_open(folder / file, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    shard = load_file(folder / file)
    assert all(index["weight_map"][name] == file for name in shard)
    loaded |= shard
assert set(loaded) == set(index["weight_map"])
assert index["metadata"]["total_size"] == sum(tensor.numel() * tensor.element_size() for tensor in loaded.values())
print(json.dumps({name.removeprefix("net."): tensor.flatten().double().tolist() for name, tensor in sorted(loaded.items())}))
"#;
    if let Some(output) = python(script, &[&folder])? {
        let found: std::collections::BTreeMap<String, Vec<f64>> = serde_json::from_str(&output)?;
        assert_eq!(found.into_iter().collect::<Vec<_>>(), values(&vs));
    }
    save.save(&vs, &folder)?;
    assert_eq!(names(&folder)?, ["config.json", "model.safetensors", rest[1], rest[2]]);

    for (text, reason) in [
        (r#"{"weight_map": {"w": "../model.safetensors"}}"#, "lies elsewhere"),
        (r#"{"weight_map": {"w": "model.safetensors"}}"#, "'w' is not in model.safetensors"),
        (r#"{"weight_map": {"w": "none.safetensors"}}"#, "none.safetensors"),
        (r#"{"weight_map": ["w"]}"#, "invalid type"),
    ] {
        let damaged = tempfile::tempdir()?;
        fs::copy(folder.join("model.safetensors"), damaged.path().join("model.safetensors"))?;
        fs::rename(
            damaged.path().join("model.safetensors"),
            damaged.path().join("one.safetensors"),
        )?;
        let text = text.replace("\"model.safetensors\"", "\"one.safetensors\"");
        fs::write(damaged.path().join("model.safetensors.index.json"), text)?;
        let error = read_pretrained(damaged.path()).unwrap_err().to_string();
        assert!(
            error.contains(&reason.replace("model.", "one.")) || error.contains(reason),
            "{error}"
        );
    }
    let error = read_pretrained(temporary.path()).unwrap_err().to_string();
    assert!(error.contains("there is no model.safetensors or pytorch_model.bin"), "{error}");
    Ok(())
}

#[test]
fn distributed_checkpoints_are_read_and_written() -> Result<()> {
    let _guard = serial();
    let temporary = tempfile::tempdir()?;
    let (there, here) = (temporary.path().join("there"), temporary.path().join("here"));
    let vs = VarStore::new(Device::Cpu);
    small(&vs.root());
    SavePretrained::new().max_shard_size(1000).save(&vs, &here)?;
    let script = r#"
import os, torch.distributed as dist, torch.distributed.checkpoint as dcp, torch.multiprocessing as mp
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.tensor import DeviceMesh, Replicate, Shard, distribute_tensor
def rank(number, folder, store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=number, world_size=2)
    mesh, x = DeviceMesh("cpu", [0, 1]), torch.arange(35, dtype=torch.float64).view(5, 7)
    state = {"rows": distribute_tensor(x, mesh, [Shard(0)]), "columns": distribute_tensor(x, mesh, [Shard(1)]),
             "same": distribute_tensor(x, mesh, [Replicate()])}
    dcp.save(state, storage_writer=HuggingFaceStorageWriter(folder, save_distributed=True))
    dist.destroy_process_group()
mp.start_processes(rank, (sys.argv[1], sys.argv[1] + ".store"), 2, start_method="fork")
state = {name: torch.zeros(shape) for name, shape in json.loads(sys.argv[3]).items()}
dcp.load(state, storage_reader=HuggingFaceStorageReader(sys.argv[2]), no_dist=True)
print(json.dumps({name: tensor.flatten().double().tolist() for name, tensor in sorted(state.items())}))
"#;
    let shapes: std::collections::BTreeMap<_, _> =
        vs.variables().into_iter().map(|(name, variable)| (name, variable.size())).collect();
    let shapes = serde_json::to_string(&shapes)?;
    let Some(output) = python(script, &[&there, &here, Path::new(&shapes)])? else { return Ok(()) };
    let last = output.lines().last().unwrap_or_default();
    let found: std::collections::BTreeMap<String, Vec<f64>> = serde_json::from_str(last)?;
    assert_eq!(found.into_iter().collect::<Vec<_>>(), values(&vs));

    assert_eq!(names(&there)?.len(), 2);
    let check = |weights: &Weights| -> Result<()> {
        assert_eq!(weights.names(), ["columns", "rows", "same"]);
        for (name, tensor) in weights.iter() {
            let expected = Tensor::arange(35, (Kind::Double, Device::Cpu)).view([5, 7]);
            assert!(tensor.tensor()?.equal(&expected), "{name}");
        }
        Ok(())
    };
    check(&read_pretrained(&there)?)?;
    let [one, two] = &names(&there)?[..] else { anyhow::bail!("two files") };
    let (one, two) = (there.join(one), there.join(two));
    // A rank that saved nothing writes no file, and the mapping of files may name one that nobody wrote.
    for (rank, count) in [(3, 1), (3, 2)] {
        let other = there.join(format!("shard-{rank:05}-model-00001-of-{count:05}.safetensors"));
        fs::rename(&two, &other)?;
        check(&read_pretrained(&there)?)?;
        fs::rename(&other, &two)?;
    }
    // A rank's file is missing: the first one's is noticed by what its tensors lack, and told by the numbers.
    let kept = temporary.path().join("one");
    fs::rename(&one, &kept)?;
    let error = read_pretrained(&there).unwrap_err().to_string();
    assert!(error.contains("cannot be put together: its parts have"), "{error}");
    assert!(error.contains("the files of rank 1 of at least 2 are missing"), "{error}");
    fs::rename(&two, &one)?;
    let error = read_pretrained(&there).unwrap_err().to_string();
    assert!(error.contains("cannot be put together") && !error.contains("perhaps"), "{error}");
    let other = there.join("shard-00001-model-00001-of-00002.safetensors");
    fs::rename(&one, &other)?;
    let error = read_pretrained(&there).unwrap_err().to_string();
    assert!(error.contains("perhaps a file 2 of 2 is missing"), "{error}");
    fs::remove_file(&other)?;
    // The last one's is noticed by the shapes.
    fs::rename(&kept, &one)?;
    let vs = VarStore::new(Device::Cpu);
    for name in ["rows", "columns", "same"] {
        let _ = vs.root().ones(name, &[5, 7]);
    }
    let error = read_pretrained(&there)?.load(&vs).unwrap_err().to_string();
    assert!(error.contains("rows is [5, 7] here and [3, 7] in the file"), "{error}");
    assert!(values(&vs).iter().all(|(_, values)| values.iter().all(|value| *value == 1.)));
    Ok(())
}

#[test]
fn files_of_python_are_read_with_all_types_and_tied_names() -> Result<()> {
    let temporary = tempfile::tempdir()?;
    let folder = temporary.path();
    let script = r#"
import pathlib
from safetensors.torch import save_file, save_model
folder = pathlib.Path(sys.argv[1])
x = torch.arange(6).view(2, 3)
types = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
         torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64)
tensors = {str(dtype): x.to(dtype) for dtype in types} | {"torch.bool": x > 2, "torch.complex64": x * (1 + 2j)}
save_file(tensors | {"empty": torch.zeros(0, 3), "scalar": torch.tensor(2.5)}, folder / "model.safetensors")
class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.wte, self.head = torch.nn.Embedding(5, 3), torch.nn.Linear(3, 5, bias=False)
        self.head.weight = self.wte.weight
save_model(Tied(), folder / "tied.safetensors")
(folder / "old").mkdir()
torch.save({"a": x.float()}, folder / "old" / "pytorch_model-00001-of-00002.bin")
torch.save({"b": x.double()}, folder / "old" / "pytorch_model-00002-of-00002.bin")
(folder / "old" / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {
    "a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}}))
print()
"#;
    if python(script, &[folder])?.is_none() {
        return Ok(());
    }
    let weights = read_pretrained(folder)?;
    assert_eq!(weights.names().len(), 18);
    for (name, tensor) in weights.iter().filter(|(name, _)| name.starts_with("torch.")) {
        assert_eq!((tensor.dtype().name(), tensor.size()), (name, &[2, 3][..]));
        if tensor.dtype().kind().is_some() && !name.contains("float8") {
            let expected = Tensor::arange(6, (Kind::Double, Device::Cpu)).view([2, 3]);
            let expected = if name == "torch.bool" { expected.gt(2.) } else { expected };
            let read = tensor.tensor()?;
            let read = if read.is_complex() { read.real() } else { read };
            let same = read.to_kind(Kind::Double).equal(&expected.to_kind(Kind::Double));
            assert!(same, "{name}");
        }
    }
    let tied = read_pretrained(folder.join("tied.safetensors"))?;
    let mut names = tied.names();
    names.sort_unstable();
    assert_eq!(names, ["head.weight", "wte.weight"]);
    assert_eq!(read_pretrained(folder.join("old"))?.names(), ["a", "b"]);

    // A store whose variable is tied needs one of its names.
    let vs = VarStore::new(Device::Cpu);
    let wte = (vs.root() / "wte").zeros("weight", &[5, 3]);
    let _ = (vs.root() / "head").add("weight", wte, false);
    let one = tied.rename(&Names::new().only("wte.*"))?;
    let loaded = one.load(&vs)?;
    assert_eq!((loaded.loaded, loaded.missing), (vec!["wte.weight".to_owned()], vec![]));
    Ok(())
}
