use super::{Sampler, permutation};
use crate::error::{Error, Result};

/// One process's share of the samples: PyTorch's `DistributedSampler`.
///
/// Rank `r` of `n` takes the places `r`, `r + n`, `r + 2n`, … of a pass's order, shuffled or not. All ranks get the
/// same number of samples: the order is padded with samples from its beginning, or cut
/// ([`drop_last`](Self::drop_last)). The order depends on seed and pass alone, so that ranks agree without a
/// message, and passes differ without torch's `set_epoch`. The first batches of all ranks together are the
/// beginning of that order: where all ranks together have the same number of samples in a batch, each step sees the
/// same samples with any number of ranks.
///
/// A pass computes the order of all samples, 8 bytes each; any position in the pass is then reached at no cost.
///
/// ```
/// use tch_ignite::data::{DistributedSampler, Sampler};
/// let (rank, world_size) = (1, 2);
/// let sampler = DistributedSampler::new(5, rank, world_size)?;
/// assert_eq!(sampler.order(0)?, [1, 3, 0]); // of 0 1 2 3 4 0
/// assert_eq!(sampler.clone().drop_last(true)?.order(0)?, [1, 3]);
/// assert_eq!(sampler.uneven(true)?.order(0)?, [1, 3]); // rank 0 has one more
/// # anyhow::Ok(())
/// ```
#[derive(Debug, Clone)]
pub struct DistributedSampler {
    len: usize,
    rank: usize,
    world_size: usize,
    seed: Option<u64>,
    rest: Rest,
}

/// How samples that cannot be divided among the ranks are treated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rest {
    Padded,
    Dropped,
    /// The first ranks have one sample more than the others.
    Uneven,
}

impl DistributedSampler {
    /// Makes the share of `rank` among `world_size` processes, of data with `len` samples, in order and padded.
    ///
    /// # Errors
    /// No samples, no processes, a rank that is not below their number.
    pub fn new(len: usize, rank: usize, world_size: usize) -> Result<Self> {
        if world_size == 0 {
            return Err(Error::invalid(
                "the number of processes must be at least 1, but 0 was given",
            ));
        }
        if rank >= world_size {
            return Err(Error::invalid(format!(
                "Invalid rank {rank}, rank should be in the interval [0, {}]: there are {world_size} processes",
                world_size - 1
            )));
        }
        if len == 0 {
            return Err(Error::invalid(
                "a sampler needs at least one sample, but the data has none",
            ));
        }
        Ok(Self { len, rank, world_size, seed: None, rest: Rest::Padded })
    }

    /// Makes the share of this process in its group.
    ///
    /// # Errors
    /// No samples.
    #[cfg(feature = "distributed")]
    pub fn of_group(len: usize, pg: &crate::distributed::ProcessGroup) -> Result<Self> {
        Self::new(len, pg.rank(), pg.world_size())
    }

    /// Shuffles each pass anew. All ranks must be given the same seed.
    pub fn shuffle(mut self, seed: u64) -> Self {
        self.seed = Some(seed);
        self
    }

    /// Leaves out the last samples of the order where they cannot be divided, instead of padding.
    ///
    /// # Errors
    /// Fewer samples than ranks: no rank would have a sample.
    pub fn drop_last(self, on: bool) -> Result<Self> {
        self.with(if on { Rest::Dropped } else { Rest::Padded })
    }

    /// Neither pads nor leaves out samples: each one comes once, so that a metric over all ranks equals that of one
    /// process. The first ranks may have one sample more than the others, so use this for evaluation only; in
    /// training each step waits for a gradient of every rank.
    ///
    /// # Errors
    /// Fewer samples than ranks: some ranks would have none.
    pub fn uneven(self, on: bool) -> Result<Self> {
        self.with(if on { Rest::Uneven } else { Rest::Padded })
    }

    fn with(mut self, rest: Rest) -> Result<Self> {
        if rest != Rest::Padded && self.len < self.world_size {
            return Err(Error::invalid(format!(
                "{} samples are too few for {} ranks without padding: some would have none",
                self.len, self.world_size
            )));
        }
        self.rest = rest;
        Ok(self)
    }
}

impl Sampler for DistributedSampler {
    fn num_samples(&self) -> usize {
        match self.rest {
            Rest::Padded => self.len.div_ceil(self.world_size),
            Rest::Dropped => self.len / self.world_size,
            Rest::Uneven => (self.len - self.rank).div_ceil(self.world_size),
        }
    }

    fn order(&self, pass: u64) -> anyhow::Result<Vec<usize>> {
        let places = (0..self.num_samples()).map(|i| (self.rank + i * self.world_size) % self.len);
        Ok(match self.seed {
            None => places.collect(),
            Some(seed) => {
                let order = permutation(self.len, seed, pass);
                places.map(|place| order[place] as usize).collect()
            }
        })
    }

    fn seed(&self) -> Option<u64> {
        self.seed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The expected values were found by hand with the rule of torch's `DistributedSampler(shuffle=False)`: pad
    /// with the beginning, or cut, then take every n-th.
    #[test]
    fn the_shares_are_torchs() -> anyhow::Result<()> {
        let shares = |len, world, drop_last| -> anyhow::Result<Vec<Vec<usize>>> {
            let share =
                |rank| DistributedSampler::new(len, rank, world)?.drop_last(drop_last)?.order(3);
            (0..world).map(share).collect()
        };
        assert_eq!(shares(8, 2, false)?, [[0, 2, 4, 6], [1, 3, 5, 7]]);
        assert_eq!(shares(10, 4, false)?, [[0, 4, 8], [1, 5, 9], [2, 6, 0], [3, 7, 1]]);
        assert_eq!(shares(10, 4, true)?, [[0, 4], [1, 5], [2, 6], [3, 7]]);
        assert_eq!(shares(8, 4, true)?, [[0, 4], [1, 5], [2, 6], [3, 7]]);
        // The padding goes round more than once.
        assert_eq!(shares(2, 5, false)?, [[0], [1], [0], [1], [0]]);
        assert_eq!(shares(7, 1, false)?, [[0, 1, 2, 3, 4, 5, 6]]);
        Ok(())
    }

    #[test]
    fn the_seed_is_the_one_that_shuffles() -> Result<()> {
        let sampler = DistributedSampler::new(10, 1, 2)?;
        assert_eq!((sampler.seed(), sampler.clone().shuffle(7).seed()), (None, Some(7)));
        Ok(())
    }

    #[test]
    fn uneven_shares_have_each_sample_once() -> anyhow::Result<()> {
        for (len, world) in [(10, 4), (9, 4), (4, 4), (7, 1)] {
            let share =
                |rank| DistributedSampler::new(len, rank, world)?.shuffle(5).uneven(true)?.order(2);
            let mut all = (0..world).map(share).collect::<anyhow::Result<Vec<_>>>()?.concat();
            all.sort();
            assert_eq!(all, (0..len).collect::<Vec<_>>());
        }
        Ok(())
    }

    #[test]
    fn joined_batches_are_the_same_for_any_number_of_ranks() -> anyhow::Result<()> {
        let joined = |world: usize| -> anyhow::Result<Vec<Vec<usize>>> {
            let local = 12 / world;
            let orders = (0..world)
                .map(|rank| DistributedSampler::new(48, rank, world)?.shuffle(1).order(4));
            let orders = orders.collect::<anyhow::Result<Vec<_>>>()?;
            let batch = |i: usize| {
                let mut batch: Vec<_> = orders
                    .iter()
                    .flat_map(|order| order[i * local..(i + 1) * local].to_vec())
                    .collect();
                batch.sort();
                batch
            };
            Ok((0..4).map(batch).collect())
        };
        let one = joined(1)?;
        for world in [2, 3, 4] {
            assert_eq!(joined(world)?, one);
        }
        Ok(())
    }

    #[test]
    fn what_cannot_be_shared_is_an_error() {
        assert!(DistributedSampler::new(5, 2, 2).is_err());
        assert!(DistributedSampler::new(5, 0, 0).is_err());
        assert!(DistributedSampler::new(0, 0, 1).is_err());
        for refused in [
            DistributedSampler::new(3, 0, 4).and_then(|sampler| sampler.drop_last(true)),
            DistributedSampler::new(3, 3, 4).and_then(|sampler| sampler.uneven(true)),
        ] {
            assert!(refused.unwrap_err().to_string().contains("3 samples are too few for 4 ranks"));
        }
    }
}
