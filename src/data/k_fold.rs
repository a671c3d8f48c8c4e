use super::permutation;
use crate::error::{Error, Result};

/// Splits samples into `n_splits` parts, each of which is the test set once: scikit-learn's `KFold`, with its sizes and
/// its order.
///
/// The first `len % n_splits` parts have one sample more than the others. Indices come in ascending order, also with
/// [`shuffle`](Self::shuffle), which chooses the members of each part at random.
///
/// ```
/// use tch_ignite::data::{KFold, Subset, from_fn};
/// let data = std::sync::Arc::new(from_fn(5, |index, _| Ok(index as i64)));
/// for (train, test) in KFold::new(2)?.shuffle(42).split(5)? {
///     let (train, test) = (Subset::new(data.clone(), train)?, Subset::new(data.clone(), test)?);
///     // … a model for each
/// }
/// let folds: Vec<_> = KFold::new(2)?.split(5)?.collect();
/// assert_eq!(folds, [(vec![3, 4], vec![0, 1, 2]), (vec![0, 1, 2], vec![3, 4])]);
/// # Ok::<(), tch_ignite::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct KFold {
    n_splits: usize,
    seed: Option<u64>,
}

impl KFold {
    /// Makes a rule for `n_splits` parts of consecutive samples.
    ///
    /// # Errors
    /// Fewer than 2 parts.
    pub fn new(n_splits: usize) -> Result<Self> {
        Ok(Self { n_splits: check_splits(n_splits)?, seed: None })
    }

    /// Chooses the members of the parts at random. The same seed always gives the same parts.
    pub fn shuffle(mut self, seed: u64) -> Self {
        self.seed = Some(seed);
        self
    }

    /// Splits `len` samples: gives the indices for training and those for testing, part by part.
    ///
    /// Costs 8 bytes a sample, and a walk over all samples for each part.
    ///
    /// # Errors
    /// Fewer samples than parts.
    pub fn split(&self, len: usize) -> Result<Folds> {
        let n_splits = self.n_splits;
        if len < n_splits {
            return Err(Error::invalid(format!(
                "n_splits is {n_splits}, but there are only {len} samples; give fewer parts or more samples"
            )));
        }
        let (size, larger) = (len / n_splits, len % n_splits);
        let parts = (0..n_splits)
            .flat_map(|fold| std::iter::repeat_n(fold, size + usize::from(fold < larger)));
        let mut fold_of: Vec<usize> = parts.collect();
        if let Some(seed) = self.seed {
            let in_order = fold_of.clone();
            for (place, sample) in permutation(len, seed, 0).into_iter().enumerate() {
                fold_of[sample as usize] = in_order[place];
            }
        }
        Ok(Folds { fold_of, n_splits, next: 0 })
    }
}

/// Returns the number of parts where it is one that can be made.
pub(super) fn check_splits(n_splits: usize) -> Result<usize> {
    match n_splits {
        0 | 1 => Err(Error::invalid(format!(
            "n_splits must be at least 2, one part to test and one to train, but {n_splits} was given"
        ))),
        _ => Ok(n_splits),
    }
}

/// The parts that [`KFold`] and [`StratifiedKFold`](super::StratifiedKFold) make: pairs of the indices for training and
/// those for testing, both in ascending order.
#[derive(Debug, Clone)]
pub struct Folds {
    /// For each sample, the part that tests it.
    pub(super) fold_of: Vec<usize>,
    pub(super) n_splits: usize,
    pub(super) next: usize,
}

impl Iterator for Folds {
    type Item = (Vec<usize>, Vec<usize>);

    fn next(&mut self) -> Option<Self::Item> {
        let fold = self.next;
        if fold == self.n_splits {
            return None;
        }
        self.next += 1;
        Some((0..self.fold_of.len()).partition(|sample| self.fold_of[*sample] != fold))
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        let left = self.n_splits - self.next;
        (left, Some(left))
    }
}

impl ExactSizeIterator for Folds {}
