use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize, de};
use serde_json::{Map, Value};
use tch::nn::VarStore;

use super::hyper::Hyper;
use super::{GroupOptions, LowPrecision, Optimizer, is_bias_or_norm, is_matrix};
use crate::bridge::Algorithm;
use crate::error::Result;
use crate::plan_file::{Lines, Place, PlanFile};

/// An optimizer with its groups, as in a file: JSON or TOML. A [`SchedulePlan`](crate::schedule::SchedulePlan) may be in
/// the same file.
///
/// `type` is PyTorch's name of the optimizer, and the other keys are its options, with PyTorch's names and defaults:
///
/// ```
/// # use tch::{Device, nn};
/// use tch_ignite::optim::OptimizerPlan;
///
/// # #[cfg(feature = "toml")] {
/// let plan = OptimizerPlan::from_toml(r#"
///     [optimizer]
///     type = "AdamW"
///     lr = 1e-3
///     betas = [0.9, 0.95]
///     weight_decay = 0.1
///
///     [[optimizer.group]]
///     name = "embedding"
///     prefix = ["embedding.", "position."]
///     frozen = true
///
///     [[optimizer.group]]
///     name = "no decay"
///     bias_or_norm = true
///     weight_decay = 0.0
///
///     [[optimizer.group]]
///     name = "rest"             # a group without a condition takes what is left
/// "#)?;
///
/// let vs = nn::VarStore::new(Device::Cpu);
/// nn::embedding(&vs.root() / "embedding", 50, 8, Default::default());
/// nn::linear(&vs.root() / "fc", 8, 2, Default::default());
/// let optimizer = plan.build(&vs)?;
/// assert_eq!(optimizer.group("no decay")?.parameters()?, ["fc.bias"]);
/// assert_eq!(optimizer.group("rest")?.weight_decay()?, 0.1);
/// # }
/// # Ok::<(), tch_ignite::Error>(())
/// ```
///
/// A parameter is in the first group whose conditions it meets, all of them: `prefix` and `suffix` of its name (one text,
/// or a list of which one fits), `bias_or_norm` ([`is_bias_or_norm`]) and `matrix` ([`is_matrix`]), true or false. Variables
/// that are added to the store after [`build`](Self::build) are no matrices and neither biases nor norms. The other keys of
/// a group are `name`, `frozen` ([`Group::freeze`](super::Group::freeze)), options, and `type` for an algorithm of its own,
/// where the optimizer takes such groups ([`OptimizerBuilder::group`](super::OptimizerBuilder::group)).
///
/// Options that are tuples in PyTorch are lists (`betas`, of which AdEMAMix has three, `etas`, `step_sizes`,
/// `ns_coefficients`, `eps` of Adafactor), or single values under the names of [`Group::get`](super::Group::get).
///
/// `low_precision` of the optimizer or a group is `"master_weights"`, `"kahan_sum"`,
/// `{ stochastic_rounding = { seed = 1 } }` or `"none"` ([`LowPrecision`]).
///
/// Errors have the path to what is wrong, with line and column. Reading a plan refuses unknown keys and optimizers, options
/// that the optimizer does not have, and values outside their bounds; building it, groups without parameters and
/// parameters without a group.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct OptimizerPlan {
    #[serde(rename = "optimizer")]
    written: Map<String, Value>,
    #[serde(skip)]
    algorithm: Algorithm,
    #[serde(skip)]
    options: Vec<(Hyper, f64)>,
    #[serde(skip)]
    low_precision: Option<Option<LowPrecision>>,
    #[serde(skip)]
    groups: Vec<PlannedGroup>,
    #[serde(skip)]
    lines: Lines,
}

/// A group of the file.
#[derive(Debug, Clone, PartialEq)]
struct PlannedGroup {
    members: Members,
    algorithm: Algorithm,
    options: Vec<(Hyper, f64)>,
    low_precision: Option<Option<LowPrecision>>,
}

/// The keys of a group that are no options.
#[derive(Debug, Clone, PartialEq, Deserialize)]
struct Members {
    name: String,
    #[serde(default)]
    prefix: Option<OneOf>,
    #[serde(default)]
    suffix: Option<OneOf>,
    #[serde(default)]
    bias_or_norm: Option<bool>,
    #[serde(default)]
    matrix: Option<bool>,
    #[serde(default)]
    frozen: bool,
    #[serde(default)]
    r#type: Option<String>,
}

const MEMBERS: [&str; 7] = ["name", "prefix", "suffix", "bias_or_norm", "matrix", "frozen", "type"];

/// One text, or several.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(untagged, expecting = "expected a text or a list of texts")]
enum OneOf {
    Text(String),
    Texts(Vec<String>),
}

/// Options that are lists, with the options of their elements. One name may have several lists.
const LISTS: [(&str, &[&str]); 6] = [
    ("betas", &["beta1", "beta2", "beta3"]),
    ("betas", &["beta1", "beta2"]),
    ("etas", &["etaminus", "etaplus"]),
    ("step_sizes", &["step_size_min", "step_size_max"]),
    ("ns_coefficients", &["ns_coefficient_a", "ns_coefficient_b", "ns_coefficient_c"]),
    ("eps", &["eps1", "eps2"]),
];

type Rule = Box<dyn Fn(&str) -> bool + Send + Sync>;

impl OneOf {
    fn any(&self, fits: impl Fn(&str) -> bool) -> bool {
        match self {
            Self::Text(text) => fits(text),
            Self::Texts(texts) => texts.iter().any(|text| fits(text)),
        }
    }
}

impl Members {
    /// Whether all parameters meet the conditions.
    fn takes_all(&self) -> bool {
        let names = self.prefix.is_none() && self.suffix.is_none();
        names && self.bias_or_norm.is_none() && self.matrix.is_none()
    }

    fn rule(&self, vs: &VarStore) -> Rule {
        let Self { prefix, suffix, bias_or_norm, matrix, .. } = self.clone();
        let (flat, two_dimensions) = (is_bias_or_norm(vs), is_matrix(vs));
        Box::new(move |name| {
            prefix.as_ref().is_none_or(|prefix| prefix.any(|text| name.starts_with(text)))
                && suffix.as_ref().is_none_or(|suffix| suffix.any(|text| name.ends_with(text)))
                && bias_or_norm.is_none_or(|wanted| flat(name) == wanted)
                && matrix.is_none_or(|wanted| two_dimensions(name) == wanted)
        })
    }
}

impl OptimizerPlan {
    /// Reads a file: `.json`, or `.toml` with the feature `toml` (on by default).
    ///
    /// # Errors
    /// A file that cannot be read, another extension, or a plan that [`from_json`](Self::from_json) would refuse.
    pub fn from_path(path: impl AsRef<Path>) -> Result<Self> {
        Self::from_file(PlanFile::from_path(path.as_ref())?)
    }

    /// Reads JSON: `{"optimizer": {"type": "SGD", "lr": 0.1, "group": [{"name": "fc", "prefix": "fc", …}, …]}}`.
    ///
    /// # Errors
    /// Text that is not JSON, unknown keys, optimizers or options, wrong types, or values outside their bounds.
    pub fn from_json(text: &str) -> Result<Self> {
        Self::from_file(PlanFile::from_json(text)?)
    }

    /// Reads TOML: `[optimizer]`, and `[[optimizer.group]]` for each group.
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
            optimizer: Map<String, Value>,
            /// The schedules in the same file, which are for a `SchedulePlan`.
            #[serde(default, rename = "schedule")]
            _schedule: de::IgnoredAny,
        }
        let written = lines.root().read::<File>(value)?.optimizer;
        let place = lines.root().key("optimizer");
        let mut rest = written.clone();
        let name = match rest.remove("type") {
            Some(name) => place.key("type").read::<String>(name)?,
            None => {
                return Err(place.error("missing field `type`: PyTorch's name of the optimizer"));
            }
        };
        let algorithm = Algorithm::named(&name).map_err(|error| place.key("type").error(error))?;
        let groups: Vec<Map<String, Value>> = match rest.remove("group") {
            Some(groups) => place.key("group").read(groups)?,
            None => vec![],
        };
        let low_precision = low_precision(&place, &mut rest)?;
        let options = options(&place, algorithm, &rest)?;
        let groups = groups.into_iter().enumerate();
        let groups: Vec<_> = groups
            .map(|(index, group)| {
                PlannedGroup::read(&place.key("group").index(index), algorithm, group)
            })
            .collect::<Result<_>>()?;
        let too_early = groups
            .split_last()
            .and_then(|(_, before)| before.iter().position(|group| group.members.takes_all()));
        if let Some(index) = too_early {
            let name = &groups[index].members.name;
            let text = format!(
                "group '{name}' has no condition, so it takes all parameters that are left: put it last, or give it a prefix or another condition"
            );
            return Err(place.key("group").index(index).error(text));
        }
        Ok(Self { written, algorithm, options, low_precision, groups, lines })
    }

    /// Builds the optimizer over the parameters of a store, which the groups share among them.
    ///
    /// # Errors
    /// The errors of [`OptimizerBuilder::build`](super::OptimizerBuilder::build): a group without parameters, a parameter
    /// in no group.
    pub fn build(&self, vs: &VarStore) -> Result<Optimizer> {
        let place = self.lines.root().key("optimizer");
        let (values, low_precision) = (self.options.clone(), self.low_precision);
        let options = GroupOptions { algorithm: None, values, low_precision };
        let mut builder = Optimizer::of(self.algorithm, vs).options(options);
        let rules: Arc<[Rule]> = self.groups.iter().map(|group| group.members.rule(vs)).collect();
        for (index, group) in self.groups.iter().enumerate() {
            let own = (group.algorithm != self.algorithm).then_some(group.algorithm);
            let (values, low_precision) = (group.options.clone(), group.low_precision);
            let options = GroupOptions { algorithm: own, values, low_precision };
            let rules = rules.clone();
            let is_first =
                move |name: &str| rules.iter().position(|rule| rule(name)) == Some(index);
            builder = builder.group(&*group.members.name, is_first, options);
        }
        let optimizer = builder.build().map_err(|error| place.error(error))?;
        for group in self.groups.iter().filter(|group| group.members.frozen) {
            optimizer.group(&group.members.name)?.freeze()?;
        }
        Ok(optimizer)
    }
}

impl PlannedGroup {
    fn read(place: &Place, of_all: Algorithm, mut group: Map<String, Value>) -> Result<Self> {
        let members = MEMBERS.iter().filter_map(|key| group.remove_entry(*key)).collect();
        let members: Members = place.read(Value::Object(members))?;
        let algorithm = members.r#type.as_deref().map_or(Ok(of_all), Algorithm::named);
        let algorithm = algorithm.map_err(|error| place.key("type").error(error))?;
        let low_precision = low_precision(place, &mut group)?;
        Ok(Self { algorithm, options: options(place, algorithm, &group)?, low_precision, members })
    }
}

/// Takes `low_precision` out of the keys of an optimizer or group.
fn low_precision(
    place: &Place,
    written: &mut Map<String, Value>,
) -> Result<Option<Option<LowPrecision>>> {
    match written.remove("low_precision") {
        None => Ok(None),
        Some(Value::String(none)) if none == "none" => Ok(Some(None)),
        Some(storage) => place.key("low_precision").read(storage).map(|own| Some(Some(own))),
    }
}

/// Reads the options of an optimizer or group.
fn options(
    place: &Place,
    algorithm: Algorithm,
    written: &Map<String, Value>,
) -> Result<Vec<(Hyper, f64)>> {
    let mut options = vec![];
    let mut read = |place: &Place, name: &str, value: &Value| {
        let hyper = algorithm.settable(name).map_err(|error| place.error(error))?;
        let (flag, expected) = match hyper.is_flag() {
            true => (value.as_bool(), "true or false"),
            false => (None, "a number"),
        };
        let number = value.as_f64().or(flag.map(f64::from)).ok_or_else(|| {
            place.error(format!("invalid type: expected {expected}, but given {value}"))
        })?;
        algorithm.check(hyper, number).map_err(|error| place.error(error))?;
        options.push((hyper, number));
        Ok(())
    };
    for (key, value) in written {
        let place = place.key(key);
        // The list counts of which the algorithm has the most options, and the last of equal ones.
        let known =
            |names: &[&str]| names.iter().filter(|name| algorithm.hyper(name).is_ok()).count();
        let lists = LISTS.iter().filter(|(list, _)| list == key).map(|(_, names)| *names);
        let (Value::Array(values), Some(names)) = (value, lists.max_by_key(|names| known(names)))
        else {
            read(&place, key, value)?;
            continue;
        };
        if values.len() != names.len() {
            let count = names.len();
            return Err(
                place.error(format!("expected a list of {count} numbers, but given {value}"))
            );
        }
        for (index, (name, value)) in names.iter().zip(values).enumerate() {
            read(&place.index(index), name, value)?;
        }
    }
    Ok(options)
}

impl<'de> Deserialize<'de> for OptimizerPlan {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        let value = Value::deserialize(deserializer)?;
        Self::from_file(PlanFile::from_value(value)).map_err(de::Error::custom)
    }
}
