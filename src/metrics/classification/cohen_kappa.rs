use tch::{Kind, TchError, Tensor};

use super::confusion_matrix::{check_classes, count};
use super::labels::not_whole;
use super::{double, gathered, of_pair};
use crate::error::Result;
use crate::metrics::MetricValue;
use crate::metrics::{Contribution, Of, Pairwise, Parts, Reduce};

/// How much a disagreement counts in [`CohenKappa`], by the distance between the two class numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KappaWeights {
    /// In proportion to the distance.
    Linear,
    /// In proportion to the square of the distance.
    Quadratic,
}

/// The agreement of two ratings beyond chance: ignite's `CohenKappa`.
///
/// `y_pred` and `y` are (N,) or (N, 1), class numbers from 0. With [`num_classes`](Of::num_classes) the metric counts
/// them on the device without a host sync; otherwise it keeps all of them on the device, and `compute` takes one host
/// sync.
///
/// ```
/// use tch::Tensor;
/// use tch_ignite::metrics::{CohenKappa, Metric, pair};
/// let mut kappa = CohenKappa::of(pair).num_classes(2);
/// kappa.update(&(Tensor::from_slice(&[1i64, 0, 1, 1]), Tensor::from_slice(&[1i64, 0, 1, 0])))?;
/// assert!((kappa.compute()?.read()? - 0.5).abs() < 1e-12);
/// # anyhow::Ok(())
/// ```
#[derive(Debug, Default)]
pub struct CohenKappa {
    weights: Option<KappaWeights>,
    num_classes: Option<i64>,
}

of_pair!(CohenKappa);

impl<F> Of<CohenKappa, F> {
    /// Weighs disagreements by distance; without weights all of them count the same.
    pub fn weights(self, weights: impl Into<Option<KappaWeights>>) -> Self {
        self.with(|kappa| kappa.weights = weights.into())
    }

    /// Sets the number of classes, at least 2. Samples with a class number outside of these are left out.
    pub fn num_classes(self, num_classes: impl Into<Option<i64>>) -> Self {
        self.with(|kappa| kappa.num_classes = num_classes.into())
    }
}

impl CohenKappa {
    /// Computes kappa of a confusion matrix of the classes with these numbers, of which `largest` may be the largest.
    fn kappa(&self, matrix: &Tensor, numbers: &Tensor, largest: i64) -> Result<Tensor, TchError> {
        let (matrix, numbers) = (double(matrix)?, double(numbers)?);
        let share = |part: &Tensor| part.f_div(&matrix.f_sum(None)?);
        let rows = matrix.f_sum_dim_intlist(1i64, false, None)?;
        let columns = matrix.f_sum_dim_intlist(0i64, false, None)?;
        let by_chance = share(&rows.f_outer(&columns)?)?;
        let weights = self.disagreement(&numbers, largest as f64)?;
        let disagreement = |of: &Tensor| share(&of.f_mul(&weights)?.f_sum(None)?);
        // ignite computes 1 - d / d_chance in this form, with a denominator of at least 1e-9.
        let (observed, chance) = (disagreement(&matrix)?, disagreement(&by_chance)?);
        chance.f_sub(&observed)?.f_div(&chance.f_clamp_min(1e-9)?)
    }

    /// Returns the weight of each cell of the matrix, by the distance of its two classes.
    fn disagreement(&self, numbers: &Tensor, largest: f64) -> Result<Tensor, TchError> {
        let distance = numbers.f_unsqueeze(0)?.f_sub(&numbers.f_unsqueeze(1)?)?.f_abs()?;
        match self.weights {
            None => distance.f_clamp_max(1.),
            Some(KappaWeights::Linear) => distance.f_div_scalar(largest),
            Some(KappaWeights::Quadratic) => distance.f_square()?.f_div_scalar(largest * largest),
        }
    }
}

impl Pairwise for CohenKappa {
    const NAME: &'static str = "CohenKappa";

    fn parts(&self) -> Parts {
        match self.num_classes {
            Some(_) => &[("confusion_matrix", Reduce::Sum)],
            None => gathered::PARTS,
        }
    }

    fn validate(&self) -> Result<()> {
        self.num_classes.map_or(Ok(()), check_classes)
    }

    fn batch(&mut self, y_pred: &Tensor, y: &Tensor) -> anyhow::Result<Contribution> {
        let flat = |tensor: &Tensor| -> anyhow::Result<Tensor> {
            match tensor.size().as_slice() {
                [_] | [_, 1] => Ok(tensor.f_reshape([-1])?.f_to_kind(Kind::Int64)?),
                shape => {
                    anyhow::bail!("multilabel-indicator is not supported: the shape is {shape:?}")
                }
            }
        };
        let wrong = [not_whole("y_pred", y_pred)?, not_whole("y", y)?];
        let (y_pred, y) = (flat(y_pred)?, flat(y)?);
        let gathered = gathered::gather(&y_pred, &y)?;
        let contribution = match self.num_classes {
            Some(classes) => Contribution::new([count(&y_pred, &y, classes)?], gathered.samples),
            None => gathered,
        };
        Ok(contribution.wrong(wrong.into_iter().flatten().collect()))
    }

    fn value(&self, parts: &[Tensor], _samples: f64) -> anyhow::Result<MetricValue> {
        if let Some(classes) = self.num_classes {
            let numbers = Tensor::f_arange(classes, (Kind::Int64, parts[0].device()))?;
            return Ok(self.kappa(&parts[0], &numbers, classes - 1)?.into());
        }
        let both = Tensor::f_stack(parts, 0)?.f_to_device(tch::Device::Cpu)?;
        // The matrix has the classes that occur, so that a large class number takes no memory.
        let (numbers, both) = both.f_internal_unique(true, true)?;
        let (least, largest) = (numbers.f_min()?, numbers.f_max()?);
        let (least, largest) = (least.f_int64_value(&[])?, largest.f_int64_value(&[])?);
        anyhow::ensure!(least >= 0, "class numbers start with 0, but there is {least}");
        let classes = numbers.numel() as i64;
        let matrix = count(&both.f_select(0, 0)?, &both.f_select(0, 1)?, classes)?;
        Ok(self.kappa(&matrix, &numbers, largest.max(1))?.into())
    }
}
