//! Handlers that come with the crate.

mod evaluate;

pub use evaluate::Evaluate;
