//! The example `chargpt` and its counterpart in PyTorch, `benches/chargpt.py`, train alike.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use approx::assert_abs_diff_eq;
use tch::nn::VarStore;
use tch::{Device, Tensor};
use tch_ignite::data::{DistributedSampler, Sampler};
use tch_ignite::engine::OPTIMIZER_STEPPED;
use tch_ignite::prelude::*;

use super::common;

#[allow(dead_code)] // The program writes, too.
#[path = "../../examples/chargpt/model.rs"]
mod model;
#[path = "../../examples/chargpt/recipe.rs"]
mod recipe;
#[allow(dead_code)]
#[path = "../../examples/chargpt/text.rs"]
mod text;

use model::{Config, Gpt};
use recipe::Algorithm;
use text::{Text, windows};

/// Any text does, and this one has characters of two and three bytes.
const TEXT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/DIFFERENCES.md");
const UPDATES: u64 = 50;
const BATCH: usize = 12;

/// Trains a smaller network in f64 from given weights and windows. The arguments are the folder of `chargpt.py`, the
/// text, and a file of weights and the order of the windows.
const SCRIPT: &str = r#"
import json, sys
sys.path.insert(0, sys.argv[1])
sys.dont_write_bytecode = True
import chargpt, safetensors.torch, torch
torch.set_num_threads(1)
chargpt.CONTEXT, chargpt.LAYERS, chargpt.HEADS, chargpt.WIDTH = 16, 2, 2, 16
vocabulary, training, validation = chargpt.read(sys.argv[2])
net = chargpt.Gpt(vocabulary).double()
weights = safetensors.torch.load_file(sys.argv[3])
order = weights.pop("order")
net.load_state_dict(weights)
losses = list(chargpt.train(net, training, order, 50))
print(json.dumps([losses, chargpt.validate(net, validation)]))
"#;

/// The losses of the updates, and the validation loss after them. `accumulate` batches make an update; the mean of their
/// losses is the update's, because they are equally large.
fn trained(
    (vs, net, text): (&VarStore, Gpt, &Text),
    sampler: &DistributedSampler,
    accumulate: u64,
) -> Result<(Vec<f64>, f64)> {
    let (train, val) = text.tokens.split_at(text.tokens.len() * 9 / 10);
    let (x, y) = windows(train, 16, 1, Device::Cpu)?;
    let train = Loader::new(&x, &y, BATCH / accumulate as usize)?.sampler(sampler.clone());
    let (x, y) = windows(val, 16, 16, Device::Cpu)?;
    let val = Loader::new(&x, &y, 128)?;
    let optimizer = recipe::optimizer(Algorithm::Adamw, vs)?;
    let mut cx = recipe::context(net, &optimizer).accumulate(accumulate)?;
    let (mut losses, mut clips) = (vec![], false);
    let mut trainer = create_supervised_trainer();
    trainer
        .attach(
            ParamScheduler::new("lr", optimizer.knob("lr")?, recipe::schedule(UPDATES))
                .on(OPTIMIZER_STEPPED),
        )
        .on(Event::IterationCompleted, |cx: &mut Supervised<Gpt>, engine| {
            losses.push(engine.state.output.as_ref().map_or(f64::NAN, |x| x.double_value(&[])));
            clips |= cx.grad_norm().is_some_and(|norm| norm.double_value(&[]) > 1.);
            Ok(())
        });
    trainer.run(&mut cx, &train, Until::iterations(UPDATES * accumulate))?;
    drop(trainer);
    ensure!(clips, "no gradient was clipped");
    let mut evaluator = recipe::evaluator();
    evaluator.run(&mut cx, &val, Until::epochs(1))?;
    let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len() as f64;
    let losses = losses.chunks(accumulate as usize).map(mean).collect();
    Ok((losses, evaluator.state.metrics.get("loss")?))
}

#[test]
fn losses_are_those_of_pytorch() -> Result<()> {
    let test = "losses_are_those_of_pytorch";
    let Some(python) = common::python(test, "TORCH_PYTHON", "torch, safetensors") else {
        return Ok(());
    };
    let text = Text::read(TEXT.as_ref())?;
    let vocabulary = text.characters.len() as i64;
    let config = Config { vocabulary, context: 16, layers: 2, heads: 2, width: 16, dropout: 0. };
    let windows = text.tokens.len() * 9 / 10 - 16;
    let sampler = DistributedSampler::new(windows, 0, 1)?.shuffle(7).drop_last(true)?;
    let order: Vec<i64> = sampler.order(0)?.into_iter().map(|place| place as i64).collect();

    let made = || {
        let _guard = common::serial();
        tch::manual_seed(7);
        let mut vs = VarStore::new(Device::Cpu);
        let net = Gpt::new(&vs.root(), config);
        vs.double();
        (vs, net)
    };
    let (vs, net) = made();
    // With larger weights than at a usual start, gradients are large enough to be clipped.
    for mut variable in vs.trainable_variables() {
        let _ = tch::no_grad(|| variable.f_mul_scalar_(4.))?;
    }
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("weights.safetensors");
    let mut tensors: Vec<_> = vs.variables().into_iter().collect();
    tensors.push(("order".into(), Tensor::from_slice(&order)));
    Tensor::write_safetensors(&tensors, &file)?;

    let benches = concat!(env!("CARGO_MANIFEST_DIR"), "/benches");
    let script = ["-c", SCRIPT, benches, TEXT];
    let output = Command::new(python).args(script).arg(&file).output()?;
    ensure!(output.status.success(), "Python: {}", String::from_utf8_lossy(&output.stderr));
    let (expected, validation): (Vec<f64>, f64) = serde_json::from_slice(&output.stdout)?;
    assert_eq!(expected.len() as u64, UPDATES);
    let fell = expected.first().context("a loss")? - validation;
    assert!(fell > 0.1, "nothing was learnt: {expected:?}, then {validation}");

    let (mut again, other) = made();
    again.copy(&vs)?;
    for (parts, accumulate) in [((&vs, net, &text), 1), ((&again, other, &text), 3)] {
        let (losses, loss) = trained(parts, &sampler, accumulate)?;
        assert_abs_diff_eq!(*losses, *expected, epsilon = 1e-9);
        assert_abs_diff_eq!(loss, validation, epsilon = 1e-9);
    }
    Ok(())
}
