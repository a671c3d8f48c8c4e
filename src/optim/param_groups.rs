//! Parameter groups as schedulers take them, and as training recipes use them: groups without weight decay, frozen groups.

use std::collections::HashSet;

use tch::Tensor;
use tch::nn::VarStore;

use super::{Group, Optimizer, locked};
use crate::bridge::set_gradient;
use crate::error::{Error, Result};

/// Parameter groups that a scheduler drives: all of an [`Optimizer`], or one [`Group`].
pub trait ParamGroups: sealed::Chosen {}

impl ParamGroups for Optimizer {}
impl ParamGroups for Group {}

pub(crate) mod sealed {
    use crate::optim::{Group, Optimizer};

    /// Keeps other crates from implementing [`ParamGroups`](super::ParamGroups), which may grow.
    pub trait Chosen {
        /// The optimizer, and the group where it is one.
        fn chosen(&self) -> (Optimizer, Option<Group>);
    }

    impl Chosen for Optimizer {
        fn chosen(&self) -> (Optimizer, Option<Group>) {
            (self.clone(), None)
        }
    }

    impl Chosen for Group {
        fn chosen(&self) -> (Optimizer, Option<Group>) {
            (self.optimizer.clone(), Some(self.clone()))
        }
    }
}

/// Returns a predicate on names: true for the variables of the store that are biases, or scales and shifts of norms.
/// These are the variables with at most one dimension, which recipes leave out of the weight decay. Variables that are
/// added to the store later are not known to the predicate.
///
/// ```
/// # use tch::{Device, nn};
/// use tch_ignite::optim::{GroupOptions, Optimizer, is_bias_or_norm};
///
/// # let vs = nn::VarStore::new(Device::Cpu);
/// # nn::linear(vs.root() / "fc", 4, 2, Default::default());
/// let (without, with) = (is_bias_or_norm(&vs), is_bias_or_norm(&vs));
/// let optimizer = Optimizer::adamw(&vs)
///     .group("no decay", without, GroupOptions::new().weight_decay(0.))
///     .group("decay", move |name| !with(name), GroupOptions::new())
///     .build()?;
/// assert_eq!(optimizer.group("no decay")?.parameters()?, ["fc.bias"]);
/// # Ok::<(), tch_ignite::Error>(())
/// ```
pub fn is_bias_or_norm(vs: &VarStore) -> impl Fn(&str) -> bool + Send + 'static {
    let variables = locked(&vs.variables_);
    let flat = variables.named_variables.iter().filter(|(_, tensor)| tensor.dim() <= 1);
    let names: HashSet<String> = flat.map(|(name, _)| name.clone()).collect();
    move |name| names.contains(name)
}

/// Returns a predicate on names: true for the variables of the store that have two dimensions, which is what
/// [`Muon`](super::Muon) steps. Its authors leave embeddings and the last layer to AdamW. Variables that are added to the
/// store later are not known to the predicate.
pub fn is_matrix(vs: &VarStore) -> impl Fn(&str) -> bool + Send + Sync + 'static {
    let variables = locked(&vs.variables_);
    let matrices = variables.named_variables.iter().filter(|(_, tensor)| tensor.dim() == 2);
    let names: HashSet<String> = matrices.map(|(name, _)| name.clone()).collect();
    move |name| names.contains(name)
}

impl Group {
    /// Stops the training of the group's parameters: backward computes no gradients for them, their present
    /// gradients are dropped, and steps skip them. Their state is kept for [`unfreeze`](Self::unfreeze).
    ///
    /// ```
    /// # use tch::{Device, nn};
    /// # use tch_ignite::optim::{Optimizer, lr};
    /// # let vs = nn::VarStore::new(Device::Cpu);
    /// # let (base, head) = (vs.root().ones("base", &[1]), vs.root().ones("head", &[1]));
    /// let optimizer = Optimizer::sgd(&vs)
    ///     .group("base", |name| name == "base", lr(0.5))
    ///     .group("head", |name| name == "head", lr(0.5))
    ///     .build()?;
    /// optimizer.group("base")?.freeze()?;
    /// optimizer.backward_step(&(&base * &head).sum(tch::Kind::Float))?;
    /// assert_eq!((base.double_value(&[0]), head.double_value(&[0])), (1.0, 0.5));
    /// # Ok::<(), tch_ignite::Error>(())
    /// ```
    ///
    /// # Errors
    /// See [`Optimizer`].
    pub fn freeze(&self) -> Result<()> {
        let parameters = self.optimizer.parameters_of([self.index()])?;
        parameters.iter().try_for_each(|parameter| self.optimizer.set_trains(parameter, false))
    }

    /// Goes on with the training of the group's parameters after [`freeze`](Self::freeze).
    ///
    /// # Errors
    /// See [`Optimizer`].
    pub fn unfreeze(&self) -> Result<()> {
        let parameters = self.optimizer.parameters_of([self.index()])?;
        parameters.iter().try_for_each(|parameter| self.optimizer.set_trains(parameter, true))
    }
}

impl Optimizer {
    /// Switches the training of one parameter on or off.
    pub(super) fn set_trains(&self, parameter: &Tensor, on: bool) -> Result<()> {
        let what = if on { "unfreezing" } else { "freezing" };
        if !on {
            set_gradient(parameter, None).map_err(|text| Error::libtorch(what, text))?;
        }
        let set = parameter.f_set_requires_grad(on);
        set.map(drop).map_err(|error| Error::libtorch(what, error))
    }
}
