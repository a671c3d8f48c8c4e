use std::f64::consts::PI;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::check::starts;
use super::cycle::{Cycles, LastCycle, Point, cyclical_arguments, one};
use super::{OptimizerScheduler, Schedule};
use crate::error::Result;
use crate::optim::ParamGroups;

/// Half a cosine wave from start to end in each cycle: ignite's `CosineAnnealingScheduler`
/// (Loshchilov and Hutter 2016, <https://arxiv.org/abs/1608.03983>).
///
/// The end value itself is reached only with a [`warmup_duration`](Self::warmup_duration): without
/// one, the event after the last of a cycle is already the first of the next.
///
/// ```
/// use tch_ignite::schedule::{CosineAnnealing, Schedule};
/// let schedule = CosineAnnealing::new(1.0, 0.0, 10).cycle_mult(2.0);
/// assert_eq!(schedule.at(5), 0.5);
/// assert_eq!(schedule.at(10), 1.0);
/// assert_eq!(schedule.at(20), 0.5);
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CosineAnnealing {
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
    #[serde(skip)]
    last: LastCycle,
}

/// ignite's `CosineAnnealingScheduler`, with its arguments: drives a hyper-parameter by a [`CosineAnnealing`] schedule.
///
/// ```
/// # use tch::{Device, nn};
/// # use tch_ignite::engine::Engine;
/// # use tch_ignite::optim::Optimizer;
/// use tch_ignite::schedule::CosineAnnealingScheduler;
/// # let vs = nn::VarStore::new(Device::Cpu);
/// # nn::linear(vs.root(), 1, 1, Default::default());
/// # let optimizer = Optimizer::sgd(&vs).build()?;
/// # let mut trainer = Engine::new(|_: &mut (), _, _: ()| Ok(()));
/// trainer.attach(CosineAnnealingScheduler::new(&optimizer, "lr", 1e-1, 1e-3, 100).cycle_mult(2.0));
/// # Ok::<(), tch_ignite::Error>(())
/// ```
pub type CosineAnnealingScheduler = OptimizerScheduler<CosineAnnealing>;

impl CosineAnnealing {
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
            last: LastCycle::default(),
        }
    }
}

cyclical_arguments!(CosineAnnealing);

impl Schedule for CosineAnnealing {
    fn at(&self, event: u64) -> f64 {
        match self.cycles().point(event, &self.last) {
            Some(Point::Cycle { start, end, progress }) => {
                start + ((end - start) / 2.) * (1. - (PI * progress).cos())
            }
            Some(Point::Warmup(value)) => value,
            None => f64::NAN,
        }
    }

    fn validate(&self) -> Result<()> {
        self.cycles().validate()?;
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
