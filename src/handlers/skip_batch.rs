use std::cell::Cell;
use std::rc::Rc;

use crate::engine::{Engine, Handler, HandlerSpec};
use crate::error::Result;
use crate::event::Event;
use crate::state::StateDict;

/// Skips batches: they get no step and no iteration.
///
/// `when` is called for each batch that is fetched; [`Engine::skip_batch`] documents the consequences. Clones share the
/// count. Where the batch is on a GPU, looking at its values is a host sync: it is better to let the loader decide.
///
/// ```
/// use tch_ignite::engine::{Engine, Until};
/// use tch_ignite::handlers::SkipBatch;
/// let skip = SkipBatch::when(|batch: &f64| batch.is_nan());
/// let mut trainer = Engine::new(|seen: &mut Vec<f64>, _, x: f64| { seen.push(x); Ok(()) });
/// trainer.attach(skip.clone());
/// let mut seen = vec![];
/// trainer.run(&mut seen, vec![1.0, f64::NAN, 2.0], Until::iterations(4))?;
/// assert_eq!((seen, skip.skipped()), (vec![1.0, 2.0, 1.0, 2.0], 2));
/// # Ok::<(), tch_ignite::Error>(())
/// ```
#[must_use = "a handler is called only once it is attached: `Engine::attach`"]
pub struct SkipBatch<F> {
    when: F,
    skipped: Rc<Cell<u64>>,
}

crate::debug::opaque_debug!(SkipBatch<F>);

impl<F> SkipBatch<F> {
    /// Skips the batches for which `when` returns true.
    pub fn when<B>(when: F) -> Self
    where
        F: Fn(&B) -> bool,
    {
        Self { when, skipped: Rc::default() }
    }

    /// Number of batches skipped so far.
    pub fn skipped(&self) -> u64 {
        self.skipped.get()
    }
}

impl<F: Clone> Clone for SkipBatch<F> {
    fn clone(&self) -> Self {
        Self { when: self.when.clone(), skipped: self.skipped.clone() }
    }
}

impl<C, B, O, F: Fn(&B) -> bool> Handler<C, B, O> for SkipBatch<F> {
    fn spec(&self) -> Result<HandlerSpec> {
        Ok(HandlerSpec::new("skip batch", Event::GetBatchCompleted))
    }

    fn save_state(&self) -> Result<Option<StateDict>> {
        let mut state = StateDict::new();
        state.set_value("skipped", self.skipped())?;
        Ok(Some(state))
    }

    fn load_state(&mut self, state: StateDict) -> Result<()> {
        self.skipped.set(state.value("skipped")?);
        Ok(())
    }

    fn call(
        &mut self,
        _event: Event,
        _cx: &mut C,
        engine: &mut Engine<'_, C, B, O>,
    ) -> anyhow::Result<()> {
        if engine.state.batch.as_ref().is_some_and(&self.when) {
            self.skipped.set(self.skipped.get() + 1);
            engine.skip_batch();
        }
        Ok(())
    }
}
