//! The description of an exported model: `manifest.json`.

use std::collections::{BTreeMap, HashSet};
use std::path::Path;

use serde::Deserialize;
use tch::Kind;

use super::processor;
use crate::bridge::{Role, libtorch_version};
use crate::error::{Error, Result};
use crate::pytorch::DType;

/// The form of the folder that this release reads.
const FORMAT: u64 = 1;
/// No manifest of a real model is as long.
const MAX_LENGTH: u64 = 100_000_000;
/// The largest number of a group: a store has room for all groups below it.
const MAX_GROUP: usize = 1 << 16;

#[derive(Deserialize, Clone, Copy, PartialEq, Eq, Debug)]
#[serde(rename_all = "lowercase")]
pub(super) enum Mode {
    Train,
    Eval,
}

/// A tensor of a batch.
#[derive(Deserialize)]
pub(super) struct OfBatch {
    pub(super) name: String,
    /// The sizes; `None` is that of the batch.
    pub(super) shape: Vec<Option<i64>>,
    #[serde(deserialize_with = "kind")]
    pub(super) dtype: Kind,
}

#[derive(Deserialize, Clone, Copy)]
#[serde(rename_all = "lowercase")]
pub(super) enum Gradient {
    /// The step returns it.
    Given,
    /// The parameter was frozen when the model was exported.
    Frozen,
    /// The loss does not depend on the parameter.
    Unused,
}

#[derive(Deserialize)]
pub(super) struct Parameter {
    pub(super) name: String,
    pub(super) shape: Vec<i64>,
    #[serde(deserialize_with = "kind")]
    pub(super) dtype: Kind,
    pub(super) gradient: Gradient,
    /// The number of its group; that of the path unless given.
    pub(super) group: Option<usize>,
}

#[derive(Deserialize)]
pub(super) struct Buffer {
    pub(super) name: String,
    pub(super) shape: Vec<i64>,
    #[serde(deserialize_with = "kind")]
    pub(super) dtype: Kind,
    pub(super) updated: bool,
}

/// A package, and the smallest and largest batch that it is for.
#[derive(Deserialize)]
pub(super) struct Program {
    pub(super) mode: Mode,
    pub(super) file: String,
    pub(super) batch: (i64, i64),
    /// The length of the file in bytes and its CRC-32, which tell it from the file of another export: its code trusts the
    /// sizes that the manifest describes.
    pub(super) length: u64,
    pub(super) crc32: u32,
}

#[derive(Deserialize)]
pub(super) struct Manifest {
    torch: String,
    pub(super) device: String,
    machine: String,
    instructions: Vec<String>,
    pub(super) inputs: Vec<OfBatch>,
    pub(super) targets: Vec<OfBatch>,
    pub(super) parameters: Vec<Parameter>,
    pub(super) buffers: Vec<Buffer>,
    /// Further names of parameters and buffers, and the names that they have above.
    pub(super) tied: BTreeMap<String, String>,
    /// The names of the outputs.
    pub(super) outputs: Vec<String>,
    pub(super) train_outputs: bool,
    pub(super) programs: Vec<Program>,
}

fn kind<'de, D: serde::Deserializer<'de>>(from: D) -> std::result::Result<Kind, D::Error> {
    let name = String::deserialize(from)?;
    let kind = DType::named(&format!("torch.{name}")).and_then(DType::kind);
    kind.ok_or_else(|| serde::de::Error::custom(format!("tch has no type {name}")))
}

impl Manifest {
    /// Reads the description of a folder, and refuses what cannot run here.
    pub(super) fn read(folder: &Path) -> Result<Self> {
        let path = folder.join("manifest.json");
        let io = |source| Error::Io { path: path.clone(), source };
        let failed = |why: String| Error::State(format!("{}: {why}", path.display()));
        if !path.exists() {
            return Err(failed(
                "there is no such file. Give the folder that scripts/export_step.py wrote".into(),
            ));
        }
        if std::fs::metadata(&path).map_err(io)?.len() > MAX_LENGTH {
            return Err(failed(
                "it is too long for a manifest: give the folder that scripts/export_step.py wrote"
                    .into(),
            ));
        }
        Self::parse(&std::fs::read(&path).map_err(io)?).map_err(failed)
    }

    fn parse(text: &[u8]) -> std::result::Result<Self, String> {
        #[derive(Deserialize)]
        struct Format {
            format: u64,
        }
        let error = |error: serde_json::Error| error.to_string();
        let Format { format } = serde_json::from_slice(text).map_err(error)?;
        if format != FORMAT {
            return Err(format!(
                "it has format {format}, and this release reads {FORMAT}. Export the model anew with the script of this release"
            ));
        }
        let manifest: Self = serde_json::from_slice(text).map_err(error)?;
        manifest.check()?;
        Ok(manifest)
    }

    fn check(&self) -> std::result::Result<(), String> {
        let release = |version: &str| version.split('.').take(2).collect::<Vec<_>>().join(".");
        let here = libtorch_version();
        if release(&self.torch) != release(here) {
            return Err(format!(
                "the model was exported with torch {}, and this program has libtorch {here}. Export it anew with torch {here}",
                self.torch
            ));
        }
        if let Some(why) = processor::refusal(&self.machine, &self.instructions) {
            return Err(format!(
                "{why}. Export it anew on such a machine, or with `processor` set to \"baseline\""
            ));
        }
        let mut names = HashSet::new();
        let all = self.parameters.iter().map(|parameter| &parameter.name);
        for name in
            all.chain(self.buffers.iter().map(|buffer| &buffer.name)).chain(self.tied.keys())
        {
            if !names.insert(name) {
                return Err(format!("two tensors have the name '{name}'"));
            }
        }
        if let Some((name, kept)) = self.tied.iter().find(|(_, kept)| !names.contains(kept)) {
            return Err(format!("'{name}' is tied to '{kept}', which is not there"));
        }
        for Parameter { name, dtype, gradient, group, .. } in &self.parameters {
            let is_float =
                matches!(dtype, Kind::Half | Kind::BFloat16 | Kind::Float | Kind::Double)
                    || matches!(dtype, Kind::ComplexFloat | Kind::ComplexDouble);
            if !is_float && !matches!(gradient, Gradient::Frozen) {
                return Err(format!(
                    "the parameter '{name}' of type {dtype:?} can have no gradient"
                ));
            }
            if let Some(group) = group.filter(|group| *group > MAX_GROUP) {
                return Err(format!("'{name}' is in group {group}, beyond {MAX_GROUP}"));
            }
        }
        for program in &self.programs {
            let name = Path::new(&program.file);
            if name.file_name().is_none_or(|name| name != program.file.as_str()) {
                return Err(format!("the program {:?} lies elsewhere", program.file));
            }
        }
        let is_there = |mode| self.programs.iter().any(|program| program.mode == mode);
        if !is_there(Mode::Train) {
            return Err("it has no training step. Export it anew".into());
        }
        match self.inputs.is_empty() {
            true => Err("it has no inputs. Export it anew".into()),
            false => Ok(()),
        }
    }

    /// The parts that parameters and buffers have in a step, in the order in which programs get them.
    pub(super) fn roles(&self) -> Vec<Role> {
        let parameters = self.parameters.iter().map(|parameter| match parameter.gradient {
            Gradient::Given => Role::Trained,
            Gradient::Frozen => Role::Frozen,
            Gradient::Unused => Role::Unused,
        });
        let buffers = self.buffers.iter().map(|buffer| match buffer.updated {
            true => Role::Updated,
            false => Role::Buffer,
        });
        parameters.chain(buffers).collect()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn manifest() -> Value {
        json!({
            "format": 1,
            "torch": libtorch_version(),
            "device": "cpu",
            "machine": std::env::consts::ARCH,
            "instructions": [],
            "inputs": [{"name": "input 0", "shape": [null, 8], "dtype": "float32"}],
            "targets": [],
            "parameters": [{"name": "w", "shape": [8], "dtype": "float32", "gradient": "given", "group": 0}],
            "buffers": [{"name": "mean", "shape": [8], "dtype": "float64", "updated": true}],
            "tied": {"v": "w"},
            "outputs": [""],
            "train_outputs": false,
            "programs": [{"mode": "train", "file": "train.pt2", "batch": [2, 9], "length": 1, "crc32": 7}],
        })
    }

    #[test]
    fn what_cannot_run_here_is_refused_with_what_to_do() {
        let read = |manifest: &Value| Manifest::parse(manifest.to_string().as_bytes());
        let whole = read(&manifest()).map_err(|error| panic!("{error}")).unwrap();
        assert_eq!(whole.roles(), [Role::Trained, Role::Updated]);
        for (key, value, expected) in [
            ("format", json!(2), "Export the model anew with the script of this release"),
            ("torch", json!("1.9.0"), "exported with torch 1.9.0"),
            ("machine", json!("s390x"), "compiled for s390x"),
            ("instructions", json!(["mmx17"]), "\"baseline\""),
            ("tied", json!({"v": "u"}), "'v' is tied to 'u'"),
            ("tied", json!({"w": "w"}), "two tensors have the name 'w'"),
            ("programs", json!([]), "no training step"),
            (
                "programs",
                json!([{"mode": "train", "file": "../x.pt2", "batch": [2, 9], "length": 1, "crc32": 7}]),
                "lies elsewhere",
            ),
            (
                "programs",
                json!([{"mode": "train", "file": "train.pt2", "batch": [2, 9]}]),
                "missing field `length`",
            ),
            (
                "parameters",
                json!([{"name": "w", "shape": [8], "dtype": "int64", "gradient": "given"}]),
                "'w' of type Int64 can have no gradient",
            ),
            (
                "parameters",
                json!([{"name": "w", "shape": [8], "dtype": "int64", "gradient": "unused"}]),
                "can have no gradient",
            ),
            (
                "parameters",
                json!([{"name": "w", "shape": [8], "dtype": "float32", "gradient": "given", "group": 1e6 as u64}]),
                "in group 1000000, beyond",
            ),
            ("inputs", json!([]), "no inputs"),
            (
                "inputs",
                json!([{"name": "x", "shape": [1], "dtype": "float31"}]),
                "tch has no type float31",
            ),
            ("buffers", json!(3), "invalid type"),
        ] {
            let mut changed = manifest();
            changed[key] = value;
            let error = read(&changed).err().unwrap();
            assert!(error.contains(expected), "{key}: {error}");
        }
    }
}
