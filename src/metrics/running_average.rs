use super::{Metric, ToValue, Usage, scalar};
use crate::engine::MetricValue;

/// Exponential moving average of a value, at each iteration: ignite's `RunningAverage`.
///
/// `v = v * alpha + (1 - alpha) * new`, starting with the first value, kept in f64 on the device of
/// the value (four small kernels an iteration, no host sync until somebody reads it).
///
/// ```
/// use tch_ignite::engine::{Engine, Until};
/// use tch_ignite::metrics::RunningAverage;
/// let mut engine = Engine::new(|_: &mut (), _, x: f64| Ok(x));
/// engine.metric("running", RunningAverage::new().alpha(0.5));
/// engine.run(&mut (), vec![1.0, 2.0], Until::epochs(1))?;
/// assert_eq!(engine.state.metrics.get("running")?, 1.5);
/// # Ok::<(), tch_ignite::Error>(())
/// ```
pub struct RunningAverage<F> {
    value: F,
    alpha: f64,
    average: Option<MetricValue>,
}

impl<O: ToValue> RunningAverage<fn(&O) -> MetricValue> {
    /// Of the output itself.
    pub fn new() -> Self {
        Self { value: O::to_value, alpha: 0.98, average: None }
    }
}

impl<O: ToValue> Default for RunningAverage<fn(&O) -> MetricValue> {
    fn default() -> Self {
        Self::new()
    }
}

impl<F> RunningAverage<F> {
    /// Of a value in the output: a number, or a tensor with one element.
    pub fn of<O, V: Into<MetricValue>>(value: F) -> Self
    where
        F: Fn(&O) -> V,
    {
        Self { value, alpha: 0.98, average: None }
    }

    /// The weight of the past, 0.98 unless given; in (0, 1].
    pub fn alpha(mut self, alpha: f64) -> Self {
        self.alpha = alpha;
        self
    }
}

impl<O, V: Into<MetricValue>, F: Fn(&O) -> V> Metric<O> for RunningAverage<F> {
    fn reset(&mut self) {
        self.average = None;
    }

    fn update(&mut self, output: &O) -> anyhow::Result<()> {
        anyhow::ensure!(
            self.alpha > 0. && self.alpha <= 1.,
            "Argument alpha should be a float between 0.0 and 1.0, but given {}",
            self.alpha
        );
        let new = scalar((self.value)(output).into())?;
        self.average = Some(match (self.average.take(), new) {
            (Some(MetricValue::Number(old)), MetricValue::Number(new)) => {
                (old * self.alpha + (1. - self.alpha) * new).into()
            }
            (Some(MetricValue::Tensor(old)), MetricValue::Tensor(new)) => {
                old.f_mul_scalar(self.alpha)?.f_add(&new.f_mul_scalar(1. - self.alpha)?)?.into()
            }
            // The first, or a change between numbers and tensors.
            (_, new) => new,
        });
        Ok(())
    }

    fn compute(&self) -> anyhow::Result<MetricValue> {
        match &self.average {
            Some(MetricValue::Number(value)) => Ok((*value).into()),
            Some(MetricValue::Tensor(value)) => Ok(value.shallow_clone().into()),
            None => anyhow::bail!("RunningAverage has no value before the first iteration"),
        }
    }

    fn usage(&self) -> Usage {
        Usage::RunningBatchWise
    }
}
