use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fmt;
use std::path::Path;
use std::sync::Arc;

use tch::Tensor;
use tch::nn::VarStore;

use super::names::Names;
use super::reader::Reader;
use super::tensor::StoredTensor;
use super::value::{Dict, Value};
use super::writer::write;
use crate::bridge::TensorId;
use crate::error::{Error, Result};
use crate::variables::{Variable, variables};

/// Tensors by name, as a module's `state_dict()` has them.
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let path = folder.path().join("model.pt");
/// # let (weight, bias) = (tch::Tensor::zeros([3, 2], tch::kind::FLOAT_CPU), tch::Tensor::zeros([3], tch::kind::FLOAT_CPU));
/// # let mut state = pytorch::Dict::ordered();
/// # state.insert("module.fc.weight", pytorch::Value::tensor(&weight)?);
/// # state.insert("module.fc.bias", pytorch::Value::tensor(&bias)?);
/// # let mut file = pytorch::Dict::new();
/// # file.insert("state_dict", state);
/// # pytorch::write(&path, &file.into())?;
/// use tch::{Device, nn};
/// use tch_ignite::pytorch::{self, Names, Weights};
/// let vs = nn::VarStore::new(Device::Cpu);
/// let fc = nn::linear(vs.root() / "fc", 2, 3, Default::default());
/// // A training checkpoint of DataParallel: torch.save({"state_dict": model.state_dict(), …})
/// let checkpoint = pytorch::read(&path)?;
/// let weights = Weights::of(checkpoint.require("state_dict")?)?;
/// let loaded = weights.rename(&Names::new().strip_prefix("module."))?.load(&vs)?;
/// assert_eq!(loaded.loaded, ["fc.bias", "fc.weight"]);
/// # Ok::<(), anyhow::Error>(())
/// ```
#[derive(Clone)]
pub struct Weights {
    /// Names and tensors in the order of the file.
    tensors: Vec<(String, Arc<StoredTensor>)>,
    /// Maps each name to its index in `tensors`.
    places: HashMap<String, usize>,
    /// Names that [`rename`](Self::rename) left out.
    skipped: Vec<String>,
}

/// The variables of a store that were loaded from a file, and everything that did not fit. `Display` shows it in a
/// line or a few.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Loaded {
    /// Variables of the store that were loaded, in the order of their names.
    pub loaded: Vec<String>,
    /// Variables of the store that the file does not have. They keep their values.
    pub missing: Vec<String>,
    /// Tensors of the file that have no place in the store.
    pub unexpected: Vec<String>,
    /// Variables whose shapes differ: the name, and a text with both shapes.
    pub mismatched: Vec<(String, String)>,
    /// Tensors of the file that the mapping of names left out.
    pub skipped: Vec<String>,
    /// Advice to strip or add a prefix, if that would make most names fit.
    hint: Option<String>,
}

/// PyTorch's batch norm counts its batches under this name. tch's does not, so a file may have these counters
/// although the store has no place for them.
const COUNTER: &str = "num_batches_tracked";

impl Weights {
    /// The tensors of a dict whose values are all tensors.
    ///
    /// # Errors
    /// The value is no dict, or an entry is no tensor or has a name that is no text; the error names the entry, and
    /// the parts that look like a module's `state_dict()`.
    pub fn of(value: &Value) -> Result<Self> {
        let Some(dict) = value.as_dict() else {
            return Err(Error::State(format!("a {} is no state_dict()", value.type_name())));
        };
        let mut tensors = Vec::with_capacity(dict.len());
        for (name, value) in dict.iter() {
            match (name, value) {
                (Value::Str(name), Value::Tensor(tensor)) => {
                    tensors.push((name.to_string(), tensor.clone()));
                }
                (name, other) => {
                    let parts: Vec<_> = dict.iter().filter(|(_, part)| is_state(part)).collect();
                    let parts: Vec<_> = parts.iter().map(|(key, _)| key.to_string()).collect();
                    let hint = match &parts[..] {
                        [] => String::new(),
                        parts => format!("; weights are in {}", parts.join(", ")),
                    };
                    let what = other.type_name();
                    return Err(Error::State(format!("{name} is a {what} and no tensor{hint}")));
                }
            }
        }
        Ok(Self::new(tensors, vec![]))
    }

    pub(super) fn new(tensors: Vec<(String, Arc<StoredTensor>)>, skipped: Vec<String>) -> Self {
        let names = tensors.iter().enumerate();
        let places = names.map(|(place, (name, _))| (name.clone(), place)).collect();
        Self { tensors, places, skipped }
    }

    /// Reads a file that holds a module's state and nothing else: `torch.save(model.state_dict(), path)`.
    ///
    /// # Errors
    /// As [`Reader::read`] and [`of`](Self::of).
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let value = Reader::new().read(path)?;
        Self::of(&value).map_err(|error| Error::State(format!("{}: {error}", path.display())))
    }

    pub(super) fn into_tensors(self) -> Vec<(String, Arc<StoredTensor>)> {
        self.tensors
    }

    /// The variables of a store, parameters and buffers, in PyTorch's usual [order](Self::names); shared, not copied.
    ///
    /// # Errors
    /// A variable cannot be saved; the error names it.
    pub fn of_store(vs: &VarStore) -> Result<Self> {
        let named = names_of_store(variables(&vs.variables_));
        let mut tensors = Vec::with_capacity(named.len());
        for (name, variable) in named {
            // state_dict() has tensors without their gradients' history.
            let stored = variable
                .f_detach()
                .map_err(|error| Error::libtorch("saving a variable", error))
                .and_then(|variable| StoredTensor::new(&variable))
                .map_err(|error| Error::State(format!("variable '{name}': {error}")))?;
            tensors.push((name, Arc::new(stored)));
        }
        Ok(Self::new(tensors, vec![]))
    }

    /// Gives the tensors other names.
    ///
    /// # Errors
    /// Two tensors would get the same name.
    pub fn rename(self, names: &Names) -> Result<Self> {
        let (mut tensors, mut skipped) = (Vec::with_capacity(self.tensors.len()), self.skipped);
        let mut before: HashMap<String, String> = HashMap::new();
        for (name, tensor) in self.tensors {
            let Some(new) = names.apply(&name) else {
                skipped.push(name);
                continue;
            };
            if let Some(other) = before.insert(new.clone(), name.clone()) {
                return Err(Error::invalid(format!(
                    "'{other}' and '{name}' would both be named '{new}'"
                )));
            }
            tensors.push((new, tensor));
        }
        Ok(Self::new(tensors, skipped))
    }

    /// The tensors in the order of the file.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &StoredTensor)> {
        self.tensors.iter().map(|(name, tensor)| (name.as_str(), &**tensor))
    }

    /// The names in the order of the file. A `state_dict()` has the order of the modules and of their parameters, by
    /// which PyTorch's optimizers number parameters. The names of a store are in the order in which the modules were
    /// made; within a module biases come behind other parameters, and buffers behind both, which is the order of
    /// PyTorch's own modules. All names of a tied parameter stand at its place.
    pub fn names(&self) -> Vec<&str> {
        self.tensors.iter().map(|(name, _)| name.as_str()).collect()
    }

    /// The tensor of that name.
    pub fn get(&self, name: &str) -> Option<&StoredTensor> {
        self.stored(name).map(|tensor| &**tensor)
    }

    fn stored(&self, name: &str) -> Option<&Arc<StoredTensor>> {
        self.places.get(name).and_then(|place| self.tensors.get(*place)).map(|(_, tensor)| tensor)
    }

    /// Tells which variables [`load`](Self::load) would load and which would not fit; nothing is read. A tied variable is
    /// there if one of its names is.
    pub fn compare(&self, vs: &VarStore) -> Loaded {
        self.compared(&vs.variables().into_iter().collect())
    }

    fn compared(&self, variables: &BTreeMap<String, Tensor>) -> Loaded {
        let mut found = Loaded { skipped: self.skipped.clone(), ..Loaded::default() };
        for (name, variable) in variables {
            match self.stored(name) {
                None => found.missing.push(name.clone()),
                Some(stored) if stored.shape == variable.size() => found.loaded.push(name.clone()),
                Some(stored) => found.mismatched.push((
                    name.clone(),
                    format!("{:?} here and {:?} in the file", variable.size(), stored.shape),
                )),
            }
        }
        let id = |name: &String| variables.get(name).map(TensorId::of);
        let loaded: HashSet<_> = found.loaded.iter().map(id).collect();
        found.missing.retain(|name| !loaded.contains(&id(name)));
        let names = self.tensors.iter().map(|(name, _)| name);
        found.unexpected = names.filter(|name| !variables.contains_key(*name)).cloned().collect();
        found.hint = hint(&found.missing, &found.unexpected);
        found
    }

    /// Loads all variables of a store. Values are converted to the store's types, as in PyTorch; types and
    /// devices of the store stay as they are. Where the types are the same, a file is read straight into the
    /// store's memory.
    ///
    /// `num_batches_tracked`, which tch's batch norm does not have, may have no place: it is listed as unexpected.
    ///
    /// # Errors
    /// Names or shapes do not fit; the error lists all of them, and nothing is changed. If the file cannot be read to
    /// its end, or a checksum is wrong, the error says so, and the store then holds a part of the file.
    pub fn load(&self, vs: &VarStore) -> Result<Loaded> {
        self.load_into(vs.variables().into_iter().collect())
    }

    /// Loads the variables of a store, or tensors that stand for them.
    pub(super) fn load_into(&self, variables: BTreeMap<String, Tensor>) -> Result<Loaded> {
        let found = self.compared(&variables);
        match found.fits() {
            true => self.copied(variables, found),
            false => Err(Error::State(found.to_string())),
        }
    }

    /// Loads the tensors whose names and shapes fit and leaves the other variables as they are; the result lists
    /// them.
    ///
    /// # Errors
    /// Nothing fits; the file cannot be read.
    pub fn load_partial(&self, vs: &VarStore) -> Result<Loaded> {
        let found = self.compare(vs);
        match found.loaded.is_empty() && !found.missing.is_empty() {
            true => Err(Error::State(found.to_string())),
            false => self.copied(vs.variables().into_iter().collect(), found),
        }
    }

    fn copied(&self, mut variables: BTreeMap<String, Tensor>, found: Loaded) -> Result<Loaded> {
        for name in &found.loaded {
            if let (Some(stored), Some(variable)) = (self.stored(name), variables.get_mut(name)) {
                tch::no_grad(|| stored.copied(variable)).map_err(|why| {
                    Error::State(format!(
                        "'{name}' cannot be read: {why}. The store now holds a part of the file"
                    ))
                })?;
            }
        }
        Ok(found)
    }

    /// The tensors as the value of a module's `state_dict()`.
    pub fn to_value(&self) -> Value {
        let mut dict = Dict::ordered();
        for (name, tensor) in &self.tensors {
            dict.push(name.as_str(), Value::Tensor(tensor.clone()));
        }
        dict.into()
    }
}

impl fmt::Debug for Weights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.tensors.iter().map(|(name, tensor)| (name, tensor))).finish()
    }
}

/// The names and tensors of all variables of a store: parameters in [PyTorch's order](parameters_in_order), and each
/// buffer behind the parameters of its module.
fn names_of_store(variables: Vec<Variable>) -> Vec<(String, Tensor)> {
    let (parameters, buffers): (Vec<_>, Vec<_>) =
        variables.into_iter().partition(|variable| variable.trainable);
    let named = |variable: Variable| {
        let names: Vec<_> =
            variable.names().filter(|name| !name.is_empty()).map(str::to_owned).collect();
        let tensor = variable.tensor;
        names.into_iter().map(move |name| (name, tensor.shallow_clone()))
    };
    let mut all: Vec<_> = parameters_in_order(parameters).into_iter().flat_map(named).collect();
    for (name, tensor) in buffers.into_iter().flat_map(named) {
        let behind = all.iter().rposition(|(other, _)| module_of(other) == module_of(&name));
        all.insert(behind.map_or(all.len(), |place| place + 1), (name, tensor));
    }
    all
}

fn module_of(name: &str) -> &str {
    name.rsplit_once('.').map_or("", |(module, _)| module)
}

/// Sorts parameters from the order in which the store got them into PyTorch's order: tch makes a layer's bias first,
/// PyTorch last. A tied parameter belongs to the first of its modules.
pub(super) fn parameters_in_order(mut parameters: Vec<Variable>) -> Vec<Variable> {
    let mut modules: HashMap<String, usize> = HashMap::new();
    let (tied, single): (Vec<_>, Vec<_>) =
        parameters.iter().enumerate().partition(|(_, p)| !p.other_names.is_empty());
    // The store does not tell which name of a tied parameter came first. So a module that also has untied parameters
    // gets the place of the first of these.
    for (place, parameter) in single.into_iter().chain(tied) {
        for name in parameter.names() {
            modules.entry(module_of(name).to_owned()).or_insert(place);
        }
    }
    parameters.sort_by_cached_key(|parameter| {
        let place = |name: &str| modules.get(module_of(name)).copied();
        let is_bias =
            |name: &str| name[module_of(name).len()..].trim_start_matches('.').starts_with("bias");
        parameter.names().map(|name| (place(name), is_bias(name))).min()
    });
    parameters
}

/// Whether a value is a dict of tensors.
pub(super) fn is_state(value: &Value) -> bool {
    value.as_dict().is_some_and(|dict| {
        !dict.is_empty()
            && dict.iter().all(|(key, value)| key.as_str().is_some() && value.as_tensor().is_some())
    })
}

/// Looks for a prefix that, taken off the unexpected names or put before them, would turn them into most of the
/// missing names, and returns advice to strip or add it.
fn hint(missing: &[String], unexpected: &[String]) -> Option<String> {
    let beginnings = |long: &[String], short: &[String]| {
        let short: BTreeSet<_> = short.iter().collect();
        let mut counts: BTreeMap<String, usize> = BTreeMap::new();
        for name in long {
            for (at, _) in name.match_indices('.') {
                if short.contains(&name[at + 1..].to_owned()) {
                    *counts.entry(name[..=at].to_owned()).or_default() += 1;
                }
            }
        }
        counts
            .into_iter()
            .max_by_key(|(_, count)| *count)
            .filter(|(_, count)| 2 * count > short.len())
    };
    if let Some((prefix, _)) = beginnings(unexpected, missing) {
        return Some(format!(
            "the file's names begin with '{prefix}': try Names::new().strip_prefix({prefix:?})"
        ));
    }
    let (prefix, _) = beginnings(missing, unexpected)?;
    Some(format!(
        "the store's names begin with '{prefix}': try Names::new().add_prefix({prefix:?})"
    ))
}

impl Loaded {
    /// Whether everything has its place: nothing is missing, and nothing but counters of batch norm is left over.
    pub fn fits(&self) -> bool {
        self.missing.is_empty() && self.mismatched.is_empty() && self.faults().next().is_none()
    }

    /// Unexpected tensors that must not be left over: all but batch norm's counters.
    fn faults(&self) -> impl Iterator<Item = &String> {
        let is_counter = |name: &str| name.rsplit('.').next() == Some(COUNTER);
        self.unexpected.iter().filter(move |name| !is_counter(name))
    }
}

/// How many names one line of `Display` lists.
const MAX_LISTED: usize = 10;

impl fmt::Display for Loaded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let all =
            self.loaded.len() + self.missing.len() + self.mismatched.len() + self.unexpected.len();
        let faults: Vec<_> = self.faults().cloned().collect();
        let misfits = self.missing.len() + self.mismatched.len() + faults.len();
        match misfits {
            0 => write!(f, "{} variables loaded", self.loaded.len())?,
            misfits => write!(f, "{misfits} of {all} do not fit")?,
        }
        let listed = |f: &mut fmt::Formatter<'_>, what: &str, names: &[String]| {
            if names.is_empty() {
                return Ok(());
            }
            let more = names.len().saturating_sub(MAX_LISTED);
            let shown = names[..names.len() - more].join(", ");
            write!(f, "\n  {what}: {shown}")?;
            if more > 0 { write!(f, " and {more} more") } else { Ok(()) }
        };
        let shapes: Vec<_> =
            self.mismatched.iter().map(|(name, how)| format!("{name} is {how}")).collect();
        listed(f, "not in the file", &self.missing)?;
        listed(f, "of another shape", &shapes)?;
        listed(
            f,
            "without a place in the store",
            if misfits == 0 { &self.unexpected } else { &faults },
        )?;
        listed(f, "left out by the mapping of names", &self.skipped)?;
        match &self.hint {
            Some(hint) => write!(f, "\n  {hint}"),
            None => Ok(()),
        }
    }
}

/// Loads all variables of a store from a file of `torch.save(model.state_dict(), path)`: see [`Weights::load`],
/// which takes the weights of a larger checkpoint, and other names.
///
/// # Errors
/// As [`Weights::read`] and [`Weights::load`].
pub fn load_weights(vs: &VarStore, path: impl AsRef<Path>, names: &Names) -> Result<Loaded> {
    let path = path.as_ref();
    let weights = Weights::read(path)?;
    weights
        .rename(names)
        .and_then(|weights| weights.load(vs))
        .map_err(|error| Error::State(format!("{}: {error}", path.display())))
}

/// Writes the variables of a store, parameters and buffers, for `model.load_state_dict(torch.load(path))`.
///
/// # Errors
/// As [`write()`] and [`Weights::rename`].
pub fn save_weights(vs: &VarStore, path: impl AsRef<Path>, names: &Names) -> Result<()> {
    write(path, &Weights::of_store(vs)?.rename(names)?.to_value())
}
