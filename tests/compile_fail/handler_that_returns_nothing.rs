//~ expected `Result<(), Error>`, found `()`
use tch_ignite::engine::{Engine, Event};

pub fn attach() {
    let mut engine = Engine::new(|_: &mut (), _, x: f64| Ok(x));
    engine.on(Event::EpochCompleted, |_, engine| println!("{}", engine.state.epoch));
}
