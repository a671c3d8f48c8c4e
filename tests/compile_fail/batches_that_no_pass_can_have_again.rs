//~ `Vec<Opened>` is no data of batches `Opened`
//~ `restartable(|| iterator)` for anything that can be iterated again
use tch_ignite::engine::{Engine, Until};

pub struct Opened(pub std::fs::File);

pub fn run(files: Vec<Opened>) {
    let mut engine = Engine::new(|_: &mut (), _, file: Opened| Ok(file.0));
    let _ = engine.run(&mut (), files, Until::epochs(1));
}
