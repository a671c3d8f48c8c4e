//! Plans: sets of schedules, and the hyper-parameter that each drives, from files.

mod planned;
mod template;

use std::path::Path;

use serde::{Deserialize, Deserializer, Serialize, de};
use serde_json::{Map, Value};

pub use planned::PlannedSchedule;

use super::{AnySchedule, ParamScheduler, RunLength, Schedule};
use crate::error::{Error, Result};
use crate::optim::{Knob, Optimizer};
use crate::plan_file::{Lines, Place, PlanFile};

/// Schedules, each with the hyper-parameter and the parameter group that it drives, as in a file.
///
/// A file is JSON or TOML, and may also have the optimizer, for an [`OptimizerPlan`](crate::optim::OptimizerPlan). `type` is
/// the class and the other keys are its arguments, as in
/// [`AnySchedule`]:
///
/// ```
/// # use tch::{Device, nn};
/// # use tch_ignite::engine::Engine;
/// # use tch_ignite::optim::{Optimizer, lr};
/// use tch_ignite::schedule::{RunLength, SchedulePlan};
///
/// # #[cfg(feature = "toml")] {
/// let plan = SchedulePlan::from_toml(r#"
///     [[schedule]]
///     group = "base"            # all groups where it is not given
///     param = "lr"              # "lr" where it is not given
///     event = "iteration"       # or "update", "epoch"; "iteration" where it is not given
///     type = "LinearCyclical"
///     start_value = 1e-3
///     end_value = 1e-4
///     cycle_size = "1ep"        # a number of events, or as below
///
///     [[schedule]]
///     name = "fc"               # "lr (fc)" where it is not given
///     group = "fc"
///     longer = "warn"           # "refuse" where it is not given
///     type = "CosineAnnealing"
///     start_value = 1e-2
///     end_value = 0.0
///     cycle_size = "1run"
/// "#)?;
///
/// # let vs = nn::VarStore::new(Device::Cpu);
/// # nn::linear(&vs.root() / "base", 1, 1, Default::default());
/// # nn::linear(&vs.root() / "fc", 1, 1, Default::default());
/// # let optimizer = Optimizer::sgd(&vs)
/// #     .group("base", |name| name.starts_with("base"), lr(1e-3))
/// #     .group("fc", |name| name.starts_with("fc"), lr(1e-2))
/// #     .build()?;
/// # let mut trainer = Engine::new(|_: &mut (), _, _: ()| Ok(()));
/// let run = RunLength::new(938, 8); // iterations in an epoch, epochs
/// for scheduler in plan.bind(&optimizer, run)? {
///     trainer.attach(scheduler);
/// }
/// # }
/// # Ok::<(), tch_ignite::Error>(())
/// ```
///
/// Lengths are whole numbers of events, or strings: `"2ep"` epochs, `"500it"` iterations, `"100up"` updates,
/// `"0.3run"` or `"30%"` of the run, or several with `+` and `-` between (`"1run - 500it"`). They become numbers,
/// rounded down, when the run is known.
///
/// Errors have the path to what is wrong, and the line (`schedule[1].cycle_size: … (line 7, column 14)`). Reading a plan
/// refuses unknown keys and classes, wrong types and values, and two entries that drive the same value. Binding it refuses
/// groups and hyper-parameters that the optimizer does not have, values that a hyper-parameter cannot have, a schedule that
/// ends before the run, and one that is [longer](Schedule::length) than the run, unless the entry has `longer = "warn"`.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct SchedulePlan {
    #[serde(rename = "schedule")]
    entries: Vec<PlannedSchedule>,
    #[serde(skip)]
    lines: Lines,
}

impl SchedulePlan {
    /// Makes a plan in code.
    ///
    /// # Errors
    /// Two entries that drive the same hyper-parameter of the same group, or have the same name.
    pub fn new(entries: impl IntoIterator<Item = PlannedSchedule>) -> Result<Self> {
        Self::of(entries.into_iter().collect(), Lines::default())
    }

    fn of(entries: Vec<PlannedSchedule>, lines: Lines) -> Result<Self> {
        let plan = Self { entries, lines };
        for (index, entry) in plan.entries.iter().enumerate() {
            for (before, other) in plan.entries[..index].iter().enumerate() {
                let (group, others) = (entry.group(), other.group());
                let (place, before) = (plan.place(index), plan.place(before));
                if entry.param() == other.param()
                    && (group == others || group.is_none() || others.is_none())
                {
                    let group =
                        group.or(others).map_or("all groups".into(), |g| format!("group '{g}'"));
                    return Err(place.error(format!(
                        "drives {} of {group}, as {} does already; join them with a Concat",
                        entry.param(),
                        before.path()
                    )));
                }
                if entry.name() == other.name() {
                    let text = format!("{} is named '{}' too", before.path(), other.name());
                    return Err(place.key("name").error(text));
                }
            }
        }
        Ok(plan)
    }

    /// Reads a file: `.json`, or `.toml` with the feature `toml` (on by default).
    ///
    /// # Errors
    /// A file that cannot be read, another extension, or a plan that [`from_json`](Self::from_json) would refuse.
    pub fn from_path(path: impl AsRef<Path>) -> Result<Self> {
        Self::from_file(PlanFile::from_path(path.as_ref())?)
    }

    /// Reads JSON: `{"schedule": [{"group": "base", "type": "StepLR", …}, …]}`.
    ///
    /// # Errors
    /// Text that is not JSON, unknown keys or classes, wrong types or values, or entries that [`new`](Self::new)
    /// refuses.
    pub fn from_json(text: &str) -> Result<Self> {
        Self::from_file(PlanFile::from_json(text)?)
    }

    /// Reads TOML: `[[schedule]]` with the keys of an entry, for each.
    ///
    /// # Errors
    /// Text that is not TOML, and what [`from_json`](Self::from_json) refuses.
    #[cfg(feature = "toml")]
    pub fn from_toml(text: &str) -> Result<Self> {
        Self::from_file(PlanFile::from_toml(text)?)
    }

    fn from_file(PlanFile { value, lines }: PlanFile) -> Result<Self> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct File {
            schedule: Option<Vec<Map<String, Value>>>,
            /// The optimizer in the same file, which is for an `OptimizerPlan`.
            optimizer: Option<de::IgnoredAny>,
        }
        let file: File = lines.root().read(value)?;
        let written = match (file.schedule, file.optimizer) {
            (Some(written), _) => written,
            (None, Some(_)) => vec![],
            (None, None) => return Err(lines.root().error("missing field `schedule`")),
        };
        let place = lines.root().key("schedule");
        let entries = written.into_iter().enumerate();
        let entries: Result<Vec<_>> = entries
            .map(|(index, entry)| PlannedSchedule::from_value(&place.index(index), entry))
            .collect();
        Self::of(entries?, lines)
    }

    /// The place of an entry in the file.
    fn place(&self, index: usize) -> Place<'_> {
        self.lines.root().key("schedule").index(index)
    }

    /// Writes JSON that [`from_json`](Self::from_json) reads.
    ///
    /// # Errors
    /// A plan that cannot be written as JSON.
    pub fn to_json(&self) -> Result<String> {
        serde_json::to_string_pretty(self)
            .map_err(|error| Error::invalid(format!("the plan cannot be JSON: {error}")))
    }

    /// Writes TOML that [`from_toml`](Self::from_toml) reads.
    ///
    /// # Errors
    /// A plan that cannot be written as TOML.
    #[cfg(feature = "toml")]
    pub fn to_toml(&self) -> Result<String> {
        toml::to_string(self)
            .map_err(|error| Error::invalid(format!("the plan cannot be TOML: {error}")))
    }

    /// Cuts off schedules that are longer than the run, with a warning, instead of refusing them.
    pub fn allow_longer(mut self) -> Self {
        self.entries = self.entries.into_iter().map(PlannedSchedule::allow_longer).collect();
        self
    }

    /// Returns the entries, in the order of the file.
    pub fn entries(&self) -> &[PlannedSchedule] {
        &self.entries
    }

    /// Makes the schedules for a run, in the order of [`entries`](Self::entries). Where something about the run is
    /// not known, checks that depend on it are left out.
    ///
    /// # Errors
    /// A length that cannot be turned into events, a value that is impossible in this run, or a schedule
    /// that ends before the run or is longer.
    pub fn resolve(&self, run: RunLength) -> Result<Vec<AnySchedule>> {
        Ok(self.checked(run)?.0)
    }

    /// Checks the plan against a run, as [`resolve`](Self::resolve) does, and each value against the bounds of the
    /// hyper-parameter of that name (a learning rate is not negative), and returns the warnings of entries with `longer =
    /// "warn"`. Computes the values of all events, up to ten million.
    ///
    /// # Errors
    /// The errors of [`resolve`](Self::resolve), and a value outside its bounds.
    pub fn check(&self, run: RunLength) -> Result<Vec<String>> {
        let (schedules, warnings) = self.checked(run)?;
        self.check_bounds(&schedules, run)?;
        Ok(warnings)
    }

    fn check_bounds(&self, schedules: &[AnySchedule], run: RunLength) -> Result<()> {
        let mut entries = self.entries.iter().zip(schedules).enumerate();
        entries.try_for_each(|(index, (entry, schedule))| {
            entry.check_bounds(&self.place(index), schedule, run)
        })
    }

    fn checked(&self, run: RunLength) -> Result<(Vec<AnySchedule>, Vec<String>)> {
        run.validate()?;
        let (mut schedules, mut warnings) = (vec![], vec![]);
        for (index, entry) in self.entries.iter().enumerate() {
            let place = self.place(index);
            let schedule = entry.resolve(&place, run)?;
            warnings.extend(entry.check(&place, &schedule, run)?);
            schedules.push(schedule);
        }
        Ok((schedules, warnings))
    }

    /// Returns the values of each entry over a run with their iterations, counted from 1 as in a history, without
    /// any training. Entries that count epochs, or updates of several batches, have two values for each, at its
    /// first and its last iteration.
    ///
    /// # Errors
    /// The errors of [`resolve`](Self::resolve), and a run whose length is not known.
    pub fn simulate_values(&self, run: RunLength) -> Result<Vec<Vec<(u64, f64)>>> {
        let entries = self.entries.iter().zip(self.resolve(run)?).enumerate();
        let values = entries.map(|(index, (entry, schedule))| {
            entry.simulate_values(&schedule, run).map_err(|error| self.place(index).error(error))
        });
        values.collect()
    }

    /// Makes the handlers for an optimizer and a run; attach each to the trainer.
    ///
    /// # Errors
    /// The errors of [`check`](Self::check), and groups or hyper-parameters that the optimizer does not have.
    pub fn bind(&self, optimizer: &Optimizer, run: RunLength) -> Result<Vec<ParamScheduler>> {
        let bound = self.bind_with(run, |param, group| match group {
            Some(group) => optimizer.group(group)?.knob(param),
            None => optimizer.knob(param),
        })?;
        self.check_bounds(&self.resolve(run)?, run)?;
        Ok(bound)
    }

    /// Makes handlers as [`bind`](Self::bind) does, but `knob(param, group)` finds the knob that an entry drives:
    /// in one of several optimizers, or a knob of your own.
    ///
    /// # Errors
    /// The errors of [`resolve`](Self::resolve) and of `knob`.
    pub fn bind_with(
        &self,
        run: RunLength,
        knob: impl Fn(&str, Option<&str>) -> Result<Knob>,
    ) -> Result<Vec<ParamScheduler>> {
        let schedules = self.resolve(run)?;
        let bound = self.entries.iter().zip(schedules).enumerate();
        bound
            .map(|(index, (entry, schedule))| {
                let knob = knob(entry.param(), entry.group()).map_err(|error| {
                    let place = self.place(index);
                    match &error {
                        Error::UnknownGroup { .. } => place.key("group").error(error),
                        Error::UnknownHyperParameter { .. } => place.key("param").error(error),
                        _ => place.error(error),
                    }
                })?;
                let schedule: Box<dyn Schedule> = Box::new(schedule);
                Ok(ParamScheduler::new(entry.name(), knob, schedule).on(entry.event()))
            })
            .collect()
    }
}

impl<'de> Deserialize<'de> for SchedulePlan {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        let value = Value::deserialize(deserializer)?;
        Self::from_file(PlanFile::from_value(value)).map_err(de::Error::custom)
    }
}
