use std::sync::{Arc, Mutex, PoisonError};

use tch::nn::{VarStore, Variables};
use tch::{Kind, TchError, Tensor};

use crate::variables::{variables_in, were_moved};

/// The parameters of a store that a handler looks at, chosen by name.
pub(crate) struct Parameters {
    store: Arc<Mutex<Variables>>,
    pub(crate) whitelist: Box<dyn Fn(&str) -> bool>,
}

impl Parameters {
    pub(crate) fn of(vs: &VarStore) -> Self {
        Self { store: vs.variables_.clone(), whitelist: Box::new(|_| true) }
    }

    /// Names and values of the parameters, or names and gradients where a gradient exists, in the order in which the
    /// parameters were made. A parameter with several names is listed once, by the first name that the whitelist takes.
    pub(crate) fn listed(&self, gradients: bool) -> anyhow::Result<Vec<(String, Tensor)>> {
        // No lock is held while the user's predicate runs.
        let all = {
            let store = self.store.lock().unwrap_or_else(PoisonError::into_inner);
            if were_moved(&store) {
                anyhow::bail!(
                    "the store has no parameters any more: VarStore::merge moved them to another store; make this handler for that one"
                );
            }
            variables_in(&store)
        };
        let mut listed = vec![];
        for variable in all.into_iter().filter(|variable| variable.trainable) {
            let named = !variable.name.is_empty();
            let passes = |name: &&str| named && (self.whitelist)(name);
            let Some(name) = variable.names().find(passes).map(str::to_owned) else { continue };
            let tensor = variable.tensor;
            let tensor = if gradients { tensor.f_grad()? } else { tensor.f_detach()? };
            if tensor.defined() {
                listed.push((name, tensor));
            }
        }
        Ok(listed)
    }

    /// Names and Euclidean norms of the parameters or gradients: f64 scalars on the parameters' devices. No host sync.
    pub(crate) fn norms(&self, gradients: bool) -> anyhow::Result<(Vec<String>, Vec<Tensor>)> {
        let _guard = tch::no_grad_guard();
        let norm = |tensor: &Tensor| -> Result<Tensor, TchError> {
            // Norms of f16 and bf16 are computed in f32, because squares overflow in f16.
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
