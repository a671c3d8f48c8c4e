//! The loop. [`Engine`] draws it; here it is a machine that can stop between any two events, so that
//! `interrupt` can suspend it and the next run go on.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

use super::state::check_budget;
use super::{Control, Engine, Event, State, Stop, Summary, Until, guarded};
use crate::data::IntoSource;
use crate::{Error, Result};

/// What comes next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Started,
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
}

/// Where the data is to be when the first epoch of a run begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Entry {
    /// At the start of pass `Position::pass`.
    Pass,
    /// At the start of the pass after that.
    NextPass,
    /// Where an uninterrupted run would be at `state.iteration`.
    Loaded,
    /// Where an error left it.
    Broken,
}

/// Where the loop is, beyond what `State` shows.
#[derive(Debug)]
pub(super) struct Position {
    phase: Phase,
    /// The run was suspended by `interrupt`.
    interrupted: bool,
    entry: Entry,
    /// Whether `entry` was followed in this run.
    placed: bool,
    /// An error left the epoch that `state.epoch` counts.
    epoch_broken: bool,
    /// Iterations done in this epoch.
    counter: u64,
    /// Number of the walk over the data, and batches fetched in it.
    pub(super) pass: u64,
    fetched: u64,
    /// The data was restarted and gave nothing since.
    restarted: bool,
    /// It gave nothing in a whole epoch.
    exhausted: bool,
    until: Until,
    deadline: Option<Instant>,
    epoch_start: Option<Instant>,
    warnings: Vec<String>,
}

impl Default for Position {
    fn default() -> Self {
        Self {
            phase: Phase::Started,
            interrupted: false,
            entry: Entry::Pass,
            placed: false,
            epoch_broken: false,
            counter: 0,
            pass: 0,
            fetched: 0,
            restarted: false,
            exhausted: false,
            until: Until::default(),
            deadline: None,
            epoch_start: None,
            warnings: vec![],
        }
    }
}

impl Position {
    pub(super) fn loaded() -> Self {
        Self { entry: Entry::Loaded, ..Self::default() }
    }
}

impl<'a, C, B, O> Engine<'a, C, B, O> {
    /// Runs until the budget is used up or something stops it.
    ///
    /// Goes on with an earlier run, or a loaded state, whose budget leaves something to do; starts at
    /// iteration 0 otherwise.
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
        self.prepare(data, until)?;
        self.running = true;
        // Steps and handlers are guarded one by one; this is for filters and data sources.
        let driven = catch_unwind(AssertUnwindSafe(|| self.drive(cx))).unwrap_or_else(|payload| {
            let text = crate::panic_message(&*payload);
            Err(Error::invalid(format!("a filter or the data source panicked: {text}")))
        });
        let result = driven.map_err(|error| self.fail(error, cx));
        self.running = false;
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

    /// Iterations begun in this epoch, from 1; those before a run goes on in mid epoch count.
    pub fn iteration_in_epoch(&self) -> u64 {
        self.position.counter
    }

    /// Settles budget, epoch length and where to begin. Nothing is changed on error.
    fn prepare(&mut self, data: impl IntoSource<'a, B>, until: Until) -> Result<()> {
        until.validate()?;
        let state = &self.state;
        let interrupted = self.position.interrupted;
        let epoch = state.epoch.saturating_sub(u64::from(self.position.epoch_broken));
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
        let had_budget = max_epochs.is_some() || max_iters.is_some();
        if had_budget {
            max_epochs = until.max_epochs.or(max_epochs);
            max_iters = until.max_iters.or(max_iters);
            check_budget(max_epochs, max_iters, epoch, state.iteration)?;
        }
        let done = used_up(state.iteration, epoch, state.epoch_length, max_epochs, max_iters);
        let new = !interrupted && (!had_budget || done);

        let source = data.into_source();
        let known = until.epoch_length.or(source.batches());
        let epoch_length = match new {
            true => known.or(state.epoch_length),
            false => state.epoch_length.or(known),
        };
        if epoch_length == Some(0) || known == Some(0) {
            return Err(Error::invalid("Input data has zero size. Please provide non-empty data"));
        }
        if !new && until.epoch_length.is_some_and(|length| Some(length) != epoch_length) {
            return Err(Error::invalid(format!(
                "Argument epoch_length should be same as in the state, given {} vs {}",
                until.epoch_length.unwrap_or(0),
                epoch_length.unwrap_or(0)
            )));
        }
        if epoch_length.is_none() && !source.fetches() {
            return Err(Error::invalid("epoch_length should be provided if data is None"));
        }

        let state = &mut self.state;
        state.epoch_length = epoch_length;
        state.samples = 0;
        self.control = Control::default();
        self.exception = None;
        self.position.warnings.clear();
        self.position.until = until;
        self.position.deadline = until.max_time.and_then(|time| Instant::now().checked_add(time));
        if interrupted {
            state.max_epochs = until.max_epochs.or(max_epochs);
            state.max_iters = until.max_iters.or(max_iters);
            if state.max_epochs.is_none() && state.max_iters.is_none() && !until.open_ended() {
                // As for a run without a budget.
                state.max_epochs = Some(state.epoch.max(1));
            }
            return Ok(());
        }
        if new {
            (state.iteration, state.epoch) = (0, 0);
            (state.max_epochs, state.max_iters) = (until.max_epochs, until.max_iters);
            if state.max_epochs.is_none() && state.max_iters.is_none() && !until.open_ended() {
                state.max_epochs = Some(1);
            }
            self.position.entry = Entry::Pass;
            self.position.pass = 0;
        } else {
            state.epoch = epoch;
            (state.max_epochs, state.max_iters) = (max_epochs, max_iters);
        }
        self.position.epoch_broken = false;
        self.position.exhausted = false;
        self.position.placed = false;
        self.position.phase = Phase::Started;
        self.data = Some(source);
        Ok(())
    }

    /// Puts data and counter to where this run begins; once, in its first epoch.
    fn place(&mut self) -> Result<()> {
        let iteration = self.state.iteration;
        let (pass, batch) = match self.position.entry {
            Entry::Pass => {
                self.position.counter = 0;
                (self.position.pass, 0)
            }
            Entry::NextPass => {
                self.position.counter = 0;
                (self.position.pass + 1, 0)
            }
            Entry::Loaded => {
                let data = self.data.as_ref().and_then(|data| data.batches());
                let length = data.or(self.state.epoch_length).unwrap_or(u64::MAX);
                self.position.counter = iteration % self.state.epoch_length.unwrap_or(u64::MAX);
                (iteration / length, iteration % length)
            }
            Entry::Broken => (self.position.pass, self.position.fetched),
        };
        self.position.placed = true;
        self.seek(pass, batch)
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

    fn drive(&mut self, cx: &mut C) -> Result<Stop> {
        self.position.interrupted = false;
        let fetches = self.data.as_ref().is_none_or(|data| data.fetches());
        let mut left_early = false;
        loop {
            // Each arm sets the phase to follow before it fires, so that an interrupt goes on there.
            let event = match self.position.phase {
                Phase::Started => {
                    self.position.phase = Phase::EpochStarted;
                    Event::Started
                }
                Phase::EpochStarted => {
                    if self.is_done() {
                        self.position.phase = Phase::Completed;
                        continue;
                    }
                    self.state.epoch += 1;
                    if self.position.placed {
                        self.position.counter = 0;
                    }
                    self.position.epoch_start = Some(Instant::now());
                    self.position.phase = Phase::EpochBegun;
                    Event::EpochStarted
                }
                Phase::EpochBegun => {
                    if !self.position.placed {
                        self.place()?;
                    }
                    self.position.restarted = false;
                    self.position.phase = Phase::GetBatch;
                    continue;
                }
                Phase::GetBatch => {
                    self.state.batch = None;
                    self.state.output = None;
                    self.position.phase = Phase::Fetch;
                    if !fetches {
                        continue;
                    }
                    Event::GetBatchStarted
                }
                Phase::Fetch => match self.fetch()? {
                    true => {
                        self.position.phase = Phase::BatchFetched;
                        if !fetches {
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
                    self.position.phase = Phase::EpochStarted;
                    continue;
                }
                Phase::Terminate => {
                    left_early = true;
                    self.position.phase = Phase::Completed;
                    self.fire(Event::Terminate, cx)?;
                    continue;
                }
                Phase::Completed => {
                    self.position.entry = Entry::NextPass;
                    if !self.control.skip_completed {
                        self.fire(Event::Completed, cx)?;
                    }
                    self.data = None;
                    return Ok(if left_early { Stop::Terminated } else { Stop::Completed });
                }
            };
            self.fire(event, cx)?;
            if self.control.any && self.obey(event, cx)? {
                self.position.interrupted = true;
                return Ok(Stop::Interrupted);
            }
        }
    }

    /// Whether there was a batch.
    fn fetch(&mut self) -> Result<bool> {
        let Some(data) = self.data.as_mut() else {
            return Ok(false);
        };
        match catch(|| data.next()) {
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
            Err(error) => {
                // The next run goes on after it.
                self.position.fetched += 1;
                Err(self.data_error(error))
            }
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
        let output = guarded(|| step(cx, self, batch));
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

    fn warn_of_missing_data(&mut self) {
        if self.is_done() {
            return;
        }
        let State { iteration, epoch_length, max_epochs, max_iters, .. } = self.state;
        let total = max_iters
            .or(max_epochs.zip(epoch_length).map(|(epochs, length)| epochs.saturating_mul(length)));
        let total = total.map_or_else(|| "unknown".to_owned(), |total| total.to_string());
        self.position.warnings.push(format!(
            "Data iterator can not provide data anymore but required total number of iterations to run is not reached. Current iteration: {iteration} vs Total iterations to run : {total}"
        ));
    }

    /// Does what handlers of `event` asked for; true if the run is to be suspended.
    fn obey(&mut self, event: Event, cx: &mut C) -> Result<bool> {
        if self.control.terminate {
            self.control.any = false;
            self.position.phase = Phase::Terminate;
            return Ok(false);
        }
        if std::mem::take(&mut self.control.terminate_epoch) {
            match event {
                Event::Started | Event::EpochStarted => {
                    return Err(Error::invalid(
                        "The method terminate_epoch() should not be called on Event.STARTED or Event.EPOCH_STARTED.",
                    ));
                }
                Event::EpochCompleted => self.control.skip_epoch_completed = false,
                _ => {
                    self.fire(Event::TerminateSingleEpoch, cx)?;
                    self.seek(self.position.pass + 1, 0)?;
                    let skip = std::mem::take(&mut self.control.skip_epoch_completed);
                    self.position.phase =
                        if skip { Phase::EpochEnded } else { Phase::EpochCompleted };
                }
            }
        }
        self.control.any = false;
        if std::mem::take(&mut self.control.interrupt) {
            self.fire(Event::Interrupt, cx)?;
            return Ok(true);
        }
        Ok(false)
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
        self.position.until.max_samples.is_some_and(|max| self.state.samples >= max)
            || self.position.deadline.is_some_and(|deadline| Instant::now() >= deadline)
    }

    fn note_epoch_time(&mut self) {
        if let Some(start) = self.position.epoch_start {
            self.state.epoch_time = start.elapsed();
        }
    }

    /// Calls the handlers of `ExceptionRaised`, all of them, and leaves the engine ready to run again.
    fn fail(&mut self, error: Error, cx: &mut C) -> Error {
        let position = &mut self.position;
        let between_epochs =
            matches!(position.phase, Phase::Started | Phase::EpochStarted | Phase::EpochEnded);
        let full = self.state.epoch_length.is_some_and(|length| position.counter >= length);
        let between_epochs = between_epochs || (position.placed && full);
        if matches!(position.phase, Phase::Terminate | Phase::Completed) {
            position.entry = Entry::NextPass;
        } else if position.placed {
            position.entry = Entry::Broken;
            position.epoch_broken = !between_epochs;
            if between_epochs {
                position.counter = 0;
            }
        } else {
            position.epoch_broken = !between_epochs;
        }
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

/// Keeps the first error and tells of the second.
fn with_second(mut first: Error, second: Error) -> Error {
    if let Error::Step { source, .. } | Error::Handler { source, .. } | Error::Data { source, .. } =
        &mut first
    {
        let cause = std::mem::replace(source, anyhow::Error::msg(""));
        *source = cause.context(format!("(besides: {second})"));
    }
    first
}

fn catch<B>(call: impl FnOnce() -> Option<anyhow::Result<B>>) -> anyhow::Result<Option<B>> {
    guarded(|| call().transpose())
}

/// ignite's `_is_done`.
fn used_up(
    iteration: u64,
    epoch: u64,
    epoch_length: Option<u64>,
    max_epochs: Option<u64>,
    max_iters: Option<u64>,
) -> bool {
    let by_iterations = max_iters.is_some_and(|max| iteration >= max);
    let by_length = epoch_length
        .zip(max_epochs)
        .is_some_and(|(length, epochs)| iteration >= length.saturating_mul(epochs));
    by_iterations || by_length || max_epochs.is_some_and(|max| epoch >= max)
}
