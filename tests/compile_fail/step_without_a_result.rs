//~ expected `Result<_, Error>`, found `f64`
use tch_ignite::engine::Engine;

pub fn engine() -> Engine<'static, (), f64, f64> {
    Engine::new(|_: &mut (), _, x: f64| x)
}
