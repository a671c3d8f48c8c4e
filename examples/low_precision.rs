//! Trains a small transformer in f32, in bf16 alone, and in bf16 with each storage of `LowPrecision`, and plots the losses.
//!
//! `cargo run --release --example low_precision` makes docs/low-precision.svg, in about three minutes of one core.

#[path = "chargpt/model.rs"]
#[expect(dead_code, reason = "this example writes no text")]
mod model;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;
use tch::nn::{ModuleT, VarStore};
use tch::{Device, Kind, Tensor};
use tch_ignite::handlers::plot::{Curve, Panel, write_svg};
use tch_ignite::optim::LowPrecision;
use tch_ignite::prelude::*;
use tch_ignite::schedule::CosineAnnealing;

use model::{Config, Gpt};

const CONFIG: Config =
    Config { vocabulary: 24, context: 32, layers: 2, heads: 4, width: 64, dropout: 0. };
const BATCH_SIZE: usize = 16;

/// Plots trainings in f32 and in bf16.
#[derive(Parser)]
struct Args {
    /// Updates of each training
    #[arg(long, value_name = "N", default_value_t = 1500, value_parser = clap::value_parser!(u64).range(1..))]
    iterations: u64,
    /// Learning rate at the beginning; it falls to a hundredth
    #[arg(long, value_name = "LR", default_value_t = 2e-3)]
    lr: f64,
    /// File for the picture
    #[arg(long, value_name = "FILE", default_value = "docs/low-precision.svg")]
    out: PathBuf,
}

/// A language of 24 letters: the two letters before decide between which four the next one is drawn, and how often each
/// comes.
fn language(count: usize) -> Vec<i64> {
    let mut state = 0u64;
    let mut random = || {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
        state >> 33
    };
    let letters = CONFIG.vocabulary as u64;
    let table: Vec<u64> = (0..letters * letters * 4).map(|_| random() % letters).collect();
    let mut text = vec![0, 1];
    while text.len() < count {
        let before = (text[text.len() - 2] * letters + text[text.len() - 1]) as usize;
        let choice = match random() % 20 {
            0..10 => 0,
            10..15 => 1,
            15..18 => 2,
            _ => 3,
        };
        text.push(table[before * 4 + choice]);
    }
    text.into_iter().map(|letter| letter as i64).collect()
}

/// Inputs and targets: all windows of the text, and the same one letter later.
fn windows(text: &[i64], step: i64) -> Result<(Tensor, Tensor)> {
    let text = Tensor::from_slice(text);
    let (context, last) = (CONFIG.context, text.size()[0] - 1);
    let inputs = text.f_narrow(0, 0, last)?.f_unfold(0, context, step)?;
    Ok((inputs, text.f_narrow(0, 1, last)?.f_unfold(0, context, step)?))
}

/// The mean over letters, computed in f32 whatever the scores are.
fn loss(scores: &Tensor, targets: &Tensor) -> Tensor {
    let scores = scores.flatten(0, -2).to_kind(Kind::Float);
    scores.cross_entropy_for_logits(&targets.flatten(0, -1))
}

/// Trains with the same weights and batches as all others, and gives the validation losses.
fn train(args: &Args, kind: Kind, storage: Option<LowPrecision>) -> Result<Vec<(u64, f64)>> {
    let text = language(100_000);
    let (train, validation) = text.split_at(90_000);
    let (x, y) = windows(train, 1)?;
    let data = Loader::new(&x, &y, BATCH_SIZE)?.shuffle(1);
    let (x, y) = windows(validation, CONFIG.context)?;

    let mut losses = vec![];
    tch::manual_seed(1);
    let mut vs = VarStore::new(Device::Cpu);
    let net = Gpt::new(&vs.root(), CONFIG);
    vs.set_kind(kind);
    let optimizer = Optimizer::adamw(&vs)
        .lr(args.lr)
        .betas(0.9, 0.99)
        .weight_decay(0.)
        .low_precision(storage)
        .build()?;
    let mut cx = Supervised::new(net, optimizer.clone(), loss).clip_grad_norm(1.);
    let mut trainer = create_supervised_trainer();
    let schedule = CosineAnnealing::new(args.lr, args.lr / 100., args.iterations);
    trainer.attach(ParamScheduler::new("lr", optimizer.knob("lr")?, schedule));
    let every = (args.iterations / 60).max(1);
    trainer.on(Event::IterationCompleted.every(every), |cx: &mut Supervised<Gpt>, engine| {
        let loss = tch::no_grad(|| loss(&cx.net.forward_t(&x, false), &y));
        losses.push((engine.state.iteration, f64::try_from(loss)?));
        Ok(())
    });
    trainer.run(&mut cx, &data, Until::iterations(args.iterations))?;
    drop(trainer);
    Ok(losses)
}

fn main() -> Result<ExitCode> {
    let args = Args::parse();
    tch::set_num_threads(1);
    let seed = 1;
    let bf16 = Kind::BFloat16;
    let mut curves = vec![];
    for (name, kind, storage) in [
        ("f32", Kind::Float, None),
        ("bf16 alone", bf16, None),
        ("bf16, master weights", bf16, Some(LowPrecision::MasterWeights)),
        ("bf16, Kahan summation", bf16, Some(LowPrecision::KahanSum)),
        ("bf16, stochastic rounding", bf16, Some(LowPrecision::StochasticRounding { seed })),
    ] {
        let losses = train(&args, kind, storage)?;
        println!("{name}: {:.4}", losses.last().map_or(f64::NAN, |(_, loss)| *loss));
        curves.push((name, losses));
    }
    let single = curves[0].1.clone();
    let all = curves.iter().map(|(name, losses)| Curve::new(*name, losses.iter().copied()));
    let above = curves[1..].iter().map(|(name, losses)| {
        let differences = losses.iter().zip(&single).map(|(own, f32)| (own.0, own.1 - f32.1));
        // The first third is as noisy as the learning rate is high.
        Curve::new(*name, differences.skip(losses.len() / 3))
    });
    write_svg(&args.out, &[Panel::new("validation loss", all), Panel::new("above f32", above)])?;
    println!("{}", args.out.display());
    Ok(ExitCode::SUCCESS)
}
