use std::cell::Cell;

use super::checkpoint::{generators, load_generators_strictly};
use super::handler::NamedHandler;
use super::position::Position;
use super::{Engine, Profile, Requests, State};
use crate::data::Source;
use crate::error::{Error, Result};
use crate::guard::guarded;
use crate::state::StateDict;

/// Where an engine stands and what belongs to it, while it runs something else.
struct SuspendedRun<'a, B, O> {
    state: State<B, O>,
    position: Position,
    data: Option<Box<dyn Source<B> + 'a>>,
    requests: Requests,
    exception: Option<Error>,
    refused: Option<String>,
    random: Option<StateDict>,
    profile: Option<Profile>,
    firings: Vec<u64>,
    registrations: (u64, u64),
    /// The states of the handlers that a trial run calls, by name.
    handlers: StateDict,
    /// What is tracked by name, and the context.
    parts: Vec<StateDict>,
    context: Option<StateDict>,
    generators: StateDict,
}

thread_local! {
    /// Trial runs that are under way on this thread.
    static TRIALS: Cell<u32> = const { Cell::new(0) };
}

/// Whether a trial run is under way on this thread: of this engine, or of one that runs this one.
#[inline]
pub(super) fn in_trial() -> bool {
    TRIALS.get() > 0
}

struct Trial;

impl Trial {
    fn begin() -> Self {
        TRIALS.set(TRIALS.get() + 1);
        Self
    }
}

impl Drop for Trial {
    fn drop(&mut self) {
        TRIALS.set(TRIALS.get() - 1);
    }
}

impl<'a, C, B, O> Engine<'a, C, B, O> {
    /// Runs something on this engine and leaves no trace of it, also after an error or a panic. The engine is
    /// as if it had never run meanwhile, but with its handlers; those whose
    /// [`runs_in_trials`](super::Handler::runs_in_trials) is false are not called, nor are those of engines
    /// that run within it. Afterwards the engine stands where it stood, with its data; handlers, tracked
    /// parts, the context (where it is tracked) and libtorch's generators have their states again, and
    /// handlers that were added or removed meanwhile are not, or are again, there.
    ///
    /// Costs a copy of these states in the computer's memory.
    ///
    /// # Errors
    /// The engine is running; a state that cannot be saved, before anything runs; what `call` returns, or
    /// its panic; a state that cannot be restored.
    pub(crate) fn trial<T>(
        &mut self,
        cx: &mut C,
        call: impl FnOnce(&mut Self, &mut C) -> Result<T>,
    ) -> Result<T> {
        let suspended = self.suspend(cx)?;
        let trial = Trial::begin();
        let result = guarded(|| Ok(call(self, cx)))
            .unwrap_or_else(|panicked| Err(Error::invalid(format!("the trial run {panicked}"))));
        drop(trial);
        match (result, self.resume_suspended(cx, suspended)) {
            (Ok(value), Ok(())) => Ok(value),
            (Ok(_), Err(error)) => Err(error),
            (Err(error), Ok(())) => Err(error),
            (Err(error), Err(second)) => Err(error.besides(second)),
        }
    }

    /// Nothing is changed on error.
    fn suspend(&mut self, cx: &C) -> Result<SuspendedRun<'a, B, O>> {
        if self.running {
            return Err(Error::invalid("the engine is running already"));
        }
        let mut handlers = StateDict::new();
        for NamedHandler { name, handler, .. } in self.handlers.objects() {
            if let Some(handler) = handler.filter(|handler| handler.runs_in_trials())
                && let Some(state) = handler.save_state()?
            {
                handlers.set_part(&name, state.copy()?);
            }
        }
        let (parts, context) = self.tracked_copies(cx)?;
        let generators = generators()?;
        Ok(SuspendedRun {
            state: std::mem::take(&mut self.state),
            position: std::mem::take(&mut self.position),
            data: self.data.take(),
            requests: std::mem::take(&mut self.requests),
            exception: self.exception.take(),
            refused: self.refused.clone(),
            random: self.random.take(),
            profile: self.profile.take(),
            firings: self.handlers.take_firings(),
            registrations: self.handlers.hold(),
            handlers,
            parts,
            context,
            generators,
        })
    }

    /// Puts back all it can before it tells of an error.
    fn resume_suspended(
        &mut self,
        cx: &mut C,
        mut suspended: SuspendedRun<'a, B, O>,
    ) -> Result<()> {
        self.state = suspended.state;
        self.position = suspended.position;
        self.data = suspended.data;
        self.requests = suspended.requests;
        self.exception = suspended.exception;
        self.refused = suspended.refused;
        self.random = suspended.random;
        self.profile = suspended.profile;
        let mut result = self.handlers.release(suspended.registrations).map_err(|panicked| {
            Error::invalid(format!(
                "handler {} after a trial run: {:#}",
                panicked.name, panicked.source
            ))
        });
        self.handlers.put_back_firings(&suspended.firings);
        result = result.and(self.load_tracked_copies(cx, suspended.parts, suspended.context));
        for (name, handler) in self.handlers.objects_mut() {
            if let Some(state) = suspended.handlers.parts.remove(&name) {
                let loaded = handler.load_state(state);
                result = result.and(loaded.map_err(|error| {
                    Error::State(format!("handler '{name}' after a trial run: {error}"))
                }));
            }
        }
        result.and(load_generators_strictly(suspended.generators))
    }
}
