//! Runs in an MLflow server, through its REST interface.

mod builder;
mod queue;
mod rest;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Serialize;
use serde_json::Value;

pub use self::builder::MLflowBuilder;
use self::queue::{Item, Queue};
use super::{Image, Logger, flat};
use crate::engine::{Engine, Handler, Log, Priority, Ranks};
use crate::error::{Error, Result};
use crate::event::Event;
use crate::event_filter::Events;

/// How long the end of a run waits for what is not sent yet.
const AT_THE_END: Duration = Duration::from_secs(10);

/// Sends metrics, parameters, tags and files to an MLflow server: ignite's `MLflowLogger`, with its
/// names (`training loss`, `lr group_0`: a space where other loggers have a slash).
///
/// A thread of its own talks to the server, so that logging costs a push onto a queue; values are sent
/// together, once a second or when there are a thousand. **The network never stops or delays a run.**
/// What cannot be sent is tried again, every ten seconds at last; meanwhile the queue keeps 10,000 values
/// and 64 MiB of files, and what comes then, or is refused by the server, is dropped and counted.
/// [`close`](Self::close) says what was lost. Attached to an engine, this waits at the end of each run, ten seconds at most, for what is not
/// sent yet, and what was lost is among the [`warnings`](crate::engine::Summary::warnings) of the run. Only the
/// start needs the server.
///
/// A checkpoint says which run it belongs to: [`resume`](crate::engine::Engine::resume) tells if another one is logged to,
/// and that steps which are done again are there twice, because MLflow takes nothing back.
///
/// When it is closed, or the last clone is dropped, the run is marked as finished; as failed if the last
/// run of the engine it is attached to ended in an error, or the thread is panicking.
///
/// Histograms have no place in MLflow and are left out. Pictures and texts become artifacts
/// (`images/TAG/STEP.png`, `texts/TAG/STEP.txt`), if the server takes artifacts itself, as
/// `mlflow server` does unless told otherwise.
///
/// ```no_run
/// use tch_ignite::engine::{Engine, Event, Until};
/// use tch_ignite::loggers::{MLflowLogger, OutputHandler};
///
/// let mlflow = MLflowLogger::builder("http://127.0.0.1:5000").experiment("digits").start()?;
/// mlflow.config(&serde_json::json!({"batch_size": 64, "optimizer": {"name": "sgd", "lr": 0.1}}))?;
/// let mut trainer = Engine::new(|_: &mut (), _, loss: f64| Ok(loss));
/// trainer
///     .attach(OutputHandler::new(&mlflow, "training", Event::IterationCompleted).output("loss", |loss: &f64| *loss))
///     .attach(mlflow.clone());
/// println!("{}", trainer.run(&mut (), vec![0.5; 10], Until::epochs(2))?);
/// mlflow.close()?;
/// # anyhow::Ok(())
/// ```
#[derive(Clone)]
pub struct MLflowLogger(Arc<Run>);

/// The run, until the last clone is dropped.
struct Run {
    id: String,
    queue: Arc<Queue>,
    worker: Mutex<Option<JoinHandle<()>>>,
}

impl MLflowLogger {
    /// Starts a run in the experiment `Default` of this server.
    ///
    /// # Errors
    /// The address is none, or there is no MLflow server; the text has both address and reason.
    pub fn new(tracking_uri: impl Into<String>) -> Result<Self> {
        Self::builder(tracking_uri).start()
    }

    /// Says more about the run before it starts.
    pub fn builder(tracking_uri: impl Into<String>) -> MLflowBuilder {
        MLflowBuilder::new(tracking_uri.into())
    }

    /// The run's id at the server.
    pub fn run_id(&self) -> &str {
        &self.0.id
    }

    /// Logs a parameter of the run. MLflow keeps the first value of each.
    pub fn log_param(&self, name: &str, value: impl ToString) {
        let value = value.to_string();
        self.push_named(name, value.len(), 6000, |name| Item::Param(name, value));
    }

    /// Logs all values of a configuration as parameters, nested ones as `optimizer/lr`.
    ///
    /// # Errors
    /// It cannot be written as JSON.
    pub fn config(&self, config: &impl Serialize) -> Result<()> {
        for (name, value) in flat::values(config)? {
            match value {
                Value::String(text) => self.log_param(&name, text),
                other => self.log_param(&name, other),
            }
        }
        Ok(())
    }

    /// Sets a tag of the run.
    pub fn set_tag(&self, name: &str, value: impl ToString) {
        let value = value.to_string();
        self.push_named(name, value.len(), 8000, |name| Item::Tag(name, value));
    }

    /// Keeps a file with the run, under this path. The bytes wait in memory until they are sent.
    ///
    /// # Errors
    /// The path is none: empty parts, `..`, or other characters than letters, digits and `_-. /`.
    pub fn log_artifact(&self, path: &str, bytes: impl Into<Vec<u8>>) -> Result<()> {
        let part = |part: &str| !part.is_empty() && part != "." && part != "..";
        if !path.split('/').all(part) || !path.chars().all(|c| is_allowed(c) && c != ':') {
            return Err(Error::invalid(format!(
                "'{path}' is no path of an artifact: letters, digits and '_-. ' with single slashes between"
            )));
        }
        self.0.queue.push(Item::Artifact(path.to_owned(), bytes.into()));
        Ok(())
    }

    /// Sends what is left, for ten seconds at most, and marks the run as finished. What is logged
    /// afterwards is lost.
    ///
    /// # Errors
    /// Something was lost: how many values, and the last reason.
    pub fn close(&self) -> Result<()> {
        self.0.end();
        match self.0.queue.trouble() {
            Some(trouble) => Err(Error::State(trouble)),
            None => Ok(()),
        }
    }

    fn push_named(&self, name: &str, size: usize, most: usize, item: impl FnOnce(String) -> Item) {
        if name.is_empty() || name.len() > 250 || !name.chars().all(is_allowed) {
            let rule = "MLflow takes names of up to 250 letters, digits and '_-. :/'";
            self.0.queue.lose(1, format!("'{name}': {rule}"));
        } else if size > most {
            self.0.queue.lose(1, format!("'{name}' has {size} bytes; MLflow takes {most}"));
        } else {
            self.0.queue.push(item(name.to_owned()));
        }
    }
}

/// In names.
fn is_allowed(c: char) -> bool {
    c.is_alphanumeric() || "_-. :/".contains(c)
}

/// A tag as a part of a path.
fn path_of(tag: &str) -> String {
    let parts = tag.split('/').filter(|part| !matches!(*part, "" | "." | ".."));
    let allowed = |c| if is_allowed(c) && c != ':' { c } else { '_' };
    let parts: Vec<String> = parts.map(|part| part.chars().map(allowed).collect()).collect();
    parts.join("/")
}

/// Milliseconds since 1970.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_millis() as u64)
}

impl Run {
    fn end(&self) {
        let worker = self.worker.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(worker) = worker
            && self.queue.end(AT_THE_END)
        {
            // It is past its last request.
            let _ = worker.join();
        }
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.queue.set_failed(true);
        }
        self.end();
        if let Some(trouble) = self.queue.untold_trouble() {
            eprintln!("{trouble}");
        }
    }
}

impl Logger for MLflowLogger {
    fn scalar(&self, tag: &str, value: f64, step: u64) -> Result<()> {
        let name = tag.replace('/', " ");
        self.push_named(&name, 0, 0, |name| Item::Metric { name, value, step, time: now() });
        Ok(())
    }

    fn text(&self, tag: &str, text: &str, step: u64) -> Result<()> {
        self.log_artifact(&format!("texts/{}/{step}.txt", path_of(tag)), text)
    }

    fn image(&self, tag: &str, image: &Image, step: u64) -> Result<()> {
        self.log_artifact(&format!("images/{}/{step}.png", path_of(tag)), image.png.as_slice())
    }

    /// Sends soon what is there, without waiting for it.
    fn flush(&self) -> Result<()> {
        self.0.queue.hurry();
        Ok(())
    }

    fn logs(&self) -> Vec<Box<dyn Log>> {
        vec![Box::new(self.clone())]
    }
}

/// A checkpoint does not wait for the server, and nothing is taken back there.
impl Log for MLflowLogger {
    fn path(&self) -> PathBuf {
        "MLflow".into()
    }

    fn commit(&self) -> Result<Value> {
        self.0.queue.hurry();
        Ok(self.run_id().into())
    }

    fn rewind(&self, place: &Value) -> Result<Option<String>> {
        let then = place.as_str().unwrap_or_default();
        Ok(Some(match then == self.run_id() {
            true => {
                "MLflow takes nothing back, so steps that are done again are there twice".into()
            }
            false => format!(
                "what was logged until then is in MLflow run {then}: MLflowBuilder::run_id goes on with it"
            ),
        }))
    }
}

impl<C, B, O> Handler<C, B, O> for MLflowLogger {
    fn name(&self) -> String {
        format!("MLflow run {}", self.run_id())
    }

    fn events(&self) -> Events {
        use Event::*;
        Started | Terminate | Completed | ExceptionRaised | Interrupt
    }

    fn priority(&self) -> Priority {
        Priority::Last
    }

    fn ranks(&self) -> Ranks {
        Ranks::Main
    }

    fn logs(&self) -> Vec<Box<dyn Log>> {
        Logger::logs(self)
    }

    fn call(
        &mut self,
        event: Event,
        _cx: &mut C,
        engine: &mut Engine<'_, C, B, O>,
    ) -> anyhow::Result<()> {
        let queue = &self.0.queue;
        queue.set_failed(event == Event::ExceptionRaised);
        // COMPLETED may follow TERMINATE; then nothing is left to wait for.
        if event != Event::Started {
            queue.wait(AT_THE_END);
        }
        // A run that fails has no summary.
        if !matches!(event, Event::Started | Event::ExceptionRaised)
            && let Some(trouble) = queue.untold_trouble()
        {
            engine.warn(trouble);
        }
        Ok(())
    }
}
