//! Metrics of one predicted number: ignite's `ignite.metrics.regression`.
//!
//! All take `y_pred` and `y` of floating point, (N,) or (N, 1).

mod canberra_metric;
mod fractional_absolute_error;
mod fractional_bias;
mod geometric_mean_absolute_error;
mod geometric_mean_relative_absolute_error;
mod kendall_rank_correlation;
mod manhattan_distance;
mod maximum_absolute_error;
mod mean_absolute_relative_error;
mod mean_error;
mod mean_normalized_bias;
mod median_absolute_error;
mod median_absolute_percentage_error;
mod median_relative_absolute_error;
mod pearson_correlation;
mod r2_score;
mod spearman_rank_correlation;
mod wave_hedges_distance;

pub use canberra_metric::CanberraMetric;
pub use fractional_absolute_error::FractionalAbsoluteError;
pub use fractional_bias::FractionalBias;
pub use geometric_mean_absolute_error::GeometricMeanAbsoluteError;
pub use geometric_mean_relative_absolute_error::GeometricMeanRelativeAbsoluteError;
pub use kendall_rank_correlation::{KendallRankCorrelation, KendallVariant};
pub use manhattan_distance::ManhattanDistance;
pub use maximum_absolute_error::MaximumAbsoluteError;
pub use mean_absolute_relative_error::MeanAbsoluteRelativeError;
pub use mean_error::MeanError;
pub use mean_normalized_bias::MeanNormalizedBias;
pub use median_absolute_error::MedianAbsoluteError;
pub use median_absolute_percentage_error::MedianAbsolutePercentageError;
pub use median_relative_absolute_error::MedianRelativeAbsoluteError;
pub use pearson_correlation::PearsonCorrelation;
pub use r2_score::R2Score;
pub use spearman_rank_correlation::SpearmanRankCorrelation;
pub use wave_hedges_distance::WaveHedgesDistance;

use tch::{TchError, Tensor};

use super::classification::ranks;
use super::gathered;
use super::pairwise::of_pair;
use super::to_value::{double, host};

/// Both as (N,) in the accumulator's type, and N.
fn columns(y_pred: &Tensor, y: &Tensor) -> anyhow::Result<(Tensor, Tensor, u64)> {
    for (name, tensor) in [("y_pred", y_pred), ("y", y)] {
        let shape = tensor.size();
        anyhow::ensure!(
            matches!(shape.as_slice(), [_] | [_, 1]),
            "Input {name} should have shape (N,) or (N, 1), but given {shape:?}"
        );
        anyhow::ensure!(
            tensor.is_floating_point(),
            "Input {name} dtype should be float 16, 32 or 64, but given {:?}",
            tensor.kind()
        );
    }
    anyhow::ensure!(
        y_pred.size() == y.size(),
        "Input data shapes should be the same, but given {:?} and {:?}",
        y_pred.size(),
        y.size()
    );
    let column = |tensor: &Tensor| double(tensor)?.f_reshape([-1]);
    Ok((column(y_pred)?, column(y)?, y.size()[0] as u64))
}

/// What is wrong where `y` is divided by.
fn no_zeros(y: &Tensor) -> Result<Vec<(Tensor, String)>, TchError> {
    Ok(vec![(y.f_eq(0.)?.f_any()?, "The ground truth has 0.".into())])
}

/// The median; the mean of the two in the middle where the number is even.
fn median(values: &Tensor) -> Result<Tensor, TchError> {
    let n = values.size()[0];
    let at = |k: i64| Ok::<_, TchError>(values.f_kthvalue(k, 0, false)?.0);
    match n % 2 {
        0 => at(n / 2)?.f_add(&at(n / 2 + 1)?)?.f_div_scalar(2.),
        _ => at(n / 2 + 1),
    }
}
