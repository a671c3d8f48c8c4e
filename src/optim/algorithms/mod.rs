//! Everything about each optimizer but its arithmetic: one file for each, and `libtorch.rs` for the four
//! that tch has.

mod adadelta;
mod adafactor;
mod adagrad;
mod adamax;
mod adamw_schedule_free;
mod ademamix;
mod asgd;
mod lbfgs;
mod libtorch;
mod lion;
mod muon;
mod nadam;
mod radam;
mod rprop;
mod sgd_schedule_free;
mod sparse_adam;

pub use adadelta::Adadelta;
pub use adafactor::Adafactor;
pub use adagrad::Adagrad;
pub use adamax::Adamax;
pub use adamw_schedule_free::AdamWScheduleFree;
pub use ademamix::AdEMAMix;
pub use asgd::Asgd;
pub use lbfgs::Lbfgs;
pub use lion::Lion;
pub use muon::Muon;
pub use nadam::NAdam;
pub use radam::RAdam;
pub use rprop::Rprop;
pub use sgd_schedule_free::SgdScheduleFree;
pub use sparse_adam::SparseAdam;

use tch::nn::{self, OptimizerConfig};
use tch::{COptimizer, Kind, TchError, Tensor};

use super::hyper::Hyper;
use crate::bridge::{Algorithm, own_optimizer};
use crate::error::{Error, Result};

/// An optimizer as the rest of the crate sees it.
pub(crate) struct Description {
    /// PyTorch's name.
    pub(super) name: &'static str,
    /// The hyper-parameters, with PyTorch's defaults.
    pub(super) hypers: &'static [(Hyper, f64)],
    /// Up to three tensors that are kept for a parameter.
    pub(super) state: &'static [StateTensor],
    /// Whether the steps of each parameter are counted, and the count is a part of the state.
    pub(super) counts_steps: bool,
}

impl Algorithm {
    /// PyTorch's name of the optimizer.
    pub(crate) fn name(self) -> &'static str {
        self.description().name
    }

    /// The optimizer with this name, in capital or small letters.
    pub(super) fn named(name: &str) -> Result<Self> {
        let all = || (0..).map_while(|number| Self::try_from(number).ok());
        all().find(|algorithm| algorithm.name().eq_ignore_ascii_case(name)).ok_or_else(|| {
            let names: Vec<_> = all().map(Self::name).collect();
            Error::invalid(format!("no optimizer '{name}'; there are: {}", names.join(", ")))
        })
    }

    /// PyTorch's default learning rate.
    fn lr(self) -> f64 {
        let hypers = self.description().hypers.iter();
        hypers.filter(|(hyper, _)| *hyper == Hyper::Lr).map(|(_, lr)| *lr).sum()
    }

    /// The hyper-parameters that this optimizer has.
    pub(crate) fn hypers(self) -> impl Iterator<Item = Hyper> {
        self.description().hypers.iter().map(|(hyper, _)| *hyper)
    }

    /// PyTorch's names of the tensors that are kept for a parameter, in the order of `RawState::tensors`. A name is
    /// empty where the optimizer has no such tensor.
    pub(crate) fn state_names(self) -> [&'static str; 3] {
        let mut names = [""; 3];
        for (name, tensor) in names.iter_mut().zip(self.description().state) {
            *name = tensor.name;
        }
        names
    }

    /// Whether the steps of each parameter are counted.
    pub(crate) fn counts_steps(self) -> bool {
        self.description().counts_steps
    }

    /// Whether `tensors` hold those that a parameter of this size needs at every step.
    pub(crate) fn has_needed(self, tensors: &[Option<Tensor>; 3], parameter: &[i64]) -> bool {
        self.description().state.iter().zip(tensors).all(|(state, tensor)| {
            let needed = state.needed == Needed::Always && state.shape.of(parameter).is_some();
            tensor.is_some() || !needed
        })
    }

    /// The size and type of the state tensor with this name for a parameter of this size and type; `None` if it has no
    /// such tensor.
    pub(crate) fn state_like(
        self,
        name: &str,
        parameter: &[i64],
        kind: Kind,
    ) -> Option<(Vec<i64>, Kind)> {
        let tensor = self.description().state.iter().find(|tensor| tensor.name == name)?;
        let kind = if tensor.shape == Shape::Number { Kind::Float } else { kind };
        Some((tensor.shape.of(parameter)?, kind))
    }

    /// The index of the state tensor that is needed only while this hyper-parameter is not 0. It is created at a
    /// parameter's first step or never; so whoever switches the option on later has to add it.
    pub(crate) fn buffer_of(self, hyper: Hyper) -> Option<usize> {
        let state = self.description().state.iter();
        state.map(|tensor| tensor.needed).position(|needed| needed == Needed::While(hyper))
    }

    /// The hyper-parameter that is the momentum, or the decay rate of the first moment.
    pub(crate) fn momentum(self) -> Option<Hyper> {
        [Hyper::Momentum, Hyper::Beta1]
            .into_iter()
            .find(|hyper| self.hypers().any(|own| own == *hyper))
    }

    /// The hyper-parameter by which the parameters of a Schedule-Free optimizer lie between their two other points: 1 is
    /// the average.
    pub(crate) fn interpolation(self) -> Option<Hyper> {
        match self {
            Self::AdamWScheduleFree => Some(Hyper::Beta1),
            Self::SgdScheduleFree => Some(Hyper::Momentum),
            _ => None,
        }
    }

    /// Whether a step evaluates the loss by itself.
    pub(crate) fn needs_closure(self) -> bool {
        self == Self::Lbfgs
    }

    /// Checks a value against the bounds of the hyper-parameter, and those that only this optimizer has.
    #[inline]
    pub(crate) fn check(self, hyper: Hyper, value: f64) -> Result<()> {
        hyper.check(value)?;
        if hyper != Hyper::Lr && self.interpolation() == Some(hyper) && !(value > 0. && value < 1.)
        {
            return Err(Error::invalid(format!(
                "{hyper} of {} must be between 0 and 1, but {value} was given",
                self.name()
            )));
        }
        Ok(())
    }

    /// [`hyper`](Self::hyper) for a hyper-parameter that is to be set, and not one that steps count in.
    pub(crate) fn settable(self, name: &str) -> Result<Hyper> {
        match self.hyper(name)? {
            hyper if hyper.is_counted() => Err(Error::invalid(format!(
                "{hyper} is counted by the steps of {}, and can only be read",
                self.name()
            ))),
            hyper => Ok(hyper),
        }
    }

    /// The hyper-parameter with this PyTorch name; an error if this optimizer has none.
    pub(crate) fn hyper(self, name: &str) -> Result<Hyper> {
        self.hypers().find(|h| h.name() == name).ok_or_else(|| Error::UnknownHyperParameter {
            name: name.into(),
            optimizer: self.name(),
            available: self.hypers().map(|h| h.name()).collect(),
        })
    }
}

/// A tensor that an optimizer keeps for a parameter.
pub(super) struct StateTensor {
    /// PyTorch's name.
    pub(super) name: &'static str,
    pub(super) shape: Shape,
    pub(super) needed: Needed,
}

/// When a step needs a tensor of the state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Needed {
    Always,
    /// While the hyper-parameter is not 0. Only a parameter's first step makes it.
    While(Hyper),
    /// Never: a step goes without it, or makes it.
    Never,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Shape {
    /// The parameter's shape.
    Parameter,
    /// One f32 number.
    Number,
    /// A number for each row of a parameter of two or more dimensions.
    Rows,
    /// A number for each column of a parameter of two or more dimensions.
    Columns,
    /// The parameter's shape if it has at most one dimension; otherwise there is no tensor.
    Vector,
}

impl Shape {
    /// The size of the tensor for a parameter of this size; `None` if there is none.
    pub(super) fn of(self, parameter: &[i64]) -> Option<Vec<i64>> {
        let without = |from_last: usize| {
            let mut size = parameter.to_vec();
            let last = size.len().checked_sub(2)? + 1;
            size[last - from_last] = 1;
            Some(size)
        };
        match self {
            Self::Parameter => Some(parameter.to_vec()),
            Self::Number => Some(vec![]),
            Self::Rows => without(0),
            Self::Columns => without(1),
            Self::Vector => (parameter.len() < 2).then(|| parameter.to_vec()),
        }
    }
}

impl StateTensor {
    /// A tensor of the parameter's shape that every step needs.
    const fn like_parameter(name: &'static str) -> Self {
        Self::shaped(name, Shape::Parameter)
    }

    const fn shaped(name: &'static str, shape: Shape) -> Self {
        Self { name, shape, needed: Needed::Always }
    }

    /// A tensor of the parameter's shape that some steps need.
    const fn needed(name: &'static str, needed: Needed) -> Self {
        Self { name, shape: Shape::Parameter, needed }
    }
}

impl Algorithm {
    pub(super) fn description(self) -> &'static Description {
        match self {
            Self::Sgd => &libtorch::SGD,
            Self::Adam => &libtorch::ADAM,
            Self::AdamW => &libtorch::ADAMW,
            Self::RmsProp => &libtorch::RMS_PROP,
            Self::Adagrad => &Adagrad::DESCRIPTION,
            Self::NAdam => &NAdam::DESCRIPTION,
            Self::RAdam => &RAdam::DESCRIPTION,
            Self::Adamax => &Adamax::DESCRIPTION,
            Self::Adadelta => &Adadelta::DESCRIPTION,
            Self::Asgd => &Asgd::DESCRIPTION,
            Self::Rprop => &Rprop::DESCRIPTION,
            Self::Lion => &Lion::DESCRIPTION,
            Self::Adafactor => &Adafactor::DESCRIPTION,
            Self::Muon => &Muon::DESCRIPTION,
            Self::SparseAdam => &SparseAdam::DESCRIPTION,
            Self::AdamWScheduleFree => &AdamWScheduleFree::DESCRIPTION,
            Self::SgdScheduleFree => &SgdScheduleFree::DESCRIPTION,
            Self::AdEMAMix => &AdEMAMix::DESCRIPTION,
            Self::Lbfgs => &Lbfgs::DESCRIPTION,
        }
    }
}

/// The settings of an optimizer that is known by its name: made by [`Optimizer::named`](super::Optimizer::named).
#[derive(Debug, Clone, Copy)]
pub struct NamedOptimizer(Algorithm);

impl OptimizerConfig for NamedOptimizer {
    fn build_copt(&self, lr: f64) -> Result<COptimizer, TchError> {
        match self.0 {
            Algorithm::Sgd => nn::Sgd::default().build_copt(lr),
            Algorithm::Adam => nn::Adam::default().build_copt(lr),
            Algorithm::AdamW => nn::AdamW::default().build_copt(lr),
            Algorithm::RmsProp => nn::RmsProp::default().build_copt(lr),
            other => build(other, lr),
        }
    }
}

impl super::Optimizer {
    /// An optimizer by PyTorch's name (`"AdamW"`, `"SGD"`, …; small letters too), with PyTorch's defaults, also for the
    /// learning rate: for programs whose users choose one.
    ///
    /// ```
    /// # use tch::{Device, nn};
    /// use tch_ignite::optim::Optimizer;
    /// # let vs = nn::VarStore::new(Device::Cpu);
    /// # nn::linear(vs.root(), 1, 1, Default::default());
    /// let optimizer = Optimizer::named("lion", &vs)?.weight_decay(0.1).build()?;
    /// assert_eq!((optimizer.name(), optimizer.group_at(0)?.lr()?), ("Lion", 1e-4));
    /// # Ok::<(), tch_ignite::Error>(())
    /// ```
    ///
    /// # Errors
    /// There is no optimizer of this name; the error lists those there are.
    pub fn named<'v>(
        name: &str,
        vs: &'v nn::VarStore,
    ) -> crate::error::Result<super::OptimizerBuilder<'v, NamedOptimizer>> {
        Ok(Self::of(Algorithm::named(name)?, vs))
    }

    /// An optimizer of this algorithm, with PyTorch's defaults.
    pub(super) fn of(
        algorithm: Algorithm,
        vs: &nn::VarStore,
    ) -> super::OptimizerBuilder<'_, NamedOptimizer> {
        Self::builder(NamedOptimizer(algorithm), vs).lr(algorithm.lr())
    }
}

/// tch's handle of a new optimizer with PyTorch's defaults and this learning rate.
fn build(algorithm: Algorithm, lr: f64) -> Result<COptimizer, TchError> {
    let mut hypers = algorithm.description().hypers.to_vec();
    for (_, value) in hypers.iter_mut().filter(|(hyper, _)| *hyper == Hyper::Lr) {
        *value = lr;
    }
    own_optimizer(algorithm, &hypers).map_err(TchError::Torch)
}

/// Makes the settings of an optimizer, a type for tch, with its documentation, and the method of [`Optimizer`] that
/// begins to build one.
///
/// [`Optimizer`]: super::Optimizer
macro_rules! algorithm {
    ($(#[$doc:meta])* $name:ident, $(#[$method_doc:meta])* fn $method:ident, $description:expr) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy)]
        pub struct $name(());

        impl $name {
            pub(super) const DESCRIPTION: crate::optim::algorithms::Description = $description;
        }

        impl tch::nn::OptimizerConfig for $name {
            fn build_copt(&self, lr: f64) -> Result<tch::COptimizer, tch::TchError> {
                crate::optim::algorithms::build(crate::bridge::Algorithm::$name, lr)
            }
        }

        impl crate::optim::Optimizer {
            $(#[$method_doc])*
            pub fn $method(
                vs: &tch::nn::VarStore,
            ) -> crate::optim::OptimizerBuilder<'_, $name> {
                Self::builder($name(()), vs).lr(crate::bridge::Algorithm::$name.lr())
            }
        }

        impl crate::optim::GroupOptions {
            #[doc = concat!(
                "Options of a group that ", stringify!($name), " steps, in an optimizer of another algorithm: ",
                "PyTorch's defaults, also for the learning rate, but for what is set. See ",
                "[`OptimizerBuilder::group`](crate::optim::OptimizerBuilder::group)."
            )]
            pub fn $method() -> Self {
                Self::of(crate::bridge::Algorithm::$name)
            }
        }
    };
}
use algorithm;

#[cfg(test)]
mod kernel_forms;
#[cfg(test)]
mod tests;
