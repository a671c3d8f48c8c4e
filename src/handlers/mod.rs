//! Handlers that come with the crate.

mod evaluate;
mod files;
mod history;
#[cfg(feature = "plots")]
mod plot;
#[cfg(feature = "progress")]
mod progress_bar;

pub use evaluate::Evaluate;
pub use history::History;
#[cfg(feature = "progress")]
pub use progress_bar::ProgressBar;
