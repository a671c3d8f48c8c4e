//! Sharpness-aware minimization.

use std::sync::{Arc, Mutex};

use tch::{TchError, Tensor};

use super::closure::Before;
use super::{Knob, Optimizer, locked};
use crate::error::{Error, Result};

/// Sharpness-aware minimization (SAM, Foret et al. 2021, <https://arxiv.org/abs/2010.01412>) around any optimizer but
/// [`Lbfgs`](super::Lbfgs), and its adaptive variant (ASAM, Kwon et al. 2021, <https://arxiv.org/abs/2102.11600>), with the
/// numbers of the implementation for PyTorch at <https://github.com/davda54/sam>.
///
/// A step evaluates the loss twice. With the gradient `g` at the parameters `p`, and the optimizer's own step:
///
/// ```text
/// e = rho · g / (‖g‖ + 1e-12)                    (SAM)
/// e = rho · p² · g / (‖|p| · g‖ + 1e-12)         (ASAM)
/// p = step(p, gradient at p + e)
/// ```
///
/// The norm is over all parameters together. Nothing but rho outlives a step, so checkpoints need the optimizer alone; a
/// scheduler may drive rho ([`knob`](Self::knob)). Clones share rho.
///
/// ```
/// use tch::{Device, Kind, nn};
/// use tch_ignite::optim::{Optimizer, Sam};
///
/// let vs = nn::VarStore::new(Device::Cpu);
/// let w = vs.root().ones("w", &[1]);
/// let optimizer = Optimizer::sgd(&vs).lr(0.25).build()?;
/// let sam = Sam::new(&optimizer).rho(0.5)?;
/// sam.step_with(|| {
///     optimizer.zero_grad()?;
///     let loss = w.square().sum(Kind::Float);
///     loss.backward();
///     Ok(loss)
/// })?;
/// assert_eq!(w.double_value(&[0]), 0.25); // the gradient is that at 1.5
/// # Ok::<(), anyhow::Error>(())
/// ```
///
/// Layers of batch normalisation update their running averages in both evaluations. Of random numbers, such as those of
/// dropout, each evaluation has its own.
#[derive(Debug, Clone)]
pub struct Sam {
    optimizer: Optimizer,
    rho: Arc<Mutex<f64>>,
    adaptive: bool,
}

/// The term added to the norm.
const EPS: f64 = 1e-12;

impl Sam {
    /// SAM around this optimizer, with rho 0.05.
    pub fn new(optimizer: &Optimizer) -> Self {
        Self { optimizer: optimizer.clone(), rho: Arc::new(Mutex::new(0.05)), adaptive: false }
    }

    /// The distance at which gradients are computed: 0.05 unless given. ASAM needs about ten times as much.
    ///
    /// # Errors
    /// The value is negative or not finite.
    pub fn rho(self, rho: f64) -> Result<Self> {
        *locked(&self.rho) = checked(rho)?;
        Ok(self)
    }

    /// Makes distances relative to the size of each element: ASAM.
    pub fn adaptive(mut self) -> Self {
        self.adaptive = true;
        self
    }

    /// The optimizer that makes the steps.
    pub fn optimizer(&self) -> &Optimizer {
        &self.optimizer
    }

    /// Rho as a knob, which a scheduler can drive. A step refuses a value that is negative or not finite.
    pub fn knob(&self) -> Knob {
        let (get, set) = (self.rho.clone(), self.rho.clone());
        Knob::new("rho", move || *locked(&get), move |rho| *locked(&set) = rho)
    }

    /// Makes a step. `closure` sets the gradients to none, computes the loss, runs backward and returns the loss; it is
    /// called twice. Returns the first loss. Copies the parameters; no host sync.
    ///
    /// # Errors
    /// Errors of the closure, those of [`Optimizer::step`], a sparse gradient, and rho out of its bounds. The parameters
    /// are then as they were before, also after a panic of the closure.
    pub fn step_with(
        &self,
        closure: impl FnMut() -> anyhow::Result<Tensor>,
    ) -> anyhow::Result<Tensor> {
        let loss = self.gradients_beside(closure)?;
        self.optimizer.step()?;
        Ok(loss)
    }

    /// Leaves the gradients for the step in the parameters, whose values are as before, and returns the first loss.
    pub(crate) fn gradients_beside(
        &self,
        mut closure: impl FnMut() -> anyhow::Result<Tensor>,
    ) -> anyhow::Result<Tensor> {
        if self.optimizer.needs_closure() {
            return Err(Error::invalid(
                "LBFGS evaluates the loss by itself and cannot be made sharpness-aware: choose another optimizer",
            )
            .into());
        }
        let rho = checked(*locked(&self.rho))?;
        let loss = tch::with_grad(&mut closure)?;
        let parameters = self.optimizer.all_parameters()?;
        let moved = moved(&parameters, rho, self.adaptive)
            .map_err(|error| Error::libtorch("a step of SAM", error))?;
        let mut before = moved?;
        let _ = tch::with_grad(closure)?;
        before.put_back()?;
        Ok(loss)
    }
}

/// Moves the parameters that have gradients to where the loss is larger.
fn moved(parameters: &[Tensor], rho: f64, adaptive: bool) -> Result<Result<Before>, TchError> {
    let _guard = tch::no_grad_guard();
    let (mut chosen, mut directions, mut norms) = (vec![], vec![], vec![]);
    for parameter in parameters {
        let gradient = parameter.f_grad()?;
        if !gradient.defined() {
            continue;
        }
        if gradient.is_sparse() {
            return Ok(Err(Error::invalid(
                "SAM needs dense gradients, and one is sparse: make the embedding without `sparse`",
            )));
        }
        let value = parameter.f_detach()?;
        let (length, direction) = match adaptive {
            true => (value.f_abs()?.f_mul(&gradient)?, value.f_square()?.f_mul(&gradient)?),
            false => (gradient.shallow_clone(), gradient),
        };
        norms.push(length.f_norm()?);
        directions.push(direction);
        chosen.push(parameter.shallow_clone());
    }
    let before = Before::of(&chosen)?;
    let Some(first) = norms.first() else { return Ok(Ok(before)) };
    let (device, kind) = (first.device(), first.kind());
    let norms = norms.iter().map(|norm| norm.f_to_device(device)?.f_to_kind(kind));
    let norm = Tensor::f_stack(&norms.collect::<Result<Vec<_>, _>>()?, 0)?.f_norm()?;
    let scale = norm.f_add_scalar(EPS)?.f_reciprocal()?.f_mul_scalar(rho)?;
    for (mut parameter, direction) in chosen.into_iter().zip(directions) {
        let scale = scale.f_to_device(parameter.device())?.f_to_kind(parameter.kind())?;
        let _ = parameter.f_add_(&direction.f_mul(&scale)?)?;
    }
    Ok(Ok(before))
}

fn checked(rho: f64) -> Result<f64> {
    match rho >= 0. && rho.is_finite() {
        true => Ok(rho),
        false => {
            Err(Error::invalid(format!("rho must be finite and not negative, but {rho} was given")))
        }
    }
}
