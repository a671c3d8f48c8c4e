use super::{Description, Shape, StateTensor, algorithm};
use crate::optim::hyper::Hyper::*;

algorithm! {
    /// Adafactor, which keeps a number for each row and column of a matrix instead of one for each element (Shazeer and
    /// Stern 2018, <https://arxiv.org/abs/1804.04235>), with the numbers of `torch.optim.Adafactor`; built by
    /// [`Optimizer::adafactor`](crate::optim::Optimizer::adafactor).
    ///
    /// With the gradient `g` of step `t` and the root mean square of all elements `RMS`, for each parameter:
    ///
    /// ```text
    /// α        = max(eps2, RMS(p)) · min(lr, 1 / √t)
    /// p       *= 1 - lr · weight_decay
    /// row_var += t^beta2_decay (mean of g² over each row - row_var)
    /// col_var += t^beta2_decay (mean of g² over each column - col_var)
    /// variance = row_var · col_var / max(mean of row_var, eps1)
    /// u        = g / √max(variance, eps1²)
    /// p       -= α · u / max(1, RMS(u) / d)
    /// ```
    ///
    /// A parameter of one dimension has its own `variance` of each element. A step waits for the device twice for each
    /// parameter.
    Adafactor,
    /// Adafactor with learning rate 1e-2, beta2 decay -0.8, eps1 of the parameter's type, eps2 1e-3, d 1; see
    /// [`Adafactor`].
    fn adafactor,
    Description {
        name: "Adafactor",
        hypers: &[
            (Lr, 1e-2),
            (Beta2Decay, -0.8),
            (Eps1, 0.),
            (Eps2, 1e-3),
            (D, 1.),
            (WeightDecay, 0.),
            (Maximize, 0.),
        ],
        state: &[
            StateTensor::shaped("row_var", Shape::Rows),
            StateTensor::shaped("col_var", Shape::Columns),
            StateTensor::shaped("variance", Shape::Vector),
        ],
        counts_steps: true,
    }
}
