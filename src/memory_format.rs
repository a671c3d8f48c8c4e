//! Channels last (NHWC): the memory format in which libtorch's convolutions and poolings are vectorised.
//!
//! PyTorch's `to(memory_format=torch.channels_last)`. Shapes stay (N, C, H, W); only the order in memory
//! changes, so a network needs no other code, but `flatten` or `reshape` where it has a `view`
//! (`flat_view`), which other strides refuse. On the CPU it takes the pooling of small convolutional
//! networks from scalar loops to vector ones; on CUDA it is what tensor cores want with f16 and bf16.

use tch::Tensor;
use tch::nn::VarStore;

use crate::{Error, Result};

/// A batch of pictures (N, C, H, W) with the channels last in memory: PyTorch's
/// `x.to(memory_format=torch.channels_last)`. One copy, none where it is so already; an error for other
/// than four dimensions.
///
/// ```
/// use tch::{Device, Kind, Tensor};
/// use tch_ignite::memory_format::to_channels_last;
///
/// let x = to_channels_last(&Tensor::zeros([8, 3, 32, 32], (Kind::Float, Device::Cpu)))?;
/// assert_eq!((x.size(), x.stride()), (vec![8, 3, 32, 32], vec![3072, 1, 96, 3]));
/// # Ok::<(), tch_ignite::Error>(())
/// ```
pub fn to_channels_last(tensor: &Tensor) -> Result<Tensor> {
    if tensor.dim() != 4 {
        return Err(Error::invalid(format!(
            "channels last is for four dimensions (N, C, H, W), but the tensor has size {:?}",
            tensor.size()
        )));
    }
    let converted = || tensor.f_permute([0, 2, 3, 1])?.f_contiguous()?.f_permute([0, 3, 1, 2]);
    converted().map_err(|error| Error::libtorch("changing the memory format", error))
}

/// Brings all parameters and buffers of four dimensions (kernels of convolutions) into channels last: PyTorch's
/// `model.to(memory_format=torch.channels_last)`. They stay the same variables, for an optimizer too; call
/// it before the first step, because an optimizer's state keeps the format it was made in.
pub fn channels_last_parameters(vs: &VarStore) -> Result<()> {
    let _guard = tch::no_grad_guard();
    for mut variable in vs.variables().into_values().filter(|variable| variable.dim() == 4) {
        let data = to_channels_last(&variable.detach())?;
        variable
            .f_set_data(&data)
            .map_err(|error| Error::libtorch("changing the memory format", error))?;
    }
    Ok(())
}
