use tch::{Device, Kind, TchError, Tensor};

use super::{accumulator_kind, double, same_kind};
use crate::error::{Error, Result};
use crate::metrics::MetricValue;
use crate::metrics::{Contribution, Of, Pairwise, Parts, Reduce, References};

/// The mean structural similarity of images: ignite's `SSIM`.
///
/// `y_pred` and `y` have the same type and shape: (N, C, H, W), or (N, C, D, H, W) with [`ndims(3)`](Of::ndims). The
/// window is slid in the type of the images (f32 for integers), over images that are reflected at their borders and
/// must be larger than half of the window. `update` makes one grouped convolution of five images; no host sync.
///
/// ```
/// use tch::{Device, Kind, Tensor};
/// use tch_ignite::metrics::{Metric, SSIM, pair};
/// let mut metric = SSIM::of(1., pair);
/// let images = Tensor::rand([2, 3, 16, 16], (Kind::Double, Device::Cpu));
/// metric.update(&(images.copy(), images))?;
/// assert!((metric.compute()?.read()? - 1.).abs() < 1e-9);
/// # anyhow::Ok(())
/// ```
#[derive(Debug)]
pub struct SSIM {
    data_range: f64,
    kernel_size: Vec<i64>,
    sigma: Vec<f64>,
    k1: f64,
    k2: f64,
    gaussian: bool,
    ndims: usize,
}

impl SSIM {
    /// Makes the metric. `data_range` is the largest possible value minus the smallest: 1 for images in [0, 1], 255
    /// for bytes. `parts` takes `y_pred` and `y` out of the output.
    pub fn of<O, F>(data_range: f64, parts: F) -> Of<Self, References<F, O>>
    where
        F: for<'o> Fn(&'o O) -> (&'o Tensor, &'o Tensor),
    {
        let ssim = Self {
            data_range,
            kernel_size: vec![11],
            sigma: vec![1.5],
            k1: 0.01,
            k2: 0.03,
            gaussian: true,
            ndims: 2,
        };
        Of::new(ssim, parts)
    }

    fn sizes(&self) -> Vec<i64> {
        (0..self.ndims).map(|d| self.kernel_size[d % self.kernel_size.len()]).collect()
    }

    /// Makes the window, the product of one window for each dimension. It is computed on the device, because a copy
    /// would wait for the device.
    fn kernel(&self, device: Device) -> Result<Tensor, TchError> {
        let options = (accumulator_kind(device), device);
        let mut kernel = Tensor::f_ones([] as [i64; 0], options)?;
        for (dimension, size) in self.sizes().into_iter().enumerate() {
            let places = Tensor::f_arange(size, options)?.f_sub_scalar((size - 1) as f64 / 2.)?;
            let one = match self.gaussian {
                true => gaussian(&places, self.sigma[dimension % self.sigma.len()])?,
                // The window is 0.2 at up to five places in the middle.
                false => double(&places.f_abs()?.f_le(2.)?)?.f_div_scalar(5.)?,
            };
            kernel = kernel.f_unsqueeze(-1)?.f_mul(&one)?;
        }
        Ok(kernel)
    }

    /// Computes the similarity from the window's means of x, y, x², y² and x·y.
    fn similarity(&self, [x, y, xx, yy, xy]: [Tensor; 5]) -> Result<Tensor, TchError> {
        let (c1, c2) = ((self.k1 * self.data_range).powi(2), (self.k2 * self.data_range).powi(2));
        let (x_square, y_square, product) = (x.f_square()?, y.f_square()?, x.f_mul(&y)?);
        let squares = x_square.f_add(&y_square)?;
        let variances = xx.f_add(&yy)?.f_sub(&squares)?;
        let covariance = xy.f_sub(&product)?;
        let twice = |value: &Tensor, c: f64| value.f_mul_scalar(2.)?.f_add_scalar(c);
        let above = twice(&product, c1)?.f_mul(&twice(&covariance, c2)?)?;
        above.f_div(&squares.f_add_scalar(c1)?.f_mul(&variances.f_add_scalar(c2)?)?)
    }
}

impl<F> Of<SSIM, F> {
    /// Sets the size of the window, one for all dimensions or one for each, odd; 11 unless given.
    pub fn kernel_size(self, sizes: impl Into<Vec<i64>>) -> Self {
        self.with(|ssim| ssim.kernel_size = sizes.into())
    }

    /// Sets the width of the Gaussian window, one for all dimensions or one for each; 1.5 unless given.
    pub fn sigma(self, sigma: impl Into<Vec<f64>>) -> Self {
        self.with(|ssim| ssim.sigma = sigma.into())
    }

    /// Sets the first constant, 0.01 unless given.
    pub fn k1(self, k1: f64) -> Self {
        self.with(|ssim| ssim.k1 = k1)
    }

    /// Sets the second constant, 0.03 unless given.
    pub fn k2(self, k2: f64) -> Self {
        self.with(|ssim| ssim.k2 = k2)
    }

    /// Whether the window is Gaussian (the default) or, as ignite's other one, 0.2 at up to five places in the
    /// middle.
    pub fn gaussian(self, on: bool) -> Self {
        self.with(|ssim| ssim.gaussian = on)
    }

    /// Takes images (2, the default) or volumes (3).
    pub fn ndims(self, ndims: usize) -> Self {
        self.with(|ssim| ssim.ndims = ndims)
    }
}

fn gaussian(places: &Tensor, sigma: f64) -> Result<Tensor, TchError> {
    let values = places.f_div_scalar(sigma)?.f_square()?.f_mul_scalar(-0.5)?.f_exp()?;
    values.f_div(&values.f_sum(None)?)
}

impl Pairwise for SSIM {
    const NAME: &'static str = "SSIM";

    fn parts(&self) -> Parts {
        &[("sum", Reduce::Sum)]
    }

    fn validate(&self) -> Result<()> {
        let each = |given: usize| given == 1 || given == self.ndims;
        let refused = |text: String| Err(Error::invalid(text));
        if !(2..=3).contains(&self.ndims) {
            return refused(format!("Expected ndims to be 2 or 3. Got {}.", self.ndims));
        }
        if !each(self.kernel_size.len()) || !each(self.sigma.len()) {
            return refused(format!(
                "Expected kernel_size and sigma to have length of 1 or {}. Got {:?} and {:?}.",
                self.ndims, self.kernel_size, self.sigma
            ));
        }
        if self.kernel_size.iter().any(|size| size % 2 != 1) {
            return refused(format!(
                "Expected kernel_size to have odd positive number. Got {:?}.",
                self.kernel_size
            ));
        }
        for (name, value) in [("data_range", self.data_range), ("k1", self.k1), ("k2", self.k2)] {
            if !(value > 0. && value.is_finite()) {
                return refused(format!("Expected {name} to be finite and positive. Got {value}."));
            }
        }
        if !self.sigma.iter().all(|sigma| *sigma > 0. && sigma.is_finite()) {
            return refused(format!(
                "Expected sigma to have positive number. Got {:?}.",
                self.sigma
            ));
        }
        Ok(())
    }

    fn batch(&mut self, y_pred: &Tensor, y: &Tensor) -> anyhow::Result<Contribution> {
        same_kind(y_pred, y)?;
        let shape = y.size();
        anyhow::ensure!(
            y_pred.size() == shape && shape.len() == self.ndims + 2,
            "Expected y_pred and y to have BxCxHxW or BxCxDxHxW shape. Got y_pred: {:?} and y: {shape:?}.",
            y_pred.size()
        );
        let kind = if y.is_floating_point() { y.kind() } else { Kind::Float };
        let (images, channels) = (shape[0], shape[1]);
        let kernel = self.kernel(y.device())?.f_to_kind(kind)?;
        let window: Vec<_> = [channels, 1].into_iter().chain(kernel.size()).collect();
        let kernel = kernel.f_expand(&window, false)?;
        // `pad` takes the borders of the last dimension first.
        let borders = self.sizes().into_iter().rev().flat_map(|size| [(size - 1) / 2; 2]);
        let borders: Vec<_> = borders.collect();
        let pad = |images: &Tensor| images.f_to_kind(kind)?.f_pad(&borders, "reflect", None);
        let (x, y) = (pad(y_pred)?, pad(y)?);
        let products = [x.f_mul(&x)?, y.f_mul(&y)?, x.f_mul(&y)?];
        let [xx, yy, xy] = products;
        let all = Tensor::f_cat(&[x, y, xx, yy, xy], 0)?;
        let ones = vec![1i64; self.ndims];
        let none: Option<Tensor> = None;
        let zeros = vec![0i64; self.ndims];
        let means = match self.ndims {
            3 => all.f_conv3d(&kernel, none, &ones, &zeros, &ones, channels)?,
            _ => all.f_conv2d(&kernel, none, &ones, &zeros, &ones, channels)?,
        };
        let mean = |part: i64| means.f_narrow(0, part * images, images);
        let similarity = self.similarity([mean(0)?, mean(1)?, mean(2)?, mean(3)?, mean(4)?])?;
        let places: Vec<_> = (1..shape.len() as i64).collect();
        let sum = double(&similarity)?.f_mean_dim(&places[..], false, None)?.f_sum(None)?;
        Ok(Contribution::new([sum], images as u64))
    }

    fn value(&self, parts: &[Tensor], samples: f64) -> anyhow::Result<MetricValue> {
        Ok(parts[0].f_div_scalar(samples)?.into())
    }
}
