use anyhow::Result;

use super::dataset::out_of_range;
use super::{Dataset, SplitMix64};

/// Datasets one after the other: PyTorch's `ConcatDataset`. Datasets of different types can be joined as
/// `Box<dyn Dataset<Item = …>>`.
///
/// ```
/// use tch_ignite::data::{ConcatDataset, Dataset, SplitMix64, from_fn};
/// let both = ConcatDataset::new([2, 10].map(|len| from_fn(len, |index, _| Ok(index))));
/// assert_eq!((both.len(), both.get(3, &mut SplitMix64::new(0))?), (12, 1));
/// # anyhow::Ok(())
/// ```
#[derive(Debug, Clone)]
pub struct ConcatDataset<D> {
    datasets: Vec<D>,
    /// For each dataset, the number of samples in it and in those before it.
    ends: Vec<usize>,
}

impl<D: Dataset> ConcatDataset<D> {
    /// Joins the datasets in this order.
    pub fn new(datasets: impl Into<Vec<D>>) -> Self {
        let datasets = datasets.into();
        let end = |end: &mut usize, dataset: &D| {
            *end = end.saturating_add(dataset.len());
            Some(*end)
        };
        let ends = datasets.iter().scan(0, end).collect();
        Self { datasets, ends }
    }
}

impl<D: Dataset> Dataset for ConcatDataset<D> {
    type Item = D::Item;

    fn len(&self) -> usize {
        self.ends.last().copied().unwrap_or(0)
    }

    fn get(&self, index: usize, rng: &mut SplitMix64) -> Result<D::Item> {
        let which = self.ends.partition_point(|end| *end <= index);
        let dataset = self.datasets.get(which).ok_or_else(|| out_of_range(index, self.len()))?;
        let before = which.checked_sub(1).map_or(0, |before| self.ends[before]);
        dataset.get(index - before, rng)
    }
}
