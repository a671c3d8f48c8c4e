use tch::{Kind, TchError, Tensor};

use super::double;
use super::labels::occurrences;
use crate::error::{Error, Result};
use crate::metrics::MetricValue;
use crate::metrics::{Contribution, Of, Pairwise, Parts, Reduce, References};

/// How the counts of a [`ConfusionMatrix`] are normalised.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MatrixAverage {
    /// Divides all counts by the number of samples.
    Samples,
    /// Divides each row by its sum: how the samples of a class were predicted.
    Recall,
    /// Divides each column by its sum: which classes the predictions of a class really were.
    Precision,
}

/// How often class i (row) was predicted as class j (column): ignite's `ConfusionMatrix`.
///
/// `y_pred` of shape (N, C, …), scores or probabilities; `y` of shape (N, …), class numbers. Samples with a class
/// number outside of [0, C) are left out, so that -1, or 255, is a label to ignore. The value is a C × C matrix,
/// i64, or f64 with an [`average`](Of::average). The counts are kept on the device; no host sync.
///
/// [`shared`](Of::shared) gives the metrics that derive from the matrix: IoU, Dice coefficient, accuracy, ….
///
/// ```
/// use tch::Tensor;
/// use tch_ignite::metrics::{ConfusionMatrix, Metric, pair};
/// let mut matrix = ConfusionMatrix::of(2, pair);
/// let scores = Tensor::from_slice2(&[[0.9, 0.1], [0.2, 0.8], [0.3, 0.7]]);
/// matrix.update(&(scores, Tensor::from_slice(&[0i64, 0, 1])))?;
/// assert_eq!(matrix.compute()?.tensor()?, Tensor::from_slice2(&[[1i64, 1], [0, 1]]));
/// # anyhow::Ok(())
/// ```
#[derive(Debug)]
pub struct ConfusionMatrix {
    pub(super) num_classes: i64,
    pub(super) average: Option<MatrixAverage>,
}

impl ConfusionMatrix {
    /// Makes a matrix of `num_classes` classes, at least 2; `parts` takes `y_pred` and `y` out of the output.
    pub fn of<O, F>(num_classes: i64, parts: F) -> Of<Self, References<F, O>>
    where
        F: for<'o> Fn(&'o O) -> (&'o Tensor, &'o Tensor),
    {
        Of::new(Self { num_classes, average: None }, parts)
    }
}

impl<F> Of<ConfusionMatrix, F> {
    /// Divides the counts by the number of samples, or by the sums of rows or columns.
    pub fn average(self, average: impl Into<Option<MatrixAverage>>) -> Self {
        self.with(|matrix| matrix.average = average.into())
    }
}

pub(super) fn check_classes(num_classes: i64) -> Result<()> {
    match num_classes > 1 {
        true => Ok(()),
        false => Err(Error::invalid(format!(
            "Argument num_classes needs to be > 1, but given {num_classes}"
        ))),
    }
}

/// Counts class numbers into a matrix (classes, classes), i64. Samples with a number outside of the classes in `y` or
/// `y_pred` are left out. No host sync.
pub(super) fn count(y_pred: &Tensor, y: &Tensor, classes: i64) -> Result<Tensor, TchError> {
    let (y_pred, y) = (y_pred.f_to_kind(Kind::Int64)?, y.f_to_kind(Kind::Int64)?);
    let outside = |numbers: &Tensor| numbers.f_lt(0)?.f_logical_or(&numbers.f_ge(classes)?);
    let places = y.f_mul_scalar(classes)?.f_add(&y_pred)?;
    let left_out = outside(&y)?.f_logical_or(&outside(&y_pred)?)?;
    occurrences(&places.f_masked_fill(&left_out, -1)?, classes * classes)?
        .f_reshape([classes, classes])
}

impl Pairwise for ConfusionMatrix {
    const NAME: &'static str = "Confusion matrix";
    fn parts(&self) -> Parts {
        &[("confusion_matrix", Reduce::Sum)]
    }

    fn validate(&self) -> Result<()> {
        check_classes(self.num_classes)
    }

    fn batch(&mut self, y_pred: &Tensor, y: &Tensor) -> anyhow::Result<Contribution> {
        let (classes, pred, shape) = (self.num_classes, y_pred.size(), y.size());
        anyhow::ensure!(
            pred.len() < 2 || pred[1] == classes,
            "y_pred does not have correct number of classes: {} vs {classes}",
            pred[1]
        );
        anyhow::ensure!(
            pred.len() == shape.len() + 1 && pred[0] == shape[0] && pred[2..] == shape[1..],
            "y_pred must have shape (batch_size, num_classes (currently set to {classes}), ...) and y must have shape of (batch_size, ...), but given {shape:?} vs {pred:?}"
        );
        let matrix = count(&y_pred.f_argmax(1, false)?, y, classes)?;
        Ok(Contribution::new([matrix], pred[0] as u64))
    }

    fn value(&self, parts: &[Tensor], samples: f64) -> anyhow::Result<MetricValue> {
        let matrix = &parts[0];
        let shares = |dim: i64| -> Result<Tensor, TchError> {
            let matrix = double(matrix)?;
            let sums = matrix.f_sum_dim_intlist(dim, true, None)?.f_add_scalar(1e-15)?;
            matrix.f_div(&sums)
        };
        Ok(match self.average {
            None => matrix.shallow_clone(),
            Some(MatrixAverage::Samples) => double(matrix)?.f_div_scalar(samples)?,
            Some(MatrixAverage::Recall) => shares(1)?,
            Some(MatrixAverage::Precision) => shares(0)?,
        }
        .into())
    }
}
