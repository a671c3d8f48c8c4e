use super::{Logger, attend, spec_of, step_at, tagged};
use crate::engine::{Engine, Handler, HandlerSpec};
use crate::error::Result;
use crate::event::Event;
use crate::event_filter::Events;
use crate::optim::Optimizer;

/// Logs a hyper-parameter of each parameter group, as `tag/lr/group_0`: ignite's `OptimizerParamsHandler`.
///
/// Costs a read of each group, and no host sync. The handler acts after the other handlers of its events
/// ([`Priority::Last`](crate::engine::Priority::Last)): at [`Event::IterationStarted`] it logs the values that the step
/// will use.
///
/// ```
/// # use tch::{Device, nn};
/// use tch_ignite::engine::{Engine, Event, Until};
/// use tch_ignite::loggers::{CsvLogger, OptimizerParamsHandler};
/// use tch_ignite::optim::Optimizer;
/// # let folder = std::env::temp_dir().join(format!("tch-ignite-params-{}", std::process::id()));
/// # let vs = nn::VarStore::new(Device::Cpu);
/// # nn::linear(vs.root(), 1, 1, Default::default());
/// let csv = CsvLogger::open(folder.join("log.csv"))?;
/// let optimizer = Optimizer::sgd(&vs).build()?;
/// let mut trainer = Engine::new(|_: &mut (), _, _: ()| Ok(()));
/// trainer.attach(OptimizerParamsHandler::new(&csv, "", &optimizer, Event::IterationStarted.every(10)));
/// trainer.run(&mut (), vec![(); 10], Until::epochs(1))?;
/// # drop((trainer, csv));
/// # assert!(std::fs::read_to_string(folder.join("log.csv"))?.contains(",10,lr/group_0,"));
/// # std::fs::remove_dir_all(folder)?;
/// # Ok::<(), anyhow::Error>(())
/// ```
#[doc(alias = "LearningRateMonitor")]
#[must_use = "a handler is called only once it is attached: `Engine::attach`"]
pub struct OptimizerParamsHandler {
    logger: Box<dyn Logger>,
    tag: String,
    optimizer: Optimizer,
    param: String,
    by_name: bool,
    events: Events,
}

crate::debug::opaque_debug!(OptimizerParamsHandler);

impl OptimizerParamsHandler {
    /// Logs the learning rates at these events.
    pub fn new<L: Logger + Clone + 'static>(
        logger: &L,
        tag: impl Into<String>,
        optimizer: &Optimizer,
        events: impl Into<Events>,
    ) -> Self {
        Self {
            logger: Box::new(logger.clone()),
            tag: tag.into(),
            optimizer: optimizer.clone(),
            param: "lr".into(),
            by_name: false,
            events: events.into(),
        }
    }

    /// Logs another hyper-parameter, such as `"weight_decay"`.
    pub fn param(mut self, name: impl Into<String>) -> Self {
        self.param = name.into();
        self
    }

    /// Uses the names of the groups in tags (`lr/fc`), instead of their numbers.
    pub fn by_name(mut self) -> Self {
        self.by_name = true;
        self
    }
}

impl<C, B, O> Handler<C, B, O> for OptimizerParamsHandler {
    fn spec(&self) -> Result<HandlerSpec> {
        Ok(spec_of(&*self.logger, format!("logger of {}", self.param), &self.events))
    }

    fn call(
        &mut self,
        event: Event,
        _cx: &mut C,
        engine: &mut Engine<'_, C, B, O>,
    ) -> anyhow::Result<()> {
        attend(&*self.logger, &self.events, event, engine, |engine| {
            let step = step_at(event, &engine.state);
            for (index, group) in self.optimizer.groups()?.iter().enumerate() {
                let name = if self.by_name { group.name() } else { format!("group_{index}") };
                let tag = tagged(&self.tag, &format!("{}/{name}", self.param));
                self.logger.scalar(&tag, group.get(&self.param)?, step)?;
            }
            Ok(())
        })
    }
}
