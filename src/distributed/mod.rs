//! Training by many processes, on one machine or several, through libtorch's own c10d, which `torch.distributed` and
//! Python's `DistributedDataParallel` use too. Needs the feature `distributed`.
//!
//! Each process runs the same program. [`ProcessGroup::from_env_or_single`] finds the other processes by the variables
//! that torchrun, mpirun, Slurm or a shell loop sets. A process that runs alone is a group of one, in which all
//! operations are identities.
//!
//! ```
//! use tch::{Device, Kind, Tensor};
//! use tch_ignite::distributed::{ProcessGroup, ProcessGroupOptions, ReduceOp};
//!
//! let pg = ProcessGroup::from_env_or_single(ProcessGroupOptions::new())?;
//! let sum = Tensor::from_slice(&[1.0f32, 2.0]);
//! pg.all_reduce(&[&sum], ReduceOp::Sum)?; // in place
//! let mut counts = [3.0, 4.0];
//! pg.control().all_reduce_f64(&mut counts, ReduceOp::Sum)?;
//! if pg.is_main() {
//!     println!("{} of {}: {sum} {counts:?}", pg.rank(), pg.world_size());
//! }
//! # assert_eq!(counts, [3.0, 4.0]);
//! # Ok::<(), tch_ignite::Error>(())
//! ```
//!
//! # Order
//! All ranks make the same calls in the same order. If one rank leaves out a call, all ranks get an error after the
//! time-out, and none hangs. The control group compares the calls of all ranks, so that a different call, or a
//! different number of elements, is an error that says so ([`FailureKind::Mismatch`]).
//!
//! # Errors
//! [`Error::Distributed`](crate::Error::Distributed) says what happened, in which operation, and which ranks did not
//! answer. No call waits longer than its time-out. A rank that fails closes its connections, so that the others notice
//! at once, and all of them wait up to 2 seconds for reports from the ranks that are still alive. After such an error
//! the group is dead: return the error from `main`, so that the process ends with a code other than 0 and its launcher
//! ends or restarts the job. Only a difference that the control group found before anything was sent leaves the group
//! alive.

mod control_group;
mod data_parallel;
mod deadline;
mod environment;
mod failure;
mod frame;
#[cfg(unix)]
pub mod launch;
mod options;
mod outputs;
mod process_group;
mod reduce_op;

pub use crate::failure_kind::FailureKind;
pub use control_group::ControlGroup;
pub use data_parallel::{Compression, DdpOptions, DistributedDataParallel, NoSync};
pub use options::{Backend, ProcessGroupOptions};
pub use outputs::Outputs;
pub use process_group::ProcessGroup;
pub use reduce_op::ReduceOp;
