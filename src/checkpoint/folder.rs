//! The folder of a run's checkpoints: one run at a time, nothing half-written.

use std::collections::HashMap;
use std::fs::{self, File, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock, Mutex, PoisonError, Weak};

use super::format::{Contents, Stamp};
pub(super) use crate::handlers::files::is_part;
use crate::handlers::files::{make_folder, write_whole};
use crate::{Error, Result};

const LOCK: &str = ".lock";
/// Holds the name of the newest file, for people and scripts.
pub(super) const LATEST: &str = "latest";
/// A folder that no other process writes to. Handlers and loggers of one process share it.
#[derive(Debug)]
pub(crate) struct Folder {
    path: PathBuf,
    /// When the newest file was written, so that the next is newer also where the clock was put back.
    newest: Mutex<u64>,
    /// Of which time the file is that `latest` names.
    latest: Mutex<u64>,
    /// Locked as long as it is open; the system unlocks it however the process ends.
    lock: File,
}

static OPEN: LazyLock<Mutex<HashMap<PathBuf, Weak<Folder>>>> = LazyLock::new(Mutex::default);

impl Folder {
    /// Makes the folder if need be, locks it, and removes what a killed process left half-written.
    ///
    /// # Errors
    /// The folder cannot be made or written, or another process has it.
    pub(crate) fn open(path: &Path, create: bool) -> Result<Arc<Self>> {
        let io = |source| Error::Io { path: path.to_owned(), source };
        if create {
            make_folder(path).map_err(io)?;
        } else if !path.is_dir() {
            return Err(Error::invalid(format!(
                "Directory path '{}' is not found",
                path.display()
            )));
        }
        let path = fs::canonicalize(path).map_err(io)?;
        let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(folder) = open.get(&path).and_then(Weak::upgrade) {
            return Ok(folder);
        }
        let lock = lock(&path)?;
        let newest = newest(&path).map_err(io)?;
        let folder =
            Self { path: path.clone(), newest: Mutex::new(newest), latest: Mutex::default(), lock };
        let folder = Arc::new(folder);
        folder.remove_parts();
        open.retain(|_, folder| folder.strong_count() > 0);
        open.insert(path, Arc::downgrade(&folder));
        Ok(folder)
    }

    /// Fails where the folder was removed, or another one has its name.
    pub(crate) fn check(&self) -> Result<()> {
        let path = self.file(LOCK);
        let gone = |text: &str| Error::Io {
            path: self.path.clone(),
            source: io::Error::new(io::ErrorKind::NotFound, text.to_owned()),
        };
        let there = fs::symlink_metadata(&path);
        let there = there.map_err(|_| gone("it was removed while a run was writing to it"))?;
        #[cfg(unix)]
        {
            use std::os::unix::fs::MetadataExt;
            let ours = self.lock.metadata().map_err(|source| Error::Io { path, source })?;
            if (ours.dev(), ours.ino()) != (there.dev(), there.ino()) {
                return Err(gone("it was replaced while a run was writing to it"));
            }
        }
        let _ = there;
        Ok(())
    }

    pub(super) fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    pub(super) fn names(&self) -> Result<Vec<String>> {
        names(&self.path).map_err(|source| Error::Io { path: self.path.clone(), source })
    }

    /// The time for a file that is written now: later than that of any other.
    pub(super) fn time(&self) -> u64 {
        let mut newest = self.newest.lock().unwrap_or_else(PoisonError::into_inner);
        *newest = Stamp::now().written.max(newest.saturating_add(1));
        *newest
    }

    /// Lets `latest` name this file, unless a newer one was written meanwhile by somebody else.
    pub(super) fn set_latest(&self, name: &str, written: u64) -> Result<()> {
        let mut latest = self.latest.lock().unwrap_or_else(PoisonError::into_inner);
        if *latest > written {
            return Ok(());
        }
        write_whole(&self.file(LATEST), |file| file.write_all(format!("{name}\n").as_bytes()))?;
        *latest = written;
        Ok(())
    }

    fn remove_parts(&self) {
        for name in names(&self.path).iter().flatten().filter(|name| is_part(name)) {
            let _ = fs::remove_file(self.file(name));
        }
    }
}

/// The names of all files in a folder.
pub(super) fn names(folder: &Path) -> io::Result<Vec<String>> {
    let mut names = vec![];
    for entry in fs::read_dir(folder)? {
        names.extend(entry?.file_name().into_string());
    }
    names.sort();
    Ok(names)
}

/// The largest time of its files.
fn newest(folder: &Path) -> io::Result<u64> {
    let names = names(folder)?;
    let written = |name: &String| Some(Contents::open(&folder.join(name)).ok()?.stamp.written);
    // Beyond that it is no time, and none could follow.
    let sensible = |written: &u64| *written < u64::MAX / 2;
    Ok(names.iter().filter_map(written).filter(sensible).max().unwrap_or(0))
}

fn lock(folder: &Path) -> Result<File> {
    let path = folder.join(LOCK);
    let io = |source| Error::Io { path: path.clone(), source };
    let mut file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(&path)
        .map_err(io)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let mut owner = String::new();
            let _ = file.take(20).read_to_string(&mut owner);
            return Err(Error::invalid(format!(
                "another run (process {}) writes to {}: give this one a folder of its own, or end the other",
                owner.trim(),
                folder.display()
            )));
        }
        Err(TryLockError::Error(source)) => return Err(io(source)),
    }
    // For the message above only.
    file.rewind().and_then(|()| write!(file, "{:<20}", std::process::id())).map_err(io)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn latest_names_the_newest_whoever_is_done_first() -> Result<()> {
        let folder = tempfile::tempdir().unwrap();
        let folder = Folder::open(&folder.path().join("a/b"), true)?;
        let latest = || fs::read_to_string(folder.file(LATEST)).unwrap();
        let (first, second) = (folder.time(), folder.time());
        assert!(first < second);
        folder.set_latest("second", second)?;
        // Of a handler that writes in the background.
        folder.set_latest("first", first)?;
        assert_eq!(latest(), "second\n");
        folder.set_latest("third", folder.time())?;
        assert_eq!(latest(), "third\n");
        Ok(())
    }
}
