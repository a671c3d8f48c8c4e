use tch::Tensor;

use super::{alike, of_pair};
use crate::metrics::MetricValue;
use crate::metrics::{Contribution, Pairwise, Parts, Reduce};

/// The sum of |y_pred − y| over the number of samples: ignite's `MeanAbsoluteError`.
///
/// Both of the same number of elements, any shape (N, …). As in ignite the sum is divided by N, not by the
/// number of elements. Three small kernels an iteration, no host sync.
///
/// ```
/// use tch::Tensor;
/// use tch_ignite::metrics::{MeanAbsoluteError, Metric, pair};
/// let mut metric = MeanAbsoluteError::of(pair);
/// let y_pred = Tensor::from_slice(&[1., 2.]);
/// metric.update(&(y_pred, Tensor::from_slice(&[1., 4.])))?;
/// assert_eq!(metric.compute()?.read()?, 1.);
/// # anyhow::Ok(())
/// ```
#[derive(Debug, Default)]
pub struct MeanAbsoluteError;

of_pair!(MeanAbsoluteError);

impl Pairwise for MeanAbsoluteError {
    const NAME: &'static str = "MeanAbsoluteError";

    fn parts(&self) -> Parts {
        &[("sum", Reduce::Sum)]
    }

    fn batch(&mut self, y_pred: &Tensor, y: &Tensor) -> anyhow::Result<Contribution> {
        let (y_pred, y, samples) = alike(y_pred, y)?;
        let sum = y_pred.f_sub(&y)?.f_abs()?.f_sum(None)?;
        Ok(Contribution::new([sum], samples))
    }

    fn value(&self, parts: &[Tensor], samples: f64) -> anyhow::Result<MetricValue> {
        Ok(parts[0].f_div_scalar(samples)?.into())
    }
}
