use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};

use anyhow::{Context, Result};

use super::BatchSize;
use super::fetcher::Plan;
use crate::guard::guarded;

/// The batches of a plan, from sample `first` on.
pub(super) struct Work {
    pub(super) plan: Arc<Plan>,
    pub(super) first: u64,
    pub(super) batch_size: u64,
    pub(super) bounds: BatchSize,
}

impl Work {
    /// The positions of its batch `number`.
    fn batch(&self, number: u64) -> Option<Range<usize>> {
        let first = self.first.saturating_add(number.saturating_mul(self.batch_size));
        let len = self.bounds.batch_at(first, self.batch_size);
        (len > 0).then(|| first as usize..(first + len) as usize)
    }
}

/// Makes the batch of these positions; `None` where it was cancelled on the way.
type Make<T> = dyn Fn(&Plan, Range<usize>, &dyn Fn() -> bool) -> Result<Option<T>> + Send + Sync;

/// Threads that make batches ahead of their use, and hand them out in order.
///
/// Batches are numbered; a thread takes the next number while there is room, so that at most `ahead`
/// are made or ready. What belongs to work that was given up is thrown away.
pub(super) struct Workers<T> {
    shared: Arc<Shared<T>>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared<T> {
    queue: Mutex<Queue<T>>,
    /// There is room for another batch, or other work, or nothing more to do.
    room: Condvar,
    /// A batch is ready.
    ready: Condvar,
    /// Counts the works begun: threads look at it between samples.
    generation: AtomicU64,
    ahead: usize,
}

struct Queue<T> {
    work: Option<Arc<Work>>,
    /// Number of the batch to be handed out next; `made` begins with it.
    next: u64,
    /// Those begun; `None` until ready.
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
    /// So many threads, which have at most `ahead` batches begun or ready.
    pub(super) fn spawn(count: usize, ahead: usize, make: Arc<Make<T>>) -> Result<Self> {
        let queue = Queue { work: None, next: 0, made: VecDeque::new(), closed: false };
        let shared = Arc::new(Shared {
            queue: Mutex::new(queue),
            room: Condvar::new(),
            ready: Condvar::new(),
            generation: AtomicU64::new(0),
            ahead,
        });
        // Threads that could be started end when this is dropped on error.
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
    /// Gives up what is under way, and begins this.
    pub(super) fn begin(&self, work: Option<Work>) {
        let mut queue = self.shared.lock();
        self.shared.generation.fetch_add(1, Ordering::Relaxed);
        queue.work = work.map(Arc::new);
        queue.next = 0;
        let old = std::mem::take(&mut queue.made);
        drop(queue);
        self.shared.room.notify_all();
        // The user's batches, which are not dropped under the lock.
        drop(old);
    }

    /// The next batch, waiting for it; `None` where there is no further one.
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
    /// Waits for the samples being read.
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.begin(None);
        for thread in self.threads.drain(..) {
            // It ends without a panic: all code that is not ours is guarded.
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
            // The user's types, whose drop may panic.
            if let Some(unwanted) = made.transpose().and_then(|made| self.finish(&job, made)) {
                let _ = guarded(|| {
                    drop(unwanted);
                    Ok(())
                });
            }
        }
    }

    /// The next batch to make, once there is room; `None` at the end.
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

    /// Puts it into its place, or gives it back where nobody wants it any more.
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
