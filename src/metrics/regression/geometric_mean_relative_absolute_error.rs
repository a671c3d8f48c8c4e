use tch::Tensor;

use super::{columns, gathered, of_pair};
use crate::metrics::MetricValue;
use crate::metrics::{Contribution, Pairwise, Parts};

/// The geometric mean of |y − y_pred| / |y − ȳ|: ignite's `GeometricMeanRelativeAbsoluteError`.
///
/// `y_pred` and `y` are of floating point, (N,) or (N, 1). Keeps everything on the device; no host sync.
///
/// ```
/// use tch::Tensor;
/// use tch_ignite::metrics::{Metric, pair, regression::GeometricMeanRelativeAbsoluteError};
/// let mut metric = GeometricMeanRelativeAbsoluteError::of(pair);
/// let y_pred = Tensor::from_slice(&[1., 2.]);
/// metric.update(&(y_pred, Tensor::from_slice(&[3., 10.])))?;
/// assert!((metric.compute()?.read()? - (4. / 3.5)).abs() < 1e-12);
/// # anyhow::Ok(())
/// ```
#[derive(Debug, Default)]
pub struct GeometricMeanRelativeAbsoluteError;

of_pair!(GeometricMeanRelativeAbsoluteError);

impl Pairwise for GeometricMeanRelativeAbsoluteError {
    const NAME: &'static str = "GeometricMeanRelativeAbsoluteError";

    fn parts(&self) -> Parts {
        gathered::PARTS
    }

    fn batch(&mut self, y_pred: &Tensor, y: &Tensor) -> anyhow::Result<Contribution> {
        let (y_pred, y, _) = columns(y_pred, y)?;
        gathered::gather(&y_pred, &y)
    }

    fn value(&self, parts: &[Tensor], _samples: f64) -> anyhow::Result<MetricValue> {
        let (y_pred, y) = (&parts[0], &parts[1]);
        let errors = y.f_sub(y_pred)?.f_abs()?;
        let deviations = y.f_sub(&y.f_mean(None)?)?.f_abs()?;
        Ok(errors.f_div(&deviations)?.f_log()?.f_mean(None)?.f_exp()?.into())
    }
}
