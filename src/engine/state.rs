use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::{Map, Value};
use tch::{Device, Kind, Tensor};

use super::Event;
use super::event::Count;
use crate::{Error, Result};

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

/// What a metric computes.
#[derive(Debug)]
pub enum MetricValue {
    /// A number.
    Number(f64),
    /// A tensor of any shape and numeric type, on any device, that nobody has read yet.
    Tensor(Tensor),
    /// Several values, each with its name, in order.
    Named(Vec<(String, MetricValue)>),
}

impl From<f64> for MetricValue {
    fn from(value: f64) -> Self {
        Self::Number(value)
    }
}

impl From<Tensor> for MetricValue {
    fn from(value: Tensor) -> Self {
        Self::Tensor(value)
    }
}

impl MetricValue {
    /// The same value; a tensor is shared, not copied.
    pub fn share(&self) -> Self {
        match self {
            Self::Number(value) => Self::Number(*value),
            Self::Tensor(tensor) => Self::Tensor(tensor.shallow_clone()),
            Self::Named(parts) => {
                Self::Named(parts.iter().map(|(name, part)| (name.clone(), part.share())).collect())
            }
        }
    }

    /// The value as a number. Waits for the device where it is a tensor: a host sync on CUDA.
    ///
    /// # Errors
    /// A tensor that has not exactly one element, or several values.
    pub fn read(&self) -> Result<f64> {
        match self {
            Self::Number(value) => Ok(*value),
            Self::Tensor(tensor) if tensor.numel() == 1 => tensor
                .f_reshape([1i64])
                .and_then(|tensor| tensor.f_double_value(&[0]))
                .map_err(|error| Error::libtorch("reading a metric's value", error)),
            Self::Tensor(tensor) => Err(Error::invalid(format!(
                "the value has shape {:?} and is no single number: ask for its tensor, or attach its mean or one element",
                tensor.size()
            ))),
            Self::Named(_) => Err(self.not_one()),
        }
    }

    /// The value as a tensor, on the device where it is; a number as a tensor without dimensions, in
    /// f64 on the CPU. No host sync.
    ///
    /// # Errors
    /// Several values.
    pub fn tensor(&self) -> Result<Tensor> {
        match self {
            Self::Number(value) => Ok(Tensor::from(*value)),
            Self::Tensor(tensor) => Ok(tensor.shallow_clone()),
            Self::Named(_) => Err(self.not_one()),
        }
    }

    /// All numbers, each with its name, as loggers show them: a number under `name`, the elements of
    /// a tensor under `name/0`, `name/1` or `name/0/1`, named values under `name/part`. One host sync
    /// for each tensor.
    ///
    /// ```
    /// use tch::Tensor;
    /// use tch_ignite::engine::MetricValue;
    /// let recall = MetricValue::from(Tensor::from_slice(&[0.5, 1.0]));
    /// let numbers = [("val/recall/0".to_owned(), 0.5), ("val/recall/1".to_owned(), 1.0)];
    /// assert_eq!(recall.flatten("val/recall")?, numbers);
    /// # Ok::<(), tch_ignite::Error>(())
    /// ```
    pub fn flatten(&self, name: &str) -> Result<Vec<(String, f64)>> {
        match self {
            Self::Number(value) => Ok(vec![(name.to_owned(), *value)]),
            Self::Tensor(tensor) => {
                let numbers = numbers(tensor)
                    .map_err(|error| Error::libtorch("reading a metric's value", error))?;
                let shape = tensor.size();
                let named = |(i, number)| (format!("{name}{}", place(i, &shape)), number);
                Ok(numbers.into_iter().enumerate().map(named).collect())
            }
            Self::Named(parts) => {
                let parts =
                    parts.iter().map(|(part, value)| value.flatten(&format!("{name}/{part}")));
                Ok(parts.collect::<Result<Vec<_>>>()?.concat())
            }
        }
    }

    fn not_one(&self) -> Error {
        Error::invalid(match self {
            Self::Named(parts) => format!(
                "there are several values: {}",
                parts.iter().map(|(name, _)| format!("'{name}'")).collect::<Vec<_>>().join(", ")
            ),
            _ => "the value is no single number".into(),
        })
    }
}

/// The elements, in f64, in order of memory of a contiguous tensor.
fn numbers(tensor: &Tensor) -> std::result::Result<Vec<f64>, tch::TchError> {
    let tensor = tensor.f_detach()?.f_to_device(Device::Cpu)?.f_to_kind(Kind::Double)?;
    let mut numbers = vec![0.; tensor.numel()];
    tensor.f_contiguous()?.f_copy_data(&mut numbers, tensor.numel())?;
    Ok(numbers)
}

/// The indices of element `i`, each after a slash.
fn place(i: usize, shape: &[i64]) -> String {
    let mut rest = i as i64;
    let mut indices: Vec<_> = shape
        .iter()
        .rev()
        .map(|size| {
            let index = rest % size;
            rest /= size;
            format!("/{index}")
        })
        .collect();
    indices.reverse();
    indices.concat()
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
