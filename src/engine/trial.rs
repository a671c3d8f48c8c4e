use std::cell::Cell;

use super::handler::NamedHandler;
use super::position::Position;
use super::random_numbers::{generators, load_generators_strictly};
use super::run::RUNS_ALREADY;
use super::{Engine, Event, Profile, Requests, State};
use crate::data::Source;
use crate::error::{Error, Result};
use crate::guard::guarded;
use crate::state::StateDict;

/// The run of an engine that is set aside while a trial run uses the engine.
struct SuspendedRun<'a, B, O> {
    state: State<B, O>,
    position: Position,
    data: Option<Box<dyn Source<B> + 'a>>,
    requests: Requests,
    exception: Option<Error>,
    last_event: Option<Event>,
    refused: Option<String>,
    random: Option<StateDict>,
    profile: Option<Profile>,
    firings: Vec<u64>,
    registrations: (u64, u64),
    /// States of the handlers that the trial run calls, by name.
    handlers: StateDict,
    /// Copies of the states of the tracked parts, in the order of `track`, and of the context.
    parts: Vec<StateDict>,
    context: Option<StateDict>,
    generators: StateDict,
}

thread_local! {
    /// Number of trial runs under way on this thread.
    static TRIALS: Cell<u32> = const { Cell::new(0) };
}

/// Whether a trial run is under way on this thread: one of this engine, or of an engine that runs this one.
#[inline]
pub(super) fn in_trial() -> bool {
    TRIALS.get() > 0
}

/// Counts a trial run as under way until it is dropped.
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
    /// Runs `call` on this engine and leaves no trace of it, also after an error or a panic. For `call` the engine
    /// looks as if it had never run, but has its handlers. Handlers whose
    /// [`runs_in_trials`](super::HandlerSpec::runs_in_trials) is false are not called, and neither are such handlers of
    /// engines that run within the trial. Afterwards the engine is at its old position, with its data; handlers,
    /// tracked parts, the context (where it is tracked) and libtorch's generators have their old states, and handlers
    /// that `call` added or removed are gone or back.
    ///
    /// Costs a copy of these states in host memory.
    ///
    /// # Errors
    /// Refused while the engine is running, and where a state cannot be saved (nothing runs then). Otherwise the error
    /// is the one that `call` returns, its panic, or that of a state that cannot be restored.
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

    /// Sets the current run aside. Nothing is changed on error.
    fn suspend(&mut self, cx: &C) -> Result<SuspendedRun<'a, B, O>> {
        if self.running {
            return Err(Error::invalid(RUNS_ALREADY));
        }
        let mut handlers = StateDict::new();
        for NamedHandler { name, handler, spec, .. } in self.handlers.objects() {
            if let Some(handler) = handler.filter(|_| spec.is_called_in_trials())
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
            last_event: self.last_event.take(),
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

    /// Brings the run back. It puts back all it can before it returns an error. Variables that the trial made stay, and
    /// the summary of the next run names them.
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
        self.last_event = suspended.last_event;
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
        for (name, _, handler) in self.handlers.objects_mut() {
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
