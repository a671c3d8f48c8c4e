//! A ready context for supervised learning, with its training and evaluation steps.

use tch::nn::ModuleT;
use tch::{Kind, Tensor};

use crate::amp::{GradScaler, autocast};
use crate::checkpoint::{Gradients, StateDict, Stateful};
use crate::data::Batch;
use crate::engine::{Engine, Evaluator, Event, Trainer};
use crate::memory_format::to_channels_last;
use crate::optim::Optimizer;
use crate::parallel::Parallel;
use crate::{Accumulation, Error, Result, Window};

/// Fired by the trainer of [`create_supervised_trainer`] after each step of the optimizer that was made:
/// not within a window of accumulation, and not where a [`GradScaler`] skipped it. A scheduler attached to
/// it counts updates.
///
/// With a `GradScaler` on CUDA, and only if something is attached, the trainer has to hear whether there
/// was a step: a host sync.
pub const OPTIMIZER_STEPPED: Event = Event::custom("optimizer_stepped");

/// What an evaluation step returns.
#[derive(Debug)]
pub struct Prediction {
    /// What the model gave, without gradients.
    pub y_pred: Tensor,
    /// The targets of the batch.
    pub y: Tensor,
}

impl Prediction {
    /// Both, as metrics take them.
    pub fn parts(&self) -> (&Tensor, &Tensor) {
        (&self.y_pred, &self.y)
    }
}

type LossFn = Box<dyn Fn(&Tensor, &Tensor) -> Tensor + Send>;

/// A model, its optimizer and a loss: the context of small programs.
pub struct Supervised<N> {
    /// The model.
    pub net: N,
    /// Its optimizer.
    pub optimizer: Optimizer,
    loss: LossFn,
    autocast: Option<Kind>,
    channels_last: bool,
    scaler: Option<GradScaler>,
    accumulation: Option<Accumulation>,
    parallel: Parallel,
    max_norm: Option<f64>,
    max_value: Option<f64>,
    grad_norm: Option<Tensor>,
    accumulated: Accumulated,
}

/// Where accumulation stands.
#[derive(Debug, Default)]
struct Accumulated {
    /// Batches whose gradients wait for a step, each of its loss divided by `size`.
    pending: u64,
    size: u64,
}

impl<N: ModuleT> Supervised<N> {
    /// `loss(y_pred, y)` gives one value, such as `|y_pred, y| y_pred.cross_entropy_for_logits(y)`.
    pub fn new(
        net: N,
        optimizer: Optimizer,
        loss: impl Fn(&Tensor, &Tensor) -> Tensor + Send + 'static,
    ) -> Self {
        Self {
            net,
            optimizer,
            loss: Box::new(loss),
            autocast: None,
            channels_last: false,
            scaler: None,
            accumulation: None,
            parallel: Parallel::default(),
            max_norm: None,
            max_value: None,
            grad_norm: None,
            accumulated: Accumulated::default(),
        }
    }

    /// Forward and loss under [`autocast`] to f16 or bf16, in training and evaluation.
    pub fn autocast(mut self, kind: Kind) -> Self {
        self.autocast = Some(kind);
        self
    }

    /// Gives the network its pictures with the channels last in memory: [`crate::memory_format`]. Bring the
    /// parameters there too, with [`channels_last_parameters`](crate::memory_format::channels_last_parameters).
    /// Inputs of other than four dimensions are then an error.
    pub fn channels_last(mut self) -> Self {
        self.channels_last = true;
        self
    }

    /// Scales the loss, and skips steps with gradients that are not finite. Keep a clone to read and save it.
    pub fn grad_scaler(mut self, scaler: GradScaler) -> Self {
        self.scaler = Some(scaler);
        self
    }

    /// One step for every `steps` batches, with the mean of their losses; the last window of an epoch may
    /// be shorter. See [`Accumulation`].
    pub fn accumulate(mut self, steps: u64) -> Result<Self> {
        self.accumulation = Some(Accumulation::new(steps)?);
        Ok(self)
    }

    /// Trains as one of several processes: forward and backward through this, gradients sent once for each window of
    /// accumulation. Evaluation does not go through it.
    #[cfg(feature = "distributed")]
    pub fn data_parallel(mut self, ddp: crate::distributed::DistributedDataParallel) -> Self {
        self.parallel = Parallel::new(ddp);
        self
    }

    /// Clips the gradients to a norm of at most `max` within the step: [`Optimizer::step_clipped`].
    pub fn clip_grad_norm(mut self, max: f64) -> Self {
        self.max_norm = Some(max);
        self
    }

    /// Brings every element of the gradients between `-max` and `max` before the step, and before clipping
    /// by norm.
    pub fn clip_grad_value(mut self, max: f64) -> Self {
        self.max_value = Some(max);
        self
    }

    /// The norm of the gradients before the last clipping by norm, on its device.
    pub fn grad_norm(&self) -> Option<&Tensor> {
        self.grad_norm.as_ref()
    }

    /// Forward in training mode, loss, backward, one step of the optimizer, with what was asked for of
    /// autocast, scaling, accumulation and clipping. Returns the loss, detached and on its device, whole
    /// also where it is divided for accumulation: no host sync.
    ///
    /// With accumulation each `steps`-th call steps; [`train_step_in`](Self::train_step_in) knows about the
    /// end of an epoch.
    pub fn train_step(&mut self, batch: Batch) -> anyhow::Result<Tensor> {
        let size = self.accumulation.map_or(1, Accumulation::steps);
        let pending = self.accumulated.pending;
        self.train_step_in(batch, Window { size, first: pending == 0, last: pending + 1 >= size })
    }

    /// [`train_step`](Self::train_step) for a batch that has this place in its window.
    pub fn train_step_in(&mut self, (x, y): Batch, window: Window) -> anyhow::Result<Tensor> {
        if window.first || self.accumulated.pending == 0 {
            self.optimizer.zero_grad()?;
            self.accumulated.pending = 0;
        }
        let x = self.formatted(x)?;
        // Gradients travel in the last backward of the window.
        let _local = (!window.last).then(|| self.parallel.no_sync());
        let (net, loss) = (&self.net, &self.loss);
        let forward = || loss(&net.forward_t(&x, true), &y);
        let loss = self.parallel.forward(|| match self.autocast {
            Some(kind) => autocast(x.device(), kind, forward),
            None => Ok(forward()),
        })?;
        let share = if window.size > 1 {
            loss.f_div_scalar(window.size as i64)?
        } else {
            loss.shallow_clone()
        };
        match &self.scaler {
            Some(scaler) => self.parallel.backward(&scaler.scale(&share)?)?,
            None => self.parallel.backward(&share)?,
        }
        self.accumulated.pending += 1;
        self.accumulated.size = window.size;
        if window.last {
            self.update()?;
        }
        Ok(loss.f_detach()?)
    }

    /// Steps for batches that wait for the end of their window, if there are any: at the end of an epoch
    /// whose length was not known, or that was left early. Says whether there were.
    pub fn finish_window(&mut self) -> anyhow::Result<bool> {
        let Accumulated { pending, size, .. } = self.accumulated;
        if pending == 0 {
            return Ok(false);
        }
        self.parallel.reduce_gradients()?;
        // Each loss was divided by more than there are.
        self.optimizer.gradients()?.scale(&Tensor::from(size as f64 / pending as f64))?;
        self.update()?;
        Ok(true)
    }

    fn update(&mut self) -> anyhow::Result<()> {
        self.accumulated.pending = 0;
        if let Some(max) = self.max_value {
            if let Some(scaler) = &self.scaler {
                scaler.unscale(&self.optimizer)?;
            }
            self.optimizer.clip_grad_value(max)?;
        }
        match (&self.scaler, self.max_norm) {
            (None, None) => self.optimizer.step()?,
            (None, Some(max)) => self.grad_norm = Some(self.optimizer.step_clipped(max)?),
            (Some(scaler), None) => scaler.step(&self.optimizer)?,
            (Some(scaler), Some(max)) => {
                self.grad_norm = Some(scaler.step_clipped(&self.optimizer, max)?);
            }
        }
        if let Some(scaler) = &self.scaler {
            scaler.update()?;
        }
        Ok(())
    }

    /// The place of a batch of the epoch, from 1.
    fn window(&self, number: u64, epoch_length: Option<u64>) -> Window {
        match self.accumulation {
            Some(accumulation) => accumulation.window(number.saturating_sub(1), epoch_length),
            None => Window { size: 1, first: true, last: true },
        }
    }

    fn formatted(&self, x: Tensor) -> Result<Tensor> {
        if self.channels_last { to_channels_last(&x) } else { Ok(x) }
    }

    /// Forward in evaluation mode, without gradients.
    pub fn eval_step(&mut self, (x, y): Batch) -> anyhow::Result<Prediction> {
        let _guard = tch::no_grad_guard();
        let x = self.formatted(x)?;
        let forward = || self.net.forward_t(&x, false);
        let y_pred = match self.autocast {
            Some(kind) => autocast(x.device(), kind, forward)?,
            None => forward(),
        };
        Ok(Prediction { y_pred, y })
    }
}

/// The scaler, and gradients that wait for a step. Model and optimizer are tracked by name.
impl<N> Stateful for Supervised<N> {
    fn state_dict(&self) -> Result<StateDict> {
        let mut state = StateDict::new();
        let Accumulated { pending, size } = self.accumulated;
        state.set_value("accumulated", (pending, size))?;
        if let Some(norm) = &self.grad_norm {
            state.set_tensor("grad_norm", norm.shallow_clone());
        }
        if pending > 0 {
            state.set_part("gradients", self.gradients().state_dict()?);
        }
        if let Some(scaler) = &self.scaler {
            state.set_part("scaler", Stateful::state_dict(scaler)?);
        }
        Ok(state)
    }

    fn load_state_dict(&mut self, mut state: StateDict) -> Result<()> {
        let (pending, size) = state.value("accumulated")?;
        if pending > 0 {
            self.gradients().load_state_dict(state.take_part("gradients")?)?;
        }
        match &mut self.scaler {
            Some(scaler) => Stateful::load_state_dict(scaler, state.take_part("scaler")?)?,
            None if state.part("scaler").is_ok() => {
                return Err(Error::State("a GradScaler was used, and is not here".into()));
            }
            None => {}
        }
        self.accumulated = Accumulated { pending, size };
        self.grad_norm = state.take_tensor("grad_norm").ok();
        Ok(())
    }

    /// Within a window: gradients are exchanged at its end.
    fn differs_by_rank(&self) -> bool {
        self.accumulated.pending > 0
    }
}

impl<N> Supervised<N> {
    fn gradients(&self) -> Gradients {
        Gradients::of_optimizer(&self.optimizer)
    }
}

/// A trainer with [`Supervised::train_step`]: ignite's `create_supervised_trainer`. It fires
/// [`OPTIMIZER_STEPPED`], and steps for what is left of a window at the end of an epoch. Checkpoints hold
/// the scaler's state and, within a window, the gradients.
pub fn create_supervised_trainer<'a, N: ModuleT + 'a>() -> Trainer<'a, Supervised<N>> {
    let mut trainer = Engine::new(|cx: &mut Supervised<N>, engine: &mut Trainer<'a, _>, batch| {
        let window = cx.window(engine.iteration_in_epoch(), engine.state.epoch_length);
        let loss = cx.train_step_in(batch, window)?;
        if window.last {
            fire_stepped(cx, engine)?;
        }
        Ok(loss)
    });
    trainer.track_context().track_output();
    trainer.context_has_no_model();
    // Its own name, registered once: this cannot fail, and if it did, firing would say so.
    let _ = trainer.register_events([OPTIMIZER_STEPPED]);
    trainer.on(Event::EpochCompleted, |cx: &mut Supervised<N>, engine| {
        if cx.finish_window()? {
            fire_stepped(cx, engine)?;
        }
        Ok(())
    });
    trainer
}

fn fire_stepped<N: ModuleT>(
    cx: &mut Supervised<N>,
    engine: &mut Trainer<'_, Supervised<N>>,
) -> anyhow::Result<()> {
    if !engine.listens(OPTIMIZER_STEPPED) {
        return Ok(());
    }
    let skipped = cx.scaler.as_ref().map_or(Ok(false), GradScaler::last_skipped)?;
    if !skipped {
        engine.fire_event(OPTIMIZER_STEPPED, cx)?;
    }
    Ok(())
}

/// An evaluator with [`Supervised::eval_step`]: ignite's `create_supervised_evaluator`.
pub fn create_supervised_evaluator<'a, N: ModuleT + 'a>() -> Evaluator<'a, Supervised<N>> {
    Engine::new(|cx: &mut Supervised<N>, _, batch| cx.eval_step(batch))
}
