use tch::Tensor;

use super::{columns, of_pair};
use crate::metrics::MetricValue;
use crate::metrics::{Contribution, Pairwise, Parts, Reduce};

/// The sum of |y − y_pred| / (|y_pred| + |y| + 1e-15): ignite's `CanberraMetric`.
///
/// `y_pred` and `y` are of floating point, (N,) or (N, 1). No host sync.
///
/// ```
/// use tch::Tensor;
/// use tch_ignite::metrics::{Metric, pair, regression::CanberraMetric};
/// let mut metric = CanberraMetric::of(pair);
/// let y_pred = Tensor::from_slice(&[1., 2.]);
/// metric.update(&(y_pred, Tensor::from_slice(&[3., 2.])))?;
/// assert!((metric.compute()?.read()? - 0.5).abs() < 1e-12);
/// # anyhow::Ok(())
/// ```
#[derive(Debug, Default)]
pub struct CanberraMetric;

of_pair!(CanberraMetric);

impl Pairwise for CanberraMetric {
    const NAME: &'static str = "CanberraMetric";

    fn parts(&self) -> Parts {
        &[("sum", Reduce::Sum)]
    }

    fn batch(&mut self, y_pred: &Tensor, y: &Tensor) -> anyhow::Result<Contribution> {
        let (y_pred, y, samples) = columns(y_pred, y)?;
        let sizes = y_pred.f_abs()?.f_add(&y.f_abs()?)?.f_add_scalar(1e-15)?;
        let errors = y.f_sub(&y_pred)?.f_abs()?.f_div(&sizes)?;
        Ok(Contribution::new([errors.f_sum(None)?], samples))
    }

    fn value(&self, parts: &[Tensor], _samples: f64) -> anyhow::Result<MetricValue> {
        Ok(parts[0].shallow_clone().into())
    }
}
