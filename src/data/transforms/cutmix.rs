use anyhow::Result;
use tch::Tensor;

use super::mixup::{as_shares, beta, mix};
use super::shape_of;
use crate::data::SplitMix64;

/// Puts a rectangle of each picture's predecessor into it, and mixes their targets by the area (Yun et al. 2019,
/// "CutMix: Regularization Strategy to Train Strong Classifiers"): torchvision's `CutMix`.
///
/// The share of the area that stays is drawn from Beta(`alpha`, `alpha`), and the rectangle's place uniformly, once for
/// the batch. Inputs are pictures (N, C, H, W) of any kind; targets are as for [`mixup`](super::mixup).
///
/// # Errors
/// Inputs that are no pictures, targets that do not fit, or an `alpha` that is not from 0.001 to 1000.
pub fn cutmix(
    inputs: &Tensor,
    targets: &Tensor,
    num_classes: i64,
    alpha: f64,
    rng: &mut SplitMix64,
) -> Result<(Tensor, Tensor)> {
    let [_, height, width] = shape_of(inputs)?;
    let targets = as_shares("cutmix", inputs, targets, num_classes)?;
    let share = beta("cutmix", alpha, rng)?;
    let x = rng.below(width as u64) as i64;
    let y = rng.below(height as u64) as i64;
    let (inputs, share) = paste(inputs, share, x, y)?;
    Ok((inputs, mix(&targets, share)?))
}

/// Pastes the rectangle around this pixel, and returns the share of the area that stayed.
pub(super) fn paste(inputs: &Tensor, share: f64, x: i64, y: i64) -> Result<(Tensor, f64)> {
    let [_, height, width] = shape_of(inputs)?;
    let half = |length: i64| (0.5 * (1. - share).sqrt() * length as f64) as i64;
    let (half_width, half_height) = (half(width), half(height));
    let (left, top) = ((x - half_width).max(0), (y - half_height).max(0));
    let (columns, rows) = ((x + half_width).min(width) - left, (y + half_height).min(height) - top);
    let rectangle = |images: &Tensor| images.f_narrow(-2, top, rows)?.f_narrow(-1, left, columns);
    let mut output = inputs.f_empty_like()?;
    output.f_copy_(inputs)?;
    rectangle(&output)?.f_copy_(&rectangle(&inputs.f_roll([1], [0])?)?)?;
    Ok((output, 1. - (columns * rows) as f64 / (width * height) as f64))
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;

    /// torchvision's numbers: share, centre, and the rectangle's columns and rows with the share that stayed.
    #[test]
    fn rectangles_are_torchvisions() -> Result<()> {
        let inputs =
            Tensor::f_arange(2 * 9 * 12, (Kind::Int64, Device::Cpu))?.f_view([2, 1, 9, 12])?;
        for (share, x, y, columns, rows, stays) in [
            (0.3, 5, 2, 0..10, 0..5, 0.537037037037037),
            (0.9, 0, 8, 0..1, 7..9, 0.9814814814814815),
            (0.0, 11, 0, 5..12, 0..4, 0.7407407407407407),
            (0.5, 6, 4, 2..10, 1..7, 0.5555555555555556),
            (1.0, 3, 3, 3..3, 3..3, 1.),
        ] {
            let (output, found) = paste(&inputs, share, x, y)?;
            assert_eq!(found, stays);
            for row in 0..9 {
                for column in 0..12 {
                    let here = row * 12 + column;
                    let pasted = rows.contains(&row) && columns.contains(&column);
                    let expected = if pasted { 108 + here } else { here };
                    assert_eq!(output.int64_value(&[0, 0, row, column]), expected);
                    assert_eq!(output.int64_value(&[1, 0, row, column]), 108 + 2 * here - expected);
                }
            }
        }
        Ok(())
    }
}
