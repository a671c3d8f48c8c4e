//! Kind `schedule`: what the step sees of a scheduled parameter, and what the scheduler remembers.

use std::cell::RefCell;
use std::rc::Rc;

use anyhow::Result;
use serde_json::Value;
use tch_ignite::engine::{Engine, Until};

use super::Outcome;
use super::json::{array, count, events, float, floats, object, same_bits, text};
use super::optimizer::{Params, beside, missing_class, schedule, store};

pub fn run(config: &Value, expect: &Value, defect: &mut Option<&'static str>) -> Result<Outcome> {
    let entries = array(&config["schedulers"])?;
    if let Some(reason) = entries.iter().find_map(|entry| missing_class(&entry["scheduler"])) {
        return Outcome::skipped(reason);
    }
    let vs = store(&config["optimizer"])?;
    let specs = entries.iter().map(|entry| &entry["scheduler"]);
    let beside = beside(&config["optimizer"], specs, &[&expect["values"], &expect["extra"]]);
    *defect = beside.and_then(|(_, defect)| defect);
    let params = Params::new(&config["optimizer"], &vs, beside.map(|(name, _)| name))?;
    let record: Vec<&str> = array(&config["record"])?.iter().map(text).collect::<Result<_>>()?;

    let mut trainer = Engine::new(|seen: &mut Vec<Vec<Vec<f64>>>, _, _: ()| {
        for (name, seen) in record.iter().zip(seen) {
            seen.push(params.values(name)?);
        }
        Ok(())
    });
    let mut schedulers = Vec::new();
    for entry in entries {
        let scheduler = params.scheduler(&entry["scheduler"])?.on(events(&entry["event"])?);
        let scheduler = Rc::new(RefCell::new(scheduler));
        trainer.attach(scheduler.clone());
        schedulers.push(scheduler);
    }
    let mut seen = vec![vec![]; record.len()];
    let length = count(&config["run"]["epoch_length"])?.unwrap_or(1);
    let epochs = count(&config["run"]["max_epochs"])?.unwrap_or(1);
    let ran = trainer.run(&mut seen, vec![(); length as usize], Until::epochs(epochs));
    if expect["error"]["type"] == "ZeroDivisionError" {
        *defect = Some("a cycle that shrinks to nothing divides by zero");
        let text = ran.err().map(|error| format!("{:#}", anyhow::Error::from(error)));
        if !text.as_ref().is_some_and(|text| text.contains("shrinks the cycle")) {
            return Ok(Outcome::Failed(format!("ends with {text:?}")));
        }
        // ignite's counter is lost in the middle of the failing event.
        return Ok(compare(config, expect, &record, &seen, &trainer.state.param_history)?.into());
    } else {
        ran?;
    }

    Ok(compare(config, expect, &record, &seen, &trainer.state.param_history)?
        .and_then(|()| {
            for (scheduler, theirs) in
                schedulers.iter().zip(expect["final_event_index"].as_array().into_iter().flatten())
            {
                let ours = &scheduler.borrow().state_dict()["event_index"];
                if ours != theirs {
                    return Err(format!("event_index is {ours} instead of {theirs}"));
                }
            }
            Ok(())
        })
        .into())
}

fn compare(
    config: &Value,
    expect: &Value,
    record: &[&str],
    seen: &[Vec<Vec<f64>>],
    history: &std::collections::BTreeMap<String, Vec<Vec<f64>>>,
) -> Result<Result<(), String>> {
    for (index, (name, ours)) in record.iter().zip(seen).enumerate() {
        let theirs = if index == 0 { &expect["values"] } else { &expect["extra"][name] };
        if let Err(difference) = same_rows(name, ours, theirs)? {
            return Ok(Err(difference));
        }
    }
    if !expect["param_history"].is_null() {
        let theirs = object(&expect["param_history"])?;
        if theirs.keys().ne(history.keys()) {
            return Ok(Err(format!("param_history has {:?}", history.keys())));
        }
        for (name, rows) in theirs {
            if let Err(difference) = same_rows("param_history", &history[name], rows)? {
                return Ok(Err(difference));
            }
        }
    }
    if !expect["simulated"].is_null() {
        let theirs = array(&expect["simulated"])?;
        let spec = &config["schedulers"][0]["scheduler"];
        let ours = schedule(spec)?.simulate_values(theirs.len() as u64)?;
        for (ours, theirs) in ours.iter().zip(theirs) {
            let theirs = (theirs[0].as_u64(), float(&theirs[1])?);
            if (Some(ours.0), ours.1.to_bits()) != (theirs.0, theirs.1.to_bits()) {
                return Ok(Err(format!("simulate_values gives {ours:?} instead of {theirs:?}")));
            }
        }
    }
    Ok(Ok(()))
}

pub fn same_rows(what: &str, ours: &[Vec<f64>], theirs: &Value) -> Result<Result<(), String>> {
    let theirs: Vec<_> = array(theirs)?.iter().map(floats).collect::<Result<_>>()?;
    if ours.len() != theirs.len() {
        return Ok(Err(format!("{what}: {} rows instead of {}", ours.len(), theirs.len())));
    }
    let rows = ours.iter().zip(&theirs).enumerate();
    Ok(rows
        .map(|(i, (a, b))| same_bits(&format!("{what}[{i}]"), a, b))
        .find(Result::is_err)
        .unwrap_or(Ok(())))
}
