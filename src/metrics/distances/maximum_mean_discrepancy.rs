use tch::Tensor;

use super::{alike, of_pair, same_shape, squared_distances};
use crate::error::{Error, Result};
use crate::metrics::MetricValue;
use crate::metrics::{Contribution, Of, Pairwise, Parts, Reduce};

/// The distance between the distributions of x and y by a Gaussian kernel: ignite's `MaximumMeanDiscrepancy`,
/// the square root of the mean over batches of E k(x, x') + E k(y, y') − 2 E k(x, y).
///
/// x and y are (N, …) of the same shape with N of at least 2, and are flattened to (N, D). `update` makes N × N
/// kernels; no host sync.
///
/// ```
/// use tch::Tensor;
/// use tch_ignite::metrics::{MaximumMeanDiscrepancy, Metric, pair};
/// let mut metric = MaximumMeanDiscrepancy::of(pair);
/// let (x, y) = (Tensor::from_slice2(&[[0.], [0.]]), Tensor::from_slice2(&[[900.], [900.]]));
/// metric.update(&(x, y))?;
/// assert!((metric.compute()?.read()? - 2f64.sqrt()).abs() < 1e-12);
/// # anyhow::Ok(())
/// ```
#[derive(Debug)]
pub struct MaximumMeanDiscrepancy {
    var: f64,
}

impl Default for MaximumMeanDiscrepancy {
    fn default() -> Self {
        Self { var: 1. }
    }
}

of_pair!(MaximumMeanDiscrepancy);

impl<F> Of<MaximumMeanDiscrepancy, F> {
    /// Sets the variance of the kernel, 1 unless given.
    pub fn var(self, var: f64) -> Self {
        self.with(|metric| metric.var = var)
    }
}

impl Pairwise for MaximumMeanDiscrepancy {
    const NAME: &'static str = "MaximumMeanDiscrepancy";

    fn parts(&self) -> Parts {
        &[("xx", Reduce::Sum), ("yy", Reduce::Sum), ("xy", Reduce::Sum)]
    }

    fn validate(&self) -> Result<()> {
        match self.var > 0. && self.var.is_finite() {
            true => Ok(()),
            false => Err(Error::invalid(format!(
                "Argument var should be finite and above 0, but given {}",
                self.var
            ))),
        }
    }

    fn batch(&mut self, y_pred: &Tensor, y: &Tensor) -> anyhow::Result<Contribution> {
        same_shape(y_pred, y, 2)?;
        let (x, y, samples) = alike(y_pred, y)?;
        anyhow::ensure!(samples > 1, "a batch must contain at least 2 samples, got {samples}");
        let (x, y, n) = (x.f_flatten(1, -1)?, y.f_flatten(1, -1)?, samples as f64);
        let kernels = |a: &Tensor, b: &Tensor| {
            squared_distances(a, b)?.f_mul_scalar(-0.5 / self.var)?.f_exp()?.f_sum(None)
        };
        let among = |a: &Tensor| kernels(a, a)?.f_sub_scalar(n)?.f_div_scalar(n * (n - 1.));
        let parts = [among(&x)?, among(&y)?, kernels(&x, &y)?.f_div_scalar(n * n)?];
        // Each batch counts as one sample, whatever its size.
        Ok(Contribution::new(parts, 1))
    }

    fn value(&self, parts: &[Tensor], samples: f64) -> anyhow::Result<MetricValue> {
        let [xx, yy, xy] = parts else { anyhow::bail!("three sums") };
        let squares = xx.f_add(yy)?.f_sub(&xy.f_mul_scalar(2.)?)?.f_clamp_min(0.)?;
        Ok(squares.f_div_scalar(samples)?.f_sqrt()?.into())
    }
}
