//! How the network is trained: optimizer, learning rate, loss, clipping. All but Muon is nanoGPT's.

use anyhow::Result;
use clap::ValueEnum;
use tch::nn::VarStore;
use tch::{Reduction, Tensor};
use tch_ignite::optim::{GroupOptions, is_bias_or_norm};
use tch_ignite::prelude::*;
use tch_ignite::schedule::{Decay, WarmupStableDecay};

use super::model::Gpt;

/// The highest learning rate.
const LR: f64 = 1e-3;

#[derive(Clone, Copy, ValueEnum)]
pub enum Algorithm {
    Adamw,
    Muon,
}

/// AdamW for all, or Muon for the matrices of the blocks and AdamW for the rest. Norms do not decay.
pub fn optimizer(algorithm: Algorithm, vs: &VarStore) -> Result<Optimizer> {
    let (flat, norm) = (is_bias_or_norm(vs), is_bias_or_norm(vs));
    let adamw = |options: GroupOptions| options.lr(LR).betas(0.9, 0.99);
    Ok(match algorithm {
        Algorithm::Adamw => Optimizer::adamw(vs)
            .group("decay", move |name| !flat(name), adamw(GroupOptions::new()).weight_decay(0.1))
            .group("no decay", norm, adamw(GroupOptions::new()).weight_decay(0.))
            .build()?,
        Algorithm::Muon => {
            let embedding = |name: &str| name.starts_with("wte.") || name.starts_with("wpe.");
            let muon = GroupOptions::new().lr(LR).weight_decay(0.1).match_rms_adamw(true);
            Optimizer::muon(vs)
                .group("hidden", move |name| !flat(name) && !embedding(name), muon)
                .group("embeddings", embedding, adamw(GroupOptions::adamw()).weight_decay(0.1))
                .group("no decay", norm, adamw(GroupOptions::adamw()).weight_decay(0.))
                .build()?
        }
    })
}

/// The learning rate of each update.
pub fn schedule(updates: u64) -> WarmupStableDecay {
    let warmup = 100.min(updates / 10);
    WarmupStableDecay::new(LR, warmup, 0, updates - warmup)
        .start(LR / (warmup + 1) as f64)
        .end(LR / 10.)
        .shape(Decay::Cosine)
}

/// The mean over the characters of a batch, and their number.
pub fn loss(logits: &Tensor, targets: &Tensor) -> (Tensor, i64) {
    let (logits, targets) = (logits.flatten(0, -2), targets.flatten(0, -1));
    let weight = None::<Tensor>;
    let loss = logits.cross_entropy_loss(&targets, weight, Reduction::Mean, -100, 0.);
    (loss, targets.numel() as i64)
}

/// The net with its optimizer, loss and clipping.
pub fn context(net: Gpt, optimizer: &Optimizer) -> Supervised<Gpt> {
    Supervised::new(net, optimizer.clone(), loss).clip_grad_norm(1.)
}

/// An evaluator with the metric `loss`.
pub fn evaluator<'a>() -> Evaluator<'a, Supervised<Gpt>> {
    let mut evaluator = create_supervised_evaluator();
    let loss = |logits: &Tensor, targets: &Tensor| loss(logits, targets).0;
    evaluator.metric("loss", Loss::of(loss, Prediction::parts));
    evaluator
}
