use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use tch::Tensor;
use tch::nn::VarStore;

use super::format::{Contents, Stamp};
use super::stateful::{check_fixed, load_variables, variables_of};
use super::{StateDict, folder, writer};
use crate::engine::{Engine, HANDLERS, Restored};
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
    /// Newer files that are broken or do not belong here, and why.
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
        if let Some(ended) = &self.restored.ended {
            writeln!(f, "ended: {ended}")?;
        }
        let Self { path, epoch, iteration, .. } = self;
        write!(f, "resumed {} at iteration {iteration} (epoch {epoch})", path.display())
    }
}

impl<'a, C, B, O> Engine<'a, C, B, O> {
    /// Goes to the newest whole checkpoint in a folder; the next `run` goes on there. `None` where there
    /// is none, nor anything that looks like one: the run starts from the beginning then.
    ///
    /// Files of engines that ran within others (evaluators) are passed over; those that have other parts
    /// than this engine too, and told, where an older one fits. What changed in the data since is told by
    /// the summary of the next run, which has it.
    ///
    /// Attach handlers and track models first, as when it was saved. Reads the file once, models
    /// straight into their memory.
    ///
    /// # Errors
    /// The folder cannot be read; there are checkpoints, but none that is whole; one that does not fit this engine, by the name of
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
        let Found { candidates, broken: mut skipped } = self.find(folder.as_ref())?;
        let some_fit = candidates.iter().any(|candidate| candidate.misfit.is_none());
        for Candidate { path, epoch, iteration, misfit, .. } in candidates {
            if let Some(misfit) = misfit.filter(|_| strict && some_fit) {
                skipped.push((path, format!("it is of another program: {misfit}")));
                continue;
            }
            let contents = match Contents::open(&path) {
                Ok(contents) => contents,
                Err(why) => {
                    skipped.push((path, why));
                    continue;
                }
            };
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
    epoch: u64,
    iteration: u64,
    /// What it has that the engine has not, or the other way round.
    misfit: Option<String>,
}

#[derive(Default)]
struct Found {
    candidates: Vec<Candidate>,
    broken: Vec<(PathBuf, String)>,
}

impl<C, B, O> Engine<'_, C, B, O> {
    /// Files that are checkpoints of an engine like this by their headers, the last written first, and
    /// those that should be checkpoints.
    fn find(&self, folder: &Path) -> Result<Found> {
        let names = match folder::names(folder) {
            Ok(names) => names,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Found::default()),
            Err(source) => return Err(Error::Io { path: folder.to_owned(), source }),
        };
        let mut found = Found::default();
        // Extensions of checkpoints.
        let latest = fs::read_to_string(folder.join(folder::LATEST)).unwrap_or_default();
        let mut known: Vec<_> =
            ["a.safetensors", "a.pt", latest.trim()].iter().filter_map(|n| extension(n)).collect();
        for name in names.iter().filter(|name| !name.starts_with('.') && !folder::is_part(name)) {
            let path = folder.join(name);
            if !path.is_file() {
                continue;
            }
            match Contents::open(&path) {
                Ok(contents) if contents.has_state() => {
                    known.extend(extension(name));
                    let (epoch, iteration, nested) = contents.progress();
                    // An evaluator may keep its checkpoints in the trainer's folder.
                    if nested == self.is_nested() {
                        let (written, misfit) = (contents.stamp.written, self.misfit(&contents));
                        let candidate = Candidate { path, written, epoch, iteration, misfit };
                        found.candidates.push(candidate);
                    }
                }
                Ok(_) => {}
                Err(why) => found.broken.push((path, why)),
            }
        }
        found.broken.retain(|(path, _)| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            extension(&name).is_some_and(|ext| known.contains(&ext)) || begins_like_one(path)
        });
        // Not by iterations: an older run in the same folder may have had more.
        found.candidates.sort_by_key(|c| std::cmp::Reverse((c.written, c.iteration)));
        Ok(found)
    }

    fn misfit(&self, contents: &Contents) -> Option<String> {
        let (parts, handlers) = contents.parts(HANDLERS);
        let (ours, required) = self.part_names();
        let unknown = parts.iter().find(|name| !ours.iter().any(|our| our == **name));
        let missing = required.iter().find(|name| !parts.contains(&name.as_str()));
        let (known, stateful) = self.handler_names();
        let unknown_handler = handlers.iter().find(|name| !known.iter().any(|k| k == **name));
        let missing_handler = stateful.iter().find(|name| !handlers.contains(&name.as_str()));
        None.or(missing.map(|name| format!("it has no part '{name}'")))
            .or(unknown.map(|name| format!("its part '{name}' is not tracked here")))
            .or(missing_handler.map(|name| format!("it has no part of handler '{name}'")))
            .or(unknown_handler.map(|name| format!("its handler '{name}' is not attached here")))
    }
}

fn extension(name: &str) -> Option<String> {
    Some(Path::new(name).extension()?.to_str()?.to_owned())
}

/// Whether a file begins with a length and JSON.
fn begins_like_one(path: &Path) -> bool {
    let mut begin = [0; 9];
    let read = fs::File::open(path).and_then(|mut file| file.read_exact(&mut begin));
    read.is_ok() && begin[8] == b'{' && begin[4..8] == [0; 4]
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
    writer::write(path.as_ref(), &variables_of(&vs.variables_), true, &Stamp::now())
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
    writer::write(path.as_ref(), state, false, &Stamp::now())
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
