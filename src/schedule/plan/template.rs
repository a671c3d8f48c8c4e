//! Classes and arguments as files have them, with lengths that only a run makes numbers.

use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::schedule::run_length::{Clock, Length};
use crate::schedule::{AnySchedule, RunLength, Schedule};

/// Arguments that count events; those of `milestones_values` are the first of each pair.
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

/// An error at a place of the file.
pub(super) fn at(path: &str, text: impl std::fmt::Display) -> Error {
    Error::invalid(if path.is_empty() { text.to_string() } else { format!("{path}: {text}") })
}

/// The value that a part of a file stands for, or the path to what is wrong.
pub(super) fn read<T: serde::de::DeserializeOwned>(path: &str, value: Value) -> Result<T> {
    serde_path_to_error::deserialize(value).map_err(|error| misfit(path, error))
}

fn misfit(path: &str, error: serde_path_to_error::Error<serde_json::Error>) -> Error {
    let path = match error.path().to_string() {
        inner if inner == "." => path.to_owned(),
        inner if path.is_empty() => inner,
        inner => format!("{path}.{inner}"),
    };
    at(&path, error.inner())
}

/// Makes a schedule of a template.
pub(super) struct Reader {
    /// `None` to find only mistakes that do not depend on a run.
    run: Option<(RunLength, Clock)>,
    /// Some lengths were made up, so that values say nothing.
    made_up: bool,
}

impl Reader {
    pub(super) fn without_run() -> Self {
        Self { run: None, made_up: false }
    }

    pub(super) fn of(run: RunLength, clock: Clock) -> Self {
        Self { run: Some((run, clock)), made_up: false }
    }

    /// The schedule, with the lengths in the template replaced by numbers.
    pub(super) fn schedule(
        &mut self,
        path: &str,
        template: &mut Map<String, Value>,
    ) -> Result<AnySchedule> {
        let original = template.clone();
        for (key, value) in template.iter_mut() {
            let path = format!("{path}.{key}");
            if NESTED.contains(&key.as_str()) {
                self.nested(&path, value)?;
            } else if LENGTHS.contains(&key.as_str()) {
                self.lengths(&path, value)?;
            } else if key == "milestones_values" {
                for (index, pair) in elements(value).enumerate() {
                    if let Some(milestone) = elements(pair).next() {
                        self.lengths(&format!("{path}[{index}][0]"), milestone)?;
                    }
                }
            }
        }
        let mut arguments = template.clone();
        let class = match arguments.remove("type") {
            Some(Value::String(class)) => class,
            Some(other) => {
                return Err(at(&format!("{path}.type"), format!("{other} is no schedule class")));
            }
            None => return Err(at(path, format!("missing field `type`: {}", classes()))),
        };
        let schedule = AnySchedule::from_arguments(&class, arguments.into())
            .ok_or_else(|| {
                at(&format!("{path}.type"), format!("no schedule class '{class}'; {}", classes()))
            })?
            .map_err(|error| misfit(path, error))?;
        if !self.made_up {
            schedule.validate().map_err(|error| refused(path, &original, &error))?;
        }
        Ok(schedule)
    }

    fn nested(&mut self, path: &str, value: &mut Value) -> Result<()> {
        match value {
            Value::Object(template) => self.schedule(path, template).map(|_| ()),
            Value::Array(values) => {
                let mut values = values.iter_mut().enumerate();
                values
                    .try_for_each(|(index, value)| self.nested(&format!("{path}[{index}]"), value))
            }
            other => Err(at(path, format!("invalid type: expected a schedule, but given {other}"))),
        }
    }

    fn lengths(&mut self, path: &str, value: &mut Value) -> Result<()> {
        match value {
            Value::String(text) => {
                let events = text.parse().and_then(|length| self.events(&length));
                *value = events.map_err(|error| at(path, error))?.into();
                Ok(())
            }
            Value::Array(values) => {
                let mut values = values.iter_mut().enumerate();
                values
                    .try_for_each(|(index, value)| self.lengths(&format!("{path}[{index}]"), value))
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

/// At the argument that the error is about, if it names one.
fn refused(path: &str, template: &Map<String, Value>, error: &Error) -> Error {
    let text = error.to_string();
    let name = text.strip_prefix("Argument ").and_then(|rest| rest.split(' ').next());
    match name.and_then(|name| template.get_key_value(name)) {
        Some((name, length @ Value::String(_))) => {
            at(&format!("{path}.{name}"), format!("{text}, which is {length} of this run"))
        }
        Some((name, _)) => at(&format!("{path}.{name}"), text),
        None => at(path, text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What serde says of a class with one argument.
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
        let numbers = ["d_model", "T_mult", "milestones_values"];
        for name in counting {
            let known = [&LENGTHS[..], &NESTED, &numbers].concat();
            assert!(known.contains(&name.as_str()), "add `{name}` to LENGTHS, or here");
        }
        Ok(())
    }
}
