//! Reads values in the form in which the golden files write them.

use anyhow::{Context, Result, bail};
use serde_json::{Map, Value};
use tch_ignite::engine::{Event, Events, FilteredEvent};

/// Reads a float. Infinities and NaN are strings in the files.
pub fn float(value: &Value) -> Result<f64> {
    match value {
        Value::String(text) => match text.as_str() {
            "NaN" => Ok(f64::NAN),
            "Infinity" => Ok(f64::INFINITY),
            "-Infinity" => Ok(f64::NEG_INFINITY),
            _ => bail!("{text:?} is no number"),
        },
        Value::Bool(on) => Ok(f64::from(*on)),
        _ => value.as_f64().with_context(|| format!("{value} is no number")),
    }
}

pub fn floats(value: &Value) -> Result<Vec<f64>> {
    array(value)?.iter().map(float).collect()
}

/// Stands for a value that is not there yet (`null`): a NaN of bits that no computation gives, so that
/// comparing bits tells it from every value.
pub const UNSET: f64 = f64::from_bits(0x7ff8_0000_0bad_cafe);

/// Reads rows of values; `null` becomes [`UNSET`].
pub fn rows(value: &Value) -> Result<Vec<Vec<f64>>> {
    let value_of = |value: &Value| if value.is_null() { Ok(UNSET) } else { float(value) };
    array(value)?.iter().map(|row| array(row)?.iter().map(value_of).collect()).collect()
}

pub fn array(value: &Value) -> Result<&Vec<Value>> {
    value.as_array().with_context(|| format!("{value} is no list"))
}

pub fn object(value: &Value) -> Result<&Map<String, Value>> {
    value.as_object().with_context(|| format!("{value} is no object"))
}

/// Reads a whole number that is not negative; `None` where it is absent or null.
pub fn count(value: &Value) -> Result<Option<u64>> {
    match value {
        Value::Null => Ok(None),
        _ => value.as_u64().map(Some).with_context(|| format!("{value} is no count")),
    }
}

pub fn text(value: &Value) -> Result<&str> {
    value.as_str().with_context(|| format!("{value} is no text"))
}

/// The event of this name. The names of custom events must live as long as the program, so only three of them are
/// known.
pub fn event_named(name: &str) -> Event {
    use Event::*;
    match name {
        "STARTED" => Started,
        "EPOCH_STARTED" => EpochStarted,
        "GET_BATCH_STARTED" => GetBatchStarted,
        "GET_BATCH_COMPLETED" => GetBatchCompleted,
        "ITERATION_STARTED" => IterationStarted,
        "ITERATION_COMPLETED" => IterationCompleted,
        "DATALOADER_STOP_ITERATION" => DataloaderStopIteration,
        "EXCEPTION_RAISED" => ExceptionRaised,
        "TERMINATE_SINGLE_EPOCH" => TerminateSingleEpoch,
        "EPOCH_COMPLETED" => EpochCompleted,
        "TERMINATE" => Terminate,
        "COMPLETED" => Completed,
        "INTERRUPT" => Interrupt,
        custom => Event::custom(custom.to_owned().leak()),
    }
}

/// The event with the filters that a spec gives; the spec's own event name is ignored.
pub fn filtered(event: Event, value: &Value) -> Result<FilteredEvent> {
    let mut event = FilteredEvent::from(event);
    if let Some(n) = count(&value["every"])? {
        event = event.every(n);
    }
    if let Some(n) = count(&value["before"])? {
        event = event.before(n);
    }
    if let Some(n) = count(&value["after"])? {
        event = event.after(n);
    }
    match &value["once"] {
        Value::Null => {}
        Value::Array(numbers) => {
            let numbers = numbers.iter().map(|n| count(n)?.context("a number"));
            event = event.once_at(numbers.collect::<Result<Vec<_>>>()?);
        }
        number => event = event.once_at(count(number)?),
    }
    Ok(event)
}

/// Reads an event, or a list of events.
pub fn events(value: &Value) -> Result<Events> {
    let one = |value: &Value| filtered(event_named(text(&value["name"])?), value);
    match value {
        Value::Array(list) => list.iter().map(one).collect(),
        _ => Ok(one(value)?.into()),
    }
}

/// The first difference between two lists, bit for bit.
pub fn same_bits(what: &str, ours: &[f64], theirs: &[f64]) -> Result<(), String> {
    if ours.len() != theirs.len() {
        return Err(format!("{what}: {} values instead of {}", ours.len(), theirs.len()));
    }
    match ours.iter().zip(theirs).position(|(a, b)| a.to_bits() != b.to_bits()) {
        Some(i) => Err(format!("{what}[{i}]: {:e} instead of {:e}", ours[i], theirs[i])),
        None => Ok(()),
    }
}

/// Whether two values are equal. Numbers are compared by value, so that 1 equals 1.0.
pub fn same_value(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Number(a), Value::Number(b)) => a.as_f64() == b.as_f64(),
        _ => a == b,
    }
}

/// The first key in which two objects differ.
pub fn same_object(
    what: &str,
    ours: &Map<String, Value>,
    theirs: &Map<String, Value>,
) -> Result<(), String> {
    for key in ours.keys().chain(theirs.keys()) {
        let absent = Value::String("absent".into());
        let (a, b) = (ours.get(key).unwrap_or(&absent), theirs.get(key).unwrap_or(&absent));
        if !same_value(a, b) {
            return Err(format!("{what}: '{key}' is {a} instead of {b}"));
        }
    }
    Ok(())
}
