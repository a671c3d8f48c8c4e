use serde_json::{Map, Value, json};

use super::scheduler::with_start;
use super::{ParamScheduler, Schedule, read};
use crate::engine::{Engine, Handler, HandlerSpec};
use crate::error::{Error, Result};
use crate::event::Event;
use crate::event_filter::Events;
use crate::state::StateDict;

/// Several schedulers as one handler, which calls them one after the other at each event: ignite's
/// `ParamGroupScheduler`.
///
/// ```
/// # use tch::{Device, nn};
/// # use tch_ignite::engine::Engine;
/// # use tch_ignite::optim::Optimizer;
/// # use tch_ignite::optim::lr;
/// use tch_ignite::schedule::{CosineAnnealingScheduler, LinearCyclicalScheduler, ParamGroupScheduler};
/// # let vs = nn::VarStore::new(Device::Cpu);
/// # nn::linear(vs.root().set_group(0), 1, 1, Default::default());
/// # nn::linear(vs.root().set_group(1), 1, 1, Default::default());
/// # let optimizer = Optimizer::sgd(&vs).name_group(0, "base", lr(1e-3)).name_group(1, "fc", lr(1e-2)).build()?;
/// # let mut trainer = Engine::new(|_: &mut (), _, _: ()| Ok(()));
/// trainer.attach(ParamGroupScheduler::new([
///     LinearCyclicalScheduler::new(&optimizer, "lr", 1e-3, 1e-4, 100).param_group("base").into(),
///     CosineAnnealingScheduler::new(&optimizer, "lr", 1e-2, 1e-4, 100).param_group("fc").into(),
/// ]));
/// # Ok::<(), tch_ignite::Error>(())
/// ```
#[derive(Debug)]
#[must_use = "a handler is called only once it is attached: `Engine::attach`"]
pub struct ParamGroupScheduler<S> {
    schedulers: Vec<ParamScheduler<S>>,
    events: Events,
    /// The user's choice; `None` leaves it to the events.
    write_at_start: Option<bool>,
}

impl<S: Schedule> ParamGroupScheduler<S> {
    /// Makes a handler that calls the schedulers in this order at every event, [`Event::IterationStarted`] unless
    /// [`on`](Self::on) says otherwise. The events of the single schedulers are not used.
    pub fn new(schedulers: impl IntoIterator<Item = ParamScheduler<S>>) -> Self {
        Self {
            schedulers: schedulers.into_iter().collect(),
            events: Event::IterationStarted.into(),
            write_at_start: None,
        }
    }

    /// Acts on these events. Update k uses value k of each schedule, as described at [`ParamScheduler`].
    pub fn on(mut self, events: impl Into<Events>) -> Self {
        self.events = events.into();
        self
    }

    /// Sets for all schedulers what [`ParamScheduler::write_at_start`] sets for one.
    pub fn write_at_start(mut self, on: bool) -> Self {
        self.write_at_start = Some(on);
        self
    }

    fn writes_at_start(&self) -> bool {
        self.write_at_start.unwrap_or_else(|| self.events.are_after_step())
    }

    /// Writes the next value of each scheduler: one event, without an engine.
    ///
    /// # Errors
    /// The errors of [`ParamScheduler::advance`]; the schedulers before the failing one have written.
    pub fn advance(&mut self) -> Result<()> {
        self.schedulers.iter_mut().try_for_each(|scheduler| scheduler.advance().map(drop))
    }

    /// Returns the state of each scheduler with its name, under `schedulers`, as in ignite.
    pub fn state_dict(&self) -> Map<String, Value> {
        let states = self.schedulers.iter().map(|s| json!([s.name(), s.state_dict()]));
        Map::from_iter([("schedulers".to_owned(), states.collect())])
    }

    /// Goes to a saved position.
    ///
    /// # Errors
    /// Another number of schedulers, other names, or a state that a scheduler refuses; the schedulers before
    /// that one have gone to their positions then.
    pub fn load_state_dict(&mut self, state: &Map<String, Value>) -> Result<()> {
        let states = self.states(state)?;
        let mut pairs = self.schedulers.iter_mut().zip(&states);
        pairs.try_for_each(|(scheduler, state)| scheduler.load_state_dict(state))
    }

    /// Reads the states of the schedulers, which must have the same names.
    fn states(&self, state: &Map<String, Value>) -> Result<Vec<Map<String, Value>>> {
        let states: Vec<(String, Map<String, Value>)> = read(state, "schedulers")?;
        if states.len() != self.schedulers.len() {
            return Err(Error::State(format!(
                "Input state_dict contains {} state_dicts of param group schedulers, but {} needed",
                states.len(),
                self.schedulers.len()
            )));
        }
        for (scheduler, (name, _)) in self.schedulers.iter().zip(&states) {
            if scheduler.name() != name {
                return Err(Error::State(format!(
                    "Name of scheduler from input state dict does not correspond to required one, {name} vs {}",
                    scheduler.name()
                )));
            }
        }
        Ok(states.into_iter().map(|(_, state)| state).collect())
    }

    fn load(&mut self, mut state: StateDict, strict: bool) -> Result<Vec<String>> {
        let mut changed = vec![];
        let states = self.states(state.values())?;
        for (index, (scheduler, values)) in self.schedulers.iter_mut().zip(states).enumerate() {
            let mut besides = state.take_part(&index.to_string())?;
            let different = scheduler.load_both(&values, &mut besides, strict)?;
            changed.extend(different.map(|text| format!("'{}': {text}", scheduler.name())));
        }
        Ok(changed)
    }
}

impl<S: Schedule, C, B, O> Handler<C, B, O> for ParamGroupScheduler<S> {
    fn spec(&self) -> Result<HandlerSpec> {
        let (mut names, mut unique, mut knobs) = (vec![], vec![], vec![]);
        for (index, scheduler) in self.schedulers.iter().enumerate() {
            let spec = <_ as Handler<C, B, O>>::spec(scheduler)?;
            // The schedulers are one handler, so they may have one name, but not one history.
            unique.retain(|name| *name != format!("scheduler '{}'", spec.name));
            unique.extend(spec.unique_names);
            names.push(spec.name);
            knobs.push(scheduler.knob().clone());
            let mut before = self.schedulers[..index].iter();
            if let Some(other) = before.find(|other| other.knob().overlaps(scheduler.knob())) {
                return Err(scheduler.knob().driven_twice(other.name(), scheduler.name()));
            }
        }
        let events = with_start(&self.events, self.writes_at_start());
        let spec = HandlerSpec::new(names.join(", "), events).unique_names(unique);
        Ok(if self.events.are_filtered() { spec } else { spec.drives(knobs) })
    }

    fn save_state(&self) -> Result<Option<StateDict>> {
        let mut state = StateDict::from(self.state_dict());
        for (index, scheduler) in self.schedulers.iter().enumerate() {
            let mut value = StateDict::new();
            scheduler.save_besides(&mut value)?;
            state.set_part(&index.to_string(), value);
        }
        Ok(Some(state))
    }

    fn load_state(&mut self, state: StateDict) -> Result<()> {
        self.load(state, true).map(drop)
    }

    fn load_state_partially(&mut self, state: StateDict) -> Result<Vec<String>> {
        self.load(state, false)
    }

    fn param(&self, name: &str) -> Option<Result<f64>> {
        let scheduler = self.schedulers.iter().find(|scheduler| scheduler.name() == name)?;
        Some(scheduler.get_param())
    }

    fn call(
        &mut self,
        event: Event,
        _cx: &mut C,
        engine: &mut Engine<'_, C, B, O>,
    ) -> anyhow::Result<()> {
        let at_start = self.writes_at_start();
        let mut schedulers = self.schedulers.iter_mut();
        schedulers.try_for_each(|scheduler| scheduler.handle(event, at_start, engine))
    }
}
