use tch::Tensor;

use super::gathered;
use super::{Contribution, Of, Pairwise, Parts, References};
use crate::metrics::MetricValue;

/// A function of all predictions and targets since the last reset: ignite's `EpochMetric`.
///
/// `y_pred` and `y` are each (N,) or (N, C), of the same type and number of columns in every batch; the function
/// gets one column (N, 1) as (N,). The metric keeps a copy of everything on the device. Neither `update` nor
/// `compute` waits for the device, unless the function does.
///
/// ```
/// use tch::Tensor;
/// use tch_ignite::metrics::{EpochMetric, Metric, pair};
/// let largest = |y_pred: &Tensor, y: &Tensor| Ok(y_pred.f_sub(y)?.f_abs()?.f_max()?.into());
/// let mut metric = EpochMetric::of(largest, pair);
/// metric.update(&(Tensor::from_slice(&[1.0, 2.0]), Tensor::from_slice(&[1.5, 2.0])))?;
/// metric.update(&(Tensor::from_slice(&[3.0]), Tensor::from_slice(&[3.25])))?;
/// assert_eq!(metric.compute()?.read()?, 0.5);
/// # anyhow::Ok(())
/// ```
pub struct EpochMetric<C> {
    compute: C,
}

crate::debug::opaque_debug!(EpochMetric<C>);

impl<C: Fn(&Tensor, &Tensor) -> anyhow::Result<MetricValue>> EpochMetric<C> {
    /// Makes the metric: `compute(y_pred, y)` gives the value, and `parts` takes `y_pred` and `y` out of the output.
    pub fn of<O, F>(compute: C, parts: F) -> Of<Self, References<F, O>>
    where
        F: for<'o> Fn(&'o O) -> (&'o Tensor, &'o Tensor),
    {
        Of::new(Self { compute }, parts)
    }
}

impl<C: Fn(&Tensor, &Tensor) -> anyhow::Result<MetricValue>> Pairwise for EpochMetric<C> {
    const NAME: &'static str = "EpochMetric";

    fn parts(&self) -> Parts {
        gathered::PARTS
    }

    fn batch(&mut self, y_pred: &Tensor, y: &Tensor) -> anyhow::Result<Contribution> {
        gathered::gather(y_pred, y)
    }

    fn value(&self, parts: &[Tensor], _samples: f64) -> anyhow::Result<MetricValue> {
        (self.compute)(&parts[0], &parts[1])
    }
}
