//! The four handlers that look at the parameters of a model: norms and histograms, of weights and of
//! gradients.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use tch::nn::{VarStore, Variables};
use tch::{Device, Kind, Tensor};

use super::{Histogram, Logger, step_at, tagged};
use crate::bridge::TensorId;
use crate::engine::{Engine, Event, Events, Handler};

/// Parameters by name, those that a handler was told to look at.
struct Parameters {
    variables: Arc<Mutex<Variables>>,
    whitelist: Box<dyn Fn(&str) -> bool>,
}

impl Parameters {
    fn of(vs: &VarStore) -> Self {
        Self { variables: vs.variables_.clone(), whitelist: Box::new(|_| true) }
    }

    /// Names and tensors, in the order in which they were made; of gradients those that exist.
    fn listed(&self, gradients: bool) -> anyhow::Result<Vec<(String, Tensor)>> {
        let (named, tensors) = {
            let variables = self.variables.lock().unwrap_or_else(PoisonError::into_inner);
            let named: HashMap<_, _> = (variables.named_variables.iter())
                .map(|(name, tensor)| (TensorId::of(tensor), name.clone()))
                .collect();
            let tensors: Vec<_> = variables
                .trainable_variables
                .iter()
                .map(|var| var.tensor.shallow_clone())
                .collect();
            (named, tensors)
        };
        let mut listed = vec![];
        for tensor in tensors {
            let Some(name) = named.get(&TensorId::of(&tensor)) else { continue };
            if !(self.whitelist)(name) {
                continue;
            }
            let tensor = if gradients { tensor.f_grad()? } else { tensor.f_detach()? };
            if tensor.defined() {
                listed.push((name.replace('.', "/"), tensor));
            }
        }
        Ok(listed)
    }

    /// Names and Euclidean norms. One host sync for all.
    fn norms(&self, gradients: bool) -> anyhow::Result<Vec<(String, f64)>> {
        let _guard = tch::no_grad_guard();
        let listed = self.listed(gradients)?;
        if listed.is_empty() {
            return Ok(vec![]);
        }
        let norm = |tensor: &Tensor| -> Result<Tensor, tch::TchError> {
            // Squares of halves overflow soon.
            let kind = match tensor.kind() {
                kind @ (Kind::Float | Kind::Double) => kind,
                _ => Kind::Float,
            };
            tensor.f_norm_scalaropt_dtype(2, kind)?.f_to_kind(Kind::Double)
        };
        let norms = listed.iter().map(|(_, tensor)| norm(tensor)).collect::<Result<Vec<_>, _>>()?;
        let norms = Tensor::f_stack(&norms, 0)?.f_to_device(Device::Cpu)?;
        let names = listed.into_iter().map(|(name, _)| name);
        Ok(names.zip(Vec::<f64>::try_from(norms)?).collect())
    }
}

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

            fn events(&self) -> Events {
                self.events.clone()
            }

            fn call(
                &mut self,
                event: Event,
                _cx: &mut C,
                engine: &mut Engine<'_, C, B, O>,
            ) -> anyhow::Result<()> {
                let step = step_at(event, &engine.state);
                let tag = tagged(&self.tag, $kind);
                $log(&*self.logger, &tag, &self.parameters, $gradients, step)
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
    for (name, norm) in parameters.norms(gradients)? {
        logger.scalar(&format!("{tag}/{name}"), norm, step)?;
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
        logger.histogram(&format!("{tag}/{name}"), &Histogram::of(&tensor)?, step)?;
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
