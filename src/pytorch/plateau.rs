//! The state of torch's `ReduceLROnPlateau`, both ways.

use serde_json::{Map, Value as Json};

use super::json::{dict, to_json};
use super::schedules::{dict_of, fault};
use super::value::Value;
use crate::error::Result;
use crate::schedule::ReduceLROnPlateauScheduler;

/// Goes on where torch's `ReduceLROnPlateau` was: `saved` is its `state_dict()`. The reduced rate itself comes with the
/// optimizer's state. Where a schedule drives the same knob, [`load_scheduler`](super::load_scheduler) finds by how much
/// it is reduced: make the plateau, and load it, before that. What it has reduced here before does not count any more.
///
/// # Errors
/// Other arguments than here, which are told; a state of another scheduler. Nothing is changed then.
pub fn load_plateau(plateau: &mut ReduceLROnPlateauScheduler, saved: &Value) -> Result<()> {
    let dict = dict_of(saved)?;
    for (key, ours) in plateau.arguments() {
        let theirs = dict.get(&key).ok_or_else(|| fault(format!("it has no {key}")))?;
        let theirs = to_json(theirs)?;
        if !same(&ours, &theirs) {
            return Err(fault(format!("{key} is {theirs} there and {ours} here")));
        }
    }
    let mut state = plateau.state_dict();
    // Without them, schedules are not reduced.
    state.remove("reductions");
    for key in ["num_bad_epochs", "cooldown_counter", "last_epoch"] {
        let count = dict.get(key).and_then(Value::as_i64);
        let count = count.ok_or_else(|| fault(format!("it has no {key}")))?;
        let ours = if key == "last_epoch" { "event_index" } else { key };
        state.insert(ours.into(), count.into());
    }
    let best = dict.get("best").and_then(Value::as_f64);
    let best = best.ok_or_else(|| fault("it has no best"))?;
    let best = if best.is_finite() { best.into() } else { Json::Null };
    state.insert("best".into(), best);
    plateau.load_state_dict(&state)
}

/// Numbers are compared as such: Python's may be integers. A lowest rate for all groups is repeated there.
fn same(ours: &Json, theirs: &Json) -> bool {
    match (ours, theirs) {
        (Json::Array(ours), Json::Array(theirs)) => {
            let at = |index: usize| ours.get(index).or(ours.first().filter(|_| ours.len() == 1));
            theirs.len() >= ours.len()
                && theirs.iter().enumerate().all(|(i, one)| at(i).is_some_and(|own| same(own, one)))
        }
        _ => match (ours.as_f64(), theirs.as_f64()) {
            (Some(ours), Some(theirs)) => ours == theirs,
            _ => ours == theirs,
        },
    }
}

/// The state of a plateau for `scheduler.load_state_dict()` of torch's `ReduceLROnPlateau`.
///
/// # Errors
/// A rate that cannot be read.
pub fn plateau_value(plateau: &ReduceLROnPlateauScheduler) -> Result<Value> {
    let (arguments, state): (Map<_, _>, _) = (plateau.arguments(), plateau.state_dict());
    let mut value = dict(&arguments);
    let is_min = value.get("mode").and_then(Value::as_str) == Some("min");
    let worst = if is_min { f64::INFINITY } else { f64::NEG_INFINITY };
    value.insert("mode_worse", worst);
    for (key, json) in &dict(&state).entries {
        match key.as_str() {
            Some("event_index") => value.insert("last_epoch", json.clone()),
            Some("best") if matches!(json, Value::None) => value.insert("best", worst),
            Some("reductions") | None => {}
            Some(key) => value.insert(key, json.clone()),
        }
    }
    let rates = plateau.values()?;
    if let Some(Value::List(lowest)) = value.get("min_lrs").cloned()
        && let ([lowest], true) = (&lowest[..], rates.len() > 1)
    {
        value.insert("min_lrs", Value::list(rates.iter().map(|_| lowest.clone())));
    }
    value.insert("_last_lr", Value::list(rates));
    Ok(value.into())
}
