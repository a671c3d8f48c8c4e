use super::{Description, Shape, StateTensor, algorithm};
use crate::optim::hyper::Hyper::*;

algorithm! {
    /// NAdam, Adam with Nesterov momentum (Dozat 2016, <https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ>), with the
    /// numbers of `torch.optim.NAdam`; built by [`Optimizer::nadam`](crate::optim::Optimizer::nadam).
    ///
    /// With the gradient `g` (weight decay added to it, or decoupled) of step `t`, for each element:
    ///
    /// ```text
    /// μₜ          = beta1 (1 - 0.96^(t · momentum_decay) / 2)
    /// mu_product  = μ₁ μ₂ … μₜ
    /// exp_avg     = beta1 · exp_avg + (1 - beta1) g
    /// exp_avg_sq  = beta2 · exp_avg_sq + (1 - beta2) g²
    /// denominator = √(exp_avg_sq / (1 - beta2^t)) + eps
    /// p          -= lr ((1 - μₜ) / (1 - mu_product) · g + μₜ₊₁ / (1 - mu_product · μₜ₊₁) · exp_avg) / denominator
    /// ```
    NAdam,
    /// NAdam with learning rate 2e-3, betas (0.9, 0.999), eps 1e-8, momentum decay 4e-3; see [`NAdam`].
    fn nadam,
    Description {
        name: "NAdam",
        hypers: &[
            (Lr, 2e-3),
            (Beta1, 0.9),
            (Beta2, 0.999),
            (Eps, 1e-8),
            (WeightDecay, 0.),
            (MomentumDecay, 4e-3),
            (DecoupledWeightDecay, 0.),
            (Maximize, 0.),
        ],
        state: &[
            StateTensor::like_parameter("exp_avg"),
            StateTensor::like_parameter("exp_avg_sq"),
            StateTensor::shaped("mu_product", Shape::Number),
        ],
        counts_steps: true,
    }
}
