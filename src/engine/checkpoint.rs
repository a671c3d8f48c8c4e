//! Saving and restoring the state of an engine and of everything that belongs to it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use tch::{Device, Kind, Tensor};

use super::handler::NamedHandler;
use super::peers::RANKS;
use super::position::SavedPosition;
use super::requests::Requests;
use super::{Engine, MetricValue, Ranks};
use crate::bridge::{generator_state, set_generator_state};
use crate::error::{Error, Result};
use crate::event::BUILT_IN_EVENTS;
use crate::guard::guarded_state;
use crate::state::{IntoStateful, Saveable, StateDict, Stateful};

/// The parts that `track`, `track_context` and `track_output` add to the state of an engine.
pub(super) struct Tracked<'a, C, O> {
    parts: Vec<(String, Box<dyn Stateful + 'a>)>,
    context: Option<ContextState<C>>,
    output: Option<OutputState<O>>,
}

struct OutputState<O> {
    save: fn(&O) -> Result<StateDict>,
    load: fn(StateDict) -> Result<O>,
}

struct ContextState<C> {
    save: fn(&C) -> Result<StateDict>,
    load: fn(&mut C, StateDict) -> Result<()>,
    load_partially: fn(&mut C, StateDict) -> Result<Vec<String>>,
    differs_by_rank: fn(&C) -> bool,
    /// Whether a model may be part of the context.
    has_model: bool,
}

impl<C, O> Default for Tracked<'_, C, O> {
    fn default() -> Self {
        Self { parts: vec![], context: None, output: None }
    }
}

/// Names of the parts that the state of an engine may have besides tracked ones.
const ENGINE: &str = "engine";
pub(crate) const HANDLERS: &str = "handlers";
const METRICS: &str = "metrics";
const PARAM_HISTORY: &str = "param_history";
const RNG: &str = "rng";
const CONTEXT: &str = "context";
const SETTINGS: &str = "settings";
const OUTPUT: &str = "output";
const LOGS: &str = "logs";
const RESERVED: [&str; 10] =
    [ENGINE, HANDLERS, METRICS, PARAM_HISTORY, RNG, CONTEXT, OUTPUT, SETTINGS, LOGS, RANKS];

/// Largest count that is accepted from a file, so that additions to it cannot overflow.
const MAX_COUNT: u64 = 1 << 53;

/// The part of the random numbers with the states from before the pass under way.
const BEFORE_PASS: &str = "before_pass";

const IN_PART: &str = "a checkpoint was loaded only in part: restore a whole one before running, or give models and optimizers their values anew and call reset()";

/// The engine's own values, as they are saved.
#[derive(Serialize, Deserialize)]
struct Values {
    iteration: u64,
    epoch: u64,
    epoch_length: Option<u64>,
    max_epochs: Option<u64>,
    max_iters: Option<u64>,
    samples: u64,
    /// Whether the engine ran within another one, as evaluators do.
    nested: bool,
    position: SavedPosition,
    /// Requests of handlers that the engine has not done yet.
    asked: Requests,
    /// The last event, at which handlers made these requests.
    event: String,
    firings: BTreeMap<String, u64>,
}

/// The result of [`Engine::restore`]: what was restored, and what differs.
#[derive(Debug, Default)]
#[non_exhaustive]
pub struct Restored {
    /// Names of the restored parts: tracked parts, the context, handlers, metrics, random numbers, the position.
    pub parts: Vec<String>,
    /// Parts that a run may need, but that this engine's state lacks because they are not tracked.
    pub untracked: Vec<&'static str>,
    /// Differences that were left out: parts that only the state or only the engine has, and parts that do not fit.
    /// With `strict` these are errors, except devices whose random numbers were not saved or are not here.
    pub ignored: Vec<String>,
    /// Settings of tracked parts that differ from those in the state, such as the learning rate that an optimizer was
    /// built with; the state's settings are used. Without `strict` also arguments of handlers that differ, such as a
    /// longer schedule; the handler's arguments are used.
    pub changed: Vec<String>,
    /// Who had ended the run for good when the state was saved (early stopping, for example), and how to go on all the
    /// same; see [`Engine::resume_terminated`]. `None` where there is something left to do. A limit of time or samples
    /// does not count, because it does not hold in the next process.
    pub ended: Option<String>,
}

impl<'a, C, B, O> Engine<'a, C, B, O> {
    /// Makes something part of this engine's state under a name: a model (`&VarStore`), an
    /// [`Optimizer`](crate::optim::Optimizer), or a type that you implement [`Stateful`] for. Handlers, metrics, the
    /// engine's position and libtorch's random number generators are always part of the state.
    ///
    /// The next `run` returns an error where the name is taken or reserved.
    pub fn track(&mut self, name: impl Into<String>, part: impl IntoStateful<'a>) -> &mut Self {
        let name = name.into();
        let taken = self.tracked.parts.iter().any(|(other, _)| *other == name);
        if taken || RESERVED.contains(&name.as_str()) || name.contains('/') || name.is_empty() {
            self.refused.get_or_insert(format!(
                "'{name}' cannot be tracked under this name: it must not be empty, hold a '/', be used before, or be one of {}",
                RESERVED.join(", ")
            ));
        } else {
            self.tracked.parts.push((name, part.into_stateful()));
        }
        self
    }

    /// Makes the context part of this engine's state.
    pub fn track_context(&mut self) -> &mut Self
    where
        C: Stateful,
    {
        self.tracked.context = Some(ContextState {
            save: C::state_dict,
            load: |cx, state| cx.load_state_dict(state),
            load_partially: |cx, state| cx.load_state_dict_partially(state),
            differs_by_rank: C::differs_by_rank,
            has_model: true,
        });
        self
    }

    /// Notes that the tracked context holds no model or optimizer: these are given to [`track`](Self::track).
    pub(crate) fn context_has_no_model(&mut self) {
        if let Some(context) = &mut self.tracked.context {
            context.has_model = false;
        }
    }

    /// Whether the model or the optimizer may be part of this engine's state.
    pub(crate) fn tracks_a_model(&self) -> bool {
        let context = self.tracked.context.as_ref();
        !self.tracked.parts.is_empty() || context.is_some_and(|context| context.has_model)
    }

    /// Makes the output of the last step part of this engine's state, so that handlers of events after the step find
    /// the output when a run goes on there. [`create_supervised_trainer`] does this.
    ///
    /// [`create_supervised_trainer`]: crate::supervised::create_supervised_trainer
    pub fn track_output(&mut self) -> &mut Self
    where
        O: Saveable,
    {
        self.tracked.output = Some(OutputState { save: O::to_state, load: O::from_state });
        self
    }

    /// The state of the engine: position, budgets, position in the data, metrics, all handlers, everything
    /// [tracked](Self::track), and the random number generators. Tensors are shared, not copied. Logs of handlers are
    /// synced to the disk.
    ///
    /// Within a run this is the state after the current event, provided that the last handler of the event calls this:
    /// see [`Priority`](super::Priority).
    ///
    /// # Errors
    /// A part cannot be saved (the text names it), a log cannot be synced, or the call comes from a step or from a
    /// handler of an event that is fired within a step or another handler.
    pub fn checkpoint(&self, cx: &C) -> Result<StateDict> {
        let (state, logs) = self.checkpoint_within(cx, None)?;
        logs.map(|()| state)
    }

    /// Like [`checkpoint`](Self::checkpoint), for a handler: `caller` is the state of the running handler, which cannot
    /// be asked for it. The second result is the error of logs that cannot be synced: the state lacks their places, and
    /// is worth saving all the same.
    pub(crate) fn checkpoint_within(
        &self,
        cx: &C,
        mut caller: Option<StateDict>,
    ) -> Result<(StateDict, Result<()>)> {
        if self.step.is_none() || self.handlers.firings_under_way() > 1 {
            return Err(Error::State(
                "a checkpoint cannot be made within a step, nor in handlers of events that are fired within a step or another handler: it would not know how far these have come".into(),
            ));
        }
        let mut all = StateDict::new();
        all.set_part(ENGINE, self.own_state()?);
        all.set_part(HANDLERS, self.save_handlers(&mut caller)?);
        all.set_part(METRICS, self.metric_values()?);
        all.set_part(PARAM_HISTORY, self.saved_history()?);
        all.set_part(RNG, self.random_numbers()?);
        if let Some(context) = &self.tracked.context {
            all.set_part(CONTEXT, of_named(CONTEXT, || (context.save)(cx))?);
        }
        if let (Some(tracked), Some(output)) = (&self.tracked.output, &self.state.output) {
            all.set_part(OUTPUT, of_named(OUTPUT, || (tracked.save)(output))?);
        }
        let mut settings = StateDict::new();
        for (name, part) in &self.tracked.parts {
            all.set_part(name, of_named(name, || part.state_dict())?);
            settings.set_value(name, of_named(name, || Ok(part.settings()))?)?;
        }
        all.set_part(SETTINGS, settings);
        // Logs come last, so that what the checkpoint covers is on the disk before the checkpoint can count.
        let mut logs = Ok(());
        if self.is_main() {
            let (places, committed) = self.commit_logs();
            if !places.values.is_empty() {
                all.set_part(LOGS, places);
            }
            logs = committed;
        }
        Ok((all, logs))
    }

    /// The parts that may differ between ranks, under their usual names: random numbers, and parts and handlers whose
    /// `differs_by_rank` is true.
    pub(super) fn rank_local_state(&self, cx: &C) -> Result<StateDict> {
        let mut own = StateDict::new();
        own.set_part(RNG, self.random_numbers()?);
        if let Some(context) = &self.tracked.context
            && of_named(CONTEXT, || Ok((context.differs_by_rank)(cx)))?
        {
            own.set_part(CONTEXT, of_named(CONTEXT, || (context.save)(cx))?);
        }
        for (name, part) in &self.tracked.parts {
            if of_named(name, || Ok(part.differs_by_rank()))? {
                own.set_part(name, of_named(name, || part.state_dict())?);
            }
        }
        let mut handlers = StateDict::new();
        let objects = self.handlers.objects().into_iter();
        for NamedHandler { name, handler, .. } in objects.filter(|o| o.spec.has_state_by_rank()) {
            if let Some(handler) = handler
                && let Some(state) =
                    of_named(&format!("handler '{name}'"), || handler.save_state())?
            {
                handlers.set_part(&name, state);
            }
        }
        own.set_part(HANDLERS, handlers);
        Ok(own)
    }

    /// The states of libtorch's random number generators, and their states from before the pass under way where the
    /// data may have drawn its order from them.
    fn random_numbers(&self) -> Result<StateDict> {
        let mut random = generators()?;
        if let Some(before) =
            self.position.before_pass.as_ref().filter(|_| self.position.is_within_pass())
        {
            random.set_part(BEFORE_PASS, shared(before));
        }
        Ok(random)
    }

    /// Loads a state; the next `run` goes on there, exactly as if there had been no break. Tensors of the state are
    /// taken over where that saves a copy. When that run begins, it removes from logs what was logged after the state was
    /// saved; the summary warns of logs that cannot be rewound.
    ///
    /// With `strict`, the state and the engine must have the same parts. Otherwise missing and unknown parts, and parts
    /// that do not fit, are left out and reported.
    ///
    /// # Errors
    /// A part is missing, unknown or does not fit (the text names it). Parts before it are loaded already, so the
    /// engine refuses to run until a restore succeeds. Also refused within a run.
    pub fn restore(&mut self, cx: &mut C, state: StateDict, strict: bool) -> Result<Restored> {
        if self.running {
            return Err(Error::invalid("restore() was called within a run"));
        }
        let changed = guarded_state(|| Ok(self.changed_settings(&state)))?;
        let mut report = Report { restored: Restored { changed, ..Restored::default() }, strict };
        let result = guarded_state(|| self.restore_parts(cx, state, &mut report));
        match result {
            Ok(()) => drop(self.forgive_part()),
            Err(_) => self.refuse_until_restored(),
        }
        result.map(|()| Restored {
            untracked: self.untracked(),
            ended: self.position.ended_for_good(&self.requests),
            ..report.restored
        })
    }

    /// The parts for [`Restored::untracked`].
    fn untracked(&self) -> Vec<&'static str> {
        let mut untracked = vec![];
        if !self.tracks_a_model() {
            untracked.push("any model or optimizer (Engine::track)");
        }
        if self.tracked.context.is_none() && size_of::<C>() > 0 {
            untracked.push("the context (Engine::track_context)");
        }
        untracked
    }

    /// Lets the engine run though a checkpoint was loaded only in part. Returns whether one was.
    pub(super) fn forgive_part(&mut self) -> bool {
        let was_in_part = self.refused.as_deref() == Some(IN_PART);
        if was_in_part {
            self.refused = None;
        }
        was_in_part
    }

    /// Refuses to run until a restore succeeds, because models may hold garbage.
    pub(crate) fn refuse_until_restored(&mut self) {
        self.refused.get_or_insert(IN_PART.into());
    }

    fn changed_settings(&self, state: &StateDict) -> Vec<String> {
        let Ok(saved) = state.part(SETTINGS) else { return vec![] };
        let mut changed = vec![];
        for (name, part) in &self.tracked.parts {
            let Ok(then) = saved.value::<Map<String, Value>>(name) else { continue };
            let now = part.settings();
            for key in then.keys().chain(now.keys().filter(|key| !then.contains_key(*key))) {
                if then.get(key) != now.get(key) {
                    let shown = |value: Option<&Value>| {
                        value.map_or_else(|| "nothing".to_owned(), Value::to_string)
                    };
                    let (then, now) = (shown(then.get(key)), shown(now.get(key)));
                    changed.push(format!("{key} of {name}: {then} then, {now} now"));
                }
            }
        }
        changed
    }

    fn restore_parts(&mut self, cx: &mut C, state: StateDict, report: &mut Report) -> Result<()> {
        let StateDict { mut parts, .. } = state;
        parts.remove(SETTINGS);
        let places = parts.remove(LOGS).filter(|_| self.is_main());
        let rank = self.rank();
        let mut own = StateDict::new();
        if let Some(mut ranks) = parts.remove(RANKS) {
            own = ranks.parts.remove(&rank.to_string()).unwrap_or_default();
        }
        let mut random = match rank {
            0 => parts.remove(RNG),
            _ => parts.remove(RNG).and(own.parts.remove(RNG)),
        };
        let before_pass = random.as_mut().and_then(|random| random.parts.remove(BEFORE_PASS));
        let mut handlers = parts.remove(HANDLERS).unwrap_or_default();
        handlers.parts.extend(own.parts.remove(HANDLERS).unwrap_or_default().parts);
        let mut part = |name: &str| {
            let of_main = parts.remove(name);
            own.parts.remove(name).or(of_main)
        };
        for (name, tracked) in &mut self.tracked.parts {
            report.load(name, part(name), |state, strict| match strict {
                true => tracked.load_state_dict(state).map(|()| vec![]),
                false => tracked.load_state_dict_partially(state),
            })?;
        }
        if let Some(context) = &self.tracked.context {
            report.load(CONTEXT, part(CONTEXT), |state, strict| match strict {
                true => (context.load)(cx, state).map(|()| vec![]),
                false => (context.load_partially)(cx, state),
            })?;
        }
        self.load_handlers(handlers, report)?;
        if let Some(metrics) = part(METRICS) {
            report
                .load_whole(METRICS, Some(metrics), |metrics| self.load_metric_values(metrics))?;
        }
        self.state.output = None;
        if let Some(tracked) = &self.tracked.output
            && let Some(output) = part(OUTPUT)
        {
            let load = |saved| (tracked.load)(saved).map(|output| self.state.output = Some(output));
            report.load_whole(OUTPUT, Some(output), load)?;
        }
        if let Some(history) = part(PARAM_HISTORY) {
            report
                .load_whole(PARAM_HISTORY, Some(history), |history| self.load_history(history))?;
        }
        self.clear_shared_metrics()?;
        let again = random.as_ref().map(StateDict::copy).transpose()?;
        if rank > 0 && random.is_none() {
            let text =
                format!("no random numbers of rank {rank} were saved: they go on as they are");
            report.restored.ignored.push(text);
        } else {
            load_generators(random, report)?;
        }
        let position = part(ENGINE);
        for name in parts.keys() {
            report.note(format!("the state has a part '{name}', which is not tracked here"))?;
        }
        report.load_whole(ENGINE, position, |state| self.load_own_state(state))?;
        self.position.before_pass = before_pass;
        self.random = again;
        // Nothing is removed from logs for a state that is refused, or that nobody runs from.
        self.log_places = places;
        Ok(())
    }

    /// Removes from logs what was logged after the restored state was saved.
    pub(super) fn rewind_restored_logs(&mut self) -> Result<()> {
        let Some(places) = self.log_places.take() else { return Ok(()) };
        self.rewind_logs(&places)?.into_iter().for_each(|left| self.warn(left));
        Ok(())
    }

    /// Sets the restored random numbers once more, because numbers that were drawn between restoring and running do not
    /// count.
    pub(super) fn restore_random_numbers(&mut self) -> Result<()> {
        self.random.take().map_or(Ok(()), load_generators_strictly)
    }

    /// Copies of the states of all tracked parts, and of the context where it is tracked.
    pub(super) fn tracked_copies(&self, cx: &C) -> Result<(Vec<StateDict>, Option<StateDict>)> {
        let part = |(name, part): &(String, Box<dyn Stateful + 'a>)| {
            part.state_dict().and_then(|state| state.copy()).map_err(|error| of_part(name, error))
        };
        let parts = self.tracked.parts.iter().map(part).collect::<Result<_>>()?;
        let context = self.tracked.context.as_ref().map(|context| {
            let state = (context.save)(cx).and_then(|state| state.copy());
            state.map_err(|error| of_part(CONTEXT, error))
        });
        Ok((parts, context.transpose()?))
    }

    /// Loads the copies that [`tracked_copies`](Self::tracked_copies) made. Puts back all it can before it returns an
    /// error. What the copies lack, because it was made since, stays; the summary of the next run names it.
    pub(super) fn load_tracked_copies(
        &mut self,
        cx: &mut C,
        parts: Vec<StateDict>,
        context: Option<StateDict>,
    ) -> Result<()> {
        let mut result = Ok(());
        let position = &mut self.position;
        let mut note = |name: &str, loaded: Result<Vec<String>>| match loaded {
            Ok(new) => {
                new.iter()
                    .for_each(|new| position.note(format!("{name} after a trial run: {new}")));
            }
            Err(error) if result.is_ok() => result = Err(of_part(name, error)),
            Err(_) => {}
        };
        for ((name, part), state) in self.tracked.parts.iter_mut().zip(parts) {
            note(name, part.load_state_dict_partially(state));
        }
        if let Some((tracked, state)) = self.tracked.context.as_ref().zip(context) {
            note(CONTEXT, (tracked.load_partially)(cx, state));
        }
        result
    }

    /// The states of all handlers that have one.
    fn handler_states(&self) -> Result<StateDict> {
        self.save_handlers(&mut None)
    }

    /// Loads the states of all handlers; none may be missing or unknown.
    fn load_handler_states(&mut self, states: StateDict) -> Result<()> {
        self.load_handlers(states, &mut Report::strict())
    }

    /// The state of an evaluator that lasts from one run to the next.
    pub(crate) fn lasting_state(&self) -> Result<StateDict> {
        let mut state = StateDict::new();
        state.set_part(HANDLERS, self.handler_states()?);
        state.set_part(PARAM_HISTORY, self.saved_history()?);
        for (name, part) in &self.tracked.parts {
            state.set_part(name, of_named(name, || part.state_dict())?);
        }
        Ok(state)
    }

    /// A copy of everything that a run changes of an evaluator and of the process. Logs are synced to the disk.
    pub(crate) fn moment(&self) -> Result<Moment> {
        let lasting = self.lasting_state()?.copy()?;
        let (logs, committed) = self.commit_logs();
        committed?;
        Ok(Moment { lasting, random: generators()?, logs })
    }

    /// Goes back to an earlier moment of this process.
    pub(crate) fn go_back(&mut self, moment: Moment) -> Result<()> {
        self.load_lasting_state(moment.lasting)?;
        self.rewind_logs(&moment.logs)?;
        load_generators_strictly(moment.random)
    }

    /// Loads a state that [`lasting_state`](Self::lasting_state) gave; no part may be missing or unknown.
    pub(crate) fn load_lasting_state(&mut self, mut state: StateDict) -> Result<()> {
        for (name, part) in &mut self.tracked.parts {
            let saved = state.take_part(name)?;
            of_named(name, || part.load_state_dict(saved))?;
        }
        self.load_handler_states(state.take_part(HANDLERS)?)?;
        self.load_history(state.take_part(PARAM_HISTORY)?)?;
        match state.parts.keys().next() {
            Some(name) => Err(Error::State(format!("'{name}' is not tracked here"))),
            None => Ok(()),
        }
    }

    fn load_firings(&mut self, saved: &BTreeMap<String, u64>) -> Result<()> {
        for (name, firings) in saved {
            if !self.handlers.set_firings(name, *firings) {
                return Err(Error::State(format!(
                    "the state counts firings of event '{name}', which is not registered here"
                )));
            }
        }
        Ok(())
    }

    fn save_handlers(&self, caller: &mut Option<StateDict>) -> Result<StateDict> {
        let mut states = StateDict::new();
        for NamedHandler { name, handler, had_state, .. } in self.handlers.objects() {
            let state = match handler {
                Some(handler) => of_named(&format!("handler '{name}'"), || handler.save_state())?,
                None if had_state && caller.is_none() => {
                    return Err(Error::State(format!(
                        "handler '{name}' is running: a checkpoint cannot be made within it"
                    )));
                }
                None => caller.take(),
            };
            if let Some(state) = state {
                states.set_part(&name, state);
            }
        }
        Ok(states)
    }

    fn load_handlers(&mut self, mut states: StateDict, report: &mut Report) -> Result<()> {
        let (is_main, strict) = (self.is_main(), report.strict);
        for (name, ranks, handler) in self.handlers.objects_mut() {
            let saved = states.parts.remove(&name);
            let name = format!("handler '{name}'");
            if ranks != Ranks::All && !is_main {
                continue;
            }
            // The handler is asked now, because handlers may have no state at times.
            if saved.is_some() || of_named(&name, || Ok(handler.save_state()?.is_some()))? {
                let mut changed = vec![];
                report.load_whole(&name, saved, |state| match strict {
                    true => handler.load_state(state),
                    false => {
                        handler.load_state_partially(state).map(|different| changed = different)
                    }
                })?;
                let changed = changed.into_iter().map(|changed| format!("{name}: {changed}"));
                report.restored.changed.extend(changed);
            }
        }
        states.parts.keys().try_for_each(|name| {
            report.note(format!(
                "the state has a part of handler '{name}', which is not attached here (attach before restoring)"
            ))
        })
    }

    /// The names of the parts that a state may have, and of the parts that it must have.
    pub(crate) fn part_names(&self) -> (Vec<String>, Vec<String>) {
        let mut must: Vec<_> = self.tracked.parts.iter().map(|(name, _)| name.clone()).collect();
        must.extend(self.tracked.context.iter().map(|_| CONTEXT.to_owned()));
        let may = RESERVED.iter().map(|name| (*name).to_owned()).chain(must.clone());
        (may.collect(), must)
    }

    /// The names of the handlers that may have a state, and of those that had one when they were attached.
    pub(crate) fn handler_names(&self) -> (Vec<String>, Vec<String>) {
        let objects = self.handlers.objects();
        let had = objects.iter().filter(|object| object.had_state).map(|object| &object.name);
        (objects.iter().map(|object| object.name.clone()).collect(), had.cloned().collect())
    }

    fn own_state(&self) -> Result<StateDict> {
        let state = &self.state;
        let values = Values {
            iteration: state.iteration,
            epoch: state.epoch,
            epoch_length: state.epoch_length,
            max_epochs: state.max_epochs,
            max_iters: state.max_iters,
            samples: state.samples,
            nested: self.is_nested(),
            position: of_named("the data", || Ok(self.position.save(self.data.as_deref())))?
                .into_global(self.ranks()),
            asked: self.position.saved_requests(&self.requests),
            event: self.position.event.to_string(),
            firings: self.handlers.firings().map(|(name, n)| (name.to_owned(), n)).collect(),
        };
        let mut own = StateDict::new();
        own.set_value("position", values)?;
        Ok(own)
    }

    fn load_own_state(&mut self, own: StateDict) -> Result<()> {
        let saved: Values = own.value("position")?;
        let counts = [saved.iteration, saved.epoch, saved.samples];
        if counts.into_iter().chain(saved.position.counts()).any(|count| count > MAX_COUNT) {
            return Err(Error::State("the saved position is beyond any run's".into()));
        }
        let event = BUILT_IN_EVENTS.into_iter().find(|event| event.to_string() == saved.event);
        let event =
            event.ok_or_else(|| Error::State(format!("there is no event '{}'", saved.event)))?;
        let state = &mut self.state;
        state.iteration = saved.iteration;
        state.epoch = saved.epoch;
        state.epoch_length = saved.epoch_length;
        (state.max_epochs, state.max_iters) = (saved.max_epochs, saved.max_iters);
        state.samples = saved.samples;
        self.load_firings(&saved.firings)?;
        let budgeted = saved.max_epochs.is_some() || saved.max_iters.is_some();
        let ranks = self.ranks();
        self.position = saved.position.into_local(ranks).restore(event, budgeted);
        self.requests = saved.asked;
        self.requests.any = self.requests.is_any();
        self.data = None;
        Ok(())
    }

    fn metric_values(&self) -> Result<StateDict> {
        fn add(values: &mut StateDict, name: &str, value: &MetricValue) -> Result<()> {
            match value {
                MetricValue::Number(value) => values.set_value(name, value)?,
                MetricValue::Tensor(tensor) => values.set_tensor(name, tensor.shallow_clone()),
                MetricValue::Named(named) => {
                    let mut part = StateDict::new();
                    named.iter().try_for_each(|(name, value)| add(&mut part, name, value))?;
                    values.set_part(name, part);
                }
            }
            Ok(())
        }
        let mut values = StateDict::new();
        self.state.metrics.iter().try_for_each(|(name, value)| add(&mut values, name, value))?;
        Ok(values)
    }

    fn load_metric_values(&mut self, saved: StateDict) -> Result<()> {
        fn values_of(state: StateDict) -> Result<Vec<(String, MetricValue)>> {
            let mut values = vec![];
            for name in state.values.keys() {
                values.push((name.clone(), state.value::<f64>(name)?.into()));
            }
            values.extend(state.tensors.into_iter().map(|(name, tensor)| (name, tensor.into())));
            for (name, part) in state.parts {
                values.push((name, MetricValue::Named(values_of(part)?)));
            }
            Ok(values)
        }
        let values = values_of(saved)?;
        self.state.metrics.clear();
        values.into_iter().for_each(|(name, value)| self.state.metrics.set(&name, value));
        Ok(())
    }

    fn saved_history(&self) -> Result<StateDict> {
        let mut saved = StateDict::new();
        for (name, rows) in &self.state.param_history {
            // A row has a value for each parameter group, and groups may be added; so rows differ in length.
            let lens: Vec<i64> = rows.iter().map(|row| row.len() as i64).collect();
            let mut history = StateDict::new();
            let failed = |error| Error::libtorch("saving the history of a parameter", error);
            history.set_tensor("lens", Tensor::f_from_slice(&lens).map_err(failed)?);
            history.set_tensor("values", Tensor::f_from_slice(&rows.concat()).map_err(failed)?);
            saved.set_part(name, history);
        }
        Ok(saved)
    }

    fn load_history(&mut self, saved: StateDict) -> Result<()> {
        let mut all = BTreeMap::new();
        for (name, history) in &saved.parts {
            let odd = || Error::State(format!("the history of '{name}' is not what it should be"));
            let lens = Vec::<i64>::try_from(history.tensor("lens")?).map_err(|_| odd())?;
            let values = Vec::<f64>::try_from(history.tensor("values")?).map_err(|_| odd())?;
            let mut rest = values.as_slice();
            let mut rows = Vec::with_capacity(lens.len());
            for len in lens {
                let len = usize::try_from(len).map_err(|_| odd())?;
                let (row, others) = rest.split_at_checked(len).ok_or_else(odd)?;
                rows.push(row.to_vec());
                rest = others;
            }
            all.insert(name.clone(), rows);
        }
        self.state.param_history = all;
        Ok(())
    }

    /// The current states of the tracked parts that are read in place, by name, with whether their tensors are fixed.
    pub(crate) fn tracked_states(&self) -> Result<Vec<(&str, bool, StateDict)>> {
        let state = |(name, part): &'_ (String, Box<dyn Stateful + 'a>)| {
            of_named(name, || Ok((part.has_fixed_tensors(), part.state_dict()?)))
        };
        let parts = self.tracked.parts.iter().filter(|(_, part)| part.is_read_in_place());
        parts
            .map(|part| state(part).map(|(fixed, state)| (part.0.as_str(), fixed, state)))
            .collect()
    }
}

/// See [`Engine::moment`].
pub(crate) struct Moment {
    lasting: StateDict,
    random: StateDict,
    /// The places of the logs that the evaluator's handlers write to.
    logs: StateDict,
}

/// Collects what was restored and what does not fit. With `strict`, what does not fit is an error.
struct Report {
    strict: bool,
    restored: Restored,
}

impl Report {
    fn strict() -> Self {
        Self { strict: true, restored: Restored::default() }
    }

    /// Notes a difference; with `strict` an error.
    fn note(&mut self, what: String) -> Result<()> {
        if self.strict {
            return Err(Error::State(what));
        }
        self.restored.ignored.push(what);
        Ok(())
    }

    /// Loads a part. `load` gets whether all of the part has to fit, and returns a line for each difference.
    fn load(
        &mut self,
        name: &str,
        state: Option<StateDict>,
        load: impl FnOnce(StateDict, bool) -> Result<Vec<String>>,
    ) -> Result<()> {
        let Some(state) = state else {
            return self.note(format!("the state has no part '{name}'"));
        };
        let strict = self.strict;
        match guarded_state(|| load(state, strict)) {
            Ok(misfits) => {
                self.restored.parts.push(name.to_owned());
                let misfits = misfits.into_iter().map(|misfit| format!("{name}: {misfit}"));
                self.restored.ignored.extend(misfits);
                Ok(())
            }
            Err(error) => self.note(of_part(name, error).to_string()),
        }
    }

    /// Loads a part all of which has to fit.
    fn load_whole(
        &mut self,
        name: &str,
        state: Option<StateDict>,
        load: impl FnOnce(StateDict) -> Result<()>,
    ) -> Result<()> {
        self.load(name, state, |state, _| load(state).map(|()| vec![]))
    }
}

/// Calls user code that saves or loads the part of this name. A panic becomes an error, and errors name the part.
fn of_named<T>(name: &str, call: impl FnOnce() -> Result<T>) -> Result<T> {
    guarded_state(call).map_err(|error| of_part(name, error))
}

fn of_part(name: &str, error: Error) -> Error {
    Error::State(format!("{name}: {error}"))
}

/// The devices with generators of their own, by the names under which their states are saved.
fn generator_devices() -> Vec<(String, Device)> {
    let mut devices = vec![("cpu".to_owned(), Device::Cpu)];
    if tch::Cuda::is_available() {
        let count = usize::try_from(tch::Cuda::device_count()).unwrap_or(0);
        devices.extend((0..count).map(|index| (format!("cuda:{index}"), Device::Cuda(index))));
    }
    devices
}

/// A state with the same tensors, not copied.
fn shared(state: &StateDict) -> StateDict {
    let mut shared = StateDict::new();
    state.tensors().for_each(|(name, tensor)| shared.set_tensor(name, tensor.shallow_clone()));
    shared
}

/// Whether two sets of generator states are equal.
pub(super) fn same_generators(a: &StateDict, b: &StateDict) -> bool {
    let same = |name: &str, tensor: &Tensor| {
        b.tensor(name).is_ok_and(|other| tensor.f_equal(other).unwrap_or(false))
    };
    a.tensors().all(|(name, tensor)| same(name, tensor))
}

/// Sets the generators to states that [`generators`] gave, in this process or another.
pub(super) fn set_generators(states: &StateDict) -> Result<()> {
    load_generators_strictly(shared(states))
}

/// The states of the default generators of the CPU and of each CUDA device, by device; `u8` tensors on the CPU.
pub(super) fn generators() -> Result<StateDict> {
    let mut states = StateDict::new();
    for (name, device) in generator_devices() {
        let state = generator_state(device)
            .map_err(|text| Error::libtorch(format!("saving the generator of {name}"), text))?;
        states.set_tensor(&name, state);
    }
    Ok(states)
}

pub(super) fn load_generators_strictly(states: StateDict) -> Result<()> {
    load_generators(Some(states), &mut Report::strict())
}

fn load_generators(states: Option<StateDict>, report: &mut Report) -> Result<()> {
    let Some(mut states) = states else {
        return report.note(format!("the state has no part '{RNG}'"));
    };
    for (name, device) in generator_devices() {
        match states.tensors.remove(&name) {
            None => report.restored.ignored.push(format!("no random numbers of {name} were saved")),
            Some(state) if state.kind() != Kind::Uint8 || state.dim() != 1 => {
                report.note(format!("the saved random numbers of {name} are not bytes"))?;
            }
            Some(state) => {
                set_generator_state(device, &state).map_err(|text| {
                    Error::libtorch(format!("restoring the generator of {name}"), text)
                })?;
                report.restored.parts.push(format!("random numbers of {name}"));
            }
        }
    }
    for name in states.tensors.keys() {
        report.restored.ignored.push(format!("random numbers of {name}, which is not here"));
    }
    Ok(())
}
