use tch::nn::VarStore;
use tch::{Device, Tensor};

use super::locked;
use crate::error::{Error, Result};

/// Makes a store of tensors that belong to none, with these names: optimizers, averages, checkpoints and all else that
/// takes a `&VarStore` then take the tensors. The store shares them. A tensor that requires a gradient is a parameter, any
/// other a buffer.
///
/// ```
/// use tch::{Device, Kind, Tensor};
/// use tch_ignite::optim::{Optimizer, var_store_of};
///
/// let weight = Tensor::ones([2], (Kind::Float, Device::Cpu)).set_requires_grad(true);
/// let bias = Tensor::zeros([1], (Kind::Float, Device::Cpu)).set_requires_grad(true);
/// let vs = var_store_of([("weight", &weight), ("bias", &bias)])?;
/// let optimizer = Optimizer::sgd(&vs).lr(0.5).build()?;
/// optimizer.backward_step(&(weight.sum(Kind::Float) + bias.sum(Kind::Float)))?;
/// assert_eq!((weight.double_value(&[0]), bias.double_value(&[0])), (0.5, -0.5));
/// # Ok::<(), tch_ignite::Error>(())
/// ```
///
/// # Errors
/// An empty name, a name that comes twice, or a tensor that was computed from others that require a gradient.
pub fn var_store_of<'t, N: Into<String>>(
    tensors: impl IntoIterator<Item = (N, &'t Tensor)>,
) -> Result<VarStore> {
    let tensors: Vec<_> =
        tensors.into_iter().map(|(name, tensor)| (name.into(), tensor.shallow_clone())).collect();
    let device = tensors.first().map_or(Device::Cpu, |(_, tensor)| tensor.device());
    let vs = VarStore::new(device);
    for (name, tensor) in tensors {
        if name.is_empty() {
            return Err(Error::invalid("a tensor has an empty name: give it another"));
        }
        let failed = |error| Error::libtorch(format!("looking at '{name}'"), error);
        if tensor.requires_grad() && !tensor.f_is_leaf().map_err(failed)? {
            return Err(Error::invalid(format!(
                "'{name}' was computed from tensors that require a gradient, so it cannot be a parameter: give these, or '{name}'.detach()"
            )));
        }
        if locked(&vs.variables_).named_variables.contains_key(&name) {
            return Err(Error::invalid(format!(
                "two tensors are named '{name}': give each a name of its own"
            )));
        }
        let trainable = tensor.requires_grad();
        // tch takes a name part by part.
        let (folders, last) = name.rsplit_once('.').unwrap_or(("", &name));
        let folders = folders.split('.').filter(|_| name.contains('.'));
        let _ = folders.fold(vs.root(), |path, folder| path / folder).add(last, tensor, trainable);
    }
    Ok(vs)
}
