//! Models of Transformers and timm: read from what these libraries write, trained here, and loaded there again.

use std::path::Path;

use anyhow::{Context, Result};
use tch::nn::{self, VarStore};
use tch::{Device, Kind, Tensor};
use tch_ignite::optim::Optimizer;
use tch_ignite::pytorch::{Names, SavePretrained, Weights, read_pretrained, save_weights};

use super::{python_of_libraries, serial};

/// A store with the names and shapes of these weights, filled with them. tch's batch norm has no counters.
fn loaded(weights: &Weights) -> Result<VarStore> {
    let vs = VarStore::new(Device::Cpu);
    for (name, tensor) in weights.iter().filter(|(name, _)| !name.ends_with("num_batches_tracked"))
    {
        let (modules, last) = name.rsplit_once('.').unwrap_or(("", name));
        let modules = modules.split('.').filter(|module| !module.is_empty());
        let path = modules.fold(vs.root(), |path, module| path / module);
        let _ = match last.starts_with("running_") {
            true => path.zeros_no_train(last, tensor.size()),
            false => path.zeros(last, tensor.size()),
        };
    }
    weights.load(&vs)?;
    Ok(vs)
}

/// Trains until all parameters are half of what they were: a step of half the gradient of the sum of their squares.
fn train(vs: &VarStore) -> Result<()> {
    let optimizer = Optimizer::builder(nn::sgd(0., 0., 0., false), vs).lr(0.5).build()?;
    let squares = vs.trainable_variables().into_iter().map(|w| (&w * &w).sum(Kind::Float) * 0.5);
    let loss: Tensor = squares.sum();
    Ok(optimizer.backward_step(&loss)?)
}

/// Weights have to be equal. Those that are read from a file may be aligned otherwise in memory, so that vectorised kernels
/// add in another order: outputs are as close as that leaves them.
const COMPARED: &str = r#"
def same_models(ours, theirs):
    state = theirs.state_dict()
    assert set(ours.state_dict()) == set(state)
    for name, tensor in ours.state_dict().items():
        assert "num_batches_tracked" in name or tensor.dtype == state[name].dtype and torch.equal(tensor, state[name]), name
def same_outputs(ours, theirs, name):
    tolerance = 2**-6 if theirs.dtype is torch.bfloat16 else 1e-5
    assert theirs.std() > 0 and (ours - theirs).abs().max() <= tolerance * theirs.abs().max(), name
"#;

/// Small models with random weights, by name: each with an input.
const TRANSFORMERS: &str = r#"
import os, pathlib
os.environ["HF_HUB_OFFLINE"] = "1"
from transformers import (
    BertConfig, BertForMaskedLM, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM,
    ResNetConfig, ResNetForImageClassification, T5Config, T5ForConditionalGeneration, ViTConfig, ViTForImageClassification, logging,
)
logging.set_verbosity_error()
logging.disable_progress_bar()
small = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=40)
tokens = dict(input_ids=torch.arange(12).view(2, 6))
picture = dict(pixel_values=torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32))
MODELS = {
    "bert": (lambda: BertForSequenceClassification(BertConfig(**small)), tokens),
    "tied": (lambda: BertForMaskedLM(BertConfig(**small)), tokens),
    "gpt2": (lambda: GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=20)), tokens),
    "llama": (lambda: LlamaForCausalLM(LlamaConfig(**small)), tokens),
    "half": (lambda: LlamaForCausalLM(LlamaConfig(**small)).to(torch.bfloat16), tokens),
    "t5": (lambda: T5ForConditionalGeneration(T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, vocab_size=40)),
           tokens | dict(decoder_input_ids=tokens["input_ids"])),
    "vit": (lambda: ViTForImageClassification(ViTConfig(**{**small, "vocab_size": None}, image_size=32, patch_size=8)), picture),
    "resnet": (lambda: ResNetForImageClassification(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])), picture),
}
def trained(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    return model.eval()
"#;

#[test]
fn transformers_loads_what_was_trained_here() -> Result<()> {
    let _guard = serial();
    let temporary = tempfile::tempdir()?;
    let (there, here) = (temporary.path().join("there"), temporary.path().join("here"));
    let script = format!(
        "{TRANSFORMERS}{}",
        r#"
for name, (make, _) in MODELS.items():
    torch.manual_seed(len(name))
    model = make()
    model.save_pretrained(pathlib.Path(sys.argv[1]) / name)
    model.save_pretrained(pathlib.Path(sys.argv[1]) / f"{name} in shards", max_shard_size="5KB")
    print(name)
"#
    );
    let Some(output) = python_of_libraries("transformers", &script, &[&there])? else {
        return Ok(());
    };
    assert_eq!(output.lines().count(), 8, "{output}");
    for name in output.lines() {
        let shards = there.join(format!("{name} in shards"));
        assert!(shards.join("model.safetensors.index.json").is_file(), "{name}");
        let vs = loaded(&read_pretrained(there.join(name))?)?;
        train(&vs)?;
        SavePretrained::new().like(there.join(name)).save(&vs, here.join(name))?;
        let vs = loaded(&read_pretrained(&shards)?)?;
        train(&vs)?;
        let folder = here.join(format!("{name} in shards"));
        SavePretrained::new().max_shard_size(7000).like(&shards).save(&vs, &folder)?;
        assert!(folder.join("model.safetensors.index.json").is_file(), "{name}");
    }
    let script = format!(
        "{TRANSFORMERS}{COMPARED}{}",
        r#"
there, here = map(pathlib.Path, sys.argv[1:3])
for name, (make, inputs) in MODELS.items():
    torch.manual_seed(len(name))
    expected = trained(make())
    for folder in (here / name, here / f"{name} in shards"):
        model, report = type(expected).from_pretrained(folder, output_loading_info=True)
        # tch's batch norm does not count batches, which torch's does for a momentum of None.
        report["missing_keys"] = [key for key in report["missing_keys"] if not key.endswith("num_batches_tracked")]
        assert not any(report.values()), (name, report)
        assert model.config.to_diff_dict().keys() == expected.config.to_diff_dict().keys() | {"architectures", "dtype"}, name
        same_models(model, expected)
        with torch.no_grad():
            ours, theirs = model(**inputs).logits, expected(**inputs).logits
        same_outputs(ours, theirs, name)
        print(folder.name)
"#
    );
    let output = python_of_libraries("transformers", &script, &[&there, &here])?;
    assert_eq!(output.context("transformers")?.lines().count(), 16);
    Ok(())
}

const TIMM: &str = r#"
import pathlib, timm
from timm.models import load_checkpoint, save_for_hf
NAMES = ("test_resnet", "test_vit", "test_convnext", "test_efficientnet")
def made(name):
    torch.manual_seed(len(name))
    model = timm.create_model(name, num_classes=7)
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 2)
    return model.eval()
def trained(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    return model
"#;

#[test]
fn timm_loads_what_was_trained_here() -> Result<()> {
    let _guard = serial();
    let temporary = tempfile::tempdir()?;
    let (there, here) = (temporary.path().join("there"), temporary.path().join("here"));
    let script = format!(
        "{TIMM}{}",
        r#"
for name in NAMES:
    model = made(name)
    # One of them is a pickle, as in older folders.
    save_for_hf(model, pathlib.Path(sys.argv[1]) / name, safe_serialization=name != "test_vit")
    torch.save({"state_dict": model.state_dict(), "arch": name}, pathlib.Path(sys.argv[1]) / f"{name}.pth.tar")
    print(name)
"#
    );
    let Some(output) = python_of_libraries("timm", &script, &[&there])? else { return Ok(()) };
    assert_eq!(output.lines().count(), 4, "{output}");
    for name in output.lines() {
        let vs = loaded(&read_pretrained(there.join(name))?)?;
        train(&vs)?;
        SavePretrained::new().like(there.join(name)).save(&vs, here.join(name))?;
        let file = there.join(format!("{name}.pth.tar"));
        let vs = loaded(&tch_ignite::pytorch::TrainingFile::read(file)?.weights()?)?;
        train(&vs)?;
        save_weights(&vs, here.join(format!("{name}.pth")), &Names::new())?;
    }
    let script = format!(
        "{TIMM}{COMPARED}{}",
        r#"
here = pathlib.Path(sys.argv[1])
for name in NAMES:
    expected = trained(made(name))
    x = torch.linspace(-1, 1, 3 * 160 * 160).view(1, 3, 160, 160)[..., :expected.default_cfg["input_size"][1], :expected.default_cfg["input_size"][2]]
    again = timm.create_model(name, num_classes=7)
    load_checkpoint(again, here / f"{name}.pth", weights_only=True)
    models = [
        timm.create_model(name, num_classes=7, checkpoint_path=here / name / "model.safetensors"),
        timm.create_model(name, num_classes=7, checkpoint_path=here / f"{name}.pth"),
        timm.create_model(f"local-dir:{here / name}", pretrained=True, num_classes=7),
        again,
    ]
    for model in models:
        with torch.no_grad():
            ours, theirs = model.eval()(x), expected(x)
        same_models(model, expected)
        same_outputs(ours, theirs, name)
        print(name)
"#
    );
    let output = python_of_libraries("timm", &script, &[Path::new(&here)])?;
    assert_eq!(output.context("timm")?.lines().count(), 16);
    Ok(())
}
