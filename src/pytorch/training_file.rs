//! Training checkpoints of any of the usual layouts.

use std::fmt;
use std::path::Path;

use super::lightning;
use super::position::Position;
use super::prefixes;
use super::reader::Reader;
use super::value::{Dict, Value};
use super::weights::{Weights, is_state};
use crate::engine::Engine;
use crate::error::{Error, Result};

/// How a training checkpoint is laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Layout {
    /// `torch.save(model.state_dict(), path)`: weights and nothing else.
    StateDict,
    /// A dict of the program's own, such as `{"model": model.state_dict(), "optimizer": …, "epoch": 3}`.
    Dict,
    /// ignite's `Checkpoint` with the trainer among what is saved.
    Ignite,
    /// Lightning's `.ckpt`.
    Lightning,
}

impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::StateDict => "state_dict",
            Self::Dict => "dict",
            Self::Ignite => "checkpoint of ignite",
            Self::Lightning => "checkpoint of Lightning",
        })
    }
}

/// A training checkpoint of Python: which parts are a model, an optimizer, a scheduler or a position is found by what is
/// in them, so that the program's names do not matter. Displayed, it says what was found.
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let path = folder.path().join("checkpoint.pt");
/// use tch::{Device, nn};
/// use tch_ignite::engine::{Engine, Until};
/// use tch_ignite::optim::Optimizer;
/// use tch_ignite::pytorch::{self, Dict, TrainingFile, Weights};
/// # use tch_ignite::schedule::{ParamScheduler, StepLR};
/// let vs = nn::VarStore::new(Device::Cpu);
/// let fc = nn::linear(vs.root() / "fc", 2, 3, Default::default());
/// let mut optimizer = Optimizer::adam(&vs).build()?;
/// let mut scheduler = ParamScheduler::new("lr", optimizer.knob("lr")?, StepLR::new(1e-3, 30));
/// let mut trainer = Engine::new(|_: &mut (), _engine, _batch: i32| Ok(()));
/// # trainer.run(&mut (), vec![0; 4], Until::epochs(2))?;
/// // For ignite: Checkpoint.load_objects({"model": model, "optimizer": optimizer, "trainer": trainer}, torch.load(path))
/// let mut checkpoint = Dict::new();
/// checkpoint.insert("model", Weights::of_store(&vs)?.to_value());
/// let mut of_optimizer = pytorch::optimizer_value(&optimizer, &[])?;
/// checkpoint.insert("lr_scheduler", pytorch::scheduler_value(&[&scheduler], &mut of_optimizer)?);
/// checkpoint.insert("optimizer", of_optimizer);
/// checkpoint.insert("trainer", pytorch::position_value(&trainer));
/// pytorch::write(&path, &checkpoint.into())?;
/// // Of Python, in any layout:
/// let saved = TrainingFile::read(&path)?;
/// println!("{saved}");
/// let weights = saved.weights()?;
/// weights.load(&vs)?;
/// pytorch::load_optimizer(&mut optimizer, saved.optimizer()?, &weights.names())?;
/// pytorch::load_scheduler(&mut scheduler, saved.scheduler()?, saved.optimizer()?)?;
/// saved.load_position(&mut trainer)?;
/// assert!(saved.others().is_empty()); // nothing in the file is without a place
/// # assert_eq!(saved.layout(), pytorch::Layout::Ignite);
/// # Ok::<(), anyhow::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct TrainingFile {
    layout: Layout,
    models: Vec<(String, Value)>,
    optimizers: Vec<(String, Value)>,
    schedulers: Vec<(String, Value)>,
    grad_scalers: Vec<(String, Value)>,
    position: Position,
    rng: Option<Value>,
    others: Vec<String>,
}

/// Names under which programs keep a position of their own.
const ITERATIONS: [&str; 6] = ["iteration", "iterations", "global_step", "step", "steps", "iter"];
const EPOCHS: [&str; 2] = ["epoch", "epochs"];

impl TrainingFile {
    /// Reads a file.
    ///
    /// # Errors
    /// As [`Reader::read`]; a file that has none of the parts.
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let value = Reader::new().read(path)?;
        Self::of(&value).map_err(|error| Error::State(format!("{}: {error}", path.display())))
    }

    /// Looks at the content of a file, such as one that was read with classes [allowed](Reader::allow).
    ///
    /// # Errors
    /// It has no model, optimizer, scheduler, scaler of losses, position or state of random numbers.
    pub fn of(value: &Value) -> Result<Self> {
        let mut found = Self {
            layout: Layout::Dict,
            models: vec![],
            optimizers: vec![],
            schedulers: vec![],
            grad_scalers: vec![],
            position: Position::default(),
            rng: None,
            others: vec![],
        };
        let Some(dict) = value.as_dict() else {
            return Err(Error::State(format!("a {} is no checkpoint", value.type_name())));
        };
        if is_state(value) {
            found.layout = Layout::StateDict;
            found.models.push((String::new(), value.clone()));
            return Ok(found);
        }
        let is_lightning = lightning::is_one(dict);
        let mut epoch = None;
        for (key, part) in dict.iter() {
            let name = key.as_str().map_or_else(|| key.to_string(), str::to_owned);
            let count = part.as_i64().and_then(|count| u64::try_from(count).ok());
            match count {
                // Lightning has both in its loops.
                Some(_) if is_lightning && (name == "epoch" || name == "global_step") => {}
                Some(_) if ITERATIONS.contains(&&*name) => {
                    found.position.iteration = found.position.iteration.or(count);
                }
                Some(_) if EPOCHS.contains(&&*name) => epoch = epoch.or(count),
                _ => found.part(name, part, is_lightning),
            }
        }
        // Only a program knows whether its own epoch counts whole epochs, or the one under way.
        if let Some(epoch) = epoch {
            match found.layout == Layout::Ignite || found.position.iteration.is_some() {
                true => found.others.push(format!("epoch = {epoch}")),
                false => found.position.epoch = Some(epoch),
            }
        }
        if is_lightning {
            (found.layout, found.position) = (Layout::Lightning, lightning::position(dict));
        }
        let nothing = found.models.is_empty()
            && found.optimizers.is_empty()
            && found.schedulers.is_empty()
            && found.grad_scalers.is_empty()
            && found.rng.is_none()
            && found.position == Position::default();
        match nothing {
            false => Ok(found),
            true => {
                let there = match &found.others[..] {
                    [] => "nothing else".into(),
                    others => others[..others.len().min(20)].join(", "),
                };
                Err(Error::State(format!(
                    "there is no model, optimizer, scheduler, GradScaler, position or state of random numbers in it; it has {there}"
                )))
            }
        }
    }

    fn part(&mut self, name: String, part: &Value, is_lightning: bool) {
        let has = |key: &str| part.as_dict().is_some_and(|dict| dict.get(key).is_some());
        let all_are = |is: fn(&Value) -> bool| {
            part.as_slice().is_some_and(|parts| !parts.is_empty() && parts.iter().all(is))
        };
        let numbered = |parts: &Value| -> Vec<(String, Value)> {
            let parts = parts.as_slice().unwrap_or_default().iter().enumerate();
            parts.map(|(index, part)| (format!("{name}/{index}"), part.clone())).collect()
        };
        if is_state(part) {
            self.models.push((name, part.clone()));
        } else if is_optimizer(part) {
            self.optimizers.push((name, part.clone()));
        } else if is_scheduler(part) {
            self.schedulers.push((name, part.clone()));
        } else if is_grad_scaler(part) {
            self.grad_scalers.push((name, part.clone()));
        } else if all_are(is_optimizer) {
            self.optimizers.extend(numbered(part));
        } else if all_are(is_scheduler) {
            self.schedulers.extend(numbered(part));
        } else if is_rng(&name, part) && self.rng.is_none() {
            self.rng = Some(part.clone());
        } else if let (Some(position), false) =
            (Position::of_ignite(part), self.layout == Layout::Ignite)
        {
            (self.layout, self.position) = (Layout::Ignite, position);
        } else if !(is_lightning && matches!(&*name, "loops" | "pytorch-lightning_version")
            || is_empty(part))
        {
            // Parts of what has no place may have one.
            let what = if has("state_dict") { " (with a state_dict)" } else { "" };
            self.others.push(format!("{name}{what}"));
        }
    }

    /// The layout that was found.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// The states of all models, under their names in the file, with the names of parameters as they are there. An
    /// averaged model may be among them. In a file that is one model's state, its name is empty.
    pub fn models(&self) -> &[(String, Value)] {
        &self.models
    }

    /// The states of all optimizers, under their names in the file; those of a list have numbers, such as
    /// `optimizer_states/0`.
    pub fn optimizers(&self) -> &[(String, Value)] {
        &self.optimizers
    }

    /// The states of all schedulers, under their names in the file.
    pub fn schedulers(&self) -> &[(String, Value)] {
        &self.schedulers
    }

    /// The states of all scalers of losses (`GradScaler`), under their names in the file.
    pub fn grad_scalers(&self) -> &[(String, Value)] {
        &self.grad_scalers
    }

    /// The state of torch's generator of random numbers, for [`set_rng_state`](super::set_rng_state).
    pub fn rng(&self) -> Option<&Value> {
        self.rng.as_ref()
    }

    /// Parts of the file that have no place here, by name.
    pub fn others(&self) -> &[String] {
        &self.others
    }

    /// Iterations that are done, if the file says so.
    pub fn iteration(&self) -> Option<u64> {
        self.position.iteration
    }

    /// Weights of the model under the names that it has itself: see [`weights_of`](Self::weights_of). Where there are
    /// several models, it is the one named `model`, `state_dict` or `model_state_dict`.
    ///
    /// # Errors
    /// There is none, or there are several, whose names are told.
    pub fn weights(&self) -> Result<Weights> {
        let usual = ["model", "state_dict", "model_state_dict"];
        let usual = self.models.iter().find(|(name, _)| usual.contains(&&**name));
        match (usual, &self.models[..]) {
            (Some((name, _)), _) | (None, [(name, _)]) => self.weights_of(name),
            _ => self.only("model", &self.models).and_then(weights_of),
        }
    }

    /// Weights of one of the [`models`](Self::models). What wrappers put before all names is taken off: `module.` of
    /// `DataParallel`, `DistributedDataParallel` and `AveragedModel` with its `n_averaged`, and `_orig_mod.` of
    /// `torch.compile`. If that belongs to the names here, use [`Weights::of`].
    ///
    /// # Errors
    /// There is no such model.
    pub fn weights_of(&self, name: &str) -> Result<Weights> {
        let model = self.models.iter().find(|(own, _)| own == name).map(|(_, model)| model);
        model
            .ok_or_else(|| self.absent(&format!("model '{name}'"), &self.models))
            .and_then(weights_of)
    }

    /// The state of the only optimizer, for [`load_optimizer`](super::load_optimizer).
    ///
    /// # Errors
    /// There is none, or there are several: take one of [`optimizers`](Self::optimizers), or a list of all where groups
    /// have several algorithms here.
    pub fn optimizer(&self) -> Result<&Value> {
        self.only("optimizer", &self.optimizers)
    }

    /// The state of the only scheduler, for [`load_scheduler`](super::load_scheduler) or
    /// [`load_plateau`](super::load_plateau).
    ///
    /// # Errors
    /// There is none, or there are several: take one of [`schedulers`](Self::schedulers).
    pub fn scheduler(&self) -> Result<&Value> {
        self.only("scheduler", &self.schedulers)
    }

    /// The state of the only scaler of losses, for [`load_grad_scaler`](super::load_grad_scaler).
    ///
    /// # Errors
    /// There is none, or there are several: take one of [`grad_scalers`](Self::grad_scalers).
    pub fn grad_scaler(&self) -> Result<&Value> {
        self.only("GradScaler", &self.grad_scalers)
    }

    /// Puts an engine where training was, as [`Engine::load_state_dict`] does. ignite's budget comes along; other
    /// layouts have none, so that `run` is given one. An `epoch` alone counts as that many that are done. Lightning's files say in mid epoch only from the second epoch on
    /// how many batches an epoch has, and other programs' never: where they do not, set `engine.state.epoch_length`
    /// before.
    ///
    /// # Errors
    /// There is no position, or the length of an epoch is needed.
    pub fn load_position<C, B, O>(&self, engine: &mut Engine<'_, C, B, O>) -> Result<()> {
        self.position.load(engine)
    }

    fn only<'c>(&self, what: &str, parts: &'c [(String, Value)]) -> Result<&'c Value> {
        match parts {
            [(_, part)] => Ok(part),
            [] => Err(self.absent(what, parts)),
            parts => {
                let names: Vec<_> = parts.iter().map(|(name, _)| name.as_str()).collect();
                Err(Error::State(format!("there are several {what}s: {}", names.join(", "))))
            }
        }
    }

    fn absent(&self, what: &str, parts: &[(String, Value)]) -> Error {
        let there = parts.iter().map(|(name, _)| name).chain(&self.others).take(20);
        let there: Vec<_> = there.map(String::as_str).collect();
        let there = if there.is_empty() { "nothing else".into() } else { there.join(", ") };
        Error::State(format!("the {} has no {what}: it has {there}", self.layout))
    }
}

fn weights_of(model: &Value) -> Result<Weights> {
    prefixes::without(Weights::of(model)?).map(|(weights, _)| weights)
}

fn keys_of(value: &Value, keys: &[&str]) -> bool {
    value.as_dict().is_some_and(|dict| keys.iter().all(|key| dict.get(key).is_some()))
}

fn is_optimizer(value: &Value) -> bool {
    keys_of(value, &["state", "param_groups"])
}

/// A state of torch's schedulers, or of ignite's.
fn is_scheduler(value: &Value) -> bool {
    keys_of(value, &["last_epoch", "_last_lr"])
        || keys_of(value, &["_schedulers"])
        || keys_of(value, &["event_index", "param_name"])
}

/// A state of torch's `GradScaler`.
fn is_grad_scaler(value: &Value) -> bool {
    keys_of(value, &["scale", "growth_interval", "_growth_tracker"])
}

fn is_rng(name: &str, value: &Value) -> bool {
    name.contains("rng") && value.as_tensor().is_some_and(|stored| stored.size().len() == 1)
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::None => true,
        Value::Dict(dict) => dict.is_empty(),
        other => other.as_slice().is_some_and(<[Value]>::is_empty),
    }
}

impl fmt::Display for TrainingFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.layout)?;
        match (self.position.iteration, self.position.epoch) {
            (Some(iteration), _) => write!(f, " after {iteration} iterations")?,
            (None, Some(epoch)) => write!(f, " after {epoch} epochs")?,
            (None, None) => {}
        }
        let parts = [
            ("model", &self.models),
            ("optimizer", &self.optimizers),
            ("scheduler", &self.schedulers),
            ("GradScaler", &self.grad_scalers),
        ];
        for (what, parts) in parts {
            for (name, part) in parts {
                let tensors = part.as_dict().filter(|_| what == "model").map(Dict::len);
                write!(f, "\n  {what} {name}")?;
                tensors.map_or(Ok(()), |tensors| write!(f, ": {tensors} tensors"))?;
                if let (true, Ok((_, taken))) =
                    (what == "model", Weights::of(part).and_then(prefixes::without))
                    && !taken.is_empty()
                {
                    write!(f, ", without {}", taken.join(", "))?;
                }
            }
        }
        if self.rng.is_some() {
            write!(f, "\n  state of the random numbers")?;
        }
        match &self.others[..] {
            [] => Ok(()),
            others => write!(f, "\n  without a place: {}", others.join(", ")),
        }
    }
}
