use super::{Description, Needed, StateTensor, algorithm};
use crate::optim::hyper::Hyper::*;

algorithm! {
    /// Schedule-Free AdamW (Defazio et al. 2024, <https://arxiv.org/abs/2405.15682>), which needs no schedule of the
    /// learning rate and no number of steps to be known beforehand, with the numbers of the Python package schedulefree
    /// 1.4.1; built by [`Optimizer::adamw_schedule_free`](crate::optim::Optimizer::adamw_schedule_free).
    ///
    /// The optimizer has three points for each parameter: `z`, which the steps move; `x`, the average of all `z`, which
    /// is what the training is for; and `y` between the two, at which gradients are computed. With the gradient `g` at
    /// `y`, in step `k` of the group:
    ///
    /// ```text
    /// lr'        = lr · min(1, k / warmup_steps)
    /// exp_avg_sq = beta2 · exp_avg_sq + (1 - beta2) g²
    /// u          = g / (√(exp_avg_sq / (1 - beta2ᵏ)) + eps) + weight_decay · y
    /// z         -= lr' · u
    /// c          = w / (sum of all w),  w = kʳ · (largest lr' so far)^weight_lr_power
    /// x          = (1 - c) x + c · z
    /// y          = (1 - beta1) z + beta1 · x
    /// ```
    ///
    /// Parameters hold `y` while they are trained and have to hold `x` while the model is evaluated or saved:
    /// [`Optimizer::eval`](crate::optim::Optimizer::eval), which lists who calls it without being told, and
    /// [`train`](crate::optim::Optimizer::train) switch between the two.
    AdamWScheduleFree,
    /// Schedule-Free AdamW with learning rate 0.0025, betas (0.9, 0.999), eps 1e-8; see [`AdamWScheduleFree`].
    fn adamw_schedule_free,
    Description {
        name: "AdamWScheduleFree",
        hypers: &[
            (Lr, 0.0025),
            (Beta1, 0.9),
            (Beta2, 0.999),
            (Eps, 1e-8),
            (WeightDecay, 0.),
            (WarmupSteps, 0.),
            (R, 0.),
            (WeightLrPower, 2.),
            (Maximize, 0.),
            (K, 0.),
            (WeightSum, 0.),
            (LrMax, -1.),
            (TrainMode, 1.),
        ],
        state: &[
            StateTensor::like_parameter("z"),
            StateTensor::like_parameter("exp_avg_sq"),
            StateTensor::needed("y", Needed::Never),
        ],
        counts_steps: false,
    }
}
