//! Models that PyTorch compiled, trained without Python.
//!
//! `scripts/export_step.py` exports a model of Python once, with its loss and backward: PyTorch's AOTInductor makes
//! machine code of them. [`CompiledModel`] loads the folder, puts the parameters and buffers into a store under their
//! names in Python, and runs training steps whose loss has a backward as any other: so optimizers, clipping, accumulation,
//! `GradScaler`, averages, checkpoints and data-parallel ranks need not know of it.
//!
//! ```no_run
//! use tch::{Device, nn};
//! use tch_ignite::compiled::CompiledModel;
//! use tch_ignite::prelude::*;
//! # fn main() -> anyhow::Result<()> {
//! # let data = Loader::new(&tch::Tensor::zeros([4, 8], tch::kind::FLOAT_CPU), &tch::Tensor::zeros([4], tch::kind::INT64_CPU), 4)?;
//! // Python wrote it: python scripts/export_step.py net.py:example net
//! let vs = nn::VarStore::new(Device::Cpu);
//! let net = CompiledModel::load("net", &vs.root())?;
//! let optimizer = Optimizer::adam(&vs).build()?;
//! let mut cx = Supervised::compiled(net, optimizer);
//! let mut trainer = create_supervised_trainer();
//! trainer.track("model", &vs).track("optimizer", &cx.optimizer);
//! trainer.run(&mut cx, &data, Until::epochs(3))?;
//! # Ok(())
//! # }
//! ```
//!
//! # Trust
//!
//! A package holds machine code: loading it runs it, with all rights of the process. Nothing loads one but
//! [`CompiledModel::load`], from the folder that the program names. Checkpoints hold values only, so resuming from one runs
//! no code of it. Load no folder that you would not run a program from; while it loads, PyTorch unpacks it into the
//! system's folder for temporary files.

mod manifest;
mod model;
mod processor;

pub use model::{CompiledModel, StepOutput};
