use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};

use anyhow::{Context, Result};

use super::BatchSize;
use super::fetcher::Plan;
use crate::guard::guarded;

/// The batches of a pass, from sample `first` on.
pub(super) struct Work {
    pub(super) plan: Arc<Plan>,
    pub(super) first: u64,
    pub(super) batch_size: u64,
    pub(super) bounds: BatchSize,
}

impl Work {
    /// Returns the positions of batch `number` of this work; `None` past the end.
    fn batch(&self, number: u64) -> Option<Range<usize>> {
        self.plan.batch_after(self.first, number, self.batch_size, &self.bounds)
    }
}

/// Makes the batch of these positions; `None` where it was cancelled on the way.
type Make<T> = dyn Fn(&Plan, Range<usize>, &dyn Fn() -> bool) -> Result<Option<T>> + Send + Sync;

/// Threads that make batches ahead of their use, and hand them out in order.
///
/// Batches are numbered. A thread takes the next number while there is room, so that at most `ahead` batches are
/// being made or ready. Batches of work that was given up are thrown away.
pub(super) struct Workers<T> {
    shared: Arc<Shared<T>>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared<T> {
    queue: Mutex<Queue<T>>,
    /// Signals that there is room for another batch, that the work has changed, or that the queue is closed.
    room: Condvar,
    /// Signals that the batch that comes next is ready.
    ready: Condvar,
    /// Number of works begun. A thread compares it between samples, and drops a batch of older work.
    generation: AtomicU64,
    ahead: usize,
}

struct Queue<T> {
    work: Option<Arc<Work>>,
    /// Number of the batch to be handed out next, which is the first in `made`.
    next: u64,
    /// The batches begun, in order; `None` until one is ready.
    made: VecDeque<Option<Result<T>>>,
    closed: bool,
}

struct Job {
    work: Arc<Work>,
    generation: u64,
    number: u64,
    positions: Range<usize>,
}

impl<T: Send + 'static> Workers<T> {
    /// Starts `count` threads, which have at most `ahead` batches begun or ready.
    pub(super) fn spawn(count: usize, ahead: usize, make: Arc<Make<T>>) -> Result<Self> {
        let queue = Queue { work: None, next: 0, made: VecDeque::new(), closed: false };
        let shared = Arc::new(Shared {
            queue: Mutex::new(queue),
            room: Condvar::new(),
            ready: Condvar::new(),
            generation: AtomicU64::new(0),
            ahead,
        });
        // On error this value is dropped, which ends the threads that were started.
        let mut workers = Self { shared, threads: Vec::new() };
        for number in 0..count {
            let (shared, make) = (workers.shared.clone(), make.clone());
            let thread = Builder::new()
                .name(format!("data worker {number}"))
                .spawn(move || shared.serve(&*make))
                .with_context(|| format!("starting worker thread {} of {count}", number + 1))?;
            workers.threads.push(thread);
        }
        Ok(workers)
    }
}

impl<T> Workers<T> {
    /// Gives up the batches under way, and begins `work`.
    pub(super) fn begin(&self, work: Option<Work>) {
        let mut queue = self.shared.lock();
        self.shared.generation.fetch_add(1, Ordering::Relaxed);
        queue.work = work.map(Arc::new);
        queue.next = 0;
        let old = std::mem::take(&mut queue.made);
        drop(queue);
        self.shared.room.notify_all();
        // The user's batches are dropped after the lock is released, because their `drop` may be slow or panic.
        drop(old);
    }

    /// Waits for the next batch and returns it; `None` where the work has no further batch.
    pub(super) fn next(&self) -> Option<Result<T>> {
        let mut queue = self.shared.lock();
        loop {
            if let Some(made) = queue.made.front_mut().and_then(Option::take) {
                queue.made.pop_front();
                queue.next += 1;
                drop(queue);
                self.shared.room.notify_one();
                return Some(made);
            }
            queue.work.as_ref()?.batch(queue.next)?;
            queue = self.shared.ready.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl<T> Drop for Workers<T> {
    /// Waits for the samples that are being read.
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.begin(None);
        for thread in self.threads.drain(..) {
            // The thread ends without a panic, because all code of the user's is guarded.
            let _ = thread.join();
        }
    }
}

impl<T> Shared<T> {
    fn lock(&self) -> MutexGuard<'_, Queue<T>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn serve(&self, make: &Make<T>) {
        while let Some(job) = self.take() {
            let cancelled = || self.generation.load(Ordering::Relaxed) != job.generation;
            let made = guarded(|| make(&job.work.plan, job.positions.clone(), &cancelled));
            // The user's types may panic when they are dropped.
            if let Some(unwanted) = made.transpose().and_then(|made| self.finish(&job, made)) {
                let _ = guarded(|| {
                    drop(unwanted);
                    Ok(())
                });
            }
        }
    }

    /// Waits for room and takes the next batch to make; `None` when the queue is closed.
    fn take(&self) -> Option<Job> {
        let mut queue = self.lock();
        loop {
            if queue.closed {
                return None;
            }
            let number = queue.next + queue.made.len() as u64;
            if queue.made.len() < self.ahead
                && let Some(work) = &queue.work
                && let Some(positions) = work.batch(number)
            {
                let (work, generation) = (work.clone(), self.generation.load(Ordering::Relaxed));
                queue.made.push_back(None);
                return Some(Job { work, generation, number, positions });
            }
            queue = self.room.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Puts a batch into its place in the queue, or returns it where the work has been given up.
    fn finish(&self, job: &Job, made: Result<T>) -> Option<Result<T>> {
        let mut queue = self.lock();
        if self.generation.load(Ordering::Relaxed) != job.generation {
            return Some(made);
        }
        let place = (job.number - queue.next) as usize;
        let Some(slot) = queue.made.get_mut(place) else {
            return Some(made);
        };
        *slot = Some(made);
        if place == 0 {
            self.ready.notify_one();
        }
        None
    }
}
