use std::ops::RangeInclusive;

use anyhow::{Result, ensure};
use tch::Tensor;

use super::{crop, resize, shape_of};
use crate::data::SplitMix64;

/// Returns a part of random size and shape, resized to `size`: torchvision's `RandomResizedCrop`.
///
/// The part has a share of the picture's area in `scale` (`0.08..=1.` in torchvision) and a width divided by height in
/// `ratio` (`3. / 4. ..=4. / 3.`). Where ten draws give none that fits, it is the largest one in the middle.
///
/// # Errors
/// Ranges that are not above 0 and finite, a size of 0, or a tensor that is no picture.
pub fn random_resized_crop(
    image: &Tensor,
    size: [i64; 2],
    scale: RangeInclusive<f64>,
    ratio: RangeInclusive<f64>,
    rng: &mut SplitMix64,
) -> Result<Tensor> {
    let [_, rows, columns] = shape_of(image)?;
    for (name, range) in [("scale", &scale), ("ratio", &ratio)] {
        ensure!(
            *range.start() > 0. && range.start() <= range.end() && range.end().is_finite(),
            "{name} needs a range of numbers above 0, the smaller one first, but {range:?} was given"
        );
    }
    let [top, left, height, width] = part(rows, columns, scale, ratio, rng);
    resize(&crop(image, top, left, [height, width])?, size)
}

/// Draws a part of a picture: its top, left, height and width.
fn part(
    rows: i64,
    columns: i64,
    scale: RangeInclusive<f64>,
    ratio: RangeInclusive<f64>,
    rng: &mut SplitMix64,
) -> [i64; 4] {
    let (area, logarithms) = ((rows * columns) as f64, ratio.start().ln()..=ratio.end().ln());
    let round = |length: f64| length.round_ties_even() as i64;
    for _ in 0..10 {
        let area = area * rng.within(&scale);
        let ratio = rng.within(&logarithms).exp();
        let (width, height) = (round((area * ratio).sqrt()), round((area / ratio).sqrt()));
        if (1..=columns).contains(&width) && (1..=rows).contains(&height) {
            let top = rng.below((rows - height + 1) as u64) as i64;
            let left = rng.below((columns - width + 1) as u64) as i64;
            return [top, left, height, width];
        }
    }
    let of_picture = columns as f64 / rows as f64;
    // A ratio far from the picture's would round an edge to 0.
    let (height, width) = if of_picture < *ratio.start() {
        (round(columns as f64 / ratio.start()).max(1), columns)
    } else if of_picture > *ratio.end() {
        (rows, round(rows as f64 * ratio.end()).max(1))
    } else {
        (rows, columns)
    };
    [(rows - height) / 2, (columns - width) / 2, height, width]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_have_the_area_and_shape_that_was_asked_for() {
        let mut rng = SplitMix64::new(3);
        let (mut smallest, mut largest) = (1f64, 0f64);
        for _ in 0..2000 {
            let [top, left, height, width] = part(100, 120, 0.2..=0.6, 0.5..=2., &mut rng);
            assert!(top >= 0 && left >= 0 && top + height <= 100 && left + width <= 120);
            let share = (height * width) as f64 / 12_000.;
            (smallest, largest) = (smallest.min(share), largest.max(share));
            let ratio = width as f64 / height as f64;
            assert!((0.48..2.08).contains(&ratio), "{ratio}");
        }
        assert!((0.19..0.22).contains(&smallest) && (0.58..0.62).contains(&largest));
    }

    /// The expected values are those of torchvision's rule, which comes into play as no draw can fit.
    #[test]
    fn pictures_without_a_fitting_part_give_their_middle() {
        let mut rng = SplitMix64::new(0);
        let mut middle = |rows, columns, ratio| part(rows, columns, 1.0..=1., ratio, &mut rng);
        assert_eq!(middle(10, 100, 0.75..=4. / 3.), [0, 43, 10, 13]);
        assert_eq!(middle(100, 10, 0.75..=4. / 3.), [43, 0, 13, 10]);
        assert_eq!(middle(100, 1, 50.0..=50.), [49, 0, 1, 1]);
    }
}
