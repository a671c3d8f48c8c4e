//! The loop. [`Engine`] draws it; here it is a machine that can stop between any two events, so that
//! `interrupt` can suspend it and the next run go on.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::state::check_budget;
use super::{Control, Engine, Event, State, Stop, Summary, Until, guarded};
use crate::data::{IntoSource, Place, Source};
use crate::{Error, Result};

/// What comes next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum Phase {
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
    /// Only in saved states: COMPLETED was fired.
    Ended,
}

impl Phase {
    /// Whether a batch is under way, which has to be fetched again elsewhere.
    fn has_batch(self) -> bool {
        matches!(self, Self::BatchFetched | Self::Step)
    }
}

/// How the last run was left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Left {
    /// There was none.
    Nothing,
    /// Finished, or ended by `terminate` or a limit.
    Ended,
    /// Suspended by `interrupt`, with its data.
    Suspended,
    /// By an error.
    Failed,
    /// In another engine, from where its ignite-like state was loaded.
    Loaded,
    /// In another engine, from where its whole state was restored.
    Restored,
}

/// Where the data is to be when its first batch is fetched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum Entry {
    /// At the start.
    Start,
    /// At the start of the pass after `Position::pass`.
    NextPass,
    /// Where an uninterrupted run would be at `state.iteration`.
    Loaded,
    /// At `Position::pass` and `Position::fetched`.
    Kept,
}

/// Where the loop is, beyond what `State` shows.
#[derive(Debug)]
pub(super) struct Position {
    phase: Phase,
    left: Left,
    /// The run had a budget in epochs or iterations.
    budgeted: bool,
    /// Taken when it was followed.
    entry: Option<Entry>,
    /// The batch before `fetched` is needed again.
    refetch: bool,
    /// Iterations done in this epoch.
    counter: u64,
    /// Number of the walk over the data, and batches fetched in it.
    pub(super) pass: u64,
    fetched: u64,
    /// `fetched` in samples, where the data counts them and is to be put there.
    kept: Option<Place>,
    /// Of the data when the state was saved that was restored: batches in a pass, and settings.
    batches: Option<u64>,
    settings: Map<String, Value>,
    /// The data was restarted and gave nothing since.
    restarted: bool,
    /// It gave nothing in a whole epoch.
    exhausted: bool,
    /// The run ends before its budget in epochs is used up.
    left_early: bool,
    /// Some rank has reached a limit of samples or time.
    pub(super) limit: bool,
    /// COMPLETED is being fired.
    completing: bool,
    /// Why it is being interrupted, if for that.
    pub(super) signal: Option<i32>,
    /// The last one that was fired.
    pub(super) event: Event,
    until: Until,
    deadline: Option<Instant>,
    epoch_start: Option<Instant>,
    warnings: Vec<String>,
}

impl Default for Position {
    fn default() -> Self {
        Self {
            phase: Phase::Started,
            left: Left::Nothing,
            budgeted: false,
            entry: Some(Entry::Start),
            refetch: false,
            counter: 0,
            pass: 0,
            fetched: 0,
            kept: None,
            batches: None,
            settings: Map::new(),
            restarted: false,
            exhausted: false,
            left_early: false,
            limit: false,
            completing: false,
            signal: None,
            event: Event::Started,
            until: Until::default(),
            deadline: None,
            epoch_start: None,
            warnings: vec![],
        }
    }
}

impl Position {
    pub(super) fn loaded(budgeted: bool) -> Self {
        Self { left: Left::Loaded, entry: Some(Entry::Loaded), budgeted, ..Self::default() }
    }

    pub(super) fn save<B>(&self, data: Option<&(dyn Source<B> + '_)>) -> SavedPosition {
        SavedPosition {
            place: self.kept.clone().or_else(|| data?.place(self.phase.has_batch())),
            settings: data.map(|data| data.settings()).unwrap_or_default(),
            batches: data.and_then(|data| data.batches()),
            phase: if self.completing { Phase::Ended } else { self.phase },
            // In the same process the data is where it is.
            entry: self.entry.unwrap_or(Entry::Kept),
            counter: self.counter,
            pass: self.pass,
            fetched: self.fetched,
            restarted: self.restarted,
            exhausted: self.exhausted,
            left_early: self.left_early,
        }
    }

    pub(super) fn is_at_start(&self) -> bool {
        self.phase == Phase::Started
    }

    /// Whether an epoch is under way.
    fn in_epoch(&self) -> bool {
        use Phase::*;
        !matches!(self.phase, Started | NextEpoch | EpochEnded | Terminate | Completed | Ended)
    }
}

/// A [`Position`] for another process.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct SavedPosition {
    phase: Phase,
    entry: Entry,
    counter: u64,
    pass: u64,
    fetched: u64,
    place: Option<Place>,
    batches: Option<u64>,
    settings: Map<String, Value>,
    restarted: bool,
    exhausted: bool,
    left_early: bool,
}

impl SavedPosition {
    pub(super) fn counts(&self) -> [u64; 4] {
        let samples = self.place.as_ref().map_or(0, |place| place.samples);
        [self.counter, self.pass, self.fetched, samples]
    }

    /// Counts the samples of all ranks, which are the same with any number of them.
    pub(super) fn of_all(mut self, ranks: u64) -> Self {
        self.place.iter_mut().for_each(|place| place.samples = place.samples.saturating_mul(ranks));
        self
    }

    /// The other way round; in batches where the ranks cannot share the samples.
    pub(super) fn of_each(mut self, ranks: u64) -> Self {
        self.place = self.place.filter(|place| place.samples % ranks == 0);
        self.place.iter_mut().for_each(|place| place.samples /= ranks);
        self
    }

    pub(super) fn restore(self, event: Event, budgeted: bool) -> Position {
        let refetch = self.phase.has_batch();
        Position {
            refetch,
            phase: self.phase,
            left: Left::Restored,
            budgeted,
            entry: Some(self.entry),
            counter: self.counter,
            pass: self.pass,
            fetched: self.fetched.saturating_sub(u64::from(refetch)),
            kept: self.place,
            batches: self.batches,
            settings: self.settings,
            restarted: self.restarted,
            exhausted: self.exhausted,
            left_early: self.left_early,
            event,
            ..Position::default()
        }
    }
}

impl<'a, C, B, O> Engine<'a, C, B, O> {
    /// Runs until the budget is used up or something stops it.
    ///
    /// Goes on where an earlier run or a loaded state leaves something to do; starts at iteration 0
    /// otherwise, or after [`reset`](Self::reset). What goes on is told at [`Engine`].
    ///
    /// # Errors
    /// What the step, a handler or the data returned, or their panic, with who and when; registrations
    /// that were refused; arguments that do not go together. After an error the engine can be run again.
    pub fn run(
        &mut self,
        cx: &mut C,
        data: impl IntoSource<'a, B>,
        until: Until,
    ) -> Result<Summary> {
        if let Some(text) = &self.refused {
            return Err(Error::invalid(text));
        }
        if self.running {
            return Err(Error::invalid("the engine is running already"));
        }
        let start = Instant::now();
        outside_the_step(|| self.prepare(data, until))?;
        let running = Running::begin();
        self.running = true;
        let result = outside_the_step(|| self.drive(cx)).map_err(|error| self.fail(error, cx));
        self.running = false;
        drop(running);
        self.state.run_time = start.elapsed();
        let stop = result?;
        Ok(Summary {
            stop,
            epochs: self.state.epoch,
            iterations: self.state.iteration,
            elapsed: start.elapsed(),
            warnings: std::mem::take(&mut self.position.warnings),
        })
    }

    /// Forgets where the last run stopped: the next one starts anew. Handlers, metrics and the history
    /// of parameters stay.
    ///
    /// # Errors
    /// The engine is running.
    pub fn reset(&mut self) -> Result<()> {
        if self.running {
            return Err(Error::invalid("reset() was called within a run; terminate() ends one"));
        }
        self.position = Position::default();
        self.data = None;
        let state = &mut self.state;
        (state.iteration, state.epoch) = (0, 0);
        (state.max_epochs, state.max_iters, state.epoch_length) = (None, None, None);
        Ok(())
    }

    /// Whether this engine is, or would be, run within another: as evaluators are.
    pub(crate) fn is_nested(&self) -> bool {
        RUNNING.get() > u32::from(self.running)
    }

    /// Iterations begun in this epoch, from 1; those before a run goes on in mid epoch count.
    pub fn iteration_in_epoch(&self) -> u64 {
        self.position.counter
    }

    /// Settles budget, epoch length and where to begin. Nothing is changed on error.
    fn prepare(&mut self, data: impl IntoSource<'a, B>, until: Until) -> Result<()> {
        until.validate()?;
        let (state, position) = (&self.state, &self.position);
        let (mut max_epochs, mut max_iters) = (state.max_epochs, state.max_iters);
        for (given, other, ours, theirs) in [
            (until.max_epochs, max_iters, "max_epochs", "max_iters"),
            (until.max_iters, max_epochs, "max_iters", "max_epochs"),
        ] {
            if given.is_some() && other.is_some() {
                return Err(Error::invalid(format!(
                    "To switch from {theirs} to {ours} mode during resume, you must first reset by setting 'engine.state.{theirs} = None' before calling run()."
                )));
            }
        }
        let has_budget = max_epochs.is_some() || max_iters.is_some();
        max_epochs = until.max_epochs.or(max_epochs);
        max_iters = until.max_iters.or(max_iters);
        let epochs_done = state.epoch.saturating_sub(u64::from(position.in_epoch()));
        if has_budget {
            check_budget(max_epochs, max_iters, epochs_done, state.iteration)?;
        }
        let used_up = max_epochs.is_some_and(|max| epochs_done >= max)
            || max_iters.is_some_and(|max| state.iteration >= max);
        let was_reset = position.budgeted && !has_budget;
        let mut left = match position.left {
            _ if was_reset => Left::Nothing,
            Left::Ended | Left::Loaded if has_budget && used_up => Left::Nothing,
            // Only COMPLETED is missing, but for a budget that grew.
            Left::Failed | Left::Restored
                if matches!(position.phase, Phase::Completed | Phase::Ended) && !used_up =>
            {
                Left::Ended
            }
            left => left,
        };
        if left == Left::Suspended && self.data.is_none() {
            left = Left::Failed;
        }

        let source = data.into_source();
        let known = until.epoch_length.or(source.batches());
        let epoch_length = match left {
            Left::Nothing => known.or(state.epoch_length),
            _ => state.epoch_length.or(known),
        };
        source.validate().map_err(|error| Error::invalid(format!("{error:#}")))?;
        if epoch_length == Some(0) || known == Some(0) || source.batches() == Some(0) {
            return Err(Error::invalid("Input data has zero size. Please provide non-empty data"));
        }
        if left != Left::Nothing
            && until.epoch_length.is_some_and(|length| Some(length) != epoch_length)
        {
            return Err(Error::invalid(format!(
                "Argument epoch_length should be same as in the state, given {} vs {}",
                until.epoch_length.unwrap_or(0),
                epoch_length.unwrap_or(0)
            )));
        }
        if epoch_length.is_none() && !source.fetches() {
            return Err(Error::invalid("epoch_length should be provided if data is None"));
        }

        let (state, position) = (&mut self.state, &mut self.position);
        match left {
            Left::Nothing => {
                (max_epochs, max_iters) = (until.max_epochs, until.max_iters);
                (state.iteration, state.epoch) = (0, 0);
                *position = Position::default();
            }
            Left::Ended => {
                position.phase = Phase::Started;
                position.entry = Some(Entry::NextPass);
            }
            Left::Failed => position.entry = position.entry.or(Some(Entry::Kept)),
            Left::Suspended | Left::Loaded | Left::Restored => {}
        }
        if max_epochs.is_none() && max_iters.is_none() && !until.open_ended() {
            max_epochs = Some(if left == Left::Nothing { 1 } else { epochs_done + 1 });
        }
        (state.max_epochs, state.max_iters) = (max_epochs, max_iters);
        state.epoch_length = epoch_length;
        if left != Left::Restored {
            state.samples = 0;
            self.control = Control::default();
        }
        position.budgeted = max_epochs.is_some() || max_iters.is_some();
        position.exhausted = false;
        position.limit = false;
        position.signal = None;
        position.warnings.clear();
        if left == Left::Restored {
            position.warnings = changes(position, &*source);
        }
        position.until = until;
        position.deadline = until.max_time.and_then(|time| Instant::now().checked_add(time));
        self.exception = None;
        if left != Left::Suspended {
            self.data = Some(source);
        }
        Ok(())
    }

    /// Puts data and counter to where this run begins.
    fn enter(&mut self) -> Result<()> {
        let Position { entry, pass, fetched, .. } = self.position;
        let place = self.position.kept.clone().filter(|_| entry == Some(Entry::Kept));
        match entry {
            None => {}
            Some(Entry::Start) => self.seek(0, 0)?,
            Some(Entry::NextPass) => self.seek(pass + 1, 0)?,
            Some(Entry::Kept) if self.seek_place(pass, place)? => {}
            Some(Entry::Kept) => self.seek(pass, fetched)?,
            Some(Entry::Loaded) => {
                let iteration = self.state.iteration;
                if let Some(length) = self.state.epoch_length {
                    self.position.counter = iteration % length.max(1);
                }
                match self.data.as_ref().and_then(|data| data.batches()) {
                    Some(0) => return Err(Error::invalid("the data has no batches any more")),
                    Some(length) => self.seek(iteration / length, iteration % length)?,
                    None => self.walk(iteration)?,
                }
            }
        }
        self.position.entry = None;
        self.position.kept = None;
        Ok(())
    }

    /// False where that is not possible.
    fn seek_place(&mut self, pass: u64, place: Option<Place>) -> Result<bool> {
        let (Some(place), Some(data)) = (place, self.data.as_mut()) else { return Ok(false) };
        guarded(|| data.seek_place(pass, &place)).map_err(|error| self.data_error(error))
    }

    /// Goes past that many batches of data of unknown length.
    fn walk(&mut self, batches: u64) -> Result<()> {
        self.seek(0, 0)?;
        for _ in 0..batches {
            if !self.fetch()? {
                self.seek(self.position.pass + 1, 0)?;
                if !self.fetch()? {
                    break;
                }
            }
        }
        self.state.batch = None;
        self.state.samples = 0;
        Ok(())
    }

    pub(super) fn seek(&mut self, pass: u64, batch: u64) -> Result<()> {
        self.position.pass = pass;
        self.position.fetched = batch;
        match self.data.as_mut() {
            Some(data) => {
                guarded(|| data.seek(pass, batch)).map_err(|error| self.data_error(error))
            }
            None => Ok(()),
        }
    }

    fn data_error(&self, source: anyhow::Error) -> Error {
        Error::Data { epoch: self.state.epoch, iteration: self.state.iteration, source }
    }

    /// Whether the data gives batches at all; `set_data` may change that within a run.
    fn fetches(&self) -> bool {
        self.data.as_ref().is_none_or(|data| data.fetches())
    }

    fn drive(&mut self, cx: &mut C) -> Result<Stop> {
        self.agree_on_start()?;
        if self.position.entry == Some(Entry::Kept) {
            self.enter()?;
        }
        if std::mem::take(&mut self.position.refetch) {
            // The batch was under way when the state was saved.
            let samples = self.state.samples;
            self.fetch()?;
            self.state.samples = samples;
        }
        self.restore_random_numbers()?;
        if self.control.any {
            // Asked for before the state was saved.
            self.obey(self.position.event, cx)?;
        }
        loop {
            // Each arm sets the phase to follow before it fires, so that an interrupt goes on there.
            let event = match self.position.phase {
                Phase::Started => {
                    self.position.left_early = false;
                    self.position.phase = Phase::NextEpoch;
                    Event::Started
                }
                Phase::NextEpoch => {
                    if self.is_done() {
                        self.position.phase = Phase::Completed;
                    } else {
                        self.state.epoch += 1;
                        self.position.counter = 0;
                        self.position.phase = Phase::EpochStarted;
                    }
                    continue;
                }
                Phase::EpochStarted => {
                    self.position.epoch_start = Some(Instant::now());
                    self.position.restarted = false;
                    self.position.phase = Phase::EpochBegun;
                    Event::EpochStarted
                }
                Phase::EpochBegun => {
                    self.position.phase = Phase::GetBatch;
                    continue;
                }
                Phase::GetBatch => {
                    if self.position.entry.is_some() {
                        // Not before: handlers of EPOCH_STARTED may change the batch size.
                        self.enter()?;
                    }
                    self.state.batch = None;
                    self.state.output = None;
                    self.position.phase = Phase::Fetch;
                    if !self.fetches() {
                        continue;
                    }
                    Event::GetBatchStarted
                }
                Phase::Fetch => match self.fetch()? {
                    true => {
                        self.position.phase = Phase::BatchFetched;
                        if !self.fetches() {
                            continue;
                        }
                        Event::GetBatchCompleted
                    }
                    false if self.state.epoch_length.is_none() => {
                        self.end_first_pass()?;
                        continue;
                    }
                    false if self.position.restarted => {
                        self.warn_of_missing_data();
                        self.position.exhausted = self.position.counter == 0;
                        self.position.phase = Phase::EpochCompleted;
                        continue;
                    }
                    false => {
                        self.position.phase = Phase::RestartData;
                        Event::DataloaderStopIteration
                    }
                },
                Phase::RestartData => {
                    self.seek(self.position.pass + 1, 0)?;
                    self.position.restarted = true;
                    self.position.phase = Phase::Fetch;
                    continue;
                }
                Phase::BatchFetched => {
                    self.position.counter += 1;
                    self.position.restarted = false;
                    self.state.iteration += 1;
                    self.position.phase = Phase::Step;
                    Event::IterationStarted
                }
                Phase::Step => {
                    self.step(cx)?;
                    self.position.phase = Phase::IterationCompleted;
                    Event::IterationCompleted
                }
                Phase::IterationCompleted => {
                    // At least, not exactly: a handler may have made the epoch shorter.
                    if self.state.epoch_length.is_some_and(|length| self.position.counter >= length)
                    {
                        self.position.phase = Phase::EpochCompleted;
                    } else if self.budget_reached() {
                        self.position.phase = Phase::Terminate;
                    } else {
                        self.position.phase = Phase::GetBatch;
                    }
                    continue;
                }
                Phase::EpochCompleted => {
                    self.position.phase = Phase::EpochEnded;
                    self.note_epoch_time();
                    Event::EpochCompleted
                }
                Phase::EpochEnded => {
                    self.note_epoch_time();
                    self.position.phase = Phase::NextEpoch;
                    continue;
                }
                Phase::Terminate => {
                    self.position.left_early = true;
                    self.position.phase = Phase::Completed;
                    self.fire(Event::Terminate, cx)?;
                    continue;
                }
                Phase::Completed => {
                    if !self.control.skip_completed {
                        self.position.completing = true;
                        let fired = self.fire(Event::Completed, cx);
                        self.position.completing = false;
                        fired?;
                    }
                    self.position.phase = Phase::Ended;
                    continue;
                }
                Phase::Ended => {
                    self.position.left = Left::Ended;
                    self.data = None;
                    return Ok(match self.position.left_early {
                        true => Stop::Terminated,
                        false => Stop::Completed,
                    });
                }
            };
            self.position.event = event;
            self.join_metrics(event)?;
            self.fire(event, cx)?;
            if !self.agree(event)? {
                // What else is asked for waits until the ranks meet.
                if std::mem::take(&mut self.control.skip_batch) {
                    self.pass_over_batch(event)?;
                }
                continue;
            }
            if self.control.any && self.obey(event, cx)? {
                self.position.left = Left::Suspended;
                let signal = self.position.signal.take();
                return Ok(signal.map_or(Stop::Interrupted, Stop::Signal));
            }
        }
    }

    /// Whether there was a batch.
    fn fetch(&mut self) -> Result<bool> {
        let begun = self.clock();
        let Some(data) = self.data.as_mut() else {
            return Ok(false);
        };
        let next = catch(|| data.next());
        if let (Some(profile), Some(begun)) = (&self.profile, begun) {
            profile.note_data(begun.elapsed());
        }
        match next {
            Ok(Some(batch)) => {
                if let Some(samples) = data.samples() {
                    self.state.samples += samples;
                } else if self.position.until.max_samples.is_some() {
                    return Err(Error::invalid(
                        "a budget in samples needs a data source that counts them: implement Source::samples",
                    ));
                }
                self.position.fetched += 1;
                self.state.batch = Some(batch);
                Ok(true)
            }
            Ok(None) => Ok(false),
            Err(error) => Err(self.data_error(error)),
        }
    }

    fn step(&mut self, cx: &mut C) -> Result<()> {
        let (epoch, iteration) = (self.state.epoch, self.state.iteration);
        let wrap = |source| Error::Step { epoch, iteration, source };
        let Some(batch) = self.state.batch.take() else {
            return Err(wrap(anyhow::anyhow!("a handler took the batch away before the step")));
        };
        let Some(mut step) = self.step.take() else {
            return Err(wrap(anyhow::anyhow!("the engine is running already")));
        };
        let begun = self.clock();
        let output = guarded(|| step(cx, self, batch));
        if let (Some(profile), Some(begun)) = (&self.profile, begun) {
            profile.note_step(begun.elapsed());
        }
        self.step = Some(step);
        self.state.output = Some(output.map_err(wrap)?);
        Ok(())
    }

    /// Data of unknown length was exhausted for the first time: that is the length of an epoch.
    fn end_first_pass(&mut self) -> Result<()> {
        if self.position.counter == 0 {
            return Err(Error::invalid("Input data has zero size. Please provide non-empty data"));
        }
        self.state.epoch_length = Some(self.position.counter);
        self.position.phase = Phase::EpochCompleted;
        Ok(())
    }

    /// Notes something that looks wrong without being an error, for the summary of the run that is under
    /// way.
    pub fn warn(&mut self, warning: impl Into<String>) {
        self.position.warnings.push(warning.into());
    }

    fn warn_of_missing_data(&mut self) {
        if self.is_done() {
            return;
        }
        let State { iteration, epoch_length, max_epochs, max_iters, .. } = self.state;
        let total = max_iters
            .or(max_epochs.zip(epoch_length).map(|(epochs, length)| epochs.saturating_mul(length)));
        let total = total.map_or_else(|| "unknown".to_owned(), |total| total.to_string());
        let warning = format!(
            "Data iterator can not provide data anymore but required total number of iterations to run is not reached. Current iteration: {iteration} vs Total iterations to run : {total}"
        );
        // Once, not for each of many empty epochs.
        if self.position.warnings.last() != Some(&warning) {
            self.position.warnings.push(warning);
        }
    }

    /// Does what handlers of `event` asked for; true if the run is to be suspended.
    fn obey(&mut self, event: Event, cx: &mut C) -> Result<bool> {
        if std::mem::take(&mut self.control.terminate_epoch) && !self.control.terminate {
            self.leave_epoch(event, cx)?;
        }
        if std::mem::take(&mut self.control.skip_batch) {
            self.pass_over_batch(event)?;
        }
        self.control.any = false;
        if !self.control.terminate && std::mem::take(&mut self.control.interrupt) {
            self.fire(Event::Interrupt, cx)?;
            self.control.any = false;
            if !self.control.terminate {
                return Ok(true);
            }
        }
        if std::mem::take(&mut self.control.terminate) {
            self.position.phase = Phase::Terminate;
        }
        Ok(false)
    }

    fn pass_over_batch(&mut self, event: Event) -> Result<()> {
        if event != Event::GetBatchCompleted {
            return Err(Error::invalid(format!(
                "skip_batch() was called at {event}; call it from a handler of GET_BATCH_COMPLETED"
            )));
        }
        // Not after terminate_epoch, which has set another.
        if self.position.phase == Phase::BatchFetched {
            self.position.phase = Phase::GetBatch;
        }
        Ok(())
    }

    fn leave_epoch(&mut self, event: Event, cx: &mut C) -> Result<()> {
        let skip = std::mem::take(&mut self.control.skip_epoch_completed);
        match event {
            Event::Started | Event::EpochStarted => Err(Error::invalid(
                "The method terminate_epoch() should not be called on Event.STARTED or Event.EPOCH_STARTED.",
            )),
            Event::EpochCompleted => Ok(()),
            _ => {
                self.position.phase = if skip { Phase::EpochEnded } else { Phase::EpochCompleted };
                self.seek(self.position.pass + 1, 0)?;
                self.fire(Event::TerminateSingleEpoch, cx)?;
                // It is left already.
                self.control.terminate_epoch = false;
                Ok(())
            }
        }
    }

    fn is_done(&self) -> bool {
        match self.state.max_epochs {
            // Not by iterations: epochs may differ in length.
            Some(max) => self.state.epoch >= max || self.budget_reached(),
            // Without a limit of epochs, empty ones would follow for ever.
            None => self.position.exhausted || self.budget_reached(),
        }
    }

    /// In mid epoch: epochs cannot be used up there.
    fn budget_reached(&self) -> bool {
        self.state.max_iters.is_some_and(|max| self.state.iteration >= max) || self.limit_reached()
    }

    fn limit_reached(&self) -> bool {
        // Clocks differ: ranks go by what they agreed on.
        if self.joins_metrics() { self.position.limit } else { self.limit_reached_here() }
    }

    pub(super) fn limit_reached_here(&self) -> bool {
        self.position.until.max_samples.is_some_and(|max| self.state.samples >= max)
            || self.position.deadline.is_some_and(|deadline| Instant::now() >= deadline)
    }

    fn note_epoch_time(&mut self) {
        if let Some(start) = self.position.epoch_start {
            self.state.epoch_time = start.elapsed();
        }
    }

    /// Calls the handlers of `ExceptionRaised`, all of them, and leaves the engine ready to go on: with
    /// the event or the batch that failed up to the step, else with what follows.
    fn fail(&mut self, error: Error, cx: &mut C) -> Error {
        let position = &mut self.position;
        if position.entry.is_none() {
            let again = position.phase == Phase::BatchFetched;
            let place = |data: &dyn Source<B>| guarded(|| Ok(data.place(again))).ok().flatten();
            position.kept = self.data.as_deref().and_then(place);
        }
        position.phase = match position.phase {
            Phase::NextEpoch => Phase::Started,
            Phase::EpochBegun => Phase::EpochStarted,
            Phase::Fetch | Phase::RestartData => Phase::GetBatch,
            Phase::BatchFetched => {
                position.fetched -= 1;
                Phase::GetBatch
            }
            Phase::Step => Phase::IterationCompleted,
            phase => phase,
        };
        position.restarted = false;
        position.left = Left::Failed;
        self.exception = Some(error);
        let raised = self.fire(Event::ExceptionRaised, cx);
        self.data = None;
        self.state.batch = None;
        let error = self.exception.take();
        match (error, raised) {
            (Some(error), Ok(())) => error,
            (Some(error), Err(second)) => with_second(error, second),
            (None, Err(error)) => error,
            (None, Ok(())) => Error::invalid("the run failed"),
        }
    }
}

/// What is other data than when the state was saved.
fn changes<B>(position: &Position, data: &dyn Source<B>) -> Vec<String> {
    let mut changes = vec![];
    let (batches, settings) = (data.batches(), data.settings());
    // The settings tell more, and the batch size may be restored later.
    if batches != position.batches && (settings.is_empty() || position.settings.is_empty()) {
        let shown = |batches: Option<u64>| {
            batches.map_or_else(|| "an unknown number of".to_owned(), |n| n.to_string())
        };
        changes.push(format!(
            "a pass over the data had {} batches when this state was saved, and has {} now: the place in it is counted in batches",
            shown(position.batches),
            shown(batches)
        ));
    }
    for (name, then) in &position.settings {
        if let Some(now) = settings.get(name).filter(|now| *now != then) {
            changes.push(format!("{name} of the data: {then} then, {now} now"));
        }
    }
    changes
}

/// Engines that are running on this thread, one within the other.
struct Running;

thread_local! {
    static RUNNING: Cell<u32> = const { Cell::new(0) };
}

impl Running {
    fn begin() -> Self {
        RUNNING.set(RUNNING.get() + 1);
        Self
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        RUNNING.set(RUNNING.get() - 1);
    }
}

/// Runs what calls user code that is not guarded on its own: the data source.
fn outside_the_step<T>(call: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(call)).unwrap_or_else(|payload| {
        let text = crate::panic_message(&*payload);
        Err(Error::invalid(format!("the data source panicked: {text}")))
    })
}

/// Keeps the first error and tells of the second.
fn with_second(mut first: Error, second: Error) -> Error {
    if let Error::Step { source, .. } | Error::Handler { source, .. } | Error::Data { source, .. } =
        &mut first
    {
        let cause = std::mem::replace(source, anyhow::Error::msg(""));
        *source = cause.context(format!("(besides: {:#})", anyhow::Error::from(second)));
    }
    first
}

fn catch<B>(call: impl FnOnce() -> Option<anyhow::Result<B>>) -> anyhow::Result<Option<B>> {
    guarded(|| call().transpose())
}
