//! The report of a restore: the parts that came back, and those that differ.

use crate::error::{Error, Result};
use crate::guard::guarded_state;
use crate::state::StateDict;

/// The result of [`Engine::restore`](super::Engine::restore): what was restored, and what differs.
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
    /// same; see [`Engine::resume_terminated`](super::Engine::resume_terminated). `None` where there is something left
    /// to do. A limit of time or samples does not count, because it does not hold in the next process.
    pub ended: Option<String>,
}

/// Collects what was restored and what does not fit. With `strict`, what does not fit is an error.
pub(super) struct Report {
    pub(super) strict: bool,
    pub(super) restored: Restored,
}

impl Report {
    pub(super) fn strict() -> Self {
        Self { strict: true, restored: Restored::default() }
    }

    /// Notes a difference; with `strict` an error.
    pub(super) fn note(&mut self, what: String) -> Result<()> {
        if self.strict {
            return Err(Error::State(what));
        }
        self.restored.ignored.push(what);
        Ok(())
    }

    /// Loads a part. `load` gets whether all of the part has to fit, and returns a line for each difference.
    pub(super) fn load(
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
    pub(super) fn load_whole(
        &mut self,
        name: &str,
        state: Option<StateDict>,
        load: impl FnOnce(StateDict) -> Result<()>,
    ) -> Result<()> {
        self.load(name, state, |state, _| load(state).map(|()| vec![]))
    }
}

/// Calls user code that saves or loads the part of this name. A panic becomes an error, and errors name the part.
pub(super) fn of_named<T>(name: &str, call: impl FnOnce() -> Result<T>) -> Result<T> {
    guarded_state(call).map_err(|error| of_part(name, error))
}

pub(super) fn of_part(name: &str, error: Error) -> Error {
    Error::State(format!("{name}: {error}"))
}
