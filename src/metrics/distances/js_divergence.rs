use tch::{Reduction, Tensor};

use super::{logits, of_pair, same_shape};
use crate::metrics::MetricValue;
use crate::metrics::{Contribution, Pairwise, Parts, Reduce};

/// The mean Jensen-Shannon divergence of softmax(y_pred) and softmax(y), half the sum of the divergences
/// of both from their mean, in nats: ignite's `JSDivergence`.
///
/// Both are logits of the same shape, (N, C) or (N, C, …); every place counts as a sample. No host sync.
///
/// ```
/// use tch::Tensor;
/// use tch_ignite::metrics::{JSDivergence, Metric, pair};
/// let mut metric = JSDivergence::of(pair);
/// let y_pred = Tensor::from_slice2(&[[900., 0.]]);
/// metric.update(&(y_pred, Tensor::from_slice2(&[[0., 900.]])))?;
/// assert!((metric.compute()?.read()? - 2f64.ln()).abs() < 1e-12);
/// # anyhow::Ok(())
/// ```
#[derive(Debug, Default)]
pub struct JSDivergence;

of_pair!(JSDivergence);

impl Pairwise for JSDivergence {
    const NAME: &'static str = "JSDivergence";

    fn parts(&self) -> Parts {
        &[("sum", Reduce::Sum)]
    }

    fn batch(&mut self, y_pred: &Tensor, y: &Tensor) -> anyhow::Result<Contribution> {
        same_shape(y_pred, y, 2)?;
        let (y_pred, y) =
            (logits(y_pred)?.f_log_softmax(1, None)?, logits(y)?.f_log_softmax(1, None)?);
        let middle = y_pred.f_exp()?.f_add(&y.f_exp()?)?.f_div_scalar(2.)?.f_log()?;
        let divergence = |of: &Tensor| middle.f_kl_div(of, Reduction::Sum, true);
        let sum = divergence(&y_pred)?.f_add(&divergence(&y)?)?;
        Ok(Contribution::new([sum], y.size()[0] as u64))
    }

    fn value(&self, parts: &[Tensor], samples: f64) -> anyhow::Result<MetricValue> {
        Ok(parts[0].f_div_scalar(2. * samples)?.into())
    }
}
