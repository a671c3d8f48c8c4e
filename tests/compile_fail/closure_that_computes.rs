//~ expected `&Tensor`, found `Tensor`
use tch_ignite::metrics::Accuracy;
use tch_ignite::tch::Tensor;

pub fn metric() {
    Accuracy::of(|output: &(Tensor, Tensor)| (output.0.sigmoid().round(), &output.1));
}
