//~ is no metric of the output
use tch_ignite::engine::Engine;
use tch_ignite::metrics::{Mean, MetricGroup};

pub fn attach() {
    let mut engine = Engine::new(|_: &mut (), _, x: f64| Ok((x, x)));
    engine.metric("group", MetricGroup::new().metric("mean", Mean::of(|x: &f64| *x)));
}
