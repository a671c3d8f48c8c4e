use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Weak};

use tch::Tensor;

use super::hyper::Hyper;
use super::{Optimizer, locked};
use crate::error::{Error, Result};
use crate::state::StateDict;

/// A value that can be read and written. Schedulers drive knobs.
///
/// A knob is a hyper-parameter of one group ([`Group::knob`](super::Group::knob)) or of all groups
/// ([`Optimizer::knob`]), or any other value through [`Knob::new`].
#[derive(Clone)]
pub struct Knob {
    name: String,
    target: Target,
}

#[derive(Clone)]
enum Target {
    Groups {
        optimizer: Optimizer,
        group: Option<usize>,
        hyper: Hyper,
    },
    Custom(Arc<Custom>),
    /// A hyper-parameter or a group that there is not. Each use of the knob is an error with this text.
    Missing(Arc<str>),
}

struct Custom {
    get: Box<dyn Fn() -> f64 + Send + Sync>,
    set: Box<dyn Fn(f64) + Send + Sync>,
    reduction: Mutex<Weak<Mutex<f64>>>,
}

/// The factor by which a plateau scheduler has lowered a knob of one group. While a reduction lives, schedules multiply
/// the values that they write to the knob by its factor. Clones, and reductions of the same knob, share the factor.
#[derive(Debug, Clone)]
pub(crate) struct Reduction(Arc<Mutex<f64>>);

impl Reduction {
    pub(crate) fn get(&self) -> f64 {
        *locked(&self.0)
    }

    pub(crate) fn set(&self, factor: f64) {
        *locked(&self.0) = factor;
    }

    /// The reduction that `weak` points to if it still lives, otherwise a new one with factor 1.
    fn alive(weak: &mut Weak<Mutex<f64>>) -> Self {
        let alive = weak.upgrade().unwrap_or_else(|| Arc::new(Mutex::new(1.)));
        *weak = Arc::downgrade(&alive);
        Self(alive)
    }
}

/// The reductions of an optimizer's hyper-parameters, by group.
#[derive(Default)]
pub(super) struct Reductions {
    /// True once there was a reduction. While it is false, a schedule need not take the lock.
    some: AtomicBool,
    all: Mutex<Vec<Reduced>>,
}

/// A hyper-parameter of a group that a plateau scheduler lowers. The entry counts while `factor` can be upgraded.
struct Reduced {
    group: usize,
    hyper: Hyper,
    factor: Weak<Mutex<f64>>,
}

impl Reductions {
    /// The factor on a hyper-parameter of a group; 1 if no reduction of it lives.
    #[inline]
    fn factor(&self, group: usize, hyper: Hyper) -> f64 {
        self.living(group, hyper).map_or(1., |reduction| reduction.get())
    }

    /// The reduction of a hyper-parameter of a group, if one lives.
    #[inline]
    fn living(&self, group: usize, hyper: Hyper) -> Option<Reduction> {
        if !self.some.load(Ordering::Relaxed) {
            return None;
        }
        let all = locked(&self.all);
        let reduced = all.iter().find(|reduced| (reduced.group, reduced.hyper) == (group, hyper));
        reduced.and_then(|reduced| reduced.factor.upgrade()).map(Reduction)
    }

    /// The reduction of a hyper-parameter of a group; made with factor 1 if there is none.
    fn of(&self, group: usize, hyper: Hyper) -> Reduction {
        self.some.store(true, Ordering::Relaxed);
        let mut all = locked(&self.all);
        all.retain(|reduced| reduced.factor.strong_count() > 0);
        let mut known = all.iter_mut();
        if let Some(known) = known.find(|known| (known.group, known.hyper) == (group, hyper)) {
            return Reduction::alive(&mut known.factor);
        }
        let mut factor = Weak::new();
        let reduction = Reduction::alive(&mut factor);
        all.push(Reduced { group, hyper, factor });
        reduction
    }
}

impl Knob {
    pub(super) fn of_groups(optimizer: Optimizer, group: Option<usize>, hyper: Hyper) -> Self {
        Self { name: hyper.name().into(), target: Target::Groups { optimizer, group, hyper } }
    }

    /// A knob for a value of your own: a loss weight, a dropout rate, anything.
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
        let (get, set, reduction) = (Box::new(get), Box::new(set), Mutex::default());
        Self { name: name.into(), target: Target::Custom(Arc::new(Custom { get, set, reduction })) }
    }

    /// A knob that could not be made. A scheduler holds it until it is attached, where its user sees the error.
    pub(crate) fn missing(name: &str, error: &Error) -> Self {
        Self { name: name.into(), target: Target::Missing(error.to_string().into()) }
    }

    /// An error if there is no such knob: see [`missing`](Self::missing).
    pub(crate) fn check(&self) -> Result<()> {
        match &self.target {
            Target::Missing(text) => Err(Error::invalid(&**text)),
            _ => Ok(()),
        }
    }

    /// The name of the value (`"lr"`).
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The number of the parameter group; `None` for a knob of all groups or of a value of your own.
    pub fn group(&self) -> Option<usize> {
        match &self.target {
            Target::Groups { group, .. } => *group,
            Target::Custom(_) | Target::Missing(_) => None,
        }
    }

    /// A knob for each group that this knob sets; a clone of itself for a value of your own.
    ///
    /// # Errors
    /// See [`Optimizer`].
    pub fn each(&self) -> Result<Vec<Self>> {
        let Target::Groups { optimizer, group: None, hyper } = &self.target else {
            return Ok(vec![self.clone()]);
        };
        let knob = |index| Self::of_groups(optimizer.clone(), Some(index), *hyper);
        Ok((0..optimizer.group_count()?).map(knob).collect())
    }

    /// The current value, read from libtorch; the first group's value for a knob of all groups.
    ///
    /// # Errors
    /// See [`Optimizer`].
    pub fn get(&self) -> Result<f64> {
        match &self.target {
            Target::Groups { optimizer, group, hyper } => {
                optimizer.get_hyper(group.unwrap_or(0), *hyper)
            }
            Target::Custom(custom) => Ok((custom.get)()),
            Target::Missing(text) => Err(Error::invalid(&**text)),
        }
    }

    /// The current value of every group that this knob sets.
    ///
    /// # Errors
    /// See [`Optimizer`].
    pub fn values(&self) -> Result<Vec<f64>> {
        match &self.target {
            Target::Groups { optimizer, group: None, hyper } => (0..optimizer.group_count()?)
                .map(|index| optimizer.get_hyper(index, *hyper))
                .collect(),
            _ => Ok(vec![self.get()?]),
        }
    }

    /// Sets the value, in all groups for a knob of all groups. Costs a lock and a call into C++ for each group.
    ///
    /// # Errors
    /// A value outside PyTorch's bounds for the hyper-parameter, or not finite. See also [`Optimizer`].
    pub fn set(&self, value: f64) -> Result<()> {
        match &self.target {
            Target::Groups { optimizer, group: Some(index), hyper } => {
                optimizer.set_hyper(*index, *hyper, value)
            }
            Target::Groups { optimizer, group: None, hyper } => (0..optimizer.group_count()?)
                .try_for_each(|index| optimizer.set_hyper(index, *hyper, value)),
            Target::Custom(custom) => {
                if !value.is_finite() {
                    return Err(Error::invalid(format!(
                        "{} must be finite, but {value} was given",
                        self.name
                    )));
                }
                (custom.set)(value);
                Ok(())
            }
            Target::Missing(text) => Err(Error::invalid(&**text)),
        }
    }

    /// Sets a schedule's value times the [`Reduction`] of each group. Returns the value that was set, in the first
    /// group for a knob of all groups.
    #[inline]
    pub(crate) fn set_scheduled(&self, value: f64) -> Result<f64> {
        match &self.target {
            Target::Groups { optimizer, group: Some(index), hyper } => {
                let value = value * optimizer.shared.reductions.factor(*index, *hyper);
                optimizer.set_hyper(*index, *hyper, value)?;
                Ok(value)
            }
            Target::Groups { optimizer, group: None, hyper } => {
                let factor = |index| optimizer.shared.reductions.factor(index, *hyper);
                for index in 0..optimizer.group_count()? {
                    optimizer.set_hyper(index, *hyper, value * factor(index))?;
                }
                Ok(value * factor(0))
            }
            Target::Custom(_) => {
                let value = value * self.living_reduction().map_or(1., |reduction| reduction.get());
                self.set(value)?;
                Ok(value)
            }
            Target::Missing(text) => Err(Error::invalid(&**text)),
        }
    }

    /// The reduction of this knob, for a knob of one group or of a value of the user's own.
    pub(crate) fn reduction(&self) -> Reduction {
        match &self.target {
            Target::Groups { optimizer, group, hyper } => {
                optimizer.shared.reductions.of(group.unwrap_or(0), *hyper)
            }
            Target::Custom(custom) => Reduction::alive(&mut locked(&custom.reduction)),
            Target::Missing(_) => Reduction::alive(&mut Weak::new()),
        }
    }

    /// The reduction of this knob, of the first group for a knob of all groups, while a plateau scheduler has one.
    pub(crate) fn living_reduction(&self) -> Option<Reduction> {
        match &self.target {
            Target::Groups { optimizer, group, hyper } => {
                optimizer.shared.reductions.living(group.unwrap_or(0), *hyper)
            }
            Target::Custom(custom) => locked(&custom.reduction).upgrade().map(Reduction),
            Target::Missing(_) => None,
        }
    }

    /// Whether both knobs set the same value of at least one group. Knobs of the user's own values overlap if one is a
    /// clone of the other.
    pub(crate) fn overlaps(&self, other: &Self) -> bool {
        match (&self.target, &other.target) {
            (
                Target::Groups { optimizer, group, hyper },
                Target::Groups { optimizer: others, group: theirs, hyper: which },
            ) => {
                let groups = group.zip(*theirs).is_none_or(|(ours, theirs)| ours == theirs);
                optimizer.is(others) && hyper == which && groups
            }
            (Target::Custom(ours), Target::Custom(theirs)) => Arc::ptr_eq(ours, theirs),
            _ => false,
        }
    }

    /// The error for two schedulers that drive this knob, of which only the last to write would count.
    pub(crate) fn driven_twice(&self, first: &str, second: &str) -> Error {
        let group = self.group().map_or(String::new(), |group| format!(" of group {group}"));
        Error::invalid(format!(
            "schedulers '{first}' and '{second}' both set {}{group}, and only the last to write would count: join the schedules with `first.then(second, events)` or `ChainedScheduler`, give both filtered events, or use ReduceLROnPlateauScheduler, which multiplies",
            self.name
        ))
    }
}

/// Checkpoints hold the values of knobs that belong to no optimizer, because a schedule may set them only later.
impl Knob {
    pub(crate) fn save_value(&self, state: &mut StateDict) -> Result<()> {
        if let Target::Custom(custom) = &self.target {
            state.set_tensor("knob", Tensor::from((custom.get)()));
        }
        Ok(())
    }

    pub(crate) fn load_value(&self, state: &mut StateDict) -> Result<()> {
        if let Target::Custom(_) = &self.target {
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
