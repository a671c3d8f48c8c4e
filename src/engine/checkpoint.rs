//! Saving and restoring the state of an engine and of everything that belongs to it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::handler::NamedHandler;
use super::peers::RANKS;
use super::position::SavedPosition;
use super::random_numbers::{BEFORE_PASS, RNG, load_generators};
use super::requests::Requests;
use super::restored::{Report, Restored, of_named};
use super::{Engine, Ranks};
use crate::error::{Error, Result};
use crate::event::BUILT_IN_EVENTS;
use crate::guard::guarded_state;
use crate::state::StateDict;

/// Names of the parts that the state of an engine may have besides tracked ones.
const ENGINE: &str = "engine";
pub(crate) const HANDLERS: &str = "handlers";
const METRICS: &str = "metrics";
pub(super) const PARAM_HISTORY: &str = "param_history";
pub(super) const CONTEXT: &str = "context";
pub(super) const SETTINGS: &str = "settings";
const OUTPUT: &str = "output";
const LOGS: &str = "logs";
pub(super) const RESERVED: [&str; 10] =
    [ENGINE, HANDLERS, METRICS, PARAM_HISTORY, RNG, CONTEXT, OUTPUT, SETTINGS, LOGS, RANKS];

/// Largest count that is accepted from a file, so that additions to it cannot overflow.
const MAX_COUNT: u64 = 1 << 53;

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

impl<'a, C, B, O> Engine<'a, C, B, O> {
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
            return Err(Error::invalid("restore() was called within a run: call it before run()"));
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

    pub(super) fn save_handlers(&self, caller: &mut Option<StateDict>) -> Result<StateDict> {
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

    pub(super) fn load_handlers(
        &mut self,
        mut states: StateDict,
        report: &mut Report,
    ) -> Result<()> {
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
}
