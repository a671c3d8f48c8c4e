use std::path::{Path, PathBuf};
use std::rc::Rc;

use serde_json::{Value, json};

use super::append::{LineLog, Lines, SharedLines, locked, now};
use super::{Logger, logger_as_handler};
use crate::engine::Log;
use crate::error::Result;

const LINES: Lines = Lines { header: "", quotes: false };

/// A logger that writes scalars and texts as JSON, one object a line:
/// `{"step":3,"tag":"val/accuracy","time":…,"value":0.975}`.
///
/// Texts have `text` instead of `value`. Numbers are written so that they can be read back bit for bit; those that JSON
/// does not have are the texts `"NaN"`, `"Infinity"` and `"-Infinity"`. Lines are appended and cut off like the rows of
/// [`CsvLogger`](super::CsvLogger).
#[derive(Clone)]
pub struct JsonLinesLogger {
    file: SharedLines,
}

crate::debug::opaque_debug!(JsonLinesLogger);

impl JsonLinesLogger {
    /// Opens the file, or makes it.
    ///
    /// # Errors
    /// The file cannot be made or opened, or another process writes to it; the text has the path.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        LineLog::open(path.as_ref(), &LINES).map(|file| Self { file })
    }

    /// Begins a run like [`Logger::begin`]. Returns whether lines of earlier processes were moved away.
    pub(super) fn begins(&self, anew: bool) -> Result<bool> {
        locked(&self.file).begin(anew)
    }

    fn write(&self, line: &Value) -> Result<()> {
        locked(&self.file).write(format!("{line}\n").as_bytes())
    }
}

/// The number as JSON, or its name where JSON has no such number.
pub(super) fn number(value: f64) -> Value {
    match value {
        _ if value.is_finite() => value.into(),
        _ if value.is_nan() => "NaN".into(),
        _ if value > 0. => "Infinity".into(),
        _ => "-Infinity".into(),
    }
}

/// Tag, step and value of a line; `None` for a text, and for a line that is not whole or not of this logger.
pub(super) fn scalar_of(line: &str) -> Option<(String, u64, f64)> {
    let line: Value = serde_json::from_str(line).ok()?;
    let value = match line["value"].as_str() {
        Some(name) => name.parse().ok()?,
        None => line["value"].as_f64()?,
    };
    Some((line["tag"].as_str()?.to_owned(), line["step"].as_u64()?, value))
}

impl Logger for JsonLinesLogger {
    fn scalar(&self, tag: &str, value: f64, step: u64) -> Result<()> {
        self.write(&json!({"time": now(), "step": step, "tag": tag, "value": number(value)}))
    }

    fn text(&self, tag: &str, text: &str, step: u64) -> Result<()> {
        self.write(&json!({"time": now(), "step": step, "tag": tag, "text": text}))
    }

    fn flush(&self) -> Result<()> {
        locked(&self.file).flush()
    }

    fn begin(&self, anew: bool) -> Result<()> {
        self.begins(anew).map(drop)
    }

    fn logs(&self) -> Vec<Rc<dyn Log>> {
        vec![Rc::new(self.clone())]
    }
}

impl Log for JsonLinesLogger {
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

logger_as_handler!(JsonLinesLogger, "JSON lines logger");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_comes_back() -> anyhow::Result<()> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("scalars.jsonl");
        let logger = JsonLinesLogger::open(&path)?;
        let values = [0.1 + 0.2, -0., 1e-300, f64::NAN, f64::INFINITY, f64::NEG_INFINITY];
        for (step, value) in values.iter().enumerate() {
            logger.scalar("a\n\"b\"", *value, step as u64)?;
        }
        logger.text("note", "ä\n", 9)?;
        drop(logger);
        let text = std::fs::read_to_string(path)?;
        let read: Vec<_> = text.lines().filter_map(scalar_of).collect();
        assert_eq!(read.len(), values.len());
        for (step, (read, value)) in read.iter().zip(values).enumerate() {
            assert_eq!((read.0.as_str(), read.1), ("a\n\"b\"", step as u64));
            assert!(read.2.to_bits() == value.to_bits() || read.2.is_nan() && value.is_nan());
        }
        Ok(())
    }
}
