//! The engine: it runs a step function over data, and calls handlers at events. ignite's `Engine`.

mod checkpoint;
#[cfg_attr(not(feature = "distributed"), path = "no_group.rs")]
mod group;
mod handler;
mod log;
mod metric;
mod moment;
mod peers;
mod position;
mod profile;
mod random_numbers;
mod recorded_values;
mod requests;
mod restored;
mod run;
mod state;
mod summary;
mod tracked;
mod trial;
mod until;

use std::cell::RefCell;
use std::panic::Location;
use std::rc::{Rc, Weak};
use std::time::Instant;

use serde_json::{Map, Value};

pub use crate::event::{Event, OPTIMIZER_STEPPED, WINDOW_COMPLETED};
pub use crate::event_filter::{Events, FilteredEvent};
pub use crate::metrics::MetricValue;
pub(crate) use checkpoint::HANDLERS;
pub use handler::{EventClosure, Handler, HandlerId, HandlerSpec, Priority};
pub use log::Log;
pub use peers::Ranks;
pub use profile::{Profile, ProfileRow};
pub use random_numbers::keep_random_state;
pub use restored::Restored;
#[cfg(feature = "signals")]
pub(crate) use run::is_running_here;
pub use state::{Metrics, State};
pub use summary::{Stop, Summary, TimeSpent};
pub use until::Until;

use crate::data::{IntoSource, Source};
use crate::error::{Error, Result};
use crate::event::Count;
use crate::guard::{Entered, guarded, guarded_drop, guarded_within};
use crate::metrics::{Metric, Usage};
use crate::state::StateDict;
use handler::{Callable, EventIndex, Handlers, SlotKind};
use metric::{MetricHandler, RankMetric};
use peers::Peers;
use position::Position;
use requests::Requests;
use tracked::Tracked;

/// An engine whose step updates parameters. It is the same type as [`Evaluator`]; the two names are for readers.
pub type Trainer<'a, C, B = crate::data::Batch, O = tch::Tensor> = Engine<'a, C, B, O>;

/// An engine whose step updates nothing.
pub type Evaluator<'a, C, B = crate::data::Batch, O = crate::prediction::Prediction> =
    Engine<'a, C, B, O>;

type StepFn<'a, C, B, O> =
    Box<dyn FnMut(&mut C, &mut Engine<'a, C, B, O>, B) -> anyhow::Result<O> + 'a>;

/// Calls a step function for each batch of the data, and handlers at events around the step.
///
/// `C` is your own context (the model, the optimizer, whatever the step needs), `B` a batch, `O` the output of the
/// step. The step and the handlers get the context and the engine itself, so handlers can read `engine.state`, stop the
/// run, add handlers or fire events.
///
/// ```
/// use tch_ignite::engine::{Engine, Event, Until};
///
/// let mut trainer = Engine::new(|total: &mut i32, _engine, batch: i32| {
///     *total += batch;
///     Ok(*total)
/// });
/// trainer.on(Event::EpochCompleted, |total, engine| {
///     println!("epoch {}: {total}", engine.state.epoch);
///     Ok(())
/// });
/// let mut total = 0;
/// let summary = trainer.run(&mut total, vec![1, 2, 3], Until::epochs(2))?;
/// assert_eq!((total, summary.iterations), (12, 6));
/// # Ok::<(), tch_ignite::Error>(())
/// ```
///
/// The diagram shows a run with every event in its place. At `*` the engine does what `terminate`, `terminate_epoch`
/// and `interrupt` asked for, after all handlers of the event were called:
///
/// ```text
/// STARTED *
/// until the budget is used up:
///     epoch += 1
///     EPOCH_STARTED *
///     until epoch_length iterations are done:
///         GET_BATCH_STARTED *
///         fetch a batch           exhausted: DATALOADER_STOP_ITERATION *, restart the data, fetch again;
///                                 twice in a row, or in the first pass of data of unknown length:
///                                 the epoch ends here
///         GET_BATCH_COMPLETED *
///         iteration += 1
///         ITERATION_STARTED *
///         output = step(batch)
///         ITERATION_COMPLETED *
///     EPOCH_COMPLETED *
/// TERMINATE                       only if the run was left early
/// COMPLETED
///
/// terminate_epoch():  TERMINATE_SINGLE_EPOCH, restart the data, EPOCH_COMPLETED
/// interrupt():        INTERRUPT, and `run` returns; the next `run` goes on with what follows
/// an error or panic:  EXCEPTION_RAISED, and `run` returns the error
/// ```
///
/// Without data ([`no_data`](crate::data::no_data)) there are no `GET_BATCH` events. Epochs do not restart the data: it
/// restarts when it is exhausted.
///
/// The next `run` goes on where the last one stopped, if that left something to do or the budget is larger now.
/// Otherwise, and after [`reset`](Engine::reset), it starts anew. It goes on:
///
/// * after `interrupt`, and after an error, with what follows in the diagram above. After an error up to
///   `GET_BATCH_COMPLETED` that event, or the fetching of the batch, is repeated; an error in an iteration gives up
///   that iteration. No other event is repeated or left out.
/// * after `terminate`, or after a limit in samples or time was reached, with `STARTED` and the next epoch; the data
///   restarts.
/// * after [`restore`](Engine::restore) or [`resume`](Engine::resume), with what follows the event at which the
///   checkpoint was written. Limits of time and samples, and [`terminate_at_limit`](Engine::terminate_at_limit),
///   belonged to the process that wrote the checkpoint, so the rest of the budget goes on. A run that `terminate` had
///   ended stays ended, and the summary says so; see [`resume_terminated`](Engine::resume_terminated).
/// * after [`load_state_dict`](Engine::load_state_dict), as in ignite, with `STARTED` and `EPOCH_STARTED` of the epoch
///   that was under way, and the remaining batches of that epoch.
///
/// Where the data, and not [`Until::epoch_length`], gave epochs their length, an epoch is one pass over the current
/// data. After a change of the batch size, the data or the number of processes the epoch under way ends with the pass,
/// and the next epochs are whole passes. For data of unknown length the engine notices the change when the first pass
/// ends.
///
/// An iteration without handlers costs a few nanoseconds, no allocation, no lock and no host sync.
#[doc(alias = "Trainer")]
#[doc(alias = "LightningModule")]
pub struct Engine<'a, C, B, O> {
    /// The state of the run. Handlers may read and change it.
    pub state: State<B, O>,
    step: Option<StepFn<'a, C, B, O>>,
    handlers: Handlers<'a, C, B, O>,
    data: Option<Box<dyn Source<B> + 'a>>,
    position: Position,
    requests: Requests,
    exception: Option<Error>,
    /// The event that was fired last, with handlers or without.
    last_event: Option<Event>,
    running: bool,
    /// Why a registration was refused; the next `run` returns this.
    refused: Option<String>,
    tracked: Tracked<'a, C, O>,
    /// States of the random number generators from a restored checkpoint, to be set when the next run begins.
    random: Option<StateDict>,
    /// The places of the logs in the state that was restored, until the run from there begins.
    log_places: Option<StateDict>,
    profile: Option<Profile>,
    peers: Option<Peers>,
    /// How often the ranks meet, in iterations.
    agree_every: u64,
    /// The attached metrics; weak references, because the list of handlers owns them.
    metrics: Vec<Weak<RefCell<dyn RankMetric<O> + 'a>>>,
}

crate::debug::opaque_debug!(Engine<'a, C, B, O>);

impl<'a, C, B, O> Engine<'a, C, B, O> {
    /// An engine that calls `step(context, engine, batch)` for each batch.
    pub fn new<F>(step: F) -> Self
    where
        F: FnMut(&mut C, &mut Engine<'a, C, B, O>, B) -> anyhow::Result<O> + 'a,
    {
        Self {
            state: State::default(),
            step: Some(Box::new(step)),
            handlers: Handlers::new(),
            data: None,
            position: Position::default(),
            requests: Requests::default(),
            exception: None,
            last_event: None,
            running: false,
            refused: None,
            tracked: Tracked::default(),
            random: None,
            log_places: None,
            profile: None,
            peers: None,
            agree_every: peers::PERIOD,
            metrics: vec![],
        }
    }

    /// Calls `handler(context, engine)` at these events, after the handlers that were registered before. Values that
    /// the handler borrows must be declared before the engine.
    ///
    /// The next `run` returns an error where the registration is refused (an event that is not registered, `every(0)`);
    /// [`add_event_handler`](Self::add_event_handler) returns that error at once.
    #[doc(alias = "add_event_handler")]
    #[track_caller]
    pub fn on<F>(&mut self, events: impl Into<Events>, handler: F) -> &mut Self
    where
        F: EventClosure<'a, C, B, O> + 'a,
    {
        let added = self.add_event_handler(events, handler);
        self.refuse(added)
    }

    /// Attaches a handler of this crate, or a [`Handler`] of your own, at the events that the handler names. The next
    /// `run` returns an error where the handler is refused; [`add_handler`](Self::add_handler) returns it at once.
    #[doc(alias = "add_handler")]
    #[doc(alias = "callbacks")]
    pub fn attach(&mut self, handler: impl Handler<C, B, O> + 'a) -> &mut Self {
        let added = self.add_handler(handler);
        self.refuse(added)
    }

    /// Registers a closure like [`on`](Self::on), and returns its id.
    ///
    /// # Errors
    /// An event is not registered, or a filter is refused.
    #[track_caller]
    pub fn add_event_handler<F>(
        &mut self,
        events: impl Into<Events>,
        handler: F,
    ) -> Result<HandlerId>
    where
        F: EventClosure<'a, C, B, O> + 'a,
    {
        let place = Location::caller();
        let spec = HandlerSpec::new(format!("at {}:{}", place.file(), place.line()), events);
        self.handlers.add(spec, Callable::Closure(Box::new(handler)), SlotKind::Closure)
    }

    /// Attaches a handler like [`attach`](Self::attach), and returns its id.
    ///
    /// # Errors
    /// Arguments or events of the handler are refused, another handler has one of its unique names or drives the same
    /// knob, or its state cannot be saved.
    pub fn add_handler(&mut self, handler: impl Handler<C, B, O> + 'a) -> Result<HandlerId> {
        // The engine asks the handler everything first, so that a refused handler leaves nothing behind.
        let type_name = std::any::type_name_of_val(&handler);
        let refused = |name: &str, panic| Error::invalid(format!("attaching {name}: {panic}"));
        let spec = guarded(|| Ok(handler.spec())).map_err(|panic| refused(type_name, panic))?;
        let spec = spec.map_err(|error| handler::named(type_name, error))?;
        let has_state = guarded(|| Ok(handler.save_state().map(|state| state.is_some())));
        let had_state =
            has_state.map_err(|panic| refused(&format!("handler '{}'", spec.name), panic))??;
        let object = Callable::Object(Box::new(handler));
        self.handlers.add(spec, object, SlotKind::Object { had_state })
    }

    /// The value that the attached scheduler of this name sets next, before the reductions of a plateau: `get_param()` of
    /// ignite's schedulers. Costs a walk over the handlers; nothing where it is not called.
    ///
    /// ```
    /// # use tch::{Device, nn};
    /// use tch_ignite::engine::{Engine, Event, Until};
    /// use tch_ignite::optim::Optimizer;
    /// use tch_ignite::schedule::CosineAnnealingScheduler;
    ///
    /// # let vs = nn::VarStore::new(Device::Cpu);
    /// # nn::linear(vs.root(), 1, 1, Default::default());
    /// let optimizer = Optimizer::sgd(&vs).build()?;
    /// let mut trainer = Engine::new(|_: &mut Vec<f64>, _engine, _batch: i32| Ok(()));
    /// trainer
    ///     .attach(CosineAnnealingScheduler::new(&optimizer, "lr", 1.0, 0.0, 4))
    ///     .on(Event::IterationCompleted, |next, engine| {
    ///         next.push(engine.get_param("lr")?);
    ///         Ok(())
    ///     });
    /// assert_eq!(trainer.get_param("lr")?, 1.0);
    /// let mut next = vec![];
    /// trainer.run(&mut next, vec![0; 2], Until::epochs(1))?;
    /// assert_eq!(next[1], 0.5);
    /// # Ok::<(), tch_ignite::Error>(())
    /// ```
    ///
    /// # Errors
    /// No scheduler of this name is attached, or it is being called at this moment; its schedule has ended.
    pub fn get_param(&self, name: &str) -> Result<f64> {
        self.handlers.param(name)
    }

    /// Computes a metric, and stores the value under this name in `state.metrics`. The metric is computed over each
    /// epoch, unless it has another [`Usage`] of its own. [`add_metric`](Self::add_metric) returns an id to detach the
    /// metric by.
    pub fn metric(&mut self, name: impl Into<String>, metric: impl Metric<O> + 'a) -> &mut Self {
        let usage = metric.usage();
        self.metric_with(name, metric, usage)
    }

    /// Computes a metric with a [`Usage`] of your choice, and stores the value under this name in `state.metrics`.
    pub fn metric_with(
        &mut self,
        name: impl Into<String>,
        metric: impl Metric<O> + 'a,
        usage: Usage,
    ) -> &mut Self {
        let added = self.attach_metric(name.into(), metric, usage);
        self.refuse(added)
    }

    /// Attaches a metric like [`metric`](Self::metric), and returns its id, by which
    /// [`remove_event_handler`](Self::remove_event_handler) detaches it: ignite's `metric.detach(engine)`. Its last value
    /// stays in `state.metrics` until [`Metrics::remove`] takes it away.
    ///
    /// ```
    /// use tch_ignite::engine::{Engine, Until};
    /// use tch_ignite::metrics::Mean;
    /// let mut engine = Engine::new(|_: &mut (), _, x: f64| Ok(x));
    /// let mean = engine.add_metric("mean", Mean::new())?;
    /// engine.run(&mut (), vec![1.0, 3.0], Until::epochs(1))?;
    /// engine.remove_event_handler(mean)?;
    /// engine.run(&mut (), vec![5.0], Until::epochs(1))?;
    /// assert_eq!(engine.state.metrics.get("mean")?, 2.0);
    /// # Ok::<(), tch_ignite::Error>(())
    /// ```
    ///
    /// # Errors
    /// An argument of the metric is refused, or another metric has the name.
    pub fn add_metric(
        &mut self,
        name: impl Into<String>,
        metric: impl Metric<O> + 'a,
    ) -> Result<HandlerId> {
        let usage = metric.usage();
        self.attach_metric(name.into(), metric, usage)
    }

    fn attach_metric(
        &mut self,
        name: String,
        metric: impl Metric<O> + 'a,
        usage: Usage,
    ) -> Result<HandlerId> {
        let metric = Rc::new(RefCell::new(MetricHandler::new(name, metric, usage)));
        let of_rank: Rc<RefCell<dyn RankMetric<O> + 'a>> = metric.clone();
        let id = self.add_handler(metric)?;
        self.metrics.retain(|metric| metric.strong_count() > 0);
        self.metrics.push(Rc::downgrade(&of_rank));
        Ok(id)
    }

    /// The event that was fired last, whether it had handlers or not; `None` before the first: ignite's
    /// `last_event_name`. In a handler this is the handler's event, also after the handler fired another one.
    pub fn last_event_name(&self) -> Option<Event> {
        self.last_event
    }

    fn refuse(&mut self, added: Result<HandlerId>) -> &mut Self {
        if let Err(error) = added {
            self.refused.get_or_insert(error.to_string());
        }
        self
    }

    /// Removes a handler. A firing that is under way still calls the handler.
    ///
    /// # Errors
    /// The handler is not registered, or it panicked when it was dropped.
    pub fn remove_event_handler(&mut self, id: HandlerId) -> Result<()> {
        self.handlers.remove(id)
    }

    /// Whether the handler is registered.
    pub fn has_event_handler(&self, id: HandlerId) -> bool {
        self.handlers.contains(id)
    }

    /// Registers events of your own with this engine. Filters on such an event compare with the number of times it was
    /// fired.
    ///
    /// # Errors
    /// An event is a built-in one.
    pub fn register_events(&mut self, events: impl IntoIterator<Item = Event>) -> Result<()> {
        events.into_iter().try_for_each(|event| self.handlers.register(event))
    }

    /// Whether an event has handlers.
    pub(crate) fn listens(&self, event: Event) -> bool {
        self.handlers.index(event).is_ok_and(|index| !self.handlers.is_empty(index))
    }

    /// Calls the handlers of an event at once. The step or a handler calls this for events of your own.
    ///
    /// ```
    /// use tch_ignite::engine::{Engine, Event, Until};
    ///
    /// const BACKWARD_COMPLETED: Event = Event::custom("backward_completed");
    ///
    /// let mut trainer = Engine::new(|seen: &mut u32, engine, _batch: ()| {
    ///     engine.fire_event(BACKWARD_COMPLETED, seen)?;
    ///     Ok(())
    /// });
    /// trainer.register_events([BACKWARD_COMPLETED])?;
    /// trainer.on(BACKWARD_COMPLETED.every(2), |seen, _| { *seen += 1; Ok(()) });
    /// let mut seen = 0;
    /// trainer.run(&mut seen, vec![(); 6], Until::epochs(1))?;
    /// assert_eq!(seen, 3);
    /// # Ok::<(), tch_ignite::Error>(())
    /// ```
    ///
    /// # Errors
    /// The event is not registered, or a handler failed; the handlers after it are not called.
    pub fn fire_event(&mut self, event: Event, cx: &mut C) -> Result<()> {
        let index = self.handlers.index(event)?;
        let outer = self.last_event.replace(event);
        let _entered = Entered::here();
        let fired = self.fire_from(event, index, (0, 0), cx);
        if self.handlers.firings_under_way() > 0 {
            // A handler fired this event, and goes on.
            self.last_event = outer;
        }
        fired
    }

    // The loop fires each event, and most have no handlers.
    #[inline(always)]
    fn fire(&mut self, event: Event, cx: &mut C) -> Result<()> {
        let Some(index) = event.built_in().map(EventIndex::built_in) else {
            return self.fire_event(event, cx);
        };
        self.last_event = Some(event);
        match self.handlers.is_empty(index) {
            true => Ok(()),
            false => self.fire_from(event, index, (0, 0), cx),
        }
    }

    /// Calls the handlers of an event from this place on: a priority, and a position in the list of that priority.
    fn fire_from(
        &mut self,
        event: Event,
        index: EventIndex,
        mut place: (usize, usize),
        cx: &mut C,
    ) -> Result<()> {
        let firings = self.handlers.count_firing(index);
        let number = match event.count() {
            Count::Iteration => self.state.iteration,
            Count::Epoch => self.state.epoch,
            Count::Firings => firings,
            Count::None => 0,
        };
        let begun = self.clock();
        let removals = self.handlers.begin();
        let mut result = Ok(());
        while let Some(due) = self.handlers.next_due(index, &mut place, number, removals) {
            let here = (place.0, place.1 - 1);
            let called = match due {
                Ok(slot) => self.call(event, slot, cx),
                Err(panicked) => Err(self.handler_error(panicked.name, event, panicked.source)),
            };
            if called.is_err() {
                result = result.and(called);
                match event {
                    // The other handlers are still called, because nothing else tells them of the error.
                    Event::ExceptionRaised => {}
                    // Work is saved though another handler failed, because no further event of the run follows.
                    Event::Interrupt | Event::Terminate | Event::Completed => {
                        place = place.max((Priority::Save as usize, 0));
                    }
                    _ => break,
                }
            }
            if self.requests.repeat {
                self.requests.repeat = false;
                self.position.cursor.again = self.handlers.call_at(index, here);
                break;
            }
        }
        if let Err(panicked) = self.handlers.end() {
            let dropped = self.handler_error(panicked.name, event, panicked.source);
            result = result.and(Err(dropped));
        }
        if let (Some(profile), Some(begun)) = (&self.profile, begun) {
            profile.note_event(event, begun.elapsed());
        }
        result
    }

    /// The current time, if a profile is being recorded.
    #[inline]
    fn clock(&self) -> Option<Instant> {
        self.profile.is_some().then(Instant::now)
    }

    /// Calls a handler, unless it is already running further out.
    #[inline]
    fn call(&mut self, event: Event, slot: usize, cx: &mut C) -> Result<()> {
        let Some(mut callable) = self.handlers.take(slot) else { return Ok(()) };
        let begun = self.clock();
        let result = guarded_within(|| match &mut callable {
            Callable::Closure(closure) => closure(cx, self),
            Callable::Object(handler) => match self.handlers.reach(slot) {
                (Ranks::Main, _) if !self.is_main() => Ok(()),
                (_, false) if trial::in_trial() => Ok(()),
                _ => handler.call(event, cx, self),
            },
        });
        self.handlers.put_back(slot, callable);
        if let (Some(profile), Some(begun)) = (&self.profile, begun) {
            let (id, name) = (self.handlers.id(slot), || self.handlers.name(slot));
            profile.note_handler(id, event, begun.elapsed(), name);
        }
        if self.requests.terminate && self.requests.terminated_by.is_none() {
            self.note_who_terminated(event, slot);
        }
        match result {
            Ok(()) => Ok(()),
            Err(source) => Err(self.handler_error(self.handlers.name(slot), event, source)),
        }
    }

    #[cold]
    fn note_who_terminated(&mut self, event: Event, slot: usize) {
        let name = self.handlers.name(slot);
        let (epoch, iteration) = (self.state.epoch, self.state.iteration);
        let text = format!("handler {name} of {event} (epoch {epoch}, iteration {iteration})");
        self.requests.terminated_by = Some(text);
    }

    #[cold]
    fn handler_error(&self, handler: String, event: Event, source: anyhow::Error) -> Error {
        let (epoch, iteration) = (self.state.epoch, self.state.iteration);
        Error::Handler { handler, event, epoch, iteration, source }
    }

    /// Ends the run after the handlers of the current event, with `TERMINATE` and `COMPLETED`, and without
    /// `EPOCH_COMPLETED`.
    pub fn terminate(&mut self) {
        self.requests.any = true;
        self.requests.terminate = true;
    }

    /// Like [`terminate`](Self::terminate), without `COMPLETED`.
    pub fn terminate_skip_completed(&mut self) {
        self.terminate();
        self.requests.skip_completed = true;
    }

    /// Ends the run like [`terminate`](Self::terminate), for a limit of this process, such as the time that a job may
    /// take. A checkpoint does not hold that request: where it was written at the same event or at the end of this run,
    /// the resumed run goes on with what would have followed. In the same process the next `run` does the same as after
    /// `terminate`.
    pub fn terminate_at_limit(&mut self) {
        self.requests.any = true;
        self.requests.limit = true;
    }

    /// Leaves the epoch after the handlers of the current event, with `TERMINATE_SINGLE_EPOCH` and `EPOCH_COMPLETED`;
    /// the next epoch begins with the data restarted. A call from a handler of `STARTED` or `EPOCH_STARTED` ends the
    /// run with an error; a call from a handler of `EPOCH_COMPLETED` has no effect.
    pub fn terminate_epoch(&mut self) {
        self.requests.any = true;
        self.requests.terminate_epoch = true;
    }

    /// Like [`terminate_epoch`](Self::terminate_epoch), without `EPOCH_COMPLETED`.
    pub fn terminate_epoch_skip_completed(&mut self) {
        self.terminate_epoch();
        self.requests.skip_epoch_completed = true;
    }

    /// Suspends the run after the handlers of the current event, with `INTERRUPT`: `run` returns, and the next `run`
    /// goes on with what follows, on the data of the suspended run.
    pub fn interrupt(&mut self) {
        self.requests.any = true;
        self.requests.interrupt = true;
    }

    pub(crate) fn interrupt_for_signal(&mut self, signal: i32) {
        self.interrupt();
        self.position.signal = Some(signal);
    }

    /// Skips the batch that was fetched: there is no iteration with it, and the next batch is fetched. Only handlers of
    /// `GET_BATCH_COMPLETED` may call this; after a call from a handler of another event the run ends with an error.
    ///
    /// The position in the data is then no longer the number of iterations: a run that goes on after
    /// [`load_state_dict`](Self::load_state_dict) begins as many batches too early as were skipped. Checkpoints hold
    /// the position itself.
    pub fn skip_batch(&mut self) {
        self.requests.any = true;
        self.requests.skip_batch = true;
    }

    /// Starts to measure where the time goes, and returns the record; the [`Summary`] of a run then says it in one line,
    /// too. Costs two readings of the clock for each step, fetch, event and handler: some 100 ns each.
    ///
    /// ```
    /// use tch_ignite::engine::{Engine, Event, Until};
    /// let mut trainer = Engine::new(|_: &mut (), _, _: ()| Ok(()));
    /// trainer.on(Event::EpochCompleted, |_, _| Ok(()));
    /// let profile = trainer.profile();
    /// trainer.run(&mut (), vec![(); 10], Until::epochs(2))?;
    /// println!("{profile}");
    /// assert_eq!(profile.basic()[1].count, 20); // steps
    /// assert_eq!(profile.handlers()[0].count, 2);
    /// # Ok::<(), tch_ignite::Error>(())
    /// ```
    pub fn profile(&mut self) -> Profile {
        self.profile.get_or_insert_default().clone()
    }

    /// Replaces the data at once, also within a run; `epoch_length` stays as it is.
    ///
    /// # Errors
    /// The data is refused or has no batches (the old data stays then), or it could not go to its start.
    pub fn set_data(&mut self, data: impl IntoSource<'a, B>) -> Result<()> {
        let _entered = Entered::here();
        let source = guarded_within(|| {
            let source = data.into_source();
            source.validate()?;
            anyhow::ensure!(
                source.batches() != Some(0),
                "Input data has zero size. Please provide non-empty data"
            );
            let fetches = source.fetches();
            Ok((source, fetches))
        });
        let (source, fetches) = source.map_err(|error| Error::invalid(format!("{error:#}")))?;
        let old = self.data.replace(source);
        self.position.replace_data(fetches);
        let sought = self.seek(0, 0);
        guarded_drop(old)
            .map_err(|panic| {
                Error::invalid(format!("dropping the data that was replaced: {panic}"))
            })
            .and(sought)
    }

    /// The error of the run, for handlers of [`Event::ExceptionRaised`].
    pub fn exception(&self) -> Option<&Error> {
        self.exception.as_ref()
    }

    /// The position as ignite saves it: `epoch_length`, `iteration`, and `max_iters` or `max_epochs`.
    pub fn state_dict(&self) -> Map<String, Value> {
        self.state.save()
    }

    /// Loads a position that [`state_dict`](Self::state_dict) saved. The next `run` continues there, in mid epoch too,
    /// with the batches that an uninterrupted run would see. Nothing is changed on error.
    ///
    /// # Errors
    /// Refused within a run, and for a state without exactly one of `iteration` and `epoch` and one of the two budgets,
    /// or with a budget smaller than the position.
    pub fn load_state_dict(&mut self, state: &Map<String, Value>) -> Result<()> {
        if self.running {
            return Err(Error::invalid(
                "load_state_dict() was called within a run: call it before run()",
            ));
        }
        self.state.load(state)?;
        (self.requests, self.random, self.log_places) = (Requests::default(), None, None);
        let budgeted = self.state.max_epochs.is_some() || self.state.max_iters.is_some();
        self.position = Position::loaded(budgeted);
        self.data = None;
        Ok(())
    }
}
