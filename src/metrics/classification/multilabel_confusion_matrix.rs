use tch::{Kind, Tensor};

use super::confusion_matrix::check_classes;
use super::double;
use super::labels::both_binary;
use crate::error::Result;
use crate::metrics::MetricValue;
use crate::metrics::{Contribution, Of, Pairwise, Parts, Reduce, References};

/// A confusion matrix of each label: ignite's `MultiLabelConfusionMatrix`.
///
/// `y_pred` and `y` are of the same shape (N, C, …), integers 0 or 1. The value is of shape (C, 2, 2), for each label
/// `[[true negatives, false positives], [false negatives, true positives]]`, in i64, or in f64 where it is
/// [`normalized`](Of::normalized). The counts are kept on the device; no host sync.
///
/// ```
/// use tch::Tensor;
/// use tch_ignite::metrics::{Metric, MultiLabelConfusionMatrix, pair};
/// let mut matrix = MultiLabelConfusionMatrix::of(2, pair);
/// let y_pred = Tensor::from_slice2(&[[1i64, 0], [1, 1]]);
/// matrix.update(&(y_pred, Tensor::from_slice2(&[[1i64, 0], [0, 1]])))?;
/// let expected = Tensor::from_slice(&[0i64, 1, 0, 1, 1, 0, 0, 1]).reshape([2, 2, 2]);
/// assert_eq!(matrix.compute()?.tensor()?, expected);
/// # anyhow::Ok(())
/// ```
#[derive(Debug)]
pub struct MultiLabelConfusionMatrix {
    num_classes: i64,
    normalized: bool,
}

impl MultiLabelConfusionMatrix {
    /// Makes the matrices of `num_classes` labels, at least 2; `parts` takes `y_pred` and `y` out of the output.
    pub fn of<O, F>(num_classes: i64, parts: F) -> Of<Self, References<F, O>>
    where
        F: for<'o> Fn(&'o O) -> (&'o Tensor, &'o Tensor),
    {
        Of::new(Self { num_classes, normalized: false }, parts)
    }
}

impl<F> Of<MultiLabelConfusionMatrix, F> {
    /// Divides each label's matrix by its sum.
    pub fn normalized(self, on: bool) -> Self {
        self.with(|matrix| matrix.normalized = on)
    }
}

impl Pairwise for MultiLabelConfusionMatrix {
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
            pred == shape && pred.len() > 1 && pred[1] == classes,
            "y_pred and y must both have shape (batch_size, num_classes (currently set to {classes}), ...), but given {pred:?} and {shape:?}"
        );
        for (name, tensor) in [("y_pred", y_pred), ("y", y)] {
            anyhow::ensure!(
                !tensor.is_floating_point(),
                "{name} must be of an integer type, but is {:?}",
                tensor.kind()
            );
        }
        let wrong = both_binary(y_pred, y)?;
        let flat = |tensor: &Tensor| {
            tensor.f_to_kind(Kind::Int64)?.f_transpose(0, 1)?.f_reshape([classes, -1])
        };
        let (y_pred, y) = (flat(y_pred)?, flat(y)?);
        let sum = |ones: &Tensor| ones.f_sum_dim_intlist(1i64, false, None);
        let both = sum(&y_pred.f_mul(&y)?)?;
        let (false_positives, false_negatives) =
            (sum(&y_pred)?.f_sub(&both)?, sum(&y)?.f_sub(&both)?);
        let others = both.f_add(&false_positives)?.f_add(&false_negatives)?;
        let neither = others.f_neg()?.f_add_scalar(y.size()[1])?;
        let matrix = Tensor::f_stack(&[neither, false_positives, false_negatives, both], 1)?;
        Ok(Contribution::new([matrix.f_reshape([classes, 2, 2])?], pred[0] as u64).wrong(wrong))
    }

    fn value(&self, parts: &[Tensor], _samples: f64) -> anyhow::Result<MetricValue> {
        if !self.normalized {
            return Ok(parts[0].shallow_clone().into());
        }
        let matrix = double(&parts[0])?;
        let sums = matrix.f_sum_dim_intlist(&[1i64, 2][..], true, None)?;
        Ok(matrix.f_div(&sums)?.into())
    }
}
