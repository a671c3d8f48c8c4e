//! The position of an engine, as ignite has it.

use serde_json::{Map, Value as Json};

use super::json::{dict, object};
use super::value::{Dict, Value};
use crate::engine::Engine;
use crate::error::{Error, Result};

/// Where a training run is.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Position {
    /// Iterations that are done.
    pub(super) iteration: Option<u64>,
    /// Epochs that are done.
    pub(super) epoch: Option<u64>,
    pub(super) epoch_length: Option<u64>,
    /// The further values of ignite's own state.
    pub(super) budget: Map<String, Json>,
}

impl Position {
    /// ignite's state of a trainer, if it is one.
    pub(super) fn of_ignite(value: &Value) -> Option<Self> {
        let state = object(value.as_dict()?).ok()?;
        let count = |key: &str| state.get(key).and_then(Json::as_u64);
        let (iteration, epoch) = (count("iteration"), count("epoch"));
        let is_one = state.contains_key("epoch_length")
            && (state.contains_key("max_epochs") || state.contains_key("max_iters"))
            && (iteration.is_some() || epoch.is_some());
        let budget = state.iter().filter(|(key, _)| key.starts_with("max_"));
        let budget = budget.map(|(key, value)| (key.clone(), value.clone())).collect();
        is_one.then(|| Self { iteration, epoch, epoch_length: count("epoch_length"), budget })
    }

    pub(super) fn load<C, B, O>(&self, engine: &mut Engine<'_, C, B, O>) -> Result<()> {
        let length = self.epoch_length.or(engine.state.epoch_length);
        let mut state = self.budget.clone();
        if state.is_empty() {
            state.insert("max_epochs".into(), Json::Null);
        }
        match (self.iteration, self.epoch) {
            (Some(iteration), _) => state.insert("iteration".into(), iteration.into()),
            (None, Some(epoch)) => state.insert("epoch".into(), epoch.into()),
            (None, None) => return Err(Error::State("the file has no position of a run".into())),
        };
        if length.is_none() && (self.iteration, self.epoch) != (Some(0), None) {
            return Err(Error::State(
                "the file does not say how many batches an epoch has: set engine.state.epoch_length before".into(),
            ));
        }
        state.insert("epoch_length".into(), length.into());
        engine.load_state_dict(&state)
    }
}

/// The position of an engine as ignite's trainer has it, for `trainer.load_state_dict()` and
/// `ignite.handlers.Checkpoint.load_objects`.
pub fn position_value<C, B, O>(engine: &Engine<'_, C, B, O>) -> Value {
    let state = Dict { entries: dict(&engine.state_dict()).entries, ..Dict::ordered() };
    state.into()
}
