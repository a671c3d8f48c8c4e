//! Where the loop of an engine is: what a checkpoint holds of it, and what this process knows besides.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::requests::Requests;
use super::{Event, Until};
use crate::data::{SamplePosition, Source};
use crate::state::StateDict;

/// What comes next.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Phase {
    #[default]
    Started,
    NextEpoch,
    EpochStarted,
    EpochBegun,
    GetBatch,
    Fetch,
    RestartData,
    BatchFetched,
    Step,
    IterationCompleted,
    EpochCompleted,
    EpochEnded,
    Terminate,
    Completed,
    /// COMPLETED was fired.
    Ended,
}

impl Phase {
    /// Whether a batch is under way, which has to be fetched again elsewhere.
    pub(super) fn has_batch(self) -> bool {
        matches!(self, Self::BatchFetched | Self::Step)
    }

    /// Whether an epoch is under way.
    pub(super) fn in_epoch(self) -> bool {
        use Phase::*;
        !matches!(self, Started | NextEpoch | EpochEnded | Terminate | Completed | Ended)
    }

    /// Whether the run has ended, but for its last events.
    pub(super) fn is_end(self) -> bool {
        matches!(self, Self::Terminate | Self::Completed | Self::Ended)
    }
}

/// How the last run was left.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum PreviousRun {
    /// There was none.
    #[default]
    Nothing,
    /// Finished, or ended by `terminate` or a limit.
    Ended,
    /// Suspended by `interrupt`, with its data.
    Suspended,
    /// By an error.
    Failed,
    /// Position set by `load_state_dict` (ignite's format: epoch and iteration only).
    Loaded,
    /// Position set by `restore`, from a checkpoint.
    Restored,
}

/// Where to position the data before this run's first fetch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum DataStart {
    /// At the start.
    Start,
    /// At the start of the pass after `Cursor::pass`.
    NextPass,
    /// Where an uninterrupted run would be at `state.iteration`.
    AtIteration,
    /// At `Cursor::pass` and `Cursor::fetched`.
    AtCursor,
}

/// Where the loop is. A checkpoint holds it as it is.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct Cursor {
    pub(super) phase: Phase,
    /// Iterations begun in this epoch.
    pub(super) counter: u64,
    /// Number of the walk over the data, from 0, and batches fetched in it.
    pub(super) pass: u64,
    pub(super) fetched: u64,
    /// The data was restarted and has given nothing since.
    pub(super) restarted: bool,
    /// The data gave nothing in a whole epoch.
    pub(super) exhausted: bool,
    /// The run ends before its budget in epochs is used up.
    pub(super) ended_early: bool,
    /// The phase that would have followed where the run was ended early. After a limit a restored run
    /// goes on there.
    pub(super) ended_at: Option<Phase>,
    /// Who ended the run by `terminate`, and where; `None` where a limit or a budget did.
    pub(super) terminated_by: Option<String>,
    /// Set where the data gave the epoch its length, not the program.
    pub(super) length: Option<DataLength>,
    /// The handler of the last event from which on its handlers are to be called when a suspended run
    /// goes on.
    pub(super) again: Option<String>,
}

/// An epoch length that is one pass over the data.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(super) struct DataLength {
    /// The length of whole epochs.
    pub(super) pass: u64,
    /// The length of this epoch: another one where the data changed within it. The program has set the
    /// length where `state.epoch_length` is not this.
    pub(super) epoch: u64,
    /// Batches that all passes had so far, where only walking over them tells; `None` where they
    /// differed, or the data knows.
    pub(super) walked: Option<u64>,
}

impl Cursor {
    /// The phase in which a run from a checkpoint goes on, if nothing but a limit ended the run.
    pub(super) fn resumes_at(&self) -> Phase {
        match self.ended_at {
            Some(phase) if self.phase.is_end() && self.terminated_by.is_none() => phase,
            _ => self.phase,
        }
    }

    /// Whether the last batch that was fetched is needed again where a run goes on from a checkpoint.
    pub(super) fn needs_batch(&self) -> bool {
        match self.ended_at {
            Some(phase) if self.phase.is_end() => phase.has_batch(),
            _ => self.phase.has_batch(),
        }
    }
}

/// What the data said when a run left it.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct LastData {
    /// The place in the pass in samples, where the data counts them; otherwise `Cursor::fetched` tells.
    pub(super) place: Option<SamplePosition>,
    /// Batches in a pass.
    pub(super) batches: Option<u64>,
    /// The settings of the data, to warn about changes.
    pub(super) settings: Map<String, Value>,
}

impl LastData {
    /// The place is before the last batch with `again`, else after it.
    pub(super) fn of<B>(data: &(dyn Source<B> + '_), again: bool) -> Self {
        Self {
            place: data.sample_position(again),
            batches: data.batches(),
            settings: data.settings(),
        }
    }
}

/// Where the loop is, beyond what `State` shows.
#[derive(Debug)]
pub(super) struct Position {
    pub(super) cursor: Cursor,
    pub(super) previous: PreviousRun,
    /// The run had a budget in epochs or iterations.
    pub(super) budgeted: bool,
    /// `None` once the data has been positioned.
    pub(super) data_start: Option<DataStart>,
    /// The batch under way has yet to be fetched again.
    pub(super) refetch: bool,
    /// What the data said when the last run left it, or the restored state was saved.
    pub(super) last_data: LastData,
    /// The random number generators as they were before the pass under way was begun, where the data
    /// may draw its order from them.
    pub(super) before_pass: Option<StateDict>,
    /// The data gives batches by events; false without data.
    pub(super) fetches: bool,
    /// The data is not known to be what the epoch length was taken from.
    pub(super) other_data: bool,
    /// The batch that the data was sent to in mid pass by this run; there may be fewer.
    pub(super) skipped_to: Option<u64>,
    /// Some rank has reached a limit of samples or time.
    pub(super) limit: bool,
    /// COMPLETED is being fired.
    pub(super) completing: bool,
    /// The signal that the run is interrupted for, if any.
    pub(super) signal: Option<i32>,
    /// The last event that was fired.
    pub(super) event: Event,
    pub(super) until: Until,
    pub(super) deadline: Option<Instant>,
    pub(super) run_start: Option<Instant>,
    /// When this run began the epoch, or went on in it.
    pub(super) epoch_start: Option<Instant>,
    /// How long earlier runs of this process were in this epoch.
    pub(super) epoch_before: Duration,
    pub(super) warnings: Vec<String>,
    /// Warnings for the next run.
    pub(super) notes: Vec<String>,
}

impl Default for Position {
    fn default() -> Self {
        Self {
            cursor: Cursor::default(),
            previous: PreviousRun::Nothing,
            budgeted: false,
            data_start: Some(DataStart::Start),
            refetch: false,
            last_data: LastData::default(),
            before_pass: None,
            fetches: true,
            other_data: false,
            skipped_to: None,
            limit: false,
            completing: false,
            signal: None,
            event: Event::Started,
            until: Until::default(),
            deadline: None,
            run_start: None,
            epoch_start: None,
            epoch_before: Duration::ZERO,
            warnings: vec![],
            notes: vec![],
        }
    }
}

impl Position {
    pub(super) fn loaded(budgeted: bool) -> Self {
        Self {
            previous: PreviousRun::Loaded,
            data_start: Some(DataStart::AtIteration),
            budgeted,
            ..Self::default()
        }
    }

    pub(super) fn save<B>(&self, data: Option<&(dyn Source<B> + '_)>) -> SavedPosition {
        let mut cursor = self.cursor.clone();
        if self.completing {
            cursor.phase = Phase::Ended;
        }
        let mut last_data = match data {
            Some(data) => LastData::of(data, cursor.needs_batch() && !self.refetch),
            None => self.last_data.clone(),
        };
        if self.last_data.place.is_some() {
            // The data has not been put there yet.
            last_data.place.clone_from(&self.last_data.place);
        }
        if self.refetch {
            // Counted as fetched: it is, but for an error.
            cursor.fetched += 1;
        }
        // In the same process the data is where it is.
        SavedPosition {
            cursor,
            data_start: self.data_start.unwrap_or(DataStart::AtCursor),
            last_data,
        }
    }

    /// Whether the pass under way has to be begun again where a run goes on from a checkpoint.
    pub(super) fn is_within_pass(&self) -> bool {
        matches!(self.data_start, None | Some(DataStart::AtCursor))
    }

    pub(super) fn is_at_start(&self) -> bool {
        self.cursor.phase == Phase::Started
    }

    /// The requests that a checkpoint holds.
    pub(super) fn saved_requests(&self, requests: &Requests) -> Requests {
        match self.completing || self.cursor.phase.is_end() {
            true => requests.after_the_end(),
            false => requests.clone(),
        }
    }

    /// What the user has to know of a restored run that `terminate` ended.
    pub(super) fn ended_for_good(&self, requests: &Requests) -> Option<String> {
        let by = match &self.cursor.terminated_by {
            Some(by) if self.cursor.phase.is_end() => by.clone(),
            _ if requests.terminate => self.terminator(requests),
            _ => return None,
        };
        Some(format!(
            "{by} had ended the run for good when this state was saved: the next run does no iterations; call resume_terminated() before it to go on all the same"
        ))
    }

    pub(super) fn terminator(&self, requests: &Requests) -> String {
        requests.terminated_by.clone().unwrap_or_else(|| format!("terminate() at {}", self.event))
    }

    /// Goes on with what follows, though `terminate` ended the run.
    pub(super) fn forget_terminate(&mut self) {
        self.cursor.terminated_by = None;
    }

    /// The data was replaced within the run.
    pub(super) fn replace_data(&mut self, fetches: bool) {
        (self.fetches, self.refetch, self.skipped_to) = (fetches, false, None);
        self.last_data.place = None;
        // The place that `load_state_dict` asks for is one in any data.
        self.data_start = self.data_start.filter(|entry| *entry == DataStart::AtIteration);
    }

    /// Adds a warning for the next run.
    pub(super) fn note(&mut self, text: String) {
        self.notes.push(text);
    }

    /// Counts this run out of the time in the epoch that is under way.
    pub(super) fn pause_epoch(&mut self) {
        if let Some(start) = self.epoch_start.take() {
            self.epoch_before += start.elapsed();
        }
    }
}

/// A [`Position`] for another process.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct SavedPosition {
    pub(super) cursor: Cursor,
    pub(super) data_start: DataStart,
    pub(super) last_data: LastData,
}

impl SavedPosition {
    pub(super) fn counts(&self) -> impl Iterator<Item = u64> {
        let Cursor { counter, pass, fetched, length, .. } = self.cursor;
        let samples = self.last_data.place.as_ref().map(|place| place.samples);
        let length = length.map(|length| [length.pass, length.epoch]);
        [counter, pass, fetched].into_iter().chain(samples).chain(length.into_iter().flatten())
    }

    /// Counts the samples of all ranks, which are the same with any number of them.
    pub(super) fn into_global(mut self, ranks: u64) -> Self {
        if let Some(place) = &mut self.last_data.place {
            place.samples = place.samples.saturating_mul(ranks);
        }
        self
    }

    /// The other way round. Where the ranks cannot share the samples, a few come again.
    pub(super) fn into_local(mut self, ranks: u64) -> Self {
        if let Some(place) = &mut self.last_data.place {
            place.samples /= ranks;
        }
        self
    }

    pub(super) fn restore(self, event: Event, budgeted: bool) -> Position {
        Position {
            cursor: self.cursor,
            previous: PreviousRun::Restored,
            budgeted,
            data_start: Some(self.data_start),
            last_data: self.last_data,
            event,
            ..Position::default()
        }
    }
}
