use super::hyper::Hyper;
use super::{LowPrecision, OptimizerBuilder};
use crate::bridge::Algorithm;

/// The hyper-parameters of one group that differ from the optimizer's.
///
/// ```
/// use tch_ignite::optim::lr;
/// let options = lr(1e-3).weight_decay(1e-2).betas(0.9, 0.98);
/// # let _ = options;
/// ```
#[derive(Debug, Clone, Default)]
pub struct GroupOptions {
    /// The algorithm of the group, where it is not that of the optimizer.
    pub(super) algorithm: Option<Algorithm>,
    pub(super) values: Vec<(Hyper, f64)>,
    /// How the group stores parameters in f16 and bf16, where it does so unlike the others.
    pub(super) low_precision: Option<Option<LowPrecision>>,
}

/// Group options that set the learning rate: the start of a chain.
pub fn lr(value: f64) -> GroupOptions {
    GroupOptions::new().lr(value)
}

impl GroupOptions {
    /// Options that change nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    pub(super) fn of(algorithm: Algorithm) -> Self {
        Self { algorithm: Some(algorithm), ..Self::default() }
    }

    /// Options of a group that AdamW steps, in an optimizer of another algorithm, such as [`Muon`](super::Muon): PyTorch's
    /// defaults, also for the learning rate, but for what is set. See [`OptimizerBuilder::group`].
    pub fn adamw() -> Self {
        Self::of(Algorithm::AdamW)
    }

    /// Learning rate, not negative.
    pub fn lr(self, value: f64) -> Self {
        self.with(Hyper::Lr, value)
    }

    /// How the group's parameters in f16 and bf16 are stored: see [`LowPrecision`]; `None` for the parameters alone, rounded
    /// to the nearest. Other types are not concerned.
    pub fn low_precision(mut self, storage: impl Into<Option<LowPrecision>>) -> Self {
        self.low_precision = Some(storage.into());
        self
    }

    pub(super) fn with(mut self, hyper: Hyper, value: f64) -> Self {
        self.values.push((hyper, value));
        self
    }
}

/// Makes a method of [`GroupOptions`] for each option, and one of [`OptimizerBuilder`] that sets it for all groups that do
/// not set their own.
macro_rules! options {
    ($($(#[$doc:meta])* $name:ident($($argument:ident: $type:ty),*) => $($hyper:ident: $value:expr),*;)*) => {
        impl GroupOptions {
            $($(#[$doc])* pub fn $name(self, $($argument: $type),*) -> Self {
                self$(.with(Hyper::$hyper, $value))*
            })*
        }

        /// Options of all groups that do not set their own, and have no algorithm of their own.
        impl<T> OptimizerBuilder<'_, T> {
            $($(#[$doc])* pub fn $name(mut self, $($argument: $type),*) -> Self {
                $(self.options.values.push((Hyper::$hyper, $value));)*
                self
            })*
        }
    };
}

options! {
    /// Momentum (SGD, RMSprop, Muon), not negative.
    momentum(value: f64) => Momentum: value;

    /// Dampening of the momentum (SGD).
    dampening(value: f64) => Dampening: value;

    /// Weight decay, not negative.
    weight_decay(value: f64) => WeightDecay: value;

    /// Whether the momentum is Nesterov's (SGD, Muon).
    nesterov(on: bool) => Nesterov: f64::from(on);

    /// Both decay rates of the moments (Adam and its kin, Lion), in [0, 1).
    betas(beta1: f64, beta2: f64) => Beta1: beta1, Beta2: beta2;

    /// Term added to the denominator, not negative.
    eps(value: f64) => Eps: value;

    /// Whether Adam or AdamW is the AMSGrad variant.
    amsgrad(on: bool) => Amsgrad: f64::from(on);

    /// Smoothing constant (RMSprop), or the power by which the step size falls (ASGD), not negative.
    alpha(value: f64) => Alpha: value;

    /// Whether RMSprop is the centered variant.
    centered(on: bool) => Centered: f64::from(on);

    /// Whether steps go up the gradient, to maximize, not down.
    maximize(on: bool) => Maximize: f64::from(on);

    /// Decay of the learning rate with the number of steps (Adagrad), not negative.
    lr_decay(value: f64) => LrDecay: value;

    /// The first value of the sums of squares (Adagrad), not negative. Counts for parameters without state.
    initial_accumulator_value(value: f64) => InitialAccumulatorValue: value;

    /// Decay of the momentum with the number of steps (NAdam), not negative.
    momentum_decay(value: f64) => MomentumDecay: value;

    /// Whether weight decay shrinks the parameter, as in AdamW, and is not added to the gradient (NAdam, RAdam).
    decoupled_weight_decay(on: bool) => DecoupledWeightDecay: f64::from(on);

    /// Decay rate of both averages of squares (Adadelta), in [0, 1].
    rho(value: f64) => Rho: value;

    /// Decay of the parameters in each step (ASGD).
    lambd(value: f64) => Lambd: value;

    /// The number of the step after which averaging begins (ASGD).
    t0(value: f64) => T0: value;

    /// Factors of a step size when the gradient changed its sign, between 0 and 1, and when it did not, above 1
    /// (Rprop).
    etas(minus: f64, plus: f64) => EtaMinus: minus, EtaPlus: plus;

    /// The smallest and the largest step size (Rprop), not negative.
    step_sizes(min: f64, max: f64) => StepSizeMin: min, StepSizeMax: max;

    /// The power of the step count by which the decay of the variances approaches 1 (Adafactor), not positive.
    beta2_decay(value: f64) => Beta2Decay: value;

    /// The smallest root of a variance (Adafactor), not negative. 0 stands for the precision of the parameter's type
    /// (torch's `None`).
    eps1(value: f64) => Eps1: value;

    /// The smallest size of a parameter that steps are relative to (Adafactor), not negative.
    eps2(value: f64) => Eps2: value;

    /// The root mean square to which updates are clipped (Adafactor), at least 1.
    d(value: f64) => D: value;

    /// Coefficients of the polynomial of the Newton-Schulz iteration (Muon).
    ns_coefficients(a: f64, b: f64, c: f64) => NsA: a, NsB: b, NsC: c;

    /// The number of Newton-Schulz iterations (Muon), below 100.
    ns_steps(count: u32) => NsSteps: f64::from(count);

    /// Whether updates of matrices have the root mean square of AdamW's (`adjust_lr_fn="match_rms_adamw"` of torch's
    /// Muon), so that AdamW's learning rate and weight decay fit.
    match_rms_adamw(on: bool) => MatchRmsAdamW: f64::from(on);

    /// The number of steps in which the learning rate rises in a straight line (Schedule-Free).
    warmup_steps(steps: u32) => WarmupSteps: f64::from(steps);

    /// The power of the step count by which steps weigh in the average (Schedule-Free).
    r(power: f64) => R: power;

    /// The power of the largest learning rate so far by which steps weigh in the average (Schedule-Free).
    weight_lr_power(power: f64) => WeightLrPower: power;

    /// The decay rate of the slow average (AdEMAMix), in [0, 1).
    beta3(value: f64) => Beta3: value;

    /// The number of steps in which the half-life of the slow average rises (AdEMAMix); 0 for none.
    beta3_warmup(steps: u32) => Beta3Warmup: f64::from(steps);

    /// The number of steps in which the weight of the slow average rises (AdEMAMix); 0 for none.
    alpha_warmup(steps: u32) => AlphaWarmup: f64::from(steps);

    /// The most iterations in a step (LBFGS), at least 1.
    max_iter(count: u32) => MaxIter: f64::from(count);

    /// The most evaluations of the loss in a step (LBFGS); 0 stands for 5/4 of the iterations.
    max_eval(count: u32) => MaxEval: f64::from(count);

    /// A step ends where no element of the gradient is larger (LBFGS), not negative.
    tolerance_grad(value: f64) => ToleranceGrad: value;

    /// A step ends where loss or parameters change less (LBFGS), not negative.
    tolerance_change(value: f64) => ToleranceChange: value;

    /// The number of iterations that are remembered (LBFGS), at least 1.
    history_size(count: u32) => HistorySize: f64::from(count);

    /// Whether the length of each iteration is searched for (LBFGS; torch's `line_search_fn="strong_wolfe"`).
    strong_wolfe(on: bool) => StrongWolfe: f64::from(on);
}
