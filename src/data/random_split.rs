use std::sync::Arc;

use super::{Dataset, Subset, permutation};
use crate::error::{Error, Result};

/// A length of a part that [`random_split`] makes: a number of samples (`usize`), or a fraction of them (`f64`).
pub trait SplitLength: Sized + sealed::Sealed {
    /// Returns the number of samples of each part, which together are `len`.
    ///
    /// # Errors
    /// Lengths whose sum is not that of the dataset, or fractions whose sum is not 1.
    fn lengths<const N: usize>(lengths: [Self; N], len: usize) -> Result<[usize; N]>;
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for usize {}
    impl Sealed for f64 {}
}

impl SplitLength for usize {
    fn lengths<const N: usize>(lengths: [Self; N], len: usize) -> Result<[usize; N]> {
        let sum = lengths.iter().try_fold(0usize, |sum, length| sum.checked_add(*length));
        if sum != Some(len) {
            let text = sum.map_or("more than can be counted".into(), |sum| sum.to_string());
            return Err(Error::invalid(format!(
                "the lengths {lengths:?} must sum up to that of the dataset, {len}, but their sum is {text}; give fractions such as [0.9, 0.1] to have them computed"
            )));
        }
        Ok(lengths)
    }
}

impl SplitLength for f64 {
    fn lengths<const N: usize>(fractions: [Self; N], len: usize) -> Result<[usize; N]> {
        if let Some(bad) = fractions.iter().find(|fraction| !(0. ..=1.).contains(*fraction)) {
            return Err(Error::invalid(format!(
                "fractions must be between 0 and 1, but {bad} was given"
            )));
        }
        let sum: f64 = fractions.iter().sum();
        let refused = || {
            Error::invalid(format!(
                "the fractions {fractions:?} must sum up to 1, but their sum is {sum}"
            ))
        };
        if (sum - 1.).abs() > 1e-9 {
            return Err(refused());
        }
        let mut lengths = fractions.map(|fraction| (len as f64 * fraction).floor() as usize);
        let rest = len.checked_sub(lengths.iter().sum()).ok_or_else(refused)?;
        for place in 0..rest {
            lengths[place % N] += 1;
        }
        Ok(lengths)
    }
}

/// Splits a dataset at random into parts of these lengths, without overlap: PyTorch's `random_split`. The same seed
/// always gives the same parts.
///
/// Lengths are numbers of samples, or fractions of them. Each part has its fraction of the samples, rounded down; of
/// those left over, the first parts get one each.
///
/// ```
/// use tch_ignite::data::{Dataset, from_fn, random_split};
/// let numbers = || from_fn(101, |index, _| Ok(index as i64));
/// let [train, validation] = random_split(numbers(), [91, 10], 42)?;
/// assert_eq!((train.len(), validation.len()), (91, 10));
/// let [train, validation] = random_split(numbers(), [0.9, 0.1], 42)?;
/// assert_eq!((train.len(), validation.len()), (91, 10));
/// # Ok::<(), tch_ignite::Error>(())
/// ```
///
/// # Errors
/// Lengths whose sum is not the number of samples, or fractions whose sum is not 1.
pub fn random_split<D: Dataset, L: SplitLength, const N: usize>(
    dataset: D,
    lengths: [L; N],
    seed: u64,
) -> Result<[Subset<Arc<D>>; N]> {
    let (len, dataset) = (dataset.len(), Arc::new(dataset));
    let lengths = L::lengths(lengths, len)?;
    let mut order = permutation(len, seed, 0).into_iter().map(|index| index as usize);
    Ok(lengths.map(|length| Subset {
        dataset: dataset.clone(),
        indices: order.by_ref().take(length).collect(),
    }))
}
