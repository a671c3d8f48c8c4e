use tch::{Kind, Tensor};

use super::labels::{Case, Labels, both_binary, occurrences, rows};
use super::{double, of_pair};
use crate::metrics::MetricValue;
use crate::metrics::{Contribution, Of, Pairwise, Parts, Reduce};

/// How often each class, or label, is predicted: ignite's `SelectionRate`, of `ignite.metrics.fairness`.
///
/// A vector: of binary predictions the share of 0 and of 1, of classes that of each, of labels (with
/// [`is_multilabel`](Of::is_multilabel)) how often each is set. Shapes as for [`Accuracy`](super::Accuracy);
/// of `y` only the shape counts. No host sync.
///
/// ```
/// use tch::Tensor;
/// use tch_ignite::metrics::{Metric, pair, fairness::SelectionRate};
/// let mut metric = SelectionRate::of(pair);
/// let y_pred = Tensor::from_slice2(&[[0.1, 0.9], [0.2, 0.8], [0.3, 0.7], [0.9, 0.1]]);
/// metric.update(&(y_pred, Tensor::from_slice(&[1i64, 1, 0, 0])))?;
/// assert_eq!(metric.compute()?.tensor()?, Tensor::from_slice(&[0.25, 0.75]));
/// # anyhow::Ok(())
/// ```
#[derive(Debug, Default)]
pub struct SelectionRate {
    labels: Labels,
}

of_pair!(SelectionRate);

impl<F> Of<SelectionRate, F> {
    /// Counts how often each label is set.
    pub fn is_multilabel(self, on: bool) -> Self {
        self.with(|rate| rate.labels.multilabel = on)
    }
}

impl Pairwise for SelectionRate {
    const NAME: &'static str = "SelectionRate";

    fn parts(&self) -> Parts {
        &[("positives", Reduce::Sum)]
    }

    fn reset(&mut self) {
        self.labels.reset();
    }

    fn batch(&mut self, y_pred: &Tensor, y: &Tensor) -> anyhow::Result<Contribution> {
        let (case, classes) = self.labels.case(y_pred, y)?;
        Ok(match case {
            Case::Multiclass => {
                let chosen = y_pred.f_argmax(1, false)?;
                let samples = chosen.numel() as u64;
                Contribution::new([occurrences(&chosen, classes)?], samples)
            }
            Case::Binary => {
                let positives = occurrences(y_pred, 2)?;
                let wrong = both_binary(y_pred, y)?;
                Contribution::new([positives], y_pred.numel() as u64).wrong(wrong)
            }
            Case::Multilabel => {
                let labels = rows(y_pred)?;
                let samples = labels.size()[0] as u64;
                let positives = labels.f_sum_dim_intlist(0i64, false, Kind::Int64)?;
                Contribution::new([positives], samples).wrong(both_binary(y_pred, y)?)
            }
        })
    }

    fn value(&self, parts: &[Tensor], samples: f64) -> anyhow::Result<MetricValue> {
        Ok(double(&parts[0])?.f_div_scalar(samples)?.into())
    }
}
