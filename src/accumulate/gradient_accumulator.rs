use tch::Tensor;

use super::weight::Amount;
use super::{Accumulation, Weight, Window};
use crate::amp::GradScaler;
use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::optim::Optimizer;
use crate::parallel::{Local, Parallel};
use crate::state::{StateDict, Stateful};

/// Combines the gradients of the batches of a window into the gradient of one large batch. Each batch counts as much as
/// its [`Weight`], also among several ranks. Use it in a step of your own;
/// [`Supervised`](crate::supervised::Supervised) contains one.
///
/// For each batch, call [`begin`](Self::begin), [`forward`](Self::forward) and [`backward`](Self::backward), and make a
/// step of the optimizer if `backward` returns true. When a window is cut short (by the end of an epoch of unknown
/// length, `terminate`, or a budget that is used up), call [`finish`](Self::finish), and make a step if it returns
/// true. A batch that is lost to an error does not count: the other batches of its window are weighed as if it did not
/// exist.
///
/// The result equals that of one large batch up to rounding. Gradients of parameters that are stored by
/// [`LowPrecision`](crate::optim::LowPrecision) add up in f32, but for data-parallel models. For batches of equal weight, each loss is divided by the
/// number of batches and nothing else is done, as such loops are usually written.
///
/// ```
/// use tch::{Device, Kind, Tensor, nn};
/// use tch_ignite::GradientAccumulator;
/// use tch_ignite::engine::{Engine, Event, OPTIMIZER_STEPPED, Until};
/// use tch_ignite::optim::Optimizer;
///
/// struct Context { w: Tensor, optimizer: Optimizer, accumulator: GradientAccumulator }
///
/// # let vs = nn::VarStore::new(Device::Cpu);
/// # let w = vs.root().zeros("w", &[1]);
/// let optimizer = Optimizer::sgd(&vs).lr(1.0).build()?;
/// let mut cx = Context { w, optimizer, accumulator: GradientAccumulator::new(2)? };
/// let mut trainer = Engine::new(|cx: &mut Context, engine, batch: Vec<f32>| {
///     let window = cx.accumulator.window_of(engine);
///     // True where the last batch of the window before was lost.
///     while cx.accumulator.begin(&cx.optimizer, window)? {
///         cx.optimizer.step()?;
///     }
///     let loss = cx.accumulator.forward(|| (Tensor::from_slice(&batch) * &cx.w).mean(Kind::Float))?;
///     if cx.accumulator.backward(&cx.optimizer, &loss, batch.len())? {
///         cx.optimizer.step()?;
///         engine.fire_event(OPTIMIZER_STEPPED, cx)?;
///     }
///     Ok(())
/// });
/// trainer.register_events([OPTIMIZER_STEPPED])?;
/// let ends = Event::EpochCompleted | Event::TerminateSingleEpoch | Event::Terminate;
/// trainer.on(ends, |cx, engine| {
///     if cx.accumulator.finish(&cx.optimizer)? {
///         cx.optimizer.step()?;
///         engine.fire_event(OPTIMIZER_STEPPED, cx)?;
///     }
///     Ok(())
/// });
/// // The mean of all six numbers, not of the two means.
/// trainer.run(&mut cx, vec![vec![1.0, 2.0, 3.0, 4.0, 5.0], vec![9.0]], Until::epochs(1))?;
/// assert_eq!(cx.w.double_value(&[0]), -4.0);
/// # Ok::<(), tch_ignite::Error>(())
/// ```
///
/// A checkpoint within a window needs the accumulator's state and the gradients: track
/// [`SavedGradients`](crate::checkpoint::SavedGradients) too.
#[derive(Debug)]
pub struct GradientAccumulator {
    accumulation: Accumulation,
    parallel: Parallel,
    scaler: Option<GradScaler>,
    /// Whether all batches count the same.
    equal: bool,
    /// The place of the current batch, from `begin` to `backward`.
    window: Option<Window>,
    /// Keeps the current batch's gradients on this rank; `None` for the last batch of a window.
    local: Option<Local>,
    pending: Option<Pending>,
}

/// Data about gradients that wait for the rest of their window.
#[derive(Debug)]
pub(crate) struct Pending {
    /// The number of batches that wait.
    batches: u64,
    /// The size of the window, by which each loss was divided.
    size: u64,
    /// [`Window::begin`]; `None` in states of older versions.
    begin: Option<u64>,
    /// The weight of the first batch, or 1 if that is 0. Each loss was multiplied by its own weight divided by this
    /// one.
    first: Amount,
    /// The sum of the weights, each divided by `first`.
    quotients: Amount,
}

impl Pending {
    /// The sum of the weights of all batches that wait.
    fn weight(&self) -> Result<Amount> {
        self.first.mul(&self.quotients)
    }

    /// The factor that turns the accumulated gradients into those of one large batch: exactly 1 for equal weights.
    fn factor(&self, ranks: u64, weight_of_all: &Amount) -> Result<Amount> {
        check_some(weight_of_all, self.batches)?;
        let size = Amount::Number(self.size as f64);
        self.first.mul(&size)?.mul(&Amount::Number(ranks as f64))?.div(weight_of_all)
    }
}

impl GradientAccumulator {
    /// One step for every `steps` batches; 1 for no accumulation.
    ///
    /// # Errors
    /// `steps` is 0.
    pub fn new(steps: u64) -> Result<Self> {
        Ok(Self { accumulation: Accumulation::new(steps)?, ..Self::unshared() })
    }

    /// An accumulator with a step for each batch.
    pub(crate) fn unshared() -> Self {
        Self {
            accumulation: Accumulation { steps: 1 },
            parallel: Parallel::default(),
            scaler: None,
            equal: false,
            window: None,
            local: None,
            pending: None,
        }
    }

    /// Scales losses with this scaler before backward.
    pub fn grad_scaler(mut self, scaler: GradScaler) -> Self {
        self.scaler = Some(scaler);
        self
    }

    /// Runs forward and backward through this data-parallel model. Gradients are sent once for each window, and the
    /// mean over ranks is a mean over samples (or over the units of the weights), also if ranks have batches of
    /// different sizes. For that the ranks exchange one number in each window, between forward and backward of its last
    /// batch; with gloo they wait for each other, about 0.1 ms on one machine. [`equal_weights`](Self::equal_weights)
    /// avoids the exchange, and with ranks in Python it is left out.
    #[cfg(feature = "distributed")]
    pub fn data_parallel(mut self, ddp: crate::distributed::DistributedDataParallel) -> Self {
        self.parallel = Parallel::new(ddp);
        self
    }

    /// Makes all batches count the same, whatever their weight is: the step is that of the mean of their losses.
    pub fn equal_weights(mut self) -> Self {
        self.equal = true;
        self
    }

    pub(crate) fn set_steps(&mut self, accumulation: Accumulation) {
        self.accumulation = accumulation;
    }

    pub(crate) fn scaler(&self) -> Option<&GradScaler> {
        self.scaler.as_ref()
    }

    /// Whether there are other ranks.
    pub(crate) fn is_parallel(&self) -> bool {
        self.parallel.is_parallel()
    }

    /// The number of batches that share a step.
    pub fn steps(&self) -> u64 {
        self.accumulation.steps()
    }

    /// The number of batches that wait for the end of their window.
    pub fn pending(&self) -> u64 {
        self.pending.as_ref().map_or(0, |pending| pending.batches)
    }

    /// Forgets the batches that wait, and returns their number.
    pub(crate) fn drop_pending(&mut self) -> u64 {
        (self.window, self.local) = (None, None);
        self.pending.take().map_or(0, |pending| pending.batches)
    }

    /// The place of the batch of the current iteration: [`Accumulation::window_of`].
    pub fn window_of<C, B, O>(&self, engine: &Engine<'_, C, B, O>) -> Window {
        self.accumulation.window_of(engine)
    }

    /// The place of the next batch, for loops without an engine: counts the calls of [`backward`](Self::backward).
    pub fn next_window(&self) -> Window {
        let (size, pending) = (self.steps(), self.pending());
        let begin = self.pending.as_ref().and_then(|pending| pending.begin).unwrap_or(0);
        Window { size, first: pending == 0, last: pending + 1 >= size, begin }
    }

    /// Whether gradients of another window than this one wait, so that the rest of their window will not come.
    pub(crate) fn is_left_over(&self, window: Window) -> bool {
        let Some(pending) = &self.pending else { return false };
        window.first || pending.begin.is_some_and(|begin| begin != window.begin)
    }

    /// Begins a batch, before its forward. Clears the gradients before the first batch of a window. Returns true if
    /// gradients of another window wait, because its last batch was lost to an error: they are ready then, so make a
    /// step and call `begin` again.
    ///
    /// # Errors
    /// The errors of [`finish`](Self::finish) and [`Optimizer::zero_grad`].
    pub fn begin(&mut self, optimizer: &Optimizer, window: Window) -> Result<bool> {
        if self.is_left_over(window) {
            return self.finish(optimizer);
        }
        if self.pending.is_none() {
            optimizer.zero_grad()?;
        }
        self.window = Some(window);
        // Only the last backward of the window sends gradients to other ranks.
        self.local = (!window.last).then(|| self.parallel.no_sync());
        Ok(false)
    }

    /// Calls `forward`, which runs the model and returns the loss, through the data-parallel model if there is one.
    ///
    /// # Errors
    /// The errors of `DistributedDataParallel::forward`; none without a data-parallel model.
    pub fn forward(&self, forward: impl FnOnce() -> Tensor) -> Result<Tensor> {
        self.parallel.forward(|| Ok(forward()))
    }

    pub(crate) fn forward_result(
        &self,
        forward: impl FnOnce() -> Result<Tensor>,
    ) -> Result<Tensor> {
        self.parallel.forward(forward)
    }

    /// Adds the gradients of a scalar loss that is a mean over `weight` units (samples, tokens, …). Returns true after
    /// the last batch of a window: then the gradients are ready for a step.
    ///
    /// A batch of weight 0 adds nothing. A weight on a device is not read, so there the loss of a batch of weight 0 has
    /// to be finite: divide a sum over tokens by `tokens.clamp_min(1)`.
    ///
    /// # Errors
    /// A call without [`begin`](Self::begin); a weight that is negative or not finite; a window in which all weights
    /// are 0. If backward fails, the gradients of the window are dropped, because a part of this batch's gradients may
    /// be among them; the error says how many batches are lost.
    pub fn backward(
        &mut self,
        optimizer: &Optimizer,
        loss: &Tensor,
        weight: impl Into<Weight>,
    ) -> Result<bool> {
        let window = self.window.take().ok_or_else(|| {
            Error::invalid("backward() of a GradientAccumulator was called without begin()")
        })?;
        let _local = self.local.take();
        let before = self.pending.take();
        let shared = self.parallel.is_shared() && !self.equal;
        let weight = if self.equal { Weight::Number(1.) } else { weight.into() };
        let weight = match Amount::of(weight, loss.device()) {
            Ok(weight) => weight,
            Err(error) => {
                self.pending = before;
                return Err(error);
            }
        };
        if window.size == 1 && window.last && before.is_none() && !shared {
            // The batch is the whole window, so it does not matter how much it weighs.
            check_some(&weight, 1)?;
            self.backward_scaled(loss)?;
            return Ok(true);
        }
        let batches = before.as_ref().map_or(0, |pending| pending.batches);
        let added = self.add(optimizer, loss, weight, before, window, shared);
        match added {
            Ok(pending) => self.pending = pending,
            Err(error) if batches > 0 => {
                return Err(Error::invalid(format!(
                    "{:#} (with it the gradients of the other {batches} batches of its window are dropped, because a part of this batch's may be among them)",
                    anyhow::Error::from(error)
                )));
            }
            Err(error) => return Err(error),
        }
        Ok(window.last)
    }

    /// Adds the gradients of one batch. Returns the data about the gradients that wait afterwards; `None` after the
    /// last batch of a window.
    fn add(
        &self,
        optimizer: &Optimizer,
        loss: &Tensor,
        weight: Amount,
        before: Option<Pending>,
        window: Window,
        shared: bool,
    ) -> Result<Option<Pending>> {
        let mut pending = match before {
            Some(pending) => pending,
            None => Pending {
                batches: 0,
                size: window.size,
                begin: Some(window.begin),
                first: weight.or_one()?,
                quotients: Amount::Number(0.),
            },
        };
        let others = pending.batches > 0;
        pending.batches += 1;
        let quotient = weight.div(&pending.first)?;
        pending.quotients = pending.quotients.add(&quotient)?;
        let share = if pending.size > 1 {
            loss.f_div_scalar(pending.size as i64)
                .map_err(|error| Error::libtorch("dividing the loss", error))?
        } else {
            loss.shallow_clone()
        };
        let mut share = quotient.times(&share)?;
        if window.last {
            let factor = self.factor(&pending, shared, loss.device())?;
            // Scales the gradients of the batches before here, and those of this batch through its loss.
            if others {
                scale(optimizer, &factor)?;
            }
            share = factor.times(&share)?;
        }
        if !weight.is(0.) {
            self.backward_scaled(&share)?;
        } else if window.last {
            // The other ranks wait for this one. A backward from `share` would add NaN where the loss is none.
            self.parallel.backward_nothing(loss)?;
        }
        if window.last {
            return Ok(None);
        }
        // The reducer of data-parallel models needs gradients of the parameters' type.
        if !self.is_parallel() {
            optimizer.widen_gradients()?;
        }
        Ok(Some(pending))
    }

    /// The factor for the gradients of a window; `shared` sums the weights over all ranks.
    fn factor(&self, pending: &Pending, shared: bool, device: tch::Device) -> Result<Amount> {
        let own = pending.weight()?;
        if !shared {
            return pending.factor(1, &own);
        }
        // `weight()` made a new tensor, so summing it in place changes nobody else's.
        let all = own.tensor(device)?;
        let ranks = self.parallel.sum(&all)?;
        pending.factor(ranks, &Amount::from_tensor(&all, device)?)
    }

    fn backward_scaled(&self, share: &Tensor) -> Result<()> {
        match &self.scaler {
            Some(scaler) => self.parallel.backward(&scaler.scale(share)?),
            None => self.parallel.backward(share),
        }
    }

    /// Ends a window before its last batch. If batches wait, turns their gradients into those of one large batch,
    /// averages them over ranks, and returns true: make a step then. Returns false if no batch waits.
    ///
    /// # Errors
    /// All weights of the window are 0; the exchange with other ranks fails. See also [`Optimizer`].
    pub fn finish(&mut self, optimizer: &Optimizer) -> Result<bool> {
        (self.window, self.local) = (None, None);
        let Some(pending) = self.pending.take() else { return Ok(false) };
        let device = match &pending.quotients {
            Amount::Number(_) => self.parallel.device(),
            Amount::Tensor(tensor) => tensor.device(),
        };
        let shared = self.parallel.is_shared() && !self.equal;
        let factor = self.factor(&pending, shared, device)?;
        scale(optimizer, &factor)?;
        self.parallel.reduce_gradients()?;
        Ok(true)
    }
}

/// Refuses a window whose batches all have weight 0. A weight on a device is not read.
fn check_some(weight_of_all: &Amount, batches: u64) -> Result<()> {
    if !weight_of_all.is(0.) {
        return Ok(());
    }
    let who = match batches {
        1 => "the only batch of the window has".to_owned(),
        _ => format!("all {batches} batches of the window have"),
    };
    Err(Error::invalid(format!(
        "{who} weight 0, so there is nothing that its loss could be a mean of: leave out empty batches"
    )))
}

fn scale(optimizer: &Optimizer, factor: &Amount) -> Result<()> {
    if factor.is(1.) {
        return Ok(());
    }
    match factor {
        Amount::Number(number) => optimizer.gradients()?.scale(&Tensor::from(*number)),
        Amount::Tensor(tensor) => optimizer.gradients()?.scale(tensor),
    }
}

/// The state holds how many batches wait, and their weights. The gradients themselves are in
/// [`SavedGradients`](crate::checkpoint::SavedGradients).
impl Stateful for GradientAccumulator {
    fn state_dict(&self) -> Result<StateDict> {
        let mut state = StateDict::new();
        let Some(pending) = &self.pending else {
            state.set_value("accumulated", (0, 0))?;
            return Ok(state);
        };
        state.set_value("accumulated", (pending.batches, pending.size))?;
        state.set_value("window", pending.begin)?;
        for (name, amount) in [("first", &pending.first), ("quotients", &pending.quotients)] {
            match amount {
                Amount::Number(number) => state.set_value(name, number)?,
                Amount::Tensor(tensor) => state.set_tensor(name, tensor.shallow_clone()),
            }
        }
        Ok(state)
    }

    fn load_state_dict(&mut self, mut state: StateDict) -> Result<()> {
        let pending = self.read(&mut state)?;
        self.load(pending);
        Ok(())
    }

    /// True within a window, because ranks exchange gradients only at its end.
    fn differs_by_rank(&self) -> bool {
        self.pending.is_some()
    }
}

impl GradientAccumulator {
    /// Reads which batches wait, and changes nothing.
    pub(crate) fn read(&self, state: &mut StateDict) -> Result<Option<Pending>> {
        let (batches, size): (u64, u64) = state.value("accumulated")?;
        let begin = state.value("window").unwrap_or(None);
        let device = self.parallel.device();
        let mut amount = |name: &str, missing: f64| match state.value(name) {
            Ok(number) => Ok(Amount::Number(number)),
            Err(_) => match state.take_tensor(name) {
                Ok(tensor) => Amount::from_tensor(&tensor, device),
                // States of older versions have no weights, because all batches counted the same.
                Err(_) => Ok(Amount::Number(missing)),
            },
        };
        let (first, quotients) = (amount("first", 1.)?, amount("quotients", batches as f64)?);
        Ok((batches > 0).then_some(Pending { batches, size, begin, first, quotients }))
    }

    /// Takes over data that was read.
    pub(crate) fn load(&mut self, pending: Option<Pending>) {
        (self.window, self.local) = (None, None);
        self.pending = pending;
    }
}

#[cfg(test)]
mod tests {
    use tch::nn::VarStore;
    use tch::{Device, Kind};

    use super::*;

    /// The gradient after a window of batches, each given as (mean, weight), with the loss `w * mean`.
    fn gradient(batches: &[(f64, f64)], amount: fn(f64) -> Amount) -> Result<f64> {
        let mut vs = VarStore::new(Device::Cpu);
        vs.set_kind(Kind::Double);
        let w = vs.root().zeros("w", &[1]);
        let optimizer = Optimizer::sgd(&vs).build()?;
        let mut accumulator = GradientAccumulator::new(batches.len() as u64)?;
        for (mean, weight) in batches {
            let window = accumulator.next_window();
            accumulator.begin(&optimizer, window)?;
            let loss = (&w * *mean).sum(Kind::Double);
            let before = accumulator.pending.take();
            accumulator.pending =
                accumulator.add(&optimizer, &loss, amount(*weight), before, window, false)?;
        }
        Ok(w.grad().double_value(&[0]))
    }

    /// Weights in tensors are computed with on their device; here that device is the CPU.
    #[test]
    fn weights_on_a_device_count_as_numbers_do() -> Result<()> {
        let on_device = |weight| Amount::Tensor(Tensor::from(weight));
        for batches in [
            [(1., 5.), (2., 1.), (9., 2.)],
            [(7., 0.), (2., 3.), (9., 1.)],
            [(1., 3.), (2., 3.), (7., 3.)],
            [(3., 4.), (2., 1.), (7., 0.)],
        ] {
            let sum: f64 = batches.iter().map(|(_, weight)| weight).sum();
            let mean = batches.iter().map(|(mean, weight)| mean * weight).sum::<f64>() / sum;
            for amount in [Amount::Number, on_device] {
                let gradient = gradient(&batches, amount)?;
                approx::assert_abs_diff_eq!(gradient, mean, epsilon = 1e-14);
            }
        }
        Ok(())
    }

    /// A window of one batch has the rules of larger ones: a whole window of `accumulate(1)`, and the batch that is left
    /// over at the end of an epoch.
    #[test]
    fn the_weight_of_a_batch_that_is_alone_is_looked_at() -> Result<()> {
        let vs = VarStore::new(Device::Cpu);
        let w = vs.root().ones("w", &[1]);
        let optimizer = Optimizer::sgd(&vs).build()?;
        for steps in [1, 3] {
            let mut accumulator = GradientAccumulator::new(steps)?;
            let alone = Window { size: 1, first: true, last: true, begin: 6 };
            let mut backward = |weight: Weight| {
                accumulator.begin(&optimizer, alone)?;
                let ready = accumulator.backward(&optimizer, &w.sum(Kind::Float), weight);
                assert_eq!(accumulator.pending(), 0);
                ready
            };
            for (weight, says) in
                [(-1., "not negative"), (f64::NAN, "must be finite"), (0., "has weight 0")]
            {
                let error = backward(weight.into()).unwrap_err().to_string();
                assert!(error.contains(says), "{error}");
                assert!(!w.grad().defined());
                assert!(backward(Tensor::from(weight).into()).is_err());
            }
            assert!(backward(0.1.into())?);
            assert_eq!(w.grad().double_value(&[0]), 1.);
            optimizer.zero_grad()?;
            accumulator = accumulator.equal_weights();
            accumulator.begin(&optimizer, alone)?;
            assert!(accumulator.backward(&optimizer, &w.sum(Kind::Float), 0.)?);
        }
        Ok(())
    }

    #[test]
    fn a_state_with_weights_on_a_device_comes_back() -> Result<()> {
        let mut one = GradientAccumulator::new(4)?;
        let (first, quotients) =
            (Amount::Tensor(Tensor::from(3.)), Amount::Tensor(Tensor::from(1.5)));
        one.pending = Some(Pending { batches: 2, size: 4, begin: Some(8), first, quotients });
        let mut other = GradientAccumulator::new(4)?;
        other.load_state_dict(Stateful::state_dict(&one)?)?;
        let pending = other.pending.as_ref().expect("two batches");
        assert_eq!((pending.batches, pending.size, pending.begin), (2, 4, Some(8)));
        assert!(pending.weight()?.is(4.5) && other.differs_by_rank());
        // This is a state of an older version.
        let mut old = StateDict::new();
        old.set_value("accumulated", (3, 4))?;
        other.load_state_dict(old)?;
        let pending = other.pending.as_ref().expect("three batches");
        assert!(pending.weight()?.is(3.) && pending.begin.is_none());
        Ok(())
    }
}
