//! Metrics: accumulated where the outputs live, read when somebody asks.
//!
//! A metric takes what it needs out of the step's output by a closure, so that one which cannot read
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
//! Sums are kept in f64 on the device of the predictions (f32 on devices that have no f64), counts in
//! i64. Unless its documentation says otherwise, a metric neither waits for the device in `update` nor
//! in `compute`: the value is a tensor that is read when somebody asks. An empty batch counts nothing.
//!
//! | of | see |
//! |---|---|
//! | classes and labels | [`Accuracy`], [`Precision`], [`Recall`], [`Fbeta`], [`ConfusionMatrix`] and what [derives from it](SharedConfusionMatrix) (IoU, Dice, …), [`MultiLabelConfusionMatrix`], [`ClassificationReport`], [`TopKCategoricalAccuracy`], [`MatthewsCorrCoef`], [`CohenKappa`] |
//! | scores of classes | [`RocAuc`], [`RocCurve`], [`AveragePrecision`], [`PrecisionRecallCurve`], [`MeanAveragePrecision`] |
//! | distances | [`Loss`], [`MeanAbsoluteError`], [`MeanSquaredError`], [`RootMeanSquaredError`], [`MeanPairwiseDistance`], [`CosineSimilarity`] |
//! | distributions | [`Entropy`], [`KLDivergence`], [`JSDivergence`], [`MutualInformation`], [`MaximumMeanDiscrepancy`], [`HSIC`] |
//! | images | [`PSNR`], [`SSIM`] |
//! | one number, text, recommendations, clusters, generated pictures, groups of people | [`regression`], [`nlp`], [`rec_sys`], [`clustering`], [`gan`], [`fairness`] |
//! | anything | [`Mean`], [`Average`], [`GeometricAverage`], [`RunningAverage`], [`Frequency`], [`EpochMetric`], [`VariableAccumulation`] |
//! | other metrics | [`MetricsLambda`], [`MetricGroup`] |
//! | your own | [`Pairwise`], [`Metric`] |
//!
//! What the values must be (0 or 1, say) is checked in `update` on the CPU. On other devices that would
//! wait for the device; there the value is NaN from then on, until the next reset.

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
pub use pairwise::{Contribution, Of, Pairwise, Parts, pair};
pub use running_average::{OfMetric, RunningAverage};
pub use to_value::ToValue;
pub use usage::Usage;
pub use value::MetricValue;
pub use variable_accumulation::VariableAccumulation;

use crate::error::Result;

/// Something computed from the outputs of a step. Attach it with
/// [`Engine::metric`](crate::engine::Engine::metric).
///
/// Metrics of predictions and targets are easier made by [`Pairwise`].
pub trait Metric<O> {
    /// Forgets everything.
    fn reset(&mut self);

    /// Takes in the output of one iteration. Called without gradients.
    fn update(&mut self, output: &O) -> anyhow::Result<()>;

    /// Takes in the output of every iteration for a metric within this one, where the usage calls
    /// [`update`](Self::update) less often. Nothing, but for [`RunningAverage::of_metric`] and what holds one.
    fn observe(&mut self, _output: &O) -> anyhow::Result<()> {
        Ok(())
    }

    /// The value over all since the last reset; a tensor where reading it would wait for a device.
    fn compute(&self) -> anyhow::Result<MetricValue>;

    /// When the engine resets, updates and computes it, unless told otherwise.
    fn usage(&self) -> Usage {
        Usage::EpochWise
    }

    /// What is wrong with its arguments, if anything; asked when it is attached.
    fn validate(&self) -> Result<()> {
        Ok(())
    }

    /// Makes a handle that can be used several times, in [arithmetic](MetricsLambda) too, and is
    /// updated once.
    fn shared<'a>(self) -> MetricsLambda<'a, O>
    where
        Self: Sized + 'a,
    {
        MetricsLambda::of(self)
    }

    /// What has been accumulated since the last reset, each part with how several processes join it.
    /// Nothing where there is nothing yet, and for metrics of your own that do not say: their value is that
    /// of each process alone. Shares the tensors; those gathered batch by batch are joined, a copy.
    fn state(&self) -> anyhow::Result<Vec<Accumulated>> {
        Ok(vec![])
    }

    /// Goes on from what [`state`](Self::state) gave, or from what processes joined.
    ///
    /// # Errors
    /// Parts that are missing, or that this metric does not know: the text names the first.
    fn load_state(&mut self, state: &[Accumulated]) -> anyhow::Result<()> {
        match state.first() {
            Some(part) => anyhow::bail!("this metric keeps no '{}'", part.name),
            None => Ok(()),
        }
    }
}
