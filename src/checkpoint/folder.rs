//! The folder of a run's checkpoints. Only one run at a time may have it, and no file in it is half-written.

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
use crate::fs::{make_folder, open_file, sweep, write_atomically};

const LOCK: &str = ".lock";
/// The file with the name of the newest checkpoint, for people and scripts.
pub(super) const LATEST: &str = "latest";
/// A folder that no other process writes to. Handlers and loggers of one process share it.
#[derive(Debug)]
pub(crate) struct Folder {
    path: PathBuf,
    /// Time stamp of the newest file, so that the next one is newer even where the clock was set back.
    newest: Mutex<u64>,
    /// Time stamp of the file that `latest` names.
    latest: Mutex<u64>,
    /// Names of the files that handlers write in the runs under way: see [`Claim`].
    claimed: Mutex<HashSet<String>>,
    /// The open lock file. The system releases the lock however the process ends.
    lock: File,
}

/// The folders that this process has open.
static OPEN: LazyLock<Mutex<HashMap<PathBuf, Weak<Folder>>>> = LazyLock::new(Mutex::default);

impl Folder {
    /// Locks the folder, and removes what a killed process left half-written. With `create`, a missing folder is made.
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
        // A folder that was removed is still open here, and another one may have its name since.
        if let Some(folder) = open.get(&path).and_then(Weak::upgrade)
            && folder.check().is_ok()
        {
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
        sweep(&folder.path);
        open.retain(|_, folder| folder.strong_count() > 0);
        open.insert(path, Arc::downgrade(&folder));
        Ok(folder)
    }

    /// Refuses to go on where the folder was removed, or another folder has its name.
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

    /// The time stamp for a file that is written now: later than the stamp of any other file.
    pub(super) fn time(&self) -> u64 {
        let mut newest = self.newest.lock().unwrap_or_else(PoisonError::into_inner);
        *newest = Stamp::now().written.max(newest.saturating_add(1));
        *newest
    }

    /// Writes the name of this file into `latest`, unless a newer file was written meanwhile by another handler.
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

    /// Removes a file, if its stamp says that it belongs to `owner`. Other files stay.
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

    /// Reserves files with names like this one for one handler, until the claim is dropped.
    ///
    /// # Errors
    /// Another handler has the claim.
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
}

/// The right of a handler to write files that are named like `file`. It ends when the claim is dropped.
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

/// The handler and the run whose list a file is on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Owner {
    pub(super) run: u64,
    pub(super) of: String,
}

/// The stamp in each file that lets a later process adopt the file again, and remove it when its turn comes.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct RetentionStamp {
    #[serde(flatten)]
    pub(super) owner: Owner,
    /// The file's own name, so that copies under other names are left alone.
    pub(super) name: String,
    pub(super) score: Value,
    /// Whether the score is one of `score_function` or `best`, and not the step.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(super) scored: bool,
}

/// The name in the file `latest`, if there is such a file.
pub(super) fn latest(folder: &Path) -> Option<String> {
    let mut name = String::new();
    open_file(&folder.join(LATEST)).ok()?.take(1000).read_to_string(&mut name).ok()?;
    Some(name.trim().to_owned())
}

/// The names of all files in a folder, sorted.
pub(super) fn names(folder: &Path) -> io::Result<Vec<String>> {
    let mut names = vec![];
    for entry in fs::read_dir(folder)? {
        names.extend(entry?.file_name().into_string());
    }
    names.sort();
    Ok(names)
}

/// The latest time stamp of the files in a folder.
fn newest(folder: &Path) -> io::Result<u64> {
    let names = names(folder)?;
    let written = |name: &String| Some(Contents::open(&folder.join(name)).ok()?.stamp.written);
    // A larger number is not a time, and no later one could follow it.
    let sensible = |written: &u64| *written < u64::MAX / 2;
    Ok(names.iter().filter_map(written).filter(sensible).max().unwrap_or(0))
}

fn lock(folder: &Path) -> Result<File> {
    let path = folder.join(LOCK);
    let io = |source| Error::Io { path: path.clone(), source };
    let mut options = File::options();
    options.read(true).write(true).create(true).truncate(false);
    // Through a link the number below would be written into another file.
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
    // The number of the process is only for the error message above.
    file.rewind().and_then(|()| write!(file, "{:<20}", std::process::id())).map_err(io)?;
    Ok(file)
}

/// Whether the file is a plain file without other hard links.
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
    fn a_folder_that_was_removed_and_made_again_is_another_one() -> Result<()> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run");
        let old = Folder::open(&path, true)?;
        assert!(Arc::ptr_eq(&old, &Folder::open(&path, true)?));
        fs::remove_dir_all(&path).unwrap();
        let new = Folder::open(&path, true)?;
        assert!(old.check().is_err());
        new.check()?;
        assert!(Arc::ptr_eq(&new, &Folder::open(&path, true)?));
        Ok(())
    }

    #[test]
    fn opening_sweeps_what_nobody_is_writing() -> Result<()> {
        let folder = tempfile::tempdir().unwrap();
        let place = |name: &str| folder.path().join(name);
        fs::write(place("a.part-7-1"), "half").unwrap();
        let written = File::create_new(place("b.part-7-2")).unwrap();
        written.try_lock().unwrap();
        Folder::open(folder.path(), true)?;
        assert!(!place("a.part-7-1").exists() && place("b.part-7-2").exists());
        Ok(())
    }

    #[test]
    fn latest_names_the_newest_whoever_is_done_first() -> Result<()> {
        let folder = tempfile::tempdir().unwrap();
        let folder = Folder::open(&folder.path().join("a/b"), true)?;
        let latest = || fs::read_to_string(folder.file(LATEST)).unwrap();
        let (first, second) = (folder.time(), folder.time());
        assert!(first < second);
        folder.set_latest("second", second)?;
        // A handler that writes in the background may be done later.
        folder.set_latest("first", first)?;
        assert_eq!(latest(), "second\n");
        folder.set_latest("third", folder.time())?;
        assert_eq!(latest(), "third\n");
        Ok(())
    }
}
