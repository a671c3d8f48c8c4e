//~ is no metric of the output
//~ cx.trainer()
use tch_ignite::metrics::Accuracy;
use tch_ignite::supervised::{Prediction, create_supervised_trainer};
use tch_ignite::tch::nn;

pub fn attach() {
    let mut trainer = create_supervised_trainer::<nn::Linear>();
    trainer.metric("accuracy", Accuracy::of(Prediction::parts));
}
