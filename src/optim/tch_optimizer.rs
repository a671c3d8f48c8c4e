#![expect(clippy::panic, reason = "the methods of tch's optimizer panic")]

use tch::Tensor;

use super::hyper::Hyper;
use super::{Optimizer, set_hyper};
use crate::bridge::{Algorithm, Native};
use crate::error::Result;

/// tch's optimizer, lent out by [`Optimizer::with_tch`](super::Optimizer::with_tch). It has the methods of tch's
/// optimizer, which panic where those of [`Optimizer`] return errors.
///
/// tch's own methods work for the optimizers that tch knows (its `set_lr` does nothing for others); these work for
/// all. This is not a `&mut tch::nn::Optimizer`, because a caller could replace that by another optimizer.
pub struct TchOptimizer<'o> {
    optimizer: &'o Optimizer,
    native: &'o mut Native,
}

crate::debug::opaque_debug!(TchOptimizer<'o>);

impl<'o> TchOptimizer<'o> {
    pub(super) fn new(optimizer: &'o Optimizer, native: &'o mut Native) -> Self {
        Self { optimizer, native }
    }

    /// Adds new variables as the methods of `Optimizer` do, so that tch finds none to add by itself.
    fn admit_new(&mut self) {
        let new = self.optimizer.group_new_variables().unwrap_or_else(|error| panic!("{error}"));
        if let Some(new) = new {
            let admitted = self.optimizer.admit(self.native, &new);
            admitted.unwrap_or_else(|error| panic!("{error}"));
        }
    }

    /// Sets a hyper-parameter of a group; of all groups that have it, and of those to come, if `group` is `None`.
    fn set(
        &mut self,
        group: Option<usize>,
        hyper: impl Fn(Algorithm) -> Result<Hyper>,
        value: f64,
    ) {
        self.admit_new();
        self.try_set(group, hyper, value).unwrap_or_else(|error| panic!("{error}"));
    }

    fn try_set(
        &mut self,
        group: Option<usize>,
        hyper: impl Fn(Algorithm) -> Result<Hyper>,
        value: f64,
    ) -> Result<()> {
        if let Some(group) = group {
            let algorithm = self.optimizer.algorithm(group);
            return set_hyper(self.native, algorithm, group, hyper(algorithm)?, value);
        }
        let of_all = hyper(self.native.algorithm);
        let mut found = of_all.is_ok();
        for group in 0..self.native.group_count() {
            let algorithm = self.optimizer.algorithm(group);
            if let Ok(hyper) = hyper(algorithm) {
                set_hyper(self.native, algorithm, group, hyper, value)?;
                found = true;
            }
        }
        match of_all {
            Ok(hyper) => self
                .native
                .set_default(hyper, value)
                .map_err(|text| crate::error::Error::libtorch(format!("setting {hyper}"), text)),
            Err(_) if found => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// All trainable variables of the store.
    pub fn trainable_variables(&self) -> Vec<Tensor> {
        self.native.tch.trainable_variables()
    }

    /// Makes one step.
    ///
    /// # Panics
    /// A parameter cannot be stepped, or the parameters have their values for evaluation: see [`Optimizer::step`] and
    /// [`Optimizer::eval`].
    pub fn step(&mut self) {
        self.admit_new();
        self.optimizer.check_training(self.native).unwrap_or_else(|error| panic!("{error}"));
        self.native.step(None, None).unwrap_or_else(|error| panic!("{}", error.text));
    }

    /// Calls `zero_grad`, backward from `loss`, and `step`.
    ///
    /// # Panics
    /// As [`step`](Self::step), and where backward fails.
    pub fn backward_step(&mut self, loss: &Tensor) {
        self.zero_grad();
        loss.backward();
        self.step();
    }

    /// `backward_step` with gradients clipped by value.
    ///
    /// # Panics
    /// As [`backward_step`](Self::backward_step).
    pub fn backward_step_clip(&mut self, loss: &Tensor, max: f64) {
        self.zero_grad();
        loss.backward();
        self.clip_grad_value(max);
        self.step();
    }

    /// `backward_step` with gradients clipped by norm: a host sync.
    ///
    /// # Panics
    /// As [`backward_step`](Self::backward_step).
    pub fn backward_step_clip_norm(&mut self, loss: &Tensor, max: f64) {
        self.zero_grad();
        loss.backward();
        self.clip_grad_norm(max);
        self.step();
    }

    /// Sets the learning rate of all groups.
    pub fn set_lr(&mut self, lr: f64) {
        self.set(None, |algorithm| algorithm.hyper("lr"), lr);
    }

    /// Sets the learning rate of a group.
    pub fn set_lr_group(&mut self, group: usize, lr: f64) {
        self.set(Some(group), |algorithm| algorithm.hyper("lr"), lr);
    }

    /// Sets the momentum (where there are betas, beta1) of all groups.
    pub fn set_momentum(&mut self, value: f64) {
        self.set(None, momentum, value);
    }

    /// Sets the momentum (where there are betas, beta1) of a group.
    pub fn set_momentum_group(&mut self, group: usize, value: f64) {
        self.set(Some(group), momentum, value);
    }

    /// Sets the weight decay of all groups.
    pub fn set_weight_decay(&mut self, weight_decay: f64) {
        self.set(None, |algorithm| algorithm.hyper("weight_decay"), weight_decay);
    }

    /// Sets the weight decay of a group.
    pub fn set_weight_decay_group(&mut self, group: usize, weight_decay: f64) {
        self.set(Some(group), |algorithm| algorithm.hyper("weight_decay"), weight_decay);
    }
}

fn momentum(algorithm: Algorithm) -> Result<Hyper> {
    algorithm.momentum().map_or_else(|| algorithm.hyper("momentum"), Ok)
}

macro_rules! forwarded {
    ($($(#[$doc:meta])* $name:ident($($argument:ident: $type:ty),*);)*) => {
        impl TchOptimizer<'_> {
            $($(#[$doc])* pub fn $name(&mut self, $($argument: $type),*) {
                self.admit_new();
                self.native.tch.$name($($argument),*)
            })*
        }
    };
}

forwarded! {
    /// Sets the gradients to none.
    zero_grad();
    /// Clips gradients by value.
    clip_grad_value(max: f64);
    /// Clips gradients by their norm: a host sync; panics without gradients.
    clip_grad_norm(max: f64);
}
