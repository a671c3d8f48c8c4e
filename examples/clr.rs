//! Trains a small network on Fashion-MNIST with cyclical learning rates and with others, from the same weights and in the
//! same order: the question of "Cyclical Learning Rates for Training Neural Networks" (Smith 2017,
//! <https://arxiv.org/abs/1506.01186>). A range test picks the bounds.
//!
//! `scripts/experiments.sh clr` fetches what is needed and runs the example with five seeds; `docs/CLR.md` says what came
//! out.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use tch::nn::{self, VarStore};
use tch::{Device, Tensor};
use tch_ignite::handlers::{LrCurve, StepMode};
use tch_ignite::plot::{Curve, Panel, write_svg};
use tch_ignite::prelude::*;
use tch_ignite::schedule::{
    AnySchedule, CyclicLR, CyclicMode, ExponentialLR, MultiStepLR, OneCycleLR,
};

/// Compares cyclical learning rates with others on Fashion-MNIST.
#[derive(Parser)]
struct Args {
    /// Folder with the four IDX files, unzipped
    #[arg(long, value_name = "DIR", default_value = "data/fashion-mnist")]
    data: PathBuf,
    /// Passes over the training set, in each run
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u64).range(1..))]
    epochs: u64,
    /// Seed of the weights and of the order of the pictures
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u32,
    /// Folder for seed-N.csv
    #[arg(long, value_name = "DIR", default_value = "runs/clr")]
    out: PathBuf,
    /// Trains nothing: sums up the tables of all seeds in the folder, and draws them and the range test
    #[arg(long)]
    summary: bool,
    /// Only tries that everything works, on a few pictures, in seconds
    #[arg(long)]
    smoke: bool,
}

/// Accuracies in percent, of whose first appearance the summary tells.
const LEVELS: [f64; 5] = [85., 86., 87., 88., 89.];

/// The ready context with this example's network.
type Model = Supervised<nn::Sequential>;

/// Loaders of the training set, in order, and of the test set.
fn data(args: &Args) -> Result<(Loader, Loader)> {
    let set = tch::vision::mnist::load_dir(&args.data).with_context(|| {
        format!("no pictures in {} (run scripts/fetch-mnist.sh --fashion)", args.data.display())
    })?;
    let (mean, std) = (set.train_images.mean(None), set.train_images.std(true));
    let loader = |images: &Tensor, labels: &Tensor, batch_size, at_most: i64| {
        let count = if args.smoke { at_most } else { images.size()[0] };
        let images = ((images.f_narrow(0, 0, count)? - &mean) / &std).view([-1, 1, 28, 28]);
        anyhow::Ok(Loader::new(&images, &labels.f_narrow(0, 0, count)?, batch_size)?)
    };
    let train = loader(&set.train_images, &set.train_labels, 128, 1280)?;
    Ok((train, loader(&set.test_images, &set.test_labels, 1000, 500)?))
}

/// A network with the weights of this seed, and its optimizer.
fn model(seed: u32) -> Result<(VarStore, Optimizer, Model)> {
    tch::manual_seed(seed.into());
    let vs = VarStore::new(Device::Cpu);
    let root = vs.root();
    let by_two = nn::ConvConfig { stride: 2, ..Default::default() };
    let net = nn::seq()
        .add(nn::conv2d(&root / "conv1", 1, 8, 5, by_two))
        .add_fn(Tensor::relu)
        .add(nn::conv2d(&root / "conv2", 8, 16, 5, by_two))
        .add_fn(|x| x.relu().flat_view())
        .add(nn::linear(&root / "fc1", 256, 64, Default::default()))
        .add_fn(Tensor::relu)
        .add(nn::linear(&root / "fc2", 64, 10, Default::default()));
    let optimizer = Optimizer::sgd(&vs).momentum(0.9).weight_decay(5e-4).build()?;
    let cross_entropy = |y_pred: &Tensor, y: &Tensor| y_pred.cross_entropy_for_logits(y);
    Ok((vs, optimizer.clone(), Supervised::new(net, optimizer, cross_entropy)))
}

/// Trains with a rate that grows by the same step in each iteration of two epochs, up to 0.5 or until the loss has
/// diverged: the paper's range test.
fn range_test(train: &Loader) -> Result<LrCurve> {
    let (vs, optimizer, mut cx) = model(0)?;
    let finder = LrFinder::new(&optimizer, &vs)
        .start_lr(0.)
        .end_lr(0.5)
        .step_mode(StepMode::Linear)
        .num_iter(2 * train.batches());
    let mut trainer = create_supervised_trainer();
    Ok(finder.run(&mut trainer, &mut cx, train.clone().shuffle(0), Tensor::shallow_clone)?)
}

/// The paper's bounds are the rates at which training begins to work and at which it slows down: here those at which the
/// smoothed loss has done 5 % and 95 % of its fall.
fn bounds(curve: &LrCurve) -> Result<(f64, f64)> {
    let points: Vec<_> = curve.lr().iter().map(|lrs| lrs[0]).zip(curve.loss()).collect();
    let lowest = curve.loss().iter().copied().fold(f64::INFINITY, f64::min);
    let (_, first) = points.first().context("the range test has no loss")?;
    let fallen = |part: f64| {
        let level = *first - part * (*first - lowest);
        points.iter().find(|(_, loss)| **loss <= level).map(|(lr, _)| *lr)
    };
    fallen(0.05).zip(fallen(0.95)).context("the loss did not fall in the range test")
}

/// All schedules, of runs of `run` iterations, with `epoch` of them in an epoch.
fn schedules((low, high): (f64, f64), epoch: u64, run: u64) -> Vec<(&'static str, AnySchedule)> {
    // The paper's half cycle is of 2 to 10 epochs.
    let half = 2 * epoch;
    let cycles = |mode| CyclicLR::new(low, high).step_size_up(half as f64).mode(mode);
    let tenth_at_the_end = 0.1f64.powf(1. / run as f64);
    vec![
        ("fixed (lower bound)", ExponentialLR::new(low, 1.).into()),
        ("fixed (upper bound)", ExponentialLR::new(high, 1.).into()),
        ("step decay", MultiStepLR::new(high, [run / 2, run * 3 / 4]).into()),
        ("triangular", LinearCyclical::new(low, high, 2 * half).into()),
        ("triangular2", cycles(CyclicMode::Triangular2).into()),
        ("exp_range", cycles(CyclicMode::ExpRange).gamma(tenth_at_the_end).into()),
        ("cosine with restarts", CosineAnnealing::new(high, 0., 2 * half).into()),
        ("one-cycle", OneCycleLR::new(high, run).into()),
    ]
}

/// Whether accuracy is measured after this iteration: four times an epoch.
fn is_measured(iteration: u64, epochs: u64, run: u64) -> bool {
    let quarter = |iteration: u64| iteration * 4 * epochs / run;
    quarter(iteration) > quarter(iteration.saturating_sub(1))
}

/// Trains once, and returns the accuracy on the test set, in percent, four times an epoch.
fn train(
    schedule: AnySchedule,
    seed: u32,
    (train, test): (&Loader, &Loader),
    epochs: u64,
) -> Result<Vec<(u64, f64)>> {
    let (_vs, optimizer, mut cx) = model(seed)?;
    let mut evaluator = create_supervised_evaluator();
    evaluator.metric("accuracy", Accuracy::of(Prediction::parts));
    let run = epochs * train.batches();
    let quarters =
        Event::IterationCompleted.filter(move |iteration| is_measured(iteration, epochs, run));
    let mut accuracies = vec![];
    let mut trainer = create_supervised_trainer();
    trainer
        .attach(ParamScheduler::new("lr", optimizer.knob("lr")?, schedule))
        .attach(Evaluate::on(quarters.clone(), "test", evaluator, test))
        .on(quarters, |_, engine| {
            let accuracy = 100. * engine.state.metrics.get("test/accuracy")?;
            accuracies.push((engine.state.iteration, accuracy));
            Ok(())
        });
    trainer.run(&mut cx, train.clone().shuffle(seed.into()), Until::epochs(epochs))?;
    drop(trainer);
    Ok(accuracies)
}

/// The runs of one schedule, one for each seed: accuracies by iteration.
struct Runs {
    name: &'static str,
    runs: Vec<Vec<(u64, f64)>>,
}

/// The first line of a table.
fn header(schedules: &[(&'static str, AnySchedule)]) -> String {
    schedules.iter().fold("iteration".to_owned(), |header, (name, _)| format!("{header},{name}"))
}

/// The runs of all seeds whose tables are in a folder. A table has a row for each measurement: the iteration, and the
/// accuracy with each schedule. Refuses tables of runs of another length.
fn read(
    folder: &Path,
    schedules: &[(&'static str, AnySchedule)],
    (epochs, run): (u64, u64),
) -> Result<Vec<Runs>> {
    let measured: Vec<u64> = (1..=run).filter(|at| is_measured(*at, epochs, run)).collect();
    let mut all: Vec<Runs> =
        schedules.iter().map(|(name, _)| Runs { name, runs: vec![] }).collect();
    for entry in std::fs::read_dir(folder)? {
        let file = entry?;
        if !file.file_name().to_string_lossy().starts_with("seed-") {
            continue;
        }
        let text = std::fs::read_to_string(file.path())?;
        let mut lines = text.lines();
        let mut fits = lines.next() == Some(&*header(schedules));
        all.iter_mut().for_each(|runs| runs.runs.push(vec![]));
        for line in lines {
            let (iteration, accuracies) = line.split_once(',').context("a line of one field")?;
            for (runs, accuracy) in all.iter_mut().zip(accuracies.split(',')) {
                let point = (iteration.parse()?, accuracy.parse()?);
                runs.runs.last_mut().context("no run was begun")?.push(point);
            }
        }
        for run in all.iter().filter_map(|runs| runs.runs.last()) {
            fits &= run.iter().map(|point| point.0).eq(measured.iter().copied());
        }
        ensure!(
            fits,
            "{} is of other schedules, or of runs that do not end at iteration {run}: remove it, or choose another --out",
            file.path().display()
        );
    }
    Ok(all)
}

impl Runs {
    fn final_accuracies(&self) -> Vec<f64> {
        let mut last: Vec<f64> =
            self.runs.iter().filter_map(|run| run.last()).map(|point| point.1).collect();
        last.sort_by(f64::total_cmp);
        last
    }

    /// The mean of all seeds.
    fn mean(&self) -> Vec<(u64, f64)> {
        let mean =
            |i: usize| self.runs.iter().map(|run| run[i].1).sum::<f64>() / self.runs.len() as f64;
        self.runs[0].iter().enumerate().map(|(i, (iteration, _))| (*iteration, mean(i))).collect()
    }

    /// The iterations after which a level was first measured, of the seeds that reached it.
    fn reached(&self, level: f64) -> Vec<u64> {
        let first =
            |run: &Vec<(u64, f64)>| run.iter().find(|point| point.1 >= level).map(|point| point.0);
        let mut iterations: Vec<u64> = self.runs.iter().filter_map(first).collect();
        iterations.sort_unstable();
        iterations
    }
}

fn summary(all: &[Runs]) -> Result<String> {
    let mut text = String::from(
        "| schedule | final accuracy, %: mean | deviation | lowest to highest |\n|---|---|---|---|\n",
    );
    for runs in all {
        let last = runs.final_accuracies();
        let count = last.len() as f64;
        let mean = last.iter().sum::<f64>() / count;
        let variance = last.iter().map(|a| (a - mean).powi(2)).sum::<f64>() / (count - 1.).max(1.);
        let (low, high) = (last[0], last[last.len() - 1]);
        writeln!(
            text,
            "| {} | {mean:.2} | {:.2} | {low:.2} to {high:.2} |",
            runs.name,
            variance.sqrt()
        )?;
    }
    text += "\n| iterations to |";
    LEVELS.iter().try_for_each(|level| write!(text, " {level} % |"))?;
    text += "\n|---|";
    text += &"---|".repeat(LEVELS.len());
    for runs in all {
        write!(text, "\n| {} |", runs.name)?;
        for level in LEVELS {
            let reached = runs.reached(level);
            match reached.get(runs.runs.len() / 2) {
                Some(median) if reached.len() == runs.runs.len() => write!(text, " {median} |")?,
                Some(median) => {
                    write!(text, " {median} ({} of {}) |", reached.len(), runs.runs.len())?
                }
                None => write!(text, " – ({} of {}) |", reached.len(), runs.runs.len())?,
            }
        }
    }
    Ok(text + "\n")
}

/// Writes the table of a seed. Another process may be reading the folder, so the table gets its name once it is whole.
fn write_table(args: &Args, mut table: String, runs: &[Vec<(u64, f64)>]) -> Result<()> {
    for (row, (iteration, _)) in runs[0].iter().enumerate() {
        write!(table, "\n{iteration}")?;
        runs.iter().try_for_each(|run| write!(table, ",{:.2}", run[row].1))?;
    }
    let part = args.out.join(format!("part-{}.csv", args.seed));
    std::fs::write(&part, table)?;
    Ok(std::fs::rename(part, args.out.join(format!("seed-{}.csv", args.seed)))?)
}

fn main() -> Result<()> {
    let mut args = Args::parse();
    if args.smoke {
        args.epochs = args.epochs.min(2);
    }
    tch::set_num_threads(1);
    tch_ignite::keep_freed_memory(256 << 20);
    std::fs::create_dir_all(&args.out)?;
    let (train_set, test_set) = data(&args)?;
    let (epoch, run) = (train_set.batches(), args.epochs * train_set.batches());

    let curve = range_test(&train_set)?;
    let (low, high) = bounds(&curve)?;
    println!("range test: {low:.4} to {high:.4}");

    let schedules = schedules((low, high), epoch, run);
    // Tables that could not be summed up with those of this run are refused before it.
    let all = read(&args.out, &schedules, (args.epochs, run))?;
    if !args.summary {
        let mut runs = vec![];
        for (name, schedule) in &schedules {
            let start = Instant::now();
            let run = train(schedule.clone(), args.seed, (&train_set, &test_set), args.epochs)?;
            let (seconds, last) =
                (start.elapsed().as_secs_f64(), run.last().context("no accuracy")?);
            println!("{name}, seed {}: {:.2} %, {seconds:.1} s", args.seed, last.1);
            runs.push(run);
        }
        return write_table(&args, header(&schedules), &runs);
    }

    ensure!(
        all.iter().all(|runs| !runs.runs.is_empty()),
        "there is no seed-N.csv in {}: train with --seed first",
        args.out.display()
    );
    curve.plot(args.out.join("range.svg"))?;
    let rates = schedules
        .iter()
        .map(|(name, schedule)| anyhow::Ok(Curve::new(*name, schedule.simulate_values(run)?)));
    // The first two epochs would leave no room for the rest.
    let later = |runs: &Runs| {
        Curve::new(runs.name, runs.mean().into_iter().filter(|(at, _)| *at >= 2 * epoch))
    };
    let panels = [
        Panel::new("learning rate", rates.collect::<Result<Vec<_>>>()?),
        Panel::new("test accuracy, %", all.iter().map(later)),
    ];
    write_svg(args.out.join("accuracy.svg"), &panels)?;
    std::fs::write(args.out.join("summary.md"), summary(&all)?)?;
    Ok(())
}
