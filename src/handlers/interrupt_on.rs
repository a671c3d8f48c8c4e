use std::fmt;
use std::time::{Duration, Instant};

use super::signals::{self, Signals};
use crate::engine::{Engine, Handler, HandlerSpec};
use crate::error::Result;
use crate::event::Event;

/// Suspends the run in good order when the process is asked to end, or after a time: the step is finished,
/// [`Checkpoint`](crate::checkpoint::Checkpoint) writes a checkpoint that can be resumed, and `run` returns
/// [`Stop::Signal`](crate::engine::Stop::Signal) or [`Stop::Interrupted`](crate::engine::Stop::Interrupted). A second
/// signal ends the process at once.
///
/// ```
/// use std::time::Duration;
/// use tch_ignite::engine::{Engine, Stop, Until};
/// use tch_ignite::handlers::InterruptOn;
///
/// let mut trainer = Engine::new(|_: &mut (), _, batch: u32| Ok(batch));
/// trainer.attach(InterruptOn::signals()?.after(Duration::from_secs(3600)));
/// let summary = trainer.run(&mut (), vec![1, 2, 3], Until::epochs(1))?;
/// if let Stop::Signal(number) = summary.stop {
///     std::process::exit(128 + number);
/// }
/// # Ok::<(), tch_ignite::Error>(())
/// ```
///
/// Any number of engines may have this handler: one after the other, nested, or in several threads. A signal stops all
/// engines that run, and the next run listens again. While no such handler exists, a signal ends the process at once.
///
/// An evaluation by [`Evaluate`](super::Evaluate) is stopped at its next batch. The trainer's checkpoint then holds the
/// state before the evaluation, and the resumed run repeats the evaluation from its start.
///
/// When `run` returns, the loggers that handlers write to are flushed, so `std::process::exit` loses nothing.
///
/// Costs two atomic loads an iteration, and a reading of the clock where there is a time limit.
#[doc(alias = "SIGTERM")]
#[doc(alias = "preemption")]
#[must_use = "a handler is called only once it is attached: `Engine::attach`"]
pub struct InterruptOn {
    signals: Option<Listener>,
    after: Option<Duration>,
    deadline: Option<Instant>,
}

struct Listener {
    signals: &'static Signals,
    /// Number of signals that were noticed before this listener began, or that stopped its engine.
    since: u64,
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.signals.listen_no_more();
    }
}

impl InterruptOn {
    /// Listens to SIGTERM and SIGINT, from now on and until this handler is dropped.
    ///
    /// # Errors
    /// The system refuses to register the signal handlers.
    pub fn signals() -> Result<Self> {
        let signals = Signals::registered()?;
        signals.listen();
        let since = signals.noticed();
        Ok(Self { signals: Some(Listener { signals, since }), after: None, deadline: None })
    }

    /// Suspends the run after this time of a call of `run`, and listens to no signal.
    pub fn time(after: Duration) -> Self {
        Self { signals: None, after: Some(after), deadline: None }
    }

    /// Also suspends the run after this time of a call of `run`.
    pub fn after(mut self, time: Duration) -> Self {
        self.after = Some(time);
        self
    }
}

impl<C, B, O> Handler<C, B, O> for InterruptOn {
    fn spec(&self) -> Result<HandlerSpec> {
        let ends = Event::Interrupt | Event::Completed | Event::ExceptionRaised;
        let events = Event::Started | Event::IterationCompleted | Event::EpochCompleted | ends;
        Ok(HandlerSpec::new("interrupt", events))
    }

    fn call(
        &mut self,
        event: Event,
        _cx: &mut C,
        engine: &mut Engine<'_, C, B, O>,
    ) -> anyhow::Result<()> {
        if matches!(event, Event::Interrupt | Event::Completed | Event::ExceptionRaised) {
            self.deadline = None;
            return Ok(());
        }
        if let Some(listener) = &mut self.signals {
            if let Some(signal) = listener.signals.take(&mut listener.since) {
                signals::obey(engine, signal);
                return Ok(());
            }
            signals::rearm(engine);
        }
        if let Some(after) = self.after {
            let now = Instant::now();
            // A suspended run that goes on fires no STARTED.
            if event == Event::Started || self.deadline.is_none() {
                self.deadline = now.checked_add(after);
            } else if self.deadline.is_some_and(|deadline| now >= deadline) {
                engine.interrupt();
            }
        }
        Ok(())
    }
}

impl fmt::Debug for InterruptOn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("InterruptOn")
            .field("signals", &self.signals.is_some())
            .field("after", &self.after)
            .finish()
    }
}
