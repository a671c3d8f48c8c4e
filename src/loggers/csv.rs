use std::path::{Path, PathBuf};
use std::rc::Rc;

use serde_json::Value;

use super::append::{LineLog, Lines, SharedLines, locked, now};
use super::{Logger, logger_as_handler};
use crate::engine::Log;
use crate::error::Result;

const LINES: Lines = Lines { header: "time,step,tag,value\n", quotes: true };

/// A logger that writes scalars as a table with a row for each, `time,step,tag,value`, in the order they come.
///
/// `time` is in seconds since 1970. Rows are appended to a file that exists, so that a run that goes on has one table:
/// when an engine is resumed, rows from after its checkpoint are cut off, so that each step is there once. A run that
/// starts anew moves the rows of earlier processes to another file, `NAME.1` and so on. See [`loggers`](super) for when
/// rows are on the disk. Loggers of one path in a process share the table.
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

crate::debug::opaque_debug!(CsvLogger);

impl CsvLogger {
    /// Opens the table, or makes it.
    ///
    /// # Errors
    /// The file cannot be made or opened, or another process writes to it; the text has the path.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        LineLog::open(path.as_ref(), &LINES).map(|file| Self { file })
    }
}

/// The text of a cell, in quotes where a table would misread it.
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
        locked(&self.file).begin(anew).map(drop)
    }

    fn logs(&self) -> Vec<Rc<dyn Log>> {
        vec![Rc::new(self.clone())]
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
    use crate::engine::{Engine, Until};
    use crate::event::Event;
    use crate::loggers::OutputHandler;

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

    /// The rows of the table without times.
    fn rows(path: &Path) -> Vec<String> {
        let text = std::fs::read_to_string(path).unwrap();
        assert!(text.ends_with('\n'), "{text}");
        text.lines().map(|row| row.split_once(',').unwrap().1.to_owned()).collect()
    }

    #[test]
    fn a_line_that_was_torn_is_cut_when_the_table_is_opened_again() -> anyhow::Result<()> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("scalars.csv");
        let whole = "time,step,tag,value\n1.0,1,\"a\nb\",0.5\n";
        // The last row ends with a line feed between quotes.
        for torn in ["", "2", "2.0,2,loss,0.", "2.0,2,\"a\n"] {
            std::fs::write(&path, format!("{whole}{torn}"))?;
            CsvLogger::open(&path)?.scalar("loss", 2., 2)?;
            let text = std::fs::read_to_string(&path)?;
            let added = text.strip_prefix(whole).unwrap_or_else(|| panic!("{torn}: {text}"));
            assert!(added.ends_with(",2,loss,2\n") && added.lines().count() == 1, "{added}");
        }
        std::fs::write(&path, "time,st")?;
        CsvLogger::open(&path)?.scalar("loss", 2., 2)?;
        assert_eq!(rows(&path), ["step,tag,value", "2,loss,2"]);
        Ok(())
    }

    #[test]
    fn tables_of_one_path_are_one_table() -> anyhow::Result<()> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("scalars.csv");
        let (first, second) = (CsvLogger::open(&path)?, CsvLogger::open(&path)?);
        for step in 1..=3 {
            first.scalar("a", 1., step)?;
            second.scalar("b", 2., step)?;
        }
        first.flush()?;
        assert_eq!(rows(&path)[1..], ["1,a,1", "1,b,2", "2,a,1", "2,b,2", "3,a,1", "3,b,2"]);
        Ok(())
    }

    type Trainer<'a> = Engine<'a, (), f64, f64>;

    fn trainer<'a>(csv: &CsvLogger) -> Trainer<'a> {
        let mut trainer = Engine::new(|_: &mut (), _, x: f64| Ok(x));
        let every = Event::IterationCompleted;
        trainer.attach(OutputHandler::new(csv, "", every).output("x", |x: &f64| *x));
        trainer
    }

    #[test]
    fn a_run_that_starts_anew_leaves_the_rows_of_another_process_beside() -> anyhow::Result<()> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("scalars.csv");
        let run = |batches: Vec<f64>| -> anyhow::Result<()> {
            let csv = CsvLogger::open(&path)?;
            csv.scalar("before", 0., 0)?;
            let mut trainer = trainer(&csv);
            trainer.run(&mut (), batches.clone(), Until::epochs(1))?;
            // Another run of this process goes on in the table.
            trainer.run(&mut (), batches, Until::epochs(2))?;
            Ok(())
        };
        run(vec![5.])?;
        let first = ["step,tag,value", "0,before,0", "1,x,5", "2,x,5"];
        assert_eq!(rows(&path), first);
        run(vec![7.])?;
        let second = ["step,tag,value", "0,before,0", "1,x,7", "2,x,7"];
        assert_eq!(rows(&path), second);
        run(vec![9.])?;
        assert_eq!(rows(&folder.path().join("scalars.csv.1")), first);
        assert_eq!(rows(&folder.path().join("scalars.csv.2")), second);
        // A position without the state of handlers goes on, too.
        let mut trainer = trainer(&CsvLogger::open(&path)?);
        let state = serde_json::json!({"iteration": 2, "epoch_length": 1, "max_epochs": 3});
        trainer.load_state_dict(state.as_object().unwrap())?;
        trainer.run(&mut (), vec![9.], Until::epochs(3))?;
        drop(trainer);
        assert_eq!(rows(&path), ["step,tag,value", "0,before,0", "1,x,9", "2,x,9", "3,x,9"]);
        Ok(())
    }

    #[test]
    fn a_checkpoint_cuts_its_own_table_only() -> anyhow::Result<()> {
        let folder = tempfile::tempdir()?;
        let path = |name: &str| folder.path().join(name).join("scalars.csv");
        let csv = CsvLogger::open(path("a"))?;
        let mut first = trainer(&csv);
        first.run(&mut (), vec![1.; 2], Until::epochs(1))?;
        let saved = first.checkpoint(&())?.copy()?;
        first.run(&mut (), vec![1.; 2], Until::epochs(2))?;
        // A restore in the same process cuts the table too, when the run goes on.
        let whole = rows(&path("a"));
        let restored = first.restore(&mut (), saved.copy()?, true)?;
        assert_eq!((rows(&path("a")), restored.ignored.len()), (whole.clone(), 0));
        let rerun = first.run(&mut (), vec![1.; 2], Until::epochs(2))?;
        assert_eq!((rows(&path("a")), rerun.warnings), (whole.clone(), vec![]));
        // After a reset the state counts for nothing, and neither do its places.
        first.restore(&mut (), saved.copy()?, true)?;
        first.reset()?;
        first.run(&mut (), vec![1.; 2], Until::epochs(1))?;
        assert_eq!(rows(&path("a")), [&whole[..], &whole[1..3]].concat());
        drop((first, csv));

        // This logger writes to another folder, which has other rows.
        let other = CsvLogger::open(path("b"))?;
        other.scalar("x", 4., 1)?;
        let mut moved = trainer(&other);
        moved.restore(&mut (), saved.copy()?, true)?;
        let warnings = moved.run(&mut (), vec![1.; 2], Until::epochs(2))?.warnings;
        assert!(warnings[0].contains("log 'scalars.csv' stays as it is"), "{warnings:?}");
        assert_eq!(rows(&path("b"))[1..], ["1,x,4", "3,x,1", "4,x,1"]);

        // Programs with other loggers, or none, resume all the same.
        let mut without: Trainer<'_> = Engine::new(|_: &mut (), _, x: f64| Ok(x));
        let old = without.checkpoint(&())?.copy()?;
        assert_eq!(without.restore(&mut (), saved, true)?.ignored, [""; 0]);
        assert_eq!(trainer(&other).restore(&mut (), old, true)?.ignored, [""; 0]);
        Ok(())
    }

    #[test]
    fn a_table_that_was_removed_or_replaced_is_an_error_of_the_run() -> anyhow::Result<()> {
        fn replace(path: &Path) -> std::io::Result<()> {
            // The old one is still open, so its number is not given to the new one.
            std::fs::remove_file(path)?;
            std::fs::write(path, "time,step,tag,value\n")
        }
        fn remove(path: &Path) -> std::io::Result<()> {
            std::fs::remove_dir_all(path.parent().unwrap())
        }
        for (word, change) in [("replaced", replace as fn(&Path) -> _), ("removed", remove)] {
            let folder = tempfile::tempdir()?;
            let path = folder.path().join("run/scalars.csv");
            let mut trainer = trainer(&CsvLogger::open(&path)?);
            trainer.on(Event::IterationCompleted.once(2), move |_, _| Ok(change(&path)?));
            let error = trainer.run(&mut (), vec![1.; 3], Until::epochs(1)).unwrap_err();
            let error = format!("{error}");
            assert!(error.contains("scalars.csv") && error.contains(word), "{error}");
        }
        Ok(())
    }
}
