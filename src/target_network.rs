use std::collections::HashMap;

use tch::Tensor;
use tch::nn::VarStore;

use crate::bridge::{Average, Pairs, TensorId};
use crate::error::{Error, Result};
use crate::variables::variables;

/// A network whose weights follow those of another, as in deep reinforcement learning: DDPG's soft updates (Lillicrap et
/// al. 2015, <https://arxiv.org/abs/1509.02971>), DQN's copies.
///
/// The variables of the two stores are paired by name, once. Each update is one pass over them, without a host sync. The
/// target has no state beside its store: track that one in checkpoints.
///
/// ```
/// use tch::{Device, nn};
/// use tch_ignite::TargetNetwork;
///
/// let (online, target) = (nn::VarStore::new(Device::Cpu), nn::VarStore::new(Device::Cpu));
/// let (weight, followed) = (online.root().ones("weight", &[1]), target.root().zeros("weight", &[1]));
/// let mut network = TargetNetwork::new(&target, &online)?;
/// network.soft_update(0.25)?;
/// network.soft_update(0.25)?;
/// assert_eq!(followed.double_value(&[0]), 0.4375); // 1 - 0.75^2
/// network.hard_update()?;
/// assert_eq!(followed.double_value(&[0]), weight.double_value(&[0]));
/// # Ok::<(), tch_ignite::Error>(())
/// ```
#[derive(Debug)]
pub struct TargetNetwork {
    parameters: Pairs,
    buffers: Pairs,
}

impl TargetNetwork {
    /// Pairs the variables of the two stores. The target stays as it is; [`hard_update`](Self::hard_update) makes it a copy.
    ///
    /// # Errors
    /// A variable that only one of the stores has, that has another size in the other, or that has several names in the
    /// target only (tied weights).
    pub fn new(target: &VarStore, online: &VarStore) -> Result<Self> {
        let (followers, sources) = (variables(&target.variables_), variables(&online.variables_));
        let mut left: HashMap<&str, (&Tensor, bool)> = HashMap::new();
        for source in &sources {
            left.extend(source.names().map(|name| (name, (&source.tensor, source.trainable))));
        }
        let (mut parameters, mut buffers) = (vec![], vec![]);
        for follower in &followers {
            let mut found: Option<(&Tensor, bool)> = None;
            for name in follower.names() {
                let (source, trainable) = left.remove(name).ok_or_else(|| {
                    Error::invalid(format!(
                        "the target has '{name}', and the other network has not"
                    ))
                })?;
                if source.size() != follower.tensor.size() {
                    return Err(Error::invalid(format!(
                        "'{name}' has size {:?} in the target, and {:?} in the other network",
                        follower.tensor.size(),
                        source.size()
                    )));
                }
                if found.is_some_and(|(other, _)| TensorId::of(other) != TensorId::of(source)) {
                    return Err(Error::invalid(format!(
                        "'{}' and '{name}' are one variable in the target and two in the other network: tie them in both, or in neither",
                        follower.name
                    )));
                }
                found = Some((source, trainable));
            }
            match found {
                Some((source, true)) => parameters.push((&follower.tensor, source)),
                Some((source, false)) => buffers.push((&follower.tensor, source)),
                None => {}
            }
        }
        if let Some(name) = left.keys().min() {
            return Err(Error::invalid(format!(
                "the target has no '{name}', which the other network has"
            )));
        }
        let pairs = |list: Vec<(&Tensor, &Tensor)>| {
            Pairs::new(list.into_iter()).map_err(|text| Error::libtorch("pairing variables", text))
        };
        Ok(Self { parameters: pairs(parameters)?, buffers: pairs(buffers)? })
    }

    /// Moves the target's parameters by the share `tau` towards the other network's, `target += tau * (online - target)`,
    /// and copies the buffers.
    ///
    /// # Errors
    /// A share that is not from 0 to 1, or a variable that got another size or device; nothing is changed then.
    pub fn soft_update(&mut self, tau: f64) -> Result<()> {
        if !(0. ..=1.).contains(&tau) {
            return Err(Error::invalid(format!(
                "soft_update: tau, the share that is taken of the other network, should be from 0 to 1, but given {tau}"
            )));
        }
        self.update(Average::Lerp(tau))
    }

    /// Copies the other network's variables to the target.
    ///
    /// # Errors
    /// A variable that got another size; nothing is changed then.
    pub fn hard_update(&mut self) -> Result<()> {
        self.update(Average::Copy)
    }

    fn update(&mut self, how: Average) -> Result<()> {
        let failed = |text| Error::libtorch("updating the target network", text);
        self.buffers.check(Average::Copy).map_err(failed)?;
        self.parameters.update(how).map_err(failed)?;
        self.buffers.update(Average::Copy).map_err(failed)
    }
}
