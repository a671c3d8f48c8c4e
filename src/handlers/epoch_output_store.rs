use std::cell::{Ref, RefCell};
use std::rc::Rc;

use crate::engine::{Engine, Handler, HandlerSpec};
use crate::error::{Error, Result};
use crate::event::Event;
use crate::state::{Saveable, StateDict};

/// Keeps a value from the output of each iteration until the epoch ends: ignite's `EpochOutputStore`.
///
/// Clones share the list: attach one, read the other. Attach the store before the handlers that read it at the end of
/// the epoch; the list is emptied when the next epoch begins. Tensors stay on their device. Keep no more of an output
/// than you need, and [`detach`](tch::Tensor::detach) tensors with gradients: otherwise the graphs of the whole epoch
/// stay in memory. Checkpoints hold the list after [`tracked`](Self::tracked); otherwise a run that is resumed in mid
/// epoch has only the rest of the list.
///
/// ```
/// use tch_ignite::engine::{Engine, Until};
/// use tch_ignite::handlers::EpochOutputStore;
/// let losses = EpochOutputStore::of(|output: &(f64, &str)| output.0);
/// let mut trainer = Engine::new(|_: &mut (), _, x: f64| Ok((x, "more")));
/// trainer.attach(losses.clone());
/// trainer.run(&mut (), vec![1.0, 2.0], Until::epochs(3))?;
/// assert_eq!(*losses.data(), [1.0, 2.0]);
/// # Ok::<(), tch_ignite::Error>(())
/// ```
#[must_use = "a handler is called only once it is attached: `Engine::attach`"]
pub struct EpochOutputStore<T, F> {
    transform: F,
    data: Rc<RefCell<Vec<T>>>,
    states: Option<States<T>>,
}

crate::debug::opaque_debug!(EpochOutputStore<T, F>);

/// Functions that turn the list into a state and back.
struct States<T> {
    save: fn(&Vec<T>) -> Result<StateDict>,
    load: fn(StateDict) -> Result<Vec<T>>,
}

impl<T> Clone for States<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for States<T> {}

impl<T, F> EpochOutputStore<T, F> {
    /// Keeps the value that `transform` returns for each output.
    pub fn of<O>(transform: F) -> Self
    where
        F: Fn(&O) -> T,
    {
        Self { transform, data: Rc::default(), states: None }
    }

    /// Saves the list in checkpoints.
    pub fn tracked(mut self) -> Self
    where
        T: Saveable,
    {
        self.states = Some(States { save: Vec::to_state, load: Vec::from_state });
        self
    }

    /// The values kept since the epoch began. Drop the borrow before the run goes on: the handler fails while it
    /// exists.
    pub fn data(&self) -> Ref<'_, Vec<T>> {
        self.data.borrow()
    }
}

impl<T, F: Clone> Clone for EpochOutputStore<T, F> {
    fn clone(&self) -> Self {
        let (transform, data) = (self.transform.clone(), self.data.clone());
        Self { transform, data, states: self.states }
    }
}

impl<C, B, O, T, F: Fn(&O) -> T> Handler<C, B, O> for EpochOutputStore<T, F> {
    fn spec(&self) -> Result<HandlerSpec> {
        let events = Event::EpochStarted | Event::IterationCompleted;
        // A trial run calls the handler only if the list can be restored afterwards.
        Ok(HandlerSpec::new("epoch output store", events).runs_in_trials(self.states.is_some()))
    }

    fn save_state(&self) -> Result<Option<StateDict>> {
        let Some(states) = self.states else { return Ok(None) };
        let data = self.data.try_borrow().map_err(|error| Error::State(error.to_string()))?;
        (states.save)(&data).map(Some)
    }

    fn load_state(&mut self, state: StateDict) -> Result<()> {
        let Some(states) = self.states else {
            return Err(Error::State("it was tracked, and is not here".into()));
        };
        let mut data =
            self.data.try_borrow_mut().map_err(|error| Error::State(error.to_string()))?;
        *data = (states.load)(state)?;
        Ok(())
    }

    fn call(
        &mut self,
        event: Event,
        _cx: &mut C,
        engine: &mut Engine<'_, C, B, O>,
    ) -> anyhow::Result<()> {
        let mut data = self.data.try_borrow_mut()?;
        match (event, &engine.state.output) {
            (Event::EpochStarted, _) => data.clear(),
            (_, Some(output)) => data.push((self.transform)(output)),
            (_, None) => {}
        }
        Ok(())
    }
}
