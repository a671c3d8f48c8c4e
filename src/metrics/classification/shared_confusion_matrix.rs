use tch::{TchError, Tensor};

use super::double;
use super::{ConfusionMatrix, MatrixAverage};
use crate::metrics::{MetricsLambda, Of, OutputPair};

/// A confusion matrix that several metrics derive from; it is updated once.
///
/// Each method gives a metric to attach, or to compute with. The derived values are f64, without a host sync;
/// [`matrix`](Self::matrix) keeps its own type.
///
/// ```
/// use tch::Tensor;
/// use tch_ignite::engine::{Engine, Until};
/// use tch_ignite::metrics::{ConfusionMatrix, pair};
/// let mut evaluator = Engine::new(|_: &mut (), _, (): ()| {
///     let scores = Tensor::from_slice2(&[[0.9, 0.1], [0.2, 0.8], [0.3, 0.7]]);
///     Ok((scores, Tensor::from_slice(&[0i64, 0, 1])))
/// });
/// let matrix = ConfusionMatrix::of(2, pair).shared();
/// evaluator
///     .metric("mIoU", matrix.mean_iou(None))
///     .metric("dice", matrix.dice_coefficient(None))
///     .metric("matrix", matrix.matrix());
/// evaluator.run(&mut (), vec![()], Until::epochs(1))?;
/// assert!((evaluator.state.metrics.get("mIoU")? - 0.5).abs() < 1e-12);
/// # Ok::<(), tch_ignite::Error>(())
/// ```
pub struct SharedConfusionMatrix<'a, O> {
    matrix: MetricsLambda<'a, O>,
    num_classes: i64,
    average: Option<MatrixAverage>,
}

crate::debug::opaque_debug!(SharedConfusionMatrix<'a, O>);

impl<F> Of<ConfusionMatrix, F> {
    /// Makes a handle to derive other metrics from.
    pub fn shared<'a, O: 'a>(self) -> SharedConfusionMatrix<'a, O>
    where
        F: OutputPair<O> + 'a,
    {
        let (num_classes, average) = (self.metric.num_classes, self.metric.average);
        SharedConfusionMatrix { matrix: MetricsLambda::of(self), num_classes, average }
    }
}

/// The diagonal of the matrix, and the sums of its rows and columns.
struct Sums {
    right: Tensor,
    actual: Tensor,
    predicted: Tensor,
}

fn sums(matrix: &Tensor) -> Result<Sums, TchError> {
    let matrix = double(matrix)?;
    Ok(Sums {
        right: matrix.f_diag(0)?,
        actual: matrix.f_sum_dim_intlist(1i64, false, None)?,
        predicted: matrix.f_sum_dim_intlist(0i64, false, None)?,
    })
}

/// Divides with ignite's epsilon in these denominators.
fn share(part: &Tensor, whole: &Tensor) -> Result<Tensor, TchError> {
    part.f_div(&whole.f_add_scalar(1e-15)?)
}

impl<'a, O> SharedConfusionMatrix<'a, O> {
    /// Returns the matrix itself, as a metric.
    pub fn matrix(&self) -> MetricsLambda<'a, O> {
        self.matrix.clone()
    }

    fn derived(&self, rates: fn(&Sums) -> Result<Tensor, TchError>) -> MetricsLambda<'a, O> {
        self.matrix().apply(move |matrix| Ok(rates(&sums(matrix)?)?))
    }

    /// Derives a vector of rates; with `ignore_index` that class is left out of it.
    fn without(
        &self,
        ignore_index: Option<i64>,
        rates: fn(&Sums) -> Result<Tensor, TchError>,
    ) -> MetricsLambda<'a, O> {
        let derived = self.derived(rates);
        let Some(index) = ignore_index else { return derived };
        if !(0..self.num_classes).contains(&index) {
            return MetricsLambda::refused(format!(
                "ignore_index should be integer and in the range of [0, {}), but given {index}",
                self.num_classes
            ));
        }
        derived.apply(move |rates| {
            let after = rates.f_narrow(0, index + 1, rates.size()[0] - index - 1)?;
            Ok(Tensor::f_cat(&[rates.f_narrow(0, 0, index)?, after], 0)?)
        })
    }

    /// Intersection over union of each class: ignite's `IoU`. With `ignore_index` that class is left out of the
    /// vector. The matrix must have no average, or [`Samples`](MatrixAverage::Samples).
    #[doc(alias = "IoU")]
    pub fn iou(&self, ignore_index: impl Into<Option<i64>>) -> MetricsLambda<'a, O> {
        if !matches!(self.average, None | Some(MatrixAverage::Samples)) {
            return MetricsLambda::refused(
                "ConfusionMatrix should have average attribute either None or 'samples'",
            );
        }
        self.without(ignore_index.into(), |sums| {
            let union = sums.actual.f_add(&sums.predicted)?.f_sub(&sums.right)?;
            share(&sums.right, &union)
        })
    }

    /// The mean of [`iou`](Self::iou) over classes: ignite's `mIoU`.
    #[doc(alias = "mIoU")]
    pub fn mean_iou(&self, ignore_index: impl Into<Option<i64>>) -> MetricsLambda<'a, O> {
        self.iou(ignore_index).mean()
    }

    /// ignite's `JaccardIndex`, which is [`iou`](Self::iou).
    #[doc(alias = "JaccardIndex")]
    pub fn jaccard_index(&self, ignore_index: impl Into<Option<i64>>) -> MetricsLambda<'a, O> {
        self.iou(ignore_index)
    }

    /// Twice the intersection over the sum of both sizes, for each class: ignite's `DiceCoefficient`.
    /// With `ignore_index` that class is left out of the vector.
    #[doc(alias = "DiceCoefficient")]
    pub fn dice_coefficient(&self, ignore_index: impl Into<Option<i64>>) -> MetricsLambda<'a, O> {
        self.without(ignore_index.into(), |sums| {
            share(&sums.right.f_mul_scalar(2.)?, &sums.actual.f_add(&sums.predicted)?)
        })
    }

    /// The share of right predictions: ignite's `cmAccuracy`.
    #[doc(alias = "cmAccuracy")]
    pub fn accuracy(&self) -> MetricsLambda<'a, O> {
        self.derived(|sums| share(&sums.right.f_sum(None)?, &sums.actual.f_sum(None)?))
    }

    /// The precision of each class, or their mean with `average`: ignite's `cmPrecision`.
    #[doc(alias = "cmPrecision")]
    pub fn precision(&self, average: bool) -> MetricsLambda<'a, O> {
        let precision = self.derived(|sums| share(&sums.right, &sums.predicted));
        if average { precision.mean() } else { precision }
    }

    /// The recall of each class, or their mean with `average`: ignite's `cmRecall`.
    #[doc(alias = "cmRecall")]
    pub fn recall(&self, average: bool) -> MetricsLambda<'a, O> {
        let recall = self.derived(|sums| share(&sums.right, &sums.actual));
        if average { recall.mean() } else { recall }
    }
}
