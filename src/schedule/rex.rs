use serde::{Deserialize, Serialize};

use super::Schedule;
use super::check::{finite, positive, starts};
use crate::error::Result;

/// `base * (1 - t) / (1/2 + (1 - t) / 2)` for the share `t` of the run that is done: REX, reflected exponential (Chen,
/// Wolfe and Kyrillidis 2021, <https://arxiv.org/abs/2107.04197>). It stays high for longer than a line, and is 0 from
/// event `total_iters` on.
///
/// ```
/// use tch_ignite::schedule::{Rex, Schedule};
/// let schedule = Rex::new(1.0, 4);
/// assert_eq!([0, 2, 4].map(|i| schedule.at(i)), [1.0, 0.5 / 0.75, 0.0]);
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rex {
    base: f64,
    total_iters: u64,
}

impl Rex {
    /// Makes a schedule from `base` to 0 in `total_iters` events.
    pub fn new(base: f64, total_iters: u64) -> Self {
        Self { base, total_iters }
    }
}

impl Schedule for Rex {
    fn at(&self, event: u64) -> f64 {
        let left = 1. - event.min(self.total_iters) as f64 / self.total_iters as f64;
        self.base * (left / (0.5 + 0.5 * left))
    }

    fn validate(&self) -> Result<()> {
        positive("total_iters", self.total_iters)?;
        finite(&[("base", self.base)])?;
        starts(self)
    }

    fn length(&self) -> Option<u64> {
        Some(self.total_iters)
    }

    fn arguments(&self) -> Option<serde_json::Value> {
        super::written(self)
    }
}
