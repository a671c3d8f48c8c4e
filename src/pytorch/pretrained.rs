//! Folders of Hugging Face: weights in one file or in shards, with an index.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tch::nn::VarStore;

use super::distributed_checkpoint;
use super::names::Names;
use super::safetensors;
use super::tensor::StoredTensor;
use super::weights::Weights;
use crate::error::{Error, Result};
use crate::fs::write_atomically;

/// The files that a folder may have, and the indices of shards; those of pickles are of older programs.
const FILES: [&str; 2] = ["model.safetensors", "pytorch_model.bin"];
const INDEX: &str = ".index.json";
/// No index of a real model is as long.
const MAX_INDEX: u64 = 100_000_000;

#[derive(Serialize, Deserialize)]
struct Index {
    #[serde(default)]
    metadata: serde_json::Value,
    weight_map: BTreeMap<String, String>,
}

/// Reads the weights of a Hugging Face folder: `model.safetensors`, or its shards and their index; in older folders
/// `pytorch_model.bin` and its shards. A `.safetensors` file by itself will do, too. Elements are read when they are asked for,
/// straight into the store's memory, as those of `.pt` files.
///
/// A folder of torch's distributed checkpoints in this form (`HuggingFaceStorageWriter`, also with
/// `save_distributed=True`) is read, too; tensors that ranks have parts of are put together at once. How many ranks there
/// were is told nowhere, so where the last ones' files are missing, tensors are shorter, and loading them says that they
/// are of another shape. torch's `HuggingFaceStorageReader` reads what [`SavePretrained`] writes, for any number of ranks.
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let folder = folder.path();
/// use tch::{Device, nn};
/// use tch_ignite::pytorch::{self, Names, SavePretrained};
/// let vs = nn::VarStore::new(Device::Cpu);
/// let fc = nn::linear(vs.root() / "fc", 2, 3, Default::default());
/// // For Python: AutoModel.from_pretrained(folder)
/// SavePretrained::new().names(Names::new().add_prefix("net.")).save(&vs, folder)?;
/// // Of Python: model.save_pretrained(folder)
/// let weights = pytorch::read_pretrained(folder)?;
/// println!("{}", weights.rename(&Names::new().strip_prefix("net."))?.load(&vs)?);
/// # Ok::<(), anyhow::Error>(())
/// ```
///
/// # Errors
/// There are no weights in the folder; a file of the index is missing, lies elsewhere, or lacks a tensor; the files of
/// ranks lack a part of a tensor; damaged files.
pub fn read_pretrained(path: impl AsRef<Path>) -> Result<Weights> {
    let path = path.as_ref();
    if path.is_file() {
        return Ok(Weights::new(safetensors::read(path)?, vec![]));
    }
    for file in FILES {
        let (whole, index) = (path.join(file), path.join(format!("{file}{INDEX}")));
        if whole.is_file() {
            return Ok(Weights::new(tensors_of(&whole)?, vec![]));
        }
        if index.is_file() {
            return sharded(path, &index);
        }
    }
    let mut parts = names_in(path)?;
    parts.retain(|name| name.ends_with(".safetensors"));
    if !parts.is_empty() {
        return Ok(Weights::new(distributed_checkpoint::read(path, &parts)?, vec![]));
    }
    Err(Error::State(format!(
        "{}: there is no {} and no index of shards in it",
        path.display(),
        FILES.join(" or ")
    )))
}

fn tensors_of(file: &Path) -> Result<Vec<(String, Arc<StoredTensor>)>> {
    match file.extension().is_some_and(|extension| extension == "safetensors") {
        true => safetensors::read(file),
        false => Weights::read(file).map(Weights::into_tensors),
    }
}

fn sharded(folder: &Path, path: &Path) -> Result<Weights> {
    let io = |source| Error::Io { path: path.to_owned(), source };
    let failed = |why: String| Error::State(format!("{}: {why}", path.display()));
    if fs::metadata(path).map_err(io)?.len() > MAX_INDEX {
        return Err(failed("it is too long for an index".into()));
    }
    let text = fs::read(path).map_err(io)?;
    let index: Index = serde_json::from_slice(&text).map_err(|error| failed(error.to_string()))?;
    let mut shards: BTreeMap<&str, HashMap<String, Arc<StoredTensor>>> = BTreeMap::new();
    for file in index.weight_map.values() {
        let name = Path::new(file);
        let is_beside = name.file_name().is_some_and(|name| name == file.as_str());
        if !is_beside || file.contains('\\') {
            return Err(failed(format!("the shard {file:?} lies elsewhere")));
        }
        if !shards.contains_key(file.as_str()) {
            shards.insert(file, tensors_of(&folder.join(file))?.into_iter().collect());
        }
    }
    let mut tensors = Vec::with_capacity(index.weight_map.len());
    for (name, file) in &index.weight_map {
        let tensor = shards.get(file.as_str()).and_then(|shard| shard.get(name));
        let tensor = tensor.ok_or_else(|| failed(format!("'{name}' is not in {file}")))?;
        tensors.push((name.clone(), tensor.clone()));
    }
    Ok(Weights::new(tensors, vec![]))
}

/// Writes a Hugging Face folder, for `from_pretrained`.
#[derive(Clone, Debug)]
pub struct SavePretrained {
    max_shard: u64,
    names: Names,
    like: Option<PathBuf>,
}

impl Default for SavePretrained {
    fn default() -> Self {
        Self { max_shard: 5_000_000_000, names: Names::new(), like: None }
    }
}

impl SavePretrained {
    /// Writes one file, or shards of at most 5 GB.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets how many bytes of tensors a file has at most, 5,000,000,000 unless given. A larger tensor has a file of its
    /// own.
    pub fn max_shard_size(mut self, bytes: u64) -> Self {
        self.max_shard = bytes;
        self
    }

    /// Gives the tensors the names that they have in Python.
    pub fn names(mut self, names: Names) -> Self {
        self.names = names;
        self
    }

    /// Copies all else from the folder that the model came from: `config.json`, the tokenizer's files and the other
    /// JSON and text files beside the weights.
    pub fn like(mut self, folder: impl Into<PathBuf>) -> Self {
        self.like = Some(folder.into());
        self
    }

    /// Writes the variables of a store into a folder, which is made. Weights that are there already are replaced, and
    /// shards that no longer belong to them removed at the end; all other files stay, such as `config.json`. Each file is
    /// there whole or not at all.
    ///
    /// Tensors that have several names are written under each: libraries differ in which of them they look for.
    ///
    /// # Errors
    /// Types that safetensors does not have, names that clash, the disk's.
    pub fn save(&self, vs: &VarStore, folder: impl AsRef<Path>) -> Result<()> {
        self.save_weights(&Weights::of_store(vs)?, folder)
    }

    /// Writes weights that were read from elsewhere.
    ///
    /// # Errors
    /// The errors of [`save`](Self::save).
    pub fn save_weights(&self, weights: &Weights, folder: impl AsRef<Path>) -> Result<()> {
        let folder = folder.as_ref();
        let weights = weights.clone().rename(&self.names)?;
        let shards = self.shards(&weights);
        let file = |index: usize| match shards.len() {
            1 => FILES[0].to_owned(),
            count => format!("model-{:05}-of-{count:05}.safetensors", index + 1),
        };
        let mut written = vec![];
        let mut weight_map = BTreeMap::new();
        for (index, shard) in shards.iter().enumerate() {
            let file = file(index);
            safetensors::write(&folder.join(&file), shard)?;
            weight_map.extend(shard.iter().map(|(name, _)| ((*name).to_owned(), file.clone())));
            written.push(file);
        }
        if shards.len() > 1 {
            let size: u64 = weights.iter().map(|(_, tensor)| safetensors::length(tensor)).sum();
            let index = Index { metadata: serde_json::json!({ "total_size": size }), weight_map };
            let text = serde_json::to_vec_pretty(&index)
                .map_err(|error| Error::State(error.to_string()))?;
            let file = format!("{}{INDEX}", FILES[0]);
            write_atomically(&folder.join(&file), |to| std::io::Write::write_all(to, &text))?;
            written.push(file);
        }
        if let Some(like) = &self.like {
            copy_rest(like, folder)?;
        }
        for name in names_in(folder)?.iter().filter(|name| is_weights(name)) {
            if !written.contains(name) {
                let path = folder.join(name);
                fs::remove_file(&path).map_err(|source| Error::Io { path, source })?;
            }
        }
        Ok(())
    }

    /// The tensors in their order, as many in each file as it may hold.
    fn shards<'w>(&self, weights: &'w Weights) -> Vec<Vec<(&'w str, &'w StoredTensor)>> {
        let (mut shards, mut size) = (vec![vec![]], 0u64);
        for (name, tensor) in weights.iter() {
            let length = safetensors::length(tensor);
            if size.saturating_add(length) > self.max_shard && size > 0 {
                shards.push(vec![]);
                size = 0;
            }
            size = size.saturating_add(length);
            if let Some(shard) = shards.last_mut() {
                shard.push((name, tensor));
            }
        }
        shards
    }
}

fn names_in(folder: &Path) -> Result<Vec<String>> {
    let io = |source| Error::Io { path: folder.to_owned(), source };
    let mut names = vec![];
    for entry in fs::read_dir(folder).map_err(io)? {
        let entry = entry.map_err(io)?;
        if entry.file_type().map_err(io)?.is_file() {
            names.push(entry.file_name().to_string_lossy().into_owned());
        }
    }
    Ok(names)
}

/// Whether it is one of the files that [`read_pretrained`] looks at.
fn is_weights(name: &str) -> bool {
    FILES.iter().any(|file| {
        let (stem, extension) = file.rsplit_once('.').unwrap_or((file, ""));
        let is_shard = name.strip_prefix(stem).and_then(|rest| {
            let (number, count) = rest
                .strip_prefix('-')?
                .strip_suffix(extension)?
                .strip_suffix('.')?
                .split_once("-of-")?;
            let is_number =
                |text: &str| text.len() == 5 && text.bytes().all(|b| b.is_ascii_digit());
            Some(is_number(number) && is_number(count))
        });
        name == *file || name == format!("{file}{INDEX}") || is_shard == Some(true)
    })
}

/// Copies what describes a model beside its weights.
fn copy_rest(from: &Path, to: &Path) -> Result<()> {
    if fs::canonicalize(from).ok() == fs::canonicalize(to).ok() {
        return Ok(());
    }
    for name in names_in(from)? {
        let is_rest = [".json", ".txt", ".model", ".jinja"].iter().any(|end| name.ends_with(end));
        if is_rest && !is_weights(&name) {
            let path = from.join(&name);
            fs::copy(&path, to.join(&name)).map_err(|source| Error::Io { path, source })?;
        }
    }
    Ok(())
}
