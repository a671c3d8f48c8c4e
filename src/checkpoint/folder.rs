//! The folder of a run's checkpoints: one run at a time, nothing half-written.

use std::collections::{HashMap, HashSet};
use std::fs::{self, File, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock, Mutex, PoisonError, Weak};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::format::{Contents, Stamp};
use crate::error::{Error, Result};
pub(super) use crate::fs::is_part;
use crate::fs::{make_folder, open_file, write_atomically};

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
    /// The files that handlers write in the runs that are under way: see [`Claim`].
    claimed: Mutex<HashSet<String>>,
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
        let folder = Self {
            path: path.clone(),
            newest: Mutex::new(newest),
            latest: Mutex::default(),
            claimed: Mutex::default(),
            lock,
        };
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
        write_atomically(&self.file(LATEST), |file| {
            file.write_all(format!("{name}\n").as_bytes())
        })?;
        *latest = written;
        Ok(())
    }

    /// Reads the stamp of a file, if the file carries one under its own name.
    pub(super) fn kept(&self, name: &str) -> Option<(RetentionStamp, Contents)> {
        let contents = Contents::open(&self.file(name)).ok()?;
        let kept: RetentionStamp = serde_json::from_str(contents.stamp.kept.as_deref()?).ok()?;
        (kept.name == name).then_some((kept, contents))
    }

    /// Removes a file, if it is on the list of `owner`. What was put there by somebody else stays.
    pub(super) fn remove(&self, name: &str, owner: &Owner) -> Result<()> {
        if self.kept(name).is_none_or(|(kept, _)| kept.owner != *owner) {
            return Ok(());
        }
        let path = self.file(name);
        match fs::remove_file(&path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(Error::Io { path, source })
            }
            _ => Ok(()),
        }
    }

    /// Lets one handler alone write files like this one, until the claim is dropped.
    ///
    /// # Errors
    /// Another one does.
    pub(super) fn claim(self: &Arc<Self>, file: String) -> Result<Claim> {
        let mut claimed = self.claimed.lock().unwrap_or_else(PoisonError::into_inner);
        if !claimed.insert(file.clone()) {
            return Err(Error::invalid(format!(
                "another Checkpoint writes files such as '{file}' to {} in this run, and each would remove the other's: give one of them another name, prefix or folder",
                self.path.display()
            )));
        }
        Ok(Claim { folder: self.clone(), file })
    }

    fn remove_parts(&self) {
        for name in names(&self.path).iter().flatten().filter(|name| is_part(name)) {
            let _ = fs::remove_file(self.file(name));
        }
    }
}

/// The right of a handler to write files that are named like `file`, for as long as it lives.
#[derive(Debug)]
pub(super) struct Claim {
    folder: Arc<Folder>,
    file: String,
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut claimed = self.folder.claimed.lock().unwrap_or_else(PoisonError::into_inner);
        claimed.remove(&self.file);
    }
}

/// Names the list that a file is on: that of a handler in a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Owner {
    pub(super) run: u64,
    pub(super) of: String,
}

/// The stamp in each file that lets a later process put it on its list again, and remove it one day.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct RetentionStamp {
    #[serde(flatten)]
    pub(super) owner: Owner,
    /// The file's own name: copies under other names are somebody's.
    pub(super) name: String,
    pub(super) score: Value,
}

/// The name in `latest`, if there is a file like that.
pub(super) fn latest(folder: &Path) -> Option<String> {
    let mut name = String::new();
    open_file(&folder.join(LATEST)).ok()?.take(1000).read_to_string(&mut name).ok()?;
    Some(name.trim().to_owned())
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
    let mut options = File::options();
    options.read(true).write(true).create(true).truncate(false);
    // A link would let the number below be written into another file.
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::custom_flags(
        &mut options,
        libc::O_NOFOLLOW | libc::O_NONBLOCK,
    );
    let mut file = options.open(&path).map_err(io)?;
    if !is_ours_alone(&file.metadata().map_err(io)?) {
        let kind = io::ErrorKind::InvalidInput;
        return Err(io(io::Error::new(kind, "it is no plain file of this folder alone")));
    }
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

/// Whether it is a plain file without other names.
fn is_ours_alone(metadata: &fs::Metadata) -> bool {
    #[cfg(unix)]
    let one_name = std::os::unix::fs::MetadataExt::nlink(metadata) <= 1;
    #[cfg(not(unix))]
    let one_name = true;
    metadata.is_file() && one_name
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
