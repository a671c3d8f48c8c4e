//! Gradient accumulation: which batches share a step of the optimizer, and how their gradients are put together.

mod gradient_accumulator;
mod weight;

pub use gradient_accumulator::GradientAccumulator;
pub use weight::{Weight, WeightedLoss};

use crate::engine::Engine;
use crate::error::{Error, Result};

/// Gradient accumulation: one step of the optimizer for several batches. The last window of an epoch may be shorter.
/// [`GradientAccumulator`] makes the gradient of the window from those of its batches.
///
/// Plain arithmetic on the position, so that it is right after a resume. A checkpoint that is written
/// within a window needs the gradients too: track [`Gradients`](crate::checkpoint::Gradients).
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

/// The place of a batch among those that share a step; made by [`Accumulation::window`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Window {
    /// How many batches share the step, if none is lost.
    pub size: u64,
    /// This batch is the first.
    pub first: bool,
    /// This batch is the last: a step follows.
    pub last: bool,
    /// How many batches came before the first one of the window: two batches with different numbers are of two windows.
    pub begin: u64,
}

impl Accumulation {
    /// A step for every `steps` batches, at least 1.
    pub fn new(steps: u64) -> Result<Self> {
        if steps == 0 {
            return Err(Error::invalid(
                "Gradient_accumulation_steps must be strictly positive. No gradient accumulation if the value set to one (default).",
            ));
        }
        Ok(Self { steps })
    }

    /// How many batches share a step.
    pub fn steps(self) -> u64 {
        self.steps
    }

    /// The place of the batch of this iteration; for steps and for handlers of `ITERATION_STARTED` and
    /// `ITERATION_COMPLETED`.
    pub fn window_of<C, B, O>(self, engine: &Engine<'_, C, B, O>) -> Window {
        let index = engine.iteration_in_epoch().saturating_sub(1);
        let window = self.window(index, engine.state.epoch_length);
        // Windows of different epochs differ.
        let before = (engine.state.iteration.max(1) - 1).saturating_sub(index % self.steps);
        Window { begin: before, ..window }
    }

    /// The place of batch `index`, from 0, of an epoch of `epoch_length` batches, in iterations of the epoch. Where
    /// the length is not known all windows are full, and what is left at the end has to be stepped for.
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
