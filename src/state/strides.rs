//! How tensors lie in memory: files hold them in the order of their dimensions, and note another one.

use tch::{Device, Tensor};

/// Of a tensor that is dense but not contiguous, such as one with channels last; `None` where there is
/// nothing to note, or nothing that could be kept (gaps, overlaps).
pub(crate) fn to_note(tensor: &Tensor) -> Option<Vec<i64>> {
    if !tensor.defined() || tensor.is_sparse() || tensor.is_contiguous() {
        return None;
    }
    let strides = tensor.stride();
    are_dense(&tensor.size(), &strides).then_some(strides)
}

/// An uninitialised tensor on the CPU with the type, the shape, and where it is dense the strides.
pub(crate) fn empty_like(tensor: &Tensor) -> Result<Tensor, tch::TchError> {
    let options = (tensor.f_kind()?, Device::Cpu);
    match to_note(tensor) {
        Some(strides) => Tensor::f_empty_strided(tensor.size(), strides, options),
        None => Tensor::f_empty(tensor.size(), options),
    }
}

/// A copy with these strides.
pub(crate) fn with(tensor: &Tensor, strides: &[i64]) -> Result<Tensor, String> {
    if !are_dense(&tensor.size(), strides) {
        return Err(format!("it cannot lie in memory with strides {strides:?}"));
    }
    let copied = || {
        let options = (tensor.f_kind()?, Device::Cpu);
        let mut copy = Tensor::f_empty_strided(tensor.size(), strides, options)?;
        copy.f_copy_(tensor)?;
        Ok::<_, tch::TchError>(copy)
    };
    copied().map_err(|error| error.to_string())
}

/// Whether each element has a place of its own, without gaps.
fn are_dense(shape: &[i64], strides: &[i64]) -> bool {
    if shape.len() != strides.len() || shape.contains(&0) || strides.iter().any(|s| *s < 0) {
        return false;
    }
    // Those of size 1 do not count, but libtorch multiplies them.
    let small = strides.iter().all(|stride| *stride <= 1 << 40);
    let mut dims: Vec<_> = strides.iter().zip(shape).filter(|(_, size)| **size > 1).collect();
    dims.sort();
    let mut expected = 1;
    small
        && dims.into_iter().all(|(stride, size)| {
            let dense = *stride == expected;
            expected = expected.saturating_mul(*size);
            dense
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_dense_strides_are_taken() {
        for (shape, strides, dense) in [
            (&[2, 3][..], &[3, 1][..], true),
            (&[2, 3], &[1, 2], true),
            (&[2, 1, 3], &[3, 77, 1], true),
            (&[2, 3, 4, 5], &[60, 1, 15, 3], true),
            (&[], &[], true),
            (&[2, 3], &[4, 1], false),
            (&[2, 3], &[0, 1], false),
            (&[2, 3], &[-3, 1], false),
            (&[2, 3], &[1], false),
            (&[0, 3], &[3, 1], false),
            (&[2, 3], &[i64::MAX, 1], false),
            (&[1, 3], &[i64::MAX, 1], false),
        ] {
            assert_eq!(are_dense(shape, strides), dense, "{shape:?} {strides:?}");
        }
    }
}
