//! Steps of all parameters at once, on libtorch's own state.

use tch::Tensor;

use super::Optimizer;
use crate::bridge::{Mode, StepError, TensorId};
use crate::error::{Error, Result};
use crate::variables::variables;

impl Optimizer {
    /// Whether steps are fused: true unless [`set_fused`](Self::set_fused) switched that off.
    ///
    /// # Errors
    /// Only while [`with_tch`](Self::with_tch) lends the optimizer out.
    pub fn fused(&self) -> Result<bool> {
        self.native(|native| Ok(native.mode != Mode::Loop))
    }

    /// Switches between fused steps (all parameters at once, several times as fast) and libtorch's own
    /// loop (parameter by parameter), at any step: both work on the same state.
    ///
    /// Fused steps of f32 and f64 parameters follow libtorch's order of operations and agree with the loop
    /// to the last bits; f16 and bf16 are computed in f32 and rounded once for each value, where the loop
    /// rounds after every operation. On the CPU a step is one pass over all parameters in one parallel region;
    /// on CUDA it calls libtorch's fused kernels (RMSprop: foreach kernels; optimizers that tch does not have: their loop).
    /// A parameter that neither of these can handle goes through the loop: sparse gradients, gradients of another type or
    /// with other strides than the parameter, memory that is not dense, and all those of [`Muon`](super::Muon),
    /// [`Adafactor`](super::Adafactor) and [`SparseAdam`](super::SparseAdam), which are not element-wise. If the loop cannot step it either (a sparse gradient under
    /// Adam), the step is an error that names the parameter, before any parameter is stepped.
    ///
    /// ```
    /// # use tch::{Device, nn};
    /// # use tch_ignite::optim::Optimizer;
    /// # let vs = nn::VarStore::new(Device::Cpu);
    /// # nn::linear(vs.root(), 4, 2, Default::default());
    /// let optimizer = Optimizer::adamw(&vs).build()?;
    /// assert!(optimizer.fused()?);
    /// optimizer.set_fused(false)?;
    /// # Ok::<(), tch_ignite::Error>(())
    /// ```
    ///
    /// # Errors
    /// Only while [`with_tch`](Self::with_tch) lends the optimizer out.
    pub fn set_fused(&self, on: bool) -> Result<()> {
        self.native(|native| {
            native.mode = if on { Mode::Fused } else { Mode::Loop };
            Ok(())
        })
    }

    /// Whether `self` and `other` are clones of one optimizer.
    pub(crate) fn is(&self, other: &Self) -> bool {
        std::sync::Arc::ptr_eq(&self.shared, &other.shared)
    }

    /// Makes a step in which the gradients count `factor` times, and nothing if `found_inf` is not 0. Both are
    /// tensors of one element. On a device they are not read, with the exceptions of `Native::step`.
    pub(crate) fn update(&self, factor: Option<&Tensor>, found_inf: Option<&Tensor>) -> Result<()> {
        if self.needs_closure() {
            return Err(Error::invalid(
                "LBFGS evaluates the loss several times in a step: call step_with(closure), whose closure computes the loss and its gradients anew",
            ));
        }
        self.admit_new()?;
        let refused = self.native(|native| {
            self.check_training(native)?;
            Ok(native.step(factor, found_inf).err())
        })?;
        let Some(StepError { parameter, text }) = refused else { return Ok(()) };
        let operation = "optimizer step";
        let Some(parameter) = parameter else { return Err(Error::libtorch(operation, text)) };
        let mut variables = variables(&self.shared.variables).into_iter();
        let name = variables.find(|v| TensorId::of(&v.tensor) == parameter).map(|v| v.name);
        Err(Error::libtorch(
            operation,
            format!(
                "parameter '{}' of {} cannot be stepped: {text}. No parameter was",
                name.unwrap_or_default(),
                self.name()
            ),
        ))
    }
}

#[cfg(test)]
mod tests;
