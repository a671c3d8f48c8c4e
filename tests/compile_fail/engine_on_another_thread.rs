//~ cannot be sent between threads safely
use tch_ignite::engine::{Engine, Until};

pub fn run() {
    let mut engine = Engine::new(|_: &mut (), _, x: f64| Ok(x));
    std::thread::spawn(move || engine.run(&mut (), vec![1.0], Until::epochs(1)));
}
