use std::sync::Arc;

use anyhow::Result;

use super::dataset::out_of_range;
use super::{Dataset, SplitMix64, permutation};
use crate::error::Error;

/// Some samples of a dataset, by index: PyTorch's `Subset`.
///
/// ```
/// use tch_ignite::data::{Dataset, SplitMix64, Subset, from_fn};
/// let letters = from_fn(4, |index, _| Ok(["a", "b", "c", "d"][index]));
/// let evens = Subset::new(letters, [0, 2])?;
/// assert_eq!((evens.len(), evens.get(1, &mut SplitMix64::new(0))?), (2, "c"));
/// # anyhow::Ok(())
/// ```
#[derive(Debug, Clone)]
pub struct Subset<D> {
    dataset: D,
    indices: Vec<usize>,
}

impl<D: Dataset> Subset<D> {
    /// Those at `indices`, in that order.
    ///
    /// # Errors
    /// An index that the dataset does not have.
    pub fn new(dataset: D, indices: impl Into<Vec<usize>>) -> crate::error::Result<Self> {
        let (indices, len) = (indices.into(), dataset.len());
        if let Some(index) = indices.iter().find(|index| **index >= len) {
            return Err(Error::invalid(format!(
                "the subset has index {index}, but the dataset has {len} samples"
            )));
        }
        Ok(Self { dataset, indices })
    }
}

impl<D: Dataset> Dataset for Subset<D> {
    type Item = D::Item;

    fn len(&self) -> usize {
        self.indices.len()
    }

    fn get(&self, index: usize, rng: &mut SplitMix64) -> Result<D::Item> {
        let place = self.indices.get(index);
        let place = place.ok_or_else(|| out_of_range(index, self.indices.len()))?;
        self.dataset.get(*place, rng)
    }
}

/// Parts of these lengths, of a shuffled dataset, without overlap: PyTorch's `random_split`. Always the
/// same for the same seed.
///
/// ```
/// use tch_ignite::data::{Dataset, from_fn, random_split};
/// let numbers = from_fn(100, |index, _| Ok(index as i64));
/// let [train, validation] = random_split(numbers, [90, 10], 42)?;
/// assert_eq!((train.len(), validation.len()), (90, 10));
/// # Ok::<(), tch_ignite::Error>(())
/// ```
///
/// # Errors
/// Lengths that do not sum up to that of the dataset.
pub fn random_split<D: Dataset, const N: usize>(
    dataset: D,
    lengths: [usize; N],
    seed: u64,
) -> crate::error::Result<[Subset<Arc<D>>; N]> {
    let (len, dataset) = (dataset.len(), Arc::new(dataset));
    let sum = lengths.iter().try_fold(0usize, |sum, length| sum.checked_add(*length));
    if sum != Some(len) {
        return Err(Error::invalid(format!(
            "the lengths {lengths:?} must sum up to that of the dataset, {len}"
        )));
    }
    let mut order = permutation(len, seed, 0).into_iter().map(|index| index as usize);
    Ok(lengths.map(|length| Subset {
        dataset: dataset.clone(),
        indices: order.by_ref().take(length).collect(),
    }))
}
