use super::to_value::Scalar;
use super::{Accumulated, Metric, Reduce, ToValue, Usage};
use crate::error::{Error, Result};
use crate::metrics::MetricValue;

/// Exponential moving average of a value, at each iteration: ignite's `RunningAverage`.
///
/// `v = v * alpha + (1 - alpha) * new`, starting with the first value, kept in f64 on the device of
/// the value (four small kernels an iteration, no host sync until somebody reads it).
///
/// The value is a number, or a tensor with one element. `alpha` is checked when the metric is attached.
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
    average: Option<Scalar>,
}

crate::debug::opaque_debug!(RunningAverage<F>);

impl<O: ToValue> RunningAverage<fn(&O) -> MetricValue> {
    /// Averages the step's output itself.
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
    /// Averages a value that `value` takes out of the output: a number, or a tensor with one element.
    pub fn of<O, V: Into<MetricValue>>(value: F) -> Self
    where
        F: Fn(&O) -> V,
    {
        Self { value, alpha: 0.98, average: None }
    }

    /// Sets the weight of the past, 0.98 unless given; in (0, 1].
    pub fn alpha(mut self, alpha: f64) -> Self {
        self.alpha = alpha;
        self
    }
}

/// The metric that [`RunningAverage::of_metric`] takes its values from.
pub struct OfMetric<M> {
    metric: M,
    /// Set once the metric has taken in an output since its value was last read.
    observed: bool,
}

crate::debug::opaque_debug!(OfMetric<M>);

impl<M> RunningAverage<OfMetric<M>> {
    /// Averages the values of a metric. The metric is updated at every iteration, and read and reset when the
    /// average is updated: at each iteration, so that its values are those of single batches, or with
    /// [`Usage::RunningEpochWise`] at the end of each epoch, so that its values are those of epochs. This is
    /// ignite's `src`, but the metric need not be attached by itself, and cannot be attached twice by accident.
    ///
    /// With [`Usage::BatchFiltered`] the metric takes in only the batches that pass the filter.
    ///
    /// ```
    /// use tch::Tensor;
    /// use tch_ignite::metrics::{Accuracy, Metric, RunningAverage, pair};
    /// let mut metric = RunningAverage::of_metric(Accuracy::of(pair)).alpha(0.5);
    /// for y in [1i64, 0] {
    ///     metric.update(&(Tensor::from_slice(&[1i64]), Tensor::from_slice(&[y])))?;
    /// }
    /// assert_eq!(metric.compute()?.read()?, 0.5);
    /// # anyhow::Ok(())
    /// ```
    pub fn of_metric(metric: M) -> Self {
        let value = OfMetric { metric, observed: false };
        Self { value, alpha: 0.98, average: None }
    }
}

impl<F> RunningAverage<F> {
    fn check(&self) -> Result<()> {
        match self.alpha > 0. && self.alpha <= 1. {
            true => Ok(()),
            false => Err(Error::invalid(format!(
                "Argument alpha should be a float between 0.0 and 1.0. Given was {}",
                self.alpha
            ))),
        }
    }

    fn take_in(&mut self, new: MetricValue) -> anyhow::Result<()> {
        self.check()?;
        let new = Scalar::of(new)?;
        self.average = Some(match &self.average {
            Some(old) => old.times(self.alpha)?.plus(&new.times(1. - self.alpha)?)?,
            None => new,
        });
        Ok(())
    }

    fn average(&self) -> anyhow::Result<MetricValue> {
        match &self.average {
            Some(average) => Ok(average.value()),
            None => anyhow::bail!("RunningAverage has no value before the first iteration"),
        }
    }

    fn parts(&self) -> anyhow::Result<Vec<Accumulated>> {
        let part = |average: &Scalar| Ok(Accumulated::new(AVERAGE, average.saved()?, Reduce::Mean));
        self.average.iter().map(part).collect()
    }

    fn load(&mut self, state: &[Accumulated]) -> anyhow::Result<()> {
        self.average = match state {
            [] => None,
            state => Some(Scalar::loaded(&Accumulated::find(state, AVERAGE)?)?),
        };
        Ok(())
    }
}

/// The name of the part that holds the average.
const AVERAGE: &str = "average";

/// The prefix of the parts of the metric within.
const METRIC: &str = "metric";

impl<O, V: Into<MetricValue>, F: Fn(&O) -> V> Metric<O> for RunningAverage<F> {
    fn reset(&mut self) {
        self.average = None;
    }

    fn update(&mut self, output: &O) -> anyhow::Result<()> {
        let value = (self.value)(output).into();
        self.take_in(value)
    }

    fn compute(&self) -> anyhow::Result<MetricValue> {
        self.average()
    }

    fn usage(&self) -> Usage {
        Usage::RunningBatchWise
    }

    fn validate(&self) -> Result<()> {
        self.check()
    }

    fn state(&self) -> anyhow::Result<Vec<Accumulated>> {
        self.parts()
    }

    fn load_state(&mut self, state: &[Accumulated]) -> anyhow::Result<()> {
        self.load(state)
    }
}

impl<O, M: Metric<O>> Metric<O> for RunningAverage<OfMetric<M>> {
    fn reset(&mut self) {
        self.average = None;
        self.value.observed = false;
        self.value.metric.reset();
    }

    fn observe(&mut self, output: &O) -> anyhow::Result<()> {
        self.value.metric.update(output)?;
        self.value.observed = true;
        Ok(())
    }

    /// Takes the value of the outputs observed so far, or of `output` alone where none was observed.
    fn update(&mut self, output: &O) -> anyhow::Result<()> {
        if !self.value.observed {
            self.observe(output)?;
        }
        let value = self.value.metric.compute()?;
        self.value.metric.reset();
        self.value.observed = false;
        self.take_in(value)
    }

    fn compute(&self) -> anyhow::Result<MetricValue> {
        self.average()
    }

    fn usage(&self) -> Usage {
        Usage::RunningBatchWise
    }

    fn validate(&self) -> Result<()> {
        self.check()?;
        self.value.metric.validate()
    }

    fn state(&self) -> anyhow::Result<Vec<Accumulated>> {
        let mut state = self.parts()?;
        if self.value.observed {
            let within = self.value.metric.state()?.into_iter();
            state.extend(
                within.map(|part| Accumulated { name: format!("{METRIC}/{}", part.name), ..part }),
            );
        }
        Ok(state)
    }

    fn load_state(&mut self, state: &[Accumulated]) -> anyhow::Result<()> {
        let within = Accumulated::within(state, METRIC);
        let known = |name: &str| name == AVERAGE || name.starts_with("metric/");
        if let Some(part) = state.iter().find(|part| !known(&part.name)) {
            anyhow::bail!("this metric keeps no '{}'", part.name);
        }
        self.value.metric.load_state(&within)?;
        self.value.observed = !within.is_empty();
        let average = state.iter().any(|part| part.name == AVERAGE);
        self.load(if average { state } else { &[] })
    }
}
