//! Handlers that come with the crate.

mod early_stopping;
mod epoch_output_store;
mod evaluate;
pub(crate) mod files;
mod history;
mod lr_finder;
#[cfg(feature = "plots")]
pub mod plot;
#[cfg(feature = "progress")]
mod progress_bar;
mod terminate_on_nan;
mod time_limit;
mod timer;

pub use early_stopping::EarlyStopping;
pub use epoch_output_store::EpochOutputStore;
pub use evaluate::Evaluate;
pub use history::History;
pub use lr_finder::{LrCurve, LrFinder, StepMode};
#[cfg(feature = "progress")]
pub use progress_bar::ProgressBar;
pub use terminate_on_nan::{Numbers, TerminateOnNan};
pub use time_limit::TimeLimit;
pub use timer::Timer;
