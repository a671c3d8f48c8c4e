//! Checkpoints: everything that a run needs to go on exactly, in one file.
//!
//! [`Checkpoint`] writes them while an engine runs, and [`Engine::resume`](crate::engine::Engine::resume) goes on from
//! the newest. A file is a safetensors file, so any program that knows the format can read it:
//!
//! ```python
//! from safetensors import safe_open
//! with safe_open("checkpoint_1000.safetensors", "pt") as file:
//!     weight = file.get_tensor("model/conv1.weight")
//!     moment = file.get_tensor("optimizer/conv1.weight/exp_avg")
//! ```
//!
//! In Rust, [`load_part`] loads only the model from a checkpoint, and [`load_best`] that of the best score.
//!
//! Values (the position, hyper-parameters, the state of schedulers) are JSON in the metadata, under `state`; a CRC-32C
//! of the file is there too. NaN and infinities, which JSON does not have, are objects such as `{"$f64": "NaN"}`.
//! Tensors in channels-last format are written in the usual order, and get their strides back.
//!
//! The position in the data is counted in samples where the source can do that, as both loaders can, so the batch size
//! may change; elsewhere it is counted in batches. When the data has changed (its length, batch size, seeds), the
//! summary of the run says so. A batch that was under way is fetched again, without the changes that handlers of
//! `GET_BATCH_COMPLETED` made to it: make such changes in the data.
//!
//! `state.output` is saved after [`Engine::track_output`](crate::engine::Engine::track_output), which the supervised
//! trainer calls; handlers that read it at the end of an epoch need that. Gradients are saved where they are
//! [tracked](SavedGradients). What belongs to the process is not saved: deadlines, progress bars, the count of samples that
//! a loader left out.
//!
//! A damaged or hostile file is an error. Reading takes the memory of the tensors' elements, and at most 150 MB
//! besides. Nothing in a file is executed, and no path in it is followed. Of the files that a checkpoint lists, only
//! those are ever removed that carry the stamp of its run. Pipes and links in the folder are neither waited for nor
//! followed.
//!
//! These go on bit for bit: parameters, buffers, the optimizer's state, schedules, metrics, the data's order and
//! position, and the random numbers of libtorch's default generators on the CPU and CUDA. These do not: kernels that
//! are not deterministic themselves, and random numbers on another kind of device than the one they were saved from.

mod best;
mod filename;
mod folder;
mod format;
mod handler;
mod header;
mod resume;
mod retention;
mod score;
mod writer;

pub use crate::state::{
    EvaluationWeights, IntoStateful, Saveable, SavedGradients, StateDict, Stateful,
};
pub use best::{best_checkpoint, load_best};
pub use filename::setup_filename_pattern;
pub(crate) use folder::Folder;
pub use handler::Checkpoint;
pub use resume::{
    IncompatibleKeys, Resumed, load_part, load_weights, load_weights_with, read_state,
    save_weights, verify, write_state,
};
pub use score::{Mode, Score};
