//! Trains the four models of MNIST-1D's paper (Greydanus and Kobak 2024, <https://arxiv.org/abs/2011.14439>) as its
//! authors do, 6,000 iterations of Adam each, and prints their test accuracies beside the published ones.
//!
//! `data.rs` makes the data set. `benches/mnist1d.py` is the same in PyTorch, and `scripts/experiments.sh mnist1d` runs both.

mod data;

use std::path::PathBuf;
use std::time::Instant;

use anyhow::Result;
use clap::Parser;
use tch::nn::{self, Func, Init, Module, Path, RNN, RNNConfig, VarStore};
use tch::{Device, Kind, Tensor};
use tch_ignite::prelude::*;
use tch_ignite::pytorch::{self, Dict, Value};

use data::{Mnist1d, POINTS};

/// Trains the four models of MNIST-1D's paper.
#[derive(Parser)]
struct Args {
    /// Updates of the weights, of each model
    #[arg(long, value_name = "N", default_value_t = 6000, value_parser = clap::value_parser!(u64).range(1..))]
    iterations: u64,
    /// Runs of each model, with seeds 0 to N - 1
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    seeds: u32,
    /// Folder for the data set, data.pt
    #[arg(long, value_name = "DIR", default_value = "runs/mnist1d")]
    out: PathBuf,
    /// Only tries that everything works, in seconds
    #[arg(long)]
    smoke: bool,
}

/// A model of the paper, and the accuracy that the paper states.
struct Model {
    name: &'static str,
    published: f64,
    network: fn(&Path) -> Func<'static>,
}

const MODELS: [Model; 4] = [
    Model { name: "logistic regression", published: 32., network: logistic },
    Model { name: "MLP", published: 68., network: mlp },
    Model { name: "CNN", published: 94., network: cnn },
    Model { name: "GRU", published: 91., network: gru },
];

/// PyTorch begins with these weights, by the number of inputs of a unit; tch begins with larger ones.
fn uniform(inputs: i64) -> Init {
    let bound = 1. / (inputs as f64).sqrt();
    Init::Uniform { lo: -bound, up: bound }
}

fn linear(path: Path, from: i64, to: i64) -> nn::Linear {
    let config = nn::LinearConfig { ws_init: uniform(from), ..Default::default() };
    nn::linear(path, from, to, config)
}

fn conv(path: Path, from: i64, size: i64) -> nn::Conv1D {
    let init = uniform(from * size);
    let config = nn::ConvConfig {
        stride: 2,
        padding: 1,
        ws_init: init,
        bs_init: init,
        ..Default::default()
    };
    nn::conv1d(path, from, 25, size, config)
}

fn logistic(root: &Path) -> Func<'static> {
    let layer = linear(root / "linear", POINTS as i64, 10);
    nn::func(move |x| layer.forward(x))
}

fn mlp(root: &Path) -> Func<'static> {
    let first = linear(root / "linear1", POINTS as i64, 100);
    let second = linear(root / "linear2", 100, 100);
    let third = linear(root / "linear3", 100, 10);
    nn::func(move |x| {
        let hidden = first.forward(x).relu();
        third.forward(&(&hidden + second.forward(&hidden).relu()))
    })
}

fn cnn(root: &Path) -> Func<'static> {
    let layers =
        [conv(root / "conv1", 1, 5), conv(root / "conv2", 25, 3), conv(root / "conv3", 25, 3)];
    let last = linear(root / "linear", 125, 10);
    nn::func(move |x| {
        let channels = layers.iter().fold(x.unsqueeze(1), |x, layer| layer.forward(&x).relu());
        last.forward(&channels.flat_view())
    })
}

fn gru(root: &Path) -> Func<'static> {
    let init = uniform(6);
    let config = RNNConfig {
        bidirectional: true,
        w_ih_init: init,
        w_hh_init: init,
        b_ih_init: Some(init),
        b_hh_init: Some(init),
        ..Default::default()
    };
    let layer = nn::gru(&(root / "gru"), 1, 6, config);
    let last = linear(root / "linear", 2 * 6 * POINTS as i64, 10);
    nn::func(move |x| last.forward(&layer.seq(&x.unsqueeze(-1)).0.flatten(1, -1)))
}

/// Trains a model, and returns its accuracy in percent of the test samples.
fn accuracy(model: &Model, data: &Mnist1d, seed: u32, iterations: u64) -> Result<f64> {
    let loader =
        |(x, y): &(Tensor, Tensor), batch_size| Loader::new(&x.to_kind(Kind::Float), y, batch_size);
    let (train, test) = (loader(&data.train, 100)?, loader(&data.test, 1000)?);
    tch::manual_seed(seed.into());
    let vs = VarStore::new(Device::Cpu);
    let net = (model.network)(&vs.root());
    let optimizer = Optimizer::adam(&vs).lr(1e-2).build()?;
    let mut cx = Supervised::new(net, optimizer, |y_pred, y| y_pred.cross_entropy_for_logits(y));
    let mut evaluator = create_supervised_evaluator();
    evaluator.metric("accuracy", Accuracy::of(Prediction::parts));
    let mut trainer = create_supervised_trainer();
    trainer.attach(Evaluate::on(Event::Completed, "test", evaluator, &test));
    trainer.run(&mut cx, &train, Until::iterations(iterations))?;
    Ok(100. * trainer.state.metrics.get("test/accuracy")?)
}

/// Leaves the data set for `benches/mnist1d.py`.
fn save(data: &Mnist1d, folder: &std::path::Path) -> Result<()> {
    let mut dict = Dict::new();
    for (name, (x, y)) in [("train", &data.train), ("test", &data.test)] {
        dict.insert(name, Value::list([Value::tensor(x)?, Value::tensor(y)?]));
    }
    std::fs::create_dir_all(folder)?;
    Ok(pytorch::write(folder.join("data.pt"), &dict.into())?)
}

fn main() -> Result<()> {
    let mut args = Args::parse();
    if args.smoke {
        (args.iterations, args.seeds) = (args.iterations.min(40), 2);
    }
    tch::set_num_threads(1);
    let data = Mnist1d::new(5000, 42);
    save(&data, &args.out)?;
    println!(
        "| model | published, % | here, % | lowest to highest | s a run |\n|---|---|---|---|---|"
    );
    for model in MODELS {
        let start = Instant::now();
        let runs = (0..args.seeds).map(|seed| accuracy(&model, &data, seed, args.iterations));
        let mut runs = runs.collect::<Result<Vec<f64>>>()?;
        runs.sort_by(f64::total_cmp);
        let count = runs.len() as f64;
        let (mean, seconds) =
            (runs.iter().sum::<f64>() / count, start.elapsed().as_secs_f64() / count);
        let (low, high) = (runs[0], runs[runs.len() - 1]);
        println!(
            "| {} | {:.0} | {mean:.1} | {low:.1} to {high:.1} | {seconds:.1} |",
            model.name, model.published
        );
    }
    Ok(())
}
