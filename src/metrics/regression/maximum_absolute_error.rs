use tch::Tensor;

use super::{columns, of_pair};
use crate::metrics::MetricValue;
use crate::metrics::{Contribution, Pairwise, Parts, Reduce};

/// The largest |y_pred − y|: ignite's `MaximumAbsoluteError`. NaN where one is NaN.
///
/// `y_pred` and `y` are of floating point, (N,) or (N, 1). No host sync.
///
/// ```
/// use tch::Tensor;
/// use tch_ignite::metrics::{Metric, pair, regression::MaximumAbsoluteError};
/// let mut metric = MaximumAbsoluteError::of(pair);
/// let y_pred = Tensor::from_slice(&[1., 2.]);
/// metric.update(&(y_pred, Tensor::from_slice(&[2., 4.])))?;
/// assert_eq!(metric.compute()?.read()?, 2.);
/// # anyhow::Ok(())
/// ```
#[derive(Debug, Default)]
pub struct MaximumAbsoluteError;

of_pair!(MaximumAbsoluteError);

impl Pairwise for MaximumAbsoluteError {
    const NAME: &'static str = "MaximumAbsoluteError";

    fn parts(&self) -> Parts {
        &[("max", Reduce::Max)]
    }

    fn batch(&mut self, y_pred: &Tensor, y: &Tensor) -> anyhow::Result<Contribution> {
        let (y_pred, y, samples) = columns(y_pred, y)?;
        Ok(Contribution::new([y_pred.f_sub(&y)?.f_abs()?.f_max()?], samples))
    }

    fn value(&self, parts: &[Tensor], _samples: f64) -> anyhow::Result<MetricValue> {
        Ok(parts[0].shallow_clone().into())
    }
}
