//! Assigns the variables of a store to parameter groups.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use tch::nn::Variables;

use super::{listed, locked};
use crate::bridge::TensorId;
use crate::error::{Error, Result};
use crate::guard::guarded;
use crate::variables::{Variable, variables_in};

/// A group that is defined by the names of its variables.
pub(super) struct GroupRule {
    pub(super) name: String,
    pub(super) contains: Box<dyn Fn(&str) -> bool + Send + Sync>,
}

/// The names of the groups, and the way in which variables get into them.
pub(super) enum Grouping {
    /// A variable is in the group whose rule takes its name.
    Rules(Vec<GroupRule>),
    /// A variable is in the group whose number tch's `Path::set_group` gave it. Some numbers have a name.
    Numbers(Vec<(usize, String)>),
}

impl Grouping {
    pub(super) fn rules(&self) -> &[GroupRule] {
        match self {
            Self::Rules(rules) => rules,
            Self::Numbers(_) => &[],
        }
    }

    /// The group numbers that have a name.
    pub(super) fn numbers(&self) -> impl Iterator<Item = usize> {
        let names = match self {
            Self::Rules(_) => &[][..],
            Self::Numbers(names) => names,
        };
        names.iter().map(|(number, _)| *number)
    }

    /// The name of a group: `"group_<number>"` if it was given none.
    pub(super) fn name(&self, index: usize) -> String {
        let name = match self {
            Self::Rules(rules) => rules.get(index).map(|rule| &rule.name),
            Self::Numbers(names) => names.iter().find(|(n, _)| *n == index).map(|(_, name)| name),
        };
        name.map_or_else(|| unnamed(index), Clone::clone)
    }

    /// Sets the group numbers of the variables from index `from` on, until the returned value is dropped. The
    /// rules, which are user code, run without the store's lock. A variable that the store lists again must be
    /// in the same group.
    pub(super) fn group(&self, variables: &Arc<Mutex<Variables>>, from: usize) -> Result<Grouped> {
        let (listed, named) = {
            let variables = locked(variables);
            let listed = variables.trainable_variables.iter();
            let listed: Vec<_> = listed.map(|v| (TensorId::of(&v.tensor), v.group)).collect();
            (listed, variables_in(&variables))
        };
        let (until, from) = (listed.len(), from.min(listed.len()));
        let named: HashMap<_, _> = named.iter().map(|v| (TensorId::of(&v.tensor), v)).collect();
        let mut first_groups = HashMap::new();
        let mut tied = vec![];
        for (index, (id, group)) in listed.iter().enumerate() {
            let Some(first) = first_groups.insert(*id, *group) else { continue };
            let Some(variable) = named.get(id).filter(|_| index >= from) else { continue };
            tied.push(quoted(variable));
            if matches!(self, Self::Numbers(_)) && first != *group {
                return Err(Error::invalid(format!(
                    "{} are names of one parameter, which is in two groups: '{}' and '{}'; put both into one",
                    quoted(variable),
                    self.name(first),
                    self.name(*group)
                )));
            }
        }
        let numbers = match self {
            Self::Rules(rules) => {
                let new: Vec<_> =
                    listed[from..].iter().filter_map(|(id, _)| named.get(id).copied()).collect();
                groups_of(rules, &new)?
            }
            Self::Numbers(_) => vec![],
        };
        let variables = variables.clone();
        let mut grouped = Grouped { variables, range: from..until, old: vec![], tied };
        let mut variables = locked(&grouped.variables);
        if let Some(new) = variables.trainable_variables.get_mut(from..until) {
            for (variable, number) in new.iter_mut().zip(numbers) {
                grouped.old.push(std::mem::replace(&mut variable.group, number));
            }
        }
        drop(variables);
        Ok(grouped)
    }

    /// The first group with a rule that has no variable.
    pub(super) fn empty_group(&self, grouped: &Grouped) -> Option<&str> {
        let variables = locked(&grouped.variables);
        let used = |index| variables.trainable_variables.iter().any(|v| v.group == index);
        let empty = self.rules().iter().enumerate().find(|(index, _)| !used(*index));
        empty.map(|(_, rule)| rule.name.as_str())
    }
}

/// A range of the store's variables that have our group numbers. When this is dropped, the variables get their own
/// numbers back, because other optimizers may use these. tch reads a number only when it adds the variable.
pub(super) struct Grouped {
    variables: Arc<Mutex<Variables>>,
    range: Range<usize>,
    /// The variables' own numbers.
    old: Vec<usize>,
    /// The names of each variable that the store had listed before under another name.
    tied: Vec<String>,
}

impl Grouped {
    /// The index of the first variable after the range.
    pub(super) fn until(&self) -> usize {
        self.range.end
    }

    /// Warns about variables that the store lists more than once, as PyTorch warns about a parameter that an optimizer
    /// is given twice.
    pub(super) fn warn_of_tied(&self) {
        if !self.tied.is_empty() {
            crate::bridge::warn_once(&format!(
                "the store lists a tensor more than once as a parameter ({}); the optimizer has it once. Add its second name with trainable = false",
                listed(&self.tied)
            ));
        }
    }
}

fn quoted(variable: &Variable) -> String {
    let names: Vec<_> = variable.names().map(|name| format!("'{name}'")).collect();
    names.join(" and ")
}

impl Drop for Grouped {
    fn drop(&mut self) {
        let mut variables = locked(&self.variables);
        // `VarStore::merge` may have emptied the list in between.
        let Some(new) = variables.trainable_variables.get_mut(self.range.clone()) else { return };
        for (variable, old) in new.iter_mut().zip(&self.old) {
            variable.group = *old;
        }
    }
}

/// The name of a group that was given none.
pub(super) fn unnamed(index: usize) -> String {
    format!("group_{index}")
}

/// The group of each variable by the rules; an error if a variable is in no group or in two.
fn groups_of(rules: &[GroupRule], variables: &[&Variable]) -> Result<Vec<usize>> {
    let mut found = Vec::with_capacity(variables.len());
    let mut homeless = vec![];
    for variable in variables {
        // The groups that contain the variable, each with the name that its rule took.
        let mut fitting: Vec<(usize, &str)> = vec![];
        for (index, rule) in rules.iter().enumerate() {
            for name in variable.names() {
                let contains = guarded(|| Ok((rule.contains)(name))).map_err(|panic| {
                    Error::invalid(format!(
                        "the rule of group '{}' {panic} (for '{name}')",
                        rule.name
                    ))
                })?;
                if contains {
                    fitting.push((index, name));
                    break;
                }
            }
        }
        match fitting[..] {
            [(index, _)] => found.push(index),
            [] => homeless.push(quoted(variable)),
            [(a, name), (b, other_name), ..] if name == other_name => {
                return Err(Error::invalid(format!(
                    "parameter '{name}' is in two groups: '{}' and '{}'; let only one of their conditions hold for it",
                    rules[a].name, rules[b].name
                )));
            }
            [(a, name), (b, other_name), ..] => {
                return Err(Error::invalid(format!(
                    "'{name}' and '{other_name}' are names of one parameter, which is in two groups: '{}' and '{}'; put both into one",
                    rules[a].name, rules[b].name
                )));
            }
        }
    }
    if homeless.is_empty() {
        return Ok(found);
    }
    let groups: Vec<_> = rules.iter().map(|rule| rule.name.as_str()).collect();
    Err(Error::invalid(format!(
        "in no parameter group: {}; the groups are: {}. Each parameter has to be in one: widen a condition, or add a group",
        listed(&homeless),
        groups.join(", ")
    )))
}
