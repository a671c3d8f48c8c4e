//~ expected `tch_ignite::optim::Optimizer`, found `tch_ignite::tch::nn::Optimizer`
use tch_ignite::supervised::Supervised;
use tch_ignite::tch::{Tensor, nn};

pub fn context(net: nn::Linear, optimizer: nn::Optimizer) {
    Supervised::new(net, optimizer, |y_pred: &Tensor, y: &Tensor| y_pred - y);
}
