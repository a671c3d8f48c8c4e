use std::cell::Cell;
use std::rc::Rc;

use super::signals;
use crate::data::IntoSource;
use crate::engine::{Engine, Handler, HandlerSpec, Stop, Summary, Until, keep_random_state};
use crate::error::Result;
use crate::event::Event;
use crate::event_filter::Events;
use crate::state::StateDict;

/// Runs an evaluator at events of the trainer, and stores its metrics in the trainer's state under `"<name>/<metric>"`.
///
/// The handler owns the evaluator. Trainer and evaluator work on the same context. Warnings of the evaluator's run are
/// added to the trainer's.
///
/// During the evaluation, parameters of a Schedule-Free optimizer that the trainer tracks have their values for evaluation:
/// see [`Optimizer::eval`](crate::optim::Optimizer::eval).
///
/// Where [`InterruptOn`](super::InterruptOn) listens to signals, a signal during an evaluation stops the evaluation at
/// its next batch, and the trainer with it. When the run goes on, the evaluation is repeated from its start with the
/// same random numbers, and then the handlers after it are called. In a group of processes, and at events that are
/// fired within a step, the evaluation runs to its end first.
///
/// ```
/// use tch_ignite::engine::{Engine, Until};
/// use tch_ignite::handlers::Evaluate;
/// use tch_ignite::metrics::Mean;
///
/// let mut evaluator = Engine::new(|bias: &mut f64, _, x: f64| Ok(x + *bias));
/// evaluator.metric("mean", Mean::new());
/// let mut trainer = Engine::new(|bias: &mut f64, _, x: f64| { *bias += x; Ok(()) });
/// trainer.attach(Evaluate::each_epoch("val", evaluator, vec![1.0, 3.0]));
/// trainer.run(&mut 0.0, vec![10.0], Until::epochs(2))?;
/// assert_eq!(trainer.state.metrics.get("val/mean")?, 22.0);
/// # Ok::<(), tch_ignite::Error>(())
/// ```
#[must_use = "a handler is called only once it is attached: `Engine::attach`"]
pub struct Evaluate<'e, C, B, O, D> {
    name: String,
    events: Events,
    evaluator: Engine<'e, C, B, O>,
    data: D,
    /// Names of the values that the last evaluation stored in the trainer's state.
    left: Vec<String>,
    /// Whether a signal stops the evaluation under way.
    stops: Rc<Cell<bool>>,
    keep_random_state: bool,
}

crate::debug::opaque_debug!(Evaluate<'e, C, B, O, D>);

/// How an evaluation ended.
enum Outcome {
    /// The evaluation ran to its end; a signal may have come meanwhile.
    Ended(Summary, Option<i32>),
    /// A signal stopped the evaluation. The evaluator has its earlier state again.
    Stopped(i32),
}

impl<'e, C, B, O, D: IntoSource<'e, B> + Clone> Evaluate<'e, C, B, O, D> {
    /// Evaluates over one pass of `data` at the end of each epoch of the trainer.
    pub fn each_epoch(name: impl Into<String>, evaluator: Engine<'e, C, B, O>, data: D) -> Self {
        Self::on(Event::EpochCompleted, name, evaluator, data)
    }

    /// Evaluates over one pass of `data` at these events of the trainer.
    pub fn on(
        events: impl Into<Events>,
        name: impl Into<String>,
        mut evaluator: Engine<'e, C, B, O>,
        data: D,
    ) -> Self {
        let stops = Rc::new(Cell::new(false));
        let listens = stops.clone();
        let mut since = 0;
        evaluator.on(Event::IterationCompleted, move |_, evaluator| {
            if listens.get()
                && let Some(signal) = signals::take_signal(&mut since)
            {
                signals::obey(evaluator, signal);
            }
            Ok(())
        });
        let (name, events, left) = (name.into(), events.into(), vec![]);
        Self { name, events, evaluator, data, left, stops, keep_random_state: false }
    }

    /// Whether an evaluation leaves libtorch's random number generators as they were, so that training goes on as it
    /// would without the evaluation: ignite's `keep_random_state`. The default is false. Costs a copy of each
    /// generator's state for each evaluation.
    pub fn keep_random_state(mut self, on: bool) -> Self {
        self.keep_random_state = on;
        self
    }

    /// Evaluates once, from the start. With `may_stop` a signal stops the evaluation.
    fn evaluate(&mut self, cx: &mut C, may_stop: bool) -> Result<Outcome> {
        let listens = may_stop && signals::is_listening();
        // If the evaluator's state cannot be copied, the evaluation runs to its end.
        let mut before = listens.then(|| self.evaluator.moment().ok()).flatten();
        self.stops.set(before.is_some());
        self.evaluator.state.metrics.clear();
        let mut came = None;
        loop {
            let (evaluator, data) = (&mut self.evaluator, self.data.clone());
            let run = || evaluator.run(cx, data, Until::epochs(1));
            let summary = if self.keep_random_state { keep_random_state(run) } else { run() }?;
            let Stop::Signal(signal) = summary.stop else {
                return Ok(Outcome::Ended(summary, came));
            };
            if let Some(before) = before.take() {
                self.evaluator.go_back(before)?;
                return Ok(Outcome::Stopped(signal));
            }
            came = Some(signal);
        }
    }
}

impl<'e, C, B, O, D, TB, TO> Handler<C, TB, TO> for Evaluate<'e, C, B, O, D>
where
    D: IntoSource<'e, B> + Clone,
{
    fn spec(&self) -> Result<HandlerSpec> {
        let spec = HandlerSpec::new(format!("evaluator {}", self.name), self.events.clone());
        let spec = spec.unique_names([format!("evaluation '{}'", self.name)]);
        Ok(spec.logs(self.evaluator.logs()))
    }

    fn save_state(&self) -> Result<Option<StateDict>> {
        let mut state = StateDict::new();
        state.set_part("evaluator", self.evaluator.lasting_state()?);
        state.set_value("left", &self.left)?;
        Ok(Some(state))
    }

    fn load_state(&mut self, mut state: StateDict) -> Result<()> {
        let left = state.value("left")?;
        self.evaluator.load_lasting_state(state.take_part("evaluator")?)?;
        self.left = left;
        Ok(())
    }

    fn call(
        &mut self,
        event: Event,
        cx: &mut C,
        engine: &mut Engine<'_, C, TB, TO>,
    ) -> anyhow::Result<()> {
        let may_stop = engine.may_repeat(event);
        if may_stop && engine.is_stopped_by_signal() {
            // The signal came just before this handler.
            engine.repeat_from_here();
            return Ok(());
        }
        signals::rearm(engine);
        // Each evaluation starts anew, also after a run that was left early, and without values of an earlier run for
        // metrics that this one does not compute.
        self.evaluator.reset()?;
        self.evaluator.follow(engine);
        let outcome = {
            let _weights = engine.evaluation_weights(cx)?;
            self.evaluate(cx, may_stop)
        };
        if let Ok(Outcome::Stopped(signal)) = outcome {
            signals::obey(engine, signal);
            engine.repeat_from_here();
            return Ok(());
        }
        for name in self.left.drain(..) {
            engine.state.metrics.remove(&name);
        }
        if let Outcome::Ended(summary, came) = outcome? {
            for (metric, value) in self.evaluator.state.metrics.iter() {
                let name = format!("{}/{metric}", self.name);
                engine.state.metrics.set(&name, value.share());
                self.left.push(name);
            }
            for warning in summary.warnings {
                engine.warn(format!("evaluator {}: {warning}", self.name));
            }
            if let Some(signal) = came {
                signals::obey(engine, signal);
            }
        }
        Ok(())
    }
}
