//! Tensors as slices of bytes.

use std::ffi::c_void;

use tch::{Device, TchError, Tensor};

use super::BridgeError;

fn checked_pointer(tensor: &Tensor) -> Result<(*mut c_void, usize), BridgeError> {
    if !tensor.defined() || tensor.device() != Device::Cpu {
        return Err("the bytes of a tensor that is not on the CPU were asked for".into());
    }
    if tensor.is_sparse() || !tensor.is_contiguous() {
        return Err("the bytes of a tensor that is not dense and contiguous were asked for".into());
    }
    if tensor.is_conj() || tensor.is_neg() {
        return Err("the bytes of a lazily conjugated or negated tensor were asked for".into());
    }
    let size = tensor.f_kind().map_err(|error| error.to_string())?.elt_size_in_bytes();
    let (start, len) = (tensor.data_ptr(), tensor.numel() * size);
    if start.is_null() && len > 0 {
        return Err("a tensor without memory of its own has no bytes".into());
    }
    Ok((start, len))
}

/// The elements on the CPU, dense and contiguous, without lazy conjugation or negation, which the bytes do not show. A
/// tensor that is all this already is returned without a copy.
pub(crate) fn dense_on_cpu(tensor: &Tensor) -> Result<Tensor, TchError> {
    let dense =
        if tensor.is_sparse() { tensor.f_to_dense(None, false)? } else { tensor.f_detach()? };
    dense.f_to_device(Device::Cpu)?.f_resolve_conj()?.f_resolve_neg()?.f_contiguous()
}

/// The bytes of a dense, contiguous CPU tensor, in memory order. Other tensors are an error.
pub(crate) fn bytes(tensor: &Tensor) -> Result<&[u8], BridgeError> {
    let (start, len) = checked_pointer(tensor)?;
    if len == 0 {
        return Ok(&[]);
    }
    // SAFETY: a dense, contiguous CPU tensor has `numel` elements of its type from `data_ptr` on, and the
    // elements of all types are plain bytes. The borrow keeps the storage alive. Nothing may write to it
    // through another handle meanwhile; every use of a tch tensor relies on that.
    Ok(unsafe { std::slice::from_raw_parts(start.cast(), len) })
}

/// The bytes of a dense, contiguous CPU tensor, to write to. The bytes of a bool tensor must be 0 or 1.
pub(crate) fn bytes_mut(tensor: &mut Tensor) -> Result<&mut [u8], BridgeError> {
    let (start, len) = checked_pointer(tensor)?;
    if len == 0 {
        return Ok(&mut []);
    }
    // SAFETY: as in `bytes`, and the caller uses no other handle of the tensor meanwhile.
    Ok(unsafe { std::slice::from_raw_parts_mut(start.cast(), len) })
}
