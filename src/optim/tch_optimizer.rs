use tch::Tensor;

use super::Optimizer;
use crate::bridge::Native;

/// tch's optimizer, lent out by [`Optimizer::with_tch`](super::Optimizer::with_tch). It has the methods of tch's
/// optimizer, which panic where those of [`Optimizer`] return errors.
///
/// This is not a `&mut tch::nn::Optimizer`, because a caller could replace that by another optimizer.
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
    #[expect(clippy::panic, reason = "the methods of tch's optimizer panic")]
    fn admit_new(&mut self) {
        let new = self.optimizer.group_new_variables().unwrap_or_else(|error| panic!("{error}"));
        if let Some(new) = new {
            let admitted = self.optimizer.admit(self.native, &new);
            admitted.unwrap_or_else(|error| panic!("{error}"));
        }
    }
}

macro_rules! forwarded {
    ($($(#[$doc:meta])* $name:ident($($argument:ident: $type:ty),*);)*) => {
        impl TchOptimizer<'_> {
            $($(#[$doc])* pub fn $name(&mut self, $($argument: $type),*) {
                self.admit_new();
                self.native.tch.$name($($argument),*)
            })*

            /// All trainable variables of the store.
            pub fn trainable_variables(&self) -> Vec<Tensor> {
                self.native.tch.trainable_variables()
            }
        }
    };
}

forwarded! {
    /// Sets the gradients to none.
    zero_grad();
    /// Makes one step.
    step();
    /// Calls `zero_grad`, backward from `loss`, and `step`.
    backward_step(loss: &Tensor);
    /// `backward_step` with gradients clipped by value.
    backward_step_clip(loss: &Tensor, max: f64);
    /// `backward_step` with gradients clipped by norm: a host sync.
    backward_step_clip_norm(loss: &Tensor, max: f64);
    /// Clips gradients by value.
    clip_grad_value(max: f64);
    /// Clips gradients by their norm: a host sync; panics without gradients.
    clip_grad_norm(max: f64);
    /// Sets the learning rate of all groups.
    set_lr(lr: f64);
    /// Sets the learning rate of a group.
    set_lr_group(group: usize, lr: f64);
    /// Sets the momentum (beta1 for Adam and AdamW) of all groups.
    set_momentum(momentum: f64);
    /// Sets the momentum of a group; tch panics except for SGD.
    set_momentum_group(group: usize, momentum: f64);
    /// Sets the weight decay of all groups.
    set_weight_decay(weight_decay: f64);
    /// Sets the weight decay of a group.
    set_weight_decay_group(group: usize, weight_decay: f64);
}
