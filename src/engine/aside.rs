use super::position::Position;
use super::{Engine, Requests, State};
use crate::checkpoint::StateDict;
use crate::data::Source;
use crate::{Error, Result};

/// Where an engine stands, while it runs something else.
pub(crate) struct Aside<'a, B, O> {
    state: State<B, O>,
    position: Position,
    data: Option<Box<dyn Source<B> + 'a>>,
    requests: Requests,
    exception: Option<Error>,
    random: Option<StateDict>,
    firings: Vec<u64>,
}

impl<'a, C, B, O> Engine<'a, C, B, O> {
    /// Leaves the engine as if it had never run, but with its handlers.
    pub(crate) fn set_aside(&mut self) -> Result<Aside<'a, B, O>> {
        if self.running {
            return Err(Error::invalid("the engine is running already"));
        }
        Ok(Aside {
            state: std::mem::take(&mut self.state),
            position: std::mem::take(&mut self.position),
            data: self.data.take(),
            requests: std::mem::take(&mut self.requests),
            exception: self.exception.take(),
            random: self.random.take(),
            firings: self.handlers.take_firings(),
        })
    }

    /// Goes back to where it stood.
    pub(crate) fn put_back(&mut self, aside: Aside<'a, B, O>) {
        self.state = aside.state;
        self.position = aside.position;
        self.data = aside.data;
        self.requests = aside.requests;
        self.exception = aside.exception;
        self.random = aside.random;
        self.handlers.put_back_firings(&aside.firings);
    }
}
