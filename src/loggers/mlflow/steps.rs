use std::collections::BTreeMap;

use serde_json::{Map, Value};

/// The steps of each metric that the MLflow run has. The server cannot remove them, so a run that is resumed must not
/// send them again.
#[derive(Default)]
pub(super) struct Steps {
    /// The largest step of each metric.
    last: BTreeMap<String, u64>,
    /// The steps that a resumed run goes over again: those after the first number (all if it is `None`), up to the
    /// second.
    again: BTreeMap<String, (Option<u64>, u64)>,
}

impl Steps {
    /// The steps of a run, from the server's answer with the last value of each metric.
    pub(super) fn of(run: &Value) -> Self {
        let metrics = run["data"]["metrics"].as_array();
        let last = metrics.into_iter().flatten().filter_map(|metric| {
            let step = &metric["step"];
            let step = step.as_u64().or_else(|| step.as_str()?.parse().ok())?;
            Some((metric["key"].as_str()?.to_owned(), step))
        });
        Self { last: last.collect(), again: BTreeMap::new() }
    }

    pub(super) fn last(&self) -> &BTreeMap<String, u64> {
        &self.last
    }

    /// Whether a value is to be sent, because the server does not have this step of the metric. Notes the step.
    pub(super) fn takes(&mut self, name: &str, step: u64) -> bool {
        let is_there = |(after, last): &(Option<u64>, u64)| *after < Some(step) && step <= *last;
        if self.again.get(name).is_some_and(is_there) {
            return false;
        }
        match self.last.get_mut(name) {
            Some(last) => *last = step.max(*last),
            None => drop(self.last.insert(name.to_owned(), step)),
        }
        true
    }

    /// Goes back to a checkpoint that noted these last steps; a checkpoint of an older version noted none, and
    /// then its steps are sent again. Returns whether there are steps after the checkpoint.
    pub(super) fn rewind(&mut self, then: Option<&Map<String, Value>>) -> bool {
        let Some(then) = then else { return false };
        let after = |name: &str| then.get(name).and_then(Value::as_u64);
        let again = self.last.iter().map(|(name, last)| (name.clone(), (after(name), *last)));
        self.again = again.filter(|(_, (after, last))| *after < Some(*last)).collect();
        !self.again.is_empty()
    }
}
