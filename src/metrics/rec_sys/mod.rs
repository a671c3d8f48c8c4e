//! Metrics of recommendations: ignite's `ignite.metrics.rec_sys`.

mod hit_rate;
mod ndcg;

pub use hit_rate::HitRate;
pub use ndcg::{Gain, NDCG};

use tch::Tensor;

use super::value::double;

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
