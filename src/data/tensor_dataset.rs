use anyhow::Result;
use tch::Tensor;

use super::dataset::out_of_range;
use super::{Dataset, SplitMix64};
use crate::bridge::SharedTensor;
use crate::error::Error;

/// Inputs and targets in memory, sample by sample: PyTorch's `TensorDataset`.
///
/// For samples that are changed one by one, with [`map`](Dataset::map); a
/// [`Loader`](super::Loader) over the same tensors gathers whole batches and is some 5 times as fast.
/// A sample is a pair of views: what writes into it writes into the data.
///
/// ```
/// use tch::{Device, Kind, Tensor};
/// use tch_ignite::data::{DataLoader, Dataset, TensorDataset};
/// let (x, y) = (Tensor::rand([8, 3, 32, 32], (Kind::Float, Device::Cpu)), Tensor::arange(8, (Kind::Int64, Device::Cpu)));
/// let mirrored = TensorDataset::new(&x, &y)?
///     .map(|(x, y), rng| Ok((if rng.uniform() < 0.5 { x.f_flip([2])? } else { x }, y)));
/// let loader = DataLoader::new(mirrored, 4)?.shuffle(42).num_workers(2);
/// assert_eq!(loader.batches(), 2);
/// # Ok::<(), tch_ignite::Error>(())
/// ```
#[derive(Debug)]
pub struct TensorDataset {
    inputs: SharedTensor,
    targets: SharedTensor,
    len: usize,
}

impl TensorDataset {
    /// Samples along the first dimension of both. Shares the tensors, copies nothing.
    ///
    /// # Errors
    /// Tensors without a first dimension or of different lengths.
    pub fn new(inputs: &Tensor, targets: &Tensor) -> crate::error::Result<Self> {
        let len = super::common_len(inputs, targets)?;
        let share = |tensor| {
            SharedTensor::new(tensor).map_err(|error| Error::libtorch("TensorDataset", error))
        };
        Ok(Self { inputs: share(inputs)?, targets: share(targets)?, len })
    }
}

impl Dataset for TensorDataset {
    type Item = (Tensor, Tensor);

    fn len(&self) -> usize {
        self.len
    }

    fn get(&self, index: usize, _rng: &mut SplitMix64) -> Result<Self::Item> {
        if index >= self.len {
            return Err(out_of_range(index, self.len));
        }
        let index = index as i64;
        Ok((self.inputs.row(index)?, self.targets.row(index)?))
    }
}
