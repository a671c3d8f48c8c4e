//! The data set MNIST-1D (Greydanus and Kobak 2024, <https://arxiv.org/abs/2011.14439>): ten curves of 12 points, each
//! padded, stretched, scaled, moved, covered with noise, tilted, and sampled at 40 points.
//!
//! The random numbers are NumPy's, so that seed 42 gives the authors' own 5,000 samples.

use tch::Tensor;

/// The curves of the digits 0 to 9, before they are standardised.
const TEMPLATES: [[f64; 12]; 10] = [
    [5., 6., 6.5, 6.75, 7., 7., 7., 7., 6.75, 6.5, 6., 5.],
    [5., 3., 3., 3.4, 3.8, 4.2, 4.6, 5., 5.4, 5.8, 5., 5.],
    [5., 6., 6.5, 6.5, 6., 5.25, 4.75, 4., 3.5, 3.5, 4., 5.],
    [5., 6., 6.5, 6.5, 6., 5., 5., 6., 6.5, 6.5, 6., 5.],
    [5., 4.4, 3.8, 3.2, 2.6, 2.6, 5., 5., 5., 5., 5., 5.],
    [5., 3., 3., 3., 3., 5., 6., 6.5, 6.5, 6., 4.5, 5.],
    [5., 4., 3.5, 3.25, 3., 3., 3., 3., 3.25, 3.5, 4., 5.],
    [5., 7., 7., 6.6, 6.2, 5.8, 5.4, 5., 4.6, 4.2, 5., 5.],
    [5., 4., 3.5, 3.5, 4., 5., 5., 4., 3.5, 3.5, 4., 5.],
    [5., 4., 3.5, 3.5, 4., 5., 5., 5., 5., 4.7, 4.3, 5.],
];
/// The number of points that a sample has at the end.
pub const POINTS: usize = 40;
/// The number of points that a curve has while it is changed.
const LENGTH: usize = 72;
const SHORTEST_PADDING: usize = 36;
const LONGEST_PADDING: usize = 60;
const SCALE: f64 = 0.4;
const TRANSLATIONS: u32 = 48;
const CORRELATED_NOISE: f64 = 0.25;
const NOISE: f64 = 0.02;
const SHEAR: f64 = 0.75;

/// The samples, f64 of shape (n, 40), and their digits, i64 of shape (n): four fifths to train with, the rest to test.
pub struct Mnist1d {
    pub train: (Tensor, Tensor),
    pub test: (Tensor, Tensor),
}

impl Mnist1d {
    /// Makes the data set. The authors' has 5,000 samples of seed 42.
    pub fn new(samples: usize, seed: u32) -> Self {
        let mut rng = RandomState::new(seed);
        let mut made = vec![];
        for (digit, template) in (0i64..).zip(&TEMPLATES) {
            let curve = standardised(template);
            made.extend((0..samples / 10).map(|_| (sample(&curve, &mut rng), digit)));
        }
        let order = rng.permutation(made.len());
        let rows: Vec<f64> = order.iter().flat_map(|row| made[*row].0.clone()).collect();
        let digits: Vec<i64> = order.iter().map(|row| made[*row].1).collect();
        let x = Tensor::from_slice(&rows).view([-1, POINTS as i64]);
        let (x, y) = ((&x - x.mean(None)) / x.std(false), Tensor::from_slice(&digits));
        let (all, train) = (made.len() as i64, made.len() as i64 * 4 / 5);
        let part = |from, to| (x.narrow(0, from, to - from), y.narrow(0, from, to - from));
        Self { train: part(0, train), test: part(train, all) }
    }
}

/// The curve with mean 0 and deviation 1/6, moved so that it starts at 0.
fn standardised(template: &[f64]) -> Vec<f64> {
    let count = template.len() as f64;
    let mean = template.iter().sum::<f64>() / count;
    let std = (template.iter().map(|y| (y - mean).powi(2)).sum::<f64>() / count).sqrt();
    template.iter().map(|y| ((y - mean) / std - (template[0] - mean) / std) / 6.).collect()
}

fn sample(curve: &[f64], rng: &mut RandomState) -> Vec<f64> {
    let choices = (LONGEST_PADDING - SHORTEST_PADDING + 1) as f64;
    let padding = SHORTEST_PADDING + (rng.uniform() * choices) as usize;
    // A hair is added to the curve, so that its zeros can be told from padding.
    let mut padded: Vec<f64> = curve.iter().map(|y| y + 1e-8).collect();
    padded.resize(curve.len() + padding, 0.);
    let scale = 1. + SCALE * (rng.uniform() - 0.5);
    let mut y: Vec<f64> = interpolate(&padded, LENGTH).iter().map(|y| y * scale).collect();
    y.rotate_right(rng.below(TRANSLATIONS) as usize);

    let smooth = smoothed(&rng.normals(LENGTH, CORRELATED_NOISE));
    let noise = rng.normals(LENGTH, NOISE);
    let tilt = SHEAR * (rng.uniform() - 0.5);
    for (i, y) in y.iter_mut().enumerate() {
        let signal = if *y == 0. { smooth[i] } else { *y };
        *y = signal + noise[i] - tilt * (i as f64 / (LENGTH - 1) as f64 - 0.5);
    }
    interpolate(&y, POINTS)
}

/// Reads the curve at `count` places, the same distance apart, on the straight lines between its points.
fn interpolate(y: &[f64], count: usize) -> Vec<f64> {
    // NumPy's roundings: they decide whether a place at the end of the curve is padding.
    let (step, new_step) = (1. / (y.len() - 1) as f64, 1. / (count - 1) as f64);
    let place = |i: usize| if i == y.len() - 1 { 1. } else { i as f64 * step };
    let mut left = 0;
    let read = |i: usize| {
        let x = if i == count - 1 { 1. } else { i as f64 * new_step };
        while left + 1 < y.len() && place(left + 1) <= x {
            left += 1;
        }
        if left == y.len() - 1 || place(left) == x {
            return y[left];
        }
        let slope = (y[left + 1] - y[left]) / (place(left + 1) - place(left));
        slope * (x - place(left)) + y[left]
    };
    (0..count).map(read).collect()
}

/// A Gaussian filter of deviation 2 over 8 points to each side; beyond its ends the curve is mirrored.
fn smoothed(y: &[f64]) -> Vec<f64> {
    let weights: Vec<f64> = (-8..=8).map(|at| (-f64::from(at * at) / 8.).exp()).collect();
    let total: f64 = weights.iter().sum();
    let mirrored = |at: isize| match usize::try_from(at) {
        Err(_) => y[(-at - 1) as usize],
        Ok(at) if at >= y.len() => y[2 * y.len() - 1 - at],
        Ok(at) => y[at],
    };
    let point = |i: isize| {
        let terms = (i - 8..).zip(&weights).map(|(at, weight)| weight / total * mirrored(at));
        terms.sum()
    };
    (0..y.len() as isize).map(point).collect()
}

/// NumPy's `RandomState`: the Mersenne Twister MT19937 (Matsumoto and Nishimura 1998), and NumPy's ways to draw from it.
struct RandomState {
    words: Vec<u32>,
    next: usize,
}

impl RandomState {
    fn new(seed: u32) -> Self {
        let mut words = vec![seed];
        for i in 1..624 {
            let last = words[i - 1];
            words.push((last ^ (last >> 30)).wrapping_mul(1_812_433_253).wrapping_add(i as u32));
        }
        Self { words, next: 624 }
    }

    fn bits(&mut self) -> u32 {
        if self.next == 624 {
            for i in 0..624 {
                let bits =
                    (self.words[i] & 0x8000_0000) | (self.words[(i + 1) % 624] & 0x7fff_ffff);
                let odd = if bits % 2 == 1 { 0x9908_b0df } else { 0 };
                self.words[i] = self.words[(i + 397) % 624] ^ (bits >> 1) ^ odd;
            }
            self.next = 0;
        }
        let mut y = self.words[self.next];
        self.next += 1;
        y ^= y >> 11;
        y ^= (y << 7) & 0x9d2c_5680;
        y ^= (y << 15) & 0xefc6_0000;
        y ^ (y >> 18)
    }

    /// A number in [0, 1), of 53 bits.
    fn uniform(&mut self) -> f64 {
        let (high, low) = (self.bits() >> 5, self.bits() >> 6);
        (f64::from(high) * 67_108_864. + f64::from(low)) / 9_007_199_254_740_992.
    }

    /// A whole number below `bound`: of as many bits as needed, drawn until it is below.
    fn below(&mut self, bound: u32) -> u32 {
        let mask = bound.next_power_of_two() - 1;
        loop {
            let value = self.bits() & mask;
            if value < bound {
                return value;
            }
        }
    }

    /// An even count of normal numbers times `scale`, two at a time by Marsaglia's polar method.
    fn normals(&mut self, count: usize, scale: f64) -> Vec<f64> {
        let mut drawn = vec![];
        while drawn.len() < count {
            let (x, y) = (2. * self.uniform() - 1., 2. * self.uniform() - 1.);
            let r2 = x * x + y * y;
            if r2 < 1. && r2 != 0. {
                let factor = (-2. * r2.ln() / r2).sqrt();
                drawn.extend([scale * (factor * y), scale * (factor * x)]);
            }
        }
        drawn
    }

    fn permutation(&mut self, len: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..len).collect();
        for i in (1..len).rev() {
            order.swap(i, self.below(i as u32 + 1) as usize);
        }
        order
    }
}
