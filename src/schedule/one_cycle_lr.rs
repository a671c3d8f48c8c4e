use std::f64::consts::PI;

use serde::{Deserialize, Serialize};

use super::check::{finite, positive, starts, within};
use super::{ParamScheduler, Schedule};
use crate::error::Result;
use crate::optim::Group;

/// One cycle over the whole run: up to `max_lr`, down far below the start: torch's `OneCycleLR`
/// (Smith and Topin 2017, <https://arxiv.org/abs/1708.07120>).
///
/// Ends after `total_steps` events. [`momentum`](Self::momentum) is the schedule of the momentum that
/// goes with it, and [`one_cycle`] drives both in one line.
///
/// ```
/// use tch_ignite::schedule::{OneCycleLR, Schedule};
/// let schedule = OneCycleLR::new(1.0, 100);
/// assert_eq!(schedule.at(29), 1.0);
/// assert!((schedule.at(0) - 1.0 / 25.0).abs() < 1e-15);
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OneCycleLR {
    max_lr: f64,
    total_steps: u64,
    #[serde(default = "pct_start")]
    pct_start: f64,
    #[serde(default)]
    anneal_strategy: Anneal,
    #[serde(default = "div_factor")]
    div_factor: f64,
    #[serde(default = "final_div_factor")]
    final_div_factor: f64,
    #[serde(default)]
    three_phase: bool,
}

/// The momentum of a one-cycle run: high where the learning rate is low. Made by
/// [`OneCycleLR::momentum`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OneCycleMomentum {
    base_momentum: f64,
    max_momentum: f64,
    total_steps: u64,
    #[serde(default = "pct_start")]
    pct_start: f64,
    #[serde(default)]
    anneal_strategy: Anneal,
    #[serde(default)]
    three_phase: bool,
}

/// The shape of the way between two values.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Anneal {
    /// Half a cosine wave.
    #[default]
    Cos,
    /// A straight line.
    Linear,
}

fn pct_start() -> f64 {
    0.3
}

fn div_factor() -> f64 {
    25.
}

fn final_div_factor() -> f64 {
    1e4
}

impl Anneal {
    fn between(self, start: f64, end: f64, progress: f64) -> f64 {
        match self {
            Self::Cos => end + (start - end) / 2. * ((PI * progress).cos() + 1.),
            Self::Linear => (end - start) * progress + start,
        }
    }
}

/// Where the phases of a run end.
#[derive(Clone, Copy)]
struct Phases {
    total: u64,
    pct_start: f64,
    three: bool,
    anneal: Anneal,
}

impl Phases {
    /// The phase of an event, and where it begins and ends.
    fn phase(self, event: f64) -> (usize, f64, f64) {
        let total = self.total as f64;
        let rise = self.pct_start * total;
        let two = [rise - 1., total - 1.];
        let three = [rise - 1., 2. * rise - 2., total - 1.];
        let ends: &[f64] = if self.three { &three } else { &two };
        let phase = ends.iter().position(|end| event <= *end).unwrap_or(ends.len() - 1);
        let start = if phase == 0 { 0. } else { ends[phase - 1] };
        (phase, start, ends[phase])
    }

    /// The value where `values` are those at the ends of the phases, the start first.
    fn at(self, event: u64, values: [f64; 4]) -> f64 {
        let event = event as f64;
        let (phase, start, end) = self.phase(event);
        let progress = (event - start) / (end - start);
        self.anneal.between(values[phase], values[phase + 1], progress)
    }

    fn validate(self) -> Result<()> {
        positive("total_steps", self.total)?;
        let share = self.pct_start;
        within("pct_start", share, (0. ..=1.).contains(&share), "from 0 to 1")?;
        // As torch, which counts from the start value to the highest one.
        let rises = share * self.total as f64 - 1. != 0.;
        let bounds = "other than 1 / total_steps, with which the value would rise within 0 events";
        within("pct_start", share, rises, bounds)
    }

    /// torch reads one value past the end, if there is one.
    fn events(self) -> u64 {
        let (_, start, end) = self.phase(self.total as f64);
        self.total.saturating_add(u64::from(start != end))
    }

    fn end(self) -> Option<(u64, String)> {
        Some((self.events(), format!("total_steps is {}", self.total)))
    }
}

impl OneCycleLR {
    /// Up to `max_lr` in the first 30 % of `total_steps` events, unless told otherwise.
    pub fn new(max_lr: f64, total_steps: u64) -> Self {
        Self {
            max_lr,
            total_steps,
            pct_start: pct_start(),
            anneal_strategy: Anneal::default(),
            div_factor: div_factor(),
            final_div_factor: final_div_factor(),
            three_phase: false,
        }
    }

    /// The share of the run in which the value rises, 0.3 unless given.
    pub fn pct_start(mut self, share: f64) -> Self {
        self.pct_start = share;
        self
    }

    /// The shape of the ways, cosine unless given.
    pub fn anneal_strategy(mut self, anneal: Anneal) -> Self {
        self.anneal_strategy = anneal;
        self
    }

    /// The start is `max_lr / div_factor`; 25 unless given.
    pub fn div_factor(mut self, factor: f64) -> Self {
        self.div_factor = factor;
        self
    }

    /// The end is the start divided by this; 10,000 unless given.
    pub fn final_div_factor(mut self, factor: f64) -> Self {
        self.final_div_factor = factor;
        self
    }

    /// Back down to the start as fast as up, and then to the end.
    pub fn three_phase(mut self, on: bool) -> Self {
        self.three_phase = on;
        self
    }

    /// The momentum that goes with it; torch's defaults are 0.85 and 0.95.
    pub fn momentum(&self, base_momentum: f64, max_momentum: f64) -> OneCycleMomentum {
        OneCycleMomentum {
            base_momentum,
            max_momentum,
            total_steps: self.total_steps,
            pct_start: self.pct_start,
            anneal_strategy: self.anneal_strategy,
            three_phase: self.three_phase,
        }
    }

    fn phases(&self) -> Phases {
        Phases {
            total: self.total_steps,
            pct_start: self.pct_start,
            three: self.three_phase,
            anneal: self.anneal_strategy,
        }
    }
}

impl Schedule for OneCycleLR {
    fn at(&self, event: u64) -> f64 {
        if event >= self.phases().events() {
            return f64::NAN;
        }
        let start = self.max_lr / self.div_factor;
        let end = start / self.final_div_factor;
        let values = match self.three_phase {
            true => [start, self.max_lr, start, end],
            false => [start, self.max_lr, end, end],
        };
        self.phases().at(event, values)
    }

    fn validate(&self) -> Result<()> {
        self.phases().validate()?;
        let (div, last) = (self.div_factor, self.final_div_factor);
        within("div_factor", div, div > 0., "positive")?;
        within("final_div_factor", last, last > 0., "positive")?;
        finite(&[("max_lr", self.max_lr), ("div_factor", div), ("final_div_factor", last)])?;
        starts(self)
    }

    fn end(&self) -> Option<(u64, String)> {
        self.phases().end()
    }

    fn length(&self) -> Option<u64> {
        Some(self.total_steps)
    }

    fn arguments(&self) -> Option<serde_json::Value> {
        super::written(self)
    }
}

impl OneCycleMomentum {
    fn phases(&self) -> Phases {
        Phases {
            total: self.total_steps,
            pct_start: self.pct_start,
            three: self.three_phase,
            anneal: self.anneal_strategy,
        }
    }
}

impl Schedule for OneCycleMomentum {
    fn at(&self, event: u64) -> f64 {
        if event >= self.phases().events() {
            return f64::NAN;
        }
        let (low, high) = (self.base_momentum, self.max_momentum);
        self.phases().at(event, [high, low, high, high])
    }

    fn validate(&self) -> Result<()> {
        self.phases().validate()?;
        finite(&[("base_momentum", self.base_momentum), ("max_momentum", self.max_momentum)])?;
        starts(self)
    }

    fn end(&self) -> Option<(u64, String)> {
        self.phases().end()
    }

    fn length(&self) -> Option<u64> {
        Some(self.total_steps)
    }

    fn arguments(&self) -> Option<serde_json::Value> {
        super::written(self)
    }
}

/// Learning rate and momentum of a group in one cycle, with torch's 0.85 to 0.95 for the momentum
/// (`beta1` for Adam and AdamW): attach both.
///
/// ```
/// # use tch::{Device, nn};
/// # use tch_ignite::engine::Engine;
/// # use tch_ignite::optim::Optimizer;
/// use tch_ignite::schedule::{OneCycleLR, one_cycle};
/// # let vs = nn::VarStore::new(Device::Cpu);
/// # nn::linear(vs.root(), 1, 1, Default::default());
/// # let optimizer = Optimizer::adam(&vs).build()?;
/// # let mut trainer = Engine::new(|_: &mut (), _, _: ()| Ok(()));
/// let [lr, momentum] = one_cycle(&optimizer.group_at(0)?, OneCycleLR::new(1e-2, 1000))?;
/// trainer.attach(lr).attach(momentum);
/// # Ok::<(), tch_ignite::Error>(())
/// ```
pub fn one_cycle(group: &Group, schedule: OneCycleLR) -> Result<[ParamScheduler; 2]> {
    let momentum = schedule.momentum(0.85, 0.95);
    let hyper = if group.get("beta1").is_ok() { "beta1" } else { "momentum" };
    let (lr, knob) = (group.knob("lr")?, group.knob(hyper)?);
    let name = |hyper: &str| format!("{hyper} ({})", group.name());
    Ok([
        ParamScheduler::new(name("lr"), lr, Box::new(schedule) as Box<dyn Schedule>),
        ParamScheduler::new(name(hyper), knob, Box::new(momentum)),
    ])
}
