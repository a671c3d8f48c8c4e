//! Panics of user code come out as errors, and leave libtorch's settings of the thread as they were.

use std::cell::Cell;
use std::marker::PhantomData;
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::bridge::ThreadState;
use crate::error::Panicked;
use crate::error::{Error, Result};

thread_local! {
    /// The settings that a panic which is caught on this thread goes back to.
    static ENTERED: Cell<Option<ThreadState>> = const { Cell::new(None) };
}

/// While it lives, a panic that is caught on this thread puts libtorch's settings of the thread
/// (gradients, autocast) back to what they were when this was made. User code makes one by each of its
/// calls into an engine; the engine itself changes no settings between these and the next user code, so
/// nothing has to be noted for each step or handler.
pub(crate) struct Entered {
    before: Option<ThreadState>,
    // The settings are those of one thread.
    of_thread: PhantomData<*const ()>,
}

impl Entered {
    pub(crate) fn here() -> Self {
        Self { before: ENTERED.replace(ThreadState::now().ok()), of_thread: PhantomData }
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        ENTERED.set(self.before);
    }
}

/// Runs user code; a panic comes out as an error.
pub(crate) fn guarded<T>(call: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<T> {
    let _entered = Entered::here();
    guarded_within(call)
}

/// Like [`guarded`], in code that an engine runs: [`Entered`] was made already.
#[inline]
pub(crate) fn guarded_within<T>(call: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<T> {
    catch_unwind(AssertUnwindSafe(call)).unwrap_or_else(|payload| Err(caught(payload).into()))
}

/// Like [`guarded`], for code that returns this crate's errors.
pub(crate) fn guarded_state<T>(call: impl FnOnce() -> Result<T>) -> Result<T> {
    let called = guarded(|| Ok(call()));
    called.unwrap_or_else(|panicked| Err(Error::State(panicked.to_string())))
}

/// Drops a value of the user's; its panic comes out as an error.
#[inline]
pub(crate) fn guarded_drop<T>(value: T) -> anyhow::Result<()> {
    match std::mem::needs_drop::<T>() {
        true => guarded_within(move || {
            drop(value);
            Ok(())
        }),
        false => Ok(()),
    }
}

#[cold]
fn caught(payload: Box<dyn std::any::Any + Send>) -> Panicked {
    let text = crate::panic::message(&*payload);
    if let Err(second) = catch_unwind(AssertUnwindSafe(|| drop(payload))) {
        // What was thrown panics when it is dropped, and so may the next.
        std::mem::forget(second);
    }
    if let Some(before) = ENTERED.get() {
        // It sets what was set before on this thread; there is nobody else to tell of an error.
        let _ = before.put_back();
    }
    Panicked(text)
}
