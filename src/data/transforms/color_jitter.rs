use anyhow::{Result, ensure};
use tch::Tensor;

use super::{adjust_brightness, adjust_contrast, adjust_hue, adjust_saturation};
use crate::data::SplitMix64;

/// Changes brightness, contrast, saturation and hue at random, in random order: torchvision's `ColorJitter`.
///
/// Each is off at 0, the default. Pictures are bytes, or floats from 0 to 1, of 1 or 3 channels.
///
/// ```
/// # use tch::{Device, Kind, Tensor};
/// use tch_ignite::data::{SplitMix64, transforms::ColorJitter};
/// # let picture = Tensor::zeros([3, 4, 4], (Kind::Uint8, Device::Cpu));
/// let jitter = ColorJitter::new().brightness(0.4).hue(0.1);
/// let picture = jitter.apply(&picture, &mut SplitMix64::new(0))?;
/// # anyhow::Ok(())
/// ```
#[derive(Debug, Clone, Default)]
pub struct ColorJitter {
    brightness: f64,
    contrast: f64,
    saturation: f64,
    hue: f64,
}

impl ColorJitter {
    /// Makes a jitter that changes nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Draws the factor of [`adjust_brightness`] from `1 - by` (at least 0) to `1 + by`.
    pub fn brightness(mut self, by: f64) -> Self {
        self.brightness = by;
        self
    }

    /// Draws the factor of [`adjust_contrast`] from `1 - by` (at least 0) to `1 + by`.
    pub fn contrast(mut self, by: f64) -> Self {
        self.contrast = by;
        self
    }

    /// Draws the factor of [`adjust_saturation`] from `1 - by` (at least 0) to `1 + by`.
    pub fn saturation(mut self, by: f64) -> Self {
        self.saturation = by;
        self
    }

    /// Draws the factor of [`adjust_hue`] from `-by` to `by`, which is at most 0.5.
    pub fn hue(mut self, by: f64) -> Self {
        self.hue = by;
        self
    }

    /// Changes a picture.
    ///
    /// # Errors
    /// Wrong arguments of this jitter, or a tensor that is no picture of bytes or floats with 1 or 3 channels.
    pub fn apply(&self, image: &Tensor, rng: &mut SplitMix64) -> Result<Tensor> {
        let Self { brightness, contrast, saturation, hue } = *self;
        for (name, by, most, bound) in [
            ("brightness", brightness, f64::MAX, "finite"),
            ("contrast", contrast, f64::MAX, "finite"),
            ("saturation", saturation, f64::MAX, "finite"),
            ("hue", hue, 0.5, "at most 0.5"),
        ] {
            ensure!(
                (0. ..=most).contains(&by),
                "ColorJitter: {name} must be at least 0 and {bound}, but {by} was given"
            );
        }
        let mut image = image.shallow_clone();
        let mut order = [0, 1, 2, 3];
        for place in (1..order.len()).rev() {
            order.swap(place, rng.below(place as u64 + 1) as usize);
        }
        let mut factor = |by: f64| rng.within(&((1. - by).max(0.)..=1. + by));
        for which in order {
            image = match which {
                0 if brightness > 0. => adjust_brightness(&image, factor(brightness))?,
                1 if contrast > 0. => adjust_contrast(&image, factor(contrast))?,
                2 if saturation > 0. => adjust_saturation(&image, factor(saturation))?,
                3 if hue > 0. => adjust_hue(&image, factor(1.).mul_add(hue, -hue))?,
                _ => image,
            };
        }
        Ok(image)
    }
}
