use tch::Tensor;

use super::{columns, of_pair};
use crate::metrics::MetricValue;
use crate::metrics::{Contribution, Pairwise, Parts, Reduce};

/// The coefficient of determination, 1 − Σ(y_pred − y)² / Σ(y − ȳ)²: ignite's `R2Score`.
///
/// `y_pred` and `y` are of floating point, (N,) or (N, 1). No host sync.
///
/// ```
/// use tch::Tensor;
/// use tch_ignite::metrics::{Metric, pair, regression::R2Score};
/// let mut metric = R2Score::of(pair);
/// let y_pred = Tensor::from_slice(&[1., 2., 4.]);
/// metric.update(&(y_pred, Tensor::from_slice(&[1., 2., 3.])))?;
/// assert!((metric.compute()?.read()? - 0.5).abs() < 1e-12);
/// # anyhow::Ok(())
/// ```
#[derive(Debug, Default)]
pub struct R2Score;

of_pair!(R2Score);

impl Pairwise for R2Score {
    const NAME: &'static str = "R2Score";

    fn parts(&self) -> Parts {
        &[("errors", Reduce::Sum), ("sum", Reduce::Sum), ("squares", Reduce::Sum)]
    }

    fn batch(&mut self, y_pred: &Tensor, y: &Tensor) -> anyhow::Result<Contribution> {
        let (y_pred, y, samples) = columns(y_pred, y)?;
        let errors = y_pred.f_sub(&y)?.f_square()?.f_sum(None)?;
        let (sum, squares) = (y.f_sum(None)?, y.f_square()?.f_sum(None)?);
        Ok(Contribution::new([errors, sum, squares], samples))
    }

    fn value(&self, parts: &[Tensor], samples: f64) -> anyhow::Result<MetricValue> {
        let [errors, sum, squares] = parts else { anyhow::bail!("three sums") };
        let variation = squares.f_sub(&sum.f_square()?.f_div_scalar(samples)?)?;
        Ok(errors.f_div(&variation)?.f_neg()?.f_add_scalar(1.)?.into())
    }
}
