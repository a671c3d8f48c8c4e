//! Handlers that come with the crate.

pub(crate) mod awaited;
mod early_stopping;
mod ema;
mod epoch_output_store;
mod evaluate;
mod grad_norm;
mod history;
#[cfg(feature = "signals")]
mod interrupt_on;
mod lr_finder;
#[cfg(feature = "plots")]
pub use crate::plot;
#[cfg(feature = "progress")]
mod progress_bar;
#[cfg(feature = "signals")]
mod signals;
/// Without the feature `signals` no signal is listened to.
#[cfg(not(feature = "signals"))]
mod signals {
    pub(super) fn is_listening() -> bool {
        false
    }

    pub(super) fn take_signal(_since: &mut u64) -> Option<i32> {
        None
    }

    pub(super) fn obey<C, B, O>(engine: &mut crate::engine::Engine<'_, C, B, O>, signal: i32) {
        engine.interrupt_for_signal(signal);
    }

    pub(super) fn rearm<C, B, O>(_engine: &crate::engine::Engine<'_, C, B, O>) {}
}
mod skip_batch;
mod terminate_on_nan;
mod throughput;
mod time_limit;
mod timer;
#[cfg(feature = "tracing")]
mod tracing;
mod update_bn;

#[cfg(feature = "tracing")]
pub use self::tracing::Tracing;
pub use early_stopping::EarlyStopping;
pub use epoch_output_store::EpochOutputStore;
mod swa;
mod weight_averages;

pub use ema::EMAHandler;
pub use evaluate::Evaluate;
pub use grad_norm::GradNorm;
pub use history::History;
#[cfg(feature = "signals")]
pub use interrupt_on::InterruptOn;
pub use lr_finder::{LrCurve, LrFinder, StepMode};
#[cfg(feature = "progress")]
pub use progress_bar::ProgressBar;
pub use skip_batch::SkipBatch;
pub use swa::SWAHandler;
pub use terminate_on_nan::{Numbers, TerminateOnNan};
pub use throughput::Throughput;
pub use time_limit::TimeLimit;
pub use timer::Timer;
pub use update_bn::update_bn;
pub use weight_averages::{Buffers, Swapped, WithAverages};
