use super::{Description, StateTensor, algorithm};
use crate::optim::hyper::Hyper::*;

algorithm! {
    /// Adagrad (Duchi et al. 2011, <https://jmlr.org/papers/v12/duchi11a.html>), with the numbers of
    /// `torch.optim.Adagrad`; built by [`Optimizer::adagrad`](crate::optim::Optimizer::adagrad).
    ///
    /// With the gradient `g` (weight decay added to it) of step `t`, for each element:
    ///
    /// ```text
    /// sum += g²
    /// p   -= lr / (1 + (t - 1) lr_decay) · g / (√sum + eps)
    /// ```
    ///
    /// A sparse gradient changes the rows that it has; it takes no weight decay.
    Adagrad,
    /// Adagrad with learning rate 1e-2, eps 1e-10; see [`Adagrad`].
    fn adagrad,
    Description {
        name: "Adagrad",
        hypers: &[
            (Lr, 1e-2),
            (LrDecay, 0.),
            (WeightDecay, 0.),
            (InitialAccumulatorValue, 0.),
            (Eps, 1e-10),
            (Maximize, 0.),
        ],
        state: &[StateTensor::like_parameter("sum")],
        counts_steps: true,
    }
}
