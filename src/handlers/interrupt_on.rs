use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::{SigId, flag, low_level};

use crate::engine::{Engine, Event, Events, Handler};
use crate::{Error, Result};

/// Suspends the run in good order when the process is asked to end, or after a time: the step is
/// finished, [`Checkpoint`](crate::checkpoint::Checkpoint) writes what can be resumed, and `run`
/// returns [`Stop::Signal`](crate::engine::Stop::Signal) or
/// [`Stop::Interrupted`](crate::engine::Stop::Interrupted). A second signal ends the process at once.
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
/// Costs a load of an atomic an iteration, and a look at the clock where there is a time.
pub struct InterruptOn {
    /// The number of the signal that came, or 0.
    signal: Arc<AtomicUsize>,
    /// One came, or nobody listens any more: the next ends the process.
    came: Arc<AtomicBool>,
    registered: Vec<SigId>,
    after: Option<Duration>,
    deadline: Option<Instant>,
}

impl InterruptOn {
    /// On SIGTERM and SIGINT, from now on and until this is dropped.
    ///
    /// # Errors
    /// The system refuses to register them.
    pub fn signals() -> Result<Self> {
        let mut this = Self::new();
        for signal in [SIGTERM, SIGINT] {
            // In this order: the first signal sets the flag, the second finds it set and ends the process.
            // What ends it stays registered, because the system's own way is gone for good.
            let registered = flag::register_conditional_default(signal, this.came.clone())
                .and_then(|_| flag::register(signal, this.came.clone()))
                .and_then(|id| {
                    let number = this.signal.clone();
                    Ok([id, flag::register_usize(signal, number, signal as usize)?])
                })
                .map_err(|error| Error::invalid(format!("cannot listen to signals: {error}")))?;
            this.registered.extend(registered);
        }
        Ok(this)
    }

    /// After this time of a call of `run`, and on no signal.
    pub fn time(after: Duration) -> Self {
        Self::new().after(after)
    }

    /// Also after this time of a call of `run`.
    pub fn after(mut self, time: Duration) -> Self {
        self.after = Some(time);
        self
    }

    fn new() -> Self {
        let (signal, came) = (Arc::default(), Arc::default());
        Self { signal, came, registered: vec![], after: None, deadline: None }
    }
}

impl Drop for InterruptOn {
    fn drop(&mut self) {
        self.came.store(true, Ordering::Relaxed);
        for id in self.registered.drain(..) {
            low_level::unregister(id);
        }
    }
}

impl<C, B, O> Handler<C, B, O> for InterruptOn {
    fn name(&self) -> String {
        "interrupt".into()
    }

    fn events(&self) -> Events {
        let ends = Event::Interrupt | Event::Completed | Event::ExceptionRaised;
        Event::Started | Event::IterationCompleted | Event::EpochCompleted | ends
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
        let signal = self.signal.swap(0, Ordering::Relaxed);
        if signal != 0 {
            engine.interrupt_for_signal(signal as i32);
        } else if let Some(after) = self.after {
            let now = Instant::now();
            // A run that goes on has no STARTED.
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
            .field("signals", &!self.registered.is_empty())
            .field("after", &self.after)
            .finish()
    }
}
