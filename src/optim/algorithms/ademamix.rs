use super::{Description, StateTensor, algorithm};
use crate::optim::hyper::Hyper::*;

algorithm! {
    /// AdEMAMix, AdamW with a second, slow average of the gradients (Pagliardini et al. 2024,
    /// <https://arxiv.org/abs/2409.03137>), with the numbers of its authors' implementation for PyTorch; built by
    /// [`Optimizer::ademamix`](crate::optim::Optimizer::ademamix).
    ///
    /// With the gradient `g` of step `t`, for each element:
    ///
    /// ```text
    /// exp_avg_fast = beta1 · exp_avg_fast + (1 - beta1) g
    /// exp_avg_slow = beta3 · exp_avg_slow + (1 - beta3) g
    /// exp_avg_sq   = beta2 · exp_avg_sq   + (1 - beta2) g²
    /// u  = (exp_avg_fast / (1 - beta1ᵗ) + alpha · exp_avg_slow) / (√(exp_avg_sq / (1 - beta2ᵗ)) + eps)
    /// p -= lr · (u + weight_decay · p)
    /// ```
    ///
    /// In the first `alpha_warmup` steps alpha rises from 0 in a straight line; in the first `beta3_warmup` steps the
    /// half-life of the slow average does, from that of the fast one. 0 is no warm-up. The authors warm both up over the
    /// whole training, because a slow average diverges early on.
    AdEMAMix,
    /// AdEMAMix with learning rate 1e-3, betas (0.9, 0.999, 0.9999), alpha 2, eps 1e-8, no warm-up; see [`AdEMAMix`].
    fn ademamix,
    Description {
        name: "AdEMAMix",
        hypers: &[
            (Lr, 1e-3),
            (Beta1, 0.9),
            (Beta2, 0.999),
            (Beta3, 0.9999),
            (Alpha, 2.),
            (Beta3Warmup, 0.),
            (AlphaWarmup, 0.),
            (Eps, 1e-8),
            (WeightDecay, 0.),
            (Maximize, 0.),
        ],
        state: &[
            StateTensor::like_parameter("exp_avg_fast"),
            StateTensor::like_parameter("exp_avg_slow"),
            StateTensor::like_parameter("exp_avg_sq"),
        ],
        counts_steps: true,
    }
}
