//! Orders as arithmetic on a seed, so that any position can be reached again.

use std::ops::RangeInclusive;

/// Steele, Lea and Flood's SplitMix64 (OOPSLA 2014): a 64-bit generator with one word of state. Its sequence never
/// changes between versions of this crate.
#[derive(Debug, Clone)]
pub struct SplitMix64(u64);

impl SplitMix64 {
    /// Starts the sequence of a seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// Starts the sequence that belongs to these numbers in this order. Sequences of neighbouring numbers are
    /// unrelated.
    pub fn keyed<const N: usize>(numbers: [u64; N]) -> Self {
        Self(numbers.into_iter().fold(0, |key, number| Self(key ^ number).next_u64()))
    }

    /// Draws the next 64 bits.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Draws a number in [0, 1), one of 2^53.
    pub fn uniform(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 * (0.5f64).powi(53)
    }

    /// Draws a number from this range, whose ends are finite.
    pub(super) fn within(&mut self, range: &RangeInclusive<f64>) -> f64 {
        range.start() + (range.end() - range.start()) * self.uniform()
    }

    /// Draws a number below `bound`, without bias (Lemire 2019, <https://arxiv.org/abs/1805.10941>); 0 for a bound
    /// of 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        loop {
            let product = u128::from(self.next_u64()) * u128::from(bound);
            let low = product as u64;
            if low >= bound || bound == 0 || low >= bound.wrapping_neg() % bound {
                return (product >> 64) as u64;
            }
        }
    }
}

/// Returns the numbers from 0 to `len - 1`, shuffled (Fisher and Yates); the result depends on `len`, seed and pass
/// alone.
pub fn permutation(len: usize, seed: u64, pass: u64) -> Vec<i64> {
    // Seed and pass go through the generator once, so that neighbouring seeds or passes give unrelated orders.
    let mut rng = SplitMix64::new(SplitMix64::new(seed).next_u64() ^ pass);
    let mut order: Vec<i64> = (0..len as i64).collect();
    for i in (1..len).rev() {
        order.swap(i, rng.below(i as u64 + 1) as usize);
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn split_mix_gives_its_published_sequence() {
        let mut rng = SplitMix64::new(1234567);
        let values: Vec<_> = (0..3).map(|_| rng.next_u64()).collect();
        assert_eq!(values, [6457827717110365317, 3203168211198807973, 9817491932198370423]);
    }

    #[test]
    fn keyed_sequences_depend_on_each_number_and_its_place() {
        let keys = [[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [0, 1, 1]];
        let mut firsts = keys.map(|key| SplitMix64::keyed(key).next_u64()).to_vec();
        firsts.push(SplitMix64::keyed([0, 0]).next_u64());
        firsts.sort();
        firsts.dedup();
        assert_eq!(firsts.len(), 7);
    }

    #[test]
    fn uniform_numbers_lie_between_0_and_1() {
        let mut rng = SplitMix64::keyed([7]);
        let numbers: Vec<f64> = (0..100_000).map(|_| rng.uniform()).collect();
        assert!(numbers.iter().all(|x| (0. ..1.).contains(x)));
        let mean = numbers.iter().sum::<f64>() / 1e5;
        // The standard deviation of the mean is 0.0009.
        approx::assert_abs_diff_eq!(mean, 0.5, epsilon = 0.004);
    }

    #[test]
    fn orders_are_permutations_and_differ_by_seed_and_pass() {
        let orders = [(0, 0), (0, 1), (1, 0)].map(|(seed, pass)| permutation(1000, seed, pass));
        for order in &orders {
            let mut sorted = order.clone();
            sorted.sort();
            assert!(sorted.iter().enumerate().all(|(i, v)| i as i64 == *v));
        }
        assert!(orders[0] != orders[1] && orders[0] != orders[2] && orders[1] != orders[2]);
        assert_eq!(orders[1], permutation(1000, 0, 1));
        assert_eq!(permutation(0, 0, 0), Vec::<i64>::new());
    }

    #[test]
    fn every_place_is_equally_likely() {
        let mut counts = [[0u32; 5]; 5];
        for pass in 0..10_000 {
            for (place, value) in permutation(5, 7, pass).into_iter().enumerate() {
                counts[place][value as usize] += 1;
            }
        }
        // 2,000 are expected, with a standard deviation of 40.
        assert!(counts.iter().flatten().all(|n| (1800..2200).contains(n)), "{counts:?}");
    }
}
