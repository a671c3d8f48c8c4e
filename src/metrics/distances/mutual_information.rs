use tch::Tensor;

use super::{logits, of_pair};
use crate::metrics::MetricValue;
use crate::metrics::{Contribution, Pairwise, Parts, Reduce};

/// How much a prediction tells of which sample it is, in nats: ignite's `MutualInformation`, the entropy
/// of the mean prediction less the mean entropy of predictions.
///
/// `y_pred` are logits, (N, C) or (N, C, …); every place counts as a sample. `y` is not looked at. No host
/// sync.
///
/// ```
/// use tch::Tensor;
/// use tch_ignite::metrics::{Metric, MutualInformation, pair};
/// let mut metric = MutualInformation::of(pair);
/// let y_pred = Tensor::from_slice2(&[[0., 900.], [900., 0.]]);
/// metric.update(&(y_pred, Tensor::from_slice(&[0i64, 0])))?;
/// assert!((metric.compute()?.read()? - 2f64.ln()).abs() < 1e-12);
/// # anyhow::Ok(())
/// ```
#[derive(Debug, Default)]
pub struct MutualInformation;

of_pair!(MutualInformation);

impl Pairwise for MutualInformation {
    const NAME: &'static str = "MutualInformation";

    fn parts(&self) -> Parts {
        &[("entropy", Reduce::Sum), ("probabilities", Reduce::Sum)]
    }

    fn batch(&mut self, y_pred: &Tensor, y: &Tensor) -> anyhow::Result<Contribution> {
        let _ = y;
        let logits = logits(y_pred)?;
        let log = logits.f_log_softmax(1, None)?;
        let probabilities = log.f_exp()?;
        let entropy = probabilities.f_mul(&log)?.f_sum(None)?.f_neg()?;
        let probabilities = probabilities.f_sum_dim_intlist(0i64, false, None)?;
        Ok(Contribution::new([entropy, probabilities], logits.size()[0] as u64))
    }

    fn value(&self, parts: &[Tensor], samples: f64) -> anyhow::Result<MetricValue> {
        let marginal = parts[1].f_div_scalar(samples)?;
        // 0 · ln 0 is 0.
        let of_mean = marginal.f_xlogy(&marginal)?.f_sum(None)?.f_neg()?;
        let mean = parts[0].f_div_scalar(samples)?;
        Ok(of_mean.f_sub(&mean)?.f_clamp_min(0.)?.into())
    }
}
