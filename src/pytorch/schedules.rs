//! States of `torch.optim.lr_scheduler`, read.

use std::fmt;

use serde_json::{Map, Value as Json, json};

use super::json::{object, to_json};
use super::value::{Dict, Value};
use crate::error::{Error, Result};
use crate::optim::Knob;
use crate::schedule::{AnySchedule, CyclicLR, OneCycleLR, ParamScheduler, Schedule};

/// How many values are compared from where a run goes on.
const COMPARED: u64 = 1000;
/// More updates than runs have: a few bytes may claim any number, and each value is made from the one before.
const MAX_UPDATES: u64 = 100_000_000;
/// More milestones than anybody writes down; each update looks at all.
const MAX_MILESTONES: usize = 100;

/// Makes the schedule of a group's learning rate from the `state_dict()` of a scheduler of torch: `StepLR`,
/// `MultiStepLR`, `ConstantLR`, `LinearLR`, `ExponentialLR`, `PolynomialLR`, `CosineAnnealingLR`,
/// `CosineAnnealingWarmRestarts`, `CyclicLR`, `OneCycleLR`, `SequentialLR` and `ChainedScheduler`. All their arguments
/// are in the file, but for `OneCycleLR`, which keeps some in `optimizer`, the optimizer's `state_dict()`. Groups count
/// from 0, as there.
///
/// # Errors
/// Another scheduler, or one whose arguments are functions.
pub fn schedule(saved: &Value, optimizer: &Value, group: usize) -> Result<AnySchedule> {
    made(saved, optimizer, group, false)
}

/// Makes the schedule of a group's momentum (`beta1` for Adam and AdamW) from the state of torch's `OneCycleLR` or
/// `CyclicLR`: see [`schedule`].
///
/// # Errors
/// A scheduler that leaves the momentum alone.
pub fn momentum_schedule(saved: &Value, optimizer: &Value, group: usize) -> Result<AnySchedule> {
    made(saved, optimizer, group, true)
}

/// Goes on where a scheduler of Python was: `saved` is its `state_dict()`, of torch or of ignite, and `optimizer` that of
/// its optimizer, which comes with the learning rate. Update `k` then has the value that it has in Python.
///
/// The schedule must have the values of Python's from there on; that of the file itself is made by [`schedule`]. Of a
/// `LambdaLR` or `MultiplicativeLR`, whose functions are in no file, the last value is compared.
///
/// Where a [`ReduceLROnPlateauScheduler`](crate::schedule::ReduceLROnPlateauScheduler) is there for the same knob, the
/// optimizer's rate tells by how much a plateau had lowered Python's, and all values from there on are lowered as much.
/// torch's `StepLR`, `MultiStepLR`, `ConstantLR`, `LinearLR`, `ExponentialLR`, `PolynomialLR` and `ChainedScheduler`
/// make each rate from the one before and so do the same; a lowered rate of the others is refused.
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let path = folder.path().join("checkpoint.pt");
/// use tch::{Device, nn};
/// use tch_ignite::optim::Optimizer;
/// use tch_ignite::pytorch::{self, Dict};
/// use tch_ignite::schedule::{ParamScheduler, StepLR};
/// # let vs = nn::VarStore::new(Device::Cpu);
/// # nn::linear(vs.root(), 2, 3, Default::default());
/// let optimizer = Optimizer::sgd(&vs).build()?;
/// let lr = optimizer.knob("lr")?;
/// let mut scheduler = ParamScheduler::new("lr", lr.clone(), StepLR::new(0.1, 30));
/// // For Python: scheduler.load_state_dict(checkpoint["lr_scheduler"])
/// let mut of_optimizer = pytorch::optimizer_value(&optimizer, &[])?;
/// let of_scheduler = pytorch::scheduler_value(&[&scheduler], &mut of_optimizer)?;
/// let mut checkpoint = Dict::new();
/// checkpoint.insert("optimizer", of_optimizer);
/// checkpoint.insert("lr_scheduler", of_scheduler);
/// pytorch::write(&path, &checkpoint.into())?;
/// // Of Python: scheduler.state_dict()
/// let checkpoint = pytorch::read(&path)?;
/// let (saved, of_optimizer) = (checkpoint.require("lr_scheduler")?, checkpoint.require("optimizer")?);
/// pytorch::load_scheduler(&mut scheduler, saved, of_optimizer)?;
/// // The schedule need not be known.
/// let mut scheduler = ParamScheduler::new("lr", lr, pytorch::schedule(saved, of_optimizer, 0)?);
/// pytorch::load_scheduler(&mut scheduler, saved, of_optimizer)?;
/// # Ok::<(), anyhow::Error>(())
/// ```
///
/// # Errors
/// A schedule with other values, which are told; a state that is no scheduler's. Without a plateau here, a rate in the
/// optimizer's state that is not the schedule's: a plateau had lowered it, or the program sets it after
/// `scheduler.step()`, as a warm-up by hand does. Nothing is changed then.
pub fn load_scheduler<S: Schedule>(
    scheduler: &mut ParamScheduler<S>,
    saved: &Value,
    optimizer: &Value,
) -> Result<()> {
    let dict = dict_of(saved)?;
    if dict.get("event_index").is_some() {
        return scheduler.load_state_dict(&object(dict)?);
    }
    scheduler.schedule().validate()?;
    let update = last_epoch(dict)?;
    let momentum = scheduler.knob().name() != "lr";
    let (knobs, mut reductions) = (scheduler.knob().each()?, vec![]);
    let groups = match scheduler.knob().group() {
        Some(group) => group..group + 1,
        None => 0..groups_of(dict)?,
    };
    for (index, group) in groups.enumerate() {
        let ours = scheduler.schedule();
        if !momentum {
            let last = numbers(dict, "_last_lr")?.get(group).copied();
            let last = last.ok_or_else(|| fault(format!("it has no group {group}")))?;
            let now = option(&options(optimizer, group)?, "lr")?;
            match knobs.get(index).and_then(Knob::living_reduction) {
                None => {
                    check(update, ours.at(update), last, "Python's last rate", last)?;
                    check(update, ours.at(update), now, "the optimizer's", last).map_err(|error| {
                        Error::State(format!(
                            "{error}: make a plateau that has lowered it before, or, if the program itself sets it after scheduler.step(), set lr of its group to {last} there"
                        ))
                    })?;
                }
                Some(reduction) => {
                    let factor = lowered(dict, ours.at(update), last, now)
                        .map_err(|why| fault(format!("at update {update} {why}")))?;
                    reductions.push((reduction, factor));
                }
            }
        }
        if has_functions(dict) {
            continue;
        }
        let theirs = made(saved, optimizer, group, momentum)?;
        let scale = theirs.at(0);
        for update in update..update.saturating_add(COMPARED) {
            check(update, ours.at(update), theirs.at(update), theirs.class(), scale)?;
        }
    }
    scheduler.go_to_update(update);
    reductions.iter().for_each(|(reduction, factor)| reduction.set(*factor));
    Ok(())
}

/// The factor by which a plateau has lowered a schedule's value to the rate that the optimizer has now; `last` is the
/// rate after the scheduler's own last step.
fn lowered(dict: &Dict, value: f64, last: f64, now: f64) -> Result<f64, String> {
    let alike = |one: f64, other: f64| (one - other).abs() <= 1e-9 * one.abs().max(other.abs());
    if alike(value, now) && alike(value, last) {
        return Ok(1.);
    }
    let between = |one: f64, other: f64| alike(one, other) || one < other;
    if !(now > 0. && between(now, last) && between(last, value)) {
        return Err(format!(
            "the schedule here gives {value}, and Python's rate is {last}, and {now} in the optimizer: a plateau cannot have lowered it"
        ));
    }
    match multiplies(dict) {
        true => Ok((now / value).min(1.)),
        false => Err(format!(
            "a plateau has lowered {value} to {now}, and Python's scheduler goes on in another way than by multiplying"
        )),
    }
}

/// Whether torch's scheduler makes all its further rates by multiplying the one before, so that a plateau's reduction stays.
fn multiplies(dict: &Dict) -> bool {
    let has = |key: &str| dict.get(key).is_some();
    let inner = |one: &Value| one.as_dict().is_some_and(multiplies);
    match (dict.get("_schedulers").and_then(Value::as_slice), dict.get("_milestones")) {
        (Some(parts), None) => parts.iter().all(inner),
        // Each part begins with a rate of its own.
        (Some(parts), Some(milestones)) => {
            let last = dict.get("last_epoch").and_then(Value::as_f64);
            let begun = |milestone: &Value| {
                milestone.as_f64().zip(last).is_some_and(|(milestone, last)| milestone <= last)
            };
            milestones.as_slice().is_some_and(|all| all.iter().all(begun))
                && parts.last().is_some_and(inner)
        }
        // StepLR, MultiStepLR and ExponentialLR have a gamma, and so has CyclicLR, which has a step_ratio; LinearLR,
        // ConstantLR and PolynomialLR have total_iters.
        (None, _) => (has("gamma") || has("total_iters")) && !has("step_ratio"),
    }
}

/// Two values that differ by no more than by rounding; both may be NaN where schedules have ended.
fn check(update: u64, ours: f64, theirs: f64, what: &str, scale: f64) -> Result<()> {
    let difference = (ours - theirs).abs();
    let same = difference <= 1e-9 * ours.abs() + 1e-12 * scale.abs();
    match same || ours.is_nan() && theirs.is_nan() {
        true => Ok(()),
        false => Err(fault(format!(
            "at update {update} the schedule here gives {ours}, and {what} is {theirs}"
        ))),
    }
}

pub(super) fn fault(why: impl fmt::Display) -> Error {
    Error::State(format!("the scheduler's state: {why}"))
}

pub(super) fn dict_of(saved: &Value) -> Result<&Dict> {
    saved.as_dict().ok_or_else(|| fault(format!("it is a {}", saved.type_name())))
}

/// How often `scheduler.step()` was called.
fn last_epoch(dict: &Dict) -> Result<u64> {
    let first = || dict.get("_schedulers").and_then(|inner| inner.get("0"));
    let last = dict.get("last_epoch").or_else(|| first()?.get("last_epoch"));
    let last = last.and_then(Value::as_i64).and_then(|last| u64::try_from(last).ok());
    let fraction = dict.get("T_cur").and_then(Value::as_f64).is_some_and(|at| at.fract() != 0.);
    match (last, fraction) {
        (Some(last), false) if last <= MAX_UPDATES => Ok(last),
        (Some(_), true) => Err(fault("it is between two epochs (T_cur), where no update is here")),
        _ => Err(fault("it has no last_epoch that is a count")),
    }
}

fn groups_of(dict: &Dict) -> Result<usize> {
    numbers(dict, "_last_lr").map(|rates| rates.len())
}

/// Whether its arguments are functions, which no file has.
fn has_functions(dict: &Dict) -> bool {
    dict.get("lr_lambdas").is_some()
}

fn numbers(dict: &Dict, key: &str) -> Result<Vec<f64>> {
    let values = dict.get(key).and_then(Value::as_slice);
    let values = values.and_then(|values| values.iter().map(number_of).collect());
    values.ok_or_else(|| fault(format!("it has no list of numbers {key}")))
}

/// A number, which may be a tensor of one.
fn number_of(value: &Value) -> Option<f64> {
    match value {
        Value::Tensor(stored) if stored.numel() == 1 => {
            f64::try_from(stored.tensor().ok()?.detach().reshape([])).ok()
        }
        other => other.as_f64(),
    }
}

fn made(saved: &Value, optimizer: &Value, group: usize, momentum: bool) -> Result<AnySchedule> {
    let dict = dict_of(saved)?;
    let number = |key: &str| -> Result<f64> {
        let number = numbers(dict, key)?.get(group).copied();
        number.ok_or_else(|| fault(format!("it has no group {group}")))
    };
    let has = |key: &str| dict.get(key).is_some();
    if has_functions(dict) {
        return Err(fault(
            "the functions of LambdaLR and MultiplicativeLR are in no file: make the schedule here",
        ));
    }
    if has("_schedule_phases") {
        let one_cycle = one_cycle(dict, &options(optimizer, group)?)?;
        return match momentum {
            false => Ok(one_cycle.into()),
            true => {
                let options = options(optimizer, group)?;
                cycles_momentum(dict)?;
                let (base, max) =
                    (option(&options, "base_momentum")?, option(&options, "max_momentum")?);
                Ok(one_cycle.momentum(base, max).into())
            }
        };
    }
    if has("step_ratio") {
        let cyclic = cyclic(dict, number("base_lrs")?, number("max_lrs")?)?;
        return match momentum {
            false => Ok(cyclic.into()),
            true => {
                cycles_momentum(dict)?;
                Ok(cyclic.momentum(number("base_momentums")?, number("max_momentums")?).into())
            }
        };
    }
    if momentum {
        return Err(fault("it leaves the momentum alone"));
    }
    if let Some(inner) = dict.get("_schedulers") {
        let inner = inner.as_slice().ok_or_else(|| fault("_schedulers is no list"))?;
        let schedules = inner.iter().map(|one| made(one, optimizer, group, false));
        let schedules = schedules.collect::<Result<Vec<_>>>()?;
        return Ok(match dict.get("_milestones") {
            None => crate::schedule::ChainedScheduler::new(schedules).into(),
            Some(milestones) => {
                let counts: Vec<u64> = from(&to_json(milestones)?, "_milestones")?;
                crate::schedule::SequentialLR::sequential(schedules, counts).into()
            }
        });
    }
    let (class, keys): (_, &[&str]) = match () {
        () if has("milestones") => ("MultiStepLR", &["milestones", "gamma"]),
        () if has("step_size") => ("StepLR", &["step_size", "gamma"]),
        () if has("T_0") => ("CosineAnnealingWarmRestarts", &["T_0", "T_mult", "eta_min"]),
        () if has("T_max") => ("CosineAnnealingLR", &["T_max", "eta_min"]),
        () if has("start_factor") => ("LinearLR", &["start_factor", "end_factor", "total_iters"]),
        () if has("power") => ("PolynomialLR", &["total_iters", "power"]),
        () if has("factor") && has("total_iters") => ("ConstantLR", &["factor", "total_iters"]),
        () if has("num_bad_epochs") => {
            return Err(fault("it is of ReduceLROnPlateau: load_plateau() takes it"));
        }
        () if has("gamma") => ("ExponentialLR", &["gamma"]),
        () => return Err(fault("it is of no scheduler that is here")),
    };
    let mut arguments: Map<String, Json> =
        [("type".into(), class.into()), ("base".into(), number("base_lrs")?.into())]
            .into_iter()
            .collect();
    for key in keys {
        let value = dict.get(key).ok_or_else(|| fault(format!("{class} without {key}")))?;
        arguments.insert((*key).into(), argument(value)?);
    }
    let schedule: AnySchedule = from(&arguments.into(), class)?;
    schedule.validate()?;
    Ok(schedule)
}

fn from<T: serde::de::DeserializeOwned>(json: &Json, what: &str) -> Result<T> {
    T::deserialize(json).map_err(|error| fault(format!("{what}: {error}")))
}

/// An argument as our schedules have it: counts that Python has as floats, and milestones that it counts in a `Counter`.
fn argument(value: &Value) -> Result<Json> {
    if let Some(counter) = value.as_dict() {
        let mut milestones = vec![];
        for (milestone, times) in counter.iter() {
            let times = times.as_i64().filter(|times| (0..=1000).contains(times));
            let times = times.ok_or_else(|| fault("its milestones are no counts"))?;
            (0..times).try_for_each(|_| to_json(milestone).map(|json| milestones.push(json)))?;
            if milestones.len() > MAX_MILESTONES {
                return Err(fault(format!("it has more than {MAX_MILESTONES} milestones")));
            }
        }
        milestones.sort_by_key(Json::as_u64);
        return Ok(milestones.into());
    }
    match value.as_f64() {
        Some(float) if float.fract() == 0. && float.abs() < (1u64 << 53) as f64 => {
            Ok((float as i64).into())
        }
        _ => to_json(value),
    }
}

/// The options of a group in the optimizer's state.
fn options(optimizer: &Value, group: usize) -> Result<Dict> {
    let options = optimizer.require("param_groups")?.get(&group.to_string());
    let options = options.and_then(Value::as_dict);
    options.cloned().ok_or_else(|| fault(format!("the optimizer has no group {group}")))
}

fn option(options: &Dict, key: &str) -> Result<f64> {
    let number = options.get(key).and_then(number_of);
    number.ok_or_else(|| fault(format!("the optimizer's group has no {key}")))
}

fn cycles_momentum(dict: &Dict) -> Result<()> {
    match dict.get("cycle_momentum").and_then(Value::as_bool) {
        Some(true) => Ok(()),
        _ => Err(fault("it leaves the momentum alone (cycle_momentum)")),
    }
}

fn one_cycle(dict: &Dict, options: &Dict) -> Result<OneCycleLR> {
    let phases = dict.get("_schedule_phases").and_then(Value::as_slice).unwrap_or_default();
    let total = dict.get("total_steps").and_then(Value::as_i64).filter(|total| *total > 0);
    let end = phases.first().and_then(|phase| phase.get("end_step")).and_then(Value::as_f64);
    let (Some(total), Some(end), 2..=3) = (total, end, phases.len()) else {
        return Err(fault("the phases of its OneCycleLR are damaged"));
    };
    let anneal = dict.get("_anneal_func_type").or_else(|| dict.get("anneal_func_type"));
    let max = option(options, "max_lr")?;
    let (initial, min) = (option(options, "initial_lr")?, option(options, "min_lr")?);
    let arguments = json!({
        "max_lr": max,
        "total_steps": total,
        "pct_start": (end + 1.) / total as f64,
        "anneal_strategy": anneal.and_then(Value::as_str).unwrap_or("cos"),
        "div_factor": max / initial,
        "final_div_factor": initial / min,
        "three_phase": phases.len() == 3,
    });
    let schedule: OneCycleLR = from(&arguments, "OneCycleLR")?;
    schedule.validate()?;
    Ok(schedule)
}

fn cyclic(dict: &Dict, base: f64, max: f64) -> Result<CyclicLR> {
    if dict.get("_scale_fn_custom").is_some_and(|custom| !matches!(custom, Value::None)) {
        return Err(fault("the function of its CyclicLR (scale_fn) has no place here"));
    }
    let get = |key: &str| {
        let number = dict.get(key).and_then(Value::as_f64);
        number.ok_or_else(|| fault(format!("CyclicLR without {key}")))
    };
    let (total, ratio) = (get("total_size")?, get("step_ratio")?);
    let arguments = json!({
        "base_lr": base,
        "max_lr": max,
        "step_size_up": total * ratio,
        "step_size_down": total - total * ratio,
        "mode": dict.get("mode").and_then(Value::as_str),
        "gamma": get("gamma")?,
    });
    let schedule: CyclicLR = from(&arguments, "CyclicLR")?;
    schedule.validate()?;
    Ok(schedule)
}
