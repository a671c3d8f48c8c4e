use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::{Map, Value};
use tch::Tensor;

use super::Event;
use crate::error::{Error, Result};
use crate::event::Count;
use crate::metrics::MetricValue;

/// Where a run stands: ignite's `engine.state`. Handlers may read and change all of it.
#[derive(Debug)]
pub struct State<B, O> {
    /// Iterations begun, from 1 while running. Counts over epochs.
    pub iteration: u64,
    /// Epochs begun, from 1 while running.
    pub epoch: u64,
    /// Iterations in an epoch; `None` until it is known.
    pub epoch_length: Option<u64>,
    /// The budget in epochs, if that is what the run has.
    pub max_epochs: Option<u64>,
    /// The budget in iterations, if that is what the run has.
    pub max_iters: Option<u64>,
    /// The batch, from [`Event::GetBatchCompleted`](super::Event::GetBatchCompleted) until the step
    /// takes it. Handlers may replace it.
    pub batch: Option<B>,
    /// What the step returned, until the batch of the next iteration was fetched: where there is none it
    /// stays the last output.
    pub output: Option<O>,
    /// The latest value of each metric.
    pub metrics: Metrics,
    /// What schedulers with `save_history` wrote: for each event, a value for each group.
    pub param_history: BTreeMap<String, Vec<Vec<f64>>>,
    /// Samples fetched in this call of `run`, where the data source counts them. A run that is resumed from a
    /// checkpoint counts on, unless that reached the limit of the call that wrote it.
    pub samples: u64,
    /// How long the last epoch of this call of `run` took, its handlers included; the time between two
    /// calls does not count.
    pub epoch_time: Duration,
    /// How long this call of `run` took, set where it ends: before `TERMINATE`, `COMPLETED`, `INTERRUPT` and
    /// `EXCEPTION_RAISED`, and after them.
    pub run_time: Duration,
}

impl<B, O> Default for State<B, O> {
    fn default() -> Self {
        Self {
            iteration: 0,
            epoch: 0,
            epoch_length: None,
            max_epochs: None,
            max_iters: None,
            batch: None,
            output: None,
            metrics: Metrics::default(),
            param_history: BTreeMap::new(),
            samples: 0,
            epoch_time: Duration::ZERO,
            run_time: Duration::ZERO,
        }
    }
}

impl<B, O> State<B, O> {
    /// How often the event came so far, for those with a number: the iteration, or the epoch.
    ///
    /// ```
    /// use tch_ignite::engine::{Event, State};
    /// let state = State::<(), ()> { iteration: 30, epoch: 2, ..State::default() };
    /// assert_eq!(state.get_event_attrib_value(Event::EpochCompleted), Some(2));
    /// assert_eq!(state.get_event_attrib_value(Event::IterationStarted), Some(30));
    /// assert_eq!(state.get_event_attrib_value(Event::Terminate), None);
    /// ```
    pub fn get_event_attrib_value(&self, event: Event) -> Option<u64> {
        match event.count() {
            Count::Iteration => Some(self.iteration),
            Count::Epoch => Some(self.epoch),
            Count::Firings | Count::None => None,
        }
    }

    /// Appends to the history of a parameter, one value for each group.
    pub fn record_param(&mut self, name: &str, values: Vec<f64>) {
        match self.param_history.get_mut(name) {
            Some(history) => history.push(values),
            None => {
                self.param_history.insert(name.to_owned(), vec![values]);
            }
        }
    }

    pub(super) fn save(&self) -> Map<String, Value> {
        let mut state = Map::new();
        state.insert("epoch_length".into(), self.epoch_length.into());
        state.insert("iteration".into(), self.iteration.into());
        match self.max_iters {
            Some(_) => state.insert("max_iters".into(), self.max_iters.into()),
            None => state.insert("max_epochs".into(), self.max_epochs.into()),
        };
        state
    }

    pub(super) fn load(&mut self, saved: &Map<String, Value>) -> Result<()> {
        let number = |key: &str| -> Result<Option<u64>> {
            match saved.get(key) {
                None | Some(Value::Null) => Ok(None),
                Some(value) => value.as_u64().map(Some).ok_or_else(|| {
                    Error::State(format!(
                        "Argument {key} is invalid. Please, set a correct {key} positive value, not {value}"
                    ))
                }),
            }
        };
        let state = |text: &str| Err(Error::State(text.into()));
        let (epochs, iterations) = (number("epoch")?, number("iteration")?);
        if let (Some(epoch), Some(iteration)) = (epochs, iterations) {
            return state(&format!(
                "State dictionary should contain only one of 'iteration' or 'epoch' keys. Found both: iteration={iteration}, epoch={epoch}."
            ));
        }
        if epochs.is_none() && iterations.is_none() {
            return state("Required state attribute 'iteration' is absent in provided state_dict");
        }
        if saved.contains_key("max_epochs") == saved.contains_key("max_iters") {
            return state(
                "state_dict should contain exactly one of '('max_epochs', 'max_iters')' keys",
            );
        }
        let (max_epochs, max_iters) = (number("max_epochs")?, number("max_iters")?);
        let epoch_length = number("epoch_length")?;
        let (iteration, epoch) = match (iterations, epochs, epoch_length) {
            (Some(0), _, None) => (0, 0),
            (_, _, None | Some(0)) => {
                return state(
                    "epoch_length must be a positive integer to calculate missing 'iteration' or 'epoch' key",
                );
            }
            (Some(iteration), _, Some(length)) => (iteration, iteration / length),
            (None, epoch, Some(length)) => {
                let epoch = epoch.unwrap_or(0);
                (epoch.saturating_mul(length), epoch)
            }
        };
        check_budget(max_epochs, max_iters, epoch, iteration)?;
        self.iteration = iteration;
        self.epoch = epoch;
        self.epoch_length = epoch_length;
        self.max_epochs = max_epochs;
        self.max_iters = max_iters;
        Ok(())
    }
}

/// A budget may not be smaller than what is done already.
pub(super) fn check_budget(
    max_epochs: Option<u64>,
    max_iters: Option<u64>,
    epoch: u64,
    iteration: u64,
) -> Result<()> {
    for (name, unit, max, done) in [
        ("max_epochs", "epoch", max_epochs, epoch),
        ("max_iters", "iteration", max_iters, iteration),
    ] {
        if max == Some(0) {
            return Err(Error::State(format!(
                "Argument {name} is invalid. Please, set a correct {name} positive value"
            )));
        }
        if max.is_some_and(|max| max < done) {
            return Err(Error::State(format!(
                "Argument {name} should be greater than or equal to the start {unit} defined in the state: {} vs {done}. Please, set engine.state.{name} = None before calling engine.run() in order to restart the training from the beginning.",
                max.unwrap_or(0)
            )));
        }
    }
    Ok(())
}

/// Values of metrics by name. Values that live on a device are read when asked for, not before.
///
/// A value with named parts is kept part by part, under `name/part`.
#[derive(Debug, Default)]
pub struct Metrics {
    values: BTreeMap<String, MetricValue>,
}

impl Metrics {
    /// Sets a value; one with named parts part by part, under `name/part`.
    pub fn set(&mut self, name: &str, value: impl Into<MetricValue>) {
        match (value.into(), self.values.get_mut(name)) {
            (MetricValue::Named(parts), _) => {
                for (part, value) in parts {
                    self.set(&format!("{name}/{part}"), value);
                }
            }
            (value, Some(old)) => *old = value,
            (value, None) => {
                self.values.insert(name.to_owned(), value);
            }
        }
    }

    /// The value of that name as a number. Waits for the device where it lives there.
    ///
    /// # Errors
    /// No such metric, or none yet: the text lists those there are. A value that is no single number:
    /// see [`tensor`](Self::tensor).
    pub fn get(&self, name: &str) -> Result<f64> {
        self.known(name)?.read().map_err(|error| match error {
            Error::InvalidArgument(text) => Error::invalid(format!("metric '{name}': {text}")),
            other => other,
        })
    }

    /// The value of that name as a tensor, where it is; a number as a tensor without dimensions. No
    /// host sync.
    ///
    /// # Errors
    /// No such metric, or none yet: the text lists those there are.
    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        self.known(name)?.tensor()
    }

    fn known(&self, name: &str) -> Result<&MetricValue> {
        self.values.get(name).ok_or_else(|| {
            Error::invalid(format!(
                "no metric '{name}' has a value yet; there are: {}",
                self.values.keys().map(|name| format!("'{name}'")).collect::<Vec<_>>().join(", ")
            ))
        })
    }

    /// The value of that name, unread, if there is one.
    pub fn value(&self, name: &str) -> Option<&MetricValue> {
        self.values.get(name)
    }

    /// Removes a value; true if there was one.
    pub fn remove(&mut self, name: &str) -> bool {
        self.values.remove(name).is_some()
    }

    /// Removes all values.
    pub fn clear(&mut self) {
        self.values.clear();
    }

    /// Whether there is a value of that name.
    pub fn contains(&self, name: &str) -> bool {
        self.values.contains_key(name)
    }

    /// All values, by name, unread.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &MetricValue)> {
        self.values.iter().map(|(name, value)| (name.as_str(), value))
    }
}
