//! Tests of saving and restoring. Checkpoints hold the state of libtorch's generator, which all threads share: tests
//! that draw from it or restore it take turns (`common::serial`).

#[path = "../common/mod.rs"]
mod common;

mod checkpoint;
mod checkpoint_files;
mod checkpoint_folder;
mod stateful;
