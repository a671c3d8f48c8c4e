use anyhow::{Result, ensure};

/// Chooses the batches of a pass and their order: PyTorch's `batch_sampler`.
/// [`DataLoader::batch_sampler`](super::DataLoader::batch_sampler) takes one.
///
/// The batches depend on the pass's number alone, so that a run can be continued anywhere. All passes have the same
/// number of batches. A checkpoint counts them, so that processes whose batches differ in size go on together.
///
/// ```
/// use tch_ignite::data::BatchSampler;
/// /// Frames of a film, scene by scene.
/// struct Scenes(Vec<std::ops::Range<usize>>);
/// impl BatchSampler for Scenes {
///     fn num_batches(&self) -> usize {
///         self.0.len()
///     }
///     fn batches(&self, _pass: u64) -> anyhow::Result<Vec<Vec<usize>>> {
///         Ok(self.0.iter().map(|scene| scene.clone().collect()).collect())
///     }
/// }
/// ```
pub trait BatchSampler: Send + Sync {
    /// Returns the number of batches in a pass, the same in all passes.
    fn num_batches(&self) -> usize;

    /// Returns the indices of the samples of each batch of pass `pass` (counted from 0), none of them empty. The loader
    /// asks once a pass; positions within the pass are then reached at no cost.
    ///
    /// # Errors
    /// Batches that cannot be made.
    fn batches(&self, pass: u64) -> Result<Vec<Vec<usize>>>;

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

/// Asks the sampler for a pass, and checks its batches against data with `len` samples. Returns the indices of all
/// batches, and the position behind each batch.
pub(super) fn batches_of(
    sampler: &dyn BatchSampler,
    pass: u64,
    len: usize,
) -> Result<(Vec<usize>, Vec<u64>)> {
    let count = sampler.num_batches();
    let batches = sampler.batches(pass)?;
    ensure!(
        batches.len() == count,
        "the batch sampler says that a pass has {count} batches, but gives {} in pass {pass}",
        batches.len()
    );
    let mut ends = Vec::with_capacity(count);
    let mut order = Vec::new();
    for (number, batch) in batches.into_iter().enumerate() {
        ensure!(
            !batch.is_empty(),
            "the batch sampler gives an empty batch {number} in pass {pass}"
        );
        if let Some(index) = batch.iter().find(|index| **index >= len) {
            anyhow::bail!(
                "the batch sampler gives index {index} in pass {pass}, but the data has {len} samples"
            );
        }
        order.extend(batch);
        ends.push(order.len() as u64);
    }
    Ok((order, ends))
}
