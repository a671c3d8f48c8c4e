use std::sync::Arc;

use tch::{Device, Kind, TchError, Tensor};

use crate::bridge::{Rows, normalize_rows};
use crate::error::{Error, Result};

/// Computes `(x / 255 - mean) / std` in f32, channel by channel, for images kept as bytes.
#[derive(Debug, Clone)]
pub(super) struct Normalize {
    /// The normalised value of each byte: 256 values a channel.
    tables: Arc<[f32]>,
    mean: Vec<f64>,
    std: Vec<f64>,
}

impl Normalize {
    /// Makes the tables. There is one value of mean and std for all, or one for each channel.
    pub(super) fn new(mean: &[f64], std: &[f64]) -> Result<Self> {
        if mean.is_empty() || mean.len() != std.len() {
            return Err(Error::invalid(format!(
                "mean and std need one value each, or one a channel; {} and {} were given",
                mean.len(),
                std.len()
            )));
        }
        if let Some(bad) = mean.iter().find(|mean| !(**mean as f32).is_finite()) {
            return Err(Error::invalid(format!(
                "mean must be finite in f32, but {bad:?} was given"
            )));
        }
        if let Some(bad) = std.iter().find(|std| !(**std as f32 > 0. && (**std as f32).is_finite()))
        {
            return Err(Error::invalid(format!(
                "std must be above 0 and finite in f32, but {bad:?} was given"
            )));
        }
        let channels = mean.len() as i64;
        let make = || {
            let (mean, std) = (values(mean, &[channels, 1])?, values(std, &[channels, 1])?);
            let bytes = Tensor::f_arange(256, (Kind::Float, Device::Cpu))?;
            let tables = apply(&bytes.f_expand([channels, 256], false)?, &mean, &std)?;
            Vec::<f32>::try_from(tables.f_reshape(-1)?)
        };
        let tables = make().map_err(|error: TchError| Error::libtorch("normalize", error))?;
        Ok(Self { tables: tables.into(), mean: mean.to_vec(), std: std.to_vec() })
    }

    /// Checks that these are bytes with the channels that there are values for, samples first.
    pub(super) fn check(&self, kind: Kind, shape: &[i64]) -> Result<()> {
        if kind != Kind::Uint8 {
            return Err(Error::invalid(format!(
                "normalize needs inputs of kind Uint8, but they are {kind:?}; normalise those once, before"
            )));
        }
        let channels = self.mean.len() as i64;
        if channels > 1 && shape.get(1) != Some(&channels) {
            return Err(Error::invalid(format!(
                "{channels} values of mean and std need images of shape [samples, {channels}, …], but the shape is {shape:?}; give one value for all"
            )));
        }
        Ok(())
    }

    /// Normalises rows of contiguous bytes on the CPU, in one pass over them.
    pub(super) fn rows(&self, data: &Tensor, rows: Rows<'_>) -> Result<Tensor> {
        normalize_rows(data, rows, &self.tables)
            .map_err(|message| Error::libtorch("normalize", message))
    }

    /// Normalises a whole batch of bytes on the CPU, in one pass over them.
    pub(super) fn batch(&self, bytes: &Tensor) -> Result<Tensor> {
        self.check(bytes.kind(), &bytes.size())?;
        let bytes = bytes.f_contiguous().map_err(|error| Error::libtorch("normalize", error))?;
        let samples = bytes.size().first().map_or(0, |samples| *samples as usize);
        self.rows(&bytes, Rows::Consecutive(0, samples))
    }

    /// Returns what normalises batches of this many dimensions on `device`.
    pub(super) fn on(&self, device: Device, dimensions: usize) -> Result<OnDevice, TchError> {
        // Mean and std are broadcast over the batch's first dimension, and over those after the channels.
        let mut beside = vec![1; dimensions];
        if let Some(dimension) = beside.get_mut(1) {
            *dimension = self.mean.len() as i64;
        }
        let put = |numbers| values(numbers, &beside)?.f_to_device(device);
        Ok(OnDevice { mean: put(&self.mean)?, std: put(&self.std)? })
    }
}

/// Mean and std on the device of the batches. Both have shape (1, C, 1, …), and C = 1 for one value for all.
#[derive(Debug)]
pub(super) struct OnDevice {
    mean: Tensor,
    std: Tensor,
}

impl OnDevice {
    /// Returns the number of dimensions of the batches that this normalises.
    pub(super) fn dimensions(&self) -> usize {
        self.mean.dim()
    }

    /// Normalises a batch of bytes with libtorch's operations.
    pub(super) fn batch(&self, bytes: &Tensor) -> Result<Tensor, TchError> {
        apply(&bytes.f_to_kind(Kind::Float)?, &self.mean, &self.std)
    }
}

/// Returns the numbers in f32, with this shape.
fn values(numbers: &[f64], shape: &[i64]) -> Result<Tensor, TchError> {
    Tensor::f_from_slice(numbers)?.f_to_kind(Kind::Float)?.f_view(shape)
}

fn apply(values: &Tensor, mean: &Tensor, std: &Tensor) -> Result<Tensor, TchError> {
    values.f_div_scalar(255)?.f_sub(mean)?.f_div(std)
}
