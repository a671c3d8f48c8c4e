//! The state of an evaluator that lasts from one of its runs to the next, and going back to an earlier one.

use super::Engine;
use super::checkpoint::{HANDLERS, PARAM_HISTORY};
use super::random_numbers::{generators, load_generators_strictly};
use super::restored::{Report, of_named};
use crate::error::{Error, Result};
use crate::state::StateDict;

/// See [`Engine::moment`].
pub(crate) struct Moment {
    lasting: StateDict,
    random: StateDict,
    /// The places of the logs that the evaluator's handlers write to.
    logs: StateDict,
}

impl<'a, C, B, O> Engine<'a, C, B, O> {
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
}
