use tch::Tensor;

use super::{columns, of_pair};
use crate::metrics::MetricValue;
use crate::metrics::{Contribution, Pairwise, Parts, Reduce};

/// The sum of |y − y_pred|: ignite's `ManhattanDistance`.
///
/// `y_pred` and `y` are of floating point, (N,) or (N, 1). No host sync.
///
/// ```
/// use tch::Tensor;
/// use tch_ignite::metrics::{Metric, pair, regression::ManhattanDistance};
/// let mut metric = ManhattanDistance::of(pair);
/// let y_pred = Tensor::from_slice(&[1., 2.]);
/// metric.update(&(y_pred, Tensor::from_slice(&[3., 10.])))?;
/// assert!((metric.compute()?.read()? - 10.).abs() < 1e-12);
/// # anyhow::Ok(())
/// ```
#[derive(Debug, Default)]
pub struct ManhattanDistance;

of_pair!(ManhattanDistance);

impl Pairwise for ManhattanDistance {
    const NAME: &'static str = "ManhattanDistance";

    fn parts(&self) -> Parts {
        &[("sum", Reduce::Sum)]
    }

    fn batch(&mut self, y_pred: &Tensor, y: &Tensor) -> anyhow::Result<Contribution> {
        let (y_pred, y, samples) = columns(y_pred, y)?;
        let errors = y.f_sub(&y_pred)?.f_abs()?;
        Ok(Contribution::new([errors.f_sum(None)?], samples))
    }

    fn value(&self, parts: &[Tensor], _samples: f64) -> anyhow::Result<MetricValue> {
        Ok(parts[0].shallow_clone().into())
    }
}
