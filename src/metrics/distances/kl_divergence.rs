use tch::{Reduction, Tensor};

use super::{logits, of_pair, same_shape};
use crate::metrics::MetricValue;
use crate::metrics::{Contribution, Pairwise, Parts, Reduce};

/// The mean Kullback-Leibler divergence of softmax(y_pred) from softmax(y), Σ p ln(p / q) with p of y, in
/// nats: ignite's `KLDivergence`.
///
/// Both are logits of the same shape, (N, C) or (N, C, …); every place counts as a sample. No host sync.
///
/// ```
/// use tch::Tensor;
/// use tch_ignite::metrics::{KLDivergence, Metric, pair};
/// let mut metric = KLDivergence::of(pair);
/// let y_pred = Tensor::from_slice2(&[[0., 0.]]);
/// metric.update(&(y_pred, Tensor::from_slice2(&[[0., 900.]])))?;
/// assert!((metric.compute()?.read()? - 2f64.ln()).abs() < 1e-12);
/// # anyhow::Ok(())
/// ```
#[derive(Debug, Default)]
pub struct KLDivergence;

of_pair!(KLDivergence);

impl Pairwise for KLDivergence {
    const NAME: &'static str = "KLDivergence";

    fn parts(&self) -> Parts {
        &[("sum", Reduce::Sum)]
    }

    fn batch(&mut self, y_pred: &Tensor, y: &Tensor) -> anyhow::Result<Contribution> {
        same_shape(y_pred, y, 2)?;
        let (y_pred, y) =
            (logits(y_pred)?.f_log_softmax(1, None)?, logits(y)?.f_log_softmax(1, None)?);
        let sum = y_pred.f_kl_div(&y, Reduction::Sum, true)?;
        Ok(Contribution::new([sum], y.size()[0] as u64))
    }

    fn value(&self, parts: &[Tensor], samples: f64) -> anyhow::Result<MetricValue> {
        Ok(parts[0].f_div_scalar(samples)?.into())
    }
}
