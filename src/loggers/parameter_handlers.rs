//! The four handlers that log the parameters of a model: norms and histograms, of weights and of gradients.

use tch::nn::VarStore;
use tch::{Device, Tensor};

use super::{Histogram, Logger, attend, spec_of, step_at, tagged};
use crate::engine::{Engine, Handler, HandlerSpec};
use crate::error::Result;
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

        crate::debug::opaque_debug!($name);

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

            /// Logs only parameters whose name passes, such as `|name| name.starts_with("fc")`.
            pub fn whitelist(mut self, passes: impl Fn(&str) -> bool + 'static) -> Self {
                self.parameters.whitelist = Box::new(passes);
                self
            }
        }

        impl<C, B, O> Handler<C, B, O> for $name {
            fn spec(&self) -> Result<HandlerSpec> {
                Ok(spec_of(&*self.logger, concat!("logger of ", $kind), &self.events))
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
    /// Logs the norm of each parameter, as `weights_norm/fc/weight`. Costs one host sync for all.
    WeightsScalarHandler, "weights_norm", false, log_norms
}

handler! {
    /// Logs the norm of each gradient that exists, as `grads_norm/fc/weight`. Costs one host sync for all.
    ///
    /// At [`Event::IterationCompleted`] the gradients are those of the step just done, if the step clears them at its
    /// beginning and not at its end.
    GradsScalarHandler, "grads_norm", true, log_norms
}

handler! {
    /// Logs a [`Histogram`] of each parameter, as `weights/fc/weight`. Costs two host syncs for each.
    WeightsHistHandler, "weights", false, log_histograms
}

handler! {
    /// Logs a [`Histogram`] of each gradient that exists, as `grads/fc/weight`. Costs two host syncs for each.
    GradsHistHandler, "grads", true, log_histograms
}
