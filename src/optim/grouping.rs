//! Which variable belongs to which group.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use tch::nn::Variables;

use super::{listed, locked};
use crate::bridge::TensorId;
use crate::error::{Error, Result};
use crate::guard::guarded;
use crate::variables::{Variable, variables_in};

/// A group by the names of its variables.
pub(super) struct GroupRule {
    pub(super) name: String,
    pub(super) contains: Box<dyn Fn(&str) -> bool + Send + Sync>,
}

/// Names of the groups, and the rule that puts variables into them.
pub(super) enum Grouping {
    Rules(Vec<GroupRule>),
    /// Those of tch's `Path::set_group`, some of them with a name.
    Numbers(Vec<(usize, String)>),
}

impl Grouping {
    pub(super) fn rules(&self) -> &[GroupRule] {
        match self {
            Self::Rules(rules) => rules,
            Self::Numbers(_) => &[],
        }
    }

    /// Numbers that have a name.
    pub(super) fn numbers(&self) -> impl Iterator<Item = usize> {
        let names = match self {
            Self::Rules(_) => &[][..],
            Self::Numbers(names) => names,
        };
        names.iter().map(|(number, _)| *number)
    }

    pub(super) fn name(&self, index: usize) -> String {
        let name = match self {
            Self::Rules(rules) => rules.get(index).map(|rule| &rule.name),
            Self::Numbers(names) => names.iter().find(|(n, _)| *n == index).map(|(_, name)| name),
        };
        name.map_or_else(|| unnamed(index), Clone::clone)
    }

    /// Gives variables from that one on their group's number, until the answer is dropped. The rules
    /// are asked outside the store's lock. A variable that the store lists again is in one group.
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

    /// The first group by names without a variable.
    pub(super) fn empty_group(&self, grouped: &Grouped) -> Option<&str> {
        let variables = locked(&grouped.variables);
        let used = |index| variables.trainable_variables.iter().any(|v| v.group == index);
        let empty = self.rules().iter().enumerate().find(|(index, _)| !used(*index));
        empty.map(|(_, rule)| rule.name.as_str())
    }
}

/// Variables that have our numbers for their groups; dropped, they get their own back. Other
/// optimizers may use those, and tch reads a number only when it adds the variable.
pub(super) struct Grouped {
    variables: Arc<Mutex<Variables>>,
    range: Range<usize>,
    /// Their own numbers.
    old: Vec<usize>,
    /// For each that the store had listed before, its names.
    tied: Vec<String>,
}

impl Grouped {
    /// The first variable after them.
    pub(super) fn until(&self) -> usize {
        self.range.end
    }

    /// Tells, once they are in the optimizer, which ones the store lists more than once, as PyTorch does of
    /// a parameter that an optimizer is given twice.
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
        // The list may have been taken away in between (`VarStore::merge`).
        let Some(new) = variables.trainable_variables.get_mut(self.range.clone()) else { return };
        for (variable, old) in new.iter_mut().zip(&self.old) {
            variable.group = *old;
        }
    }
}

/// The name of a group that has none.
pub(super) fn unnamed(index: usize) -> String {
    format!("group_{index}")
}

fn groups_of(rules: &[GroupRule], variables: &[&Variable]) -> Result<Vec<usize>> {
    let mut found = Vec::with_capacity(variables.len());
    let mut homeless = vec![];
    for variable in variables {
        // The groups that contain it, each with the name by which it is there.
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
                    "parameter '{name}' is in two groups: '{}' and '{}'",
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
        "in no parameter group: {}; the groups are: {}",
        listed(&homeless),
        groups.join(", ")
    )))
}
