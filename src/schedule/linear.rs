use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::check::starts;
use super::cycle::{Cycles, LastCycle, Point, cyclical_arguments, one};
use super::{OptimizerScheduler, Schedule};
use crate::error::{Error, Result};
use crate::optim::ParamGroups;

/// Straight lines to `end_value` and back in each cycle: ignite's `LinearCyclicalScheduler`.
///
/// The value goes from `start_value` to `end_value` in the first half of the cycle and back in the second. With
/// [`monotonic`](Self::monotonic) it goes to `end_value` in the whole cycle.
///
/// ```
/// use tch_ignite::schedule::{LinearCyclical, Schedule};
/// let schedule = LinearCyclical::new(1.0, 0.0, 4);
/// assert_eq!([0, 1, 2, 3, 4].map(|i| schedule.at(i)), [1.0, 0.5, 0.0, 0.5, 1.0]);
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LinearCyclical {
    start_value: f64,
    end_value: f64,
    cycle_size: u64,
    #[serde(default = "one")]
    cycle_mult: f64,
    #[serde(default = "one")]
    start_value_mult: f64,
    #[serde(default = "one")]
    end_value_mult: f64,
    #[serde(default)]
    warmup_duration: u64,
    #[serde(default)]
    monotonic: bool,
    #[serde(skip)]
    last: LastCycle,
}

/// ignite's `LinearCyclicalScheduler`, with its arguments: drives a hyper-parameter by a [`LinearCyclical`] schedule.
///
/// ```
/// # use tch::{Device, nn};
/// # use tch_ignite::engine::Engine;
/// # use tch_ignite::optim::Optimizer;
/// use tch_ignite::schedule::LinearCyclicalScheduler;
/// # let vs = nn::VarStore::new(Device::Cpu);
/// # nn::linear(vs.root(), 1, 1, Default::default());
/// # let optimizer = Optimizer::sgd(&vs).build()?;
/// # let mut trainer = Engine::new(|_: &mut (), _, _: ()| Ok(()));
/// trainer.attach(LinearCyclicalScheduler::new(&optimizer, "lr", 1e-1, 1e-3, 100).cycle_mult(2.0));
/// # Ok::<(), tch_ignite::Error>(())
/// ```
pub type LinearCyclicalScheduler = OptimizerScheduler<LinearCyclical>;

impl LinearCyclical {
    /// Makes a schedule with cycles of `cycle_size` events (at least 2).
    pub fn new(start_value: f64, end_value: f64, cycle_size: u64) -> Self {
        Self {
            start_value,
            end_value,
            cycle_size,
            cycle_mult: 1.,
            start_value_mult: 1.,
            end_value_mult: 1.,
            warmup_duration: 0,
            monotonic: false,
            last: LastCycle::default(),
        }
    }

    /// Goes from start to end only, and at once back to the start: a saw-tooth.
    pub fn monotonic(mut self, on: bool) -> Self {
        self.monotonic = on;
        self
    }
}

cyclical_arguments!(LinearCyclical);

impl OptimizerScheduler<LinearCyclical> {
    /// Goes from start to end only, and at once back to the start: a saw-tooth.
    pub fn monotonic(self, on: bool) -> Self {
        self.with(|schedule| schedule.monotonic(on))
    }
}

impl Schedule for LinearCyclical {
    fn at(&self, event: u64) -> f64 {
        match self.cycles().point(event, &self.last) {
            Some(Point::Cycle { start, end, progress }) if self.monotonic => {
                start + (end - start) * progress
            }
            Some(Point::Cycle { start, end, progress }) => {
                end + (start - end) * (progress - 0.5).abs() * 2.
            }
            Some(Point::Warmup(value)) => value,
            None => f64::NAN,
        }
    }

    fn validate(&self) -> Result<()> {
        self.cycles().validate()?;
        if self.warmup_duration > 0 && !self.monotonic {
            return Err(Error::invalid(
                "Invalid combination when warmup_duration > 0 and monotonic=False, please use either set warmup_duration=0 or monotonic=True",
            ));
        }
        starts(self)
    }

    fn end(&self) -> Option<(u64, String)> {
        self.cycles().end()
    }

    fn length(&self) -> Option<u64> {
        Some(self.cycle_size)
    }

    fn arguments(&self) -> Option<serde_json::Value> {
        super::written(self)
    }

    fn save(&self, events: u64) -> Map<String, Value> {
        self.cycles().save(events, &self.last)
    }

    fn load(&self, state: &Map<String, Value>) -> Result<u64> {
        self.cycles().load(state)
    }
}
