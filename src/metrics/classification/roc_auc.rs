use tch::Tensor;

use super::labels::not_binary;
use super::{gathered, of_pair, ranking};
use crate::metrics::MetricValue;
use crate::metrics::{Contribution, Pairwise, Parts};

/// The area under the ROC curve: ignite's `ROC_AUC`.
///
/// `y_pred` are scores, `y` is 0 or 1, both (N,), or (N, C) for the mean over labels. Computed from
/// ranks, ties counting half. NaN where there is but one class, or a score is NaN. Keeps everything on
/// the device and sorts it in compute; no host sync.
///
/// ```
/// use tch::Tensor;
/// use tch_ignite::metrics::{Metric, RocAuc, pair};
/// let mut metric = RocAuc::of(pair);
/// let scores = Tensor::from_slice(&[0.9, 0.8, 0.7, 0.6]);
/// metric.update(&(scores, Tensor::from_slice(&[1i64, 0, 1, 0])))?;
/// assert_eq!(metric.compute()?.read()?, 0.75);
/// # anyhow::Ok(())
/// ```
#[doc(alias = "ROC_AUC")]
#[derive(Debug, Default)]
pub struct RocAuc;

of_pair!(RocAuc);

impl Pairwise for RocAuc {
    const NAME: &'static str = "ROC_AUC";

    fn parts(&self) -> Parts {
        gathered::PARTS
    }

    fn batch(&mut self, y_pred: &Tensor, y: &Tensor) -> anyhow::Result<Contribution> {
        let wrong = not_binary("y", y)?.into_iter().collect();
        Ok(gathered::gather(y_pred, y)?.wrong(wrong))
    }

    fn value(&self, parts: &[Tensor], _samples: f64) -> anyhow::Result<MetricValue> {
        let (scores, y) = ranking::class_rows(&parts[0], &parts[1])?;
        Ok(ranking::roc_auc(&scores, &y)?.f_mean(None)?.into())
    }
}
