//! Runs cases of `EarlyStopping`, which say how it counts and when it stops for a list of scores.

use std::cmp::Ordering;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use tch_ignite::handlers::EarlyStopping;
use tch_ignite::schedule::ThresholdMode;

use super::super::Outcome;
use super::super::json::{array, count, float, floats, text};

/// IGNITE 1.9 describes this defect.
const NAN: &str = "a NaN score counts as an improvement and becomes the best";

/// `(counter, best score)` after a score; the best score is `None` until there is one.
type Step = (u64, Option<f64>);

/// Computes the steps by ignite's rules. With `nan_is_better` they must be ignite's results; without, they are what
/// this crate must do.
fn by_rule(config: &Value, nan_is_better: bool) -> Result<Vec<Step>> {
    let threshold = float(&config["threshold"])?;
    let (max, rel) = (config["mode"] == "max", config["threshold_mode"] == "rel");
    let sign = if max { 1. } else { -1. };
    let bar = |best: f64, threshold: f64| match rel {
        true => best * (1. + sign * threshold),
        false => best + sign * threshold,
    };
    let passes = |score: f64, bar: f64| match nan_is_better {
        // `score > bar` would be false for NaN, which ignite takes for better.
        true if max => !matches!(score.partial_cmp(&bar), Some(Ordering::Less | Ordering::Equal)),
        true => !matches!(score.partial_cmp(&bar), Some(Ordering::Greater | Ordering::Equal)),
        false if max => score > bar,
        false => score < bar,
    };
    let (mut counter, mut best) = (0, None);
    let mut steps = vec![];
    for score in floats(&config["scores"])? {
        match best {
            None if nan_is_better || !score.is_nan() => (counter, best) = (0, Some(score)),
            Some(old) if passes(score, bar(old, threshold)) => (counter, best) = (0, Some(score)),
            Some(old) => {
                counter += 1;
                if config["cumulative"] != true && passes(score, old) {
                    best = Some(score);
                }
            }
            None => counter += 1,
        }
        steps.push((counter, best));
    }
    Ok(steps)
}

fn same(what: &str, ours: &[Step], theirs: &[Step]) -> Result<(), String> {
    if ours.len() != theirs.len() {
        return Err(format!("{what}: {} scores instead of {}", ours.len(), theirs.len()));
    }
    let bits = |step: &Step| (step.0, step.1.map(f64::to_bits));
    match ours.iter().zip(theirs).position(|(a, b)| bits(a) != bits(b)) {
        Some(i) => Err(format!("{what}[{i}]: {:?} instead of {:?}", ours[i], theirs[i])),
        None => Ok(()),
    }
}

fn handler(config: &Value) -> Result<EarlyStopping> {
    let patience = count(&config["patience"])?.context("patience")?;
    let handler = match text(&config["mode"])? {
        "max" => EarlyStopping::max("score", patience),
        "min" => EarlyStopping::min("score", patience),
        other => bail!("no mode {other}"),
    };
    let mode = match text(&config["threshold_mode"])? {
        "abs" => ThresholdMode::Abs,
        "rel" => ThresholdMode::Rel,
        other => bail!("no threshold mode {other}"),
    };
    let handler = handler.threshold(float(&config["threshold"])?, mode);
    Ok(handler.cumulative_delta(config["cumulative"] == true))
}

pub fn run(config: &Value, expect: &Value, defect: &mut Option<&'static str>) -> Result<Outcome> {
    let scores = floats(&config["scores"])?;
    let given = |step: &Value| -> Result<Step> {
        let best = &step["best_score"];
        Ok((
            count(&step["counter"])?.context("counter")?,
            (!best.is_null()).then(|| float(best)).transpose()?,
        ))
    };
    let theirs = array(&expect["trace"])?.iter().map(given).collect::<Result<Vec<_>>>()?;
    let mut result = same("rules of ignite", &by_rule(config, true)?, &theirs);

    let theirs = match scores.iter().any(|score| score.is_nan()) {
        true => {
            *defect = Some(NAN);
            by_rule(config, false)?
        }
        false => theirs,
    };
    let save_after = count(&config["save_load_after"])?;
    let mut stop = handler(config)?;
    let (mut ours, mut first_stop) = (vec![], None);
    for (index, score) in scores.iter().enumerate() {
        if save_after == Some(index as u64) {
            let saved = stop.state_dict();
            if defect.is_none() {
                let theirs = &expect["state_dict_saved"];
                result = result.and(saved_as("state_dict_saved", &saved, theirs));
            }
            stop = handler(config)?;
            stop.load_state_dict(&saved)?;
        }
        if stop.advance(*score)? {
            first_stop.get_or_insert(index as u64);
        }
        ours.push((stop.counter(), stop.best_score()));
    }
    result = result.and(same("trace", &ours, &theirs));
    let patience = count(&config["patience"])?;
    let stopped = theirs.iter().position(|(counter, _)| Some(*counter) >= patience);
    let stopped = match defect {
        Some(_) => stopped.map(|index| index as u64),
        None => {
            result = result.and(saved_as("state_dict", &stop.state_dict(), &expect["state_dict"]));
            count(&expect["first_stop_index"])?
        }
    };
    if first_stop != stopped {
        result = result.and(Err(format!("stops at {first_stop:?} instead of {stopped:?}")));
    }
    Ok(result.into())
}

/// Checks that our saved state has every value that ignite saves.
fn saved_as(
    what: &str,
    ours: &serde_json::Map<String, Value>,
    theirs: &Value,
) -> Result<(), String> {
    for (key, value) in theirs.as_object().into_iter().flatten() {
        let own = ours.get(key).unwrap_or(&Value::Null);
        if *own != *value && own.as_f64() != value.as_f64() {
            return Err(format!("{what}: {key} is {own} instead of {}", json!(value)));
        }
    }
    Ok(())
}
