use tch::Tensor;

use super::counts::{self, Averaging, Counts};
use super::of_pair;
use crate::metrics::MetricValue;
use crate::metrics::{Contribution, Of, Pairwise, Parts};

/// How many of a class were found, of all that there are: ignite's `Recall`,
/// true positives / actual (+ 1e-20).
///
/// Shapes as for [`Accuracy`](super::Accuracy). The value is a vector with one element for each
/// class, or a number: see [`average`](Of::average). Counted in i64 on the device; no host sync.
///
/// ```
/// use tch::Tensor;
/// use tch_ignite::metrics::{Averaging, Metric, Recall, pair};
/// let mut metric = Recall::of(pair).average(Averaging::Macro);
/// let (y_pred, y) = (Tensor::from_slice(&[1i64, 0, 1, 1]), Tensor::from_slice(&[1i64, 0, 0, 1]));
/// metric.update(&(y_pred, y))?;
/// assert_eq!(metric.compute()?.read()?, (0.5 + 1.) / 2.);
/// # anyhow::Ok(())
/// ```
#[derive(Debug, Default)]
pub struct Recall {
    counts: Counts,
}

of_pair!(Recall);

impl<F> Of<Recall, F> {
    /// What the rates of the classes are made to; each by itself unless given.
    pub fn average(self, average: impl Into<Averaging>) -> Self {
        self.with(|metric| metric.counts.averaging = average.into())
    }

    /// `y_pred` and `y` are both (N, C, …), 0 or 1 for each label.
    pub fn is_multilabel(self, on: bool) -> Self {
        self.with(|metric| metric.counts.labels.multilabel = on)
    }
}

impl Pairwise for Recall {
    const NAME: &'static str = "Recall";
    fn parts(&self) -> Parts {
        counts::PARTS
    }

    fn reset(&mut self) {
        self.counts.labels.reset();
    }

    fn batch(&mut self, y_pred: &Tensor, y: &Tensor) -> anyhow::Result<Contribution> {
        self.counts.batch(y_pred, y, counts::Share::Actual)
    }

    fn value(&self, parts: &[Tensor], _samples: f64) -> anyhow::Result<MetricValue> {
        Ok(self.counts.rate(parts, counts::Share::Actual)?.into())
    }
}
