//! Trains a character transformer on a text, in nanoGPT's setting for a CPU: 4 layers of width 128, 64 characters of
//! context, batches of 12, 2,000 iterations of AdamW with warm-up and cosine.
//!
//! `scripts/fetch-text.sh` fetches a text, and `--help` lists the options. With the feature `distributed` it trains on
//! several processes: with `--ranks 2`, or when torchrun or Slurm starts it. `benches/chargpt.py` is the same in PyTorch,
//! and `docs/RESULTS.md` has what came out.

mod model;
mod recipe;
mod text;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, ensure};
use clap::Parser;
use tch::nn::VarStore;
use tch::{Device, Kind, Tensor};
use tch_ignite::data::DistributedSampler;
#[cfg(feature = "distributed")]
use tch_ignite::distributed::{
    DdpOptions, DistributedDataParallel, ProcessGroup, ProcessGroupOptions, launch,
};
use tch_ignite::engine::{OPTIMIZER_STEPPED, Stop};
use tch_ignite::loggers::{CsvLogger, OutputHandler};
use tch_ignite::prelude::*;

use model::{Config, Gpt};
use recipe::Algorithm;
use text::{Text, windows};

/// The number of updates from one evaluation, and checkpoint, to the next.
const EVALUATED_EVERY: u64 = 100;

/// Trains a character transformer on a text.
#[derive(Parser)]
struct Args {
    /// The text
    #[arg(long, value_name = "FILE", default_value = "data/text/input.txt")]
    text: PathBuf,
    /// Updates of the weights
    #[arg(long, value_name = "N", default_value_t = 2000, value_parser = clap::value_parser!(u64).range(1..))]
    iterations: u64,
    /// Ends after this many updates of them, for --resume to go on [default: after all]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    stop_after: Option<u64>,
    /// Windows of the text in an update, over all ranks
    #[arg(long, value_name = "N", default_value_t = 12)]
    batch_size: usize,
    /// Batches that an update is made of
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..))]
    accumulate: u64,
    /// AdamW for all, or Muon for the matrices of the blocks and AdamW for the rest
    #[arg(long, value_enum, default_value_t = Algorithm::Adamw)]
    optimizer: Algorithm,
    /// Computes forward and loss in bfloat16
    #[arg(long)]
    bf16: bool,
    /// Processes on this machine that train together [needs the feature distributed]
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    ranks: u16,
    /// Seed of the weights and of the order of the windows
    #[arg(long, value_name = "N", default_value_t = 1337)]
    seed: u32,
    /// Threads on the CPU
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(i32).range(1..))]
    threads: i32,
    /// Folder for checkpoints and the table of losses, log.csv
    #[arg(long, value_name = "DIR", default_value = "runs/chargpt")]
    out: PathBuf,
    /// Goes on from the newest checkpoint in the output folder, where there is one
    #[arg(long)]
    resume: bool,
    /// Characters to write at the end
    #[arg(long, value_name = "N", default_value_t = 500)]
    write: usize,
    /// Only tries that everything works, in seconds
    #[arg(long)]
    smoke: bool,
}

fn train(mut args: Args) -> Result<()> {
    let mut config =
        Config { vocabulary: 0, context: 64, layers: 4, heads: 4, width: 128, dropout: 0. };
    if args.smoke {
        args.iterations = args.iterations.min(20);
        (config.layers, config.width) = (2, 32);
    }
    #[cfg(feature = "distributed")]
    let pg = ProcessGroup::from_env_or_single(ProcessGroupOptions::new())?;
    #[cfg(feature = "distributed")]
    let (rank, ranks) = (pg.rank(), pg.world_size());
    #[cfg(not(feature = "distributed"))]
    let (rank, ranks) = (0, 1);
    let per_batch = args.batch_size as u64 / (ranks as u64 * args.accumulate);
    ensure!(
        per_batch * ranks as u64 * args.accumulate == args.batch_size as u64 && per_batch > 0,
        "--batch-size {} cannot be divided among {ranks} ranks and {} batches",
        args.batch_size,
        args.accumulate
    );
    let device = Device::cuda_if_available();
    #[cfg(feature = "distributed")]
    let device = if device.is_cuda() { Device::Cuda(pg.local_rank()) } else { device };
    tch::set_num_threads(args.threads);
    tch_ignite::keep_freed_memory(256 << 20);
    tch::manual_seed(args.seed.into());

    let text = Text::read(&args.text)?;
    config.vocabulary = text.characters.len() as i64;
    let (train, val) = text.tokens.split_at(text.tokens.len() * 9 / 10);
    let val = if args.smoke { &val[..val.len().min(2000)] } else { val };
    let share = |x: &Tensor| DistributedSampler::new(x.size()[0] as usize, rank, ranks);
    let (x, y) = windows(train, config.context, 1, device)?;
    let shuffled = share(&x)?.shuffle(args.seed.into()).drop_last(true)?;
    let train = Loader::new(&x, &y, per_batch as usize)?.sampler(shuffled);
    let (x, y) = windows(val, config.context, config.context, device)?;
    let val = Loader::new(&x, &y, 128)?.sampler(share(&x)?.uneven(true)?);

    let vs = VarStore::new(device);
    let net = Gpt::new(&vs.root(), config);
    let optimizer = recipe::optimizer(args.optimizer, &vs)?;
    let mut cx = recipe::context(net, &optimizer).accumulate(args.accumulate)?;
    if args.bf16 {
        cx = cx.autocast(Kind::BFloat16);
    }
    let mut trainer = create_supervised_trainer();
    #[cfg(feature = "distributed")]
    {
        cx = cx.data_parallel(DistributedDataParallel::new(&pg, &vs, DdpOptions::new())?);
        trainer.distributed(&pg);
    }

    let updates = args.stop_after.map_or(args.iterations, |updates| updates.min(args.iterations));
    let (last, every) = (updates * args.accumulate, EVALUATED_EVERY * args.accumulate);
    let evaluated = Event::IterationCompleted.filter(move |n| n % every == 0 || n == last);
    let lr = optimizer.knob("lr")?;
    trainer
        .metric("loss", RunningAverage::new())
        .attach(
            ParamScheduler::new("lr", lr, recipe::schedule(args.iterations)).on(OPTIMIZER_STEPPED),
        )
        .attach(Evaluate::on(evaluated.clone(), "val", recipe::evaluator(), &val))
        .attach(ProgressBar::new().metric("loss").metric("val/loss"))
        .on_main(evaluated.clone(), |_, engine| {
            let (iteration, metrics) = (engine.state.iteration, &engine.state.metrics);
            println!("batch {iteration}: validation loss {:.4}", metrics.get("val/loss")?);
            Ok(())
        })
        .attach(InterruptOn::signals()?)
        .attach(Checkpoint::new(args.out.join("checkpoints")).on(evaluated.clone()))
        .track("model", &vs)
        .track("optimizer", &optimizer);
    if trainer.is_main() {
        let log = CsvLogger::open(args.out.join("log.csv"))?;
        trainer.attach(OutputHandler::new(&log, "", evaluated).metric("loss").metric("val/loss"));
    }
    if args.resume
        && let Some(resumed) = trainer.resume(&mut cx, args.out.join("checkpoints"))?
    {
        println!("{resumed}");
    }
    let summary = trainer.run(&mut cx, &train, Until::iterations(last))?;
    if !trainer.is_main() {
        return Ok(());
    }
    println!("{summary}");
    if !matches!(summary.stop, Stop::Signal(_)) {
        let start = Tensor::zeros([1, 1], (Kind::Int64, device));
        println!("{}", text.decode(&cx.net.generate(start, args.write, 0.8)?)?);
        println!("validation loss: {:.4}", trainer.state.metrics.get("val/loss")?);
    }
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
