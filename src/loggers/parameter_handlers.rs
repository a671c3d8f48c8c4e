//! The four handlers that look at the parameters of a model: norms and histograms, of weights and of
//! gradients.

use tch::nn::VarStore;
use tch::{Device, Tensor};

use super::{Histogram, Logger, attend, step_at, tagged, with_ends};
use crate::engine::{Engine, Handler, Log, Priority, Ranks};
use crate::event::Event;
use crate::event_filter::Events;
use crate::optim::Parameters;

macro_rules! handler {
    ($(#[$doc:meta])* $name:ident, $kind:literal, $gradients:literal, $log:ident) => {
        $(#[$doc])*
        pub struct $name {
            logger: Box<dyn Logger>,
            tag: String,
            parameters: Parameters,
            events: Events,
        }

        impl $name {
            /// Logs all parameters of the store, at these events.
            pub fn new<L: Logger + Clone + 'static>(
                logger: &L,
                tag: impl Into<String>,
                vs: &VarStore,
                events: impl Into<Events>,
            ) -> Self {
                Self {
                    logger: Box::new(logger.clone()),
                    tag: tag.into(),
                    parameters: Parameters::of(vs),
                    events: events.into(),
                }
            }

            /// Only those whose name passes, such as `|name| name.starts_with("fc")`.
            pub fn whitelist(mut self, passes: impl Fn(&str) -> bool + 'static) -> Self {
                self.parameters.whitelist = Box::new(passes);
                self
            }
        }

        impl<C, B, O> Handler<C, B, O> for $name {
            fn name(&self) -> String {
                concat!("logger of ", $kind).into()
            }

            fn ranks(&self) -> Ranks {
                Ranks::Main
            }

            fn events(&self) -> Events {
                with_ends(&self.events)
            }

            fn priority(&self) -> Priority {
                Priority::Last
            }

            fn logs(&self) -> Vec<Box<dyn Log>> {
                self.logger.logs()
            }

            fn call(
                &mut self,
                event: Event,
                _cx: &mut C,
                engine: &mut Engine<'_, C, B, O>,
            ) -> anyhow::Result<()> {
                attend(&*self.logger, &self.events, event, engine, |engine| {
                    let step = step_at(event, &engine.state);
                    let tag = tagged(&self.tag, $kind);
                    $log(&*self.logger, &tag, &self.parameters, $gradients, step)
                })
            }
        }
    };
}

fn log_norms(
    logger: &dyn Logger,
    tag: &str,
    parameters: &Parameters,
    gradients: bool,
    step: u64,
) -> anyhow::Result<()> {
    let (names, norms) = parameters.norms(gradients)?;
    if norms.is_empty() {
        return Ok(());
    }
    let norms = Vec::<f64>::try_from(Tensor::f_stack(&norms, 0)?.f_to_device(Device::Cpu)?)?;
    for (name, norm) in names.iter().zip(norms) {
        logger.scalar(&format!("{tag}/{}", name.replace('.', "/")), norm, step)?;
    }
    Ok(())
}

fn log_histograms(
    logger: &dyn Logger,
    tag: &str,
    parameters: &Parameters,
    gradients: bool,
    step: u64,
) -> anyhow::Result<()> {
    for (name, tensor) in parameters.listed(gradients)? {
        let tag = format!("{tag}/{}", name.replace('.', "/"));
        logger.histogram(&tag, &Histogram::of(&tensor)?, step)?;
    }
    Ok(())
}

handler! {
    /// Logs the norm of each parameter, as `weights_norm/fc/weight`. One host sync for all.
    WeightsScalarHandler, "weights_norm", false, log_norms
}

handler! {
    /// Logs the norm of each gradient there is, as `grads_norm/fc/weight`. One host sync for all.
    ///
    /// On [`Event::IterationCompleted`] they are those of the step before, if the step clears them
    /// at its beginning.
    GradsScalarHandler, "grads_norm", true, log_norms
}

handler! {
    /// Logs a [`Histogram`] of each parameter, as `weights/fc/weight`. Two host syncs for each.
    WeightsHistHandler, "weights", false, log_histograms
}

handler! {
    /// Logs a [`Histogram`] of each gradient there is, as `grads/fc/weight`. Two host syncs for each.
    GradsHistHandler, "grads", true, log_histograms
}
