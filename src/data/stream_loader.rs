use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::{Builder, JoinHandle};

use anyhow::{Context, Result as AnyResult};
use serde_json::{Map, Value};
use tch::Device;

use super::fetcher::CollateFn;
use super::{Collate, IntoSource, Source, Transfer};
use crate::bridge::Serial;
use crate::error::{Error, Panicked, Result};
use crate::guard::guarded;

/// Batches of samples that come one after the other, such as lines of files or records of a server, read by worker
/// threads if wanted: PyTorch's `DataLoader` over an `IterableDataset`.
///
/// A function gives each worker an iterator over its share of a pass. Each worker makes batches of its own share; the
/// first batch of a pass is worker 0's, the second worker 1's, and so on, and workers that have no more are passed over.
/// So the order depends on the number of workers, but not on how fast they are. The function makes the order a function
/// of the pass: random numbers are drawn from [`SplitMix64`](super::SplitMix64) of seed and pass, not from libtorch. In a
/// process group it also leaves to each process its part.
///
/// ```
/// use tch::Tensor;
/// use tch_ignite::data::StreamLoader;
/// use tch_ignite::engine::{Engine, Until};
///
/// // Each worker reads all lines and keeps every n-th; one that can open its own files need not.
/// let lines = StreamLoader::new(4, |_pass, worker| {
///     let lines = (0..10).map(|line| Ok(f64::from(line)));
///     Ok(worker.share(lines))
/// })?;
/// let mut engine = Engine::new(|sum: &mut f64, _, batch: Tensor| {
///     *sum += f64::try_from(batch.sum(tch::Kind::Double))?;
///     Ok(())
/// });
/// let mut sum = 0.;
/// engine.run(&mut sum, &lines.num_workers(2), Until::epochs(1))?;
/// assert_eq!(sum, 45.);
/// # Ok::<(), tch_ignite::Error>(())
/// ```
///
/// # Position
/// The length of a pass is not known before its end; [`Until::epoch_length`](crate::engine::Until::epoch_length) sets how
/// long an epoch is. A run that goes on in the middle of a pass reads all samples before it again, without putting them
/// together. It needs the same number of workers, and is warned about another one.
///
/// # Errors and panics
/// An error or a panic of an iterator ends the run at the batch that the sample belongs to. A run that goes on reads this
/// batch again, and fails again where the sample still cannot be read. An iterator that is to go on without such samples
/// leaves them out itself: `lines.filter(Result::is_ok)`.
///
/// # Threads
/// Workers live as long as a pass. The end of a pass or run waits for the samples that are being read. Workers make
/// batches without gradients, and each worker uses one libtorch thread.
pub struct StreamLoader<T, B> {
    make: Arc<MakeFn<T>>,
    collate: Arc<CollateFn<T, B>>,
    batch_size: usize,
    drop_last: bool,
    num_workers: usize,
    prefetch_factor: usize,
    device: Option<(Device, MoveFn<B>)>,
}

/// The largest prefetch factor. A channel allocates the room for all its batches at once.
const MOST_AHEAD: usize = 1 << 16;

type Samples<T> = Box<dyn Iterator<Item = AnyResult<T>>>;
type MakeFn<T> = dyn Fn(u64, WorkerInfo) -> AnyResult<Samples<T>> + Send + Sync;
type MoveFn<B> = fn(B, Device, bool) -> AnyResult<B>;

/// The worker of a [`StreamLoader`] that an iterator is made for, as torch's `get_worker_info` tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WorkerInfo {
    id: usize,
    num_workers: usize,
}

impl WorkerInfo {
    /// Returns the worker's number, from 0.
    pub fn id(&self) -> usize {
        self.id
    }

    /// Returns the number of workers; 1 where a loader has none and the thread of the run reads.
    pub fn num_workers(&self) -> usize {
        self.num_workers
    }

    /// Leaves this worker's share of the samples: the one at place `id`, and then every `num_workers`-th. The others
    /// are read too, and dropped.
    pub fn share<I: IntoIterator>(&self, samples: I) -> impl Iterator<Item = I::Item> + use<I> {
        samples.into_iter().skip(self.id).step_by(self.num_workers)
    }
}

impl<T: 'static, B> StreamLoader<T, B> {
    /// Makes batches of `batch_size` samples, of which each worker's last one may be smaller. `make` gets the number of
    /// the pass (from 0) and the worker, and returns the worker's samples.
    ///
    /// # Errors
    /// A batch size of 0.
    pub fn new<I>(
        batch_size: usize,
        make: impl Fn(u64, WorkerInfo) -> AnyResult<I> + Send + Sync + 'static,
    ) -> Result<Self>
    where
        T: Collate<Batch = B>,
        I: Iterator<Item = AnyResult<T>> + 'static,
    {
        Self::with_collate(batch_size, make, T::collate)
    }

    /// Makes a loader like [`new`](Self::new) whose batches are put together by `collate`. The function gets at least
    /// one sample, in order.
    ///
    /// # Errors
    /// A batch size of 0.
    pub fn with_collate<I>(
        batch_size: usize,
        make: impl Fn(u64, WorkerInfo) -> AnyResult<I> + Send + Sync + 'static,
        collate: impl Fn(Vec<T>) -> AnyResult<B> + Send + Sync + 'static,
    ) -> Result<Self>
    where
        I: Iterator<Item = AnyResult<T>> + 'static,
    {
        if batch_size == 0 {
            return Err(Error::invalid("batch_size must be at least 1, but 0 was given"));
        }
        Ok(Self {
            make: Arc::new(move |pass, worker| Ok(Box::new(make(pass, worker)?) as Samples<T>)),
            collate: Arc::new(collate),
            batch_size,
            drop_last: false,
            num_workers: 0,
            prefetch_factor: 2,
            device: None,
        })
    }

    /// Leaves out the last batch of each worker where it is smaller than the others.
    pub fn drop_last(mut self, on: bool) -> Self {
        self.drop_last = on;
        self
    }

    /// Reads on this many threads, ahead of the use. With 0, the default, each batch is made when the engine asks for
    /// it, from the samples of worker 0 of 1.
    pub fn num_workers(mut self, threads: usize) -> Self {
        self.num_workers = threads;
        self
    }

    /// Sets how many batches each worker may have ready, 2 by default and at most 65536; it makes one more meanwhile.
    pub fn prefetch_factor(mut self, batches: usize) -> Self {
        self.prefetch_factor = batches;
        self
    }

    /// Gives batches on this device. The copy is made when the engine asks for a batch, and waits for the device.
    pub fn to_device(mut self, device: Device) -> Self
    where
        B: Transfer,
    {
        self.device = Some((device, B::transfer));
        self
    }

    /// Begins a worker's walk over its share.
    fn walk(&self, pass: u64, worker: WorkerInfo) -> AnyResult<Walk<T, B>> {
        let samples = guarded(|| (self.make)(pass, worker)).with_context(|| {
            format!("beginning the share of worker {} in pass {pass}", worker.id)
        })?;
        let (collate, batch_size, drop_last) =
            (self.collate.clone(), self.batch_size, self.drop_last);
        Ok(Walk { samples, collate, batch_size, drop_last, worker, pass, read: 0, ended: false })
    }
}

impl<T, B> Clone for StreamLoader<T, B> {
    fn clone(&self) -> Self {
        Self { make: self.make.clone(), collate: self.collate.clone(), ..*self }
    }
}

impl<T, B> fmt::Debug for StreamLoader<T, B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StreamLoader")
            .field("batch_size", &self.batch_size)
            .field("num_workers", &self.num_workers)
            .field("prefetch_factor", &self.prefetch_factor)
            .finish_non_exhaustive()
    }
}

/// A batch with the number of its samples; `None` where it was passed over.
type Made<B> = AnyResult<Option<(B, u64)>>;

/// One worker's walk over its share of a pass.
struct Walk<T, B> {
    samples: Samples<T>,
    collate: Arc<CollateFn<T, B>>,
    batch_size: usize,
    drop_last: bool,
    worker: WorkerInfo,
    pass: u64,
    /// Number of samples read.
    read: u64,
    ended: bool,
}

impl<T, B> Walk<T, B> {
    /// Makes the next batch, or with `skip` passes over it; `None` at the end, or where it was `cancelled` on the way.
    fn next(&mut self, skip: bool, cancelled: &AtomicBool) -> Option<Made<B>> {
        let _no_grad = tch::no_grad_guard();
        let _serial = Serial::begin();
        let (mut samples, mut count) = (Vec::new(), 0);
        while count < self.batch_size && !self.ended {
            if cancelled.load(Ordering::Relaxed) {
                return None;
            }
            match guarded(|| self.samples.next().transpose()) {
                Ok(None) => self.ended = true,
                Ok(Some(sample)) => {
                    (count, self.read) = (count + 1, self.read + 1);
                    if !skip {
                        samples.push(sample);
                    }
                }
                Err(error) => {
                    self.ended = error.downcast_ref::<Panicked>().is_some();
                    let (read, id, pass) = (self.read, self.worker.id, self.pass);
                    self.read += 1;
                    return Some(Err(error.context(format!(
                        "sample {read} of the share of worker {id} in pass {pass}"
                    ))));
                }
            }
        }
        if count == 0 || (self.drop_last && count < self.batch_size) {
            return None;
        }
        if skip {
            return Some(Ok(None));
        }
        let batch = guarded(|| (self.collate)(samples)).with_context(|| {
            format!("collating {count} samples of worker {} in pass {}", self.worker.id, self.pass)
        });
        Some(batch.map(|batch| Some((batch, count as u64))))
    }
}

/// A worker as the consumer sees it.
enum Lane<T, B> {
    Here(Walk<T, B>),
    Thread(Receiver<Made<B>>),
    Ended,
}

struct Cursor<T, B> {
    loader: StreamLoader<T, B>,
    lanes: Vec<Lane<T, B>>,
    threads: Vec<JoinHandle<()>>,
    /// Tells the threads to stop.
    cancelled: Arc<AtomicBool>,
    /// The lane whose batch comes next.
    turn: usize,
    /// Whether a pass has begun.
    begun: bool,
    is_beyond_end: bool,
    last_samples: u64,
}

impl<T: 'static, B: Send + 'static> Cursor<T, B> {
    /// Returns the next batch in turn, or with `skip` perhaps nothing for it.
    fn take(&mut self, skip: bool) -> Option<Made<B>> {
        while self.lanes.iter().any(|lane| !matches!(lane, Lane::Ended)) {
            let turn = self.turn;
            self.turn = (turn + 1) % self.lanes.len();
            let made = match &mut self.lanes[turn] {
                Lane::Here(walk) => walk.next(skip, &self.cancelled),
                Lane::Thread(made) => made.recv().ok(),
                Lane::Ended => continue,
            };
            match made {
                Some(made) => return Some(made),
                None => self.lanes[turn] = Lane::Ended,
            }
        }
        None
    }

    /// Starts the thread of a worker, which passes over the batches that come before batch `first` of the pass.
    fn spawn(&mut self, pass: u64, worker: WorkerInfo, first: u64) -> AnyResult<Lane<T, B>> {
        let (sender, receiver) = sync_channel(self.loader.prefetch_factor);
        let (loader, cancelled) = (self.loader.clone(), self.cancelled.clone());
        let serve = move || {
            let served = guarded(|| serve(&loader, pass, worker, first, &sender, &cancelled));
            if let Err(error) = served {
                let _ = sender.send(Err(error));
            }
        };
        let thread = Builder::new()
            .name(format!("stream worker {}", worker.id))
            .spawn(serve)
            .with_context(|| format!("starting worker thread {}", worker.id + 1))?;
        self.threads.push(thread);
        Ok(Lane::Thread(receiver))
    }
}

impl<T, B> Cursor<T, B> {
    /// Ends the threads, and waits for the samples that are being read.
    fn stop(&mut self) {
        self.cancelled.store(true, Ordering::Relaxed);
        // A thread that waits for room ends when its lane is gone.
        self.lanes.clear();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
        self.cancelled = Arc::default();
    }
}

impl<T, B> Drop for Cursor<T, B> {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Makes the batches of a worker's share, until the consumer is gone.
fn serve<T: 'static, B>(
    loader: &StreamLoader<T, B>,
    pass: u64,
    worker: WorkerInfo,
    first: u64,
    sender: &SyncSender<Made<B>>,
    cancelled: &AtomicBool,
) -> AnyResult<()> {
    let mut walk = loader.walk(pass, worker)?;
    // Batch `number` of a worker is at most at this place of the pass, and earlier where other shares have ended.
    let mut latest_place = worker.id as u64;
    while let Some(made) = walk.next(latest_place < first, cancelled) {
        if sender.send(made).is_err() {
            break;
        }
        latest_place = latest_place.saturating_add(worker.num_workers as u64);
    }
    Ok(())
}

impl<T: 'static, B: Send + 'static> Source<B> for Cursor<T, B> {
    fn validate(&self) -> AnyResult<()> {
        anyhow::ensure!(
            (1..=MOST_AHEAD).contains(&self.loader.prefetch_factor) || self.loader.num_workers == 0,
            "prefetch_factor must be at least 1 and at most {MOST_AHEAD} with workers, but {} was given",
            self.loader.prefetch_factor
        );
        Ok(())
    }

    fn batches(&self) -> Option<u64> {
        None
    }

    fn seek(&mut self, pass: u64, batch: u64) -> AnyResult<()> {
        self.validate()?;
        self.stop();
        (self.turn, self.begun, self.is_beyond_end) = (0, true, false);
        let num_workers = self.loader.num_workers.max(1);
        for id in 0..num_workers {
            let worker = WorkerInfo { id, num_workers };
            let lane = match self.loader.num_workers {
                0 => Lane::Here(self.loader.walk(pass, worker)?),
                _ => self.spawn(pass, worker, batch)?,
            };
            self.lanes.push(lane);
        }
        for _ in 0..batch {
            match self.take(true) {
                Some(Ok(_)) => {}
                Some(Err(error)) => {
                    self.stop();
                    return Err(error.context("passing over the batches before the position"));
                }
                None => {
                    self.is_beyond_end = true;
                    break;
                }
            }
        }
        Ok(())
    }

    fn may_be_beyond_end(&self) -> bool {
        self.is_beyond_end
    }

    fn next(&mut self) -> Option<AnyResult<B>> {
        if !self.begun
            && let Err(error) = self.seek(0, 0)
        {
            return Some(Err(error));
        }
        let made = match self.take(false)? {
            Ok(made) => made.context("the workers passed over a batch that was not used"),
            Err(error) => Err(error),
        };
        let moved = made.and_then(|(batch, samples)| {
            self.last_samples = samples;
            match self.loader.device {
                Some((device, transfer)) => transfer(batch, device, false)
                    .with_context(|| format!("moving a batch to {device:?}")),
                None => Ok(batch),
            }
        });
        Some(moved)
    }

    fn samples(&self) -> Option<u64> {
        Some(self.last_samples)
    }

    fn is_random(&self) -> bool {
        false
    }

    fn settings(&self) -> Map<String, Value> {
        Map::from_iter([
            ("batch_size".to_owned(), self.loader.batch_size.into()),
            ("drop_last".to_owned(), self.loader.drop_last.into()),
            ("num_workers".to_owned(), self.loader.num_workers.max(1).into()),
        ])
    }
}

impl<'a, T: 'static, B: Send + 'static> IntoSource<'a, B> for &StreamLoader<T, B> {
    fn into_source(self) -> Box<dyn Source<B> + 'a> {
        self.clone().into_source()
    }
}

impl<'a, T: 'static, B: Send + 'static> IntoSource<'a, B> for StreamLoader<T, B> {
    fn into_source(self) -> Box<dyn Source<B> + 'a> {
        Box::new(Cursor {
            loader: self,
            lanes: vec![],
            threads: vec![],
            cancelled: Arc::default(),
            turn: 0,
            begun: false,
            is_beyond_end: false,
            last_samples: 0,
        })
    }
}
