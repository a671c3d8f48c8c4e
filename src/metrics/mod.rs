//! Metrics: accumulated on the device of the outputs, read when somebody asks.
//!
//! A metric takes what it needs out of the step's output with a closure, so that a metric which cannot read
//! the output does not compile. [`pair`] is that closure for steps that return `(y_pred, y)`:
//!
//! ```
//! use tch::Tensor;
//! use tch_ignite::engine::{Engine, Until};
//! use tch_ignite::metrics::{Accuracy, Metric, Precision, Recall, pair};
//!
//! let mut evaluator = Engine::new(|_: &mut (), _, scores: [f64; 2]| {
//!     Ok((Tensor::from_slice(&scores).unsqueeze(0), Tensor::from_slice(&[1i64])))
//! });
//! let (precision, recall) = (Precision::of(pair).shared(), Recall::of(pair).shared());
//! let f1 = (&precision * &recall * 2. / (&precision + &recall + 1e-15)).mean();
//! evaluator
//!     .metric("accuracy", Accuracy::of(pair))
//!     .metric("recall", recall) // of each class: a vector
//!     .metric("f1", f1);
//! evaluator.run(&mut (), vec![[0.2, 0.8], [0.9, 0.1]], Until::epochs(1))?;
//! let metrics = &evaluator.state.metrics;
//! assert_eq!(metrics.get("accuracy")?, 0.5);
//! assert_eq!(metrics.tensor("recall")?, Tensor::from_slice(&[0.0, 0.5]));
//! # Ok::<(), tch_ignite::Error>(())
//! ```
//!
//! Where the metric needs other tensors than the output has, [`Of::map_y_pred`], [`Of::map_y`] and [`Of::leave_out`]
//! make them (thresholds, softmax, slices, padding): `Accuracy::of(pair).map_y_pred(|y_pred| y_pred.sigmoid().round())`.
//! All metrics of pairs have these, in a [`MetricGroup`] too.
//!
//! Sums are kept in f64 on the device of the predictions (f32 on devices that have no f64), counts in
//! i64. Unless its documentation says otherwise, a metric waits for the device neither in `update` nor
//! in `compute`: the value is a tensor that is read when somebody asks. An empty batch counts nothing.
//!
//! | for | see |
//! |---|---|
//! | classes and labels | [`Accuracy`], [`Precision`], [`Recall`], [`Fbeta`], [`ConfusionMatrix`] and what [derives from it](SharedConfusionMatrix) (IoU, Dice, …), [`MultiLabelConfusionMatrix`], [`ClassificationReport`], [`TopKCategoricalAccuracy`], [`MatthewsCorrCoef`], [`CohenKappa`] |
//! | scores of classes | [`RocAuc`], [`RocCurve`], [`AveragePrecision`], [`PrecisionRecallCurve`], [`MeanAveragePrecision`] |
//! | distances | [`Loss`], [`MeanAbsoluteError`], [`MeanSquaredError`], [`RootMeanSquaredError`], [`MeanPairwiseDistance`], [`CosineSimilarity`] |
//! | distributions | [`Entropy`], [`KLDivergence`], [`JSDivergence`], [`MutualInformation`], [`MaximumMeanDiscrepancy`], [`HSIC`] |
//! | images | [`PSNR`], [`SSIM`] |
//! | numbers, text, recommendations, clusters, generated pictures, groups of people | [`regression`], [`nlp`], [`rec_sys`], [`clustering`], [`gan`], [`fairness`] |
//! | anything | [`Mean`], [`Average`], [`GeometricAverage`], [`RunningAverage`], [`Frequency`], [`EpochMetric`], [`VariableAccumulation`] |
//! | other metrics | [`MetricsLambda`], [`MetricGroup`] |
//! | your own | [`Pairwise`], [`Metric`] |
//!
//! Conditions on the elements of a batch (0 or 1, say) are checked in `update` on the CPU. On other devices that
//! check would wait for the device; there the value is NaN from then on, until the next reset.

mod accumulator;
mod average;
mod classification;
pub mod clustering;
mod distances;
mod epoch_metric;
pub(crate) mod exchange;
pub mod fairness;
mod frequency;
pub mod gan;
mod gathered;
mod loss;
mod mean;
mod metric_group;
mod metrics_lambda;
pub mod nlp;
mod output_pair;
mod pairwise;
pub mod rec_sys;
pub mod regression;
mod running_average;
mod to_value;
mod usage;
mod value;
mod variable_accumulation;

pub use accumulator::{Accumulated, Reduce};
pub use average::{Average, GeometricAverage};
pub use classification::*;
pub use distances::*;
pub use epoch_metric::EpochMetric;
pub use frequency::Frequency;
pub use loss::Loss;
pub use mean::Mean;
pub use metric_group::MetricGroup;
pub use metrics_lambda::MetricsLambda;
pub use output_pair::{Computed, LeaveOut, MapY, MapYPred, OutputPair, References};
pub use pairwise::{Contribution, Of, Pairwise, Parts, pair};
pub use running_average::{OfMetric, RunningAverage};
pub use to_value::ToValue;
pub use usage::Usage;
pub use value::MetricValue;
pub use variable_accumulation::VariableAccumulation;

use crate::error::Result;

/// A value that is computed from the outputs of a step. Attach it with
/// [`Engine::metric`](crate::engine::Engine::metric).
///
/// [`Pairwise`] is the easier way to write a metric of predictions and targets.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is no metric of the output `{O}`",
    note = "metrics of predictions and targets take these out of the output: `Accuracy::of(Prediction::parts)` in evaluators of `create_supervised_evaluator`, `Accuracy::of(|output: &Output| (&output.y_pred, &output.y))` for an output of your own, `Accuracy::of(pair)` for a pair",
    note = "the output of a training step is the loss, unless `Supervised::output_transform(|y_pred, y, loss| (y_pred, y, loss))` says otherwise and the trainer is `cx.trainer()`",
    note = "metrics of numbers take them likewise: `Mean::of(|output: &Output| output.loss)`"
)]
pub trait Metric<O> {
    /// Forgets everything that was accumulated.
    fn reset(&mut self);

    /// Takes in the output of one iteration. The engine calls this without gradients.
    ///
    /// # Errors
    /// An output that the metric cannot take, for instance tensors of wrong shapes.
    fn update(&mut self, output: &O) -> anyhow::Result<()>;

    /// Takes in the output of an iteration at which the usage does not call [`update`](Self::update), for a metric
    /// within this one. It does nothing but in [`RunningAverage::of_metric`] and metrics that hold one.
    ///
    /// # Errors
    /// The errors of [`update`](Self::update).
    fn observe(&mut self, _output: &O) -> anyhow::Result<()> {
        Ok(())
    }

    /// Computes the value over everything since the last reset. It is a tensor where reading it would wait for a
    /// device.
    ///
    /// # Errors
    /// A metric that needs at least one sample and has none, or a computation that fails.
    fn compute(&self) -> anyhow::Result<MetricValue>;

    /// Returns when the engine resets, updates and computes the metric, unless it is attached with another usage.
    fn usage(&self) -> Usage {
        Usage::EpochWise
    }

    /// Checks the arguments; called when the metric is attached.
    ///
    /// # Errors
    /// Wrong arguments; the error names the first.
    fn validate(&self) -> Result<()> {
        Ok(())
    }

    /// Makes a handle that can be used several times, in [arithmetic](MetricsLambda) too; the metric is updated once.
    fn shared<'a>(self) -> MetricsLambda<'a, O>
    where
        Self: Sized + 'a,
    {
        MetricsLambda::of(self)
    }

    /// Returns what has been accumulated since the last reset, each part with how several processes join it; empty
    /// before the first update. The default is always empty: such a metric has each process's own value, and starts
    /// anew in a resumed run. Tensors are shared; samples gathered batch by batch are copied into one tensor.
    ///
    /// # Errors
    /// Tensors that cannot be put together.
    fn state(&self) -> anyhow::Result<Vec<Accumulated>> {
        Ok(vec![])
    }

    /// Takes over what [`state`](Self::state) gave, or what processes joined, and goes on from there.
    ///
    /// # Errors
    /// Parts that are missing, or that this metric does not know; the error names the first.
    fn load_state(&mut self, state: &[Accumulated]) -> anyhow::Result<()> {
        match state.first() {
            Some(part) => anyhow::bail!("this metric keeps no '{}'", part.name),
            None => Ok(()),
        }
    }
}
