use super::{Accumulated, Metric};
use crate::Result;
use crate::engine::MetricValue;

/// Several metrics attached as one: ignite's `MetricGroup`. In `state.metrics` each is under
/// `group/name`.
///
/// ```
/// use tch_ignite::engine::{Engine, Until};
/// use tch_ignite::metrics::{Mean, MetricGroup, RunningAverage};
/// let mut engine = Engine::new(|_: &mut (), _, x: f64| Ok(x));
/// let group = MetricGroup::new()
///     .metric("mean", Mean::new())
///     .metric("running", RunningAverage::new().alpha(0.5));
/// engine.metric("loss", group);
/// engine.run(&mut (), vec![1.0, 2.0, 6.0], Until::epochs(1))?;
/// assert_eq!(engine.state.metrics.get("loss/mean")?, 3.0);
/// assert_eq!(engine.state.metrics.get("loss/running")?, 3.75);
/// # Ok::<(), tch_ignite::Error>(())
/// ```
pub struct MetricGroup<'a, O> {
    metrics: Vec<(String, Box<dyn Metric<O> + 'a>)>,
}

impl<O> Default for MetricGroup<'_, O> {
    fn default() -> Self {
        Self::new()
    }
}

impl<'a, O> MetricGroup<'a, O> {
    /// An empty group.
    pub fn new() -> Self {
        Self { metrics: vec![] }
    }

    /// Adds a metric.
    pub fn metric(mut self, name: impl Into<String>, metric: impl Metric<O> + 'a) -> Self {
        self.metrics.push((name.into(), Box::new(metric)));
        self
    }
}

impl<O> Metric<O> for MetricGroup<'_, O> {
    fn reset(&mut self) {
        self.metrics.iter_mut().for_each(|(_, metric)| metric.reset());
    }

    fn update(&mut self, output: &O) -> anyhow::Result<()> {
        self.metrics.iter_mut().try_for_each(|(name, metric)| {
            metric.update(output).map_err(|error| error.context(format!("metric '{name}'")))
        })
    }

    fn observe(&mut self, output: &O) -> anyhow::Result<()> {
        self.metrics.iter_mut().try_for_each(|(name, metric)| {
            metric.observe(output).map_err(|error| error.context(format!("metric '{name}'")))
        })
    }

    fn compute(&self) -> anyhow::Result<MetricValue> {
        let value = |(name, metric): &(String, Box<dyn Metric<O> + '_>)| {
            Ok((name.clone(), metric.compute()?))
        };
        Ok(MetricValue::Named(self.metrics.iter().map(value).collect::<anyhow::Result<_>>()?))
    }

    fn validate(&self) -> Result<()> {
        self.metrics.iter().try_for_each(|(_, metric)| metric.validate())
    }

    fn state(&self) -> anyhow::Result<Vec<Accumulated>> {
        let mut state = vec![];
        for (name, metric) in &self.metrics {
            for part in metric.state()? {
                state.push(Accumulated { name: format!("{name}/{}", part.name), ..part });
            }
        }
        Ok(state)
    }

    fn load_state(&mut self, state: &[Accumulated]) -> anyhow::Result<()> {
        self.metrics
            .iter_mut()
            .try_for_each(|(name, metric)| metric.load_state(&Accumulated::within(state, name)))
    }
}
