use tch::Tensor;

use super::{columns, of_pair};
use crate::metrics::MetricValue;
use crate::metrics::{Contribution, Of, Pairwise, Parts, Reduce};

/// Pearson's correlation of y_pred and y: ignite's `PearsonCorrelation`.
///
/// `y_pred` and `y` are of floating point, (N,) or (N, 1). No host sync.
///
/// ```
/// use tch::Tensor;
/// use tch_ignite::metrics::{Metric, pair, regression::PearsonCorrelation};
/// let mut metric = PearsonCorrelation::of(pair);
/// let y_pred = Tensor::from_slice(&[1., 2., 3.]);
/// metric.update(&(y_pred, Tensor::from_slice(&[2., 4., 6.])))?;
/// assert!((metric.compute()?.read()? - 1.).abs() < 1e-12);
/// # anyhow::Ok(())
/// ```
#[derive(Debug)]
pub struct PearsonCorrelation {
    eps: f64,
}

impl Default for PearsonCorrelation {
    fn default() -> Self {
        Self { eps: 1e-8 }
    }
}

of_pair!(PearsonCorrelation);

impl<F> Of<PearsonCorrelation, F> {
    /// The least product of standard deviations to divide by, 1e-8 unless given.
    pub fn eps(self, eps: f64) -> Self {
        self.with(|metric| metric.eps = eps)
    }
}

impl Pairwise for PearsonCorrelation {
    const NAME: &'static str = "PearsonCorrelation";

    fn parts(&self) -> Parts {
        &[
            ("y_pred", Reduce::Sum),
            ("y", Reduce::Sum),
            ("y_pred_squares", Reduce::Sum),
            ("y_squares", Reduce::Sum),
            ("products", Reduce::Sum),
        ]
    }

    fn batch(&mut self, y_pred: &Tensor, y: &Tensor) -> anyhow::Result<Contribution> {
        let (y_pred, y, samples) = columns(y_pred, y)?;
        let sum = |values: &Tensor| values.f_sum(None);
        let squares = [sum(&y_pred.f_square()?)?, sum(&y.f_square()?)?];
        let [y_pred_squares, y_squares] = squares;
        let products = sum(&y_pred.f_mul(&y)?)?;
        let parts = [sum(&y_pred)?, sum(&y)?, y_pred_squares, y_squares, products];
        Ok(Contribution::new(parts, samples))
    }

    fn value(&self, parts: &[Tensor], samples: f64) -> anyhow::Result<MetricValue> {
        let [y_pred, y, y_pred_squares, y_squares, products] = parts else {
            anyhow::bail!("five sums")
        };
        let mean = |sum: &Tensor| sum.f_div_scalar(samples);
        let variance = |squares: &Tensor, sum: &Tensor| {
            mean(squares)?.f_sub(&mean(sum)?.f_square()?)?.f_clamp_min(0.)
        };
        let covariance =
            mean(products)?.f_sub(&y_pred.f_mul(y)?.f_div_scalar(samples * samples)?)?;
        let variances = variance(y_pred_squares, y_pred)?.f_mul(&variance(y_squares, y)?)?;
        Ok(covariance.f_div(&variances.f_sqrt()?.f_clamp_min(self.eps)?)?.into())
    }
}
