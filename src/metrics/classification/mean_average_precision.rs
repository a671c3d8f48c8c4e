use tch::{Kind, TchError, Tensor};

use super::labels::{Case, Labels, any_outside, not_binary, rows};
use super::{double, gathered, of_pair, ranking};
use crate::error::{Error, Result};
use crate::metrics::MetricValue;
use crate::metrics::{Contribution, Of, Pairwise, Parts};

/// How [`MeanAveragePrecision`] combines the classes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ClassMean {
    /// The mean over classes.
    #[default]
    Macro,
    /// One value over all classes together.
    Micro,
    /// The mean over classes, each weighted by how often it occurs in `y`.
    Weighted,
    /// A vector with one value for each class.
    None,
}

/// The average precision over classes: ignite's `MeanAveragePrecision`.
///
/// `y_pred` are scores of floating point. Shapes are those of [`Accuracy`](super::Accuracy), but binary and
/// multilabel scores need not be 0 or 1. A class without positives counts as 0. The metric keeps all samples on the
/// device and sorts them in `compute`, without a host sync; only with [`rec_thresholds`](Of::rec_thresholds)
/// `compute` copies the thresholds to the device.
///
/// ```
/// use tch::Tensor;
/// use tch_ignite::metrics::{MeanAveragePrecision, Metric, pair};
/// let mut metric = MeanAveragePrecision::of(pair);
/// let scores = Tensor::from_slice2(&[[0.9, 0.1], [0.2, 0.8], [0.3, 0.7]]);
/// metric.update(&(scores, Tensor::from_slice(&[0i64, 0, 1])))?;
/// assert!((metric.compute()?.read()? - (5. / 6. + 0.5) / 2.).abs() < 1e-12);
/// # anyhow::Ok(())
/// ```
#[derive(Debug, Default)]
pub struct MeanAveragePrecision {
    labels: Labels,
    class_mean: ClassMean,
    rec_thresholds: Vec<f64>,
}

of_pair!(MeanAveragePrecision);

impl<F> Of<MeanAveragePrecision, F> {
    /// Takes `y_pred` and `y` that are both (N, C, …), `y` 0 or 1 for each label.
    pub fn is_multilabel(self, on: bool) -> Self {
        self.with(|metric| metric.labels.multilabel = on)
    }

    /// Sets how the classes are combined; the default is their mean.
    pub fn class_mean(self, class_mean: ClassMean) -> Self {
        self.with(|metric| metric.class_mean = class_mean)
    }

    /// Takes the precision at these recalls in [0, 1] instead of at those of the data.
    pub fn rec_thresholds(self, thresholds: impl Into<Vec<f64>>) -> Self {
        self.with(|metric| {
            metric.rec_thresholds = thresholds.into();
            metric.rec_thresholds.sort_by(f64::total_cmp);
        })
    }
}

impl MeanAveragePrecision {
    fn by_class(&self, scores: &Tensor, y: &Tensor) -> Result<Tensor, TchError> {
        if self.rec_thresholds.is_empty() {
            return ranking::average_precision(scores, y);
        }
        let thresholds = double(&Tensor::f_from_slice(&self.rec_thresholds)?)?;
        ranking::average_precision_at(scores, y, &thresholds)
    }
}

impl Pairwise for MeanAveragePrecision {
    const NAME: &'static str = "MeanAveragePrecision";

    fn parts(&self) -> Parts {
        gathered::PARTS
    }

    fn validate(&self) -> Result<()> {
        match self.rec_thresholds.iter().find(|recall| !(0. ..=1.).contains(*recall)) {
            Some(recall) => Err(Error::invalid(format!(
                "rec_thresholds values should be between 0 and 1, given {recall}"
            ))),
            None => Ok(()),
        }
    }

    fn reset(&mut self) {
        self.labels.reset();
    }

    fn batch(&mut self, y_pred: &Tensor, y: &Tensor) -> anyhow::Result<Contribution> {
        anyhow::ensure!(
            y_pred.is_floating_point(),
            "`y_pred` should be a float tensor, given {:?}",
            y_pred.kind()
        );
        let (case, classes) = self.labels.case(y_pred, y)?;
        let mut wrong = vec![];
        let (y_pred, y) = match case {
            Case::Binary => {
                wrong.extend(not_binary("y", y)?);
                (y_pred.f_reshape([-1, 1])?, y.f_reshape([-1, 1])?)
            }
            Case::Multilabel => {
                wrong.extend(not_binary("y", y)?);
                (rows(y_pred)?, rows(y)?)
            }
            Case::Multiclass => {
                let outside = any_outside(y, classes)?;
                wrong.push((outside, format!("y_pred contains fewer classes than y: an element in y is outside of [0, {classes}).")));
                let numbers = Tensor::f_arange(classes, (Kind::Int64, y.device()))?;
                (rows(y_pred)?, y.f_reshape([-1, 1])?.f_eq_tensor(&numbers)?)
            }
        };
        Ok(gathered::gather(&double(&y_pred)?, &y.f_to_kind(Kind::Uint8)?)?.wrong(wrong))
    }

    fn value(&self, parts: &[Tensor], _samples: f64) -> anyhow::Result<MetricValue> {
        let (mut scores, mut y) = ranking::class_rows(&parts[0], &parts[1])?;
        // A binary metric keeps one column, which `gather` stores as (N,).
        if parts[0].dim() == 1 {
            return Ok(self.by_class(&scores, &y)?.f_squeeze_dim(0)?.into());
        }
        if self.class_mean == ClassMean::Micro {
            (scores, y) = (scores.f_reshape([1, -1])?, y.f_reshape([1, -1])?);
        }
        let values = self.by_class(&scores, &y)?;
        Ok(match self.class_mean {
            ClassMean::None => values,
            ClassMean::Macro | ClassMean::Micro => values.f_mean(None)?,
            ClassMean::Weighted => {
                let positives = y.f_sum_dim_intlist(-1i64, false, None)?;
                values.f_mul(&positives)?.f_sum(None)?.f_div(&positives.f_sum(None)?)?
            }
        }
        .into())
    }
}
