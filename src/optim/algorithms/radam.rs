use super::{Description, StateTensor, algorithm};
use crate::optim::hyper::Hyper::*;

algorithm! {
    /// RAdam, Adam with a rectified learning rate, which needs no warm-up (Liu et al. 2019,
    /// <https://arxiv.org/abs/1908.03265>), with the numbers of `torch.optim.RAdam`; built by
    /// [`Optimizer::radam`](crate::optim::Optimizer::radam).
    ///
    /// With the gradient `g` (weight decay added to it, or decoupled) of step `t`, for each element:
    ///
    /// ```text
    /// exp_avg    = beta1 · exp_avg + (1 - beta1) g
    /// exp_avg_sq = beta2 · exp_avg_sq + (1 - beta2) g²
    /// ρ∞         = 2 / (1 - beta2) - 1
    /// ρ          = ρ∞ - 2 t beta2^t / (1 - beta2^t)
    /// m          = exp_avg / (1 - beta1^t)
    /// p         -= lr · m                                                      if ρ ≤ 5, otherwise
    /// p         -= lr · m · √((ρ-4)(ρ-2)ρ∞ / ((ρ∞-4)(ρ∞-2)ρ)) · √(1 - beta2^t) / (√exp_avg_sq + eps)
    /// ```
    RAdam,
    /// RAdam with learning rate 1e-3, betas (0.9, 0.999), eps 1e-8; see [`RAdam`].
    fn radam,
    Description {
        name: "RAdam",
        hypers: &[
            (Lr, 1e-3),
            (Beta1, 0.9),
            (Beta2, 0.999),
            (Eps, 1e-8),
            (WeightDecay, 0.),
            (DecoupledWeightDecay, 0.),
            (Maximize, 0.),
        ],
        state: &[
            StateTensor::like_parameter("exp_avg"),
            StateTensor::like_parameter("exp_avg_sq"),
        ],
        counts_steps: true,
    }
}
