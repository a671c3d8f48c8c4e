//~ `(f64, f64)` is no value
//~ Mean::of(|output: &Output| output.loss)
use tch_ignite::engine::Engine;
use tch_ignite::metrics::Mean;

pub fn attach() {
    let mut engine = Engine::new(|_: &mut (), _, x: f64| Ok((x, x)));
    engine.metric("mean", Mean::new());
}
