//! Trains a character transformer on a text, in nanoGPT's setting for a CPU: 4 layers of width 128, 64 characters of
//! context, batches of 12, 2,000 iterations of AdamW with warm-up and cosine.
//!
//! `scripts/fetch-text.sh` fetches a text, and `--help` lists the options. With the feature `distributed` it trains on
//! several processes: with `--ranks 2`, or when torchrun or Slurm starts it. `benches/chargpt.py` is the same in PyTorch.

mod model;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use clap::{Parser, ValueEnum};
use tch::nn::VarStore;
use tch::{Device, Kind, Tensor};
use tch_ignite::data::DistributedSampler;
#[cfg(feature = "distributed")]
use tch_ignite::distributed::{
    DdpOptions, DistributedDataParallel, ProcessGroup, ProcessGroupOptions, launch,
};
use tch_ignite::optim::{GroupOptions, is_bias_or_norm, is_matrix};
use tch_ignite::prelude::*;
use tch_ignite::schedule::{Decay, WarmupStableDecay};

use model::{Config, Gpt};

const HIGHEST_LR: f64 = 1e-3;
const LOWEST_LR: f64 = 1e-4;

/// Trains a character transformer on a text.
#[derive(Parser)]
struct Args {
    /// The text
    #[arg(long, value_name = "FILE", default_value = "data/text/input.txt")]
    text: PathBuf,
    /// Updates of the weights
    #[arg(long, value_name = "N", default_value_t = 2000, value_parser = clap::value_parser!(u64).range(1..))]
    iterations: u64,
    /// Windows of the text in an update, over all ranks
    #[arg(long, value_name = "N", default_value_t = 12)]
    batch_size: usize,
    /// Batches that an update is made of
    #[arg(long, value_name = "N", default_value_t = 1)]
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
    /// Folder for checkpoints, history.csv and history.svg
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

#[derive(Clone, Copy, ValueEnum)]
enum Algorithm {
    Adamw,
    Muon,
}

/// The characters of the text in order, and the text as their numbers.
struct Text {
    characters: Vec<char>,
    tokens: Vec<i64>,
}

impl Text {
    fn read(args: &Args) -> Result<Self> {
        let text = std::fs::read_to_string(&args.text).with_context(|| {
            format!("no text in {} (run scripts/fetch-text.sh)", args.text.display())
        })?;
        let mut characters: Vec<char> = text.chars().collect();
        characters.sort_unstable();
        characters.dedup();
        let number = |c| characters.binary_search(&c).map(|number| number as i64);
        let tokens = text.chars().filter_map(|c| number(c).ok()).collect();
        Ok(Self { characters, tokens })
    }

    fn decode(&self, tokens: &Tensor) -> Result<String> {
        let tokens = Vec::<i64>::try_from(tokens.flatten(0, -1))?;
        Ok(tokens.iter().filter_map(|token| self.characters.get(*token as usize)).collect())
    }
}

/// Inputs and targets: the windows of `tokens` that begin at every `step`th character, and the same one character later.
/// Both are views of one tensor.
fn windows(tokens: &[i64], context: i64, step: i64, device: Device) -> Result<(Tensor, Tensor)> {
    let text = Tensor::from_slice(tokens).to_device(device);
    let last = text.size()[0] - 1;
    ensure!(last >= context, "the text is too short for windows of {context} characters");
    let inputs = text.f_narrow(0, 0, last)?.f_unfold(0, context, step)?;
    Ok((inputs, text.f_narrow(0, 1, last)?.f_unfold(0, context, step)?))
}

fn optimizer(args: &Args, vs: &VarStore) -> Result<Optimizer> {
    let (flat, norm) = (is_bias_or_norm(vs), is_bias_or_norm(vs));
    let adamw = GroupOptions::adamw().lr(HIGHEST_LR).betas(0.9, 0.99);
    Ok(match args.optimizer {
        Algorithm::Adamw => Optimizer::adamw(vs)
            .lr(HIGHEST_LR)
            .betas(0.9, 0.99)
            .group("decay", move |name| !flat(name), GroupOptions::new().weight_decay(0.1))
            .group("no decay", norm, GroupOptions::new().weight_decay(0.))
            .build()?,
        Algorithm::Muon => {
            let matrix = is_matrix(vs);
            let hidden = move |name: &str| name.starts_with("h.") && matrix(name);
            let (hidden_too, embedding) = (is_matrix(vs), |name: &str| !name.starts_with("h."));
            let options =
                GroupOptions::new().lr(HIGHEST_LR).weight_decay(0.1).match_rms_adamw(true);
            Optimizer::muon(vs)
                .group("hidden", hidden, options)
                .group(
                    "embeddings",
                    move |name| embedding(name) && hidden_too(name),
                    adamw.clone().weight_decay(0.1),
                )
                .group("no decay", norm, adamw.weight_decay(0.))
                .build()?
        }
    })
}

/// The mean over the characters of a batch, and their number.
fn loss(logits: &Tensor, targets: &Tensor) -> (Tensor, Tensor) {
    let targets = targets.flatten(0, -1);
    (logits.flatten(0, -2).cross_entropy_for_logits(&targets), Tensor::from(targets.numel() as i64))
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
    let per_batch = args.batch_size as u64 / (ranks as u64 * args.accumulate.max(1));
    ensure!(
        per_batch * ranks as u64 * args.accumulate == args.batch_size as u64 && per_batch > 0,
        "--batch-size {} cannot be divided among {ranks} ranks and {} batches",
        args.batch_size,
        args.accumulate
    );
    #[cfg(feature = "distributed")]
    let device = match Device::cuda_if_available() {
        Device::Cuda(_) => Device::Cuda(pg.local_rank()),
        other => other,
    };
    #[cfg(not(feature = "distributed"))]
    let device = Device::cuda_if_available();
    tch::set_num_threads(args.threads);
    tch_ignite::keep_freed_memory(256 << 20);
    tch::manual_seed(args.seed.into());

    let text = Text::read(&args)?;
    config.vocabulary = text.characters.len() as i64;
    let (train, val) = text.tokens.split_at(text.tokens.len() / 10 * 9);
    let val = if args.smoke { &val[..val.len().min(2000)] } else { val };
    let (x, y) = windows(train, config.context, 1, device)?;
    let share = |count: i64| DistributedSampler::new(count as usize, rank, ranks);
    let train = Loader::new(&x, &y, per_batch as usize)?
        .sampler(share(x.size()[0])?.shuffle(args.seed.into()).drop_last(true)?);
    let (x, y) = windows(val, config.context, config.context, device)?;
    let val = Loader::new(&x, &y, 128)?.sampler(share(x.size()[0])?.uneven(true)?);

    let vs = VarStore::new(device);
    let net = Gpt::new(&vs.root(), config);
    let optimizer = optimizer(&args, &vs)?;
    let mut cx = Supervised::new(net, optimizer.clone(), loss)
        .accumulate(args.accumulate)?
        .clip_grad_norm(1.);
    if args.bf16 {
        cx = cx.autocast(Kind::BFloat16);
    }
    let mut trainer = create_supervised_trainer();
    #[cfg(feature = "distributed")]
    {
        cx = cx.data_parallel(DistributedDataParallel::new(&pg, &vs, DdpOptions::new())?);
        trainer.distributed(&pg);
    }
    let mut evaluator = create_supervised_evaluator();
    evaluator.metric(
        "loss",
        Loss::of(|logits: &Tensor, y: &Tensor| loss(logits, y).0, Prediction::parts),
    );

    // The schedules count updates, so a value is for as many batches as an update is made of.
    let warmup = 100.min(args.iterations / 10);
    let schedule = WarmupStableDecay::new(HIGHEST_LR, warmup, 0, args.iterations - warmup)
        .start(HIGHEST_LR / 100.)
        .end(LOWEST_LR)
        .shape(Decay::Cosine);
    let lr = optimizer.knob("lr")?;
    let every = args.accumulate * 250.min(args.iterations);
    let history = History::new().knob("lr", lr.clone()).metric("loss").epoch_metric("val/loss");
    trainer
        .metric("loss", RunningAverage::new())
        .attach(ParamScheduler::new("lr", lr, schedule).on(tch_ignite::engine::OPTIMIZER_STEPPED))
        .attach(Evaluate::on(Event::IterationCompleted.every(every), "val", evaluator, &val))
        .attach(history.clone())
        .attach(ProgressBar::new().metric("loss").metric("val/loss"))
        .on_main(Event::IterationCompleted.every(every), move |_, engine| {
            let (iteration, metrics) = (engine.state.iteration, &engine.state.metrics);
            println!("batch {iteration}: validation loss {:.4}", metrics.get("val/loss")?);
            Ok(())
        })
        .attach(InterruptOn::signals()?)
        .attach(
            Checkpoint::new(args.out.join("checkpoints"))
                .on(Event::IterationCompleted.every(every)),
        )
        .track("model", &vs)
        .track("optimizer", &optimizer);
    if args.resume
        && let Some(resumed) = trainer.resume(&mut cx, args.out.join("checkpoints"))?
    {
        println!("{resumed}");
    }
    let summary =
        trainer.run(&mut cx, &train, Until::iterations(args.iterations * args.accumulate))?;
    if rank > 0 {
        return Ok(());
    }
    history.write_csv(args.out.join("history.csv"))?;
    history.plot(
        args.out.join("history.svg"),
        &[
            ("learning rate", &["lr"]),
            ("training loss", &["loss"]),
            ("validation loss", &["val/loss"]),
        ],
    )?;
    println!("{summary}");
    let start = Tensor::zeros([1, 1], (Kind::Int64, device));
    println!("{}", text.decode(&cx.net.generate(start, args.write, 0.8)?)?);
    println!("validation loss: {:.4}", trainer.state.metrics.get("val/loss")?);
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
