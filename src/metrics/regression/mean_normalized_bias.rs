use tch::Tensor;

use super::{columns, no_zeros, of_pair};
use crate::metrics::MetricValue;
use crate::metrics::{Contribution, Pairwise, Parts, Reduce};

/// The mean of (y − y_pred) / y: ignite's `MeanNormalizedBias`.
///
/// `y_pred` and `y` are of floating point, (N,) or (N, 1). `y` must not be 0. No host sync.
///
/// ```
/// use tch::Tensor;
/// use tch_ignite::metrics::{Metric, pair, regression::MeanNormalizedBias};
/// let mut metric = MeanNormalizedBias::of(pair);
/// let y_pred = Tensor::from_slice(&[1., 2.]);
/// metric.update(&(y_pred, Tensor::from_slice(&[2., 4.])))?;
/// assert!((metric.compute()?.read()? - 0.5).abs() < 1e-12);
/// # anyhow::Ok(())
/// ```
#[derive(Debug, Default)]
pub struct MeanNormalizedBias;

of_pair!(MeanNormalizedBias);

impl Pairwise for MeanNormalizedBias {
    const NAME: &'static str = "MeanNormalizedBias";

    fn parts(&self) -> Parts {
        &[("sum", Reduce::Sum)]
    }

    fn batch(&mut self, y_pred: &Tensor, y: &Tensor) -> anyhow::Result<Contribution> {
        let (y_pred, y, samples) = columns(y_pred, y)?;
        let errors = y.f_sub(&y_pred)?.f_div(&y)?;
        Ok(Contribution::new([errors.f_sum(None)?], samples).wrong(no_zeros(&y)?))
    }

    fn value(&self, parts: &[Tensor], samples: f64) -> anyhow::Result<MetricValue> {
        Ok(parts[0].f_div_scalar(samples)?.into())
    }
}
