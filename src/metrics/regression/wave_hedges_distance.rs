use tch::Tensor;

use super::{columns, of_pair};
use crate::metrics::MetricValue;
use crate::metrics::{Contribution, Pairwise, Parts, Reduce};

/// The sum of |y − y_pred| / (max(y_pred, y) + 1e-30): ignite's `WaveHedgesDistance`.
///
/// `y_pred` and `y` are of floating point, (N,) or (N, 1). No host sync.
///
/// ```
/// use tch::Tensor;
/// use tch_ignite::metrics::{Metric, pair, regression::WaveHedgesDistance};
/// let mut metric = WaveHedgesDistance::of(pair);
/// let y_pred = Tensor::from_slice(&[1., 2.]);
/// metric.update(&(y_pred, Tensor::from_slice(&[2., 4.])))?;
/// assert!((metric.compute()?.read()? - 1.).abs() < 1e-12);
/// # anyhow::Ok(())
/// ```
#[derive(Debug, Default)]
pub struct WaveHedgesDistance;

of_pair!(WaveHedgesDistance);

impl Pairwise for WaveHedgesDistance {
    const NAME: &'static str = "WaveHedgesDistance";

    fn parts(&self) -> Parts {
        &[("sum", Reduce::Sum)]
    }

    fn batch(&mut self, y_pred: &Tensor, y: &Tensor) -> anyhow::Result<Contribution> {
        let (y_pred, y, samples) = columns(y_pred, y)?;
        let sizes = y_pred.f_maximum(&y)?.f_add_scalar(1e-30)?;
        let errors = y.f_sub(&y_pred)?.f_abs()?.f_div(&sizes)?;
        Ok(Contribution::new([errors.f_sum(None)?], samples))
    }

    fn value(&self, parts: &[Tensor], _samples: f64) -> anyhow::Result<MetricValue> {
        Ok(parts[0].shallow_clone().into())
    }
}
