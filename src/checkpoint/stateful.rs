//! What engines track: models, optimizers, and things of your own.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};

use serde_json::{Map, Value};
use tch::Tensor;
use tch::nn::{VarStore, Variables};

use super::{StateDict, Stateful};
use crate::amp::GradScaler;
use crate::bridge::{TensorId, set_gradient};
use crate::optim::Optimizer;
use crate::{Error, Result};

/// What [`Engine::track`](crate::engine::Engine::track) takes: `&VarStore`, `&Optimizer`, a
/// [`GradScaler`], [`Gradients`], and `Rc<RefCell<T>>` or `Arc<Mutex<T>>` of a [`Stateful`] type.
pub trait IntoStateful<'a> {
    /// A handle to it.
    fn into_stateful(self) -> Box<dyn Stateful + 'a>;
}

impl<'a> IntoStateful<'a> for &VarStore {
    fn into_stateful(self) -> Box<dyn Stateful + 'a> {
        Box::new(Model(self.variables_.clone()))
    }
}

impl<'a> IntoStateful<'a> for &Optimizer {
    fn into_stateful(self) -> Box<dyn Stateful + 'a> {
        Box::new(self.clone())
    }
}

impl<'a> IntoStateful<'a> for &GradScaler {
    fn into_stateful(self) -> Box<dyn Stateful + 'a> {
        Box::new(self.clone())
    }
}

impl<'a> IntoStateful<'a> for Gradients {
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
}

#[deny(clippy::missing_trait_methods)]
impl<T: Stateful> Stateful for Arc<Mutex<T>> {
    fn state_dict(&self) -> Result<StateDict> {
        free(self)?.state_dict()
    }

    fn load_state_dict(&mut self, state: StateDict) -> Result<()> {
        free(self)?.load_state_dict(state)
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
}

/// An error, not a deadlock, where the caller has the guard itself.
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

    fn has_fixed_tensors(&self) -> bool {
        true
    }

    fn is_read_in_place(&self) -> bool {
        true
    }
}

/// The gradients of a model's parameters, to be tracked beside the model where checkpoints are written
/// while gradients are accumulated over several batches. Elsewhere a step begins without any, and they
/// need not be saved.
///
/// Where several processes train together each one's are saved, and sent to all for that.
pub struct Gradients(Arc<Mutex<Variables>>);

impl Gradients {
    /// Of the parameters of this store.
    pub fn of(vs: &VarStore) -> Self {
        Self(vs.variables_.clone())
    }

    pub(crate) fn of_optimizer(optimizer: &Optimizer) -> Self {
        Self(optimizer.variables())
    }
}

impl Stateful for Gradients {
    fn state_dict(&self) -> Result<StateDict> {
        let mut state = StateDict::new();
        for (name, variable) in variables_of(&self.0).tensors {
            let gradient = variable
                .f_grad()
                .map_err(|error| Error::libtorch(format!("the gradient of '{name}'"), error))?;
            if gradient.defined() {
                state.set_tensor(&name, gradient);
            }
        }
        Ok(state)
    }

    /// Nothing is changed where they do not fit. Parameters without a saved gradient have none then.
    fn load_state_dict(&mut self, mut state: StateDict) -> Result<()> {
        let variables = variables_of(&self.0).tensors;
        for (name, gradient) in &state.tensors {
            let fits = variables.get(name).is_some_and(|variable| {
                (variable.kind(), variable.size()) == (gradient.kind(), gradient.size())
            });
            if !fits {
                return Err(Error::State(format!(
                    "the gradient of '{name}' fits no parameter here"
                )));
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

pub(super) fn variables_of(variables: &Mutex<Variables>) -> StateDict {
    let variables = variables.lock().unwrap_or_else(PoisonError::into_inner);
    let mut state = StateDict::new();
    for (name, tensor) in &variables.named_variables {
        state.set_tensor(name, tensor.shallow_clone());
    }
    state
}

/// Copies values into the variables, whose types stay. Nothing is changed on error.
pub(super) fn load_variables(variables: &Mutex<Variables>, state: &StateDict) -> Result<()> {
    let ours = variables_of(variables);
    let fits = |tensor: &Tensor| (tensor.kind(), tensor.size());
    check_fixed(&ours, |name| state.tensors.get(name).map(fits), state.tensors.keys())?;
    let _guard = tch::no_grad_guard();
    for (name, value) in &state.tensors {
        let Some(mut variable) = ours.tensors.get(name).map(Tensor::shallow_clone) else {
            continue;
        };
        // Read into its place already.
        if TensorId::of(&variable) != TensorId::of(value) {
            variable
                .f_copy_(value)
                .map_err(|error| Error::libtorch(format!("loading '{name}'"), error))?;
        }
    }
    Ok(())
}

/// Whether the saved tensors are those of `ours`, in name, type and shape.
pub(crate) fn check_fixed<'n>(
    ours: &StateDict,
    saved: impl Fn(&str) -> Option<(tch::Kind, Vec<i64>)>,
    saved_names: impl IntoIterator<Item = &'n String>,
) -> Result<()> {
    for (name, tensor) in &ours.tensors {
        match saved(name) {
            None => return Err(Error::State(format!("'{name}' is missing"))),
            Some((kind, shape)) if kind != tensor.kind() || shape != tensor.size() => {
                return Err(Error::State(format!(
                    "'{name}' is {kind:?} of shape {shape:?}, but {:?} of shape {:?} here",
                    tensor.kind(),
                    tensor.size()
                )));
            }
            Some(_) => {}
        }
    }
    match saved_names.into_iter().find(|name| !ours.tensors.contains_key(*name)) {
        Some(name) => Err(Error::State(format!("'{name}' is unknown here"))),
        None => Ok(()),
    }
}
