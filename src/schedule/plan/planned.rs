use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::template::Reader;
use crate::error::{Error, Result};
use crate::event::{Event, OPTIMIZER_STEPPED};
use crate::optim::Hyper;
use crate::plan_file::Place;
use crate::schedule::run_length::Clock;
use crate::schedule::{
    AnySchedule, MOST_CHECKED, RunLength, Schedule, not_finite, too_long, too_short,
};

/// A schedule with the hyper-parameter and the group that it drives: an entry of a
/// [`SchedulePlan`](super::SchedulePlan).
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PlannedSchedule {
    #[serde(flatten)]
    target: Target,
    /// The class and its arguments, with lengths as they were written.
    #[serde(flatten)]
    template: Map<String, Value>,
}

/// The keys of an entry that are not the schedule's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Target {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    group: Option<String>,
    #[serde(default = "lr", skip_serializing_if = "is_lr")]
    param: String,
    #[serde(default, skip_serializing_if = "is_default")]
    event: Clock,
    #[serde(default, skip_serializing_if = "is_default")]
    longer: Longer,
}

/// How a schedule that is longer than the run is treated.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Longer {
    #[default]
    Refuse,
    Warn,
}

const TARGET: [&str; 5] = ["name", "group", "param", "event", "longer"];

fn lr() -> String {
    "lr".into()
}

fn is_lr(param: &String) -> bool {
    param == "lr"
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

impl PlannedSchedule {
    /// Makes an entry: a schedule of this hyper-parameter, in one group or in all, on every iteration.
    ///
    /// # Errors
    /// A schedule with wrong arguments, or one that no file can hold.
    pub fn new(param: &str, group: Option<&str>, schedule: impl Into<AnySchedule>) -> Result<Self> {
        let schedule = schedule.into();
        schedule.validate()?;
        let Ok(Value::Object(template)) = serde_json::to_value(&schedule) else {
            let class = schedule.class();
            return Err(Error::invalid(format!("{class} cannot be written to a file")));
        };
        let target = Target {
            name: None,
            group: group.map(Into::into),
            param: param.into(),
            event: Clock::Iteration,
            longer: Longer::Refuse,
        };
        // TOML has no null, so arguments that are not set are left out.
        let template = template.into_iter().filter(|(_, value)| !value.is_null()).collect();
        Ok(Self { target, template })
    }

    /// Sets the name, which is `"<param> (<group>)"` unless given.
    pub fn named(mut self, name: impl Into<String>) -> Self {
        self.target.name = Some(name.into());
        self
    }

    /// Makes each epoch one event of the schedule, instead of each iteration.
    pub fn each_epoch(mut self) -> Self {
        self.target.event = Clock::Epoch;
        self
    }

    /// Makes each update of the optimizer one event of the schedule, instead of each iteration. The engine has to
    /// fire [`OPTIMIZER_STEPPED`], as the one of
    /// [`create_supervised_trainer`](crate::supervised::create_supervised_trainer) does.
    pub fn each_update(mut self) -> Self {
        self.target.event = Clock::Update;
        self
    }

    /// Cuts off a schedule that is longer than the run, with a warning, instead of refusing it.
    pub fn allow_longer(mut self) -> Self {
        self.target.longer = Longer::Warn;
        self
    }

    pub(super) fn from_value(place: &Place, mut template: Map<String, Value>) -> Result<Self> {
        let target = TARGET.iter().filter_map(|key| template.remove_entry(*key)).collect();
        let target = place.read(Value::Object(target))?;
        Reader::without_run().schedule(place, &mut template.clone())?;
        Ok(Self { target, template })
    }

    /// Returns the entry's name, which is also its key in the history.
    pub fn name(&self) -> String {
        match (&self.target.name, &self.target.group) {
            (Some(name), _) => name.clone(),
            (None, Some(group)) => format!("{} ({group})", self.target.param),
            (None, None) => self.target.param.clone(),
        }
    }

    /// Returns the group that the schedule drives; `None` for all groups.
    pub fn group(&self) -> Option<&str> {
        self.target.group.as_deref()
    }

    /// Returns the hyper-parameter that the schedule drives.
    pub fn param(&self) -> &str {
        &self.target.param
    }

    /// Returns the event that the schedule counts: [`Event::IterationStarted`], [`OPTIMIZER_STEPPED`] or
    /// [`Event::EpochStarted`].
    pub fn event(&self) -> Event {
        match self.target.event {
            Clock::Iteration => Event::IterationStarted,
            Clock::Update => OPTIMIZER_STEPPED,
            Clock::Epoch => Event::EpochStarted,
        }
    }

    /// Returns how many events of the schedule a run has, where that is known.
    pub fn events(&self, run: RunLength) -> Option<u64> {
        run.events(self.target.event)
    }

    pub(super) fn simulate_values(
        &self,
        schedule: &AnySchedule,
        run: RunLength,
    ) -> Result<Vec<(u64, f64)>> {
        let clock = self.target.event;
        let unknown = || {
            let plural = clock.plural();
            Error::invalid(format!("the number of {plural} in the run is not known"))
        };
        let events = self.events(run).ok_or_else(unknown)?;
        let iterations = run.iterations().ok_or_else(unknown)?;
        let before = |event| run.before(event, clock).ok_or_else(unknown);
        let mut values = vec![];
        for (event, value) in schedule.simulate_values(events)? {
            values.push((before(event)?.saturating_add(1), value));
            values.push((before(event.saturating_add(1))?.min(iterations), value));
        }
        values.dedup();
        Ok(values)
    }

    pub(super) fn resolve(&self, place: &Place, run: RunLength) -> Result<AnySchedule> {
        Reader::of(run, self.target.event).schedule(place, &mut self.template.clone())
    }

    /// Checks that the schedule fits the run. Returns a warning where the schedule is longer and the entry allows
    /// that.
    pub(super) fn check(
        &self,
        place: &Place,
        schedule: &AnySchedule,
        run: RunLength,
    ) -> Result<Option<String>> {
        let Some(events) = self.events(run) else {
            return Ok(None);
        };
        let text = |text: String| {
            let text = text.replace("events", self.target.event.plural());
            format!("{} {text}", schedule.class())
        };
        if let Some(why) = too_short(schedule, events).or_else(|| not_finite(schedule, events)) {
            return Err(place.error(text(why)));
        }
        match (too_long(schedule, events).map(text), self.target.longer) {
            (Some(why), Longer::Refuse) => Err(place.error(format!(
                "{why}; shorten it, or say `longer = \"warn\"` to have it cut off"
            ))),
            (Some(why), Longer::Warn) => Ok(Some(format!("{}: {why}", place.path()))),
            (None, _) => Ok(None),
        }
    }

    /// Refuses a value that the hyper-parameter of this name cannot have, at any event of the run; at the first, where the
    /// length of the run is not known.
    pub(super) fn check_bounds(
        &self,
        place: &Place,
        schedule: &AnySchedule,
        run: RunLength,
    ) -> Result<()> {
        let Some(hyper) = Hyper::named(self.param()) else { return Ok(()) };
        for event in 0..self.events(run).unwrap_or(1).min(MOST_CHECKED) {
            let value = schedule.at(event);
            let Err(error) = hyper.check(value) else { continue };
            // The value may be an argument as it was written.
            let mut arguments = self.template.iter();
            let argument = arguments.find(|(_, argument)| argument.as_f64() == Some(value));
            let place = argument.map_or_else(|| place.clone(), |(key, _)| place.key(key));
            let (class, plural) = (schedule.class(), self.target.event.plural());
            return Err(place.error(format!("{class} after {event} {plural}: {error}")));
        }
        Ok(())
    }
}
