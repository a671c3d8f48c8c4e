//! Distances of predictions from targets.

mod cosine_similarity;
mod entropy;
mod hsic;
mod js_divergence;
mod kl_divergence;
mod maximum_mean_discrepancy;
mod mean_absolute_error;
mod mean_pairwise_distance;
mod mean_squared_error;
mod mutual_information;
mod psnr;
mod root_mean_squared_error;
mod ssim;

pub use cosine_similarity::CosineSimilarity;
pub use entropy::Entropy;
pub use hsic::HSIC;
pub use js_divergence::JSDivergence;
pub use kl_divergence::KLDivergence;
pub use maximum_mean_discrepancy::MaximumMeanDiscrepancy;
pub use mean_absolute_error::MeanAbsoluteError;
pub use mean_pairwise_distance::MeanPairwiseDistance;
pub use mean_squared_error::MeanSquaredError;
pub use mutual_information::MutualInformation;
pub use psnr::PSNR;
pub use root_mean_squared_error::RootMeanSquaredError;
pub use ssim::SSIM;

use tch::{TchError, Tensor};

use super::pairwise::of_pair;
use super::to_value::{accumulator_kind, double};

/// Both in the accumulator's type, `y` in the shape of `y_pred`, and the number of samples.
fn alike(y_pred: &Tensor, y: &Tensor) -> anyhow::Result<(Tensor, Tensor, u64)> {
    anyhow::ensure!(
        y_pred.numel() == y.numel(),
        "y_pred and y must have as many elements, but given {:?} and {:?}",
        y_pred.size(),
        y.size()
    );
    let samples = y.size().first().copied().unwrap_or(1) as u64;
    Ok((double(y_pred)?, double(&y.f_reshape_as(y_pred)?)?, samples))
}

/// The same shape, of at least so many dimensions.
fn same_shape(y_pred: &Tensor, y: &Tensor, dimensions: usize) -> anyhow::Result<()> {
    anyhow::ensure!(
        y_pred.size() == y.size() && y.dim() >= dimensions,
        "Expected y_pred and y to have the same shape of {dimensions} or more dimensions. Got y_pred: {:?} and y: {:?}.",
        y_pred.size(),
        y.size()
    );
    Ok(())
}

fn same_kind(y_pred: &Tensor, y: &Tensor) -> anyhow::Result<()> {
    anyhow::ensure!(
        y_pred.kind() == y.kind(),
        "Expected y_pred and y to have the same data type. Got y_pred: {:?} and y: {:?}.",
        y_pred.kind(),
        y.kind()
    );
    Ok(())
}

/// Logits as rows, (N, C, …) to (N·…, C), in the accumulator's type.
fn logits(tensor: &Tensor) -> anyhow::Result<Tensor> {
    let shape = tensor.size();
    anyhow::ensure!(
        shape.len() > 1,
        "must be in the shape of (B, C) or (B, C, ...), got {shape:?}"
    );
    Ok(rows(&double(tensor)?, shape[1])?)
}

fn rows(tensor: &Tensor, classes: i64) -> Result<Tensor, TchError> {
    tensor.f_movedim_int(1, -1)?.f_reshape([-1, classes])
}

/// |a|² + |b|² − 2 a·b of all pairs of rows.
fn squared_distances(a: &Tensor, b: &Tensor) -> Result<Tensor, TchError> {
    let squares = |rows: &Tensor| rows.f_square()?.f_sum_dim_intlist(1i64, true, None);
    let products = a.f_matmul(&b.f_transpose(0, 1)?)?.f_mul_scalar(2.)?;
    squares(a)?.f_add(&squares(b)?.f_transpose(0, 1)?)?.f_sub(&products)
}
