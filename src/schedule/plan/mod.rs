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
use template::{at, read};

/// Schedules, each with the hyper-parameter and the parameter group that it drives, as in a file.
///
/// A file is JSON or TOML. `type` is the class and the other keys are its arguments, as in
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
/// Errors have the path to what is wrong (`schedule[1].cycle_size: …`). Reading a plan refuses unknown keys and
/// classes, wrong types and values, and two entries that drive the same value. Binding it refuses groups and
/// hyper-parameters that the optimizer does not have, a schedule that ends before the run, and one that is
/// [longer](Schedule::length) than the run, unless the entry has `longer = "warn"`.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct SchedulePlan {
    #[serde(rename = "schedule")]
    entries: Vec<PlannedSchedule>,
}

impl SchedulePlan {
    /// Makes a plan in code.
    ///
    /// # Errors
    /// Two entries that drive the same hyper-parameter of the same group, or have the same name.
    pub fn new(entries: impl IntoIterator<Item = PlannedSchedule>) -> Result<Self> {
        let entries: Vec<PlannedSchedule> = entries.into_iter().collect();
        for (index, entry) in entries.iter().enumerate() {
            for (before, other) in entries[..index].iter().enumerate() {
                let (group, others) = (entry.group(), other.group());
                if entry.param() == other.param()
                    && (group == others || group.is_none() || others.is_none())
                {
                    let group =
                        group.or(others).map_or("all groups".into(), |g| format!("group '{g}'"));
                    return Err(at(
                        &place(index),
                        format!(
                            "drives {} of {group}, as {} does already; join them with a Concat",
                            entry.param(),
                            place(before)
                        ),
                    ));
                }
                if entry.name() == other.name() {
                    return Err(at(
                        &format!("{}.name", place(index)),
                        format!("{} is named '{}' too", place(before), other.name()),
                    ));
                }
            }
        }
        Ok(Self { entries })
    }

    /// Reads a file: `.json`, or `.toml` with the feature `toml` (on by default).
    ///
    /// # Errors
    /// A file that cannot be read, another extension, or a plan that [`from_json`](Self::from_json) would refuse.
    pub fn from_path(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let text = std::fs::read_to_string(path)
            .map_err(|source| Error::Io { path: path.to_owned(), source })?;
        let plan = match path.extension().and_then(|extension| extension.to_str()) {
            Some("json") => Self::from_json(&text),
            #[cfg(feature = "toml")]
            Some("toml") => Self::from_toml(&text),
            #[cfg(not(feature = "toml"))]
            Some("toml") => Err(Error::invalid("TOML needs the feature `toml` of tch-ignite")),
            _ => Err(Error::invalid("a plan should be a .json or .toml file")),
        };
        plan.map_err(|error| at(&path.display().to_string(), error))
    }

    /// Reads JSON: `{"schedule": [{"group": "base", "type": "StepLR", …}, …]}`.
    ///
    /// # Errors
    /// Text that is not JSON, unknown keys or classes, wrong types or values, or entries that [`new`](Self::new)
    /// refuses.
    pub fn from_json(text: &str) -> Result<Self> {
        Self::from_value(serde_json::from_str(text).map_err(|error| at("JSON", error))?)
    }

    /// Reads TOML: `[[schedule]]` with the keys of an entry, for each.
    ///
    /// # Errors
    /// Text that is not TOML, and what [`from_json`](Self::from_json) refuses.
    #[cfg(feature = "toml")]
    pub fn from_toml(text: &str) -> Result<Self> {
        let value =
            toml::from_str(text).map_err(|error| Error::invalid(error.to_string().trim()))?;
        Self::from_value(value)
    }

    fn from_value(value: Value) -> Result<Self> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct File {
            schedule: Vec<Map<String, Value>>,
        }
        let file: File = read("", value)?;
        let entries = file.schedule.into_iter().enumerate();
        let entries: Result<Vec<_>> = entries
            .map(|(index, entry)| PlannedSchedule::from_value(&place(index), entry))
            .collect();
        Self::new(entries?)
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

    /// Checks the plan against a run, as [`resolve`](Self::resolve) does, and returns the warnings of
    /// entries with `longer = "warn"`.
    ///
    /// # Errors
    /// The errors of [`resolve`](Self::resolve).
    pub fn check(&self, run: RunLength) -> Result<Vec<String>> {
        Ok(self.checked(run)?.1)
    }

    fn checked(&self, run: RunLength) -> Result<(Vec<AnySchedule>, Vec<String>)> {
        run.validate()?;
        let (mut schedules, mut warnings) = (vec![], vec![]);
        for (index, entry) in self.entries.iter().enumerate() {
            let schedule = entry.resolve(&place(index), run)?;
            warnings.extend(entry.check(&place(index), &schedule, run)?);
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
            entry.simulate_values(&schedule, run).map_err(|error| at(&place(index), error))
        });
        values.collect()
    }

    /// Makes the handlers for an optimizer and a run; attach each to the trainer.
    ///
    /// # Errors
    /// The errors of [`resolve`](Self::resolve), and groups or hyper-parameters that the optimizer does not
    /// have.
    pub fn bind(&self, optimizer: &Optimizer, run: RunLength) -> Result<Vec<ParamScheduler>> {
        self.bind_with(run, |param, group| match group {
            Some(group) => optimizer.group(group)?.knob(param),
            None => optimizer.knob(param),
        })
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
                    let key = match &error {
                        Error::UnknownGroup { .. } => ".group",
                        Error::UnknownHyperParameter { .. } => ".param",
                        _ => "",
                    };
                    at(&(place(index) + key), error)
                })?;
                let schedule: Box<dyn Schedule> = Box::new(schedule);
                Ok(ParamScheduler::new(entry.name(), knob, schedule).on(entry.event()))
            })
            .collect()
    }
}

impl<'de> Deserialize<'de> for SchedulePlan {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        Self::from_value(Value::deserialize(deserializer)?).map_err(de::Error::custom)
    }
}

/// Returns the path of an entry in the file.
fn place(index: usize) -> String {
    format!("schedule[{index}]")
}
