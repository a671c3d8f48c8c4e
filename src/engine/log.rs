use std::collections::{BTreeMap, HashSet};
use std::path::PathBuf;
use std::rc::Rc;

use serde_json::Value;

use super::Engine;
use super::handler::Names;
use crate::error::{Error, Result};
use crate::guard::guarded_state;
use crate::state::StateDict;

/// An output outside of the engine that grows during a run, such as the file of a logger, and is rewound when a run is
/// resumed.
///
/// A handler names its logs by [`HandlerSpec::logs`](super::HandlerSpec::logs). Before a checkpoint is written the engine asks
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
    pub(crate) fn logs(&self) -> Vec<Rc<dyn Log>> {
        self.handlers.logs().cloned().collect()
    }

    /// All logs, each once, by their names in checkpoints.
    fn named_logs(&self) -> BTreeMap<String, Rc<dyn Log>> {
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

    /// Commits all logs and returns their places; nothing up to these can be lost. A log that cannot be committed has no
    /// place, and its error is returned.
    pub(super) fn commit_logs(&self) -> (StateDict, Result<()>) {
        let mut places = StateDict::new();
        let mut committed = Ok(());
        for (name, log) in self.named_logs() {
            let place = guarded_state(|| log.commit());
            match place.and_then(|place| places.set_value(&name, place)) {
                Ok(()) => {}
                Err(error) => committed = committed.and(Err(of_log(&name, error))),
            }
        }
        (places, committed)
    }

    /// Rewinds the logs to the places in a checkpoint. Returns a line for each log that could not be rewound.
    pub(super) fn rewind_logs(&self, places: &StateDict) -> Result<Vec<String>> {
        let mut left = vec![];
        for (name, log) in self.named_logs() {
            let Ok(place) = places.value::<Value>(&name) else { continue };
            let rewound = guarded_state(|| log.rewind(&place));
            let rewound = rewound.map_err(|error| of_log(&name, error))?;
            left.extend(rewound.map(|why| format!("log '{name}' stays as it is: {why}")));
        }
        Ok(left)
    }
}

fn of_log(name: &str, error: Error) -> Error {
    Error::State(format!("log '{name}': {error}"))
}
