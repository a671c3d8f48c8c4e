//! Makes optimizers from the specs in cases, and schedulers that drive their parameters.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Result, bail};
use serde_json::Value;
use tch::nn::{self, OptimizerConfig, VarStore};
use tch_ignite::engine::{Event, Events};
use tch_ignite::optim::{Group, Knob, Optimizer};
use tch_ignite::schedule::{AnySchedule, ParamGroupScheduler, ParamScheduler, Schedule};

use super::json::{UNSET, array, count, float, object, text};
use super::specs::{Bases, Leaf, keeps_history, leaves, param_names, torchs};

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

/// The value of a hyper-parameter in each group.
pub fn values(optimizer: &Optimizer, name: &str) -> tch_ignite::Result<Vec<f64>> {
    optimizer.groups()?.iter().map(|group| group.get(name)).collect()
}

/// The hyper-parameters that torch's groups have as one number each, by class.
fn hyper_parameters(class: &str) -> &'static [&'static str] {
    match class {
        "SGD" => &["lr", "momentum", "dampening", "weight_decay"],
        "RMSprop" => &["lr", "alpha", "eps", "weight_decay", "momentum"],
        _ => &["lr", "eps", "weight_decay"],
    }
}

/// The parameters of a case that are kept beside the optimizer.
#[derive(Clone, Copy, PartialEq)]
pub enum Beside {
    /// Only the parameters that torch's groups do not have; ignite writes them into the groups all the same.
    Unknown,
    /// All parameters that schedulers drive, because torch's groups accept values that an optimizer here refuses.
    Scheduled,
}

/// ignite's defect where a case needs [`Beside::Scheduled`].
pub const NEGATIVE: &str = "a schedule may drive lr below 0";

/// The parameters of a case: an optimizer's own, and those that are kept beside the optimizer.
pub struct Params {
    pub optimizer: Optimizer,
    /// The name of each parameter, and its value in each group.
    beside: Vec<(String, Arc<Mutex<Vec<f64>>>)>,
    spec: Value,
}

impl Params {
    /// Makes the parameters of a case from the optimizer's spec; `schedulers` are the specs of all its schedulers.
    pub fn new(spec: &Value, vs: &VarStore, schedulers: &[&Value], beside: Beside) -> Result<Self> {
        let known = hyper_parameters(spec["type"].as_str().unwrap_or_default());
        let mut names = vec![];
        schedulers.iter().for_each(|spec| param_names(spec, &mut names));
        names.sort();
        names.dedup();
        names.retain(|name| beside == Beside::Scheduled || !known.contains(name));

        let mut own = spec.clone();
        for group in own.get_mut("groups").and_then(Value::as_array_mut).into_iter().flatten() {
            if let Some(group) = group.as_object_mut() {
                group.retain(|name, _| known.contains(&&**name) || name == "betas");
            }
        }
        let optimizer = optimizer(&own, vs)?;
        let groups = optimizer.groups()?;
        let value = |(group, options): (&Group, &Value), name: &str| match &options[name] {
            Value::Null if known.contains(&name) => Ok(group.get(name)?),
            Value::Null => Ok(UNSET),
            value => float(value),
        };
        let beside = names.into_iter().map(|name| {
            let options = array(&spec["groups"])?;
            let values = groups.iter().zip(options).map(|pair| value(pair, name));
            let values = values.collect::<Result<Vec<_>>>()?;
            Ok((name.to_owned(), Arc::new(Mutex::new(values))))
        });
        let beside = beside.collect::<Result<_>>()?;
        Ok(Self { optimizer, beside, spec: spec.clone() })
    }

    fn beside(&self, name: &str) -> Option<&Arc<Mutex<Vec<f64>>>> {
        self.beside.iter().find(|(beside, _)| beside == name).map(|(_, values)| values)
    }

    /// Whether schedulers drive this parameter beside the optimizer.
    pub fn is_beside(&self, name: &str) -> bool {
        self.beside(name).is_some()
    }

    /// The value in each group; [`UNSET`] where torch's group has none.
    pub fn values(&self, name: &str) -> tch_ignite::Result<Vec<f64>> {
        let known = hyper_parameters(self.spec["type"].as_str().unwrap_or_default());
        match self.beside(name) {
            Some(values) => Ok(lock(values).clone()),
            None if known.contains(&name) => values(&self.optimizer, name),
            None => Ok(vec![UNSET; self.optimizer.groups()?.len()]),
        }
    }

    /// Sets the learning rate of each group.
    pub fn set_lrs(&self, lrs: &[f64]) -> Result<()> {
        if let Some(values) = self.beside("lr") {
            lock(values).copy_from_slice(lrs);
            return Ok(());
        }
        let groups = self.optimizer.groups()?;
        groups.iter().zip(lrs).try_for_each(|(group, lr)| Ok(group.set_lr(*lr)?))
    }

    fn knob(&self, leaf: &Leaf) -> Result<Knob> {
        let Some(values) = self.beside(&leaf.param) else {
            return knob_of(&leaf.param, leaf.group, &self.optimizer);
        };
        let group = leaf.group;
        if let Some(group) = group.filter(|group| *group >= lock(values).len()) {
            bail!("no parameter group {group}");
        }
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
        // torch's schedulers set their first value when they are made.
        let inner = &spec["lr_scheduler"];
        if spec["type"] == "WithWarmup" && inner["type"] == "Torch" {
            let bases = Bases(&self.spec);
            let first = |group| Ok(torchs(&inner["torch"], bases.lr(group)?)?.0.at(0));
            self.set_lrs(&(0..bases.groups()?).map(first).collect::<Result<Vec<_>>>()?)?;
        }
        let history = keeps_history(spec);
        let single = |leaf: Leaf| -> Result<_> {
            let knob = self.knob(&leaf)?;
            Ok(ParamScheduler::new(leaf.name, knob, leaf.schedule).save_history(history))
        };
        // A knob beside the optimizer has one value, but ignite's history has one for each group; so each group gets
        // its own scheduler.
        let each_group = |leaf: Leaf| -> Vec<Leaf> {
            if !history || leaf.group.is_some() || !self.is_beside(&leaf.param) {
                return vec![leaf];
            }
            let groups = 0..self.optimizer.groups().map_or(1, |groups| groups.len());
            groups.map(|group| Leaf { group: Some(group), ..leaf.clone() }).collect()
        };
        let leaves = leaves(spec, &Bases(&self.spec))?.into_iter().flat_map(each_group);
        let mut all: Vec<_> = leaves.map(single).collect::<Result<_>>()?;
        Ok(match all.pop() {
            Some(only) if all.is_empty() && spec["type"] != "ParamGroup" => {
                Driver::new(Schedulers::One(only))
            }
            last => {
                let all = all.into_iter().chain(last);
                Driver::new(Schedulers::Several(ParamGroupScheduler::new(all)))
            }
        })
    }
}

/// One scheduler, or several that advance together. Unlike those of this crate, ignite's may drive one parameter
/// together, and bear one name, so an engine is not told what they drive.
pub struct Driver {
    schedulers: Schedulers,
    events: Events,
}

enum Schedulers {
    One(ParamScheduler<AnySchedule>),
    Several(ParamGroupScheduler<AnySchedule>),
}

impl Driver {
    fn new(schedulers: Schedulers) -> Self {
        Self { schedulers, events: Event::IterationStarted.into() }
    }

    /// Attaches to these events and, as in ignite, writes no value before the first of them.
    pub fn on(self, events: Events) -> Self {
        let Self { schedulers, events } = self.torchs_on(events, false);
        let schedulers = match schedulers {
            Schedulers::One(scheduler) => Schedulers::One(scheduler.write_at_start(false)),
            Schedulers::Several(scheduler) => Schedulers::Several(scheduler.write_at_start(false)),
        };
        Self { schedulers, events }
    }

    /// Attaches to these events as torch's schedulers are stepped, so that update k uses value k: value 0 is written at
    /// STARTED where `after_step` says that the events follow the step.
    pub fn torchs_on(self, events: Events, after_step: bool) -> Self {
        let schedulers = match self.schedulers {
            Schedulers::One(scheduler) => Schedulers::One(scheduler.on(events.clone())),
            Schedulers::Several(scheduler) => Schedulers::Several(scheduler.on(events.clone())),
        };
        let events = if after_step { Event::Started | events } else { events };
        Self { schedulers, events }
    }

    pub fn advance(&mut self) -> tch_ignite::Result<()> {
        match &mut self.schedulers {
            Schedulers::One(scheduler) => scheduler.advance().map(drop),
            Schedulers::Several(scheduler) => scheduler.advance(),
        }
    }

    /// The state of the scheduler, or of the first of several.
    pub fn first_state(&self) -> serde_json::Map<String, Value> {
        let state = self.state_dict();
        match self.schedulers {
            Schedulers::One(_) => state,
            Schedulers::Several(_) => {
                state["schedulers"][0][1].as_object().cloned().unwrap_or_default()
            }
        }
    }

    pub fn state_dict(&self) -> serde_json::Map<String, Value> {
        match &self.schedulers {
            Schedulers::One(scheduler) => scheduler.state_dict(),
            Schedulers::Several(scheduler) => scheduler.state_dict(),
        }
    }

    pub fn load_state_dict(
        &mut self,
        state: &serde_json::Map<String, Value>,
    ) -> tch_ignite::Result<()> {
        match &mut self.schedulers {
            Schedulers::One(scheduler) => scheduler.load_state_dict(state),
            Schedulers::Several(scheduler) => scheduler.load_state_dict(state),
        }
    }
}

impl<C, B, O> tch_ignite::engine::Handler<C, B, O> for Driver {
    fn spec(&self) -> tch_ignite::Result<tch_ignite::engine::HandlerSpec> {
        Ok(tch_ignite::engine::HandlerSpec::new("scheduler", self.events.clone()))
    }

    fn call(
        &mut self,
        event: Event,
        cx: &mut C,
        engine: &mut tch_ignite::engine::Engine<'_, C, B, O>,
    ) -> Result<()> {
        match &mut self.schedulers {
            Schedulers::One(scheduler) => scheduler.call(event, cx, engine),
            Schedulers::Several(scheduler) => scheduler.call(event, cx, engine),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The negative value, if the error says that an optimizer refused one.
pub fn refused_negative(error: &anyhow::Error) -> Option<f64> {
    let text = format!("{error:#}");
    let (_, value) = text.split_once("must be finite and not negative, but ")?;
    value.split_once(' ')?.0.parse().ok().filter(|value: &f64| *value < 0.)
}

/// Runs a case with its parameters in the optimizer. If the optimizer refuses a negative value, the case is run again
/// with the scheduled parameters beside the optimizer.
pub fn in_or_beside<T>(
    defect: &mut Option<&'static str>,
    mut run: impl FnMut(Beside, &mut Option<&'static str>) -> Result<T>,
) -> Result<T> {
    match run(Beside::Unknown, defect) {
        Err(error) if refused_negative(&error).is_some() => {
            *defect = Some(NEGATIVE);
            run(Beside::Scheduled, defect)
        }
        result => result,
    }
}
