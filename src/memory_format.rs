//! Channels last (NHWC): the memory format in which libtorch's convolutions and poolings are vectorised.
//!
//! The functions here do what PyTorch's `to(memory_format=torch.channels_last)` does. Shapes stay (N, C, H, W); only
//! the order in memory changes. So a network needs no other code, except that it must use `flatten` or `reshape` in
//! place of `view` (`flat_view`), which fails with these strides. On the CPU the pooling of small convolutional
//! networks then runs in vector loops instead of scalar ones; on CUDA tensor cores need this format for f16 and bf16.

use tch::Tensor;
use tch::nn::VarStore;

use crate::error::{Error, Result};

/// Brings a batch of pictures (N, C, H, W) into channels last, as PyTorch's `x.to(memory_format=torch.channels_last)`
/// does. Any dtype and device. Copies the batch, unless it has this format already; then the result shares its memory.
///
/// ```
/// use tch::{Device, Kind, Tensor};
/// use tch_ignite::memory_format::to_channels_last;
///
/// let x = to_channels_last(&Tensor::zeros([8, 3, 32, 32], (Kind::Float, Device::Cpu)))?;
/// assert_eq!((x.size(), x.stride()), (vec![8, 3, 32, 32], vec![3072, 1, 96, 3]));
/// # Ok::<(), tch_ignite::Error>(())
/// ```
///
/// # Errors
/// The tensor does not have four dimensions.
pub fn to_channels_last(tensor: &Tensor) -> Result<Tensor> {
    if tensor.dim() != 4 {
        return Err(Error::invalid(format!(
            "channels last is for four dimensions (N, C, H, W), but the tensor has size {:?}",
            tensor.size()
        )));
    }
    let size = tensor.size();
    let (c, h, w) = (size[1], size[2], size[3]);
    // The strides are set explicitly: with a single channel several strides describe the same memory, and libtorch
    // recognises only these as channels last.
    let converted = || {
        let contiguous = tensor.f_permute([0, 2, 3, 1])?.f_contiguous()?;
        contiguous.f_as_strided(&size, [h * w * c, 1, w * c, c], None::<i64>)
    };
    converted().map_err(|error| Error::libtorch("changing the memory format", error))
}

/// Brings all parameters and buffers of four dimensions (kernels of convolutions) into channels last, as PyTorch's
/// `model.to(memory_format=torch.channels_last)` does. They stay the same variables, so an optimizer keeps them. Call
/// this before the first step, because an optimizer's state keeps the format in which it was made.
///
/// # Errors
/// libtorch cannot convert a variable (out of memory).
pub fn channels_last_parameters(vs: &VarStore) -> Result<()> {
    let _guard = tch::no_grad_guard();
    let variables = crate::variables::variables(&vs.variables_).into_iter();
    for mut variable in variables.map(|v| v.tensor).filter(|variable| variable.dim() == 4) {
        let data = to_channels_last(&variable.detach())?;
        variable
            .f_set_data(&data)
            .map_err(|error| Error::libtorch("changing the memory format", error))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::nn::{self, Module};
    use tch::{Device, Kind};

    use crate::optim::Optimizer;

    /// Tests a single channel too, for which several strides describe the same memory.
    #[test]
    fn a_network_goes_on_with_the_channels_last() {
        for channels in [1, 3] {
            let vs = VarStore::new(Device::Cpu);
            let conv = nn::conv2d(vs.root(), channels, 8, 3, Default::default());
            let x = Tensor::rand([16, channels, 10, 10], (Kind::Float, Device::Cpu));
            let before = conv.forward(&x);
            channels_last_parameters(&vs).unwrap();
            let y = conv.forward(&to_channels_last(&x).unwrap());
            assert_eq!(y.stride(), [512, 1, 64, 8]);
            assert_eq!(y.max_pool2d_default(2).stride(), [128, 1, 32, 8]);
            assert!((y - before).abs().max().double_value(&[]) < 1e-5);
        }
    }

    #[test]
    fn steps_are_the_loops() {
        // The values do not come from libtorch's generator, because other tests use it at the same time.
        let values = |shape: &[i64], seed: f64| {
            let count = shape.iter().product::<i64>();
            (Tensor::arange(count, (Kind::Float, Device::Cpu)) * 12.9898 + seed)
                .sin()
                .reshape(shape)
        };
        let train = |fused| {
            let vs = VarStore::new(Device::Cpu);
            let conv = nn::conv2d(vs.root(), 1, 8, 3, Default::default());
            for mut variable in vs.trainable_variables() {
                tch::no_grad(|| variable.copy_(&values(&variable.size(), 1.)));
            }
            channels_last_parameters(&vs).unwrap();
            let optimizer = Optimizer::builder(nn::sgd(0.9, 0., 0., false), &vs).build().unwrap();
            optimizer.set_fused(fused).unwrap();
            for step in 0..3 {
                let x = to_channels_last(&values(&[16, 1, 10, 10], f64::from(step))).unwrap();
                optimizer.zero_grad().unwrap();
                conv.forward(&x).square().mean(Kind::Float).backward();
                optimizer.step().unwrap();
            }
            vs.variables()["weight"].copy()
        };
        let (fused, looped) = (train(true), train(false));
        assert!((fused - looped).abs().max().double_value(&[]) < 1e-6);
    }

    #[test]
    fn other_than_four_dimensions_are_refused() {
        let error = to_channels_last(&Tensor::zeros([2, 3], (Kind::Float, Device::Cpu)));
        assert!(error.unwrap_err().to_string().contains("[2, 3]"));
    }
}
