//~ type annotations needed
use tch_ignite::metrics::Accuracy;
use tch_ignite::supervised::create_supervised_evaluator;
use tch_ignite::tch::nn;

pub fn attach() {
    let mut evaluator = create_supervised_evaluator::<nn::Linear>();
    evaluator.metric("accuracy", Accuracy::of(|output| (&output.0, &output.1)));
}
