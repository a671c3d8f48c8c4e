use std::ptr::null;

use tch::{Device, Kind, TchError, Tensor};

use super::BridgeError;

unsafe extern "C" {
    fn tig_normalize_rows(
        data: *const u8,
        rows: *const i64,
        count: usize,
        channels: usize,
        inner: usize,
        tables: *const f32,
        out: *mut f32,
    );
}

/// A choice of rows of a tensor.
#[derive(Clone, Copy)]
pub(crate) enum Rows<'a> {
    /// The first row, and how many rows from there on.
    Consecutive(usize, usize),
    /// The numbers of the rows, in any order.
    These(&'a [i64]),
}

/// Gathers rows of `data` (uint8, on the CPU, contiguous) as f32: each byte becomes the float that its channel's
/// table has for it. `tables` has 256 floats for each channel. With several channels, the channels are the second
/// dimension of `data`. Other tensors, rows that do not exist, and tables that do not fit are errors.
pub(crate) fn normalize_rows(
    data: &Tensor,
    rows: Rows<'_>,
    tables: &[f32],
) -> Result<Tensor, BridgeError> {
    let text = |error: TchError| error.to_string();
    let mut shape = data.size();
    let plain = data.kind() == Kind::Uint8 && data.device() == Device::Cpu && data.is_contiguous();
    if !plain || shape.is_empty() {
        return Err("normalize_rows needs contiguous rows of uint8 on the CPU".into());
    }
    let (channels, len) = (tables.len() / 256, shape[0] as usize);
    let width = shape[1..].iter().product::<i64>() as usize;
    if !tables.len().is_multiple_of(256) || channels == 0 || !width.is_multiple_of(channels) {
        return Err(format!("{} table entries do not fit rows of {width}", tables.len()));
    }
    let (start, count, inside) = match rows {
        Rows::Consecutive(first, count) => (first, count, first <= len && count <= len - first),
        Rows::These(rows) => {
            (0, rows.len(), rows.iter().all(|row| usize::try_from(*row).is_ok_and(|row| row < len)))
        }
    };
    if !inside {
        return Err(format!("a row is outside of the {len} there are"));
    }
    shape[0] = count as i64;
    let out = Tensor::f_empty(&shape, (Kind::Float, Device::Cpu)).map_err(text)?;
    if count == 0 || width == 0 {
        return Ok(out);
    }
    let rows = match rows {
        Rows::Consecutive(..) => null(),
        Rows::These(rows) => rows.as_ptr(),
    };
    // SAFETY: `data` holds `len` rows of `width` bytes one after the other, and only such rows are read
    // (checked above); `tables` has 256 entries for each channel; `out` is new and has count * width floats.
    unsafe {
        tig_normalize_rows(
            data.data_ptr().cast::<u8>().add(start * width),
            rows,
            count,
            channels,
            width / channels,
            tables.as_ptr(),
            out.data_ptr().cast(),
        );
    }
    Ok(out)
}
