//! Metrics as handlers of an engine, and the joining of metrics in an engine of several processes.

use super::{Engine, Event, Handler, HandlerSpec};
use crate::error::{Error, Result};
use crate::guard::guarded;
use crate::metrics::{Accumulated, Metric, MetricValue, Reduce, Usage, exchange};
use crate::state::StateDict;

/// A handler that updates and computes a metric.
pub(crate) struct MetricHandler<M> {
    name: String,
    metric: M,
    usage: Usage,
    /// `update_before` already consumed the output of the event about to be fired; `call` must not again.
    updated: bool,
    /// The joined state of all ranks, which a checkpoint saves instead of this rank's; set while a checkpoint is made.
    of_all: Option<Vec<Accumulated>>,
}

impl<M> MetricHandler<M> {
    pub(crate) fn new(name: String, metric: M, usage: Usage) -> Self {
        Self { name, metric, usage, updated: false, of_all: None }
    }
}

/// A metric as an engine of several processes joins it, before the handlers of an event are called.
pub(crate) trait RankMetric<O> {
    /// The name of the metric's value.
    fn name(&self) -> &str;

    /// Whether the metric gets a value at this event. Every metric gets one at the end of an epoch.
    fn is_due(&self, event: Event) -> bool;

    /// Updates the metric with the output, if it is updated and computed at this same event.
    fn update_before(&mut self, event: Event, output: Option<&O>) -> anyhow::Result<()>;

    /// Forgets that [`update_before`](Self::update_before) consumed an output, because the event is not fired.
    fn discard_pending_update(&mut self);

    /// The state that the metric has accumulated on this rank.
    fn parts(&self) -> anyhow::Result<Vec<Accumulated>>;

    /// Computes the value from the joined state of all ranks, and puts back `own`, this rank's state. Returns `None`
    /// where nothing is accumulated and the event is not one at which the metric is computed.
    fn value_of(
        &mut self,
        event: Event,
        joined: &[Accumulated],
        own: &[Accumulated],
    ) -> anyhow::Result<Option<MetricValue>>;

    /// Sets the state that a checkpoint saves instead of this rank's; `None` goes back to this rank's.
    fn save_as(&mut self, of_all: Option<Vec<Accumulated>>);

    /// Clears the parts of the state that would be counted twice, on a rank other than the main one, after the joined
    /// state was loaded on all ranks. Averages stay, because they are equal on all ranks.
    fn clear_shared_parts(&mut self) -> anyhow::Result<()>;
}

impl<O, M: Metric<O>> RankMetric<O> for MetricHandler<M> {
    fn name(&self) -> &str {
        &self.name
    }

    fn is_due(&self, event: Event) -> bool {
        event == Event::EpochCompleted || self.usage.events().2 == event
    }

    fn update_before(&mut self, event: Event, output: Option<&O>) -> anyhow::Result<()> {
        let (_, update, compute) = self.usage.events();
        if let Some(output) = output
            && event == update
            && update == compute
        {
            let _guard = tch::no_grad_guard();
            self.metric.update(output)?;
            self.updated = true;
        }
        Ok(())
    }

    fn discard_pending_update(&mut self) {
        self.updated = false;
    }

    fn parts(&self) -> anyhow::Result<Vec<Accumulated>> {
        self.metric.state()
    }

    fn value_of(
        &mut self,
        event: Event,
        joined: &[Accumulated],
        own: &[Accumulated],
    ) -> anyhow::Result<Option<MetricValue>> {
        if joined.is_empty() {
            let is_due = self.usage.events().2 == event;
            return is_due.then(|| self.metric.compute()).transpose();
        }
        let value = guarded(|| {
            self.metric.load_state(joined)?;
            self.metric.compute()
        });
        let back = guarded(|| self.metric.load_state(own));
        if back.is_err() {
            // Keeping the joined state would count the samples of the other ranks twice.
            self.metric.reset();
        }
        let value = value?;
        back.map_err(|error| error.context("its own state could not be put back, and was reset"))?;
        Ok(Some(value))
    }

    fn save_as(&mut self, of_all: Option<Vec<Accumulated>>) {
        self.of_all = of_all;
    }

    fn clear_shared_parts(&mut self) -> anyhow::Result<()> {
        let rest = self.metric.state().and_then(|state| exchange::nothing_of(&state));
        let left = rest.and_then(|rest| self.metric.load_state(&rest));
        if left.is_err() {
            self.metric.reset();
        }
        left
    }
}

impl<C, B, O, M: Metric<O>> Handler<C, B, O> for MetricHandler<M> {
    fn spec(&self) -> Result<HandlerSpec> {
        self.metric.validate().map_err(|error| match error {
            Error::InvalidArgument(text) => {
                Error::invalid(format!("metric '{}': {text}", self.name))
            }
            other => other,
        })?;
        let (reset, update, compute) = self.usage.events();
        let events = match &self.usage {
            Usage::BatchFiltered(filtered) if filtered.event() != Event::IterationCompleted => {
                return Err(Error::invalid(format!(
                    "Usage::BatchFiltered filters ITERATION_COMPLETED, not {}",
                    filtered.event()
                )));
            }
            Usage::BatchFiltered(filtered) => reset | filtered.clone() | compute,
            // Metrics within a running average may have to see every iteration.
            Usage::RunningEpochWise => reset | Event::IterationCompleted | update,
            _ if update == compute => reset | update,
            _ => reset | update | compute,
        };
        let spec = HandlerSpec::new(format!("metric {}", self.name), events);
        // A checkpoint has the joined state of all ranks, and each rank's part of it is not known any more.
        Ok(spec.differs_by_rank(false).unique_names([format!("metric '{}'", self.name)]))
    }

    fn save_state(&self) -> Result<Option<StateDict>> {
        let own;
        let parts = match &self.of_all {
            Some(of_all) => of_all,
            None => {
                own = self.metric.state().map_err(|error| Error::State(format!("{error:#}")))?;
                &own
            }
        };
        let mut state = StateDict::new();
        for part in parts {
            state.set_tensor(&part.name, part.value.shallow_clone());
        }
        Ok(Some(state))
    }

    fn load_state(&mut self, state: StateDict) -> Result<()> {
        // How processes join the parts does not matter for loading.
        let part = |(name, value)| Accumulated::new(name, value, Reduce::Sum);
        let parts: Vec<_> = state.tensors.into_iter().map(part).collect();
        self.metric.reset();
        self.metric.load_state(&parts).map_err(|error| Error::State(format!("{error:#}")))
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
        let updated = event == update && std::mem::take(&mut self.updated);
        if !updated && let Some(output) = &engine.state.output {
            let _guard = tch::no_grad_guard();
            if event == update {
                self.metric.update(output)?;
            } else if event == Event::IterationCompleted {
                self.metric.observe(output)?;
            }
        }
        // In a group of processes the engine has joined and computed the metric.
        if event == compute && !engine.joins_metrics() {
            let value = self.metric.compute()?;
            engine.state.metrics.set(&self.name, value);
        }
        Ok(())
    }
}
