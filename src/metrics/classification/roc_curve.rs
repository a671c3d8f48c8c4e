use tch::Tensor;

use super::labels::not_binary;
use super::{gathered, of_pair, ranking};
use crate::metrics::MetricValue;
use crate::metrics::{Contribution, Pairwise, Parts};

/// The ROC curve: ignite's `RocCurve`, as scikit-learn draws it.
///
/// `y_pred` are scores, `y` is 0 or 1, both (N,). The value has the vectors `fpr`, `tpr` (false and
/// true positive rates) and `thresholds`, from the highest score, in f64 on the CPU; points on a
/// straight line between their neighbours are left out. Keeps everything on the device and sorts it in
/// compute; one host sync there.
///
/// ```
/// use tch::Tensor;
/// use tch_ignite::metrics::{Metric, RocCurve, pair};
/// let mut metric = RocCurve::of(pair);
/// let scores = Tensor::from_slice(&[0.9, 0.8, 0.7, 0.6]);
/// metric.update(&(scores, Tensor::from_slice(&[1i64, 0, 1, 0])))?;
/// assert_eq!(metric.compute()?.flatten("roc")?[1], ("roc/fpr/1".into(), 0.));
/// # anyhow::Ok(())
/// ```
#[derive(Debug, Default)]
pub struct RocCurve;

of_pair!(RocCurve);

impl Pairwise for RocCurve {
    const NAME: &'static str = "RocCurve";

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
        let kept: Vec<_> = (0..tps.len()).filter(|i| bends(fps, *i) || bends(tps, *i)).collect();
        let rate = |counts: &[f64]| {
            let all = counts.last().copied().filter(|all| *all > 0.).unwrap_or(f64::NAN);
            let rates = kept.iter().map(|i| counts[*i] / all);
            Tensor::f_from_slice(&std::iter::once(0. / all).chain(rates).collect::<Vec<_>>())
        };
        let thresholds = kept.iter().map(|i| curve.thresholds[*i]);
        let thresholds: Vec<_> = std::iter::once(f64::INFINITY).chain(thresholds).collect();
        Ok(MetricValue::Named(vec![
            ("fpr".into(), rate(fps)?.into()),
            ("tpr".into(), rate(tps)?.into()),
            ("thresholds".into(), Tensor::f_from_slice(&thresholds)?.into()),
        ]))
    }
}

/// Whether the counts do not go on in a straight line at `i`; ends count as bends.
fn bends(counts: &[f64], i: usize) -> bool {
    match (i.checked_sub(1).map(|before| counts[before]), counts.get(i + 1)) {
        (Some(before), Some(after)) => after - 2. * counts[i] + before != 0.,
        _ => true,
    }
}
