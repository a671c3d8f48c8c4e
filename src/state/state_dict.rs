use std::collections::{BTreeMap, HashMap};
use std::fmt;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use tch::Tensor;

use super::{json_floats, strides};
use crate::bridge::TensorId;
use crate::error::{Error, Result};

/// What something needs to go on exactly: values, tensors, and the state of its parts, all by name.
///
/// Numbers come back bit for bit, NaN and infinities too, which JSON does not have: they are objects
/// such as `{"$f64": "NaN"}` there.
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
    /// Nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets a value: anything that serde can turn into JSON.
    ///
    /// # Errors
    /// JSON cannot hold it, such as a map whose keys are neither texts nor numbers.
    pub fn set_value(&mut self, name: &str, value: impl Serialize) -> Result<()> {
        let value = json_floats::to_value(&value)
            .map_err(|error| Error::State(format!("'{name}' cannot be saved: {error}")))?;
        self.values.insert(name.into(), value);
        Ok(())
    }

    /// Sets a tensor. It is shared, not copied: it is read when the state is written.
    pub fn set_tensor(&mut self, name: &str, tensor: Tensor) {
        self.tensors.insert(name.into(), tensor);
    }

    /// Sets the state of a part.
    pub fn set_part(&mut self, name: &str, part: StateDict) {
        self.parts.insert(name.into(), part);
    }

    /// The value of that name.
    ///
    /// # Errors
    /// There is none, or one of another type.
    pub fn value<T: DeserializeOwned>(&self, name: &str) -> Result<T> {
        let value = self.values.get(name).ok_or_else(|| absent("value", name))?;
        json_floats::from_value(value).map_err(|error| {
            Error::State(format!("state attribute '{name}' is not what it should be: {error}"))
        })
    }

    /// The tensor of that name.
    ///
    /// # Errors
    /// There is none.
    pub fn tensor(&self, name: &str) -> Result<&Tensor> {
        self.tensors.get(name).ok_or_else(|| absent("tensor", name))
    }

    /// The state of the part of that name.
    ///
    /// # Errors
    /// There is none.
    pub fn part(&self, name: &str) -> Result<&StateDict> {
        self.parts.get(name).ok_or_else(|| absent("part", name))
    }

    /// Takes the tensor of that name out, to keep it.
    ///
    /// # Errors
    /// There is none.
    pub fn take_tensor(&mut self, name: &str) -> Result<Tensor> {
        self.tensors.remove(name).ok_or_else(|| absent("tensor", name))
    }

    /// Takes the state of the part of that name out.
    ///
    /// # Errors
    /// There is none.
    pub fn take_part(&mut self, name: &str) -> Result<StateDict> {
        self.parts.remove(name).ok_or_else(|| absent("part", name))
    }

    /// A copy with tensors of its own, dense and on the CPU: a snapshot that training does not change.
    ///
    /// # Errors
    /// libtorch could not copy.
    pub fn copy(&self) -> Result<Self> {
        let _guard = tch::no_grad_guard();
        let mut copy = Self { values: self.values.clone(), ..Self::default() };
        // Names of one tensor stay names of one tensor.
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

/// A state of values only, as schedulers have.
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
/// [`Engine::track`](crate::engine::Engine::track) puts it into the checkpoints of an engine. Models
/// ([`VarStore`](tch::nn::VarStore)) and [`Optimizer`](crate::optim::Optimizer) are such things; so is
/// what you implement it for, shared as `Rc<RefCell<T>>` or `Arc<Mutex<T>>`.
pub trait Stateful {
    /// The state. Tensors are shared, not copied.
    fn state_dict(&self) -> Result<StateDict>;

    /// Goes to a saved state, whose tensors may be kept: nobody else uses them.
    ///
    /// # Errors
    /// What is missing or does not fit, by name.
    fn load_state_dict(&mut self, state: StateDict) -> Result<()>;

    /// Goes to as much of a saved state as fits, and says what did not, a line for each: where a run is
    /// resumed without `strict`. Unless told otherwise all of it has to fit.
    ///
    /// # Errors
    /// Nothing of it fits; nothing is changed then.
    fn load_state_dict_partially(&mut self, state: StateDict) -> Result<Vec<String>> {
        self.load_state_dict(state).map(|()| vec![])
    }

    /// What the program chose, as far as a change of it should be told when a run is resumed.
    fn settings(&self) -> Map<String, Value> {
        Map::new()
    }

    /// Whether a saved state must have exactly the tensors of this one, in name, type and shape, as
    /// that of a model: checked before anything is loaded.
    fn has_fixed_tensors(&self) -> bool {
        false
    }

    /// Whether a checkpoint may be read straight into the tensors that [`state_dict`](Self::state_dict)
    /// gives. On error they hold garbage then.
    fn is_read_in_place(&self) -> bool {
        false
    }

    /// Whether the state is now this process's own where several train together, as gradients are that have
    /// not been exchanged. A checkpoint then has that of each; otherwise that of the main one is all there is.
    fn differs_by_rank(&self) -> bool {
        false
    }
}
