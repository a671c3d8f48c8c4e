use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::check::within;
use super::scheduler::unique_names;
use crate::engine::{Engine, Handler, HandlerSpec};
use crate::error::{Error, Result};
use crate::event::Event;
use crate::event_filter::Events;
use crate::optim::{Knob, Reduction};
use crate::state::{StateDict, json_floats};

/// Lowers a value when a metric has stopped getting better: ignite's `ReduceLROnPlateauScheduler`,
/// torch's `ReduceLROnPlateau`, on any knob.
///
/// At the end of each epoch it reads the metric from `engine.state.metrics`, so attach it after the handler that
/// computes the metric; reading is a host sync where the value is on a GPU. After more than `patience` epochs
/// without a better value, the knob is multiplied by `factor`, in each group it turns, down to `min_value`, if that
/// changes it by more than `eps`. A metric that is NaN is never better.
///
/// A [`ParamScheduler`](super::ParamScheduler) may drive the same knob, before or after this one: the two multiply,
/// as torch's schedulers do. From a reduction on, every value of the schedule is multiplied by the reductions so
/// far, until this handler is dropped. So a warm-up before a plateau is a schedule that ends with the warm-up, and
/// this handler, on one knob:
///
/// ```
/// # use tch::{Device, nn};
/// # use tch_ignite::engine::{Engine, Until};
/// # use tch_ignite::metrics::Mean;
/// # use tch_ignite::optim::Optimizer;
/// use tch_ignite::schedule::{LinearLR, ParamScheduler, ReduceLROnPlateauScheduler};
/// # let vs = nn::VarStore::new(Device::Cpu);
/// # nn::linear(vs.root(), 1, 1, Default::default());
/// # let optimizer = Optimizer::sgd(&vs).build()?;
/// let lr = optimizer.knob("lr")?;
/// let mut trainer = Engine::new(|_: &mut (), _, loss: f64| Ok(loss));
/// trainer
///     .metric("loss", Mean::new())
///     .attach(ParamScheduler::new("lr", lr.clone(), LinearLR::new(0.1).start_factor(0.5).total_iters(2)))
///     .attach(ReduceLROnPlateauScheduler::min("plateau", lr.clone(), "loss")?.factor(0.5).patience(0));
/// trainer.run(&mut (), vec![3.0, 3.0, 3.0], Until::epochs(2))?; // the second epoch is no better than the first
/// assert_eq!(lr.get()?, 0.05);
/// # Ok::<(), tch_ignite::Error>(())
/// ```
///
/// ```
/// use tch_ignite::engine::{Engine, Until};
/// # use std::sync::{Arc, Mutex};
/// use tch_ignite::metrics::Mean;
/// use tch_ignite::optim::Knob;
/// use tch_ignite::schedule::ReduceLROnPlateauScheduler;
///
/// # let value = Arc::new(Mutex::new(1.0));
/// # let (read, write) = (value.clone(), value.clone());
/// # let knob = Knob::new("lr", move || *read.lock().unwrap(), move |v| *write.lock().unwrap() = v);
/// let mut trainer = Engine::new(|_: &mut (), _, loss: f64| Ok(loss));
/// trainer
///     .metric("loss", Mean::new())
///     .attach(ReduceLROnPlateauScheduler::min("lr", knob, "loss")?.factor(0.5).patience(1));
/// trainer.run(&mut (), vec![3.0], Until::epochs(3))?; // the third epoch is one too many
/// # assert_eq!(*value.lock().unwrap(), 0.5);
/// # Ok::<(), tch_ignite::Error>(())
/// ```
#[derive(Debug)]
#[must_use = "a handler is called only once it is attached: `Engine::attach`"]
pub struct ReduceLROnPlateauScheduler {
    name: String,
    knobs: Vec<Knob>,
    min_values: Vec<f64>,
    metric: String,
    mode: Mode,
    factor: f64,
    patience: u64,
    threshold: f64,
    threshold_mode: ThresholdMode,
    cooldown: u64,
    eps: f64,
    save_history: bool,
    events: Events,
    state: Progress,
    /// The factor on the values of schedules, one for each knob; it holds as long as this handler lives.
    reductions: Vec<Reduction>,
}

/// The direction in which a metric gets better.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Min,
    Max,
}

/// How [`threshold`](ReduceLROnPlateauScheduler::threshold) is measured.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum ThresholdMode {
    /// As a share of the best value.
    #[default]
    Rel,
    /// As a difference from the best value.
    Abs,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Progress {
    /// `None` before the first metric that was better than infinity.
    best: Option<f64>,
    num_bad_epochs: u64,
    cooldown_counter: u64,
    event_index: u64,
    /// The product of the reductions so far, for each knob; empty in states of older versions.
    #[serde(default)]
    reductions: Vec<f64>,
}

impl ReduceLROnPlateauScheduler {
    /// Makes a scheduler for a metric that is better when smaller.
    ///
    /// # Errors
    /// A knob of an optimizer that is in use, so that its groups cannot be read.
    pub fn min(name: impl Into<String>, knob: Knob, metric: impl Into<String>) -> Result<Self> {
        Self::new(name.into(), knob, metric.into(), Mode::Min)
    }

    /// Makes a scheduler for a metric that is better when larger.
    ///
    /// # Errors
    /// The errors of [`min`](Self::min).
    pub fn max(name: impl Into<String>, knob: Knob, metric: impl Into<String>) -> Result<Self> {
        Self::new(name.into(), knob, metric.into(), Mode::Max)
    }

    fn new(name: String, knob: Knob, metric: String, mode: Mode) -> Result<Self> {
        let knobs = knob.each()?;
        let reductions: Vec<_> = knobs.iter().map(Knob::reduction).collect();
        let state = Progress {
            best: None,
            num_bad_epochs: 0,
            cooldown_counter: 0,
            event_index: 0,
            reductions: vec![],
        };
        Ok(Self {
            name,
            knobs,
            reductions,
            min_values: vec![0.],
            metric,
            mode,
            factor: 0.1,
            patience: 10,
            threshold: 1e-4,
            threshold_mode: ThresholdMode::default(),
            cooldown: 0,
            eps: 1e-8,
            save_history: false,
            events: Event::EpochCompleted.into(),
            state,
        })
    }

    /// Sets the factor that the value is multiplied by, below 1; 0.1 unless given.
    pub fn factor(mut self, factor: f64) -> Self {
        self.factor = factor;
        self
    }

    /// Sets how many epochs without a better metric are allowed, 10 unless given.
    pub fn patience(mut self, epochs: u64) -> Self {
        self.patience = epochs;
        self
    }

    /// Sets by how much a metric has to be better, 1e-4 of the best value unless given.
    pub fn threshold(mut self, threshold: f64, mode: ThresholdMode) -> Self {
        (self.threshold, self.threshold_mode) = (threshold, mode);
        self
    }

    /// Sets how many epochs after a reduction are not counted, 0 unless given.
    pub fn cooldown(mut self, epochs: u64) -> Self {
        self.cooldown = epochs;
        self
    }

    /// Sets the lowest value, one for all groups or one for each; 0 unless given.
    pub fn min_value(mut self, values: impl IntoIterator<Item = f64>) -> Self {
        self.min_values = values.into_iter().collect();
        self
    }

    /// Sets the change of the value that a reduction must exceed to be made, 1e-8 unless given.
    pub fn eps(mut self, eps: f64) -> Self {
        self.eps = eps;
        self
    }

    /// Appends the values to `engine.state.param_history` at each event.
    pub fn save_history(mut self, on: bool) -> Self {
        self.save_history = on;
        self
    }

    /// Looks at the metric on these events instead of the end of each epoch.
    pub fn on(mut self, events: impl Into<Events>) -> Self {
        self.events = events.into();
        self
    }

    fn check(&self) -> Result<()> {
        within("factor", self.factor, self.factor < 1. && self.factor > 0., "above 0 and below 1")?;
        within("threshold", self.threshold, self.threshold.is_finite(), "finite")?;
        within("eps", self.eps, self.eps.is_finite(), "finite")?;
        for min in &self.min_values {
            within("min_value", *min, min.is_finite(), "finite")?;
        }
        if self.min_values.len() != 1 && self.min_values.len() != self.knobs.len() {
            return Err(Error::invalid(format!(
                "expected {} min values, one for each group, but given {}",
                self.knobs.len(),
                self.min_values.len()
            )));
        }
        Ok(())
    }

    /// The arguments under torch's names.
    pub(crate) fn arguments(&self) -> Map<String, Value> {
        let mode = if self.mode == Mode::Min { "min" } else { "max" };
        let measure = if self.threshold_mode == ThresholdMode::Rel { "rel" } else { "abs" };
        let arguments: [(_, Value); 8] = [
            ("mode", mode.into()),
            ("factor", self.factor.into()),
            ("patience", self.patience.into()),
            ("threshold", self.threshold.into()),
            ("threshold_mode", measure.into()),
            ("cooldown", self.cooldown.into()),
            ("min_lrs", self.min_values.clone().into()),
            ("eps", self.eps.into()),
        ];
        arguments.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()
    }

    /// The arguments by which a checkpoint tells the scheduler from others.
    fn saved_arguments(&self) -> Map<String, Value> {
        let mut arguments = self.arguments();
        arguments.insert("metric".into(), self.metric.clone().into());
        arguments
    }

    /// Goes to the state of a checkpoint. Returns a line for each argument that differs from the saved one; with
    /// `strict` that is an error.
    fn load(&mut self, mut state: StateDict, strict: bool) -> Result<Vec<String>> {
        let now = self.saved_arguments();
        let then: Map<String, Value> = match state.values.remove("arguments") {
            Some(Value::Object(then)) => then,
            Some(other) => return Err(Error::State(format!("'arguments' is {other}"))),
            // A checkpoint of an older version.
            None => now.clone(),
        };
        let differs = |(key, now): (&String, &Value)| {
            let then = then.get(key).filter(|then| *then != now)?;
            Some(format!("{key} was {then} when the state was saved, and is {now} now"))
        };
        let changed: Vec<_> = now.iter().filter_map(differs).collect();
        if strict && !changed.is_empty() {
            return Err(Error::State(format!(
                "scheduler '{}' has other arguments: {}",
                self.name,
                changed.join("; ")
            )));
        }
        self.load_state_dict(state.values())?;
        self.knobs.iter().try_for_each(|knob| knob.load_value(&mut state))?;
        Ok(changed)
    }

    /// The values of all knobs.
    pub(crate) fn values(&self) -> Result<Vec<f64>> {
        self.knobs.iter().map(Knob::get).collect()
    }

    fn is_better(&self, metric: f64) -> bool {
        // As in torch, an infinite metric is not better than none.
        let worst = if self.mode == Mode::Min { f64::INFINITY } else { f64::NEG_INFINITY };
        let best = self.state.best.unwrap_or(worst);
        let threshold = self.threshold;
        match (self.mode, self.threshold_mode) {
            (Mode::Min, ThresholdMode::Rel) => metric < best * (1. - threshold),
            (Mode::Min, ThresholdMode::Abs) => metric < best - threshold,
            (Mode::Max, ThresholdMode::Rel) => metric > best * (threshold + 1.),
            (Mode::Max, ThresholdMode::Abs) => metric > best + threshold,
        }
    }

    /// Takes in one value of the metric, without an engine.
    ///
    /// # Errors
    /// Wrong arguments, or a value that the knob refuses.
    pub fn advance(&mut self, metric: f64) -> Result<()> {
        self.check()?;
        if self.is_better(metric) {
            self.state.best = Some(metric);
            self.state.num_bad_epochs = 0;
        } else {
            self.state.num_bad_epochs += 1;
        }
        if self.state.cooldown_counter > 0 {
            self.state.cooldown_counter -= 1;
            self.state.num_bad_epochs = 0;
        }
        if self.state.num_bad_epochs > self.patience {
            for (index, knob) in self.knobs.iter().enumerate() {
                let min = self.min_values.get(index).or(self.min_values.first()).copied();
                let old = knob.get()?;
                let new = (old * self.factor).max(min.unwrap_or(0.));
                if old - new > self.eps {
                    knob.set(new)?;
                    let factor = if new == old * self.factor { self.factor } else { new / old };
                    self.reductions[index].set(self.reductions[index].get() * factor);
                }
            }
            self.state.cooldown_counter = self.cooldown;
            self.state.num_bad_epochs = 0;
        }
        self.state.event_index += 1;
        Ok(())
    }

    /// Returns the best metric, the number of bad epochs, the cool-down, the position and the reductions.
    pub fn state_dict(&self) -> Map<String, Value> {
        let reductions = self.reductions.iter().map(Reduction::get).collect();
        match json_floats::to_value(&Progress { reductions, ..self.state.clone() }) {
            Ok(Value::Object(state)) => state,
            _ => Map::new(),
        }
    }

    /// Goes to a saved position.
    ///
    /// # Errors
    /// A missing or unknown key, or reductions of another number of groups.
    pub fn load_state_dict(&mut self, state: &Map<String, Value>) -> Result<()> {
        let state = Value::Object(state.clone());
        let mut state: Progress = json_floats::from_value(&state).map_err(|error| {
            Error::State(format!("state of scheduler '{}': {error}", self.name))
        })?;
        if state.reductions.is_empty() {
            state.reductions.resize(self.reductions.len(), 1.);
        }
        let fits = state.reductions.iter().all(|factor| *factor > 0. && *factor <= 1.);
        if !fits || state.reductions.len() != self.reductions.len() {
            return Err(Error::State(format!(
                "scheduler '{}' reduces {} values by factors above 0 and up to 1, but the state has {:?}",
                self.name,
                self.reductions.len(),
                state.reductions
            )));
        }
        for (reduction, factor) in self.reductions.iter().zip(&state.reductions) {
            reduction.set(*factor);
        }
        self.state = state;
        Ok(())
    }
}

impl<C, B, O> Handler<C, B, O> for ReduceLROnPlateauScheduler {
    fn spec(&self) -> Result<HandlerSpec> {
        self.check()?;
        let spec = HandlerSpec::new(&*self.name, self.events.clone());
        Ok(spec.unique_names(unique_names(&self.name, self.save_history)))
    }

    fn save_state(&self) -> Result<Option<StateDict>> {
        let mut state = StateDict::from(self.state_dict());
        state.set_value("arguments", self.saved_arguments())?;
        // A knob that belongs to no optimizer is the only knob, so its value has no clash of names in the state.
        self.knobs.iter().try_for_each(|knob| knob.save_value(&mut state))?;
        Ok(Some(state))
    }

    fn load_state(&mut self, state: StateDict) -> Result<()> {
        self.load(state, true).map(drop)
    }

    fn load_state_partially(&mut self, state: StateDict) -> Result<Vec<String>> {
        self.load(state, false)
    }

    fn param(&self, name: &str) -> Option<Result<f64>> {
        // Only the next value of the metric decides what is set next, so this is the value that holds until then.
        Some(self.knobs.first().filter(|_| name == self.name)?.get())
    }

    fn call(
        &mut self,
        _event: Event,
        _cx: &mut C,
        engine: &mut Engine<'_, C, B, O>,
    ) -> anyhow::Result<()> {
        self.advance(engine.state.metrics.get(&self.metric)?)?;
        if self.save_history {
            engine.state.record_param(&self.name, self.values()?);
        }
        Ok(())
    }
}
