//! Handlers that come with the crate.

mod ema;
mod evaluate;
mod files;
mod history;
mod lr_finder;
#[cfg(feature = "plots")]
pub mod plot;
#[cfg(feature = "progress")]
mod progress_bar;
mod shadow;
mod swa;

pub use ema::EMAHandler;
pub use evaluate::Evaluate;
pub use history::History;
pub use lr_finder::{LrCurve, LrFinder, StepMode};
#[cfg(feature = "progress")]
pub use progress_bar::ProgressBar;
pub use shadow::{Buffers, Swapped, WithAverages};
pub use swa::SWAHandler;
