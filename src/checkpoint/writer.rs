//! Writing, in the training's thread or in one of its own.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use super::folder::{Folder, Owner};
use super::format::Stamp;
use super::{StateDict, format};
use crate::error::{Error, Result};
use crate::fs::write_atomically;

/// What is to be done to a folder, in this order: the new file is safe before an old one goes.
pub(super) struct Job {
    pub(super) folder: Arc<Folder>,
    pub(super) state: StateDict,
    /// Only the tensors, for other programs; `latest` does not name it.
    pub(super) plain: bool,
    pub(super) name: String,
    pub(super) stamp: Stamp,
    pub(super) remove: Vec<String>,
    /// Only what carries its stamp is removed.
    pub(super) owner: Owner,
}

impl Job {
    /// The new file is safe before `latest` and the old files are seen to; of those all are tried.
    fn run(self) -> Result<()> {
        self.folder.check()?;
        write(&self.folder.file(&self.name), &self.state, self.plain, &self.stamp)?;
        let mut tidied = match self.plain {
            true => Ok(()),
            false => self.folder.set_latest(&self.name, self.stamp.written),
        };
        for name in self.remove.iter().filter(|name| **name != self.name) {
            tidied = both(tidied, self.folder.remove(name, &self.owner));
        }
        tidied
    }
}

/// Joins two results: the first error tells of the second too.
pub(super) fn both(first: Result<()>, second: Result<()>) -> Result<()> {
    match (first, second) {
        (Err(first), Err(second)) => Err(first.besides(second)),
        (first, second) => first.and(second),
    }
}

pub(super) fn write(path: &Path, state: &StateDict, plain: bool, stamp: &Stamp) -> Result<()> {
    write_atomically(path, |file| match plain {
        false => format::write(file, state, stamp),
        true => format::write_plain(file, state, stamp),
    })
}

/// Does one job at a time, in the background if asked to: with at most one copy of the state, and with
/// errors that come out of the next job or the final wait.
#[derive(Debug, Default)]
pub(super) struct Writer {
    running: Option<JoinHandle<Result<()>>>,
}

impl Writer {
    pub(super) fn submit(&mut self, mut job: Job, background: bool) -> Result<()> {
        self.wait()?;
        if !background {
            return job.run();
        }
        job.state = job.state.copy()?;
        let job = Arc::new(Mutex::new(Some(job)));
        let theirs = job.clone();
        let run = |job: &Mutex<Option<Job>>| {
            let job = job.lock().unwrap_or_else(PoisonError::into_inner).take();
            job.map_or(Ok(()), Job::run)
        };
        let spawned =
            std::thread::Builder::new().name("checkpoint".into()).spawn(move || run(&theirs));
        match spawned {
            Ok(spawned) => self.running = Some(spawned),
            // Where no thread can be started it is done here.
            Err(_) => return run(&job),
        }
        Ok(())
    }

    /// Waits for the job under way.
    pub(super) fn wait(&mut self) -> Result<()> {
        match self.running.take().map(JoinHandle::join) {
            None => Ok(()),
            Some(Ok(result)) => result,
            Some(Err(panic)) => Err(Error::State(format!(
                "writing a checkpoint panicked: {}",
                crate::panic::message(&*panic)
            ))),
        }
    }
}

/// A process that ends in order has its last checkpoint.
impl Drop for Writer {
    fn drop(&mut self) {
        let _ = self.wait();
    }
}
