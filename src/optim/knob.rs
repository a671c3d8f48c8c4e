use std::fmt;
use std::sync::Arc;

use tch::Tensor;

use super::Optimizer;
use super::hyper::Hyper;
use crate::checkpoint::StateDict;
use crate::{Error, Result};

/// Something with one value that can be read and written: what schedulers drive.
///
/// A hyper-parameter of one group ([`Group::knob`](super::Group::knob)) or of all
/// ([`Optimizer::knob`]), or anything else through [`Knob::new`].
#[derive(Clone)]
pub struct Knob {
    name: String,
    target: Target,
}

#[derive(Clone)]
enum Target {
    Groups { optimizer: Optimizer, group: Option<usize>, hyper: Hyper },
    Custom { get: Arc<dyn Fn() -> f64 + Send + Sync>, set: Arc<dyn Fn(f64) + Send + Sync> },
}

impl Knob {
    pub(super) fn of_groups(optimizer: Optimizer, group: Option<usize>, hyper: Hyper) -> Self {
        Self { name: hyper.name().into(), target: Target::Groups { optimizer, group, hyper } }
    }

    /// A knob of your own: a loss weight, dropout, anything.
    ///
    /// ```
    /// use std::sync::{Arc, Mutex};
    /// use tch_ignite::optim::Knob;
    ///
    /// let dropout = Arc::new(Mutex::new(0.5));
    /// let (read, write) = (dropout.clone(), dropout.clone());
    /// let knob = Knob::new("dropout", move || *read.lock().unwrap(), move |v| *write.lock().unwrap() = v);
    /// knob.set(0.1)?;
    /// assert_eq!(*dropout.lock().unwrap(), 0.1);
    /// # Ok::<(), tch_ignite::Error>(())
    /// ```
    pub fn new(
        name: impl Into<String>,
        get: impl Fn() -> f64 + Send + Sync + 'static,
        set: impl Fn(f64) + Send + Sync + 'static,
    ) -> Self {
        Self {
            name: name.into(),
            target: Target::Custom { get: Arc::new(get), set: Arc::new(set) },
        }
    }

    /// The name of what it turns (`"lr"`).
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The parameter group it is bound to; `None` for all groups and for knobs of your own.
    pub fn group(&self) -> Option<usize> {
        match &self.target {
            Target::Groups { group, .. } => *group,
            Target::Custom { .. } => None,
        }
    }

    /// A knob for each group that this one turns.
    pub fn each(&self) -> Result<Vec<Self>> {
        let Target::Groups { optimizer, group: None, hyper } = &self.target else {
            return Ok(vec![self.clone()]);
        };
        let knob = |index| Self::of_groups(optimizer.clone(), Some(index), *hyper);
        Ok((0..optimizer.group_count()?).map(knob).collect())
    }

    /// The current value, read from libtorch; of the first group where it turns all.
    pub fn get(&self) -> Result<f64> {
        match &self.target {
            Target::Groups { optimizer, group, hyper } => {
                optimizer.get_hyper(group.unwrap_or(0), *hyper)
            }
            Target::Custom { get, .. } => Ok(get()),
        }
    }

    /// The current value of every group it turns.
    pub fn values(&self) -> Result<Vec<f64>> {
        match &self.target {
            Target::Groups { optimizer, group: None, hyper } => (0..optimizer.group_count()?)
                .map(|index| optimizer.get_hyper(index, *hyper))
                .collect(),
            _ => Ok(vec![self.get()?]),
        }
    }

    /// Sets the value, in all groups it turns. Costs a lock and a call into C++ for each, no more.
    ///
    /// # Errors
    /// A value outside PyTorch's bounds for the hyper-parameter, or not finite.
    pub fn set(&self, value: f64) -> Result<()> {
        match &self.target {
            Target::Groups { optimizer, group: Some(index), hyper } => {
                optimizer.set_hyper(*index, *hyper, value)
            }
            Target::Groups { optimizer, group: None, hyper } => (0..optimizer.group_count()?)
                .try_for_each(|index| optimizer.set_hyper(index, *hyper, value)),
            Target::Custom { set, .. } => {
                if !value.is_finite() {
                    return Err(Error::invalid(format!(
                        "{} must be finite, but {value} was given",
                        self.name
                    )));
                }
                set(value);
                Ok(())
            }
        }
    }
}

/// Checkpoints hold the values of knobs that belong to no optimizer; a schedule may only change them later.
impl Knob {
    pub(crate) fn save_value(&self, state: &mut StateDict) -> Result<()> {
        if let Target::Custom { get, .. } = &self.target {
            state.set_tensor("knob", Tensor::from(get()));
        }
        Ok(())
    }

    pub(crate) fn load_value(&self, state: &mut StateDict) -> Result<()> {
        if let Target::Custom { .. } = &self.target {
            let value = state.take_tensor("knob")?;
            let value = value
                .f_double_value(&[])
                .map_err(|error| Error::libtorch(format!("loading '{}'", self.name), error))?;
            self.set(value)?;
        }
        Ok(())
    }
}

impl fmt::Debug for Knob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Knob({})", self.name)
    }
}
