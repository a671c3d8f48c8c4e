use anyhow::{Result, ensure};
use tch::{Kind, Tensor};

use super::shape_of;

/// Multiplies all values by `factor`, within the range of pictures.
///
/// # Errors
/// A negative factor, or a tensor that is no picture of bytes or floats with 1 or 3 channels.
pub fn adjust_brightness(image: &Tensor, factor: f64) -> Result<Tensor> {
    check(image, "brightness", factor)?;
    within_range(image.f_mul_scalar(factor)?, image.kind())
}

/// Multiplies the distance of all values to the picture's mean by `factor`: 0 gives gray, 1 the picture.
///
/// # Errors
/// A negative factor, or a tensor that is no picture of bytes or floats with 1 or 3 channels.
pub fn adjust_contrast(image: &Tensor, factor: f64) -> Result<Tensor> {
    check(image, "contrast", factor)?;
    let mean = gray(image)?.f_mean_dim(&[-3i64, -2, -1][..], true, None::<Kind>)?;
    blend(image, &mean, factor)
}

/// Multiplies the distance of all values to the pixel's gray by `factor`: 0 gives a picture without colours, 1 the
/// picture. Pictures of one channel stay as they are.
///
/// # Errors
/// A negative factor, or a tensor that is no picture of bytes or floats with 1 or 3 channels.
pub fn adjust_saturation(image: &Tensor, factor: f64) -> Result<Tensor> {
    match check(image, "saturation", factor)? {
        1 => Ok(image.shallow_clone()),
        _ => blend(image, &gray(image)?, factor),
    }
}

/// Turns the colours by `factor` of the colour circle, from -0.5 to 0.5. Pictures of one channel stay as they are.
///
/// On another device than the CPU, a table of 18 numbers is copied there.
///
/// # Errors
/// Another factor, or a tensor that is no picture of bytes or floats with 1 or 3 channels.
pub fn adjust_hue(image: &Tensor, factor: f64) -> Result<Tensor> {
    ensure!(
        (-0.5..=0.5).contains(&factor),
        "the factor of hue must be between -0.5 and 0.5, but {factor} was given"
    );
    if check(image, "hue", 0.)? == 1 {
        return Ok(image.shallow_clone());
    }
    let is_bytes = image.kind() == Kind::Uint8;
    let rgb = match is_bytes {
        true => image.f_to_kind(Kind::Float)?.f_mul_scalar(1. / 255.)?,
        false => image.f_to_kind(Kind::Float)?,
    };
    let [hue, saturation, value] = hsv_of_rgb(&rgb)?;
    let hue = hue.f_add_scalar(factor)?.f_remainder(1.)?;
    let rgb = rgb_of_hsv(&hue, &saturation, &value)?;
    Ok(match is_bytes {
        true => rgb.f_mul_scalar(255. + 1. - 1e-3)?.f_to_kind(Kind::Uint8)?,
        false => rgb.f_to_kind(image.kind())?,
    })
}

/// Checks picture and factor, and returns the number of channels.
fn check(image: &Tensor, name: &str, factor: f64) -> Result<i64> {
    let [channels, ..] = shape_of(image)?;
    let kind = image.kind();
    ensure!(
        factor >= 0. && factor.is_finite(),
        "the factor of {name} must be at least 0 and finite, but {factor} was given"
    );
    ensure!(
        channels == 1 || channels == 3,
        "{name} needs a picture of 1 or 3 channels, but it has {channels}"
    );
    ensure!(
        matches!(kind, Kind::Uint8 | Kind::Float | Kind::Double | Kind::Half | Kind::BFloat16),
        "{name} needs a picture of bytes (Uint8), or of floats from 0 to 1, but its kind is {kind:?}"
    );
    Ok(channels)
}

/// Returns values that were computed in floats as values of a picture of this kind.
fn within_range(values: Tensor, kind: Kind) -> Result<Tensor> {
    let largest = if kind == Kind::Uint8 { 255. } else { 1. };
    Ok(values.f_clamp(0., largest)?.f_to_kind(kind)?)
}

/// Returns `first * factor + second * (1 - factor)`.
fn blend(first: &Tensor, second: &Tensor, factor: f64) -> Result<Tensor> {
    let kind = first.kind();
    let sum = add_times(&first.f_mul_scalar(factor)?, second, 1. - factor)?;
    within_range(sum, kind)
}

/// Returns the gray of each pixel, in floats; whole numbers for bytes.
fn gray(image: &Tensor) -> Result<Tensor> {
    let is_bytes = image.kind() == Kind::Uint8;
    let floats = if is_bytes { image.f_to_kind(Kind::Float)? } else { image.shallow_clone() };
    if image.size().iter().nth_back(2) == Some(&1) {
        return Ok(floats);
    }
    let channel = |place| floats.f_narrow(-3, place, 1);
    let gray = channel(0)?.f_mul_scalar(0.2989)?;
    let gray = add_times(&add_times(&gray, &channel(1)?, 0.587)?, &channel(2)?, 0.114)?;
    Ok(if is_bytes { gray.f_floor()? } else { gray })
}

/// Returns `sum + values * factor`, with the one rounding that torchvision's operation has.
fn add_times(sum: &Tensor, values: &Tensor, factor: f64) -> Result<Tensor> {
    let factor = Tensor::f_full([], factor, (sum.kind(), sum.device()))?;
    Ok(sum.f_addcmul(values, &factor)?)
}

/// Returns hue, saturation and value of each pixel, all from 0 to 1 (Smith 1978, "Color gamut transform pairs").
fn hsv_of_rgb(rgb: &Tensor) -> Result<[Tensor; 3]> {
    let (red, green) = (rgb.f_select(-3, 0)?, rgb.f_select(-3, 1)?);
    let (min, max) = rgb.f_aminmax(-3, false)?;
    let (range, is_gray, ones) = (max.f_sub(&min)?, max.f_eq_tensor(&min)?, max.f_ones_like()?);
    let saturation = range.f_div(&ones.f_where_self(&is_gray, &max)?)?;
    // Each distance is from the channel to the largest one, in parts of the range.
    let divisor = ones.f_where_self(&is_gray, &range)?.f_unsqueeze(-3)?;
    let distances = max.f_unsqueeze(-3)?.f_sub(rgb)?.f_div(&divisor)?;
    let distance = |channel| distances.f_select(-3, channel);
    let (from_red, from_green, from_blue) = (distance(0)?, distance(1)?, distance(2)?);
    let is_red = max.f_eq_tensor(&red)?;
    let is_green = max.f_eq_tensor(&green)?.f_logical_and(&is_red.f_logical_not()?)?;
    let is_blue = is_red.f_logical_or(&is_green)?.f_logical_not()?;
    let red_part = from_blue.f_sub(&from_green)?.f_mul(&is_red)?;
    let green_part = from_red.f_add_scalar(2.)?.f_sub(&from_blue)?.f_mul(&is_green)?;
    let blue_part = from_green.f_add_scalar(4.)?.f_sub(&from_red)?.f_mul(&is_blue)?;
    let sixths = red_part.f_add(&green_part)?.f_add(&blue_part)?;
    let hue = sixths.f_mul_scalar(1. / 6.)?.f_add_scalar(1.)?.f_fmod(1.)?;
    Ok([hue, saturation, max])
}

/// Returns the pixels of these hues, saturations and values.
fn rgb_of_hsv(hue: &Tensor, saturation: &Tensor, value: &Tensor) -> Result<Tensor> {
    let sixths = hue.f_mul_scalar(6.)?;
    let sector = sixths.f_floor()?;
    let within = saturation.f_mul(&sixths.f_sub(&sector)?)?;
    let unsaturated = saturation.f_neg()?.f_add_scalar(1.)?;
    let of_value = |share: &Tensor| share.f_mul(value)?.f_clamp(0., 1.);
    let falling = of_value(&within.f_neg()?.f_add_scalar(1.)?)?;
    let rising = of_value(&within.f_add(&unsaturated)?)?;
    let lowest = of_value(&unsaturated)?;
    let choices = Tensor::f_stack(&[value, &lowest, &falling, &rising], -3)?;
    // The table says for red, green and blue which of the four it is in each sector of the circle.
    let table = [0i64, 2, 1, 1, 3, 0, 3, 0, 0, 2, 1, 1, 1, 1, 3, 0, 0, 2];
    let table = Tensor::f_from_slice(&table)?.f_view([3, 6])?.f_to_device(hue.device())?;
    let sector = sector.f_to_kind(Kind::Int64)?.f_remainder(6)?;
    let mut shape = sector.size();
    shape.insert(0, 3);
    let chosen = table.f_index_select(1, &sector.f_reshape(-1)?)?.f_view(&*shape)?;
    Ok(choices.f_gather(-3, &chosen.f_movedim_int(0, -3)?, false)?)
}
