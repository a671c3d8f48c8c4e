use std::time::Instant;

use super::{Metric, Usage};
use crate::engine::MetricValue;

/// How many samples (tokens, images, …) a second are worked through: ignite's `Frequency`, which
/// rounds down to a whole number.
///
/// Counted from the last reset, at each iteration of an epoch unless attached with another
/// [`Usage`]. Of this process alone. Reads the clock; no host sync.
///
/// ```
/// use tch_ignite::engine::{Engine, Until};
/// use tch_ignite::metrics::Frequency;
/// let mut engine = Engine::new(|_: &mut (), _, batch: Vec<f64>| Ok(batch.len()));
/// engine.metric("samples/s", Frequency::of(|batch_size: &usize| *batch_size as f64));
/// engine.run(&mut (), vec![vec![0.; 8]; 3], Until::epochs(1))?;
/// assert!(engine.state.metrics.get("samples/s")? > 0.);
/// # Ok::<(), tch_ignite::Error>(())
/// ```
pub struct Frequency<F> {
    count: F,
    total: f64,
    since: Instant,
    seconds: Option<f64>,
}

impl<F> Frequency<F> {
    /// `count` says how many an iteration worked through.
    pub fn of<O>(count: F) -> Self
    where
        F: Fn(&O) -> f64,
    {
        Self { count, total: 0., since: Instant::now(), seconds: None }
    }
}

impl<O, F: Fn(&O) -> f64> Metric<O> for Frequency<F> {
    fn reset(&mut self) {
        self.total = 0.;
        self.seconds = None;
        self.since = Instant::now();
    }

    fn update(&mut self, output: &O) -> anyhow::Result<()> {
        self.total += (self.count)(output);
        self.seconds = Some(self.since.elapsed().as_secs_f64());
        Ok(())
    }

    fn compute(&self) -> anyhow::Result<MetricValue> {
        match self.seconds {
            Some(seconds) => Ok((self.total / seconds).into()),
            None => anyhow::bail!("Frequency has no value before the first iteration"),
        }
    }

    fn usage(&self) -> Usage {
        Usage::SingleEpochRunningBatchWise
    }
}
