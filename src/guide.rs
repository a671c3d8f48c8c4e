//! The guide: where to begin, then a page for each topic.
//!
//! To begin with: [from ignite](from_ignite), [from Lightning](from_lightning), [from a plain loop of tch](from_tch).
//!
//! | for | page |
//! |---|---|
//! | tensors in memory, samples from files, augmentation, splits, streams | [`data`] |
//! | a learning rate for each group, warm-up, files, schedules by update | [`schedules`], [all of them](all_schedules) |
//! | accuracy and its sisters, arithmetic with metrics | [`metrics`], [all of them](all_metrics) |
//! | files to go on from, the best model, its averages | [`checkpoints`] |
//! | a pretrained network, freezing, rates that fall from layer to layer | [`fine_tuning`] |
//! | large batches, mixed precision, clipping | [`gradients`] |
//! | several processes and machines | [`distributed`] |
//! | TensorBoard, tables, a report, MLflow | [`logging`] |
//! | a step, handler, metric, schedule, loss or event of your own | [`your_own`] |
//! | files of PyTorch, Lightning and Hugging Face; TorchScript | [`pytorch`] |
//! | models of Python, compiled by PyTorch and trained here | [`compiled`] |
//! | which optimizer | [`all_optimizers`] |
//! | which handler | [`all_handlers`] |
//! | where ignite does something else | [`differences`] |
//! | what was measured, and how | [`numbers`] |
//! | known experiments, beside PyTorch | [`results`] |
//!
//! The pages are the files of the folder `docs`. This module is there in the documentation alone; the code of every page is
//! compiled by its tests.

// The programs of the pages use the default features.
#![cfg(any(
    not(doctest),
    all(feature = "progress", feature = "plots", feature = "signals", feature = "toml")
))]

/// Where the names of pages that `docs` uses lead to in the documentation. A page ends with the same names for readers of
/// the files; of two definitions of a name Markdown takes the first.
macro_rules! links {
    () => {
        "\
[from-ignite.md]: crate::guide::from_ignite
[from-lightning.md]: crate::guide::from_lightning
[from-tch.md]: crate::guide::from_tch
[data.md]: crate::guide::data
[schedules.md]: crate::guide::schedules
[metrics.md]: crate::guide::metrics
[checkpoints.md]: crate::guide::checkpoints
[fine-tuning.md]: crate::guide::fine_tuning
[gradients.md]: crate::guide::gradients
[logging.md]: crate::guide::logging
[your-own.md]: crate::guide::your_own
[SCHEDULES]: crate::guide::all_schedules
[METRICS]: crate::guide::all_metrics
[HANDLERS]: crate::guide::all_handlers
[OPTIMIZERS]: crate::guide::all_optimizers
[PYTORCH]: crate::guide::pytorch
[DISTRIBUTED]: crate::guide::distributed
[COMPILED]: crate::guide::compiled
[DIFFERENCES]: crate::guide::differences
[NUMBERS]: crate::guide::numbers
[RESULTS]: crate::guide::results
[chargpt.svg]: https://docs.rs/crate/tch-ignite/latest/source/docs/chargpt.svg

"
    };
}

macro_rules! pages {
    ($($(#[$only:meta])* $name:ident: $file:literal;)*) => {$(
        $(#[$only])*
        #[doc = links!()]
        #[doc = include_str!(concat!("../docs/", $file))]
        pub mod $name {}
    )*};
}

pages! {
    from_ignite: "guide/from-ignite.md";
    from_lightning: "guide/from-lightning.md";
    from_tch: "guide/from-tch.md";
    data: "guide/data.md";
    schedules: "guide/schedules.md";
    metrics: "guide/metrics.md";
    checkpoints: "guide/checkpoints.md";
    fine_tuning: "guide/fine-tuning.md";
    gradients: "guide/gradients.md";
    logging: "guide/logging.md";
    your_own: "guide/your-own.md";
    pytorch: "PYTORCH.md";
    #[cfg(feature = "distributed")]
    distributed: "DISTRIBUTED.md";
    compiled: "COMPILED.md";
    all_schedules: "SCHEDULES.md";
    all_metrics: "METRICS.md";
    all_handlers: "HANDLERS.md";
    all_optimizers: "OPTIMIZERS.md";
    differences: "DIFFERENCES.md";
    numbers: "NUMBERS.md";
    results: "RESULTS.md";
}

/// The page of the feature `distributed`, without which it is not built.
#[cfg(not(feature = "distributed"))]
pub mod distributed {}

/// The program of the README is compiled, too.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
mod readme {}
