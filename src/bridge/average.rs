//! Averages of the tensors that training changes; the C++ is in average.cpp.

use std::ffi::{c_char, c_int, c_void};
use std::ptr::{NonNull, null_mut};

use tch::Tensor;
use torch_sys::C_tensor;

use super::abi::Update;
use super::{BridgeError, Raw, checked};

unsafe extern "C" {
    fn tig_pairs_new(
        averages: *const *const C_tensor,
        sources: *const *const C_tensor,
        count: usize,
        made: *mut Raw,
        error: *mut *mut c_char,
    ) -> c_int;
    fn tig_pairs_free(pairs: Raw);
    fn tig_pairs_check(pairs: Raw, how: c_int, error: *mut *mut c_char) -> c_int;
    fn tig_pairs_update(pairs: Raw, how: c_int, number: f64, error: *mut *mut c_char) -> c_int;
}

/// An update of averages from their sources.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Average {
    /// `average * (1 - momentum) + source * momentum`
    Lerp(f64),
    /// `average + (source - average) / count`
    Mean(f64),
    /// The average gets the source's values.
    Copy,
    /// Average and source exchange their values, pair by pair.
    Swap,
    /// As `Swap`, but from the last pair to the first. This undoes `Swap` even if sources share memory.
    SwapBack,
}

/// Pairs of an average and the tensor that it averages (its source), as lists on the C++ side. The tensors are shared,
/// not copied.
#[derive(Debug)]
pub(crate) struct Pairs(NonNull<c_void>);

// SAFETY: torch::Tensors may be used from any thread, one at a time; `update` takes &mut self.
unsafe impl Send for Pairs {}

impl Pairs {
    /// Makes the lists from pairs of (average, source).
    pub(crate) fn new<'t>(
        pairs: impl Iterator<Item = (&'t Tensor, &'t Tensor)>,
    ) -> Result<Self, BridgeError> {
        let (averages, sources): (Vec<_>, Vec<_>) =
            pairs.map(|(average, source)| (average.as_ptr(), source.as_ptr())).unzip();
        let mut made = null_mut();
        // SAFETY: both lists have the given length and point to live torch::Tensors.
        checked(|error| unsafe {
            tig_pairs_new(
                averages.as_ptr().cast(),
                sources.as_ptr().cast(),
                averages.len(),
                &mut made,
                error,
            )
        })?;
        NonNull::new(made).map(Self).ok_or_else(|| "no memory".into())
    }

    /// An error if [`update`](Self::update) would be one.
    pub(crate) fn check(&self, how: Average) -> Result<(), BridgeError> {
        // SAFETY: the object is live, and nothing is changed.
        checked(|error| unsafe { tig_pairs_check(self.0.as_ptr(), how.numbers().0, error) })
    }

    /// Changes all pairs, or none where one does not fit.
    pub(crate) fn update(&mut self, how: Average) -> Result<(), BridgeError> {
        let (how, number) = how.numbers();
        // SAFETY: the object is live, and &mut self keeps other users out.
        checked(|error| unsafe { tig_pairs_update(self.0.as_ptr(), how, number, error) })
    }
}

impl Average {
    /// The number of the kind of update on the C++ side, and the number that the update takes.
    fn numbers(self) -> (c_int, f64) {
        let (how, number) = match self {
            Self::Lerp(momentum) => (Update::Lerp, momentum),
            Self::Mean(count) => (Update::Mean, count),
            Self::Copy => (Update::Copy, 0.),
            Self::Swap => (Update::Swap, 0.),
            Self::SwapBack => (Update::SwapBack, 0.),
        };
        (how as c_int, number)
    }
}

/// Updates an empty list of pairs by a number, to test that the C++ side refuses an unknown one.
#[cfg(test)]
pub(super) fn update_with_number(how: c_int) -> Result<(), BridgeError> {
    let pairs = Pairs::new(std::iter::empty())?;
    // SAFETY: as in `update`.
    checked(|error| unsafe { tig_pairs_update(pairs.0.as_ptr(), how, 0., error) })
}

impl Drop for Pairs {
    fn drop(&mut self) {
        // SAFETY: tig_pairs_new made the object, and it is freed once, here.
        unsafe { tig_pairs_free(self.0.as_ptr()) };
    }
}
