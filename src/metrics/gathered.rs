//! The state of metrics that need all samples at once.

use tch::{TchError, Tensor};

use super::{Contribution, Parts, Reduce};

pub(super) const PARTS: Parts = &[("predictions", Reduce::Concat), ("targets", Reduce::Concat)];

/// Makes a contribution that keeps a copy of a batch; `y_pred` and `y` are (N,), (N, 1) or (N, C) each.
pub(super) fn gather(y_pred: &Tensor, y: &Tensor) -> anyhow::Result<Contribution> {
    for (name, tensor) in [("Predictions", y_pred), ("Targets", y)] {
        anyhow::ensure!(
            (1..=2).contains(&tensor.dim()),
            "{name} should be of shape (batch_size, n_targets) or (batch_size, ), but given {:?}",
            tensor.size()
        );
    }
    let samples = y.size().first().copied().unwrap_or(0);
    anyhow::ensure!(
        y_pred.size().first() == Some(&samples),
        "y_pred and y must have as many samples, but given {:?} and {:?}",
        y_pred.size(),
        y.size()
    );
    Ok(Contribution::new([kept(y_pred)?, kept(y)?], samples as u64))
}

/// Copies a tensor, because the step may write into its own. One column, (N, 1), becomes (N,).
fn kept(tensor: &Tensor) -> Result<Tensor, TchError> {
    let tensor = if tensor.size().get(1) == Some(&1) {
        tensor.f_squeeze_dim(1)?
    } else {
        tensor.f_detach()?
    };
    tensor.f_to_dtype(tensor.kind(), false, true)
}
