//~ is no data of batches
//~ restartable(|| tensors.iter().map(Tensor::shallow_clone))
use tch_ignite::engine::{Engine, Until};
use tch_ignite::tch::Tensor;

pub fn run(tensors: Vec<Tensor>) {
    let mut engine = Engine::new(|_: &mut (), _, x: Tensor| Ok(x));
    let _ = engine.run(&mut (), tensors, Until::epochs(1));
}
