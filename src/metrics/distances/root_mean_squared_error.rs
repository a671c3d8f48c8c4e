use tch::Tensor;

use super::{alike, of_pair};
use crate::metrics::MetricValue;
use crate::metrics::{Contribution, Pairwise, Parts, Reduce};

/// The square root of [`MeanSquaredError`](super::MeanSquaredError): ignite's `RootMeanSquaredError`.
///
/// Both of the same number of elements, any shape (N, …). No host sync.
///
/// ```
/// use tch::Tensor;
/// use tch_ignite::metrics::{Metric, RootMeanSquaredError, pair};
/// let mut metric = RootMeanSquaredError::of(pair);
/// let y_pred = Tensor::from_slice(&[1., 2.]);
/// metric.update(&(y_pred, Tensor::from_slice(&[1., 4.])))?;
/// assert!((metric.compute()?.read()? - 2f64.sqrt()).abs() < 1e-12);
/// # anyhow::Ok(())
/// ```
#[derive(Debug, Default)]
pub struct RootMeanSquaredError;

of_pair!(RootMeanSquaredError);

impl Pairwise for RootMeanSquaredError {
    const NAME: &'static str = "RootMeanSquaredError";

    fn parts(&self) -> Parts {
        &[("sum", Reduce::Sum)]
    }

    fn batch(&mut self, y_pred: &Tensor, y: &Tensor) -> anyhow::Result<Contribution> {
        let (y_pred, y, samples) = alike(y_pred, y)?;
        let sum = y_pred.f_sub(&y)?.f_square()?.f_sum(None)?;
        Ok(Contribution::new([sum], samples))
    }

    fn value(&self, parts: &[Tensor], samples: f64) -> anyhow::Result<MetricValue> {
        Ok(parts[0].f_div_scalar(samples)?.f_sqrt()?.into())
    }
}
