//~ `Tokens` is no tensor and no tuple, list or map of tensors
//~ implement `Tensors`
use tch_ignite::optim::Optimizer;
use tch_ignite::supervised::Supervised;
use tch_ignite::tch::{Tensor, nn};

pub struct Tokens {
    pub ids: Tensor,
}

pub fn context(net: nn::Linear, optimizer: Optimizer) {
    Supervised::with_model_fn(
        net,
        optimizer,
        |net, x: &Tokens, _train| x.ids.apply(net),
        |y_pred: &Tensor, y: &Tensor| y_pred - y,
    );
}
