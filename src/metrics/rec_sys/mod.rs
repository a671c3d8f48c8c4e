//! Metrics of recommendations: ignite's `ignite.metrics.rec_sys`.

mod hit_rate;
mod ndcg;

pub use hit_rate::HitRate;
pub use ndcg::{Gain, NDCG};

use tch::Tensor;

use super::to_value::double;
use crate::error::{Error, Result};

fn check_top_k(top_k: &[i64]) -> Result<()> {
    match top_k.first() {
        None => Err(Error::invalid("top_k must have at least one positive value")),
        Some(k) if *k <= 0 => Err(Error::invalid(format!(
            "top_k must be list of positive integers only, but given {top_k:?}"
        ))),
        _ => Ok(()),
    }
}

/// Both (N, items), with at least so many items.
fn check(y_pred: &Tensor, y: &Tensor, items: i64) -> anyhow::Result<()> {
    let shape = y_pred.size();
    anyhow::ensure!(
        shape == y.size() && shape.len() == 2,
        "y_pred and y must be in the same shape (N, items), got {shape:?} != {:?}.",
        y.size()
    );
    anyhow::ensure!(shape[1] >= items, "top_k is up to {items}, but there are {} items", shape[1]);
    Ok(())
}
