//~ the trait bound `WeightedLoss: From<f64>` is not satisfied
use tch_ignite::optim::Optimizer;
use tch_ignite::supervised::Supervised;
use tch_ignite::tch::{Tensor, nn};

pub fn context(net: nn::Linear, optimizer: Optimizer) {
    Supervised::new(net, optimizer, |y_pred: &Tensor, _: &Tensor| y_pred.double_value(&[]));
}
