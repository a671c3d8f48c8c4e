use tch::Tensor;

use super::{logits, of_pair};
use crate::metrics::MetricValue;
use crate::metrics::{Contribution, Pairwise, Parts, Reduce};

/// The mean entropy of softmax(y_pred), in nats: ignite's `Entropy`.
///
/// `y_pred` are logits, (N, C) or (N, C, …); every place counts as a sample. `y` is not looked at. No host
/// sync.
///
/// ```
/// use tch::Tensor;
/// use tch_ignite::metrics::{Entropy, Metric, pair};
/// let mut metric = Entropy::of(pair);
/// let y_pred = Tensor::from_slice2(&[[0., 0.]]);
/// metric.update(&(y_pred, Tensor::from_slice(&[0i64])))?;
/// assert!((metric.compute()?.read()? - 2f64.ln()).abs() < 1e-12);
/// # anyhow::Ok(())
/// ```
#[derive(Debug, Default)]
pub struct Entropy;

of_pair!(Entropy);

impl Pairwise for Entropy {
    const NAME: &'static str = "Entropy";

    fn parts(&self) -> Parts {
        &[("sum", Reduce::Sum)]
    }

    fn batch(&mut self, y_pred: &Tensor, y: &Tensor) -> anyhow::Result<Contribution> {
        let _ = y;
        let logits = logits(y_pred)?;
        let log = logits.f_log_softmax(1, None)?;
        let sum = log.f_exp()?.f_mul(&log)?.f_sum(None)?.f_neg()?;
        Ok(Contribution::new([sum], logits.size()[0] as u64))
    }

    fn value(&self, parts: &[Tensor], samples: f64) -> anyhow::Result<MetricValue> {
        Ok(parts[0].f_div_scalar(samples)?.into())
    }
}
