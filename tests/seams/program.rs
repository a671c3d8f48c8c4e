//! Describes random training programs, generates them, and prints them as Rust.

use std::fmt::{self, Debug, Display};

use proptest::prelude::*;
use serde::{Deserialize, Serialize};
use tch_ignite::engine::{Event, FilteredEvent};
use tch_ignite::supervised::{OPTIMIZER_STEPPED, WINDOW_COMPLETED};

/// Makes a struct of fields with defaults and a builder method for each field. It is printed as the calls for the
/// fields that differ from their defaults.
macro_rules! program {
    ($($(#[$doc:meta])* $field:ident: $kind:ty = $default:expr,)*) => {
        /// A training program. The default is about the smallest there is.
        #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
        pub struct Program {
            $($(#[$doc])* pub $field: $kind,)*
        }

        impl Default for Program {
            fn default() -> Self {
                Self { $($field: $default,)* }
            }
        }

        #[allow(dead_code)]
        impl Program {
            $(pub fn $field(mut self, $field: $kind) -> Self {
                self.$field = $field;
                self
            })*

            /// This program with one field as in the default program, for each that differs.
            pub fn with_a_default(&self) -> Vec<Self> {
                let (usual, mut simpler) = (Self::default(), vec![]);
                $(if self.$field != usual.$field {
                    simpler.push(Self { $field: usual.$field.clone(), ..self.clone() });
                })*
                simpler
            }
        }

        impl Display for Program {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                let usual = Self::default();
                write!(f, "Program::default()")?;
                $(if self.$field != usual.$field {
                    write!(f, "\n        .{}({})", stringify!($field), rust(&self.$field))?;
                })*
                Ok(())
            }
        }
    };
}

/// A value as Rust code: the text of `Debug`, with `vec![…]` for lists.
fn rust(value: &impl Debug) -> String {
    format!("{value:?}").replace('[', "vec![")
}

program! {
    /// The seed, from which parameters and data are computed.
    seed: u64 = 1,
    model: Model = Model::Linear,
    /// How many samples there are.
    samples: usize = 6,
    data: Data = Data::Loader { batch: 2, shuffle: None, drop_last: false },
    /// A schedule of a loader's batch sizes, by epoch.
    batch_sizes: Option<Shape> = None,
    /// Whether losses are multiplied by random numbers.
    noise: bool = false,
    budget: Budget = Budget::Epochs(2),
    /// A smaller budget, which the engine runs first.
    first_budget: Option<u64> = None,
    epoch_length: Option<u64> = None,
    optimizer: Algorithm = Algorithm::Sgd { momentum: 0., dampening: 0., weight_decay: 0., nesterov: false },
    lr: f64 = 0.1,
    /// If given, biases are a second group with this learning rate.
    lr_of_biases: Option<f64> = None,
    accumulate: u64 = 1,
    weights: Weights = Weights::BySamples,
    scaler: Option<Scaler> = None,
    sam: Option<Sharpness> = None,
    clip_value: Option<f64> = None,
    clip_norm: Option<f64> = None,
    schedules: Vec<Scheduled> = vec![],
    plateau: Option<Plateau> = None,
    ema: Option<Ema> = None,
    swa: Option<When> = None,
    frozen: Option<Frozen> = None,
    evaluation: Option<Evaluation> = None,
    early_stopping: Option<EarlyStop> = None,
    /// Losses and rates are logged at these events.
    log: Option<When> = None,
    /// When checkpoints are written.
    checkpoint: When = When { at: At::EpochCompleted, every: 1, after: 0 },
    background: bool = false,
    /// Whether a checkpoint is written after an error, too.
    on_exception: bool = false,
    /// Whether the weights of the two best epochs are kept.
    best: bool = false,
    /// The batch size after a resume.
    batch_after_resume: Option<usize> = None,
    /// Whether a new engine resumes once more at the end.
    resumed_at_the_end: bool = false,
    /// Whether each engine runs in a process of its own.
    processes: bool = false,
    /// How many processes train together.
    ranks: usize = 1,
    breaks: Vec<Break> = vec![],
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub enum Model {
    /// A matrix and a bias.
    Linear,
    /// Two matrices with biases, and a tanh between them.
    TwoLayers,
    /// A matrix under two names, used twice, and a bias.
    Tied,
    /// A table with sparse gradients, one of whose rows is never looked up, and a bias.
    Table,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Data {
    Loader {
        batch: usize,
        shuffle: Option<u64>,
        drop_last: bool,
    },
    /// A vector of batches with so many samples each.
    Batches(Vec<usize>),
    /// The same batches, as data of unknown length.
    Restartable(Vec<usize>),
    /// The same batches again and again, as data without an end.
    Stream(Vec<usize>),
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub enum Budget {
    Epochs(u64),
    Iterations(u64),
    Samples(u64),
}

/// The optimizer. Muon and SparseAdam are for the weights, with AdamW for the biases in a group of the same optimizer.
/// LBFGS is without a line search, which golden cases cover.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub enum Algorithm {
    Sgd { momentum: f64, dampening: f64, weight_decay: f64, nesterov: bool },
    Adam { beta1: f64, beta2: f64, weight_decay: f64, amsgrad: bool },
    AdamW { beta1: f64, beta2: f64, weight_decay: f64, amsgrad: bool },
    RmsProp { alpha: f64, momentum: f64, weight_decay: f64, centered: bool },
    Adagrad { lr_decay: f64, weight_decay: f64, initial: f64 },
    NAdam { beta1: f64, beta2: f64, weight_decay: f64, decoupled: bool },
    RAdam { beta1: f64, beta2: f64, weight_decay: f64, decoupled: bool },
    Adamax { beta1: f64, beta2: f64, weight_decay: f64 },
    Adadelta { rho: f64, weight_decay: f64 },
    Asgd { lambd: f64, t0: f64, weight_decay: f64 },
    Rprop,
    Adafactor { d: f64, weight_decay: f64 },
    Muon { nesterov: bool, weight_decay: f64 },
    SparseAdam { beta1: f64, beta2: f64 },
    Lion { beta1: f64, beta2: f64, weight_decay: f64 },
    AdEMAMix { beta1: f64, beta2: f64, weight_decay: f64, warmup: u32 },
    SgdScheduleFree { momentum: f64, weight_decay: f64, warmup: u32, r: f64 },
    AdamWScheduleFree { beta1: f64, beta2: f64, weight_decay: f64, warmup: u32 },
    Lbfgs { max_iter: u32, history: u32 },
}

impl Algorithm {
    /// The momentum, or the decay rate of the first moment.
    pub fn momentum(self) -> Option<f64> {
        match self {
            Self::Sgd { momentum, .. }
            | Self::RmsProp { momentum, .. }
            | Self::SgdScheduleFree { momentum, .. } => Some(momentum),
            Self::Adam { beta1, .. }
            | Self::AdamW { beta1, .. }
            | Self::NAdam { beta1, .. }
            | Self::RAdam { beta1, .. }
            | Self::Adamax { beta1, .. }
            | Self::Lion { beta1, .. }
            | Self::AdEMAMix { beta1, .. }
            | Self::AdamWScheduleFree { beta1, .. } => Some(beta1),
            Self::Adagrad { .. }
            | Self::Adadelta { .. }
            | Self::Asgd { .. }
            | Self::Rprop
            | Self::Adafactor { .. }
            | Self::Muon { .. }
            | Self::SparseAdam { .. }
            | Self::Lbfgs { .. } => None,
        }
    }

    pub fn weight_decay(self) -> Option<f64> {
        match self {
            Self::Sgd { weight_decay, .. }
            | Self::Adam { weight_decay, .. }
            | Self::AdamW { weight_decay, .. }
            | Self::RmsProp { weight_decay, .. }
            | Self::Adagrad { weight_decay, .. }
            | Self::NAdam { weight_decay, .. }
            | Self::RAdam { weight_decay, .. }
            | Self::Adamax { weight_decay, .. }
            | Self::Adadelta { weight_decay, .. }
            | Self::Asgd { weight_decay, .. }
            | Self::Adafactor { weight_decay, .. }
            | Self::Muon { weight_decay, .. }
            | Self::Lion { weight_decay, .. }
            | Self::AdEMAMix { weight_decay, .. }
            | Self::SgdScheduleFree { weight_decay, .. }
            | Self::AdamWScheduleFree { weight_decay, .. } => Some(weight_decay),
            Self::Rprop | Self::SparseAdam { .. } | Self::Lbfgs { .. } => None,
        }
    }

    /// Whether parameters have other values in evaluations.
    pub fn is_schedule_free(self) -> bool {
        matches!(self, Self::SgdScheduleFree { .. } | Self::AdamWScheduleFree { .. })
    }
}

/// SAM around the optimizer, or ASAM.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Sharpness {
    pub rho: f64,
    pub adaptive: bool,
}

/// How the batches of a window are weighted.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub enum Weights {
    BySamples,
    Equally,
    /// By the number of tokens that the loss is a mean over.
    ByTokens,
    /// By the number of tokens, which is given as a tensor.
    ByTokensInATensor,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Scaler {
    pub scale: f64,
    /// Steps without an overflow before the scale doubles.
    pub interval: u32,
    /// Iterations whose loss is infinite.
    pub overflows: Vec<u64>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Scheduled {
    pub knob: Driven,
    pub on: When,
    pub shape: Shape,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Driven {
    /// The rate of all groups.
    Lr,
    /// The rate of group 0 (weights) or 1 (biases).
    LrOf(usize),
    WeightDecay,
    /// Momentum, or beta1.
    Momentum,
    EmaMomentum,
    /// The distance of SAM.
    Rho,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Shape {
    /// Straight lines between these points.
    Lines(Vec<(i64, f64)>),
    /// `base * gamma ^ (n / size)`.
    Steps { base: f64, size: u64, gamma: f64 },
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Plateau {
    pub watch: Watch,
    pub factor: f64,
    pub patience: u64,
    pub cooldown: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct EarlyStop {
    pub watch: Watch,
    pub patience: u64,
}

/// The metric that a handler watches.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub enum Watch {
    /// The mean loss of each epoch.
    MeanLoss,
    /// The error of each evaluation.
    Validation,
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Ema {
    pub momentum: f64,
    /// The momentum begins with this value and reaches its own in so many updates.
    pub warmup: Option<(f64, u64)>,
    /// When the averages are updated; `None` is once for each update of the optimizer.
    pub on: Option<When>,
}

/// A group that has no gradients from one iteration to another.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Frozen {
    pub biases: bool,
    pub from: u64,
    pub until: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    pub on: When,
    /// Whether the moving averages are evaluated, if the program has them.
    pub averages: bool,
}

/// Events with a filter.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct When {
    pub at: At,
    pub every: u64,
    pub after: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum At {
    Started,
    EpochStarted,
    GetBatchStarted,
    GetBatchCompleted,
    IterationStarted,
    IterationCompleted,
    OptimizerStepped,
    WindowCompleted,
    DataloaderStopIteration,
    TerminateSingleEpoch,
    EpochCompleted,
    Terminate,
    Completed,
}

/// Something that ends a call of `run`, once.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Break {
    pub place: Place,
    /// The iteration at which it happens, or the epoch at events of epochs.
    pub number: u64,
    pub how: How,
    pub then: Then,
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub enum Place {
    /// In a handler.
    In(At),
    /// In the data source.
    Fetch,
    /// In the data source, when a batch that was under way is fetched again.
    Refetch,
    /// In the loss, within `no_grad`. The number says which of the iteration's evaluations of the loss it is, from 1.
    InTheLoss(u32),
    /// In the step of the evaluator.
    InTheEvaluation,
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub enum How {
    Interrupt,
    Error,
    Panic,
    /// The epoch ends, and the run goes on.
    EndOfEpoch,
    /// The run ends.
    End,
    /// A time limit ends the call of `run`; a new engine resumes.
    Limit,
    /// SIGTERM, where there are processes.
    Signal,
    /// SIGKILL, where there are processes.
    Kill,
}

/// How the program goes on.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub enum Then {
    /// The same engine runs again.
    Again,
    /// A new engine resumes the newest checkpoint.
    Resume,
}

impl At {
    pub fn event(self) -> Event {
        match self {
            At::Started => Event::Started,
            At::EpochStarted => Event::EpochStarted,
            At::GetBatchStarted => Event::GetBatchStarted,
            At::GetBatchCompleted => Event::GetBatchCompleted,
            At::IterationStarted => Event::IterationStarted,
            At::IterationCompleted => Event::IterationCompleted,
            At::OptimizerStepped => OPTIMIZER_STEPPED,
            At::WindowCompleted => WINDOW_COMPLETED,
            At::TerminateSingleEpoch => Event::TerminateSingleEpoch,
            At::DataloaderStopIteration => Event::DataloaderStopIteration,
            At::EpochCompleted => Event::EpochCompleted,
            At::Terminate => Event::Terminate,
            At::Completed => Event::Completed,
        }
    }

    /// Whether this event is counted by epochs and not by iterations.
    pub fn is_of_epochs(self) -> bool {
        matches!(self, At::Started | At::EpochStarted | At::EpochCompleted | At::Completed)
    }

    /// Whether a run that goes on after an error in a handler of this event fires the event again.
    pub fn comes_again_after_an_error(self) -> bool {
        use At::*;
        let fetches = [GetBatchStarted, GetBatchCompleted, DataloaderStopIteration];
        [Started, EpochStarted].contains(&self) || fetches.contains(&self)
    }

    /// Whether a schedule at this event sets the value for the updates that follow it.
    pub fn is_after_the_step(self) -> bool {
        use At::*;
        matches!(self, IterationCompleted | OptimizerStepped | WindowCompleted | EpochCompleted)
    }
}

impl When {
    pub fn each(at: At) -> Self {
        Self { at, every: 1, after: 0 }
    }

    pub fn events(self) -> FilteredEvent {
        let event = FilteredEvent::from(self.at.event());
        match (self.every, self.after) {
            (1, 0) => event,
            (every, 0) => event.every(every),
            (every, after) => event.every(every).after(after),
        }
    }

    pub fn passes(self, at: At, number: u64) -> bool {
        at == self.at
            && match (self.every, self.after) {
                (every, 0) => number.is_multiple_of(every),
                (every, after) => number > after && (number - after - 1).is_multiple_of(every),
            }
    }
}

impl Program {
    /// Programs that are a little smaller.
    pub fn smaller(&self) -> Vec<Self> {
        let mut smaller = self.with_a_default();
        let but = |list: usize| (0..list).rev();
        smaller.extend(but(self.breaks.len()).map(|index| {
            let mut program = self.clone();
            program.breaks.remove(index);
            program
        }));
        smaller.extend(but(self.schedules.len()).map(|index| {
            let mut program = self.clone();
            program.schedules.remove(index);
            program
        }));
        smaller.extend(match self.budget {
            Budget::Epochs(n) if n > 1 => Some(self.clone().budget(Budget::Epochs(n - 1))),
            Budget::Iterations(n) if n > 1 => Some(self.clone().budget(Budget::Iterations(n - 1))),
            _ => None,
        });
        smaller.into_iter().map(Self::settled).filter(|smaller| smaller != self).collect()
    }
}

impl Break {
    /// Whether the break writes a checkpoint at its place, from which the run is resumed.
    fn writes_a_checkpoint(&self, program: &Program) -> bool {
        match self.how {
            How::Interrupt | How::Signal | How::Limit => self.then == Then::Resume,
            How::Error | How::Panic => program.on_exception,
            How::EndOfEpoch | How::End | How::Kill => false,
        }
    }

    /// Whether the break changes the outcome. It does if the same engine goes on after an error, because the work
    /// that failed is given up; a new engine that resumes does that work again.
    pub fn leaves_a_trace(&self, program: &Program) -> bool {
        match self.how {
            How::Interrupt | How::Limit | How::Signal | How::Kill => false,
            How::Error | How::Panic => {
                // A checkpoint that is written after an error also goes on behind the work that failed.
                let goes_on = self.then == Then::Again || program.on_exception;
                goes_on && self.place != Place::Refetch
            }
            How::EndOfEpoch | How::End => true,
        }
    }
}

impl Shape {
    /// The first value of some knobs must be above 0.
    fn begin_above_zero(&mut self) {
        if let Shape::Lines(points) = self {
            points[0].1 = points[0].1.max(0.01);
        }
    }

    /// Turns steps into a line that ends after the first of them. Schedule-Free divides by its momentum where it goes from
    /// its parameters to their averages: a momentum near 0, where steps lead to, multiplies the rounding of all before.
    fn stay_above_zero(&mut self) {
        self.begin_above_zero();
        if let Shape::Steps { base, size, gamma } = *self {
            *self = Shape::Lines(vec![(0, base), (size as i64, base * gamma)]);
        }
    }

    /// The value of event `n`, from 0.
    pub fn value(&self, n: u64) -> f64 {
        match self {
            Shape::Steps { base, size, gamma } => base * gamma.powf((n / size) as f64),
            Shape::Lines(points) => {
                let n = n as i64;
                let next = points.iter().position(|(at, _)| *at > n);
                match next {
                    None => points[points.len() - 1].1,
                    Some(0) => points[0].1,
                    Some(next) => {
                        let ((from, start), (to, end)) = (points[next - 1], points[next]);
                        start + (end - start) * (n - from) as f64 / (to - from) as f64
                    }
                }
            }
        }
    }
}

impl Program {
    /// When the watched metric gets a new value.
    pub fn watched_on(&self, watch: Watch) -> When {
        match (watch, &self.evaluation) {
            (Watch::Validation, Some(evaluation)) => evaluation.on,
            _ => When::each(At::EpochCompleted),
        }
    }

    /// This program without the parts that contradict others.
    fn settled(self) -> Self {
        let mut this = self.of_closures().of_ranks();
        if let Algorithm::Muon { .. } | Algorithm::SparseAdam { .. } = this.optimizer {
            this.lr_of_biases.get_or_insert(this.lr);
        }
        let two_groups = this.lr_of_biases.is_some();
        let mut seen: Vec<Driven> = vec![];
        this.schedules.retain_mut(|schedule| {
            let knob = schedule.knob;
            let overlaps = |other: &Driven| {
                *other == knob
                    || matches!(
                        (other, knob),
                        (Driven::Lr, Driven::LrOf(_)) | (Driven::LrOf(_), Driven::Lr)
                    )
            };
            let there = match knob {
                Driven::LrOf(group) => group == 0 || two_groups,
                Driven::EmaMomentum => this.ema.is_some_and(|ema| ema.warmup.is_none()),
                Driven::Momentum => this.optimizer.momentum().is_some(),
                Driven::WeightDecay => this.optimizer.weight_decay().is_some(),
                Driven::Rho => this.sam.is_some(),
                Driven::Lr => true,
            };
            if knob == Driven::Momentum && this.optimizer.is_schedule_free() {
                schedule.shape.stay_above_zero();
            }
            let keep = there && !seen.iter().any(overlaps);
            if keep {
                seen.push(knob);
            }
            keep
        });
        let schedules_momentum = seen.contains(&Driven::Momentum);
        if schedules_momentum && this.optimizer.is_schedule_free() {
            // The weights in evaluations are computed with the momentum. Where nothing else changes them (a rate of 0),
            // rounding decides which evaluation is the better one.
            (this.plateau, this.early_stopping) = (None, None);
        }
        match &mut this.optimizer {
            Algorithm::Sgd { momentum, dampening, nesterov, .. } if *nesterov => {
                *dampening = 0.;
                if *momentum == 0. || schedules_momentum {
                    *nesterov = false;
                }
            }
            _ => {}
        }
        match &mut this.data {
            // A batch is no larger than the data, so that there is at least one.
            Data::Loader { batch, .. } => {
                *batch = (*batch).min(this.samples);
                if let Some(Shape::Lines(sizes)) = &mut this.batch_sizes {
                    let most = this.samples as f64;
                    sizes.iter_mut().for_each(|(_, size)| *size = size.min(most));
                }
            }
            data => {
                this.batch_sizes = None;
                this.batch_after_resume = None;
                if let Data::Stream(_) = data {
                    this.epoch_length.get_or_insert(3);
                    // A stream does not begin again, so an epoch cannot be ended early.
                    this.breaks.retain(|planted| planted.how != How::EndOfEpoch);
                }
                if let Budget::Samples(samples) = this.budget {
                    this.budget = Budget::Iterations(samples);
                }
            }
        }
        for planted in &mut this.breaks {
            if matches!(planted.how, How::Signal | How::Kill | How::Limit) {
                planted.then = Then::Resume;
                if !this.processes && planted.how != How::Limit {
                    planted.how = How::Panic;
                }
            }
        }
        if this.batch_sizes.is_some() {
            // The epoch is as long as the pass, whose length changes with the batch size.
            this.epoch_length = None;
        }
        if let Budget::Samples(_) = this.budget {
            // This budget counts the samples of one call of `run`, and breaks make several calls.
            let asks = |how| matches!(how, How::EndOfEpoch | How::End);
            this.breaks.retain(|planted| asks(planted.how));
            (this.first_budget, this.resumed_at_the_end) = (None, false);
        }
        if let Budget::Epochs(all) | Budget::Iterations(all) = this.budget {
            this.first_budget = this.first_budget.filter(|first| *first < all);
        }
        if this.batch_after_resume.is_some() {
            let whole = |at| matches!(at, At::IterationCompleted | At::EpochCompleted);
            // Samples that are left out at the end of a pass would come back with another batch size.
            let drops = matches!(this.data, Data::Loader { drop_last: true, .. });
            let fits = this.batch_sizes.is_none() && whole(this.checkpoint.at) && !drops;
            // A break in the middle of an iteration would be resumed with another batch.
            let breaks_fit = this.breaks.iter().all(|planted| match planted.place {
                Place::In(at) => whole(at) || !planted.writes_a_checkpoint(&this),
                _ => !planted.writes_a_checkpoint(&this),
            });
            if !fits || !breaks_fit {
                this.batch_after_resume = None;
            } else {
                this.epoch_length = None;
                this.batch_after_resume = this.batch_after_resume.map(|b| b.min(this.samples));
            }
        }
        if let Data::Restartable(_) = this.data
            && this.epoch_length.is_none()
            && !switches::END_OF_THE_FIRST_PASS
        {
            this.breaks.clear();
        }
        if this.on_exception && !switches::REQUESTS_BESIDE_AN_ERROR {
            this.early_stopping = None;
            let asks = |how| matches!(how, How::End | How::EndOfEpoch | How::Limit);
            this.breaks.retain(|planted| !asks(planted.how));
        }
        // File names contain the loss, which must be finite.
        this.best &= this.scaler.as_ref().is_none_or(|scaler| scaler.overflows.is_empty());
        // A run without a checkpoint starts anew and leaves the files of the lost one, whose losses were others.
        this.best &= this.batch_after_resume.is_none();
        let watches_validation = |watch: &mut Watch| {
            if this.evaluation.is_none() {
                *watch = Watch::MeanLoss;
            }
        };
        this.plateau.iter_mut().for_each(|plateau| watches_validation(&mut plateau.watch));
        this.early_stopping.iter_mut().for_each(|stop| watches_validation(&mut stop.watch));
        if let Some(evaluation) = &mut this.evaluation {
            evaluation.averages &= this.ema.is_some();
        }
        if this.evaluation.is_some_and(|evaluation| {
            matches!(evaluation.on.at, At::OptimizerStepped | At::WindowCompleted)
        }) {
            // Handlers of these events run within the step, so programs do not evaluate there.
            this.evaluation = None;
            return this.settled();
        }
        this
    }

    /// This program without the parts that steps which evaluate a batch several times refuse.
    fn of_closures(mut self) -> Self {
        let is_lbfgs = matches!(self.optimizer, Algorithm::Lbfgs { .. });
        if is_lbfgs {
            (self.sam, self.lr_of_biases, self.ranks) = (None, None, 1);
            (self.clip_value, self.clip_norm) = (None, None);
        }
        if let Algorithm::SparseAdam { .. } = self.optimizer {
            self.sam = None;
        }
        if is_lbfgs || self.sam.is_some() {
            (self.accumulate, self.scaler) = (1, None);
        }
        let evaluations = match self.optimizer {
            Algorithm::Lbfgs { max_iter, .. } => max_iter,
            _ if self.sam.is_some() => 2,
            _ => 1,
        };
        for planted in &mut self.breaks {
            if let Place::InTheLoss(number) = &mut planted.place {
                *number = (*number).min(evaluations);
            }
        }
        self
    }

    /// This program without the parts that several ranks do not do, or not at the same place.
    fn of_ranks(mut self) -> Self {
        if let Algorithm::SparseAdam { .. } = self.optimizer {
            (self.model, self.ranks) = (Model::Table, 1);
        }
        if self.ranks == 1 {
            return self;
        }
        self.processes = true;
        (self.noise, self.log, self.frozen, self.batch_sizes) = (false, None, None, None);
        (self.on_exception, self.batch_after_resume) = (false, None);
        if let Weights::ByTokens | Weights::ByTokensInATensor = self.weights {
            self.weights = Weights::BySamples;
        }
        if let Data::Batches(sizes) | Data::Restartable(sizes) | Data::Stream(sizes) = &self.data {
            self.data = Data::Loader { batch: sizes[0], shuffle: None, drop_last: false };
        }
        if let Data::Loader { batch, .. } = &mut self.data {
            *batch = (*batch).min(self.samples.div_ceil(self.ranks));
        }
        if let Budget::Samples(samples) = self.budget {
            self.budget = Budget::Iterations(samples);
        }
        // After an error, all ranks go on in new processes, because the failed rank has left the others.
        self.breaks.retain(|planted| !matches!(planted.how, How::EndOfEpoch | How::End));
        for planted in &mut self.breaks {
            if planted.how != How::Interrupt {
                planted.then = Then::Resume;
            }
        }
        // The ranks can evaluate only at these events, where all of them meet.
        if let Some(evaluation) = &mut self.evaluation
            && !matches!(evaluation.on.at, At::IterationCompleted | At::EpochCompleted)
        {
            evaluation.on.at = At::EpochCompleted;
        }
        self
    }
}

/// Names that printed programs use.
pub mod names {
    #![allow(unused_imports)]
    pub use super::{
        Algorithm::*, At::*, Break, Budget::*, Data::*, Driven::*, EarlyStop, Ema, Evaluation,
        Frozen, How::*, Model::*, Place::*, Plateau, Program, Scaler, Scheduled, Shape::*,
        Sharpness, Then::*, Watch::*, Weights::*, When,
    };
}

/// Behaviour of the engine that was wrong at some time. A switch that is `false` keeps the generator from making
/// programs that depend on it.
mod switches {
    /// A run that goes on at the end of the first pass of data of unknown length knows that length.
    pub const END_OF_THE_FIRST_PASS: bool = true;
    /// A handler's request, made before another handler of the same event failed, has the same effect for the engine
    /// that goes on and for one that resumes the checkpoint written after the error.
    pub const REQUESTS_BESIDE_AN_ERROR: bool = true;
}

/// The share of programs that run in processes of their own. It is small, because starting processes takes long.
const PROCESSES: f64 = 0.01;
/// The share of programs with two ranks.
const RANKS: f64 = if cfg!(feature = "distributed") { 0.005 } else { 0. };

/// Small decimals, so that printed programs are short.
fn decimal(values: &'static [f64]) -> impl Strategy<Value = f64> {
    prop::sample::select(values)
}

fn every() -> impl Strategy<Value = u64> {
    prop_oneof![4 => Just(1), 1 => Just(2), 1 => Just(3)]
}

fn when(events: &'static [At]) -> impl Strategy<Value = When> {
    let after = prop_oneof![4 => Just(0u64), 1 => 1u64..4];
    (prop::sample::select(events), every(), after).prop_map(|(at, every, after)| When {
        at,
        every,
        after,
    })
}

fn optional<T: Debug + Clone>(
    strategy: impl Strategy<Value = T>,
) -> impl Strategy<Value = Option<T>> {
    prop::option::weighted(0.35, strategy)
}

fn data() -> impl Strategy<Value = Data> {
    let sizes = || prop::collection::vec(1usize..4, 1..6);
    prop_oneof![
        3 => (1usize..5, prop::option::of(0u64..100), any::<bool>())
            .prop_map(|(batch, shuffle, drop_last)| Data::Loader { batch, shuffle, drop_last }),
        1 => sizes().prop_map(Data::Batches),
        1 => sizes().prop_map(Data::Restartable),
        1 => sizes().prop_map(Data::Stream),
    ]
}

fn algorithm() -> impl Strategy<Value = Algorithm> {
    let decay = || decimal(&[0., 0.01, 0.1]);
    let betas = || (decimal(&[0.9, 0.5, 0.]), decimal(&[0.999, 0.9]));
    let warmup = || prop_oneof![Just(0u32), 1u32..6];
    let libtorchs = prop_oneof![
        (decimal(&[0., 0.9, 0.5]), decimal(&[0., 0.3]), decay(), any::<bool>()).prop_map(
            |(momentum, dampening, weight_decay, nesterov)| Algorithm::Sgd {
                momentum,
                dampening,
                weight_decay,
                nesterov
            }
        ),
        (betas(), decay(), any::<bool>()).prop_map(|((beta1, beta2), weight_decay, amsgrad)| {
            Algorithm::Adam { beta1, beta2, weight_decay, amsgrad }
        }),
        (betas(), decay(), any::<bool>()).prop_map(|((beta1, beta2), weight_decay, amsgrad)| {
            Algorithm::AdamW { beta1, beta2, weight_decay, amsgrad }
        }),
        (decimal(&[0.99, 0.5]), decimal(&[0., 0.9]), decay(), any::<bool>()).prop_map(
            |(alpha, momentum, weight_decay, centered)| Algorithm::RmsProp {
                alpha,
                momentum,
                weight_decay,
                centered
            }
        ),
    ];
    let of_moments = prop_oneof![
        (betas(), decay(), any::<bool>()).prop_map(|((beta1, beta2), weight_decay, decoupled)| {
            Algorithm::NAdam { beta1, beta2, weight_decay, decoupled }
        }),
        (betas(), decay(), any::<bool>()).prop_map(|((beta1, beta2), weight_decay, decoupled)| {
            Algorithm::RAdam { beta1, beta2, weight_decay, decoupled }
        }),
        (betas(), decay()).prop_map(|((beta1, beta2), weight_decay)| Algorithm::Adamax {
            beta1,
            beta2,
            weight_decay
        }),
        (betas(), decay()).prop_map(|((beta1, beta2), weight_decay)| Algorithm::Lion {
            beta1,
            beta2,
            weight_decay
        }),
        (betas(), decay(), warmup()).prop_map(|((beta1, beta2), weight_decay, warmup)| {
            Algorithm::AdEMAMix { beta1, beta2, weight_decay, warmup }
        }),
    ];
    let others = prop_oneof![
        (decimal(&[0., 0.1]), decay(), decimal(&[0., 0.5])).prop_map(
            |(lr_decay, weight_decay, initial)| Algorithm::Adagrad {
                lr_decay,
                weight_decay,
                initial
            }
        ),
        (decimal(&[0.9, 0.5]), decay())
            .prop_map(|(rho, weight_decay)| Algorithm::Adadelta { rho, weight_decay }),
        (decimal(&[1e-4, 0.1]), decimal(&[2., 1e6]), decay())
            .prop_map(|(lambd, t0, weight_decay)| Algorithm::Asgd { lambd, t0, weight_decay }),
        Just(Algorithm::Rprop),
        (decimal(&[1., 1.5]), decay())
            .prop_map(|(d, weight_decay)| Algorithm::Adafactor { d, weight_decay }),
        (any::<bool>(), decay())
            .prop_map(|(nesterov, weight_decay)| Algorithm::Muon { nesterov, weight_decay }),
        betas().prop_map(|(beta1, beta2)| Algorithm::SparseAdam { beta1, beta2 }),
    ];
    let schedule_free = prop_oneof![
        (decimal(&[0.9, 0.5]), decay(), warmup(), decimal(&[0., 0.5])).prop_map(
            |(momentum, weight_decay, warmup, r)| Algorithm::SgdScheduleFree {
                momentum,
                weight_decay,
                warmup,
                r
            }
        ),
        (decimal(&[0.9, 0.5]), decimal(&[0.999, 0.9]), decay(), warmup()).prop_map(
            |(beta1, beta2, weight_decay, warmup)| Algorithm::AdamWScheduleFree {
                beta1,
                beta2,
                weight_decay,
                warmup
            }
        ),
    ];
    let lbfgs =
        (1u32..8, 1u32..4).prop_map(|(max_iter, history)| Algorithm::Lbfgs { max_iter, history });
    prop_oneof![4 => libtorchs, 3 => of_moments, 2 => others, 2 => schedule_free, 1 => lbfgs]
}

/// Events at which handlers act.
const EVENTS: &[At] = &[
    At::EpochCompleted,
    At::IterationCompleted,
    At::IterationStarted,
    At::EpochStarted,
    At::OptimizerStepped,
    At::WindowCompleted,
    At::GetBatchStarted,
    At::GetBatchCompleted,
    At::Started,
];
const AFTER_STEPS: &[At] =
    &[At::IterationCompleted, At::OptimizerStepped, At::WindowCompleted, At::EpochCompleted];
const OF_EVALUATIONS: &[At] =
    &[At::EpochCompleted, At::IterationCompleted, At::EpochStarted, At::IterationStarted];

fn scheduled() -> impl Strategy<Value = Scheduled> {
    let knob = prop_oneof![
        3 => Just(Driven::Lr),
        1 => (0usize..2).prop_map(Driven::LrOf),
        1 => Just(Driven::WeightDecay),
        1 => Just(Driven::Momentum),
        1 => Just(Driven::EmaMomentum),
        1 => Just(Driven::Rho),
    ];
    let value = || decimal(&[0.1, 0.05, 0.02, 0.01, 0.2]);
    let shape = prop_oneof![
        (decimal(&[0., 0.1, 0.3]), 1i64..6, value(), 1i64..8, value()).prop_map(
            |(from, up, peak, down, to)| Shape::Lines(vec![(0, from), (up, peak), (up + down, to)])
        ),
        (value(), 1u64..4, decimal(&[0.5, 0.9])).prop_map(|(base, size, gamma)| Shape::Steps {
            base,
            size,
            gamma
        }),
    ];
    (knob, when(EVENTS), shape).prop_map(|(knob, mut on, mut shape)| {
        if knob == Driven::EmaMomentum {
            shape.begin_above_zero();
        }
        if on.at == At::Started {
            on.after = 0;
        }
        Scheduled { knob, on, shape }
    })
}

fn breaks() -> impl Strategy<Value = Break> {
    let place = prop_oneof![
        6 => prop::sample::select(&[
            At::IterationCompleted,
            At::EpochCompleted,
            At::IterationStarted,
            At::EpochStarted,
            At::GetBatchStarted,
            At::GetBatchCompleted,
            At::OptimizerStepped,
            At::Started,
            At::DataloaderStopIteration,
        ][..]).prop_map(Place::In),
        1 => Just(Place::Fetch),
        1 => Just(Place::Refetch),
        1 => prop_oneof![2 => Just(1u32), 1 => 2u32..5].prop_map(Place::InTheLoss),
        1 => Just(Place::InTheEvaluation),
    ];
    let how = prop_oneof![
        4 => Just(How::Interrupt),
        2 => Just(How::Error),
        2 => Just(How::Panic),
        1 => Just(How::EndOfEpoch),
        1 => Just(How::End),
        1 => Just(How::Limit),
        2 => Just(How::Signal),
        1 => Just(How::Kill),
    ];
    let then = prop_oneof![Just(Then::Again), Just(Then::Resume)];
    (place, 1u64..12, how, then).prop_map(|(place, number, how, then)| {
        let number = match place {
            Place::In(At::Started) => 0,
            Place::In(at) if at.is_of_epochs() => number.div_ceil(3),
            _ => number,
        };
        let asks_the_engine =
            matches!(how, How::Interrupt | How::EndOfEpoch | How::End | How::Limit);
        let how = match place {
            Place::InTheLoss(_) if asks_the_engine || how == How::Error => How::Panic,
            Place::Fetch | Place::Refetch | Place::InTheEvaluation if asks_the_engine => How::Error,
            // Ending the epoch is refused where no epoch is under way, and has no effect where it ends anyway.
            Place::In(At::Started | At::EpochStarted | At::EpochCompleted)
                if how == How::EndOfEpoch =>
            {
                How::Error
            }
            _ => how,
        };
        let then = if how == How::Limit { Then::Resume } else { then };
        Break { place, number, how, then }
    })
}

/// Generates all kinds of programs.
pub fn programs() -> impl Strategy<Value = Program> {
    let world = (
        0u64..1000,
        prop_oneof![Just(Model::Linear), Just(Model::TwoLayers), Just(Model::Tied)],
        3usize..10,
        data(),
        prop::option::weighted(
            0.1,
            (1i64..4, 1i64..4, 1i64..5).prop_map(|(from, length, to)| {
                Shape::Lines(vec![(0, from as f64), (length, to as f64)])
            }),
        ),
        prop::bool::weighted(0.3),
        prop_oneof![
            3 => (1u64..5).prop_map(Budget::Epochs),
            2 => (1u64..15).prop_map(Budget::Iterations),
            1 => (1u64..40).prop_map(Budget::Samples),
        ],
        (optional(1u64..6), optional(1u64..8)),
    );
    let updates = (
        algorithm(),
        decimal(&[0.1, 0.02, 0.05]),
        optional(decimal(&[0.05, 0.2])),
        (
            prop_oneof![2 => Just(1u64), 1 => 2u64..5],
            prop::sample::select(
                &[
                    Weights::BySamples,
                    Weights::BySamples,
                    Weights::Equally,
                    Weights::ByTokens,
                    Weights::ByTokensInATensor,
                ][..],
            ),
        ),
        optional(
            (decimal(&[8., 1024., 65536.]), 1u32..5, prop::collection::vec(1u64..12, 0..3))
                .prop_map(|(scale, interval, overflows)| Scaler { scale, interval, overflows }),
        ),
        optional(decimal(&[0.5, 0.1, 2.])),
        optional(decimal(&[0.5, 1.5, 0.1])),
        prop::option::weighted(
            0.15,
            (decimal(&[0.05, 0.5, 0.]), any::<bool>())
                .prop_map(|(rho, adaptive)| Sharpness { rho, adaptive }),
        ),
    );
    let watch = || prop_oneof![Just(Watch::MeanLoss), Just(Watch::Validation)];
    let handlers = (
        prop::collection::vec(scheduled(), 0..4),
        optional((watch(), decimal(&[0.5, 0.1]), 0u64..3, 0u64..2).prop_map(
            |(watch, factor, patience, cooldown)| Plateau { watch, factor, patience, cooldown },
        )),
        optional(
            (
                decimal(&[0.1, 0.5]),
                optional((decimal(&[0.5, 1.]), 1u64..6)),
                optional(when(AFTER_STEPS)),
            )
                .prop_map(|(momentum, warmup, on)| Ema { momentum, warmup, on }),
        ),
        optional(when(AFTER_STEPS)),
        optional((any::<bool>(), 1u64..6, 1u64..8).prop_map(|(biases, from, length)| Frozen {
            biases,
            from,
            until: from + length,
        })),
        optional(
            (when(OF_EVALUATIONS), any::<bool>())
                .prop_map(|(on, averages)| Evaluation { on, averages }),
        ),
        optional((watch(), 1u64..4).prop_map(|(watch, patience)| EarlyStop { watch, patience })),
        optional(when(&[At::IterationCompleted, At::EpochCompleted])),
        when(&[
            At::EpochCompleted,
            At::IterationCompleted,
            At::IterationStarted,
            At::EpochStarted,
            At::GetBatchStarted,
            At::GetBatchCompleted,
        ]),
        (
            (any::<bool>(), any::<bool>(), prop::bool::weighted(0.2), prop::bool::weighted(0.2)),
            prop::option::weighted(0.1, 1usize..5),
            prop::bool::weighted(PROCESSES),
            prop::bool::weighted(RANKS),
        ),
        prop_oneof![
            1 => Just(vec![]),
            2 => prop::collection::vec(breaks(), 1..4),
        ],
    );
    (world, updates, handlers).prop_map(|(world, updates, handlers)| {
        let (seed, model, samples, data, batch_sizes, noise, budget, lengths) = world;
        let (epoch_length, first_budget) = lengths;
        let (optimizer, lr, lr_of_biases, windows, scaler, clip_value, clip_norm, sam) = updates;
        let (accumulate, weights) = windows;
        // L-BFGS takes its steps whole.
        let lr = if matches!(optimizer, Algorithm::Lbfgs { .. }) { lr * 10. } else { lr };
        let (
            schedules,
            plateau,
            ema,
            swa,
            frozen,
            evaluation,
            early_stopping,
            log,
            checkpoint,
            (files, batch_after_resume, processes, two_ranks),
            breaks,
        ) = handlers;
        let (background, on_exception, best, resumed_at_the_end) = files;
        Program {
            seed,
            model,
            samples,
            data,
            batch_sizes,
            noise,
            budget,
            first_budget,
            epoch_length,
            optimizer,
            lr,
            lr_of_biases,
            accumulate,
            weights,
            scaler,
            sam,
            clip_value,
            clip_norm,
            schedules,
            plateau,
            ema,
            swa,
            frozen,
            evaluation,
            early_stopping,
            log,
            checkpoint,
            background,
            on_exception,
            best,
            batch_after_resume,
            resumed_at_the_end,
            processes,
            ranks: if two_ranks { 2 } else { 1 },
            breaks,
        }
        .settled()
    })
}
