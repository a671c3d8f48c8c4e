use tracing::span::EnteredSpan;
use tracing::{Level, debug_span, error, info, info_span};

use crate::engine::{Engine, Handler, HandlerSpec};
use crate::error::Result;
use crate::event::Event;

/// Reports the progress of the run to subscribers of the `tracing` crate.
///
/// The spans are `run` (with the engine's name) and within it `epoch`, both at level INFO, and within that `iteration`
/// at DEBUG, so events that steps and handlers emit appear in them. The handler emits an event at the end of an epoch
/// with its time and metrics, at the end of the run, and for an error. Attach it first: spans begin and end where the
/// handler is called.
///
/// Without a subscriber, an iteration costs three comparisons. If a subscriber listens at INFO, metrics are read once
/// an epoch: a host sync for those on a GPU.
///
/// ```
/// use tch_ignite::engine::{Engine, Until};
/// use tch_ignite::handlers::Tracing;
/// let mut trainer = Engine::new(|_: &mut (), _, _: ()| Ok(()));
/// trainer.attach(Tracing::new("trainer"));
/// trainer.run(&mut (), vec![(); 3], Until::epochs(1))?;
/// # Ok::<(), tch_ignite::Error>(())
/// ```
#[derive(Debug)]
#[must_use = "a handler is called only once it is attached: `Engine::attach`"]
pub struct Tracing {
    name: String,
    /// The entered spans, from the outermost: run, epoch, iteration.
    spans: Vec<EnteredSpan>,
}

impl Tracing {
    /// Reports under this name of the engine.
    pub fn new(name: impl Into<String>) -> Self {
        Self { name: name.into(), spans: vec![] }
    }

    /// Leaves the innermost spans until this many are left.
    fn leave(&mut self, depth: usize) {
        while self.spans.len() > depth {
            self.spans.pop();
        }
    }

    /// Enters the spans that are not entered yet: a run that goes on may begin in mid epoch.
    fn enter<C, B, O>(&mut self, depth: usize, engine: &Engine<'_, C, B, O>) {
        let state = &engine.state;
        while self.spans.len() < depth {
            let span = match self.spans.len() {
                0 => info_span!("run", engine = self.name),
                1 => info_span!("epoch", epoch = state.epoch),
                _ => debug_span!("iteration", iteration = state.iteration),
            };
            self.spans.push(span.entered());
        }
    }
}

impl Drop for Tracing {
    fn drop(&mut self) {
        self.leave(0);
    }
}

fn metrics<C, B, O>(engine: &Engine<'_, C, B, O>) -> String {
    let metrics = engine.state.metrics.iter();
    let texts = metrics.filter_map(|(name, value)| Some(format!("{name}={}", value.read().ok()?)));
    texts.collect::<Vec<_>>().join(" ")
}

impl<C, B, O> Handler<C, B, O> for Tracing {
    fn spec(&self) -> Result<HandlerSpec> {
        use Event::*;
        let ends = Terminate | Completed | ExceptionRaised | Interrupt;
        let events =
            Started | EpochStarted | IterationStarted | IterationCompleted | EpochCompleted | ends;
        Ok(HandlerSpec::new(format!("tracing of {}", self.name), events).runs_in_trials(false))
    }

    fn call(
        &mut self,
        event: Event,
        _cx: &mut C,
        engine: &mut Engine<'_, C, B, O>,
    ) -> anyhow::Result<()> {
        let (epoch, iteration) = (engine.state.epoch, engine.state.iteration);
        match event {
            Event::Started => {
                self.leave(0);
                self.enter(1, engine);
            }
            Event::EpochStarted => {
                self.leave(1);
                self.enter(2, engine);
            }
            Event::IterationStarted => {
                self.leave(2);
                self.enter(3, engine);
            }
            Event::IterationCompleted => self.leave(2),
            Event::EpochCompleted => {
                self.leave(2);
                if tracing::enabled!(Level::INFO) {
                    let seconds = engine.state.epoch_time.as_secs_f64();
                    info!(epoch, iteration, seconds, metrics = metrics(engine), "epoch completed");
                }
            }
            Event::ExceptionRaised => {
                if let Some(exception) = engine.exception() {
                    error!(
                        epoch,
                        iteration,
                        error = exception as &dyn std::error::Error,
                        "run failed"
                    );
                }
                self.leave(0);
            }
            Event::Terminate => info!(epoch, iteration, "run terminated"),
            Event::Interrupt => {
                info!(epoch, iteration, "run interrupted");
                self.leave(0);
            }
            _ => {
                info!(epoch, iteration, "run completed");
                self.leave(0);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fmt::Write;
    use std::sync::{Arc, Mutex};

    use tracing::field::{Field, Visit};
    use tracing::span::{Attributes, Id, Record};
    use tracing::{Metadata, Subscriber};

    use super::*;
    use crate::engine::Until;
    use crate::metrics::Mean;

    /// Records the spans and events that it gets.
    #[derive(Clone, Default)]
    struct Listener(Arc<Mutex<(Vec<&'static str>, Vec<String>)>>);

    struct Text(String);

    impl Visit for Text {
        fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
            if field.name() != "seconds" {
                write!(self.0, " {}={value:?}", field.name()).unwrap();
            }
        }
    }

    impl Subscriber for Listener {
        fn enabled(&self, _: &Metadata<'_>) -> bool {
            true
        }
        fn new_span(&self, span: &Attributes<'_>) -> Id {
            let (names, lines) = &mut *self.0.lock().unwrap();
            let mut text = Text(format!("new {}", span.metadata().name()));
            span.record(&mut text);
            lines.push(text.0);
            names.push(span.metadata().name());
            Id::from_u64(names.len() as u64)
        }
        fn record(&self, _: &Id, _: &Record<'_>) {}
        fn record_follows_from(&self, _: &Id, _: &Id) {}
        fn event(&self, event: &tracing::Event<'_>) {
            let mut text = Text(event.metadata().level().to_string());
            event.record(&mut text);
            self.0.lock().unwrap().1.push(text.0);
        }
        fn enter(&self, _: &Id) {}
        fn exit(&self, id: &Id) {
            let (names, lines) = &mut *self.0.lock().unwrap();
            lines.push(format!("exit {}", names[id.into_u64() as usize - 1]));
        }
    }

    #[test]
    fn spans_nest_and_errors_are_told() {
        let listener = Listener::default();
        tracing::subscriber::with_default(listener.clone(), || {
            let mut trainer = Engine::new(|_: &mut (), _, x: f64| {
                anyhow::ensure!(x > 0., "as asked");
                Ok(x)
            });
            trainer.metric("mean", Mean::new()).attach(Tracing::new("t"));
            trainer.run(&mut (), vec![0.5], Until::epochs(1)).unwrap();
            trainer.run(&mut (), vec![-1.], Until::epochs(1)).unwrap_err();
        });
        let lines = listener.0.lock().unwrap().1.join("\n");
        let expected = r#"new run engine="t"
new epoch epoch=1
new iteration iteration=1
exit iteration
INFO message=epoch completed epoch=1 iteration=1 metrics="mean=0.5"
INFO message=run completed epoch=1 iteration=1
exit epoch
exit run
new run engine="t"
new epoch epoch=1
new iteration iteration=1
ERROR message=run failed epoch=1 iteration=1 error=the step of iteration 1 (epoch 1) failed: as asked
exit iteration
exit epoch
exit run"#;
        assert_eq!(lines, expected);
    }
}
