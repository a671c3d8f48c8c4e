//! Metrics as handlers of an engine, and what an engine of several processes does with them.

use super::{Engine, Event, Events, Handler};
use crate::error::{Error, Result};
use crate::guard::guarded;
use crate::metrics::{Accumulated, Metric, MetricValue, Reduce, Usage, exchange};
use crate::state::StateDict;

/// A metric as a handler.
pub(crate) struct MetricHandler<M> {
    name: String,
    metric: M,
    usage: Usage,
    /// The output of the event that is about to be fired was taken in already.
    updated: bool,
    /// The state of all ranks, which a checkpoint is to have instead of this rank's.
    of_all: Option<Vec<Accumulated>>,
}

impl<M> MetricHandler<M> {
    pub(crate) fn new(name: String, metric: M, usage: Usage) -> Self {
        Self { name, metric, usage, updated: false, of_all: None }
    }
}

/// What an engine of several processes does with a metric, before the handlers of an event.
pub(crate) trait RankMetric<O> {
    /// The name of the value.
    fn name(&self) -> &str;

    /// Whether it has a value at this event. All have one at the end of an epoch.
    fn is_due(&self, event: Event) -> bool;

    /// Takes in the output, if its time is this event.
    fn update_before(&mut self, event: Event, output: Option<&O>) -> anyhow::Result<()>;

    /// The event at which it took in an output is not fired.
    fn discard_pending_update(&mut self);

    /// What it has accumulated.
    fn parts(&self) -> anyhow::Result<Vec<Accumulated>>;

    /// The value of the state of all ranks, joined; `None` where nothing is accumulated and the event is not one of its
    /// own. Its own state, given here, stays.
    fn value_of(
        &mut self,
        event: Event,
        joined: &[Accumulated],
        own: &[Accumulated],
    ) -> anyhow::Result<Option<MetricValue>>;

    /// What a checkpoint has of it from now on, instead of what it has accumulated.
    fn save_as(&mut self, of_all: Option<Vec<Accumulated>>);

    /// After a state that was that of all processes was loaded, on others than the main one: forgets what would be counted
    /// twice. Averages are the same everywhere.
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
            // With the state of all, the samples of the other ranks would be counted twice.
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
    fn name(&self) -> String {
        format!("metric {}", self.name)
    }

    fn events(&self) -> Events {
        let (reset, update, compute) = self.usage.events();
        match &self.usage {
            Usage::BatchFiltered(filtered) => reset | filtered.clone() | compute,
            // A metric within may have to see every iteration.
            Usage::RunningEpochWise => reset | Event::IterationCompleted | update,
            _ if update == compute => reset | update,
            _ => reset | update | compute,
        }
    }

    fn validate(&self) -> Result<()> {
        if let Usage::BatchFiltered(filtered) = &self.usage
            && filtered.event() != Event::IterationCompleted
        {
            return Err(Error::invalid(format!(
                "Usage::BatchFiltered filters ITERATION_COMPLETED, not {}",
                filtered.event()
            )));
        }
        self.metric.validate()
    }

    fn unique_names(&self) -> Vec<String> {
        vec![format!("metric '{}'", self.name)]
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
        // How processes would join them does not matter here.
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
        // Where there are other processes the engine has joined and computed it.
        if event == compute && !engine.joins_metrics() {
            let value = self.metric.compute()?;
            engine.state.metrics.set(&self.name, value);
        }
        Ok(())
    }
}
