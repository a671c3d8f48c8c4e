use serde_json::{Map, Value};

use super::scheduler::{is_due, unless_ended, with_start};
use super::{Schedule, load_position, save_position, value};
use crate::data::BatchSize;
use crate::engine::{Engine, Handler, HandlerSpec};
use crate::error::{Error, Result};
use crate::event::Event;
use crate::event_filter::Events;
use crate::state::StateDict;

/// Drives the batch size of a [`Loader`](crate::data::Loader) or [`DataLoader`](crate::data::DataLoader):
/// ignite's `BatchSizeScheduler`.
///
/// At the start of each epoch, unless [`on`](Self::on) says otherwise, the loader gets the schedule's value, rounded,
/// and `state.epoch_length` becomes the loader's new number of batches, so that an epoch stays one pass over
/// the data. (In ignite the length stays, and epochs drift from passes.)
///
/// ```
/// # use tch::{Device, Kind, Tensor};
/// use tch_ignite::data::{Batch, Loader};
/// use tch_ignite::engine::{Engine, Until};
/// use tch_ignite::schedule::{BatchSizeScheduler, StepLR};
/// # let x = Tensor::arange(12, (Kind::Float, Device::Cpu));
/// let loader = Loader::new(&x, &x, 2)?;
/// let mut trainer = Engine::new(|sizes: &mut Vec<i64>, _, (x, _): Batch| {
///     sizes.push(x.size()[0]);
///     Ok(())
/// });
/// trainer.attach(BatchSizeScheduler::new(&loader, StepLR::new(4.0, 1).gamma(1.5)));
/// let mut sizes = vec![];
/// trainer.run(&mut sizes, &loader, Until::epochs(2))?;
/// assert_eq!(sizes, [4, 4, 4, 6, 6]);
/// # Ok::<(), tch_ignite::Error>(())
/// ```
#[derive(Debug)]
#[must_use = "a handler is called only once it is attached: `Engine::attach`"]
pub struct BatchSizeScheduler<S> {
    batch_size: BatchSize,
    schedule: S,
    /// The batch size when this scheduler was made; going to a position before the first event sets it again.
    first: u64,
    events_done: u64,
    events: Events,
}

impl<S: Schedule> BatchSizeScheduler<S> {
    /// Makes a scheduler for this loader (`&loader`) and its clones.
    pub fn new(loader: impl Into<BatchSize>, schedule: S) -> Self {
        let (batch_size, events) = (loader.into(), Event::EpochStarted.into());
        let first = batch_size.get();
        Self { batch_size, schedule, first, events_done: 0, events }
    }

    /// Returns the position, with the schedule's arguments.
    pub fn state_dict(&self) -> Map<String, Value> {
        self.schedule.save(self.events_done)
    }

    /// Goes to a saved position. The loader gets the batch size of the last event before it, or, where there is
    /// none, the size that it had when the scheduler was made.
    ///
    /// # Errors
    /// A missing key, or a state of a schedule with other arguments; nothing is changed then.
    pub fn load_state_dict(&mut self, state: &Map<String, Value>) -> Result<()> {
        self.go_to(self.schedule.load(state)?)
    }

    fn go_to(&mut self, events: u64) -> Result<()> {
        let last = events.checked_sub(1);
        self.batch_size.set(last.map_or(Ok(self.first), |last| self.size_at(last))?)?;
        self.events_done = events;
        Ok(())
    }

    fn size_at(&self, event: u64) -> Result<u64> {
        let size = value(&self.schedule, event)?.round();
        if !(1. ..=u32::MAX.into()).contains(&size) {
            return Err(Error::invalid(format!(
                "a batch size must be at least 1 and finite, but the schedule gives {size}"
            )));
        }
        Ok(size as u64)
    }

    /// Acts on these events. Where all of them are fired after the step, value 0 is set when the run begins, as
    /// described at [`ParamScheduler`](super::ParamScheduler). The epoch length is adapted at the start and end of
    /// epochs only; a change within an epoch leaves its length as it is.
    pub fn on(mut self, events: impl Into<Events>) -> Self {
        self.events = events.into();
        self
    }
}

impl<S: Schedule, C, B, O> Handler<C, B, O> for BatchSizeScheduler<S> {
    fn spec(&self) -> Result<HandlerSpec> {
        self.schedule.validate()?;
        let events = with_start(&self.events, self.events.are_after_step());
        let drives = (!self.events.are_filtered()).then(|| self.batch_size.knob().clone());
        Ok(HandlerSpec::new("batch size", events).drives(drives))
    }

    fn save_state(&self) -> Result<Option<StateDict>> {
        let mut state = self.state_dict().into();
        save_position(&self.schedule, self.events_done, &mut state)?;
        Ok(Some(state))
    }

    fn load_state(&mut self, state: StateDict) -> Result<()> {
        match load_position(&self.schedule, &state, true)? {
            Some((events, _)) => self.go_to(events),
            None => self.load_state_dict(state.values()),
        }
    }

    fn load_state_partially(&mut self, state: StateDict) -> Result<Vec<String>> {
        let position = load_position(&self.schedule, &state, false)?;
        let Some((events, changed)) = position else {
            return self.load_state_dict(state.values()).map(|()| vec![]);
        };
        self.go_to(events)?;
        Ok(changed.into_iter().collect())
    }

    fn call(
        &mut self,
        event: Event,
        _cx: &mut C,
        engine: &mut Engine<'_, C, B, O>,
    ) -> anyhow::Result<()> {
        let after_step = self.events.are_after_step();
        if after_step && !is_due(event, &mut self.events_done) {
            return Ok(());
        }
        let size = self.size_at(self.events_done);
        let size = match after_step {
            true => unless_ended(&self.schedule, &mut self.events_done, size)?,
            false => Some(size?),
        };
        let Some(size) = size else { return Ok(()) };
        let batches = self.batch_size.batches_with(size);
        let adapts = matches!(event, Event::Started | Event::EpochStarted | Event::EpochCompleted);
        anyhow::ensure!(
            !adapts || batches > 0,
            "the schedule gives batch_size {size}, but with drop_last the loader's {} samples make no batch of that size",
            self.batch_size.samples()
        );
        self.batch_size.set(size)?;
        if adapts {
            engine.state.epoch_length = Some(batches);
        }
        self.events_done += 1;
        Ok(())
    }
}
