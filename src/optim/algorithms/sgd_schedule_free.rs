use super::{Description, Needed, StateTensor, algorithm};
use crate::optim::hyper::Hyper::*;

algorithm! {
    /// Schedule-Free SGD (Defazio et al. 2024, <https://arxiv.org/abs/2405.15682>), with the numbers of the Python package
    /// schedulefree 1.4.1; built by [`Optimizer::sgd_schedule_free`](crate::optim::Optimizer::sgd_schedule_free).
    ///
    /// [`AdamWScheduleFree`](super::AdamWScheduleFree) says what the points `x`, `y` and `z` are, and how parameters switch
    /// between `y` and `x`. Here a step is, with the momentum in the place of beta1:
    ///
    /// ```text
    /// z -= lr' · (g + weight_decay · y)
    /// ```
    ///
    /// The learning rate is larger than that of SGD with momentum, ten times and more.
    SgdScheduleFree,
    /// Schedule-Free SGD with learning rate 1, momentum 0.9; see [`SgdScheduleFree`].
    fn sgd_schedule_free,
    Description {
        name: "SGDScheduleFree",
        hypers: &[
            (Lr, 1.),
            (Momentum, 0.9),
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
        state: &[StateTensor::like_parameter("z"), StateTensor::needed("y", Needed::Never)],
        counts_steps: false,
    }
}
