//! Runs the cases of kind `schedule_resume`: a scheduler is saved after k events and loaded into a new one, which
//! must go on with the same values.

use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result};
use serde_json::Value;
use tch_ignite::optim::Knob;
use tch_ignite::schedule::{ParamScheduler, Schedule};

use super::Outcome;
use super::json::{array, count, float, floats, object, same_bits, same_object, text};
use super::optimizer::{Beside, Params, in_or_beside, store};
use super::schedule::{UNEVEN_WARMUP, near_rows, same_rows};
use super::specs::simple;

/// Classes of torch's that give the same values in ignite's wrapper as without it.
const SAME_WRAPPED: [&str; 4] = ["StepLR", "MultiStepLR", "OneCycleLR", "CyclicLR"];

pub fn run(config: &Value, expect: &Value, defect: &mut Option<&'static str>) -> Result<Outcome> {
    if config["state_param"] == true {
        return state_param(config, expect);
    }
    in_or_beside(defect, |beside, defect| in_optimizer(config, expect, beside, defect))
}

fn in_optimizer(
    config: &Value,
    expect: &Value,
    beside: Beside,
    defect: &mut Option<&'static str>,
) -> Result<Outcome> {
    let spec = &config["scheduler"];
    let name = text(&config["record"][0])?;
    let k = count(&config["k"])?.unwrap_or(0);
    let total = count(&config["total"])?.unwrap_or(0);
    let fresh = || -> Result<_> {
        let vs = store(&config["optimizer"])?;
        let params = Params::new(&config["optimizer"], &vs, &[spec], beside)?;
        Ok((params.scheduler(spec)?, params))
    };
    let (mut first, first_params) = fresh()?;
    let mut before = vec![];
    for _ in 0..k {
        first.advance()?;
        before.push(first_params.values(name)?);
    }
    let (saved, mut saved_first) = (first.state_dict(), first.first_state());
    // The first scheduler goes on without interruption, for comparison.
    let mut straight = vec![];
    for _ in k..total {
        first.advance()?;
        straight.push(first_params.values(name)?);
    }

    let (mut second, second_params) = fresh()?;
    if config["restore_optimizer_lr"] == true {
        second_params.set_lrs(&floats(&expect["optimizer_lr_at_k"])?)?;
    }
    second.load_state_dict(&saved)?;
    let mut after = vec![];
    for _ in k..total {
        second.advance()?;
        after.push(second_params.values(name)?);
    }
    let resumed = same_bits("resumed", &after.concat(), &straight.concat());
    let end = second.state_dict();
    let same_end = same_object("state_dict at the end", &end, &first.state_dict());
    let result = resumed.and(same_end);

    let torch = &spec["torch"]["type"];
    if spec["type"] == "LRScheduler" && !SAME_WRAPPED.iter().any(|class| torch == class) {
        *defect = Some("torch's schedulers are off by one in ignite's wrapper");
        return Ok(result.into());
    }
    let exact = !spec.to_string().contains("Torch");
    let rows = if exact { same_rows } else { near_rows };
    let same_before = rows("values_before", &before, &expect["values_before"])?;
    let same_after = rows("values_after", &after, &expect["values_after"])?;
    if (same_before.is_err() || same_after.is_err()) && uneven_warmup(spec, config) {
        *defect = Some(UNEVEN_WARMUP);
        return Ok(result.into());
    }
    if same_after.is_err() && expect["equals_uninterrupted"] == false {
        *defect = Some("a resumed scheduler of torch's goes on from the lr of the new optimizer");
        return Ok(result.and(same_before).into());
    }
    let result = result.and(same_before).and(same_after);
    // Only cyclical schedulers save the same values as ignite's.
    let cyclical = matches!(spec["type"].as_str(), Some("LinearCyclical" | "CosineAnnealing"));
    if !cyclical {
        return Ok(result.into());
    }
    let mut end = second.first_state();
    if second_params.is_beside(spec["param_name"].as_str().unwrap_or_default()) {
        // A knob beside the optimizer belongs to no group, so its state lacks the index.
        for state in [&mut saved_first, &mut end] {
            state.insert("param_group_index".into(), spec["param_group_index"].clone());
        }
    }
    Ok(result
        .and(same_object("state_dict", &saved_first, object(&expect["state_dict"])?))
        .and(same_object("state_dict_end", &end, object(&expect["state_dict_end"])?))
        .into())
}

/// Whether a scheduler warms up several groups.
fn uneven_warmup(spec: &Value, config: &Value) -> bool {
    spec["type"] == "WithWarmup"
        && config["optimizer"]["groups"].as_array().is_some_and(|groups| groups.len() > 1)
}

fn state_param(config: &Value, expect: &Value) -> Result<Outcome> {
    let schedule = simple(&config["scheduler"])?.context("a state schedule")?;
    let k = count(&config["k"])?.unwrap_or(0);
    let total = count(&config["total"])?.unwrap_or(0);
    let cell = Arc::new(Mutex::new(f64::NAN));
    let fresh = || {
        let (read, write) = (cell.clone(), cell.clone());
        let knob = Knob::new(
            "param",
            move || *read.lock().unwrap_or_else(PoisonError::into_inner),
            move |value| *write.lock().unwrap_or_else(PoisonError::into_inner) = value,
        );
        ParamScheduler::state("param", knob, schedule.clone())
    };
    let mut values = vec![];
    let mut first = fresh();
    for _ in 0..k {
        values.push(first.advance()?);
    }
    let mut second = fresh();
    second.load_state_dict(&first.state_dict())?;
    for _ in k..total {
        values.push(second.advance()?);
    }
    let flat = |rows: &Value| -> Result<Vec<f64>> {
        array(rows)?
            .iter()
            .map(|row| if row.is_array() { float(&row[0]) } else { float(row) })
            .collect()
    };
    let theirs = [flat(&expect["values_before"])?, flat(&expect["values_after"])?].concat();
    let straight: Vec<_> = schedule.simulate_values(total)?.into_iter().map(|(_, v)| v).collect();
    Ok(same_bits("values", &values, &theirs).and(same_bits("straight", &values, &straight)).into())
}
