use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use tch::Tensor;
use tch::nn::VarStore;

use super::weight_averages::{Buffers, Swapped, WeightAverages, WithAverages};
use crate::bridge::Average;
use crate::engine::{Engine, Handler, HandlerSpec};
use crate::error::{Error, Result};
use crate::event::{Event, OPTIMIZER_STEPPED, WINDOW_COMPLETED};
use crate::event_filter::Events;
use crate::optim::Knob;
use crate::state::StateDict;

/// An exponential moving average of a model's variables: ignite's `EMAHandler`. At each of its events the handler
/// computes `ema = ema * (1 - momentum) + model * momentum`, in one pass and in place.
///
/// By default the averages are updated once for each update of the optimizer, also with gradient accumulation. The
/// event is [`WINDOW_COMPLETED`] if the trainer has it, as the one of
/// [`create_supervised_trainer`](crate::supervised::create_supervised_trainer); otherwise [`OPTIMIZER_STEPPED`] if the
/// trainer has registered it before the handler is attached; otherwise [`Event::IterationCompleted`]. At
/// `WINDOW_COMPLETED` a step that a [`GradScaler`](crate::amp::GradScaler) skipped counts too, as in programs that call
/// `update` after `scaler.step(optimizer)`: the momentum's warm-up goes on, and no host sync is needed. With
/// `.on(OPTIMIZER_STEPPED)` such a step does not count.
///
/// A clone shares the averages: attach one and evaluate with the other. The handler averages the variables that the
/// store has when the handler is made. No host sync.
///
/// ```
/// use tch::{Device, Kind, nn};
/// use tch_ignite::engine::{Engine, Until};
/// use tch_ignite::handlers::EMAHandler;
///
/// let vs = nn::VarStore::new(Device::Cpu);
/// let mut w = vs.root().zeros("w", &[1]);
/// let ema = EMAHandler::new(&vs, 0.5)?; // or EMAHandler::decay(&vs, 0.5), the same in other words
/// let mut trainer = Engine::new(|w: &mut tch::Tensor, _, value: f64| Ok(tch::no_grad(|| { let _ = w.fill_(value); })));
/// trainer.attach(ema.clone());
/// trainer.run(&mut w, vec![1.0, 3.0], Until::epochs(1))?;
/// {
///     let _averages = ema.swap()?; // until the end of this block
///     assert_eq!(w.double_value(&[0]), 1.75);
/// }
/// assert_eq!(w.double_value(&[0]), 3.0);
/// # Ok::<(), tch_ignite::Error>(())
/// ```
#[derive(Debug, Clone)]
#[doc(alias = "AveragedModel")]
#[doc(alias = "ModelEma")]
#[must_use = "a handler is called only once it is attached: `Engine::attach`"]
pub struct EMAHandler {
    averages: WeightAverages,
    momentum: Arc<Mutex<Momentum>>,
    buffers: Buffers,
    name: String,
    events: Events,
    save_history: bool,
}

#[derive(Debug)]
struct Momentum {
    /// The momentum after the warm-up.
    target: f64,
    /// The momentum of the last update, or the value that was set since.
    current: f64,
    warmup: Warmup,
    updates: u64,
}

#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
enum Warmup {
    None,
    Linear { from: f64, updates: u64 },
    Count,
}

impl Momentum {
    fn loaded(state: &StateDict) -> Result<Self> {
        let (updates, current) = (state.value("updates")?, state.value("momentum")?);
        let (target, warmup) = (state.value("target")?, state.value("warmup")?);
        Ok(Self { target, current, warmup, updates })
    }

    /// Counts an update, and returns its momentum.
    fn next(&mut self) -> f64 {
        self.updates += 1;
        let index = (self.updates - 1) as f64;
        match self.warmup {
            Warmup::None => {}
            Warmup::Linear { from, updates } => {
                let denominator = (updates.max(2) - 1) as f64;
                let value = from + (self.target - from) * index / denominator;
                self.current = if self.target >= from {
                    value.min(self.target)
                } else {
                    value.max(self.target)
                };
            }
            Warmup::Count => self.current = (1. - (1. + index) / (10. + index)).max(self.target),
        }
        self.current
    }
}

fn locked(momentum: &Mutex<Momentum>) -> MutexGuard<'_, Momentum> {
    momentum.lock().unwrap_or_else(PoisonError::into_inner)
}

fn check(momentum: f64) -> Result<()> {
    if 0. < momentum && momentum < 1. {
        return Ok(());
    }
    Err(Error::invalid(format!(
        "EMAHandler: Invalid momentum: {momentum:?}. It must be above 0 and below 1: the weight of the new values"
    )))
}

impl EMAHandler {
    /// Makes averages in which the new values have the weight `momentum` (ignite's default is 0.0002). The averages
    /// start as copies of the variables, and take as much memory.
    ///
    /// # Errors
    /// The momentum is not above 0 and below 1.
    pub fn new(vs: &VarStore, momentum: f64) -> Result<Self> {
        check(momentum)?;
        let momentum =
            Momentum { target: momentum, current: momentum, warmup: Warmup::None, updates: 0 };
        Ok(Self {
            averages: WeightAverages::of(vs)?,
            momentum: Arc::new(Mutex::new(momentum)),
            buffers: Buffers::default(),
            name: "ema_momentum".into(),
            events: WINDOW_COMPLETED.or(OPTIMIZER_STEPPED.or(Event::IterationCompleted)).into(),
            save_history: false,
        })
    }

    /// Makes averages in which the old values have the weight `decay`, as most papers define it: `new(vs, 1 - decay)`.
    ///
    /// # Errors
    /// The decay is not above 0 and below 1.
    pub fn decay(vs: &VarStore, decay: f64) -> Result<Self> {
        if !(0. < decay && decay < 1.) {
            return Err(Error::invalid(format!(
                "EMAHandler: Invalid decay: {decay:?}. It must be above 0 and below 1: the weight of the old values"
            )));
        }
        Self::new(vs, 1. - decay)
    }

    /// Lets the momentum go linearly from `momentum_warmup` (0 to 1) at the first update to its value at update
    /// `warmup_iters`.
    ///
    /// # Errors
    /// `momentum_warmup` is outside 0 to 1, or `warmup_iters` is 0.
    pub fn warmup(self, momentum_warmup: f64, warmup_iters: u64) -> Result<Self> {
        if !(0. ..=1.).contains(&momentum_warmup) {
            return Err(Error::invalid(format!(
                "EMAHandler: Invalid momentum_warmup: {momentum_warmup:?}. It must be between 0 and 1"
            )));
        }
        if warmup_iters == 0 {
            return Err(Error::invalid(
                "EMAHandler: Invalid warmup_iters: 0. It must be positive: the number of updates until the momentum has its value",
            ));
        }
        let warmup = Warmup::Linear { from: momentum_warmup, updates: warmup_iters };
        locked(&self.momentum).warmup = warmup;
        Ok(self)
    }

    /// Limits the decay of update n, counted from 0, to `(1 + n) / (10 + n)`, so that the first values are soon
    /// forgotten (TensorFlow's `num_updates`).
    pub fn warmup_by_count(self) -> Self {
        locked(&self.momentum).warmup = Warmup::Count;
        self
    }

    /// Sets how buffers are treated; the default is [`Buffers::Copy`].
    pub fn handle_buffers(mut self, buffers: Buffers) -> Self {
        self.buffers = buffers;
        self
    }

    /// Sets the name in errors and in the history; the default is `"ema_momentum"`.
    pub fn named(mut self, name: impl Into<String>) -> Self {
        self.name = name.into();
        self
    }

    /// Updates the averages at these events, instead of once for each update of the optimizer.
    pub fn on(mut self, events: impl Into<Events>) -> Self {
        self.events = events.into();
        self
    }

    /// Whether the momentum of each update is added to `engine.state.param_history`, under the handler's name; the
    /// default is false.
    pub fn save_history(mut self, on: bool) -> Self {
        self.save_history = on;
        self
    }

    /// The momentum of the last update; before the first update, the momentum after the warm-up.
    pub fn momentum(&self) -> f64 {
        locked(&self.momentum).current
    }

    /// Number of updates so far.
    pub fn updates(&self) -> u64 {
        locked(&self.momentum).updates
    }

    /// A knob through which a scheduler can drive the momentum. Setting the knob ends the warm-up. The next update
    /// refuses a value that is not above 0 and below 1.
    pub fn knob(&self) -> Knob {
        let (get, set) = (self.momentum.clone(), self.momentum.clone());
        Knob::new(
            self.name.clone(),
            move || locked(&get).current,
            move |value| {
                let mut momentum = locked(&set);
                (momentum.target, momentum.current) = (value, value);
                momentum.warmup = Warmup::None;
            },
        )
    }

    /// Updates the averages once, without an engine, and returns the momentum used.
    ///
    /// # Errors
    /// The momentum is not above 0 and below 1, or the averages are swapped in.
    pub fn update(&self) -> Result<f64> {
        let mut momentum = locked(&self.momentum);
        check(momentum.target)?;
        let before = (momentum.updates, momentum.current);
        let value = momentum.next();
        let updated = self.averages.update(Average::Lerp(value), self.buffers);
        if updated.is_err() {
            (momentum.updates, momentum.current) = before;
        }
        updated.map(|()| value)
    }

    /// The averages, by the names of the variables. The tensors are the handler's own: copy them to keep their values,
    /// and copy into them to restore values.
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

    /// Wraps a handler so that it is called with the averages swapped in: `ema.with_averages(Evaluate::each_epoch(…))`.
    pub fn with_averages<H>(&self, handler: H) -> WithAverages<H> {
        WithAverages { averages: self.averages.clone(), handler }
    }
}

impl<C, B, O> Handler<C, B, O> for EMAHandler {
    fn spec(&self) -> Result<HandlerSpec> {
        // The name must be unique only where it names a history.
        let history = self.save_history.then(|| format!("history of '{}'", self.name));
        let spec = HandlerSpec::new(&*self.name, self.events.clone()).differs_by_rank(false);
        Ok(spec.unique_names(history))
    }

    fn save_state(&self) -> Result<Option<StateDict>> {
        let mut state = StateDict::new();
        {
            let momentum = locked(&self.momentum);
            state.set_value("updates", momentum.updates)?;
            state.set_value("momentum", momentum.current)?;
            // A knob may have changed these since the handler was made.
            state.set_value("target", momentum.target)?;
            state.set_value("warmup", momentum.warmup)?;
        }
        state.set_part("averages", self.averages.save()?);
        Ok(Some(state))
    }

    fn load_state(&mut self, state: StateDict) -> Result<()> {
        let momentum = Momentum::loaded(&state)?;
        self.averages.load(state.part("averages")?)?;
        *locked(&self.momentum) = momentum;
        Ok(())
    }

    fn load_state_partially(&mut self, mut state: StateDict) -> Result<Vec<String>> {
        let momentum = Momentum::loaded(&state)?;
        let misfits = self.averages.load_partially(state.take_part("averages")?)?;
        *locked(&self.momentum) = momentum;
        Ok(misfits)
    }

    fn call(
        &mut self,
        _event: Event,
        cx: &mut C,
        engine: &mut Engine<'_, C, B, O>,
    ) -> anyhow::Result<()> {
        let momentum = {
            let _weights = engine.evaluation_weights(cx)?;
            self.update()?
        };
        if self.save_history {
            engine.state.record_param(&self.name, vec![momentum]);
        }
        Ok(())
    }
}
