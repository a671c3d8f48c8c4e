use tch::Tensor;

use super::{Clusters, check, gathered, of_pair};
use crate::metrics::MetricValue;
use crate::metrics::{Contribution, Pairwise, Parts};

/// The spread between clusters over that within: ignite's `CalinskiHarabaszScore`, scikit-learn's formula;
/// higher is better. 1 where there is no spread within.
///
/// `y_pred` are features, (N, D); `y` are the numbers of their clusters, (N,). NaN where there is but one
/// cluster, or each sample is its own. Keeps everything on the device; one host sync in compute.
///
/// ```
/// use tch::Tensor;
/// use tch_ignite::metrics::{Metric, clustering::CalinskiHarabaszScore, pair};
/// let mut metric = CalinskiHarabaszScore::of(pair);
/// let features = Tensor::from_slice2(&[[0.], [2.], [10.], [12.]]);
/// metric.update(&(features, Tensor::from_slice(&[0i64, 0, 1, 1])))?;
/// assert!((metric.compute()?.read()? - 50.).abs() < 1e-12);
/// # anyhow::Ok(())
/// ```
#[derive(Debug, Default)]
pub struct CalinskiHarabaszScore;

of_pair!(CalinskiHarabaszScore);

impl Pairwise for CalinskiHarabaszScore {
    const NAME: &'static str = "CalinskiHarabaszScore";

    fn parts(&self) -> Parts {
        gathered::PARTS
    }

    fn batch(&mut self, y_pred: &Tensor, y: &Tensor) -> anyhow::Result<Contribution> {
        check(y_pred, y)?;
        gathered::gather(y_pred, y)
    }

    fn value(&self, parts: &[Tensor], samples: f64) -> anyhow::Result<MetricValue> {
        let Some(clusters) = Clusters::of(&parts[0], &parts[1])? else {
            return Ok(f64::NAN.into());
        };
        let mean = clusters.features.f_mean_dim(0i64, true, None)?;
        let between = clusters.centroids.f_sub(&mean)?.f_square()?;
        let between =
            between.f_sum_dim_intlist(1i64, false, None)?.f_mul(&clusters.sizes)?.f_sum(None)?;
        let within = clusters.deviations()?.f_square()?.f_sum(None)?;
        let (n, k) = (samples, clusters.sizes.size()[0] as f64);
        let score = between.f_mul_scalar((n - k) / (k - 1.))?.f_div(&within)?;
        Ok(score.f_masked_fill(&within.f_eq(0.)?, 1.)?.into())
    }
}
