//! Copies of everything that training changes, to which a program can go back.

use std::fmt;
use std::sync::{Arc, Mutex};

use tch::nn::Variables;
use tch::{TchError, Tensor};

use super::hyper::Hyper;
use super::lbfgs::Memory;
use super::{Optimizer, Shared, locked};
use crate::bridge::{RawState, set_gradient};
use crate::error::{Error, Result};
use crate::variables::Variable;

/// A copy of an [`Optimizer`]'s state: all hyper-parameters of all groups, and the state of each parameter (momentum
/// buffers, moments, step counts), if the parameter had been stepped.
///
/// Made by [`Optimizer::snapshot`]; can be restored any number of times.
pub struct OptimizerSnapshot {
    /// The optimizer that the snapshot was taken of.
    of: Arc<Shared>,
    /// The hyper-parameters of each group.
    hypers: Vec<Vec<(Hyper, f64)>>,
    /// Each parameter and its state; `None` if the parameter had not been stepped yet.
    states: Vec<(Tensor, Option<RawState>)>,
    lbfgs: Memory,
}

impl fmt::Debug for OptimizerSnapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OptimizerSnapshot")
            .field("optimizer", &self.of.algorithm.name())
            .field("groups", &self.hypers)
            .field("parameters", &self.states.len())
            .finish()
    }
}

impl Optimizer {
    /// A copy of the optimizer's hyper-parameters and state. The copy is on the device of the state and needs as
    /// much memory (Adam: twice that of the parameters). The parameters themselves are not copied.
    ///
    /// ```
    /// # use tch::{Device, Kind, nn};
    /// # use tch_ignite::optim::Optimizer;
    /// # let vs = nn::VarStore::new(Device::Cpu);
    /// # let weight = vs.root().ones("weight", &[2]);
    /// let optimizer = Optimizer::adam(&vs).lr(0.1).build()?;
    /// let fresh = optimizer.snapshot()?;
    /// optimizer.backward_step(&(&weight * 2.).sum(Kind::Float))?;
    /// optimizer.knob("lr")?.set(0.5)?;
    /// assert!(!optimizer.state("weight")?.is_empty());
    ///
    /// optimizer.restore(&fresh)?;
    /// assert!(optimizer.state("weight")?.is_empty());
    /// assert_eq!(optimizer.knob("lr")?.get()?, 0.1);
    /// # Ok::<(), tch_ignite::Error>(())
    /// ```
    ///
    /// # Errors
    /// libtorch cannot copy the state (out of memory). See also [`Optimizer`].
    pub fn snapshot(&self) -> Result<OptimizerSnapshot> {
        let parameters = self.parameters_of(0..self.group_count()?)?;
        self.native(|native| {
            let failed = |text| Error::libtorch("copying the optimizer's state", text);
            let hyper = |group, hyper: Hyper| {
                let value = native.get(group, hyper).map_err(failed)?;
                Ok((hyper, value))
            };
            let group = |index| self.algorithm(index).hypers().map(|h| hyper(index, h)).collect();
            let hypers = (0..native.group_count()).map(group).collect::<Result<_>>()?;
            let mut states = vec![];
            for parameter in parameters {
                let state = native.state(&parameter).map_err(failed)?;
                let state = state.as_ref().map(copied).transpose();
                states.push((parameter, state.map_err(|error| failed(error.to_string()))?));
            }
            let lbfgs = locked(&self.shared.lbfgs).clone();
            Ok(OptimizerSnapshot { of: self.shared.clone(), hypers, states, lbfgs })
        })
    }

    /// Goes back to a snapshot, bit for bit. Groups and parameters that were added since are not changed.
    ///
    /// # Errors
    /// A snapshot of another optimizer; then nothing is changed. See also [`Optimizer`].
    pub fn restore(&self, snapshot: &OptimizerSnapshot) -> Result<()> {
        if !Arc::ptr_eq(&self.shared, &snapshot.of) {
            return Err(Error::invalid(format!(
                "this snapshot is of another {}: restore it on the optimizer that it was taken of, or a clone",
                snapshot.of.algorithm.name()
            )));
        }
        self.native(|native| {
            let failed = |text| Error::libtorch("restoring the optimizer", text);
            for (index, hypers) in snapshot.hypers.iter().enumerate() {
                for (hyper, value) in hypers {
                    native.set(index, *hyper, *value).map_err(failed)?;
                }
            }
            *locked(&self.shared.lbfgs) = snapshot.lbfgs.clone();
            for (parameter, state) in &snapshot.states {
                // The state is copied again, because training would otherwise change the snapshot's tensors.
                let state = state.as_ref().map(copied).transpose();
                let state = state.map_err(|error| failed(error.to_string()))?;
                native.set_state(parameter, state.as_ref()).map_err(failed)?;
            }
            Ok(())
        })
    }
}

fn copied(state: &RawState) -> Result<RawState, TchError> {
    let mut tensors = [None, None, None];
    for (copied, tensor) in tensors.iter_mut().zip(&state.tensors) {
        *copied = tensor.as_ref().map(copy).transpose()?;
    }
    let kept = state.kept.as_ref().map(copy).transpose()?;
    Ok(RawState { step: state.step, tensors, kept })
}

pub(super) fn copy(tensor: &Tensor) -> Result<Tensor, TchError> {
    let _guard = tch::no_grad_guard();
    let mut copy = tensor.f_empty_like()?;
    copy.f_copy_(tensor)?;
    Ok(copy)
}

/// Copies of the values of all variables of a store, and of their gradients.
pub(crate) struct StoreSnapshot {
    variables: Vec<Saved>,
}

struct Saved {
    variable: Tensor,
    value: Tensor,
    /// The gradient and a copy of its values. The gradient may be a view of memory that backward writes to, such as a
    /// bucket of `DistributedDataParallel`.
    gradient: Option<(Tensor, Tensor)>,
}

impl StoreSnapshot {
    pub(crate) fn of(variables: &Mutex<Variables>) -> Result<Self> {
        let failed = |text: String| Error::libtorch("copying the parameters", text);
        let mut saved = Self { variables: vec![] };
        for Variable { tensor: variable, .. } in crate::variables::variables(variables) {
            let copied = |tensor: &Tensor| copy(tensor).map_err(|error| failed(error.to_string()));
            let value = copied(&variable)?;
            let gradient = variable.f_grad().map_err(|error| failed(error.to_string()))?;
            let both = || Ok((gradient.shallow_clone(), copied(&gradient)?));
            let gradient = gradient.defined().then(both).transpose()?;
            saved.variables.push(Saved { variable, value, gradient });
        }
        Ok(saved)
    }

    /// Removes the gradients from the variables, so that backward does not add to the saved ones.
    pub(crate) fn clear_gradients(&self) -> Result<()> {
        self.variables.iter().try_for_each(|saved| {
            set_gradient(&saved.variable, None)
                .map_err(|text| Error::libtorch("clearing gradients", text))
        })
    }

    /// Restores values (in place, bit for bit) and gradients. Goes on after an error, and returns the first one.
    pub(crate) fn restore(self) -> Result<()> {
        let _guard = tch::no_grad_guard();
        let failed = |text| Error::libtorch("restoring the parameters", text);
        let mut result = Ok(());
        for Saved { mut variable, value, gradient } in self.variables {
            let put = |to: &mut Tensor, value| {
                to.f_copy_(value).map(drop).map_err(|error| failed(error.to_string()))
            };
            let (mut gradient, values) = gradient.unzip();
            let copied = put(&mut variable, &value);
            let of_gradient = match gradient.as_mut().zip(values) {
                Some((gradient, values)) => put(gradient, &values),
                None => Ok(()),
            };
            let given = set_gradient(&variable, gradient.as_ref()).map_err(failed);
            result = result.and(copied).and(of_gradient).and(given);
        }
        result
    }
}

#[cfg(test)]
mod tests {
    use tch::nn::{self, OptimizerConfig};
    use tch::{Device, Kind, Tensor};

    use super::*;

    fn store() -> nn::VarStore {
        let mut vs = nn::VarStore::new(Device::Cpu);
        vs.set_kind(Kind::Double);
        let _ = vs.root().var("a", &[3], nn::Init::Const(1.));
        let _ = vs.root().set_group(1).var("b", &[2, 2], nn::Init::Const(-0.5));
        vs
    }

    /// Makes a step for each number, with a gradient that depends on it; returns the parameters after each step.
    fn train(optimizer: &Optimizer, vs: &nn::VarStore, steps: std::ops::Range<i32>) -> Vec<Tensor> {
        let mut seen = vec![];
        let mut variables: Vec<_> = vs.variables().into_iter().collect();
        variables.sort_by(|a, b| a.0.cmp(&b.0));
        for step in steps {
            let terms = variables
                .iter()
                .map(|(_, v)| ((v + f64::from(step) * 0.3).sin() * v).sum(Kind::Double));
            let loss: Tensor = terms.reduce(|a, b| a + b).unwrap();
            optimizer.backward_step(&loss).unwrap();
            seen.extend(variables.iter().map(|(_, v)| v.detach().copy()));
        }
        seen
    }

    fn goes_back(config: impl OptimizerConfig + Copy) {
        for before in [0, 3] {
            let vs = store();
            let optimizer = Optimizer::builder(config, &vs).lr(0.05).build().unwrap();
            optimizer.group_at(1).unwrap().set_lr(0.2).unwrap();
            train(&optimizer, &vs, 0..before);

            let (values, saved) =
                (StoreSnapshot::of(&vs.variables_).unwrap(), optimizer.snapshot().unwrap());
            let first = train(&optimizer, &vs, before..before + 4);
            optimizer.knob("lr").unwrap().set(3.).unwrap();
            optimizer.knob("weight_decay").unwrap().set(0.5).unwrap();
            train(&optimizer, &vs, 9..12);
            values.restore().unwrap();
            optimizer.restore(&saved).unwrap();
            assert_eq!(optimizer.state("a").unwrap().is_empty(), before == 0);
            assert_eq!(first, train(&optimizer, &vs, before..before + 4), "{}", optimizer.name());

            // Training did not change the snapshot.
            let values = StoreSnapshot::of(&vs.variables_).unwrap();
            optimizer.restore(&saved).unwrap();
            let second = train(&optimizer, &vs, 20..23);
            values.restore().unwrap();
            optimizer.restore(&saved).unwrap();
            assert_eq!(second, train(&optimizer, &vs, 20..23), "{}", optimizer.name());
        }
    }

    #[test]
    fn all_optimizers_train_on_as_before() {
        goes_back(nn::sgd(0.9, 0.1, 1e-3, false));
        goes_back(nn::Adam { amsgrad: true, wd: 0.01, ..nn::Adam::default() });
        goes_back(nn::AdamW { amsgrad: true, ..nn::AdamW::default() });
        goes_back(nn::AdamW::default());
        goes_back(nn::RmsProp { momentum: 0.8, centered: true, ..nn::RmsProp::default() });
    }

    #[test]
    fn gradients_are_as_they_were() {
        let vs = store();
        let a = vs.variables()["a"].shallow_clone();
        (&a * 3.).sum(Kind::Double).backward();
        let gradient = a.grad();
        let saved = StoreSnapshot::of(&vs.variables_).unwrap();
        saved.clear_gradients().unwrap();
        assert!(!a.grad().defined());
        (&a * 5.).sum(Kind::Double).backward();
        vs.variables()["b"].sum(Kind::Double).backward();
        saved.restore().unwrap();
        assert_eq!(a.grad().data_ptr(), gradient.data_ptr());
        assert_eq!(a.grad(), a.ones_like() * 3.);
        assert!(!vs.variables()["b"].grad().defined());
        // Gradients that are views of memory which is written to, such as buckets, are so too.
        let saved = StoreSnapshot::of(&vs.variables_).unwrap();
        let _ = gradient.shallow_clone().fill_(7.);
        saved.restore().unwrap();
        assert_eq!(a.grad(), a.ones_like() * 3.);
        (&a * 2.).sum(Kind::Double).backward();
        assert_eq!(a.grad().double_value(&[0]), 5.);
    }

    #[test]
    fn another_optimizers_snapshot_is_refused() {
        let vs = store();
        let build = || Optimizer::sgd(&vs).build().unwrap();
        let (one, other) = (build(), build());
        let error = other.restore(&one.snapshot().unwrap()).unwrap_err().to_string();
        assert!(error.contains("of another SGD"), "{error}");
        one.clone().restore(&one.snapshot().unwrap()).unwrap();
    }
}
