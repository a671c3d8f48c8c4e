//! The position of an engine's loop: the part that a checkpoint holds, and what only this process knows.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::requests::Requests;
use super::{Event, Until};
use crate::data::{SamplePosition, Source};
use crate::state::StateDict;

/// The next thing that the loop does.
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
    /// COMPLETED was fired (or left out); nothing follows.
    Ended,
}

impl Phase {
    /// Whether a batch is under way, which another process has to fetch again.
    pub(super) fn has_batch(self) -> bool {
        matches!(self, Self::BatchFetched | Self::Step)
    }

    /// Whether an epoch is under way.
    pub(super) fn in_epoch(self) -> bool {
        use Phase::*;
        !matches!(self, Started | NextEpoch | EpochEnded | Terminate | Completed | Ended)
    }

    /// Whether the run has ended, except for its last events.
    pub(super) fn is_end(self) -> bool {
        matches!(self, Self::Terminate | Self::Completed | Self::Ended)
    }
}

/// How the last run ended.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum PreviousRun {
    /// There was no run, or it was reset.
    #[default]
    Nothing,
    /// The run finished, or was ended by `terminate` or a limit.
    Ended,
    /// The run was suspended by `interrupt`, and keeps its data.
    Suspended,
    /// The run ended with an error.
    Failed,
    /// The position was set by `load_state_dict` (ignite's format: epoch and iteration only).
    Loaded,
    /// The position was set by `restore`, from a checkpoint.
    Restored,
}

/// Where to position the data before this run's first fetch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum DataStart {
    /// At the start of the first pass.
    Start,
    /// At the start of the pass after `Cursor::pass`.
    NextPass,
    /// Where an uninterrupted run would be at `state.iteration`.
    AtIteration,
    /// At `Cursor::pass` and `Cursor::fetched`.
    AtCursor,
}

/// The position of the loop, in the form in which a checkpoint holds it.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct Cursor {
    pub(super) phase: Phase,
    /// Iterations begun in this epoch.
    pub(super) counter: u64,
    /// Number of the pass over the data, from 0, and number of batches fetched in that pass.
    pub(super) pass: u64,
    pub(super) fetched: u64,
    /// The data was restarted and has given no batch since.
    pub(super) restarted: bool,
    /// The data gave no batch in a whole epoch.
    pub(super) exhausted: bool,
    /// Whether the run was left by `terminate`, or in mid epoch by a limit or the budget in iterations. The
    /// result is then `Stop::Terminated`.
    pub(super) ended_early: bool,
    /// The phase that would have followed where the run was ended early. A run that is restored after a limit goes on
    /// there.
    pub(super) ended_at: Option<Phase>,
    /// Who ended the run by `terminate`, and at which event; `None` where a limit or a budget ended it.
    pub(super) terminated_by: Option<String>,
    /// Set where the data gave the epoch its length, not the program.
    pub(super) length: Option<DataLength>,
    /// The first call of the last event that is to be made when a suspended run goes on; `None` where all were made.
    pub(super) again: Option<CallAgain>,
}

/// A call of a handler, in a form that holds in another process.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct CallAgain {
    pub(super) handler: String,
    /// The number of the handler's registration for the event, from 0: `every(2) | every(3)` makes two.
    pub(super) registration: usize,
}

/// The epoch length, where it is one pass over the data.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(super) struct DataLength {
    /// The length of whole epochs.
    pub(super) pass: u64,
    /// The length of this epoch, which differs from `pass` where the data changed within the epoch. Where
    /// `state.epoch_length` has another value, the program has set it.
    pub(super) epoch: u64,
    /// Number of batches that every pass had so far, where only walking over the data tells; `None` where passes
    /// differed, or the data knows its length.
    pub(super) walked: Option<u64>,
}

impl Cursor {
    /// The phase in which a run from a checkpoint goes on. After a limit it is the phase that would have followed; a
    /// run that `terminate` ended stays ended.
    pub(super) fn resumes_at(&self) -> Phase {
        match self.ended_at {
            Some(phase) if self.phase.is_end() && self.terminated_by.is_none() => phase,
            _ => self.phase,
        }
    }

    /// Whether a run that goes on from a checkpoint has to fetch the last batch again.
    pub(super) fn needs_batch(&self) -> bool {
        match self.ended_at {
            Some(phase) if self.phase.is_end() => phase.has_batch(),
            _ => self.phase.has_batch(),
        }
    }
}

/// The data's answers about itself when the last run ended, or when the restored state was saved.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct LastData {
    /// The position in the pass in samples, where the data counts samples; otherwise `Cursor::fetched` is the position.
    pub(super) place: Option<SamplePosition>,
    /// Number of batches in a pass, if known.
    pub(super) batches: Option<u64>,
    /// The settings of the data, to warn about changes.
    pub(super) settings: Map<String, Value>,
}

impl LastData {
    /// Asks the data. The position is before the last batch if `again` is true, otherwise after it.
    pub(super) fn of<B>(data: &(dyn Source<B> + '_), again: bool) -> Self {
        Self {
            place: data.sample_position(again),
            batches: data.batches(),
            settings: data.settings(),
        }
    }
}

/// The position of the loop, and what `State` does not show of the run.
#[derive(Debug)]
pub(super) struct Position {
    pub(super) cursor: Cursor,
    pub(super) previous: PreviousRun,
    /// Whether the run, or the state that was loaded, has a budget in epochs or iterations.
    pub(super) budgeted: bool,
    /// Where to position the data; `None` once that was done.
    pub(super) data_start: Option<DataStart>,
    /// The batch under way has to be fetched again before the run goes on.
    pub(super) refetch: bool,
    /// The data's answers when the last run ended, or when the restored state was saved.
    pub(super) last_data: LastData,
    /// States of the random number generators from before the pass under way began, where the data may draw its order
    /// from them.
    pub(super) before_pass: Option<StateDict>,
    /// Whether the data gives batches, with their events; false for an engine without data.
    pub(super) fetches: bool,
    /// Whether the data may differ from the data that the epoch length was taken from.
    pub(super) other_data: bool,
    /// The batch of the pass that this run positioned the data at, if in mid pass; the pass may have fewer batches.
    pub(super) skipped_to: Option<u64>,
    /// Number of batches that handlers of this rank skipped.
    pub(super) skipped: u64,
    /// Whether some rank has reached a limit of samples or time.
    pub(super) limit: bool,
    /// COMPLETED is being fired.
    pub(super) completing: bool,
    /// The signal that caused the interrupt, if any.
    pub(super) signal: Option<i32>,
    /// The last event that was fired.
    pub(super) event: Event,
    pub(super) until: Until,
    pub(super) deadline: Option<Instant>,
    pub(super) run_start: Option<Instant>,
    /// When this run began the epoch, or went on in it.
    pub(super) epoch_start: Option<Instant>,
    /// Time that earlier runs of this process spent in this epoch.
    pub(super) epoch_before: Duration,
    pub(super) warnings: Vec<String>,
    /// Warnings for the summary of the next run.
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
            skipped: 0,
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
            // The data has not been moved to this position yet, so it still counts.
            last_data.place.clone_from(&self.last_data.place);
        }
        if self.refetch {
            // The batch was counted out to be fetched again; in a checkpoint it counts as fetched.
            cursor.fetched += 1;
        }
        // `None` means that the data of this process is positioned already; another process goes to the cursor.
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

    /// A text for the user about a restored run that `terminate` ended; `None` after other runs.
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

    /// Who asked to terminate, in words.
    pub(super) fn terminator(&self, requests: &Requests) -> String {
        requests.terminated_by.clone().unwrap_or_else(|| format!("terminate() at {}", self.event))
    }

    /// Lets a run that `terminate` ended go on with what would have followed.
    pub(super) fn forget_terminate(&mut self) {
        self.cursor.terminated_by = None;
    }

    /// Notes that the data was replaced within the run.
    pub(super) fn replace_data(&mut self, fetches: bool) {
        (self.fetches, self.refetch, self.skipped_to) = (fetches, false, None);
        self.last_data.place = None;
        // `AtIteration` (set by `load_state_dict`) stays: it is a position in any data.
        self.data_start = self.data_start.filter(|entry| *entry == DataStart::AtIteration);
    }

    /// Adds a warning for the summary of the next run.
    pub(super) fn note(&mut self, text: String) {
        self.notes.push(text);
    }

    /// Adds the time that this run spent in the epoch under way to `epoch_before`.
    pub(super) fn pause_epoch(&mut self) {
        if let Some(start) = self.epoch_start.take() {
            self.epoch_before += start.elapsed();
        }
    }
}

/// The part of a [`Position`] that another process needs.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct SavedPosition {
    pub(super) cursor: Cursor,
    pub(super) data_start: DataStart,
    pub(super) last_data: LastData,
}

/// All counts, to check their range when a state is loaded.
impl SavedPosition {
    pub(super) fn counts(&self) -> impl Iterator<Item = u64> {
        let Cursor { counter, pass, fetched, length, .. } = self.cursor;
        let samples = self.last_data.place.as_ref().map(|place| place.samples);
        let length = length.map(|length| [length.pass, length.epoch]);
        [counter, pass, fetched].into_iter().chain(samples).chain(length.into_iter().flatten())
    }

    /// Turns this rank's count of samples into the count of all ranks, which holds for any number of ranks.
    pub(super) fn into_global(mut self, ranks: u64) -> Self {
        if let Some(place) = &mut self.last_data.place {
            place.samples = place.samples.saturating_mul(ranks);
        }
        self
    }

    /// Turns the count of all ranks into this rank's. A remainder is dropped, so that a few samples may come again.
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
