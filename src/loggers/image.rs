use tch::{Device, Kind, Tensor};

use super::png;
use crate::error::{Error, Result};

/// A picture, as PNG.
#[derive(Debug, Clone)]
pub struct Image {
    pub(super) width: u32,
    pub(super) height: u32,
    pub(super) channels: u8,
    pub(super) png: Vec<u8>,
}

/// The space between the pictures of a grid, in pixels.
const GAP: i64 = 2;

fn libtorch(error: tch::TchError) -> Error {
    Error::libtorch("making a picture", error)
}

impl Image {
    /// A tensor of shape (H, W) or (C, H, W), C of 1 (grey), 3 (RGB) or 4 (RGBA): `u8`, or floating
    /// point from 0 (black) to 1. What lies outside is cut off, and NaN is black. Waits for the device.
    ///
    /// # Errors
    /// Another shape.
    pub fn from_tensor(pixels: &Tensor) -> Result<Self> {
        let shape = pixels.size();
        let (channels, height, width) = match shape[..] {
            [height, width] => (1, height, width),
            [channels @ (1 | 3 | 4), height, width] => (channels, height, width),
            _ => (0, 0, 0),
        };
        let side = |length: i64| u32::try_from(length).ok().filter(|length| *length > 0);
        let (Some(width), Some(height)) = (side(width), side(height)) else {
            return Err(Error::invalid(format!(
                "a picture has shape (H, W) or (C, H, W) with 1, 3 or 4 channels; given {shape:?}"
            )));
        };
        let bytes = || {
            let pixels = match pixels.kind() {
                Kind::Uint8 => pixels.f_detach()?,
                _ => (pixels.f_detach()?.f_to_kind(Kind::Float)?)
                    .f_nan_to_num(0., 1., 0.)?
                    .f_clamp(0., 1.)?
                    .f_mul_scalar(255.)?
                    .f_round()?
                    .f_to_kind(Kind::Uint8)?,
            };
            let rows = pixels.f_reshape([channels, height.into(), width.into()])?;
            let bytes = rows.f_permute([1, 2, 0])?.f_to_device(Device::Cpu)?.f_reshape([-1i64])?;
            Vec::<u8>::try_from(bytes.f_contiguous()?)
        };
        let bytes = bytes().map_err(libtorch)?;
        let channels = channels as u8;
        Ok(Self { width, height, channels, png: png::encode(width, height, channels, &bytes) })
    }

    /// Pictures of shape (N, C, H, W) side by side, so many in a row, as torchvision's `make_grid`.
    ///
    /// ```
    /// use tch::{Device, Kind, Tensor};
    /// use tch_ignite::loggers::Image;
    /// let digits = Tensor::rand([10, 1, 28, 28], (Kind::Float, Device::Cpu));
    /// let grid = Image::grid(&digits, 5)?;
    /// assert_eq!((grid.width(), grid.height()), (5 * 30 + 2, 2 * 30 + 2));
    /// # Ok::<(), tch_ignite::Error>(())
    /// ```
    ///
    /// # Errors
    /// Another shape, or no columns.
    pub fn grid(pictures: &Tensor, columns: u32) -> Result<Self> {
        let &[count, channels, height, width] = pictures.size().as_slice() else {
            return Err(Error::invalid(format!(
                "a grid is made of pictures of shape (N, C, H, W); given {:?}",
                pictures.size()
            )));
        };
        if columns == 0 || count == 0 {
            return Err(Error::invalid(format!(
                "a grid needs pictures and columns; given {count} and {columns}"
            )));
        }
        let columns = i64::from(columns).min(count);
        let rows = (count + columns - 1) / columns;
        let size = [channels, rows * (height + GAP) + GAP, columns * (width + GAP) + GAP];
        let grid = || {
            let pictures = pictures.f_detach()?;
            let grid = Tensor::f_zeros(size, (pictures.kind(), pictures.device()))?;
            for index in 0..count {
                let (row, column) = (index / columns, index % columns);
                grid.f_narrow(1, GAP + row * (height + GAP), height)?
                    .f_narrow(2, GAP + column * (width + GAP), width)?
                    .f_copy_(&pictures.f_get(index)?)?;
            }
            Ok(grid)
        };
        Self::from_tensor(&grid().map_err(libtorch)?)
    }

    /// In pixels.
    pub fn width(&self) -> u32 {
        self.width
    }

    /// In pixels.
    pub fn height(&self) -> u32 {
        self.height
    }

    /// The PNG file.
    pub fn png(&self) -> &[u8] {
        &self.png
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libtorch_reads_the_picture_back() -> anyhow::Result<()> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("picture.png");
        // More than one block of deflate.
        let pixels = Tensor::randint(256, [3, 150, 200], (Kind::Uint8, Device::Cpu));
        std::fs::write(&path, Image::from_tensor(&pixels)?.png())?;
        assert_eq!(tch::vision::image::load(&path)?, pixels);
        Ok(())
    }

    #[test]
    fn floats_are_cut_off_and_shapes_refused() -> anyhow::Result<()> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("picture.png");
        let pixels = Tensor::from_slice(&[-1., 0.5, 2., f64::NAN, f64::INFINITY, 1.]).view([2, 3]);
        std::fs::write(&path, Image::from_tensor(&pixels)?.png())?;
        let bytes = Vec::<u8>::try_from(tch::vision::image::load(&path)?.get(0).reshape([-1]))?;
        assert_eq!(bytes, [0, 128, 255, 0, 255, 255]);
        for shape in [&[2i64][..], &[2, 3, 4], &[0, 4], &[1, 1, 1, 1]] {
            let error = Image::from_tensor(&Tensor::zeros(shape, (Kind::Float, Device::Cpu)));
            assert!(error.unwrap_err().to_string().contains(&format!("{shape:?}")));
        }
        Ok(())
    }
}
