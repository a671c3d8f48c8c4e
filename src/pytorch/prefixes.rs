//! The prefixes that wrappers put before the names of a model's parameters.

use super::averages::COUNT;
use super::names::Names;
use super::weights::Weights;
use crate::error::Result;

/// `DataParallel`, `DistributedDataParallel` and `AveragedModel` put this before all names.
pub(super) const WRAPPED: &str = "module.";
/// `torch.compile` puts this before the names of what it compiled, which may be a part of the model.
const COMPILED: &str = "_orig_mod.";

/// Weights under the names that the model itself has, and what was taken off.
pub(super) fn without(mut weights: Weights) -> Result<(Weights, Vec<String>)> {
    let mut taken = vec![];
    loop {
        let names = weights.names();
        let is_wrapped = |name: &&str| name.starts_with(WRAPPED);
        let averaged = names.contains(&COUNT) && names.iter().any(is_wrapped);
        let rule = if names.iter().any(|name| is_compiled(name)) {
            taken.push(COMPILED.to_owned());
            Names::new().map(compiled)
        } else if averaged && names.iter().all(|name| *name == COUNT || is_wrapped(name)) {
            taken.push(COUNT.to_owned());
            Names::new().skip(COUNT)
        } else if !names.is_empty() && names.iter().all(is_wrapped) {
            taken.push(WRAPPED.to_owned());
            Names::new().strip_prefix(WRAPPED)
        } else {
            return Ok((weights, taken));
        };
        weights = weights.rename(&rule)?;
    }
}

fn is_compiled(name: &str) -> bool {
    name.starts_with(COMPILED) || name.contains(&format!(".{COMPILED}"))
}

fn compiled(name: &str) -> String {
    let name = name.replace(&format!(".{COMPILED}"), ".");
    name.strip_prefix(COMPILED).map(str::to_owned).unwrap_or(name)
}
