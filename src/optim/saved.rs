//! The state of an optimizer for another process, by the names of groups and parameters.

use std::collections::{BTreeMap, HashMap};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use tch::Tensor;

use super::{Group, Optimizer, TensorId, locked};
use crate::bridge::RawState;
use crate::checkpoint::{StateDict, Stateful};
use crate::{Error, Result};

#[derive(Serialize, Deserialize)]
struct SavedGroup {
    name: String,
    options: BTreeMap<String, f64>,
    parameters: Vec<String>,
}

/// What `load_state_dict` will set, checked.
struct Checked {
    parameter: Tensor,
    trains: bool,
    state: Option<RawState>,
}

/// Every hyper-parameter of every group, and what libtorch keeps for each parameter, under
/// `"<parameter>/<name>"`.
impl Stateful for Optimizer {
    fn state_dict(&self) -> Result<StateDict> {
        let mut saved = StateDict::new();
        let groups = self.groups()?.iter().map(saved_group).collect::<Result<Vec<_>>>()?;
        let (mut steps, mut frozen) = (BTreeMap::new(), vec![]);
        let keys = self.shared.kind.state_names();
        for (name, parameter) in self.named_parameters() {
            let failed = |text| Error::libtorch(format!("reading the state of '{name}'"), text);
            if !parameter.requires_grad() {
                frozen.push(name.clone());
            }
            let state = self.native(|native| native.state(&parameter).map_err(failed))?;
            let Some(state) = state else { continue };
            steps.insert(name.clone(), state.step);
            for (key, tensor) in keys.iter().zip(state.tensors) {
                if let Some(tensor) = tensor {
                    saved.set_tensor(&format!("{name}/{key}"), tensor);
                }
            }
        }
        saved.set_value("optimizer", self.name())?;
        saved.set_value("groups", groups)?;
        saved.set_value("steps", steps)?;
        saved.set_value("frozen", frozen)?;
        Ok(saved)
    }

    fn settings(&self) -> Map<String, Value> {
        self.shared.built.get().cloned().unwrap_or_default()
    }

    fn is_read_in_place(&self) -> bool {
        true
    }

    /// Nothing is changed on error, but for what was read in place.
    fn load_state_dict(&mut self, state: StateDict) -> Result<()> {
        self.load(state, true).map(drop)
    }

    /// Parameters that are new, or whose state has another type or shape, keep theirs; groups go by name.
    fn load_state_dict_partially(&mut self, state: StateDict) -> Result<Vec<String>> {
        self.load(state, false)
    }
}

impl Optimizer {
    /// With `strict` the first thing that does not fit is an error, otherwise all are returned.
    fn load(&self, mut state: StateDict, strict: bool) -> Result<Vec<String>> {
        let kind: String = state.value("optimizer")?;
        if kind != self.name() {
            return Err(Error::State(format!("it is of {kind}, and this is {}", self.name())));
        }
        let saved: Vec<SavedGroup> = state.value("groups")?;
        let groups = self.groups()?;
        let mut misfits = vec![];
        match check_groups(&saved, &groups) {
            Err(error) if strict => return Err(error),
            checked => misfits.extend(checked.err().map(|error| error.to_string())),
        }
        for (option, value) in saved.iter().flat_map(|group| &group.options) {
            self.shared.kind.hyper(option)?.check(*value)?;
        }
        let steps: BTreeMap<String, Option<i64>> = state.value("steps")?;
        let frozen: Vec<String> = state.value("frozen")?;
        let mut checked = vec![];
        for (name, parameter) in self.named_parameters() {
            let mut tensors = [None, None, None];
            for (tensor, key) in tensors.iter_mut().zip(self.shared.kind.state_names()) {
                *tensor = state.tensors.remove(&format!("{name}/{key}"));
            }
            if !saved.iter().any(|group| group.parameters.contains(&name)) {
                // With `strict` the groups have told it.
                continue;
            }
            let trains = !frozen.contains(&name);
            match self.fitting(&name, &parameter, steps.get(&name).copied(), tensors) {
                Ok(state) => checked.push(Checked { parameter, trains, state }),
                Err(error) if strict => return Err(error),
                Err(error) => misfits.push(error.to_string()),
            }
        }
        if let Some(name) = state.tensors.keys().next()
            && strict
        {
            return Err(Error::State(format!("'{name}' is unknown here")));
        }
        misfits.extend(state.tensors.keys().map(|name| format!("'{name}' is unknown here")));
        for saved in &saved {
            let Some(group) = groups.iter().find(|group| group.name() == saved.name) else {
                continue;
            };
            for (option, value) in &saved.options {
                group.set(option, *value)?;
            }
        }
        for Checked { parameter, trains, .. } in &checked {
            self.train(parameter, *trains)?;
        }
        self.native(|native| {
            checked.iter().try_for_each(|Checked { parameter, state, .. }| {
                native
                    .set_state(parameter, state.as_ref())
                    .map_err(|text| Error::libtorch("loading the optimizer's state", text))
            })
        })?;
        Ok(misfits)
    }

    /// The saved state of a parameter, where it fits.
    fn fitting(
        &self,
        name: &str,
        parameter: &Tensor,
        step: Option<Option<i64>>,
        mut tensors: [Option<Tensor>; 3],
    ) -> Result<Option<RawState>> {
        for (tensor, key) in tensors.iter_mut().zip(self.shared.kind.state_names()) {
            if let Some(tensor) = tensor.as_mut() {
                check_tensor(name, key, tensor, parameter)?;
                *tensor = placed_like(tensor, parameter)
                    .map_err(|error| Error::libtorch(format!("loading '{name}/{key}'"), error))?;
            }
        }
        if step.is_none() && tensors.iter().any(Option::is_some) {
            return Err(Error::State(format!("'{name}' has tensors but no step")));
        }
        if step.is_some() && !self.shared.kind.has_needed(&tensors) {
            return Err(Error::State(format!("the state of '{name}' is not complete")));
        }
        if step.is_some_and(|step| step.is_some_and(|step| !(0..1 << 53).contains(&step))) {
            return Err(Error::State(format!("the step of '{name}' is impossible")));
        }
        Ok(step.map(|step| RawState { step, tensors }))
    }
}

/// On the device of the parameter and laid out as it is: steps of tensors that differ are slow.
fn placed_like(tensor: &Tensor, parameter: &Tensor) -> Result<Tensor, tch::TchError> {
    if tensor.device() == parameter.device() && tensor.stride() == parameter.stride() {
        return Ok(tensor.shallow_clone());
    }
    let _guard = tch::no_grad_guard();
    let mut placed = parameter.f_detach()?.f_empty_like()?;
    placed.f_copy_(tensor)?;
    Ok(placed)
}

impl Optimizer {
    pub(super) fn note_as_built(&self) -> Result<()> {
        let mut built = Map::new();
        for group in self.groups()? {
            for hyper in self.shared.kind.hypers() {
                let value = group.get(hyper.name())?;
                built.insert(format!("{}.{hyper}", group.name()), value.into());
            }
        }
        let _ = self.shared.built.set(built);
        Ok(())
    }

    /// Its parameters with their names, in libtorch's order.
    fn named_parameters(&self) -> Vec<(String, Tensor)> {
        let variables = locked(&self.shared.variables);
        let names: HashMap<_, _> =
            variables.named_variables.iter().map(|(name, t)| (TensorId::of(t), name)).collect();
        let named = |tensor: &Tensor| {
            let name = names.get(&TensorId::of(tensor))?;
            Some((name.to_string(), tensor.shallow_clone()))
        };
        variables.trainable_variables.iter().filter_map(|v| named(&v.tensor)).collect()
    }
}

fn saved_group(group: &Group) -> Result<SavedGroup> {
    let hypers = group.optimizer.shared.kind.hypers();
    let options = hypers.iter().map(|h| Ok((h.name().to_owned(), group.get(h.name())?)));
    Ok(SavedGroup {
        name: group.name(),
        options: options.collect::<Result<_>>()?,
        parameters: group.parameters()?,
    })
}

fn check_groups(saved: &[SavedGroup], groups: &[Group]) -> Result<()> {
    let theirs: Vec<_> = saved.iter().map(|group| group.name.clone()).collect();
    let ours: Vec<_> = groups.iter().map(Group::name).collect();
    if theirs != ours {
        return Err(Error::State(format!(
            "its groups are {}, and here they are {}",
            theirs.join(", "),
            ours.join(", ")
        )));
    }
    for (saved, group) in saved.iter().zip(groups) {
        let (mut theirs, mut ours) = (saved.parameters.clone(), group.parameters()?);
        theirs.sort();
        ours.sort();
        let only = |a: &[String], b: &[String]| a.iter().find(|name| !b.contains(name)).cloned();
        if let Some(name) = only(&theirs, &ours) {
            return Err(Error::State(format!(
                "'{name}' was in group '{}', and is not here",
                saved.name
            )));
        }
        if let Some(name) = only(&ours, &theirs) {
            return Err(Error::State(format!(
                "'{name}' is in group '{}', and was not then",
                saved.name
            )));
        }
    }
    Ok(())
}

fn check_tensor(name: &str, key: &str, tensor: &Tensor, parameter: &Tensor) -> Result<()> {
    if tensor.size() == parameter.size() && tensor.kind() == parameter.kind() {
        return Ok(());
    }
    Err(Error::State(format!(
        "'{name}/{key}' is {:?} of shape {:?}, and the parameter is {:?} of shape {:?}",
        tensor.kind(),
        tensor.size(),
        parameter.kind(),
        parameter.size()
    )))
}
