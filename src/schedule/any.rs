use serde::{Deserialize, Serialize};

use super::recurrence::Recurrence;
use super::*;

macro_rules! any_schedule {
    ($($schedule:ident)* ; chainable: $($chainable:ident)* ; no file: $($closure:ident)*) => {
        /// Any schedule of this crate, as one type, which compositions hold and files contain.
        ///
        /// In files, `type` is the class and the other keys are its arguments:
        ///
        /// ```
        /// use tch_ignite::schedule::{AnySchedule, Schedule};
        /// let schedule: AnySchedule =
        ///     serde_json::from_str(r#"{"type": "StepLR", "base": 1.0, "step_size": 10, "gamma": 0.5}"#)?;
        /// assert_eq!(schedule.at(10), 0.5);
        /// # Ok::<(), serde_json::Error>(())
        /// ```
        #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
        #[serde(tag = "type")]
        #[non_exhaustive]
        #[expect(missing_docs)] // Each variant is the class of that name.
        pub enum AnySchedule {
            $($schedule($schedule),)*
            $($chainable($chainable),)*
            $(#[serde(skip)] $closure($closure),)*
        }

        $(impl From<$schedule> for AnySchedule {
            fn from(schedule: $schedule) -> Self {
                Self::$schedule(schedule)
            }
        })*
        $(impl From<$chainable> for AnySchedule {
            fn from(schedule: $chainable) -> Self {
                Self::$chainable(schedule)
            }
        })*
        $(impl From<$closure> for AnySchedule {
            fn from(schedule: $closure) -> Self {
                Self::$closure(schedule)
            }
        })*

        impl AnySchedule {
            fn inner(&self) -> &dyn Schedule {
                match self {
                    $(Self::$schedule(schedule) => schedule,)*
                    $(Self::$chainable(schedule) => schedule,)*
                    $(Self::$closure(schedule) => schedule,)*
                }
            }

            /// Returns the name of the class, as in files.
            pub fn class(&self) -> &'static str {
                match self {
                    $(Self::$schedule(_) => stringify!($schedule),)*
                    $(Self::$chainable(_) => stringify!($chainable),)*
                    $(Self::$closure(_) => stringify!($closure),)*
                }
            }

            /// The classes that [`from_arguments`](Self::from_arguments) knows.
            pub(super) const CLASSES: &[&str] =
                &[$(stringify!($schedule),)* $(stringify!($chainable),)*];

            /// Makes a schedule of this class with these arguments. An error has the path to the wrong argument,
            /// which the derived `Deserialize` of a tagged enum loses. `None` for an unknown class.
            pub(super) fn from_arguments(
                class: &str,
                arguments: Value,
            ) -> Option<std::result::Result<Self, serde_path_to_error::Error<serde_json::Error>>>
            {
                Some(match class {
                    $(stringify!($schedule) => {
                        serde_path_to_error::deserialize(arguments).map(Self::$schedule)
                    })*
                    $(stringify!($chainable) => {
                        serde_path_to_error::deserialize(arguments).map(Self::$chainable)
                    })*
                    _ => return None,
                })
            }

            /// Returns the schedule as a recurrence, if torch computes each of its values from the one before.
            pub(super) fn recurrence(&self) -> Option<&dyn Recurrence> {
                match self {
                    $(Self::$chainable(schedule) => Some(schedule),)*
                    Self::MultiplicativeLR(schedule) => Some(schedule),
                    _ => None,
                }
            }
        }
    };
}

any_schedule! {
    LinearCyclical CosineAnnealing PiecewiseLinear Concat Scaled Skipped CosineAnnealingWarmRestarts
    CyclicLR OneCycleLR OneCycleMomentum InverseSqrt Noam Power Rex WarmupStableDecay ExpState
    StepState MultiStepState;
    chainable: StepLR MultiStepLR ConstantLR LinearLR ExponentialLR PolynomialLR CosineAnnealingLR
    ChainedScheduler;
    no file: LambdaLR MultiplicativeLR
}

impl Schedule for AnySchedule {
    fn at(&self, event: u64) -> f64 {
        self.inner().at(event)
    }

    fn validate(&self) -> Result<()> {
        self.inner().validate()
    }

    fn end(&self) -> Option<(u64, String)> {
        self.inner().end()
    }

    fn length(&self) -> Option<u64> {
        self.inner().length()
    }

    fn fits(&self, events: u64) -> Result<()> {
        self.inner().fits(events)
    }

    fn simulate_values(&self, events: u64) -> Result<Vec<(u64, f64)>> {
        self.inner().simulate_values(events)
    }

    fn arguments(&self) -> Option<Value> {
        self.inner().arguments()
    }

    fn save(&self, events: u64) -> Map<String, Value> {
        self.inner().save(events)
    }

    fn load(&self, state: &Map<String, Value>) -> Result<u64> {
        self.inner().load(state)
    }
}
