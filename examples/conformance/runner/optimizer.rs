//! Optimizers and schedulers from their specs.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Result, bail};
use serde_json::Value;
use tch::nn::{self, OptimizerConfig, VarStore};
use tch_ignite::optim::{Group, Knob, Optimizer};
use tch_ignite::schedule::{CosineAnnealing, LinearCyclical, ParamScheduler, Schedule};

use super::json::{array, count, events, float, object, text};

/// A store with one variable for each group of the spec.
pub fn store(spec: &Value) -> Result<VarStore> {
    let vs = VarStore::new(tch::Device::Cpu);
    for index in 0..array(&spec["groups"])?.len() {
        let _ = vs.root().set_group(index).zeros(&format!("p{index}"), &[1]);
    }
    Ok(vs)
}

fn set(group: &Group, options: &Value) -> Result<()> {
    for (name, value) in object(options)? {
        if name == "betas" {
            let betas = array(value)?;
            group.set_betas(float(&betas[0])?, float(&betas[1])?)?;
        } else {
            group.set(name, float(value)?)?;
        }
    }
    Ok(())
}

fn built<T: OptimizerConfig>(config: T, vs: &VarStore) -> Result<Optimizer> {
    Ok(Optimizer::builder(config, vs).build()?)
}

/// The optimizer over a store whose variables have tch's group numbers.
pub fn optimizer(spec: &Value, vs: &VarStore) -> Result<Optimizer> {
    let optimizer = match text(&spec["type"])? {
        "SGD" => built(nn::Sgd::default(), vs)?,
        "Adam" => built(nn::Adam::default(), vs)?,
        "AdamW" => built(nn::AdamW::default(), vs)?,
        "RMSprop" => built(nn::RmsProp::default(), vs)?,
        other => bail!("no optimizer {other}"),
    };
    for (group, options) in optimizer.groups()?.iter().zip(array(&spec["groups"])?) {
        if !spec["defaults"].is_null() {
            set(group, &spec["defaults"])?;
        }
        set(group, options)?;
    }
    Ok(optimizer)
}

/// The class of the spec, if it does not exist yet.
pub fn missing_class(spec: &Value) -> Option<String> {
    match spec["type"].as_str() {
        Some("LinearCyclical" | "CosineAnnealing") => None,
        other => Some(format!("scheduler {} does not exist yet", other.unwrap_or("?"))),
    }
}

pub fn schedule(spec: &Value) -> Result<Box<dyn Schedule>> {
    let number = |key: &str, default: f64| match &spec[key] {
        Value::Null => Ok(default),
        value => float(value),
    };
    let (start, end) = (float(&spec["start_value"])?, float(&spec["end_value"])?);
    let size = count(&spec["cycle_size"])?.unwrap_or(0);
    let warmup = count(&spec["warmup_duration"])?.unwrap_or(0);
    let cycle = number("cycle_mult", 1.)?;
    let (start_mult, end_mult) = (number("start_value_mult", 1.)?, number("end_value_mult", 1.)?);
    match text(&spec["type"])? {
        "LinearCyclical" => Ok(Box::new(
            LinearCyclical::new(start, end, size)
                .cycle_mult(cycle)
                .start_value_mult(start_mult)
                .end_value_mult(end_mult)
                .warmup_duration(warmup)
                .monotonic(spec["monotonic"].as_bool().unwrap_or(false)),
        )),
        "CosineAnnealing" => Ok(Box::new(
            CosineAnnealing::new(start, end, size)
                .cycle_mult(cycle)
                .start_value_mult(start_mult)
                .end_value_mult(end_mult)
                .warmup_duration(warmup),
        )),
        other => bail!("no schedule {other}"),
    }
}

pub fn knob(spec: &Value, optimizer: &Optimizer) -> Result<Knob> {
    let param = spec["param_name"].as_str().unwrap_or("lr");
    Ok(match count(&spec["param_group_index"])? {
        Some(index) => optimizer.group_at(index as usize)?.knob(param)?,
        None => optimizer.knob(param)?,
    })
}

type Driven = ParamScheduler<Box<dyn Schedule>>;

fn scheduler_with(knob: Knob, spec: &Value) -> Result<Driven> {
    let history = spec["save_history"].as_bool().unwrap_or(false);
    Ok(ParamScheduler::new(knob.name().to_owned(), knob, schedule(spec)?).save_history(history))
}

pub fn scheduler(spec: &Value, optimizer: &Optimizer) -> Result<Driven> {
    scheduler_with(knob(spec, optimizer)?, spec)
}

/// A scheduler with the event it is attached to.
pub fn attached(entry: &Value, optimizer: &Optimizer) -> Result<Driven> {
    Ok(scheduler(&entry["scheduler"], optimizer)?.on(events(&entry["event"])?))
}

/// A hyper-parameter of all groups.
pub fn values(optimizer: &Optimizer, name: &str) -> tch_ignite::Result<Vec<f64>> {
    optimizer.groups()?.iter().map(|group| group.get(name)).collect()
}

/// Parameters as a case has them: those of an optimizer, and one beside it where the case has values
/// that an optimizer refuses (a negative lr) or a name that none has.
pub struct Params {
    pub optimizer: Optimizer,
    beside: Option<(String, Arc<Mutex<Vec<f64>>>)>,
}

impl Params {
    pub fn new(spec: &Value, vs: &VarStore, beside: Option<&str>) -> Result<Self> {
        let mut spec = spec.clone();
        let mut initial = vec![];
        for group in spec["groups"].as_array_mut().into_iter().flatten() {
            let own = beside.map_or(&Value::Null, |name| &group[name]);
            initial.push(if own.is_null() { 0. } else { float(own)? });
            if let (Some(name), Some(group)) = (beside, group.as_object_mut()) {
                group.remove(name);
            }
        }
        let beside = beside.map(|name| (name.to_owned(), Arc::new(Mutex::new(initial))));
        Ok(Self { optimizer: optimizer(&spec, vs)?, beside })
    }

    pub fn values(&self, name: &str) -> tch_ignite::Result<Vec<f64>> {
        match &self.beside {
            Some((beside, values)) if beside == name => Ok(lock(values).clone()),
            _ => values(&self.optimizer, name),
        }
    }

    pub fn scheduler(&self, spec: &Value) -> Result<Driven> {
        match &self.beside {
            Some((name, values)) if spec["param_name"] == **name => {
                let group = count(&spec["param_group_index"])?.map(|index| index as usize);
                let (read, write) = (values.clone(), values.clone());
                let get = move || lock(&read)[group.unwrap_or(0)];
                let set = move |value| match group {
                    Some(group) => lock(&write)[group] = value,
                    None => lock(&write).fill(value),
                };
                scheduler_with(Knob::new(name.clone(), get, set), spec)
            }
            _ => scheduler(spec, &self.optimizer),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The parameter that has to stand beside the optimizer, and ignite's defect if that is why.
pub fn beside<'c>(
    optimizer: &Value,
    specs: impl Iterator<Item = &'c Value>,
    rows: &[&Value],
) -> Option<(&'c str, Option<&'static str>)> {
    let negative =
        rows.iter().any(|rows| rows.to_string().contains("[-") || rows.to_string().contains(",-"));
    let known = ["lr", "momentum", "weight_decay", "dampening"];
    let specs: Vec<_> = specs.filter_map(|spec| spec["param_name"].as_str()).collect();
    if let Some(name) =
        specs.iter().find(|name| optimizer["type"] == "SGD" && !known.contains(name))
    {
        return Some((name, None));
    }
    let name = specs.first()?;
    negative.then_some((name, Some("a schedule may drive lr below 0")))
}
