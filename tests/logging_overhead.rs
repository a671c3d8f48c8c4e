//! What watching a run costs: the network of the MNIST example, trained in a bare loop of tch and with
//! metrics, progress, CSV and TensorBoard, by turns in one process.
//!
//! `cargo test --release --test logging_overhead -- --ignored --nocapture`: a measurement, for a quiet
//! machine.
#![cfg(feature = "progress")]

use std::time::{Duration, Instant};

use anyhow::Result;
use tch::nn::{self, ModuleT, OptimizerConfig, VarStore};
use tch::{Device, Kind, Tensor};
use tch_ignite::data::Loader;
use tch_ignite::engine::{Engine, Event, Until};
use tch_ignite::handlers::ProgressBar;
use tch_ignite::loggers::{CsvLogger, OutputHandler, TensorBoard};
use tch_ignite::metrics::{Accuracy, Loss, RunningAverage};
use tch_ignite::optim::Optimizer;

/// Epochs of each kind, and batches in one.
const ROUNDS: usize = 15;
const BATCHES: i64 = 30;

fn network(vs: &VarStore) -> impl ModuleT + use<> {
    let root = vs.root();
    nn::seq_t()
        .add(nn::conv2d(&root / "conv1", 1, 16, 5, Default::default()))
        .add_fn(|x| x.max_pool2d_default(2).relu())
        .add(nn::conv2d(&root / "conv2", 16, 32, 5, Default::default()))
        .add_fn(|x| x.max_pool2d_default(2).relu().flat_view())
        .add(nn::linear(&root / "fc1", 512, 128, Default::default()))
        .add_fn(|x| x.relu())
        .add(nn::linear(&root / "fc2", 128, 10, Default::default()))
}

struct Output {
    loss: Tensor,
    y_pred: Tensor,
    y: Tensor,
}

impl Output {
    fn parts(&self) -> (&Tensor, &Tensor) {
        (&self.y_pred, &self.y)
    }
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

#[test]
#[ignore = "a measurement, for a quiet machine: cargo test --release --test logging_overhead -- --ignored --nocapture"]
fn watching_a_run_costs_three_percent_at_most() -> Result<()> {
    tch::set_num_threads(1);
    let images = Tensor::rand([64 * BATCHES, 1, 28, 28], (Kind::Float, Device::Cpu));
    let labels = Tensor::randint(10, [64 * BATCHES], (Kind::Int64, Device::Cpu));

    let bare_vs = VarStore::new(Device::Cpu);
    let bare_net = network(&bare_vs);
    let mut bare_optimizer = nn::sgd(0.9, 0., 5e-4, false).build(&bare_vs, 0.01)?;
    let mut bare = || {
        let begun = Instant::now();
        for batch in 0..BATCHES {
            let x = images.narrow(0, 64 * batch, 64);
            let loss = bare_net.forward_t(&x, true).cross_entropy_for_logits(&labels.narrow(
                0,
                64 * batch,
                64,
            ));
            bare_optimizer.backward_step(&loss);
        }
        begun.elapsed()
    };

    let folder = tempfile::tempdir()?;
    let (csv, board) =
        (CsvLogger::open(folder.path().join("log.csv"))?, TensorBoard::create(folder.path())?);
    let vs = VarStore::new(Device::Cpu);
    let net = network(&vs);
    let optimizer = Optimizer::builder(nn::sgd(0.9, 0., 5e-4, false), &vs).lr(0.01).build()?;
    let mut trainer = Engine::new(|_: &mut (), _, (x, y): (Tensor, Tensor)| {
        let y_pred = net.forward_t(&x, true);
        let loss = y_pred.cross_entropy_for_logits(&y);
        optimizer.backward_step(&loss)?;
        Ok(Output { loss: loss.detach(), y_pred: y_pred.detach(), y })
    });
    let cross_entropy = |y_pred: &Tensor, y: &Tensor| y_pred.cross_entropy_for_logits(y);
    let every = Event::IterationCompleted;
    trainer
        .metric("running", RunningAverage::of(|output: &Output| output.loss.shallow_clone()))
        .metric("accuracy", Accuracy::of(Output::parts))
        .metric("loss", Loss::of(cross_entropy, Output::parts))
        .attach(ProgressBar::new().metric("running"))
        .attach(OutputHandler::new(&csv, "training", every).metric("running"))
        .attach(OutputHandler::new(&board, "training", every).metric("running"))
        .attach(OutputHandler::each_epoch(&board, "epoch").metric("accuracy").metric("loss"));
    let loader = Loader::new(&images, &labels, 64)?;
    let mut epochs = 0;
    let mut watched = || -> Result<Duration> {
        epochs += 1;
        let begun = Instant::now();
        trainer.run(&mut (), &loader, Until::epochs(epochs))?;
        Ok(begun.elapsed())
    };

    bare();
    watched()?;
    let (mut bares, mut watcheds) = (vec![], vec![]);
    for _ in 0..ROUNDS {
        bares.push(bare());
        watcheds.push(watched()?);
    }
    let (bare, watched) = (median(bares), median(watcheds));
    let ratio = watched.as_secs_f64() / bare.as_secs_f64();
    println!("bare {bare:?}, watched {watched:?}: {ratio:.4}");
    assert!(ratio <= 1.03, "{ratio}");
    Ok(())
}
