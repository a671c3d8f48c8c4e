use tch::Tensor;

use super::{columns, gathered, host, of_pair};
use crate::metrics::MetricValue;
use crate::metrics::{Contribution, Of, Pairwise, Parts};

/// Kendall's τ, how many pairs of samples y_pred and y order alike: ignite's `KendallRankCorrelation`.
///
/// `y_pred` and `y` are of floating point, (N,) or (N, 1). The metric keeps all samples on the device; `compute`
/// takes one host sync and sorts on the CPU, O(N log N). The value is NaN where all values are equal.
///
/// ```
/// use tch::Tensor;
/// use tch_ignite::metrics::{Metric, pair, regression::KendallRankCorrelation};
/// let mut metric = KendallRankCorrelation::of(pair);
/// let y_pred = Tensor::from_slice(&[1., 2., 3.]);
/// metric.update(&(y_pred, Tensor::from_slice(&[1., 3., 2.])))?;
/// assert!((metric.compute()?.read()? - 1. / 3.).abs() < 1e-12);
/// # anyhow::Ok(())
/// ```
#[derive(Debug, Default)]
pub struct KendallRankCorrelation {
    variant: KendallVariant,
}

of_pair!(KendallRankCorrelation);

/// The denominator of [`KendallRankCorrelation`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum KendallVariant {
    /// τ-b: the geometric mean of the numbers of pairs that are no ties in `y_pred`, and in `y`.
    #[default]
    B,
    /// τ-c: the largest possible number of pairs, by the smaller number of distinct values.
    C,
}

impl<F> Of<KendallRankCorrelation, F> {
    /// Sets the variant, τ-b unless given.
    pub fn variant(self, variant: KendallVariant) -> Self {
        self.with(|metric| metric.variant = variant)
    }
}

impl Pairwise for KendallRankCorrelation {
    const NAME: &'static str = "KendallRankCorrelation";

    fn parts(&self) -> Parts {
        gathered::PARTS
    }

    fn batch(&mut self, y_pred: &Tensor, y: &Tensor) -> anyhow::Result<Contribution> {
        let (y_pred, y, _) = columns(y_pred, y)?;
        gathered::gather(&y_pred, &y)
    }

    fn value(&self, parts: &[Tensor], _samples: f64) -> anyhow::Result<MetricValue> {
        let both = host::<f64>(&Tensor::f_stack(parts, 0)?)?;
        let (y_pred, y) = both.split_at(both.len() / 2);
        if both.iter().any(|value| value.is_nan()) {
            return Ok(f64::NAN.into());
        }
        // Adding 0 makes -0 the 0 that it equals, for the order too.
        let mut pairs: Vec<_> = y_pred.iter().zip(y).map(|(a, b)| (a + 0., b + 0.)).collect();
        Ok(tau(&mut pairs, self.variant).into())
    }
}

/// Computes τ with Knight's method: sorts by one value, then counts the exchanges that sort by the other.
fn tau(pairs: &mut [(f64, f64)], variant: KendallVariant) -> f64 {
    let n = pairs.len() as f64;
    let all = n * (n - 1.) / 2.;
    pairs.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.total_cmp(&b.1)));
    let (ties_x, distinct_x) = ties(pairs, |a, b| a.0 == b.0);
    let (ties_both, _) = ties(pairs, |a, b| a == b);
    let mut y: Vec<_> = pairs.iter().map(|pair| pair.1).collect();
    let discordant = exchanges(&mut y);
    let (ties_y, distinct_y) = ties(&y, |a, b| a == b);
    let surplus = all - ties_x - ties_y + ties_both - 2. * discordant;
    match variant {
        KendallVariant::B => surplus / (all - ties_x).sqrt() / (all - ties_y).sqrt(),
        KendallVariant::C => {
            let classes = distinct_x.min(distinct_y) as f64;
            2. * surplus / (n * n * (classes - 1.) / classes)
        }
    }
}

/// Counts the pairs of equal elements and the groups of equal elements in a sorted list.
fn ties<T>(sorted: &[T], equal: impl Fn(&T, &T) -> bool) -> (f64, usize) {
    let groups = sorted.chunk_by(equal).map(|group| group.len() as f64);
    let sizes: Vec<_> = groups.collect();
    (sizes.iter().map(|size| size * (size - 1.) / 2.).sum(), sizes.len())
}

/// Sorts the values, and counts the pairs that were in the wrong order.
fn exchanges(values: &mut [f64]) -> f64 {
    if values.len() < 2 {
        return 0.;
    }
    let (left, right) = values.split_at_mut(values.len() / 2);
    let mut count = exchanges(left) + exchanges(right);
    let mut merged = Vec::with_capacity(left.len() + right.len());
    let (mut i, mut j) = (0, 0);
    while i < left.len() && j < right.len() {
        if right[j] < left[i] {
            count += (left.len() - i) as f64;
            merged.push(right[j]);
            j += 1;
        } else {
            merged.push(left[i]);
            i += 1;
        }
    }
    merged.extend_from_slice(&left[i..]);
    merged.extend_from_slice(&right[j..]);
    values.copy_from_slice(&merged);
    count
}
