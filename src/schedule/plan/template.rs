//! Classes and arguments as files have them; lengths become numbers when the run is known.

use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::plan_file::Place;
use crate::schedule::run_length::{Clock, Length};
use crate::schedule::{AnySchedule, RunLength, Schedule};

/// Arguments that count events; in `milestones_values` the first of each pair does too.
const LENGTHS: [&str; 15] = [
    "T_0",
    "T_max",
    "cycle_size",
    "decay",
    "durations",
    "events",
    "milestones",
    "stable",
    "step_size",
    "step_size_down",
    "step_size_up",
    "total_iters",
    "total_steps",
    "warmup",
    "warmup_duration",
];

/// Arguments that are schedules.
const NESTED: [&str; 2] = ["schedule", "schedules"];

/// Makes a schedule of a template.
pub(super) struct Reader {
    /// `None` to find only mistakes that do not depend on a run.
    run: Option<(RunLength, Clock)>,
    /// Set where lengths were made up for want of a run, so that the arguments cannot be checked together.
    made_up: bool,
}

impl Reader {
    pub(super) fn without_run() -> Self {
        Self { run: None, made_up: false }
    }

    pub(super) fn of(run: RunLength, clock: Clock) -> Self {
        Self { run: Some((run, clock)), made_up: false }
    }

    /// Makes the schedule, and replaces the lengths in the template by numbers.
    pub(super) fn schedule(
        &mut self,
        place: &Place,
        template: &mut Map<String, Value>,
    ) -> Result<AnySchedule> {
        let original = template.clone();
        for (key, value) in template.iter_mut() {
            let place = place.key(key);
            if NESTED.contains(&key.as_str()) {
                self.nested(&place, value)?;
            } else if LENGTHS.contains(&key.as_str()) {
                self.lengths(&place, value)?;
            } else if key == "milestones_values" {
                for (index, pair) in elements(value).enumerate() {
                    if let Some(milestone) = elements(pair).next() {
                        self.lengths(&place.index(index).index(0), milestone)?;
                    }
                }
            }
        }
        let mut arguments = template.clone();
        let class = match arguments.remove("type") {
            Some(Value::String(class)) => class,
            Some(other) => {
                return Err(place.key("type").error(format!("{other} is no schedule class")));
            }
            None => return Err(place.error(format!("missing field `type`: {}", classes()))),
        };
        let schedule = AnySchedule::from_arguments(&class, arguments.into())
            .ok_or_else(|| {
                let text = format!("no schedule class '{class}'; {}", classes());
                place.key("type").error(text)
            })?
            .map_err(|error| place.misfit(&error))?;
        if !self.made_up {
            schedule.validate().map_err(|error| refused(place, &original, &error))?;
        }
        Ok(schedule)
    }

    fn nested(&mut self, place: &Place, value: &mut Value) -> Result<()> {
        match value {
            Value::Object(template) => self.schedule(place, template).map(|_| ()),
            Value::Array(values) => {
                let mut values = values.iter_mut().enumerate();
                values.try_for_each(|(index, value)| self.nested(&place.index(index), value))
            }
            other => {
                Err(place.error(format!("invalid type: expected a schedule, but given {other}")))
            }
        }
    }

    fn lengths(&mut self, place: &Place, value: &mut Value) -> Result<()> {
        match value {
            Value::String(text) => {
                let events = text.parse().and_then(|length| self.events(&length));
                *value = events.map_err(|error| place.error(error))?.into();
                Ok(())
            }
            Value::Array(values) => {
                let mut values = values.iter_mut().enumerate();
                values.try_for_each(|(index, value)| self.lengths(&place.index(index), value))
            }
            _ => Ok(()),
        }
    }

    fn events(&mut self, length: &Length) -> Result<u64> {
        match &self.run {
            Some((run, clock)) => length.events(run, *clock),
            None => {
                self.made_up = true;
                Ok(2)
            }
        }
    }
}

fn elements(value: &mut Value) -> impl Iterator<Item = &mut Value> {
    value.as_array_mut().into_iter().flatten()
}

fn classes() -> String {
    format!("there are: {}", AnySchedule::CLASSES.join(", "))
}

/// Puts an error at the argument that it is about, if it names one.
fn refused(place: &Place, template: &Map<String, Value>, error: &Error) -> Error {
    let text = error.to_string();
    let name = text.strip_prefix("Argument ").and_then(|rest| rest.split(' ').next());
    match name.and_then(|name| template.get_key_value(name)) {
        Some((name, length @ Value::String(_))) => {
            place.key(name).error(format!("{text}, which is {length} of this run"))
        }
        Some((name, _)) => place.key(name).error(text),
        None => place.error(text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns what serde says about a class with one argument of type string.
    fn said(class: &str, argument: &str) -> Option<String> {
        let arguments = Map::from_iter([(argument.to_owned(), "text".into())]);
        let error = AnySchedule::from_arguments(class, arguments.into())?.err()?;
        Some(error.inner().to_string())
    }

    #[test]
    fn every_argument_that_counts_events_is_known() -> Result<()> {
        let mut counting = vec![];
        for class in AnySchedule::CLASSES {
            let names = said(class, "?").unwrap_or_default();
            let mut names: Vec<_> = names.split('`').skip(3).step_by(2).collect();
            assert!(!names.is_empty(), "{class}");
            names.retain(|name| {
                let said = said(class, name).unwrap_or_default();
                said.ends_with("64") && !said.ends_with("f64") || said.ends_with("a sequence")
            });
            counting.extend(names.iter().map(|name| name.to_string()));
        }
        let numbers = ["batch_size", "d_model", "T_mult", "milestones_values", "tokens"];
        for name in counting {
            let known = [&LENGTHS[..], &NESTED, &numbers].concat();
            assert!(known.contains(&name.as_str()), "add `{name}` to LENGTHS, or here");
        }
        Ok(())
    }
}
