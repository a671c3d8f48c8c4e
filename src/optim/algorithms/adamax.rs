use super::{Description, StateTensor, algorithm};
use crate::optim::hyper::Hyper::*;

algorithm! {
    /// Adamax, Adam by the largest gradient (Kingma and Ba 2014, section 7.1, <https://arxiv.org/abs/1412.6980>), with
    /// the numbers of `torch.optim.Adamax`; built by [`Optimizer::adamax`](crate::optim::Optimizer::adamax).
    ///
    /// With the gradient `g` (weight decay added to it) of step `t`, for each element:
    ///
    /// ```text
    /// exp_avg = beta1 · exp_avg + (1 - beta1) g
    /// exp_inf = max(beta2 · exp_inf, |g| + eps)
    /// p      -= lr / (1 - beta1^t) · exp_avg / exp_inf
    /// ```
    Adamax,
    /// Adamax with learning rate 2e-3, betas (0.9, 0.999), eps 1e-8; see [`Adamax`].
    fn adamax,
    Description {
        name: "Adamax",
        hypers: &[
            (Lr, 2e-3),
            (Beta1, 0.9),
            (Beta2, 0.999),
            (Eps, 1e-8),
            (WeightDecay, 0.),
            (Maximize, 0.),
        ],
        state: &[
            StateTensor::like_parameter("exp_avg"),
            StateTensor::like_parameter("exp_inf"),
        ],
        counts_steps: true,
    }
}
