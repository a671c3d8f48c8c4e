//! Steps of all parameters at once, on libtorch's own state.

use tch::Tensor;

use super::{Optimizer, locked};
use crate::bridge::{Mode, set_gradient};
use crate::{Error, Result};

impl Optimizer {
    /// Whether steps are fused: true unless [`set_fused`](Self::set_fused) said otherwise.
    pub fn fused(&self) -> Result<bool> {
        self.native(|native| Ok(native.mode != Mode::Loop))
    }

    /// Switches between fused steps (all parameters at once, several times as fast) and libtorch's own
    /// loop (parameter by parameter), at any step: both work on the same state.
    ///
    /// Fused steps of f32 and f64 parameters follow libtorch's order of operations and agree with the loop
    /// to the last bits; f16 and bf16 are computed in f32 and rounded once for each value, where the loop
    /// rounds after every operation. On the CPU it is one pass over all parameters in one parallel region;
    /// on CUDA libtorch's fused kernels (RMSprop: its foreach kernels). A parameter that neither takes goes
    /// through the loop: sparse gradients, gradients of another type or with other strides than the
    /// parameter, memory that is not dense.
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
    pub fn set_fused(&self, on: bool) -> Result<()> {
        self.native(|native| {
            native.mode = if on { Mode::Fused } else { Mode::Loop };
            Ok(())
        })
    }

    /// Whether both are clones of one.
    pub(crate) fn is(&self, other: &Self) -> bool {
        std::sync::Arc::ptr_eq(&self.shared, &other.shared)
    }

    /// A step in which the gradients count `factor` times and which does nothing where `found_inf` is not
    /// 0: both tensors of one element, which are not read where they live on a device.
    pub(crate) fn update(&self, factor: Option<&Tensor>, found_inf: Option<&Tensor>) -> Result<()> {
        self.admit_new()?;
        self.native(|native| {
            native.step(factor, found_inf).map_err(|text| Error::libtorch("optimizer step", text))
        })
    }

    /// Puts variables that were added to the store since into libtorch's optimizer.
    pub(super) fn admit_new(&self) -> Result<()> {
        let Some(new) = self.group_new_variables()? else { return Ok(()) };
        let failed = |text: String| Error::libtorch("adding variables to the optimizer", text);
        let mut gradients = vec![];
        for variable in &locked(&self.shared.variables).trainable_variables {
            let gradient = variable.tensor.f_grad().map_err(|error| failed(error.to_string()))?;
            if gradient.defined() {
                gradients.push((variable.tensor.shallow_clone(), gradient));
            }
        }
        // Of tch's methods that add variables this one changes the least: gradients, which come back.
        let operation = "adding variables to the optimizer";
        let added = self.through_tch(operation, &new, |tch| tch.zero_grad());
        for (parameter, gradient) in &gradients {
            set_gradient(parameter, Some(gradient)).map_err(failed)?;
        }
        added
    }
}

#[cfg(test)]
mod tests;
