use tch::Tensor;

use super::{columns, gathered, median, of_pair};
use crate::metrics::MetricValue;
use crate::metrics::{Contribution, Pairwise, Parts};

/// The median of |y − y_pred| / |y − ȳ|: ignite's `MedianRelativeAbsoluteError`.
///
/// `y_pred` and `y` are of floating point, (N,) or (N, 1). Keeps everything on the device; no host sync.
///
/// ```
/// use tch::Tensor;
/// use tch_ignite::metrics::{Metric, pair, regression::MedianRelativeAbsoluteError};
/// let mut metric = MedianRelativeAbsoluteError::of(pair);
/// let y_pred = Tensor::from_slice(&[1., 2.]);
/// metric.update(&(y_pred, Tensor::from_slice(&[3., 9.])))?;
/// assert!((metric.compute()?.read()? - 1.5).abs() < 1e-12);
/// # anyhow::Ok(())
/// ```
#[derive(Debug, Default)]
pub struct MedianRelativeAbsoluteError;

of_pair!(MedianRelativeAbsoluteError);

impl Pairwise for MedianRelativeAbsoluteError {
    const NAME: &'static str = "MedianRelativeAbsoluteError";

    fn parts(&self) -> Parts {
        gathered::PARTS
    }

    fn batch(&mut self, y_pred: &Tensor, y: &Tensor) -> anyhow::Result<Contribution> {
        let (y_pred, y, _) = columns(y_pred, y)?;
        gathered::gather(&y_pred, &y)
    }

    fn value(&self, parts: &[Tensor], _samples: f64) -> anyhow::Result<MetricValue> {
        let (y_pred, y) = (&parts[0], &parts[1]);
        let deviations = y.f_sub(&y.f_mean(None)?)?.f_abs()?;
        Ok(median(&y.f_sub(y_pred)?.f_abs()?.f_div(&deviations)?)?.into())
    }
}
