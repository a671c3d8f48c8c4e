//! Real processes that train together, and some that die.

#![cfg(unix)]

#[path = "distributed/collectives.rs"]
mod collectives;
#[path = "distributed/data_parallel.rs"]
mod data_parallel;
#[path = "distributed/failures.rs"]
mod failures;
#[path = "distributed/interop.rs"]
mod interop;
#[path = "distributed/ranks.rs"]
mod ranks;
