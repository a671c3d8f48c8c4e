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
use crate::engine::{Engine, Event, Events, Handler, MetricValue, Until};
use crate::optim::{Knob, Optimizer, OptimizerSnapshot, StoreSnapshot};
use crate::{Error, Result};

/// Trains for some iterations with a growing learning rate, to see where the loss falls fastest:
/// ignite's `FastaiLRFinder`.
///
/// ```
/// # use tch::{Device, Kind, Tensor, nn};
/// use tch_ignite::engine::{Engine, Until};
/// use tch_ignite::handlers::LrFinder;
/// use tch_ignite::optim::Optimizer;
///
/// # let vs = nn::VarStore::new(Device::Cpu);
/// # let weight = vs.root().ones("weight", &[3]);
/// # let train = vec![Tensor::from_slice(&[1f32, 2., 3.]); 50];
/// let optimizer = Optimizer::sgd(&vs).lr(0.1).build()?;
/// let mut trainer = Engine::new(|optimizer: &mut Optimizer, _, x: Tensor| {
///     let loss = (&weight * &x).square().sum(Kind::Float);
///     optimizer.backward_step(&loss)?;
///     Ok(loss.detach())
/// });
/// # let train = |xs: &[Tensor]| tch_ignite::data::restartable({
/// #     let xs: Vec<_> = xs.iter().map(|x| x.shallow_clone()).collect();
/// #     move || xs.iter().map(|x| x.shallow_clone()).collect::<Vec<_>>().into_iter()
/// # })(&train);
/// let mut cx = optimizer.clone();
/// let curve = LrFinder::new(&optimizer, &vs)
///     .start_lr(1e-6)
///     .end_lr(1.0)
///     .num_iter(40)
///     .run(&mut trainer, &mut cx, train, |loss: &Tensor| loss.shallow_clone())?;
///
/// assert_eq!((optimizer.knob("lr")?.get()?, trainer.state.iteration), (0.1, 0)); // as before
/// curve.apply_suggested_lr(&optimizer)?;
/// let suggested = curve.lr_suggestion()?[0];
/// assert!(optimizer.knob("lr")?.get()? == suggested && (1e-4..0.1).contains(&suggested));
/// # #[cfg(feature = "plots")]
/// # let folder = std::env::temp_dir().join(format!("tch-ignite-lr-{}", std::process::id()));
/// # #[cfg(feature = "plots")]
/// curve.plot(folder.join("lr.svg"))?;
/// # #[cfg(feature = "plots")]
/// # std::fs::remove_dir_all(folder).ok();
/// # Ok::<(), tch_ignite::Error>(())
/// ```
///
/// Iteration `i` trains with `start * (end / start)^((i - 1) / num_iter)`, or on a line with
/// [`StepMode::Linear`], in each group from its own start to its own end. The last iteration is number
/// `num_iter + 1`, with the end itself; it is left out where the run's budget has no room for it. The
/// finder stops when the loss has diverged, which is what it is expected to do.
///
/// The trainer's own handlers run too. The finder writes the learning rate after them, so schedulers
/// of the trainer do not interfere. Afterwards, also after an error, these are as they were, bit for
/// bit: the optimizer's hyper-parameters and state, the variables of the store with their gradients,
/// and where the trainer stands, even in the middle of an interrupted run. What your context and your
/// handlers keep is not brought back (a scheduler counts its events, a history records), nor is
/// torch's random generator: best is to look for the learning rate before attaching handlers.
///
/// Costs a copy of the variables and of the optimizer's state, on their device, and a host sync an
/// iteration to read the loss.
#[doc(alias = "FastaiLRFinder")]
#[derive(Clone)]
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

/// How an [`LrFinder`] goes from the first learning rate to the last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum StepMode {
    /// By the same factor in each iteration.
    #[default]
    Exp,
    /// By the same difference.
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
                "Number of values of {name} should be equal to optimizer values: {} were given for {groups} parameter groups",
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

    /// The learning rate of the first iteration, in all groups; unless given, each group's own.
    pub fn start_lr(mut self, lr: f64) -> Self {
        self.start = Some(Values::All(lr));
        self
    }

    /// The learning rate of the first iteration, for each group.
    pub fn start_lrs(mut self, lrs: impl IntoIterator<Item = f64>) -> Self {
        self.start = Some(Values::Each(lrs.into_iter().collect()));
        self
    }

    /// The largest learning rate, in all groups: 10 unless given.
    pub fn end_lr(mut self, lr: f64) -> Self {
        self.end = Values::All(lr);
        self
    }

    /// The largest learning rate, for each group.
    pub fn end_lrs(mut self, lrs: impl IntoIterator<Item = f64>) -> Self {
        self.end = Values::Each(lrs.into_iter().collect());
        self
    }

    /// Steps from the first learning rate to the largest. Goes over the data as often as that takes.
    /// Unless given: as many as [`until`](Self::until) has iterations.
    pub fn num_iter(mut self, iterations: u64) -> Self {
        self.num_iter = Some(iterations);
        self
    }

    /// The run's budget, in epochs or iterations: one epoch unless given. `num_iter` extends it.
    pub fn until(mut self, until: Until) -> Self {
        self.until = until;
        self
    }

    /// How the learning rate grows: [`StepMode::Exp`] unless given.
    pub fn step_mode(mut self, mode: StepMode) -> Self {
        self.mode = mode;
        self
    }

    /// Weight of a new loss in the smoothed one, in [0, 1): 0.05 unless given; 0 for no smoothing.
    pub fn smooth_f(mut self, weight: f64) -> Self {
        self.smooth_f = weight;
        self
    }

    /// Stops when the smoothed loss is more than this many times the smallest so far: 5 unless given,
    /// at least 1. Where the smallest is negative, it is its distance to zero that counts.
    pub fn diverge_th(mut self, times: f64) -> Self {
        self.diverge_th = times;
        self
    }

    /// Also restores another optimizer that the step updates, and its variables.
    pub fn also_restore(mut self, optimizer: &Optimizer, vs: &VarStore) -> Self {
        self.to_restore.push((optimizer.clone(), vs.variables_.clone()));
        self
    }

    /// Runs `trainer` on `data` with growing learning rates, and brings everything back to where it
    /// was. `loss` takes the loss out of what the step returns: a number, or a tensor with one element.
    ///
    /// # Errors
    /// Wrong arguments, before anything runs; what [`Engine::run`] returns; a loss that is not one value.
    pub fn run<'a, C, B, O, V: Into<MetricValue>>(
        &self,
        trainer: &mut Engine<'a, C, B, O>,
        cx: &mut C,
        data: impl IntoSource<'a, B>,
        loss: impl Fn(&O) -> V + 'a,
    ) -> Result<LrCurve> {
        let search = Rc::new(RefCell::new(self.search(loss)?));
        let aside = trainer.set_aside()?;
        let found = self.run_aside(trainer, cx, data, search);
        trainer.put_back(aside);
        found
    }

    fn run_aside<'a, C, B, O, V: Into<MetricValue>, F: Fn(&O) -> V + 'a>(
        &self,
        trainer: &mut Engine<'a, C, B, O>,
        cx: &mut C,
        data: impl IntoSource<'a, B>,
        search: Rc<RefCell<Search<F>>>,
    ) -> Result<LrCurve> {
        let saved = Saved::of(&self.to_restore)?;
        let handler = trainer.add_handler(search.clone())?;
        let ran = saved.clear_gradients().and_then(|()| trainer.run(cx, data, self.until));
        let removed = trainer.remove_event_handler(handler);
        let restored = saved.restore();
        let summary = ran?;
        restored?;
        removed?;
        let mut curve = std::mem::take(&mut search.borrow_mut().curve);
        curve.warnings = summary.warnings;
        if !curve.diverged {
            curve.warnings.push(
                "Run completed without loss diverging, increase end_lr, decrease diverge_th or look at the plot".into(),
            );
        }
        Ok(curve)
    }

    /// Checks the arguments.
    fn search<F>(&self, loss: F) -> Result<Search<F>> {
        if !(0. ..1.).contains(&self.smooth_f) {
            return Err(Error::invalid(format!(
                "smooth_f is outside the range [0, 1]: {} was given, but the weight of a new loss is at least 0 and less than 1",
                self.smooth_f
            )));
        }
        if self.diverge_th.is_nan() || self.diverge_th < 1. {
            return Err(Error::invalid(format!(
                "diverge_th should be larger than 1, but {} was given",
                self.diverge_th
            )));
        }
        if self.num_iter == Some(0) {
            return Err(Error::invalid("if provided, num_iter should be positive, but give 0"));
        }
        let groups = self.optimizer.groups()?;
        let start = match &self.start {
            Some(values) => values.of_groups("start_lr", groups.len())?,
            None => groups.iter().map(|group| group.lr()).collect::<Result<_>>()?,
        };
        let end = self.end.of_groups("end_lr", groups.len())?;
        for (start, end) in start.iter().zip(&end) {
            if start.is_nan() || !end.is_finite() || start >= end {
                return Err(Error::invalid(format!(
                    "start_lr must be less than end_lr, start_lr={start:?} vs end_lr={end:?}"
                )));
            }
            if *start < 0. || (*start == 0. && self.mode == StepMode::Exp) {
                return Err(Error::invalid(format!(
                    "start_lr must not be negative, nor 0 with StepMode::Exp, but {start:?} was given"
                )));
            }
        }
        let curve = LrCurve {
            groups: groups.iter().map(|group| group.name()).collect(),
            ..LrCurve::default()
        };
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

    /// Restores all it can before it tells of an error.
    fn restore(self) -> Result<()> {
        let stores = self.stores.into_iter().map(StoreSnapshot::restore);
        let restored = stores.fold(Ok(()), |all: Result<()>, one| all.and(one));
        let optimizers = self.optimizers.iter().map(|(optimizer, saved)| optimizer.restore(saved));
        optimizers.fold(restored, |all, one| all.and(one))
    }
}

/// The handler that turns the learning rates and records.
struct Search<F> {
    knobs: Vec<Knob>,
    /// From where to where, for each group.
    ranges: Vec<(f64, f64)>,
    mode: StepMode,
    num_iter: Option<u64>,
    /// Steps from start to end, once the run's length is known.
    iterations: u64,
    smooth_f: f64,
    diverge_th: f64,
    loss: F,
    /// Of this iteration.
    lr: Vec<f64>,
    best: Option<f64>,
    curve: LrCurve,
}

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
                // In the order of ignite's operations.
                StepMode::Linear => start + (end - start) * step / self.iterations as f64,
            };
            knob.set(lr)?;
            self.lr.push(lr);
        }
        Ok(())
    }

    /// Whether to stop.
    fn record(&mut self, loss: f64) -> bool {
        let loss = match self.curve.loss.last() {
            Some(last) if self.smooth_f > 0. => {
                self.smooth_f * loss + (1. - self.smooth_f) * last
            }
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
        self.curve.diverged || self.curve.loss.len() as u64 > self.iterations
    }
}

impl<C, B, O, V: Into<MetricValue>, F: Fn(&O) -> V> Handler<C, B, O> for Search<F> {
    fn name(&self) -> String {
        "learning rate finder".into()
    }

    fn events(&self) -> Events {
        Event::Started | Event::IterationStarted | Event::IterationCompleted
    }

    fn call(
        &mut self,
        event: Event,
        _cx: &mut C,
        engine: &mut Engine<'_, C, B, O>,
    ) -> anyhow::Result<()> {
        match event {
            Event::Started => self.plan(engine)?,
            Event::IterationStarted => self.turn()?,
            _ => {
                let output = engine.state.output.as_ref();
                let output = output.context("a handler took the step's output away")?;
                let loss: MetricValue = (self.loss)(output).into();
                let loss = loss.read().context("the loss must be a single value")?;
                if self.record(loss) {
                    engine.terminate();
                }
            }
        }
        Ok(())
    }
}

/// What an [`LrFinder`] saw: the smoothed loss over the learning rate.
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
    /// A curve from elsewhere: for each iteration the learning rates of all groups, and the loss.
    ///
    /// # Errors
    /// Not as many learning rates as losses, or not the same number of groups everywhere.
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

    /// For each iteration the learning rates it trained with, one for each group.
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

    /// What looked wrong without being an error.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// The learning rates, one for each group, at which the loss fell fastest: of all points up to the
    /// smallest loss, the one with the most negative central difference. Computed in f64; ignite
    /// rounds the losses to f32 first, which can move it where the curve is nearly flat. What comes
    /// after a loss that is not finite does not count.
    ///
    /// # Errors
    /// No run yet, or fewer than 3 points up to the smallest loss.
    pub fn lr_suggestion(&self) -> Result<Vec<f64>> {
        Ok(self.lr[self.steepest()?].clone())
    }

    /// Sets the suggestion in the optimizer's groups.
    ///
    /// # Errors
    /// No suggestion, or an optimizer with another number of groups.
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
                "learning rate finder didn't run yet so lr_suggestion can't be returned",
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

    /// Draws the loss over the learning rate on a logarithmic scale as SVG, a curve for each group, and
    /// marks the suggestion where there is one. A file that was there is replaced when the new one is
    /// complete.
    ///
    /// # Errors
    /// No run yet; a file that cannot be written.
    #[cfg(feature = "plots")]
    pub fn plot(&self, path: impl AsRef<Path>) -> Result<()> {
        use super::plot::{Line, Sheet, X, label, svg_of};
        if self.loss.is_empty() {
            return Err(Error::invalid(
                "learning rate finder didn't run yet so results can't be plotted",
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
                Some((lr, _)) => format!(", suggested {}", label(lr)),
                None => ", no suggestion".to_owned(),
            };
            Line { name, points: (0..self.loss.len()).map(point).collect(), mark }
        };
        let lines = self.groups.iter().enumerate().map(line).collect();
        let svg = svg_of(&[Sheet { title: "smoothed loss".into(), lines }], X::LogLr)?;
        super::files::write_whole(path.as_ref(), |file| file.write_all(svg.as_bytes()))
    }
}

/// The index of the smallest value, the first of equals.
fn first_least(values: impl Iterator<Item = f64>) -> Option<usize> {
    let least = values.enumerate().reduce(|a, b| if b.1 < a.1 { b } else { a });
    least.map(|(index, _)| index)
}
