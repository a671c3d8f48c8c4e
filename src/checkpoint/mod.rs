//! Checkpoints: everything that a run needs to go on exactly, in one file.
//!
//! [`Checkpoint`] writes them while an engine runs, [`Engine::resume`](crate::engine::Engine::resume)
//! goes on from the newest. A file is safetensors and can be read by any program that knows that:
//!
//! ```python
//! from safetensors import safe_open
//! with safe_open("checkpoint_1000.safetensors", "pt") as file:
//!     weight = file.get_tensor("model/conv1.weight")
//!     moment = file.get_tensor("optimizer/conv1.weight/exp_avg")
//! ```
//!
//! In Rust [`load_part`] takes the model alone out of one.
//!
//! Values (the position, hyper-parameters, the schedulers' state) are JSON in its metadata, under
//! `state`; a CRC-32C of everything is there too. NaN and infinities, which JSON does not have, are objects
//! such as `{"$f64": "NaN"}`. Tensors with channels last are in the usual order, and get their strides back.
//!
//! The place in the data is counted in samples where the source does that, as both loaders do, so the batch
//! size may change; in batches elsewhere. When the data is not what it was (its length, batch size, seeds),
//! the summary of the run says so. A batch that was under way is fetched again, without what handlers of
//! `GET_BATCH_COMPLETED` made of it: do that in the data.
//!
//! `state.output` is saved after [`Engine::track_output`](crate::engine::Engine::track_output), which the
//! ready trainer has: what reads it at the end of an epoch needs that. Gradients are saved where they are
//! [tracked](Gradients). Not saved is what belongs to the process: deadlines, bars, how many samples a
//! loader left out.
//!
//! A damaged or hostile file is an error. Reading takes the memory of its tensors' elements, and at most
//! 150 MB besides; nothing in it is executed, no path in it is followed, and of the files that it lists only
//! those are ever removed that carry the stamp of its run. Pipes and links in its folder are not waited for
//! nor followed.
//!
//! What goes on bit for bit: parameters, buffers, the optimizer's state, schedules, metrics, the data's
//! order and position, random numbers of libtorch's default generators on the CPU and CUDA. What does
//! not: kernels that are not deterministic themselves, and random numbers on another kind of device
//! than the one they were saved from.

mod filename;
mod folder;
mod format;
mod handler;
mod header;
mod resume;
mod writer;

pub use crate::state::{Gradients, IntoStateful, Saveable, StateDict, Stateful};
pub use filename::setup_filename_pattern;
pub(crate) use folder::Folder;
pub use handler::{Checkpoint, Mode, Score};
pub use resume::{
    IncompatibleKeys, Resumed, load_part, load_weights, load_weights_with, read_state,
    save_weights, verify, write_state,
};
