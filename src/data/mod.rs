//! Sources of batches.
//!
//! [`Engine::run`](crate::engine::Engine::run) takes one of these:
//!
//! | for | take |
//! |---|---|
//! | tensors in memory; images as bytes, normalised on the fly | [`Loader`]: whole batches at a time, by far the fastest |
//! | samples read from files, computed, augmented one by one; batches of your own type | [`DataLoader`] over a [`Dataset`], with worker threads |
//! | pictures in folders | [`DataLoader`] over an [`ImageFolder`], with [`transforms`] |
//! | samples that come one after the other, read by worker threads | [`StreamLoader`] |
//! | few batches that exist already | a vector or slice of them, also of tensors |
//! | iterators, streams, no data, anything of your own | [`restartable`], [`one_shot`], [`no_data`], [`source`] |
//!
//! [`Loader`] and [`DataLoader`] take a [`Sampler`]. They compute orders, and the random numbers of augmentation, from seed, pass and
//! index alone, so that a run that is continued anywhere sees the batches it would have seen.

mod batch_sampler;
mod batch_size;
mod bucket_batch_sampler;
mod collate;
mod concat_dataset;
mod data_loader;
mod dataset;
mod distributed_batch_sampler;
mod distributed_sampler;
mod fetcher;
mod finish;
mod image_folder;
mod k_fold;
mod loader;
mod map_batches;
mod normalize;
mod order;
mod padded;
mod random_split;
mod sampler;
mod shallow_clone;
mod stratified_k_fold;
mod stream_loader;
mod subset;
mod tensor_dataset;
mod transfer;
pub mod transforms;
mod weighted_random_sampler;
mod workers;

use anyhow::Result;
use serde::{Deserialize, Serialize};
use tch::Tensor;

pub use batch_sampler::BatchSampler;
pub use batch_size::BatchSize;
pub use bucket_batch_sampler::BucketBatchSampler;
pub use collate::Collate;
pub use concat_dataset::ConcatDataset;
pub use data_loader::DataLoader;
pub use dataset::{Dataset, FromFn, Map, from_fn};
pub use distributed_batch_sampler::DistributedBatchSampler;
pub use distributed_sampler::DistributedSampler;
pub use image_folder::ImageFolder;
pub use k_fold::{Folds, KFold};
pub use loader::{Batch, Loader};
pub use order::{SplitMix64, permutation};
pub use padded::Padded;
pub use random_split::{SplitLength, random_split};
pub use sampler::{RandomSampler, Sampler, SequentialSampler, SubsetRandomSampler};
pub use shallow_clone::ShallowClone;
pub use stratified_k_fold::StratifiedKFold;
pub use stream_loader::{StreamLoader, WorkerInfo};
pub use subset::Subset;
pub use tensor_dataset::TensorDataset;
pub use transfer::Transfer;
pub use weighted_random_sampler::WeightedRandomSampler;

/// A cursor over batches. One walk over the data is a pass; the engine starts the next pass when one is exhausted.
pub trait Source<B> {
    /// Checks the source's arguments; the engine calls this when a run begins.
    ///
    /// # Errors
    /// Wrong arguments; the error names the first.
    fn validate(&self) -> Result<()> {
        Ok(())
    }

    /// Returns the number of batches in a pass, where it is known.
    fn batches(&self) -> Option<u64>;

    /// Goes to batch `batch` of pass `pass`, both counted from 0. The order of a pass must depend on its number
    /// alone, so that a run can be continued anywhere.
    ///
    /// # Errors
    /// A position that the source cannot reach.
    fn seek(&mut self, pass: u64, batch: u64) -> Result<()>;

    /// Returns the next batch of this pass; `None` when the pass is exhausted.
    ///
    /// # Errors
    /// A batch that cannot be read or made. The error ends the run.
    fn next(&mut self) -> Option<Result<B>>;

    /// Returns the number of samples in the batch that [`next`](Self::next) gave last, where it is known.
    fn samples(&self) -> Option<u64> {
        None
    }

    /// Returns the number of batches from the next one to the end of the pass, where it is known. Where it is not,
    /// the engine subtracts the batches it has fetched from [`batches`](Self::batches).
    fn batches_left(&self) -> Option<u64> {
        None
    }

    /// Returns whether [`seek`](Self::seek) may draw the order of a pass from libtorch's default random number
    /// generators, as `tch::data::Iter2::shuffle` does. The engine then keeps the generators' state from before
    /// each pass, in checkpoints too, so that a run which goes on in the middle of a pass gets the rest of the same
    /// pass. That costs a copy of 5 KB for each pass; return false where `seek` draws nothing.
    fn is_random(&self) -> bool {
        true
    }

    /// Whether the last [`seek`](Self::seek) may have gone beyond the end of the pass. Data of unknown length is asked
    /// this after a run went on in the middle of a pass: false says that the pass has at least the batches that were
    /// passed over, so that its end tells its length.
    fn may_be_beyond_end(&self) -> bool {
        true
    }

    /// Returns where the next batch begins, or with `again` where the batch that [`next`](Self::next) gave last
    /// begins; `None` where the source counts batches only.
    fn sample_position(&self, again: bool) -> Option<SamplePosition> {
        let _ = again;
        None
    }

    /// Goes to a position in pass `pass` that [`sample_position`](Self::sample_position) gave, perhaps in another
    /// process and with another batch size. Returns false where the source cannot; the engine then calls
    /// [`seek`](Self::seek).
    ///
    /// # Errors
    /// A position that the source cannot reach.
    fn seek_samples(&mut self, pass: u64, place: &SamplePosition) -> Result<bool> {
        let _ = (pass, place);
        Ok(false)
    }

    /// Returns the settings that a checkpoint keeps, so that a resumed run can warn about those that have changed.
    fn settings(&self) -> serde_json::Map<String, serde_json::Value> {
        serde_json::Map::new()
    }

    /// Returns whether batches are fetched at all: false for [`no_data`], where the engine fires no `GET_BATCH`
    /// events.
    fn fetches(&self) -> bool {
        true
    }
}

/// A position in a pass that does not depend on the batch size.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SamplePosition {
    /// Number of samples of the pass before this position.
    pub samples: u64,
    /// The batch size at this position; `None` where it is the one that the source was made with.
    pub batch_size: Option<u64>,
}

/// Types that can be given to [`Engine::run`](crate::engine::Engine::run).
#[diagnostic::on_unimplemented(
    message = "`{Self}` is no data of batches `{B}`",
    note = "data is a `&Loader`, a `&DataLoader`, a `&StreamLoader`, a `Vec` of batches (tensors, and tuples of them, are shared), `source(..)` for a `Source` of your own, `restartable(|| iterator)` for anything that can be iterated again",
    note = "a `Supervised` context takes batches of another type after `prepare_batch(|batch| (x, y))`, in the engines `cx.trainer()` and `cx.evaluator()`"
)]
pub trait IntoSource<'a, B> {
    /// Makes the cursor over the batches.
    fn into_source(self) -> Box<dyn Source<B> + 'a>;
}

/// Makes a [`Source`] of your own into data to run on.
pub fn source<'a, B, S: Source<B> + 'a>(source: S) -> Custom<'a, B> {
    Custom(Box::new(source))
}

/// Data made anew for each pass: `make` returns an iterator. The engine learns the length when the first pass is
/// exhausted.
///
/// A run that goes on in the middle of a pass calls `make` again and skips the batches that were used. The engine
/// restores libtorch's random numbers from before the pass first, so that an order drawn from them, as by
/// `m.train_iter(64).shuffle()` of tch, is the same again. Where the order comes from elsewhere (another crate's
/// generator, a set of files that changes), `make` itself has to make it a function of the pass.
///
/// ```
/// # use tch_ignite::engine::{Engine, Until};
/// use tch_ignite::data::restartable;
/// let mut engine = Engine::new(|sum: &mut i64, _, x: i64| { *sum += x; Ok(()) });
/// let mut sum = 0;
/// engine.run(&mut sum, restartable(|| 1..=3), Until::epochs(2))?;
/// assert_eq!(sum, 12);
/// # Ok::<(), tch_ignite::Error>(())
/// ```
pub fn restartable<'a, I: Iterator + 'a>(make: impl FnMut() -> I + 'a) -> Custom<'a, I::Item> {
    source(Restartable { make, current: None, is_beyond_end: false })
}

/// Data that can be walked once, such as a stream. It may be infinite, with
/// [`Until::epoch_length`](crate::engine::Until::epoch_length). A run that is resumed in another process must be
/// given the same items from the first one on; the engine skips those that were used.
pub fn one_shot<'a, I>(batches: I) -> Custom<'a, I::Item>
where
    I: IntoIterator,
    I::IntoIter: 'a,
{
    source(OneShot(batches.into_iter()))
}

/// No data: the step gets a default batch, and [`Until::epoch_length`](crate::engine::Until::epoch_length) sets how
/// long an epoch is.
pub fn no_data<'a, B: Default + 'a>() -> Custom<'a, B> {
    source(NoData)
}

/// Data made by [`source`], [`restartable`], [`one_shot`] or [`no_data`].
pub struct Custom<'a, B>(Box<dyn Source<B> + 'a>);

crate::debug::opaque_debug!(Custom<'a, B>);

impl<'a, B> IntoSource<'a, B> for Custom<'a, B> {
    fn into_source(self) -> Box<dyn Source<B> + 'a> {
        self.0
    }
}

struct Indexed<D> {
    data: D,
    next: usize,
}

impl<B: ShallowClone, D: AsRef<[B]>> Source<B> for Indexed<D> {
    fn batches(&self) -> Option<u64> {
        Some(self.data.as_ref().len() as u64)
    }

    fn seek(&mut self, _pass: u64, batch: u64) -> Result<()> {
        self.next = usize::try_from(batch)?;
        Ok(())
    }

    fn is_random(&self) -> bool {
        false
    }

    fn next(&mut self) -> Option<Result<B>> {
        let batch = self.data.as_ref().get(self.next)?.shallow_clone();
        self.next += 1;
        Some(Ok(batch))
    }
}

#[diagnostic::do_not_recommend]
impl<'a, B: ShallowClone + 'a> IntoSource<'a, B> for Vec<B> {
    fn into_source(self) -> Box<dyn Source<B> + 'a> {
        Box::new(Indexed { data: self, next: 0 })
    }
}

impl<'a, B: ShallowClone> IntoSource<'a, B> for &'a [B] {
    fn into_source(self) -> Box<dyn Source<B> + 'a> {
        Box::new(Indexed { data: self, next: 0 })
    }
}

impl<'a, B: ShallowClone> IntoSource<'a, B> for &'a Vec<B> {
    fn into_source(self) -> Box<dyn Source<B> + 'a> {
        self.as_slice().into_source()
    }
}

struct Restartable<F, I> {
    make: F,
    current: Option<I>,
    /// The last pass was shorter than the position that `seek` was to go to.
    is_beyond_end: bool,
}

impl<I: Iterator, F: FnMut() -> I> Source<I::Item> for Restartable<F, I> {
    fn batches(&self) -> Option<u64> {
        None
    }

    fn seek(&mut self, _pass: u64, batch: u64) -> Result<()> {
        let mut iterator = (self.make)();
        self.is_beyond_end = !skip(&mut iterator, batch);
        self.current = Some(iterator);
        Ok(())
    }

    fn may_be_beyond_end(&self) -> bool {
        self.is_beyond_end
    }

    fn next(&mut self) -> Option<Result<I::Item>> {
        self.current.as_mut()?.next().map(Ok)
    }
}

struct OneShot<I>(I);

impl<I: Iterator> Source<I::Item> for OneShot<I> {
    fn batches(&self) -> Option<u64> {
        None
    }

    fn seek(&mut self, _pass: u64, batch: u64) -> Result<()> {
        skip(&mut self.0, batch);
        Ok(())
    }

    fn is_random(&self) -> bool {
        false
    }

    fn next(&mut self) -> Option<Result<I::Item>> {
        self.0.next().map(Ok)
    }
}

/// Returns the number of samples, along the first dimension of both tensors.
fn common_len(inputs: &Tensor, targets: &Tensor) -> crate::error::Result<usize> {
    let (x, y) = (inputs.size(), targets.size());
    let (Some(&samples), Some(&labels)) = (x.first(), y.first()) else {
        return Err(crate::error::Error::invalid(format!(
            "inputs and targets need a first dimension, the samples; their shapes are {x:?} and {y:?}"
        )));
    };
    if samples != labels {
        return Err(crate::error::Error::invalid(format!(
            "there are {samples} inputs but {labels} targets (shapes {x:?} and {y:?})"
        )));
    }
    Ok(samples as usize)
}

/// Passes over batches. Returns false where there are fewer.
fn skip(iterator: &mut impl Iterator, batches: u64) -> bool {
    (0..batches).all(|_| iterator.next().is_some())
}

struct NoData;

impl<B: Default> Source<B> for NoData {
    fn batches(&self) -> Option<u64> {
        None
    }

    fn seek(&mut self, _pass: u64, _batch: u64) -> Result<()> {
        Ok(())
    }

    fn is_random(&self) -> bool {
        false
    }

    fn next(&mut self) -> Option<Result<B>> {
        Some(Ok(B::default()))
    }

    fn fetches(&self) -> bool {
        false
    }
}
