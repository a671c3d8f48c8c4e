use tch::Tensor;

use super::labels::not_binary;
use super::{gathered, of_pair, ranking};
use crate::metrics::MetricValue;
use crate::metrics::{Contribution, Pairwise, Parts};

/// Precision and recall at every threshold: ignite's `PrecisionRecallCurve`, as scikit-learn draws it.
///
/// `y_pred` are scores, `y` is 0 or 1, both (N,). The value has the vectors `precision`, `recall` (they
/// end with 1 and 0) and `thresholds`, from the lowest score, in f64 on the CPU. Keeps everything on
/// the device and sorts it in compute; one host sync there.
///
/// ```
/// use tch::Tensor;
/// use tch_ignite::metrics::{Metric, PrecisionRecallCurve, pair};
/// let mut metric = PrecisionRecallCurve::of(pair);
/// let scores = Tensor::from_slice(&[0.9, 0.8, 0.7, 0.6]);
/// metric.update(&(scores, Tensor::from_slice(&[1i64, 0, 1, 0])))?;
/// assert_eq!(metric.compute()?.flatten("pr")?[0], ("pr/precision/0".into(), 0.5));
/// # anyhow::Ok(())
/// ```
#[derive(Debug, Default)]
pub struct PrecisionRecallCurve;

of_pair!(PrecisionRecallCurve);

impl Pairwise for PrecisionRecallCurve {
    const NAME: &'static str = "PrecisionRecallCurve";

    fn parts(&self) -> Parts {
        gathered::PARTS
    }

    fn batch(&mut self, y_pred: &Tensor, y: &Tensor) -> anyhow::Result<Contribution> {
        let wrong = not_binary("y", y)?.into_iter().collect();
        Ok(gathered::gather(y_pred, y)?.wrong(wrong))
    }

    fn value(&self, parts: &[Tensor], _samples: f64) -> anyhow::Result<MetricValue> {
        let curve = ranking::curve(&parts[0], &parts[1])?;
        let (fps, tps) = (&curve.false_positives, &curve.true_positives);
        let positives = tps.last().copied().unwrap_or(0.);
        let precision = tps.iter().zip(fps).rev().map(|(tp, fp)| tp / (tp + fp));
        let recall = tps.iter().rev().map(|tp| if positives == 0. { 1. } else { tp / positives });
        let precision: Vec<_> = precision.chain([1.]).collect();
        let recall: Vec<_> = recall.chain([0.]).collect();
        let thresholds: Vec<_> = curve.thresholds.into_iter().rev().collect();
        Ok(MetricValue::Named(vec![
            ("precision".into(), Tensor::f_from_slice(&precision)?.into()),
            ("recall".into(), Tensor::f_from_slice(&recall)?.into()),
            ("thresholds".into(), Tensor::f_from_slice(&thresholds)?.into()),
        ]))
    }
}
