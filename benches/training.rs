//! Trains one epoch on Fashion-MNIST, either with this crate, schedules, metrics and a bar, or with tch's plain loop.
//! `scripts/bench.sh training` runs both, and PyTorch's and ignite's ways in `training.py`.
//!
//! Prints one line of JSON: samples per second, seconds from the start of the process to the first loss, the most
//! memory that the process used, and the accuracy on the test set.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::{Parser, ValueEnum};
use tch::nn::{self, ModuleT, OptimizerConfig, VarStore};
use tch::{Device, Kind, Tensor, data::Iter2};
use tch_ignite::amp::autocast;
use tch_ignite::memory_format;
use tch_ignite::prelude::*;

#[derive(Parser)]
struct Args {
    #[arg(long, default_value = "data/fashion-mnist")]
    data: PathBuf,
    #[arg(long, value_enum, default_value_t = Way::Ours)]
    way: Way,
    #[arg(long, value_enum, default_value_t = Model::Mlp)]
    model: Model,
    #[arg(long, default_value_t = 64)]
    batch_size: usize,
    /// Ours only: pictures and kernels with the channels last
    #[arg(long)]
    channels_last: bool,
    /// Ours only: autocast to bf16
    #[arg(long)]
    bf16: bool,
    /// Both: memory that was freed stays with the process
    #[arg(long)]
    keep_freed_memory: bool,
    /// cargo bench always passes this option
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Clone, Copy, ValueEnum, PartialEq)]
enum Way {
    Ours,
    Tch,
}

#[derive(Clone, Copy, ValueEnum)]
enum Model {
    Mlp,
    Cnn,
}

const MEAN: f64 = 0.2860;
const STD: f64 = 0.3530;

fn network(vs: &VarStore, model: Model) -> nn::SequentialT {
    let root = vs.root();
    let linear =
        |name, inputs, outputs| nn::linear(&root / name, inputs, outputs, Default::default());
    match model {
        Model::Mlp => nn::seq_t()
            .add_fn(|x| x.flatten(1, -1))
            .add(linear("fc1", 784, 256))
            .add_fn(|x| x.relu())
            .add(linear("fc2", 256, 128))
            .add_fn(|x| x.relu())
            .add(linear("fc3", 128, 10)),
        Model::Cnn => nn::seq_t()
            .add(nn::conv2d(&root / "conv1", 1, 32, 5, Default::default()))
            .add_fn(|x| x.max_pool2d_default(2).relu())
            .add(nn::conv2d(&root / "conv2", 32, 64, 5, Default::default()))
            .add_fn(|x| x.max_pool2d_default(2).relu().flatten(1, -1))
            .add(linear("fc1", 1024, 256))
            .add_fn(|x| x.relu())
            .add(linear("fc2", 256, 10)),
    }
}

/// The bytes of an IDX file after its header.
fn idx(folder: &Path, name: &str, shape: &[i64]) -> Result<Tensor> {
    let file = folder.join(name);
    let bytes = fs::read(&file)
        .with_context(|| format!("no {} (scripts/fetch-mnist.sh --fashion)", file.display()))?;
    let count = shape.iter().product::<i64>() as usize;
    ensure!(bytes.len() >= count, "{} is too short", file.display());
    Ok(Tensor::from_slice(&bytes[bytes.len() - count..]).f_reshape(shape)?)
}

/// Seconds since the process was started.
fn seconds() -> Result<f64> {
    let uptime = fs::read_to_string("/proc/uptime")?;
    let stat = fs::read_to_string("/proc/self/stat")?;
    let uptime: f64 = uptime.split(' ').next().context("/proc/uptime")?.parse()?;
    let ticks: f64 =
        stat.rsplit(')').next().and_then(|s| s.split(' ').nth(20)).context("stat")?.parse()?;
    Ok(uptime - ticks / 100.)
}

fn peak_memory_mb() -> Result<f64> {
    let status = fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find(|line| line.starts_with("VmHWM")).context("VmHWM")?;
    Ok(line.split_whitespace().nth(1).context("VmHWM")?.parse::<f64>()? / 1024.)
}

struct Training {
    net: nn::SequentialT,
    optimizer: Optimizer,
    bf16: bool,
    first: Option<f64>,
}

type Output = (f64, Tensor, Tensor);

fn parts((_, y_pred, y): &Output) -> (&Tensor, &Tensor) {
    (y_pred, y)
}

/// Trains with this crate: uint8 pictures in memory, two schedules, three metrics and a bar.
fn ours(args: &Args, vs: &VarStore, net: nn::SequentialT) -> Result<(f64, f64, nn::SequentialT)> {
    let images = idx(&args.data, "train-images-idx3-ubyte", &[60_000, 1, 28, 28])?;
    let labels = idx(&args.data, "train-labels-idx1-ubyte", &[60_000])?.to_kind(Kind::Int64);
    let loader =
        Loader::new(&images, &labels, args.batch_size)?.normalize(&[MEAN], &[STD])?.shuffle(1);
    drop((images, labels));
    if args.channels_last {
        memory_format::channels_last_parameters(vs)?;
    }
    let optimizer = Optimizer::adam(vs).lr(1e-3).build()?;
    let group = optimizer.groups()?.pop().context("a group")?;
    let steps = loader.batches();
    let channels_last = args.channels_last;
    let mut trainer = Engine::new(
        move |cx: &mut Training, _: &mut Engine<'_, _, _, Output>, (x, y): (Tensor, Tensor)| {
            cx.optimizer.zero_grad()?;
            let x = if channels_last { memory_format::to_channels_last(&x)? } else { x };
            let forward = || cx.net.forward_t(&x, true);
            let y_pred = if cx.bf16 {
                autocast(Device::Cpu, Kind::BFloat16, forward)?.to_kind(Kind::Float)
            } else {
                forward()
            };
            let loss = y_pred.cross_entropy_for_logits(&y);
            loss.f_backward()?;
            cx.optimizer.step()?;
            let loss = loss.double_value(&[]);
            if cx.first.is_none() {
                cx.first = Some(seconds()?);
            }
            Ok((loss, y_pred.detach(), y))
        },
    );
    trainer
        .metric("accuracy", Accuracy::of(parts))
        .metric("nll", Loss::of(|y_pred, y| y_pred.cross_entropy_for_logits(y), parts))
        .metric("loss", RunningAverage::of(|output: &Output| output.0))
        .attach(ParamScheduler::new(
            "lr",
            group.knob("lr")?,
            CosineAnnealing::new(1e-3, 5e-4, 2 * steps),
        ))
        .attach(ParamScheduler::new(
            "eps",
            group.knob("eps")?,
            LinearCyclical::new(1e-8, 1.1e-8, steps),
        ))
        .attach(ProgressBar::new().metric("loss"));
    let mut cx = Training { net, optimizer, bf16: args.bf16, first: None };
    let start = Instant::now();
    trainer.run(&mut cx, &loader, Until::epochs(1))?;
    Ok((start.elapsed().as_secs_f64(), cx.first.context("no batch")?, cx.net))
}

/// Trains in a plain loop, as tch's examples do.
fn plain(args: &Args, vs: &VarStore, net: nn::SequentialT) -> Result<(f64, f64, nn::SequentialT)> {
    let images = idx(&args.data, "train-images-idx3-ubyte", &[60_000, 1, 28, 28])?;
    let images = ((images.to_kind(Kind::Float) / 255.) - MEAN) / STD;
    let labels = idx(&args.data, "train-labels-idx1-ubyte", &[60_000])?.to_kind(Kind::Int64);
    let mut optimizer = nn::Adam::default().build(vs, 1e-3)?;
    let mut first = None;
    let start = Instant::now();
    for (x, y) in Iter2::new(&images, &labels, args.batch_size as i64).shuffle() {
        let loss = net.forward_t(&x, true).cross_entropy_for_logits(&y);
        optimizer.backward_step(&loss);
        loss.double_value(&[]);
        if first.is_none() {
            first = Some(seconds()?);
        }
    }
    Ok((start.elapsed().as_secs_f64(), first.context("no batch")?, net))
}

fn main() -> Result<()> {
    let args = Args::parse();
    if args.keep_freed_memory {
        ensure!(tch_ignite::keep_freed_memory(512 << 20), "this needs glibc");
    }
    tch::manual_seed(0);
    let vs = VarStore::new(Device::Cpu);
    let net = network(&vs, args.model);
    let (took, first, net) = match args.way {
        Way::Ours => ours(&args, &vs, net)?,
        Way::Tch => plain(&args, &vs, net)?,
    };
    let peak = peak_memory_mb()?;
    let images = idx(&args.data, "t10k-images-idx3-ubyte", &[10_000, 1, 28, 28])?;
    let images = ((images.to_kind(Kind::Float) / 255.) - MEAN) / STD;
    let labels = idx(&args.data, "t10k-labels-idx1-ubyte", &[10_000])?.to_kind(Kind::Int64);
    let accuracy = tch::no_grad(|| net.forward_t(&images, false).accuracy_for_logits(&labels));
    println!(
        "{{\"samples_per_second\": {:.0}, \"first_batch\": {first:.2}, \"peak_mb\": {peak:.0}, \"accuracy\": {:.4}}}",
        60_000. / took,
        accuracy.double_value(&[])
    );
    Ok(())
}
