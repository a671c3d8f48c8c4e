//~ is no closure `|cx, engine|
//~ engine.attach(scheduler.on(Event::IterationStarted))
use tch_ignite::engine::{Engine, Event};
use tch_ignite::optim::Optimizer;
use tch_ignite::schedule::CosineAnnealingScheduler;

pub fn attach(optimizer: &Optimizer) {
    let mut trainer = Engine::new(|_: &mut (), _, _batch: i32| Ok(()));
    let scheduler = CosineAnnealingScheduler::new(optimizer, "lr", 1e-5, 1e-3, 100);
    trainer.add_event_handler(Event::IterationStarted, scheduler);
}
