use std::collections::HashMap;

use super::SplitMix64;
use super::k_fold::{Folds, check_splits};
use crate::error::{Error, Result};

/// Splits samples into parts that have about the same number of each class: scikit-learn's `StratifiedKFold`, with its
/// numbers of members.
///
/// A class with fewer members than parts is missing from some of the parts.
///
/// ```
/// use tch_ignite::data::StratifiedKFold;
/// let labels = [0, 0, 0, 0, 1, 1];
/// for (train, test) in StratifiedKFold::new(2)?.split(&labels)? {
///     let of_class_1 = test.iter().filter(|index| labels[**index] == 1).count();
///     assert_eq!((train.len(), test.len(), of_class_1), (3, 3, 1));
/// }
/// # Ok::<(), tch_ignite::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct StratifiedKFold {
    n_splits: usize,
    seed: Option<u64>,
}

impl StratifiedKFold {
    /// Makes a rule for `n_splits` parts; the members of a class go to them in order.
    ///
    /// # Errors
    /// Fewer than 2 parts.
    pub fn new(n_splits: usize) -> Result<Self> {
        Ok(Self { n_splits: check_splits(n_splits)?, seed: None })
    }

    /// Chooses the members of the parts at random within each class. The same seed always gives the same parts.
    pub fn shuffle(mut self, seed: u64) -> Self {
        self.seed = Some(seed);
        self
    }

    /// Splits samples of these classes, one for each sample: gives the indices for training and those for testing, part
    /// by part.
    ///
    /// # Errors
    /// More parts than samples in the largest class.
    pub fn split(&self, labels: &[i64]) -> Result<Folds> {
        let n_splits = self.n_splits;
        // Classes are numbered as they first come, and have this many members.
        let (mut numbers, mut counts) = (HashMap::new(), Vec::new());
        let mut class_of = Vec::with_capacity(labels.len());
        for label in labels {
            let class = *numbers.entry(label).or_insert_with(|| {
                counts.push(0);
                counts.len() - 1
            });
            counts[class] += 1;
            class_of.push(class);
        }
        let largest = counts.iter().max().copied().unwrap_or(0);
        if largest < n_splits {
            return Err(Error::invalid(format!(
                "n_splits is {n_splits}, but the largest of the {} classes has {largest} members; give fewer parts",
                counts.len()
            )));
        }
        let mut rng = self.seed.map(SplitMix64::new);
        let mut before = 0;
        let mut parts_of: Vec<_> = counts
            .iter()
            .map(|count| {
                // With all samples in the order of their classes, part `i` tests the places i, i + n, i + 2n, …; a
                // class gives a part as many members as it has of these places.
                let members = before..before + count;
                before += count;
                let places = |fold| {
                    (members.end + n_splits - 1 - fold) / n_splits
                        - (members.start + n_splits - 1 - fold) / n_splits
                };
                let mut parts: Vec<usize> = (0..n_splits)
                    .flat_map(|fold| std::iter::repeat_n(fold, places(fold)))
                    .collect();
                if let Some(rng) = &mut rng {
                    for place in (1..parts.len()).rev() {
                        parts.swap(place, rng.below(place as u64 + 1) as usize);
                    }
                }
                parts.into_iter()
            })
            .collect();
        let fold_of = class_of.into_iter().filter_map(|class| parts_of[class].next()).collect();
        Ok(Folds { fold_of, n_splits, next: 0 })
    }
}
