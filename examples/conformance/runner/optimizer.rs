//! Optimizers from their specs, and schedulers on them.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Result, bail};
use serde_json::Value;
use tch::nn::{self, OptimizerConfig, VarStore};
use tch_ignite::engine::Events;
use tch_ignite::optim::{Group, Knob, Optimizer};
use tch_ignite::schedule::{AnySchedule, ParamGroupScheduler, ParamScheduler};

use super::json::{array, count, float, object, text};
use super::specs::{Bases, Leaf, keeps_history, leaves, param_names};

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

/// The knob that a spec names.
pub fn knob(spec: &Value, optimizer: &Optimizer) -> Result<Knob> {
    let param = spec["param_name"].as_str().unwrap_or("lr");
    knob_of(param, count(&spec["param_group_index"])?.map(|index| index as usize), optimizer)
}

fn knob_of(param: &str, group: Option<usize>, optimizer: &Optimizer) -> Result<Knob> {
    Ok(match group {
        Some(index) => optimizer.group_at(index)?.knob(param)?,
        None => optimizer.knob(param)?,
    })
}

/// A hyper-parameter of all groups.
pub fn values(optimizer: &Optimizer, name: &str) -> tch_ignite::Result<Vec<f64>> {
    optimizer.groups()?.iter().map(|group| group.get(name)).collect()
}

/// Parameters as a case has them: those of an optimizer, and those beside it where the case has
/// values that an optimizer refuses (a negative lr) or a name that none has.
pub struct Params {
    pub optimizer: Optimizer,
    beside: Vec<(String, Arc<Mutex<Vec<f64>>>)>,
    spec: Value,
}

impl Params {
    pub fn new(spec: &Value, vs: &VarStore, beside: &[&str]) -> Result<Self> {
        let mut own = spec.clone();
        let mut values: Vec<_> = beside.iter().map(|name| (*name, vec![])).collect();
        for group in own["groups"].as_array_mut().into_iter().flatten() {
            for (name, values) in &mut values {
                values.push(if group[&**name].is_null() { 0. } else { float(&group[&**name])? });
                if let Some(group) = group.as_object_mut() {
                    group.remove(*name);
                }
            }
        }
        let beside = values
            .into_iter()
            .map(|(name, values)| (name.to_owned(), Arc::new(Mutex::new(values))))
            .collect();
        Ok(Self { optimizer: optimizer(&own, vs)?, beside, spec: spec.clone() })
    }

    fn beside(&self, name: &str) -> Option<&Arc<Mutex<Vec<f64>>>> {
        self.beside.iter().find(|(beside, _)| beside == name).map(|(_, values)| values)
    }

    pub fn values(&self, name: &str) -> tch_ignite::Result<Vec<f64>> {
        match self.beside(name) {
            Some(values) => Ok(lock(values).clone()),
            None => values(&self.optimizer, name),
        }
    }

    fn knob(&self, leaf: &Leaf) -> Result<Knob> {
        let Some(values) = self.beside(&leaf.param) else {
            return knob_of(&leaf.param, leaf.group, &self.optimizer);
        };
        let group = leaf.group;
        let (read, write) = (values.clone(), values.clone());
        let get = move || lock(&read)[group.unwrap_or(0)];
        let set = move |value| match group {
            Some(group) => lock(&write)[group] = value,
            None => lock(&write).fill(value),
        };
        Ok(Knob::new(leaf.param.clone(), get, set))
    }

    /// The scheduler of a spec.
    pub fn scheduler(&self, spec: &Value) -> Result<Driver> {
        let history = keeps_history(spec);
        let single = |leaf: Leaf| -> Result<_> {
            let knob = self.knob(&leaf)?;
            Ok(ParamScheduler::new(leaf.name, knob, leaf.schedule).save_history(history))
        };
        let mut all: Vec<_> =
            leaves(spec, &Bases(&self.spec))?.into_iter().map(single).collect::<Result<_>>()?;
        Ok(match all.pop() {
            Some(only) if all.is_empty() && spec["type"] != "ParamGroup" => Driver::One(only),
            last => Driver::Several(ParamGroupScheduler::new(all.into_iter().chain(last))),
        })
    }
}

/// One scheduler, or several as one.
pub enum Driver {
    One(ParamScheduler<AnySchedule>),
    Several(ParamGroupScheduler<AnySchedule>),
}

impl Driver {
    /// In ignite no value is written before the first event.
    pub fn on(self, events: Events) -> Self {
        match self.torchs_on(events) {
            Self::One(scheduler) => Self::One(scheduler.write_at_start(false)),
            Self::Several(scheduler) => Self::Several(scheduler.write_at_start(false)),
        }
    }

    /// As torch's schedulers are stepped: update k uses value k.
    pub fn torchs_on(self, events: Events) -> Self {
        match self {
            Self::One(scheduler) => Self::One(scheduler.on(events)),
            Self::Several(scheduler) => Self::Several(scheduler.on(events)),
        }
    }

    pub fn advance(&mut self) -> tch_ignite::Result<()> {
        match self {
            Self::One(scheduler) => scheduler.advance().map(drop),
            Self::Several(scheduler) => scheduler.advance(),
        }
    }

    pub fn state_dict(&self) -> serde_json::Map<String, Value> {
        match self {
            Self::One(scheduler) => scheduler.state_dict(),
            Self::Several(scheduler) => scheduler.state_dict(),
        }
    }

    pub fn load_state_dict(
        &mut self,
        state: &serde_json::Map<String, Value>,
    ) -> tch_ignite::Result<()> {
        match self {
            Self::One(scheduler) => scheduler.load_state_dict(state),
            Self::Several(scheduler) => scheduler.load_state_dict(state),
        }
    }
}

impl<C, B, O> tch_ignite::engine::Handler<C, B, O> for Driver {
    fn name(&self) -> String {
        "scheduler".into()
    }

    fn events(&self) -> Events {
        match self {
            Self::One(scheduler) => <_ as tch_ignite::engine::Handler<C, B, O>>::events(scheduler),
            Self::Several(scheduler) => {
                <_ as tch_ignite::engine::Handler<C, B, O>>::events(scheduler)
            }
        }
    }

    fn call(
        &mut self,
        event: tch_ignite::engine::Event,
        cx: &mut C,
        engine: &mut tch_ignite::engine::Engine<'_, C, B, O>,
    ) -> Result<()> {
        match self {
            Self::One(scheduler) => scheduler.call(event, cx, engine),
            Self::Several(scheduler) => scheduler.call(event, cx, engine),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The parameters that have to stand beside the optimizer, and ignite's defect if that is why.
pub fn beside<'c>(
    optimizer: &Value,
    specs: impl Iterator<Item = &'c Value>,
    rows: &[&Value],
) -> (Vec<&'c str>, Option<&'static str>) {
    let negative = rows
        .iter()
        .map(|rows| rows.to_string())
        .any(|text| text.contains("[-") || text.contains(",-"));
    let mut names = vec![];
    specs.for_each(|spec| param_names(spec, &mut names));
    names.sort();
    names.dedup();
    if negative {
        if names.is_empty() {
            names.push("lr");
        }
        return (names, Some("a schedule may drive lr below 0"));
    }
    let known = ["lr", "momentum", "weight_decay", "dampening"];
    names.retain(|name| optimizer["type"] == "SGD" && !known.contains(name));
    (names, None)
}
