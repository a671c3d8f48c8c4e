//! Signals that ask the process to end, shared by all engines.

use std::cell::Cell;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::{flag, low_level};

use crate::engine::{Engine, is_running_here};
use crate::error::{Error, Result};

/// The signals of this process. The handlers are registered once and never removed, because a system's default action
/// that was replaced cannot be brought back.
pub(super) struct Signals {
    /// Number of a signal that no engine has noticed yet, or 0.
    raised: Arc<AtomicUsize>,
    /// Whether the next signal ends the process, because one came already or nobody listens.
    is_last: Arc<AtomicBool>,
    listeners: Mutex<usize>,
    /// Count of noticed signals, and the number of the last one.
    noticed: AtomicU64,
    number: AtomicUsize,
}

static SIGNALS: OnceLock<Signals> = OnceLock::new();

thread_local! {
    /// The count of noticed signals up to which the outermost engines of this thread were stopped, or which came before
    /// this thread listened.
    static OBEYED: Cell<u64> = const { Cell::new(0) };
}

impl Signals {
    pub(super) fn registered() -> Result<&'static Self> {
        static REGISTERING: Mutex<()> = Mutex::new(());
        let _one = REGISTERING.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(signals) = SIGNALS.get() {
            return Ok(signals);
        }
        let (raised, is_last) = (Arc::default(), Arc::new(AtomicBool::new(true)));
        let mut ids = vec![];
        for signal in [SIGTERM, SIGINT] {
            // The order matters: a first signal sets both flags; a second one finds `is_last` set and ends the process.
            let registered = flag::register_conditional_default(signal, Arc::clone(&is_last))
                .map(|id| ids.push(id))
                .and_then(|()| flag::register_usize(signal, Arc::clone(&raised), signal as usize))
                .map(|id| ids.push(id))
                .and_then(|()| flag::register(signal, Arc::clone(&is_last)))
                .map(|id| ids.push(id));
            if let Err(error) = registered {
                for id in ids {
                    low_level::unregister(id);
                }
                return Err(Error::invalid(format!("cannot listen to signals: {error}")));
            }
        }
        #[cfg(all(unix, feature = "distributed"))]
        crate::distributed::launch::leave_default();
        let listeners = Mutex::new(0);
        let (noticed, number) = Default::default();
        Ok(SIGNALS.get_or_init(|| Self { raised, is_last, listeners, noticed, number }))
    }

    /// Counts one more listener.
    pub(super) fn listen(&self) {
        let mut listeners = self.listeners.lock().unwrap_or_else(PoisonError::into_inner);
        *listeners += 1;
        // A signal that came before and stopped no engine is not forgotten.
        if *listeners == 1 && self.raised.load(Ordering::Relaxed) == 0 {
            self.is_last.store(false, Ordering::Relaxed);
        }
        // An old signal, which stopped engines of other threads, does not concern a run that begins later. A run under
        // way may still have to obey it.
        if !is_running_here() {
            OBEYED.set(OBEYED.get().max(self.noticed()));
        }
    }

    /// Counts one listener less.
    pub(super) fn listen_no_more(&self) {
        let mut listeners = self.listeners.lock().unwrap_or_else(PoisonError::into_inner);
        *listeners -= 1;
        if *listeners == 0 {
            self.is_last.store(true, Ordering::Relaxed);
        }
    }

    /// Returns the number of a signal that came after the first `since`, and that has not stopped the outermost engine
    /// of this thread yet. `since` then counts the signal too.
    pub(super) fn take(&self, since: &mut u64) -> Option<i32> {
        if self.raised.load(Ordering::Relaxed) != 0 {
            let number = self.raised.swap(0, Ordering::Relaxed);
            if number != 0 {
                self.number.store(number, Ordering::Relaxed);
                self.noticed.fetch_add(1, Ordering::Release);
            }
        }
        let noticed = self.noticed();
        if noticed <= OBEYED.get().max(*since) {
            return None;
        }
        *since = noticed;
        i32::try_from(self.number.load(Ordering::Relaxed)).ok()
    }

    /// Count of noticed signals.
    pub(super) fn noticed(&self) -> u64 {
        self.noticed.load(Ordering::Acquire)
    }

    /// Makes the next signal a first one again, when engines run again after a stop.
    fn rearm(&self) {
        if self.is_last.load(Ordering::Relaxed) && self.raised.load(Ordering::Relaxed) == 0 {
            let listeners = self.listeners.lock().unwrap_or_else(PoisonError::into_inner);
            if *listeners > 0 {
                self.is_last.store(false, Ordering::Relaxed);
            }
        }
    }
}

/// Whether a signal would stop a run in good order.
pub(super) fn is_listening() -> bool {
    SIGNALS.get().is_some_and(|signals| {
        *signals.listeners.lock().unwrap_or_else(PoisonError::into_inner) > 0
    })
}

/// Returns the number of a signal that came after the first `since`, as [`Signals::take`] does.
pub(super) fn take_signal(since: &mut u64) -> Option<i32> {
    SIGNALS.get()?.take(since)
}

/// Stops an engine for a signal. Only the outermost engine of a thread settles the signal, because those around a
/// nested one have to stop, too.
pub(super) fn obey<C, B, O>(engine: &mut Engine<'_, C, B, O>, signal: i32) {
    engine.interrupt_for_signal(signal);
    if let Some(signals) = SIGNALS.get()
        && !engine.is_nested()
    {
        OBEYED.set(signals.noticed());
    }
}

/// Makes the next signal a first one again, unless an engine of this thread is about to stop. Only the outermost engine
/// knows that.
pub(super) fn rearm<C, B, O>(engine: &Engine<'_, C, B, O>) {
    if let Some(signals) = SIGNALS.get()
        && !engine.is_nested()
        && !engine.is_stopped_by_signal()
    {
        signals.rearm();
    }
}
