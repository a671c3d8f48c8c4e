//! Metrics of text: ignite's `ignite.metrics.nlp`. All but [`Perplexity`] count on the host.

mod bleu;
mod error_rate;
mod ngrams;
mod perplexity;
mod rouge;

pub use bleu::{Bleu, BleuAverage, Smooth};
pub use error_rate::{CharacterErrorRate, WordErrorRate};
pub use perplexity::Perplexity;
pub use rouge::{MultiRef, Rouge, RougeVariant};

use tch::Tensor;

use super::pairwise::of_pair;
use super::to_value::{double, host};
use super::{Accumulated, Reduce};

/// Sums on the host, listed as one part.
fn listed(name: &str, sums: &[f64]) -> anyhow::Result<Vec<Accumulated>> {
    Ok(vec![Accumulated::new(name, Tensor::f_from_slice(sums)?, Reduce::Sum)])
}

/// What [`listed`] gave; zeros of nothing.
fn unlisted(name: &str, state: &[Accumulated], length: usize) -> anyhow::Result<Vec<f64>> {
    if state.is_empty() {
        return Ok(vec![0.; length]);
    }
    let sums = host::<f64>(&Accumulated::find(state, name)?)?;
    anyhow::ensure!(sums.len() == length, "'{name}' has {} numbers, not {length}", sums.len());
    Ok(sums)
}
