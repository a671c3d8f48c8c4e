use tch::{Device, Kind, Tensor};

use crate::error::{Error, Result};

/// Number of bins of a histogram.
const BINS: i64 = 64;

/// A histogram of a tensor's values: 64 bins of equal width from the smallest to the largest value.
#[derive(Debug, Clone, PartialEq)]
pub struct Histogram {
    /// The smallest value; 0 if there is no value.
    pub min: f64,
    /// The largest value; 0 if there is no value.
    pub max: f64,
    /// Number of values. NaN and infinities are left out.
    pub count: u64,
    /// The sum of the values.
    pub sum: f64,
    /// The sum of the squares of the values.
    pub sum_squares: f64,
    /// The upper limit of each bin, and the number of values in it.
    pub bins: Vec<(f64, f64)>,
}

impl Histogram {
    /// Computes the histogram of all values of a tensor of any shape and numeric type. The values are counted and
    /// summed on the tensor's device, with two host syncs and as much additional memory as the tensor takes in f32 or
    /// f64.
    ///
    /// # Errors
    /// libtorch cannot compute the histogram.
    pub fn of(tensor: &Tensor) -> Result<Self> {
        Self::measure(tensor).map_err(|error| Error::libtorch("making a histogram", error))
    }

    fn measure(tensor: &Tensor) -> Result<Self, tch::TchError> {
        let _guard = tch::no_grad_guard();
        let kind = if tensor.f_kind()? == Kind::Double { Kind::Double } else { Kind::Float };
        let values = tensor.f_detach()?.f_to_kind(kind)?;
        let values = values.f_masked_select(&values.f_isfinite()?)?;
        let count = values.numel() as u64;
        if count == 0 {
            return Ok(Self { min: 0., max: 0., count, sum: 0., sum_squares: 0., bins: vec![] });
        }
        let double = |tensor: Tensor| tensor.f_to_kind(Kind::Double)?.f_reshape([-1i64]);
        let parts = [
            double(values.f_min()?)?,
            double(values.f_max()?)?,
            double(values.f_sum(Kind::Double)?)?,
            double(values.f_square()?.f_sum(Kind::Double)?)?,
            double(values.f_histc(BINS)?)?,
        ];
        let numbers = Tensor::f_cat(&parts, 0)?.f_to_device(Device::Cpu)?;
        let numbers = Vec::<f64>::try_from(numbers)?;
        let (min, max) = (numbers[0], numbers[1]);
        let limit = |bin: usize| match max > min {
            true => min + (max - min) * (bin + 1) as f64 / BINS as f64,
            // libtorch uses these limits where all values are equal.
            false => min - 1. + 2. * (bin + 1) as f64 / BINS as f64,
        };
        let bins = numbers[4..].iter().enumerate().map(|(bin, count)| (limit(bin), *count));
        let (sum, sum_squares) = (numbers[2], numbers[3]);
        Ok(Self { min, max, count, sum, sum_squares, bins: bins.collect() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_counted() -> anyhow::Result<()> {
        let values: Vec<f64> = (0..=640).map(|i| f64::from(i) / 10.).collect();
        let histogram = Histogram::of(&Tensor::from_slice(&values))?;
        assert_eq!((histogram.min, histogram.max, histogram.count), (0., 64., 641));
        approx::assert_abs_diff_eq!(histogram.sum, 20512., epsilon = 1e-6);
        assert_eq!(histogram.bins.len(), 64);
        assert_eq!(histogram.bins.iter().map(|(_, count)| count).sum::<f64>(), 641.);
        assert_eq!((histogram.bins[0], histogram.bins[63]), ((1., 10.), (64., 11.)));
        Ok(())
    }

    #[test]
    fn odd_tensors_have_histograms_too() -> anyhow::Result<()> {
        let odd = Tensor::from_slice(&[f64::NAN, 2., f64::INFINITY, 2.]);
        let histogram = Histogram::of(&odd)?;
        assert_eq!((histogram.count, histogram.min, histogram.max), (2, 2., 2.));
        let full = histogram.bins.iter().find(|(_, count)| *count > 0.);
        assert!(full.is_some_and(|(limit, count)| (1.9..2.1).contains(limit) && *count == 2.));
        assert_eq!(Histogram::of(&Tensor::zeros([0], (Kind::Half, Device::Cpu)))?.count, 0);
        assert_eq!(Histogram::of(&Tensor::from_slice(&[1i64, 2, 3]))?.sum, 6.);
        assert_eq!(Histogram::of(&Tensor::from_slice(&[true, false]))?.sum_squares, 1.);
        Ok(())
    }
}
