//~ `{integer}` has no state that a checkpoint could hold
//~ implement `Stateful`
use tch_ignite::engine::Engine;

pub fn track() {
    let mut engine = Engine::new(|_: &mut (), _, x: f64| Ok(x));
    engine.track("seed", 5);
}
