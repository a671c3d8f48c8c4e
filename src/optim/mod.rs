//! libtorch's own optimizers, and those of PyTorch that libtorch lacks, with named parameter groups and every
//! hyper-parameter readable.
//!
//! [`Optimizer`] wraps `tch::nn::Optimizer`. [`Group`] reads and writes the values that libtorch uses: there
//! is no second copy, so values that are set through tch are seen here, and the other way round.

mod algorithms;
mod builder;
mod closure;
mod evaluation;
mod fused;
mod gradients;
mod group;
mod group_options;
mod grouping;
mod hyper;
mod knob;
mod layerwise;
mod lbfgs;
mod low_precision;
mod param_groups;
mod parameters;
mod plan;
mod sam;
mod snapshot;
mod state_dict;
mod tch_optimizer;
mod var_store_of;
mod wolfe;

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use serde_json::{Map, Value};
use tch::nn::{OptimizerConfig, VarStore, Variables};
use tch::{TchError, Tensor};

pub use algorithms::*;
pub use builder::OptimizerBuilder;
pub(crate) use evaluation::KEPT;
pub use gradients::Gradients;
pub use group::Group;
pub use group_options::{GroupOptions, lr};
pub use knob::Knob;
pub(crate) use knob::Reduction;
pub use layerwise::layerwise_lr_decay;
pub use low_precision::LowPrecision;
pub use param_groups::{ParamGroups, is_bias_or_norm, is_matrix};
pub(crate) use parameters::Parameters;
pub use plan::OptimizerPlan;
pub use sam::Sam;
pub use snapshot::OptimizerSnapshot;
pub(crate) use snapshot::StoreSnapshot;
pub(crate) use state_dict::LBFGS;
pub use tch_optimizer::TchOptimizer;
pub use var_store_of::var_store_of;

use crate::bridge::{Algorithm, Native, TensorId, set_gradient};
use crate::error::{Error, Result};
use crate::variables::{Variable, variables};
use grouping::{Grouped, Grouping};
pub(crate) use hyper::Hyper;
use low_precision::{Storages, kept_name};

/// How many names an error message lists before it says how many more there are.
const NAMES_LISTED: usize = 8;

/// An optimizer with named parameter groups. Clones share one libtorch optimizer.
///
/// Built by [`Optimizer::builder`] from tch's settings (`nn::sgd(..)`, `nn::Adam::default()`, …) or by the method of its
/// name ([`Optimizer::lion`], [`Optimizer::nadam`], …), before or after the variables of the store are made: each call that needs parameters first adds new variables to the optimizer. A tensor
/// with several names in the store (tied weights) is one parameter, known by the first name in alphabetical order.
/// Every call takes an uncontended lock (about 10 ns), and no lock is held while user code runs.
///
/// # Errors of all calls
/// While [`with_tch`](Self::with_tch) lends the optimizer out, calls that return a `Result` are errors. A call that
/// needs parameters is an error if a variable that was added to the store belongs to no group or to two.
#[derive(Clone)]
pub struct Optimizer {
    shared: Arc<Shared>,
}

struct Shared {
    algorithm: Algorithm,
    /// The algorithm of each group that has options of its own.
    by_group: Vec<Algorithm>,
    /// `None` while `with_tch` lends the optimizer out.
    native: Mutex<Option<Native>>,
    grouping: Grouping,
    /// The number of the store's trainable variables that are in libtorch's optimizer.
    added: AtomicUsize,
    variables: Arc<Mutex<Variables>>,
    /// The options that the optimizer was built with, as `"<group>.<option>"`.
    built: OnceLock<Map<String, Value>>,
    reductions: knob::Reductions,
    /// Whether an algorithm is Schedule-Free, so that parameters have other values in evaluation.
    averages: bool,
    /// How the groups store parameters in f16 and bf16.
    storages: Storages,
    /// LBFGS remembers this between steps; it stays empty for all others.
    lbfgs: Mutex<lbfgs::Memory>,
}

fn listed(names: &[String]) -> String {
    let mut text = names[..names.len().min(NAMES_LISTED)].join(", ");
    if names.len() > NAMES_LISTED {
        text += &format!(" and {} more", names.len() - NAMES_LISTED);
    }
    text
}

fn quoted_names(variables: &Variables) -> Vec<String> {
    let mut names: Vec<_> =
        variables.named_variables.keys().map(|name| format!("'{name}'")).collect();
    names.sort();
    names
}

fn lent_out() -> Error {
    Error::invalid("the optimizer is lent out by `with_tch`; use it when that has returned")
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A poisoned lock is fine: a panic leaves nothing half-changed here.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Optimizer {
    fn assemble<T: OptimizerConfig>(
        config: &T,
        vs: &VarStore,
        lr: f64,
        grouping: Grouping,
        algorithms: &[(usize, Option<Algorithm>)],
        storages: Storages,
    ) -> Result<Self> {
        let variables = &vs.variables_;
        // The variables get their own group numbers back when `grouped` is dropped, after tch has read ours.
        let grouped = grouping.group(variables, 0)?;
        if let Some(group) = grouping.empty_group(&grouped) {
            let names = quoted_names(&locked(variables));
            return Err(Error::invalid(match names.is_empty() {
                true => format!(
                    "group '{group}' has no parameter: the store has no variables yet; make the model before the optimizer, or leave groups out"
                ),
                false => format!(
                    "group '{group}' has no parameter; the parameters are: {}",
                    listed(&names)
                ),
            }));
        }
        let mut native = Native::build(config, vs, lr)
            .map_err(|text| Error::libtorch("cannot build the optimizer", text))?;
        // tch makes groups up to the highest number in use; a named number may be higher.
        let groups = native.group_count();
        if let Some(number) = grouping.numbers().find(|number| *number >= groups) {
            let available = (0..groups).map(|index| index.to_string()).collect();
            return Err(Error::UnknownGroup { group: number.to_string(), available });
        }
        native
            .reserve_groups(grouping.rules().len())
            .map_err(|text| Error::libtorch("cannot build the optimizer", text))?;
        for hyper in native.algorithm.hypers() {
            let value = native.get(0, hyper);
            native.algorithm.check(
                hyper,
                value.map_err(|text| Error::libtorch("cannot build the optimizer", text))?,
            )?;
        }
        let mut by_group = vec![];
        for &(index, algorithm) in algorithms {
            let algorithm = algorithm.unwrap_or(native.algorithm);
            by_group.resize(by_group.len().max(index + 1), native.algorithm);
            by_group[index] = algorithm;
            if algorithm == native.algorithm {
                continue;
            }
            if !native.takes_algorithms() {
                return Err(Error::invalid(format!(
                    "group '{}' is to be stepped by {}, and {} is of libtorch and has one algorithm: begin with one that is not, such as Optimizer::muon(&vs), and give the other groups GroupOptions::adamw()",
                    grouping.name(index),
                    algorithm.name(),
                    native.algorithm.name()
                )));
            }
            native
                .set_algorithm(index, algorithm, algorithm.description().hypers)
                .map_err(|text| Error::libtorch("cannot build the optimizer", text))?;
        }
        let mut all = by_group.iter().copied().chain([native.algorithm]);
        if native.group_count() > 1 && all.clone().any(Algorithm::needs_closure) {
            return Err(Error::invalid(
                "LBFGS takes all parameters as one vector, so it has one group: leave groups out, or choose another optimizer",
            ));
        }
        let averages = all.any(|algorithm| algorithm.interpolation().is_some());
        let of_all = native.algorithm;
        let algorithm = |group| by_group.get(group).copied().unwrap_or(of_all);
        storages.set(&mut native, algorithm, |group| grouping.name(group))?;
        grouped.warn_of_tied();
        Ok(Self {
            shared: Arc::new(Shared {
                algorithm: native.algorithm,
                by_group,
                native: Mutex::new(Some(native)),
                grouping,
                added: AtomicUsize::new(grouped.until()),
                variables: variables.clone(),
                built: OnceLock::new(),
                reductions: knob::Reductions::default(),
                averages,
                storages,
                lbfgs: Mutex::default(),
            }),
        })
    }

    /// Calls `call` with the locked optimizer; an error while `with_tch` lends it out.
    fn native<R>(&self, call: impl FnOnce(&mut Native) -> Result<R>) -> Result<R> {
        match locked(&self.shared.native).as_mut() {
            Some(native) => call(native),
            None => Err(lent_out()),
        }
    }

    /// PyTorch's name of the optimizer, such as `"AdamW"`; of the one that it was begun with if groups have others.
    pub fn name(&self) -> &'static str {
        self.shared.algorithm.name()
    }

    /// The group with this name.
    ///
    /// # Errors
    /// There is no group of this name.
    pub fn group(&self, name: &str) -> Result<Group> {
        let names = self.group_names()?;
        match names.iter().position(|known| known == name) {
            Some(index) => Ok(Group::new(self.clone(), index)),
            None => Err(Error::UnknownGroup { group: format!("'{name}'"), available: names }),
        }
    }

    /// The group with this number, from 0.
    ///
    /// # Errors
    /// There is no group of this number.
    pub fn group_at(&self, index: usize) -> Result<Group> {
        let names = self.group_names()?;
        if index < names.len() {
            return Ok(Group::new(self.clone(), index));
        }
        let available = names.iter().enumerate().map(|(i, name)| format!("{i} ('{name}')"));
        Err(Error::UnknownGroup { group: index.to_string(), available: available.collect() })
    }

    /// All groups, in order.
    ///
    /// # Errors
    /// See [`Optimizer`].
    pub fn groups(&self) -> Result<Vec<Group>> {
        let count = self.group_count()?;
        Ok((0..count).map(|index| Group::new(self.clone(), index)).collect())
    }

    /// Names of all groups, in order.
    ///
    /// # Errors
    /// See [`Optimizer`].
    pub fn group_names(&self) -> Result<Vec<String>> {
        let count = self.group_count()?;
        Ok((0..count).map(|index| self.shared.grouping.name(index)).collect())
    }

    /// A hyper-parameter of all groups as a [`Knob`], which a scheduler can drive. Setting it sets all groups that
    /// exist then; reading it gives the first group's value.
    ///
    /// # Errors
    /// The optimizer, or the algorithm of a group, has no such hyper-parameter.
    pub fn knob(&self, hyper: &str) -> Result<Knob> {
        let known = self.shared.algorithm.settable(hyper)?;
        for algorithm in &self.shared.by_group {
            algorithm.hyper(hyper)?;
        }
        Ok(Knob::of_groups(self.clone(), None, known))
    }

    /// The number of groups, with the variables that the store has now.
    fn group_count(&self) -> Result<usize> {
        // With rules, new variables add no groups, so they need not be admitted.
        if let Grouping::Numbers(_) = self.shared.grouping {
            self.admit_new()?;
        }
        self.native(|native| Ok(native.group_count()))
    }

    fn get_hyper(&self, group: usize, hyper: Hyper) -> Result<f64> {
        self.native(|native| {
            native
                .get(group, hyper)
                .map_err(|text| Error::libtorch(format!("reading {hyper} of group {group}"), text))
        })
    }

    #[inline]
    fn set_hyper(&self, group: usize, hyper: Hyper, value: f64) -> Result<()> {
        let algorithm = self.algorithm(group);
        self.native(|native| set_hyper(native, algorithm, group, hyper, value))
    }

    /// Sets a hyper-parameter of all groups, and of those that are to come.
    fn set_everywhere(&self, name: &str, value: f64) -> Result<()> {
        let hyper = self.shared.algorithm.settable(name)?;
        for group in self.groups()? {
            if self.algorithm(group.index()) == self.shared.algorithm {
                group.set_hyper(hyper, value)?;
            }
        }
        let failed = |text| Error::libtorch(format!("setting {hyper}"), text);
        self.native(|native| native.set_default(hyper, value).map_err(failed))
    }

    /// The algorithm of a group.
    #[inline]
    fn algorithm(&self, group: usize) -> Algorithm {
        self.shared.by_group.get(group).copied().unwrap_or(self.shared.algorithm)
    }

    /// The algorithm by which a parameter is stepped.
    fn algorithm_of(&self, native: &Native, parameter: &Tensor) -> Result<Algorithm> {
        let id = TensorId::of(parameter);
        for (group, algorithm) in self.shared.by_group.iter().enumerate() {
            if *algorithm == self.shared.algorithm {
                continue;
            }
            let failed = |text| Error::libtorch("reading the group's parameters", text);
            let parameters = native.parameters(group).map_err(failed)?;
            if parameters.iter().any(|parameter| TensorId::of(parameter) == id) {
                return Ok(*algorithm);
            }
        }
        Ok(self.shared.algorithm)
    }

    /// The variables of the store that the optimizer was built over.
    pub(crate) fn variables(&self) -> Arc<Mutex<Variables>> {
        self.shared.variables.clone()
    }

    /// The parameters of these groups in libtorch's order, each once, new variables included.
    fn parameters_of(&self, groups: impl IntoIterator<Item = usize>) -> Result<Vec<Tensor>> {
        self.admit_new()?;
        self.native(|native| {
            let mut parameters = vec![];
            for group in groups {
                let of_group = native.parameters(group);
                let failed = |text| Error::libtorch("reading the group's parameters", text);
                parameters.extend(of_group.map_err(failed)?);
            }
            Ok(parameters)
        })
    }

    /// The parameters of all groups.
    fn all_parameters(&self) -> Result<Vec<Tensor>> {
        self.parameters_of(0..self.group_count()?)
    }

    /// The parameters of these groups with their names. A parameter that the store has no name for gets an empty one.
    fn named_parameters_of(
        &self,
        groups: impl IntoIterator<Item = usize>,
    ) -> Result<Vec<Variable>> {
        let parameters = self.parameters_of(groups)?;
        let named = variables(&self.shared.variables).into_iter();
        let mut named: HashMap<_, _> = named.map(|v| (TensorId::of(&v.tensor), v)).collect();
        let variable = |tensor: Tensor| {
            named.remove(&TensorId::of(&tensor)).unwrap_or_else(|| Variable {
                name: String::new(),
                other_names: vec![],
                tensor,
                trainable: true,
            })
        };
        Ok(parameters.into_iter().map(variable).collect())
    }

    /// Sets the gradients of all parameters to none.
    ///
    /// # Errors
    /// See [`Optimizer`].
    pub fn zero_grad(&self) -> Result<()> {
        self.admit_new()?;
        self.native(|native| native.zero_grad().map_err(|text| Error::libtorch("zero_grad", text)))
    }

    /// Updates all parameters that have a gradient, by [fused steps](Self::set_fused) unless they are switched
    /// off. No host sync.
    ///
    /// # Errors
    /// A parameter that cannot be stepped, such as one with a sparse gradient under Adam; then no parameter is
    /// stepped. [`Lbfgs`], which needs [`step_with`](Self::step_with). A Schedule-Free optimizer whose parameters have
    /// their values for evaluation: see [`train`](Self::train). See also [`Optimizer`].
    pub fn step(&self) -> Result<()> {
        self.update(None, None)
    }

    /// Calls `zero_grad`, backward from the scalar `loss`, and `step`.
    ///
    /// # Errors
    /// A loss that is no scalar or has no graph, and the errors of [`step`](Self::step).
    pub fn backward_step(&self, loss: &Tensor) -> Result<()> {
        self.zero_grad()?;
        backward(loss)?;
        self.step()
    }

    /// [`backward_step`](Self::backward_step) with every element of the gradients limited to `-max` to `max`, as tch's.
    ///
    /// # Errors
    /// `max` is negative or NaN, and the errors of [`backward_step`](Self::backward_step).
    pub fn backward_step_clip(&self, loss: &Tensor, max: f64) -> Result<()> {
        gradients::check_max(max)?;
        self.zero_grad()?;
        backward(loss)?;
        self.clip_grad_value(max)?;
        self.step()
    }

    /// [`backward_step`](Self::backward_step) with the gradients clipped to a norm of at most `max`, as tch's; returns the
    /// norm before that. No host sync. See [`step_clipped`](Self::step_clipped).
    ///
    /// # Errors
    /// `max` is negative or NaN, and the errors of [`backward_step`](Self::backward_step).
    pub fn backward_step_clip_norm(&self, loss: &Tensor, max: f64) -> Result<Tensor> {
        gradients::check_max(max)?;
        self.zero_grad()?;
        backward(loss)?;
        self.step_clipped(max)
    }

    /// Lends out tch's optimizer, for methods that this type does not have. Until `call` returns, all other
    /// calls on this optimizer are errors. tch's methods panic where those of this type return errors. Costs a host
    /// sync if steps with a GradScaler were made on a device before.
    ///
    /// # Errors
    /// A panic in `call`; a call of `with_tch` within `call`. See also [`Optimizer`].
    pub fn with_tch<R>(&self, call: impl FnOnce(&mut TchOptimizer<'_>) -> R) -> Result<R> {
        /// Puts the optimizer back when dropped, also after a panic in `call`.
        struct Lent<'s>(&'s Shared, Option<Native>);
        impl Drop for Lent<'_> {
            fn drop(&mut self) {
                *locked(&self.0.native) = self.1.take();
            }
        }
        self.admit_new()?;
        let native = locked(&self.shared.native).take();
        if native.is_none() {
            return Err(lent_out());
        }
        let mut lent = Lent(&self.shared, native);
        let native = lent.1.as_mut().ok_or_else(lent_out)?;
        native.settle().map_err(|text| Error::libtorch("reading step counts", text))?;
        catch_unwind(AssertUnwindSafe(|| call(&mut TchOptimizer::new(self, native))))
            .map_err(|payload| Error::libtorch("with_tch", crate::panic::message(&*payload)))
    }

    /// The state that is kept for a parameter, under PyTorch's names (`"step"`, an f64 scalar on the CPU; `"exp_avg"`,
    /// …); empty before the parameter's first step. The other tensors are the optimizer's own, but for those of one
    /// number (`"mu_product"` of NAdam, `"eta"` and `"mu"` of ASGD, `"rounding"` of stochastic rounding): copy them to keep their values. Costs a host sync if steps with a GradScaler were made on a device since the last call.
    ///
    /// # Errors
    /// No parameter with this name. See also [`Optimizer`].
    pub fn state(&self, parameter: &str) -> Result<Vec<(&'static str, Tensor)>> {
        self.admit_new()?;
        let tensor = {
            let variables = locked(&self.shared.variables);
            match variables.named_variables.get(parameter) {
                Some(tensor) => tensor.shallow_clone(),
                None => {
                    return Err(Error::invalid(format!(
                        "no parameter '{parameter}'; there are: {}",
                        listed(&quoted_names(&variables))
                    )));
                }
            }
        };
        self.native(|native| {
            let names = self.algorithm_of(native, &tensor)?.state_names();
            let state = native
                .state(&tensor)
                .map_err(|text| Error::libtorch("reading the optimizer's state", text))?;
            let Some(state) = state else {
                return Ok(vec![]);
            };
            let step = state.step.map(|step| ("step", Tensor::from(step as f64)));
            let tensors = names.into_iter().zip(state.tensors);
            let tensors = tensors.filter_map(|(name, tensor)| Some((name, tensor?)));
            let kept = state.kept.map(|kept| (kept_name(&kept), kept));
            Ok(step.into_iter().chain(tensors).chain(kept).collect())
        })
    }

    /// Sets the group numbers of variables that were added to the store since the last call, for tch to read;
    /// `None` if there are no new variables.
    fn group_new_variables(&self) -> Result<Option<Grouped>> {
        let Shared { grouping, added, variables, .. } = &*self.shared;
        let added = added.load(Ordering::Relaxed);
        // There are fewer than before if `VarStore::merge` moved them to another store. The optimizer keeps those
        // that it has.
        if locked(variables).trainable_variables.len() <= added {
            return Ok(None);
        }
        grouping.group(variables, added).map(Some)
    }

    /// Adds variables that are new in the store to libtorch's optimizer. Everything that reads or changes
    /// parameters calls this first.
    fn admit_new(&self) -> Result<()> {
        match self.group_new_variables()? {
            Some(new) => self.native(|native| self.admit(native, &new)),
            None => Ok(()),
        }
    }

    /// Makes tch add the new variables, and keeps all gradients.
    fn admit(&self, native: &mut Native, new: &Grouped) -> Result<()> {
        const OPERATION: &str = "adding variables to the optimizer";
        let failed = |text: String| Error::libtorch(OPERATION, text);
        let mut gradients = vec![];
        for variable in &locked(&self.shared.variables).trainable_variables {
            let gradient = variable.tensor.f_grad().map_err(|error| failed(error.to_string()))?;
            if gradient.defined() {
                gradients.push((variable.tensor.shallow_clone(), gradient));
            }
        }
        // Only tch can add variables to its own count, and it panics on errors. Of its methods that add
        // variables, `zero_grad` changes the least: it clears gradients, which are put back below.
        let added = catch_unwind(AssertUnwindSafe(|| native.tch.zero_grad()))
            .map_err(|payload| failed(crate::panic::message(&*payload)));
        for (parameter, gradient) in &gradients {
            set_gradient(parameter, Some(gradient)).map_err(failed)?;
        }
        added?;
        native.remove_repeated().map_err(failed)?;
        self.shared.added.store(new.until(), Ordering::Relaxed);
        new.warn_of_tied();
        Ok(())
    }
}

/// Sets a hyper-parameter, and first adds the state tensor that it needs, if it is switched on.
#[inline]
fn set_hyper(
    native: &mut Native,
    algorithm: Algorithm,
    group: usize,
    hyper: Hyper,
    value: f64,
) -> Result<()> {
    algorithm.check(hyper, value)?;
    let failed = |text| Error::libtorch(format!("setting {hyper} of group {group}"), text);
    // Schedules set the learning rate all the time, and it never needs a tensor.
    if hyper != Hyper::Lr
        && let Some(buffer) = algorithm.buffer_of(hyper).filter(|_| value != 0.)
        && native.get(group, hyper).map_err(failed)? == 0.
    {
        native.add_buffer(group, buffer).map_err(failed)?;
    }
    native.set(group, hyper, value).map_err(failed)
}

/// Runs backward from a scalar; an error where libtorch refuses.
pub(crate) fn backward(loss: &Tensor) -> Result<()> {
    loss.f_backward().map_err(|error| match error {
        TchError::Torch(text) => Error::libtorch("backward", text),
        other => Error::libtorch("backward", other),
    })
}

impl std::fmt::Debug for Optimizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut debug = f.debug_struct("Optimizer");
        debug.field("name", &self.name());
        // New variables are not admitted here: printing must not change the optimizer.
        if let Ok(count) = self.native(|native| Ok(native.group_count())) {
            let groups: Vec<_> = (0..count).map(|i| Group::new(self.clone(), i)).collect();
            debug.field("groups", &groups);
        }
        debug.finish()
    }
}
