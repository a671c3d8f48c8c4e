//! Names and bounds of hyper-parameters.

use std::fmt;

use crate::error::{Error, Result};

pub(crate) use crate::bridge::Hyper;
use Hyper::*;

/// The largest count: all whole numbers up to it are exact.
const MOST: f64 = (1u64 << 53) as f64;

impl Hyper {
    /// Whether steps and the optimizer itself set this value.
    pub(crate) fn is_counted(self) -> bool {
        matches!(self, K | WeightSum | LrMax | TrainMode)
    }

    /// Whether this is on (1) or off (0).
    #[inline]
    pub(crate) fn is_flag(self) -> bool {
        matches!(
            self,
            Nesterov
                | Amsgrad
                | Centered
                | Maximize
                | DecoupledWeightDecay
                | MatchRmsAdamW
                | StrongWolfe
                | TrainMode
        )
    }

    /// The hyper-parameter of this name.
    pub(crate) fn named(name: &str) -> Option<Self> {
        (0..).map_while(|number| Self::try_from(number).ok()).find(|hyper| hyper.name() == name)
    }

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
            R => "r",
            WarmupSteps => "warmup_steps",
            WeightLrPower => "weight_lr_power",
            K => "k",
            WeightSum => "weight_sum",
            LrMax => "lr_max",
            TrainMode => "train_mode",
            Beta3 => "beta3",
            Beta3Warmup => "beta3_warmup",
            AlphaWarmup => "alpha_warmup",
            MaxIter => "max_iter",
            MaxEval => "max_eval",
            ToleranceGrad => "tolerance_grad",
            ToleranceChange => "tolerance_change",
            HistorySize => "history_size",
            StrongWolfe => "strong_wolfe",
        }
    }

    /// Checks a value against the bounds that torch.optim checks in its constructors.
    #[inline]
    pub(crate) fn check(self, value: f64) -> Result<()> {
        let (fits, bounds) = match self {
            Beta1 | Beta2 | Beta3 => ((0. ..1.).contains(&value), "in [0, 1)"),
            Dampening | Lambd | T0 | NsA | NsB | NsC | R | WeightLrPower | LrMax => {
                (value.is_finite(), "finite")
            }
            flag if flag.is_flag() => (value == 0. || value == 1., "0 or 1"),
            WarmupSteps | Beta3Warmup | AlphaWarmup | MaxEval | K => {
                let whole = value.fract() == 0. && (0. ..=MOST).contains(&value);
                (whole, "a whole number that is not negative")
            }
            MaxIter | HistorySize => {
                let whole = value.fract() == 0. && (1. ..=MOST).contains(&value);
                (whole, "a whole number of at least 1")
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
