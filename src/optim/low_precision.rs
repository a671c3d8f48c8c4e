use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use super::{Group, Optimizer};
use crate::bridge::{self, Algorithm, Native};
use crate::error::{Error, Result};

/// How an optimizer stores parameters in f16 and bf16 between steps. A value of bf16 has eight significant bits, so an
/// update of less than 1/512 of a parameter is lost when the sum is rounded, and training stops early. Each of these keeps
/// what rounding would lose, or gives it back on average.
///
/// Given by `low_precision` of [`OptimizerBuilder`](super::OptimizerBuilder) and [`GroupOptions`](super::GroupOptions),
/// with every algorithm but [`Lbfgs`](super::Lbfgs) and [`SparseAdam`](super::SparseAdam). A step then reads the
/// parameter's value in f32, computes the new one in f32 by the algorithm's rule, with moments in f32, and stores it by
/// one of the rules below. Windows of several batches
/// ([`GradientAccumulator`](crate::GradientAccumulator)) add up the gradients of such parameters in f32.
///
/// Parameters of other types are not concerned: a model may keep its norms in f32, and one program can train in bf16 and
/// in f32. Complex parameters are of other types; sparse gradients are refused.
///
/// ```
/// use tch::{Device, Kind, nn};
/// use tch_ignite::optim::{LowPrecision, Optimizer};
///
/// let mut vs = nn::VarStore::new(Device::Cpu);
/// vs.set_kind(Kind::BFloat16);
/// let w = vs.root().ones("w", &[1]);
/// let optimizer =
///     Optimizer::sgd(&vs).lr(1e-3).low_precision(LowPrecision::MasterWeights).build()?;
/// for _ in 0..4 {
///     optimizer.backward_step(&w.sum(Kind::Float))?;
/// }
/// // Each step alone would have been rounded away.
/// assert_eq!(w.double_value(&[0]), 0.99609375);
/// assert_eq!(optimizer.state("w")?[0].0, "master");
/// # Ok::<(), tch_ignite::Error>(())
/// ```
///
/// Parameters may be given other values at any time (a file of weights, averages): these count, and what was kept of the
/// old ones does not, but for less than the last bit with [`KahanSum`](Self::KahanSum). Moments that steps made in f16 or
/// bf16, without the storage (those of tch's own `step`, for example), do not fit: steps are refused then.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
#[non_exhaustive]
pub enum LowPrecision {
    /// The values in f32 (`"master"` of the state), and the parameters are these rounded to the nearest: exactly a training
    /// in f32 with the same gradients. 4 bytes more for each element.
    MasterWeights,
    /// The parameters, and what rounding took from each (`"compensation"`, in the parameter's type), which the next step
    /// adds again: Kahan's summation. About 16 significant bits in bf16. In f16 it is 22 for parameters from 1/8, and one
    /// less for each halving below, because f16 has no number below 6e-8: updates of less than 3e-8 are lost, so
    /// [`MasterWeights`](Self::MasterWeights) suit small weights better. 2 bytes more for each element.
    KahanSum,
    /// The parameters alone. A value is rounded up or down at random, with the chances that make the mean the value.
    /// Noise of the size of the last bit, and no memory between steps; a step outside of the one pass on the CPU (CUDA,
    /// Muon, Adafactor) makes several temporary tensors of 8 bytes an element, for one parameter after the other.
    ///
    /// The random numbers are those of the seed, the parameter, its step and the element alone (`"rounding"` counts
    /// them), so a resumed run, any number of threads, and all ranks round alike; no other generator is touched.
    StochasticRounding {
        /// Seed of the random numbers.
        seed: u64,
    },
}

impl LowPrecision {
    fn number(self) -> (bridge::LowPrecision, u64) {
        match self {
            Self::MasterWeights => (bridge::LowPrecision::MasterWeights, 0),
            Self::KahanSum => (bridge::LowPrecision::KahanSum, 0),
            Self::StochasticRounding { seed } => (bridge::LowPrecision::StochasticRounding, seed),
        }
    }

    /// The name, size and type of what is kept beside the state of a parameter.
    pub(super) fn kept(self, parameter: &Tensor) -> (&'static str, Vec<i64>, Kind) {
        match self {
            Self::MasterWeights => ("master", parameter.size(), Kind::Float),
            Self::KahanSum => ("compensation", parameter.size(), parameter.kind()),
            Self::StochasticRounding { .. } => ("rounding", vec![], Kind::Int64),
        }
    }
}

/// The storages of an optimizer's groups.
#[derive(Debug, Default)]
pub(super) struct Storages {
    /// Groups that have one of their own, or none where the others have one.
    pub(super) by_group: Vec<(usize, Option<LowPrecision>)>,
    pub(super) others: Option<LowPrecision>,
}

impl Storages {
    pub(super) fn of(&self, group: usize) -> Option<LowPrecision> {
        let own = self.by_group.iter().find(|(index, _)| *index == group);
        own.map_or(self.others, |(_, own)| *own)
    }

    /// Tells the bridge; refuses what cannot be.
    pub(super) fn set(
        &self,
        native: &mut Native,
        algorithm: impl Fn(usize) -> Algorithm,
        name: impl Fn(usize) -> String,
    ) -> Result<()> {
        for group in 0..native.group_count() {
            let algorithm = algorithm(group);
            let why = match algorithm {
                Algorithm::Lbfgs => "takes all parameters as one vector, in their own type",
                Algorithm::SparseAdam => "steps sparse gradients",
                _ => continue,
            };
            if self.of(group).is_some() {
                return Err(Error::invalid(format!(
                    "group '{}' is stepped by {}, which {why}, so it cannot have a storage of low precision: keep its parameters in f32 and give it low_precision(None), or choose another optimizer",
                    name(group),
                    algorithm.name(),
                )));
            }
        }
        let own = self.by_group.iter().map(|(group, storage)| (Some(*group), *storage));
        for (group, storage) in std::iter::once((None, self.others)).chain(own) {
            let (how, seed) = storage.map_or((bridge::LowPrecision::None, 0), LowPrecision::number);
            native
                .set_low_precision(group, how, seed)
                .map_err(|text| Error::libtorch("cannot build the optimizer", text))?;
        }
        Ok(())
    }
}

/// The name of what is kept beside the state.
pub(super) fn kept_name(kept: &Tensor) -> &'static str {
    match kept.kind() {
        Kind::Float => "master",
        Kind::Int64 => "rounding",
        _ => "compensation",
    }
}

impl Group {
    /// How the group's parameters in f16 and bf16 are stored; `None` for the parameters alone, rounded to the nearest.
    pub fn low_precision(&self) -> Option<LowPrecision> {
        self.optimizer.shared.storages.of(self.index())
    }
}

impl Optimizer {
    /// Whether a parameter has a storage of low precision.
    pub(crate) fn has_low_precision(&self) -> Result<bool> {
        for group in self.groups()? {
            let stored = group.low_precision().is_some();
            if stored && group.variables()?.iter().any(|own| bridge::is_low_precision(&own.tensor))
            {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Makes the gradients of parameters with a storage of low precision f32, so that backward adds to them in f32.
    pub(crate) fn widen_gradients(&self) -> Result<()> {
        let storages = &self.shared.storages;
        if storages.others.is_none() && storages.by_group.iter().all(|(_, own)| own.is_none()) {
            return Ok(());
        }
        let names: Vec<_> =
            self.groups()?.into_iter().filter(|g| g.low_precision().is_some()).collect();
        let names: Vec<_> = names.iter().map(Group::name).collect();
        self.gradients()?.groups(names.iter().map(String::as_str))?.widen()
    }
}
