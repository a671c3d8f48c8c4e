//! A logger for an MLflow server, through the server's REST interface.

mod builder;
mod queue;
mod rest;
mod steps;

use std::path::PathBuf;
use std::rc::Rc;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::Serialize;
use serde_json::{Value, json};

pub use self::builder::MLflowBuilder;
use self::queue::{Item, Queue};
use self::steps::Steps;
use super::{Image, Logger, flat, spec_of};
use crate::engine::{Engine, Handler, HandlerSpec, Log};
use crate::error::{Error, Result};
use crate::event::Event;
use crate::event_filter::Events;

/// How long the end of a run waits for values that are not sent yet.
const AT_THE_END: Duration = Duration::from_secs(10);

/// Sends metrics, parameters, tags and files to an MLflow server: ignite's `MLflowLogger`, with its names (`training
/// loss`, `lr group_0`: a space where other loggers have a slash).
///
/// A thread of its own talks to the server, so logging costs a push onto a queue. Values are sent together, once a
/// second or when there are a thousand. **The network never stops or delays a run.** Values that cannot be sent are
/// tried again, in the end every ten seconds. Meanwhile the queue keeps 10,000 values and 64 MiB of files; further
/// values, and values that the server refuses, are dropped and counted. [`close`](Self::close) says what was lost. If
/// the logger is attached to an engine, each end of a run waits at most ten seconds for values that are not sent yet,
/// and losses are among the [`warnings`](crate::engine::Summary::warnings) of the run. Only the start needs the server.
///
/// MLflow cannot remove values, so a run that is resumed does not send again what is there. A checkpoint notes the
/// MLflow run and the last step of each metric. Steps that were logged after it, by this process or by an earlier one
/// (go on with its run by [`run_id`](MLflowBuilder::run_id)), are left out when they are done again: each is there once,
/// with the value that it had first. The summary of the resumed run warns of that, and if another MLflow run is logged to
/// now.
///
/// When the logger is closed, or the last clone is dropped, the run is marked as finished. It is marked as failed if
/// the last run of the engine it is attached to ended in an error, or the thread is panicking.
///
/// MLflow has no place for histograms, so they are left out. Pictures and texts become artifacts
/// (`images/TAG/STEP.png`, `texts/TAG/STEP.txt`), if the server takes artifacts itself, as `mlflow server` does by
/// default.
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

crate::debug::opaque_debug!(MLflowLogger);

/// The MLflow run. It ends when the last clone of the logger is dropped.
struct Run {
    id: String,
    queue: Arc<Queue>,
    worker: Mutex<Option<JoinHandle<()>>>,
    /// How long the end of a run that `terminate` ends may wait. COMPLETED may follow TERMINATE, and both are one end.
    until: Mutex<Option<Instant>>,
    steps: Mutex<Steps>,
}

impl MLflowLogger {
    /// Starts a run in the experiment `Default` of this server.
    ///
    /// # Errors
    /// The address is not valid, or no MLflow server answers; the text has address and reason.
    pub fn new(tracking_uri: impl Into<String>) -> Result<Self> {
        Self::builder(tracking_uri).start()
    }

    /// Makes a builder, with settings for the run.
    pub fn builder(tracking_uri: impl Into<String>) -> MLflowBuilder {
        MLflowBuilder::new(tracking_uri.into())
    }

    /// The id of the run at the server.
    pub fn run_id(&self) -> &str {
        &self.0.id
    }

    /// Logs a parameter of the run. MLflow keeps the first value of each parameter.
    pub fn log_param(&self, name: &str, value: impl ToString) {
        let value = value.to_string();
        self.push_named(name, value.len(), 6000, |name| Item::Param(name, value));
    }

    /// Logs all values of a configuration as parameters, nested ones as `optimizer/lr`.
    ///
    /// # Errors
    /// The configuration cannot be written as JSON.
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

    /// Stores a file with the run, under this path. The bytes are kept in memory until they are sent.
    ///
    /// # Errors
    /// The path is not valid: it has empty parts, `..`, or characters other than letters, digits and `_-. /`.
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

    /// Sends what is left, for ten seconds at most, and marks the run as finished. Values that are logged afterwards
    /// are lost.
    ///
    /// # Errors
    /// Values were lost; the text says how many, and the last reason.
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

/// Whether MLflow allows the character in names.
fn is_allowed(c: char) -> bool {
    c.is_alphanumeric() || "_-. :/".contains(c)
}

/// The tag as a part of a path, with other characters replaced by `_`.
fn path_of(tag: &str) -> String {
    let parts = tag.split('/').filter(|part| !matches!(*part, "" | "." | ".."));
    let allowed = |c| if is_allowed(c) && c != ':' { c } else { '_' };
    let parts: Vec<String> = parts.map(|part| part.chars().map(allowed).collect()).collect();
    parts.join("/")
}

/// The time in milliseconds since 1970.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_millis() as u64)
}

impl Run {
    fn steps(&self) -> MutexGuard<'_, Steps> {
        self.steps.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn end(&self) {
        let worker = self.worker.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(worker) = worker
            && self.queue.end(AT_THE_END)
        {
            // The thread has done its last request.
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
        if !self.0.steps().takes(&name, step) {
            return Ok(());
        }
        self.push_named(&name, 0, 0, |name| Item::Metric { name, value, step, time: now() });
        Ok(())
    }

    fn text(&self, tag: &str, text: &str, step: u64) -> Result<()> {
        self.log_artifact(&format!("texts/{}/{step}.txt", path_of(tag)), text)
    }

    fn image(&self, tag: &str, image: &Image, step: u64) -> Result<()> {
        self.log_artifact(&format!("images/{}/{step}.png", path_of(tag)), image.png.as_slice())
    }

    /// Lets the thread send everything soon, and does not wait for it.
    fn flush(&self) -> Result<()> {
        self.0.queue.hurry();
        Ok(())
    }

    fn logs(&self) -> Vec<Rc<dyn Log>> {
        vec![Rc::new(self.clone())]
    }
}

/// A checkpoint does not wait for the server, and nothing is removed from the server.
impl Log for MLflowLogger {
    fn path(&self) -> PathBuf {
        "MLflow".into()
    }

    fn commit(&self) -> Result<Value> {
        self.0.queue.hurry();
        Ok(json!({"run": self.run_id(), "last steps": self.0.steps().last()}))
    }

    fn rewind(&self, place: &Value) -> Result<Option<String>> {
        // Older versions noted the run alone.
        let then = place["run"].as_str().or(place.as_str()).unwrap_or_default();
        if then != self.run_id() {
            return Ok(Some(format!(
                "what was logged until then is in MLflow run {then}: MLflowBuilder::run_id goes on with it"
            )));
        }
        let goes_over = self.0.steps().rewind(place["last steps"].as_object());
        Ok(goes_over.then(|| {
            "MLflow takes nothing back: steps that are done again keep the values that are there".into()
        }))
    }
}

impl<C, B, O> Handler<C, B, O> for MLflowLogger {
    fn spec(&self) -> Result<HandlerSpec> {
        Ok(spec_of(self, format!("MLflow run {}", self.run_id()), &Events::none()))
    }

    fn call(
        &mut self,
        event: Event,
        _cx: &mut C,
        engine: &mut Engine<'_, C, B, O>,
    ) -> anyhow::Result<()> {
        let queue = &self.0.queue;
        queue.set_failed(event == Event::ExceptionRaised);
        let mut until = self.0.until.lock().unwrap_or_else(PoisonError::into_inner);
        let begun = until.take().filter(|_| event == Event::Completed);
        if event != Event::Started {
            let end = begun.unwrap_or_else(|| Instant::now() + AT_THE_END);
            queue.wait(end);
            *until = (event == Event::Terminate).then_some(end);
        }
        // A run that fails has no summary for a warning.
        if !matches!(event, Event::Started | Event::ExceptionRaised)
            && let Some(trouble) = queue.untold_trouble()
        {
            engine.warn(trouble);
        }
        Ok(())
    }
}
