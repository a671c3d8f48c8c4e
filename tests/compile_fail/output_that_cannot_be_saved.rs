//~ `Output` cannot be part of a checkpoint
//~ implement `Saveable`
use tch_ignite::engine::Engine;

pub struct Output(pub f64);

pub fn track() {
    let mut engine = Engine::new(|_: &mut (), _, x: f64| Ok(Output(x)));
    engine.track_output();
}
