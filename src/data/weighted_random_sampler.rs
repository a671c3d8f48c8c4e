use super::{Sampler, SplitMix64};
use crate::error::{Error, Result};

/// Draws samples with replacement, each as often as its weight says: for classes that are rare.
///
/// Each draw is a search among the sums of the weights: O(log n).
///
/// ```
/// use tch_ignite::data::{Sampler, WeightedRandomSampler};
/// // Classes 0 and 1, of which the second is rare: each is drawn half of the time.
/// let labels = [0, 0, 0, 1];
/// let weights = labels.map(|label| if label == 0 { 1.0 / 3.0 } else { 1.0 });
/// let order = WeightedRandomSampler::new(&weights, 1000, 42)?.order(0)?;
/// let rare = order.iter().filter(|index| labels[**index] == 1).count();
/// assert!((400..600).contains(&rare));
/// # anyhow::Ok(())
/// ```
#[derive(Debug, Clone)]
pub struct WeightedRandomSampler {
    /// Sum of the weights up to and with each index.
    sums: Vec<f64>,
    num_samples: usize,
    seed: u64,
}

impl WeightedRandomSampler {
    /// `num_samples` draws a pass. The weights need not sum up to 1.
    ///
    /// # Errors
    /// A negative or non-finite weight, no weight above 0, a sum beyond f64, `num_samples` 0.
    pub fn new(weights: &[f64], num_samples: usize, seed: u64) -> Result<Self> {
        let bad = weights.iter().enumerate().find(|(_, w)| !(w.is_finite() && **w >= 0.));
        if let Some((index, weight)) = bad {
            return Err(Error::invalid(format!(
                "weights must be finite and at least 0, but that of index {index} is {weight}"
            )));
        }
        let sum = |sum: &mut f64, weight: &f64| {
            *sum += weight;
            Some(*sum)
        };
        let sums: Vec<f64> = weights.iter().scan(0., sum).collect();
        let total = sums.last().copied().unwrap_or(0.);
        if !(total > 0. && total.is_finite()) {
            return Err(Error::invalid(format!(
                "the weights need a finite sum above 0, but that of the {} given is {total}",
                weights.len()
            )));
        }
        if num_samples == 0 {
            return Err(Error::invalid("num_samples must be at least 1, but 0 was given"));
        }
        Ok(Self { sums, num_samples, seed })
    }
}

impl Sampler for WeightedRandomSampler {
    fn num_samples(&self) -> usize {
        self.num_samples
    }

    fn order(&self, pass: u64) -> anyhow::Result<Vec<usize>> {
        let mut rng = SplitMix64::keyed([self.seed, pass]);
        let total = self.sums.last().copied().unwrap_or(0.);
        // Where rounding gives the total itself: the last index with a weight.
        let last = self.sums.partition_point(|sum| *sum < total);
        let draw = || {
            let place = rng.uniform() * total;
            self.sums.partition_point(|sum| *sum <= place).min(last)
        };
        Ok(std::iter::repeat_with(draw).take(self.num_samples).collect())
    }

    fn seed(&self) -> Option<u64> {
        Some(self.seed)
    }

    fn repeats(&self) -> bool {
        true
    }
}
