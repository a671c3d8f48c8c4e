use tch::nn::{self, OptimizerConfig, VarStore};

use super::Optimizer;
use super::grouping::{GroupRule, Grouping, unnamed};
use super::hyper::Hyper;
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

    fn with(mut self, hyper: Hyper, value: f64) -> Self {
        self.values.push((hyper, value));
        self
    }

    /// Learning rate, not negative.
    pub fn lr(self, value: f64) -> Self {
        self.with(Hyper::Lr, value)
    }

    /// Momentum (SGD, RMSprop), not negative.
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

    /// Whether SGD uses Nesterov momentum.
    pub fn nesterov(self, on: bool) -> Self {
        self.with(Hyper::Nesterov, f64::from(on))
    }

    /// Both decay rates of the moments (Adam, AdamW), in [0, 1).
    pub fn betas(self, beta1: f64, beta2: f64) -> Self {
        self.with(Hyper::Beta1, beta1).with(Hyper::Beta2, beta2)
    }

    /// Term added to the denominator (Adam, AdamW, RMSprop), not negative.
    pub fn eps(self, value: f64) -> Self {
        self.with(Hyper::Eps, value)
    }

    /// Whether Adam or AdamW is the AMSGrad variant.
    pub fn amsgrad(self, on: bool) -> Self {
        self.with(Hyper::Amsgrad, f64::from(on))
    }

    /// Smoothing constant (RMSprop), not negative.
    pub fn alpha(self, value: f64) -> Self {
        self.with(Hyper::Alpha, value)
    }

    /// Whether RMSprop is the centered variant.
    pub fn centered(self, on: bool) -> Self {
        self.with(Hyper::Centered, f64::from(on))
    }
}

/// Builds an [`Optimizer`]; made by [`Optimizer::builder`].
#[must_use = "the optimizer is made by `build`"]
pub struct OptimizerBuilder<'v, T> {
    config: T,
    vs: &'v VarStore,
    lr: f64,
    groups: Vec<(GroupRule, GroupOptions)>,
    names: Vec<(usize, String)>,
}

crate::debug::opaque_debug!(OptimizerBuilder<'v, T>);

impl<'v, T: OptimizerConfig> OptimizerBuilder<'v, T> {
    pub(super) fn new(config: T, vs: &'v VarStore) -> Self {
        Self { config, vs, lr: 1e-3, groups: vec![], names: vec![] }
    }

    /// The learning rate of groups that do not set their own: 1e-3 unless given, as in PyTorch.
    pub fn lr(mut self, lr: f64) -> Self {
        self.lr = lr;
        self
    }

    /// Adds a parameter group: all variables for whose name (`"conv1.weight"`) `contains` returns true.
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
        let optimizer = Optimizer::assemble(&self.config, self.vs, self.lr, grouping)?;
        for (index, options) in options.iter().enumerate() {
            let group = optimizer.group_at(index)?;
            for &(hyper, value) in &options.values {
                group.set(hyper.name(), value)?;
            }
        }
        optimizer.note_as_built()?;
        Ok(optimizer)
    }
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
