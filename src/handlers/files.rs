use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::{Error, Result};

/// Writes a file that is there whole or not at all: beside its place, then renamed. Makes the folders
/// above it.
pub(crate) fn write_whole(
    path: &Path,
    write: impl FnOnce(&mut BufWriter<File>) -> io::Result<()>,
) -> Result<()> {
    // Two writers of one path, in threads or processes, do not meet.
    static WRITES: AtomicU64 = AtomicU64::new(0);
    let number = WRITES.fetch_add(1, Ordering::Relaxed);
    let mut beside = path.as_os_str().to_owned();
    beside.push(format!(".part-{}-{number}", std::process::id()));
    let beside = Path::new(&beside);

    let whole = || {
        if let Some(folder) = path.parent() {
            make_folder(folder)?;
        }
        let mut file = BufWriter::new(File::create(beside)?);
        write(&mut file)?;
        file.flush()?;
        file.get_ref().sync_all()?;
        fs::rename(beside, path)?;
        // The new name is only sure once the folder is on the disk too.
        path.parent().map_or(Ok(()), sync_folder)
    };
    whole().map_err(|source| {
        // What is left of it is of no use; the first error is the one to tell.
        let _ = fs::remove_file(beside);
        Error::Io { path: path.to_owned(), source }
    })
}

/// Opens a file for reading. What is no plain file is an error: a pipe would be waited for, and what the
/// opening of a device does is not known.
pub(crate) fn open_file(path: &Path) -> io::Result<File> {
    let plain = |metadata: fs::Metadata| match metadata.is_file() {
        true => Ok(()),
        false => Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no plain file")),
    };
    plain(fs::metadata(path)?)?;
    let mut options = File::options();
    options.read(true);
    // It may be a pipe by now.
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::custom_flags(&mut options, libc::O_NONBLOCK);
    let file = options.open(path)?;
    plain(file.metadata()?)?;
    Ok(file)
}

/// Makes a folder and those above it that are missing, as safely as a file is written.
pub(crate) fn make_folder(folder: &Path) -> io::Result<()> {
    if folder.as_os_str().is_empty() || folder.is_dir() {
        return Ok(());
    }
    let above = folder.parent();
    above.map_or(Ok(()), make_folder)?;
    match fs::create_dir(folder) {
        // Somebody else was faster.
        Err(_) if folder.is_dir() => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            Err(io::Error::from(io::ErrorKind::NotADirectory))
        }
        made => made,
    }?;
    above.map_or(Ok(()), sync_folder)
}

/// Names of files in the folder are on the disk then.
fn sync_folder(folder: &Path) -> io::Result<()> {
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
