//! Training loops for [`tch`].
#![doc = include_str!("docs.md")]
mod bridge;
pub mod data;
pub mod engine;
mod error;
pub mod handlers;
pub mod metrics;
pub mod optim;
pub mod schedule;
pub mod supervised;

pub use error::{Error, Panicked, Result};
pub use tch;

fn panic_message(payload: &(dyn std::any::Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().map(|text| text.to_string());
    text.or_else(|| payload.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "no message".into())
}
