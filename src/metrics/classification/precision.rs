use tch::Tensor;

use super::counts::{self, Averaging, Counts};
use super::of_pair;
use crate::metrics::MetricValue;
use crate::metrics::{Contribution, Of, Pairwise, Parts};

/// How many of a class are right, of all that were predicted: ignite's `Precision`,
/// true positives / predicted (+ 1e-20).
///
/// Shapes as for [`Accuracy`](super::Accuracy). The value is a vector with one element for each
/// class, or a number: see [`average`](Of::average). Counted in i64 on the device; no host sync.
///
/// ```
/// use tch::Tensor;
/// use tch_ignite::metrics::{Averaging, Metric, Precision, pair};
/// let mut metric = Precision::of(pair).average(Averaging::Macro);
/// let (y_pred, y) = (Tensor::from_slice(&[1i64, 0, 1, 1]), Tensor::from_slice(&[1i64, 0, 0, 1]));
/// metric.update(&(y_pred, y))?;
/// assert_eq!(metric.compute()?.read()?, (1. + 2. / 3.) / 2.);
/// # anyhow::Ok(())
/// ```
#[derive(Debug, Default)]
pub struct Precision {
    counts: Counts,
}

of_pair!(Precision);

impl<F> Of<Precision, F> {
    /// What the rates of the classes are made to; each by itself unless given.
    pub fn average(self, average: impl Into<Averaging>) -> Self {
        self.with(|metric| metric.counts.averaging = average.into())
    }

    /// `y_pred` and `y` are both (N, C, …), 0 or 1 for each label.
    pub fn is_multilabel(self, on: bool) -> Self {
        self.with(|metric| metric.counts.labels.multilabel = on)
    }
}

impl Pairwise for Precision {
    const NAME: &'static str = "Precision";
    fn parts(&self) -> Parts {
        counts::PARTS
    }

    fn reset(&mut self) {
        self.counts.labels.reset();
    }

    fn batch(&mut self, y_pred: &Tensor, y: &Tensor) -> anyhow::Result<Contribution> {
        self.counts.batch(y_pred, y, counts::Share::Predicted)
    }

    fn value(&self, parts: &[Tensor], _samples: f64) -> anyhow::Result<MetricValue> {
        Ok(self.counts.rate(parts, counts::Share::Predicted)?.into())
    }
}
