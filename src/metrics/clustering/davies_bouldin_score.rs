use tch::Tensor;

use super::{Clusters, check, gathered, of_pair};
use crate::metrics::MetricValue;
use crate::metrics::{Contribution, Pairwise, Parts};

/// How much the clusters overlap: ignite's `DaviesBouldinScore`, the mean over clusters of the worst ratio
/// of both spreads to the distance of both centroids; lower is better.
///
/// `y_pred` are features, (N, D); `y` are the numbers of their clusters, (N,). NaN where there is but one
/// cluster, or each sample is its own. Keeps everything on the device; one host sync in compute.
///
/// ```
/// use tch::Tensor;
/// use tch_ignite::metrics::{Metric, clustering::DaviesBouldinScore, pair};
/// let mut metric = DaviesBouldinScore::of(pair);
/// let features = Tensor::from_slice2(&[[0.], [2.], [10.], [12.]]);
/// metric.update(&(features, Tensor::from_slice(&[0i64, 0, 1, 1])))?;
/// assert!((metric.compute()?.read()? - 0.2).abs() < 1e-12);
/// # anyhow::Ok(())
/// ```
#[derive(Debug, Default)]
pub struct DaviesBouldinScore;

of_pair!(DaviesBouldinScore);

impl Pairwise for DaviesBouldinScore {
    const NAME: &'static str = "DaviesBouldinScore";

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
        let distances =
            clusters.deviations()?.f_square()?.f_sum_dim_intlist(1i64, false, None)?.f_sqrt()?;
        let spread = clusters.mean_of(&distances.f_unsqueeze(1)?)?.f_squeeze_dim(1)?;
        let both = spread.f_unsqueeze(0)?.f_add(&spread.f_unsqueeze(1)?)?;
        let apart = Tensor::f_cdist(&clusters.centroids, &clusters.centroids, 2., Some(2))?;
        let apart = apart.f_masked_fill(&apart.f_eq(0.)?, f64::INFINITY)?;
        Ok(both.f_div(&apart)?.f_amax(1i64, false)?.f_mean(None)?.into())
    }
}
