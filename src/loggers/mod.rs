//! Loggers for the numbers and pictures of a run, and the handlers that log them.
//!
//! **Logs have no holes.** The handlers here flush their logger with each checkpoint of the engine and at every end of
//! a run, before `run` returns, so that a program may then call `std::process::exit`. When a run is resumed, everything
//! logged after the checkpoint is removed from the log, so that each step is there once; a line that a killed process
//! left unfinished is cut. The same holds for what you log yourself in a closure, if a clone of the logger is attached
//! to the engine. Within a run, logged values are on the disk some seconds later. Two processes cannot write to one
//! log, and a log that is removed while a run writes to it is an error of that run.
//!
//! A [`RunFolder`] has everything of a run in one place: the event file of [`TensorBoard`], a CSV table, JSON lines,
//! and a report for the browser. Each of these can be used alone, too. `MLflowLogger` (feature `mlflow`) sends values
//! to a server. Handlers choose what is logged, with ignite's names and tags:
//!
//! | handler | tag |
//! |---|---|
//! | [`OutputHandler`] | `training/loss`: metrics, parts of the output, knobs |
//! | [`OptimizerParamsHandler`] | `lr/group_0` |
//! | [`WeightsScalarHandler`], [`GradsScalarHandler`] | `weights_norm/fc/weight`, `grads_norm/fc/weight` |
//! | [`WeightsHistHandler`], [`GradsHistHandler`] | `weights/fc/weight`, `grads/fc/weight` |
//!
//! ```
//! use tch_ignite::engine::{Engine, Event, Until};
//! use tch_ignite::loggers::{OutputHandler, RunFolder};
//! use tch_ignite::metrics::RunningAverage;
//!
//! # let folder = std::env::temp_dir().join(format!("tch-ignite-loggers-{}", std::process::id()));
//! let run = RunFolder::create(&folder)?;
//! run.config(&serde_json::json!({"batch_size": 64, "lr": 0.1}))?;
//! let mut trainer = Engine::new(|_: &mut (), _, loss: f64| Ok(loss));
//! trainer
//!     .metric("loss", RunningAverage::new())
//!     .attach(OutputHandler::new(&run, "training", Event::IterationCompleted.every(2)).metric("loss"))
//!     .attach(run.clone());
//! trainer.run(&mut (), vec![0.5; 10], Until::epochs(2))?;
//! assert!(std::fs::read_to_string(folder.join("report.html"))?.contains("training/loss"));
//! # std::fs::remove_dir_all(folder)?;
//! # Ok::<(), anyhow::Error>(())
//! ```

mod append;
mod chart;
mod csv;
mod curve;
mod flat;
mod histogram;
mod image;
mod json_lines;
#[cfg(feature = "mlflow")]
mod mlflow;
mod optimizer_params_handler;
mod output_handler;
mod parameter_handlers;
mod png;
mod protobuf;
mod report;
mod run_folder;
mod tensorboard;

pub use self::csv::CsvLogger;
pub use self::histogram::Histogram;
pub use self::image::Image;
pub use self::json_lines::JsonLinesLogger;
#[cfg(feature = "mlflow")]
pub use self::mlflow::{MLflowBuilder, MLflowLogger};
pub use self::optimizer_params_handler::OptimizerParamsHandler;
pub use self::output_handler::OutputHandler;
pub use self::parameter_handlers::{
    GradsHistHandler, GradsScalarHandler, WeightsHistHandler, WeightsScalarHandler,
};
pub use self::run_folder::RunFolder;
pub use self::tensorboard::{HyperParameter, TensorBoard};

use std::rc::Rc;

use crate::engine::{Engine, HandlerSpec, Log, Priority, Ranks, State};
use crate::error::Result;
use crate::event::Event;
use crate::event_filter::Events;

/// A destination for logged values. The loggers of this crate are cheap clones that share one file.
///
/// A logger ignores kinds of values that it has no place for. An error of a method ends the run.
pub trait Logger {
    /// Logs a number at a step.
    ///
    /// # Errors
    /// The number cannot be written.
    fn scalar(&self, tag: &str, value: f64, step: u64) -> Result<()>;

    /// Logs a histogram of a tensor's values at a step.
    ///
    /// # Errors
    /// The histogram cannot be written.
    fn histogram(&self, _tag: &str, _values: &Histogram, _step: u64) -> Result<()> {
        Ok(())
    }

    /// Logs a text at a step.
    ///
    /// # Errors
    /// The text cannot be written.
    fn text(&self, _tag: &str, _text: &str, _step: u64) -> Result<()> {
        Ok(())
    }

    /// Logs a picture at a step.
    ///
    /// # Errors
    /// The picture cannot be written.
    fn image(&self, _tag: &str, _image: &Image, _step: u64) -> Result<()> {
        Ok(())
    }

    /// Writes what is buffered.
    ///
    /// # Errors
    /// The log cannot be written.
    fn flush(&self) -> Result<()> {
        Ok(())
    }

    /// Notes that a run begins that will write to this logger. With `anew` it starts from the beginning, otherwise it
    /// goes on with an earlier run.
    ///
    /// # Errors
    /// The log cannot be written.
    fn begin(&self, _anew: bool) -> Result<()> {
        Ok(())
    }

    /// The logs that are rewound when a run is resumed from a checkpoint: see [`Log`].
    fn logs(&self) -> Vec<Rc<dyn Log>> {
        vec![]
    }
}

/// The events at which a run may end.
const ENDS: [Event; 4] =
    [Event::Terminate, Event::Completed, Event::ExceptionRaised, Event::Interrupt];

/// The description of a handler that writes to a logger. Besides at its own events the handler is called where its
/// logger has to know that the run begins or ends.
fn spec_of(logger: &dyn Logger, name: impl Into<String>, own: &Events) -> HandlerSpec {
    let missing = [Event::Started].into_iter().chain(ENDS).filter(|event| !own.names(*event));
    let events = missing.fold(own.clone(), |events, event| events | event);
    let spec = HandlerSpec::new(name, events).priority(Priority::Last);
    spec.ranks(Ranks::Main).logs(logger.logs())
}

/// The common part of all handlers that write to a logger: tells the logger of the beginning and the end of a run, and
/// calls `log` at the handler's own events.
fn attend<C, B, O>(
    logger: &dyn Logger,
    own: &Events,
    event: Event,
    engine: &mut Engine<'_, C, B, O>,
    log: impl FnOnce(&mut Engine<'_, C, B, O>) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    if event == Event::Started {
        logger.begin(engine.began_anew())?;
    }
    if own.names(event) {
        log(engine)?;
    }
    if ENDS.contains(&event) {
        logger.flush()?;
    }
    Ok(())
}

/// Makes a logger a handler, for programs that log values themselves.
macro_rules! logger_as_handler {
    ($logger:ident, $name:literal) => {
        /// An attached logger is flushed at each end of a run and is part of the engine's checkpoints. Attach it if you
        /// log values yourself; the handlers that write to it do the same.
        impl<C, B, O> crate::engine::Handler<C, B, O> for $logger {
            fn spec(&self) -> Result<crate::engine::HandlerSpec> {
                Ok(super::spec_of(self, $name, &crate::event_filter::Events::none()))
            }

            fn call(
                &mut self,
                event: crate::event::Event,
                _cx: &mut C,
                engine: &mut crate::engine::Engine<'_, C, B, O>,
            ) -> anyhow::Result<()> {
                let none = crate::event_filter::Events::none();
                super::attend(self, &none, event, engine, |_| Ok(()))
            }
        }
    };
}
use logger_as_handler;

/// The step to log under: the epoch at epoch events, the iteration at all others.
fn step_at<B, O>(event: Event, state: &State<B, O>) -> u64 {
    state.get_event_attrib_value(event).unwrap_or(state.iteration)
}

/// The tag `tag/name`, or `name` where `tag` is empty.
fn tagged(tag: &str, name: &str) -> String {
    if tag.is_empty() { name.to_owned() } else { format!("{tag}/{name}") }
}

/// The default events of the loggers' handlers.
fn each_epoch() -> Events {
    Event::EpochCompleted.into()
}
