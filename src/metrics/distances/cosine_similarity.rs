use tch::Tensor;

use super::{alike, of_pair, same_shape};
use crate::metrics::MetricValue;
use crate::metrics::{Contribution, Of, Pairwise, Parts, Reduce};

/// The mean cosine of the angle between y_pred and y over samples: ignite's `CosineSimilarity`.
///
/// Both (N, …), flattened to (N, D). No host sync.
///
/// ```
/// use tch::Tensor;
/// use tch_ignite::metrics::{CosineSimilarity, Metric, pair};
/// let mut metric = CosineSimilarity::of(pair);
/// let y_pred = Tensor::from_slice2(&[[3., 0.], [1., 1.]]);
/// metric.update(&(y_pred, Tensor::from_slice2(&[[2., 0.], [-1., 1.]])))?;
/// assert_eq!(metric.compute()?.read()?, 0.5);
/// # anyhow::Ok(())
/// ```
#[derive(Debug)]
pub struct CosineSimilarity {
    eps: f64,
}

impl Default for CosineSimilarity {
    fn default() -> Self {
        Self { eps: 1e-8 }
    }
}

of_pair!(CosineSimilarity);

impl<F> Of<CosineSimilarity, F> {
    /// The least length of a vector to divide by, 1e-8 unless given.
    pub fn eps(self, eps: f64) -> Self {
        self.with(|metric| metric.eps = eps)
    }
}

impl Pairwise for CosineSimilarity {
    const NAME: &'static str = "CosineSimilarity";

    fn parts(&self) -> Parts {
        &[("sum", Reduce::Sum)]
    }

    fn batch(&mut self, y_pred: &Tensor, y: &Tensor) -> anyhow::Result<Contribution> {
        same_shape(y_pred, y, 2)?;
        let (y_pred, y, samples) = alike(y_pred, y)?;
        let (y_pred, y) = (y_pred.f_flatten(1, -1)?, y.f_flatten(1, -1)?);
        let similarities = Tensor::f_cosine_similarity(&y_pred, &y, 1, self.eps)?;
        Ok(Contribution::new([similarities.f_sum(None)?], samples))
    }

    fn value(&self, parts: &[Tensor], samples: f64) -> anyhow::Result<MetricValue> {
        Ok(parts[0].f_div_scalar(samples)?.into())
    }
}
