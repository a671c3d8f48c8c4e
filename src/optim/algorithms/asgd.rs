use super::{Description, Shape, StateTensor, algorithm};
use crate::optim::hyper::Hyper::*;

algorithm! {
    /// Averaged SGD (Polyak and Juditsky 1992, <https://doi.org/10.1137/0330046>), with the numbers of
    /// `torch.optim.ASGD`; built by [`Optimizer::asgd`](crate::optim::Optimizer::asgd).
    ///
    /// With the gradient `g` (weight decay added to it) of step `t`, for each element:
    ///
    /// ```text
    /// p   = p (1 - lambd · eta) - eta · g
    /// ax  = ax + mu (p - ax)
    /// eta = lr / (1 + lambd · lr · t)^alpha
    /// mu  = 1 / max(1, t - t0)
    /// ```
    ///
    /// `eta` begins as the learning rate. The average `ax` is in the [state](crate::optim::Optimizer::state) of each
    /// parameter; the parameter itself is not averaged.
    Asgd,
    /// Averaged SGD with learning rate 1e-2, lambd 1e-4, alpha 0.75, t0 1e6; see [`Asgd`].
    fn asgd,
    Description {
        name: "ASGD",
        hypers: &[
            (Lr, 1e-2),
            (Lambd, 1e-4),
            (Alpha, 0.75),
            (T0, 1e6),
            (WeightDecay, 0.),
            (Maximize, 0.),
        ],
        state: &[
            StateTensor::like_parameter("ax"),
            StateTensor::shaped("eta", Shape::Number),
            StateTensor::shaped("mu", Shape::Number),
        ],
        counts_steps: true,
    }
}
