//! A state as values in one JSON tree, and a flat list of tensors under distinct names.

use std::collections::{BTreeMap, HashMap};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use tch::Tensor;

use super::{StateDict, strides};
use crate::bridge::TensorId;

/// The one name that a tensor in a safetensors file cannot have.
pub(crate) const METADATA: &str = "__metadata__";

/// Values and parts of a [`StateDict`], and the names of its tensors.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Tree {
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub(crate) values: Map<String, Value>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) tensors: Vec<String>,
    /// Names in the file that are not [`joined`] ones, because these were taken.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) renamed: BTreeMap<String, String>,
    /// Of tensors that are dense in memory, but not in the order of the file: channels last.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) strides: BTreeMap<String, Vec<i64>>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) parts: BTreeMap<String, Tree>,
}

impl Tree {
    pub(crate) fn name_in_file(&self, prefix: &str, name: &str) -> String {
        self.renamed.get(name).cloned().unwrap_or_else(|| joined(prefix, name))
    }
}

/// The name of a tensor in the file: the names of its part and itself.
pub(crate) fn joined(prefix: &str, name: &str) -> String {
    if prefix.is_empty() { name.into() } else { format!("{prefix}/{name}") }
}

/// Tensors by their names in the file.
#[derive(Default)]
pub(crate) struct Named<'s> {
    pub(crate) tensors: BTreeMap<String, &'s Tensor>,
    /// Other names of some of them, each with the name that the tensor is written under.
    pub(crate) tied: BTreeMap<String, String>,
}

impl<'s> Named<'s> {
    /// Adds a part, and tells by which names its tensors are in the file.
    pub(crate) fn add(&mut self, prefix: &str, state: &'s StateDict) -> Tree {
        let mut tree = Tree { values: state.values.clone(), ..Tree::default() };
        let mut written: HashMap<TensorId, String> = HashMap::new();
        for (name, tensor) in &state.tensors {
            let mut in_file = joined(prefix, name);
            while in_file == METADATA
                || self.tensors.contains_key(&in_file)
                || self.tied.contains_key(&in_file)
            {
                in_file.push('\'');
                tree.renamed.insert(name.clone(), in_file.clone());
            }
            match written.get(&TensorId::of(tensor)).filter(|_| can_be_key(&in_file)) {
                Some(first) => {
                    self.tied.insert(in_file, first.clone());
                }
                None => {
                    written.insert(TensorId::of(tensor), in_file.clone());
                    self.tensors.insert(in_file, tensor);
                }
            }
            tree.tensors.push(name.clone());
            if let Some(strides) = strides::to_note(tensor) {
                tree.strides.insert(name.clone(), strides);
            }
        }
        for (name, part) in &state.parts {
            tree.parts.insert(name.clone(), self.add(&joined(prefix, name), part));
        }
        tree
    }
}

/// Whether a tensor's name can stand in the metadata without being taken for something else.
pub(crate) fn can_be_key(name: &str) -> bool {
    const KEYS: [&str; 6] = ["crc32c", "format", "kept", "state", "tch-ignite", "written"];
    !KEYS.contains(&name) && !name.contains('"')
}

/// A state as values, in JSON, and a list of tensors: for what is sent and not written.
pub(crate) fn to_parts(state: &StateDict) -> serde_json::Result<(String, Vec<(String, &Tensor)>)> {
    let mut named = Named::default();
    let values = serde_json::to_string(&named.add("", state))?;
    let Named { mut tensors, tied } = named;
    for (name, first) in tied {
        if let Some(tensor) = tensors.get(&first).copied() {
            tensors.insert(name, tensor);
        }
    }
    Ok((values, tensors.into_iter().collect()))
}

/// What [`to_parts`] took apart.
pub(crate) fn from_parts(
    values: &str,
    tensors: impl IntoIterator<Item = (String, Tensor)>,
) -> Result<StateDict, String> {
    let tree: Tree = serde_json::from_str(values).map_err(|error| error.to_string())?;
    assembled(&tree, "", &mut tensors.into_iter().collect())
}

pub(crate) fn assembled(
    tree: &Tree,
    prefix: &str,
    tensors: &mut BTreeMap<String, Tensor>,
) -> Result<StateDict, String> {
    let mut state = StateDict { values: tree.values.clone(), ..StateDict::default() };
    // What lies in another order is a copy: one for all names of a tensor.
    let mut copies: HashMap<TensorId, Tensor> = HashMap::new();
    for name in &tree.tensors {
        let in_file = tree.name_in_file(prefix, name);
        let tensor = tensors.remove(&in_file).ok_or(format!("tensor '{in_file}' is missing"))?;
        let tensor = match (tree.strides.get(name), copies.get(&TensorId::of(&tensor))) {
            (None, _) => tensor,
            (Some(strides), Some(copy)) if copy.stride() == *strides => copy.shallow_clone(),
            (Some(strides), _) => {
                let copy = strides::with(&tensor, strides)
                    .map_err(|error| format!("tensor '{in_file}': {error}"))?;
                copies.insert(TensorId::of(&tensor), copy.shallow_clone());
                copy
            }
        };
        state.tensors.insert(name.clone(), tensor);
    }
    for (name, part) in &tree.parts {
        state.parts.insert(name.clone(), assembled(part, &joined(prefix, name), tensors)?);
    }
    Ok(state)
}
