use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;
use serde_json::Value;
use tch::Cuda;

use super::curve::Curve;
use super::json_lines::scalar_of;
use super::report::{self, Report, TAGS};
use super::{
    CsvLogger, Histogram, HyperParameter, Image, JsonLinesLogger, Logger, TensorBoard, flat,
    spec_of,
};
use crate::checkpoint::Folder;
use crate::engine::{Engine, Handler, HandlerSpec, Log, State};
use crate::error::{Error, Result};
use crate::event::Event;
use crate::fs::{open_file, write_atomically};

/// The report is written again at the end of an epoch when it is at least this old.
const PERIOD: Duration = Duration::from_secs(10);

/// Everything that a run logs, in one folder: a logger for other handlers, and a handler itself.
///
/// | file | what |
/// |---|---|
/// | `events.out.tfevents.…` | for TensorBoard |
/// | `scalars.csv`, `scalars.jsonl` | all scalars, the latter with texts too |
/// | `config.json` | what [`config`](Self::config) was given |
/// | `report.html` | curves, configuration, environment and times, for any browser, without network |
///
/// Clones share the files. The attached handler records the times of epochs, flushes all files at the end of each
/// epoch, and writes the report: at the end of the run, however it ends, and at the end of epochs, at most every ten
/// seconds. Files that exist in the folder are appended to, so a run that goes on has one record and one report, with
/// each step once: see [`loggers`](super). A run that starts anew moves the tables of earlier processes to other files,
/// `scalars.csv.1` and so on, and its report shows only itself. One process at a time may have the folder;
/// [`Checkpoint`](crate::checkpoint::Checkpoint) may write to it too.
///
/// The memory is 16 bytes a scalar, for up to 4000 points for each tag and 1000 tags; the report says when there are
/// more.
///
/// [`loggers`](super) shows it at work.
#[derive(Clone)]
pub struct RunFolder {
    path: PathBuf,
    /// Locked against other processes.
    folder: Arc<Folder>,
    board: TensorBoard,
    csv: CsvLogger,
    json: JsonLinesLogger,
    record: Arc<Mutex<Record>>,
}

crate::debug::opaque_debug!(RunFolder);

#[derive(Default)]
struct Record {
    curves: BTreeMap<String, Curve>,
    /// Whether there are more tags than the report shows.
    has_more: bool,
    config: Value,
    times: Times,
    written: Option<Instant>,
}

#[derive(Default)]
struct Times {
    status: &'static str,
    epochs: Vec<f64>,
    iterations: u64,
    begun: Option<Instant>,
}

impl RunFolder {
    /// Opens the folder, or makes it.
    ///
    /// # Errors
    /// The folder cannot be made or written, or another process has it; the text has the path.
    pub fn create(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref().to_owned();
        let folder = Folder::open(&path, true)?;
        let json = JsonLinesLogger::open(path.join("scalars.jsonl"))?;
        let mut record = recorded(&json)?;
        if let Ok(text) = fs::read_to_string(path.join("config.json")) {
            record.config = serde_json::from_str(&text).unwrap_or_default();
        }
        Ok(Self {
            csv: CsvLogger::open(path.join("scalars.csv"))?,
            json,
            folder,
            board: TensorBoard::create(&path)?,
            record: Arc::new(Mutex::new(record)),
            path,
        })
    }

    /// The path of the folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The logger of the event file, for values that only TensorBoard shows.
    pub fn tensorboard(&self) -> &TensorBoard {
        &self.board
    }

    /// Stores the configuration of the run in `config.json`, in the report, and as hyper-parameters for TensorBoard,
    /// nested ones as `optimizer/lr`.
    ///
    /// # Errors
    /// The configuration cannot be written as JSON, or the file cannot be written.
    pub fn config(&self, config: &impl Serialize) -> Result<()> {
        let value = flat::to_json(config)?;
        self.folder.check()?;
        write_atomically(&self.path.join("config.json"), |file| writeln!(file, "{value:#}"))?;
        let parameters = flat::values(&value)?;
        let parameters = parameters.iter().map(|(name, value)| {
            let parameter = match value {
                Value::Bool(on) => HyperParameter::Switch(*on),
                Value::Number(number) => {
                    HyperParameter::Number(number.as_f64().unwrap_or(f64::NAN))
                }
                Value::String(text) => HyperParameter::Text(text.clone()),
                other => HyperParameter::Text(other.to_string()),
            };
            (name.as_str(), parameter)
        });
        self.board.hparams(parameters, [])?;
        self.record().config = value;
        Ok(())
    }

    /// Writes `report.html` for the current state. The file is replaced as a whole.
    ///
    /// # Errors
    /// The file cannot be written, or the folder was removed or replaced.
    pub fn write_report(&self) -> Result<()> {
        self.folder.check()?;
        let html = {
            let mut record = self.record();
            record.written = Some(Instant::now());
            let title = self.path.file_name().unwrap_or(self.path.as_os_str()).to_string_lossy();
            report::html(&Report {
                title: &title,
                curves: &record.curves,
                has_more: record.has_more,
                config: &record.config,
                environment: &environment(),
                times: &record.times.rows(),
            })
        };
        write_atomically(&self.path.join("report.html"), |file| file.write_all(html.as_bytes()))
    }

    /// Reads the curves from the JSON lines again.
    fn record_anew(&self) -> Result<()> {
        self.json.flush()?;
        let Record { curves, has_more, .. } = recorded(&self.json)?;
        let mut record = self.record();
        (record.curves, record.has_more) = (curves, has_more);
        Ok(())
    }

    fn record(&self) -> MutexGuard<'_, Record> {
        self.record.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The curves of the scalars in a file of JSON lines. Lines longer than the limit hold texts, or nothing of this crate.
fn recorded(json: &JsonLinesLogger) -> Result<Record> {
    const LONGEST: u64 = 10_000;
    let path = json.path();
    let mut record = Record::default();
    let mut read = || {
        let (mut file, mut line) = (BufReader::new(open_file(&path)?), vec![]);
        while file.by_ref().take(LONGEST).read_until(b'\n', &mut line)? > 0 {
            let scalar = std::str::from_utf8(&line).ok().and_then(scalar_of);
            if let Some((tag, step, value)) = scalar {
                record.push(&tag, value, step);
            }
            line.clear();
        }
        Ok(())
    };
    read().map_err(|source| Error::Io { path: path.clone(), source })?;
    Ok(record)
}

/// The JSON lines of a run folder as a log; rewinding it updates the curves of the report.
struct Curves(RunFolder);

impl Log for Curves {
    fn path(&self) -> PathBuf {
        self.0.json.path()
    }

    fn commit(&self) -> Result<Value> {
        self.0.json.commit()
    }

    fn rewind(&self, place: &Value) -> Result<Option<String>> {
        let of_another = self.0.json.rewind(place)?;
        if of_another.is_none() {
            self.0.record_anew()?;
        }
        Ok(of_another)
    }
}

impl Record {
    fn push(&mut self, tag: &str, value: f64, step: u64) {
        let is_full = self.curves.len() >= TAGS;
        match self.curves.get_mut(tag) {
            Some(curve) => curve.push(step, value),
            None if is_full => self.has_more = true,
            None => self.curves.entry(tag.to_owned()).or_default().push(step, value),
        }
    }
}

impl Times {
    fn rows(&self) -> Vec<(&'static str, String)> {
        let mut rows = vec![];
        if let Some(begun) = self.begun {
            rows.push(("status", self.status.to_owned()));
            rows.push(("seconds", format!("{:.1}", begun.elapsed().as_secs_f64())));
            rows.push(("iterations", self.iterations.to_string()));
        }
        if !self.epochs.is_empty() {
            let sum: f64 = self.epochs.iter().sum();
            rows.push(("epochs", self.epochs.len().to_string()));
            rows.push(("seconds an epoch", format!("{:.2}", sum / self.epochs.len() as f64)));
        }
        rows
    }

    fn note<B, O>(&mut self, event: Event, state: &State<B, O>) {
        if event == Event::Started {
            *self = Self::default();
        }
        // A run that is resumed fires no STARTED.
        self.begun.get_or_insert_with(Instant::now);
        self.iterations = state.iteration;
        match event {
            Event::EpochCompleted => {
                self.status = "running";
                self.epochs.push(state.epoch_time.as_secs_f64());
            }
            Event::Terminate => self.status = "terminated",
            Event::Interrupt => self.status = "interrupted",
            Event::ExceptionRaised => self.status = "failed",
            Event::Completed if self.status != "terminated" => self.status = "completed",
            _ => {}
        }
    }
}

fn environment() -> Vec<(&'static str, String)> {
    let cuda = match Cuda::is_available() {
        true => format!("{} devices", Cuda::device_count()),
        false => "none".into(),
    };
    vec![
        ("tch-ignite", env!("CARGO_PKG_VERSION").into()),
        ("system", format!("{} {}", std::env::consts::OS, std::env::consts::ARCH)),
        (
            "cores",
            std::thread::available_parallelism().map_or(0, std::num::NonZero::get).to_string(),
        ),
        ("threads of libtorch", tch::get_num_threads().to_string()),
        ("CUDA", cuda),
        ("build", if cfg!(debug_assertions) { "debug" } else { "release" }.into()),
    ]
}

#[deny(clippy::missing_trait_methods)]
impl Logger for RunFolder {
    fn scalar(&self, tag: &str, value: f64, step: u64) -> Result<()> {
        self.record().push(tag, value, step);
        self.csv.scalar(tag, value, step)?;
        self.json.scalar(tag, value, step)?;
        self.board.scalar(tag, value, step)
    }

    fn histogram(&self, tag: &str, values: &Histogram, step: u64) -> Result<()> {
        self.board.histogram(tag, values, step)
    }

    fn text(&self, tag: &str, text: &str, step: u64) -> Result<()> {
        self.json.text(tag, text, step)?;
        self.board.text(tag, text, step)
    }

    fn image(&self, tag: &str, image: &Image, step: u64) -> Result<()> {
        self.board.image(tag, image, step)
    }

    fn flush(&self) -> Result<()> {
        self.csv.flush()?;
        self.json.flush()?;
        self.board.flush()
    }

    fn begin(&self, anew: bool) -> Result<()> {
        self.csv.begin(anew)?;
        self.board.begin(anew)?;
        // The curves are those of the file as long as no lines leave it.
        match self.json.begins(anew)? {
            true => self.record_anew(),
            false => Ok(()),
        }
    }

    fn logs(&self) -> Vec<Rc<dyn Log>> {
        vec![Rc::new(self.csv.clone()), Rc::new(Curves(self.clone())), Rc::new(self.board.clone())]
    }
}

impl<C, B, O> Handler<C, B, O> for RunFolder {
    fn spec(&self) -> Result<HandlerSpec> {
        let name = format!("run folder {}", self.path.display());
        Ok(spec_of(self, name, &Event::EpochCompleted.into()))
    }

    fn call(
        &mut self,
        event: Event,
        _cx: &mut C,
        engine: &mut Engine<'_, C, B, O>,
    ) -> anyhow::Result<()> {
        if event == Event::Started {
            self.begin(engine.began_anew())?;
        }
        let is_due = {
            let mut record = self.record();
            record.times.note(event, &engine.state);
            match event {
                Event::Started => false,
                Event::EpochCompleted => {
                    record.written.is_none_or(|written| written.elapsed() >= PERIOD)
                }
                _ => true,
            }
        };
        self.flush()?;
        if is_due {
            self.write_report()?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::engine::Until;
    use crate::loggers::OutputHandler;

    fn run(folder: &Path, epochs: u64, fail_at: u64) -> anyhow::Result<()> {
        let run = RunFolder::create(folder)?;
        let mut trainer =
            Engine::new(move |_: &mut (), engine: &mut Engine<'_, _, _, f64>, x: f64| {
                anyhow::ensure!(engine.state.iteration != fail_at, "as asked");
                Ok(x)
            });
        let every = Event::IterationCompleted;
        trainer
            .attach(OutputHandler::new(&run, "training", every).output("loss", |loss: &f64| *loss))
            .attach(run.clone());
        Ok(trainer.run(&mut (), vec![0.5, 0.25, 1.], Until::epochs(epochs)).map(drop)?)
    }

    #[test]
    fn a_run_leaves_all_of_it_behind() -> anyhow::Result<()> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("a/b");
        RunFolder::create(&path)?.config(&json!({"lr": 0.1, "optimizer": {"name": "<sgd>"}}))?;
        run(&path, 2, 0)?;
        let report = fs::read_to_string(path.join("report.html"))?;
        for part in ["training/loss", "completed", "&lt;sgd&gt;", "threads of libtorch", "<svg"] {
            assert!(report.contains(part), "{part}");
        }
        assert!(!report.contains("<sgd>") && !report.contains("http"));
        assert_eq!(fs::read_to_string(path.join("scalars.csv"))?.lines().count(), 7);
        Ok(())
    }

    #[test]
    fn a_run_that_fails_has_its_report_and_one_that_goes_on_its_past() -> anyhow::Result<()> {
        let folder = tempfile::tempdir()?;
        assert!(run(folder.path(), 2, 5).is_err());
        let report = || fs::read_to_string(folder.path().join("report.html"));
        assert!(report()?.contains("failed"));
        let again = RunFolder::create(folder.path())?;
        assert_eq!(again.record().curves["training/loss"].points.len(), 4);
        again.scalar("training/loss", 9., 3)?;
        let points = again.record().curves["training/loss"].points.clone();
        assert_eq!(points, [(1, 0.5), (2, 0.25), (3, 9.)]);
        Ok(())
    }

    #[test]
    fn the_file_is_read_again_only_where_lines_have_left_it() -> anyhow::Result<()> {
        let folder = tempfile::tempdir()?;
        RunFolder::create(folder.path())?.scalar("earlier", 1., 1)?;
        let run = RunFolder::create(folder.path())?;
        let tags = || run.record().curves.keys().cloned().collect::<Vec<_>>();
        // Reading the file again would lose what only the memory has.
        let note = || run.record().push("only in memory", 1., 1);
        note();
        run.begin(true)?;
        assert_eq!(tags(), [""; 0], "the earlier line has left the file");
        note();
        for anew in [true, false, true] {
            run.begin(anew)?;
            assert_eq!(tags(), ["only in memory"]);
        }
        Ok(())
    }

    #[test]
    fn loggers_of_a_folder_that_was_removed_and_made_again_write_to_the_new_one()
    -> anyhow::Result<()> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("run");
        let old = RunFolder::create(&path)?;
        fs::remove_dir_all(&path)?;
        let new = RunFolder::create(&path)?;
        new.scalar("loss", 0.5, 1)?;
        new.flush()?;
        new.write_report()?;
        assert_eq!(fs::read_to_string(path.join("scalars.csv"))?.lines().count(), 2);
        assert_eq!(fs::read_to_string(path.join("scalars.jsonl"))?.lines().count(), 1);
        assert!(old.flush().is_err() && old.write_report().is_err());
        // The newest of them are shared from then on.
        let third = RunFolder::create(&path)?;
        third.scalar("loss", 0.25, 2)?;
        new.flush()?;
        assert_eq!(fs::read_to_string(path.join("scalars.csv"))?.lines().count(), 3);
        let files = fs::read_dir(&path)?.flatten();
        let is_event_file =
            |name: &std::ffi::OsString| name.to_string_lossy().starts_with("events.out.tfevents.");
        assert_eq!(files.map(|file| file.file_name()).filter(is_event_file).count(), 1);
        Ok(())
    }

    #[test]
    fn the_report_of_any_number_of_tags_is_bounded() -> anyhow::Result<()> {
        let folder = tempfile::tempdir()?;
        let mut lines = String::new();
        for tag in 0..300_000 {
            lines += &format!("{{\"step\":1,\"tag\":\"{tag:06}\",\"time\":1.5,\"value\":0.5}}\n");
        }
        // A line without an end takes no more memory than others.
        lines += &"x".repeat(1_000_000);
        fs::write(folder.path().join("scalars.jsonl"), lines)?;
        let run = RunFolder::create(folder.path())?;
        run.scalar("one more", 1., 2)?;
        run.scalar("000001", 9., 2)?;
        assert_eq!(run.record().curves.len(), TAGS);
        run.write_report()?;
        let report = fs::read_to_string(folder.path().join("report.html"))?;
        assert!(report.contains("the first 1000 tags") && report.contains("000001"));
        assert!(!report.contains("one more") && report.len() < 5_000_000, "{}", report.len());
        Ok(())
    }

    #[test]
    fn a_folder_that_is_removed_in_a_run_is_an_error_and_is_not_made_again() -> anyhow::Result<()> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("run");
        let run = RunFolder::create(&path)?;
        let mut trainer = Engine::new(|_: &mut (), _, x: f64| Ok(x));
        trainer.attach(run.clone());
        let removed = path.clone();
        trainer
            .on(Event::IterationCompleted.once(2), move |_, _| Ok(fs::remove_dir_all(&removed)?));
        let error = trainer.run(&mut (), vec![1.; 3], Until::epochs(1)).unwrap_err();
        let error = format!("{error}");
        assert!(error.contains("removed while it was being written"), "{error}");
        assert!(run.config(&json!({"lr": 1})).is_err() && run.write_report().is_err());
        assert!(!path.exists());
        Ok(())
    }

    #[test]
    fn leftovers_of_killed_processes_are_swept() -> anyhow::Result<()> {
        let folder = tempfile::tempdir()?;
        let part = folder.path().join("report.html.part-7-1");
        fs::write(&part, "<html>")?;
        RunFolder::create(folder.path())?;
        assert!(!part.exists());
        Ok(())
    }

    #[test]
    fn a_folder_that_cannot_be_made_is_an_error_that_names_it() -> anyhow::Result<()> {
        let folder = tempfile::tempdir()?;
        fs::write(folder.path().join("file"), "")?;
        let error = RunFolder::create(folder.path().join("file/run")).err();
        assert!(error.is_some_and(|error| error.to_string().contains("file/run")));
        Ok(())
    }
}
