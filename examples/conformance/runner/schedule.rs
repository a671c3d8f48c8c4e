//! Runs the cases of kind `schedule`, which say the value of a scheduled parameter in each step, and the state of the
//! scheduler.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result};
use serde_json::Value;
use tch_ignite::engine::{Engine, Until};
use tch_ignite::optim::Knob;
use tch_ignite::schedule::{ParamScheduler, ReduceLROnPlateauScheduler, Schedule, ThresholdMode};

use super::Outcome;
use super::json::{array, count, events, float, floats, object, rows, text};
use super::optimizer::{Beside, Params, in_or_beside, optimizer, refused_negative, store, values};
use super::specs::{Bases, late_zero, leaves, simple};

/// The tolerance of tests/golden/README.md, "Tolerances", for values that are not computed in ignite's order of
/// operations.
const RELATIVE: f64 = 1e-12;

pub fn run(config: &Value, expect: &Value, defect: &mut Option<&'static str>) -> Result<Outcome> {
    let entries = array(&config["schedulers"])?;
    let spec = &entries.first().context("no scheduler")?["scheduler"];
    if spec["type"] == "ReduceLROnPlateau" {
        return plateau(config, expect, defect);
    }
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
    let entries = array(&config["schedulers"])?;
    let spec = &entries.first().context("no scheduler")?["scheduler"];
    let wrapped = spec["type"] == "LRScheduler";
    let expected = match wrapped {
        true => &expect["torch_native"],
        false => &expect["values"],
    };
    let vs = store(&config["optimizer"])?;
    let specs: Vec<_> = entries.iter().map(|entry| &entry["scheduler"]).collect();
    let params = Params::new(&config["optimizer"], &vs, &specs, beside)?;
    let exact = !specs.iter().any(|spec| spec.to_string().contains("Torch"));
    let record: Vec<&str> = array(&config["record"])?.iter().map(text).collect::<Result<_>>()?;
    anyhow::ensure!(!record.is_empty(), "nothing is recorded");

    let mut trainer = Engine::new(|seen: &mut Vec<Vec<Vec<f64>>>, _, _: ()| {
        for (name, seen) in record.iter().zip(seen) {
            seen.push(params.values(name)?);
        }
        Ok(())
    });
    let mut schedulers = Vec::new();
    for entry in entries {
        let mut scheduler = params.scheduler(&entry["scheduler"])?;
        let events = events(&entry["event"])?;
        scheduler = match wrapped {
            true => scheduler.torchs_on(events, steps_before(&entry["event"])),
            false => scheduler.on(events),
        };
        let scheduler = Rc::new(RefCell::new(scheduler));
        trainer.attach(scheduler.clone());
        schedulers.push(scheduler);
    }
    let mut seen = vec![vec![]; record.len()];
    let length = count(&config["run"]["epoch_length"])?.unwrap_or(1);
    let epochs = count(&config["run"]["max_epochs"])?.unwrap_or(1);
    let ran = trainer.run(&mut seen, vec![(); length as usize], Until::epochs(epochs));
    let ran = match ran.map_err(anyhow::Error::from) {
        Err(error) if refused_negative(&error).is_some() => return Err(error),
        ran => ran,
    };
    let history = &trainer.state.param_history;
    if expect["error"]["type"] == "ZeroDivisionError" {
        *defect = Some("a cycle that shrinks to nothing divides by zero");
        let text = ran.err().map(|error| format!("{error:#}"));
        if !text.as_ref().is_some_and(|text| text.contains("shrinks the cycle")) {
            return Ok(Outcome::Failed(format!("ends with {text:?}")));
        }
        // The counters are not compared, because ignite's event fails before it has counted.
        return Ok(compare(exact, expected, expect, &record, &seen, history)?.into());
    }
    ran?;
    if wrapped {
        if expect["same_as_torch_native"] == false {
            *defect = Some("torch's schedulers are off by one in ignite's wrapper");
        }
        return Ok(near_rows("lr", &seen[0], expected)?.into());
    }
    if late_zero(spec)? {
        *defect = Some("a duration of 0 after another makes a Concat stay there for ever");
        return Ok(skips_zeros(spec, config, &seen[0])?.into());
    }
    let result = compare(exact, expected, expect, &record, &seen, history)?;
    let lr = record.iter().position(|name| *name == "lr");
    if let (Err(_), [spec], Some(index)) = (&result, &specs[..], lr) {
        let theirs = if index == 0 { expected } else { &expect["extra"]["lr"] };
        if let Some(outcome) = uneven_warmup(spec, config, theirs, &seen[index], defect)? {
            return Ok(outcome);
        }
    }
    if result.is_err() && specs.len() > 1 && specs.iter().any(|spec| has_defect(spec, config)) {
        return Outcome::skipped(
            "several schedulers, of which one is torch's or shows a defect of ignite's",
        );
    }
    let plain =
        |entry: &Value| simple(&entry["scheduler"]).is_ok_and(|schedule| schedule.is_some());
    let indices = expect["final_event_index"].as_array().into_iter().flatten();
    let counted = entries.iter().zip(&schedulers).zip(indices);
    let result = result.and_then(|()| {
        for ((_, scheduler), theirs) in counted.filter(|((entry, _), _)| plain(entry)) {
            let ours = &scheduler.borrow().first_state()["event_index"];
            if ours != theirs {
                return Err(format!("event_index is {ours} instead of {theirs}"));
            }
        }
        Ok(())
    });
    Ok(result.and(simulated(spec, config, expect, defect)?).into())
}

/// Whether all events follow the training step.
fn steps_before(event: &Value) -> bool {
    const BEFORE: [&str; 5] = [
        "STARTED",
        "EPOCH_STARTED",
        "GET_BATCH_STARTED",
        "GET_BATCH_COMPLETED",
        "ITERATION_STARTED",
    ];
    let follows = |event: &Value| !BEFORE.iter().any(|name| event["name"] == *name);
    event.as_array().map_or_else(|| follows(event), |events| events.iter().all(follows))
}

/// Whether ignite's values of a scheduler are wrong, or depend on other schedulers' values. The latter holds for
/// torch's schedulers, which compute the next value from the current one of the group.
fn has_defect(spec: &Value, config: &Value) -> bool {
    let several = array(&config["optimizer"]["groups"]).is_ok_and(|groups| groups.len() > 1);
    spec.to_string().contains("torch")
        || (spec["type"] == "WithWarmup" && several)
        || late_zero(spec).unwrap_or(false)
}

/// Compares rows of values: bit for bit if `exact`, as for ignite's own schedules, which are computed in ignite's
/// order of operations.
fn same(what: &str, ours: &[Vec<f64>], theirs: &Value, exact: bool) -> Result<Result<(), String>> {
    if exact { same_rows(what, ours, theirs) } else { near_rows(what, ours, theirs) }
}

fn compare(
    exact: bool,
    expected: &Value,
    expect: &Value,
    record: &[&str],
    seen: &[Vec<Vec<f64>>],
    history: &BTreeMap<String, Vec<Vec<f64>>>,
) -> Result<Result<(), String>> {
    for (index, (name, ours)) in record.iter().zip(seen).enumerate() {
        let theirs = if index == 0 { expected } else { &expect["extra"][name] };
        if let Err(difference) = same(name, ours, theirs, exact)? {
            return Ok(Err(difference));
        }
    }
    if !expect["param_history"].is_null() {
        let theirs = object(&expect["param_history"])?;
        if theirs.keys().ne(history.keys()) {
            return Ok(Err(format!("param_history has {:?}", history.keys())));
        }
        for (name, theirs) in theirs {
            // The history has one entry for each group where each group has its scheduler, so entries are compared
            // joined together.
            let (ours, theirs) = (history[name].concat(), rows(theirs)?.concat());
            if let Err(difference) = near("param_history", &ours, &theirs) {
                return Ok(Err(difference));
            }
        }
    }
    Ok(Ok(()))
}

/// Compares within the tolerance, for torch's schedules, whose order of operations may differ.
fn near(what: &str, ours: &[f64], theirs: &[f64]) -> Result<(), String> {
    if ours.len() != theirs.len() {
        return Err(format!("{what}: {} values instead of {}", ours.len(), theirs.len()));
    }
    for (i, (a, b)) in ours.iter().zip(theirs).enumerate() {
        let close = (a - b).abs() <= RELATIVE * b.abs().max(1e-3);
        if a.to_bits() != b.to_bits() && !close {
            return Err(format!("{what}[{i}]: {a:e} instead of {b:e}"));
        }
    }
    Ok(())
}

pub fn near_rows(what: &str, ours: &[Vec<f64>], theirs: &Value) -> Result<Result<(), String>> {
    let theirs = rows(theirs)?;
    if ours.len() != theirs.len() {
        return Ok(Err(format!("{what}: {} rows instead of {}", ours.len(), theirs.len())));
    }
    let rows = ours.iter().zip(&theirs).enumerate();
    let mut rows = rows.map(|(i, (a, b))| near(&format!("{what}[{i}]"), a, b));
    Ok(rows.find(Result::is_err).unwrap_or(Ok(())))
}

/// Compares rows of values bit for bit.
pub fn same_rows(what: &str, ours: &[Vec<f64>], theirs: &Value) -> Result<Result<(), String>> {
    let theirs = rows(theirs)?;
    if ours.len() != theirs.len() {
        return Ok(Err(format!("{what}: {} rows instead of {}", ours.len(), theirs.len())));
    }
    let rows = ours.iter().zip(&theirs).enumerate();
    let mut rows = rows.map(|(i, (a, b))| super::json::same_bits(&format!("{what}[{i}]"), a, b));
    Ok(rows.find(Result::is_err).unwrap_or(Ok(())))
}

/// Compares `simulate_values` with ignite's, or with the values of a run where ignite's simulation has a defect.
fn simulated(
    spec: &Value,
    config: &Value,
    expect: &Value,
    defect: &mut Option<&'static str>,
) -> Result<Result<(), String>> {
    if expect["simulated"].is_null() {
        return Ok(Ok(()));
    }
    let theirs = array(&expect["simulated"])?;
    let leaves = leaves(spec, &Bases(&config["optimizer"]))?;
    let ours: Vec<_> = leaves
        .iter()
        .map(|leaf| leaf.schedule.simulate_values(theirs.len() as u64))
        .collect::<tch_ignite::Result<_>>()?;
    if spec["type"] == "ParamGroup" {
        *defect = Some("simulate_values of a ParamGroup reads before it calls");
        let vs = store(&config["optimizer"])?;
        let params = Params::new(&config["optimizer"], &vs, &[spec], Beside::Scheduled)?;
        let mut scheduler = params.scheduler(spec)?;
        for event in 0..theirs.len() {
            scheduler.advance()?;
            for (index, (leaf, ours)) in leaves.iter().zip(&ours).enumerate() {
                let overwritten = leaves[index + 1..].iter().any(|later| later.param == leaf.param);
                let value = params.values(&leaf.param)?[leaf.group.unwrap_or(0)];
                if !overwritten && value != ours[event].1 {
                    return Ok(Err(format!("simulate_values differs at event {event}")));
                }
            }
        }
        return Ok(Ok(()));
    }
    for (event, theirs) in theirs.iter().enumerate() {
        // ignite gives one number for all groups, or one for each group.
        let theirs = array(theirs)?;
        let values = theirs.get(1).context("a simulated value")?;
        let values = if values.is_array() { floats(values)? } else { floats(&theirs[1..].into())? };
        let mut ours: Vec<_> =
            ours.iter().take(values.len()).map(|values| values[event].1).collect();
        if let [only] = ours[..] {
            // One schedule drives all groups.
            ours.resize(values.len(), only);
        }
        if let Err(difference) = near("simulate_values", &ours, &values) {
            if spec["type"] == "WithWarmup" && leaves.len() > 1 {
                *defect = Some(UNEVEN_WARMUP);
                return Ok(Ok(()));
            }
            return Ok(Err(format!("{difference} at event {event}")));
        }
    }
    Ok(Ok(()))
}

/// Checks that a Concat gives the same values without its schedules of duration 0.
fn skips_zeros(spec: &Value, config: &Value, seen: &[Vec<f64>]) -> Result<Result<(), String>> {
    fn without_zeros(spec: &Value) -> Value {
        let mut spec = spec.clone();
        let Some(children) = spec["schedulers"].as_array() else { return spec };
        let children: Vec<_> = children.iter().map(without_zeros).collect();
        let durations: Vec<_> =
            spec["durations"].as_array().into_iter().flatten().cloned().collect();
        let zero = |index: usize| durations.get(index).is_some_and(|duration| duration == 0);
        let kept = children.iter().enumerate().filter(|(index, _)| !zero(*index));
        let kept: Vec<_> = kept.map(|(_, child)| child.clone()).collect();
        let durations: Vec<_> = durations.into_iter().filter(|duration| duration != 0).collect();
        if let ([only], "Concat") = (&kept[..], spec["type"].as_str().unwrap_or_default()) {
            return only.clone();
        }
        spec["schedulers"] = kept.into();
        spec["durations"] = durations.into();
        spec
    }
    let leaf = leaves(&without_zeros(spec), &Bases(&config["optimizer"]))?;
    let expected = leaf[0].schedule.simulate_values(seen.len() as u64)?;
    let column: Vec<_> = seen.iter().map(|row| row[leaf[0].group.unwrap_or(0)]).collect();
    let expected: Vec<_> = expected.into_iter().map(|(_, value)| value).collect();
    Ok(near("lr", &column, &expected))
}

pub const UNEVEN_WARMUP: &str =
    "the warm-up of several groups follows the last one, and loses first values";

/// Checks the warm-up of several groups, where ignite has a defect: it takes the length of the warm-up from the last
/// group, and for torch's schedules forgets the first value of all groups but the first.
fn uneven_warmup(
    spec: &Value,
    config: &Value,
    theirs: &Value,
    seen: &[Vec<f64>],
    defect: &mut Option<&'static str>,
) -> Result<Option<Outcome>> {
    if spec["type"] != "WithWarmup" {
        return Ok(None);
    }
    let leaves = leaves(spec, &Bases(&config["optimizer"]))?;
    let duration = count(&spec["warmup_duration"])?.unwrap_or(0);
    let last_of_warmup = duration.saturating_sub(1);
    let at_start = |leaf: &super::specs::Leaf| leaf.schedule.at(last_of_warmup);
    let torchs = spec["lr_scheduler"]["type"] == "Torch";
    let inner: Vec<_> = leaves.iter().map(|leaf| leaf.schedule.at(duration)).collect();
    let theirs = rows(theirs)?;
    if leaves.len() < 2 {
        return Ok(None);
    }
    *defect = Some(UNEVEN_WARMUP);
    // Values are compared up to the end of the warm-up, which comes one event earlier where the schedule begins with
    // the end value.
    let at_once = config["schedulers"][0]["event"].as_array().map_or(1, Vec::len).max(1);
    let steps = (last_of_warmup as usize / at_once).min(seen.len()).min(theirs.len());
    let ours: Vec<_> = seen[..steps].concat();
    let result = near("warm-up", &ours, &theirs[..steps].concat()).and_then(|()| {
        // After the warm-up, ignite's groups follow their schedules at different times, so only the last group is
        // compared.
        for (leaf, first) in leaves.iter().zip(&inner) {
            let end = at_start(leaf);
            if !end.is_finite() || !first.is_finite() {
                return Err(format!("group {:?} has no value after the warm-up", leaf.group));
            }
        }
        let last = leaves.len() - 1;
        let column = |rows: &[Vec<f64>]| rows.iter().map(|row| row[last]).collect::<Vec<_>>();
        if torchs { Ok(()) } else { near("last group", &column(seen), &column(&theirs)) }
    });
    Ok(Some(result.into()))
}

/// Runs a case of ignite's state parameter schedulers, which drive a value of the user's own.
fn state_param(config: &Value, expect: &Value) -> Result<Outcome> {
    let entry = &config["schedulers"][0];
    let schedule = simple(&entry["scheduler"])?.context("a state schedule")?;
    let cell = Arc::new(Mutex::new(None));
    let (read, write) = (cell.clone(), cell.clone());
    let locked =
        |cell: &Arc<Mutex<Option<f64>>>| *cell.lock().unwrap_or_else(PoisonError::into_inner);
    let knob = Knob::new(
        "param",
        move || locked(&read).unwrap_or(f64::NAN),
        move |value| {
            *write.lock().unwrap_or_else(PoisonError::into_inner) = Some(value);
        },
    );
    let mut trainer = Engine::new(|seen: &mut Vec<Option<f64>>, _, _: ()| {
        seen.push(locked(&cell));
        Ok(())
    });
    let history = entry["scheduler"]["save_history"] == true;
    let scheduler = ParamScheduler::state("param", knob, schedule).save_history(history);
    let scheduler = Rc::new(RefCell::new(scheduler.on(events(&entry["event"])?)));
    trainer.attach(scheduler.clone());
    let length = count(&config["run"]["epoch_length"])?.unwrap_or(1);
    let epochs = count(&config["run"]["max_epochs"])?.unwrap_or(1);
    let mut seen = vec![];
    trainer.run(&mut seen, vec![(); length as usize], Until::epochs(epochs))?;

    let optional = |value: &Value| if value.is_null() { Ok(None) } else { float(value).map(Some) };
    let theirs: Vec<_> = array(&expect["values"])?.iter().map(optional).collect::<Result<_>>()?;
    let unset = |values: &[Option<f64>]| values.iter().take_while(|value| value.is_none()).count();
    let flat = |values: &[Option<f64>]| values.iter().flatten().copied().collect::<Vec<_>>();
    let mut result = near("param", &flat(&seen), &flat(&theirs));
    if unset(&seen) != unset(&theirs) {
        result = Err(format!("set after {} steps instead of {}", unset(&seen), unset(&theirs)));
    }
    let index = &scheduler.borrow().state_dict()["event_index"];
    if *index != expect["final_event_index"][0] {
        result = Err(format!("event_index is {index}"));
    }
    Ok(result.into())
}

/// Runs a case of ReduceLROnPlateau. An epoch has one step; the scheduler reads the metric at its end.
fn plateau(config: &Value, expect: &Value, defect: &mut Option<&'static str>) -> Result<Outcome> {
    let spec = &config["schedulers"][0]["scheduler"];
    let vs = store(&config["optimizer"])?;
    let optimizer = optimizer(&config["optimizer"], &vs)?;
    let knob = super::optimizer::knob(spec, &optimizer)?;
    let metric = text(&spec["metric_name"])?;
    let mut scheduler = match spec["mode"] == "max" {
        true => ReduceLROnPlateauScheduler::max("lr", knob, metric)?,
        false => ReduceLROnPlateauScheduler::min("lr", knob, metric)?,
    };
    if !spec["factor"].is_null() {
        scheduler = scheduler.factor(float(&spec["factor"])?);
    }
    if let Some(patience) = count(&spec["patience"])? {
        scheduler = scheduler.patience(patience);
    }
    let mode =
        if spec["threshold_mode"] == "abs" { ThresholdMode::Abs } else { ThresholdMode::Rel };
    let threshold = if spec["threshold"].is_null() { 1e-4 } else { float(&spec["threshold"])? };
    scheduler =
        scheduler.threshold(threshold, mode).cooldown(count(&spec["cooldown"])?.unwrap_or(0));
    if !spec["eps"].is_null() {
        scheduler = scheduler.eps(float(&spec["eps"])?);
    }
    match &spec["min_lr"] {
        Value::Null => {}
        Value::Array(_) => scheduler = scheduler.min_value(floats(&spec["min_lr"])?),
        value => scheduler = scheduler.min_value([float(value)?]),
    }
    let metrics = floats(&config["metrics"])?;
    let epochs = metrics.len() as u64;
    let metrics = Cell::new(metrics);
    let mut trainer = Engine::new(|seen: &mut Vec<Vec<f64>>, engine, _: ()| {
        seen.push(values(&optimizer, "lr")?);
        let all = metrics.take();
        engine.state.metrics.set(metric, all[engine.state.epoch as usize - 1]);
        metrics.set(all);
        Ok(())
    });
    trainer.attach(scheduler.save_history(spec["save_history"] == true));
    let mut seen = vec![];
    trainer.run(&mut seen, vec![()], Until::epochs(epochs))?;
    seen.push(values(&optimizer, "lr")?);
    // ignite drops min_lr, or looks it up at the wrong place.
    let native = expect["same_as_torch_native"] == false;
    if native {
        *defect = Some("min_lr of a plateau scheduler is dropped or taken from another group");
    }
    let expected = if native { &expect["torch_native"] } else { &expect["values"] };
    let group = count(&spec["param_group_index"])?.map(|group| group as usize);
    if let (true, Some(group)) = (native, group) {
        // torch's own scheduler drives all groups, so only the group that the case drives is compared.
        let theirs =
            array(expected)?.iter().map(|row| float(&row[group])).collect::<Result<Vec<_>>>()?;
        let ours: Vec<_> = seen.iter().map(|row| row[group]).collect();
        return Ok(near("lr", &ours, &theirs).into());
    }
    Ok(near_rows("lr", &seen, expected)?.into())
}
