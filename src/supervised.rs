//! A ready-made context for supervised learning, with its training and evaluation steps.

use std::sync::PoisonError;

use tch::nn::ModuleT;
use tch::{Kind, Tensor};

pub use crate::event::{OPTIMIZER_STEPPED, WINDOW_COMPLETED};

use crate::accumulate::{Accumulation, GradientAccumulator, Weight, WeightedLoss, Window};
use crate::amp::{GradScaler, Saved, autocast};
use crate::bridge::{BatchNormWatch, TensorId};
use crate::data::Batch;
use crate::engine::{Engine, Evaluator, Trainer};
use crate::error::{Error, Result};
use crate::event::Event;
use crate::memory_format::to_channels_last;
use crate::optim::{Optimizer, Sam};
pub use crate::prediction::Prediction;
use crate::state::{EvaluationWeights, SavedGradients, StateDict, Stateful};

type LossFn = Box<dyn Fn(&Tensor, &Tensor) -> WeightedLoss + Send>;

/// A model, its optimizer and a loss. Small programs use this as the context of their engines.
#[doc(alias = "LightningModule")]
#[doc(alias = "training_step")]
pub struct Supervised<N> {
    /// The model.
    pub net: N,
    /// The optimizer of the model's parameters.
    pub optimizer: Optimizer,
    loss: LossFn,
    autocast: Option<Kind>,
    channels_last: bool,
    accumulator: GradientAccumulator,
    max_norm: Option<f64>,
    max_value: Option<f64>,
    sam: Option<Sam>,
    /// The norm of the gradients before the last clipping by norm; `None` until there was one.
    grad_norm: Option<Tensor>,
    /// The shape of the last batch of one sample that passed the check of batch normalisation, so that it need not be
    /// checked again.
    single: Option<Vec<i64>>,
    /// The number of variables when the store was last searched for batch normalisation, and whether it had any.
    batch_norm: Option<(usize, bool)>,
}

crate::debug::opaque_debug!(Supervised<N>);

impl<N: ModuleT> Supervised<N> {
    /// Makes a context. `loss(y_pred, y)` returns a scalar, the mean over the samples of the batch, such as
    /// `|y_pred, y| y_pred.cross_entropy_for_logits(y)`.
    ///
    /// If batches share a step, by [`accumulate`](Self::accumulate) or among ranks, each counts by its number of
    /// samples: the first dimension of the input. A loss that is a mean over other units returns `(loss, weight)`,
    /// where the [`Weight`] is the number of units: a number, or a tensor, which is not read on a GPU. Then the
    /// gradient is that of one large batch:
    ///
    /// ```
    /// # use tch::{Device, Kind, nn};
    /// # use tch_ignite::optim::Optimizer;
    /// # use tch_ignite::supervised::Supervised;
    /// # let vs = nn::VarStore::new(Device::Cpu);
    /// # let net = nn::linear(vs.root(), 8, 100, Default::default());
    /// # let optimizer = Optimizer::sgd(&vs).build()?;
    /// const PADDING: i64 = -100;
    /// // A mean over the tokens that are no padding.
    /// let cx = Supervised::new(net, optimizer, |logits, tokens| {
    ///     let (logits, tokens) = (logits.flatten(0, -2), tokens.flatten(0, -1));
    ///     let loss = logits.cross_entropy_loss::<tch::Tensor>(&tokens, None, tch::Reduction::Mean, PADDING, 0.0);
    ///     (loss, tokens.ne(PADDING).sum(Kind::Int64))
    /// });
    /// let cx = cx.accumulate(4)?;
    /// # let _ = cx;
    /// # Ok::<(), tch_ignite::Error>(())
    /// ```
    pub fn new<L: Into<WeightedLoss>>(
        net: N,
        optimizer: Optimizer,
        loss: impl Fn(&Tensor, &Tensor) -> L + Send + 'static,
    ) -> Self {
        Self {
            net,
            optimizer,
            loss: Box::new(move |y_pred, y| loss(y_pred, y).into()),
            autocast: None,
            channels_last: false,
            accumulator: GradientAccumulator::unshared(),
            max_norm: None,
            max_value: None,
            sam: None,
            grad_norm: None,
            single: None,
            batch_norm: None,
        }
    }

    /// Runs forward and loss under [`autocast`] to `kind`, f16 or bf16, in training; in evaluation the forward alone.
    pub fn autocast(mut self, kind: Kind) -> Self {
        self.autocast = Some(kind);
        self
    }

    /// Brings the inputs (pictures of shape (N, C, H, W)) into channels last before the network gets them: see
    /// [`crate::memory_format`]. Convert the parameters too, with
    /// [`channels_last_parameters`](crate::memory_format::channels_last_parameters). Steps are then errors for inputs
    /// that do not have four dimensions.
    pub fn channels_last(mut self) -> Self {
        self.channels_last = true;
        self
    }

    /// Scales the loss, and skips steps with gradients that are not finite. Keep a clone of the scaler to read its
    /// scale.
    pub fn grad_scaler(mut self, scaler: GradScaler) -> Self {
        self.accumulator = self.accumulator.grad_scaler(scaler);
        self
    }

    /// Makes one step for every `steps` batches, with the gradient of one batch of all their samples (or other units of
    /// the loss: see [`new`](Self::new)). A window may be shorter at the end of an epoch, or if a budget, `terminate`
    /// or a batch that is lost to an error cuts it short: then the step is that of the remaining batches. See
    /// [`Accumulation`] and [`GradientAccumulator`].
    ///
    /// # Errors
    /// `steps` is 0.
    pub fn accumulate(mut self, steps: u64) -> Result<Self> {
        self.accumulator.set_steps(Accumulation::new(steps)?);
        Ok(self)
    }

    /// Makes batches that share a step, by accumulation or among ranks, count the same whatever their size, as in
    /// torch's DistributedDataParallel: the step is that of the mean of their losses. Ranks then need no exchange of
    /// weights.
    pub fn equal_weights(mut self) -> Self {
        self.accumulator = self.accumulator.equal_weights();
        self
    }

    /// Trains as one of several processes: forward and backward run through `ddp`, which sends the gradients once for
    /// each window of accumulation. Evaluation does not use `ddp`. Ranks are weighed by the sizes of their batches,
    /// which costs an exchange of one number for each step: see [`GradientAccumulator::data_parallel`].
    #[cfg(feature = "distributed")]
    pub fn data_parallel(mut self, ddp: crate::distributed::DistributedDataParallel) -> Self {
        self.accumulator = self.accumulator.data_parallel(ddp);
        self
    }

    /// Clips the gradients to a norm of at most `max` within the step: [`Optimizer::step_clipped`].
    pub fn clip_grad_norm(mut self, max: f64) -> Self {
        self.max_norm = Some(max);
        self
    }

    /// Limits every element of the gradients to `-max` to `max` before the step, and before clipping by norm.
    pub fn clip_grad_value(mut self, max: f64) -> Self {
        self.max_value = Some(max);
        self
    }

    /// Makes the steps sharpness-aware: each batch is evaluated twice. `sam` is around this context's optimizer. Clipping
    /// is of the second gradient. See [`train_step`](Self::train_step) for the options that steps of this kind refuse.
    pub fn sam(mut self, sam: Sam) -> Self {
        self.sam = Some(sam);
        self
    }

    /// The norm of the gradients before the last clipping by norm, a tensor of one element on the gradients' device;
    /// `None` until there was one.
    pub fn grad_norm(&self) -> Option<&Tensor> {
        self.grad_norm.as_ref()
    }

    /// Runs forward in training mode, the loss, backward, and a step of the optimizer, with the options for autocast,
    /// scaling, accumulation and clipping. Returns the loss as the loss function gave it (not divided for
    /// accumulation), detached and on its device. No host sync.
    ///
    /// With accumulation each `steps`-th call makes a step. Use [`train_step_in`](Self::train_step_in) where the end of
    /// an epoch may cut a window short.
    ///
    /// Where the step evaluates the loss by itself ([`Sam`], and [`Lbfgs`](crate::optim::Lbfgs) as the optimizer), it
    /// evaluates this batch again. Such steps refuse accumulation and scaling; those of LBFGS, which looks at the loss of
    /// this rank alone and needs the gradient as it is, also refuse data-parallel training and clipping.
    ///
    /// # Errors
    /// A batch of one sample that leaves a layer of batch normalisation with a single value for each channel, as in
    /// PyTorch, because the running variance would be NaN for ever; the error names the layers, and parameters and
    /// running averages are unchanged. Also the errors of [`GradientAccumulator::backward`] and [`Optimizer::step`],
    /// and an input without four dimensions after [`channels_last`](Self::channels_last).
    pub fn train_step(&mut self, batch: Batch) -> anyhow::Result<Tensor> {
        let window = self.accumulator.next_window();
        self.train_step_in(batch, window)
    }

    /// [`train_step`](Self::train_step) for a batch that has this place in its window. If batches of another window
    /// wait, because its last batch was lost to an error, a step is made for them first.
    ///
    /// # Errors
    /// The errors of [`train_step`](Self::train_step).
    pub fn train_step_in(&mut self, (x, y): Batch, window: Window) -> anyhow::Result<Tensor> {
        self.optimizer.train()?;
        if self.sam.is_some() || self.optimizer.needs_closure() {
            let x = self.formatted(x)?;
            return self.step_with_closure(&x, &y, window);
        }
        while self.accumulator.begin(&self.optimizer, window)? {
            self.update()?;
        }
        let x = self.formatted(x)?;
        let (loss, ready) = self.forward_and_backward(&x, &y)?;
        if ready {
            self.update()?;
        }
        Ok(loss.f_detach()?)
    }

    /// Makes a step that evaluates the batch as often as it needs.
    fn step_with_closure(
        &mut self,
        x: &Tensor,
        y: &Tensor,
        window: Window,
    ) -> anyhow::Result<Tensor> {
        let sam = self.sam.clone();
        let name = if sam.is_some() { "SAM" } else { self.optimizer.name() };
        let refused = [
            (self.accumulator.steps() > 1, "accumulation: give it larger batches"),
            (self.accumulator.scaler().is_some(), "a GradScaler: train in bf16 or f32"),
            (
                sam.is_none() && (self.max_norm.is_some() || self.max_value.is_some()),
                "clipping: limit the step by its line search",
            ),
            (sam.is_none() && self.accumulator.is_parallel(), "several ranks: train with one"),
        ];
        if let Some((_, what)) = refused.into_iter().find(|(refused, _)| *refused) {
            return Err(Error::invalid(format!(
                "{name} evaluates a batch several times in a step, and does not go with {what}"
            ))
            .into());
        }
        let optimizer = self.optimizer.clone();
        if sam.as_ref().is_some_and(|sam| !sam.optimizer().is(&optimizer)) {
            return Err(Error::invalid(
                "the Sam is around another optimizer than the one of this Supervised: make it of that one",
            )
            .into());
        }
        let mut evaluate = || -> anyhow::Result<Tensor> {
            self.accumulator.begin(&optimizer, window)?;
            Ok(self.forward_and_backward(x, y)?.0)
        };
        let loss = match sam {
            None => optimizer.step_with(evaluate)?,
            Some(sam) => {
                let loss = sam.gradients_beside(&mut evaluate)?;
                self.update()?;
                loss
            }
        };
        Ok(loss.f_detach()?)
    }

    /// Runs forward, the loss and backward of a batch that has begun. Returns the loss, and whether the gradients are
    /// ready for a step.
    fn forward_and_backward(&mut self, x: &Tensor, y: &Tensor) -> anyhow::Result<(Tensor, bool)> {
        let shape = x.size();
        let samples = shape.first().map_or(1, |samples| *samples);
        let looks = samples == 1 && self.single.as_ref() != Some(&shape) && self.has_batch_norm();
        let watch = looks.then(BatchNormWatch::looking_for_single_values).transpose();
        let watch = watch.map_err(|text| Error::libtorch("watching batch normalisation", text))?;
        let (net, loss) = (&self.net, &self.loss);
        let mut weight = None;
        let mut forward = || {
            let weighted = loss(&net.forward_t(x, true), y);
            weight = weighted.weight;
            weighted.loss
        };
        let loss = self.accumulator.forward_result(|| match self.autocast {
            Some(kind) => autocast(x.device(), kind, forward),
            None => Ok(forward()),
        })?;
        if let Some(watch) = watch {
            self.check_single(&watch.single_values())?;
            let kept = watch.keep();
            kept.map_err(|text| Error::libtorch("watching batch normalisation", text))?;
            self.single = Some(shape);
        }
        let weight = weight.unwrap_or(Weight::from(samples));
        let ready = self.accumulator.backward(&self.optimizer, &loss, weight)?;
        Ok((loss, ready))
    }

    /// Whether the store has a layer of batch normalisation, by the names of the variables.
    fn has_batch_norm(&mut self) -> bool {
        let variables = self.optimizer.variables();
        let variables = variables.lock().unwrap_or_else(PoisonError::into_inner);
        let named = &variables.named_variables;
        match self.batch_norm {
            Some((count, has)) if count == named.len() => has,
            _ => {
                let has = named.keys().any(|name| name.ends_with("running_var"));
                self.batch_norm = Some((named.len(), has));
                has
            }
        }
    }

    /// Refuses a batch if layers of batch normalisation (given by their running variances) got a single value for each
    /// channel.
    fn check_single(&self, running_variances: &[TensorId]) -> Result<()> {
        if running_variances.is_empty() {
            return Ok(());
        }
        let variables = self.optimizer.variables();
        let variables = variables.lock().unwrap_or_else(PoisonError::into_inner);
        let name_of = |id: &TensorId| {
            let mut all = variables.named_variables.iter();
            let name = all.find(|(_, tensor)| TensorId::of(tensor) == *id)?.0;
            Some(format!("'{}'", name.strip_suffix(".running_var").unwrap_or(name)))
        };
        let names: Vec<_> = running_variances
            .iter()
            .map(|id| name_of(id).unwrap_or_else(|| "a layer of another store".into()))
            .collect();
        Err(Error::invalid(format!(
            "batch normalisation has one value for each channel in this batch of one sample ({}): they have no variance, and the running variance would be NaN from then on. Leave the last batch out (`drop_last`), or choose another batch size; the running averages are as they were",
            names.join(", ")
        )))
    }

    /// Makes a step for batches that wait for the end of their window, and returns whether there were any. Call this at
    /// the end of an epoch whose length was not known, and after a run or an epoch that ended early.
    ///
    /// # Errors
    /// The errors of [`GradientAccumulator::finish`] and [`Optimizer::step`].
    pub fn finish_window(&mut self) -> anyhow::Result<bool> {
        let waited = self.accumulator.finish(&self.optimizer)?;
        if waited {
            self.update()?;
        }
        Ok(waited)
    }

    /// Clips the gradients, makes a step of the optimizer, and updates the scaler.
    fn update(&mut self) -> anyhow::Result<()> {
        let updated = self.clip_and_step();
        if let (Err(_), Some(scaler)) = (&updated, self.accumulator.scaler()) {
            // The batch is given up, and the gradients of the next one are neither unscaled nor checked.
            scaler.forget(&self.optimizer);
        }
        updated
    }

    fn clip_and_step(&mut self) -> anyhow::Result<()> {
        let scaler = self.accumulator.scaler();
        if let Some(max) = self.max_value {
            if let Some(scaler) = scaler {
                scaler.unscale(&self.optimizer)?;
            }
            self.optimizer.clip_grad_value(max)?;
        }
        match (scaler, self.max_norm) {
            (None, None) => self.optimizer.step()?,
            (None, Some(max)) => self.grad_norm = Some(self.optimizer.step_clipped(max)?),
            (Some(scaler), None) => scaler.step(&self.optimizer)?,
            (Some(scaler), Some(max)) => {
                self.grad_norm = Some(scaler.step_clipped(&self.optimizer, max)?);
            }
        }
        if let Some(scaler) = scaler {
            scaler.update()?;
        }
        Ok(())
    }

    fn formatted(&self, x: Tensor) -> Result<Tensor> {
        if self.channels_last { to_channels_last(&x) } else { Ok(x) }
    }

    /// Runs forward in evaluation mode, without gradients, with the values for evaluation where the optimizer has others
    /// ([`Optimizer::eval`]). Returns the model's output with the target.
    ///
    /// # Errors
    /// An input without four dimensions after [`channels_last`](Self::channels_last).
    pub fn eval_step(&mut self, (x, y): Batch) -> anyhow::Result<Prediction> {
        let _guard = tch::no_grad_guard();
        self.optimizer.eval()?;
        let x = self.formatted(x)?;
        let forward = || self.net.forward_t(&x, false);
        let y_pred = match self.autocast {
            Some(kind) => autocast(x.device(), kind, forward)?,
            None => forward(),
        };
        Ok(Prediction { y_pred, y })
    }
}

/// The state holds the scaler, the last norm of the gradients, and gradients that wait for a step. The model and the
/// optimizer are not in it: track them by name.
impl<N> Stateful for Supervised<N> {
    fn state_dict(&self) -> Result<StateDict> {
        let mut state = Stateful::state_dict(&self.accumulator)?;
        if let Some(norm) = &self.grad_norm {
            state.set_tensor("grad_norm", norm.shallow_clone());
        }
        if self.accumulator.pending() > 0 {
            state.set_part("gradients", self.gradients().state_dict()?);
        }
        if let Some(scaler) = self.accumulator.scaler() {
            state.set_part("scaler", Stateful::state_dict(scaler)?);
        }
        Ok(state)
    }

    fn load_state_dict(&mut self, mut state: StateDict) -> Result<()> {
        // Everything is read and checked before anything changes.
        let pending = self.accumulator.read(&mut state)?;
        let scaler = match (self.accumulator.scaler(), state.take_part("scaler")) {
            (Some(scaler), part) => Some((scaler.clone(), Saved::of(&part?)?)),
            (None, Ok(_)) => {
                return Err(Error::State("a GradScaler was used, and is not here".into()));
            }
            (None, Err(_)) => None,
        };
        if pending.is_some() {
            self.gradients().load_state_dict(state.take_part("gradients")?)?;
        }
        if let Some((scaler, saved)) = scaler {
            scaler.load(saved)?;
        }
        self.grad_norm = state.take_tensor("grad_norm").ok();
        self.accumulator.load(pending);
        Ok(())
    }

    fn differs_by_rank(&self) -> bool {
        self.accumulator.differs_by_rank()
    }

    fn evaluation_weights(&self) -> Result<Option<EvaluationWeights>> {
        self.optimizer.evaluation_weights()
    }
}

impl<N> Supervised<N> {
    fn gradients(&self) -> SavedGradients {
        SavedGradients::of_variables(self.optimizer.variables())
    }
}

/// A trainer with [`Supervised::train_step_in`]: ignite's `create_supervised_trainer`. It fires [`OPTIMIZER_STEPPED`]
/// and [`WINDOW_COMPLETED`], and makes a step for the batches that are left of a window when an epoch ends, or when
/// `terminate_epoch`, `terminate` or a budget ends it early. Checkpoints hold the scaler's state and, within a window,
/// the gradients.
pub fn create_supervised_trainer<'a, N: ModuleT + 'a>() -> Trainer<'a, Supervised<N>> {
    let mut trainer = Engine::new(|cx: &mut Supervised<N>, engine: &mut Trainer<'a, _>, batch| {
        let window = cx.accumulator.window_of(engine);
        if cx.accumulator.is_left_over(window) {
            finish_window(cx, engine)?;
        }
        let loss = cx.train_step_in(batch, window)?;
        if window.last {
            fire_updated(cx, engine)?;
        }
        Ok(loss)
    });
    trainer.track_context().track_output();
    trainer.context_has_no_model();
    // Registering two names of the crate in a new engine cannot fail. If it did, firing the events would be an error.
    let _ = trainer.register_events([OPTIMIZER_STEPPED, WINDOW_COMPLETED]);
    trainer.on(Event::Started, |cx: &mut Supervised<N>, engine| {
        // At iteration 0 nothing was loaded. After loading a state, the batches that wait belong to this run.
        if engine.state.iteration == 0
            && let dropped @ 1.. = cx.accumulator.drop_pending()
        {
            engine.warn(format!(
                "the gradients of {dropped} batches of an earlier run, whose window was not completed, are dropped"
            ));
        }
        Ok(())
    });
    let ends = Event::EpochCompleted | Event::TerminateSingleEpoch | Event::Terminate;
    trainer.on(ends, finish_window);
    trainer
}

/// Makes a step for the batches that wait, if there are any, and fires the events of a completed window.
fn finish_window<N: ModuleT>(
    cx: &mut Supervised<N>,
    engine: &mut Trainer<'_, Supervised<N>>,
) -> anyhow::Result<()> {
    if cx.finish_window()? {
        fire_updated(cx, engine)?;
    }
    Ok(())
}

/// Fires the events of a completed window; `OPTIMIZER_STEPPED` only if the scaler did not skip the step.
fn fire_updated<N: ModuleT>(
    cx: &mut Supervised<N>,
    engine: &mut Trainer<'_, Supervised<N>>,
) -> anyhow::Result<()> {
    if engine.listens(OPTIMIZER_STEPPED) {
        let skipped = cx.accumulator.scaler().map_or(Ok(false), GradScaler::last_skipped)?;
        if !skipped {
            engine.fire_event(OPTIMIZER_STEPPED, cx)?;
        }
    }
    if engine.listens(WINDOW_COMPLETED) {
        engine.fire_event(WINDOW_COMPLETED, cx)?;
    }
    Ok(())
}

/// An evaluator with [`Supervised::eval_step`]: ignite's `create_supervised_evaluator`.
pub fn create_supervised_evaluator<'a, N: ModuleT + 'a>() -> Evaluator<'a, Supervised<N>> {
    Engine::new(|cx: &mut Supervised<N>, _, batch| cx.eval_step(batch))
}
