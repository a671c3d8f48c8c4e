use super::{Description, StateTensor, algorithm};
use crate::optim::hyper::Hyper::*;

algorithm! {
    /// Adadelta (Zeiler 2012, <https://arxiv.org/abs/1212.5701>), with the numbers of `torch.optim.Adadelta`; built by
    /// [`Optimizer::adadelta`](crate::optim::Optimizer::adadelta).
    ///
    /// With the gradient `g` (weight decay added to it), for each element:
    ///
    /// ```text
    /// square_avg = rho · square_avg + (1 - rho) g²
    /// Δ          = √(acc_delta + eps) / √(square_avg + eps) · g
    /// acc_delta  = rho · acc_delta + (1 - rho) Δ²
    /// p         -= lr · Δ
    /// ```
    Adadelta,
    /// Adadelta with learning rate 1, rho 0.9, eps 1e-6; see [`Adadelta`].
    fn adadelta,
    Description {
        name: "Adadelta",
        hypers: &[(Lr, 1.), (Rho, 0.9), (Eps, 1e-6), (WeightDecay, 0.), (Maximize, 0.)],
        state: &[
            StateTensor::like_parameter("square_avg"),
            StateTensor::like_parameter("acc_delta"),
        ],
        counts_steps: true,
    }
}
