use std::collections::{BTreeMap, HashSet};
use std::path::PathBuf;

use serde_json::Value;

use super::Engine;
use super::handler::Names;
use crate::error::{Error, Result};
use crate::state::StateDict;

/// An output outside of the engine that grows during a run, such as the file of a logger, and is rewound when a run is
/// resumed.
///
/// A handler names its logs by [`Handler::logs`](super::Handler::logs). Before a checkpoint is written the engine asks
/// each log for its place; when a run goes on from that checkpoint, each log goes back to its place, so that it has
/// every step once. A checkpoint that lacks the place of a log, or has the place of a log that is not here, fits all
/// the same.
pub trait Log {
    /// The file or folder that the log writes to, which tells it from other logs of the engine. The last component is
    /// the log's name in checkpoints.
    fn path(&self) -> PathBuf;

    /// Writes everything that was logged so far to the disk, and returns the place of its end. Costs a sync.
    ///
    /// # Errors
    /// The disk fails.
    fn commit(&self) -> Result<Value>;

    /// Removes what was logged after a place that [`commit`](Self::commit) returned, in this process or an earlier one.
    /// Where the place does not belong to this log, nothing is removed and the reason is returned.
    ///
    /// # Errors
    /// The disk fails, or another process writes to the log.
    fn rewind(&self, place: &Value) -> Result<Option<String>>;
}

impl<'a, C, B, O> Engine<'a, C, B, O> {
    /// All logs that handlers write to, as often as handlers name them.
    pub(crate) fn logs(&self) -> Vec<Box<dyn Log>> {
        let handlers = self.handlers.objects().into_iter().filter_map(|object| object.handler);
        handlers.flat_map(|handler| handler.logs()).collect()
    }

    /// All logs, each once, by their names in checkpoints.
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

    /// Commits all logs and returns their places; nothing up to these can be lost. `None` where there is no log.
    pub(super) fn commit_logs(&self) -> Result<Option<StateDict>> {
        let mut places = StateDict::new();
        for (name, log) in self.named_logs() {
            places.set_value(&name, log.commit()?)?;
        }
        Ok((!places.values.is_empty()).then_some(places))
    }

    /// Rewinds the logs to the places in a checkpoint. Returns a line for each log that could not be rewound.
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
