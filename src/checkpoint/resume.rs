use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use tch::Tensor;
use tch::nn::VarStore;

use super::format::Contents;
use super::stateful::{check_fixed, load_variables, variables_of};
use super::{StateDict, folder, writer};
use crate::engine::{Engine, Restored};
use crate::{Error, Result};

/// What [`Engine::resume`] found. Displayed, it is a line for each thing worth knowing.
#[derive(Debug)]
#[non_exhaustive]
pub struct Resumed {
    /// The checkpoint.
    pub path: PathBuf,
    /// Epochs and iterations that were done in it.
    pub epoch: u64,
    /// See `epoch`.
    pub iteration: u64,
    /// Newer files that are broken, and why.
    pub skipped: Vec<(PathBuf, String)>,
    /// What changed since, and what was left out.
    pub restored: Restored,
}

impl fmt::Display for Resumed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (path, why) in &self.skipped {
            writeln!(f, "skipped {}: {why}", path.display())?;
        }
        for change in &self.restored.changed {
            writeln!(f, "changed since: {change}")?;
        }
        for ignored in &self.restored.ignored {
            writeln!(f, "ignored: {ignored}")?;
        }
        let Self { path, epoch, iteration, .. } = self;
        write!(f, "resumed {} at iteration {iteration} (epoch {epoch})", path.display())
    }
}

impl<'a, C, B, O> Engine<'a, C, B, O> {
    /// Goes to the newest whole checkpoint in a folder; the next `run` goes on there. `None` where there
    /// is none, nor anything that looks like one: the run starts from the beginning then.
    ///
    /// Attach handlers and track models first, as when it was saved. Reads the file once, models
    /// straight into their memory.
    ///
    /// # Errors
    /// There are checkpoints, but none that is whole; one that does not fit this engine, by the name of
    /// what does not. The engine may hold parts of it then and refuses to run.
    pub fn resume(&mut self, cx: &mut C, folder: impl AsRef<Path>) -> Result<Option<Resumed>> {
        self.resume_with(cx, folder, true)
    }

    /// Like [`resume`](Self::resume); where `strict` is false, what is missing, unknown or does not fit
    /// is left out and told.
    pub fn resume_with(
        &mut self,
        cx: &mut C,
        folder: impl AsRef<Path>,
        strict: bool,
    ) -> Result<Option<Resumed>> {
        let (candidates, mut skipped) = candidates(folder.as_ref());
        for Candidate { path, .. } in candidates {
            let contents = match Contents::open(&path) {
                Ok(contents) => contents,
                Err(why) => {
                    skipped.push((path, why));
                    continue;
                }
            };
            let (epoch, iteration) = contents.progress();
            match self.read(&path, contents, strict)? {
                Ok(state) => {
                    let restored = self.restore(cx, state, strict)?;
                    return Ok(Some(Resumed { path, epoch, iteration, skipped, restored }));
                }
                Err(why) => skipped.push((path, why)),
            }
        }
        if skipped.is_empty() {
            return Ok(None);
        }
        let why: Vec<_> =
            skipped.iter().map(|(path, why)| format!("{}: {why}", path.display())).collect();
        Err(Error::State(format!(
            "no checkpoint in {} is whole ({}); remove them to start anew",
            folder.as_ref().display(),
            why.join("; ")
        )))
    }

    /// Goes to the checkpoint in this file, like [`resume`](Self::resume).
    pub fn load_checkpoint(
        &mut self,
        cx: &mut C,
        path: impl AsRef<Path>,
        strict: bool,
    ) -> Result<Restored> {
        let path = path.as_ref();
        let contents = Contents::open(path).map_err(|why| broken(path, &why))?;
        let state = self.read(path, contents, strict)?.map_err(|why| broken(path, &why))?;
        self.restore(cx, state, strict)
    }

    /// Reads everything, models into their memory; the inner error is that the file is broken.
    fn read(
        &mut self,
        path: &Path,
        contents: Contents,
        strict: bool,
    ) -> Result<Result<StateDict, String>> {
        let mut places = BTreeMap::new();
        for (name, fixed, ours) in self.tracked_states()? {
            let prefix = format!("{name}/");
            let saved: BTreeMap<String, _> = contents
                .layouts()
                .filter_map(|(tensor, layout)| {
                    Some((tensor.strip_prefix(&prefix)?.to_owned(), layout))
                })
                .collect();
            let layout = |name: &str| saved.get(name).map(|l| (l.kind, l.shape.clone()));
            if fixed && let Err(error) = check_fixed(&ours, layout, saved.keys()) {
                if strict {
                    return Err(Error::State(format!("{}: {name}: {error}", path.display())));
                }
                continue;
            }
            places.extend(ours.tensors.into_iter().map(|(name, t)| (prefix.clone() + &name, t)));
        }
        let destroyed = !places.is_empty();
        let state = contents.read(&mut places);
        if state.is_err() && destroyed {
            self.refuse_until_restored();
        }
        Ok(state)
    }
}

struct Candidate {
    path: PathBuf,
    written: u64,
    iteration: u64,
}

/// Files that are checkpoints by their headers, the last written first, and those that should be.
fn candidates(folder: &Path) -> (Vec<Candidate>, Vec<(PathBuf, String)>) {
    let (mut found, mut broken) = (vec![], vec![]);
    let mut names = folder::names(folder);
    names.sort();
    for name in names.iter().filter(|name| !name.starts_with('.') && !folder::is_part(name)) {
        let path = folder.join(name);
        if !path.is_file() {
            continue;
        }
        let looks_like_one = name.ends_with(".safetensors") || name.ends_with(".pt");
        match Contents::open(&path) {
            Ok(contents) if contents.has_state() => {
                let (_, iteration) = contents.progress();
                found.push(Candidate { path, written: contents.written, iteration });
            }
            Ok(_) => {}
            Err(why) if looks_like_one => broken.push((path, why)),
            Err(_) => {}
        }
    }
    // Not by iterations: an older run in the same folder may have had more.
    found.sort_by_key(|c| std::cmp::Reverse((c.written, c.iteration)));
    (found, broken)
}

const NO_CHECKPOINT: &str = "it holds tensors, but is no checkpoint of this crate";

fn broken(path: &Path, why: &str) -> Error {
    Error::State(format!("{}: {why}", path.display()))
}

/// Writes the variables of a store, parameters and buffers, as a plain safetensors file with their
/// names, which are PyTorch's; as safe as a checkpoint is written.
///
/// # Errors
/// A type that safetensors does not have, or the disk's.
pub fn save_weights(vs: &VarStore, path: impl AsRef<Path>) -> Result<()> {
    writer::write(path.as_ref(), &variables_of(&vs.variables_), true)
}

/// Reads the variables of a store from a safetensors file, of this crate or of Python. The store's
/// types and devices stay as they are: what is saved must be of the same types.
///
/// # Errors
/// A file that is broken, names, shapes or types that are not the store's. Nothing is changed then.
pub fn load_weights(vs: &VarStore, path: impl AsRef<Path>) -> Result<()> {
    let path = path.as_ref();
    let state = read_tensors(path)?;
    load_variables(&vs.variables_, &state).map_err(|error| broken(path, &error.to_string()))
}

/// Reads a checkpoint into memory of its own.
///
/// # Errors
/// A file that cannot be read, is broken, or no checkpoint.
pub fn read_state(path: impl AsRef<Path>) -> Result<StateDict> {
    let path = path.as_ref();
    let contents = Contents::open(path).map_err(|why| broken(path, &why))?;
    if !contents.has_state() {
        return Err(broken(path, NO_CHECKPOINT));
    }
    contents.read(&mut BTreeMap::<String, Tensor>::new()).map_err(|why| broken(path, &why))
}

fn read_tensors(path: &Path) -> Result<StateDict> {
    let contents = Contents::open(path).map_err(|why| broken(path, &why))?;
    contents.read(&mut BTreeMap::<String, Tensor>::new()).map_err(|why| broken(path, &why))
}

/// Writes a state as a checkpoint: beside its place, synced, then renamed.
///
/// # Errors
/// What cannot be saved, by name, or the disk's.
pub fn write_state(path: impl AsRef<Path>, state: &StateDict) -> Result<()> {
    writer::write(path.as_ref(), state, false)
}

/// Whether a file is a whole checkpoint, by its checksum: reads it once.
///
/// # Errors
/// Why it is not.
pub fn verify(path: impl AsRef<Path>) -> Result<()> {
    let path = path.as_ref();
    let mut contents = Contents::open(path).map_err(|why| broken(path, &why))?;
    if !contents.has_state() {
        return Err(broken(path, NO_CHECKPOINT));
    }
    contents.verify().map_err(|why| broken(path, &why))
}
