//! All that needs no process of its own: one program, because each links libtorch.
//!
//! Tests run side by side and share libtorch's generator of random numbers, so none of them may rely on a
//! seed: those that do are in `tests/checkpoints`, and what ends processes or sends signals is in `tests/kill.rs`.

#[path = "../common/mod.rs"]
mod common;

mod bad_input;
mod data_loader;
mod handlers;
mod host_syncs;
mod ignite_names;
mod metrics;
mod metrics_behaviour;
mod metrics_reference;
#[cfg(feature = "mlflow")]
mod mlflow;
mod optimizer;
mod report;
#[cfg(feature = "toml")]
mod schedule_files;
mod schedule_properties;
mod schedule_state;
mod schedules;
mod training_aids;
