use std::time::{Duration, Instant};

use tch::Tensor;

use super::{Accumulated, Metric, Reduce, Usage};
use crate::metrics::MetricValue;

/// How many samples (tokens, images, …) are processed a second: ignite's `Frequency`, without its rounding down to a
/// whole number.
///
/// The time counts from the last reset. The value is computed at each iteration and starts anew with each epoch,
/// unless the metric is attached with another [`Usage`]. With several processes it is the rate of all of them
/// together. `update` reads the clock; no host sync.
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

crate::debug::opaque_debug!(Frequency<F>);

impl<F> Frequency<F> {
    /// Makes the metric; `count` returns how many samples an iteration processed.
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

    fn state(&self) -> anyhow::Result<Vec<Accumulated>> {
        let Some(seconds) = self.seconds else { return Ok(vec![]) };
        Ok(vec![
            Accumulated::new("total", Tensor::from(self.total), Reduce::Sum),
            Accumulated::new("seconds", Tensor::from(seconds), Reduce::Mean),
        ])
    }

    fn load_state(&mut self, state: &[Accumulated]) -> anyhow::Result<()> {
        if state.is_empty() {
            <Self as Metric<O>>::reset(self);
            return Ok(());
        }
        let number =
            |name| Accumulated::find(state, name)?.f_double_value(&[]).map_err(anyhow::Error::from);
        let (total, seconds) = (number("total")?, number("seconds")?);
        // Without a value (in another process) the clock goes on from the saved time; with one it has never stopped.
        if self.seconds.is_none() {
            let before = Duration::try_from_secs_f64(seconds)?;
            self.since = self.since.checked_sub(before).unwrap_or(self.since);
        }
        self.total = total;
        self.seconds = Some(seconds);
        Ok(())
    }

    fn usage(&self) -> Usage {
        Usage::SingleEpochRunningBatchWise
    }
}
