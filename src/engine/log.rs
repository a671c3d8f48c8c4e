use std::collections::{BTreeMap, HashSet};
use std::path::PathBuf;

use serde_json::Value;

use super::Engine;
use super::handler::Names;
use crate::error::{Error, Result};
use crate::state::StateDict;

/// Something outside of the engine that grows while it runs, such as the file of a logger, and goes back with it.
///
/// A handler names its logs by [`Handler::logs`](super::Handler::logs). Before a checkpoint is written the engine asks
/// each for its place; when a run goes on from that checkpoint, the log goes back to that place, so that it has each
/// step once. A checkpoint without the place of a log, or with that of a log that is not here, fits all the same.
pub trait Log {
    /// What tells the log from others of the engine: the file or folder it writes to. Its last part is the log's name in
    /// checkpoints.
    fn path(&self) -> PathBuf;

    /// Puts all that was logged so far on the disk, and returns its place.
    ///
    /// # Errors
    /// The disk's.
    fn commit(&self) -> Result<Value>;

    /// Takes back what was logged after a place that [`commit`](Self::commit) returned, in this process or an earlier
    /// one. Returns why nothing was taken back where the place is not of this log.
    ///
    /// # Errors
    /// The disk's, or another process writes to the log.
    fn rewind(&self, place: &Value) -> Result<Option<String>>;
}

impl<'a, C, B, O> Engine<'a, C, B, O> {
    /// All logs that handlers write to.
    pub(crate) fn logs(&self) -> Vec<Box<dyn Log>> {
        let handlers = self.handlers.objects().into_iter().filter_map(|object| object.handler);
        handlers.flat_map(|handler| handler.logs()).collect()
    }

    /// The same, each once, by their names in checkpoints.
    fn named_logs(&self) -> BTreeMap<String, Box<dyn Log>> {
        let (mut paths, mut names) = (HashSet::new(), Names::default());
        let mut logs = BTreeMap::new();
        for log in self.logs() {
            let path = log.path();
            if paths.insert(path.clone()) {
                let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy();
                logs.insert(names.distinct(&name), log);
            }
        }
        logs
    }

    /// The places of all logs, after which nothing up to them can be lost; `None` where there is no log.
    pub(super) fn commit_logs(&self) -> Result<Option<StateDict>> {
        let mut places = StateDict::new();
        for (name, log) in self.named_logs() {
            places.set_value(&name, log.commit()?)?;
        }
        Ok((!places.values.is_empty()).then_some(places))
    }

    /// Takes back what was logged after a checkpoint, and tells which logs stay as they are.
    pub(super) fn rewind_logs(&self, places: &StateDict) -> Result<Vec<String>> {
        let mut left = vec![];
        for (name, log) in self.named_logs() {
            let Ok(place) = places.value::<Value>(&name) else { continue };
            let rewound = log.rewind(&place).map_err(|error| {
                Error::State(format!("log '{name}': {:#}", anyhow::Error::from(error)))
            })?;
            left.extend(rewound.map(|why| format!("log '{name}' stays as it is: {why}")));
        }
        Ok(left)
    }
}
