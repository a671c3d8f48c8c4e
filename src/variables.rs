//! Lists the variables of a store. Everything in the crate that needs them uses this module.
//!
//! tch lists a tensor once for each name under which it was added, so a program that ties weights has it twice. Here a
//! tensor is one variable, however many names it has, as in PyTorch's `named_parameters`. Tensors that share memory but
//! are not the same tensor (views) are separate variables, also as in PyTorch.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use tch::Tensor;
use tch::nn::{self, Variables};

use crate::bridge::TensorId;

/// A variable of a store.
#[derive(Debug)]
pub(crate) struct Variable {
    /// The first of the variable's names in alphabetical order; empty if the store has no name for it.
    pub(crate) name: String,
    /// The other names, sorted.
    pub(crate) other_names: Vec<String>,
    pub(crate) tensor: Tensor,
    /// True for a parameter, false for a buffer.
    pub(crate) trainable: bool,
}

impl Variable {
    /// All names of the variable, sorted.
    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        std::iter::once(&self.name).chain(&self.other_names).map(String::as_str)
    }
}

/// The variables of a store, each once: first the parameters in the order in which they were made, then the buffers
/// sorted by name, because the store keeps no order of buffers.
pub(crate) fn variables(store: &Mutex<Variables>) -> Vec<Variable> {
    variables_in(&store.lock().unwrap_or_else(PoisonError::into_inner))
}

/// [`variables`] of a store that is locked already.
pub(crate) fn variables_in(store: &Variables) -> Vec<Variable> {
    let mut named: Vec<_> = store.named_variables.iter().collect();
    named.sort_unstable_by_key(|(name, _)| *name);
    let mut places: HashMap<TensorId, usize> = HashMap::with_capacity(named.len());
    let mut by_name: Vec<Option<Variable>> = Vec::with_capacity(named.len());
    for (name, tensor) in named {
        let place = *places.entry(TensorId::of(tensor)).or_insert(by_name.len());
        match by_name.get_mut(place) {
            Some(Some(variable)) => variable.other_names.push(name.clone()),
            _ => by_name.push(Some(buffer(tensor, name.clone()))),
        }
    }
    let mut all = Vec::with_capacity(by_name.len());
    for parameter in store.trainable_variables.iter().map(|variable| &variable.tensor) {
        let place = *places.entry(TensorId::of(parameter)).or_insert_with(|| {
            by_name.push(Some(buffer(parameter, String::new())));
            by_name.len() - 1
        });
        // If the store lists a parameter again, its entry was taken the first time.
        if let Some(variable) = by_name[place].take() {
            all.push(Variable { trainable: true, ..variable });
        }
    }
    all.extend(by_name.into_iter().flatten());
    all
}

/// The path of the module that has a variable of this name, unless that is `path` itself, and its name there.
pub(crate) fn place<'p, 'n>(path: &nn::Path<'p>, name: &'n str) -> (Option<nn::Path<'p>>, &'n str) {
    let (modules, name) = name.rsplit_once('.').unwrap_or(("", name));
    let mut inner: Option<nn::Path<'p>> = None;
    for module in modules.split('.').filter(|module| !module.is_empty()) {
        inner = Some(inner.as_ref().unwrap_or(path).sub(module));
    }
    (inner, name)
}

fn buffer(tensor: &Tensor, name: String) -> Variable {
    Variable { name, other_names: vec![], tensor: tensor.shallow_clone(), trainable: false }
}

/// Whether the parameters were moved to another store by `VarStore::merge`, which leaves their names in this one.
pub(crate) fn were_moved(store: &Variables) -> bool {
    store.trainable_variables.is_empty()
        && store.named_variables.values().any(tch::Tensor::requires_grad)
}

#[cfg(test)]
mod tests {
    use tch::Device;
    use tch::nn::{Init, VarStore};

    use super::*;

    #[test]
    fn a_tensor_under_several_names_is_one_variable() {
        let vs = VarStore::new(Device::Cpu);
        let root = vs.root();
        let w = root.ones("w", &[2]);
        let _ = root.add("head", w.shallow_clone(), true);
        let _ = root.add("x", w.shallow_clone(), false);
        let _ = root.var("a", &[1], Init::Const(0.));
        let mean = root.zeros_no_train("mean", &[1]);
        let _ = root.add("also_mean", mean.shallow_clone(), false);
        let _ = root.add("view", w.detach(), true);
        let all = variables(&vs.variables_);
        let names: Vec<Vec<_>> = all.iter().map(|v| v.names().collect()).collect();
        assert_eq!(
            names,
            [vec!["head", "w", "x"], vec!["a"], vec!["view"], vec!["also_mean", "mean"]]
        );
        assert_eq!(all.iter().map(|v| v.trainable).collect::<Vec<_>>(), [true, true, true, false]);
    }
}
