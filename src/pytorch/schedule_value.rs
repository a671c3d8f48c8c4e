//! States of `torch.optim.lr_scheduler`, written.

use serde_json::{Map, Value as Json};

use super::json::{dict, from_json};
use super::schedules::fault;
use super::value::{Dict, DictClass, Value};
use crate::error::Result;
use crate::schedule::{ParamScheduler, Schedule};

/// A schedule's arguments, and where it is.
struct One {
    arguments: Map<String, Json>,
    /// The value at this update, and how many updates are behind it.
    last: f64,
    updates: u64,
    group: Option<usize>,
    of_momentum: bool,
    /// By how much a plateau has lowered the value, in each group that the knob turns.
    reductions: Vec<f64>,
}

impl One {
    /// The value that the knob of a group is to have for the next step.
    fn last_of(&self, group: usize) -> f64 {
        let index = if self.group.is_some() { 0 } else { group };
        self.last * self.reductions.get(index).copied().unwrap_or(1.)
    }
}

/// The state of schedulers as the one scheduler of torch has it that drives all groups: for
/// `scheduler.load_state_dict()`. Give one [`ParamScheduler`] for each group, or one whose knob turns all; those of the
/// momentum (of `OneCycleLR` and `CyclicLR`) may be among them.
///
/// torch keeps some of it in the optimizer's groups: it is added to `optimizer`, the
/// [`optimizer_value`](super::optimizer_value). Load that in Python when the scheduler is there, and before the
/// scheduler's state.
///
/// # Errors
/// Schedules that are none of torch's, or of different classes or positions; groups without one.
pub fn scheduler_value<S: Schedule>(
    schedulers: &[&ParamScheduler<S>],
    optimizer: &mut Value,
) -> Result<Value> {
    if optimizer.as_slice().is_some() {
        return Err(fault(
            "the optimizer's state is a list: give the state of the one optimizer in it that the schedulers drive",
        ));
    }
    let groups = optimizer.require("param_groups")?.as_slice().map(<[Value]>::to_vec);
    let mut groups = groups.ok_or_else(|| fault("the optimizer has no list of groups"))?;
    let all = schedulers.iter().map(|scheduler| one(scheduler)).collect::<Result<Vec<_>>>()?;
    let (momenta, rates): (Vec<_>, Vec<_>) = all.iter().partition(|one| one.of_momentum);
    let rates = by_group(&rates, groups.len())?;
    let momenta = if momenta.is_empty() { vec![] } else { by_group(&momenta, groups.len())? };
    let first = rates.first().ok_or_else(|| fault("the optimizer has no groups"))?;
    let keys = |one: &One| one.arguments.keys().cloned().collect::<Vec<_>>();
    for other in rates.iter().chain(&momenta) {
        if other.updates != first.updates {
            return Err(fault(format!(
                "schedulers of one optimizer are at updates {} and {}",
                first.updates, other.updates
            )));
        }
    }
    if let Some(other) = rates.iter().find(|other| keys(other) != keys(first)) {
        return Err(fault(format!(
            "schedules of one optimizer are of two classes: {:?} and {:?}",
            keys(first),
            keys(other)
        )));
    }
    let arguments: Vec<_> = rates.iter().map(|one| &one.arguments).collect();
    let mut state = class_state(&arguments, first.updates)?;
    let last = rates.iter().enumerate().map(|(group, one)| one.last_of(group));
    state.insert("_last_lr", Value::list(last));
    if state.get("cycle_momentum").is_some() {
        state.insert("cycle_momentum", !momenta.is_empty());
        state.insert("use_beta1", groups[0].get("betas").is_some());
    }
    if state.get("step_ratio").is_some() && !momenta.is_empty() {
        for (key, of) in [("base_momentums", "base_lr"), ("max_momentums", "max_lr")] {
            let values = momenta.iter().map(|one| number(&one.arguments, of));
            state.insert(key, Value::list(values.collect::<Result<Vec<_>>>()?));
        }
    }
    for (index, group) in groups.iter_mut().enumerate() {
        let mut options = group.as_dict().cloned().ok_or_else(|| fault("a group is no dict"))?;
        let arguments = &rates[index].arguments;
        options.insert("initial_lr", initial(arguments)?);
        // torch makes each rate from the one before, and the knob may not have the next one yet.
        options.insert("lr", rates[index].last_of(index));
        if arguments.contains_key("pct_start") {
            let max = number(arguments, "max_lr")?;
            let min = initial(arguments)? / number(arguments, "final_div_factor")?;
            options.insert("max_lr", max);
            options.insert("min_lr", min);
        }
        if let Some(momentum) = momenta.get(index) {
            let (base, max) = match momentum.arguments.contains_key("base_momentum") {
                true => ("base_momentum", "max_momentum"),
                false => ("base_lr", "max_lr"),
            };
            options.insert("base_momentum", number(&momentum.arguments, base)?);
            options.insert("max_momentum", number(&momentum.arguments, max)?);
            let next = momentum.last_of(index);
            match options.get("betas").and_then(|betas| betas.get("1")).cloned() {
                Some(beta2) => options.insert("betas", Value::tuple([next.into(), beta2])),
                None => options.insert("momentum", next),
            }
        }
        *group = options.into();
    }
    let mut with_groups = optimizer.as_dict().cloned().unwrap_or_default();
    with_groups.insert("param_groups", Value::list(groups));
    *optimizer = with_groups.into();
    Ok(state.into())
}

/// The state of a scheduler for `scheduler.load_state_dict()` of ignite, which has other schedulers than torch.
pub fn ignite_scheduler_value<S: Schedule>(scheduler: &ParamScheduler<S>) -> Value {
    Dict { entries: dict(&scheduler.state_dict()).entries, ..Dict::ordered() }.into()
}

fn one<S: Schedule>(scheduler: &ParamScheduler<S>) -> Result<One> {
    let (schedule, name) = (scheduler.schedule(), scheduler.name());
    schedule.validate()?;
    let Some(Json::Object(arguments)) = schedule.arguments() else {
        return Err(fault(format!("the schedule of '{name}' cannot be written down")));
    };
    let (updates, knob) = (scheduler.updates(), scheduler.knob());
    let of_momentum = knob.name() != "lr";
    let reductions = knob.each()?.iter().map(|knob| knob.reduction().get()).collect();
    let (last, group) = (schedule.at(updates), knob.group());
    Ok(One { arguments, last, updates, group, of_momentum, reductions })
}

/// The schedule of each group: one that turns all, or each its own.
fn by_group<'o>(all: &[&'o One], groups: usize) -> Result<Vec<&'o One>> {
    let of = |group: usize| {
        let mut own = all.iter().filter(|one| one.group.is_none_or(|own| own == group));
        match (own.next(), own.next()) {
            (Some(one), None) => Ok(*one),
            (None, _) => Err(fault(format!("group {group} has no scheduler"))),
            _ => Err(fault(format!("group {group} has two schedulers"))),
        }
    };
    (0..groups).map(of).collect()
}

fn number(arguments: &Map<String, Json>, key: &str) -> Result<f64> {
    let number = arguments.get(key).and_then(Json::as_f64);
    number.ok_or_else(|| fault(format!("the schedule has no {key}: torch has none like it")))
}

/// The rate that torch keeps as `initial_lr`.
fn initial(arguments: &Map<String, Json>) -> Result<f64> {
    if let Some(Json::Array(schedules)) = arguments.get("schedules") {
        let first = schedules.first().and_then(Json::as_object);
        return initial(first.ok_or_else(|| fault("a schedule of none"))?);
    }
    match arguments.contains_key("pct_start") {
        true => Ok(number(arguments, "max_lr")? / number(arguments, "div_factor")?),
        false if arguments.contains_key("base_lr") => number(arguments, "base_lr"),
        false => number(arguments, "base"),
    }
}

/// The state of a class of torch after so many updates, from the arguments for each group, without the last rates.
fn class_state(groups: &[&Map<String, Json>], updates: u64) -> Result<Dict> {
    let Some(first) = groups.first() else { return Err(fault("there are no groups")) };
    if first.contains_key("schedules") {
        return composed(groups, updates);
    }
    let mut state = Dict::new();
    let bases = groups.iter().map(|arguments| initial(arguments)).collect::<Result<Vec<_>>>()?;
    let mut keys: Vec<_> =
        first.keys().map(String::as_str).filter(|key| !matches!(*key, "type" | "base")).collect();
    keys.sort_unstable();
    match keys[..] {
        ["gamma", "milestones"] => {
            state.insert("milestones", counter(first.get("milestones")));
            state.insert("gamma", number(first, "gamma")?);
        }
        ["gamma", "step_size"]
        | ["gamma"]
        | ["T_max", "eta_min"]
        | ["end_factor", "start_factor", "total_iters"]
        | ["factor", "total_iters"]
        | ["power", "total_iters"] => {
            state = dict(first);
            state.entries.retain(|(key, _)| !matches!(key.as_str(), Some("type" | "base")));
        }
        ["T_0", "T_mult", "eta_min"] => {
            state = dict(first);
            state.entries.retain(|(key, _)| !matches!(key.as_str(), Some("type" | "base")));
            let mult = number(first, "T_mult")? as u64;
            let (mut length, mut at) = (number(first, "T_0")? as u64, updates);
            if mult == 1 {
                at %= length.max(1);
            }
            while at >= length && mult > 1 {
                at -= length;
                length = length.saturating_mul(mult);
            }
            state.insert("T_cur", at);
            state.insert("T_i", length);
        }
        ["base_lr", "gamma", "inverse", "max_lr", "mode", "step_size_down", "step_size_up"] => {
            let up = number(first, "step_size_up")?;
            let down = first.get("step_size_down").and_then(Json::as_f64).unwrap_or(up);
            let max = groups.iter().map(|arguments| number(arguments, "max_lr"));
            state.insert("max_lrs", Value::list(max.collect::<Result<Vec<_>>>()?));
            state.insert("total_size", up + down);
            state.insert("step_ratio", up / (up + down));
            state.insert("mode", first.get("mode").map_or(Value::None, from_json));
            state.insert("gamma", number(first, "gamma")?);
            let by_cycle = first.get("mode").and_then(Json::as_str) != Some("exp_range");
            state.insert("scale_mode", if by_cycle { "cycle" } else { "iterations" });
            state.insert("_scale_fn_custom", ());
            state.insert("cycle_momentum", false);
        }
        [
            "anneal_strategy",
            "div_factor",
            "final_div_factor",
            "max_lr",
            "pct_start",
            "three_phase",
            "total_steps",
        ] => {
            one_cycle(&mut state, first)?;
        }
        _ => {
            return Err(fault(format!(
                "torch has no scheduler with the arguments {}",
                keys.join(", ")
            )));
        }
    }
    state.insert("base_lrs", Value::list(bases));
    state.insert("last_epoch", updates);
    state.insert("_step_count", updates.saturating_add(1));
    state.insert("_is_initial", false);
    state.insert("_get_lr_called_within_step", false);
    Ok(state)
}

/// Milestones as torch counts them.
fn counter(milestones: Option<&Json>) -> Dict {
    let mut counter = Dict { class: DictClass::Counter, ..Dict::new() };
    let milestones = milestones.and_then(Json::as_array).map(Vec::as_slice).unwrap_or_default();
    for milestone in milestones.iter().filter_map(Json::as_i64) {
        let known = counter.entries.iter_mut().find(|(key, _)| key.as_i64() == Some(milestone));
        match known {
            Some((_, count)) => *count = (count.as_i64().unwrap_or(0) + 1).into(),
            None => counter.push(milestone, 1),
        }
    }
    counter
}

fn one_cycle(state: &mut Dict, arguments: &Map<String, Json>) -> Result<()> {
    let flag = |key: &str| arguments.get(key).and_then(Json::as_bool).unwrap_or(false);
    let (total, share) = (number(arguments, "total_steps")?, number(arguments, "pct_start")?);
    let (up, end) = (share * total - 1., total - 1.);
    let phase = |end: f64, rate: [&str; 2], momentum: [&str; 2]| {
        let mut phase = Dict::new();
        phase.insert("end_step", end);
        for (key, value) in [
            ("start_lr", rate[0]),
            ("end_lr", rate[1]),
            ("start_momentum", momentum[0]),
            ("end_momentum", momentum[1]),
        ] {
            phase.insert(key, value);
        }
        phase
    };
    let (high, low) = ("max_momentum", "base_momentum");
    let rise = phase(up, ["initial_lr", "max_lr"], [high, low]);
    let phases = match flag("three_phase") {
        false => vec![rise, phase(end, ["max_lr", "min_lr"], [low, high])],
        true => vec![
            rise,
            phase(2. * share * total - 2., ["max_lr", "initial_lr"], [low, high]),
            phase(end, ["initial_lr", "min_lr"], [high, high]),
        ],
    };
    state.insert("total_steps", total as i64);
    state.insert("_schedule_phases", Value::list(phases));
    state.insert(
        "_anneal_func_type",
        arguments.get("anneal_strategy").map_or(Value::None, from_json),
    );
    state.insert("cycle_momentum", false);
    Ok(())
}

/// `SequentialLR`, which has durations, or `ChainedScheduler`.
fn composed(groups: &[&Map<String, Json>], updates: u64) -> Result<Dict> {
    let parts = |arguments: &Map<String, Json>| -> Result<Vec<Map<String, Json>>> {
        let parts = arguments.get("schedules").and_then(Json::as_array);
        let parts = parts.ok_or_else(|| fault("a schedule of none"))?;
        let part =
            |part: &Json| part.as_object().cloned().ok_or_else(|| fault("a schedule of none"));
        parts.iter().map(part).collect()
    };
    let groups_parts = groups.iter().map(|group| parts(group)).collect::<Result<Vec<_>>>()?;
    let durations: Option<Vec<u64>> = groups[0]
        .get("durations")
        .and_then(|durations| durations.as_array()?.iter().map(Json::as_u64).collect());
    let mut state = Dict::new();
    let (mut begin, mut milestones, mut inner) = (0u64, vec![], vec![]);
    for index in 0..groups_parts[0].len() {
        let of_groups = groups_parts.iter().map(|parts| parts.get(index));
        let of_groups: Option<Vec<_>> = of_groups.collect();
        let of_groups = of_groups.ok_or_else(|| fault("its groups have different schedules"))?;
        let mut own = updates.saturating_sub(begin);
        if let Some(durations) = &durations
            && let Some(duration) = durations.get(index)
        {
            // The last update of a part is the one before the next begins.
            own = own.min(duration.saturating_sub(1));
            begin = begin.saturating_add(*duration);
            milestones.push(begin as i64);
        }
        let mut part = class_state(&of_groups, own)?;
        let last = of_groups.iter().map(|arguments| {
            let json = Json::Object((*arguments).clone());
            let schedule: crate::schedule::AnySchedule =
                serde_json::from_value(json).map_err(fault)?;
            Ok(schedule.at(own))
        });
        part.insert("_last_lr", Value::list(last.collect::<Result<Vec<_>>>()?));
        inner.push(part);
    }
    if durations.is_some() {
        state.insert("_milestones", Value::list(milestones));
        state.insert("last_epoch", updates);
    }
    state.insert("_schedulers", Value::list(inner));
    Ok(state)
}
