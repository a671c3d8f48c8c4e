use tch::{Kind, TchError, Tensor};

use super::{double, of_pair, squared_distances};
use crate::error::{Error, Result};
use crate::metrics::MetricValue;
use crate::metrics::{Contribution, Of, Pairwise, Parts, Reduce};

/// How much x and y depend on each other: ignite's `HSIC`, the mean over batches of the unbiased
/// Hilbert-Schmidt independence criterion (Song and others, 2012) with Gaussian kernels.
///
/// x and y are (N, …) with the same N, and are flattened. Batches of fewer than 4 samples are left out, or are an
/// error with [`ignore_invalid_batch(false)`](Of::ignore_invalid_batch). `update` makes N × N kernels; no host
/// sync.
///
/// ```
/// use tch::{Kind, Device, Tensor};
/// use tch_ignite::metrics::{HSIC, Metric, pair};
/// let mut metric = HSIC::of(pair).sigma_x(1.).sigma_y(1.);
/// let x = Tensor::arange(8, (Kind::Double, Device::Cpu)).unsqueeze(1);
/// metric.update(&(x.copy(), x * 2.))?;
/// assert!(metric.compute()?.read()? > 0.);
/// # anyhow::Ok(())
/// ```
#[derive(Debug)]
pub struct HSIC {
    sigma_x: Option<f64>,
    sigma_y: Option<f64>,
    ignore_invalid_batch: bool,
}

impl Default for HSIC {
    fn default() -> Self {
        Self { sigma_x: None, sigma_y: None, ignore_invalid_batch: true }
    }
}

of_pair!(HSIC);

impl<F> Of<HSIC, F> {
    /// Sets the width of the kernel of x; unless given, the square of the width is the median squared distance.
    pub fn sigma_x(self, sigma: impl Into<Option<f64>>) -> Self {
        self.with(|metric| metric.sigma_x = sigma.into())
    }

    /// Sets the width of the kernel of y; unless given, the square of the width is the median squared distance.
    pub fn sigma_y(self, sigma: impl Into<Option<f64>>) -> Self {
        self.with(|metric| metric.sigma_y = sigma.into())
    }

    /// Whether batches of fewer than 4 samples are left out (the default) or an error.
    pub fn ignore_invalid_batch(self, on: bool) -> Self {
        self.with(|metric| metric.ignore_invalid_batch = on)
    }
}

impl Pairwise for HSIC {
    const NAME: &'static str = "HSIC";

    fn parts(&self) -> Parts {
        &[("sum", Reduce::Sum)]
    }

    fn validate(&self) -> Result<()> {
        for (name, sigma) in [("sigma_x", self.sigma_x), ("sigma_y", self.sigma_y)] {
            if sigma.is_some_and(|sigma| !(sigma > 0. && sigma.is_finite())) {
                return Err(Error::invalid(format!(
                    "Argument {name} should be finite and above 0, but given {sigma:?}"
                )));
            }
        }
        Ok(())
    }

    fn batch(&mut self, y_pred: &Tensor, y: &Tensor) -> anyhow::Result<Contribution> {
        anyhow::ensure!(
            y_pred.dim() > 1 && y.dim() > 1 && y_pred.size()[0] == y.size()[0],
            "x and y must be (N, …) with the same N, got {:?} and {:?}",
            y_pred.size(),
            y.size()
        );
        let samples = y.size()[0];
        if samples < 4 {
            anyhow::ensure!(
                self.ignore_invalid_batch,
                "A batch must contain at least four samples, got only {samples} samples."
            );
            return Ok(Contribution::default());
        }
        let n = samples as f64;
        let (k, l) = (kernel(y_pred, self.sigma_x)?, kernel(y, self.sigma_y)?);
        let both = k.f_matmul(&l)?;
        let second = k.f_sum(None)?.f_mul(&l.f_sum(None)?)?.f_div_scalar((n - 1.) * (n - 2.))?;
        let third = both.f_sum(None)?.f_mul_scalar(2. / (n - 2.))?;
        let hsic = both.f_trace()?.f_add(&second)?.f_sub(&third)?.f_div_scalar(n * (n - 3.))?;
        // Each batch counts as one sample, whatever its size.
        Ok(Contribution::new([hsic.f_clamp_min(0.)?], 1))
    }

    fn value(&self, parts: &[Tensor], samples: f64) -> anyhow::Result<MetricValue> {
        Ok(parts[0].f_div_scalar(samples)?.into())
    }
}

/// Computes the kernel of all pairs of samples, with 0 for a sample and itself.
fn kernel(samples: &Tensor, sigma: Option<f64>) -> Result<Tensor, TchError> {
    let samples = double(samples)?.f_flatten(1, -1)?;
    let distances = squared_distances(&samples, &samples)?;
    let scaled = match sigma {
        Some(sigma) => distances.f_div_scalar(sigma * sigma)?,
        None => distances.f_div(&distances.f_quantile_scalar(0.5, None, false, "linear")?)?,
    };
    let kernel = scaled.f_mul_scalar(-0.5)?.f_exp()?;
    let itself = Tensor::f_eye(kernel.size()[0], (Kind::Bool, kernel.device()))?;
    kernel.f_masked_fill(&itself, 0.)
}
