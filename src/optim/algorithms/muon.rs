use super::{Description, StateTensor, algorithm};
use crate::optim::hyper::Hyper::*;

algorithm! {
    /// Muon, momentum orthogonalised by Newton-Schulz iterations, for the matrices of hidden layers (Jordan et al. 2024,
    /// <https://kellerjordan.github.io/posts/muon/>; for large models Liu et al. 2025,
    /// <https://arxiv.org/abs/2502.16982>), with the numbers of `torch.optim.Muon`; built by
    /// [`Optimizer::muon`](crate::optim::Optimizer::muon).
    ///
    /// With the gradient `g` of a matrix with `r` rows and `c` columns:
    ///
    /// ```text
    /// momentum_buffer = momentum · momentum_buffer + (1 - momentum) g
    /// u  = (1 - momentum) g + momentum · momentum_buffer     (Nesterov; otherwise the buffer)
    /// x  = u / ‖u‖, in bf16; then, ns_steps times:
    /// x  = a x + (b xxᵀ + c (xxᵀ)²) x
    /// p *= 1 - lr · weight_decay
    /// p -= lr · √max(1, r / c) · x                           (or 0.2 √max(r, c): match_rms_adamw)
    /// ```
    ///
    /// A step is an error if a parameter with a gradient is no matrix: give those, embeddings and the last layer to an
    /// optimizer of their own, such as AdamW.
    Muon,
    /// Muon with learning rate 1e-3, weight decay 0.1, Nesterov momentum 0.95; see [`Muon`].
    fn muon,
    Description {
        name: "Muon",
        hypers: &[
            (Lr, 1e-3),
            (WeightDecay, 0.1),
            (Momentum, 0.95),
            (Nesterov, 1.),
            (NsA, 3.4445),
            (NsB, -4.775),
            (NsC, 2.0315),
            (Eps, 1e-7),
            (NsSteps, 5.),
            (MatchRmsAdamW, 0.),
            (Maximize, 0.),
        ],
        state: &[StateTensor::like_parameter("momentum_buffer")],
        counts_steps: false,
    }
}
