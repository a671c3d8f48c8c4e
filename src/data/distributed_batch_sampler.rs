use anyhow::Context;

use super::{BatchSampler, DistributedSampler, Sampler};
use crate::error::Result;

/// One process's share of the batches of a [`BatchSampler`]: batch `r`, `r + n`, `r + 2n`, … for rank `r` of `n`.
///
/// All ranks get the same number of batches: the list is padded with batches from its beginning. All ranks must make
/// the sampler of the same samples and the same seed.
///
/// A checkpoint counts the batches of a rank, so a run goes on in the middle of a pass with the same number of ranks only.
/// With another one it goes on from the end of an epoch; within a pass some samples would come twice or not at all, and
/// the run warns that the number of batches has changed.
///
/// ```
/// use tch_ignite::data::{BatchSampler, BucketBatchSampler, DistributedBatchSampler};
/// let all = BucketBatchSampler::by_samples(&[1, 2, 3, 4, 5], 2)?.buckets(1);
/// let of_rank_1 = DistributedBatchSampler::new(all, 1, 2)?;
/// assert_eq!(of_rank_1.batches(0)?, [vec![2, 3], vec![0, 1]]);
/// # anyhow::Ok(())
/// ```
#[derive(Debug, Clone)]
pub struct DistributedBatchSampler<S> {
    sampler: S,
    share: DistributedSampler,
}

impl<S: BatchSampler> DistributedBatchSampler<S> {
    /// Makes the share of `rank` among `world_size` processes.
    ///
    /// # Errors
    /// No batches, no processes, a rank that is not below their number.
    pub fn new(sampler: S, rank: usize, world_size: usize) -> Result<Self> {
        let share = DistributedSampler::new(sampler.num_batches(), rank, world_size)?;
        Ok(Self { sampler, share })
    }
}

impl<S: BatchSampler> BatchSampler for DistributedBatchSampler<S> {
    fn num_batches(&self) -> usize {
        self.share.num_samples()
    }

    fn batches(&self, pass: u64) -> anyhow::Result<Vec<Vec<usize>>> {
        let all = self.sampler.batches(pass)?;
        let take = |place: usize| {
            let batch: Option<&Vec<usize>> = all.get(place);
            batch.cloned().with_context(|| {
                format!(
                    "the batch sampler gives {} batches in pass {pass}, not as many as it says",
                    all.len()
                )
            })
        };
        self.share.order(pass)?.into_iter().map(take).collect()
    }

    fn seed(&self) -> Option<u64> {
        self.sampler.seed()
    }

    fn repeats(&self) -> bool {
        self.sampler.repeats()
    }
}
