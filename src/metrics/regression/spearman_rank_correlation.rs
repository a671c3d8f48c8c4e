use tch::Tensor;

use super::{columns, gathered, of_pair, ranks};
use crate::metrics::MetricValue;
use crate::metrics::{Contribution, Pairwise, Parts};

/// Pearson's correlation of the ranks of y_pred and y, ties sharing their mean rank: ignite's
/// `SpearmanRankCorrelation`. NaN where all values are equal.
///
/// `y_pred` and `y` are of floating point, (N,) or (N, 1). Keeps everything on the device; no host sync.
///
/// ```
/// use tch::Tensor;
/// use tch_ignite::metrics::{Metric, pair, regression::SpearmanRankCorrelation};
/// let mut metric = SpearmanRankCorrelation::of(pair);
/// let y_pred = Tensor::from_slice(&[1., 2., 3.]);
/// metric.update(&(y_pred, Tensor::from_slice(&[2., 4., 9.])))?;
/// assert!((metric.compute()?.read()? - 1.).abs() < 1e-12);
/// # anyhow::Ok(())
/// ```
#[derive(Debug, Default)]
pub struct SpearmanRankCorrelation;

of_pair!(SpearmanRankCorrelation);

impl Pairwise for SpearmanRankCorrelation {
    const NAME: &'static str = "SpearmanRankCorrelation";

    fn parts(&self) -> Parts {
        gathered::PARTS
    }

    fn batch(&mut self, y_pred: &Tensor, y: &Tensor) -> anyhow::Result<Contribution> {
        let (y_pred, y, _) = columns(y_pred, y)?;
        gathered::gather(&y_pred, &y)
    }

    fn value(&self, parts: &[Tensor], _samples: f64) -> anyhow::Result<MetricValue> {
        let ranks = ranks(&Tensor::f_stack(parts, 0)?)?;
        let deviations = ranks.f_sub(&ranks.f_mean_dim(1i64, true, None)?)?;
        let products = deviations.f_matmul(&deviations.f_transpose(0, 1)?)?;
        let variances = products.f_diag(0)?.f_prod(None)?;
        Ok(products.f_select(0, 0)?.f_select(0, 1)?.f_div(&variances.f_sqrt()?)?.into())
    }
}
