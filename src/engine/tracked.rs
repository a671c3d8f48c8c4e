//! The parts that a program adds to the state of an engine: models, optimizers, the context, the output.

use serde_json::{Map, Value};

use super::Engine;
use super::checkpoint::{CONTEXT, RESERVED, SETTINGS};
use super::restored::{of_named, of_part};
use crate::error::Result;
use crate::state::{EvaluationWeights, IntoStateful, Saveable, StateDict, Stateful};

/// The parts that `track`, `track_context` and `track_output` add to the state of an engine.
pub(super) struct Tracked<'a, C, O> {
    pub(super) parts: Vec<(String, Box<dyn Stateful + 'a>)>,
    pub(super) context: Option<ContextState<C>>,
    pub(super) output: Option<OutputState<O>>,
}

pub(super) struct OutputState<O> {
    pub(super) save: fn(&O) -> Result<StateDict>,
    pub(super) load: fn(StateDict) -> Result<O>,
}

pub(super) struct ContextState<C> {
    pub(super) save: fn(&C) -> Result<StateDict>,
    pub(super) load: fn(&mut C, StateDict) -> Result<()>,
    pub(super) load_partially: fn(&mut C, StateDict) -> Result<Vec<String>>,
    pub(super) differs_by_rank: fn(&C) -> bool,
    pub(super) evaluation_weights: fn(&C) -> Result<Option<EvaluationWeights>>,
    /// Whether a model may be part of the context.
    pub(super) has_model: bool,
}

impl<C, O> Default for Tracked<'_, C, O> {
    fn default() -> Self {
        Self { parts: vec![], context: None, output: None }
    }
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
            evaluation_weights: C::evaluation_weights,
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

    /// Gives parameters of tracked optimizers their values for evaluation, until the result is dropped. Allocates nothing
    /// where no optimizer has others than those for training.
    pub(crate) fn evaluation_weights(&self, cx: &C) -> Result<Vec<EvaluationWeights>> {
        let mut all = vec![];
        if let Some(context) = &self.tracked.context {
            all.extend(of_named(CONTEXT, || (context.evaluation_weights)(cx))?);
        }
        for (name, part) in &self.tracked.parts {
            all.extend(of_named(name, || part.evaluation_weights())?);
        }
        Ok(all)
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

    /// The parts for [`Restored::untracked`].
    pub(super) fn untracked(&self) -> Vec<&'static str> {
        let mut untracked = vec![];
        if !self.tracks_a_model() {
            untracked.push("any model or optimizer (Engine::track)");
        }
        if self.tracked.context.is_none() && size_of::<C>() > 0 {
            untracked.push("the context (Engine::track_context)");
        }
        untracked
    }

    pub(super) fn changed_settings(&self, state: &StateDict) -> Vec<String> {
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
}
