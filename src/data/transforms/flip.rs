use anyhow::{Result, ensure};
use tch::Tensor;

use super::shape_of;
use crate::data::SplitMix64;

/// Mirrors a picture, left to right.
///
/// # Errors
/// A tensor that is no picture.
pub fn horizontal_flip(image: &Tensor) -> Result<Tensor> {
    shape_of(image)?;
    Ok(image.f_flip([-1])?)
}

/// Mirrors a picture with probability `p`.
///
/// # Errors
/// A probability that is not between 0 and 1, or a tensor that is no picture.
pub fn random_horizontal_flip(image: &Tensor, p: f64, rng: &mut SplitMix64) -> Result<Tensor> {
    ensure!(
        (0. ..=1.).contains(&p),
        "random_horizontal_flip: p must be between 0 and 1, but {p} was given"
    );
    match rng.uniform() < p {
        true => horizontal_flip(image),
        false => Ok(image.shallow_clone()),
    }
}
