//! Where the numbers and pictures of a run go, and the handlers that send them there.
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

use crate::Result;
use crate::engine::{Event, Events, State};

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
}

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
