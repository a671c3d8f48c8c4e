//! The loop of [`Engine`], which documents it in a diagram. Here the loop is a state machine that can stop between any
//! two events, so that `interrupt` can suspend a run and the next `run` can go on.

use std::cell::Cell;
use std::time::{Duration, Instant};

use super::position::{
    CallAgain, Cursor, DataLength, DataStart, LastData, Phase, Position, PreviousRun,
};
use super::random_numbers::{generators, same_generators, set_generators};
use super::requests::Requests;
use super::state::check_budget;
use super::{Engine, Event, Profile, State, Stop, Summary, Until};
use crate::data::{IntoSource, SamplePosition, Source};
use crate::error::{Error, Result};
use crate::guard::{Entered, guarded_drop, guarded_within};

/// Refuses a run within a run.
pub(super) const RUNS_ALREADY: &str = "the engine is running already: its step and handlers can run another engine, but not their own";

/// How far a run goes, and where it begins.
struct Plan {
    previous: PreviousRun,
    /// The phase in which the run begins, where it is not the cursor's.
    phase: Option<Phase>,
    max_epochs: Option<u64>,
    max_iters: Option<u64>,
    epoch_length: Option<u64>,
    length_by: LengthBy,
}

/// Who determines the length of an epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum LengthBy {
    Program,
    Data,
    /// Whoever determined it in the run that goes on.
    State,
}

impl<'a, C, B, O> Engine<'a, C, B, O> {
    /// Runs until the budget is used up or something stops the run.
    ///
    /// The run goes on where an earlier run or a loaded state left something to do. Otherwise, and after
    /// [`reset`](Self::reset), it starts at iteration 0. The documentation of [`Engine`] says where it goes on after
    /// which kind of end.
    ///
    /// # Errors
    /// Errors and panics of the step, a handler or the data, with the place and the iteration; registrations that were
    /// refused; arguments that contradict each other or the state. After an error the engine can be run again.
    #[doc(alias = "fit")]
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
            return Err(Error::invalid(RUNS_ALREADY));
        }
        let start = Instant::now();
        let spent_before = self.profile.as_ref().map(Profile::spent);
        let _entered = Entered::here();
        guarded_within(|| Ok(self.prepare(data, until, start)))
            .unwrap_or_else(|panic| Err(Error::invalid(format!("the data source {panic}"))))?;
        let running = Running::begin(self.position.is_at_start() && self.state.iteration == 0);
        self.running = true;
        let driven = guarded_within(|| Ok(self.drive(cx)));
        let result =
            driven.unwrap_or_else(|panic| Err(Error::invalid(format!("the engine {panic}"))));
        let result = match result {
            Ok(stop) => Ok(stop),
            Err(error) => Err(guarded_within(|| Ok(self.fail(error, cx)))
                .unwrap_or_else(|panic| Error::invalid(format!("the engine {panic}")))),
        };
        self.running = false;
        drop(running);
        self.position.pause_epoch();
        self.state.run_time = start.elapsed();
        let stop = result?;
        Ok(Summary {
            stop,
            epochs: self.state.epoch,
            iterations: self.state.iteration,
            elapsed: start.elapsed(),
            // A handler may have begun the profile within the run.
            time: self.profile.as_ref().map(|p| p.spent().since(spent_before.unwrap_or_default())),
            warnings: std::mem::take(&mut self.position.warnings),
        })
    }

    /// Forgets where the last run stopped, so that the next one starts anew. Handlers, metrics and the history of
    /// parameters stay.
    ///
    /// After a checkpoint that was loaded only in part, this lets the engine run again with the values that the load
    /// left in models and optimizers; the summary of the next run warns of that.
    ///
    /// # Errors
    /// Refused while the engine is running. A panic while the batch, the output or the data of the last run is dropped
    /// is an error, too; everything is forgotten all the same.
    pub fn reset(&mut self) -> Result<()> {
        if self.running {
            return Err(Error::invalid("reset() was called within a run; terminate() ends one"));
        }
        self.position = Position::default();
        self.requests = Requests::default();
        self.exception = None;
        (self.random, self.log_places) = (None, None);
        self.handlers.reset_firings();
        if self.forgive_part() {
            self.position.note(
                "a checkpoint was loaded only in part before reset(): models and optimizers hold what that load left".into(),
            );
        }
        let state = &mut self.state;
        (state.iteration, state.epoch, state.samples) = (0, 0, 0);
        (state.max_epochs, state.max_iters, state.epoch_length) = (None, None, None);
        let old = (self.data.take(), state.batch.take(), state.output.take());
        let _entered = Entered::here();
        guarded_drop(old.0)
            .and(guarded_drop(old.1))
            .and(guarded_drop(old.2))
            .map_err(|panic| Error::invalid(format!("dropping what the last run left: {panic}")))
    }

    /// Lets the next `run` go on after the restored checkpoint of a run that `terminate` had ended (early stopping, for
    /// example). Without this call such a run stays ended: the next `run` fires the remaining events, does no
    /// iterations, and says so in the summary. After other restores this call changes nothing.
    ///
    /// ```
    /// use tch_ignite::engine::{Engine, Event, Until};
    /// let make = || {
    ///     let mut trainer = Engine::new(|_: &mut (), _, _: i64| Ok(()));
    ///     trainer.on(Event::EpochCompleted.once(2), |_, engine| { engine.terminate(); Ok(()) });
    ///     trainer
    /// };
    /// let mut trainer = make();
    /// trainer.run(&mut (), vec![1, 2], Until::epochs(5))?;
    /// let state = trainer.checkpoint(&())?;
    ///
    /// let mut resumed = make();
    /// let restored = resumed.restore(&mut (), state, true)?;
    /// assert!(restored.ended.is_some());
    /// resumed.resume_terminated()?;
    /// assert_eq!(resumed.run(&mut (), vec![1, 2], Until::epochs(5))?.epochs, 5);
    /// # Ok::<(), tch_ignite::Error>(())
    /// ```
    ///
    /// # Errors
    /// Refused while the engine is running.
    pub fn resume_terminated(&mut self) -> Result<()> {
        if self.running {
            return Err(Error::invalid(
                "resume_terminated() was called within a run: call it before the next run()",
            ));
        }
        if self.position.previous == PreviousRun::Restored {
            self.position.forget_terminate();
            self.requests.terminate = false;
            self.requests.skip_completed = false;
            self.requests.terminated_by = None;
            self.requests.any = self.requests.is_any();
        }
        Ok(())
    }

    /// Whether this engine runs, or would run, within another one, as evaluators do.
    pub(crate) fn is_nested(&self) -> bool {
        RUNNING.get() > u32::from(self.running)
    }

    /// Whether the outermost run of this thread (this engine's, where it is not nested) began at iteration 0.
    pub(crate) fn began_anew(&self) -> bool {
        ANEW.get()
    }

    /// Iterations begun in this epoch, from 1, including those before a run that went on in mid epoch.
    pub fn iteration_in_epoch(&self) -> u64 {
        self.position.cursor.counter
    }

    /// Settles the budget, the epoch length and the start of the run. Nothing is changed on error, except where the old
    /// data panics when it is dropped.
    fn prepare(
        &mut self,
        data: impl IntoSource<'a, B>,
        until: Until,
        start: Instant,
    ) -> Result<()> {
        until.validate()?;
        let source = data.into_source();
        let plan = self.plan(&*source, until)?;
        let fetches = source.fetches();
        let mut warnings = std::mem::take(&mut self.position.notes);
        if plan.previous == PreviousRun::Restored {
            warnings.extend(changes(&self.position.last_data, &*source));
            let over = plan.phase.is_none() && self.is_used_up(plan.max_epochs, plan.max_iters);
            warnings.extend(self.position.ended_for_good(&self.requests).filter(|_| !over));
        }
        self.apply(plan, until, start);
        self.position.warnings = warnings;
        if self.position.previous != PreviousRun::Suspended {
            self.position.fetches = fetches;
            let old = self.data.replace(source);
            guarded_drop(old).map_err(|panic| {
                Error::invalid(format!("dropping the data of the last run: {panic}"))
            })?;
        }
        Ok(())
    }

    /// Whether one of these budgets is used up.
    fn is_used_up(&self, max_epochs: Option<u64>, max_iters: Option<u64>) -> bool {
        max_epochs.is_some_and(|max| self.epochs_done() >= max)
            || max_iters.is_some_and(|max| self.state.iteration >= max)
    }

    /// Number of whole epochs that are done.
    fn epochs_done(&self) -> u64 {
        let cursor = &self.position.cursor;
        let phase = match self.position.previous {
            PreviousRun::Restored => cursor.resumes_at(),
            _ => cursor.phase,
        };
        self.state.epoch.saturating_sub(u64::from(phase.in_epoch()))
    }

    /// Works out what a run on this data has to do.
    ///
    /// # Errors
    /// Refuses arguments that contradict each other or the state, and data without batches.
    fn plan(&self, source: &(dyn Source<B> + 'a), until: Until) -> Result<Plan> {
        let (state, position) = (&self.state, &self.position);
        let (mut max_epochs, mut max_iters) = (state.max_epochs, state.max_iters);
        for (given, other, ours, theirs) in [
            (until.max_epochs, max_iters, "max_epochs", "max_iters"),
            (until.max_iters, max_epochs, "max_iters", "max_epochs"),
        ] {
            if given.is_some() && other.is_some() {
                return Err(Error::invalid(format!(
                    "To switch from {theirs} to {ours} mode during resume, you must first reset by setting 'engine.state.{theirs} = None' before calling run(). Engine::reset starts anew, with any budget"
                )));
            }
        }
        let has_budget = max_epochs.is_some() || max_iters.is_some();
        max_epochs = until.max_epochs.or(max_epochs);
        max_iters = until.max_iters.or(max_iters);
        let epochs_done = self.epochs_done();
        if has_budget {
            check_budget(max_epochs, max_iters, epochs_done, state.iteration)?;
        }
        let used_up = self.is_used_up(max_epochs, max_iters);
        let was_reset = position.budgeted && !has_budget;
        let mut previous = match position.previous {
            _ if was_reset => PreviousRun::Nothing,
            PreviousRun::Ended | PreviousRun::Loaded if has_budget && used_up => {
                PreviousRun::Nothing
            }
            previous => previous,
        };
        let mut phase = None;
        let at = position.cursor.phase;
        match previous {
            // Only COMPLETED is missing, unless the budget grew.
            PreviousRun::Failed if matches!(at, Phase::Completed | Phase::Ended) && !used_up => {
                previous = PreviousRun::Ended;
            }
            PreviousRun::Restored
                if at.is_end() && !used_up && position.cursor.terminated_by.is_none() =>
            {
                match position.cursor.ended_at {
                    // The limit was one of the process that saved the state, and does not hold in this one.
                    Some(follows) => phase = Some(follows),
                    None => previous = PreviousRun::Ended,
                }
            }
            PreviousRun::Suspended if self.data.is_none() => previous = PreviousRun::Failed,
            _ => {}
        }

        let batches = source.batches();
        let known = until.epoch_length.or(batches);
        let epoch_length = match previous {
            PreviousRun::Nothing if self.data_length().is_some() => known,
            PreviousRun::Nothing => known.or(state.epoch_length),
            _ => state.epoch_length.or(known),
        };
        source.validate().map_err(|error| Error::invalid(format!("{error:#}")))?;
        if epoch_length == Some(0) || known == Some(0) || batches == Some(0) {
            return Err(Error::invalid("Input data has zero size. Please provide non-empty data"));
        }
        if previous != PreviousRun::Nothing
            && until.epoch_length.is_some_and(|length| Some(length) != epoch_length)
        {
            return Err(Error::invalid(format!(
                "Argument epoch_length should be same as in the state, given {} vs {}",
                until.epoch_length.unwrap_or(0),
                epoch_length.unwrap_or(0)
            )));
        }
        if epoch_length.is_none() && !source.fetches() {
            return Err(Error::invalid(
                "epoch_length should be provided if data is None: without data nothing says when an epoch ends; add it to the budget, Until::epochs(3).epoch_length(100)",
            ));
        }
        if previous == PreviousRun::Nothing {
            (max_epochs, max_iters) = (until.max_epochs, until.max_iters);
        }
        if max_epochs.is_none() && max_iters.is_none() && !until.open_ended() {
            max_epochs = Some(if previous == PreviousRun::Nothing { 1 } else { epochs_done + 1 });
        }
        let anew = previous == PreviousRun::Nothing || state.epoch_length.is_none();
        let length_by = match (until.epoch_length, batches) {
            (Some(_), _) => LengthBy::Program,
            (None, Some(_)) if anew => LengthBy::Data,
            _ => LengthBy::State,
        };
        Ok(Plan { previous, phase, max_epochs, max_iters, epoch_length, length_by })
    }

    /// Writes the plan of a run into the engine's state.
    fn apply(&mut self, plan: Plan, until: Until, start: Instant) {
        let (state, position) = (&mut self.state, &mut self.position);
        let was_restored = position.previous == PreviousRun::Restored;
        let cursor = &mut position.cursor;
        match plan.previous {
            PreviousRun::Nothing => {
                (state.iteration, state.epoch) = (0, 0);
                *position = Position::default();
                self.handlers.reset_firings();
            }
            PreviousRun::Ended => {
                cursor.again = None;
                cursor.phase = Phase::Started;
                position.data_start = Some(DataStart::NextPass);
                position.last_data.place = None;
            }
            PreviousRun::Failed => {
                position.data_start = position.data_start.or(Some(DataStart::AtCursor));
            }
            PreviousRun::Restored => {
                if let Some(phase) = plan.phase {
                    (cursor.phase, cursor.ended_early, cursor.again) = (phase, false, None);
                }
                if cursor.phase.has_batch() && !position.refetch {
                    position.refetch = true;
                    cursor.fetched = cursor.fetched.saturating_sub(1);
                }
            }
            PreviousRun::Loaded => self.handlers.reset_firings(),
            PreviousRun::Suspended => {}
        }
        let position = &mut self.position;
        let cursor = &mut position.cursor;
        if !cursor.phase.is_end() {
            (cursor.ended_at, cursor.terminated_by) = (None, None);
        }
        match plan.length_by {
            LengthBy::Program => cursor.length = None,
            LengthBy::Data => {
                let length = plan.epoch_length.unwrap_or(0);
                cursor.length = Some(DataLength { pass: length, epoch: length, walked: None });
            }
            LengthBy::State => {}
        }
        (state.max_epochs, state.max_iters) = (plan.max_epochs, plan.max_iters);
        state.epoch_length = plan.epoch_length;
        (state.run_time, state.epoch_time) = (Duration::ZERO, Duration::ZERO);
        if plan.previous == PreviousRun::Restored {
            // A limit of samples that was reached belonged to an earlier call of `run`; this one counts anew.
            if until.max_samples.is_some_and(|max| state.samples >= max) {
                state.samples = 0;
            }
        } else {
            state.samples = 0;
            self.requests = match plan.previous {
                // Handlers' requests from before the error are done now.
                PreviousRun::Failed => self.requests.of_failed_run(),
                _ => Requests::default(),
            };
        }
        if !was_restored {
            self.random = None;
        }
        position.other_data =
            !matches!(plan.previous, PreviousRun::Nothing | PreviousRun::Suspended);
        position.previous = plan.previous;
        position.budgeted = plan.max_epochs.is_some() || plan.max_iters.is_some();
        cursor.exhausted = false;
        (position.limit, position.completing, position.signal) = (false, false, None);
        position.until = until;
        position.run_start = Some(start);
        position.deadline = until.max_time.and_then(|time| Instant::now().checked_add(time));
        self.exception = None;
    }

    /// Asks the data something. A panic becomes an error of the data; `None` means that there is no data.
    fn ask_data<T>(&self, ask: impl FnOnce(&dyn Source<B>) -> T) -> Result<Option<T>> {
        let Some(data) = self.data.as_deref() else { return Ok(None) };
        guarded_within(|| Ok(Some(ask(data)))).map_err(|error| self.data_error(error))
    }

    /// Moves the data, and the counter of the epoch, to where this run begins.
    fn enter(&mut self) -> Result<()> {
        let Cursor { pass, fetched, .. } = self.position.cursor;
        match self.position.data_start {
            None => {}
            Some(DataStart::Start) => self.seek(0, 0)?,
            Some(DataStart::NextPass) => self.seek(pass + 1, 0)?,
            Some(DataStart::AtCursor) => self.begin_pass_again(pass, fetched)?,
            Some(DataStart::AtIteration) => {
                let iteration = self.state.iteration;
                if let Some(length) = self.state.epoch_length {
                    self.position.cursor.counter = iteration % length.max(1);
                }
                match self.ask_data(|data| data.batches())?.flatten() {
                    Some(0) => return Err(Error::invalid("the data has no batches any more")),
                    Some(length) => self.seek(iteration / length, iteration % length)?,
                    None => self.walk(iteration)?,
                }
                if iteration > 0 {
                    self.warn_if_order_was_drawn()?;
                }
            }
        }
        self.position.data_start = None;
        self.position.last_data.place = None;
        Ok(())
    }

    /// Goes to a position in a pass that another run began. Data that draws its order from libtorch's random numbers
    /// draws the same order again; afterwards the generators are as they were before the call.
    fn begin_pass_again(&mut self, pass: u64, fetched: u64) -> Result<()> {
        let place = self.position.last_data.place.clone();
        let before_pass = self.position.before_pass.take();
        let now = match &before_pass {
            Some(before) => {
                let now = generators()?;
                set_generators(before)?;
                Some(now)
            }
            None => None,
        };
        let mut placed = self.seek_samples(pass, place);
        if let Ok(false) = placed {
            placed = self.seek(pass, fetched).map(|()| true);
        }
        if let Some(now) = &now {
            set_generators(now)?;
        }
        placed?;
        let may_be_beyond_end =
            fetched > 0 && self.ask_data(|data| data.may_be_beyond_end())? == Some(true);
        self.position.skipped_to = may_be_beyond_end.then_some(fetched);
        match before_pass {
            Some(before) => self.position.before_pass = Some(before),
            None if pass > 0 || fetched > 0 => self.warn_if_order_was_drawn()?,
            None => {}
        }
        Ok(())
    }

    /// Warns where a pass was begun in the middle, and the random numbers that the data drew its order from are not
    /// known.
    fn warn_if_order_was_drawn(&mut self) -> Result<()> {
        if let Some(before) = &self.position.before_pass
            && !same_generators(before, &generators()?)
        {
            self.warn(
                "the data draws its order from libtorch's random numbers, and those from before the pass under way were not saved: the rest of this pass comes in another order, so that some samples come twice and others not at all",
            );
        }
        Ok(())
    }

    /// Lets the data go to a position in samples. Returns false where the data or the position cannot do that.
    fn seek_samples(&mut self, pass: u64, place: Option<SamplePosition>) -> Result<bool> {
        let (Some(place), Some(data)) = (place, self.data.as_mut()) else { return Ok(false) };
        guarded_within(|| data.seek_samples(pass, &place)).map_err(|error| self.data_error(error))
    }

    /// Goes past this many batches by fetching them, for data of unknown length.
    fn walk(&mut self, batches: u64) -> Result<()> {
        self.seek(0, 0)?;
        for _ in 0..batches {
            if !self.fetch()? {
                self.seek(self.position.cursor.pass + 1, 0)?;
                if !self.fetch()? {
                    break;
                }
            }
        }
        self.state.samples = 0;
        self.let_go_of_batch()
    }

    /// Moves the data to a batch of a pass. Notes the random numbers first, where the data may draw its order from
    /// them.
    pub(super) fn seek(&mut self, pass: u64, batch: u64) -> Result<()> {
        self.position.cursor.pass = pass;
        self.position.cursor.fetched = batch;
        self.position.skipped_to = None;
        let is_random = self.ask_data(|data| data.is_random())? == Some(true);
        self.position.before_pass = if is_random { Some(generators()?) } else { None };
        match self.data.as_mut() {
            Some(data) => {
                guarded_within(|| data.seek(pass, batch)).map_err(|error| self.data_error(error))
            }
            None => Ok(()),
        }
    }

    /// Adapts epochs to the data there is now, where the data gave them their length: the epoch under way ends with the
    /// pass, and the next ones are whole passes.
    fn follow_data(&mut self) -> Result<()> {
        let Some(length) = self.data_length() else { return Ok(()) };
        let Some(batches) = self.ask_data(|data| data.batches())?.flatten() else { return Ok(()) };
        if batches == 0 {
            return Err(Error::invalid("the data has no batches any more"));
        }
        if batches == self.position.last_data.batches.unwrap_or(length.pass) {
            return Ok(());
        }
        let left = self.ask_data(|data| data.batches_left())?.flatten();
        let cursor = &mut self.position.cursor;
        let left = left.unwrap_or_else(|| batches.saturating_sub(cursor.fetched));
        let begun_with_batch = cursor.phase == Phase::Step && self.position.refetch;
        let done = cursor.counter - u64::from(begun_with_batch && cursor.counter > 0);
        let epoch = match cursor.phase {
            Phase::EpochCompleted => cursor.counter,
            phase if phase.in_epoch() && cursor.counter > 0 => (done + left).max(cursor.counter),
            _ => batches,
        };
        let waits = matches!(cursor.phase, Phase::GetBatch | Phase::Fetch | Phase::RestartData);
        let lost = cursor.phase == Phase::BatchFetched && self.position.refetch;
        if cursor.counter > 0 && left == 0 && (waits || lost) {
            // All batches of the pass were used already, so the epoch ends here.
            cursor.phase = Phase::EpochCompleted;
            self.position.refetch = false;
        }
        cursor.length = Some(DataLength { pass: batches, epoch, walked: None });
        self.state.epoch_length = Some(epoch);
        Ok(())
    }

    /// The epoch length that came from the data; `None` where the program gave or changed it.
    fn data_length(&self) -> Option<DataLength> {
        let length = self.position.cursor.length?;
        (self.state.epoch_length == Some(length.epoch)).then_some(length)
    }

    fn data_error(&self, source: anyhow::Error) -> Error {
        Error::Data { epoch: self.state.epoch, iteration: self.state.iteration, source }
    }

    /// Drops the batch, if there is one. A panic becomes an error.
    #[inline]
    fn let_go_of_batch(&mut self) -> Result<()> {
        match self.state.batch.take() {
            Some(batch) => guarded_drop(batch)
                .map_err(|panic| self.data_error(panic.context("dropping the batch before it"))),
            None => Ok(()),
        }
    }

    /// Drops the output, if there is one. A panic becomes an error.
    #[inline]
    fn let_go_of_output(&mut self) -> Result<()> {
        let (epoch, iteration) = (self.state.epoch, self.state.iteration);
        match self.state.output.take() {
            Some(output) => guarded_drop(output).map_err(|panic| {
                let source = panic.context("dropping its output");
                Error::Step { epoch, iteration, source }
            }),
            None => Ok(()),
        }
    }

    fn let_go_of_data(&mut self) -> Result<()> {
        match self.data.take() {
            Some(data) => guarded_drop(data)
                .map_err(|panic| self.data_error(panic.context("dropping the data"))),
            None => Ok(()),
        }
    }

    /// Notes the position and the settings of the data for the next run. The position is before the last batch if
    /// `again` is true.
    fn note_data(&mut self, again: bool) {
        let again = again && !self.position.refetch;
        // An error of the data was reported already, or will be when the data is used.
        if let Ok(Some(noted)) = self.ask_data(|data| LastData::of(data, again)) {
            let place = match self.position.data_start {
                None => noted.place,
                Some(_) => self.position.last_data.place.clone(),
            };
            self.position.last_data = LastData { place, ..noted };
        }
    }

    fn drive(&mut self, cx: &mut C) -> Result<Stop> {
        self.agree_on_start()?;
        // The handlers of an error that the data raises below may write to the logs.
        self.rewind_restored_logs()?;
        if self.position.data_start == Some(DataStart::AtCursor) {
            self.enter()?;
        }
        if self.position.other_data {
            self.follow_data()?;
        }
        if self.position.refetch {
            self.fetch_again()?;
        }
        if self.position.cursor.phase.in_epoch() {
            self.position.epoch_start = Some(Instant::now());
        }
        self.restore_random_numbers()?;
        if self.requests.any {
            // A restored state may hold requests that were made before it was saved.
            self.obey(self.position.event, cx)?;
        }
        loop {
            // Each arm sets the next phase before it fires its event, so that a run that is interrupted there goes on
            // with what follows.
            let event = match self.position.cursor.phase {
                // The run was suspended before all handlers of this event were called.
                phase if self.position.cursor.again.is_some() && phase != Phase::Completed => {
                    self.position.event
                }
                Phase::Started => {
                    self.position.cursor.ended_early = false;
                    self.position.cursor.phase = Phase::NextEpoch;
                    Event::Started
                }
                Phase::NextEpoch => {
                    if self.is_done() {
                        let limited = self.limit_reached() && !self.budget_done();
                        self.position.cursor.ended_at = limited.then_some(Phase::NextEpoch);
                        self.position.cursor.phase = Phase::Completed;
                    } else {
                        self.begin_epoch();
                    }
                    continue;
                }
                Phase::EpochStarted => {
                    self.position.epoch_start = Some(Instant::now());
                    self.position.epoch_before = Duration::ZERO;
                    self.position.cursor.restarted = false;
                    self.position.cursor.phase = Phase::EpochBegun;
                    Event::EpochStarted
                }
                Phase::EpochBegun => {
                    self.position.cursor.phase = Phase::GetBatch;
                    continue;
                }
                Phase::GetBatch => {
                    if self.position.data_start.is_some() {
                        // Not earlier, because handlers of EPOCH_STARTED may change the batch size.
                        self.enter()?;
                    }
                    self.let_go_of_batch()?;
                    self.position.cursor.phase = Phase::Fetch;
                    if !self.position.fetches {
                        continue;
                    }
                    Event::GetBatchStarted
                }
                Phase::Fetch => match self.fetch()? {
                    true => {
                        self.position.cursor.phase = Phase::BatchFetched;
                        // Not earlier, because this is the run's last output where no further batch comes.
                        self.let_go_of_output()?;
                        if !self.position.fetches {
                            continue;
                        }
                        Event::GetBatchCompleted
                    }
                    false if self.ends_with_pass() => continue,
                    false if self.state.epoch_length.is_none() => {
                        self.end_first_pass()?;
                        continue;
                    }
                    false if self.position.cursor.restarted => {
                        self.warn_of_missing_data();
                        let cursor = &mut self.position.cursor;
                        cursor.exhausted = cursor.counter == 0;
                        cursor.phase = Phase::EpochCompleted;
                        continue;
                    }
                    false => {
                        self.position.cursor.phase = Phase::RestartData;
                        Event::DataloaderStopIteration
                    }
                },
                Phase::RestartData => {
                    self.seek(self.position.cursor.pass + 1, 0)?;
                    self.position.cursor.restarted = true;
                    self.position.cursor.phase = Phase::Fetch;
                    continue;
                }
                Phase::BatchFetched => {
                    self.position.cursor.counter += 1;
                    self.position.cursor.restarted = false;
                    self.state.iteration += 1;
                    self.position.cursor.phase = Phase::Step;
                    Event::IterationStarted
                }
                Phase::Step => {
                    self.step(cx)?;
                    self.position.cursor.phase = Phase::IterationCompleted;
                    Event::IterationCompleted
                }
                Phase::IterationCompleted => {
                    let counter = self.position.cursor.counter;
                    // At least, not exactly: a handler may have made the epoch shorter.
                    let done = self.state.epoch_length.is_some_and(|length| counter >= length);
                    self.position.cursor.phase = if done {
                        Phase::EpochCompleted
                    } else if self.budget_reached() {
                        self.position.cursor.ended_at = Some(Phase::IterationCompleted);
                        Phase::Terminate
                    } else {
                        Phase::GetBatch
                    };
                    continue;
                }
                Phase::EpochCompleted => {
                    self.position.cursor.phase = Phase::EpochEnded;
                    self.note_epoch_time();
                    Event::EpochCompleted
                }
                Phase::EpochEnded => {
                    self.note_epoch_time();
                    self.position.epoch_start = None;
                    self.position.epoch_before = Duration::ZERO;
                    self.position.cursor.phase = Phase::NextEpoch;
                    continue;
                }
                Phase::Terminate => {
                    self.position.cursor.ended_early = true;
                    self.position.cursor.phase = Phase::Completed;
                    self.note_run_time();
                    self.fire(Event::Terminate, cx)?;
                    continue;
                }
                Phase::Completed => {
                    if !self.requests.skip_completed {
                        self.note_run_time();
                        self.position.completing = true;
                        let fired = match self.position.cursor.again.take() {
                            Some(call) => self.fire_again(Event::Completed, &call, cx),
                            None => self.fire(Event::Completed, cx),
                        };
                        self.position.completing = false;
                        fired?;
                        if self.position.cursor.again.is_some() {
                            self.fire(Event::Interrupt, cx)?;
                            return Ok(self.suspended());
                        }
                    }
                    self.position.cursor.phase = Phase::Ended;
                    continue;
                }
                Phase::Ended => {
                    self.position.previous = PreviousRun::Ended;
                    self.note_data(self.position.cursor.needs_batch());
                    self.let_go_of_data()?;
                    return Ok(match self.position.cursor.ended_early {
                        true => Stop::Terminated,
                        false => Stop::Completed,
                    });
                }
            };
            self.position.event = event;
            if self.position.cursor.again.is_none() {
                self.join_metrics(event)?;
                self.fire(event, cx)?;
            } else if let Some(call) = self.position.cursor.again.take() {
                self.fire_again(event, &call, cx)?;
            }
            if !self.agree(event)? {
                // Other requests wait until the ranks meet.
                if std::mem::take(&mut self.requests.skip_batch) {
                    self.pass_over_batch(event)?;
                }
                continue;
            }
            if self.requests.any && self.obey(event, cx)? {
                return Ok(self.suspended());
            }
        }
    }

    fn suspended(&mut self) -> Stop {
        self.position.previous = PreviousRun::Suspended;
        self.position.signal.take().map_or(Stop::Interrupted, Stop::Signal)
    }

    /// Whether a handler of this event may be called again when a suspended run goes on. That holds at events of the
    /// loop itself, where nothing else ends the epoch or the run. It does not hold in a group of processes: the other
    /// ranks would not stop at the same handler.
    pub(crate) fn may_repeat(&self, event: Event) -> bool {
        let of_loop = event.built_in().is_some()
            && !matches!(
                event,
                Event::Terminate
                    | Event::TerminateSingleEpoch
                    | Event::Interrupt
                    | Event::ExceptionRaised
            );
        let asked = &self.requests;
        of_loop
            && !self.joins_metrics()
            && self.step.is_some()
            && self.handlers.firings_under_way() == 1
            && !(asked.ends() || asked.terminate_epoch || asked.skip_batch)
    }

    /// Whether handlers of the event before INTERRUPT were not called yet: they are called when the run goes on.
    pub(crate) fn is_within_event(&self) -> bool {
        self.position.cursor.again.is_some()
    }

    /// Whether the run is about to be suspended because of a signal.
    pub(crate) fn is_stopped_by_signal(&self) -> bool {
        self.requests.interrupt && self.position.signal.is_some()
    }

    /// Stops after the handler that calls this, which [may be repeated](Self::may_repeat) and has asked for an
    /// interrupt. The handlers after it are not called now; when the run goes on, this handler is called again, and
    /// then those.
    pub(crate) fn repeat_from_here(&mut self) {
        self.requests.repeat = true;
    }

    /// Makes the rest of an event's calls when a suspended run goes on, from this one on.
    fn fire_again(&mut self, event: Event, first: &CallAgain, cx: &mut C) -> Result<()> {
        let index = self.handlers.index(event)?;
        match self.handlers.place_of(index, first) {
            Some(place) => self.fire_from(event, index, place, cx),
            None => {
                self.warn(format!(
                    "the run was stopped at handler '{}' of {event}, which is not attached any more: the handlers after it were not called",
                    first.handler
                ));
                Ok(())
            }
        }
    }

    fn begin_epoch(&mut self) {
        if let Some(length) = self.data_length() {
            self.state.epoch_length = Some(length.pass);
            self.position.cursor.length = Some(DataLength { epoch: length.pass, ..length });
        }
        self.state.epoch += 1;
        self.position.cursor.counter = 0;
        self.position.cursor.phase = Phase::EpochStarted;
    }

    /// Fetches the batch that was under way when the state was saved. Where the data has become shorter, this is the
    /// first batch of the next pass.
    fn fetch_again(&mut self) -> Result<()> {
        // The samples of this batch were counted before the state was saved.
        let samples = self.state.samples;
        if !self.fetch()? {
            self.seek(self.position.cursor.pass + 1, 0)?;
            if !self.fetch()? {
                return Err(Error::invalid("the data has no batches any more"));
            }
        }
        self.state.samples = samples;
        self.position.refetch = false;
        Ok(())
    }

    /// Fetches a batch. Returns false where the data is exhausted.
    fn fetch(&mut self) -> Result<bool> {
        let begun = self.clock();
        let Some(data) = self.data.as_mut() else {
            return Ok(false);
        };
        let next = guarded_within(|| {
            let batch = data.next().transpose()?;
            Ok(batch.map(|batch| (batch, data.samples())))
        });
        if let (Some(profile), Some(begun)) = (&self.profile, begun) {
            profile.note_data(begun.elapsed());
        }
        match next {
            Ok(Some((batch, samples))) => {
                if let Some(samples) = samples {
                    self.state.samples += samples;
                } else if self.position.until.max_samples.is_some() {
                    return Err(Error::invalid(
                        "a budget in samples needs a data source that counts them: implement Source::samples",
                    ));
                }
                self.position.cursor.fetched += 1;
                self.let_go_of_batch()?;
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
            return Err(wrap(anyhow::anyhow!(RUNS_ALREADY)));
        };
        let begun = self.clock();
        let output = guarded_within(|| step(cx, self, batch));
        if let (Some(profile), Some(begun)) = (&self.profile, begun) {
            profile.note_step(begun.elapsed());
        }
        self.step = Some(step);
        if self.requests.terminate {
            self.requests
                .terminated_by
                .get_or_insert_with(|| format!("the step of iteration {iteration}"));
        }
        match self.state.output.replace(output.map_err(wrap)?) {
            Some(old) => guarded_drop(old)
                .map_err(|panic| wrap(panic.context("dropping the output before its own"))),
            None => Ok(()),
        }
    }

    /// Whether this run positioned the data at or behind the end of the pass under way, so that the pass does not tell
    /// its length.
    fn overshot(&self) -> bool {
        self.position.skipped_to == Some(self.position.cursor.fetched)
    }

    /// Ends the epoch where data of unknown length is exhausted for the first time, and takes the number of batches as
    /// the epoch length.
    fn end_first_pass(&mut self) -> Result<()> {
        let overshot = self.overshot();
        let cursor = &mut self.position.cursor;
        match cursor.counter {
            0 if overshot => {
                cursor.phase = Phase::RestartData;
                return Ok(());
            }
            0 => {
                return Err(Error::invalid(
                    "Input data has zero size. Please provide non-empty data",
                ));
            }
            _ if overshot => {
                cursor.phase = Phase::EpochCompleted;
                return Ok(());
            }
            _ => {}
        }
        let epoch = cursor.counter;
        cursor.length = Some(DataLength { pass: epoch, epoch, walked: Some(cursor.fetched) });
        cursor.phase = Phase::EpochCompleted;
        self.state.epoch_length = Some(epoch);
        Ok(())
    }

    /// Whether the end of a pass over data of unknown length ends the epoch. It does in a run that goes on with other
    /// data, where a pass has another length than in the earlier run.
    fn ends_with_pass(&mut self) -> bool {
        let overshot = self.overshot();
        let Some(length) = self.data_length() else { return false };
        let Some(walked) = length.walked else { return false };
        let cursor = &mut self.position.cursor;
        let fetched = cursor.fetched;
        if cursor.restarted || fetched == 0 || overshot {
            // This pass does not tell how long it is.
            return false;
        }
        let other_data = std::mem::take(&mut self.position.other_data);
        if fetched == walked {
            return false;
        }
        if !other_data {
            // The passes of this data differ in length; epochs keep the length of the first pass, as in ignite.
            cursor.length = Some(DataLength { walked: None, ..length });
            return false;
        }
        let ends = cursor.counter > 0;
        let epoch = if ends { cursor.counter } else { fetched };
        cursor.length = Some(DataLength { pass: fetched, epoch, walked: Some(fetched) });
        if ends {
            cursor.phase = Phase::EpochCompleted;
        }
        self.state.epoch_length = Some(epoch);
        self.warn(format!(
            "a pass over the data had {walked} batches before, and has {fetched} now: epochs are as long as a pass from here on"
        ));
        ends
    }

    /// Adds a warning about something that looks wrong without being an error to the summary of the run under way. The
    /// same text is added once.
    pub fn warn(&mut self, warning: impl Into<String>) {
        let warning = warning.into();
        if !self.position.warnings.contains(&warning) {
            self.position.warnings.push(warning);
        }
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
        // `warn` adds this text once, not for each of many empty epochs.
        self.warn(warning);
    }

    /// Does what handlers of `event` asked for. Returns true if the run is to be suspended.
    fn obey(&mut self, event: Event, cx: &mut C) -> Result<bool> {
        if std::mem::take(&mut self.requests.terminate_epoch) && !self.requests.ends() {
            self.leave_epoch(event, cx)?;
        }
        if std::mem::take(&mut self.requests.skip_batch) {
            self.pass_over_batch(event)?;
        }
        self.requests.any = false;
        if !self.requests.ends() && std::mem::take(&mut self.requests.interrupt) {
            self.note_run_time();
            self.fire(Event::Interrupt, cx)?;
            self.requests.any = false;
            if !self.requests.ends() {
                return Ok(true);
            }
        }
        if self.requests.ends() {
            let by = self.requests.terminate.then(|| self.position.terminator(&self.requests));
            let cursor = &mut self.position.cursor;
            (cursor.ended_at, cursor.terminated_by) = (Some(cursor.phase), by);
            cursor.phase = Phase::Terminate;
            self.requests = self.requests.after_the_end();
        }
        self.position.cursor.again = None;
        Ok(false)
    }

    fn pass_over_batch(&mut self, event: Event) -> Result<()> {
        if event != Event::GetBatchCompleted {
            return Err(Error::invalid(format!(
                "skip_batch() was called at {event}; call it from a handler of GET_BATCH_COMPLETED"
            )));
        }
        // `terminate_epoch` may have set another phase, which stays.
        if self.position.cursor.phase == Phase::BatchFetched {
            self.position.cursor.phase = Phase::GetBatch;
            self.position.skipped += 1;
        }
        Ok(())
    }

    fn leave_epoch(&mut self, event: Event, cx: &mut C) -> Result<()> {
        let skip = std::mem::take(&mut self.requests.skip_epoch_completed);
        match event {
            Event::Started | Event::EpochStarted => Err(Error::invalid(
                "The method terminate_epoch() should not be called on Event.STARTED or Event.EPOCH_STARTED.",
            )),
            Event::EpochCompleted => Ok(()),
            _ => {
                let cursor = &mut self.position.cursor;
                cursor.phase = if skip { Phase::EpochEnded } else { Phase::EpochCompleted };
                self.seek(self.position.cursor.pass + 1, 0)?;
                self.fire(Event::TerminateSingleEpoch, cx)?;
                // The epoch is left already, so a request from the handlers just called means nothing.
                self.requests.terminate_epoch = false;
                Ok(())
            }
        }
    }

    fn is_done(&self) -> bool {
        // Epochs are counted, and not their iterations, because epochs may differ in length. Without a limit of epochs,
        // empty ones would follow for ever, so exhausted data ends the run.
        let exhausted = self.state.max_epochs.is_none() && self.position.cursor.exhausted;
        self.budget_done() || exhausted || self.limit_reached()
    }

    /// Whether the budget in epochs or iterations is used up, between two epochs.
    fn budget_done(&self) -> bool {
        self.state.max_epochs.is_some_and(|max| self.state.epoch >= max)
            || self.state.max_iters.is_some_and(|max| self.state.iteration >= max)
    }

    /// Whether the run has to end in mid epoch. The budget in epochs cannot be used up there.
    fn budget_reached(&self) -> bool {
        self.state.max_iters.is_some_and(|max| self.state.iteration >= max) || self.limit_reached()
    }

    fn limit_reached(&self) -> bool {
        // The clocks of ranks differ, so ranks use the limit that they agreed on.
        if self.joins_metrics() { self.position.limit } else { self.limit_reached_here() }
    }

    /// Whether this process has reached a limit of samples or time.
    pub(super) fn limit_reached_here(&self) -> bool {
        self.position.until.max_samples.is_some_and(|max| self.state.samples >= max)
            || self.position.deadline.is_some_and(|deadline| Instant::now() >= deadline)
    }

    fn note_epoch_time(&mut self) {
        if let Some(start) = self.position.epoch_start {
            self.state.epoch_time = self.position.epoch_before + start.elapsed();
        }
    }

    fn note_run_time(&mut self) {
        if let Some(start) = self.position.run_start {
            self.state.run_time = start.elapsed();
        }
    }

    /// Calls all handlers of `ExceptionRaised`, and prepares the engine to go on: with the event or the batch that
    /// failed, for an error before the step; otherwise with what follows. Returns the error, joined with the errors of
    /// those handlers.
    fn fail(&mut self, error: Error, cx: &mut C) -> Error {
        let again = self.position.cursor.phase == Phase::BatchFetched;
        self.note_data(again);
        self.note_run_time();
        let position = &mut self.position;
        // A batch that has to be fetched again stays so.
        if !position.refetch {
            let cursor = &mut position.cursor;
            let failed = cursor.phase;
            cursor.phase = match failed {
                Phase::NextEpoch => Phase::Started,
                Phase::EpochBegun => Phase::EpochStarted,
                Phase::Fetch | Phase::RestartData => Phase::GetBatch,
                Phase::BatchFetched => {
                    // `fetched` is 0 where the data was replaced since the batch was fetched.
                    cursor.fetched = cursor.fetched.saturating_sub(1);
                    Phase::GetBatch
                }
                Phase::Step => Phase::IterationCompleted,
                phase => phase,
            };
            if cursor.phase != failed && failed != Phase::Step {
                // The event comes again, and its handlers ask again for what they want.
                self.requests = Requests::default();
            }
        }
        position.cursor.restarted = false;
        position.previous = PreviousRun::Failed;
        // An event after which the run failed may have left handlers of metrics uncalled.
        self.discard_pending_updates();
        self.exception = Some(error);
        // The run has ended: what handlers of EXCEPTION_RAISED ask for is for no other run.
        let requests = self.requests.clone();
        let raised = self.fire(Event::ExceptionRaised, cx);
        self.requests = requests;
        let (data, batch) = (self.let_go_of_data(), self.let_go_of_batch());
        let error = self.exception.take();
        let error = error.unwrap_or_else(|| Error::invalid("the run failed"));
        [raised, data, batch].into_iter().filter_map(Result::err).fold(error, Error::besides)
    }
}

/// Describes how the data differs from the data of the restored state.
fn changes<B>(left: &LastData, data: &dyn Source<B>) -> Vec<String> {
    let mut changes = vec![];
    let (batches, settings) = (data.batches(), data.settings());
    // The settings are more precise, and the batch size may be restored later.
    if batches != left.batches && (settings.is_empty() || left.settings.is_empty()) {
        let shown = |batches: Option<u64>| {
            batches.map_or_else(|| "an unknown number of".to_owned(), |n| n.to_string())
        };
        changes.push(format!(
            "a pass over the data had {} batches when this state was saved, and has {} now: the place in it is counted in batches",
            shown(left.batches),
            shown(batches)
        ));
    }
    for (name, then) in &left.settings {
        if let Some(now) = settings.get(name).filter(|now| *now != then) {
            changes.push(format!("{name} of the data: {then} then, {now} now"));
        }
    }
    changes
}

/// Counts the engines that run on this thread, one within the other.
struct Running;

thread_local! {
    static RUNNING: Cell<u32> = const { Cell::new(0) };
    static ANEW: Cell<bool> = const { Cell::new(false) };
}

/// Whether an engine runs on this thread.
#[cfg(feature = "signals")]
pub(crate) fn is_running_here() -> bool {
    RUNNING.get() > 0
}

impl Running {
    fn begin(anew: bool) -> Self {
        if RUNNING.get() == 0 {
            ANEW.set(anew);
        }
        RUNNING.set(RUNNING.get() + 1);
        Self
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        RUNNING.set(RUNNING.get() - 1);
    }
}
