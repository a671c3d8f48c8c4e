use std::time::{Duration, Instant};

use crate::engine::{Engine, Handler, HandlerSpec, State};
use crate::error::{Error, Result};
use crate::event::Event;
use crate::state::StateDict;

/// Measures the speed of a run: samples and iterations a second, and percentiles of the time of an iteration.
///
/// At the end of each epoch these metrics get the values of the epoch: `throughput/samples_per_second` (where the data
/// source counts samples), `throughput/iterations_per_second`, and `throughput/step_ms_p50`, `_p90` and `_p99` in
/// milliseconds, to within 3 %. An iteration is measured from the end of the one before, so it includes fetching and
/// handlers; work at the end of an epoch is not included.
///
/// Costs a reading of the clock an iteration, and 8 KB of memory. On a GPU an iteration is as long as the host needs to
/// launch its kernels, unless something waits for the device in each iteration; the rates of long epochs are right all
/// the same.
///
/// ```
/// use std::{thread::sleep, time::Duration};
/// use tch_ignite::engine::{Engine, Until};
/// use tch_ignite::handlers::Throughput;
/// let mut trainer = Engine::new(|_: &mut (), _, _: ()| { sleep(Duration::from_millis(2)); Ok(()) });
/// trainer.attach(Throughput::new());
/// trainer.run(&mut (), vec![(); 5], Until::epochs(1))?;
/// assert!(trainer.state.metrics.get("throughput/step_ms_p50")? > 1.9);
/// assert!(trainer.state.metrics.get("throughput/iterations_per_second")? < 510.0);
/// # Ok::<(), tch_ignite::Error>(())
/// ```
#[derive(Debug, Clone)]
#[doc(alias = "ThroughputMonitor")]
#[doc(alias = "DeviceStatsMonitor")]
#[must_use = "a handler is called only once it is attached: `Engine::attach`"]
pub struct Throughput {
    times: Percentiles,
    /// Number of samples of the measured iterations, and the engine's count of samples at the last one.
    samples: u64,
    counted: u64,
    elapsed: Duration,
    last: Option<Instant>,
}

impl Default for Throughput {
    fn default() -> Self {
        Self::new()
    }
}

impl Throughput {
    /// Measures each epoch.
    pub fn new() -> Self {
        let (samples, counted, elapsed) = (0, 0, Duration::ZERO);
        Self { times: Percentiles::new(), samples, counted, elapsed, last: None }
    }

    fn begin<B, O>(&mut self, state: &State<B, O>) {
        self.times.clear();
        (self.samples, self.counted) = (0, state.samples);
        self.elapsed = Duration::ZERO;
        self.last = Some(Instant::now());
    }

    fn end<B, O>(&self, state: &mut State<B, O>) {
        let seconds = self.elapsed.as_secs_f64();
        if self.times.count == 0 || seconds == 0. {
            return;
        }
        let metrics = &mut state.metrics;
        if self.samples > 0 {
            metrics.set("throughput/samples_per_second", self.samples as f64 / seconds);
        }
        metrics.set("throughput/iterations_per_second", self.times.count as f64 / seconds);
        for (name, share) in [
            ("throughput/step_ms_p50", 0.5),
            ("throughput/step_ms_p90", 0.9),
            ("throughput/step_ms_p99", 0.99),
        ] {
            metrics.set(name, self.times.at(share) * 1e-6);
        }
    }
}

impl<C, B, O> Handler<C, B, O> for Throughput {
    fn spec(&self) -> Result<HandlerSpec> {
        use Event::*;
        let events =
            EpochStarted | IterationCompleted | EpochCompleted | Interrupt | ExceptionRaised;
        Ok(HandlerSpec::new("throughput", events))
    }

    fn save_state(&self) -> Result<Option<StateDict>> {
        let mut state = StateDict::new();
        let bins = self.times.bins.iter().enumerate().filter(|(_, count)| **count > 0);
        state.set_value("times", bins.collect::<Vec<_>>())?;
        state.set_value("samples", (self.samples, self.counted))?;
        state.set_value("elapsed", self.elapsed)?;
        Ok(Some(state))
    }

    fn load_state(&mut self, state: StateDict) -> Result<()> {
        let mut times = Percentiles::new();
        for (bin, count) in state.value::<Vec<(usize, u32)>>("times")? {
            let place = times.bins.get_mut(bin);
            *place.ok_or_else(|| Error::State(format!("there is no bin {bin}")))? = count;
            times.count += u64::from(count);
        }
        (self.samples, self.counted) = state.value("samples")?;
        self.elapsed = state.value("elapsed")?;
        (self.times, self.last) = (times, None);
        Ok(())
    }

    fn call(
        &mut self,
        event: Event,
        _cx: &mut C,
        engine: &mut Engine<'_, C, B, O>,
    ) -> anyhow::Result<()> {
        match event {
            Event::EpochStarted => self.begin(&engine.state),
            Event::IterationCompleted => {
                let now = Instant::now();
                let before = std::mem::replace(&mut self.counted, engine.state.samples);
                // `last` is `None` after a pause, whose time does not count, and where a run is resumed in mid epoch.
                if let Some(last) = self.last.replace(now) {
                    let time = now - last;
                    self.elapsed += time;
                    self.samples += self.counted.saturating_sub(before);
                    self.times.add(time.as_nanos().try_into().unwrap_or(u64::MAX));
                }
            }
            Event::EpochCompleted => self.end(&mut engine.state),
            _ => self.last = None,
        }
        Ok(())
    }
}

/// Base-2 logarithm of the number of bins for each doubling; a bin is then 3 % wide.
const BITS: u32 = 5;

/// Counts values in bins whose width is proportional to the value.
#[derive(Debug, Clone)]
struct Percentiles {
    bins: Vec<u32>,
    count: u64,
}

impl Percentiles {
    fn new() -> Self {
        Self { bins: vec![0; 64 << BITS], count: 0 }
    }

    fn clear(&mut self) {
        self.bins.fill(0);
        self.count = 0;
    }

    fn bin(value: u64) -> usize {
        let value = value.max(1);
        let exponent = value.ilog2();
        // The bits after the first one.
        let rest = (value << (63 - exponent) << 1) >> (64 - BITS);
        (exponent << BITS) as usize | rest as usize
    }

    /// The value in the middle of a bin.
    fn value(bin: usize) -> f64 {
        let (exponent, rest) = (bin >> BITS, bin & ((1 << BITS) - 1));
        let share = (rest as f64 + 0.5) / f64::from(1u32 << BITS);
        2f64.powi(exponent as i32) * (1. + share)
    }

    fn add(&mut self, value: u64) {
        let bin = &mut self.bins[Self::bin(value)];
        *bin = bin.saturating_add(1);
        self.count += 1;
    }

    /// The value that this share of all values does not exceed.
    fn at(&self, share: f64) -> f64 {
        let wanted = (share * self.count as f64).ceil().max(1.) as u64;
        let mut seen = 0;
        for (bin, count) in self.bins.iter().enumerate() {
            seen += u64::from(*count);
            if seen >= wanted {
                return Self::value(bin);
            }
        }
        0.
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Loader;
    use crate::engine::Until;

    #[test]
    fn percentiles_are_three_percent_exact() {
        for scale in [1, 1000, 1_000_000_000] {
            let mut times = Percentiles::new();
            (1..=1000).for_each(|time| times.add(time * scale));
            for (share, value) in [(0.5, 500.), (0.9, 900.), (0.99, 990.), (1., 1000.)] {
                let exact = value * scale as f64;
                assert!((times.at(share) / exact - 1.).abs() < 0.032, "{scale} {share}");
            }
        }
        assert_eq!(Percentiles::bin(u64::MAX), (64 << BITS) - 1);
        assert_eq!(Percentiles::bin(0), 0);
    }

    #[test]
    fn samples_are_counted_for_each_epoch() -> anyhow::Result<()> {
        let x = tch::Tensor::zeros([64, 1], (tch::Kind::Float, tch::Device::Cpu));
        let loader = Loader::new(&x, &x, 16)?;
        let mut trainer = Engine::new(|_: &mut (), _, _: crate::data::Batch| {
            std::thread::sleep(Duration::from_millis(1));
            Ok(())
        });
        trainer.attach(Throughput::new());
        trainer.run(&mut (), &loader, Until::epochs(3))?;
        let get = |name: &str| trainer.state.metrics.get(&format!("throughput/{name}"));
        let ratio = get("samples_per_second")? / get("iterations_per_second")?;
        approx::assert_abs_diff_eq!(ratio, 16., epsilon = 1e-9);
        assert!(get("step_ms_p50")? <= get("step_ms_p99")?);
        Ok(())
    }
}
