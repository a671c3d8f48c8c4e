//! Types that engines can track: models, optimizers, gradients, and your own types.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::rc::Rc;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};

use serde_json::{Map, Value};
use tch::nn::{VarStore, Variables};
use tch::{Kind, TchError, Tensor};

use super::layout::Layout;
use super::{EvaluationWeights, StateDict, Stateful};
use crate::bridge::{TensorId, bytes, is_low_precision, set_gradient};
use crate::error::{Error, Result};

/// A value that [`Engine::track`](crate::engine::Engine::track) takes: `&VarStore`, `&Optimizer`, a
/// [`GradScaler`](crate::amp::GradScaler), [`SavedGradients`], and `Rc<RefCell<T>>` or `Arc<Mutex<T>>` of a [`Stateful`]
/// type.
#[diagnostic::on_unimplemented(
    message = "`{Self}` has no state that a checkpoint could hold",
    note = "`track` takes `&VarStore`, `&Optimizer`, a `GradScaler`, and `Rc<RefCell<T>>` or `Arc<Mutex<T>>` of a type `T` of your own: implement `Stateful` for it"
)]
pub trait IntoStateful<'a> {
    /// Makes a handle to the tracked object.
    fn into_stateful(self) -> Box<dyn Stateful + 'a>;
}

impl<'a> IntoStateful<'a> for &VarStore {
    fn into_stateful(self) -> Box<dyn Stateful + 'a> {
        Box::new(Model(self.variables_.clone()))
    }
}

impl<'a> IntoStateful<'a> for SavedGradients {
    fn into_stateful(self) -> Box<dyn Stateful + 'a> {
        Box::new(self)
    }
}

impl<'a, T: Stateful + 'a> IntoStateful<'a> for Rc<RefCell<T>> {
    fn into_stateful(self) -> Box<dyn Stateful + 'a> {
        Box::new(self)
    }
}

impl<'a, T: Stateful + 'a> IntoStateful<'a> for Arc<Mutex<T>> {
    fn into_stateful(self) -> Box<dyn Stateful + 'a> {
        Box::new(self)
    }
}

#[deny(clippy::missing_trait_methods)]
impl<T: Stateful> Stateful for Rc<RefCell<T>> {
    fn state_dict(&self) -> Result<StateDict> {
        self.try_borrow().map_err(|error| Error::State(error.to_string()))?.state_dict()
    }

    fn load_state_dict(&mut self, state: StateDict) -> Result<()> {
        self.try_borrow_mut()
            .map_err(|error| Error::State(error.to_string()))?
            .load_state_dict(state)
    }

    fn load_state_dict_partially(&mut self, state: StateDict) -> Result<Vec<String>> {
        self.try_borrow_mut()
            .map_err(|error| Error::State(error.to_string()))?
            .load_state_dict_partially(state)
    }

    fn settings(&self) -> Map<String, Value> {
        self.try_borrow().map_or_else(|_| Map::new(), |part| part.settings())
    }

    fn has_fixed_tensors(&self) -> bool {
        self.try_borrow().is_ok_and(|part| part.has_fixed_tensors())
    }

    fn is_read_in_place(&self) -> bool {
        self.try_borrow().is_ok_and(|part| part.is_read_in_place())
    }

    fn differs_by_rank(&self) -> bool {
        self.try_borrow().is_ok_and(|part| part.differs_by_rank())
    }

    fn evaluation_weights(&self) -> Result<Option<EvaluationWeights>> {
        self.try_borrow().map_or(Ok(None), |part| part.evaluation_weights())
    }
}

#[deny(clippy::missing_trait_methods)]
impl<T: Stateful> Stateful for Arc<Mutex<T>> {
    fn state_dict(&self) -> Result<StateDict> {
        free(self)?.state_dict()
    }

    fn load_state_dict(&mut self, state: StateDict) -> Result<()> {
        free(self)?.load_state_dict(state)
    }

    fn load_state_dict_partially(&mut self, state: StateDict) -> Result<Vec<String>> {
        free(self)?.load_state_dict_partially(state)
    }

    fn settings(&self) -> Map<String, Value> {
        free(self).map_or_else(|_| Map::new(), |part| part.settings())
    }

    fn has_fixed_tensors(&self) -> bool {
        free(self).is_ok_and(|part| part.has_fixed_tensors())
    }

    fn is_read_in_place(&self) -> bool {
        free(self).is_ok_and(|part| part.is_read_in_place())
    }

    fn differs_by_rank(&self) -> bool {
        free(self).is_ok_and(|part| part.differs_by_rank())
    }

    fn evaluation_weights(&self) -> Result<Option<EvaluationWeights>> {
        free(self).map_or(Ok(None), |part| part.evaluation_weights())
    }
}

/// Locks a mutex. Where the caller holds the lock itself, this is an error and not a deadlock.
fn free<T>(part: &Mutex<T>) -> Result<MutexGuard<'_, T>> {
    match part.try_lock() {
        Ok(guard) => Ok(guard),
        Err(TryLockError::Poisoned(poisoned)) => Ok(poisoned.into_inner()),
        Err(TryLockError::WouldBlock) => {
            Err(Error::State("a part that is locked elsewhere has no state".into()))
        }
    }
}

/// The variables of a store, parameters and buffers, under their names.
struct Model(Arc<Mutex<Variables>>);

impl Stateful for Model {
    fn state_dict(&self) -> Result<StateDict> {
        Ok(variables_of(&self.0))
    }

    fn load_state_dict(&mut self, state: StateDict) -> Result<()> {
        load_variables(&self.0, &state)
    }

    fn load_state_dict_partially(&mut self, mut state: StateDict) -> Result<Vec<String>> {
        let misfits = misfits(&variables_of(&self.0), &state);
        state.tensors.retain(|name, _| !misfits.contains_key(name));
        copy_variables(&self.0, &state)?;
        Ok(misfits.into_values().collect())
    }

    fn has_fixed_tensors(&self) -> bool {
        true
    }

    fn is_read_in_place(&self) -> bool {
        true
    }
}

/// The gradients of a model's parameters. Track them beside the model where checkpoints may be written while gradients
/// are accumulated over several batches. Otherwise each step starts without gradients, and they need not be saved.
///
/// A sparse gradient is saved as its indices and values, and is sparse again when it is loaded. Indices that lie outside the
/// parameter are an error. Saving shares the tensors and copies nothing.
///
/// Where several processes train together, a checkpoint holds the gradients of each rank, which are sent to all ranks
/// for that.
pub struct SavedGradients(Arc<Mutex<Variables>>);

crate::debug::opaque_debug!(SavedGradients);

impl SavedGradients {
    /// The gradients of the parameters of this store.
    pub fn of(vs: &VarStore) -> Self {
        Self(vs.variables_.clone())
    }

    pub(crate) fn of_variables(variables: Arc<Mutex<Variables>>) -> Self {
        Self(variables)
    }
}

impl Stateful for SavedGradients {
    fn state_dict(&self) -> Result<StateDict> {
        let mut state = StateDict::new();
        for (name, variable) in variables_of(&self.0).tensors {
            let failed = |error| Error::libtorch(format!("the gradient of '{name}'"), error);
            let gradient = variable.f_grad().map_err(failed)?;
            if gradient.defined() && gradient.is_sparse() {
                state.set_part(&name, sparse_parts(&gradient).map_err(failed)?);
            } else if gradient.defined() {
                state.set_tensor(&name, gradient);
            }
        }
        Ok(state)
    }

    /// Nothing is changed where the gradients do not fit. Parameters without a saved gradient have none afterwards.
    fn load_state_dict(&mut self, mut state: StateDict) -> Result<()> {
        let variables = variables_of(&self.0).tensors;
        for (name, part) in std::mem::take(&mut state.parts) {
            let gradient = variables.get(&name).map(|variable| sparse_of(part, variable));
            let gradient = gradient.transpose()?.ok_or_else(|| unfit(&name))?;
            state.tensors.insert(name, gradient);
        }
        for (name, gradient) in &state.tensors {
            let fits = variables.get(name).is_some_and(|variable| {
                // Gradients of several batches add up in f32.
                let wide = is_low_precision(variable) && gradient.kind() == Kind::Float;
                variable.size() == gradient.size() && (wide || variable.kind() == gradient.kind())
            });
            if !fits {
                return Err(unfit(name));
            }
        }
        for (name, variable) in variables {
            let failed = |text: String| Error::libtorch(format!("the gradient of '{name}'"), text);
            let gradient = state.tensors.remove(&name);
            let gradient = gradient
                .map(|gradient| gradient.f_to_device(variable.device()))
                .transpose()
                .map_err(|error| failed(error.to_string()))?;
            set_gradient(&variable, gradient.as_ref()).map_err(failed)?;
        }
        Ok(())
    }

    fn differs_by_rank(&self) -> bool {
        true
    }
}

fn unfit(name: &str) -> Error {
    Error::State(format!("the gradient of '{name}' fits no parameter here"))
}

/// A sparse gradient is saved under these names. An index may be there several times, unless it is coalesced.
const INDICES: &str = "indices";
const VALUES: &str = "values";
const COALESCED: &str = "coalesced";

fn sparse_parts(gradient: &Tensor) -> Result<StateDict, TchError> {
    let mut parts = StateDict::new();
    parts.set_tensor(INDICES, gradient.f_internal_indices()?);
    parts.set_tensor(VALUES, gradient.f_internal_values()?);
    parts.values.insert(COALESCED.into(), gradient.f_is_coalesced()?.into());
    Ok(parts)
}

/// Makes a sparse gradient of the shape of its variable.
fn sparse_of(mut parts: StateDict, variable: &Tensor) -> Result<Tensor> {
    let (indices, values) = (parts.take_tensor(INDICES)?, parts.take_tensor(VALUES)?);
    let coalesced = parts.value(COALESCED)?;
    let damaged = |why: String| Error::State(format!("a sparse gradient is damaged: {why}"));
    let size = variable.size();
    let made = is_within(&indices, &size, coalesced).and_then(|within| match within {
        true => {
            let options = (values.kind(), values.device());
            let of = Tensor::f_sparse_coo_tensor_indices_size;
            of(&indices, &values, &size[..], options, coalesced).map(Some)
        }
        false => Ok(None),
    });
    made.map_err(|error| damaged(error.to_string()))?
        .ok_or_else(|| damaged(format!("its indices are not those of a tensor of shape {size:?}")))
}

/// Whether indices, a column for each entry, are within a tensor of this size, and in order if they are said to be. libtorch
/// believes them, and writes to where they lead.
fn is_within(indices: &Tensor, size: &[i64], in_order: bool) -> Result<bool, TchError> {
    let rows = match (indices.kind(), &indices.size()[..]) {
        (Kind::Int64, [rows, _]) if *rows > 0 && *rows as usize <= size.len() => *rows,
        _ => return Ok(false),
    };
    let entries = indices.size()[1];
    let mut places = Tensor::f_zeros([entries], (Kind::Int64, indices.device()))?;
    for (row, length) in (0..rows).zip(size) {
        let row = indices.f_select(0, row)?;
        if row.f_lt(0)?.f_any()?.f_int64_value(&[])? != 0
            || row.f_ge(*length)?.f_any()?.f_int64_value(&[])? != 0
        {
            return Ok(false);
        }
        places = places.f_mul_scalar(*length)?.f_add(&row)?;
    }
    if !in_order || entries < 2 {
        return Ok(true);
    }
    let (before, after) =
        (places.f_narrow(0, 0, entries - 1)?, places.f_narrow(0, 1, entries - 1)?);
    Ok(after.f_gt_tensor(&before)?.f_all()?.f_int64_value(&[])? != 0)
}

/// The variables of a store, by name; the tensors are shared.
pub(crate) fn variables_of(variables: &Mutex<Variables>) -> StateDict {
    let variables = variables.lock().unwrap_or_else(PoisonError::into_inner);
    let mut state = StateDict::new();
    for (name, tensor) in &variables.named_variables {
        state.set_tensor(name, tensor.shallow_clone());
    }
    state
}

/// Copies values into the variables, whose types and devices stay. Nothing is changed on error.
pub(crate) fn load_variables(variables: &Mutex<Variables>, state: &StateDict) -> Result<()> {
    match misfits(&variables_of(variables), state).into_values().next() {
        Some(misfit) => Err(Error::State(misfit)),
        None => copy_variables(variables, state),
    }
}

/// Copies values into the variables of the same names; other values are ignored.
pub(crate) fn copy_variables(variables: &Mutex<Variables>, state: &StateDict) -> Result<()> {
    let ours = variables_of(variables);
    check_tied(&ours, state)?;
    let _guard = tch::no_grad_guard();
    for (name, value) in &state.tensors {
        let Some(mut variable) = ours.tensors.get(name).map(Tensor::shallow_clone) else {
            continue;
        };
        // A value that was read straight into the variable needs no copy.
        if TensorId::of(&variable) != TensorId::of(value) {
            variable
                .f_copy_(value)
                .map_err(|error| Error::libtorch(format!("loading '{name}'"), error))?;
        }
    }
    Ok(())
}

/// Refuses different values for two names of one variable, because only one value could be loaded.
fn check_tied(ours: &StateDict, state: &StateDict) -> Result<()> {
    let mut first_names: HashMap<TensorId, (&str, &Tensor)> = HashMap::new();
    for (name, value) in &state.tensors {
        let Some(variable) = ours.tensors.get(name) else { continue };
        let (first, other) = *first_names.entry(TensorId::of(variable)).or_insert((name, value));
        if TensorId::of(value) != TensorId::of(other) && !have_same_bits(value, other) {
            return Err(Error::State(format!(
                "'{first}' and '{name}' are names of one variable here, and have different values there; give them variables of their own, or load a state of tied ones"
            )));
        }
    }
    Ok(())
}

fn have_same_bits(a: &Tensor, b: &Tensor) -> bool {
    match (bytes(a), bytes(b)) {
        (Ok(a), Ok(b)) => a == b,
        // The tensors are on another device, or not dense.
        _ => a.f_equal(b).unwrap_or(false),
    }
}

/// Finds the tensors of `ours` and of a saved state that differ in name, type or shape. Returns a sentence about each,
/// by name.
pub(crate) fn misfits(ours: &StateDict, saved: &StateDict) -> BTreeMap<String, String> {
    let saved = saved.tensors.iter().map(|(name, tensor)| {
        (name.as_str(), Layout { kind: tensor.kind(), shape: tensor.size() })
    });
    layout_misfits(ours, &saved.collect())
}

/// [`misfits`] for tensors that are still in a file.
pub(crate) fn layout_misfits(
    ours: &StateDict,
    saved: &BTreeMap<&str, Layout>,
) -> BTreeMap<String, String> {
    let mut misfits = BTreeMap::new();
    // For a variable with several names, one of them in the saved state is enough.
    let named = ours.tensors.iter().filter(|(name, _)| saved.contains_key(name.as_str()));
    let found: HashSet<_> = named.map(|(_, tensor)| TensorId::of(tensor)).collect();
    for (name, tensor) in &ours.tensors {
        if !saved.contains_key(name.as_str()) && found.contains(&TensorId::of(tensor)) {
            continue;
        }
        let ours = Layout { kind: tensor.kind(), shape: tensor.size() };
        let misfit = match saved.get(name.as_str()) {
            None => format!("'{name}' is missing"),
            Some(saved) if *saved != ours => {
                format!("'{name}' is {saved}, but {ours} here")
            }
            Some(_) => continue,
        };
        misfits.insert(name.clone(), misfit);
    }
    for name in saved.keys().filter(|name| !ours.tensors.contains_key(**name)) {
        misfits.insert((*name).to_owned(), format!("'{name}' is unknown here"));
    }
    misfits
}
