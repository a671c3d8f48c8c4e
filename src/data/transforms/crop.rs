use anyhow::{Result, ensure};
use tch::Tensor;

use super::{check_size, shape_of};
use crate::data::SplitMix64;

/// Adds a border of zeros: `[left, top, right, bottom]` pixels.
///
/// # Errors
/// A negative width of a border, or a tensor that is no picture.
pub fn pad(image: &Tensor, border: [i64; 4]) -> Result<Tensor> {
    shape_of(image)?;
    let [left, top, right, bottom] = border;
    ensure!(
        border.iter().all(|pixels| *pixels >= 0),
        "pad: a border cannot be negative, but {border:?} was given; crop cuts off"
    );
    if border == [0; 4] {
        return Ok(image.shallow_clone());
    }
    Ok(image.f_constant_pad_nd([left, right, top, bottom])?)
}

/// Returns the rectangle of this size whose upper left corner is at row `top`, column `left`; a view.
///
/// # Errors
/// A rectangle that is not within the picture.
pub fn crop(image: &Tensor, top: i64, left: i64, [height, width]: [i64; 2]) -> Result<Tensor> {
    let [_, rows, columns] = shape_of(image)?;
    check_size("crop", [height, width])?;
    ensure!(
        top >= 0
            && left >= 0
            && height <= rows - top.min(rows)
            && width <= columns - left.min(columns),
        "the crop of [{height}, {width}] at [{top}, {left}] is not within the picture of [{rows}, {columns}]"
    );
    Ok(image.f_narrow(-2, top, height)?.f_narrow(-1, left, width)?)
}

/// Returns the middle of a picture. Smaller pictures get a border of zeros first.
///
/// # Errors
/// A size of 0, or a tensor that is no picture.
pub fn center_crop(image: &Tensor, [height, width]: [i64; 2]) -> Result<Tensor> {
    let [_, rows, columns] = shape_of(image)?;
    check_size("center_crop", [height, width])?;
    let (across, down) = ((width - columns).max(0), (height - rows).max(0));
    let image = pad(image, [across / 2, down / 2, (across + 1) / 2, (down + 1) / 2])?;
    let middle = |length: i64, crop: i64| ((length - crop) as f64 / 2.).round_ties_even() as i64;
    let (top, left) = (middle(rows.max(height), height), middle(columns.max(width), width));
    crop(&image, top, left, [height, width])
}

/// Returns a part of this size at random, of the picture with a border of `padding` zeros on each side.
///
/// # Errors
/// A picture that is smaller than the part even with its border, or a size of 0.
pub fn random_crop(
    image: &Tensor,
    [height, width]: [i64; 2],
    padding: i64,
    rng: &mut SplitMix64,
) -> Result<Tensor> {
    let image = pad(image, [padding; 4])?;
    let [_, rows, columns] = shape_of(&image)?;
    check_size("random_crop", [height, width])?;
    ensure!(
        height <= rows && width <= columns,
        "random_crop needs pictures of at least [{height}, {width}], but with the padding of {padding} this one has [{rows}, {columns}]; pad more, or resize it first"
    );
    let top = rng.below((rows - height + 1) as u64) as i64;
    let left = rng.below((columns - width + 1) as u64) as i64;
    crop(&image, top, left, [height, width])
}
