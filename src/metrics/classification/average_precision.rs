use tch::Tensor;

use super::labels::not_binary;
use super::{gathered, of_pair, ranking};
use crate::metrics::MetricValue;
use crate::metrics::{Contribution, Pairwise, Parts};

/// The area under the precision-recall curve as Σ (Rₙ − Rₙ₋₁) Pₙ: ignite's `AveragePrecision`.
///
/// `y_pred` are scores, `y` is 0 or 1, both (N,), or (N, C) for the mean over labels. 0 where there is
/// no positive, NaN where a score is NaN. Keeps everything on the device and sorts it in compute; no
/// host sync.
///
/// ```
/// use tch::Tensor;
/// use tch_ignite::metrics::{Metric, AveragePrecision, pair};
/// let mut metric = AveragePrecision::of(pair);
/// let scores = Tensor::from_slice(&[0.9, 0.8, 0.7, 0.6]);
/// metric.update(&(scores, Tensor::from_slice(&[1i64, 0, 1, 0])))?;
/// assert!((metric.compute()?.read()? - (1. + 2. / 3.) / 2.).abs() < 1e-12);
/// # anyhow::Ok(())
/// ```
#[derive(Debug, Default)]
pub struct AveragePrecision;

of_pair!(AveragePrecision);

impl Pairwise for AveragePrecision {
    const NAME: &'static str = "AveragePrecision";

    fn parts(&self) -> Parts {
        gathered::PARTS
    }

    fn batch(&mut self, y_pred: &Tensor, y: &Tensor) -> anyhow::Result<Contribution> {
        let wrong = not_binary("y", y)?.into_iter().collect();
        Ok(gathered::gather(y_pred, y)?.wrong(wrong))
    }

    fn value(&self, parts: &[Tensor], _samples: f64) -> anyhow::Result<MetricValue> {
        let (scores, y) = ranking::class_rows(&parts[0], &parts[1])?;
        Ok(ranking::average_precision(&scores, &y)?.f_mean(None)?.into())
    }
}
