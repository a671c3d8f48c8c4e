use tch::{Kind, TchError, Tensor};

use super::confusion_matrix::{check_classes, count};
use super::{double, gathered, of_pair};
use crate::error::Result;
use crate::metrics::MetricValue;
use crate::metrics::{Contribution, Of, Pairwise, Parts, Reduce};

/// How much a disagreement of [`CohenKappa`] counts by the distance of the two classes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KappaWeights {
    /// In proportion to it.
    Linear,
    /// In proportion to its square.
    Quadratic,
}

/// How far two ratings agree beyond chance: ignite's `CohenKappa`.
///
/// `y_pred` and `y` are (N,) or (N, 1), class numbers from 0. With [`num_classes`](Of::num_classes)
/// they are counted on the device without a host sync; otherwise all are kept on the device, and
/// compute takes one host sync.
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
    /// Disagreements by distance; all the same unless given.
    pub fn weights(self, weights: impl Into<Option<KappaWeights>>) -> Self {
        self.with(|kappa| kappa.weights = weights.into())
    }

    /// How many classes there are, at least 2. Labels of `y` outside of them are left out.
    pub fn num_classes(self, num_classes: impl Into<Option<i64>>) -> Self {
        self.with(|kappa| kappa.num_classes = num_classes.into())
    }
}

impl CohenKappa {
    fn kappa(&self, matrix: &Tensor) -> Result<Tensor, TchError> {
        let matrix = double(matrix)?;
        let share = |part: &Tensor| part.f_div(&matrix.f_sum(None)?);
        let rows = matrix.f_sum_dim_intlist(1i64, false, None)?;
        let columns = matrix.f_sum_dim_intlist(0i64, false, None)?;
        let by_chance = share(&rows.f_outer(&columns)?)?;
        let weights = self.disagreement(&matrix)?;
        let disagreement = |of: &Tensor| share(&of.f_mul(&weights)?.f_sum(None)?);
        // 1 - d / d_chance, as ignite computes it: its denominator is at least 1e-9.
        let (observed, chance) = (disagreement(&matrix)?, disagreement(&by_chance)?);
        chance.f_sub(&observed)?.f_div(&chance.f_clamp_min(1e-9)?)
    }

    /// How much each cell counts.
    fn disagreement(&self, matrix: &Tensor) -> Result<Tensor, TchError> {
        let classes = matrix.size()[0];
        let numbers = Tensor::f_arange(classes, (matrix.kind(), matrix.device()))?;
        let distance = numbers.f_unsqueeze(0)?.f_sub(&numbers.f_unsqueeze(1)?)?.f_abs()?;
        let largest = (classes - 1) as f64;
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
        let (y_pred, y) = (flat(y_pred)?, flat(y)?);
        let gathered = gathered::gather(&y_pred, &y)?;
        Ok(match self.num_classes {
            Some(classes) => Contribution::new([count(&y_pred, &y, classes)?], gathered.samples),
            None => gathered,
        })
    }

    fn value(&self, parts: &[Tensor], _samples: f64) -> anyhow::Result<MetricValue> {
        if self.num_classes.is_some() {
            return Ok(self.kappa(&parts[0])?.into());
        }
        let both = Tensor::f_stack(parts, 0)?.f_to_device(tch::Device::Cpu)?;
        let least = both.f_min()?.f_int64_value(&[])?;
        anyhow::ensure!(least >= 0, "class numbers start with 0, but there is {least}");
        let classes = both.f_max()?.f_int64_value(&[])? + 1;
        let matrix = count(&both.f_select(0, 0)?, &both.f_select(0, 1)?, classes.max(2))?;
        Ok(self.kappa(&matrix)?.into())
    }
}
