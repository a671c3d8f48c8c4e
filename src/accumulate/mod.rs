//! Gradient accumulation: which batches share a step of the optimizer, and how their gradients are combined.

mod gradient_accumulator;
mod weight;

pub use gradient_accumulator::GradientAccumulator;
pub use weight::{Weight, WeightedLoss};

use crate::engine::Engine;
use crate::error::{Error, Result};

/// Gradient accumulation: divides an epoch into windows of batches that share one step of the optimizer. The last
/// window of an epoch may be shorter. [`GradientAccumulator`] combines the gradients of the batches of a window.
///
/// The window of a batch follows from its position alone, so it is the same after a resume. A checkpoint that is
/// written within a window needs the gradients too: track [`SavedGradients`](crate::checkpoint::SavedGradients).
///
/// ```
/// use tch_ignite::Accumulation;
///
/// let accumulation = Accumulation::new(4)?;
/// // The last batch of an epoch of 10 is the second of a window of 2.
/// let window = accumulation.window(9, Some(10));
/// assert_eq!((window.size, window.first, window.last), (2, false, true));
/// # Ok::<(), tch_ignite::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Accumulation {
    steps: u64,
}

/// The place of a batch among the batches that share a step. Made by [`Accumulation::window`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Window {
    /// The number of batches that share the step, if none is lost to an error.
    pub size: u64,
    /// Whether this batch is the first of the window.
    pub first: bool,
    /// Whether this batch is the last of the window, after which a step follows.
    pub last: bool,
    /// The number of batches before the first one of the window. Batches of different windows have different numbers
    /// here.
    pub begin: u64,
}

impl Accumulation {
    /// One step for every `steps` batches, at least 1.
    ///
    /// # Errors
    /// `steps` is 0.
    pub fn new(steps: u64) -> Result<Self> {
        if steps == 0 {
            return Err(Error::invalid(
                "Gradient_accumulation_steps must be strictly positive. No gradient accumulation if the value set to one (default). accumulate(0) was given: say how many batches share a step",
            ));
        }
        Ok(Self { steps })
    }

    /// The number of batches that share a step.
    pub fn steps(self) -> u64 {
        self.steps
    }

    /// The place of the batch of the current iteration. Call this in the step, or in handlers of `ITERATION_STARTED`
    /// and `ITERATION_COMPLETED`.
    pub fn window_of<C, B, O>(self, engine: &Engine<'_, C, B, O>) -> Window {
        let index = engine.iteration_in_epoch().saturating_sub(1);
        let window = self.window(index, engine.state.epoch_length);
        // Counted over the whole run, so that windows of different epochs have different numbers.
        let before = (engine.state.iteration.max(1) - 1).saturating_sub(index % self.steps);
        Window { begin: before, ..window }
    }

    /// The place of batch `index`, from 0, in an epoch of `epoch_length` batches; [`Window::begin`] counts from the
    /// start of the epoch. If the length is not known, all windows are full, and batches that are left at the end of
    /// the epoch need a step of their own.
    pub fn window(self, index: u64, epoch_length: Option<u64>) -> Window {
        let place = index % self.steps;
        let begin = index - place;
        let size = match epoch_length {
            Some(length) if length > index => self.steps.min(length - begin),
            _ => self.steps,
        };
        Window { size, first: place == 0, last: place + 1 == size, begin }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_batch_counts_once_and_windows_end_with_the_epoch() {
        for steps in 1..6 {
            let accumulation = Accumulation::new(steps).unwrap();
            for length in 1..20 {
                let windows: Vec<_> =
                    (0..length).map(|index| accumulation.window(index, Some(length))).collect();
                let shares: f64 = windows.iter().map(|window| 1. / window.size as f64).sum();
                let last = windows.iter().filter(|window| window.last).count();
                assert_eq!(last as u64, length.div_ceil(steps));
                assert!((shares - last as f64).abs() < 1e-12, "{steps} {length}");
                assert!(windows[0].first && windows[length as usize - 1].last);
                let pairs = windows.windows(2).all(|pair| pair[0].last == pair[1].first);
                assert!(pairs, "{windows:?}");
            }
        }
        assert!(Accumulation::new(0).is_err());
    }

    #[test]
    fn without_a_length_all_windows_are_full() {
        let window = Accumulation::new(3).unwrap().window(7, None);
        assert_eq!(window, Window { size: 3, first: false, last: false, begin: 6 });
    }
}
