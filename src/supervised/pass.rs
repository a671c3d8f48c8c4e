use tch::{Device, Kind, Tensor};

use super::single_sample::SingleSample;
use super::tensors::{Tensors, description};
use crate::accumulate::{GradientAccumulator, Weight, WeightedLoss};
use crate::amp::autocast;
use crate::error::{Error, Panicked, Result};
use crate::guard::guarded;
use crate::memory_format::to_channels_last;
use crate::optim::Optimizer;

/// One batch on its way through the model: how it runs there, and what training keeps of it.
pub(super) struct Pass<'p> {
    pub(super) autocast: Option<Kind>,
    pub(super) channels_last: bool,
    /// `None` in evaluation.
    pub(super) training: Option<Training<'p>>,
}

pub(super) struct Training<'p> {
    pub(super) optimizer: &'p Optimizer,
    pub(super) accumulator: &'p GradientAccumulator,
    pub(super) single_sample: &'p mut SingleSample,
    /// The loss and its weight, once the batch went through.
    pub(super) loss: Option<(Tensor, Weight)>,
}

impl Pass<'_> {
    /// Runs `model(input, train)` and, in training, the loss. Returns the prediction. `targets` describes the targets
    /// for errors.
    pub(super) fn run<X: Tensors, P>(
        &mut self,
        input: X,
        targets: impl Fn() -> Option<String>,
        model: impl Fn(&X, bool) -> Result<P>,
        loss: impl Fn(&P) -> WeightedLoss,
    ) -> anyhow::Result<P> {
        let channels_last = self.channels_last;
        let input = match channels_last {
            true => input.map(&mut |tensor| to_channels_last(&tensor))?,
            false => input,
        };
        let (mut device, mut shapes) = (None, vec![]);
        let training = self.training.is_some();
        input.each(&mut |tensor| {
            device.get_or_insert_with(|| tensor.device());
            if training {
                shapes.push(tensor.size());
            }
        });
        let device: Device = device.ok_or_else(|| {
            Error::invalid(
                "the input of the model holds no tensor: give it at least one in the batch, or by prepare_batch",
            )
        })?;
        let kind = self.autocast;
        let passed = guarded(|| match &mut self.training {
            Some(training) => {
                Ok(training.run(kind, device, shapes, || model(&input, true), loss)?)
            }
            None => {
                let forward = || model(&input, false);
                Ok(match kind {
                    Some(kind) => autocast(device, kind, forward)?,
                    None => forward(),
                }?)
            }
        });
        passed.map_err(|error| {
            with_batch(error, || match targets() {
                Some(targets) => format!("input {}, targets {targets}", description(&input)),
                None => format!("input {}", description(&input)),
            })
        })
    }
}

impl Training<'_> {
    fn run<P>(
        &mut self,
        kind: Option<Kind>,
        device: Device,
        shapes: Vec<Vec<i64>>,
        model: impl Fn() -> Result<P>,
        loss: impl Fn(&P) -> WeightedLoss,
    ) -> Result<P> {
        let samples = shapes.first().and_then(|shape| shape.first()).map_or(1, |samples| *samples);
        let (mut prediction, mut weight) = (None, None);
        let mut forward = || {
            let y_pred = model()?;
            let weighted = loss(&y_pred);
            (prediction, weight) = (Some(y_pred), weighted.weight);
            Ok(weighted.loss)
        };
        let accumulator = self.accumulator;
        let loss = self.single_sample.checked(self.optimizer, shapes, || {
            accumulator.forward_result(|| match kind {
                Some(kind) => autocast(device, kind, forward)?,
                None => forward(),
            })
        })?;
        self.loss = Some((loss, weight.unwrap_or(Weight::from(samples))));
        prediction.ok_or_else(|| Error::invalid("the model was not called"))
    }
}

/// Adds the batch to an error of libtorch; other errors stay as they are.
fn with_batch(error: anyhow::Error, batch: impl Fn() -> String) -> anyhow::Error {
    match error.downcast::<Panicked>() {
        Ok(Panicked(text)) if text.starts_with("libtorch: ") => {
            Panicked(format!("{} ({})", text.trim_end(), batch())).into()
        }
        Ok(panicked) => panicked.into(),
        Err(error) => match error.downcast::<Error>() {
            Ok(Error::Libtorch { operation, message }) => {
                let message = format!("{} ({})", message.trim_end(), batch());
                Error::Libtorch { operation, message }.into()
            }
            Ok(error) => error.into(),
            Err(error) => error,
        },
    }
}
