use anyhow::Result;

use super::dataset::out_of_range;
use super::{Dataset, SplitMix64};
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
    pub(super) dataset: D,
    pub(super) indices: Vec<usize>,
}

impl<D: Dataset> Subset<D> {
    /// Chooses the samples at `indices`, in that order.
    ///
    /// # Errors
    /// An index that the dataset does not have.
    pub fn new(dataset: D, indices: impl Into<Vec<usize>>) -> crate::error::Result<Self> {
        let indices = indices.into();
        check_indices(&indices, dataset.len(), "the dataset")?;
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

/// Checks that data of `len` samples has all these indices; `whose` names the data.
pub(super) fn check_indices(
    indices: &[usize],
    len: usize,
    whose: &str,
) -> crate::error::Result<()> {
    match indices.iter().find(|index| **index >= len) {
        Some(index) => Err(Error::invalid(format!(
            "the subset has index {index}, but {whose} has {len} samples"
        ))),
        None => Ok(()),
    }
}
