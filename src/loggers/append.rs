use std::fs::{self, File, OpenOptions};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::{Error, Result};

/// What is written is on disk at most this much later, if something else is written by then.
const PERIOD: Duration = Duration::from_secs(5);

/// A file that grows, buffered. Flushed at a period, on demand and when it is dropped.
pub(super) struct AppendFile {
    path: PathBuf,
    file: BufWriter<File>,
    flushed: Instant,
}

impl AppendFile {
    /// Opens the file for appending, and makes it and the folders above it where they are missing.
    /// True if it was empty.
    pub(super) fn open(path: &Path) -> Result<(Self, bool)> {
        let open = || {
            if let Some(folder) = path.parent() {
                fs::create_dir_all(folder)?;
            }
            let file = OpenOptions::new().create(true).append(true).open(path)?;
            let empty = file.metadata()?.len() == 0;
            Ok((file, empty))
        };
        let (file, empty) = open().map_err(|source| Error::Io { path: path.to_owned(), source })?;
        let file = BufWriter::with_capacity(1 << 16, file);
        Ok((Self { path: path.to_owned(), file, flushed: Instant::now() }, empty))
    }

    pub(super) fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(|error| self.error(error))?;
        if self.flushed.elapsed() >= PERIOD { self.flush() } else { Ok(()) }
    }

    pub(super) fn flush(&mut self) -> Result<()> {
        self.flushed = Instant::now();
        self.file.flush().map_err(|error| self.error(error))
    }

    fn error(&self, source: std::io::Error) -> Error {
        Error::Io { path: self.path.clone(), source }
    }
}

/// Seconds since 1970.
pub(super) fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0., |time| time.as_secs_f64())
}
