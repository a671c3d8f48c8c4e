//! Writing, in the training's thread or in one of its own.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;

use super::folder::Folder;
use super::format::Stamp;
use super::{StateDict, format};
use crate::handlers::files::write_whole;
use crate::{Error, Result};

/// What is to be done to a folder, in this order: the new file is safe before an old one goes.
pub(super) struct Job {
    pub(super) folder: Arc<Folder>,
    pub(super) state: StateDict,
    /// Only the tensors, for other programs; `latest` does not name it.
    pub(super) plain: bool,
    pub(super) name: String,
    pub(super) stamp: Stamp,
    pub(super) remove: Vec<String>,
}

impl Job {
    fn run(self) -> Result<()> {
        write(&self.folder.file(&self.name), &self.state, self.plain, &self.stamp)?;
        if !self.plain {
            self.folder.set_latest(&self.name, self.stamp.written)?;
        }
        for name in self.remove.iter().filter(|name| **name != self.name) {
            let path = self.folder.file(name);
            match fs::remove_file(&path) {
                Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
                    return Err(Error::Io { path, source });
                }
                _ => {}
            }
        }
        Ok(())
    }
}

pub(super) fn write(path: &Path, state: &StateDict, plain: bool, stamp: &Stamp) -> Result<()> {
    write_whole(path, |file| match plain {
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
        let spawned = std::thread::Builder::new()
            .name("checkpoint".into())
            .spawn(move || job.run())
            .map_err(|source| Error::Io { path: PathBuf::from("a thread"), source })?;
        self.running = Some(spawned);
        Ok(())
    }

    /// Waits for the job under way.
    pub(super) fn wait(&mut self) -> Result<()> {
        match self.running.take().map(JoinHandle::join) {
            None => Ok(()),
            Some(Ok(result)) => result,
            Some(Err(panic)) => Err(Error::State(format!(
                "writing a checkpoint panicked: {}",
                crate::panic_message(&*panic)
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
