use std::collections::{BTreeMap, HashMap};
use std::fmt;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use tch::Tensor;

use super::{EvaluationWeights, json_floats, strides};
use crate::bridge::TensorId;
use crate::error::{Error, Result};

/// Everything that something needs to go on exactly: values, tensors, and the states of its parts, all by name.
///
/// Numbers are restored bit for bit. NaN and infinities, which JSON does not have, are written as objects such as
/// `{"$f64": "NaN"}`.
///
/// ```
/// use tch::Tensor;
/// use tch_ignite::checkpoint::StateDict;
/// let mut state = StateDict::new();
/// state.set_value("step", 3)?;
/// state.set_tensor("mean", Tensor::from(0.5));
/// assert_eq!(state.value::<u64>("step")?, 3);
/// assert!(state.tensor("variance").is_err());
/// # Ok::<(), tch_ignite::Error>(())
/// ```
#[derive(Default)]
pub struct StateDict {
    pub(crate) values: Map<String, Value>,
    pub(crate) tensors: BTreeMap<String, Tensor>,
    pub(crate) parts: BTreeMap<String, StateDict>,
}

impl StateDict {
    /// An empty state.
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether this state and another one have the same values, tensors and parts. Tensors with NaN count as different.
    pub(crate) fn is_like(&self, other: &Self) -> bool {
        let tensor = |(a, b): ((&String, &Tensor), (&String, &Tensor))| {
            let here = b.1.f_to_device(a.1.device());
            a.0 == b.0
                && a.1.kind() == b.1.kind()
                && here.is_ok_and(|b| a.1.f_equal(&b).unwrap_or(false))
        };
        self.values == other.values
            && self.tensors.len() == other.tensors.len()
            && self.tensors.iter().zip(&other.tensors).all(tensor)
            && self.parts.len() == other.parts.len()
            && self.parts.iter().zip(&other.parts).all(|(a, b)| a.0 == b.0 && a.1.is_like(b.1))
    }

    /// Sets a value of any type that serde can turn into JSON.
    ///
    /// # Errors
    /// JSON cannot hold the value, for example a map whose keys are neither texts nor numbers.
    pub fn set_value(&mut self, name: &str, value: impl Serialize) -> Result<()> {
        let value = json_floats::to_value(&value)
            .map_err(|error| Error::State(format!("'{name}' cannot be saved: {error}")))?;
        self.values.insert(name.into(), value);
        Ok(())
    }

    /// Sets a tensor. The tensor is shared, not copied, and is read when the state is written.
    pub fn set_tensor(&mut self, name: &str, tensor: Tensor) {
        self.tensors.insert(name.into(), tensor);
    }

    /// Sets the state of a part.
    pub fn set_part(&mut self, name: &str, part: StateDict) {
        self.parts.insert(name.into(), part);
    }

    /// Returns a value.
    ///
    /// # Errors
    /// There is no value of this name, or it has another type.
    pub fn value<T: DeserializeOwned>(&self, name: &str) -> Result<T> {
        let value = self.values.get(name).ok_or_else(|| absent("value", name))?;
        json_floats::from_value(value).map_err(|error| {
            Error::State(format!("state attribute '{name}' is not what it should be: {error}"))
        })
    }

    /// Returns a tensor.
    ///
    /// # Errors
    /// There is no tensor of this name.
    pub fn tensor(&self, name: &str) -> Result<&Tensor> {
        self.tensors.get(name).ok_or_else(|| absent("tensor", name))
    }

    /// Returns the state of a part.
    ///
    /// # Errors
    /// There is no part of this name.
    pub fn part(&self, name: &str) -> Result<&StateDict> {
        self.parts.get(name).ok_or_else(|| absent("part", name))
    }

    /// Takes a tensor out of the state.
    ///
    /// # Errors
    /// There is no tensor of this name.
    pub fn take_tensor(&mut self, name: &str) -> Result<Tensor> {
        self.tensors.remove(name).ok_or_else(|| absent("tensor", name))
    }

    /// Takes the state of a part out of this state.
    ///
    /// # Errors
    /// There is no part of this name.
    pub fn take_part(&mut self, name: &str) -> Result<StateDict> {
        self.parts.remove(name).ok_or_else(|| absent("part", name))
    }

    /// A copy whose tensors are dense, on the CPU and not shared: a snapshot that training does not change. Copying
    /// from a device waits for it.
    ///
    /// # Errors
    /// libtorch cannot copy a tensor.
    pub fn copy(&self) -> Result<Self> {
        let _guard = tch::no_grad_guard();
        let mut copy = Self { values: self.values.clone(), ..Self::default() };
        // Tied names stay names of one tensor.
        let mut copied: HashMap<TensorId, Tensor> = HashMap::new();
        for (name, tensor) in &self.tensors {
            if let Some(own) = copied.get(&TensorId::of(tensor)) {
                copy.tensors.insert(name.clone(), own.shallow_clone());
                continue;
            }
            let failed = |error| Error::libtorch(format!("copying '{name}'"), error);
            let dense = match tensor.is_sparse() {
                true => tensor.f_to_dense(None, false).map_err(failed)?,
                false => tensor.shallow_clone(),
            };
            let mut own = strides::empty_like(&dense).map_err(failed)?;
            own.f_copy_(&dense).map_err(failed)?;
            copied.insert(TensorId::of(tensor), own.shallow_clone());
            copy.tensors.insert(name.clone(), own);
        }
        for (name, part) in &self.parts {
            copy.parts.insert(name.clone(), part.copy()?);
        }
        Ok(copy)
    }

    /// All values.
    pub fn values(&self) -> &Map<String, Value> {
        &self.values
    }

    /// All tensors, by name.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.tensors.iter().map(|(name, tensor)| (name.as_str(), tensor))
    }

    /// The states of all parts, by name.
    pub fn parts(&self) -> impl Iterator<Item = (&str, &StateDict)> {
        self.parts.iter().map(|(name, part)| (name.as_str(), part))
    }
}

fn absent(what: &str, name: &str) -> Error {
    Error::State(format!("Required state attribute '{name}' is absent ({what})"))
}

/// Makes a state of values only, as schedulers have.
impl From<Map<String, Value>> for StateDict {
    fn from(values: Map<String, Value>) -> Self {
        Self { values, ..Self::default() }
    }
}

impl fmt::Debug for StateDict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut debug = f.debug_struct("StateDict");
        for (name, value) in &self.values {
            debug.field(name, value);
        }
        for (name, tensor) in &self.tensors {
            debug.field(name, &format_args!("{:?} {:?}", tensor.kind(), tensor.size()));
        }
        for (name, part) in &self.parts {
            debug.field(name, part);
        }
        debug.finish()
    }
}

/// Something whose state can be saved and restored, bit for bit.
///
/// [`Engine::track`](crate::engine::Engine::track) adds the state to the checkpoints of an engine. Models
/// ([`VarStore`](tch::nn::VarStore)) and [`Optimizer`](crate::optim::Optimizer) can be tracked, and so can your own
/// types that implement this trait, shared as `Rc<RefCell<T>>` or `Arc<Mutex<T>>`.
pub trait Stateful {
    /// Returns the state. Tensors are shared, not copied.
    ///
    /// # Errors
    /// A part of the state cannot be saved.
    fn state_dict(&self) -> Result<StateDict>;

    /// Loads a saved state. The tensors of `state` may be kept, because nobody else uses them.
    ///
    /// # Errors
    /// Something is missing or does not fit; the text names it.
    fn load_state_dict(&mut self, state: StateDict) -> Result<()>;

    /// Loads as much of a saved state as fits, and returns a line for each difference. The engine calls this instead of
    /// [`load_state_dict`](Self::load_state_dict) where a run is resumed without `strict`. By default all of the state
    /// has to fit.
    ///
    /// # Errors
    /// No part of the state fits. Nothing is changed then.
    fn load_state_dict_partially(&mut self, state: StateDict) -> Result<Vec<String>> {
        self.load_state_dict(state).map(|()| vec![])
    }

    /// Settings that the program chose, and whose changes are reported when a run is resumed.
    fn settings(&self) -> Map<String, Value> {
        Map::new()
    }

    /// Whether a saved state must have exactly the tensors of this one, in name, type and shape, as the state of a
    /// model must. The engine checks that before it loads anything.
    fn has_fixed_tensors(&self) -> bool {
        false
    }

    /// Whether a checkpoint may be read straight into the tensors that [`state_dict`](Self::state_dict) returns. On
    /// error these hold garbage then.
    fn is_read_in_place(&self) -> bool {
        false
    }

    /// Whether this process's state may differ from that of other ranks, as gradients do that have not been reduced
    /// yet. A checkpoint then holds the state of each rank; otherwise only that of the main rank.
    fn differs_by_rank(&self) -> bool {
        false
    }

    /// Gives parameters the values that are meant for evaluation, until the result is dropped; `None` where they have
    /// them already, or where there are no others. Schedule-Free optimizers have others. The engine calls this before
    /// evaluations, updates of averages, and files of weights alone; a context that holds an optimizer forwards it.
    ///
    /// # Errors
    /// The values cannot be computed. Nothing is changed then.
    fn evaluation_weights(&self) -> Result<Option<EvaluationWeights>> {
        Ok(None)
    }
}
