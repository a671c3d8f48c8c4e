use tch::nn::{self, OptimizerConfig, VarStore};

use super::grouping::{GroupRule, Grouping, unnamed};
use super::hyper::Hyper;
use super::{Group, Optimizer};
use crate::bridge::Algorithm;
use crate::error::{Error, Result};

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
    algorithm: Option<Algorithm>,
    values: Vec<(Hyper, f64)>,
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
        Self { algorithm: Some(algorithm), values: vec![] }
    }

    /// Options of a group that AdamW steps, in an optimizer of another algorithm, such as [`Muon`](super::Muon): PyTorch's
    /// defaults, also for the learning rate, but for what is set. See [`OptimizerBuilder::group`].
    pub fn adamw() -> Self {
        Self::of(Algorithm::AdamW)
    }

    fn with(mut self, hyper: Hyper, value: f64) -> Self {
        self.values.push((hyper, value));
        self
    }

    /// Learning rate, not negative.
    pub fn lr(self, value: f64) -> Self {
        self.with(Hyper::Lr, value)
    }

    /// Momentum (SGD, RMSprop, Muon), not negative.
    pub fn momentum(self, value: f64) -> Self {
        self.with(Hyper::Momentum, value)
    }

    /// Dampening of the momentum (SGD).
    pub fn dampening(self, value: f64) -> Self {
        self.with(Hyper::Dampening, value)
    }

    /// Weight decay, not negative.
    pub fn weight_decay(self, value: f64) -> Self {
        self.with(Hyper::WeightDecay, value)
    }

    /// Whether the momentum is Nesterov's (SGD, Muon).
    pub fn nesterov(self, on: bool) -> Self {
        self.with(Hyper::Nesterov, f64::from(on))
    }

    /// Both decay rates of the moments (Adam and its kin, Lion), in [0, 1).
    pub fn betas(self, beta1: f64, beta2: f64) -> Self {
        self.with(Hyper::Beta1, beta1).with(Hyper::Beta2, beta2)
    }

    /// Term added to the denominator, not negative.
    pub fn eps(self, value: f64) -> Self {
        self.with(Hyper::Eps, value)
    }

    /// Whether Adam or AdamW is the AMSGrad variant.
    pub fn amsgrad(self, on: bool) -> Self {
        self.with(Hyper::Amsgrad, f64::from(on))
    }

    /// Smoothing constant (RMSprop), the power by which the step size falls (ASGD), or the weight of the slow average
    /// (AdEMAMix), not negative.
    pub fn alpha(self, value: f64) -> Self {
        self.with(Hyper::Alpha, value)
    }

    /// Whether RMSprop is the centered variant.
    pub fn centered(self, on: bool) -> Self {
        self.with(Hyper::Centered, f64::from(on))
    }

    /// Whether steps go up the gradient, to maximize, not down.
    pub fn maximize(self, on: bool) -> Self {
        self.with(Hyper::Maximize, f64::from(on))
    }

    /// Decay of the learning rate with the number of steps (Adagrad), not negative.
    pub fn lr_decay(self, value: f64) -> Self {
        self.with(Hyper::LrDecay, value)
    }

    /// The first value of the sums of squares (Adagrad), not negative. Counts for parameters without state.
    pub fn initial_accumulator_value(self, value: f64) -> Self {
        self.with(Hyper::InitialAccumulatorValue, value)
    }

    /// Decay of the momentum with the number of steps (NAdam), not negative.
    pub fn momentum_decay(self, value: f64) -> Self {
        self.with(Hyper::MomentumDecay, value)
    }

    /// Whether weight decay shrinks the parameter, as in AdamW, and is not added to the gradient (NAdam, RAdam).
    pub fn decoupled_weight_decay(self, on: bool) -> Self {
        self.with(Hyper::DecoupledWeightDecay, f64::from(on))
    }

    /// Decay rate of both averages of squares (Adadelta), in [0, 1].
    pub fn rho(self, value: f64) -> Self {
        self.with(Hyper::Rho, value)
    }

    /// Decay of the parameters in each step (ASGD).
    pub fn lambd(self, value: f64) -> Self {
        self.with(Hyper::Lambd, value)
    }

    /// The number of the step after which averaging begins (ASGD).
    pub fn t0(self, value: f64) -> Self {
        self.with(Hyper::T0, value)
    }

    /// Factors of a step size when the gradient changed its sign, between 0 and 1, and when it did not, above 1
    /// (Rprop).
    pub fn etas(self, minus: f64, plus: f64) -> Self {
        self.with(Hyper::EtaMinus, minus).with(Hyper::EtaPlus, plus)
    }

    /// The smallest and the largest step size (Rprop), not negative.
    pub fn step_sizes(self, min: f64, max: f64) -> Self {
        self.with(Hyper::StepSizeMin, min).with(Hyper::StepSizeMax, max)
    }

    /// The power of the step count by which the decay of the variances approaches 1 (Adafactor), not positive.
    pub fn beta2_decay(self, value: f64) -> Self {
        self.with(Hyper::Beta2Decay, value)
    }

    /// The smallest root of a variance (Adafactor), not negative. 0 stands for the precision of the parameter's type
    /// (torch's `None`).
    pub fn eps1(self, value: f64) -> Self {
        self.with(Hyper::Eps1, value)
    }

    /// The smallest size of a parameter that steps are relative to (Adafactor), not negative.
    pub fn eps2(self, value: f64) -> Self {
        self.with(Hyper::Eps2, value)
    }

    /// The root mean square to which updates are clipped (Adafactor), at least 1.
    pub fn d(self, value: f64) -> Self {
        self.with(Hyper::D, value)
    }

    /// Coefficients of the polynomial of the Newton-Schulz iteration (Muon).
    pub fn ns_coefficients(self, a: f64, b: f64, c: f64) -> Self {
        self.with(Hyper::NsA, a).with(Hyper::NsB, b).with(Hyper::NsC, c)
    }

    /// The number of Newton-Schulz iterations (Muon), below 100.
    pub fn ns_steps(self, count: u32) -> Self {
        self.with(Hyper::NsSteps, f64::from(count))
    }

    /// Whether updates of matrices have the root mean square of AdamW's (`adjust_lr_fn="match_rms_adamw"` of torch's
    /// Muon), so that AdamW's learning rate and weight decay fit.
    pub fn match_rms_adamw(self, on: bool) -> Self {
        self.with(Hyper::MatchRmsAdamW, f64::from(on))
    }

    /// The number of steps in which the learning rate rises in a straight line (Schedule-Free).
    pub fn warmup_steps(self, steps: u32) -> Self {
        self.with(Hyper::WarmupSteps, f64::from(steps))
    }

    /// The power of the step count by which steps weigh in the average (Schedule-Free).
    pub fn r(self, power: f64) -> Self {
        self.with(Hyper::R, power)
    }

    /// The power of the largest learning rate so far by which steps weigh in the average (Schedule-Free).
    pub fn weight_lr_power(self, power: f64) -> Self {
        self.with(Hyper::WeightLrPower, power)
    }

    /// The decay rate of the slow average (AdEMAMix), in [0, 1).
    pub fn beta3(self, value: f64) -> Self {
        self.with(Hyper::Beta3, value)
    }

    /// The number of steps in which the half-life of the slow average rises (AdEMAMix); 0 for none.
    pub fn beta3_warmup(self, steps: u32) -> Self {
        self.with(Hyper::Beta3Warmup, f64::from(steps))
    }

    /// The number of steps in which the weight of the slow average rises (AdEMAMix); 0 for none.
    pub fn alpha_warmup(self, steps: u32) -> Self {
        self.with(Hyper::AlphaWarmup, f64::from(steps))
    }

    /// The most iterations in a step (LBFGS), at least 1.
    pub fn max_iter(self, count: u32) -> Self {
        self.with(Hyper::MaxIter, f64::from(count))
    }

    /// The most evaluations of the loss in a step (LBFGS); 0 stands for 5/4 of the iterations.
    pub fn max_eval(self, count: u32) -> Self {
        self.with(Hyper::MaxEval, f64::from(count))
    }

    /// A step ends where no element of the gradient is larger (LBFGS), not negative.
    pub fn tolerance_grad(self, value: f64) -> Self {
        self.with(Hyper::ToleranceGrad, value)
    }

    /// A step ends where loss or parameters change less (LBFGS), not negative.
    pub fn tolerance_change(self, value: f64) -> Self {
        self.with(Hyper::ToleranceChange, value)
    }

    /// The number of iterations that are remembered (LBFGS), at least 1.
    pub fn history_size(self, count: u32) -> Self {
        self.with(Hyper::HistorySize, f64::from(count))
    }

    /// Whether the length of each iteration is searched for (LBFGS; torch's `line_search_fn="strong_wolfe"`).
    pub fn strong_wolfe(self, on: bool) -> Self {
        self.with(Hyper::StrongWolfe, f64::from(on))
    }
}

/// Builds an [`Optimizer`]; made by [`Optimizer::builder`].
#[must_use = "the optimizer is made by `build`"]
pub struct OptimizerBuilder<'v, T> {
    config: T,
    vs: &'v VarStore,
    lr: f64,
    options: GroupOptions,
    groups: Vec<(GroupRule, GroupOptions)>,
    names: Vec<(usize, String)>,
}

crate::debug::opaque_debug!(OptimizerBuilder<'v, T>);

impl<'v, T: OptimizerConfig> OptimizerBuilder<'v, T> {
    pub(super) fn new(config: T, vs: &'v VarStore) -> Self {
        Self { config, vs, lr: 1e-3, options: GroupOptions::new(), groups: vec![], names: vec![] }
    }

    /// The learning rate of groups that do not set their own: 1e-3 unless given, as in PyTorch. Groups with an algorithm
    /// of their own have that one's.
    pub fn lr(mut self, lr: f64) -> Self {
        self.lr = lr;
        self
    }

    /// Sets hyper-parameters of all groups that do not set their own, and have no algorithm of their own.
    ///
    /// ```
    /// use tch::{Device, nn};
    /// use tch_ignite::optim::{GroupOptions, Optimizer};
    ///
    /// let vs = nn::VarStore::new(Device::Cpu);
    /// nn::linear(vs.root() / "fc", 4, 2, Default::default());
    /// let options = GroupOptions::new().betas(0.95, 0.98).weight_decay(0.1);
    /// let optimizer = Optimizer::lion(&vs).lr(3e-5).options(options).build()?;
    /// assert_eq!(optimizer.group_at(0)?.betas()?, (0.95, 0.98));
    /// # Ok::<(), tch_ignite::Error>(())
    /// ```
    pub fn options(mut self, options: GroupOptions) -> Self {
        self.options = options;
        self
    }

    /// Adds a parameter group: all variables for whose name (`"conv1.weight"`) `contains` returns true.
    ///
    /// A group may be stepped by another algorithm than the others: its options begin with that one's name. tch's own
    /// four optimizers (`Optimizer::adamw` and so on) cannot have such groups: begin with one of the others.
    ///
    /// ```
    /// use tch::{Device, nn};
    /// use tch_ignite::optim::{GroupOptions, Optimizer, is_matrix};
    ///
    /// let vs = nn::VarStore::new(Device::Cpu);
    /// let root = vs.root();
    /// nn::embedding(&root / "embedding", 50, 8, Default::default());
    /// nn::linear(&root / "hidden", 8, 8, Default::default());
    /// let (matrix, other) = (is_matrix(&vs), is_matrix(&vs));
    /// let optimizer = Optimizer::muon(&vs)
    ///     .lr(0.02)
    ///     .group("hidden", move |name| matrix(name) && !name.starts_with("embedding"), GroupOptions::new())
    ///     .group(
    ///         "others",
    ///         move |name| !other(name) || name.starts_with("embedding"),
    ///         GroupOptions::adamw().lr(3e-4).weight_decay(0.),
    ///     )
    ///     .build()?;
    /// assert_eq!(optimizer.group("hidden")?.parameters()?, ["hidden.weight"]);
    /// assert_eq!(optimizer.group("others")?.algorithm(), "AdamW");
    /// # Ok::<(), tch_ignite::Error>(())
    /// ```
    ///
    /// Variables that are added to the store after [`build`](Self::build) are put into groups by the same rules. The
    /// numbers of tch's `Path::set_group` are ignored, and stay as they are. A parameter with several names is in the
    /// group that contains one of them.
    pub fn group(
        mut self,
        name: impl Into<String>,
        contains: impl Fn(&str) -> bool + Send + Sync + 'static,
        options: GroupOptions,
    ) -> Self {
        let rule = GroupRule { name: name.into(), contains: Box::new(contains) };
        self.groups.push((rule, options));
        self
    }

    /// Gives a name to a group made with tch's `Path::set_group`, instead of `"group_<number>"`.
    /// Cannot be mixed with [`group`](Self::group).
    pub fn name_group(mut self, number: usize, name: impl Into<String>) -> Self {
        self.names.push((number, name.into()));
        self
    }

    /// Builds tch's own optimizer and sets the groups' options in it.
    ///
    /// # Errors
    /// A variable in no group or in two (by one name or by two), a group without variables, two groups with the same
    /// name, a name for a number that no group has, [`group`](Self::group) together with
    /// [`name_group`](Self::name_group), an option that the optimizer does not have, or a value outside its bounds.
    pub fn build(self) -> Result<Optimizer> {
        Hyper::Lr.check(self.lr)?;
        if !self.groups.is_empty() && !self.names.is_empty() {
            return Err(Error::invalid(
                "use either `group` (by name) or `name_group` (tch's numbers), not both",
            ));
        }
        let (rules, options): (Vec<_>, Vec<_>) = self.groups.into_iter().unzip();
        let grouping = match rules.is_empty() {
            true => Grouping::Numbers(named_numbers(self.names)?),
            false => Grouping::Rules(named_once(rules)?),
        };
        if self.options.algorithm.is_some() {
            return Err(Error::invalid(
                "`options` cannot name an algorithm: begin with that one (`Optimizer::muon(&vs)`)",
            ));
        }
        let algorithms: Vec<_> = options.iter().map(|options| options.algorithm).collect();
        let optimizer = Optimizer::assemble(&self.config, self.vs, self.lr, grouping, &algorithms)?;
        for &(hyper, value) in &self.options.values {
            optimizer.set_everywhere(hyper.name(), value)?;
        }
        for (index, options) in options.iter().enumerate() {
            let group = optimizer.group_at(index)?;
            for &(hyper, value) in &options.values {
                group.set(hyper.name(), value)?;
            }
        }
        optimizer.groups()?.iter().try_for_each(check_nesterov)?;
        optimizer.note_as_built()?;
        Ok(optimizer)
    }
}

/// Refuses Nesterov momentum without momentum, or with dampening, as the constructor of PyTorch's SGD does.
fn check_nesterov(group: &Group) -> Result<()> {
    // Muon has Nesterov momentum without dampening, and allows any.
    let Ok(dampening) = group.get("dampening") else { return Ok(()) };
    let momentum = group.get("momentum")?;
    if group.nesterov()? && (momentum <= 0. || dampening != 0.) {
        return Err(Error::invalid(format!(
            "Nesterov momentum requires a momentum above 0 and no dampening, but group '{}' has momentum {momentum} and dampening {dampening}",
            group.name()
        )));
    }
    Ok(())
}

fn named_once(rules: Vec<GroupRule>) -> Result<Vec<GroupRule>> {
    for (index, rule) in rules.iter().enumerate() {
        if rules[..index].iter().any(|other| other.name == rule.name) {
            return Err(two_groups(&rule.name));
        }
    }
    Ok(rules)
}

fn named_numbers(names: Vec<(usize, String)>) -> Result<Vec<(usize, String)>> {
    for (index, (number, name)) in names.iter().enumerate() {
        for (other, other_name) in &names[..index] {
            if other == number {
                return Err(Error::invalid(format!(
                    "group {number} is named twice: '{other_name}' and '{name}'"
                )));
            }
            if other_name == name {
                return Err(two_groups(name));
            }
        }
        // The name may be the default name of another group.
        let number_in_name = name.strip_prefix("group_").and_then(|n| n.parse::<usize>().ok());
        if number_in_name.is_some_and(|other| other != *number && unnamed(other) == *name) {
            return Err(two_groups(name));
        }
    }
    Ok(names)
}

fn two_groups(name: &str) -> Error {
    Error::invalid(format!("two parameter groups are named '{name}'"))
}

/// Builders for the optimizers that tch has, with PyTorch's defaults.
impl Optimizer {
    /// A builder around any of tch's optimizer settings.
    ///
    /// ```
    /// use tch::{Device, nn};
    /// use tch_ignite::optim::{Optimizer, lr};
    ///
    /// let vs = nn::VarStore::new(Device::Cpu);
    /// let root = vs.root();
    /// nn::linear(&root / "conv", 4, 4, Default::default());
    /// nn::linear(&root / "fc", 4, 2, Default::default());
    /// let optimizer = Optimizer::builder(nn::sgd(0.9, 0., 5e-4, false), &vs)
    ///     .group("base", |name| name.starts_with("conv"), lr(1e-3))
    ///     .group("fc", |name| name.starts_with("fc"), lr(1e-2).momentum(0.8))
    ///     .build()?;
    /// assert_eq!(optimizer.group("fc")?.lr()?, 1e-2);
    /// assert_eq!(optimizer.group("base")?.momentum()?, 0.9);
    /// # Ok::<(), tch_ignite::Error>(())
    /// ```
    pub fn builder<T: OptimizerConfig>(config: T, vs: &VarStore) -> OptimizerBuilder<'_, T> {
        OptimizerBuilder::new(config, vs)
    }

    /// Stochastic gradient descent without momentum; for more see [`builder`](Self::builder).
    pub fn sgd(vs: &VarStore) -> OptimizerBuilder<'_, nn::Sgd> {
        Self::builder(nn::Sgd::default(), vs)
    }

    /// Adam with betas (0.9, 0.999), eps 1e-8.
    pub fn adam(vs: &VarStore) -> OptimizerBuilder<'_, nn::Adam> {
        Self::builder(nn::Adam::default(), vs)
    }

    /// AdamW with betas (0.9, 0.999), eps 1e-8, weight decay 0.01.
    pub fn adamw(vs: &VarStore) -> OptimizerBuilder<'_, nn::AdamW> {
        Self::builder(nn::AdamW::default(), vs)
    }

    /// RMSprop with alpha 0.99, eps 1e-8; learning rate 1e-2 unless given.
    pub fn rms_prop(vs: &VarStore) -> OptimizerBuilder<'_, nn::RmsProp> {
        Self::builder(nn::RmsProp::default(), vs).lr(1e-2)
    }
}
