//! Which variable belongs to which group.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use tch::nn::Variables;

use super::{listed, locked};
use crate::bridge::TensorId;
use crate::engine::guarded;
use crate::{Error, Result};

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
    /// are asked outside the store's lock.
    pub(super) fn group(&self, variables: &Arc<Mutex<Variables>>, from: usize) -> Result<Grouped> {
        let names = trainable_names(&locked(variables), from);
        let until = from + names.len();
        let numbers = match self {
            Self::Rules(rules) => groups_of(rules, &names)?,
            Self::Numbers(_) => vec![],
        };
        let mut grouped = Grouped { variables: variables.clone(), range: from..until, old: vec![] };
        let mut variables = locked(variables);
        for (variable, number) in variables.trainable_variables[from..].iter_mut().zip(numbers) {
            grouped.old.push(std::mem::replace(&mut variable.group, number));
        }
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
}

impl Grouped {
    /// The first variable after them.
    pub(super) fn until(&self) -> usize {
        self.range.end
    }
}

impl Drop for Grouped {
    fn drop(&mut self) {
        let mut variables = locked(&self.variables);
        for (variable, old) in
            variables.trainable_variables[self.range.clone()].iter_mut().zip(&self.old)
        {
            variable.group = *old;
        }
    }
}

/// The name of a group that has none.
pub(super) fn unnamed(index: usize) -> String {
    format!("group_{index}")
}

fn trainable_names(variables: &Variables, from: usize) -> Vec<String> {
    let names: HashMap<_, _> =
        variables.named_variables.iter().map(|(name, t)| (TensorId::of(t), name)).collect();
    let name = |id| names.get(&id).map_or_else(String::new, |name| name.to_string());
    variables.trainable_variables[from..].iter().map(|v| name(TensorId::of(&v.tensor))).collect()
}

fn groups_of(rules: &[GroupRule], names: &[String]) -> Result<Vec<usize>> {
    let mut found = Vec::with_capacity(names.len());
    let mut homeless = vec![];
    for name in names {
        let mut fitting = vec![];
        for (index, rule) in rules.iter().enumerate() {
            let contains = guarded(|| Ok((rule.contains)(name))).map_err(|panic| {
                Error::invalid(format!("the rule of group '{}' {panic} (for '{name}')", rule.name))
            })?;
            if contains {
                fitting.push(index);
            }
        }
        match fitting[..] {
            [index] => found.push(index),
            [] => homeless.push(format!("'{name}'")),
            [a, b, ..] => {
                return Err(Error::invalid(format!(
                    "parameter '{name}' is in two groups: '{}' and '{}'",
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
