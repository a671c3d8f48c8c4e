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
            fs::create_dir_all(folder)?;
        }
        let mut file = BufWriter::new(File::create(beside)?);
        write(&mut file)?;
        file.flush()?;
        file.get_ref().sync_all()?;
        fs::rename(beside, path)?;
        // The new name is only sure once the folder is on the disk too.
        #[cfg(unix)]
        if let Some(folder) = path.parent() {
            File::open(if folder.as_os_str().is_empty() { Path::new(".") } else { folder })?
                .sync_all()?;
        }
        Ok(())
    };
    whole().map_err(|source| {
        // What is left of it is of no use; the first error is the one to tell.
        let _ = fs::remove_file(beside);
        Error::Io { path: path.to_owned(), source }
    })
}
