//~ is no handler of an engine
//~ engine.on(Event::EpochCompleted, |cx, engine| { ..; Ok(()) })
use tch_ignite::engine::Engine;

pub fn attach() {
    let mut engine = Engine::new(|_: &mut (), _, x: f64| Ok(x));
    engine.attach(|| println!("epoch"));
}
