use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tch::Tensor;
use tch::nn::VarStore;

use super::weight_averages::{Buffers, Swapped, WeightAverages, WithAverages};
use crate::bridge::Average;
use crate::engine::{Engine, Handler, HandlerSpec};
use crate::error::Result;
use crate::event::Event;
use crate::event_filter::Events;
use crate::state::StateDict;

/// The plain average of a model's variables over the handler's events, for stochastic weight averaging (Izmailov et al.
/// 2018, <https://arxiv.org/abs/1803.05407>): torch's `AveragedModel`. At event n, counted from 0, the handler computes
/// `average = average + (model - average) / (n + 1)`, in one pass and in place.
///
/// The default event is the end of each epoch; begin late with `.on(Event::EpochCompleted.after(100))`. A clone shares
/// the averages. The running averages of batch normalisation have to be computed anew for the averaged weights:
/// [`update_bn`](super::update_bn). No host sync.
///
/// ```
/// use tch::{Device, nn};
/// use tch_ignite::handlers::SWAHandler;
///
/// let vs = nn::VarStore::new(Device::Cpu);
/// let mut w = vs.root().zeros("w", &[1]);
/// let swa = SWAHandler::new(&vs)?;
/// for value in [1.0, 2.0, 6.0] {
///     tch::no_grad(|| { let _ = w.fill_(value); });
///     swa.update()?;
/// }
/// assert_eq!((swa.n_averaged(), swa.averages()[0].1.double_value(&[0])), (3, 3.0));
/// # Ok::<(), tch_ignite::Error>(())
/// ```
#[derive(Debug, Clone)]
#[doc(alias = "StochasticWeightAveraging")]
#[doc(alias = "AveragedModel")]
#[doc(alias = "swa_utils")]
#[must_use = "a handler is called only once it is attached: `Engine::attach`"]
pub struct SWAHandler {
    averages: WeightAverages,
    count: Arc<AtomicU64>,
    buffers: Buffers,
    events: Events,
}

impl SWAHandler {
    /// Averages the variables that the store has now; the averages take as much memory as these.
    ///
    /// # Errors
    /// libtorch cannot copy the variables.
    pub fn new(vs: &VarStore) -> Result<Self> {
        Ok(Self {
            averages: WeightAverages::of(vs)?,
            count: Arc::default(),
            buffers: Buffers::default(),
            events: Event::EpochCompleted.into(),
        })
    }

    /// Sets how buffers are treated; the default is [`Buffers::Copy`].
    pub fn handle_buffers(mut self, buffers: Buffers) -> Self {
        self.buffers = buffers;
        self
    }

    /// Updates the averages at these events instead of [`Event::EpochCompleted`].
    pub fn on(mut self, events: impl Into<Events>) -> Self {
        self.events = events.into();
        self
    }

    /// Number of values that each average is of.
    pub fn n_averaged(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }

    /// Adds the model's values to the averages, without an engine.
    ///
    /// # Errors
    /// The averages are swapped in.
    pub fn update(&self) -> Result<()> {
        let count = self.n_averaged() + 1;
        let how = if count == 1 { Average::Copy } else { Average::Mean(count as f64) };
        let buffers = match (self.buffers, count) {
            (Buffers::Update, 1) => Buffers::Copy,
            (buffers, _) => buffers,
        };
        self.averages.update(how, buffers)?;
        self.count.store(count, Ordering::Relaxed);
        Ok(())
    }

    /// The averages, by the names of the variables. The tensors are the handler's own: copy them to keep their values.
    pub fn averages(&self) -> Vec<(String, Tensor)> {
        self.averages.averages()
    }

    /// Gives the model the values of the averages, for an evaluation, until the returned guard is dropped.
    ///
    /// # Errors
    /// The averages are swapped in already.
    pub fn swap(&self) -> Result<Swapped> {
        self.averages.swap()
    }

    /// Wraps a handler so that it is called with the averages swapped in: `swa.with_averages(Evaluate::each_epoch(…))`.
    pub fn with_averages<H>(&self, handler: H) -> WithAverages<H> {
        WithAverages { averages: self.averages.clone(), handler }
    }
}

impl<C, B, O> Handler<C, B, O> for SWAHandler {
    fn spec(&self) -> Result<HandlerSpec> {
        Ok(HandlerSpec::new("SWA", self.events.clone()).differs_by_rank(false))
    }

    fn save_state(&self) -> Result<Option<StateDict>> {
        let mut state = StateDict::new();
        state.set_value("n_averaged", self.n_averaged())?;
        state.set_part("averages", self.averages.save()?);
        Ok(Some(state))
    }

    fn load_state(&mut self, state: StateDict) -> Result<()> {
        let count = state.value("n_averaged")?;
        self.averages.load(state.part("averages")?)?;
        self.count.store(count, Ordering::Relaxed);
        Ok(())
    }

    fn load_state_partially(&mut self, mut state: StateDict) -> Result<Vec<String>> {
        let count = state.value("n_averaged")?;
        let misfits = self.averages.load_partially(state.take_part("averages")?)?;
        self.count.store(count, Ordering::Relaxed);
        Ok(misfits)
    }

    fn call(
        &mut self,
        _event: Event,
        cx: &mut C,
        engine: &mut Engine<'_, C, B, O>,
    ) -> anyhow::Result<()> {
        let _weights = engine.evaluation_weights(cx)?;
        Ok(self.update()?)
    }
}
