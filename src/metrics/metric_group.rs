use std::collections::HashSet;

use super::{Accumulated, Metric};
use crate::error::{Error, Result};
use crate::metrics::MetricValue;

/// Several metrics attached as one: ignite's `MetricGroup`. Their values are in `state.metrics` under `group/name`.
/// Two metrics of one name are refused.
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

crate::debug::opaque_debug!(MetricGroup<'a, O>);

impl<O> Default for MetricGroup<'_, O> {
    fn default() -> Self {
        Self::new()
    }
}

impl<'a, O> MetricGroup<'a, O> {
    /// Makes an empty group.
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
        let values = self.metrics.iter().map(value).collect::<anyhow::Result<Vec<_>>>()?;
        let mut names = HashSet::new();
        for (name, value) in &values {
            check_distinct(name, value, &mut names)?;
        }
        Ok(MetricValue::Named(values))
    }

    fn validate(&self) -> Result<()> {
        let mut names = HashSet::new();
        for (name, metric) in &self.metrics {
            if !names.insert(name) {
                return Err(Error::invalid(format!(
                    "two metrics of a group are named '{name}': give each a name of its own"
                )));
            }
            metric.validate()?;
        }
        Ok(())
    }

    fn state(&self) -> anyhow::Result<Vec<Accumulated>> {
        let mut state = vec![];
        for (name, metric) in &self.metrics {
            for part in metric.state()? {
                let name = format!("{}/{}", prefix(name), part.name);
                state.push(Accumulated { name, ..part });
            }
        }
        Ok(state)
    }

    fn load_state(&mut self, state: &[Accumulated]) -> anyhow::Result<()> {
        let names: Vec<_> = self.metrics.iter().map(|(name, _)| prefix(name)).collect();
        Accumulated::check_prefixes(state, &names)?;
        self.metrics.iter_mut().try_for_each(|(name, metric)| {
            metric.load_state(&Accumulated::within(state, &prefix(name)))
        })
    }
}

/// Returns the prefix of a metric's parts in the state. It has no slashes, so that the parts of `a` and `a/b` are
/// told apart.
fn prefix(name: &str) -> String {
    name.replace('%', "%25").replace('/', "%2F")
}

/// Checks that no two values of the group meet under one `group/name/part`.
fn check_distinct(
    name: &str,
    value: &MetricValue,
    names: &mut HashSet<String>,
) -> anyhow::Result<()> {
    match value {
        MetricValue::Named(parts) => parts
            .iter()
            .try_for_each(|(part, value)| check_distinct(&format!("{name}/{part}"), value, names)),
        _ => {
            anyhow::ensure!(
                names.insert(name.to_owned()),
                "two metrics of a group have a value '{name}': rename one of them"
            );
            Ok(())
        }
    }
}
