//! Training loops for [tch](https://docs.rs/tch): the engine, events, handlers, metrics and schedulers of
//! pytorch-ignite, on the real libtorch optimizer, with checkpoints from which a run goes on bit for bit.
//!
//! A small convolutional net on digits, with one learning-rate schedule for each parameter group:
//!
//! ```
//! use tch::nn::{self, ModuleT};
//! use tch::{Device, Tensor};
//! use tch_ignite::prelude::*;
//!
//! # fn net(root: nn::Path) -> nn::SequentialT {
//! #     let conv = nn::ConvConfig { stride: 4, ..Default::default() };
//! #     nn::seq_t()
//! #         .add_fn(|x| x.view([-1, 1, 28, 28]))
//! #         .add(nn::conv2d(&root / "conv", 1, 4, 4, conv))
//! #         .add_fn(|x| x.relu().flat_view())
//! #         .add(nn::linear(&root / "fc", 196, 10, Default::default()))
//! # }
//! # fn main() -> anyhow::Result<()> {
//! # let (images, labels) = (Tensor::rand([256, 784], (tch::Kind::Float, Device::Cpu)), Tensor::randint(10, [256], (tch::Kind::Int64, Device::Cpu)));
//! # let (test_images, test_labels) = (images.narrow(0, 0, 64), labels.narrow(0, 0, 64));
//! let device = Device::cuda_if_available();
//! let vs = nn::VarStore::new(device);
//! let net = net(vs.root()); // any tch module, with parameters "conv.…" and "fc.…"
//! let optimizer = Optimizer::sgd(&vs)
//!     .group("base", |name| name.starts_with("conv"), lr(1e-2).momentum(0.9))
//!     .group("fc", |name| name.starts_with("fc"), lr(1e-1))
//!     .build()?; // an error if a parameter is in no group, or in two
//! let train = Loader::new(&images, &labels, 64)?.shuffle(42).to_device(device);
//! let test = Loader::new(&test_images, &test_labels, 64)?.to_device(device);
//!
//! let mut evaluator = create_supervised_evaluator();
//! evaluator.metric("accuracy", Accuracy::of(Prediction::parts));
//!
//! let mut trainer = create_supervised_trainer();
//! trainer
//!     .metric("loss", RunningAverage::new())
//!     .attach(LinearCyclicalScheduler::new(&optimizer, "lr", 1e-2, 1e-3, 8).param_group("base"))
//!     .attach(CosineAnnealingScheduler::new(&optimizer, "lr", 1e-1, 1e-3, 8).param_group("fc"))
//!     .attach(Evaluate::each_epoch("test", evaluator, test))
//!     .on(Event::EpochCompleted, |_, engine| {
//!         let (epoch, metrics) = (engine.state.epoch, &engine.state.metrics);
//!         let (loss, accuracy) = (metrics.get("loss")?, metrics.get("test/accuracy")?);
//!         println!("{epoch}: loss {loss:.3}, accuracy {accuracy:.3}");
//!         Ok(())
//!     });
//! let mut cx = Supervised::new(net, optimizer, |y_pred, y| y_pred.cross_entropy_for_logits(y));
//! println!("{}", trainer.run(&mut cx, &train, Until::epochs(2))?);
//! # Ok(())
//! # }
//! ```
//!
//! The [guide] goes through it page by page, and begins where you come from: [ignite](guide::from_ignite),
//! [Lightning](guide::from_lightning), [a plain loop of tch](guide::from_tch).
//!
//! Where to look:
//!
//! | for | see |
//! |---|---|
//! | the loop, events, filters, budgets | [`engine::Engine`], [`engine::Event`], [`engine::Until`] |
//! | named parameter groups, every hyper-parameter | [`optim::Optimizer`], [`optim::Group`] |
//! | clipping, freezing, groups without weight decay | [`optim::Gradients`], [`optim::Group`], [`optim::is_bias_or_norm`] |
//! | mixed precision | [`amp::autocast`], [`amp::GradScaler`] |
//! | gradient accumulation | [`supervised::Supervised::accumulate`], [`GradientAccumulator`] for a step of your own |
//! | averages of the weights | [`handlers::EMAHandler`], [`handlers::SWAHandler`] |
//! | something a schedule can drive | [`optim::Knob`] |
//! | schedules and their handler | [`schedule`], [`schedule::ParamScheduler`] |
//! | schedules from files | [`schedule::SchedulePlan`] |
//! | metrics that stay on the device, and arithmetic with them | [`metrics`] |
//! | checkpoints, going on bit for bit | [`checkpoint`], [`engine::Engine::resume`] |
//! | batches from memory | [`data::Loader`] |
//! | evaluation, early stopping, history, progress, profiles, a learning rate to start with | [`handlers`] |
//! | TensorBoard, tables, a report for the browser | [`loggers`] |
//! | samples of your own, read by worker threads | [`data::DataLoader`], [`data::Dataset`] |
//! | files of PyTorch, Lightning and Hugging Face; TorchScript | [`pytorch`] |
//! | ready steps for supervised learning | [`supervised`] |
#![cfg_attr(feature = "distributed", doc = "| many processes and machines | [`distributed`] |")]
//!
//! Nothing here waits for the GPU unless its documentation says so: outputs and metrics stay tensors
//! until somebody reads them. [`host_syncs()`] finds what waits in a step of your own; [`keep_freed_memory()`] and
//! [`memory_format`] make training on the CPU faster.

// docs.rs marks what needs a feature.
#![cfg_attr(docsrs, feature(doc_cfg))]
#![deny(
    // Safe code cannot crash: what is unsafe lives in `bridge` alone.
    unsafe_code,
    // Nothing that a user passes panics.
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::todo,
    clippy::unreachable,
    missing_debug_implementations,
    unreachable_pub,
    clippy::allow_attributes,
    clippy::cloned_instead_of_copied,
    clippy::dbg_macro,
    clippy::explicit_iter_loop,
    clippy::manual_let_else,
    clippy::missing_errors_doc,
    clippy::missing_panics_doc,
    clippy::semicolon_if_nothing_returned,
    clippy::uninlined_format_args
)]
#![cfg_attr(
    test,
    allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::unreachable)
)]

mod accumulate;
pub mod amp;
mod bridge;
pub mod checkpoint;
pub mod compiled;
pub mod data;
mod debug;
#[cfg(feature = "distributed")]
pub mod distributed;
pub mod engine;
mod error;
mod event;
mod event_filter;
#[cfg(feature = "distributed")]
mod failure_kind;
mod freed_memory;
mod fs;
mod guard;
// The pages of `docs`, for the documentation and its tests alone.
#[cfg(any(doc, doctest))]
pub mod guide;
pub mod handlers;
mod host_syncs;
pub mod loggers;
pub mod memory_format;
pub mod metrics;
pub mod optim;
mod panic;
mod parallel;
mod plan_file;
#[cfg(feature = "plots")]
pub mod plot;
mod prediction;
pub mod pytorch;
pub mod schedule;
mod state;
pub mod supervised;
mod target_network;
mod variables;

pub use accumulate::{Accumulation, GradientAccumulator, Weight, WeightedLoss, Window};
pub use error::{Error, Panicked, Result};
pub use freed_memory::keep_freed_memory;
pub use host_syncs::host_syncs;
pub use target_network::TargetNetwork;
pub use tch;

/// The names that most programs need.
pub mod prelude {
    pub use crate::checkpoint::Checkpoint;
    pub use crate::data::{Batch, DataLoader, Dataset, Loader};
    pub use crate::engine::{Engine, Evaluator, Event, Trainer, Until};
    #[cfg(feature = "signals")]
    pub use crate::handlers::InterruptOn;
    #[cfg(feature = "progress")]
    pub use crate::handlers::ProgressBar;
    pub use crate::handlers::{
        EMAHandler, EarlyStopping, Evaluate, History, LrFinder, SWAHandler, TerminateOnNan,
        TimeLimit, Timer,
    };
    pub use crate::metrics::{
        Accuracy, ConfusionMatrix, Loss, Mean, Metric, MetricGroup, Precision, Recall,
        RunningAverage, Usage, pair,
    };
    pub use crate::optim::{Knob, Optimizer, lr};
    pub use crate::schedule::{
        CosineAnnealing, CosineAnnealingScheduler, LinearCyclical, LinearCyclicalScheduler,
        OptimizerScheduler, ParamScheduler, Schedule,
    };
    pub use crate::supervised::{
        Prediction, Supervised, create_supervised_evaluator, create_supervised_trainer,
    };
}
