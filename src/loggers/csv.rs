use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use super::Logger;
use super::append::{AppendFile, now};
use crate::Result;

/// Scalars as a table: a row each, `time,step,tag,value`, in the order they come.
///
/// `time` is in seconds since 1970. Rows are appended to a file that exists, so that a run that goes
/// on has one table. Buffered; on disk within seconds, at [`flush`](Logger::flush) and when the last
/// clone is dropped. Steps that a run does again are there twice: the later row counts.
///
/// ```
/// use tch_ignite::loggers::{CsvLogger, Logger};
/// # let folder = std::env::temp_dir().join(format!("tch-ignite-csv-{}", std::process::id()));
/// let csv = CsvLogger::open(folder.join("scalars.csv"))?;
/// csv.scalar("val/accuracy", 0.975, 3)?;
/// csv.flush()?;
/// assert!(std::fs::read_to_string(folder.join("scalars.csv"))?.ends_with(",3,val/accuracy,0.975\n"));
/// # std::fs::remove_dir_all(folder)?;
/// # Ok::<(), anyhow::Error>(())
/// ```
#[derive(Clone)]
pub struct CsvLogger {
    file: Arc<Mutex<AppendFile>>,
}

impl CsvLogger {
    /// Opens the table, and makes it where there is none.
    ///
    /// # Errors
    /// The file cannot be made or opened; the text has its path.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let (mut file, empty) = AppendFile::open(path.as_ref())?;
        if empty {
            file.write(b"time,step,tag,value\n")?;
        }
        Ok(Self { file: Arc::new(Mutex::new(file)) })
    }
}

/// As it is, or in quotes where a table would misread it.
fn cell(text: &str) -> String {
    match text.contains([',', '"', '\n', '\r']) {
        true => format!("\"{}\"", text.replace('"', "\"\"")),
        false => text.to_owned(),
    }
}

impl Logger for CsvLogger {
    fn scalar(&self, tag: &str, value: f64, step: u64) -> Result<()> {
        let row = format!("{:.3},{step},{},{value}\n", now(), cell(tag));
        self.file.lock().unwrap_or_else(PoisonError::into_inner).write(row.as_bytes())
    }

    fn flush(&self) -> Result<()> {
        self.file.lock().unwrap_or_else(PoisonError::into_inner).flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_are_quoted_and_tables_go_on() -> anyhow::Result<()> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("deep/scalars.csv");
        for value in [0.1, f64::NAN] {
            CsvLogger::open(&path)?.scalar("a \"b\", c", value, 1)?;
        }
        let text = std::fs::read_to_string(path)?;
        let rows: Vec<_> = text.lines().map(|row| row.split_once(',').map(|row| row.1)).collect();
        let quoted = "1,\"a \"\"b\"\", c\"";
        let (first, second) = (format!("{quoted},0.1"), format!("{quoted},NaN"));
        assert_eq!(rows, [Some("step,tag,value"), Some(&*first), Some(&*second)]);
        Ok(())
    }

    #[test]
    fn a_full_disk_is_an_error_that_names_the_file() -> anyhow::Result<()> {
        let full = Path::new("/dev/full");
        if !full.exists() {
            eprintln!("skipped: there is no /dev/full here");
            return Ok(());
        }
        let csv = CsvLogger::open(full)?;
        csv.scalar("loss", 1., 1)?;
        let error = csv.flush().unwrap_err();
        assert!(error.to_string().contains("/dev/full"), "{error}");
        Ok(())
    }
}
