use tch::{TchError, Tensor};

use super::counts::{self, Counts};
use crate::error::{Error, Result};
use crate::metrics::MetricValue;
use crate::metrics::{Contribution, Of, Pairwise, Parts, References};

/// The weighted harmonic mean of precision and recall, (1 + β²) p r / (β² p + r + 1e-15): ignite's `Fbeta`. Recall
/// counts β times as much as precision.
///
/// Shapes are those of [`Accuracy`](super::Accuracy). The value is the mean over classes, or, with
/// [`average(false)`](Of::average), a vector with one element for each class. Predictions are counted in i64 on the
/// device; no host sync.
///
/// ```
/// use tch::Tensor;
/// use tch_ignite::metrics::{Fbeta, Metric, pair};
/// let mut f1 = Fbeta::of(1., pair);
/// let (y_pred, y) = (Tensor::from_slice(&[1i64, 0, 1, 1]), Tensor::from_slice(&[1i64, 0, 0, 1]));
/// f1.update(&(y_pred, y))?;
/// assert!((f1.compute()?.read()? - 0.8).abs() < 1e-12);
/// # anyhow::Ok(())
/// ```
#[derive(Debug)]
pub struct Fbeta {
    beta: f64,
    average: bool,
    counts: Counts,
}

impl Fbeta {
    /// Makes the metric; `beta` is above 0, and `parts` takes `y_pred` and `y` out of the output.
    pub fn of<O, F>(beta: f64, parts: F) -> Of<Self, References<F, O>>
    where
        F: for<'o> Fn(&'o O) -> (&'o Tensor, &'o Tensor),
    {
        Of::new(Self { beta, average: true, counts: Counts::default() }, parts)
    }
}

impl<F> Of<Fbeta, F> {
    /// Whether the value is the mean over classes (the default) or a vector.
    pub fn average(self, on: bool) -> Self {
        self.with(|fbeta| fbeta.average = on)
    }

    /// Takes `y_pred` and `y` that are both (N, C, …), 0 or 1 for each label.
    pub fn is_multilabel(self, on: bool) -> Self {
        self.with(|fbeta| fbeta.counts.labels.multilabel = on)
    }
}

/// Computes the F-score of each class.
pub(super) fn fbeta(beta: f64, precision: &Tensor, recall: &Tensor) -> Result<Tensor, TchError> {
    let square = beta * beta;
    let below = precision.f_mul_scalar(square)?.f_add(recall)?.f_add_scalar(1e-15)?;
    precision.f_mul_scalar(1. + square)?.f_mul(recall)?.f_div(&below)
}

pub(super) fn check_beta(beta: f64) -> Result<()> {
    match beta > 0. && beta.is_finite() {
        true => Ok(()),
        false => Err(Error::invalid(format!(
            "Beta should be a positive integer, but given {beta}: any number above 0 will do"
        ))),
    }
}

impl Pairwise for Fbeta {
    const NAME: &'static str = "Fbeta";
    fn parts(&self) -> Parts {
        counts::PARTS
    }

    fn validate(&self) -> Result<()> {
        check_beta(self.beta)
    }

    fn reset(&mut self) {
        self.counts.labels.reset();
    }

    fn batch(&mut self, y_pred: &Tensor, y: &Tensor) -> anyhow::Result<Contribution> {
        self.counts.batch(y_pred, y, counts::Share::Predicted)
    }

    fn value(&self, parts: &[Tensor], _samples: f64) -> anyhow::Result<MetricValue> {
        let precision = self.counts.rate(parts, counts::Share::Predicted)?;
        let recall = self.counts.rate(parts, counts::Share::Actual)?;
        let value = fbeta(self.beta, &precision, &recall)?;
        Ok(if self.average { value.f_mean(None)? } else { value }.into())
    }
}
