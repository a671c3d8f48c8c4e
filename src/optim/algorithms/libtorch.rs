//! The four optimizers that tch has, whose classes are libtorch's own.

use super::Needed::{Never, While};
use super::{Description, StateTensor};
use crate::optim::hyper::Hyper::*;

pub(super) const SGD: Description = Description {
    name: "SGD",
    hypers: &[
        (Lr, 1e-3),
        (Momentum, 0.),
        (Dampening, 0.),
        (WeightDecay, 0.),
        (Nesterov, 0.),
        (Maximize, 0.),
    ],
    state: &[StateTensor::needed("momentum_buffer", Never)],
    counts_steps: false,
};

pub(super) const ADAM: Description = Description {
    name: "Adam",
    hypers: &[
        (Lr, 1e-3),
        (Beta1, 0.9),
        (Beta2, 0.999),
        (Eps, 1e-8),
        (WeightDecay, 0.),
        (Amsgrad, 0.),
        (Maximize, 0.),
    ],
    state: &[
        StateTensor::like_parameter("exp_avg"),
        StateTensor::like_parameter("exp_avg_sq"),
        StateTensor::needed("max_exp_avg_sq", While(Amsgrad)),
    ],
    counts_steps: true,
};

pub(super) const ADAMW: Description = Description {
    name: "AdamW",
    hypers: &[
        (Lr, 1e-3),
        (Beta1, 0.9),
        (Beta2, 0.999),
        (Eps, 1e-8),
        (WeightDecay, 1e-2),
        (Amsgrad, 0.),
        (Maximize, 0.),
    ],
    ..ADAM
};

pub(super) const RMS_PROP: Description = Description {
    name: "RMSprop",
    hypers: &[
        (Lr, 1e-2),
        (Alpha, 0.99),
        (Eps, 1e-8),
        (WeightDecay, 0.),
        (Momentum, 0.),
        (Centered, 0.),
        (Maximize, 0.),
    ],
    state: &[
        StateTensor::like_parameter("square_avg"),
        StateTensor::needed("momentum_buffer", While(Momentum)),
        StateTensor::needed("grad_avg", While(Centered)),
    ],
    counts_steps: true,
};
