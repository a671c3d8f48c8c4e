use std::collections::HashSet;
use std::fs::{self, File, TryLockError};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{LazyLock, Mutex, PoisonError};

use crate::error::{Error, Result};

/// Part of the names of files that are being written.
const PART: &str = ".part-";

/// Writes a file that is either there as a whole or not at all: under another name, then synced and renamed. Makes
/// missing folders, and removes what killed processes left half-written in the file's folder.
pub(crate) fn write_atomically(
    path: &Path,
    write: impl FnOnce(&mut BufWriter<File>) -> io::Result<()>,
) -> Result<()> {
    let mut part = None;
    let whole = || {
        if let Some(folder) = path.parent() {
            make_folder(folder)?;
            sweep_once(folder);
        }
        let (beside, file) = create_part(path)?;
        let beside = part.insert(beside);
        let mut file = BufWriter::new(file);
        write(&mut file)?;
        file.flush()?;
        file.get_ref().sync_all()?;
        fs::rename(beside, path)?;
        // The new name is only safe once the folder is on the disk too.
        path.parent().map_or(Ok(()), sync_folder)
    };
    let whole = whole();
    whole.map_err(|source| {
        if let Some(beside) = part {
            // The rest of the file is useless, and the first error is the one to report.
            let _ = fs::remove_file(beside);
        }
        Error::Io { path: path.to_owned(), source }
    })
}

/// Opens a file for reading. Anything but a plain file is an error: opening a pipe would wait, and opening a device may
/// have any effect.
pub(crate) fn open_file(path: &Path) -> io::Result<File> {
    let plain = |metadata: fs::Metadata| match metadata.is_file() {
        true => Ok(()),
        false => Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no plain file")),
    };
    plain(fs::metadata(path)?)?;
    let mut options = File::options();
    options.read(true);
    // The file may have been replaced by a pipe since the check.
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::custom_flags(&mut options, libc::O_NONBLOCK);
    let file = options.open(path)?;
    plain(file.metadata()?)?;
    Ok(file)
}

/// Makes a new file beside `path`, and locks it as long as it is open, so that no other process takes it for a
/// leftover.
fn create_part(path: &Path) -> io::Result<(PathBuf, File)> {
    // The counter keeps two writers of one path apart, in threads or in processes.
    static WRITES: AtomicU64 = AtomicU64::new(0);
    loop {
        let number = WRITES.fetch_add(1, Ordering::Relaxed);
        let mut beside = path.as_os_str().to_owned();
        beside.push(format!("{PART}{}-{number}", std::process::id()));
        let beside = PathBuf::from(beside);
        let file = match File::create_new(&beside) {
            // Another process used this number, or has the same process number in another container.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
            created => created?,
        };
        // Another process may have swept the file away before it was locked.
        let is_ours = !matches!(file.try_lock(), Err(TryLockError::WouldBlock)) && beside.exists();
        if is_ours {
            return Ok((beside, file));
        }
    }
}

/// Whether a file of this name was being written: the name ends in `.part-<process>-<number>`.
pub(crate) fn is_part(name: &str) -> bool {
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let numbers = name.rsplit_once(PART).and_then(|(_, numbers)| numbers.split_once('-'));
    numbers.is_some_and(|(process, number)| digits(process) && digits(number))
}

/// Removes what killed processes left half-written in a folder, the first time that this process writes there.
pub(crate) fn sweep_once(folder: &Path) {
    static SWEPT: LazyLock<Mutex<HashSet<PathBuf>>> = LazyLock::new(Mutex::default);
    let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
    let Ok(place) = fs::canonicalize(folder) else { return };
    if SWEPT.lock().unwrap_or_else(PoisonError::into_inner).insert(place) {
        sweep(folder);
    }
}

/// Removes what killed processes left half-written in a folder. A file that is being written is locked, and stays.
pub(crate) fn sweep(folder: &Path) {
    // A leftover that cannot be removed does no harm.
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_name().to_str().is_some_and(is_part)
            && entry.file_type().is_ok_and(|kind| kind.is_file())
            && let Ok(file) = File::open(entry.path())
            && file.try_lock().is_ok()
        {
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// Makes a folder and its missing parents, and syncs them to the disk.
pub(crate) fn make_folder(folder: &Path) -> io::Result<()> {
    if folder.as_os_str().is_empty() || folder.is_dir() {
        return Ok(());
    }
    let above = folder.parent();
    above.map_or(Ok(()), make_folder)?;
    match fs::create_dir(folder) {
        // Another process made the folder meanwhile.
        Err(_) if folder.is_dir() => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            Err(io::Error::from(io::ErrorKind::NotADirectory))
        }
        made => made,
    }?;
    above.map_or(Ok(()), sync_folder)
}

/// Syncs a folder, so that the names of its files are on the disk.
pub(crate) fn sync_folder(folder: &Path) -> io::Result<()> {
    #[cfg(unix)]
    File::open(if folder.as_os_str().is_empty() { Path::new(".") } else { folder })?.sync_all()?;
    #[cfg(not(unix))]
    let _ = folder;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_killed_process_left_half_written_is_swept_and_what_is_being_written_is_not()
    -> Result<()> {
        let folder = tempfile::tempdir().unwrap();
        let place = |name: &str| folder.path().join(name);
        let (dead, other) = (place("report.html.part-1-0"), place("part-1-0.html"));
        fs::write(&dead, "half").unwrap();
        fs::write(&other, "whole").unwrap();
        let (alive, file) = create_part(&place("config.json")).unwrap();
        write_atomically(&place("history.csv"), |file| file.write_all(b"1"))?;
        assert!(!dead.exists() && other.exists() && alive.exists());
        drop(file);
        Ok(())
    }

    #[test]
    fn folders_are_made_from_the_first_that_is_missing() -> io::Result<()> {
        let folder = tempfile::tempdir()?;
        let deep = folder.path().join("a/b/../c/d");
        make_folder(&deep)?;
        make_folder(&deep)?;
        assert!(folder.path().join("a/c/d").is_dir());
        make_folder(Path::new(""))?;
        fs::write(folder.path().join("file"), "")?;
        assert!(make_folder(&folder.path().join("file/e")).is_err());
        Ok(())
    }
}
