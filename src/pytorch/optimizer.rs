use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;

use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use super::lbfgs;
use super::value::{Dict, Value};
use super::weights::parameters_in_order;
use crate::error::{Error, Result};
use crate::optim::{Group, KEPT, LBFGS, Optimizer};
use crate::state::{StateDict, Stateful};
use crate::variables::Variable;

/// Options of Python's groups that do not change what a step does, or that only its schedulers use.
const WITHOUT_EFFECT: [&str; 13] = [
    "params",
    "param_names",
    "name",
    "foreach",
    "fused",
    "capturable",
    "initial_lr",
    "max_lr",
    "min_lr",
    "max_momentum",
    "base_momentum",
    "decoupled_weight_decay",
    "scheduled_lr",
];

/// The parts of Python's state that [`load_optimizer`] took over, and those that it ignored. `Display` shows them in
/// one line.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct LoadedOptimizer {
    /// Parameters whose state was loaded.
    pub loaded: Vec<String>,
    /// Options, as `group.option`, that this crate's optimizers do not have and that do not change what a step does.
    pub ignored: Vec<String>,
}

impl fmt::Display for LoadedOptimizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "state of {} parameters loaded", self.loaded.len())?;
        match &self.ignored[..] {
            [] => Ok(()),
            ignored => write!(f, "; ignored: {}", ignored.join(", ")),
        }
    }
}

/// A parameter group in the state that our [`Optimizer`] saves.
#[derive(Serialize, Deserialize)]
struct SavedGroup {
    name: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    algorithm: Option<String>,
    options: BTreeMap<String, f64>,
    parameters: Vec<String>,
}

/// Loads `optimizer.state_dict()` of Python's optimizer of the same name: options of all groups, and the state of each
/// parameter. The learning rate comes along; schedulers are on their own.
///
/// Groups are matched by their names if Python's groups have the names of ours, else by their order. Python's state
/// numbers the parameters of each group instead of naming them; `names` lists names in the order by which Python
/// numbered them. For most programs that is the order of the model's [`state_dict()`](super::Weights::names), and
/// names of anything else in the list do no harm. Where `names` is empty, Python's own `param_names` give the order
/// (an optimizer made with `named_parameters()` has them), or else [`Weights::of_store`](super::Weights::of_store)
/// does.
///
/// Where groups have different algorithms here, Python has an optimizer for each algorithm. Their states come as one
/// list, `[muon.state_dict(), adamw.state_dict()]`: in the order in which our groups first have the algorithms, and the
/// groups of each in their order, unless their names say it. Of a [`TrainingFile`](super::TrainingFile) that is
/// `Value::list(file.optimizers().iter().map(|(_, state)| state.clone()))`.
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let path = folder.path().join("checkpoint.pt");
/// use tch::{Device, nn};
/// use tch_ignite::optim::Optimizer;
/// use tch_ignite::pytorch::{self, Dict, Weights};
/// let vs = nn::VarStore::new(Device::Cpu);
/// let fc = nn::linear(vs.root() / "fc", 2, 3, Default::default());
/// let mut optimizer = Optimizer::adam(&vs).build()?;
/// // Python reads it: optimizer.load_state_dict(torch.load("checkpoint.pt")["optimizer"])
/// let mut checkpoint = Dict::new();
/// checkpoint.insert("model", Weights::of_store(&vs)?.to_value());
/// checkpoint.insert("optimizer", pytorch::optimizer_value(&optimizer, &[])?);
/// pytorch::write(&path, &checkpoint.into())?;
/// // Python wrote it: torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, "checkpoint.pt")
/// let checkpoint = pytorch::read(&path)?;
/// let weights = Weights::of(checkpoint.require("model")?)?;
/// weights.load(&vs)?;
/// let saved = checkpoint.require("optimizer")?;
/// println!("{}", pytorch::load_optimizer(&mut optimizer, saved, &weights.names())?);
/// # Ok::<(), anyhow::Error>(())
/// ```
///
/// # Errors
/// The state is of another optimizer, or has other groups or parameters, or sets options that would change what a
/// step does and that this crate does not have (such as `differentiable`); the error names them. Nothing is changed
/// then.
pub fn load_optimizer(
    optimizer: &mut Optimizer,
    saved: &Value,
    names: &[&str],
) -> Result<LoadedOptimizer> {
    check_storage(optimizer)?;
    let all = Theirs::all(optimizer, saved, names)?;
    let mut report = LoadedOptimizer::default();

    // The optimizer's own state serves as a form that is filled in, because it has all groups, options and
    // parameters.
    let template = optimizer.state_dict()?;
    let mut ours_saved: Vec<SavedGroup> = template.value("groups")?;
    for theirs in &all {
        for (dict, group) in &theirs.groups {
            let (name, algorithm) = (group.name(), group.algorithm());
            let form = ours_saved.get_mut(group.index());
            let form = form.ok_or_else(|| fault("its groups have changed"))?;
            check_members(dict, form, &theirs.names)?;
            for (option, value) in &mut form.options {
                *value = option_of(dict, option)
                    .map_err(|why| fault(format!("group '{name}', {option}: {why}")))?
                    .ok_or_else(|| fault(format!(
                        "group '{name}' has no {option}: it is the state of another optimizer than {algorithm}"
                    )))?;
            }
            check_rest(dict, form, algorithm, &mut report)?;
        }
    }

    let mut state = StateDict::new();
    let mut steps: BTreeMap<String, Option<i64>> = BTreeMap::new();
    for theirs in &all {
        match optimizer.needs_closure() {
            true => state.set_part(LBFGS, theirs.lbfgs(template.part(LBFGS)?, &mut report)?),
            false => theirs.parameters(&mut state, &mut steps)?,
        }
    }
    report.loaded.extend(steps.keys().cloned());
    state.set_value("optimizer", optimizer.name())?;
    state.set_value("groups", ours_saved)?;
    state.set_value("steps", steps)?;
    state.set_value("frozen", template.value::<Vec<String>>("frozen")?)?;
    optimizer.load_state_dict(state)?;
    report.loaded.sort();
    Ok(report)
}

/// The state of one of Python's optimizers, with the groups that are here for its own.
struct Theirs<'s> {
    saved: &'s Value,
    groups: Vec<(&'s Dict, Group)>,
    names: Numbers,
}

impl<'s> Theirs<'s> {
    /// All states of a list, or the one that is none.
    fn all(optimizer: &Optimizer, saved: &'s Value, names: &[&str]) -> Result<Vec<Self>> {
        let sorted = by_algorithm(optimizer.groups()?);
        let mut algorithms: Vec<_> = sorted.iter().map(Group::algorithm).collect();
        algorithms.dedup();
        let (states, ours): (Vec<&Value>, _) = match saved.as_slice() {
            Some(states) => (states.iter().collect(), sorted),
            None => (vec![saved], optimizer.groups()?),
        };
        let wanted = match &algorithms[..] {
            [one] => format!("the state of one optimizer of Python, of {one}"),
            several => {
                format!("a list with the states of {}, in this order", several.join(" and "))
            }
        };
        if states.len() != algorithms.len() {
            let given = match saved.as_slice() {
                Some(states) => format!("a list of {} states", states.len()),
                None => "one state".to_owned(),
            };
            return Err(fault(format!("it is {given}, and wanted is {wanted}")));
        }
        let groups = states.iter().map(|state| saved_groups(state)).collect::<Result<Vec<_>>>()?;
        let mut ours = matched(&groups.concat(), ours)?.into_iter();
        let ours: Vec<Vec<_>> =
            groups.iter().map(|dicts| ours.by_ref().take(dicts.len()).collect()).collect();
        for ours in &ours {
            let first = ours.first().map(Group::algorithm);
            if let Some(other) = ours.iter().find(|group| Some(group.algorithm()) != first) {
                return Err(fault(format!(
                    "one of its states has {} groups, of which '{}' is stepped by {} here, and another is not; wanted is {wanted}",
                    ours.len(),
                    other.name(),
                    other.algorithm()
                )));
            }
        }
        let theirs = states.into_iter().zip(groups).zip(ours).map(|((saved, dicts), ours)| {
            let names = Numbers::of(&dicts, &ours, names)?;
            Ok(Self { saved, groups: dicts.into_iter().zip(ours).collect(), names })
        });
        theirs.collect()
    }

    /// The states of parameters, by the parameters' numbers.
    fn states(&self) -> Result<&'s Dict> {
        let states = self.saved.require("state")?.as_dict();
        states.ok_or_else(|| fault("its state is no dict"))
    }

    /// The tensors of all parameters, with their groups.
    fn tensors(&self) -> Result<HashMap<String, (&Group, Tensor)>> {
        let mut tensors = HashMap::new();
        for (_, group) in &self.groups {
            let variables = group.variables()?.into_iter();
            tensors.extend(variables.map(|own| (own.name, (group, own.tensor))));
        }
        Ok(tensors)
    }

    /// Reads the state of each parameter.
    fn parameters(
        &self,
        state: &mut StateDict,
        steps: &mut BTreeMap<String, Option<i64>>,
    ) -> Result<()> {
        let ours = self.tensors()?;
        for (number, parts) in self.states()?.iter() {
            let number = number
                .as_i64()
                .ok_or_else(|| fault(format!("'{number}' is no number of a parameter")))?;
            let name = self.names.name(number)?;
            let (group, parameter) =
                ours.get(name).ok_or_else(|| fault(format!("'{name}' is in no group")))?;
            let parts = parts
                .as_dict()
                .ok_or_else(|| fault(format!("the state of '{name}' is no dict")))?;
            let (mut step, mut tensors) = (None, 0);
            for (key, value) in parts.iter() {
                let key = key.as_str().unwrap_or_default();
                match value {
                    Value::None => {}
                    value if key == "step" => step = Some(step_of(name, value)?),
                    Value::Tensor(stored) => {
                        // A few bytes may claim to be a tensor of any shape, so a tensor is copied only if its shape
                        // fits.
                        let fitting = group.state_like(key, parameter);
                        let (shape, is_number) = fitting.unwrap_or((parameter.size(), false));
                        if stored.size() != shape {
                            return Err(fault(format!(
                                "'{name}/{key}' is of shape {:?}, and here of shape {shape:?}",
                                stored.size()
                            )));
                        }
                        // The state gets a copy, because the optimizer's steps change it. Numbers have the type of
                        // Python's default.
                        let tensor = tch::no_grad(|| {
                            let copy = stored.tensor()?.f_detach_copy();
                            let kind = |tensor: Tensor| match is_number {
                                true => tensor.f_to_kind(Kind::Float),
                                false => Ok(tensor),
                            };
                            copy.and_then(kind).map_err(|error| {
                                Error::libtorch(format!("copying '{name}/{key}'"), error)
                            })
                        })?;
                        state.set_tensor(&format!("{name}/{key}"), tensor);
                        tensors += 1;
                    }
                    other => {
                        return Err(fault(format!("'{name}/{key}' is a {}", other.type_name())));
                    }
                }
            }
            // Some optimizers, such as SGD, count no steps.
            if tensors > 0 && step.is_none() && group.counts_steps() {
                return Err(fault(format!("'{name}' has tensors but no step")));
            }
            if tensors > 0 || step.is_some() {
                steps.insert(name.to_owned(), step);
            }
        }
        Ok(())
    }

    /// The state of LBFGS, which Python keeps for all parameters with the first.
    fn lbfgs(&self, ours: &StateDict, report: &mut LoadedOptimizer) -> Result<StateDict> {
        let tensors = self.tensors()?.into_iter();
        let sizes = tensors.map(|(name, (_, own))| (name, own.numel() as i64)).collect();
        let order = self.names.in_order();
        let first = self.states()?.iter().next().and_then(|(_, own)| own.as_dict());
        let part = match first {
            Some(saved) => lbfgs::of_python(saved, ours, &order, &sizes)?,
            None => lbfgs::of_python(&lbfgs::nothing(), ours, &order, &sizes)?,
        };
        report.loaded.extend(first.map(|_| order).into_iter().flatten());
        Ok(part)
    }
}

/// The state of an optimizer as Python's `optimizer.load_state_dict()` takes it. `names` lists the parameters' names
/// in the order in which Python numbers them, as for [`load_optimizer`]. Where groups have different algorithms, it is a
/// list with the state of an optimizer for each algorithm, in the order in which our groups first have them.
///
/// # Errors
/// A parameter is not among the names, or is stored by [`LowPrecision`](crate::optim::LowPrecision).
pub fn optimizer_value(optimizer: &Optimizer, names: &[&str]) -> Result<Value> {
    check_storage(optimizer)?;
    let template = optimizer.state_dict()?;
    let memory = match optimizer.needs_closure() {
        true => Some(template.part(LBFGS)?),
        false => None,
    };
    let groups = by_algorithm(optimizer.groups()?);
    let of_python = groups.chunk_by(|group, next| group.algorithm() == next.algorithm());
    let states = of_python.map(|groups| state_value(&template, memory, groups, names));
    let mut states = states.collect::<Result<Vec<_>>>()?;
    match states.len() {
        1 => Ok(states.remove(0)),
        _ => Ok(Value::list(states)),
    }
}

/// The state of Python's optimizer of these groups, which have one algorithm, in the state of ours.
fn state_value(
    template: &StateDict,
    memory: Option<&StateDict>,
    groups: &[Group],
    names: &[&str],
) -> Result<Value> {
    let ours: Vec<SavedGroup> = template.value("groups")?;
    let (mut states, mut saved_groups, mut all, mut sizes) =
        (Dict::new(), vec![], vec![], HashMap::new());
    for group in groups {
        let form = ours.get(group.index()).ok_or_else(|| fault("its groups have changed"))?;
        let variables = group.variables()?;
        sizes.extend(variables.iter().map(|own| (own.name.clone(), own.tensor.numel() as i64)));
        let members = ordered(variables, names)?;
        // Python numbers the parameters of all groups in their order.
        let numbers: Vec<_> = (all.len()..all.len() + members.len()).collect();
        saved_groups.push(group_value(group.algorithm(), form, &numbers));
        all.extend(members.into_iter().map(|name| (group.algorithm(), name)));
    }
    let steps: BTreeMap<String, Option<i64>> = template.value("steps")?;
    for (index, (algorithm, name)) in all.iter().enumerate() {
        let Some(step) = steps.get(name) else { continue };
        let mut parts = Dict::new();
        if let Some(step) = step {
            // torch saves step counts as tensors of float32. AdEMAMix has them as numbers, and would compute with a tensor.
            let count = match maximizes_in_python(algorithm) {
                true => Value::tensor(&Tensor::from(*step as f64).to_kind(Kind::Float))?,
                false => Value::from(*step),
            };
            parts.insert("step", count);
        }
        let prefix = format!("{name}/");
        for (key, tensor) in template.tensors() {
            // Python goes back from evaluation without the copy that we keep for that.
            if let Some(key) = key.strip_prefix(&prefix).filter(|key| *key != KEPT) {
                parts.insert(key, Value::tensor(tensor)?);
            }
        }
        states.push(index as i64, parts);
    }
    if let Some(memory) = memory {
        let all: Vec<_> = all.into_iter().map(|(_, name)| name).collect();
        states.push(0i64, lbfgs::to_python(memory, &all, &sizes)?);
    }
    let mut saved = Dict::new();
    saved.insert("state", states);
    saved.insert("param_groups", Value::list(saved_groups));
    Ok(saved.into())
}

/// Groups in the order in which Python has them, where each algorithm is an optimizer: those of the first group's
/// algorithm, then those of the next.
fn by_algorithm(groups: Vec<Group>) -> Vec<Group> {
    let mut sorted: Vec<Group> = Vec::with_capacity(groups.len());
    for group in groups {
        let last = sorted.iter().rposition(|known| known.algorithm() == group.algorithm());
        sorted.insert(last.map_or(sorted.len(), |last| last + 1), group);
    }
    sorted
}

/// The names by which our state knows a group's parameters, in Python's order. Python numbers a tied parameter where the
/// first of its names is.
fn ordered(members: Vec<Variable>, names: &[&str]) -> Result<Vec<String>> {
    if names.is_empty() {
        return Ok(parameters_in_order(members).into_iter().map(|member| member.name).collect());
    }
    let mut places = HashMap::new();
    for (place, name) in names.iter().enumerate() {
        places.entry(*name).or_insert(place);
    }
    let placed = members.into_iter().map(|member| {
        let place = member.names().filter_map(|name| places.get(name)).min();
        let place = place
            .ok_or_else(|| fault(format!("parameter '{}' is not among the names", member.name)))?;
        Ok((*place, member.name))
    });
    let mut placed = placed.collect::<Result<Vec<_>>>()?;
    placed.sort_unstable();
    Ok(placed.into_iter().map(|(_, name)| name).collect())
}

/// Python has no storage of low precision.
fn check_storage(optimizer: &Optimizer) -> Result<()> {
    match optimizer.has_low_precision()? {
        true => Err(fault(
            "parameters in f16 or bf16 are stored by low_precision here, and Python's optimizers have no such state",
        )),
        false => Ok(()),
    }
}

fn fault(why: impl fmt::Display) -> Error {
    Error::State(format!("the optimizer's state: {why}"))
}

fn saved_groups(saved: &Value) -> Result<Vec<&Dict>> {
    let groups = saved.require("param_groups")?.as_slice();
    let groups = groups.ok_or_else(|| fault("param_groups is no list"))?;
    let dict = |group| Value::as_dict(group).ok_or_else(|| fault("a group is no dict"));
    groups.iter().map(dict).collect()
}

/// Our groups in the order of Python's: matched by name if the names agree, else left in their own order.
fn matched(saved: &[&Dict], ours: Vec<Group>) -> Result<Vec<Group>> {
    if saved.len() != ours.len() {
        return Err(fault(format!(
            "it has {} groups, and here there are {}",
            saved.len(),
            ours.len()
        )));
    }
    let names: Vec<_> =
        saved.iter().map(|group| group.get("name").and_then(Value::as_str)).collect();
    let mut sorted: Vec<_> = names.iter().flatten().copied().collect();
    let mut known: Vec<_> = ours.iter().map(Group::name).collect();
    sorted.sort_unstable();
    known.sort_unstable();
    if sorted != known {
        return Ok(ours);
    }
    let find =
        |name: &Option<&str>| ours.iter().find(|group| Some(&*group.name()) == *name).cloned();
    names.iter().map(|name| find(name).ok_or_else(|| fault("two groups of one name"))).collect()
}

/// The names by which our state knows parameters, by Python's numbers.
struct Numbers(BTreeMap<i64, String>);

impl Numbers {
    fn of(saved: &[&Dict], ours: &[Group], names: &[&str]) -> Result<Self> {
        let mut by_number = BTreeMap::new();
        for (dict, group) in saved.iter().zip(ours) {
            let numbers = dict.get("params").and_then(Value::as_slice);
            let numbers = numbers.ok_or_else(|| fault("a group has no params"))?;
            let of_python: Option<Vec<String>> =
                dict.get("param_names").and_then(Value::as_slice).and_then(|names| {
                    names.iter().map(|name| name.as_str().map(str::to_owned)).collect()
                });
            let members = group.variables()?;
            let names = match of_python.filter(|_| names.is_empty()) {
                Some(mut names) => {
                    // Python may know a tied parameter by another of its names.
                    for name in &mut names {
                        let known = |member: &&Variable| member.names().any(|own| own == name);
                        if let Some(member) = members.iter().find(known) {
                            name.clone_from(&member.name);
                        }
                    }
                    names
                }
                None => ordered(members, names)?,
            };
            if names.len() != numbers.len() {
                return Err(fault(format!(
                    "group '{}' has {} parameters there and {} here",
                    group.name(),
                    numbers.len(),
                    names.len()
                )));
            }
            for (number, name) in numbers.iter().zip(names) {
                let number = number.as_i64().ok_or_else(|| fault("params are no numbers"))?;
                if by_number.insert(number, name).is_some() {
                    return Err(fault(format!("parameter {number} is in two groups")));
                }
            }
        }
        Ok(Self(by_number))
    }

    /// All names in the order of their numbers.
    fn in_order(&self) -> Vec<String> {
        self.0.values().cloned().collect()
    }

    fn name(&self, number: i64) -> Result<&str> {
        let name = self.0.get(&number).map(String::as_str);
        name.ok_or_else(|| fault(format!("parameter {number} is in no group")))
    }
}

/// Fails unless Python's group and ours have the same parameters.
fn check_members(dict: &Dict, form: &SavedGroup, names: &Numbers) -> Result<()> {
    let numbers = dict.get("params").and_then(Value::as_slice).unwrap_or_default();
    let mut theirs = vec![];
    for number in numbers {
        theirs.push(names.name(number.as_i64().unwrap_or(-1))?);
    }
    let only_there = theirs.iter().find(|name| !form.parameters.iter().any(|own| own == **name));
    let only_here = form.parameters.iter().find(|name| !theirs.contains(&name.as_str()));
    let group = &form.name;
    let mut seen = HashSet::new();
    if let Some(name) = theirs.iter().find(|name| !seen.insert(**name)) {
        return Err(fault(format!("'{name}' is in group '{group}' twice")));
    }
    match (only_there, only_here) {
        (Some(name), _) => Err(fault(format!("'{name}' is in group '{group}' there and not here"))),
        (_, Some(name)) => Err(fault(format!("'{name}' is in group '{group}' here and not there"))),
        (None, None) => Ok(()),
    }
}

/// Options that Python has as one tuple, and ours in its order.
const TUPLES: [(&str, &[&str]); 6] = [
    ("betas", &["beta1", "beta2", "beta3"]),
    ("betas", &["beta1", "beta2"]),
    ("etas", &["etaminus", "etaplus"]),
    ("step_sizes", &["step_size_min", "step_size_max"]),
    ("eps", &["eps1", "eps2"]),
    ("ns_coefficients", &["ns_coefficient_a", "ns_coefficient_b", "ns_coefficient_c"]),
];

/// Python's name of one of our options, and its place in the tuple if it is in one.
fn pythons(option: &str) -> (&str, Option<usize>) {
    let place = |(name, parts): &(&'static str, &[&str])| {
        parts.iter().position(|part| *part == option).map(|place| (*name, Some(place)))
    };
    TUPLES.iter().find_map(place).unwrap_or((option, None))
}

/// Python's value of one of our options.
fn option_of(dict: &Dict, option: &str) -> Result<Option<f64>, String> {
    let (name, place) = pythons(option);
    let value = match place {
        Some(place) => dict.get(name).and_then(Value::as_slice).and_then(|tuple| tuple.get(place)),
        None => dict.get(name),
    };
    match value {
        // Python's Muon, Schedule-Free and others, and versions from before it was there, do not maximize.
        None if option == "maximize" => Ok(Some(0.)),
        None if option == "match_rms_adamw" => match dict.get("adjust_lr_fn") {
            Some(Value::None) => Ok(Some(0.)),
            Some(value) => match value.as_str() {
                Some("original") => Ok(Some(0.)),
                Some("match_rms_adamw") => Ok(Some(1.)),
                _ => Err(format!("adjust_lr_fn is {value}")),
            },
            None => Ok(None),
        },
        None if option == "strong_wolfe" => match dict.get("line_search_fn") {
            Some(Value::None) => Ok(Some(0.)),
            Some(value) if value.as_str() == Some("strong_wolfe") => Ok(Some(1.)),
            Some(value) => Err(format!("line_search_fn is {value}")),
            None => Ok(None),
        },
        // 0 is no warm-up here.
        Some(Value::None) if matches!(option, "alpha_warmup" | "beta3_warmup") => Ok(Some(0.)),
        // The precision of the parameter's type.
        Some(Value::None) if option == "eps1" => Ok(Some(0.)),
        None => Ok(None),
        Some(Value::Bool(bool)) => Ok(Some(f64::from(u8::from(*bool)))),
        Some(value @ (Value::Float(_) | Value::Int(_))) => Ok(value.as_f64()),
        // Learning rates may be tensors.
        Some(Value::Tensor(stored)) if stored.numel() == 1 => {
            let number = stored.tensor().map_err(|error| error.to_string())?;
            f64::try_from(number.detach().reshape([])).map(Some).map_err(|error| error.to_string())
        }
        Some(other) => Err(format!("it is a {}", other.type_name())),
    }
}

/// Fails if Python's group sets an option that ours does not have and that changes what a step does; lists the
/// harmless ones in the report.
fn check_rest(
    dict: &Dict,
    form: &SavedGroup,
    optimizer: &str,
    report: &mut LoadedOptimizer,
) -> Result<()> {
    for (option, value) in dict.iter() {
        let option = option.as_str().unwrap_or_default();
        let renamed = match option {
            "adjust_lr_fn" => "match_rms_adamw",
            "line_search_fn" => "strong_wolfe",
            option => option,
        };
        let is_ours = form.options.keys().any(|own| pythons(own).0 == renamed);
        if is_ours || matches!(option, "params" | "param_names" | "name") {
            continue;
        }
        let off = matches!(value, Value::None | Value::Bool(false));
        if option == "decoupled_weight_decay" && off == (optimizer == "AdamW") {
            let theirs = if off { "Adam" } else { "AdamW" };
            return Err(fault(format!("it is of {theirs}, and this is {optimizer}")));
        }
        if !off && !WITHOUT_EFFECT.contains(&option) {
            return Err(fault(format!(
                "group '{}' has {option} = {value}, which {optimizer} does not have here",
                form.name
            )));
        }
        if !off {
            report.ignored.push(format!("{}.{option}", form.name));
        }
    }
    Ok(())
}

/// Reads a step count, which PyTorch saves as a tensor since 1.12 and saved as a number before.
fn step_of(name: &str, value: &Value) -> Result<i64> {
    let number = match value {
        Value::Tensor(stored) if stored.numel() == 1 => {
            let number = stored.tensor()?.detach().reshape([]);
            f64::try_from(number).map_err(|error| Error::libtorch("reading a step", error))?
        }
        other => other.as_f64().unwrap_or(f64::NAN),
    };
    match number >= 0. && number.fract() == 0. && number < (1u64 << 53) as f64 {
        true => Ok(number as i64),
        false => Err(fault(format!("the step of '{name}' is {value}"))),
    }
}

/// Whether Python's class of this name has `maximize`, as most of torch's have. Classes of other packages, Muon and LBFGS
/// have not.
fn maximizes_in_python(optimizer: &str) -> bool {
    let others = ["Muon", "LBFGS", "Lion", "AdEMAMix", "AdamWScheduleFree", "SGDScheduleFree"];
    !others.contains(&optimizer)
}

/// A group as Python saves it, with all options that Python's optimizer looks for.
fn group_value(optimizer: &str, group: &SavedGroup, numbers: &[usize]) -> Value {
    let mut dict = Dict::new();
    for (option, value) in &group.options {
        match option.as_str() {
            "maximize" if !maximizes_in_python(optimizer) => {}
            "nesterov"
            | "amsgrad"
            | "centered"
            | "maximize"
            | "decoupled_weight_decay"
            | "train_mode" => {
                dict.insert(option, *value != 0.);
            }
            "alpha_warmup" | "beta3_warmup" if *value == 0. => dict.insert(option, Value::None),
            "ns_steps" | "k" | "warmup_steps" | "alpha_warmup" | "beta3_warmup" | "max_iter"
            | "history_size" => dict.insert(option, *value as i64),
            "max_eval" => {
                let default = group.options.get("max_iter").map_or(0, |most| *most as i64 * 5 / 4);
                dict.insert(option, if *value == 0. { default } else { *value as i64 });
            }
            "strong_wolfe" => {
                let on = *value != 0.;
                dict.insert("line_search_fn", if on { "strong_wolfe".into() } else { Value::None });
            }
            "match_rms_adamw" => {
                let name = if *value != 0. { "match_rms_adamw" } else { "original" };
                dict.insert("adjust_lr_fn", name);
            }
            option if pythons(option).1.is_some() => {}
            _ => dict.insert(option, *value),
        }
    }
    for (name, parts) in TUPLES {
        let values = parts.iter().map(|part| group.options.get(*part).map(|value| (part, *value)));
        let Some(values) = values.collect::<Option<Vec<_>>>() else { continue };
        if dict.get(name).is_some() {
            continue;
        }
        let value = |(part, value)| match (part, value) {
            (&"eps1", 0.) => Value::None,
            _ => Value::from(value),
        };
        dict.insert(name, Value::tuple(values.into_iter().map(value)));
    }
    let is_torchs = maximizes_in_python(optimizer);
    if is_torchs && optimizer != "SparseAdam" {
        dict.insert("differentiable", false);
        dict.insert("foreach", Value::None);
    }
    if optimizer.ends_with("ScheduleFree") {
        dict.insert("foreach", true);
        dict.insert("scheduled_lr", 0.);
    }
    if matches!(optimizer, "SGD" | "Adam" | "AdamW" | "Adagrad") {
        dict.insert("fused", Value::None);
    }
    if is_torchs && !matches!(optimizer, "SGD" | "Adagrad" | "Adafactor" | "SparseAdam") {
        dict.insert("capturable", false);
    }
    if matches!(optimizer, "Adam" | "AdamW") {
        dict.insert("decoupled_weight_decay", optimizer == "AdamW");
    }
    dict.insert("params", Value::list(numbers.iter().map(|number| *number as i64)));
    dict.into()
}
