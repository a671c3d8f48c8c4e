//! Saves and loads an optimizer's state, by the names of groups and parameters.

use std::collections::{BTreeMap, HashSet};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use tch::{Kind, Tensor};

use super::hyper::Hyper;
use super::lbfgs::Memory;
use super::low_precision::kept_name;
use super::{Group, LowPrecision, Optimizer, TensorId, locked};
use crate::bridge::{Algorithm, RawState, is_low_precision};
use crate::error::{Error, Result};
use crate::state::{EvaluationWeights, IntoStateful, StateDict, Stateful};
use crate::variables::Variable;

/// The part of the state that LBFGS alone has.
pub(crate) const LBFGS: &str = "lbfgs";

#[derive(Serialize, Deserialize)]
struct SavedGroup {
    name: String,
    /// The group's algorithm, if it is not the optimizer's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    algorithm: Option<String>,
    options: BTreeMap<String, f64>,
    parameters: Vec<String>,
}

/// A parameter as the optimizer has it.
struct Own {
    algorithm: Algorithm,
    /// How the parameter is stored, if it is of a type that this is for.
    storage: Option<LowPrecision>,
    variable: Variable,
}

/// The saved state of one parameter, checked, and on the parameter's device.
struct Checked {
    parameter: Tensor,
    /// False if the parameter was frozen.
    trains: bool,
    /// `None` if the parameter had not been stepped yet.
    state: Option<RawState>,
}

/// A saved state, compared with the optimizer: values to load, and misfits.
#[derive(Default)]
struct Fitting {
    options: Vec<(Group, Hyper, f64)>,
    parameters: Vec<Checked>,
    /// Parameters whose saved state does not fit as a whole, but was partly read into the optimizer's own tensors
    /// already. Their state is removed.
    spoilt: Vec<Tensor>,
    /// A line for each part of the saved state that does not fit.
    misfits: Vec<String>,
    /// LBFGS remembers this between steps.
    lbfgs: Option<Memory>,
}

/// The state holds every hyper-parameter of every group, the step counts, the names of frozen parameters, and the state
/// tensors of each parameter under `"<parameter>/<name>"`.
impl Stateful for Optimizer {
    fn state_dict(&self) -> Result<StateDict> {
        let mut saved = StateDict::new();
        let groups = self.groups()?.iter().map(saved_group).collect::<Result<Vec<_>>>()?;
        let (mut steps, mut frozen) = (BTreeMap::new(), vec![]);
        for Own { algorithm, variable, .. } in self.own_parameters()? {
            let Variable { name, tensor: parameter, .. } = variable;
            let failed = |text| Error::libtorch(format!("reading the state of '{name}'"), text);
            if !parameter.requires_grad() {
                frozen.push(name.clone());
            }
            let state = self.native(|native| native.state(&parameter).map_err(failed))?;
            let Some(state) = state else { continue };
            steps.insert(name.clone(), state.step);
            for (key, tensor) in algorithm.state_names().iter().zip(state.tensors) {
                if let Some(tensor) = tensor {
                    saved.set_tensor(&format!("{name}/{key}"), tensor);
                }
            }
            if let Some(kept) = state.kept {
                saved.set_tensor(&format!("{name}/{}", kept_name(&kept)), kept);
            }
        }
        saved.set_value("optimizer", self.name())?;
        saved.set_value("groups", groups)?;
        saved.set_value("steps", steps)?;
        saved.set_value("frozen", frozen)?;
        if self.needs_closure() {
            let memory = locked(&self.shared.lbfgs).clone();
            saved.set_part(LBFGS, memory.state_dict(&self.parameter_names()?)?);
        }
        Ok(saved)
    }

    fn evaluation_weights(&self) -> Result<Option<EvaluationWeights>> {
        let optimizer = self.clone();
        let switched = self.to_evaluation()?;
        Ok(switched.then(|| EvaluationWeights::new(move || optimizer.to_training(false))))
    }

    fn settings(&self) -> Map<String, Value> {
        self.shared.built.get().cloned().unwrap_or_default()
    }

    fn is_read_in_place(&self) -> bool {
        true
    }

    /// On error nothing is changed, except tensors that were read in place.
    fn load_state_dict(&mut self, state: StateDict) -> Result<()> {
        let mut fitting = self.fitting(state)?;
        match fitting.misfits.is_empty() {
            true => self.load(fitting),
            false => Err(Error::State(fitting.misfits.swap_remove(0))),
        }
    }

    /// Loads the state into an optimizer of a model that was changed since. A group's options are found by the group's
    /// name, a parameter's state by the parameter's name. A group or parameter that is missing in the state, or whose
    /// state does not fit, keeps its own. A parameter's state is taken as a whole, because a moment without its step
    /// count means nothing.
    ///
    /// # Errors
    /// A state of another kind of optimizer; then nothing is changed, except tensors that were read in place.
    fn load_state_dict_partially(&mut self, state: StateDict) -> Result<Vec<String>> {
        let mut fitting = self.fitting(state)?;
        let misfits = std::mem::take(&mut fitting.misfits);
        self.load(fitting)?;
        Ok(misfits)
    }
}

impl Optimizer {
    /// Compares a saved state with the optimizer, and changes nothing.
    fn fitting(&self, mut state: StateDict) -> Result<Fitting> {
        let kind: String = state.value("optimizer")?;
        if kind != self.name() {
            return Err(Error::State(format!("it is of {kind}, and this is {}", self.name())));
        }
        let mut saved: Vec<SavedGroup> = state.value("groups")?;
        let mut steps: BTreeMap<String, Option<i64>> = state.value("steps")?;
        let frozen: Vec<String> = state.value("frozen")?;
        let parameters = self.own_parameters()?;
        // A parameter with several names may have been saved under another one of them.
        for Own { variable, .. } in &parameters {
            for other in &variable.other_names {
                for name in saved.iter_mut().flat_map(|group| &mut group.parameters) {
                    if name == other {
                        name.clone_from(&variable.name);
                    }
                }
            }
        }
        let groups = self.groups()?;
        let mut fitting = Fitting::default();
        fitting.compare_groups(&saved, &groups)?;
        for Own { algorithm, storage, variable } in parameters {
            let Variable { name, other_names, tensor: parameter, .. } = variable;
            let names = || std::iter::once(&name).chain(&other_names);
            let step = names().find_map(|name| steps.remove(name));
            let trains = !names().any(|name| frozen.contains(name));
            let is_saved = saved.iter().any(|group| group.parameters.contains(&name));
            let mut tensors = [None, None, None];
            let mut misfit = None;
            for (place, key) in tensors.iter_mut().zip(algorithm.state_names()) {
                let tensor =
                    names().find_map(|name| state.tensors.remove(&format!("{name}/{key}")));
                let Some(tensor) = tensor else { continue };
                // Steps with a storage of low precision compute in f32.
                let kind = if storage.is_some() { Kind::Float } else { parameter.kind() };
                let fitting = algorithm.state_like(key, &parameter.size(), kind);
                misfit = misfit.or_else(|| tensor_misfit(&name, key, &tensor, &parameter, fitting));
                *place = Some(tensor);
            }
            let mut kept = None;
            if let Some((key, size, kind)) = storage.map(|storage| storage.kept(&parameter)) {
                kept = names().find_map(|name| state.tensors.remove(&format!("{name}/{key}")));
                let fitting = Some((size, kind));
                misfit = misfit
                    .or_else(|| tensor_misfit(&name, key, kept.as_ref()?, &parameter, fitting));
            }
            let has_tensors = tensors.iter().chain([&kept]).any(Option::is_some);
            let impossible = |step: &Option<i64>| step.is_some_and(|s| !(0..1 << 53).contains(&s));
            if misfit.is_none() {
                misfit = match &step {
                    None if has_tensors => Some(format!("'{name}' has tensors but no step")),
                    Some(_)
                        if !algorithm.has_needed(&tensors, &parameter.size())
                            || kept.is_some() != storage.is_some() =>
                    {
                        Some(format!("the state of '{name}' is not complete"))
                    }
                    Some(step) if step.is_some() != algorithm.counts_steps() => {
                        let has = if step.is_some() { "a" } else { "no" };
                        Some(format!("the state of '{name}' has {has} step count"))
                    }
                    Some(step) if impossible(step) => {
                        Some(format!("the step of '{name}' is impossible"))
                    }
                    _ => None,
                };
            }
            if let Some(misfit) = misfit {
                fitting.misfits.push(misfit);
                let own = self.native(|native| {
                    let failed = |text| Error::libtorch("reading the optimizer's state", text);
                    native.state(&parameter).map_err(failed)
                })?;
                let own = own.into_iter().flat_map(|own| own.tensors.into_iter().chain([own.kept]));
                let own: Vec<_> = own.flatten().map(|tensor| TensorId::of(&tensor)).collect();
                let mut read = tensors.iter().chain([&kept]).flatten();
                if read.any(|tensor| own.contains(&TensorId::of(tensor))) {
                    fitting.spoilt.push(parameter);
                }
                continue;
            }
            if !is_saved {
                continue;
            }
            let key = kept.as_ref().map_or("", kept_name);
            let keys = algorithm.state_names().into_iter().chain([key]);
            for (place, key) in tensors.iter_mut().chain([&mut kept]).zip(keys) {
                if let Some(tensor) = place {
                    *tensor = placed_like(tensor, &parameter).map_err(|error| {
                        Error::libtorch(format!("loading '{name}/{key}'"), error)
                    })?;
                }
            }
            let state = step.map(|step| RawState { step, tensors, kept });
            fitting.parameters.push(Checked { parameter, trains, state });
        }
        if self.needs_closure() {
            let parameters = self.parameters_of([0])?;
            let saved = state.take_part(LBFGS)?;
            match Memory::of_state(saved, &self.parameter_names()?, &parameters) {
                Ok(memory) => fitting.lbfgs = Some(memory),
                Err(error) => fitting.misfits.push(error.to_string()),
            }
        }
        for (name, tensor) in &state.tensors {
            let (kind, shape) = (tensor.kind(), tensor.size());
            fitting.misfits.push(format!("'{name}', {kind:?} of shape {shape:?}, is unknown here"));
        }
        Ok(fitting)
    }

    /// Sets the values that fit, and removes the state of `spoilt` parameters.
    fn load(&self, fitting: Fitting) -> Result<()> {
        for (group, option, value) in &fitting.options {
            group.set_hyper(*option, *value)?;
        }
        for Checked { parameter, trains, .. } in &fitting.parameters {
            self.set_trains(parameter, *trains)?;
        }
        if let Some(memory) = fitting.lbfgs {
            *locked(&self.shared.lbfgs) = memory;
        }
        let loaded = fitting.parameters.iter().map(|c| (&c.parameter, c.state.as_ref()));
        let spoilt = fitting.spoilt.iter().map(|parameter| (parameter, None));
        self.native(|native| {
            loaded.chain(spoilt).try_for_each(|(parameter, state)| {
                native
                    .set_state(parameter, state)
                    .map_err(|text| Error::libtorch("loading the optimizer's state", text))
            })
        })
    }
}

impl Fitting {
    /// Takes the options of groups that the state and the optimizer both have, and notes differences.
    fn compare_groups(&mut self, saved: &[SavedGroup], groups: &[Group]) -> Result<()> {
        let theirs: Vec<_> = saved.iter().map(|group| group.name.clone()).collect();
        let ours: Vec<_> = groups.iter().map(Group::name).collect();
        if theirs != ours {
            self.misfits.push(format!(
                "its groups are {}, and here they are {}",
                theirs.join(", "),
                ours.join(", ")
            ));
        }
        let here: Vec<_> = groups.iter().map(Group::parameters).collect::<Result<_>>()?;
        for (name, parameters) in ours.iter().zip(&here) {
            let then = saved.iter().find(|group| group.name == *name);
            let then: HashSet<_> = then.into_iter().flat_map(|group| &group.parameters).collect();
            let now: HashSet<_> = parameters.iter().collect();
            let mut gone: Vec<_> = then.difference(&now).collect();
            let mut new: Vec<_> = now.difference(&then).collect();
            gone.sort();
            new.sort();
            let gone = gone.iter().map(|p| format!("'{p}' was in group '{name}', and is not here"));
            let new = new.iter().map(|p| format!("'{p}' is in group '{name}', and was not then"));
            self.misfits.extend(gone.chain(new));
        }
        for saved in saved {
            let Some(group) = groups.iter().find(|group| group.name() == saved.name) else {
                continue;
            };
            let algorithm = saved.algorithm.as_deref().unwrap_or(group.optimizer.name());
            if algorithm != group.algorithm() {
                self.misfits.push(format!(
                    "group '{}' was stepped by {algorithm}, and is here by {}",
                    saved.name,
                    group.algorithm()
                ));
                continue;
            }
            for (option, value) in &saved.options {
                let algorithm = group.own_algorithm();
                let known = algorithm.hyper(option);
                match known.and_then(|hyper| algorithm.check(hyper, *value).map(|()| hyper)) {
                    Ok(hyper) => self.options.push((group.clone(), hyper, *value)),
                    Err(error) => self.misfits.push(error.to_string()),
                }
            }
        }
        Ok(())
    }
}

/// The tensor on the parameter's device and, if both have one shape, with its strides; copied only if it differs. Steps
/// are slow for a parameter whose state has another layout.
fn placed_like(tensor: &Tensor, parameter: &Tensor) -> Result<Tensor, tch::TchError> {
    if tensor.size() != parameter.size() {
        return tensor.f_to_device(parameter.device());
    }
    if tensor.device() == parameter.device() && tensor.stride() == parameter.stride() {
        return Ok(tensor.shallow_clone());
    }
    let _guard = tch::no_grad_guard();
    let mut placed = parameter.f_detach()?.f_empty_like()?.f_to_kind(tensor.kind())?;
    placed.f_copy_(tensor)?;
    Ok(placed)
}

impl Optimizer {
    /// Notes the options that the optimizer was built with, as its settings.
    pub(super) fn note_as_built(&self) -> Result<()> {
        let mut built = Map::new();
        for group in self.groups()? {
            for hyper in group.own_algorithm().hypers().filter(|hyper| !hyper.is_counted()) {
                let value = group.get(hyper.name())?;
                built.insert(format!("{}.{hyper}", group.name()), value.into());
            }
            if let Some(storage) = group.low_precision() {
                let storage = serde_json::to_value(storage).unwrap_or_default();
                built.insert(format!("{}.low_precision", group.name()), storage);
            }
        }
        let _ = self.shared.built.set(built);
        Ok(())
    }

    /// The names of all parameters, in libtorch's order.
    fn parameter_names(&self) -> Result<Vec<String>> {
        Ok(self.own_parameters()?.into_iter().map(|own| own.variable.name).collect())
    }

    /// The optimizer's parameters that have names, in libtorch's order.
    fn own_parameters(&self) -> Result<Vec<Own>> {
        let mut named = vec![];
        for group in self.groups()? {
            let (algorithm, storage) = (group.own_algorithm(), group.low_precision());
            let parameters = group.variables()?.into_iter().filter(|own| !own.name.is_empty());
            named.extend(parameters.map(|variable| {
                let storage = storage.filter(|_| is_low_precision(&variable.tensor));
                Own { algorithm, storage, variable }
            }));
        }
        Ok(named)
    }
}

/// Why a saved tensor cannot be a part of the parameter's state, where a tensor of this size and type fits.
fn tensor_misfit(
    name: &str,
    key: &str,
    tensor: &Tensor,
    parameter: &Tensor,
    fitting: Option<(Vec<i64>, Kind)>,
) -> Option<String> {
    let given = (tensor.size(), tensor.kind());
    if fitting.as_ref() == Some(&given) {
        return None;
    }
    let (kind, size) = (parameter.kind(), parameter.size());
    let of_another_type = fitting.filter(|(_, fitting)| *fitting != kind);
    let stored = of_another_type.map(|(_, kind)| format!(", whose state is {kind:?} here"));
    Some(format!(
        "'{name}/{key}' is {:?} of shape {:?}, and the parameter is {kind:?} of shape {size:?}{}",
        given.1,
        given.0,
        stored.unwrap_or_default()
    ))
}

fn saved_group(group: &Group) -> Result<SavedGroup> {
    let hypers = group.own_algorithm().hypers();
    let own = group.algorithm();
    let options = hypers.map(|h| Ok((h.name().to_owned(), group.get(h.name())?)));
    Ok(SavedGroup {
        name: group.name(),
        algorithm: (own != group.optimizer.name()).then(|| own.to_owned()),
        options: options.collect::<Result<_>>()?,
        parameters: group.parameters()?,
    })
}

impl<'a> IntoStateful<'a> for &Optimizer {
    fn into_stateful(self) -> Box<dyn Stateful + 'a> {
        Box::new(self.clone())
    }
}
