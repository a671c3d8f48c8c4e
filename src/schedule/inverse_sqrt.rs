use serde::{Deserialize, Serialize};

use super::Schedule;
use super::check::{finite, positive, starts};
use crate::error::Result;

/// A linear rise to `peak` in `warmup` events, then `peak * sqrt(warmup / event)`: fairseq's
/// `inverse_sqrt`.
///
/// ```
/// use tch_ignite::schedule::{InverseSqrt, Schedule};
/// let schedule = InverseSqrt::new(1.0, 4);
/// assert_eq!([0, 2, 4, 16].map(|i| schedule.at(i)), [0.0, 0.5, 1.0, 0.5]);
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InverseSqrt {
    peak: f64,
    warmup: u64,
}

impl InverseSqrt {
    /// The peak is at event `warmup`.
    pub fn new(peak: f64, warmup: u64) -> Self {
        Self { peak, warmup }
    }
}

impl Schedule for InverseSqrt {
    fn at(&self, event: u64) -> f64 {
        let (e, warmup) = (event as f64, self.warmup as f64);
        self.peak * if event < self.warmup { e / warmup } else { (warmup / e).sqrt() }
    }

    fn validate(&self) -> Result<()> {
        positive("warmup", self.warmup)?;
        finite(&[("peak", self.peak)])?;
        starts(self)
    }

    fn length(&self) -> Option<u64> {
        Some(self.warmup)
    }

    fn arguments(&self) -> Option<serde_json::Value> {
        super::written(self)
    }
}
