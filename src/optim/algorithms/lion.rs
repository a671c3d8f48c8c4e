use super::{Description, StateTensor, algorithm};
use crate::optim::hyper::Hyper::*;

algorithm! {
    /// Lion (Chen et al. 2023, <https://arxiv.org/abs/2302.06675>), with the numbers of the Python package
    /// lion-pytorch 0.2.5; built by [`Optimizer::lion`](crate::optim::Optimizer::lion).
    ///
    /// With the gradient `g`, for each element:
    ///
    /// ```text
    /// p      *= 1 - lr · weight_decay
    /// p      -= lr · sign(beta1 · exp_avg + (1 - beta1) g)
    /// exp_avg = beta2 · exp_avg + (1 - beta2) g
    /// ```
    ///
    /// Every element moves by the learning rate, so it should be 3 to 10 times smaller than AdamW's, and the weight
    /// decay as much larger.
    Lion,
    /// Lion with learning rate 1e-4, betas (0.9, 0.99); see [`Lion`].
    fn lion,
    Description {
        name: "Lion",
        hypers: &[(Lr, 1e-4), (Beta1, 0.9), (Beta2, 0.99), (WeightDecay, 0.), (Maximize, 0.)],
        state: &[StateTensor::like_parameter("exp_avg")],
        counts_steps: false,
    }
}
