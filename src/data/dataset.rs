use std::sync::Arc;

use anyhow::Result;

use super::SplitMix64;

/// Samples that are read one by one, by index: PyTorch's map-style `Dataset`.
///
/// Worker threads share a dataset, so it is `Sync`. A tensor alone is not; [`TensorDataset`](super::TensorDataset)
/// wraps tensors for sharing. [`from_fn`] makes a dataset of a length and a closure.
///
/// ```
/// use std::path::PathBuf;
/// use tch::Tensor;
/// use tch_ignite::data::{Dataset, SplitMix64};
///
/// /// Pictures and their classes, read when they are needed, every second one mirrored.
/// struct Pictures(Vec<(PathBuf, i64)>);
///
/// impl Dataset for Pictures {
///     type Item = (Tensor, i64);
///     fn len(&self) -> usize {
///         self.0.len()
///     }
///     fn get(&self, index: usize, rng: &mut SplitMix64) -> anyhow::Result<Self::Item> {
///         let (path, class) = &self.0[index];
///         let picture = tch::vision::image::load(path)?;
///         Ok((if rng.uniform() < 0.5 { picture.f_flip([2])? } else { picture }, *class))
///     }
/// }
/// ```
#[diagnostic::on_unimplemented(
    message = "`{Self}` is no dataset",
    note = "a closure becomes one by `from_fn(length, |index, rng| Ok((image, label)))`, tensors by `TensorDataset::new`"
)]
pub trait Dataset: Send + Sync {
    /// The type of a sample.
    type Item;

    /// Returns the number of samples.
    fn len(&self) -> usize;

    /// Returns whether the dataset has no samples.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Reads sample `index`, which is below [`len`](Self::len).
    ///
    /// `rng` belongs to this sample in this pass. The numbers drawn from it do not depend on the thread or on the
    /// samples read before, so that a run which is continued draws the same ones. libtorch's own random functions
    /// (`Tensor::rand`) share one state among all threads, and give no such guarantee.
    ///
    /// # Errors
    /// A sample that cannot be read. The error ends the run, unless the loader
    /// [skips errors](super::DataLoader::skip_errors).
    fn get(&self, index: usize, rng: &mut SplitMix64) -> Result<Self::Item>;

    /// Changes each sample with `map` when it is read. Augmentation belongs here.
    ///
    /// ```
    /// use tch_ignite::data::{Dataset, SplitMix64, from_fn};
    /// let numbers = from_fn(3, |index, _| Ok(index as f64));
    /// let noisy = numbers.map(|x, rng| Ok(x + 0.1 * rng.uniform()));
    /// assert!((2.0..2.1).contains(&noisy.get(2, &mut SplitMix64::new(0))?));
    /// # anyhow::Ok(())
    /// ```
    fn map<T, F>(self, map: F) -> Map<Self, F>
    where
        Self: Sized,
        F: Fn(Self::Item, &mut SplitMix64) -> Result<T> + Send + Sync,
    {
        Map { dataset: self, map }
    }
}

/// Makes a [`Dataset`] of `len` samples of a closure.
///
/// ```
/// use tch_ignite::data::{Dataset, SplitMix64, from_fn};
/// let squares = from_fn(10, |index, _| Ok((index * index) as i64));
/// assert_eq!(squares.get(3, &mut SplitMix64::new(0))?, 9);
/// # anyhow::Ok(())
/// ```
pub fn from_fn<T, F>(len: usize, get: F) -> FromFn<F>
where
    F: Fn(usize, &mut SplitMix64) -> Result<T> + Send + Sync,
{
    FromFn { len, get }
}

/// The dataset that [`from_fn`] makes.
#[derive(Debug, Clone)]
pub struct FromFn<F> {
    len: usize,
    get: F,
}

impl<T, F> Dataset for FromFn<F>
where
    F: Fn(usize, &mut SplitMix64) -> Result<T> + Send + Sync,
{
    type Item = T;

    fn len(&self) -> usize {
        self.len
    }

    fn get(&self, index: usize, rng: &mut SplitMix64) -> Result<T> {
        (self.get)(index, rng)
    }
}

/// The dataset that [`Dataset::map`] makes.
#[derive(Debug, Clone)]
pub struct Map<D, F> {
    dataset: D,
    map: F,
}

impl<T, D, F> Dataset for Map<D, F>
where
    D: Dataset,
    F: Fn(D::Item, &mut SplitMix64) -> Result<T> + Send + Sync,
{
    type Item = T;

    fn len(&self) -> usize {
        self.dataset.len()
    }

    fn is_empty(&self) -> bool {
        self.dataset.is_empty()
    }

    fn get(&self, index: usize, rng: &mut SplitMix64) -> Result<T> {
        (self.map)(self.dataset.get(index, rng)?, rng)
    }
}

impl<D: Dataset + ?Sized> Dataset for Arc<D> {
    type Item = D::Item;

    fn len(&self) -> usize {
        (**self).len()
    }

    fn is_empty(&self) -> bool {
        (**self).is_empty()
    }

    fn get(&self, index: usize, rng: &mut SplitMix64) -> Result<D::Item> {
        (**self).get(index, rng)
    }
}

impl<D: Dataset + ?Sized> Dataset for Box<D> {
    type Item = D::Item;

    fn len(&self) -> usize {
        (**self).len()
    }

    fn is_empty(&self) -> bool {
        (**self).is_empty()
    }

    fn get(&self, index: usize, rng: &mut SplitMix64) -> Result<D::Item> {
        (**self).get(index, rng)
    }
}

pub(super) fn out_of_range(index: usize, len: usize) -> anyhow::Error {
    anyhow::anyhow!("index {index} is outside of the {len} samples")
}
