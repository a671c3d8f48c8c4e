use std::path::{Path, PathBuf};

use serde_json::Value;

use super::append::{LineLog, Lines, SharedLines, locked, now};
use super::{Logger, logger_as_handler};
use crate::Result;
use crate::engine::Log;

const LINES: Lines = Lines { header: "time,step,tag,value\n", quotes: true };

/// Scalars as a table: a row each, `time,step,tag,value`, in the order they come.
///
/// `time` is in seconds since 1970. Rows are appended to a file that exists, so that a run that goes
/// on has one table: when an engine is resumed, rows that came after its checkpoint are cut off, so that each step is there
/// once. A run that starts anew leaves the rows of earlier processes in a file beside, `NAME.1` and so on. See
/// [`loggers`](super) for when rows are on the disk. Tables of one path in a process are the same table.
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
    file: SharedLines,
}

impl CsvLogger {
    /// Opens the table, and makes it where there is none.
    ///
    /// # Errors
    /// The file cannot be made or opened, or another process writes to it; the text has its path.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        LineLog::open(path.as_ref(), &LINES).map(|file| Self { file })
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
        locked(&self.file).write(row.as_bytes())
    }

    fn flush(&self) -> Result<()> {
        locked(&self.file).flush()
    }

    fn begin(&self, anew: bool) -> Result<()> {
        locked(&self.file).begin(anew)
    }

    fn logs(&self) -> Vec<Box<dyn Log>> {
        vec![Box::new(self.clone())]
    }
}

impl Log for CsvLogger {
    fn path(&self) -> PathBuf {
        locked(&self.file).path()
    }

    fn commit(&self) -> Result<Value> {
        locked(&self.file).commit()
    }

    fn rewind(&self, place: &Value) -> Result<Option<String>> {
        locked(&self.file).rewind(place)
    }
}

logger_as_handler!(CsvLogger, "CSV logger");

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
