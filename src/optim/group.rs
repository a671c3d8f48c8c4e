use std::fmt;

use tch::Tensor;

use super::algorithms::Shape;
use super::hyper::Hyper;
use super::{Knob, Optimizer};
use crate::bridge::Algorithm;
use crate::error::Result;
use crate::variables::Variable;

/// One parameter group: reads and writes its hyper-parameters in libtorch's optimizer.
///
/// Made by [`Optimizer::group`]. The typed methods (`lr`, `set_lr`, …) and the general [`get`](Self::get) and
/// [`set`](Self::set) return an error for a hyper-parameter that the optimizer does not have (`alpha` on SGD), for a
/// value outside PyTorch's bounds, and while [`with_tch`](Optimizer::with_tch) lends the optimizer out.
#[derive(Clone)]
pub struct Group {
    pub(super) optimizer: Optimizer,
    index: usize,
}

impl Group {
    pub(super) fn new(optimizer: Optimizer, index: usize) -> Self {
        Self { optimizer, index }
    }

    /// The group's number in libtorch, from 0.
    pub fn index(&self) -> usize {
        self.index
    }

    /// The group's name.
    pub fn name(&self) -> String {
        self.optimizer.shared.grouping.name(self.index)
    }

    /// PyTorch's name of the algorithm that steps the group's parameters: the optimizer's, unless the group was built with
    /// one of its own.
    pub fn algorithm(&self) -> &'static str {
        self.own_algorithm().name()
    }

    /// Whether the steps of each parameter are counted.
    pub(crate) fn counts_steps(&self) -> bool {
        self.own_algorithm().counts_steps()
    }

    /// The size of a state tensor of this name for the parameter, and whether it is one number; `None` if there is none.
    pub(crate) fn state_like(&self, name: &str, parameter: &Tensor) -> Option<(Vec<i64>, bool)> {
        let state = self.own_algorithm().description().state.iter();
        let tensor = state.into_iter().find(|tensor| tensor.name == name)?;
        Some((tensor.shape.of(&parameter.size())?, tensor.shape == Shape::Number))
    }

    pub(super) fn own_algorithm(&self) -> Algorithm {
        self.optimizer.algorithm(self.index)
    }

    /// The value of the hyper-parameter with this PyTorch name (`"lr"`, `"weight_decay"`, …; `"beta1"`
    /// and `"beta2"` for the two betas). Booleans are 0 and 1.
    ///
    /// # Errors
    /// The optimizer has no such hyper-parameter.
    pub fn get(&self, hyper: &str) -> Result<f64> {
        self.get_hyper(self.own_algorithm().hyper(hyper)?)
    }

    /// Sets the hyper-parameter with this name; for names see [`get`](Self::get).
    ///
    /// # Errors
    /// The optimizer has no such hyper-parameter, or counts its steps in it, or the value is outside its bounds.
    pub fn set(&self, hyper: &str, value: f64) -> Result<()> {
        self.set_hyper(self.own_algorithm().settable(hyper)?, value)
    }

    /// A hyper-parameter of this group as a [`Knob`], which a scheduler can drive.
    ///
    /// ```
    /// # use tch::{Device, nn};
    /// # use tch_ignite::optim::Optimizer;
    /// # let vs = nn::VarStore::new(Device::Cpu);
    /// # nn::linear(vs.root(), 4, 2, Default::default());
    /// let optimizer = Optimizer::adam(&vs).build()?;
    /// let knob = optimizer.group("group_0")?.knob("beta1")?;
    /// knob.set(0.8)?;
    /// assert_eq!(knob.get()?, 0.8);
    /// # Ok::<(), tch_ignite::Error>(())
    /// ```
    ///
    /// # Errors
    /// The optimizer has no such hyper-parameter.
    pub fn knob(&self, hyper: &str) -> Result<Knob> {
        let hyper = self.own_algorithm().settable(hyper)?;
        Ok(Knob::of_groups(self.optimizer.clone(), Some(self.index), hyper))
    }

    fn get_hyper(&self, hyper: Hyper) -> Result<f64> {
        self.optimizer.get_hyper(self.index, hyper)
    }

    pub(super) fn set_hyper(&self, hyper: Hyper, value: f64) -> Result<()> {
        self.optimizer.set_hyper(self.index, hyper, value)
    }

    /// The names of the parameters in this group, in libtorch's order. Variables that were added to the store
    /// since the last step are included. A parameter with several names is listed once, by the first name in
    /// alphabetical order.
    ///
    /// # Errors
    /// See [`Optimizer`].
    pub fn parameters(&self) -> Result<Vec<String>> {
        Ok(self.variables()?.into_iter().map(|parameter| parameter.name).collect())
    }

    /// The group's parameters with all their names, in libtorch's order.
    pub(crate) fn variables(&self) -> Result<Vec<Variable>> {
        self.optimizer.named_parameters_of([self.index])
    }

    /// Learning rate.
    ///
    /// # Errors
    /// See [`Optimizer`].
    pub fn lr(&self) -> Result<f64> {
        self.get("lr")
    }

    /// Sets the learning rate, not negative.
    ///
    /// # Errors
    /// The value is negative or not finite.
    pub fn set_lr(&self, value: f64) -> Result<()> {
        self.set("lr", value)
    }

    /// Momentum (SGD, RMSprop, Muon).
    ///
    /// # Errors
    /// The optimizer has no momentum.
    pub fn momentum(&self) -> Result<f64> {
        self.get("momentum")
    }

    /// Sets the momentum (SGD, RMSprop, Muon), not negative.
    ///
    /// # Errors
    /// The optimizer has no momentum, or the value is negative or not finite.
    pub fn set_momentum(&self, value: f64) -> Result<()> {
        self.set("momentum", value)
    }

    /// Dampening of the momentum (SGD).
    ///
    /// # Errors
    /// The optimizer has no dampening.
    pub fn dampening(&self) -> Result<f64> {
        self.get("dampening")
    }

    /// Sets the dampening of the momentum (SGD).
    ///
    /// # Errors
    /// The optimizer has no dampening, or the value is not finite.
    pub fn set_dampening(&self, value: f64) -> Result<()> {
        self.set("dampening", value)
    }

    /// Weight decay.
    ///
    /// # Errors
    /// See [`Optimizer`].
    pub fn weight_decay(&self) -> Result<f64> {
        self.get("weight_decay")
    }

    /// Sets the weight decay, not negative.
    ///
    /// # Errors
    /// The value is negative or not finite.
    pub fn set_weight_decay(&self, value: f64) -> Result<()> {
        self.set("weight_decay", value)
    }

    /// Whether the momentum is Nesterov's (SGD, Muon).
    ///
    /// # Errors
    /// The optimizer is neither SGD nor Muon.
    pub fn nesterov(&self) -> Result<bool> {
        Ok(self.get("nesterov")? != 0.)
    }

    /// Switches Nesterov momentum (SGD, Muon) on or off.
    ///
    /// # Errors
    /// The optimizer is neither SGD nor Muon.
    pub fn set_nesterov(&self, on: bool) -> Result<()> {
        self.set("nesterov", f64::from(on))
    }

    /// Decay rates of the first and second moment (Adam and its kin, Lion).
    ///
    /// # Errors
    /// The optimizer has no betas.
    pub fn betas(&self) -> Result<(f64, f64)> {
        Ok((self.get("beta1")?, self.get("beta2")?))
    }

    /// Sets both decay rates (Adam and its kin, Lion), each in [0, 1).
    ///
    /// # Errors
    /// The optimizer has no betas, or a value is outside [0, 1); nothing is changed
    /// then.
    pub fn set_betas(&self, beta1: f64, beta2: f64) -> Result<()> {
        Hyper::Beta2.check(beta2)?;
        self.set("beta1", beta1)?;
        self.set("beta2", beta2)
    }

    /// Term added to the denominator.
    ///
    /// # Errors
    /// The optimizer has no eps.
    pub fn eps(&self) -> Result<f64> {
        self.get("eps")
    }

    /// Sets the term added to the denominator, not negative.
    ///
    /// # Errors
    /// The optimizer has no eps, or the value is negative or not finite.
    pub fn set_eps(&self, value: f64) -> Result<()> {
        self.set("eps", value)
    }

    /// Whether Adam or AdamW is the AMSGrad variant.
    ///
    /// # Errors
    /// The optimizer is neither Adam nor AdamW.
    pub fn amsgrad(&self) -> Result<bool> {
        Ok(self.get("amsgrad")? != 0.)
    }

    /// Switches the AMSGrad variant (Adam, AdamW) on or off. Parameters that were stepped without it get the
    /// state for it now, as zeros: the maximum begins with the next step.
    ///
    /// # Errors
    /// The optimizer is neither Adam nor AdamW, or there is no memory for the state.
    pub fn set_amsgrad(&self, on: bool) -> Result<()> {
        self.set("amsgrad", f64::from(on))
    }

    /// Smoothing constant (RMSprop), or the power by which the step size falls (ASGD).
    ///
    /// # Errors
    /// The optimizer is neither RMSprop nor ASGD.
    pub fn alpha(&self) -> Result<f64> {
        self.get("alpha")
    }

    /// Sets the smoothing constant (RMSprop) or the power by which the step size falls (ASGD), not negative.
    ///
    /// # Errors
    /// The optimizer is neither RMSprop nor ASGD, or the value is negative or not finite.
    pub fn set_alpha(&self, value: f64) -> Result<()> {
        self.set("alpha", value)
    }

    /// Whether RMSprop is the centered variant.
    ///
    /// # Errors
    /// The optimizer is not RMSprop.
    pub fn centered(&self) -> Result<bool> {
        Ok(self.get("centered")? != 0.)
    }

    /// Switches the centered variant (RMSprop) on or off. Parameters that were stepped without it get the
    /// state for it now: a mean gradient of zero.
    ///
    /// # Errors
    /// The optimizer is not RMSprop, or there is no memory for the state.
    pub fn set_centered(&self, on: bool) -> Result<()> {
        self.set("centered", f64::from(on))
    }

    /// Whether steps go up the gradient, to maximize, not down.
    ///
    /// # Errors
    /// See [`Optimizer`].
    pub fn maximize(&self) -> Result<bool> {
        Ok(self.get("maximize")? != 0.)
    }

    /// Chooses whether steps go up the gradient, to maximize, or down.
    ///
    /// # Errors
    /// See [`Optimizer`].
    pub fn set_maximize(&self, on: bool) -> Result<()> {
        self.set("maximize", f64::from(on))
    }
}

impl fmt::Debug for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut debug = f.debug_struct(&self.name());
        for hyper in self.own_algorithm().hypers() {
            if let Ok(value) = self.get_hyper(hyper) {
                debug.field(hyper.name(), &value);
            }
        }
        debug.finish()
    }
}
