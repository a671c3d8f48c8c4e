use tch::Tensor;

use super::{columns, of_pair};
use crate::metrics::MetricValue;
use crate::metrics::{Contribution, Pairwise, Parts, Reduce};

/// The geometric mean of |y − y_pred|: ignite's `GeometricMeanAbsoluteError`.
///
/// `y_pred` and `y` are of floating point, (N,) or (N, 1). No host sync.
///
/// ```
/// use tch::Tensor;
/// use tch_ignite::metrics::{Metric, pair, regression::GeometricMeanAbsoluteError};
/// let mut metric = GeometricMeanAbsoluteError::of(pair);
/// let y_pred = Tensor::from_slice(&[1., 2.]);
/// metric.update(&(y_pred, Tensor::from_slice(&[3., 10.])))?;
/// assert!((metric.compute()?.read()? - 4.).abs() < 1e-12);
/// # anyhow::Ok(())
/// ```
#[derive(Debug, Default)]
pub struct GeometricMeanAbsoluteError;

of_pair!(GeometricMeanAbsoluteError);

impl Pairwise for GeometricMeanAbsoluteError {
    const NAME: &'static str = "GeometricMeanAbsoluteError";

    fn parts(&self) -> Parts {
        &[("sum", Reduce::Sum)]
    }

    fn batch(&mut self, y_pred: &Tensor, y: &Tensor) -> anyhow::Result<Contribution> {
        let (y_pred, y, samples) = columns(y_pred, y)?;
        let errors = y.f_sub(&y_pred)?.f_abs()?.f_log()?;
        Ok(Contribution::new([errors.f_sum(None)?], samples))
    }

    fn value(&self, parts: &[Tensor], samples: f64) -> anyhow::Result<MetricValue> {
        Ok(parts[0].f_div_scalar(samples)?.f_exp()?.into())
    }
}
