use tch::Tensor;

use super::{alike, same_kind, same_shape};
use crate::error::{Error, Result};
use crate::metrics::MetricValue;
use crate::metrics::{Contribution, Of, Pairwise, Parts, Reduce, References};

/// The mean peak signal-to-noise ratio over samples, 10 log₁₀(data_range² / (mse + 1e-10)), in decibels:
/// ignite's `PSNR`.
///
/// `y_pred` and `y` have the same shape (N, …) and type. No host sync.
///
/// ```
/// use tch::Tensor;
/// use tch_ignite::metrics::{Metric, PSNR, pair};
/// let mut metric = PSNR::of(1., pair);
/// let y_pred = Tensor::from_slice2(&[[0.1, 0.1]]);
/// metric.update(&(y_pred, Tensor::from_slice2(&[[0., 0.]])))?;
/// assert!((metric.compute()?.read()? - 20.).abs() < 1e-6);
/// # anyhow::Ok(())
/// ```
#[derive(Debug)]
pub struct PSNR {
    data_range: f64,
}

impl PSNR {
    /// Makes the metric. `data_range` is the largest possible value minus the smallest: 1 for images in [0, 1], 255
    /// for bytes. `parts` takes `y_pred` and `y` out of the output.
    pub fn of<O, F>(data_range: f64, parts: F) -> Of<Self, References<F, O>>
    where
        F: for<'o> Fn(&'o O) -> (&'o Tensor, &'o Tensor),
    {
        Of::new(Self { data_range }, parts)
    }
}

impl Pairwise for PSNR {
    const NAME: &'static str = "PSNR";

    fn parts(&self) -> Parts {
        &[("sum", Reduce::Sum)]
    }

    fn validate(&self) -> Result<()> {
        match self.data_range > 0. && self.data_range.is_finite() {
            true => Ok(()),
            false => Err(Error::invalid(format!(
                "Argument data_range should be finite and above 0, but given {}",
                self.data_range
            ))),
        }
    }

    fn batch(&mut self, y_pred: &Tensor, y: &Tensor) -> anyhow::Result<Contribution> {
        same_shape(y_pred, y, 2)?;
        same_kind(y_pred, y)?;
        let (y_pred, y, samples) = alike(y_pred, y)?;
        let errors =
            y_pred.f_sub(&y)?.f_square()?.f_flatten(1, -1)?.f_mean_dim(1i64, false, None)?;
        let ratios =
            errors.f_add_scalar(1e-10)?.f_reciprocal()?.f_mul_scalar(self.data_range.powi(2))?;
        let sum = ratios.f_log10()?.f_mul_scalar(10.)?.f_sum(None)?;
        Ok(Contribution::new([sum], samples))
    }

    fn value(&self, parts: &[Tensor], samples: f64) -> anyhow::Result<MetricValue> {
        Ok(parts[0].f_div_scalar(samples)?.into())
    }
}
