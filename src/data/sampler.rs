use serde_json::Value;

use super::permutation;
use crate::error::{Error, Result};

/// Chooses the samples of a pass and their order: PyTorch's `Sampler`.
///
/// The order depends on the pass's number alone, so that a run can be continued anywhere.
///
/// ```
/// use tch_ignite::data::Sampler;
/// /// Every second sample, beginning with another one in each pass.
/// struct Halves(usize);
/// impl Sampler for Halves {
///     fn num_samples(&self) -> usize {
///         self.0 / 2
///     }
///     fn order(&self, pass: u64) -> anyhow::Result<Vec<usize>> {
///         Ok((pass as usize % 2..self.0).step_by(2).take(self.num_samples()).collect())
///     }
/// }
/// assert_eq!(Halves(6).order(1)?, [1, 3, 5]);
/// # anyhow::Ok(())
/// ```
pub trait Sampler: Send + Sync {
    /// Returns the number of samples in a pass, the same in all passes.
    fn num_samples(&self) -> usize;

    /// Returns the indices of pass `pass` (counted from 0), [`num_samples`](Self::num_samples) of them. The loader
    /// asks once a pass; positions within the pass are then reached at no cost.
    ///
    /// # Errors
    /// An order that cannot be made.
    fn order(&self, pass: u64) -> anyhow::Result<Vec<usize>>;

    /// Returns the seed of the order, where it has one. A resumed run with another seed is warned about.
    fn seed(&self) -> Option<u64> {
        None
    }

    /// Returns whether an index may come more than once in a pass. The random numbers of a sample then depend on its
    /// position in the pass too, so that it is not augmented the same way each time.
    fn repeats(&self) -> bool {
        false
    }
}

/// Asks the sampler for a pass of `samples` samples, and checks the indices against data with `len` samples.
pub(super) fn order_of(
    sampler: &dyn Sampler,
    pass: u64,
    samples: u64,
    len: usize,
) -> anyhow::Result<Vec<usize>> {
    let order = sampler.order(pass)?;
    anyhow::ensure!(
        order.len() as u64 == samples,
        "the sampler says that a pass has {samples} samples, but gives {} in pass {pass}",
        order.len()
    );
    if let Some(index) = order.iter().find(|index| **index >= len) {
        anyhow::bail!(
            "the sampler gives index {index} in pass {pass}, but the data has {len} samples"
        );
    }
    Ok(order)
}

/// Returns the order's seed as a setting of the loader.
pub(super) fn seed_of(sampler: Option<&dyn Sampler>) -> Option<(String, Value)> {
    Some(("seed of the order".into(), sampler?.seed()?.into()))
}

/// All samples, in order.
#[derive(Debug, Clone)]
pub struct SequentialSampler {
    len: usize,
}

impl SequentialSampler {
    /// Makes a sampler for data with `len` samples.
    pub fn new(len: usize) -> Self {
        Self { len }
    }
}

impl Sampler for SequentialSampler {
    fn num_samples(&self) -> usize {
        self.len
    }

    fn order(&self, _pass: u64) -> anyhow::Result<Vec<usize>> {
        Ok((0..self.len).collect())
    }
}

/// All samples, shuffled anew in each pass by [`permutation`] of seed and pass.
#[derive(Debug, Clone)]
pub struct RandomSampler {
    len: usize,
    seed: u64,
}

impl RandomSampler {
    /// Makes a sampler for data with `len` samples.
    pub fn new(len: usize, seed: u64) -> Self {
        Self { len, seed }
    }
}

impl Sampler for RandomSampler {
    fn num_samples(&self) -> usize {
        self.len
    }

    fn order(&self, pass: u64) -> anyhow::Result<Vec<usize>> {
        let order = permutation(self.len, self.seed, pass);
        Ok(order.into_iter().map(|index| index as usize).collect())
    }

    fn seed(&self) -> Option<u64> {
        Some(self.seed)
    }
}

/// Some samples, shuffled anew in each pass. [`Subset`](super::Subset) chooses samples without shuffling.
///
/// ```
/// use tch_ignite::data::{Sampler, SubsetRandomSampler};
/// let mut order = SubsetRandomSampler::new([7, 2, 5], 42)?.order(0)?;
/// order.sort();
/// assert_eq!(order, [2, 5, 7]);
/// # anyhow::Ok(())
/// ```
#[derive(Debug, Clone)]
pub struct SubsetRandomSampler {
    indices: Vec<usize>,
    seed: u64,
}

impl SubsetRandomSampler {
    /// Makes a sampler of these indices.
    ///
    /// # Errors
    /// An empty list of indices.
    pub fn new(indices: impl Into<Vec<usize>>, seed: u64) -> Result<Self> {
        let indices = indices.into();
        if indices.is_empty() {
            return Err(Error::invalid("a sampler needs at least one index, but none was given"));
        }
        Ok(Self { indices, seed })
    }
}

impl Sampler for SubsetRandomSampler {
    fn num_samples(&self) -> usize {
        self.indices.len()
    }

    fn order(&self, pass: u64) -> anyhow::Result<Vec<usize>> {
        let order = permutation(self.indices.len(), self.seed, pass);
        Ok(order.into_iter().map(|place| self.indices[place as usize]).collect())
    }

    fn seed(&self) -> Option<u64> {
        Some(self.seed)
    }
}
