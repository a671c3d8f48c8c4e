use std::sync::Arc;

use tch::{Device, Kind, TchError, Tensor};

use crate::bridge::{Rows, normalize_rows};
use crate::error::{Error, Result};

/// `(x / 255 - mean) / std` in float, channel by channel, of images kept as bytes.
#[derive(Debug)]
pub(super) struct Normalize {
    /// What each byte becomes: 256 values a channel.
    tables: Arc<[f32]>,
    /// Shaped to go with a batch.
    mean: Tensor,
    std: Tensor,
}

impl Normalize {
    /// For images of this shape, samples first.
    pub(super) fn new(shape: &[i64], mean: &[f64], std: &[f64]) -> Result<Self> {
        if mean.is_empty() || mean.len() != std.len() {
            return Err(Error::invalid(format!(
                "mean and std need one value each, or one a channel; {} and {} were given",
                mean.len(),
                std.len()
            )));
        }
        let channels = mean.len() as i64;
        if channels > 1 && shape.get(1) != Some(&channels) {
            return Err(Error::invalid(format!(
                "{channels} values of mean and std need images of shape [samples, {channels}, …], but the shape is {shape:?}; give one value for all"
            )));
        }
        if let Some(bad) = mean.iter().find(|mean| !mean.is_finite()) {
            return Err(Error::invalid(format!("mean must be finite, but {bad} was given")));
        }
        if let Some(bad) = std.iter().find(|std| !(std.is_finite() && **std as f32 > 0.)) {
            return Err(Error::invalid(format!("std must be above 0, but {bad} was given")));
        }
        let make = || {
            let column = |values: &[f64]| {
                Tensor::f_from_slice(values)?.f_to_kind(Kind::Float)?.f_view([channels, 1])
            };
            let (mean, std) = (column(mean)?, column(std)?);
            let bytes = Tensor::f_arange(256, (Kind::Float, Device::Cpu))?;
            let tables = apply(&bytes.f_expand([channels, 256], false)?, &mean, &std)?;
            // Broadcasts over the batch's first dimension, and over those after the channels.
            let mut beside = vec![1; shape.len()];
            if let Some(dimension) = beside.get_mut(1) {
                *dimension = channels;
            }
            let tables = Vec::<f32>::try_from(tables.f_reshape(-1)?)?;
            Ok((tables.into(), mean.f_view(&*beside)?, std.f_view(&*beside)?))
        };
        let (tables, mean, std) =
            make().map_err(|error: TchError| Error::libtorch("normalize", error))?;
        Ok(Self { tables, mean, std })
    }

    /// Rows of contiguous bytes on the CPU, in one pass over them.
    pub(super) fn rows(&self, data: &Tensor, rows: Rows<'_>) -> Result<Tensor> {
        normalize_rows(data, rows, &self.tables)
            .map_err(|message| Error::libtorch("normalize", message))
    }

    /// The same for batches on this device.
    pub(super) fn on(&self, device: Device) -> Result<Self, TchError> {
        let (mean, std) = (self.mean.f_to_device(device)?, self.std.f_to_device(device)?);
        Ok(Self { tables: self.tables.clone(), mean, std })
    }

    /// A batch of bytes, with libtorch's operations.
    pub(super) fn batch(&self, bytes: &Tensor) -> Result<Tensor, TchError> {
        apply(&bytes.f_to_kind(Kind::Float)?, &self.mean, &self.std)
    }
}

impl Clone for Normalize {
    /// Shares everything.
    fn clone(&self) -> Self {
        let (mean, std) = (self.mean.shallow_clone(), self.std.shallow_clone());
        Self { tables: self.tables.clone(), mean, std }
    }
}

fn apply(values: &Tensor, mean: &Tensor, std: &Tensor) -> Result<Tensor, TchError> {
    values.f_div_scalar(255)?.f_sub(mean)?.f_div(std)
}
