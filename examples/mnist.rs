//! Trains a small network on MNIST. There are two parameter groups, and a schedule sets the learning rate of each in
//! every iteration. The run leaves a history as CSV and as a picture.
//!
//! `scripts/mnist.sh` fetches what is needed and runs the example; `--help` lists the options. With the feature
//! `distributed` it trains on several processes: with `--ranks 2`, or when torchrun or Slurm starts it.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use tch::nn::{self, ModuleT, VarStore};
use tch::{Device, Tensor};
use tch_ignite::data::DistributedSampler;
#[cfg(feature = "distributed")]
use tch_ignite::distributed::{
    DdpOptions, DistributedDataParallel, ProcessGroup, ProcessGroupOptions, launch,
};
use tch_ignite::engine::Stop;
use tch_ignite::optim::OptimizerPlan;
use tch_ignite::prelude::*;
use tch_ignite::schedule::{RunLength, SchedulePlan};

/// Trains a small network on MNIST.
#[derive(Parser)]
struct Args {
    /// Folder with the four IDX files, unzipped
    #[arg(long, value_name = "DIR", default_value = "data/mnist")]
    data: PathBuf,
    /// Passes over the training set
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u64).range(1..))]
    epochs: u64,
    /// Processes on this machine that train together [needs the feature distributed]
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    ranks: u16,
    /// Pictures in a batch, over all ranks
    #[arg(long, value_name = "N", default_value_t = 64)]
    batch_size: usize,
    /// How much of the hidden layer is dropped out in training
    #[arg(long, value_name = "P", default_value_t = 0.3, value_parser = probability)]
    dropout: f64,
    /// Optimizer with groups base and fc, and schedules, from this JSON or TOML file [default: built in]
    #[arg(long, value_name = "FILE")]
    plan: Option<PathBuf>,
    /// Seed of the parameters, the dropout and the order of the pictures
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u32,
    /// Threads on the CPU; with one, a seed gives the same numbers on any number of cores
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(i32).range(1..))]
    threads: i32,
    /// Trains on the CPU, also where there is a GPU for each rank
    #[arg(long)]
    cpu: bool,
    /// Folder for history.csv and history.svg
    #[arg(long, value_name = "DIR", default_value = "runs/mnist")]
    out: PathBuf,
    /// Goes on from the newest checkpoint in the output folder, where there is one
    #[arg(long)]
    resume: bool,
    /// Only tries that everything works, on a few pictures, in seconds
    #[arg(long)]
    smoke: bool,
}

fn probability(text: &str) -> Result<f64, String> {
    let number = text.parse::<f64>().ok().filter(|number| (0. ..1.).contains(number));
    number.ok_or_else(|| "it must be from 0 to below 1".into())
}

fn network(vs: &VarStore, dropout: f64) -> impl ModuleT + use<> {
    let root = vs.root();
    // With weights of 0 in the last layer, every digit has the same score at the start.
    let zero = nn::LinearConfig { ws_init: nn::Init::Const(0.), ..Default::default() };
    nn::seq_t()
        .add(nn::conv2d(&root / "conv1", 1, 16, 5, Default::default()))
        .add_fn(|x| x.max_pool2d_default(2).relu())
        .add(nn::conv2d(&root / "conv2", 16, 32, 5, Default::default()))
        .add_fn(|x| x.max_pool2d_default(2).relu().flat_view())
        .add(nn::linear(&root / "fc1", 512, 128, Default::default()))
        .add_fn_t(move |x, train| x.relu().dropout(dropout, train))
        .add(nn::linear(&root / "fc2", 128, 10, zero))
}

/// Two groups, each with a learning rate of its own.
fn optimizer(args: &Args, vs: &VarStore) -> Result<Optimizer> {
    Ok(match &args.plan {
        Some(file) => OptimizerPlan::from_path(file)?.build(vs)?,
        None => Optimizer::sgd(vs)
            .momentum(0.9)
            .weight_decay(5e-4)
            .group("base", |name| name.starts_with("conv"), lr(0.05))
            .group("fc", |name| name.starts_with("fc"), lr(0.05))
            .build()?,
    })
}

/// Loaders of this rank's share of the training and test set, on the device, normalised by mean and standard
/// deviation of the training set.
fn data(args: &Args, device: Device, rank: usize, ranks: usize) -> Result<(Loader, Loader)> {
    ensure!(
        args.batch_size.is_multiple_of(ranks),
        "a batch of {} pictures cannot be divided among {ranks} ranks: choose another --batch-size",
        args.batch_size
    );
    let set = tch::vision::mnist::load_dir(&args.data).with_context(|| {
        format!("no MNIST in {} (run scripts/fetch-mnist.sh to get it)", args.data.display())
    })?;
    let (mean, std) = (set.train_images.mean(None), set.train_images.std(true));
    let loader = |images: &Tensor, labels: &Tensor, batch_size, at_most: i64| {
        let count = if args.smoke { at_most.min(images.size()[0]) } else { images.size()[0] };
        let images = ((images.narrow(0, 0, count) - &mean) / &std).f_view([-1, 1, 28, 28])?;
        let labels = labels.f_narrow(0, 0, count)?.to_device(device);
        anyhow::Ok(Loader::new(&images.to_device(device), &labels, batch_size)?)
    };
    let train = loader(&set.train_images, &set.train_labels, args.batch_size / ranks, 1024)?;
    let test = loader(&set.test_images, &set.test_labels, 500, 500)?;
    let share = |loader: &Loader| DistributedSampler::new(loader.samples() as usize, rank, ranks);
    let (padded, whole) = (share(&train)?.shuffle(args.seed.into()), share(&test)?.uneven(true)?);
    Ok((train.sampler(padded), test.sampler(whole)))
}

fn train(mut args: Args) -> Result<()> {
    #[cfg(feature = "distributed")]
    let pg = ProcessGroup::from_env_or_single(
        ProcessGroupOptions::new().timeout(std::time::Duration::from_secs(300)),
    )?;
    #[cfg(feature = "distributed")]
    let (rank, ranks, index) = (pg.rank(), pg.world_size(), pg.local_rank());
    #[cfg(not(feature = "distributed"))]
    let (rank, ranks, index) = (0, 1, 0);
    let device = match Device::cuda_if_available() {
        Device::Cuda(_) if !args.cpu => Device::Cuda(index),
        _ => Device::Cpu,
    };
    if let Device::Cuda(index) = device {
        let count = tch::Cuda::device_count();
        ensure!((index as i64) < count, "rank {rank} has no GPU, there are {count}: try --cpu");
    }
    if args.smoke {
        args.epochs = args.epochs.min(2);
    }
    std::fs::create_dir_all(&args.out)
        .with_context(|| format!("cannot make the folder {}", args.out.display()))?;
    tch::set_num_threads(args.threads);
    tch_ignite::keep_freed_memory(256 << 20);
    tch::manual_seed(args.seed.into());
    let (train_loader, test_loader) = data(&args, device, rank, ranks)?;
    let vs = VarStore::new(device);
    let net = network(&vs, args.dropout);
    let optimizer = optimizer(&args, &vs)?;
    let (base, fc) = (optimizer.group("base")?, optimizer.group("fc")?);
    let cross_entropy = |y_pred: &Tensor, y: &Tensor| y_pred.cross_entropy_for_logits(y);
    let mut model = Supervised::new(net, optimizer.clone(), cross_entropy);
    if ranks > 1 {
        // All ranks have made the same weights with the same seed; from here on each draws its own dropout.
        tch::manual_seed(i64::from(args.seed) + rank as i64);
    }
    #[cfg(feature = "distributed")]
    {
        model = model.data_parallel(DistributedDataParallel::new(&pg, &vs, DdpOptions::new())?);
    }

    let mut evaluator = create_supervised_evaluator();
    evaluator.metric("accuracy", Accuracy::of(Prediction::parts));
    let mut trainer = create_supervised_trainer();
    #[cfg(feature = "distributed")]
    trainer.distributed(&pg);
    trainer.metric("loss", RunningAverage::new().alpha(0.9));

    if let Some(file) = &args.plan {
        let plan = SchedulePlan::from_path(file)?;
        let run = RunLength::new(train_loader.batches(), args.epochs);
        plan.check(run)?.iter().for_each(|warning| eprintln!("warning: {warning}"));
        for scheduler in plan.bind(&optimizer, run)? {
            trainer.attach(scheduler.save_history(true));
        }
    } else {
        // The learning rate of the convolutions goes through a cycle in every epoch, that of the linear layers falls
        // once over the whole run.
        let (high, start) = (base.lr()?, fc.lr()?);
        let epoch = train_loader.batches().max(2);
        let run = args.epochs.saturating_mul(epoch);
        let cyclical = LinearCyclicalScheduler::new(&base, "lr", high / 20., high, epoch);
        trainer
            .attach(cyclical.end_value_mult(0.7).save_history(true))
            .attach(CosineAnnealingScheduler::new(&fc, "lr", start, 0., run).save_history(true));
    }

    let (base, fc) = (base.knob("lr")?, fc.knob("lr")?);
    let bar = ProgressBar::new()
        .metric("loss")
        .metric("val/accuracy")
        .knob("lr (base)", base.clone())
        .knob("lr (fc)", fc.clone());
    let history = History::new()
        .knob("lr (base)", base)
        .knob("lr (fc)", fc)
        .metric("loss")
        .epoch_metric("val/accuracy");
    trainer
        .attach(bar.clone())
        .attach(Evaluate::each_epoch("val", evaluator, &test_loader))
        .attach(history.clone())
        .on_main(Event::EpochCompleted, move |_, engine| {
            let accuracy = 100. * engine.state.metrics.get("val/accuracy")?;
            bar.suspend(|| println!("epoch {}: test accuracy {accuracy:.2} %", engine.state.epoch));
            Ok(())
        });
    trainer
        .attach(InterruptOn::signals()?)
        .attach(Checkpoint::new(args.out.join("checkpoints")))
        .track("model", &vs)
        .track("optimizer", &optimizer);
    let is_main = trainer.is_main();
    if args.resume {
        match trainer.resume(&mut model, args.out.join("checkpoints"))? {
            _ if !is_main => {}
            Some(resumed) => println!("{resumed}"),
            None => println!("no checkpoint to resume: starting anew"),
        }
    }
    let summary = trainer.run(&mut model, &train_loader, Until::epochs(args.epochs))?;
    if !is_main {
        return Ok(());
    }
    if let Stop::Signal(_) = summary.stop {
        println!("{summary}; go on with --resume");
        return Ok(());
    }

    history.write_csv(args.out.join("history.csv"))?;
    history.plot(
        args.out.join("history.svg"),
        &[
            ("learning rate", &["lr (base)", "lr (fc)"]),
            ("training loss", &["loss"]),
            ("test accuracy", &["val/accuracy"]),
        ],
    )?;
    println!("{summary}\nhistory.csv and history.svg are in {}", args.out.display());
    println!("test accuracy: {:.2} %", 100. * trainer.state.metrics.get("val/accuracy")?);
    Ok(())
}

/// Trains in this process, or in several processes that it starts.
fn main() -> Result<ExitCode> {
    let args = Args::parse();
    if args.ranks > 1 {
        #[cfg(feature = "distributed")]
        if let Some(ended) = launch::spawn(args.ranks.into())? {
            return Ok(ended.exit_code());
        }
        #[cfg(not(feature = "distributed"))]
        anyhow::bail!("--ranks needs the feature distributed: cargo run --features distributed …");
    }
    train(args)?;
    Ok(ExitCode::SUCCESS)
}
