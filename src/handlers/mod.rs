//! Handlers that come with the crate.

mod evaluate;
pub(crate) mod files;
mod history;
#[cfg(feature = "signals")]
mod interrupt_on;
mod lr_finder;
#[cfg(feature = "plots")]
pub mod plot;
#[cfg(feature = "progress")]
mod progress_bar;

pub use evaluate::Evaluate;
pub use history::History;
#[cfg(feature = "signals")]
pub use interrupt_on::InterruptOn;
pub use lr_finder::{LrCurve, LrFinder, StepMode};
#[cfg(feature = "progress")]
pub use progress_bar::ProgressBar;
