use std::cell::RefCell;
#[cfg(feature = "plots")]
use std::io::Write;
#[cfg(feature = "plots")]
use std::path::Path;
use std::rc::Rc;
use std::sync::{Arc, Mutex};

use anyhow::Context;
use tch::nn::{VarStore, Variables};

use crate::data::IntoSource;
use crate::engine::{Engine, Handler, HandlerSpec, Stop, Until};
use crate::error::{Error, Result};
use crate::event::Event;
use crate::metrics::MetricValue;
use crate::optim::{Group, Knob, Optimizer, OptimizerSnapshot, StoreSnapshot};

/// Trains for some iterations with a growing learning rate, to find where the loss falls fastest: ignite's
/// `FastaiLRFinder`.
///
/// ```
/// # use tch::{Device, Kind, Reduction, Tensor, nn};
/// use tch_ignite::prelude::*;
///
/// # let vs = nn::VarStore::new(Device::Cpu);
/// # tch::manual_seed(1);
/// # let net = nn::linear(vs.root(), 3, 1, Default::default());
/// # let x = Tensor::randn([256, 3], (Kind::Float, Device::Cpu));
/// # let y = x.sum_dim_intlist(1, true, Kind::Float) + 3;
/// let train = Loader::new(&x, &y, 16)?.shuffle(42);
/// let optimizer = Optimizer::sgd(&vs).lr(0.1).build()?;
/// let mut trainer = create_supervised_trainer();
/// let mut cx = Supervised::new(net, optimizer.clone(), |y_pred, y| y_pred.mse_loss(y, Reduction::Mean));
///
/// let curve = LrFinder::new(&optimizer, &vs)
///     .start_lr(1e-4)
///     .num_iter(100)
///     .run(&mut trainer, &mut cx, &train, |loss: &Tensor| loss.shallow_clone())?;
/// assert_eq!((optimizer.knob("lr")?.get()?, trainer.state.iteration), (0.1, 0)); // as before
///
/// curve.apply_suggested_lr(&optimizer)?;
/// assert!((1e-3..1.0).contains(&curve.lr_suggestion()?[0]));
/// # #[cfg(feature = "plots")] {
/// # let folder = std::env::temp_dir().join(format!("tch-ignite-lr-{}", std::process::id()));
/// curve.plot(folder.join("lr.svg"))?;
/// # std::fs::remove_dir_all(folder).ok();
/// # }
/// # Ok::<(), anyhow::Error>(())
/// ```
///
/// Iteration `i` trains with `start * (end / start)^((i - 1) / num_iter)`, or with linear steps in
/// [`StepMode::Linear`], in each group from the group's own start to its own end. The last iteration is number
/// `num_iter + 1`, with the end itself; it is left out where the run's budget has no room for it. The finder stops when
/// the loss has diverged, which is the expected end.
///
/// The trainer's own handlers run too, and so do those of its evaluators. The finder sets the learning rate after them,
/// so the trainer's schedulers do not interfere. Handlers that write, draw or send
/// ([`Checkpoint`](crate::checkpoint::Checkpoint), loggers, progress bars: those whose
/// [`runs_in_trials`](HandlerSpec::runs_in_trials) is false) are not called.
///
/// The search leaves no trace. Afterwards, also after an error, all of this is bit for bit as before: the optimizer's
/// hyper-parameters and state, the variables of the store with their gradients, the trainer's position (even in the
/// middle of an interrupted run), its metrics and histories, the state of each handler, everything
/// [tracked](Engine::track), the context where it is tracked, and libtorch's random numbers. Closures that were
/// attached with [`Engine::on`] are called too: what they store, write or print stays, and so does state that a handler
/// of your own does not save.
///
/// The ranks of a group of processes search together: the loss is the mean over the ranks, so all get the same curve.
///
/// Costs a copy of the variables, their gradients and the optimizer's state on their device, a copy of everything
/// tracked in host memory, and a host sync an iteration to read the loss.
#[doc(alias = "FastaiLRFinder")]
#[derive(Clone)]
#[doc(alias = "lr_find")]
#[doc(alias = "Tuner")]
pub struct LrFinder {
    optimizer: Optimizer,
    to_restore: Vec<(Optimizer, Arc<Mutex<Variables>>)>,
    start: Option<Values>,
    end: Values,
    num_iter: Option<u64>,
    until: Until,
    mode: StepMode,
    smooth_f: f64,
    diverge_th: f64,
}

crate::debug::opaque_debug!(LrFinder);

/// How an [`LrFinder`] goes from the first learning rate to the last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum StepMode {
    /// Each iteration multiplies the learning rate by the same factor.
    #[default]
    Exp,
    /// Each iteration adds the same difference.
    Linear,
}

/// One value for all groups, or one for each.
#[derive(Debug, Clone)]
enum Values {
    All(f64),
    Each(Vec<f64>),
}

impl Values {
    fn of_groups(&self, name: &str, groups: usize) -> Result<Vec<f64>> {
        match self {
            Self::All(value) => Ok(vec![*value; groups]),
            Self::Each(values) if values.len() == groups => Ok(values.clone()),
            Self::Each(values) => Err(Error::invalid(format!(
                "LrFinder: Number of values of {name} should be equal to optimizer values: {} were given for {groups} parameter groups",
                values.len()
            ))),
        }
    }
}

impl LrFinder {
    /// A finder for this optimizer, which trains the variables of this store.
    pub fn new(optimizer: &Optimizer, vs: &VarStore) -> Self {
        Self {
            optimizer: optimizer.clone(),
            to_restore: vec![(optimizer.clone(), vs.variables_.clone())],
            start: None,
            end: Values::All(10.),
            num_iter: None,
            until: Until::default(),
            mode: StepMode::Exp,
            smooth_f: 0.05,
            diverge_th: 5.,
        }
    }

    /// Sets the learning rate of the first iteration, for all groups; the default is each group's own.
    pub fn start_lr(mut self, lr: f64) -> Self {
        self.start = Some(Values::All(lr));
        self
    }

    /// Sets the learning rate of the first iteration, for each group.
    pub fn start_lrs(mut self, lrs: impl IntoIterator<Item = f64>) -> Self {
        self.start = Some(Values::Each(lrs.into_iter().collect()));
        self
    }

    /// Sets the largest learning rate, for all groups; the default is 10.
    pub fn end_lr(mut self, lr: f64) -> Self {
        self.end = Values::All(lr);
        self
    }

    /// Sets the largest learning rate, for each group.
    pub fn end_lrs(mut self, lrs: impl IntoIterator<Item = f64>) -> Self {
        self.end = Values::Each(lrs.into_iter().collect());
        self
    }

    /// Sets the number of steps from the first learning rate to the largest. The finder goes over the data as often as
    /// that takes. The default is the number of iterations of [`until`](Self::until).
    pub fn num_iter(mut self, iterations: u64) -> Self {
        self.num_iter = Some(iterations);
        self
    }

    /// Sets the run's budget, in epochs or iterations; the default is one epoch. `num_iter` extends it.
    pub fn until(mut self, until: Until) -> Self {
        self.until = until;
        self
    }

    /// Sets how the learning rate grows; the default is [`StepMode::Exp`].
    pub fn step_mode(mut self, mode: StepMode) -> Self {
        self.mode = mode;
        self
    }

    /// Sets the weight of a new loss in the smoothed one, in [0, 1); the default is 0.05, and 0 means no smoothing.
    pub fn smooth_f(mut self, weight: f64) -> Self {
        self.smooth_f = weight;
        self
    }

    /// Stops when the smoothed loss is more than this many times the smallest one so far; the default is 5, and at
    /// least 1 is needed. Where the smallest loss is negative, the limit is the smallest loss plus `times - 1` times
    /// its distance to zero.
    pub fn diverge_th(mut self, times: f64) -> Self {
        self.diverge_th = times;
        self
    }

    /// Also restores another optimizer that the step updates, and its variables.
    pub fn also_restore(mut self, optimizer: &Optimizer, vs: &VarStore) -> Self {
        self.to_restore.push((optimizer.clone(), vs.variables_.clone()));
        self
    }

    /// Runs `trainer` on `data` with growing learning rates, and restores everything afterwards. `loss` returns the
    /// loss in the output of the step: a number, or a tensor with one element.
    ///
    /// # Errors
    /// Wrong arguments are refused before anything runs. Errors of [`Engine::run`] are returned, and so are a loss that
    /// is not one value, and a signal during the search ([`InterruptOn`](crate::handlers::InterruptOn)), after which
    /// the process should end.
    pub fn run<'a, C, B, O, V: Into<MetricValue>>(
        &self,
        trainer: &mut Engine<'a, C, B, O>,
        cx: &mut C,
        data: impl IntoSource<'a, B>,
        loss: impl Fn(&O) -> V + 'a,
    ) -> Result<LrCurve> {
        let search = Rc::new(RefCell::new(self.search(loss)?));
        trainer.trial(cx, |trainer, cx| self.run_search(trainer, cx, data, search))
    }

    fn run_search<'a, C, B, O, V: Into<MetricValue>, F: Fn(&O) -> V + 'a>(
        &self,
        trainer: &mut Engine<'a, C, B, O>,
        cx: &mut C,
        data: impl IntoSource<'a, B>,
        search: Rc<RefCell<Search<F>>>,
    ) -> Result<LrCurve> {
        let saved = Saved::of(&self.to_restore)?;
        let ran = trainer
            .add_handler(search.clone())
            .and_then(|_| saved.clear_gradients())
            .and_then(|()| trainer.run(cx, data, self.until));
        let summary = match (ran, saved.restore()) {
            (Ok(summary), restored) => restored.map(|()| summary)?,
            (Err(error), Ok(())) => return Err(error),
            (Err(error), Err(second)) => return Err(error.besides(second)),
        };
        if let Stop::Signal(number) = summary.stop {
            return Err(Error::invalid(format!(
                "signal {number} came during the search for a learning rate, which left no trace: end the process"
            )));
        }
        let mut curve = std::mem::take(&mut search.borrow_mut().curve);
        curve.warnings = summary.warnings;
        if summary.stop == Stop::Interrupted {
            curve.warnings.push("The search was interrupted before its end".into());
        } else if !curve.diverged {
            curve.warnings.push(
                "Run completed without loss diverging, increase end_lr, decrease diverge_th or look at the plot".into(),
            );
        }
        Ok(curve)
    }

    /// Checks the arguments, and makes the handler.
    fn search<F>(&self, loss: F) -> Result<Search<F>> {
        if !(0. ..1.).contains(&self.smooth_f) {
            return Err(Error::invalid(format!(
                "LrFinder: smooth_f is outside the range [0, 1]: {} was given, but the weight of a new loss is at least 0 and less than 1",
                self.smooth_f
            )));
        }
        if self.diverge_th.is_nan() || self.diverge_th < 1. {
            return Err(Error::invalid(format!(
                "LrFinder: diverge_th should be larger than 1, but {} was given: the search ends where the loss is so many times the best",
                self.diverge_th
            )));
        }
        if self.num_iter == Some(0) {
            return Err(Error::invalid(
                "LrFinder: if provided, num_iter should be positive, but give 0: the search takes so many iterations; without num_iter it takes the whole run",
            ));
        }
        let groups = self.optimizer.groups()?;
        let start = match &self.start {
            Some(values) => values.of_groups("start_lr", groups.len())?,
            None => groups.iter().map(Group::lr).collect::<Result<_>>()?,
        };
        let end = self.end.of_groups("end_lr", groups.len())?;
        for (start, end) in start.iter().zip(&end) {
            if start.is_nan() || !end.is_finite() || start >= end {
                return Err(Error::invalid(format!(
                    "LrFinder: start_lr must be less than end_lr, start_lr={start:?} vs end_lr={end:?}"
                )));
            }
            if *start < 0. || (*start == 0. && self.mode == StepMode::Exp) {
                return Err(Error::invalid(format!(
                    "LrFinder: start_lr must not be negative, nor 0 with StepMode::Exp, but {start:?} was given"
                )));
            }
        }
        let curve =
            LrCurve { groups: groups.iter().map(Group::name).collect(), ..LrCurve::default() };
        Ok(Search {
            knobs: groups.iter().map(|group| group.knob("lr")).collect::<Result<_>>()?,
            ranges: start.into_iter().zip(end).collect(),
            mode: self.mode,
            num_iter: self.num_iter,
            iterations: 0,
            smooth_f: self.smooth_f,
            diverge_th: self.diverge_th,
            loss,
            lr: vec![],
            best: None,
            ended: false,
            curve,
        })
    }
}

/// Copies of what training changes.
struct Saved {
    optimizers: Vec<(Optimizer, OptimizerSnapshot)>,
    stores: Vec<StoreSnapshot>,
}

impl Saved {
    fn of(to_save: &[(Optimizer, Arc<Mutex<Variables>>)]) -> Result<Self> {
        let optimizer = |(o, _): &(Optimizer, _)| Ok((o.clone(), o.snapshot()?));
        let optimizers = to_save.iter().map(optimizer).collect::<Result<_>>()?;
        let mut stores: Vec<&Arc<Mutex<Variables>>> = vec![];
        for (_, store) in to_save {
            if !stores.iter().any(|known| Arc::ptr_eq(known, store)) {
                stores.push(store);
            }
        }
        let stores = stores.into_iter().map(|store| StoreSnapshot::of(store));
        Ok(Self { optimizers, stores: stores.collect::<Result<_>>()? })
    }

    fn clear_gradients(&self) -> Result<()> {
        self.stores.iter().try_for_each(StoreSnapshot::clear_gradients)
    }

    /// Restores all it can before it returns an error.
    fn restore(self) -> Result<()> {
        let stores = self.stores.into_iter().map(StoreSnapshot::restore);
        let optimizers = self.optimizers.iter().map(|(optimizer, saved)| optimizer.restore(saved));
        let restored: Vec<Result<()>> = stores.chain(optimizers).collect();
        restored.into_iter().collect()
    }
}

/// The handler that sets the learning rates and records the losses.
struct Search<F> {
    knobs: Vec<Knob>,
    /// First and last learning rate of each group.
    ranges: Vec<(f64, f64)>,
    mode: StepMode,
    num_iter: Option<u64>,
    /// Number of steps from first to last; set when the run's length is known.
    iterations: u64,
    smooth_f: f64,
    diverge_th: f64,
    loss: F,
    /// The learning rates of this iteration.
    lr: Vec<f64>,
    best: Option<f64>,
    /// Whether the search has ended. In a group of processes the run may go on for some iterations, until the ranks
    /// meet.
    ended: bool,
    curve: LrCurve,
}

/// Sets the number of steps, and extends the run's budget for them.
impl<F> Search<F> {
    fn plan<C, B, O>(&mut self, engine: &mut Engine<'_, C, B, O>) -> anyhow::Result<()> {
        let state = &mut engine.state;
        let in_epochs = || Some(state.epoch_length?.saturating_mul(state.max_epochs?));
        let budget = state.max_iters.or_else(in_epochs);
        self.iterations = self.num_iter.or(budget).context(
            "how long the run is cannot be told beforehand: give the learning rate finder a num_iter",
        )?;
        if budget.is_none_or(|budget| budget < self.iterations) {
            (state.max_epochs, state.max_iters) = (None, Some(self.iterations));
        }
        Ok(())
    }

    fn turn(&mut self) -> Result<()> {
        let ratio = self.curve.loss.len() as f64 / self.iterations as f64;
        let step = self.curve.loss.len() as f64;
        self.lr.clear();
        for (knob, (start, end)) in self.knobs.iter().zip(&self.ranges) {
            let lr = match self.mode {
                StepMode::Exp => start * (end / start).powf(ratio),
                // Rounding would miss the end.
                StepMode::Linear if ratio >= 1. => *end,
                // The order of the operations is ignite's, for equal rounding.
                StepMode::Linear => start + (end - start) * step / self.iterations as f64,
            };
            knob.set(lr)?;
            self.lr.push(lr);
        }
        Ok(())
    }

    /// Records a loss, and notes whether it ends the search.
    fn record(&mut self, loss: f64) {
        let loss = match self.curve.loss.last() {
            Some(last) if self.smooth_f > 0. => self.smooth_f * loss + (1. - self.smooth_f) * last,
            _ => loss,
        };
        self.curve.lr.push(std::mem::take(&mut self.lr));
        self.curve.loss.push(loss);
        let best = self.best.map_or(loss, |best| best.min(loss));
        self.best = Some(best);
        let limit = match best >= 0. {
            true => self.diverge_th * best,
            false => best - (self.diverge_th - 1.) * best,
        };
        self.curve.diverged = !loss.is_finite() || loss > limit;
        self.ended = self.curve.diverged || self.curve.loss.len() as u64 > self.iterations;
    }
}

impl<C, B, O, V: Into<MetricValue>, F: Fn(&O) -> V> Handler<C, B, O> for Search<F> {
    fn spec(&self) -> Result<HandlerSpec> {
        let events = Event::Started | Event::IterationStarted | Event::IterationCompleted;
        Ok(HandlerSpec::new("learning rate finder", events))
    }

    fn call(
        &mut self,
        event: Event,
        _cx: &mut C,
        engine: &mut Engine<'_, C, B, O>,
    ) -> anyhow::Result<()> {
        match event {
            Event::Started => self.plan(engine)?,
            _ if self.ended => {}
            Event::IterationStarted => self.turn()?,
            _ => {
                let output = engine.state.output.as_ref();
                let output = output.context("a handler took the step's output away")?;
                let loss: MetricValue = (self.loss)(output).into();
                let loss = loss.read().context("the loss must be a single value")?;
                self.record(engine.mean_of_ranks("the loss of the learning rate finder", loss)?);
                if self.ended {
                    engine.terminate();
                }
            }
        }
        Ok(())
    }
}

/// The result of an [`LrFinder`]: the smoothed loss over the learning rate.
#[doc(alias = "get_results")]
#[derive(Debug, Clone, PartialEq, Default)]
pub struct LrCurve {
    groups: Vec<String>,
    lr: Vec<Vec<f64>>,
    loss: Vec<f64>,
    diverged: bool,
    warnings: Vec<String>,
}

impl LrCurve {
    /// Makes a curve from given values: for each iteration the learning rates of all groups, and the loss.
    ///
    /// # Errors
    /// The numbers of learning rates and losses differ, or the number of groups is not the same everywhere.
    pub fn new(lr: Vec<Vec<f64>>, loss: Vec<f64>) -> Result<Self> {
        let groups = lr.first().map_or(0, Vec::len);
        if lr.len() != loss.len() || lr.iter().any(|lrs| lrs.len() != groups) {
            return Err(Error::invalid(format!(
                "a curve needs the learning rates of all groups for each loss, but {} rows for {} losses were given, the first with {groups} groups",
                lr.len(),
                loss.len()
            )));
        }
        let groups = (0..groups).map(|index| format!("group_{index}")).collect();
        Ok(Self { groups, lr, loss, ..Self::default() })
    }

    /// For each iteration the learning rates that it trained with, one for each group.
    pub fn lr(&self) -> &[Vec<f64>] {
        &self.lr
    }

    /// For each iteration the smoothed loss after it.
    pub fn loss(&self) -> &[f64] {
        &self.loss
    }

    /// Whether the finder stopped because the loss had diverged, as it should.
    pub fn diverged(&self) -> bool {
        self.diverged
    }

    /// Warnings about things that looked wrong without being errors.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// The learning rates, one for each group, at which the loss fell fastest: of all points up to the smallest loss,
    /// the one with the most negative central difference. Computed in f64; ignite rounds the losses to f32 first, which
    /// can move the point where the curve is nearly flat. Points after a loss that is not finite do not count.
    ///
    /// # Errors
    /// The curve is empty, or has fewer than 3 points up to the smallest loss.
    pub fn lr_suggestion(&self) -> Result<Vec<f64>> {
        Ok(self.lr[self.steepest()?].clone())
    }

    /// Sets the suggested learning rates in the optimizer's groups.
    ///
    /// # Errors
    /// There is no suggestion, or the optimizer has another number of groups.
    pub fn apply_suggested_lr(&self, optimizer: &Optimizer) -> Result<()> {
        let suggestion = self.lr_suggestion()?;
        let groups = optimizer.groups()?;
        if groups.len() != suggestion.len() {
            return Err(Error::invalid(format!(
                "The number of parameter groups does not match between given optimizer and the one used for estimating the learning rate: {} vs {}",
                suggestion.len(),
                groups.len()
            )));
        }
        groups.iter().zip(suggestion).try_for_each(|(group, lr)| group.set_lr(lr))
    }

    fn steepest(&self) -> Result<usize> {
        if self.loss.is_empty() {
            return Err(Error::invalid(
                "learning rate finder didn't run yet so lr_suggestion can't be returned: the curve has no losses, take the one that LrFinder::run returns",
            ));
        }
        let finite = self.loss.split(|loss| !loss.is_finite()).next().unwrap_or_default();
        let least = first_least(finite.iter().copied()).map_or(0, |index| index + 1);
        let differences = finite[..least].windows(3).map(|three| 0.5 * (three[2] - three[0]));
        first_least(differences).map(|index| index + 1).ok_or_else(|| {
            Error::invalid(format!(
                "FastaiLRFinder got unexpected curve shape, the curve should be somehow U-shaped, please decrease start_lr or increase end_lr to resolve this issue. (of {} losses, number {least} is the smallest; it has to be number 3 or later)",
                self.loss.len()
            ))
        })
    }

    /// Plots the loss over the learning rate on a logarithmic scale as SVG, with a curve for each group, and marks the
    /// suggestion if there is one. A curve ends where it leaves the plot upwards. A file that exists is replaced when
    /// the new one is complete.
    ///
    /// # Errors
    /// The curve is empty, or the file cannot be written.
    #[cfg(feature = "plots")]
    pub fn plot(&self, path: impl AsRef<Path>) -> Result<()> {
        use crate::plot::{Line, Sheet, X, label, svg_of};
        if self.loss.is_empty() {
            return Err(Error::invalid(
                "learning rate finder didn't run yet so results can't be plotted: the curve has no losses, take the one that LrFinder::run returns",
            ));
        }
        let suggested = self.steepest().ok();
        let line = |(group, name): (usize, &String)| {
            let point = |index: usize| (self.lr[index][group], self.loss[index]);
            let mark = suggested.map(point);
            let mut name = match self.groups.len() {
                1 => "loss".to_owned(),
                _ => name.clone(),
            };
            name += &match mark {
                Some((lr, _)) => {
                    let short = format!("{lr:.2e}").parse().unwrap_or(lr);
                    format!(", suggested {}", label(short))
                }
                None => ", no suggestion".to_owned(),
            };
            Line { name, points: self.visible(group), mark }
        };
        let lines = self.groups.iter().enumerate().map(line).collect();
        let svg = svg_of(&[Sheet { title: "smoothed loss".into(), lines }], X::LogLr)?;
        crate::fs::write_atomically(path.as_ref(), |file| file.write_all(svg.as_bytes()))
    }
}

#[cfg(feature = "plots")]
impl LrCurve {
    /// The points of a group up to where the loss has risen far above the largest loss before the minimum.
    fn visible(&self, group: usize) -> Vec<(f64, f64)> {
        let finite = self.loss.split(|loss| !loss.is_finite()).next().unwrap_or_default();
        let least = first_least(finite.iter().copied()).unwrap_or(0);
        let falling = finite.get(..=least).unwrap_or_default();
        let low = falling.last().copied().unwrap_or(0.);
        let high = falling.iter().copied().fold(low, f64::max);
        let top = high + 0.5 * (high - low).max(high.abs());
        let mut points: Vec<(f64, f64)> = vec![];
        for (lrs, loss) in self.lr.iter().zip(&self.loss) {
            let (lr, loss) = (lrs[group], *loss);
            if let Some((last_lr, last)) = points.last().copied()
                && top > last
                && loss > top
            {
                // The curve is cut on the straight line between the two points of the plot.
                let part = (top - last) / (loss - last);
                points.push((last_lr * (lr / last_lr).powf(part), top));
                break;
            }
            points.push((lr, loss));
        }
        points
    }
}

/// The index of the smallest value; of equal values the first.
fn first_least(values: impl Iterator<Item = f64>) -> Option<usize> {
    let least = values.enumerate().reduce(|a, b| if b.1 < a.1 { b } else { a });
    least.map(|(index, _)| index)
}

#[cfg(test)]
mod tests {
    use anyhow::Result;
    use tch::nn::{self, Init};
    use tch::{Device, Kind, Tensor};

    use super::*;
    use crate::data::{no_data, one_shot, restartable};
    use crate::engine::Stop;
    use crate::schedule::{LinearCyclical, ParamScheduler};

    type Trainer<'a> = Engine<'a, Vec<f64>, u32, Tensor>;

    fn store() -> nn::VarStore {
        let mut vs = nn::VarStore::new(Device::Cpu);
        vs.set_kind(Kind::Double);
        let _ = vs.root().var("w", &[4], Init::Const(1.));
        let _ = vs.root().zeros_no_train("steps", &[1]);
        vs
    }

    /// Pulls `w` to the number of the batch; counts its steps in a buffer.
    fn trainer<'a>(optimizer: &'a Optimizer, vs: &nn::VarStore) -> Trainer<'a> {
        let variables = vs.variables();
        Engine::new(move |lrs: &mut Vec<f64>, _: &mut Trainer<'a>, batch: u32| {
            lrs.push(optimizer.group_at(0)?.lr()?);
            let loss = (&variables["w"] - f64::from(batch)).square().sum(Kind::Double);
            optimizer.backward_step(&loss)?;
            let _ = variables["steps"].shallow_clone().f_add_scalar_(1.)?;
            Ok(loss.detach())
        })
    }

    fn values(vs: &nn::VarStore) -> (Tensor, Tensor) {
        (vs.variables()["w"].detach().copy(), vs.variables()["steps"].copy())
    }

    fn share(loss: &Tensor) -> Tensor {
        loss.shallow_clone()
    }

    #[test]
    fn an_interrupted_run_goes_on_as_if_nothing_had_been() -> Result<()> {
        let data = [3, 1, 4, 1, 5];
        let train = |find: bool| -> Result<_> {
            let vs = store();
            let optimizer = Optimizer::adam(&vs).lr(0.1).build()?;
            let mut trainer = trainer(&optimizer, &vs);
            trainer.on(Event::IterationCompleted.once(7), |_, engine| {
                if engine.state.max_epochs == Some(4) {
                    engine.interrupt();
                }
                Ok(())
            });
            let (mut lrs, mut other) = (vec![], vec![]);
            let summary = trainer.run(&mut lrs, &data[..], Until::epochs(4))?;
            assert_eq!(summary.stop, Stop::Interrupted);
            trainer.state.metrics.set("kept", 1.);
            if find {
                let finder = LrFinder::new(&optimizer, &vs).num_iter(20);
                let before = (values(&vs), trainer.state_dict(), trainer.last_event_name());
                assert_eq!(before.2, Some(Event::Interrupt));
                let curve = finder.run(&mut trainer, &mut other, &data[..], share)?;
                assert_eq!(curve.lr().len(), other.len());
                assert!(other.windows(2).all(|pair| pair[0] < pair[1]));
                let after = (values(&vs), trainer.state_dict(), trainer.last_event_name());
                assert_eq!(after, before);
                assert_eq!(trainer.state.metrics.get("kept")?, 1.);
            }
            let summary = trainer.run(&mut lrs, &data[..], Until::default())?;
            assert_eq!((summary.iterations, lrs.len()), (20, 20));
            Ok((values(&vs), optimizer.state("w")?))
        };
        assert_eq!(train(true)?, train(false)?);
        Ok(())
    }

    #[test]
    fn all_is_restored_after_an_error_too() -> Result<()> {
        let vs = store();
        let optimizer = Optimizer::builder(nn::sgd(0.9, 0., 0., false), &vs).lr(0.1).build()?;
        let w = vs.variables()["w"].shallow_clone();
        (&w * 2.).sum(Kind::Double).backward();
        let mut trainer = trainer(&optimizer, &vs);
        trainer.on(Event::IterationCompleted.once(4), |_, _| anyhow::bail!("no more"));
        let before = values(&vs);
        let finder = LrFinder::new(&optimizer, &vs);
        let error = finder.run(&mut trainer, &mut vec![], vec![1; 9], share).unwrap_err();
        assert!(matches!(error, Error::Handler { iteration: 4, .. }), "{error}");
        assert_eq!((values(&vs), w.grad()), (before, w.ones_like() * 2.));
        assert!(optimizer.state("w")?.is_empty());
        assert_eq!(optimizer.knob("lr")?.get()?, 0.1);
        assert_eq!((trainer.state.iteration, trainer.state.max_epochs), (0, None));

        // The finder's own handler is gone.
        let mut lrs = vec![];
        trainer.run(&mut lrs, vec![1; 3], Until::epochs(1))?;
        assert_eq!(lrs, [0.1; 3]);
        Ok(())
    }

    #[test]
    fn schedulers_of_the_trainer_do_not_interfere() -> Result<()> {
        let vs = store();
        let optimizer = Optimizer::sgd(&vs).lr(0.1).build()?;
        let mut trainer = trainer(&optimizer, &vs);
        let knob = optimizer.knob("lr")?;
        trainer.attach(ParamScheduler::new("lr", knob, LinearCyclical::new(0.5, 0.4, 10)));
        let mut lrs = vec![];
        let finder = LrFinder::new(&optimizer, &vs)
            .start_lr(0.)
            .end_lr(4e-3)
            .num_iter(4)
            .step_mode(StepMode::Linear);
        let curve = finder.run(&mut trainer, &mut lrs, vec![1; 9], share)?;
        assert_eq!(lrs, [0., 1e-3, 2e-3, 3e-3, 4e-3]);
        assert_eq!(curve.lr().concat(), lrs);
        assert_eq!(curve.warnings().len(), 1);
        Ok(())
    }

    #[test]
    fn the_run_may_be_measured_in_iterations_or_not_at_all() -> Result<()> {
        let vs = store();
        let optimizer = Optimizer::sgd(&vs).lr(1e-3).build()?;
        let mut trainer = trainer(&optimizer, &vs);
        let finder = LrFinder::new(&optimizer, &vs).end_lr(2e-3);
        let mut steps = |finder: &LrFinder, data: crate::data::Custom<'static, u32>| {
            let curve = finder.run(&mut trainer, &mut vec![], data, share)?;
            anyhow::Ok(curve.loss().len())
        };
        let endless = || restartable(|| std::iter::repeat(2));
        let by_iterations = finder.clone().until(Until::iterations(7));
        assert_eq!(steps(&by_iterations, endless())?, 7);
        assert_eq!(steps(&by_iterations.clone().num_iter(5), endless())?, 6);
        assert_eq!(steps(&by_iterations.num_iter(9), endless())?, 9);
        assert_eq!(
            steps(&finder.clone().num_iter(12), restartable(|| vec![1; 5].into_iter()))?,
            12
        );
        assert_eq!(steps(&finder.clone().num_iter(12), one_shot(vec![1; 20]))?, 12);
        let long = finder.clone().until(Until::epochs(3).epoch_length(4));
        assert_eq!(steps(&long, no_data())?, 12);
        let error = steps(&finder, endless()).unwrap_err();
        assert!(format!("{error:?}").contains("num_iter"), "{error:?}");
        Ok(())
    }

    #[test]
    fn each_group_has_its_range() -> Result<()> {
        let vs = store();
        let _ = vs.root().set_group(1).zeros("v", &[1]);
        let optimizer = Optimizer::sgd(&vs).lr(0.1).build()?;
        let mut trainer = Engine::new(|_: &mut (), engine: &mut Engine<'_, _, _, _>, _: ()| {
            Ok([5., 4.5, 2., 1., 3., f64::NAN, 0.][engine.state.iteration as usize - 1])
        });
        let finder = LrFinder::new(&optimizer, &vs).smooth_f(0.).num_iter(6);
        let mut find = |finder: LrFinder| finder.run(&mut trainer, &mut (), vec![()], |x| *x);
        let curve = find(finder.clone().start_lrs([1e-3, 1.]).end_lrs([1e3, 1e6]))?;
        assert_eq!(curve.loss()[..5], [5., 4.5, 2., 1., 3.]);
        assert!(curve.diverged() && curve.warnings().is_empty() && curve.loss().len() == 6);
        let suggested = curve.lr_suggestion()?;
        assert!((suggested[0] - 0.1).abs() < 1e-12 && (suggested[1] - 100.).abs() < 1e-9);
        curve.apply_suggested_lr(&optimizer)?;
        assert_eq!(optimizer.knob("lr")?.values()?, suggested);
        let single = LrCurve::new(vec![vec![1.]; 4], vec![4., 3., 2., 1.])?;
        let error = single.apply_suggested_lr(&optimizer).unwrap_err().to_string();
        assert!(error.ends_with("1 vs 2"), "{error}");
        let error = find(finder.start_lrs([1e-3])).unwrap_err().to_string();
        assert!(error.contains("1 were given for 2 parameter groups"), "{error}");
        Ok(())
    }

    #[test]
    fn negative_losses_diverge_by_their_distance_to_zero() -> Result<()> {
        let vs = store();
        let optimizer = Optimizer::sgd(&vs).lr(0.1).build()?;
        let losses = [-1., -1.5, -2., 3., 5.9, 6.1, 7.];
        let mut trainer = Engine::new(|_: &mut (), _, loss: f64| Ok(loss));
        let finder = LrFinder::new(&optimizer, &vs).smooth_f(0.);
        let curve = finder.run(&mut trainer, &mut (), losses.to_vec(), |loss: &f64| *loss)?;
        assert_eq!((curve.diverged(), curve.loss()), (true, &losses[..6]));
        Ok(())
    }

    #[test]
    fn a_loss_of_several_values_is_an_error() -> Result<()> {
        let vs = store();
        let optimizer = Optimizer::sgd(&vs).build()?;
        let mut trainer = trainer(&optimizer, &vs);
        let two = |loss: &Tensor| loss.expand([2], false);
        let error =
            LrFinder::new(&optimizer, &vs).run(&mut trainer, &mut vec![], vec![1; 3], two).err();
        assert!(format!("{error:?}").contains("the loss must be a single value"), "{error:?}");
        Ok(())
    }

    #[test]
    fn wrong_arguments_are_named() -> Result<()> {
        let vs = store();
        let optimizer = Optimizer::sgd(&vs).lr(0.1).build()?;
        let finder = LrFinder::new(&optimizer, &vs);
        for (wrong, says) in [
            (finder.clone().smooth_f(1.), "LrFinder: smooth_f is outside"),
            (finder.clone().smooth_f(f64::NAN), "LrFinder: smooth_f is outside"),
            (finder.clone().diverge_th(0.9), "diverge_th should be larger"),
            (finder.clone().num_iter(0), "num_iter should be positive"),
            (finder.clone().start_lr(11.), "start_lr=11.0 vs end_lr=10.0"),
            (finder.clone().start_lr(0.), "nor 0 with StepMode::Exp"),
            (finder.clone().end_lr(f64::INFINITY), "must be less than"),
        ] {
            let mut trainer = trainer(&optimizer, &vs);
            let error = wrong.run(&mut trainer, &mut vec![], vec![1; 3], share).unwrap_err();
            assert!(error.to_string().contains(says), "{error}");
        }
        assert!(LrCurve::new(vec![vec![1.], vec![]], vec![1., 1.]).is_err());
        Ok(())
    }

    #[cfg(feature = "plots")]
    #[test]
    fn plots_show_the_suggestion() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("lr.svg");
        let lr = |i: i32| 1e-5 * 10f64.powf(f64::from(i) / 10.);
        let loss = |i: i32| 2.3 - 2. / (1. + (-f64::from(i - 30) / 4.).exp());
        let curve = |groups: i32| {
            let row = |i| (0..groups).map(|group| lr(i + 10 * group)).collect();
            let loss = (0..60).map(|i| if i < 45 { loss(i) } else { loss(i) * f64::from(i - 44) });
            LrCurve::new((0..60).map(row).collect(), loss.collect())
        };
        curve(1)?.plot(&path)?;
        let svg = std::fs::read_to_string(&path)?;
        assert!(svg.contains("loss, suggested 0.01") && svg.contains("learning rate"), "{svg}");
        let mut exploded = curve(1)?;
        exploded.loss[59] = 1e30;
        let seen = exploded.visible(0);
        assert!(seen.len() < 60 && seen.iter().all(|(_, loss)| *loss < 4.), "{seen:?}");
        curve(2)?.plot(&path)?;
        let svg = std::fs::read_to_string(&path)?;
        assert!(svg.contains("group_0, suggested 0.01") && svg.contains("group_1, suggested 0.1"));
        LrCurve::new(vec![vec![0.], vec![-1.]], vec![1., f64::NAN])?.plot(&path)?;
        assert!(std::fs::read_to_string(&path)?.contains("no suggestion"));
        assert!(LrCurve::default().plot(&path).is_err());
        Ok(())
    }
}
