use super::{Logger, attend, each_epoch, spec_of, step_at, tagged};
use crate::engine::{Engine, Handler, HandlerSpec, State};
use crate::error::Result;
use crate::event::Event;
use crate::event_filter::Events;
use crate::handlers::awaited::Awaited;
use crate::metrics::MetricValue;
use crate::optim::Knob;

/// Logs metrics, parts of the output and knobs, as `tag/name`: ignite's `OutputHandler`.
///
/// The handler acts after the other handlers of its events ([`Priority::Last`](crate::engine::Priority::Last)), so it
/// logs what they leave, wherever it is attached. Metrics without a value are left out; for one that never had a value
/// there is a warning in the run's [`Summary`](crate::engine::Summary). Reading a metric is a host sync where it is on a
/// GPU, so log only every so many iterations there.
///
/// ```
/// use tch_ignite::engine::{Engine, Event, Until};
/// use tch_ignite::loggers::{CsvLogger, OutputHandler};
/// use tch_ignite::metrics::Mean;
/// # let folder = std::env::temp_dir().join(format!("tch-ignite-output-{}", std::process::id()));
/// let csv = CsvLogger::open(folder.join("log.csv"))?;
/// let mut trainer = Engine::new(|_: &mut (), _, loss: f64| Ok(loss));
/// trainer
///     .metric("mean loss", Mean::new())
///     .attach(OutputHandler::new(&csv, "training", Event::IterationCompleted.every(100)).output("loss", |loss: &f64| *loss))
///     .attach(OutputHandler::new(&csv, "epoch", Event::EpochCompleted).metric("mean loss"));
/// trainer.run(&mut (), vec![0.5; 200], Until::epochs(2))?;
/// # drop((trainer, csv));
/// # assert_eq!(std::fs::read_to_string(folder.join("log.csv"))?.lines().count(), 1 + 4 + 2);
/// # std::fs::remove_dir_all(folder)?;
/// # Ok::<(), anyhow::Error>(())
/// ```
///
/// The step is the epoch at epoch events, and the iteration at all others. To compare a metric of epochs with one of
/// iterations in one plot, log it with `.global_step(|state| state.iteration)`.
#[must_use = "a handler is called only once it is attached: `Engine::attach`"]
pub struct OutputHandler<B, O> {
    logger: Box<dyn Logger>,
    tag: String,
    metrics: Which,
    outputs: Vec<(String, Output<O>)>,
    knobs: Vec<(String, Knob)>,
    global_step: Option<GlobalStep<B, O>>,
    events: Events,
}

crate::debug::opaque_debug!(OutputHandler<B, O>);

type Output<O> = Box<dyn Fn(&O) -> MetricValue>;
type GlobalStep<B, O> = Box<dyn Fn(&State<B, O>) -> u64>;

enum Which {
    All,
    Named(Awaited),
}

impl<B, O> OutputHandler<B, O> {
    /// A handler that logs nothing yet, under this tag, at these events. With an empty tag names stand alone.
    pub fn new<L: Logger + Clone + 'static>(
        logger: &L,
        tag: impl Into<String>,
        events: impl Into<Events>,
    ) -> Self {
        Self {
            logger: Box::new(logger.clone()),
            tag: tag.into(),
            metrics: Which::Named(Awaited::default()),
            outputs: vec![],
            knobs: vec![],
            global_step: None,
            events: events.into(),
        }
    }

    /// A handler that logs at the end of each epoch.
    pub fn each_epoch<L: Logger + Clone + 'static>(logger: &L, tag: impl Into<String>) -> Self {
        Self::new(logger, tag, each_epoch())
    }

    /// Logs this metric, once it has a value.
    pub fn metric(mut self, name: impl Into<String>) -> Self {
        match &mut self.metrics {
            Which::All => {}
            Which::Named(names) => names.push(name.into()),
        }
        self
    }

    /// Logs every metric that has a value, by name.
    pub fn all_metrics(mut self) -> Self {
        self.metrics = Which::All;
        self
    }

    /// Logs a value of the output under this name. A tensor with several elements gives `name/0`, `name/1`, and so on.
    pub fn output<V: Into<MetricValue>>(
        mut self,
        name: impl Into<String>,
        value: impl Fn(&O) -> V + 'static,
    ) -> Self {
        self.outputs.push((name.into(), Box::new(move |output| value(output).into())));
        self
    }

    /// Logs the knob's value under this name.
    pub fn knob(mut self, name: impl Into<String>, knob: Knob) -> Self {
        self.knobs.push((name.into(), knob));
        self
    }

    /// Logs under the step that `step` returns, such as that of another engine.
    pub fn global_step(mut self, step: impl Fn(&State<B, O>) -> u64 + 'static) -> Self {
        self.global_step = Some(Box::new(step));
        self
    }

    fn log(&self, name: &str, value: &MetricValue, step: u64) -> anyhow::Result<()> {
        for (tag, number) in value.flatten(&tagged(&self.tag, name))? {
            self.logger.scalar(&tag, number, step)?;
        }
        Ok(())
    }

    fn log_all(&self, event: Event, state: &State<B, O>) -> anyhow::Result<()> {
        let step = match &self.global_step {
            Some(step) => step(state),
            None => step_at(event, state),
        };
        match &self.metrics {
            Which::All => {
                state.metrics.iter().try_for_each(|(name, value)| self.log(name, value, step))?;
            }
            Which::Named(names) => names
                .values(&state.metrics)
                .try_for_each(|(name, value)| self.log(name, value, step))?,
        }
        if let Some(output) = &state.output {
            for (name, value) in &self.outputs {
                self.log(name, &value(output), step)?;
            }
        }
        for (name, knob) in &self.knobs {
            self.log(name, &knob.get()?.into(), step)?;
        }
        Ok(())
    }

    fn title(&self) -> String {
        format!("logger of {}", if self.tag.is_empty() { "outputs" } else { &self.tag })
    }
}

impl<C, B, O> Handler<C, B, O> for OutputHandler<B, O> {
    fn spec(&self) -> Result<HandlerSpec> {
        Ok(spec_of(&*self.logger, self.title(), &self.events))
    }

    fn call(
        &mut self,
        event: Event,
        _cx: &mut C,
        engine: &mut Engine<'_, C, B, O>,
    ) -> anyhow::Result<()> {
        attend(&*self.logger, &self.events, event, engine, |engine| {
            self.log_all(event, &engine.state)
        })?;
        if let Which::Named(names) = &self.metrics {
            names.warn_at_end(&self.title(), event, engine);
        }
        Ok(())
    }
}
