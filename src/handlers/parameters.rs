use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use tch::nn::{VarStore, Variables};
use tch::{Kind, TchError, Tensor};

use crate::bridge::TensorId;

/// Parameters of a store by name: those that a handler was told to look at.
pub(crate) struct Parameters {
    variables: Arc<Mutex<Variables>>,
    pub(crate) whitelist: Box<dyn Fn(&str) -> bool>,
}

impl Parameters {
    pub(crate) fn of(vs: &VarStore) -> Self {
        Self { variables: vs.variables_.clone(), whitelist: Box::new(|_| true) }
    }

    /// Names and tensors, in the order in which they were made; of gradients those that exist.
    pub(crate) fn listed(&self, gradients: bool) -> anyhow::Result<Vec<(String, Tensor)>> {
        // No lock is held while the user's predicate runs.
        let (named, tensors) = {
            let variables = self.variables.lock().unwrap_or_else(PoisonError::into_inner);
            let named: HashMap<_, _> = (variables.named_variables.iter())
                .map(|(name, tensor)| (TensorId::of(tensor), name.clone()))
                .collect();
            let trainable = variables.trainable_variables.iter();
            let tensors: Vec<_> = trainable.map(|var| var.tensor.shallow_clone()).collect();
            (named, tensors)
        };
        let mut listed = vec![];
        for tensor in tensors {
            let Some(name) = named.get(&TensorId::of(&tensor)) else { continue };
            if !(self.whitelist)(name) {
                continue;
            }
            let tensor = if gradients { tensor.f_grad()? } else { tensor.f_detach()? };
            if tensor.defined() {
                listed.push((name.clone(), tensor));
            }
        }
        Ok(listed)
    }

    /// Names and Euclidean norms, on their devices, in f64. No host sync.
    pub(crate) fn norms(&self, gradients: bool) -> anyhow::Result<(Vec<String>, Vec<Tensor>)> {
        let _guard = tch::no_grad_guard();
        let norm = |tensor: &Tensor| -> Result<Tensor, TchError> {
            // Squares of halves overflow soon.
            let kind = match tensor.kind() {
                kind @ (Kind::Float | Kind::Double) => kind,
                _ => Kind::Float,
            };
            tensor.f_norm_scalaropt_dtype(2, kind)?.f_to_kind(Kind::Double)
        };
        let (names, tensors): (Vec<_>, Vec<_>) = self.listed(gradients)?.into_iter().unzip();
        let norms = tensors.iter().map(norm).collect::<Result<_, _>>()?;
        Ok((names, norms))
    }
}
