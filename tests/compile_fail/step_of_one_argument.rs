//~ closure is expected to take 3 arguments, but it takes 1 argument
use tch_ignite::engine::Engine;

pub fn engine() -> Engine<'static, (), f64, f64> {
    Engine::new(|x: f64| Ok(x))
}
