//~ `Vec<Batch>` is no data of batches
//~ prepare_batch
use tch_ignite::engine::Until;
use tch_ignite::supervised::{Supervised, create_supervised_trainer};
use tch_ignite::tch::nn;

#[derive(Clone)]
pub struct Batch;

pub fn run(cx: &mut Supervised<nn::Linear>, batches: Vec<Batch>) {
    let _ = create_supervised_trainer().run(cx, batches, Until::epochs(1));
}
