//! Where the numbers and pictures of a run go, and the handlers that send them there.
//!
//! **Logs have no holes.** The handlers here flush their logger with each checkpoint of the engine and at every end of a
//! run, before `run` returns, so that a program may call `std::process::exit` then. When a run is resumed, what its log has
//! from after the checkpoint is taken back, so that each step is there once; a line that a killed process left unfinished
//! is cut. What you log yourself, in a closure, is part of that where a clone of the logger is attached to the engine.
//! Within a run, what is logged is on the disk some seconds later. Two processes cannot write to one log, and a log that
//! is removed while a run writes to it is an error of that run.
//!
//! A [`RunFolder`] has everything of a run in one place: [`TensorBoard`]'s event file, a CSV table,
//! JSON lines, and a report for the browser. Each exists alone too. `MLflowLogger` (feature `mlflow`)
//! sends it to a server. What is logged is said by
//! handlers, with ignite's names and tags:
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

use crate::engine::{Engine, Log, State};
use crate::error::Result;
use crate::event::Event;
use crate::event_filter::Events;

/// Takes what is logged. Those of this crate are cheap clones that share one file.
///
/// What a logger has no place for it leaves out.
pub trait Logger {
    /// A number at a step.
    fn scalar(&self, tag: &str, value: f64, step: u64) -> Result<()>;

    /// How many values of a tensor lie where.
    fn histogram(&self, _tag: &str, _values: &Histogram, _step: u64) -> Result<()> {
        Ok(())
    }

    /// A text.
    fn text(&self, _tag: &str, _text: &str, _step: u64) -> Result<()> {
        Ok(())
    }

    /// A picture.
    fn image(&self, _tag: &str, _image: &Image, _step: u64) -> Result<()> {
        Ok(())
    }

    /// Writes what is buffered.
    fn flush(&self) -> Result<()> {
        Ok(())
    }

    /// A run begins that will write to this: with `anew` from its start, otherwise it goes on with an earlier one.
    fn begin(&self, _anew: bool) -> Result<()> {
        Ok(())
    }

    /// What of it goes back when a run is resumed from a checkpoint: see [`Log`].
    fn logs(&self) -> Vec<Box<dyn Log>> {
        vec![]
    }
}

/// How a run may end.
const ENDS: [Event; 4] =
    [Event::Terminate, Event::Completed, Event::ExceptionRaised, Event::Interrupt];

/// A handler's own events, and those at which its logger is told that the run begins, or ends.
fn with_ends(own: &Events) -> Events {
    let missing = [Event::Started].into_iter().chain(ENDS).filter(|event| !own.names(*event));
    missing.fold(own.clone(), |events, event| events | event)
}

/// What each handler does that writes to a logger: `log` at its own events, in between what [`with_ends`] is for.
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

/// A logger that is attached to an engine: for what a program logs itself, without one of the handlers.
macro_rules! logger_as_handler {
    ($logger:ident, $name:literal) => {
        /// Attached, it is flushed at each end of a run, and is part of the engine's checkpoints, as by the handlers that
        /// write to it: for what you log yourself.
        impl<C, B, O> crate::engine::Handler<C, B, O> for $logger {
            fn name(&self) -> String {
                $name.into()
            }

            fn ranks(&self) -> crate::engine::Ranks {
                crate::engine::Ranks::Main
            }

            fn events(&self) -> crate::event_filter::Events {
                super::with_ends(&crate::event_filter::Events::none())
            }

            fn priority(&self) -> crate::engine::Priority {
                crate::engine::Priority::Last
            }

            fn logs(&self) -> Vec<Box<dyn Log>> {
                Logger::logs(self)
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

/// `tag/name`, or `name` where there is no tag.
fn tagged(tag: &str, name: &str) -> String {
    if tag.is_empty() { name.to_owned() } else { format!("{tag}/{name}") }
}

/// Events of the loggers' handlers, unless told otherwise.
fn each_epoch() -> Events {
    Event::EpochCompleted.into()
}
