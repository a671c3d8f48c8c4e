use anyhow::Result;
use tch::{Device, Kind, Tensor};

use super::{check_size, shape_of};

/// Changes the size of a picture to `[height, width]`, bilinear and with antialiasing.
///
/// # Errors
/// A size of 0, or a tensor that is no picture.
pub fn resize(image: &Tensor, size: [i64; 2]) -> Result<Tensor> {
    let [channels, rows, columns] = shape_of(image)?;
    check_size("resize", size)?;
    if size == [rows, columns] {
        return Ok(image.shallow_clone());
    }
    let mut shape = image.size();
    let kind = image.kind();
    let images = image.f_reshape([-1, channels, rows, columns])?;
    let scaled =
        |images: &Tensor| images.f_internal_upsample_bilinear2d_aa(size, false, None, None);
    let images = match (kind, image.device()) {
        (Kind::Float | Kind::Double, _) | (Kind::Uint8, Device::Cpu) => scaled(&images)?,
        (Kind::Half | Kind::BFloat16, _) => {
            scaled(&images.f_to_kind(Kind::Float)?)?.f_to_kind(kind)?
        }
        _ => scaled(&images.f_to_kind(Kind::Float)?)?.f_round()?.f_to_kind(kind)?,
    };
    shape.truncate(shape.len() - 2);
    shape.extend(size);
    Ok(images.f_reshape(shape)?)
}

/// Changes the size of a picture so that its shorter edge has this length, and its shape stays: torchvision's
/// `Resize(length)`.
///
/// # Errors
/// A length of 0, or a tensor that is no picture.
pub fn resize_shorter_edge(image: &Tensor, length: i64) -> Result<Tensor> {
    let [_, rows, columns] = shape_of(image)?;
    check_size("resize_shorter_edge", [length, length])?;
    let longer = |long: i64, short: i64| ((length as f64 * long as f64) / short as f64) as i64;
    match columns <= rows {
        true => resize(image, [longer(rows, columns), length]),
        false => resize(image, [length, longer(columns, rows)]),
    }
}
