use std::collections::BTreeMap;
use std::fmt;
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
    /// Budget in epochs, if the run has one.
    pub max_epochs: Option<u64>,
    /// Budget in iterations, if the run has one.
    pub max_iters: Option<u64>,
    /// The batch, from [`Event::GetBatchCompleted`](super::Event::GetBatchCompleted) until the step
    /// takes it. Handlers may replace it.
    pub batch: Option<B>,
    /// Output of the last step. It is dropped once the batch of the next iteration was fetched, so the last output of a
    /// run stays.
    pub output: Option<O>,
    /// The latest value of each metric.
    pub metrics: Metrics,
    /// Values that schedulers with `save_history` recorded: for each name a list of rows, and in each row a value for
    /// each parameter group.
    pub param_history: BTreeMap<String, Vec<Vec<f64>>>,
    /// Samples fetched in this call of `run`, where the data source counts them. A run that is resumed from a
    /// checkpoint counts on, unless that reached the limit of the call that wrote it.
    pub samples: u64,
    /// Duration of the last epoch of this call of `run`, with its handlers. The time between two calls of `run` does
    /// not count.
    pub epoch_time: Duration,
    /// Duration of this call of `run`. It is set before `TERMINATE`, `COMPLETED`, `INTERRUPT` and `EXCEPTION_RAISED`
    /// are fired, and again when the call returns.
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
    /// The current number of an event that filters count: the iteration, or the epoch; `None` for other events.
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

    /// Appends a row to the history of a parameter: one value for each group.
    pub fn record_param(&mut self, name: &str, values: Vec<f64>) {
        match self.param_history.get_mut(name) {
            Some(history) => history.push(values),
            None => {
                self.param_history.insert(name.to_owned(), vec![values]);
            }
        }
    }

    /// ignite's state dict: `epoch_length`, `iteration`, and `max_iters` or `max_epochs`.
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

    /// Loads ignite's state dict.
    ///
    /// # Errors
    /// Refuses a state without exactly one of `iteration` and `epoch` and one of the two budgets, values that are no
    /// counts, and a budget smaller than the position.
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

/// Refuses a budget of 0, or one smaller than what is done already.
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
                "Argument {name} should be greater than or equal to the start {unit} defined in the state: {} vs {done}. Please, set engine.state.{name} = None before calling engine.run() in order to restart the training from the beginning. Engine::reset does that; to go on, give a larger budget, which counts from the first run on",
                max.unwrap_or(0)
            )));
        }
    }
    Ok(())
}

/// Values of metrics by name. A value on a device is copied to the host when it is read, not before.
///
/// A value with named parts is kept part by part, under `name/part`. `{}` prints all values in one line, by name:
/// `accuracy: 0.9312, loss: 0.2217`; that reads them, so it waits for the device. There is no `metrics["accuracy"]`, which
/// would have to panic where there is no value: [`get`](Self::get) returns the error.
///
/// ```
/// use tch_ignite::engine::Metrics;
/// let mut metrics = Metrics::default();
/// metrics.set("loss", 0.22174);
/// metrics.set("accuracy", 0.5);
/// assert_eq!(metrics.to_string(), "accuracy: 0.5000, loss: 0.2217");
/// ```
#[derive(Debug, Default)]
pub struct Metrics {
    values: BTreeMap<String, MetricValue>,
}

impl Metrics {
    /// Sets a value. A value with named parts is set part by part, under `name/part`.
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

    /// Returns a value as a number. Waits for the device if the value is on one.
    ///
    /// # Errors
    /// Refused where no metric of this name has a value yet (the text lists those that have one), and where the value
    /// is a tensor of several elements: see [`tensor`](Self::tensor).
    pub fn get(&self, name: &str) -> Result<f64> {
        self.known(name)?.read().map_err(|error| match error {
            Error::InvalidArgument(text) => Error::invalid(format!("metric '{name}': {text}")),
            other => other,
        })
    }

    /// Returns a value as a tensor, on the value's device; a number becomes a tensor without dimensions. No host sync.
    ///
    /// # Errors
    /// Refused where no metric of this name has a value yet; the text lists those that have one.
    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        self.known(name)?.tensor()
    }

    fn known(&self, name: &str) -> Result<&MetricValue> {
        self.values.get(name).ok_or_else(|| {
            let names: Vec<_> = self.values.keys().map(|name| format!("'{name}'")).collect();
            let there = match names.is_empty() {
                true => "none has one".into(),
                false => format!("there are: {}", names.join(", ")),
            };
            Error::invalid(format!(
                "no metric '{name}' has a value yet; {there}. A metric has its value after the first epoch, or, with another Usage, after the first iteration; those of Evaluate are under 'evaluation/metric'"
            ))
        })
    }

    /// Returns a value without reading it from its device.
    pub fn value(&self, name: &str) -> Option<&MetricValue> {
        self.values.get(name)
    }

    /// Removes a value. Returns whether there was one.
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

    /// All values, in the order of their names, without reading them from their devices.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &MetricValue)> {
        self.values.iter().map(|(name, value)| (name.as_str(), value))
    }
}

/// The longest vector that `Display` writes element by element.
const ELEMENTS: usize = 10;

/// Writes all values in one line.
impl fmt::Display for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (name, value)) in self.values.iter().enumerate() {
            let separator = if index > 0 { ", " } else { "" };
            write!(f, "{separator}{name}: {}", shown(value))?;
        }
        Ok(())
    }
}

fn shown(value: &MetricValue) -> String {
    let number = |number: f64| match number.abs() {
        0. | 1e-3..1e6 => format!("{number:.4}"),
        size if size.is_finite() => format!("{number:.3e}"),
        _ => number.to_string(),
    };
    match value {
        MetricValue::Tensor(tensor) if tensor.numel() > ELEMENTS || tensor.dim() > 1 => {
            format!("a tensor of shape {:?}", tensor.size())
        }
        MetricValue::Tensor(tensor) if tensor.dim() == 1 => match value.flatten("") {
            Ok(elements) => {
                let elements: Vec<_> = elements.into_iter().map(|(_, n)| number(n)).collect();
                format!("[{}]", elements.join(", "))
            }
            Err(error) => format!("({error})"),
        },
        value => value.read().map_or_else(|error| format!("({error})"), number),
    }
}
