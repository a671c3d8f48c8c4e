//! Measures how much slower logging makes a run: the network of the MNIST example is trained on its digits in a bare
//! loop of tch, and by an engine with accuracy, loss, running average, progress bar, CSV and TensorBoard, by turns in
//! one process.
//!
//! `cargo bench --bench logging` runs epochs in pairs, one each way, and prints the median of the ratios of their
//! times; with `-- --check` it fails if the median is above 1.03. Then it prints the time that the engine's own
//! profile counts for data and handlers, which other programs on the machine disturb less; they widen the quartiles
//! of the ratios. Everything runs in one thread, on the digits in `MNIST_DIR` or `data/mnist`.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use indicatif::{InMemoryTerm, ProgressDrawTarget};
use tch::nn::{self, ModuleT, OptimizerConfig, VarStore};
use tch::{Device, Kind, Tensor};
use tch_ignite::data::Loader;
use tch_ignite::engine::{Engine, Event, Until};
use tch_ignite::handlers::ProgressBar;
use tch_ignite::loggers::{CsvLogger, OutputHandler, TensorBoard};
use tch_ignite::metrics::{Accuracy, Loss, RunningAverage};
use tch_ignite::optim::Optimizer;

const BATCH_SIZE: i64 = 64;
const AT_MOST: f64 = 1.03;

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

fn cross_entropy(y_pred: &Tensor, y: &Tensor) -> Tensor {
    y_pred.cross_entropy_for_logits(y)
}

/// The value below which this share of the values lies.
fn quantile(values: &mut [f64], share: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    values[((values.len() - 1) as f64 * share).round() as usize]
}

fn main() -> Result<()> {
    tch::set_num_threads(1);
    let check = std::env::args().any(|argument| argument == "--check");
    let rounds = std::env::var("ROUNDS").map_or(Ok(15), |rounds| rounds.parse())?;
    let folder = std::env::var("MNIST_DIR").unwrap_or_else(|_| "data/mnist".into());
    let set = tch::vision::mnist::load_dir(&folder)
        .with_context(|| format!("no MNIST in {folder} (run scripts/fetch-mnist.sh to get it)"))?;
    let images = ((set.train_images - 0.1307) / 0.3081).view([-1, 1, 28, 28]);
    let labels = set.train_labels.to_kind(Kind::Int64);
    let batches = images.size()[0] / BATCH_SIZE;
    let (images, labels) =
        (images.narrow(0, 0, batches * BATCH_SIZE), labels.narrow(0, 0, batches * BATCH_SIZE));

    // The bare loop is as fast as possible: its batches are views of the data.
    let bare_vs = VarStore::new(Device::Cpu);
    let bare_net = network(&bare_vs);
    let mut bare_optimizer = nn::sgd(0.9, 0., 5e-4, false).build(&bare_vs, 0.01)?;
    let mut bare = || {
        let begun = Instant::now();
        for batch in 0..batches {
            let of_batch = |data: &Tensor| data.narrow(0, batch * BATCH_SIZE, BATCH_SIZE);
            let loss =
                cross_entropy(&bare_net.forward_t(&of_batch(&images), true), &of_batch(&labels));
            bare_optimizer.backward_step(&loss);
        }
        begun.elapsed()
    };

    let folder = tempfile::tempdir()?;
    let csv = CsvLogger::open(folder.path().join("log.csv"))?;
    let board = TensorBoard::create(folder.path())?;
    let vs = VarStore::new(Device::Cpu);
    let net = network(&vs);
    let optimizer = Optimizer::builder(nn::sgd(0.9, 0., 5e-4, false), &vs).lr(0.01).build()?;
    // Both ways use tch's step, so that only the logging makes a difference.
    optimizer.set_fused(false)?;
    let mut trainer = Engine::new(|_: &mut (), _, (x, y): (Tensor, Tensor)| {
        let y_pred = net.forward_t(&x, true);
        let loss = cross_entropy(&y_pred, &y);
        optimizer.backward_step(&loss)?;
        Ok(Output { loss: loss.detach(), y_pred: y_pred.detach(), y })
    });
    let every = Event::IterationCompleted;
    let terminal = ProgressDrawTarget::term_like(Box::new(InMemoryTerm::new(10, 120)));
    trainer
        .metric("running", RunningAverage::of(|output: &Output| output.loss.shallow_clone()))
        .metric("accuracy", Accuracy::of(Output::parts))
        .metric("loss", Loss::of(cross_entropy, Output::parts))
        .attach(ProgressBar::new().metric("running").with_draw_target(terminal))
        .attach(OutputHandler::new(&csv, "training", every).metric("running"))
        .attach(OutputHandler::new(&board, "training", every).metric("running"))
        .attach(OutputHandler::each_epoch(&csv, "epoch").metric("accuracy").metric("loss"))
        .attach(OutputHandler::each_epoch(&board, "epoch").metric("accuracy").metric("loss"));
    let loader = Loader::new(&images, &labels, BATCH_SIZE as usize)?;
    let mut epochs = 0;
    let mut watched = || -> Result<Duration> {
        epochs += 1;
        let begun = Instant::now();
        trainer.run(&mut (), &loader, Until::epochs(epochs))?;
        Ok(begun.elapsed())
    };

    bare();
    watched()?;
    let (mut ratios, mut bares) = (vec![], vec![]);
    for round in 0..rounds {
        // The two ways take turns in going first, so that neither always has the warmer caches.
        let (bare, watched) = match round % 2 {
            0 => (bare(), watched()?),
            _ => {
                let watched = watched()?;
                (bare(), watched)
            }
        };
        bares.push(bare.as_secs_f64());
        ratios.push(watched.as_secs_f64() / bare.as_secs_f64());
    }
    let ratio = quantile(&mut ratios, 0.5);
    println!(
        "bare {:.3} s an epoch of {batches} batches; watched / bare: {ratio:.4} (quartiles {:.4} and {:.4}, {rounds} rounds)",
        quantile(&mut bares, 0.5),
        quantile(&mut ratios, 0.25),
        quantile(&mut ratios, 0.75),
    );
    let profile = trainer.profile();
    trainer.run(&mut (), &loader, Until::epochs(trainer.state.epoch + 3))?;
    let rows = profile.basic();
    let seconds = |of_steps: bool| -> f64 {
        let rows = rows.iter().filter(|row| (row.name == "step") == of_steps);
        rows.map(|row| row.total.as_secs_f64()).sum()
    };
    println!("data and handlers / steps, in one run: {:.4}", seconds(false) / seconds(true));
    for row in profile.handlers().iter().take(6) {
        println!("  {:.1} µs  {}", row.total.as_secs_f64() * 1e6 / row.count as f64, row.name);
    }
    ensure!(!check || ratio <= AT_MOST, "{ratio:.4} is above {AT_MOST}");
    Ok(())
}
