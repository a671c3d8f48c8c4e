//! Mixed precision: [`autocast`] and [`GradScaler`].

mod autocast;
mod grad_scaler;

pub use autocast::{autocast, without_autocast};
pub use grad_scaler::GradScaler;
pub(crate) use grad_scaler::Saved;
