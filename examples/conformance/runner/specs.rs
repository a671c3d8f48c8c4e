//! Makes schedules from the specs in cases.

use anyhow::{Context, Result, bail};
use serde_json::Value;
use tch_ignite::schedule::*;

use super::json::{array, count, float, text};

/// One value that one schedule drives. Every spec is turned into a list of these.
#[derive(Clone)]
pub struct Leaf {
    pub name: String,
    pub param: String,
    pub group: Option<usize>,
    pub schedule: AnySchedule,
}

/// The values with which the optimizer was built, in each group. torch's schedules start from them.
pub struct Bases<'v>(pub &'v Value);

impl Bases<'_> {
    pub fn groups(&self) -> Result<usize> {
        Ok(array(&self.0["groups"])?.len())
    }

    pub fn lr(&self, group: usize) -> Result<f64> {
        float(&self.0["groups"][group]["lr"])
    }
}

fn number(spec: &Value, key: &str, default: f64) -> Result<f64> {
    match &spec[key] {
        Value::Null => Ok(default),
        value => float(value),
    }
}

fn points(value: &Value) -> Result<Vec<(i64, f64)>> {
    array(value)?
        .iter()
        .map(|pair| Ok((pair[0].as_i64().context("a milestone")?, float(&pair[1])?)))
        .collect()
}

fn counts(value: &Value) -> Result<Vec<u64>> {
    array(value)?.iter().map(|n| count(n)?.context("a count")).collect()
}

/// The schedule of a spec that contains no other specs; `None` for other specs.
pub fn simple(spec: &Value) -> Result<Option<AnySchedule>> {
    let size = count(&spec["cycle_size"])?.unwrap_or(0);
    let warmup = count(&spec["warmup_duration"])?.unwrap_or(0);
    let cyclical = |key| number(spec, key, 1.);
    Ok(Some(match text(&spec["type"])? {
        "LinearCyclical" => {
            LinearCyclical::new(float(&spec["start_value"])?, float(&spec["end_value"])?, size)
                .cycle_mult(cyclical("cycle_mult")?)
                .start_value_mult(cyclical("start_value_mult")?)
                .end_value_mult(cyclical("end_value_mult")?)
                .warmup_duration(warmup)
                .monotonic(spec["monotonic"].as_bool().unwrap_or(false))
                .into()
        }
        "CosineAnnealing" => {
            CosineAnnealing::new(float(&spec["start_value"])?, float(&spec["end_value"])?, size)
                .cycle_mult(cyclical("cycle_mult")?)
                .start_value_mult(cyclical("start_value_mult")?)
                .end_value_mult(cyclical("end_value_mult")?)
                .warmup_duration(warmup)
                .into()
        }
        "PiecewiseLinear" => PiecewiseLinear::new(points(&spec["milestones_values"])?).into(),
        "PiecewiseLinearState" => {
            piecewise_linear_state(points(&spec["milestones_values"])?).into()
        }
        "ExpState" => ExpState::new(float(&spec["initial_value"])?, float(&spec["gamma"])?).into(),
        "StepState" => StepState::new(
            float(&spec["initial_value"])?,
            float(&spec["gamma"])?,
            count(&spec["step_size"])?.unwrap_or(0),
        )
        .into(),
        "MultiStepState" => MultiStepState::new(
            float(&spec["initial_value"])?,
            float(&spec["gamma"])?,
            counts(&spec["milestones"])?,
        )
        .into(),
        _ => return Ok(None),
    }))
}

/// torch's schedule for lr, and that for the momentum if the class cycles the momentum too.
pub fn torchs(spec: &Value, base: f64) -> Result<(AnySchedule, Option<AnySchedule>)> {
    let whole = |key: &str, default| Ok::<_, anyhow::Error>(count(&spec[key])?.unwrap_or(default));
    let real = |key: &str, default| number(spec, key, default);
    let cycles_momentum = spec["cycle_momentum"] != false;
    let momenta = (real("base_momentum", 0.85)?, real("max_momentum", 0.95)?);
    let lr = match text(&spec["type"])? {
        "StepLR" => StepLR::new(base, whole("step_size", 0)?).gamma(real("gamma", 0.1)?).into(),
        "MultiStepLR" => {
            MultiStepLR::new(base, counts(&spec["milestones"])?).gamma(real("gamma", 0.1)?).into()
        }
        "ConstantLR" => ConstantLR::new(base)
            .factor(real("factor", 1. / 3.)?)
            .total_iters(whole("total_iters", 5)?)
            .into(),
        "LinearLR" => LinearLR::new(base)
            .start_factor(real("start_factor", 1. / 3.)?)
            .end_factor(real("end_factor", 1.)?)
            .total_iters(whole("total_iters", 5)?)
            .into(),
        "ExponentialLR" => ExponentialLR::new(base, real("gamma", 0.1)?).into(),
        "PolynomialLR" => PolynomialLR::new(base)
            .total_iters(whole("total_iters", 5)?)
            .power(real("power", 1.)?)
            .into(),
        "CosineAnnealingLR" => {
            CosineAnnealingLR::new(base, whole("T_max", 0)?).eta_min(real("eta_min", 0.)?).into()
        }
        "CosineAnnealingWarmRestarts" => CosineAnnealingWarmRestarts::new(base, whole("T_0", 0)?)
            .t_mult(whole("T_mult", 1)?)
            .eta_min(real("eta_min", 0.)?)
            .into(),
        "CyclicLR" => {
            let mut lr = CyclicLR::new(real("base_lr", 0.)?, real("max_lr", 0.)?)
                .step_size_up(real("step_size_up", 2000.)?)
                .gamma(real("gamma", 1.)?)
                .mode(serde_json::from_value(spec["mode"].clone())?);
            if !spec["step_size_down"].is_null() {
                lr = lr.step_size_down(float(&spec["step_size_down"])?);
            }
            let momenta = (real("base_momentum", 0.8)?, real("max_momentum", 0.9)?);
            let momentum = cycles_momentum.then(|| lr.momentum(momenta.0, momenta.1).into());
            return Ok((lr.into(), momentum));
        }
        "OneCycleLR" => {
            let anneal =
                if spec["anneal_strategy"] == "linear" { Anneal::Linear } else { Anneal::Cos };
            let lr = OneCycleLR::new(real("max_lr", 0.)?, whole("total_steps", 0)?)
                .pct_start(real("pct_start", 0.3)?)
                .anneal_strategy(anneal)
                .div_factor(real("div_factor", 25.)?)
                .final_div_factor(real("final_div_factor", 1e4)?)
                .three_phase(spec["three_phase"] == true);
            let momentum = cycles_momentum.then(|| lr.momentum(momenta.0, momenta.1).into());
            return Ok((lr.into(), momentum));
        }
        other => bail!("torch's {other} does not exist yet"),
    };
    Ok((lr, None))
}

/// The values that a spec drives, and the schedule of each.
pub fn leaves(spec: &Value, bases: &Bases<'_>) -> Result<Vec<Leaf>> {
    if let Some(schedule) = simple(spec)? {
        let param = spec["param_name"].as_str().unwrap_or("lr").to_owned();
        let group = count(&spec["param_group_index"])?.map(|group| group as usize);
        return Ok(vec![Leaf { name: param.clone(), param, group, schedule }]);
    }
    match text(&spec["type"])? {
        "ParamGroup" => {
            let mut all = vec![];
            for (index, child) in array(&spec["schedulers"])?.iter().enumerate() {
                let mut child = leaves(child, bases)?;
                if let Some(name) = spec["names"][index].as_str() {
                    child.iter_mut().for_each(|leaf| leaf.name = name.to_owned());
                }
                all.extend(child);
            }
            Ok(all)
        }
        "Concat" => concat(spec, bases),
        "LRScheduler" => {
            let mut all = vec![];
            for group in 0..bases.groups()? {
                let (lr, momentum) = torchs(&spec["torch"], bases.lr(group)?)?;
                all.push(leaf("lr", group, lr));
                all.extend(momentum.map(|momentum| leaf("momentum", group, momentum)));
            }
            Ok(all)
        }
        "WithWarmup" => (0..bases.groups()?)
            .map(|group| Ok(leaf("lr", group, warmed_up(spec, bases, group)?)))
            .collect(),
        other => bail!("scheduler {other} does not exist yet"),
    }
}

fn leaf(param: &str, group: usize, schedule: AnySchedule) -> Leaf {
    Leaf { name: param.into(), param: param.into(), group: Some(group), schedule }
}

/// For each value that the children of a Concat drive, the children's schedules one after the other.
fn concat(spec: &Value, bases: &Bases<'_>) -> Result<Vec<Leaf>> {
    let durations = counts(&spec["durations"])?;
    let children: Vec<_> =
        array(&spec["schedulers"])?.iter().map(|s| leaves(s, bases)).collect::<Result<_>>()?;
    let first = children.first().context("a Concat of nothing")?;
    first
        .iter()
        .map(|one| {
            let parts = children.iter().map(|child| {
                child
                    .iter()
                    .find(|leaf| (&leaf.param, leaf.group) == (&one.param, one.group))
                    .map(|leaf| leaf.schedule.clone())
                    .context("the parts of a Concat drive different values")
            });
            let schedule = Concat::new(parts.collect::<Result<Vec<_>>>()?, durations.clone());
            let (name, param) = (one.name.clone(), one.param.clone());
            Ok(Leaf { name, param, group: one.group, schedule: schedule.into() })
        })
        .collect()
}

fn warmed_up(spec: &Value, bases: &Bases<'_>, group: usize) -> Result<AnySchedule> {
    let inner = &spec["lr_scheduler"];
    let schedule = match text(&inner["type"])? {
        "Torch" => torchs(&inner["torch"], bases.lr(group)?)?.0,
        _ => leaves(inner, bases)?.pop().context("a schedule to warm up for")?.schedule,
    };
    // The warm-up ends at the group's lr, which torch's schedules have set to their first value before.
    let own = match text(&inner["type"])? {
        "Torch" => schedule.at(0),
        _ => bases.lr(group)?,
    };
    let end = number(spec, "warmup_end_value", own)?;
    let duration = count(&spec["warmup_duration"])?.unwrap_or(0);
    Ok(create_lr_scheduler_with_warmup(
        schedule,
        float(&spec["warmup_start_value"])?,
        duration,
        end,
    )?)
}

/// Whether history is kept. Where schedulers are combined, only the outermost spec decides.
pub fn keeps_history(spec: &Value) -> bool {
    spec["save_history"] == true
}

/// Whether a Concat somewhere in the spec has a duration of 0 that is not the first.
pub fn late_zero(spec: &Value) -> Result<bool> {
    let Some(children) = spec["schedulers"].as_array() else { return Ok(false) };
    if !spec["durations"].is_null() && counts(&spec["durations"])?.iter().skip(1).any(|n| *n == 0) {
        return Ok(true);
    }
    let inner: Vec<_> = children.iter().map(late_zero).collect::<Result<_>>()?;
    Ok(inner.contains(&true))
}

/// All names of parameters that a spec drives.
pub fn param_names<'s>(spec: &'s Value, names: &mut Vec<&'s str>) {
    match spec["type"].as_str() {
        Some("LRScheduler") => names.extend(["lr", "momentum"]),
        Some("WithWarmup") => names.push("lr"),
        _ => names.extend(spec["param_name"].as_str()),
    }
    for child in spec["schedulers"].as_array().into_iter().flatten() {
        param_names(child, names);
    }
    if spec["lr_scheduler"].is_object() {
        param_names(&spec["lr_scheduler"], names);
    }
}
