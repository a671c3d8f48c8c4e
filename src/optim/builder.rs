use tch::nn::{self, OptimizerConfig, VarStore};

use super::grouping::{GroupRule, Grouping, unnamed};
use super::hyper::Hyper;
use super::low_precision::Storages;
use super::{Group, GroupOptions, LowPrecision, Optimizer};
use crate::error::{Error, Result};

/// Builds an [`Optimizer`]; made by [`Optimizer::builder`].
#[must_use = "the optimizer is made by `build`"]
pub struct OptimizerBuilder<'v, T> {
    config: T,
    vs: &'v VarStore,
    lr: f64,
    pub(super) options: GroupOptions,
    groups: Vec<(GroupRule, GroupOptions)>,
    names: Vec<(usize, String, GroupOptions)>,
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

    /// Sets options of all groups that do not set their own, and have no algorithm of their own.
    pub(super) fn options(mut self, options: GroupOptions) -> Self {
        self.options = options;
        self
    }

    /// How parameters in f16 and bf16 are stored between steps, in all groups that do not set their own: see
    /// [`LowPrecision`]. Unless given, it is the parameters alone, rounded to the nearest.
    pub fn low_precision(mut self, storage: impl Into<Option<LowPrecision>>) -> Self {
        self.options.low_precision = Some(storage.into());
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

    /// Gives a name and options to a group made with tch's `Path::set_group`, which is otherwise named
    /// `"group_<number>"`. Cannot be mixed with [`group`](Self::group).
    ///
    /// ```
    /// use tch::{Device, nn};
    /// use tch_ignite::optim::{GroupOptions, Optimizer, lr};
    ///
    /// let vs = nn::VarStore::new(Device::Cpu);
    /// vs.root().set_group(0).ones("weight", &[1]);
    /// vs.root().set_group(1).ones("bias", &[1]);
    /// let optimizer = Optimizer::adamw(&vs)
    ///     .weight_decay(0.1)
    ///     .name_group(0, "decay", GroupOptions::new())
    ///     .name_group(1, "no decay", lr(1e-2).weight_decay(0.0))
    ///     .build()?;
    /// assert_eq!(optimizer.group("decay")?.weight_decay()?, 0.1);
    /// assert_eq!(optimizer.group_at(1)?.weight_decay()?, 0.0);
    /// # Ok::<(), tch_ignite::Error>(())
    /// ```
    pub fn name_group(
        mut self,
        number: usize,
        name: impl Into<String>,
        options: GroupOptions,
    ) -> Self {
        self.names.push((number, name.into(), options));
        self
    }

    /// Builds tch's own optimizer and sets the groups' options in it.
    ///
    /// # Errors
    /// A variable in no group or in two (by one name or by two), a group without variables, two groups with the same
    /// name, a name for a number that no group has, [`group`](Self::group) together with
    /// [`name_group`](Self::name_group), an option that the optimizer does not have, a value outside its bounds, or
    /// [`low_precision`](Self::low_precision) with LBFGS or SparseAdam.
    pub fn build(self) -> Result<Optimizer> {
        Hyper::Lr.check(self.lr)?;
        if !self.groups.is_empty() && !self.names.is_empty() {
            return Err(Error::invalid(
                "use either `group` (by name) or `name_group` (tch's numbers), not both",
            ));
        }
        let (rules, of_rules): (Vec<_>, Vec<_>) = self.groups.into_iter().unzip();
        let mut options: Vec<_> = of_rules.into_iter().enumerate().collect();
        let mut names = vec![];
        for (number, name, of_number) in self.names {
            names.push((number, name));
            options.push((number, of_number));
        }
        let grouping = match rules.is_empty() {
            true => Grouping::Numbers(named_numbers(names)?),
            false => Grouping::Rules(named_once(rules)?),
        };
        let algorithm = |(number, options): &(_, GroupOptions)| (*number, options.algorithm);
        let algorithms: Vec<_> = options.iter().map(algorithm).collect();
        let own = options.iter().filter_map(|(number, own)| Some((*number, own.low_precision?)));
        let storages =
            Storages { by_group: own.collect(), others: self.options.low_precision.flatten() };
        let optimizer =
            Optimizer::assemble(&self.config, self.vs, self.lr, grouping, &algorithms, storages)?;
        for &(hyper, value) in &self.options.values {
            optimizer.set_everywhere(hyper.name(), value)?;
        }
        for (number, options) in &options {
            let group = optimizer.group_at(*number)?;
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
                    "group {number} is named twice: '{other_name}' and '{name}'; call name_group once for each number"
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
    Error::invalid(format!("two parameter groups are named '{name}': give each a name of its own"))
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
