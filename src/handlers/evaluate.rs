use crate::Result;
use crate::checkpoint::StateDict;
use crate::data::IntoSource;
use crate::engine::{Engine, Event, Events, Handler, Until};

/// Runs an evaluator at events of the trainer; its metrics appear there under `"<name>/<metric>"`.
///
/// The evaluator moves in here, so that nothing is circular. Both work on the same context.
///
/// ```
/// use tch_ignite::engine::{Engine, Until};
/// use tch_ignite::handlers::Evaluate;
/// use tch_ignite::metrics::Mean;
///
/// let mut evaluator = Engine::new(|bias: &mut f64, _, x: f64| Ok(x + *bias));
/// evaluator.metric("mean", Mean::new());
/// let mut trainer = Engine::new(|bias: &mut f64, _, x: f64| { *bias += x; Ok(()) });
/// trainer.attach(Evaluate::each_epoch("val", evaluator, vec![1.0, 3.0]));
/// trainer.run(&mut 0.0, vec![10.0], Until::epochs(2))?;
/// assert_eq!(trainer.state.metrics.get("val/mean")?, 22.0);
/// # Ok::<(), tch_ignite::Error>(())
/// ```
pub struct Evaluate<'e, C, B, O, D> {
    name: String,
    events: Events,
    evaluator: Engine<'e, C, B, O>,
    data: D,
    /// Names of the values that the last evaluation left.
    left: Vec<String>,
}

impl<'e, C, B, O, D: IntoSource<'e, B> + Clone> Evaluate<'e, C, B, O, D> {
    /// At the end of each epoch of the trainer, over one pass of `data`.
    pub fn each_epoch(name: impl Into<String>, evaluator: Engine<'e, C, B, O>, data: D) -> Self {
        Self::on(Event::EpochCompleted, name, evaluator, data)
    }

    /// At these events of the trainer, over one pass of `data`.
    pub fn on(
        events: impl Into<Events>,
        name: impl Into<String>,
        evaluator: Engine<'e, C, B, O>,
        data: D,
    ) -> Self {
        Self { name: name.into(), events: events.into(), evaluator, data, left: vec![] }
    }
}

impl<'e, C, B, O, D, TB, TO> Handler<C, TB, TO> for Evaluate<'e, C, B, O, D>
where
    D: IntoSource<'e, B> + Clone,
{
    fn name(&self) -> String {
        format!("evaluator {}", self.name)
    }

    fn events(&self) -> Events {
        self.events.clone()
    }

    fn unique_names(&self) -> Vec<String> {
        vec![format!("evaluation '{}'", self.name)]
    }

    fn save_state(&self) -> Result<Option<StateDict>> {
        let mut state = StateDict::new();
        state.set_part("evaluator", self.evaluator.lasting_state()?);
        state.set_value("left", &self.left)?;
        Ok(Some(state))
    }

    fn load_state(&mut self, mut state: StateDict) -> Result<()> {
        let left = state.value("left")?;
        self.evaluator.load_lasting_state(state.take_part("evaluator")?)?;
        self.left = left;
        Ok(())
    }

    fn call(
        &mut self,
        _event: Event,
        cx: &mut C,
        engine: &mut Engine<'_, C, TB, TO>,
    ) -> anyhow::Result<()> {
        // Always from the start, also after a run that was left early, and with no value of an
        // earlier run for what this one does not compute.
        self.evaluator.reset()?;
        self.evaluator.follow(engine);
        for name in self.left.drain(..) {
            engine.state.metrics.remove(&name);
        }
        self.evaluator.state.metrics.clear();
        self.evaluator.run(cx, self.data.clone(), Until::epochs(1))?;
        for (metric, value) in self.evaluator.state.metrics.iter() {
            let name = format!("{}/{metric}", self.name);
            engine.state.metrics.set(&name, value.share());
            self.left.push(name);
        }
        Ok(())
    }
}
