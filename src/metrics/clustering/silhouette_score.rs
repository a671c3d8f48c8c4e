use tch::Tensor;

use super::{Clusters, check, gathered, of_pair};
use crate::metrics::MetricValue;
use crate::metrics::{Contribution, Pairwise, Parts};

/// How much closer samples are to their own cluster than to the next: ignite's `SilhouetteScore` with
/// Euclidean distances, the mean of (b − a) / max(a, b); in [-1, 1], higher is better.
///
/// `y_pred` are features, (N, D); `y` are the numbers of their clusters, (N,). NaN where there is but one
/// cluster, or each sample is its own. Keeps everything on the device; compute takes one host sync and N × N
/// distances.
///
/// ```
/// use tch::Tensor;
/// use tch_ignite::metrics::{Metric, clustering::SilhouetteScore, pair};
/// let mut metric = SilhouetteScore::of(pair);
/// let features = Tensor::from_slice2(&[[0.], [2.], [10.], [12.]]);
/// metric.update(&(features, Tensor::from_slice(&[0i64, 0, 1, 1])))?;
/// assert!((metric.compute()?.read()? - ((11. - 2.) / 11. + (9. - 2.) / 9.) / 2.).abs() < 1e-12);
/// # anyhow::Ok(())
/// ```
#[derive(Debug, Default)]
pub struct SilhouetteScore;

of_pair!(SilhouetteScore);

impl Pairwise for SilhouetteScore {
    const NAME: &'static str = "SilhouetteScore";

    fn parts(&self) -> Parts {
        gathered::PARTS
    }

    fn batch(&mut self, y_pred: &Tensor, y: &Tensor) -> anyhow::Result<Contribution> {
        check(y_pred, y)?;
        gathered::gather(y_pred, y)
    }

    fn value(&self, parts: &[Tensor], _samples: f64) -> anyhow::Result<MetricValue> {
        let Some(clusters) = Clusters::of(&parts[0], &parts[1])? else {
            return Ok(f64::NAN.into());
        };
        let distances = Tensor::f_cdist(&clusters.features, &clusters.features, 2., Some(2))?;
        let members = &clusters.members;
        let sums = distances.f_matmul(members)?;
        let sizes = clusters.sizes.f_unsqueeze(0)?;
        let own = members.f_gt(0.)?;
        let own_size = members.f_matmul(&clusters.sizes)?;
        let within = sums.f_mul(members)?.f_sum_dim_intlist(1i64, false, None)?;
        let within = within.f_div(&own_size.f_sub_scalar(1.)?)?;
        let others = sums.f_div(&sizes)?.f_masked_fill(&own, f64::INFINITY)?;
        let next = others.f_amin(1i64, false)?;
        let score = next.f_sub(&within)?.f_div(&within.f_maximum(&next)?)?;
        // A sample alone in its cluster counts 0.
        let alone = own_size.f_le(1.)?;
        Ok(score.f_masked_fill(&alone, 0.)?.f_mean(None)?.into())
    }
}
