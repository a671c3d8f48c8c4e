use serde_json::Value;

use super::permutation;
use crate::error::{Error, Result};

/// Which samples of the data a pass has, and in which order: PyTorch's `Sampler`.
///
/// The order is a function of the pass's number, so that a run can be continued anywhere.
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
    /// Samples in a pass, the same in all of them.
    fn num_samples(&self) -> usize;

    /// The indices of pass `pass` (from 0), [`num_samples`](Self::num_samples) of them. Asked once a
    /// pass; positions within it are then reached at no cost.
    fn order(&self, pass: u64) -> anyhow::Result<Vec<usize>>;

    /// The seed of the order, where it has one: told where a resumed run has another.
    fn seed(&self) -> Option<u64> {
        None
    }

    /// Whether an index may come more than once in a pass. Random numbers of a sample then depend on
    /// its position in the pass too, so that it is not augmented the same way each time.
    fn repeats(&self) -> bool {
        false
    }
}

/// The order of a pass of `samples`, checked, of data with `len`.
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

/// A setting of the loader that has it.
pub(super) fn seed_of(sampler: Option<&dyn Sampler>) -> Option<(String, Value)> {
    Some(("seed of the order".into(), sampler?.seed()?.into()))
}

/// All samples, in order.
#[derive(Debug, Clone)]
pub struct SequentialSampler {
    len: usize,
}

impl SequentialSampler {
    /// Of data with `len` samples.
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

/// All samples, shuffled anew in each pass: [`permutation`] of seed and pass.
#[derive(Debug, Clone)]
pub struct RandomSampler {
    len: usize,
    seed: u64,
}

impl RandomSampler {
    /// Of data with `len` samples.
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

/// Some samples, shuffled anew in each pass; without shuffling, see [`Subset`](super::Subset).
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
    /// Of these indices.
    ///
    /// # Errors
    /// No indices.
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
