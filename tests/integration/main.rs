//! The tests that need no process of their own. They are one program, because each program links libtorch, which
//! takes long.
//!
//! Tests run side by side and share libtorch's generator of random numbers, so none of them may rely on a seed: tests
//! that do are in `tests/checkpoints`, and tests that end processes or send signals are in `tests/kill.rs`.

#[path = "../common/mod.rs"]
mod common;

mod bad_input;
mod batch_samplers;
mod chargpt;
mod closures;
mod data_loader;
mod data_splits;
mod engine_values;
mod handlers;
mod host_syncs;
mod ignite_names;
mod ignite_schedulers;
mod image_folder;
mod low_precision;
mod metrics;
mod metrics_behaviour;
mod metrics_reference;
#[cfg(feature = "mlflow")]
mod mlflow;
mod optimizer;
#[cfg(feature = "toml")]
mod optimizer_plan;
mod pages;
mod ready_trainer;
mod report;
#[cfg(feature = "toml")]
mod schedule_files;
mod schedule_free;
mod schedule_properties;
mod schedule_state;
mod schedules;
mod streams;
mod training_aids;
mod transforms;
mod wrong_arguments;
