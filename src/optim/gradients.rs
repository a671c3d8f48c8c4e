//! Norms, clipping and zeroing of gradients.

use tch::Tensor;

use super::Optimizer;
use crate::error::{Error, Result};

/// The gradients of all groups of an optimizer, or of some: computes their norm, clips and zeroes them.
///
/// Made by [`Optimizer::gradients`]. Parameters without a gradient are skipped; if no parameter has a gradient, norms
/// are 0 and nothing is changed. On the CPU each call is one pass over all gradients, on CUDA a few of libtorch's
/// foreach kernels; norms stay on the device.
///
/// All methods that read or change gradients return the errors of all calls: see [`Optimizer`].
///
/// ```
/// # use tch::{Device, Kind, nn};
/// # use tch_ignite::optim::Optimizer;
/// # let vs = nn::VarStore::new(Device::Cpu);
/// # let w = vs.root().zeros("w", &[2]);
/// # let optimizer = Optimizer::sgd(&vs).lr(1.0).build()?;
/// let gradient = tch::Tensor::from_slice(&[3.0f32, 4.0]);
/// (&w * &gradient).sum(Kind::Float).backward();
/// let norm = optimizer.gradients()?.clip_norm(1.0)?;
/// assert_eq!(norm.double_value(&[]), 5.0); // this reads it: a host sync on CUDA
/// assert!((w.grad().norm().double_value(&[]) - 1.0).abs() < 1e-6);
/// # Ok::<(), tch_ignite::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Gradients {
    optimizer: Optimizer,
    groups: Vec<usize>,
    order: f64,
    error_if_nonfinite: bool,
}

impl Optimizer {
    /// The gradients of all groups.
    ///
    /// # Errors
    /// See [`Optimizer`].
    pub fn gradients(&self) -> Result<Gradients> {
        let groups = (0..self.group_count()?).collect();
        Ok(Gradients { optimizer: self.clone(), groups, order: 2., error_if_nonfinite: false })
    }

    /// Fills the gradients with zeros, in their memory. [`zero_grad`](Self::zero_grad), which sets them to
    /// none, saves this write and makes the next backward write instead of add: prefer it.
    ///
    /// # Errors
    /// See [`Optimizer`].
    pub fn zero_grad_in_place(&self) -> Result<()> {
        self.gradients()?.zero()
    }

    /// Clips the gradients of all groups together to a norm of at most `max` and returns the norm before
    /// clipping: [`Gradients::clip_norm`].
    ///
    /// # Errors
    /// `max` is negative or NaN. See also [`Optimizer`].
    pub fn clip_grad_norm(&self, max: f64) -> Result<Tensor> {
        self.gradients()?.clip_norm(max)
    }

    /// Limits every element of every gradient to `-max` to `max`: [`Gradients::clip_value`].
    ///
    /// # Errors
    /// `max` is negative or NaN. See also [`Optimizer`].
    pub fn clip_grad_value(&self, max: f64) -> Result<()> {
        self.gradients()?.clip_value(max)
    }

    /// [`clip_grad_norm`](Self::clip_grad_norm) and [`step`](Self::step) in one. The step scales the gradients
    /// as it reads them. On the CPU they stay unclipped in memory, except those of parameters that go through
    /// libtorch's loop; on CUDA the step overwrites them with the clipped ones. Returns the norm before
    /// clipping. No host sync.
    ///
    /// # Errors
    /// `max` is negative or NaN, or a parameter cannot be stepped: see [`step`](Self::step).
    pub fn step_clipped(&self, max: f64) -> Result<Tensor> {
        let (norm, factor) = self.gradients()?.norm_and_factor(max)?;
        self.update(Some(&factor), None)?;
        Ok(norm)
    }
}

impl Gradients {
    /// Restricts the gradients to the groups with these names.
    ///
    /// # Errors
    /// There is no group of one of these names.
    pub fn groups<'n>(mut self, names: impl IntoIterator<Item = &'n str>) -> Result<Self> {
        let group = |name| Ok(self.optimizer.group(name)?.index());
        let mut groups: Vec<_> = names.into_iter().map(group).collect::<Result<_>>()?;
        // A group that is named twice counts once.
        groups.sort_unstable();
        groups.dedup();
        self.groups = groups;
        Ok(self)
    }

    /// Sets the order p of the norm, above 0: 2 unless given, `f64::INFINITY` for the largest absolute value.
    pub fn order(mut self, p: f64) -> Self {
        self.order = p;
        self
    }

    /// Makes a norm that is not finite an error. The norm has to be read for that: a host sync on CUDA.
    pub fn error_if_nonfinite(mut self) -> Self {
        self.error_if_nonfinite = true;
        self
    }

    /// The norm of all these gradients together, as if they were one vector: a tensor of one element on their
    /// device, f64 if a gradient is f64, otherwise f32.
    ///
    /// # Errors
    /// The order is not above 0; the norm is not finite, if that is to be an error.
    pub fn norm(&self) -> Result<Tensor> {
        Ok(self.norm_and_factor(1.)?.0)
    }

    /// Scales the gradients in place by `min(1, max / (norm + 1e-6))`, so that their norm is at most `max`.
    /// Returns the norm before that, as [`norm`](Self::norm) does (torch's `clip_grad_norm_`). No host sync.
    /// A norm of NaN makes all gradients NaN, and an infinite norm makes them 0 or NaN, unless
    /// [`error_if_nonfinite`](Self::error_if_nonfinite) is set.
    ///
    /// On the CPU nothing is written if the norm is small enough.
    ///
    /// # Errors
    /// `max` is negative or NaN, or the order is not above 0; the norm is not finite, if that is to
    /// be an error. Nothing is scaled then.
    pub fn clip_norm(&self, max: f64) -> Result<Tensor> {
        let (norm, factor) = self.norm_and_factor(max)?;
        self.native("scaling gradients", |native, groups| native.scale_gradients(groups, &factor))?;
        Ok(norm)
    }

    /// Limits every element to `-max` to `max`, in place (torch's `clip_grad_value_`). NaN stays NaN.
    ///
    /// # Errors
    /// `max` is negative or NaN.
    pub fn clip_value(&self, max: f64) -> Result<()> {
        check_max(max)?;
        self.native("clipping gradients", |native, groups| native.clip_value(groups, max))
    }

    /// Adaptive clipping (AGC; Brock et al. 2021, <https://arxiv.org/abs/2102.06171>, equation 3): scales each
    /// unit's gradient to a norm of at most `clipping` times the norm of the unit's weights, or times `eps` if
    /// that is larger. A unit is a row of the first dimension, or the whole tensor if it has only one dimension.
    /// The paper uses 1e-2 and 1e-3, and leaves the last layer out. No host sync; about ten small operations
    /// for each parameter.
    ///
    /// # Errors
    /// `clipping` or `eps` is not finite and above 0; a gradient is sparse. Gradients of parameters
    /// before it may be clipped already.
    pub fn clip_adaptive(&self, clipping: f64, eps: f64) -> Result<()> {
        for (name, value) in [("clipping", clipping), ("eps", eps)] {
            if !(value > 0. && value.is_finite()) {
                return Err(Error::invalid(format!(
                    "{name} must be finite and above 0, but {value} was given"
                )));
            }
        }
        let parameters = self.optimizer.parameters_of(self.groups.iter().copied())?;
        let _guard = tch::no_grad_guard();
        parameters.iter().try_for_each(|parameter| {
            clip_units(parameter, clipping, eps)
                .map_err(|error| Error::libtorch("adaptive clipping", error))
        })
    }

    /// Fills the gradients with zeros, in their memory.
    ///
    /// # Errors
    /// See [`Optimizer`].
    pub fn zero(&self) -> Result<()> {
        self.native("zero_grad", super::super::bridge::Native::zero_gradients)
    }

    /// Sets the gradients to none.
    ///
    /// # Errors
    /// See [`Optimizer`].
    pub fn clear(&self) -> Result<()> {
        self.native("zero_grad", super::super::bridge::Native::clear_gradients)
    }

    /// Makes gradients in f16 and bf16 f32, exactly, so that further calls of backward add to them in f32. Steps of
    /// parameters with [`low_precision`](super::LowPrecision) take them as they are; those of others round them to the
    /// parameter's type, and are slower for it. For loops that add up the gradients of several batches by themselves: call
    /// it after each backward but the last. [`GradientAccumulator`](crate::GradientAccumulator) does it for groups with
    /// `low_precision`.
    ///
    /// They stay f32 until they are set to none: [`zero_grad_in_place`](Optimizer::zero_grad_in_place) keeps the type, and
    /// `DistributedDataParallel` needs gradients of the parameters' type.
    ///
    /// # Errors
    /// There is no memory. See also [`Optimizer`].
    pub fn widen(&self) -> Result<()> {
        self.native("widening gradients", super::super::bridge::Native::widen_gradients)
    }

    /// 1 if an element of a gradient is not finite, else 0: a tensor of one f32 element on the gradients' device.
    pub(crate) fn found_inf(&self) -> Result<Tensor> {
        self.native("checking gradients", super::super::bridge::Native::found_inf)
    }

    /// Multiplies the gradients by a tensor of one element, in place.
    pub(crate) fn scale(&self, factor: &Tensor) -> Result<()> {
        self.native("scaling gradients", |native, groups| native.scale_gradients(groups, factor))
    }

    /// The norm, and the factor that clips the gradients to a norm of `max`: two tensors of one element.
    pub(crate) fn norm_and_factor(&self, max: f64) -> Result<(Tensor, Tensor)> {
        check_max(max)?;
        if self.order.is_nan() || self.order <= 0. {
            return Err(Error::invalid(format!(
                "the order of a norm must be above 0, but {} was given",
                self.order
            )));
        }
        let (norm, factor) = self.native("the norm of gradients", |native, groups| {
            native.clip_norm(groups, max, self.order)
        })?;
        if self.error_if_nonfinite {
            let value = norm
                .f_double_value(&[])
                .map_err(|error| Error::libtorch("the norm of gradients", error))?;
            if !value.is_finite() {
                return Err(Error::invalid(format!(
                    "the total norm of order {} of the gradients is {value}, so they cannot be clipped; look for a loss or an input that is not finite",
                    self.order
                )));
            }
        }
        Ok((norm, factor))
    }

    fn native<R>(
        &self,
        operation: &str,
        call: impl FnOnce(&mut crate::bridge::Native, &[usize]) -> Result<R, String>,
    ) -> Result<R> {
        self.optimizer.admit_new()?;
        self.optimizer.native(|native| {
            call(native, &self.groups).map_err(|text| Error::libtorch(operation, text))
        })
    }
}

pub(super) fn check_max(max: f64) -> Result<()> {
    if max >= 0. {
        return Ok(());
    }
    Err(Error::invalid(format!(
        "the largest norm or value must not be negative, but {max} was given"
    )))
}

/// Adaptive clipping of one parameter's gradient, unit by unit.
fn clip_units(parameter: &Tensor, clipping: f64, eps: f64) -> Result<(), tch::TchError> {
    let mut gradient = parameter.f_grad()?;
    if !gradient.defined() {
        return Ok(());
    }
    let norm = |tensor: &Tensor| match tensor.dim() {
        0 | 1 => tensor.f_norm(),
        dims => {
            let others: Vec<_> = (1..dims as i64).collect();
            tensor.f_norm_scalaropt_dim(2., &others[..], true)
        }
    };
    let most = norm(&parameter.f_detach()?)?.f_clamp_min_(eps)?.f_mul_scalar_(clipping)?;
    let of_gradient = norm(&gradient)?;
    // The factor is 1 where the norm is small enough. The clamp avoids a division by zero.
    let factor = most.f_div(&of_gradient.f_clamp_min(1e-6)?)?.f_clamp_max_(1.)?;
    let _ = gradient.f_mul_(&factor.f_to_kind(gradient.kind())?)?;
    Ok(())
}
