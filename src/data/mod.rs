//! Where batches come from.
//!
//! [`Engine::run`](crate::engine::Engine::run) takes one of these:
//!
//! | for | take |
//! |---|---|
//! | tensors in memory; images as bytes, normalised on the fly | [`Loader`]: whole batches at a time, by far the fastest |
//! | samples read from files, computed, augmented one by one; batches of your own type | [`DataLoader`] over a [`Dataset`], with worker threads |
//! | few batches that are there already | a vector or slice of them |
//! | iterators, streams, no data, anything of your own | [`restartable`], [`one_shot`], [`no_data`], [`source`] |
//!
//! Both loaders take a [`Sampler`]. Their orders, and the random numbers of augmentation, are arithmetic
//! on seed, pass and index, so that a run that is continued anywhere sees what it would have seen.

mod batch_size;
mod collate;
mod concat_dataset;
mod data_loader;
mod dataset;
mod distributed_sampler;
mod fetcher;
mod loader;
mod normalize;
mod order;
mod sampler;
mod subset;
mod tensor_dataset;
mod transfer;
mod weighted_random_sampler;
mod workers;

use anyhow::Result;
use serde::{Deserialize, Serialize};
use tch::Tensor;

pub use batch_size::BatchSize;
pub use collate::Collate;
pub use concat_dataset::ConcatDataset;
pub use data_loader::DataLoader;
pub use dataset::{Dataset, FromFn, Map, from_fn};
pub use distributed_sampler::DistributedSampler;
pub use loader::{Batch, Loader};
pub use order::{SplitMix64, permutation};
pub use sampler::{RandomSampler, Sampler, SequentialSampler, SubsetRandomSampler};
pub use subset::{Subset, random_split};
pub use tensor_dataset::TensorDataset;
pub use transfer::Transfer;
pub use weighted_random_sampler::WeightedRandomSampler;

/// A cursor over batches. One walk over the data is a pass; the engine starts the next one when a
/// pass is exhausted.
pub trait Source<B> {
    /// What is wrong with it, if anything; asked when a run begins.
    fn validate(&self) -> Result<()> {
        Ok(())
    }

    /// Batches in a pass, where that is known.
    fn batches(&self) -> Option<u64>;

    /// Goes to batch `batch` of pass `pass`, both from 0. The order of a pass is a function of its
    /// number, so that a run can be continued anywhere.
    fn seek(&mut self, pass: u64, batch: u64) -> Result<()>;

    /// The next batch of this pass; `None` when it is exhausted.
    fn next(&mut self) -> Option<Result<B>>;

    /// Samples in the batch that [`next`](Self::next) gave last, where that is known.
    fn samples(&self) -> Option<u64> {
        None
    }

    /// Batches from the next one to the end of the pass, where that is known. Where it is not, the engine
    /// takes [`batches`](Self::batches) without those that were fetched.
    fn batches_left(&self) -> Option<u64> {
        None
    }

    /// Whether [`seek`](Self::seek) may draw the order of a pass from libtorch's default random number
    /// generators, as `tch::data::Iter2::shuffle` does. The engine then keeps the state of the generators
    /// from before each pass, and in checkpoints, so that a run which goes on in the middle of a pass has
    /// the rest of the same pass. That costs a copy of 5 KB for each pass; answer false where `seek`
    /// draws nothing.
    fn is_random(&self) -> bool {
        true
    }

    /// Where the batch that comes next begins, or with `again` the one that [`next`](Self::next) gave
    /// last; `None` where that is only counted in batches.
    fn sample_position(&self, again: bool) -> Option<SamplePosition> {
        let _ = again;
        None
    }

    /// Goes to where [`sample_position`](Self::sample_position) was in pass `pass`, also in another process and with
    /// another batch size; false where it cannot, and [`seek`](Self::seek) is to be used.
    fn seek_samples(&mut self, pass: u64, place: &SamplePosition) -> Result<bool> {
        let _ = (pass, place);
        Ok(false)
    }

    /// What the program chose, as far as a change of it should be told when a run is resumed.
    fn settings(&self) -> serde_json::Map<String, serde_json::Value> {
        serde_json::Map::new()
    }

    /// Whether batches are fetched at all: false for [`no_data`], where the engine fires no
    /// `GET_BATCH` events.
    fn fetches(&self) -> bool {
        true
    }
}

/// A place in a pass that does not depend on the batch size.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SamplePosition {
    /// Samples of the pass before it.
    pub samples: u64,
    /// The batch size, where it is not the one that the source was made with.
    pub batch_size: Option<u64>,
}

/// What can be given to [`Engine::run`](crate::engine::Engine::run).
pub trait IntoSource<'a, B> {
    /// The cursor over it.
    fn into_source(self) -> Box<dyn Source<B> + 'a>;
}

/// A [`Source`] of your own, as something to run on.
pub fn source<'a, B, S: Source<B> + 'a>(source: S) -> Custom<'a, B> {
    Custom(Box::new(source))
}

/// Data made anew for each pass: `make` returns an iterator. The engine finds its length when the
/// first pass is exhausted.
///
/// A run that goes on in the middle of a pass calls `make` again and passes over what was used. An order
/// that `make` draws from libtorch's random numbers, as `m.train_iter(64).shuffle()` of tch does, is
/// then the same again: the state of the generators from before the pass is in the checkpoint. An order
/// from elsewhere (another crate's generator, a set of files that changes) has to be made a function of
/// the pass by `make` itself.
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
    source(Restartable { make, current: None })
}

/// Data that can be walked once, such as a stream; it may be infinite, with
/// [`Until::epoch_length`](crate::engine::Until::epoch_length). A run that is resumed in another process
/// expects the same items from the first one on, and passes over those that were used.
pub fn one_shot<'a, I>(batches: I) -> Custom<'a, I::Item>
where
    I: IntoIterator,
    I::IntoIter: 'a,
{
    source(OneShot(batches.into_iter()))
}

/// No data: the step gets a default batch, and
/// [`Until::epoch_length`](crate::engine::Until::epoch_length) says how long an epoch is.
pub fn no_data<'a, B: Default + 'a>() -> Custom<'a, B> {
    source(NoData)
}

/// See [`source`].
pub struct Custom<'a, B>(Box<dyn Source<B> + 'a>);

impl<'a, B> IntoSource<'a, B> for Custom<'a, B> {
    fn into_source(self) -> Box<dyn Source<B> + 'a> {
        self.0
    }
}

struct Indexed<D> {
    data: D,
    next: usize,
}

impl<B: Clone, D: AsRef<[B]>> Source<B> for Indexed<D> {
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
        let batch = self.data.as_ref().get(self.next)?.clone();
        self.next += 1;
        Some(Ok(batch))
    }
}

impl<'a, B: Clone + 'a> IntoSource<'a, B> for Vec<B> {
    fn into_source(self) -> Box<dyn Source<B> + 'a> {
        Box::new(Indexed { data: self, next: 0 })
    }
}

impl<'a, B: Clone> IntoSource<'a, B> for &'a [B] {
    fn into_source(self) -> Box<dyn Source<B> + 'a> {
        Box::new(Indexed { data: self, next: 0 })
    }
}

impl<'a, B: Clone> IntoSource<'a, B> for &'a Vec<B> {
    fn into_source(self) -> Box<dyn Source<B> + 'a> {
        self.as_slice().into_source()
    }
}

struct Restartable<F, I> {
    make: F,
    current: Option<I>,
}

impl<I: Iterator, F: FnMut() -> I> Source<I::Item> for Restartable<F, I> {
    fn batches(&self) -> Option<u64> {
        None
    }

    fn seek(&mut self, _pass: u64, batch: u64) -> Result<()> {
        let mut iterator = (self.make)();
        skip(&mut iterator, batch);
        self.current = Some(iterator);
        Ok(())
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

/// The number of samples in both.
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

fn skip(iterator: &mut impl Iterator, batches: u64) {
    for _ in 0..batches {
        if iterator.next().is_none() {
            break;
        }
    }
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
