//! Names and bounds of hyper-parameters.

use std::fmt;

use tch::Tensor;

use crate::bridge::Algorithm;
use crate::error::{Error, Result};

pub(crate) use crate::bridge::Hyper;
use Hyper::*;

const SGD: &[Hyper] = &[Lr, Momentum, Dampening, WeightDecay, Nesterov];
const ADAM: &[Hyper] = &[Lr, Beta1, Beta2, Eps, WeightDecay, Amsgrad];
const RMSPROP: &[Hyper] = &[Lr, Alpha, Eps, WeightDecay, Momentum, Centered];

impl Algorithm {
    /// PyTorch's name of the optimizer.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Algorithm::Sgd => "SGD",
            Algorithm::Adam => "Adam",
            Algorithm::AdamW => "AdamW",
            Algorithm::RmsProp => "RMSprop",
        }
    }

    /// The hyper-parameters that this optimizer has.
    pub(crate) fn hypers(self) -> &'static [Hyper] {
        match self {
            Algorithm::Sgd => SGD,
            Algorithm::Adam | Algorithm::AdamW => ADAM,
            Algorithm::RmsProp => RMSPROP,
        }
    }

    /// PyTorch's names of the state tensors that libtorch keeps for a parameter, in the order of
    /// `RawState::tensors`. A name is empty where the optimizer has no such tensor.
    pub(crate) fn state_names(self) -> [&'static str; 3] {
        match self {
            Algorithm::Sgd => ["momentum_buffer", "", ""],
            Algorithm::Adam | Algorithm::AdamW => ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"],
            Algorithm::RmsProp => ["square_avg", "momentum_buffer", "grad_avg"],
        }
    }

    /// Whether libtorch counts the steps of each parameter.
    pub(crate) fn counts_steps(self) -> bool {
        self != Algorithm::Sgd
    }

    /// Whether `tensors` hold those that libtorch needs at every step.
    pub(crate) fn has_needed(self, tensors: &[Option<Tensor>; 3]) -> bool {
        let needed = match self {
            Algorithm::Sgd => 0,
            Algorithm::Adam | Algorithm::AdamW => 2,
            Algorithm::RmsProp => 1,
        };
        tensors[..needed].iter().all(Option::is_some)
    }

    /// The index of the state tensor that is needed only while this hyper-parameter is not 0. libtorch
    /// creates it at a parameter's first step or never; so whoever switches the option on later has to add it.
    pub(crate) fn buffer_of(self, hyper: Hyper) -> Option<usize> {
        match (self, hyper) {
            (Algorithm::Adam | Algorithm::AdamW, Amsgrad) | (Algorithm::RmsProp, Centered) => {
                Some(2)
            }
            (Algorithm::RmsProp, Momentum) => Some(1),
            _ => None,
        }
    }

    /// The hyper-parameter with this PyTorch name; an error if this optimizer has none.
    pub(crate) fn hyper(self, name: &str) -> Result<Hyper> {
        self.hypers().iter().copied().find(|h| h.name() == name).ok_or_else(|| {
            Error::UnknownHyperParameter {
                name: name.into(),
                optimizer: self.name(),
                available: self.hypers().iter().map(|h| h.name()).collect(),
            }
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
        }
    }

    /// Checks a value against the bounds that torch.optim checks in its constructors.
    pub(crate) fn check(self, value: f64) -> Result<()> {
        let (fits, bounds) = match self {
            Beta1 | Beta2 => ((0. ..1.).contains(&value), "in [0, 1)"),
            Dampening => (value.is_finite(), "finite"),
            Nesterov | Amsgrad | Centered => (value == 0. || value == 1., "0 or 1"),
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
