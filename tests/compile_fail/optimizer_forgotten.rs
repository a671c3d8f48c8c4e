//~ argument #2 of type `tch_ignite::optim::Optimizer` is missing
use tch_ignite::supervised::Supervised;
use tch_ignite::tch::{Tensor, nn};

pub fn context(net: nn::Linear) -> Supervised<nn::Linear> {
    Supervised::new(net, |y_pred: &Tensor, y: &Tensor| y_pred.cross_entropy_for_logits(y))
}
