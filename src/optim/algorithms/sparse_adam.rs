use super::{Description, StateTensor, algorithm};
use crate::optim::hyper::Hyper::*;

algorithm! {
    /// Adam for sparse gradients, such as those of embeddings, which changes the rows that the gradient has (Kingma and
    /// Ba 2014, <https://arxiv.org/abs/1412.6980>), with the numbers of `torch.optim.SparseAdam`; built by
    /// [`Optimizer::sparse_adam`](crate::optim::Optimizer::sparse_adam).
    ///
    /// With the gradient `g` of step `t`, for each element of these rows:
    ///
    /// ```text
    /// exp_avg    = beta1 · exp_avg + (1 - beta1) g
    /// exp_avg_sq = beta2 · exp_avg_sq + (1 - beta2) g²
    /// p         -= lr · √(1 - beta2^t) / (1 - beta1^t) · exp_avg / (√exp_avg_sq + eps)
    /// ```
    ///
    /// A step is an error if a gradient is dense.
    SparseAdam,
    /// Adam for sparse gradients with learning rate 1e-3, betas (0.9, 0.999), eps 1e-8; see [`SparseAdam`].
    fn sparse_adam,
    Description {
        name: "SparseAdam",
        hypers: &[(Lr, 1e-3), (Beta1, 0.9), (Beta2, 0.999), (Eps, 1e-8), (Maximize, 0.)],
        state: &[
            StateTensor::like_parameter("exp_avg"),
            StateTensor::like_parameter("exp_avg_sq"),
        ],
        counts_steps: true,
    }
}
