use std::collections::HashMap;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use crate::error::{Error, Result};
use crate::fs::{make_folder, sweep_once, sync_folder, write_atomically};

/// Written bytes reach the file at most this much later, if something else is written by then.
const PERIOD: Duration = Duration::from_secs(5);
/// Number of bytes that are collected before they are written together.
const BUFFER: usize = 1 << 16;

/// A buffered file that only grows. It is flushed every few seconds, on demand and when it is dropped.
///
/// The file is locked, so that no other process writes to it meanwhile.
pub(super) struct AppendFile {
    /// The path as the user gave it.
    path: PathBuf,
    /// The absolute path, which holds when the working directory changes.
    place: PathBuf,
    file: File,
    /// Bytes that are not written yet. Bytes that a full disk refuses stay here.
    buffer: Vec<u8>,
    /// Number of bytes in the file (0 for a device) and the buffer.
    len: u64,
    flushed: Instant,
    /// Whether all bytes are on the disk.
    synced: bool,
    /// Whether the file's name is on the disk.
    is_named: bool,
    /// Whether it is a plain file, and not a device or pipe.
    is_plain: bool,
}

impl AppendFile {
    /// Opens the file for appending. Makes the file and missing folders.
    ///
    /// # Errors
    /// The file cannot be made or opened, or another process writes to it.
    pub(super) fn open(path: &Path) -> Result<Self> {
        Self::open_with(path, OpenOptions::new().create(true))
    }

    /// Makes a file like [`open`](Self::open); `None` if the file exists already.
    pub(super) fn create(path: &Path) -> Result<Option<Self>> {
        match Self::open_with(path, OpenOptions::new().create_new(true)) {
            Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::AlreadyExists => {
                Ok(None)
            }
            opened => opened.map(Some),
        }
    }

    fn open_with(path: &Path, options: &mut OpenOptions) -> Result<Self> {
        let io = |source| Error::Io { path: path.to_owned(), source };
        if let Some(folder) = path.parent() {
            make_folder(folder).map_err(io)?;
            sweep_once(folder);
        }
        let file = options.append(true).read(true).open(path).map_err(io)?;
        let metadata = file.metadata().map_err(io)?;
        if metadata.is_file() {
            lock(&file, path)?;
        }
        Ok(Self {
            path: path.to_owned(),
            place: fs::canonicalize(path).map_err(io)?,
            file,
            buffer: Vec::with_capacity(BUFFER),
            len: metadata.len(),
            flushed: Instant::now(),
            synced: false,
            is_named: false,
            is_plain: metadata.is_file(),
        })
    }

    pub(super) fn place(&self) -> &Path {
        &self.place
    }

    /// Number of bytes, including those in the buffer.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    pub(super) fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.synced = false;
        self.buffer.extend_from_slice(bytes);
        self.len += bytes.len() as u64;
        match self.buffer.len() >= BUFFER || self.flushed.elapsed() >= PERIOD {
            true => self.flush(),
            false => Ok(()),
        }
    }

    pub(super) fn flush(&mut self) -> Result<()> {
        self.flushed = Instant::now();
        self.write_buffer().and_then(|()| self.check_place()).map_err(|error| self.error(error))
    }

    fn write_buffer(&mut self) -> io::Result<()> {
        while !self.buffer.is_empty() {
            match self.file.write(&self.buffer) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => drop(self.buffer.drain(..written)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Syncs all bytes to the disk.
    pub(super) fn sync(&mut self) -> Result<()> {
        self.flush()?;
        if self.synced || !self.is_plain {
            return Ok(());
        }
        let folder = self.place.parent().filter(|_| !self.is_named);
        let synced = self.file.sync_data().and_then(|()| folder.map_or(Ok(()), sync_folder));
        synced.map_err(|error| self.error(error))?;
        (self.synced, self.is_named) = (true, true);
        Ok(())
    }

    /// Whether the file still has its name.
    pub(super) fn is_in_place(&self) -> bool {
        self.check_place().is_ok()
    }

    /// Refuses to go on where the file was removed or replaced, because further bytes would be lost.
    fn check_place(&self) -> io::Result<()> {
        let gone = |text: &str| Err(io::Error::new(io::ErrorKind::NotFound, text.to_owned()));
        let there = match fs::metadata(&self.place) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return gone("it was removed while it was being written");
            }
            there => there?,
        };
        #[cfg(unix)]
        {
            use std::os::unix::fs::MetadataExt;
            let ours = self.file.metadata()?;
            if (ours.dev(), ours.ino()) != (there.dev(), there.ino()) {
                return gone("it was replaced while it was being written");
            }
        }
        let _ = there;
        Ok(())
    }

    /// Cuts the file to this length.
    pub(super) fn cut(&mut self, len: u64) -> Result<()> {
        self.flush()?;
        self.file.set_len(len).map_err(|error| self.error(error))?;
        self.len = len;
        self.synced = false;
        Ok(())
    }

    /// Reads the bytes from this offset to the end.
    pub(super) fn tail(&mut self, from: u64) -> Result<Vec<u8>> {
        self.flush()?;
        let mut tail = vec![];
        let mut file = &self.file;
        let read = file.seek(SeekFrom::Start(from)).and_then(|_| file.read_to_end(&mut tail));
        read.map_err(|error| self.error(error))?;
        Ok(tail)
    }

    /// Renames the file within its folder.
    pub(super) fn rename(&mut self, name: &str) -> Result<()> {
        self.flush()?;
        let (path, place) = (self.path.with_file_name(name), self.place.with_file_name(name));
        fs::rename(&self.place, &place).map_err(|error| self.error(error))?;
        (self.path, self.place) = (path, place);
        (self.synced, self.is_named) = (false, false);
        Ok(())
    }

    fn error(&self, source: io::Error) -> Error {
        Error::Io { path: self.path.clone(), source }
    }
}

impl Drop for AppendFile {
    fn drop(&mut self) {
        // An error here could not be reported to anyone.
        let _ = self.write_buffer();
    }
}

/// Locks the file of a log. The system releases the lock however the process ends.
pub(super) fn lock(file: &File, path: &Path) -> Result<()> {
    match file.try_lock() {
        Ok(()) => Ok(()),
        Err(TryLockError::WouldBlock) => Err(Error::invalid(format!(
            "another process writes to {}: give this run a log of its own, or end the other (of several ranks only the main one makes loggers)",
            path.display()
        ))),
        // Some file systems have no locks.
        Err(TryLockError::Error(error)) if error.kind() == io::ErrorKind::Unsupported => Ok(()),
        Err(TryLockError::Error(source)) => Err(Error::Io { path: path.to_owned(), source }),
    }
}

/// The line format of a file.
pub(super) struct Lines {
    /// The first line, if the file has one.
    pub(super) header: &'static str,
    /// Whether a line goes on after a line feed between quotes.
    pub(super) quotes: bool,
}

/// A file of whole lines, in which resumed runs do not repeat any.
pub(super) struct LineLog {
    file: AppendFile,
    lines: &'static Lines,
    /// CRC-32C of all bytes.
    crc: u32,
    /// Number of bytes that earlier processes left.
    inherited: u64,
    /// Whether it is known if the inherited bytes belong to this run.
    settled: bool,
}

/// A log that is shared by clones of a logger, and by loggers of the same path.
pub(super) type SharedLines = Arc<Mutex<LineLog>>;

static OPEN: LazyLock<Mutex<HashMap<PathBuf, Weak<Mutex<LineLog>>>>> =
    LazyLock::new(Mutex::default);

impl LineLog {
    /// Opens the log, or makes it. A line that a killed process left unfinished is cut.
    ///
    /// # Errors
    /// The file cannot be made or opened, or another process writes to it.
    pub(super) fn open(path: &Path, lines: &'static Lines) -> Result<SharedLines> {
        let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
        open.retain(|_, log| log.strong_count() > 0);
        // A log that was removed is still open here, and another file may have its name since.
        if let Ok(place) = fs::canonicalize(path)
            && let Some(log) = open.get(&place).and_then(Weak::upgrade)
            && locked(&log).file.is_in_place()
        {
            return Ok(log);
        }
        let mut file = AppendFile::open(path)?;
        let mut crc = 0;
        if file.is_plain {
            let whole = whole_lines(&file.file, lines.quotes);
            let whole = whole.map_err(|error| file.error(error))?;
            if whole < file.len {
                file.cut(whole)?;
            }
            crc = checksum(&file.file, whole).map_err(|error| file.error(error))?;
        }
        let inherited = file.len();
        let mut log = Self { file, lines, crc, inherited, settled: false };
        if log.file.len() == 0 {
            log.write(lines.header.as_bytes())?;
            log.inherited = log.file.len();
        }
        let place = log.file.place().to_owned();
        let log = Arc::new(Mutex::new(log));
        open.insert(place, Arc::downgrade(&log));
        Ok(log)
    }

    pub(super) fn write(&mut self, line: &[u8]) -> Result<()> {
        // On a full disk the line stays in the buffer, so it counts.
        self.crc = crc32c::crc32c_append(self.crc, line);
        self.file.write(line)
    }

    pub(super) fn flush(&mut self) -> Result<()> {
        self.file.flush()
    }

    pub(super) fn path(&self) -> PathBuf {
        self.file.place().to_owned()
    }

    /// Begins a run. If the run starts anew, the lines of earlier processes are moved to a file of their own. Returns
    /// whether there were such lines.
    pub(super) fn begin(&mut self, anew: bool) -> Result<bool> {
        let header = self.lines.header.as_bytes();
        let inherits = self.file.is_plain && self.inherited > header.len() as u64;
        if self.settled || !anew || !inherits {
            self.settled = true;
            return Ok(false);
        }
        let rest = self.file.tail(self.inherited)?;
        let place = self.file.place().to_owned();
        let aside = free_name(&place);
        fs::rename(&place, &aside).map_err(|error| self.file.error(error))?;
        let begin = || {
            write_atomically(&place, |file| {
                file.write_all(header)?;
                file.write_all(&rest)
            })?;
            let mut new = AppendFile::open(&place)?;
            new.path = self.file.path.clone();
            let cut = self.file.file.set_len(self.inherited);
            cut.map_err(|source| Error::Io { path: aside.clone(), source })?;
            Ok(new)
        };
        let new = begin().inspect_err(|_| {
            // The log is as it was before; the first error is the one to report.
            let _ = fs::rename(&aside, &place);
        })?;
        self.file = new;
        self.crc = crc32c::crc32c_append(crc32c::crc32c(header), &rest);
        self.inherited = header.len() as u64;
        self.settled = true;
        Ok(true)
    }

    /// Syncs all lines to the disk, and returns the place of their end.
    pub(super) fn commit(&mut self) -> Result<Value> {
        self.file.sync()?;
        Ok(json!({"bytes": self.file.len(), "crc32c": self.crc}))
    }

    /// Cuts the lines after a place that [`commit`](Self::commit) returned. Returns the reason if the place belongs to
    /// another file.
    pub(super) fn rewind(&mut self, place: &Value) -> Result<Option<String>> {
        let (Some(bytes), Some(crc)) = (place["bytes"].as_u64(), place["crc32c"].as_u64()) else {
            return Ok(Some("the checkpoint has no place in such a log".into()));
        };
        self.file.flush()?;
        if !self.file.is_plain {
            return Ok(None);
        }
        let mut same = bytes <= self.file.len();
        if same {
            let begin = checksum(&self.file.file, bytes);
            same = u64::from(begin.map_err(|error| self.file.error(error))?) == crc;
        }
        self.settled = true;
        if !same {
            let path = self.file.path.display();
            return Ok(Some(format!(
                "{path} does not begin with what the checkpoint's run had logged"
            )));
        }
        self.file.cut(bytes)?;
        // The checksum has 32 bits, because it equals `begin`.
        self.crc = crc as u32;
        self.inherited = bytes;
        Ok(None)
    }
}

pub(super) fn locked<T>(log: &Mutex<T>) -> MutexGuard<'_, T> {
    log.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The path with `.1` appended, or with the first free number.
fn free_name(path: &Path) -> PathBuf {
    let mut number = 0u64;
    loop {
        number += 1;
        let mut name = path.as_os_str().to_owned();
        name.push(format!(".{number}"));
        let name = PathBuf::from(name);
        if !name.exists() {
            return name;
        }
    }
}

/// Reads up to `len` bytes from the beginning, piece by piece.
fn read_pieces(mut file: &File, len: u64, mut take: impl FnMut(&[u8])) -> io::Result<()> {
    file.seek(SeekFrom::Start(0))?;
    let mut piece = vec![0; 1 << 16];
    let mut left = len;
    while left > 0 {
        let most = usize::try_from(left).unwrap_or(usize::MAX).min(piece.len());
        let read = file.read(&mut piece[..most])?;
        if read == 0 {
            break;
        }
        take(&piece[..read]);
        left -= read as u64;
    }
    Ok(())
}

fn checksum(file: &File, len: u64) -> io::Result<u32> {
    let mut crc = 0;
    read_pieces(file, len, |piece| crc = crc32c::crc32c_append(crc, piece))?;
    Ok(crc)
}

/// Number of bytes up to the end of the last whole line.
fn whole_lines(file: &File, quotes: bool) -> io::Result<u64> {
    let (mut at, mut whole, mut quoted) = (0u64, 0, false);
    read_pieces(file, u64::MAX, |piece| {
        for byte in piece {
            at += 1;
            match byte {
                b'"' if quotes => quoted = !quoted,
                b'\n' if !quoted => whole = at,
                _ => {}
            }
        }
    })?;
    Ok(whole)
}

/// The time in seconds since 1970.
pub(super) fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0., |time| time.as_secs_f64())
}
