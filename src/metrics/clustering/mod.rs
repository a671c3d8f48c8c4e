//! Metrics of clusters: ignite's `ignite.metrics.clustering`.

mod calinski_harabasz_score;
mod davies_bouldin_score;
mod silhouette_score;

pub use calinski_harabasz_score::CalinskiHarabaszScore;
pub use davies_bouldin_score::DaviesBouldinScore;
pub use silhouette_score::SilhouetteScore;

use tch::{Kind, TchError, Tensor};

use super::gathered;
use super::pairwise::of_pair;
use super::to_value::{double, host};

/// Features (N, D) and labels (N,).
fn check(features: &Tensor, labels: &Tensor) -> anyhow::Result<()> {
    let shape = features.size();
    anyhow::ensure!(
        shape.len() == 2 && shape[1] > 0,
        "Features should be of shape (batch_size, n_targets), but given {shape:?}"
    );
    anyhow::ensure!(
        labels.dim() == 1,
        "Labels should be of shape (batch_size, ), but given {:?}",
        labels.size()
    );
    Ok(())
}

/// Samples by their clusters.
struct Clusters {
    features: Tensor,
    /// (N, K), 1 where a sample belongs.
    members: Tensor,
    /// (K,)
    sizes: Tensor,
    /// (K, D)
    centroids: Tensor,
}

impl Clusters {
    /// None where there is but one cluster, or each sample is its own. One host sync.
    fn of(features: &Tensor, labels: &Tensor) -> Result<Option<Self>, TchError> {
        let features = double(features)?;
        // One column was gathered as none.
        let features = if features.dim() == 1 { features.f_unsqueeze(1)? } else { features };
        let mut numbers = host::<i64>(labels)?;
        numbers.sort_unstable();
        numbers.dedup();
        if numbers.len() < 2 || numbers.len() >= features.size()[0] as usize {
            return Ok(None);
        }
        let numbers = Tensor::f_from_slice(&numbers)?.f_to_device(labels.device())?;
        let labels = labels.f_to_kind(Kind::Int64)?.f_unsqueeze(1)?;
        let members = double(&labels.f_eq_tensor(&numbers.f_unsqueeze(0)?)?)?;
        let sizes = members.f_sum_dim_intlist(0i64, false, None)?;
        let mut clusters = Self { features, members, sizes, centroids: Tensor::new() };
        clusters.centroids = clusters.mean_of(&clusters.features)?;
        Ok(Some(clusters))
    }

    /// The mean of rows (N, D) over each cluster: (K, D).
    fn mean_of(&self, rows: &Tensor) -> Result<Tensor, TchError> {
        self.members.f_transpose(0, 1)?.f_matmul(rows)?.f_div(&self.sizes.f_unsqueeze(1)?)
    }

    /// How far each sample is from its centroid: (N, D).
    fn deviations(&self) -> Result<Tensor, TchError> {
        self.features.f_sub(&self.members.f_matmul(&self.centroids)?)
    }
}
