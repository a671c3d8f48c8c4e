//! Trains a small GPT that Python described and PyTorch compiled; no Python is needed to run this.
//!
//! ```sh
//! python scripts/export_step.py examples/compiled/gpt.py:example gpt
//! cargo run --release --example compiled -- gpt --text docs/ARCHITECTURE.md
//! ```

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use tch::nn::VarStore;
use tch::{Device, Kind, Tensor};
use tch_ignite::checkpoint::Checkpoint;
use tch_ignite::compiled::CompiledModel;
use tch_ignite::data::Loader;
use tch_ignite::engine::{Event, Until};
use tch_ignite::handlers::Evaluate;
use tch_ignite::metrics::{Loss, RunningAverage};
use tch_ignite::optim::Optimizer;
use tch_ignite::schedule::{CosineAnnealing, ParamScheduler};
use tch_ignite::supervised::{
    Prediction, Supervised, create_supervised_evaluator, create_supervised_trainer,
};

/// Trains a compiled GPT on the characters of a text.
#[derive(Parser)]
struct Args {
    /// The folder that scripts/export_step.py made of examples/compiled/gpt.py. Loading it runs its machine code
    model: PathBuf,
    /// The text to learn from
    #[arg(long, value_name = "FILE", default_value = "docs/ARCHITECTURE.md")]
    text: PathBuf,
    /// Passes over the text
    #[arg(long, value_name = "N", default_value_t = 20)]
    epochs: u64,
    /// Folder for checkpoints; a run that was stopped goes on from there
    #[arg(long, value_name = "DIR", default_value = "runs/compiled")]
    out: PathBuf,
    /// Only tries that everything works, in seconds
    #[arg(long)]
    smoke: bool,
}

/// Sizes of the network in examples/compiled/gpt.py.
const CONTEXT: i64 = 64;
const CHARACTERS: u8 = 128;
const BATCH: usize = 16;

fn cross_entropy(logits: &Tensor, y: &Tensor) -> Tensor {
    logits.flatten(0, 1).cross_entropy_for_logits(&y.flatten(0, 1))
}

/// Stretches of the text, each with the characters that follow.
fn windows(text: &[u8]) -> Result<(Tensor, Tensor)> {
    let text = Tensor::from_slice(&text.iter().map(|c| i64::from(*c)).collect::<Vec<_>>());
    let all = text.f_unfold(0, CONTEXT + 1, CONTEXT / 4)?;
    Ok((all.narrow(1, 0, CONTEXT).contiguous(), all.narrow(1, 1, CONTEXT).contiguous()))
}

/// Continues a text with the likeliest characters. The programs are for two samples and more.
fn continued(net: &CompiledModel, start: &[u8], count: usize) -> Result<String> {
    let mut text = start.to_vec();
    for _ in 0..count {
        let last: Vec<_> =
            text[text.len() - CONTEXT as usize..].iter().map(|c| i64::from(*c)).collect();
        let logits = net.evaluate(&[&Tensor::from_slice(&last).repeat([2, 1])])?;
        let next = logits.first().context("an output")?.get(0).get(CONTEXT - 1).argmax(0, false);
        text.push(u8::try_from(next.int64_value(&[]))?);
    }
    Ok(String::from_utf8_lossy(&text[start.len()..]).into_owned())
}

fn main() -> Result<()> {
    let args = Args::parse();
    tch::manual_seed(0);
    let mut text = std::fs::read(&args.text).with_context(|| args.text.display().to_string())?;
    // The model knows ASCII.
    text.iter_mut().filter(|c| **c >= CHARACTERS).for_each(|c| *c = b'?');
    if args.smoke {
        text.truncate(3000);
    }
    ensure!(text.len() >= 2000, "the text is to have 2000 characters, and has {}", text.len());
    let (training, held_out) = text.split_at(text.len() * 9 / 10);
    let (x, y) = windows(training)?;
    let data = Loader::new(&x, &y, BATCH)?.shuffle(1).drop_last(true);
    let (x, y) = windows(held_out)?;
    let test = Loader::new(&x, &y, BATCH)?.drop_last(x.size()[0] % BATCH as i64 == 1);

    let vs = VarStore::new(Device::Cpu);
    let net = CompiledModel::load(&args.model, &vs.root())?;
    let optimizer = Optimizer::adamw(&vs).build()?;
    let lr = optimizer.knob("lr")?;
    let mut cx = Supervised::compiled(net, optimizer).clip_grad_norm(1.0);
    let epochs = if args.smoke { 2 } else { args.epochs };
    let steps = epochs * data.batches();

    let mut evaluator = create_supervised_evaluator();
    evaluator.metric("loss", Loss::of(cross_entropy, Prediction::parts));
    let mut trainer = create_supervised_trainer();
    trainer
        .metric("loss", RunningAverage::of(|loss: &Tensor| loss.to_kind(Kind::Double)))
        .track("model", &vs)
        .track("optimizer", &cx.optimizer)
        .attach(ParamScheduler::new("lr", lr, CosineAnnealing::new(3e-3, 1e-4, 2 * steps)))
        .attach(Evaluate::each_epoch("test", evaluator, test))
        .attach(Checkpoint::new(&args.out).n_saved(1).on(Event::EpochCompleted));
    if let Some(resumed) = trainer.resume(&mut cx, &args.out)? {
        println!("{resumed}");
    }
    let summary = trainer.run(&mut cx, &data, Until::epochs(epochs))?;
    println!("{summary}, loss {:.3}", trainer.state.metrics.get("loss")?);
    let start = &training[..CONTEXT as usize];
    println!("{:?}", continued(&cx.net, start, if args.smoke { 8 } else { 200 })?);
    Ok(())
}
