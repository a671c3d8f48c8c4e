use serde_json::{Map, Value};

use super::{Schedule, load_position, read, save_position, value};
use crate::engine::{Engine, Handler, HandlerSpec};
use crate::error::{Error, Result};
use crate::event::Event;
use crate::event_filter::Events;
use crate::optim::Knob;
use crate::state::StateDict;

/// Drives a knob by a schedule: a handler of the engine. For a hyper-parameter of an optimizer,
/// [`OptimizerScheduler`](super::OptimizerScheduler) finds the knob by names, with ignite's arguments.
///
/// At each of its events ([`Event::IterationStarted`] unless [`on`](Self::on) says otherwise) it writes the next
/// value of the schedule. The first is that of event 0, and is what the first step sees. Nothing is written at
/// construction. An event costs one call of the schedule and one of [`Knob::set`].
///
/// Update k uses value k, whichever event the scheduler counts:
///
/// * On events before the step (`STARTED`, `EPOCH_STARTED`, `GET_BATCH_STARTED`, `GET_BATCH_COMPLETED`,
///   `ITERATION_STARTED`) the value is written right before it is used.
/// * On events after the step ([`OPTIMIZER_STEPPED`](crate::engine::OPTIMIZER_STEPPED), `ITERATION_COMPLETED`,
///   `EPOCH_COMPLETED` and the others, events of the user's own too) value 0 is written when a run begins, at
///   `STARTED`, if the scheduler has written nothing yet. Each event then writes the value of the update that
///   follows, as `scheduler.step()` of torch and accelerate does. See [`write_at_start`](Self::write_at_start).
///
/// Two schedulers of one engine that drive the same knob are refused, because only the last to write would count:
/// join the schedules with [`Schedule::then`], multiply them with [`ChainedScheduler`](super::ChainedScheduler), or
/// give both filtered events (`Event::IterationStarted.before(100)`). A
/// [`ReduceLROnPlateauScheduler`](super::ReduceLROnPlateauScheduler) multiplies the values of the schedule instead.
///
/// ```
/// # use tch::{Device, nn};
/// use tch_ignite::engine::{Engine, Until};
/// use tch_ignite::optim::Optimizer;
/// use tch_ignite::schedule::{CosineAnnealing, ParamScheduler};
///
/// # let vs = nn::VarStore::new(Device::Cpu);
/// # nn::linear(vs.root(), 1, 1, Default::default());
/// let optimizer = Optimizer::sgd(&vs).build()?;
/// let knob = optimizer.group_at(0)?.knob("lr")?;
/// let mut trainer = Engine::new(|lrs: &mut Vec<f64>, _engine, _batch: i32| {
///     lrs.push(optimizer.group_at(0)?.lr()?);
///     Ok(())
/// });
/// trainer.attach(ParamScheduler::new("lr", knob, CosineAnnealing::new(1.0, 0.0, 4)));
/// let mut lrs = vec![];
/// trainer.run(&mut lrs, vec![0; 4], Until::epochs(1))?;
/// assert_eq!((lrs[0], lrs[2]), (1.0, 0.5));
/// # Ok::<(), tch_ignite::Error>(())
/// ```
#[derive(Debug)]
#[doc(alias = "LRScheduler")]
#[doc(alias = "lr_scheduler")]
#[doc(alias = "LearningRateMonitor")]
#[must_use = "a handler is called only once it is attached: `Engine::attach`"]
pub struct ParamScheduler<S = Box<dyn Schedule>> {
    pub(super) name: String,
    pub(super) knob: Knob,
    pub(super) schedule: S,
    events_done: u64,
    save_history: bool,
    event: Events,
    /// Whether all events are fired after the step.
    is_after_step: bool,
    /// The user's choice; `None` leaves it to the events.
    write_at_start: Option<bool>,
    validated: bool,
}

impl<S: Schedule> ParamScheduler<S> {
    /// Makes a scheduler under a name of its own (`"lr (fc)"`), which is also its key in the history.
    pub fn new(name: impl Into<String>, knob: Knob, schedule: S) -> Self {
        Self {
            name: name.into(),
            knob,
            schedule,
            events_done: 0,
            save_history: false,
            event: Event::IterationStarted.into(),
            is_after_step: false,
            write_at_start: None,
            validated: false,
        }
    }

    /// Appends each value to `engine.state.param_history` under the scheduler's name, one entry for each
    /// event with a value for each group. An entry takes 32 bytes or more.
    pub fn save_history(mut self, on: bool) -> Self {
        self.save_history = on;
        self
    }

    /// Acts on these events instead of [`Event::IterationStarted`].
    pub fn on(mut self, event: impl Into<Events>) -> Self {
        self.event = event.into();
        self.is_after_step = self.event.are_after_step();
        self
    }

    /// Sets whether value 0 is written at [`Event::Started`] of the first run, so that the events write the values
    /// from 1 on. The default is true where all events are fired after the step, and false otherwise. Choose false
    /// for events of your own that you fire before the step, and to do what ignite does: there the first update
    /// before the event is made with whatever value the knob had.
    pub fn write_at_start(mut self, on: bool) -> Self {
        self.write_at_start = Some(on);
        self
    }

    pub(super) fn writes_at_start(&self) -> bool {
        self.write_at_start.unwrap_or(self.is_after_step)
    }

    /// Returns the scheduler's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the schedule's value for the event to come. The next call writes it, times the reductions of a
    /// plateau.
    ///
    /// # Errors
    /// Wrong arguments, or a schedule that has ended.
    pub fn get_param(&self) -> Result<f64> {
        self.schedule.validate()?;
        value(&self.schedule, self.events_done)
    }

    /// Writes the next value into the knob, times the reductions of a plateau, and returns what was written: one
    /// event, without an engine.
    ///
    /// # Errors
    /// Wrong arguments, a schedule that has ended, or a value that the knob refuses; the position stays then.
    #[inline]
    pub fn advance(&mut self) -> Result<f64> {
        if !self.validated {
            self.schedule.validate()?;
            self.validated = true;
        }
        let value = self.knob.set_scheduled(value(&self.schedule, self.events_done)?)?;
        self.events_done += 1;
        Ok(value)
    }

    /// The same scheduler of a schedule whose type is not known.
    pub(super) fn boxed(self) -> ParamScheduler
    where
        S: 'static,
    {
        ParamScheduler {
            name: self.name,
            knob: self.knob,
            schedule: Box::new(self.schedule),
            events_done: self.events_done,
            save_history: self.save_history,
            event: self.event,
            is_after_step: self.is_after_step,
            write_at_start: self.write_at_start,
            validated: self.validated,
        }
    }

    /// Handles one event of an engine. With `at_start`, value 0 is written at [`Event::Started`].
    #[inline]
    pub(super) fn handle<C, B, O>(
        &mut self,
        event: Event,
        at_start: bool,
        engine: &mut Engine<'_, C, B, O>,
    ) -> anyhow::Result<()> {
        if at_start && !is_due(event, &mut self.events_done) {
            return Ok(());
        }
        let written = self.advance();
        let value = match at_start {
            true => match unless_ended(&self.schedule, &mut self.events_done, written)? {
                Some(value) => value,
                None => return Ok(()),
            },
            false => written?,
        };
        if self.save_history {
            let values = match self.knob.group() {
                Some(_) => vec![value],
                None => self.knob.values()?,
            };
            engine.state.record_param(&self.name, values);
        }
        Ok(())
    }

    /// Returns the schedule.
    pub fn schedule(&self) -> &S {
        &self.schedule
    }

    pub(crate) fn knob(&self) -> &Knob {
        &self.knob
    }

    /// Returns the number of updates that were made, whichever events are counted: the next has this value.
    pub(crate) fn updates(&self) -> u64 {
        self.events_done.saturating_sub(self.writes_at_start().into())
    }

    /// Goes to where [`updates`](Self::updates) are made, and the value of the next is known to the knob.
    pub(crate) fn go_to_update(&mut self, updates: u64) {
        self.events_done = updates.saturating_add(self.writes_at_start().into());
    }

    /// Returns the position, in ignite's terms where ignite has the schedule.
    pub fn state_dict(&self) -> Map<String, Value> {
        let mut state = self.schedule.save(self.events_done);
        state.insert("param_name".into(), self.knob.name().into());
        state.insert("save_history".into(), self.save_history.into());
        state.insert("param_group_index".into(), self.knob.group().into());
        state
    }

    /// Goes to a saved position. On error nothing is changed.
    ///
    /// # Errors
    /// A missing key, or a state of a scheduler with other arguments or on another parameter.
    pub fn load_state_dict(&mut self, state: &Map<String, Value>) -> Result<()> {
        self.schedule.validate()?;
        let events = self.schedule.load(state)?;
        self.load_rest(state)?;
        self.events_done = events;
        Ok(())
    }

    /// Takes everything but the position from a saved state.
    fn load_rest(&mut self, state: &Map<String, Value>) -> Result<()> {
        let param: String = read(state, "param_name")?;
        // ignite saves it, but it is an argument, and those of the program count.
        let _: bool = read(state, "save_history")?;
        let group: Option<usize> = read(state, "param_group_index")?;
        if param != self.knob.name() || group != self.knob.group() {
            return Err(Error::State(format!(
                "the state is of '{param}' in group {group:?}, but scheduler '{}' drives '{}' in group {:?}",
                self.name,
                self.knob.name(),
                self.knob.group()
            )));
        }
        Ok(())
    }

    /// Adds to a checkpoint what [`state_dict`](Self::state_dict) does not have: the position in events, and the
    /// value of a knob that belongs to no optimizer, because the schedule may only change it with the next event.
    pub(super) fn save_besides(&self, state: &mut StateDict) -> Result<()> {
        save_position(&self.schedule, self.events_done, state)?;
        self.knob.save_value(state)
    }

    /// Goes to the state that [`state_dict`](Self::state_dict) and [`save_besides`](Self::save_besides) gave. Without
    /// `strict` the schedule may have other arguments; the returned text then says which.
    pub(super) fn load_both(
        &mut self,
        values: &Map<String, Value>,
        besides: &mut StateDict,
        strict: bool,
    ) -> Result<Option<String>> {
        self.schedule.validate()?;
        let position = load_position(&self.schedule, besides, strict)?;
        let (events, changed) = match position {
            Some(position) => position,
            None => (self.schedule.load(values)?, None),
        };
        self.load_rest(values)?;
        self.events_done = events;
        self.knob.load_value(besides)?;
        Ok(changed)
    }
}

impl<S: Schedule, C, B, O> Handler<C, B, O> for ParamScheduler<S> {
    fn spec(&self) -> Result<HandlerSpec> {
        let checked = self.knob.check().and_then(|()| self.schedule.validate());
        checked.map_err(|error| Error::invalid(format!("scheduler '{}': {error}", self.name)))?;
        let events = with_start(&self.event, self.writes_at_start());
        let spec = HandlerSpec::new(&*self.name, events);
        let spec = spec.unique_names(unique_names(&self.name, self.save_history));
        let drives = (!self.event.are_filtered()).then(|| self.knob.clone());
        Ok(spec.drives(drives))
    }

    fn save_state(&self) -> Result<Option<StateDict>> {
        let mut state = self.state_dict().into();
        self.save_besides(&mut state)?;
        Ok(Some(state))
    }

    fn load_state(&mut self, mut state: StateDict) -> Result<()> {
        self.load_both(&state.values().clone(), &mut state, true).map(drop)
    }

    fn load_state_partially(&mut self, mut state: StateDict) -> Result<Vec<String>> {
        let changed = self.load_both(&state.values().clone(), &mut state, false)?;
        Ok(changed.into_iter().collect())
    }

    fn param(&self, name: &str) -> Option<Result<f64>> {
        (name == self.name).then(|| self.get_param())
    }

    fn call(
        &mut self,
        event: Event,
        _cx: &mut C,
        engine: &mut Engine<'_, C, B, O>,
    ) -> anyhow::Result<()> {
        self.handle(event, self.writes_at_start(), engine)
    }
}

/// The names that only one handler may have: the scheduler's, and that of the history that it saves.
pub(super) fn unique_names(name: &str, saves_history: bool) -> Vec<String> {
    let history = saves_history.then(|| format!("history of '{name}'"));
    [format!("scheduler '{name}'")].into_iter().chain(history).collect()
}

/// Returns whether an event writes a value, for a scheduler that writes value 0 at [`Event::Started`]. Moves the
/// position where an event counts but writes nothing.
pub(super) fn is_due(event: Event, events_done: &mut u64) -> bool {
    match (event, *events_done) {
        (Event::Started, done) => return done == 0,
        // The scheduler was attached within a run, after value 0 was due, so it goes on with the value of the next
        // update.
        (_, 0) => *events_done = 1,
        _ => {}
    }
    true
}

/// Turns the error of the first event after the schedule's end into `None`, and counts the event: its value would be
/// for an update that is not made. If that update is made, the next event is an error.
pub(super) fn unless_ended<S: Schedule, T>(
    schedule: &S,
    events_done: &mut u64,
    written: Result<T>,
) -> Result<Option<T>> {
    let event = *events_done;
    if written.is_err()
        && schedule.at(event).is_nan()
        && schedule.end().is_some_and(|(end, _)| end == event)
    {
        *events_done += 1;
        return Ok(None);
    }
    written.map(Some)
}

/// Returns the events of a scheduler, with `STARTED` where value 0 is written there.
pub(super) fn with_start(events: &Events, at_start: bool) -> Events {
    if at_start { Event::Started | events.clone() } else { events.clone() }
}
