//! Handlers that come with the crate.

mod evaluate;
pub(crate) mod files;
mod history;
mod lr_finder;
#[cfg(feature = "plots")]
pub mod plot;
#[cfg(feature = "progress")]
mod progress_bar;

pub use evaluate::Evaluate;
pub use history::History;
pub use lr_finder::{LrCurve, LrFinder, StepMode};
#[cfg(feature = "progress")]
pub use progress_bar::ProgressBar;
