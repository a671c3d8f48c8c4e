use super::{Description, StateTensor, algorithm};
use crate::optim::hyper::Hyper::*;

algorithm! {
    /// Rprop, resilient backpropagation, for whole data sets as one batch (Riedmiller and Braun 1993,
    /// <https://doi.org/10.1109/ICNN.1993.298623>), with the numbers of `torch.optim.Rprop`; built by
    /// [`Optimizer::rprop`](crate::optim::Optimizer::rprop).
    ///
    /// With the gradient `g`, for each element:
    ///
    /// ```text
    /// step_size *= etaplus if g · prev > 0, etaminus if g · prev < 0
    /// step_size  = step_size between step_size_min and step_size_max
    /// g          = 0 if g · prev < 0
    /// p         -= sign(g) · step_size
    /// prev       = g
    /// ```
    ///
    /// The learning rate is the first step size of a parameter without state; later it has no effect.
    Rprop,
    /// Rprop with learning rate 1e-2, etas (0.5, 1.2), step sizes from 1e-6 to 50; see [`Rprop`].
    fn rprop,
    Description {
        name: "Rprop",
        hypers: &[
            (Lr, 1e-2),
            (EtaMinus, 0.5),
            (EtaPlus, 1.2),
            (StepSizeMin, 1e-6),
            (StepSizeMax, 50.),
            (Maximize, 0.),
        ],
        state: &[
            StateTensor::like_parameter("prev"),
            StateTensor::like_parameter("step_size"),
        ],
        counts_steps: true,
    }
}
