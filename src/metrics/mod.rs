//! Metrics: accumulated where the outputs live, read when somebody asks.

mod accuracy;
mod mean;
mod running_average;

pub use accuracy::Accuracy;
pub use mean::{Loss, Mean};
pub use running_average::RunningAverage;

use tch::{Device, Kind, Tensor};

use crate::engine::{Engine, Event, Events, Handler, MetricValue};

/// Something computed from the outputs of a step. Attach it with
/// [`Engine::metric`](crate::engine::Engine::metric).
pub trait Metric<O> {
    /// Forgets everything.
    fn reset(&mut self);

    /// Takes in the output of one iteration. Called without gradients.
    fn update(&mut self, output: &O) -> anyhow::Result<()>;

    /// The value over all since the last reset; a tensor where reading it would wait for a device.
    fn compute(&self) -> anyhow::Result<MetricValue>;

    /// When the engine resets, updates and computes it, unless told otherwise.
    fn usage(&self) -> Usage {
        Usage::EpochWise
    }
}

/// When a metric is reset, updated and computed: ignite's `MetricUsage`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Usage {
    /// Over the iterations of each epoch, computed at its end.
    EpochWise,
    /// Over all epochs of a run, by the output at the end of each.
    RunningEpochWise,
    /// Of each iteration alone.
    BatchWise,
    /// Over all iterations of a run, computed at each.
    RunningBatchWise,
    /// Over the iterations of each epoch, computed at each.
    SingleEpochRunningBatchWise,
}

impl Usage {
    /// The events to reset, update and compute at.
    fn events(self) -> (Event, Event, Event) {
        use Event::*;
        match self {
            Self::EpochWise => (EpochStarted, IterationCompleted, EpochCompleted),
            Self::RunningEpochWise => (Started, EpochCompleted, EpochCompleted),
            Self::BatchWise => (IterationStarted, IterationCompleted, IterationCompleted),
            Self::RunningBatchWise => (Started, IterationCompleted, IterationCompleted),
            Self::SingleEpochRunningBatchWise => {
                (EpochStarted, IterationCompleted, IterationCompleted)
            }
        }
    }
}

/// A metric as a handler.
pub(crate) struct MetricHandler<M> {
    name: String,
    metric: M,
    usage: Usage,
}

impl<M> MetricHandler<M> {
    pub(crate) fn new(name: String, metric: M, usage: Usage) -> Self {
        Self { name, metric, usage }
    }
}

impl<C, B, O, M: Metric<O>> Handler<C, B, O> for MetricHandler<M> {
    fn name(&self) -> String {
        format!("metric {}", self.name)
    }

    fn events(&self) -> Events {
        let (reset, update, compute) = self.usage.events();
        match update == compute {
            true => reset | update,
            false => reset | update | compute,
        }
    }

    fn call(
        &mut self,
        event: Event,
        _cx: &mut C,
        engine: &mut Engine<'_, C, B, O>,
    ) -> anyhow::Result<()> {
        let (reset, update, compute) = self.usage.events();
        if event == reset {
            self.metric.reset();
        }
        if event == update
            && let Some(output) = &engine.state.output
        {
            let _guard = tch::no_grad_guard();
            self.metric.update(output)?;
        }
        if event == compute {
            let value = self.metric.compute()?;
            engine.state.metrics.set(&self.name, value);
        }
        Ok(())
    }
}

/// Outputs that are a value themselves, for [`Mean::new`] and [`RunningAverage::new`].
pub trait ToValue {
    /// The value; a tensor is shared, not copied.
    fn to_value(&self) -> MetricValue;
}

impl ToValue for Tensor {
    fn to_value(&self) -> MetricValue {
        self.shallow_clone().into()
    }
}

impl ToValue for f64 {
    fn to_value(&self) -> MetricValue {
        (*self).into()
    }
}

/// The accumulator's type: f64, or f32 on devices that have no f64.
fn accumulator_kind(device: Device) -> Kind {
    match device {
        Device::Mps => Kind::Float,
        _ => Kind::Double,
    }
}

/// A detached scalar of the accumulator's type, on the device where the value is.
fn scalar(value: MetricValue) -> anyhow::Result<MetricValue> {
    match value {
        MetricValue::Number(_) => Ok(value),
        MetricValue::Tensor(tensor) => {
            anyhow::ensure!(
                tensor.numel() == 1,
                "a single value is needed, but the tensor has shape {:?}",
                tensor.size()
            );
            let kind = accumulator_kind(tensor.device());
            // Kept apart from the step's tensor, which somebody may change in place.
            Ok(tensor.f_detach()?.f_reshape([0i64; 0])?.f_to_dtype(kind, false, true)?.into())
        }
    }
}
