use serde_json::{Map, Value};

use super::{ParamScheduler, Schedule};
use crate::engine::{Engine, Handler, HandlerSpec};
use crate::error::Result;
use crate::event::Event;
use crate::event_filter::Events;
use crate::optim::{Group, Knob, Optimizer, ParamGroups};
use crate::state::StateDict;

/// Drives a hyper-parameter of an optimizer by a schedule, with ignite's arguments: a [`ParamScheduler`] that finds its
/// knob by names.
///
/// [`CosineAnnealingScheduler`](super::CosineAnnealingScheduler), [`LinearCyclicalScheduler`](super::LinearCyclicalScheduler)
/// and [`PiecewiseLinearScheduler`](super::PiecewiseLinearScheduler) are of this type; [`of`](Self::of) takes any other
/// schedule. It sets the hyper-parameter of all groups, or of one: of the [`Group`] that it is made with, or the one that
/// [`param_group`](Self::param_group) names. Its name is `"lr"`, or `"lr (fc)"` for a group `fc` of several, unless
/// [`name`](Self::name) gives another.
///
/// A group or hyper-parameter that there is not, and wrong arguments of the schedule, are found when the scheduler is attached;
/// the error names the scheduler.
///
/// ```
/// # use tch::{Device, nn};
/// use tch_ignite::engine::{Engine, Event};
/// use tch_ignite::optim::{Optimizer, lr};
/// use tch_ignite::schedule::{CosineAnnealingScheduler, OptimizerScheduler, StepLR};
///
/// # let vs = nn::VarStore::new(Device::Cpu);
/// # nn::linear(&vs.root() / "base", 1, 1, Default::default());
/// # nn::linear(&vs.root() / "fc", 1, 1, Default::default());
/// let optimizer = Optimizer::sgd(&vs)
///     .group("base", |name| name.starts_with("base"), lr(1e-3))
///     .group("fc", |name| name.starts_with("fc"), lr(1e-2))
///     .build()?;
/// # let mut trainer = Engine::new(|_: &mut (), _, _: ()| Ok(()));
/// trainer
///     .attach(CosineAnnealingScheduler::new(&optimizer, "lr", 1e-2, 0.0, 1000).param_group("fc"))
///     .attach(
///         OptimizerScheduler::of(&optimizer.group("base")?, "lr", StepLR::new(1e-3, 30))
///             .on(Event::EpochStarted)
///             .save_history(true),
///     );
/// assert_eq!(trainer.get_param("lr (fc)")?, 1e-2);
/// # Ok::<(), tch_ignite::Error>(())
/// ```
#[derive(Debug)]
#[must_use = "a handler is called only once it is attached: `Engine::attach`"]
pub struct OptimizerScheduler<S> {
    optimizer: Optimizer,
    param: String,
    is_named: bool,
    scheduler: ParamScheduler<S>,
}

impl<S: Schedule> OptimizerScheduler<S> {
    /// Makes a scheduler of this hyper-parameter (`"lr"`, `"momentum"`, `"beta1"`, …), in all groups of an optimizer
    /// (`&optimizer`) or in one (`&optimizer.group("fc")?`).
    pub fn of(groups: &impl ParamGroups, param: impl Into<String>, schedule: S) -> Self {
        let ((optimizer, group), param) = (groups.chosen(), param.into());
        let knob = optimizer.knob(&param);
        let knob = knob.unwrap_or_else(|error| Knob::missing(&param, &error));
        let scheduler = ParamScheduler::new(&*param, knob, schedule);
        let of_all = Self { optimizer, param, is_named: false, scheduler };
        match group {
            Some(group) => of_all.drive(group.name(), Ok(group)),
            None => of_all,
        }
    }

    /// Drives one group, by its name.
    pub fn param_group(self, name: impl Into<String>) -> Self {
        let name = name.into();
        let group = self.optimizer.group(&name);
        self.drive(name, group)
    }

    /// Drives one group, by its number from 0.
    pub fn param_group_index(self, index: usize) -> Self {
        let group = self.optimizer.group_at(index);
        let name = group.as_ref().map_or_else(|_| index.to_string(), Group::name);
        self.drive(name, group)
    }

    fn drive(mut self, name: String, group: Result<Group>) -> Self {
        let knob = group.and_then(|group| group.knob(&self.param));
        self.scheduler.knob = knob.unwrap_or_else(|error| Knob::missing(&self.param, &error));
        if !self.is_named {
            let is_only = self.optimizer.group_names().is_ok_and(|names| names == [&*name]);
            let of_group = || format!("{} ({name})", self.param);
            self.scheduler.name = if is_only { self.param.clone() } else { of_group() };
        }
        self
    }

    /// Sets the scheduler's name, which is also its key in the history.
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.scheduler.name = name.into();
        self.is_named = true;
        self
    }

    /// Acts on these events: see [`ParamScheduler::on`].
    pub fn on(mut self, events: impl Into<Events>) -> Self {
        self.scheduler = self.scheduler.on(events);
        self
    }

    /// Records each value: see [`ParamScheduler::save_history`].
    pub fn save_history(mut self, on: bool) -> Self {
        self.scheduler = self.scheduler.save_history(on);
        self
    }

    /// Sets whether value 0 is written when the run begins: see [`ParamScheduler::write_at_start`].
    pub fn write_at_start(mut self, on: bool) -> Self {
        self.scheduler = self.scheduler.write_at_start(on);
        self
    }

    /// Changes an argument of the schedule.
    pub(super) fn with(mut self, change: impl FnOnce(S) -> S) -> Self {
        self.scheduler.schedule = change(self.scheduler.schedule);
        self
    }

    /// Returns the value for the event to come; [`Engine::get_param`] has it once the scheduler is attached.
    ///
    /// # Errors
    /// Wrong arguments, or a schedule that has ended.
    pub fn get_param(&self) -> Result<f64> {
        self.scheduler.get_param()
    }

    /// Writes the next value, and returns it: one event, without an engine. See [`ParamScheduler::advance`].
    ///
    /// # Errors
    /// Wrong arguments, a schedule that has ended, or a value that the optimizer refuses.
    pub fn advance(&mut self) -> Result<f64> {
        self.scheduler.advance()
    }

    /// Returns the position, as ignite saves it: see [`ParamScheduler::state_dict`].
    pub fn state_dict(&self) -> Map<String, Value> {
        self.scheduler.state_dict()
    }

    /// Goes to a saved position. On error nothing is changed.
    ///
    /// # Errors
    /// A missing key, or a state of a scheduler with other arguments or on another parameter.
    pub fn load_state_dict(&mut self, state: &Map<String, Value>) -> Result<()> {
        self.scheduler.load_state_dict(state)
    }
}

/// The general form, for [`ParamGroupScheduler`](super::ParamGroupScheduler) and other functions that take it.
impl<S: Schedule + 'static> From<OptimizerScheduler<S>> for ParamScheduler {
    fn from(scheduler: OptimizerScheduler<S>) -> Self {
        scheduler.scheduler.boxed()
    }
}

#[deny(clippy::missing_trait_methods)]
impl<S: Schedule, C, B, O> Handler<C, B, O> for OptimizerScheduler<S> {
    fn spec(&self) -> Result<HandlerSpec> {
        <_ as Handler<C, B, O>>::spec(&self.scheduler)
    }

    fn save_state(&self) -> Result<Option<StateDict>> {
        <_ as Handler<C, B, O>>::save_state(&self.scheduler)
    }

    fn load_state(&mut self, state: StateDict) -> Result<()> {
        <_ as Handler<C, B, O>>::load_state(&mut self.scheduler, state)
    }

    fn load_state_partially(&mut self, state: StateDict) -> Result<Vec<String>> {
        <_ as Handler<C, B, O>>::load_state_partially(&mut self.scheduler, state)
    }

    fn param(&self, name: &str) -> Option<Result<f64>> {
        <_ as Handler<C, B, O>>::param(&self.scheduler, name)
    }

    fn call(
        &mut self,
        event: Event,
        cx: &mut C,
        engine: &mut Engine<'_, C, B, O>,
    ) -> anyhow::Result<()> {
        self.scheduler.call(event, cx, engine)
    }
}
