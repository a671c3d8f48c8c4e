//! Names and bounds of hyper-parameters.

use std::fmt;

use tch::{Kind, Tensor};

use super::algorithms::{Needed, Shape};
use crate::bridge::Algorithm;
use crate::error::{Error, Result};

pub(crate) use crate::bridge::Hyper;
use Hyper::*;

impl Algorithm {
    /// PyTorch's name of the optimizer.
    pub(crate) fn name(self) -> &'static str {
        self.description().name
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
        [Momentum, Beta1].into_iter().find(|hyper| self.hypers().any(|own| own == *hyper))
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

impl Hyper {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Lr => "lr",
            Momentum => "momentum",
            Dampening => "dampening",
            WeightDecay => "weight_decay",
            Nesterov => "nesterov",
            Beta1 => "beta1",
            Beta2 => "beta2",
            Eps => "eps",
            Amsgrad => "amsgrad",
            Alpha => "alpha",
            Centered => "centered",
            Maximize => "maximize",
            LrDecay => "lr_decay",
            InitialAccumulatorValue => "initial_accumulator_value",
            MomentumDecay => "momentum_decay",
            DecoupledWeightDecay => "decoupled_weight_decay",
            Rho => "rho",
            Lambd => "lambd",
            T0 => "t0",
            EtaMinus => "etaminus",
            EtaPlus => "etaplus",
            StepSizeMin => "step_size_min",
            StepSizeMax => "step_size_max",
            Beta2Decay => "beta2_decay",
            Eps1 => "eps1",
            Eps2 => "eps2",
            D => "d",
            NsA => "ns_coefficient_a",
            NsB => "ns_coefficient_b",
            NsC => "ns_coefficient_c",
            NsSteps => "ns_steps",
            MatchRmsAdamW => "match_rms_adamw",
        }
    }

    /// Checks a value against the bounds that torch.optim checks in its constructors.
    pub(crate) fn check(self, value: f64) -> Result<()> {
        let (fits, bounds) = match self {
            Beta1 | Beta2 => ((0. ..1.).contains(&value), "in [0, 1)"),
            Dampening | Lambd | T0 | NsA | NsB | NsC => (value.is_finite(), "finite"),
            Nesterov | Amsgrad | Centered | Maximize | DecoupledWeightDecay | MatchRmsAdamW => {
                (value == 0. || value == 1., "0 or 1")
            }
            Rho => ((0. ..=1.).contains(&value), "in [0, 1]"),
            EtaMinus => (value > 0. && value < 1., "between 0 and 1"),
            EtaPlus => (value > 1. && value.is_finite(), "finite and above 1"),
            Beta2Decay => (value <= 0. && value.is_finite(), "finite and not positive"),
            D => (value >= 1. && value.is_finite(), "finite and at least 1"),
            NsSteps => {
                let whole = value.fract() == 0. && (0. ..100.).contains(&value);
                (whole, "a whole number from 0 to 99")
            }
            _ => (value >= 0. && value.is_finite(), "finite and not negative"),
        };
        if fits {
            return Ok(());
        }
        Err(Error::invalid(format!("{self} must be {bounds}, but {value} was given")))
    }
}

impl fmt::Display for Hyper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
