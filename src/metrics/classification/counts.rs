use tch::{Kind, TchError, Tensor};

use super::labels::{Case, Labels, any_outside, both_binary, occurrences, rows};
use super::{accumulator_kind, double};
use crate::metrics::{Contribution, Reduce};

/// How the rates of the classes are combined: the `average` of ignite's `Precision` and `Recall`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Averaging {
    /// A vector with the rate of each class; for binary data the rate of class 1 alone.
    #[default]
    False,
    /// A vector with the rate of each class, also for binary data.
    None,
    /// The mean over classes.
    Macro,
    /// One rate, of the counts of all classes together.
    Micro,
    /// The mean over classes, each weighted by how often it occurs in `y`.
    Weighted,
    /// The mean over samples of the rate within the sample; for multilabel data.
    Samples,
}

/// As in ignite, `true` is [`Macro`](Averaging::Macro) and `false` is [`False`](Averaging::False).
impl From<bool> for Averaging {
    fn from(on: bool) -> Self {
        if on { Self::Macro } else { Self::False }
    }
}

/// ignite's epsilon in the denominators of these rates.
const EPS: f64 = 1e-20;

/// The denominator of a rate: predicted positives (precision) or actual positives (recall).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Share {
    Predicted,
    Actual,
}

/// Counts the true positives, the predicted positives and the actual positives of each class in i64: (C,), or (1,
/// 2) where the data is binary. With [`Averaging::Samples`] the first part is the sum of the samples' rates, and
/// the other two are the number of samples.
#[derive(Debug, Default)]
pub(super) struct Counts {
    pub(super) averaging: Averaging,
    pub(super) labels: Labels,
}

pub(super) const PARTS: &[(&str, Reduce)] =
    &[("true_positives", Reduce::Sum), ("predicted", Reduce::Sum), ("actual", Reduce::Sum)];

impl Counts {
    pub(super) fn batch(
        &mut self,
        y_pred: &Tensor,
        y: &Tensor,
        of: Share,
    ) -> anyhow::Result<Contribution> {
        let (case, classes) = self.labels.case(y_pred, y)?;
        let samples = y.size().first().copied().unwrap_or(0) as u64;
        anyhow::ensure!(
            self.averaging != Averaging::Samples || case == Case::Multilabel,
            "Argument average='samples' is incompatible with binary and multiclass input data."
        );
        let (parts, wrong) = match case {
            Case::Binary => {
                let wrong = both_binary(y_pred, y)?;
                let counts = by_class(&y_pred.f_reshape_as(y)?, y, classes)?;
                // The shape (1, 2) tells binary counts from the counts of two classes.
                let rows = counts.iter().map(|count| count.f_unsqueeze(0));
                (rows.collect::<Result<_, _>>()?, wrong)
            }
            Case::Multiclass => {
                let outside = any_outside(y, classes)?;
                let reason = format!(
                    "y_pred contains fewer classes than y. Number of classes in the prediction is {classes} and an element in y is outside of [0, {classes})."
                );
                (by_class(&y_pred.f_argmax(1, false)?, y, classes)?, vec![(outside, reason)])
            }
            Case::Multilabel => {
                let wrong = both_binary(y_pred, y)?;
                let (y_pred, y) = (rows(y_pred)?, rows(y)?);
                let samples = self.averaging == Averaging::Samples;
                let parts =
                    if samples { by_sample(&y_pred, &y, of)? } else { by_label(&y_pred, &y)? };
                (parts, wrong)
            }
        };
        Ok(Contribution::new(parts, samples).wrong(wrong))
    }

    /// Divides the true positives by the predicted or actual positives, and averages as asked.
    pub(super) fn rate(&self, parts: &[Tensor], of: Share) -> anyhow::Result<Tensor> {
        let [true_positives, predicted, actual] = parts else { anyhow::bail!("three counts") };
        let all = if of == Share::Predicted { predicted } else { actual };
        let share = |part: &Tensor, whole: &Tensor| -> Result<Tensor, TchError> {
            double(part)?.f_div(&double(whole)?.f_add_scalar(EPS)?)
        };
        Ok(match self.averaging {
            Averaging::False if true_positives.dim() == 2 => {
                share(true_positives, all)?.f_reshape([-1])?.f_select(0, 1)?
            }
            Averaging::False | Averaging::None => share(true_positives, all)?.f_reshape([-1])?,
            Averaging::Macro => share(true_positives, all)?.f_mean(None)?,
            Averaging::Micro => share(&true_positives.f_sum(None)?, &all.f_sum(None)?)?,
            Averaging::Weighted => {
                let weights = double(actual)?;
                let weighted = share(true_positives, all)?.f_mul(&weights)?.f_sum(None)?;
                weighted.f_div(&weights.f_sum(None)?.f_add_scalar(EPS)?)?
            }
            // Both counts hold the number of samples here.
            Averaging::Samples => double(true_positives)?.f_div(&double(all)?)?,
        })
    }
}

fn by_class(y_pred: &Tensor, y: &Tensor, classes: i64) -> Result<Vec<Tensor>, TchError> {
    let (y_pred, y) = (y_pred.f_to_kind(Kind::Int64)?, y.f_to_kind(Kind::Int64)?);
    // Wrong predictions are moved outside of the classes, so that they are not counted.
    let right = y.f_masked_fill(&y_pred.f_ne_tensor(&y)?, classes)?;
    Ok(vec![
        occurrences(&right, classes)?,
        occurrences(&y_pred, classes)?,
        occurrences(&y, classes)?,
    ])
}

fn by_label(y_pred: &Tensor, y: &Tensor) -> Result<Vec<Tensor>, TchError> {
    let (y_pred, y) = (y_pred.f_to_kind(Kind::Int64)?, y.f_to_kind(Kind::Int64)?);
    [&y_pred.f_mul(&y)?, &y_pred, &y]
        .map(|ones| ones.f_sum_dim_intlist(0i64, false, Kind::Int64))
        .into_iter()
        .collect()
}

fn by_sample(y_pred: &Tensor, y: &Tensor, of: Share) -> Result<Vec<Tensor>, TchError> {
    let kind = accumulator_kind(y.device());
    let sum = |ones: &Tensor| ones.f_sum_dim_intlist(1i64, false, kind);
    let (y_pred, y) = (double(y_pred)?, double(y)?);
    let all = if of == Share::Predicted { &y_pred } else { &y };
    let rates = sum(&y_pred.f_mul(&y)?)?.f_div(&sum(all)?.f_add_scalar(EPS)?)?;
    let rows = Tensor::f_full([] as [i64; 0], y.size()[0], (Kind::Int64, y.device()))?;
    Ok(vec![rates.f_sum(None)?, rows.shallow_clone(), rows])
}
