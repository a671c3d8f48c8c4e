//! Turns panics of user code into errors, and restores libtorch's settings of the thread after them.

use std::cell::Cell;
use std::marker::PhantomData;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Once;

use crate::bridge::ThreadState;
use crate::error::Panicked;
use crate::error::{Error, Result};

thread_local! {
    /// The settings that are restored after a panic on this thread.
    static ENTERED: Cell<Option<ThreadState>> = const { Cell::new(None) };
}

/// Notes libtorch's settings of the thread (gradients, autocast). While this value lives, a panic that is caught on
/// this thread restores these settings. One is made at each call from user code into an engine. The engine itself
/// changes no settings between such a call and the user code that it runs, so nothing has to be noted for each step or
/// handler.
pub(crate) struct Entered {
    before: Option<ThreadState>,
    // Makes the type `!Send`, because the settings belong to one thread.
    of_thread: PhantomData<*const ()>,
}

impl Entered {
    pub(crate) fn here() -> Self {
        shorten_panics();
        Self { before: ENTERED.replace(ThreadState::now().ok()), of_thread: PhantomData }
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        ENTERED.set(self.before);
    }
}

/// Installs a panic hook, once in a process, that is silent about panics within tch's methods in code whose panics this
/// crate turns into errors. The default hook would print libtorch's message with its C++ stack trace, 30 lines and more,
/// and then the program prints the error with the message alone. All other panics go to the hook that was there before,
/// because their places are known to nobody else: also an `unwrap` of the program on an error of tch. With
/// `RUST_BACKTRACE` set those of tch go there, too, and where a panic aborts, nothing is installed, because no error
/// follows. A hook that the program sets later takes the place of this one.
fn shorten_panics() {
    static INSTALLED: Once = Once::new();
    if cfg!(panic = "abort") || INSTALLED.is_completed() || std::thread::panicking() {
        // A thread that panics may not change the hook.
        return;
    }
    INSTALLED.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            let is_caught = ENTERED.try_with(|entered| entered.get().is_some()).unwrap_or(false);
            let wants_all = || std::env::var_os("RUST_BACKTRACE").is_some_and(|it| it != "0");
            if !(is_caught && crate::panic::is_of_tch(info) && !wants_all()) {
                before(info);
            }
        }));
    });
}

/// Runs user code; a panic becomes an error.
pub(crate) fn guarded<T>(call: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<T> {
    let _entered = Entered::here();
    guarded_within(call)
}

/// Runs user code like [`guarded`], within an engine, which has made an [`Entered`] already.
#[inline]
pub(crate) fn guarded_within<T>(call: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<T> {
    catch_unwind(AssertUnwindSafe(call)).unwrap_or_else(|payload| Err(caught(payload).into()))
}

/// Runs code like [`guarded`] that returns this crate's errors.
pub(crate) fn guarded_state<T>(call: impl FnOnce() -> Result<T>) -> Result<T> {
    let called = guarded(|| Ok(call()));
    called.unwrap_or_else(|panicked| Err(Error::State(panicked.to_string())))
}

/// Drops a user's value; a panic becomes an error.
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
        // The panic's payload panics when it is dropped, and that panic's payload may do the same.
        std::mem::forget(second);
    }
    if let Some(before) = ENTERED.get() {
        // Restoring settings that this thread had before should not fail, and nobody could be told of the error.
        let _ = before.put_back();
    }
    Panicked(text)
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind, Tensor};

    use super::*;

    #[test]
    fn a_panic_of_tch_has_libtorchs_sentence_alone() {
        let zeros = |columns| Tensor::zeros([2, columns], (Kind::Float, Device::Cpu));
        let error = guarded(|| Ok(zeros(3) + zeros(4))).unwrap_err().to_string();
        let start =
            "panicked: libtorch: The size of tensor a (3) must match the size of tensor b (4)";
        assert!(error.starts_with(start) && error.lines().count() == 1, "{error}");
    }
}
