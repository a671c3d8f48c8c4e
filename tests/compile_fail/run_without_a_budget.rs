//~ argument #3 of type `Until` is missing
use tch_ignite::engine::Engine;

pub fn run() {
    let mut engine = Engine::new(|_: &mut (), _, x: f64| Ok(x));
    let _ = engine.run(&mut (), vec![1.0]);
}
