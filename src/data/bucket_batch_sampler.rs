use super::{BatchSampler, SplitMix64, permutation};
use crate::error::{Error, Result};

/// Batches of samples of similar lengths, so that little of a batch is padding.
///
/// The samples, sorted by length, are cut into [`buckets`](Self::buckets) of about equally many. A batch has samples of
/// one bucket: a fixed number of them, or as many as a budget of tokens allows, where each counts as much as the longest
/// of its bucket, which is what padding makes of it.
///
/// With [`shuffle`](Self::shuffle), the samples of a bucket and the order of all batches are new in each pass. A pass
/// computes the batches of all samples; any position in the pass is then reached at no cost.
///
/// ```
/// use tch_ignite::data::{BatchSampler, BucketBatchSampler};
/// let lengths = [9, 1, 2, 8, 1, 10];
/// let sampler = BucketBatchSampler::by_samples(&lengths, 2)?.buckets(2);
/// assert_eq!(sampler.batches(0)?, [vec![1, 4], vec![2], vec![3, 0], vec![5]]);
/// let sampler = BucketBatchSampler::by_tokens(&lengths, 20)?.buckets(2);
/// assert_eq!(sampler.batches(0)?, [vec![1, 4, 2], vec![3, 0], vec![5]]);
/// # anyhow::Ok(())
/// ```
#[derive(Debug, Clone)]
pub struct BucketBatchSampler {
    /// The indices of all samples, the shortest first.
    sorted: Vec<usize>,
    /// For each place in `sorted`, the sample's length.
    lengths: Vec<usize>,
    budget: Budget,
    buckets: usize,
    seed: Option<u64>,
}

#[derive(Debug, Clone, Copy)]
enum Budget {
    Samples(usize),
    Tokens(usize),
}

impl BucketBatchSampler {
    /// Makes batches of `batch_size` samples, of samples with these lengths. The last batch of a bucket may be smaller.
    ///
    /// # Errors
    /// No samples, or a batch size of 0.
    pub fn by_samples(lengths: &[usize], batch_size: usize) -> Result<Self> {
        if batch_size == 0 {
            return Err(Error::invalid("batch_size must be at least 1, but 0 was given"));
        }
        Self::new(lengths, Budget::Samples(batch_size))
    }

    /// Makes batches that have at most this many tokens after padding, of samples with these lengths.
    ///
    /// # Errors
    /// No samples, or a sample that is longer than the budget.
    pub fn by_tokens(lengths: &[usize], tokens: usize) -> Result<Self> {
        let longer = lengths.iter().enumerate().find(|(_, length)| **length > tokens);
        if let Some((index, length)) = longer {
            return Err(Error::invalid(format!(
                "a batch has at most {tokens} tokens, but sample {index} alone has {length}; give a larger budget, or cut the sample"
            )));
        }
        Self::new(lengths, Budget::Tokens(tokens))
    }

    fn new(lengths: &[usize], budget: Budget) -> Result<Self> {
        if lengths.is_empty() {
            return Err(Error::invalid(
                "a sampler needs at least one sample, but the data has none",
            ));
        }
        let mut sorted: Vec<usize> = (0..lengths.len()).collect();
        sorted.sort_by_key(|index| lengths[*index]);
        let lengths = sorted.iter().map(|index| lengths[*index]).collect();
        Ok(Self { sorted, lengths, budget, buckets: 10, seed: None })
    }

    /// Sets the number of buckets, 10 by default. More buckets make less padding, fewer make batches more random.
    pub fn buckets(mut self, buckets: usize) -> Self {
        self.buckets = buckets;
        self
    }

    /// Shuffles each pass anew.
    pub fn shuffle(mut self, seed: u64) -> Self {
        self.seed = Some(seed);
        self
    }

    /// Gives for each bucket its range in `sorted`, and the number of samples in its batches.
    fn parts(&self) -> impl Iterator<Item = (std::ops::Range<usize>, usize)> {
        let len = self.sorted.len();
        let buckets = self.buckets.clamp(1, len);
        let bound = move |bucket: usize| (bucket as u128 * len as u128 / buckets as u128) as usize;
        (0..buckets).map(move |bucket| {
            let part = bound(bucket)..bound(bucket + 1);
            let size = match self.budget {
                Budget::Samples(samples) => samples,
                // The bucket's last sample is its longest. Samples without tokens count as one token.
                Budget::Tokens(tokens) => tokens.max(1) / self.lengths[part.end - 1].max(1),
            };
            (part, size)
        })
    }
}

impl BatchSampler for BucketBatchSampler {
    fn num_batches(&self) -> usize {
        self.parts().map(|(part, size)| part.len().div_ceil(size)).sum()
    }

    fn batches(&self, pass: u64) -> anyhow::Result<Vec<Vec<usize>>> {
        let mut batches = Vec::with_capacity(self.num_batches());
        for (bucket, (part, size)) in self.parts().enumerate() {
            let mut samples = self.sorted[part].to_vec();
            if let Some(seed) = self.seed {
                let seed = SplitMix64::keyed([seed, bucket as u64]).next_u64();
                let order = permutation(samples.len(), seed, pass);
                samples = order.into_iter().map(|place| samples[place as usize]).collect();
            }
            batches.extend(samples.chunks(size).map(<[usize]>::to_vec));
        }
        if let Some(seed) = self.seed {
            let order = permutation(batches.len(), seed, pass);
            let mut take = |place: i64| std::mem::take(&mut batches[place as usize]);
            return Ok(order.into_iter().map(&mut take).collect());
        }
        Ok(batches)
    }

    fn seed(&self) -> Option<u64> {
        self.seed
    }
}
