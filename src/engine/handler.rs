use std::cell::RefCell;
use std::collections::HashSet;
use std::rc::Rc;

use super::position::CallAgain;
use super::{Engine, Event, Events, Log, Ranks};
use crate::error::{Error, Result};
use crate::event::BUILT_IN;
use crate::event_filter::FilteredEvent;
use crate::guard::{guarded, guarded_drop};
use crate::optim::Knob;
use crate::state::StateDict;

/// A handler with a name and a state that is called at events. All built-in handlers are of this kind; implement it for
/// your own where a closure is not enough.
///
/// ```
/// use tch_ignite::engine::{Engine, Event, Handler, HandlerSpec, Until};
///
/// /// Counts the epochs.
/// #[derive(Default)]
/// struct Epochs(u64);
///
/// impl<C, B, O> Handler<C, B, O> for Epochs {
///     fn spec(&self) -> tch_ignite::Result<HandlerSpec> {
///         Ok(HandlerSpec::new("epochs", Event::EpochCompleted))
///     }
///
///     fn call(&mut self, _: Event, _: &mut C, _: &mut Engine<'_, C, B, O>) -> anyhow::Result<()> {
///         self.0 += 1;
///         Ok(())
///     }
/// }
///
/// let epochs = std::rc::Rc::new(std::cell::RefCell::new(Epochs::default()));
/// let mut trainer = Engine::new(|_: &mut (), _, _: i64| Ok(()));
/// trainer.attach(epochs.clone());
/// trainer.run(&mut (), vec![1, 2], Until::epochs(3))?;
/// assert_eq!(epochs.borrow().0, 3);
/// # Ok::<(), tch_ignite::Error>(())
/// ```
#[diagnostic::on_unimplemented(
    message = "`{Self}` is no handler of an engine with context `{C}`, batches `{B}` and outputs `{O}`",
    note = "a closure is registered with its event: `engine.on(Event::EpochCompleted, |cx, engine| {{ ..; Ok(()) }})`"
)]
pub trait Handler<C, B, O> {
    /// Describes the handler. The engine asks once, when the handler is attached.
    ///
    /// # Errors
    /// The handler's arguments are wrong. The handler is then refused.
    fn spec(&self) -> Result<HandlerSpec>;

    /// The state that the handler needs to go on in another process; `None` where it needs none.
    ///
    /// # Errors
    /// The state cannot be saved.
    fn save_state(&self) -> Result<Option<StateDict>> {
        Ok(None)
    }

    /// Loads a state that [`save_state`](Self::save_state) gave.
    ///
    /// # Errors
    /// The state does not fit, or the handler keeps none.
    fn load_state(&mut self, state: StateDict) -> Result<()> {
        let _ = state;
        Err(Error::State("the handler keeps no state".into()))
    }

    /// Loads as much as possible of a state that [`save_state`](Self::save_state) gave, and returns a line for each
    /// difference. The engine calls this instead of [`load_state`](Self::load_state) where a run is resumed without
    /// `strict`. By default all of the state has to fit.
    ///
    /// # Errors
    /// No part of the state fits.
    fn load_state_partially(&mut self, state: StateDict) -> Result<Vec<String>> {
        self.load_state(state).map(|()| vec![])
    }

    /// The value that the handler sets next under this name, for [`Engine::get_param`]; `None` where it sets none of that
    /// name. Schedulers have one.
    fn param(&self, name: &str) -> Option<Result<f64>> {
        let _ = name;
        None
    }

    /// Handles an event. The engine calls this at each of the handler's events.
    ///
    /// # Errors
    /// An error ends the run, with the handler's name and the event.
    fn call(
        &mut self,
        event: Event,
        cx: &mut C,
        engine: &mut Engine<'_, C, B, O>,
    ) -> anyhow::Result<()>;
}

/// A closure that [`Engine::on`] and [`Engine::add_event_handler`] take: every `FnMut(&mut C, &mut Engine<'a, C, B, O>) ->
/// anyhow::Result<()>`.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is no closure `|cx, engine| {{ ..; Ok(()) }}` for an engine with context `{C}`",
    note = "a scheduler, logger or other handler is attached, at events of your choice: `engine.attach(scheduler.on(Event::IterationStarted))`"
)]
pub trait EventClosure<'a, C, B, O>:
    FnMut(&mut C, &mut Engine<'a, C, B, O>) -> anyhow::Result<()>
{
}

impl<'a, C, B, O, F> EventClosure<'a, C, B, O> for F where
    F: FnMut(&mut C, &mut Engine<'a, C, B, O>) -> anyhow::Result<()>
{
}

/// A handler's description of itself, for the engine: see [`Handler::spec`].
#[derive(Clone)]
pub struct HandlerSpec {
    pub(crate) name: String,
    pub(crate) events: Events,
    pub(crate) priority: Priority,
    pub(crate) ranks: Ranks,
    differs_by_rank: bool,
    runs_in_trials: Option<bool>,
    pub(crate) unique_names: Vec<String>,
    pub(crate) drives: Vec<Knob>,
    pub(crate) logs: Vec<Rc<dyn Log>>,
}

impl HandlerSpec {
    /// A handler of this name that is called at these events. Errors show the name, and checkpoints keep the handler's
    /// state under it.
    pub fn new(name: impl Into<String>, events: impl Into<Events>) -> Self {
        Self {
            name: name.into(),
            events: events.into(),
            priority: Priority::Normal,
            ranks: Ranks::All,
            differs_by_rank: true,
            runs_in_trials: None,
            unique_names: vec![],
            drives: vec![],
            logs: vec![],
        }
    }

    /// Sets the handler's place among the handlers of an event; by default [`Priority::Normal`]. Handlers of equal
    /// priority are called in the order in which they were attached.
    pub fn priority(mut self, priority: Priority) -> Self {
        self.priority = priority;
        self
    }

    /// Sets the ranks that call the handler, in an engine of several processes; by default [`Ranks::All`].
    pub fn ranks(mut self, ranks: Ranks) -> Self {
        self.ranks = ranks;
        self
    }

    /// Sets whether the state of a handler that all ranks call may differ between ranks; by default it may. Each rank then
    /// sends its state for a checkpoint, which costs time where the state is large, and the checkpoint holds the states
    /// that differ from the main rank's. With false all ranks get the main rank's state back.
    pub fn differs_by_rank(mut self, differs: bool) -> Self {
        self.differs_by_rank = differs;
        self
    }

    /// Sets whether a trial run, such as that of [`LrFinder`](crate::handlers::LrFinder), calls the handler. A trial
    /// run must leave no trace: afterwards the engine restores the state that [`save_state`](Handler::save_state) gave
    /// before. By default a trial run calls the handlers that all ranks call ([`Ranks::All`]), because a handler of the
    /// main rank writes, draws or sends.
    pub fn runs_in_trials(mut self, runs: bool) -> Self {
        self.runs_in_trials = Some(runs);
        self
    }

    /// Adds names that no other handler of the engine may have, such as `"metric 'loss'"`: two handlers of that name
    /// would overwrite each other's values.
    pub fn unique_names(mut self, names: impl IntoIterator<Item = String>) -> Self {
        self.unique_names.extend(names);
        self
    }

    /// Adds knobs whose values the handler sets, without regard to their old values. A second handler that drives one
    /// of them is refused.
    pub fn drives(mut self, knobs: impl IntoIterator<Item = Knob>) -> Self {
        self.drives.extend(knobs);
        self
    }

    /// Adds logs that the handler writes to. They are rewound with the engine when a run is resumed.
    pub fn logs(mut self, logs: impl IntoIterator<Item = Rc<dyn Log>>) -> Self {
        self.logs.extend(logs);
        self
    }

    /// Whether each rank keeps a state of its own.
    pub(super) fn has_state_by_rank(&self) -> bool {
        self.ranks == Ranks::All && self.differs_by_rank
    }

    /// Whether a trial run calls the handler.
    pub(super) fn is_called_in_trials(&self) -> bool {
        self.runs_in_trials.unwrap_or(self.ranks == Ranks::All)
    }
}

impl std::fmt::Debug for HandlerSpec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let logs: Vec<_> = self.logs.iter().map(|log| log.path()).collect();
        f.debug_struct("HandlerSpec")
            .field("name", &self.name)
            .field("events", &self.events)
            .field("priority", &self.priority)
            .field("ranks", &self.ranks)
            .field("differs_by_rank", &self.differs_by_rank)
            .field("runs_in_trials", &self.is_called_in_trials())
            .field("unique_names", &self.unique_names)
            .field("drives", &self.drives)
            .field("logs", &logs)
            .finish()
    }
}

/// When a handler is called among the handlers of the same event.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Priority {
    /// Before closures and most handlers.
    First,
    /// In the order of registration. Closures have this priority, and handlers by default.
    Normal,
    /// After all of these: for handlers that read what others did.
    Last,
    /// After all others: for handlers that save what the others did. A checkpoint must not fall between two handlers of
    /// an event.
    Save,
}

pub(super) const PRIORITIES: usize = 4;

/// Puts the name of a handler's type before the text of an argument that it refuses. Metrics and schedulers begin the text
/// with their own names.
pub(super) fn named(type_name: &str, error: Error) -> Error {
    let name = short(type_name);
    let is_named = |text: &str| {
        name == "MetricHandler" || text.starts_with(name) || text.starts_with("scheduler '")
    };
    match error {
        Error::InvalidArgument(text) if is_named(&text) => Error::InvalidArgument(text),
        Error::InvalidArgument(text) => Error::invalid(format!("{name}: {text}")),
        other => other,
    }
}

/// The last part of the name of a type, without its parameters; of the type within, for a shared handler.
fn short(type_name: &str) -> &str {
    let (outer, parameters) = match type_name.split_once('<') {
        Some((outer, parameters)) => (outer, Some(parameters)),
        None => (type_name.trim_end_matches('>'), None),
    };
    match (outer.rsplit("::").next().unwrap_or(outer), parameters) {
        ("Rc" | "RefCell", Some(inner)) => short(inner),
        (name, _) => name,
    }
}

/// A shared handler: attach a clone, and read the handler through the other.
#[deny(clippy::missing_trait_methods)]
impl<C, B, O, H: Handler<C, B, O>> Handler<C, B, O> for Rc<RefCell<H>> {
    fn spec(&self) -> Result<HandlerSpec> {
        let handler = self.try_borrow();
        handler
            .map_err(|_| {
                Error::invalid(
                    "the handler is borrowed mutably: end that borrow before attaching it",
                )
            })?
            .spec()
    }

    fn save_state(&self) -> Result<Option<StateDict>> {
        self.try_borrow().map_err(running)?.save_state()
    }

    fn load_state(&mut self, state: StateDict) -> Result<()> {
        self.try_borrow_mut().map_err(running)?.load_state(state)
    }

    fn load_state_partially(&mut self, state: StateDict) -> Result<Vec<String>> {
        self.try_borrow_mut().map_err(running)?.load_state_partially(state)
    }

    fn param(&self, name: &str) -> Option<Result<f64>> {
        // A handler that is borrowed mutably is not looked into, as one that runs is not.
        self.try_borrow().ok()?.param(name)
    }

    fn call(
        &mut self,
        event: Event,
        cx: &mut C,
        engine: &mut Engine<'_, C, B, O>,
    ) -> anyhow::Result<()> {
        self.try_borrow_mut()?.call(event, cx, engine)
    }
}

fn running<E>(_: E) -> Error {
    Error::State("a handler that is running has no state".into())
}

/// Identifies a registered handler, to remove it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct HandlerId(u64);

pub(super) type Closure<'a, C, B, O> =
    Box<dyn FnMut(&mut C, &mut Engine<'a, C, B, O>) -> anyhow::Result<()> + 'a>;

pub(super) enum Callable<'a, C, B, O> {
    Closure(Closure<'a, C, B, O>),
    Object(Box<dyn Handler<C, B, O> + 'a>),
}

/// A handler in the engine. It is taken out while it runs.
struct Slot<'a, C, B, O> {
    id: HandlerId,
    callable: Option<Callable<'a, C, B, O>>,
    ranks: Ranks,
    in_trials: bool,
    kind: SlotKind,
    spec: HandlerSpec,
    /// The events at which the handler is called, once for each of its registrations.
    events: Vec<EventIndex>,
    /// The number of the removal that removed the handler; `None` while it is attached.
    removed: Option<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum SlotKind {
    Closure,
    Object {
        /// Whether the handler had a state when it was attached.
        had_state: bool,
    },
}

impl<C, B, O> Slot<'_, C, B, O> {
    /// The handler's name as errors show it: a closure's is the place where it was registered.
    fn shown_name(&self) -> String {
        match self.kind {
            SlotKind::Closure => self.spec.name.clone(),
            SlotKind::Object { .. } => format!("'{}'", self.spec.name),
        }
    }
}

/// A handler's place in the list of an event.
struct Registration {
    slot: usize,
    /// `None` where the handler is called at every occurrence.
    filter: Option<FilteredEvent>,
}

struct CustomEvent {
    name: &'static str,
    firings: u64,
}

/// The index of an event's lists of handlers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct EventIndex(usize);

impl EventIndex {
    pub(super) const fn built_in(index: usize) -> Self {
        Self(index)
    }
}

/// All handlers of an engine: by event, then by priority, in order of registration.
pub(super) struct Handlers<'a, C, B, O> {
    slots: Vec<Slot<'a, C, B, O>>,
    lists: Vec<Lists>,
    custom: Vec<CustomEvent>,
    next_id: u64,
    removals: u64,
    /// Slots of removed handlers that firings under way may still call.
    leaving: Vec<usize>,
    /// Number of slots whose handlers are gone.
    vacant: usize,
    /// Number of firings under way, one within the other.
    depth: u32,
    /// Whether a trial run is under way, after which removed handlers come back.
    held: bool,
}

/// The handlers of an event, by priority.
#[derive(Default)]
struct Lists {
    by_priority: [Vec<Registration>; PRIORITIES],
    /// Number of registrations of handlers that were not removed.
    live: usize,
}

impl<'a, C, B, O> Handlers<'a, C, B, O> {
    pub(super) fn new() -> Self {
        let lists = (0..BUILT_IN).map(|_| Lists::default()).collect();
        let (slots, custom, leaving) = (vec![], vec![], vec![]);
        let (next_id, removals, vacant, depth, held) = (0, 0, 0, 0, false);
        Self { slots, lists, custom, next_id, removals, leaving, vacant, depth, held }
    }

    pub(super) fn register(&mut self, event: Event) -> Result<()> {
        let Event::Custom(name) = event else {
            return Err(Error::invalid(format!(
                "{event} is there already: register an event of your own once, under a name of its own"
            )));
        };
        if self.custom.iter().all(|known| known.name != name) {
            self.custom.push(CustomEvent { name, firings: 0 });
            self.lists.push(Lists::default());
        }
        Ok(())
    }

    pub(super) fn index(&self, event: Event) -> Result<EventIndex> {
        if let Some(index) = event.built_in() {
            return Ok(EventIndex(index));
        }
        let custom = || self.custom.iter().map(|known| known.name);
        match custom().position(|name| Event::Custom(name) == event) {
            Some(index) => Ok(EventIndex(BUILT_IN + index)),
            None => Err(Error::invalid(format!(
                "Event {event} is not a valid event for this Engine. Register it with register_events; registered are: {}",
                custom().collect::<Vec<_>>().join(", ")
            ))),
        }
    }

    /// The event itself, or the alternative to it where this engine does not know the event.
    fn known<'e>(&self, mut event: &'e FilteredEvent) -> &'e FilteredEvent {
        while let Some(other) = &event.or
            && self.index(event.event).is_err()
        {
            event = other;
        }
        event
    }

    /// # Errors
    /// The events, filters, names or knobs are refused. Nothing is registered then.
    pub(super) fn add(
        &mut self,
        spec: HandlerSpec,
        callable: Callable<'a, C, B, O>,
        kind: SlotKind,
    ) -> Result<HandlerId> {
        if spec.events.0.is_empty() {
            let name = &spec.name;
            return Err(Error::invalid(format!(
                "handler '{name}' names no event to be called at: give its HandlerSpec one"
            )));
        }
        let mut indices = Vec::with_capacity(spec.events.0.len());
        let events: Vec<_> = spec.events.0.iter().map(|event| self.known(event)).collect();
        for event in &events {
            event.validate()?;
            indices.push(self.index(event.event)?);
        }
        let living = self.slots.iter().filter(|slot| slot.removed.is_none());
        let mut names: HashSet<_> = living.flat_map(|slot| &slot.spec.unique_names).collect();
        if let Some(taken) = spec.unique_names.iter().find(|name| !names.insert(name)) {
            return Err(Error::invalid(format!(
                "there is a {taken} already: give one of them another name"
            )));
        }
        self.check_knobs(&spec)?;
        let id = HandlerId(self.next_id);
        self.next_id += 1;
        let slot = self.slots.len();
        for (index, event) in indices.iter().zip(events) {
            let filter = (!event.always()).then(|| event.clone());
            let lists = &mut self.lists[index.0];
            lists.by_priority[spec.priority as usize].push(Registration { slot, filter });
            lists.live += 1;
        }
        let (callable, events, removed) = (Some(callable), indices, None);
        let (ranks, in_trials) = (spec.ranks, spec.is_called_in_trials());
        self.slots.push(Slot { id, callable, ranks, in_trials, kind, spec, events, removed });
        Ok(id)
    }

    /// Refuses a handler that drives a knob which another one drives.
    fn check_knobs(&self, spec: &HandlerSpec) -> Result<()> {
        if spec.drives.is_empty() {
            return Ok(());
        }
        for Slot { spec: other, .. } in self.slots.iter().filter(|slot| slot.removed.is_none()) {
            let overlaps = |knob: &&Knob| other.drives.iter().any(|driven| driven.overlaps(knob));
            if let Some(knob) = spec.drives.iter().find(overlaps) {
                return Err(knob.driven_twice(&other.name, &spec.name));
            }
        }
        Ok(())
    }

    /// The slot of a handler that was not removed.
    fn slot(&self, id: HandlerId) -> Option<usize> {
        // Slots are sorted by id.
        let slot = self.slots.binary_search_by_key(&id.0, |slot| slot.id.0).ok()?;
        self.slots[slot].removed.is_none().then_some(slot)
    }

    /// # Errors
    /// There is no such handler. A panic while the handler is dropped is an error too; the handler is removed all the
    /// same.
    pub(super) fn remove(&mut self, id: HandlerId) -> Result<()> {
        let Some(slot) = self.slot(id) else {
            return Err(Error::invalid(
                "this handler is not registered, or was removed already: give the id that add_event_handler of this engine returned",
            ));
        };
        self.removals += 1;
        self.slots[slot].removed = Some(self.removals);
        self.count_live(slot, false);
        self.leaving.push(slot);
        self.purge().map_err(|panicked| {
            Error::invalid(format!("removing handler {}: {:#}", panicked.name, panicked.source))
        })
    }

    /// The value that a handler sets next under this name: see [`Handler::param`].
    pub(super) fn param(&self, name: &str) -> Result<f64> {
        let living = || self.slots.iter().filter(|slot| slot.removed.is_none());
        let of_object = |slot: &Slot<'a, C, B, O>| match &slot.callable {
            Some(Callable::Object(handler)) => guarded(|| Ok(handler.param(name)))
                .unwrap_or_else(|panic| Some(Err(Error::invalid(format!("'{name}': {panic}"))))),
            _ => None,
        };
        living().find_map(of_object).unwrap_or_else(|| {
            let names = living().flat_map(|slot| &slot.spec.unique_names);
            let schedulers: Vec<_> =
                names.filter(|name| name.starts_with("scheduler ")).map(String::as_str).collect();
            Err(Error::invalid(match schedulers[..] {
                [] => format!("no scheduler '{name}' is attached to this engine, nor any other: attach it first"),
                _ => format!(
                    "no scheduler '{name}' is attached to this engine (or it is running now); there are: {}",
                    schedulers.join(", ")
                ),
            }))
        })
    }

    /// Counts the registrations of a handler in or out.
    fn count_live(&mut self, slot: usize, is_there: bool) {
        for index in &self.slots[slot].events {
            let live = &mut self.lists[index.0].live;
            *live = if is_there { *live + 1 } else { *live - 1 };
        }
    }

    pub(super) fn contains(&self, id: HandlerId) -> bool {
        self.slot(id).is_some()
    }

    /// Drops removed handlers once no firing is under way, because firings that began before the removal still call
    /// them.
    ///
    /// # Errors
    /// The first handler that panicked when it was dropped.
    #[inline]
    fn purge(&mut self) -> Result<(), HandlerPanicked> {
        if self.depth > 0 || self.held || self.leaving.is_empty() {
            return Ok(());
        }
        self.drop_leaving()
    }

    /// Drops the handlers of the slots that are [`leaving`](Self::leaving).
    #[cold]
    fn drop_leaving(&mut self) -> Result<(), HandlerPanicked> {
        let mut result = Ok(());
        for slot in std::mem::take(&mut self.leaving) {
            self.vacant += 1;
            let slot = &mut self.slots[slot];
            let dropped = guarded_drop(slot.callable.take()).map_err(|source| {
                let source = source.context("dropping it after its removal");
                HandlerPanicked { name: slot.shown_name(), source }
            });
            result = result.and(dropped);
        }
        // Compacting only when half of the slots are empty keeps the cost of many removals linear.
        if 2 * self.vacant > self.slots.len() {
            self.close_ranks();
        }
        result
    }

    /// Removes empty slots, and renumbers the others.
    fn close_ranks(&mut self) {
        self.vacant = 0;
        // The new index of each slot.
        let mut kept = 0;
        let places: Vec<_> = self
            .slots
            .iter()
            .map(|slot| {
                let place = slot.removed.is_none().then_some(kept);
                kept += usize::from(place.is_some());
                place
            })
            .collect();
        for list in self.lists.iter_mut().flat_map(|lists| &mut lists.by_priority) {
            list.retain_mut(|entry| match places[entry.slot] {
                Some(place) => {
                    entry.slot = place;
                    true
                }
                None => false,
            });
        }
        self.slots.retain(|slot| slot.removed.is_none());
    }

    /// Keeps handlers that are removed from now on, until [`release`](Self::release) gets the value that this returns.
    pub(super) fn hold(&mut self) -> (u64, u64) {
        self.held = true;
        (self.next_id, self.removals)
    }

    /// Goes back to the handlers at the time of [`hold`](Self::hold): removes handlers that were added since, and
    /// brings back those that were removed.
    ///
    /// # Errors
    /// The first handler that panicked when it was dropped.
    pub(super) fn release(
        &mut self,
        (next_id, removals): (u64, u64),
    ) -> Result<(), HandlerPanicked> {
        self.held = false;
        self.removals += 1;
        for slot in 0..self.slots.len() {
            let Slot { id, removed, .. } = &mut self.slots[slot];
            if id.0 >= next_id && removed.is_none() {
                *removed = Some(self.removals);
                self.count_live(slot, false);
                self.leaving.push(slot);
            } else if id.0 < next_id && removed.is_some_and(|removal| removal > removals) {
                *removed = None;
                self.count_live(slot, true);
                self.leaving.retain(|leaving| *leaving != slot);
            }
        }
        self.purge()
    }

    #[inline]
    pub(super) fn is_empty(&self, index: EventIndex) -> bool {
        self.lists[index.0].live == 0
    }

    /// Counts a firing of a custom event, and returns the new count; 0 for a built-in event.
    pub(super) fn count_firing(&mut self, index: EventIndex) -> u64 {
        match index.0.checked_sub(BUILT_IN).and_then(|custom| self.custom.get_mut(custom)) {
            Some(custom) => {
                custom.firings += 1;
                custom.firings
            }
            None => 0,
        }
    }

    /// Returns how often each custom event was fired, and sets the counts to 0.
    pub(super) fn take_firings(&mut self) -> Vec<u64> {
        self.custom.iter_mut().map(|custom| std::mem::take(&mut custom.firings)).collect()
    }

    /// Sets the firing counts of custom events to 0.
    pub(super) fn reset_firings(&mut self) {
        self.custom.iter_mut().for_each(|custom| custom.firings = 0);
    }

    /// Undoes [`take_firings`](Self::take_firings).
    pub(super) fn put_back_firings(&mut self, firings: &[u64]) {
        for (custom, firings) in self.custom.iter_mut().zip(firings) {
            custom.firings = *firings;
        }
    }

    /// Number of firings under way, one within the other.
    pub(super) fn firings_under_way(&self) -> u32 {
        self.depth
    }

    /// Begins a firing, and returns the number of removals so far.
    pub(super) fn begin(&mut self) -> u64 {
        self.depth += 1;
        self.removals
    }

    /// # Errors
    /// A handler that was removed during the firing panicked when it was dropped.
    #[inline]
    pub(super) fn end(&mut self) -> Result<(), HandlerPanicked> {
        self.depth -= 1;
        self.purge()
    }

    /// The slot of the next handler to call in a firing that began after `removals` removals. `place` is a priority and
    /// a position in the event's list of that priority, and goes on behind that handler. `None` at the end of the lists.
    #[inline]
    pub(super) fn next_due(
        &self,
        index: EventIndex,
        place: &mut (usize, usize),
        number: u64,
        removals: u64,
    ) -> Option<Result<usize, HandlerPanicked>> {
        let lists = &self.lists[index.0].by_priority;
        while let Some(list) = lists.get(place.0) {
            while let Some(entry) = list.get(place.1) {
                place.1 += 1;
                let slot = &self.slots[entry.slot];
                if slot.removed.is_some_and(|removal| removal <= removals) {
                    continue;
                }
                match entry.filter.as_ref().map_or(Ok(true), |filter| filter.passes(number)) {
                    Ok(true) => return Some(Ok(entry.slot)),
                    Ok(false) => {}
                    Err(source) => {
                        let name = slot.shown_name();
                        return Some(Err(HandlerPanicked { name, source }));
                    }
                }
            }
            *place = (place.0 + 1, 0);
        }
        None
    }

    /// Takes a handler out of its slot to run; `None` if it is already running further out.
    #[inline]
    pub(super) fn take(&mut self, slot: usize) -> Option<Callable<'a, C, B, O>> {
        self.slots[slot].callable.take()
    }

    /// Puts a handler back that [`take`](Self::take) gave.
    #[inline]
    pub(super) fn put_back(&mut self, slot: usize, callable: Callable<'a, C, B, O>) {
        // The index still holds: slots are only removed when no firing is under way.
        self.slots[slot].callable = Some(callable);
    }

    /// The handler's ranks, and whether trial runs call it.
    #[inline]
    pub(super) fn reach(&self, slot: usize) -> (Ranks, bool) {
        let slot = &self.slots[slot];
        (slot.ranks, slot.in_trials)
    }

    /// All handlers that are not closures, with distinct names.
    pub(super) fn objects(&self) -> Vec<NamedHandler<'_, 'a, C, B, O>> {
        let mut names = Names::default();
        let mut objects = vec![];
        for slot in self.slots.iter().filter(|slot| slot.removed.is_none()) {
            let SlotKind::Object { had_state } = slot.kind else { continue };
            let handler = match &slot.callable {
                Some(Callable::Object(handler)) => Some(&**handler),
                _ => None,
            };
            let name = names.distinct(&slot.spec.name);
            objects.push(NamedHandler { name, handler, spec: &slot.spec, had_state });
        }
        objects
    }

    /// The call of the handler object at a place in an event's lists.
    pub(super) fn call_at(
        &self,
        index: EventIndex,
        (priority, position): (usize, usize),
    ) -> Option<CallAgain> {
        let list = &self.lists[index.0].by_priority[priority];
        let slot = list.get(position)?.slot;
        let handler = self.object_names().find_map(|(at, name)| (at == slot).then_some(name))?;
        let registration = list[..position].iter().filter(|entry| entry.slot == slot).count();
        Some(CallAgain { handler, registration })
    }

    /// The place in an event's lists of a call.
    pub(super) fn place_of(&self, index: EventIndex, call: &CallAgain) -> Option<(usize, usize)> {
        let (slot, _) = self.object_names().find(|(_, known)| *known == call.handler)?;
        self.lists[index.0].by_priority.iter().enumerate().find_map(|(priority, list)| {
            let mut places = list.iter().enumerate().filter(|(_, entry)| entry.slot == slot);
            places.nth(call.registration).map(|(position, _)| (priority, position))
        })
    }

    /// The slots of all handler objects, with their distinct names.
    fn object_names(&self) -> impl Iterator<Item = (usize, String)> {
        let mut names = Names::default();
        let slots = self.slots.iter().enumerate().filter(|(_, slot)| slot.removed.is_none());
        slots
            .filter(|(_, slot)| slot.kind != SlotKind::Closure)
            .map(move |(at, slot)| (at, names.distinct(&slot.spec.name)))
    }

    /// All handler objects that are not running, with their distinct names.
    pub(super) fn objects_mut(
        &mut self,
    ) -> impl Iterator<Item = (String, Ranks, &mut (dyn Handler<C, B, O> + 'a))> {
        let mut names = Names::default();
        self.slots.iter_mut().filter(|slot| slot.removed.is_none()).filter_map(move |slot| {
            if slot.kind == SlotKind::Closure {
                return None;
            }
            let name = names.distinct(&slot.spec.name);
            match &mut slot.callable {
                Some(Callable::Object(handler)) => Some((name, slot.spec.ranks, &mut **handler)),
                _ => None,
            }
        })
    }

    /// The logs that handlers write to, as often as handlers name them.
    pub(super) fn logs(&self) -> impl Iterator<Item = &Rc<dyn Log>> {
        let living = self.slots.iter().filter(|slot| slot.removed.is_none());
        living.flat_map(|slot| &slot.spec.logs)
    }

    /// The custom events, and how often each was fired.
    pub(super) fn firings(&self) -> impl Iterator<Item = (&str, u64)> {
        self.custom.iter().map(|custom| (custom.name, custom.firings))
    }

    /// Sets the count of a custom event; false where it is not registered.
    pub(super) fn set_firings(&mut self, name: &str, firings: u64) -> bool {
        let custom = self.custom.iter_mut().find(|custom| custom.name == name);
        custom.map(|custom| custom.firings = firings).is_some()
    }

    pub(super) fn id(&self, slot: usize) -> HandlerId {
        self.slots[slot].id
    }

    pub(super) fn name(&self, slot: usize) -> String {
        self.slots[slot].shown_name()
    }
}

/// Makes names distinct: the second of a name gets ` #2`, and so on.
#[derive(Default)]
pub(super) struct Names(HashSet<String>);

impl Names {
    pub(super) fn distinct(&mut self, name: &str) -> String {
        let mut distinct = name.to_owned();
        let mut number = 1;
        while !self.0.insert(distinct.clone()) {
            number += 1;
            distinct = format!("{name} #{number}");
        }
        distinct
    }
}

/// A handler object with its distinct name; `handler` is `None` while the handler is running.
pub(super) struct NamedHandler<'s, 'a, C, B, O> {
    pub(super) name: String,
    pub(super) handler: Option<&'s (dyn Handler<C, B, O> + 'a)>,
    pub(super) spec: &'s HandlerSpec,
    /// Whether the handler had a state when it was attached.
    pub(super) had_state: bool,
}

/// A handler whose filter or `drop` panicked.
pub(super) struct HandlerPanicked {
    pub(super) name: String,
    pub(super) source: anyhow::Error,
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Twice;

    impl Handler<(), (), ()> for Twice {
        fn spec(&self) -> Result<HandlerSpec> {
            let every = Event::IterationCompleted;
            Ok(HandlerSpec::new("twice", every.every(2) | every.every(3)))
        }
        fn call(
            &mut self,
            _: Event,
            _: &mut (),
            _: &mut Engine<'_, (), (), ()>,
        ) -> anyhow::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_call_is_found_again_among_several_of_one_handler() -> Result<()> {
        let mut handlers = Handlers::new();
        for _ in 0..2 {
            let kind = SlotKind::Object { had_state: false };
            handlers.add(Twice.spec()?, Callable::Object(Box::new(Twice)), kind)?;
        }
        let index = handlers.index(Event::IterationCompleted)?;
        for position in 0..4 {
            let place = (Priority::Normal as usize, position);
            let call = handlers.call_at(index, place).expect("there are four calls");
            assert_eq!(call.handler == "twice #2", position > 1);
            assert_eq!(handlers.place_of(index, &call), Some(place));
        }
        Ok(())
    }
}
