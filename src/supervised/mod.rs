//! A ready-made context for supervised learning, with its training and evaluation steps.

mod pass;
mod single_sample;
mod tbptt;
mod tensors;

use tch::nn::ModuleT;
use tch::{Kind, Tensor};

pub use crate::event::{OPTIMIZER_STEPPED, WINDOW_COMPLETED};

use crate::accumulate::{Accumulation, GradientAccumulator, Weight, WeightedLoss, Window};
use crate::amp::{GradScaler, Saved};
use crate::compiled::{CompiledModel, StepOutput};
use crate::data::Batch;
use crate::engine::{Engine, Evaluator, Trainer};
use crate::error::{Error, Result};
use crate::event::Event;
use crate::guard::guarded;
use crate::optim::{Optimizer, Sam};
pub use crate::prediction::Prediction;
use crate::state::{EvaluationWeights, Saveable, SavedGradients, StateDict, Stateful};
use pass::{Pass, Training};
use single_sample::SingleSample;
pub use tbptt::{
    SupervisedTbptt, TIME_ITERATION_COMPLETED, TIME_ITERATION_STARTED,
    create_supervised_tbptt_trainer,
};
pub use tensors::Tensors;
use tensors::description;

/// Runs a batch through the model, and in training through the loss.
type ForwardFn<N, B, P> = Box<dyn Fn(&N, B, &mut Pass<'_>) -> anyhow::Result<P> + Send>;

/// The output of a training step.
enum Output<P, O> {
    /// The loss alone; the prediction is dropped before backward.
    Loss(fn(Tensor) -> O),
    /// The value of a function of prediction and loss, both without their graph.
    Of(Box<dyn Fn(P, Tensor) -> Result<O> + Send>),
}

/// A model, its optimizer and a loss. Small programs use this as the context of their engines.
///
/// [`new`](Self::new) is for a model that takes a tensor and batches `(x, y)`; engines come from
/// [`create_supervised_trainer`] and [`create_supervised_evaluator`]. For everything else, these say where a program
/// differs, and the engines come from [`trainer`](Self::trainer) and [`evaluator`](Self::evaluator), so that nobody has
/// to write a step of their own for it:
///
/// | ignite | here |
/// |---|---|
/// | `prepare_batch` | [`prepare_batch`](Self::prepare_batch): batches of a type of your own |
/// | `model_fn`, `model_transform` | [`with_model_fn`](Self::with_model_fn): a model with several inputs or outputs, or with a `forward` of its own |
/// | `output_transform` | [`output_transform`](Self::output_transform): the training step's output, for metrics of the training |
///
/// `B` is a batch, `P` the output of an evaluation step, `O` that of a training step. Autocast, accumulation, clipping,
/// scaling and ranks work with all of them.
///
/// ```
/// use tch::{Device, Kind, Tensor, nn};
/// use tch_ignite::engine::Until;
/// use tch_ignite::metrics::{Accuracy, Mean};
/// use tch_ignite::optim::Optimizer;
/// use tch_ignite::supervised::Supervised;
///
/// struct Batch {
///     ids: Tensor,
///     mask: Tensor,
///     labels: Tensor,
/// }
/// # let vs = nn::VarStore::new(Device::Cpu);
/// # let batch = || Batch {
/// #     ids: Tensor::from_slice2(&[[1i64, 2, 0], [3, 0, 0]]),
/// #     mask: Tensor::from_slice2(&[[1f32, 1., 0.], [1., 0., 0.]]),
/// #     labels: Tensor::from_slice(&[0i64, 1]),
/// # };
/// let embedding = nn::embedding(vs.root() / "embedding", 10, 4, Default::default());
/// let head = nn::linear(vs.root() / "head", 4, 2, Default::default());
/// let optimizer = Optimizer::adam(&vs).lr(1e-2).build()?;
/// let mut cx = Supervised::with_model_fn(
///     (embedding, head),
///     optimizer,
///     |(embedding, head), (ids, mask): &(Tensor, Tensor), _train| {
///         let words = ids.apply(embedding) * mask.unsqueeze(-1);
///         words.sum_dim_intlist(1i64, false, Kind::Float).apply(head)
///     },
///     |y_pred, y: &Tensor| y_pred.cross_entropy_for_logits(y),
/// )
/// .prepare_batch(|batch: Batch| ((batch.ids, batch.mask), batch.labels))
/// .output_transform(|y_pred, y, loss| (y_pred, y, loss));
///
/// type Output = (Tensor, Tensor, Tensor);
/// let mut trainer = cx.trainer();
/// trainer
///     .metric("accuracy", Accuracy::of(|output: &Output| (&output.0, &output.1)))
///     .metric("loss", Mean::of(|output: &Output| output.2.shallow_clone()));
/// # let data = tch_ignite::data::restartable(move || (0..3).map(move |_| batch()));
/// trainer.run(&mut cx, data, Until::epochs(2))?;
/// assert!(trainer.state.metrics.get("accuracy")? <= 1.0);
/// # Ok::<(), tch_ignite::Error>(())
/// ```
#[doc(alias = "LightningModule")]
#[doc(alias = "training_step")]
pub struct Supervised<N, B = Batch, P = Prediction, O = Tensor> {
    /// The model.
    pub net: N,
    /// The optimizer of the model's parameters.
    pub optimizer: Optimizer,
    forward: ForwardFn<N, B, P>,
    output: Output<P, O>,
    settings: Settings,
    /// Shares a batch, for steps that evaluate it several times; `None` where nobody knows how.
    share: Option<fn(&B) -> B>,
}

crate::debug::opaque_debug!(Supervised<N, B, P, O>);

/// Everything of a [`Supervised`] context that does not depend on the types of its model and batches.
struct Settings {
    autocast: Option<Kind>,
    channels_last: bool,
    accumulator: GradientAccumulator,
    max_norm: Option<f64>,
    max_value: Option<f64>,
    sam: Option<Sam>,
    /// The norm of the gradients before the last clipping by norm; `None` until there was one.
    grad_norm: Option<Tensor>,
    single_sample: SingleSample,
}

impl Settings {
    fn new() -> Self {
        Self {
            autocast: None,
            channels_last: false,
            accumulator: GradientAccumulator::unshared(),
            max_norm: None,
            max_value: None,
            sam: None,
            grad_norm: None,
            single_sample: SingleSample::default(),
        }
    }
}

impl<N: ModuleT> Supervised<N> {
    /// Makes a context. `loss(y_pred, y)` returns a scalar, the mean over the samples of the batch, such as
    /// `|y_pred, y| y_pred.cross_entropy_for_logits(y)`.
    ///
    /// If batches share a step, by [`accumulate`](Self::accumulate) or among ranks, each counts by its number of
    /// samples: the first dimension of the input. A loss that is a mean over other units returns `(loss, weight)`,
    /// where the [`Weight`] is the number of units: a number, or a tensor, which is not read on a GPU. Then
    /// the gradient is that of one large batch:
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
        let forward = move |net: &N, (x, y): Batch, pass: &mut Pass<'_>| {
            let targets = || Some(description(&y));
            let model = |x: &Tensor, train| Ok(net.forward_t(x, train));
            let y_pred = pass.run(x, targets, model, |y_pred| loss(y_pred, &y).into())?;
            Ok(Prediction { y_pred, y })
        };
        Self::of(net, optimizer, Box::new(forward), Some(share))
    }
}

impl<N, X: Tensors, Y, P> Supervised<N, (X, Y), Prediction<P, Y>> {
    /// Makes a context for any model: `model_fn(net, x, train)` gives the prediction, where `x` is a tensor or several
    /// (see [`Tensors`]), and `loss(y_pred, y)` the loss, as in [`new`](Supervised::new). Batches are `(x, y)`, unless
    /// [`prepare_batch`](Self::prepare_batch) makes these of others. The number of samples is the first dimension of the
    /// input's first tensor.
    ///
    /// A loss of several terms, or of several heads, takes a tuple of predictions or of targets.
    pub fn with_model_fn<L: Into<WeightedLoss>>(
        net: N,
        optimizer: Optimizer,
        model_fn: impl Fn(&N, &X, bool) -> P + Send + 'static,
        loss: impl Fn(&P, &Y) -> L + Send + 'static,
    ) -> Self {
        let forward = move |net: &N, (x, y): (X, Y), pass: &mut Pass<'_>| {
            let model = |x: &X, train| Ok(model_fn(net, x, train));
            let y_pred = pass.run(x, || None, model, |y_pred| loss(y_pred, &y).into())?;
            Ok(Prediction { y_pred, y })
        };
        Self::of(net, optimizer, Box::new(forward), None)
    }
}

impl<N, B, P> Supervised<N, B, P> {
    /// Makes a context with the default settings, whose training steps give the loss.
    fn of(
        net: N,
        optimizer: Optimizer,
        forward: ForwardFn<N, B, P>,
        share: Option<fn(&B) -> B>,
    ) -> Self {
        let (output, settings) = (Output::Loss(std::convert::identity), Settings::new());
        Self { net, optimizer, forward, output, settings, share }
    }
}

/// Returns the same batch again, with shared tensors.
fn share((x, y): &Batch) -> Batch {
    (x.shallow_clone(), y.shallow_clone())
}

impl Supervised<CompiledModel> {
    /// Makes a context for a model that was exported with its loss, one input and one target. Batches that share a step
    /// count by their numbers of samples. Autocast belongs into the export: [`autocast`](Self::autocast) here makes the
    /// steps errors. An [`output_transform`](Self::output_transform) gets the model's first output; it makes the steps
    /// errors where the model was not exported with `train_outputs=True`.
    pub fn compiled(net: CompiledModel, optimizer: Optimizer) -> Self {
        let forward = |net: &CompiledModel, (x, y): Batch, pass: &mut Pass<'_>| {
            let targets = || Some(description(&y));
            let model = |x: &Tensor, train| match train {
                true => net.step(&[x, &y]),
                false => Ok(StepOutput { loss: Tensor::new(), outputs: net.evaluate(&[x])? }),
            };
            let step = pass.run(x, targets, model, |step| step.loss.shallow_clone().into())?;
            let y_pred = step.outputs.into_iter().next().unwrap_or_else(Tensor::new);
            Ok(Prediction { y_pred, y })
        };
        Self::of(net, optimizer, Box::new(forward), Some(share))
    }
}

impl<N, B, P, Y, O> Supervised<N, B, Prediction<P, Y>, O> {
    /// Sets the output of the training step: `output_transform(y_pred, y, loss)`, with tensors that have no graph.
    /// Without this the output is the loss. Metrics of the training read it, for example
    /// `Accuracy::of(|output: &(Tensor, Tensor, Tensor)| (&output.0, &output.1))`.
    ///
    /// The output lasts until the next batch is there, so it holds memory of the predictions for so long. Each checkpoint
    /// holds the last output, too (the main rank's, in a group), because handlers of the events after the step may read it
    /// when a run goes on. So return what the metrics need and no more, such as `y_pred.argmax(1, false)` instead of the
    /// scores of many classes. No host sync.
    ///
    /// It is called after the loss and before backward: where it panics, the step is an error, and no step of the
    /// optimizer is made. Steps that evaluate a batch several times call it at the first evaluation.
    pub fn output_transform<T>(
        self,
        output_transform: impl Fn(P, Y, Tensor) -> T + Send + 'static,
    ) -> Supervised<N, B, Prediction<P, Y>, T>
    where
        P: Tensors,
    {
        let detached = |tensor: Tensor| match tensor.defined() {
            true => {
                tensor.f_detach().map_err(|error| Error::libtorch("detaching a prediction", error))
            }
            false => Err(Error::invalid(
                "the output_transform needs the prediction, and the model returned an undefined tensor in training: export a compiled model with train_outputs=True, or leave output_transform out",
            )),
        };
        let output = move |Prediction { y_pred, y }: Prediction<P, Y>, loss| {
            Ok(output_transform(y_pred.map(&mut { detached })?, y, loss))
        };
        let Self { net, optimizer, forward, settings, share, .. } = self;
        Supervised {
            net,
            optimizer,
            forward,
            output: Output::Of(Box::new(output)),
            settings,
            share,
        }
    }
}

impl<N, B, P, O> Supervised<N, B, P, O> {
    /// Makes the batches of the model, usually `(x, y)`, from batches of another type, in training and in evaluation.
    pub fn prepare_batch<A>(
        self,
        prepare_batch: impl Fn(A) -> B + Send + 'static,
    ) -> Supervised<N, A, P, O>
    where
        N: 'static,
        B: 'static,
        P: 'static,
    {
        let Self { net, optimizer, forward, output, settings, .. } = self;
        let forward =
            move |net: &N, batch: A, pass: &mut Pass<'_>| forward(net, prepare_batch(batch), pass);
        Supervised { net, optimizer, forward: Box::new(forward), output, settings, share: None }
    }

    /// Runs forward and loss under [`autocast`](crate::amp::autocast) to `kind`, f16 or bf16, in training; in evaluation the
    /// forward alone.
    pub fn autocast(mut self, kind: Kind) -> Self {
        self.settings.autocast = Some(kind);
        self
    }

    /// Brings the inputs (pictures of shape (N, C, H, W)) into channels last before the network gets them: see
    /// [`crate::memory_format`]. Convert the parameters too, with
    /// [`channels_last_parameters`](crate::memory_format::channels_last_parameters). Steps are then errors for inputs
    /// that do not have four dimensions.
    pub fn channels_last(mut self) -> Self {
        self.settings.channels_last = true;
        self
    }

    /// Scales the loss, and skips steps with gradients that are not finite. Keep a clone of the scaler to read its
    /// scale.
    pub fn grad_scaler(mut self, scaler: GradScaler) -> Self {
        self.settings.accumulator = self.settings.accumulator.grad_scaler(scaler);
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
        self.settings.accumulator.set_steps(Accumulation::new(steps)?);
        Ok(self)
    }

    /// Makes batches that share a step, by accumulation or among ranks, count the same whatever their size, as in
    /// torch's DistributedDataParallel: the step is that of the mean of their losses. Ranks then need no exchange of
    /// weights.
    pub fn equal_weights(mut self) -> Self {
        self.settings.accumulator = self.settings.accumulator.equal_weights();
        self
    }

    /// Trains as one of several processes: forward and backward run through `ddp`, which sends the gradients once for
    /// each window of accumulation. Evaluation does not use `ddp`. Ranks are weighed by the sizes of their batches,
    /// which costs an exchange of one number for each step: see [`GradientAccumulator::data_parallel`].
    #[cfg(feature = "distributed")]
    pub fn data_parallel(mut self, ddp: crate::distributed::DistributedDataParallel) -> Self {
        self.settings.accumulator = self.settings.accumulator.data_parallel(ddp);
        self
    }

    /// Clips the gradients to a norm of at most `max` within the step: [`Optimizer::step_clipped`].
    pub fn clip_grad_norm(mut self, max: f64) -> Self {
        self.settings.max_norm = Some(max);
        self
    }

    /// Limits every element of the gradients to `-max` to `max` before the step, and before clipping by norm.
    pub fn clip_grad_value(mut self, max: f64) -> Self {
        self.settings.max_value = Some(max);
        self
    }

    /// Makes the steps sharpness-aware: each batch is evaluated twice. `sam` is around this context's optimizer. Clipping
    /// is of the second gradient. See [`train_step`](Self::train_step) for the options that steps of this kind refuse.
    pub fn sam(mut self, sam: Sam) -> Self {
        self.settings.sam = Some(sam);
        self
    }

    /// The norm of the gradients before the last clipping by norm, a tensor of one element on the gradients' device;
    /// `None` until there was one.
    pub fn grad_norm(&self) -> Option<&Tensor> {
        self.settings.grad_norm.as_ref()
    }

    /// Runs forward in training mode, the loss, backward, and a step of the optimizer, with the options for autocast,
    /// scaling, accumulation and clipping. Returns the loss as the loss function gave it (not divided for
    /// accumulation), detached and on its device, or what [`output_transform`](Self::output_transform) makes of it. No
    /// host sync.
    ///
    /// With accumulation each `steps`-th call makes a step. Use [`train_step_in`](Self::train_step_in) where the end of
    /// an epoch may cut a window short.
    ///
    /// Where the step evaluates the loss by itself ([`Sam`], and [`Lbfgs`](crate::optim::Lbfgs) as the optimizer), it
    /// evaluates this batch again, which takes a context made by [`new`](Self::new) without
    /// [`prepare_batch`](Self::prepare_batch). Such steps refuse accumulation and scaling; those of LBFGS, which looks at
    /// the loss of this rank alone and needs the gradient as it is, also refuse data-parallel training and clipping.
    ///
    /// # Errors
    /// A batch of one sample that leaves a layer of batch normalisation with a single value for each channel, as in
    /// PyTorch, because the running variance would be NaN for ever; the error names the layers, and parameters and
    /// running averages are unchanged. A panic of the model or the loss, which is how tch reports errors: where it is
    /// libtorch's, the text has types, shapes and devices of the batch. A panic of the
    /// [`output_transform`](Self::output_transform). Also the errors of [`GradientAccumulator::backward`] and [`Optimizer::step`],
    /// and an input without four dimensions after [`channels_last`](Self::channels_last).
    pub fn train_step(&mut self, batch: B) -> anyhow::Result<O> {
        let window = self.settings.accumulator.next_window();
        self.train_step_in(batch, window)
    }

    /// [`train_step`](Self::train_step) for a batch that has this place in its window. If batches of another window
    /// wait, because its last batch was lost to an error, a step is made for them first.
    ///
    /// # Errors
    /// The errors of [`train_step`](Self::train_step).
    pub fn train_step_in(&mut self, batch: B, window: Window) -> anyhow::Result<O> {
        self.optimizer.train()?;
        if self.settings.sam.is_some() || self.optimizer.needs_closure() {
            return self.step_with_closure(batch, window);
        }
        while self.settings.accumulator.begin(&self.optimizer, window)? {
            self.update()?;
        }
        let (prediction, loss, weight) = self.forward_with_loss(batch)?;
        let output = self.output(prediction, &loss)?;
        if self.settings.accumulator.backward(&self.optimizer, &loss, weight)? {
            self.update()?;
        }
        Ok(output)
    }

    /// Makes a step that evaluates the batch as often as it needs.
    fn step_with_closure(&mut self, batch: B, window: Window) -> anyhow::Result<O> {
        let sam = self.settings.sam.clone();
        let name = if sam.is_some() { "SAM" } else { self.optimizer.name() };
        let Settings { accumulator, max_norm, max_value, .. } = &self.settings;
        let clips = max_norm.is_some() || max_value.is_some();
        let refused = [
            (accumulator.steps() > 1, "accumulation: give it larger batches"),
            (accumulator.scaler().is_some(), "a GradScaler: train in bf16 or f32"),
            (sam.is_none() && clips, "clipping: limit the step by its line search"),
            (sam.is_none() && accumulator.is_parallel(), "several ranks: train with one"),
        ];
        let refused = refused.into_iter().find(|(refused, _)| *refused).map(|(_, what)| what);
        let with_another = sam.as_ref().is_some_and(|sam| !sam.optimizer().is(&self.optimizer));
        let (share, None, false) = (self.share, refused, with_another) else {
            return Err(Error::invalid(match refused {
                Some(what) => format!(
                    "{name} evaluates a batch several times in a step, and does not go with {what}"
                ),
                None => "the Sam is around another optimizer than the one of this Supervised: make it of that one".into(),
            })
            .into());
        };
        let share = share.ok_or_else(|| {
            Error::invalid(format!(
                "{name} evaluates a batch several times in a step, and only a batch of two tensors can be: make the context by Supervised::new, and leave prepare_batch out"
            ))
        })?;
        let optimizer = self.optimizer.clone();
        let mut first = None;
        let mut evaluate = || -> anyhow::Result<Tensor> {
            self.settings.accumulator.begin(&optimizer, window)?;
            let (prediction, loss, weight) = self.forward_with_loss(share(&batch))?;
            match first {
                None => first = Some(self.output(prediction, &loss)?),
                Some(_) => drop(prediction),
            }
            self.settings.accumulator.backward(&optimizer, &loss, weight)?;
            Ok(loss)
        };
        match sam {
            None => {
                let _ = optimizer.step_with(evaluate)?;
            }
            Some(sam) => {
                let _ = sam.gradients_beside(&mut evaluate)?;
                self.update()?;
            }
        }
        Ok(first.ok_or_else(|| Error::invalid(format!("{name} did not evaluate the batch")))?)
    }

    /// Runs forward and the loss of a batch that has begun. Returns the prediction, the loss and its weight.
    fn forward_with_loss(&mut self, batch: B) -> anyhow::Result<(P, Tensor, Weight)> {
        let Settings { autocast, channels_last, accumulator, single_sample, .. } =
            &mut self.settings;
        let training =
            Training { optimizer: &self.optimizer, accumulator, single_sample, loss: None };
        let mut pass =
            Pass { autocast: *autocast, channels_last: *channels_last, training: Some(training) };
        let prediction = (self.forward)(&self.net, batch, &mut pass)?;
        let passed = pass.training.and_then(|training| training.loss);
        let (loss, weight) = passed.ok_or_else(|| Error::invalid("the model was not called"))?;
        Ok((prediction, loss, weight))
    }

    /// Makes the output of the step, and drops the prediction where the output has none of it. Steps call this before
    /// backward, so that an error leaves the gradients as they are.
    fn output(&self, prediction: P, loss: &Tensor) -> anyhow::Result<O> {
        let loss = loss.f_detach()?;
        match &self.output {
            Output::Loss(output) => Ok(output(loss)),
            Output::Of(output) => guarded(|| Ok(output(prediction, loss)?)),
        }
    }

    /// Makes a step for batches that wait for the end of their window, and returns whether there were any. Call this at
    /// the end of an epoch whose length was not known, and after a run or an epoch that ended early.
    ///
    /// # Errors
    /// The errors of [`GradientAccumulator::finish`] and [`Optimizer::step`].
    pub fn finish_window(&mut self) -> anyhow::Result<bool> {
        let waited = self.settings.accumulator.finish(&self.optimizer)?;
        if waited {
            self.update()?;
        }
        Ok(waited)
    }

    /// Clips the gradients, makes a step of the optimizer, and updates the scaler.
    fn update(&mut self) -> anyhow::Result<()> {
        let updated = self.clip_and_step();
        if let (Err(_), Some(scaler)) = (&updated, self.settings.accumulator.scaler()) {
            // The batch is given up, and the gradients of the next one are neither unscaled nor checked.
            scaler.forget(&self.optimizer);
        }
        updated
    }

    fn clip_and_step(&mut self) -> anyhow::Result<()> {
        let scaler = self.settings.accumulator.scaler();
        if let Some(max) = self.settings.max_value {
            if let Some(scaler) = scaler {
                scaler.unscale(&self.optimizer)?;
            }
            self.optimizer.clip_grad_value(max)?;
        }
        match (scaler, self.settings.max_norm) {
            (None, None) => self.optimizer.step()?,
            (None, Some(max)) => self.settings.grad_norm = Some(self.optimizer.step_clipped(max)?),
            (Some(scaler), None) => scaler.step(&self.optimizer)?,
            (Some(scaler), Some(max)) => {
                self.settings.grad_norm = Some(scaler.step_clipped(&self.optimizer, max)?);
            }
        }
        if let Some(scaler) = scaler {
            scaler.update()?;
        }
        Ok(())
    }

    /// Runs forward in evaluation mode, without gradients. Returns the model's output with the target.
    ///
    /// # Errors
    /// The model panicked, which is how tch reports errors, or an input has not four dimensions after
    /// [`channels_last`](Self::channels_last).
    pub fn eval_step(&mut self, batch: B) -> anyhow::Result<P> {
        let _guard = tch::no_grad_guard();
        self.optimizer.eval()?;
        let Settings { autocast, channels_last, .. } = self.settings;
        let mut pass = Pass { autocast, channels_last, training: None };
        (self.forward)(&self.net, batch, &mut pass)
    }

    /// A trainer for this context: [`create_supervised_trainer`] for any types of batches and outputs. It is run with
    /// this context, `trainer.run(&mut cx, …)`.
    pub fn trainer<'a>(&self) -> Engine<'a, Self, B, O>
    where
        Self: 'a,
        B: 'a,
        O: Saveable + 'a,
    {
        trainer()
    }

    /// An evaluator for this context: [`create_supervised_evaluator`] for any types of batches and predictions.
    pub fn evaluator<'a>(&self) -> Engine<'a, Self, B, P>
    where
        Self: 'a,
        B: 'a,
    {
        Engine::new(|cx: &mut Self, _, batch| cx.eval_step(batch))
    }
}

/// The state holds the scaler, the last norm of the gradients, and gradients that wait for a step. The model and the
/// optimizer are not in it: track them by name.
impl<N, B, P, O> Stateful for Supervised<N, B, P, O> {
    fn state_dict(&self) -> Result<StateDict> {
        let mut state = Stateful::state_dict(&self.settings.accumulator)?;
        if let Some(norm) = &self.settings.grad_norm {
            state.set_tensor("grad_norm", norm.shallow_clone());
        }
        if self.settings.accumulator.pending() > 0 {
            state.set_part("gradients", self.gradients().state_dict()?);
        }
        if let Some(scaler) = self.settings.accumulator.scaler() {
            state.set_part("scaler", Stateful::state_dict(scaler)?);
        }
        Ok(state)
    }

    fn load_state_dict(&mut self, mut state: StateDict) -> Result<()> {
        // Everything is read and checked before anything changes.
        let pending = self.settings.accumulator.read(&mut state)?;
        let scaler = match (self.settings.accumulator.scaler(), state.take_part("scaler")) {
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
        self.settings.grad_norm = state.take_tensor("grad_norm").ok();
        self.settings.accumulator.load(pending);
        Ok(())
    }

    fn differs_by_rank(&self) -> bool {
        self.settings.accumulator.differs_by_rank()
    }

    fn evaluation_weights(&self) -> Result<Option<EvaluationWeights>> {
        self.optimizer.evaluation_weights()
    }
}

impl<N, B, P, O> Supervised<N, B, P, O> {
    fn gradients(&self) -> SavedGradients {
        SavedGradients::of_variables(self.optimizer.variables())
    }
}

/// A trainer with [`Supervised::train_step_in`]: ignite's `create_supervised_trainer`. It fires [`OPTIMIZER_STEPPED`]
/// and [`WINDOW_COMPLETED`], and makes a step for the batches that are left of a window when an epoch ends, or when
/// `terminate_epoch`, `terminate` or a budget ends it early. Checkpoints hold the scaler's state and, within a window,
/// the gradients.
pub fn create_supervised_trainer<'a, N: ModuleT + 'a>() -> Trainer<'a, Supervised<N>> {
    trainer()
}

fn trainer<'a, N: 'a, B: 'a, P: 'a, O: Saveable + 'a>() -> Engine<'a, Supervised<N, B, P, O>, B, O>
{
    let mut trainer =
        Engine::new(|cx: &mut Supervised<N, B, P, O>, engine: &mut Engine<'a, _, _, _>, batch| {
            let window = cx.settings.accumulator.window_of(engine);
            if cx.settings.accumulator.is_left_over(window) {
                finish_window(cx, engine)?;
            }
            let output = cx.train_step_in(batch, window)?;
            if window.last {
                fire_updated(cx, engine)?;
            }
            Ok(output)
        });
    complete_windows(&mut trainer);
    trainer
}

/// Lets a trainer fire the events of the crate, step for what is left of a window, and save what belongs to it.
fn complete_windows<'a, N: 'a, B: 'a, P: 'a, O: 'a, EB: 'a, EO: Saveable + 'a>(
    trainer: &mut Engine<'a, Supervised<N, B, P, O>, EB, EO>,
) {
    trainer.track_context().track_output();
    trainer.context_has_no_model();
    // Registering two names of the crate in a new engine cannot fail. If it did, firing the events would be an error.
    let _ = trainer.register_events([OPTIMIZER_STEPPED, WINDOW_COMPLETED]);
    trainer.on(Event::Started, |cx: &mut Supervised<N, B, P, O>, engine| {
        // At iteration 0 nothing was loaded. After loading a state, the batches that wait belong to this run.
        if engine.state.iteration == 0
            && let dropped @ 1.. = cx.settings.accumulator.drop_pending()
        {
            engine.warn(format!(
                "the gradients of {dropped} batches of an earlier run, whose window was not completed, are dropped"
            ));
        }
        Ok(())
    });
    let ends = Event::EpochCompleted | Event::TerminateSingleEpoch | Event::Terminate;
    trainer.on(ends, finish_window);
}

/// Makes a step for the batches that wait, if there are any, and fires the events of a completed window.
fn finish_window<N, B, P, O, EB, EO>(
    cx: &mut Supervised<N, B, P, O>,
    engine: &mut Engine<'_, Supervised<N, B, P, O>, EB, EO>,
) -> anyhow::Result<()> {
    if cx.finish_window()? {
        fire_updated(cx, engine)?;
    }
    Ok(())
}

/// Fires the events of a completed window; `OPTIMIZER_STEPPED` only if the scaler did not skip the step.
fn fire_updated<N, B, P, O, EB, EO>(
    cx: &mut Supervised<N, B, P, O>,
    engine: &mut Engine<'_, Supervised<N, B, P, O>, EB, EO>,
) -> anyhow::Result<()> {
    if engine.listens(OPTIMIZER_STEPPED) {
        let skipped =
            cx.settings.accumulator.scaler().map_or(Ok(false), GradScaler::last_skipped)?;
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
