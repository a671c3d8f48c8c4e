//~ takes 1 argument, but 3 arguments are required
use tch_ignite::engine::Engine;

pub fn engine() -> Engine<'static, (), f64, f64> {
    Engine::new(|x: f64| Ok(x))
}
