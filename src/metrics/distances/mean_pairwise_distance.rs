use tch::Tensor;

use super::{alike, of_pair};
use crate::metrics::MetricValue;
use crate::metrics::{Contribution, Of, Pairwise, Parts, Reduce};

/// The mean p-norm of y_pred − y + eps over samples: ignite's `MeanPairwiseDistance`, torch's
/// `pairwise_distance`.
///
/// Both (N, D). No host sync.
///
/// ```
/// use tch::Tensor;
/// use tch_ignite::metrics::{MeanPairwiseDistance, Metric, pair};
/// let mut metric = MeanPairwiseDistance::of(pair).eps(0.);
/// let y_pred = Tensor::from_slice2(&[[3., 0.], [0., 0.]]);
/// metric.update(&(y_pred, Tensor::from_slice2(&[[0., 4.], [0., 0.]])))?;
/// assert_eq!(metric.compute()?.read()?, 2.5);
/// # anyhow::Ok(())
/// ```
#[derive(Debug)]
pub struct MeanPairwiseDistance {
    p: f64,
    eps: f64,
}

impl Default for MeanPairwiseDistance {
    fn default() -> Self {
        Self { p: 2., eps: 1e-6 }
    }
}

of_pair!(MeanPairwiseDistance);

impl<F> Of<MeanPairwiseDistance, F> {
    /// The degree of the norm, 2 unless given.
    pub fn p(self, p: f64) -> Self {
        self.with(|metric| metric.p = p)
    }

    /// What is added to each difference, 1e-6 unless given.
    pub fn eps(self, eps: f64) -> Self {
        self.with(|metric| metric.eps = eps)
    }
}

impl Pairwise for MeanPairwiseDistance {
    const NAME: &'static str = "MeanPairwiseDistance";

    fn parts(&self) -> Parts {
        &[("sum", Reduce::Sum)]
    }

    fn batch(&mut self, y_pred: &Tensor, y: &Tensor) -> anyhow::Result<Contribution> {
        anyhow::ensure!(
            y_pred.size() == y.size() && y.dim() == 2,
            "y_pred and y must both be (N, D), but given {:?} and {:?}",
            y_pred.size(),
            y.size()
        );
        let (y_pred, y, samples) = alike(y_pred, y)?;
        let distances = Tensor::f_pairwise_distance(&y_pred, &y, self.p, self.eps, false)?;
        Ok(Contribution::new([distances.f_sum(None)?], samples))
    }

    fn value(&self, parts: &[Tensor], samples: f64) -> anyhow::Result<MetricValue> {
        Ok(parts[0].f_div_scalar(samples)?.into())
    }
}
