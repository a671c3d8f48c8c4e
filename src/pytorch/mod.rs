//! Reads the files that `torch.save` writes, and writes files that `torch.load` reads, without Python.
//!
//! ```
//! # let folder = tempfile::tempdir()?;
//! # let path = folder.path().join("model.pt");
//! # pytorch::save_weights(&{ let vs = nn::VarStore::new(Device::Cpu); let _ = nn::linear(vs.root() / "fc", 2, 3, Default::default()); vs }, &path, &Names::new())?;
//! use tch::{Device, nn};
//! use tch_ignite::pytorch::{self, Names};
//! let vs = nn::VarStore::new(Device::Cpu);
//! let fc = nn::linear(vs.root() / "fc", 2, 3, Default::default());
//! // Python wrote it: torch.save(model.state_dict(), "model.pt")
//! println!("{}", pytorch::load_weights(&vs, &path, &Names::new())?);
//! // Python reads it: model.load_state_dict(torch.load("model.pt"))
//! pytorch::save_weights(&vs, &path, &Names::new())?;
//! # Ok::<(), anyhow::Error>(())
//! ```
//!
//! [`read`] gives the whole content of a `.pt`, `.pth` or `.ckpt` as a [`Value`], of both containers: the zip archive
//! that torch writes since 1.6, and the one before. [`write()`] writes one. [`Weights`] are what a `state_dict()`
//! holds; [`Names`] map their names to those of a store. [`load_optimizer`] takes over `optimizer.state_dict()`,
//! [`load_scheduler`] and [`load_plateau`] the position of a scheduler, [`load_grad_scaler`] the scale of losses,
//! [`load_ema`] and [`load_swa`] averages of weights, [`set_rng_state`] the random numbers.
//! [`TrainingFile`] finds these parts in a training checkpoint of ignite, of Lightning or of a program's own layout; each
//! has a counterpart that writes (`…_value`), and [`LightningCheckpoint`] puts them together as Lightning has them.
//! [`read_pretrained`] and [`SavePretrained`] are for folders of Hugging Face, [`ScriptModule`] for TorchScript.
//!
//! # Safety of files from elsewhere
//!
//! A pickle is a program, and Python runs it. Here it is only read: a machine of about forty opcodes builds
//! plain data, and the names it may use are those of `torch.load(weights_only=True)`. Any other name is an error
//! that lists it. A size in a file is believed only once the bytes are there: reading takes memory for the
//! tensors that are asked for, which is no more than the file, and for the rest at most as much again and 64 MiB
//! ([`Reader::max_memory`]). Parts of an archive may not overlap, tensors may not reach outside their storages,
//! containers may not be within themselves or more than 200 deep. Checksums are compared where the writer made them;
//! the old container has none.
//!
//! # Memory
//!
//! [`read`] reads the description alone. The elements of a tensor are read once, when the caller asks for the tensor,
//! by a few threads and straight to where they stay: [`Weights::load`] reads into the store's own memory. The file is
//! not mapped into memory, because a mapped file that somebody cuts off meanwhile would end the process.
//!
//! # What is not built
//!
//! Sparse, quantized and nested tensors come out as [`Value::Object`], with everything the file says of them.
//! Attributes that Python code set on its tensors are left out. All tensors are on the CPU.

mod averages;
mod budget;
mod distributed_checkpoint;
mod dtype;
mod freeze;
mod globals;
mod grad_scaler;
mod json;
mod lbfgs;
mod legacy;
mod lightning;
mod machine;
mod names;
mod optimizer;
mod pickler;
mod plateau;
mod position;
mod prefixes;
mod pretrained;
mod random;
mod reader;
mod safetensors;
mod schedule_value;
mod schedules;
mod script_module;
mod source;
mod storage;
mod storages;
mod tensor;
mod training_file;
mod value;
mod weights;
mod writer;
mod zip;

use std::path::Path;

pub use averages::{ema_value, load_ema, load_swa, swa_value};
pub use dtype::DType;
pub use grad_scaler::{grad_scaler_value, load_grad_scaler};
pub use lightning::LightningCheckpoint;
pub use names::Names;
pub use optimizer::{LoadedOptimizer, load_optimizer, optimizer_value};
pub use plateau::{load_plateau, plateau_value};
pub use position::position_value;
pub use pretrained::{SavePretrained, read_pretrained};
pub use random::{rng_state, set_rng_state};
pub use reader::Reader;
pub use schedule_value::{ignite_scheduler_value, scheduler_value};
pub use schedules::{load_scheduler, momentum_schedule, schedule};
pub use script_module::ScriptModule;
pub use tensor::StoredTensor;
pub use training_file::{Layout, TrainingFile};
pub use value::{BigInt, Dict, Object, Value};
pub use weights::{Loaded, Weights, load_weights, save_weights};
pub use writer::write;

use crate::error::Result;

/// Reads a file of `torch.save`: see [`Reader`].
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let path = folder.path().join("checkpoint.pt");
/// # let mut checkpoint = pytorch::Dict::new();
/// # checkpoint.insert("epoch", 3);
/// # checkpoint.insert("betas", Value::tuple([0.9, 0.99]));
/// # checkpoint.insert("weight", Value::tensor(&tch::Tensor::from_slice(&[1f32, 2.]))?);
/// # pytorch::write(&path, &checkpoint.into())?;
/// use tch_ignite::pytorch::{self, Value};
/// let checkpoint = pytorch::read(&path)?;
/// let epoch = checkpoint.require("epoch")?.as_i64();
/// let weight = checkpoint.get("weight").and_then(Value::as_tensor).map(|stored| stored.tensor()).transpose()?;
/// checkpoint.walk(&mut |path, value| println!("{path}: {}", value.type_name()));
/// # assert_eq!((epoch, weight.map(|weight| weight.size())), (Some(3), Some(vec![2])));
/// # Ok::<(), anyhow::Error>(())
/// ```
///
/// # Errors
/// As [`Reader::read`].
pub fn read(path: impl AsRef<Path>) -> Result<Value> {
    Reader::new().read(path)
}
