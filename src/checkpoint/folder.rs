//! The folder of a run's checkpoints: one run at a time, nothing half-written.

use std::collections::HashMap;
use std::fs::{self, File, TryLockError};
use std::io::{Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock, Mutex, PoisonError, Weak};

use crate::{Error, Result};

const LOCK: &str = ".lock";
/// In the names of files that are being written.
const PART: &str = ".part-";

/// A folder that no other process writes checkpoints to. Handlers of one process share it.
#[derive(Debug)]
pub(super) struct Folder {
    path: PathBuf,
    /// Locked as long as it is open; the system unlocks it however the process ends.
    _lock: File,
}

static OPEN: LazyLock<Mutex<HashMap<PathBuf, Weak<Folder>>>> = LazyLock::new(Mutex::default);

impl Folder {
    /// Makes the folder if need be, locks it, and removes what a killed process left half-written.
    ///
    /// # Errors
    /// The folder cannot be made or written, or another process has it.
    pub(super) fn open(path: &Path, create: bool) -> Result<Arc<Self>> {
        let io = |source| Error::Io { path: path.to_owned(), source };
        if create {
            fs::create_dir_all(path).map_err(io)?;
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
        let folder = Arc::new(Self { _lock: lock(&path)?, path: path.clone() });
        folder.remove_parts();
        open.retain(|_, folder| folder.strong_count() > 0);
        open.insert(path, Arc::downgrade(&folder));
        Ok(folder)
    }

    pub(super) fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    pub(super) fn names(&self) -> Vec<String> {
        names(&self.path)
    }

    fn remove_parts(&self) {
        for name in self.names().iter().filter(|name| is_part(name)) {
            let _ = fs::remove_file(self.file(name));
        }
    }
}

/// Whether a file of that name was being written: it ends in `.part-<process>-<number>`.
pub(super) fn is_part(name: &str) -> bool {
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let numbers = name.rsplit_once(PART).and_then(|(_, numbers)| numbers.split_once('-'));
    numbers.is_some_and(|(process, number)| digits(process) && digits(number))
}

/// The names of all files in a folder.
pub(super) fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok()).collect()
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
                "another run (process {}) writes its checkpoints to {}: give this one a folder of its own, or end the other",
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
