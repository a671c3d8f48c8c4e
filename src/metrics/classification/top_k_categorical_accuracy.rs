use tch::{Kind, Tensor};

use super::double;
use crate::error::{Error, Result};
use crate::metrics::MetricValue;
use crate::metrics::{Contribution, Of, Pairwise, Parts, Reduce, References};

/// How often the right class is among the `k` with the highest scores: ignite's
/// `TopKCategoricalAccuracy`.
///
/// `y_pred` of shape (N, C), scores or probabilities; `y` of shape (N,), class numbers. Right predictions are
/// counted in i64 on the device; no host sync.
///
/// ```
/// use tch::Tensor;
/// use tch_ignite::metrics::{Metric, TopKCategoricalAccuracy, pair};
/// let mut top_2 = TopKCategoricalAccuracy::of(2, pair);
/// let scores = Tensor::from_slice2(&[[0.5, 0.3, 0.2], [0.5, 0.3, 0.2]]);
/// top_2.update(&(scores, Tensor::from_slice(&[1i64, 2])))?;
/// assert_eq!(top_2.compute()?.read()?, 0.5);
/// # anyhow::Ok(())
/// ```
#[derive(Debug)]
pub struct TopKCategoricalAccuracy {
    k: i64,
}

impl TopKCategoricalAccuracy {
    /// Makes the metric for the `k` highest scores, at least 1; `parts` takes `y_pred` and `y` out of the output.
    pub fn of<O, F>(k: i64, parts: F) -> Of<Self, References<F, O>>
    where
        F: for<'o> Fn(&'o O) -> (&'o Tensor, &'o Tensor),
    {
        Of::new(Self { k }, parts)
    }
}

impl Pairwise for TopKCategoricalAccuracy {
    const NAME: &'static str = "TopKCategoricalAccuracy";
    fn parts(&self) -> Parts {
        &[("right", Reduce::Sum)]
    }

    fn validate(&self) -> Result<()> {
        match self.k > 0 {
            true => Ok(()),
            false => Err(Error::invalid(format!(
                "Argument k should be at least 1, but given {}",
                self.k
            ))),
        }
    }

    fn batch(&mut self, y_pred: &Tensor, y: &Tensor) -> anyhow::Result<Contribution> {
        let (pred, shape) = (y_pred.size(), y.size());
        anyhow::ensure!(
            pred.len() == 2 && shape == pred[..1] && pred[1] >= self.k,
            "y_pred must be (N, C) with C of at least {} and y (N,), but given {pred:?} and {shape:?}",
            self.k
        );
        let (_, best) = y_pred.f_topk(self.k, 1, true, false)?;
        let right = best.f_eq_tensor(&y.f_unsqueeze(1)?)?.f_sum(Kind::Int64)?;
        Ok(Contribution::new([right], shape[0] as u64))
    }

    fn value(&self, parts: &[Tensor], samples: f64) -> anyhow::Result<MetricValue> {
        Ok(double(&parts[0])?.f_div_scalar(samples)?.into())
    }
}
