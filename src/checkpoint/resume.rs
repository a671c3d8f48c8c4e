use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use tch::Tensor;
use tch::nn::VarStore;

use super::format::{Contents, Stamp};
use super::header::shortened;
use super::{IntoStateful, StateDict, folder, writer};
use crate::engine::{Engine, HANDLERS, Restored};
use crate::error::{Error, Result};
use crate::fs::open_file;
use crate::state::{copy_variables, layout_misfits, variables_of};

/// The result of [`Engine::resume`]. `Display` writes a line for each thing worth knowing.
#[derive(Debug)]
#[non_exhaustive]
pub struct Resumed {
    /// The file of the checkpoint.
    pub path: PathBuf,
    /// The epoch of the checkpoint (`state.epoch`).
    pub epoch: u64,
    /// The iteration of the checkpoint (`state.iteration`).
    pub iteration: u64,
    /// Newer files that are damaged or belong to another program, with the reason.
    pub skipped: Vec<(PathBuf, String)>,
    /// The parts that were restored, have changed since, or were left out.
    pub restored: Restored,
}

/// Largest number of lines of a kind that `Display` writes, because a file can hold any number of names.
const LINES: usize = 20;

impl fmt::Display for Resumed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { path, epoch, iteration, restored, skipped } = self;
        let skipped = skipped.iter().map(|(path, why)| format!("{}: {why}", path.display()));
        lines(f, "skipped", skipped)?;
        lines(f, "changed since:", restored.changed.iter())?;
        lines(f, "not restored:", restored.ignored.iter())?;
        for untracked in &restored.untracked {
            writeln!(f, "not restored, because it is not tracked: {untracked}")?;
        }
        let more = restored.parts.len().saturating_sub(LINES);
        let parts: Vec<_> = restored.parts.iter().take(LINES).map(|part| shortened(part)).collect();
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        writeln!(f, "restored: {}{more}", parts.join(", "))?;
        if let Some(ended) = &restored.ended {
            writeln!(f, "ended: {ended}")?;
        }
        write!(f, "resumed {} at iteration {iteration} (epoch {epoch})", path.display())
    }
}

fn lines(
    f: &mut fmt::Formatter<'_>,
    title: &str,
    mut texts: impl ExactSizeIterator<Item = impl fmt::Display>,
) -> fmt::Result {
    let more = texts.len().saturating_sub(LINES);
    let mut shown = texts.by_ref().take(LINES);
    shown.try_for_each(|text| writeln!(f, "{title} {}", shortened(&text.to_string())))?;
    if more > 0 { writeln!(f, "{title} {more} more") } else { Ok(()) }
}

impl<'a, C, B, O> Engine<'a, C, B, O> {
    /// Loads the newest whole checkpoint in a folder; the next `run` goes on there. Returns `None` where the folder has
    /// no checkpoint and no file that looks like one; the run then starts from the beginning.
    ///
    /// Files of engines that ran within others (evaluators) are ignored. Files with other parts than this engine's are
    /// skipped and reported, where an older file fits. The summary of the next run reports changes of the data, because
    /// only that run has the data.
    ///
    /// Attach handlers and track models first, as when the checkpoint was saved. The file is read once, and models are
    /// read straight into their memory.
    ///
    /// # Errors
    /// The folder cannot be read; no checkpoint in it is whole; or the newest one does not fit this engine (the text
    /// names the part). The engine may then hold some of it, and refuses to run.
    pub fn resume(&mut self, cx: &mut C, folder: impl AsRef<Path>) -> Result<Option<Resumed>> {
        self.resume_with(cx, folder, true)
    }

    /// Loads a checkpoint like [`resume`](Self::resume). Where `strict` is false, missing and unknown parts, and parts
    /// that do not fit, are left out and reported, and the rest is loaded: models and optimizers tensor by tensor, so
    /// that a network with another head keeps its body. A schedule with other arguments, such as a longer one, goes on
    /// at its position, which is the number of its events so far.
    ///
    /// # Errors
    /// As [`resume`](Self::resume); without `strict` parts that do not fit are no error.
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
        let shown = skipped.iter().take(LINES);
        let mut why: Vec<_> =
            shown.map(|(path, why)| format!("{}: {}", path.display(), shortened(why))).collect();
        if skipped.len() > LINES {
            why.push(format!("and {} more", skipped.len() - LINES));
        }
        Err(Error::State(format!(
            "no checkpoint in {} is whole ({}); remove them to start anew",
            folder.as_ref().display(),
            why.join("; ")
        )))
    }

    /// Loads the checkpoint in this file, like [`resume_with`](Self::resume_with).
    ///
    /// # Errors
    /// The file is damaged or no checkpoint, or does not fit this engine.
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

    /// Reads the whole file, models into their memory. The inner error says that the file is damaged, the outer one
    /// that it does not fit.
    fn read(
        &mut self,
        path: &Path,
        contents: Contents,
        strict: bool,
    ) -> Result<Result<StateDict, String>> {
        let mut places = BTreeMap::new();
        for (name, fixed, ours) in self.tracked_states()? {
            let prefix = format!("{name}/");
            let within = |(tensor, layout)| Some((str::strip_prefix(tensor, &prefix)?, layout));
            let saved: BTreeMap<&str, _> = contents.layouts().filter_map(within).collect();
            let misfits = if fixed { layout_misfits(&ours, &saved) } else { BTreeMap::default() };
            if strict && let Some(misfit) = misfits.values().next() {
                let how = match saved.is_empty() {
                    true => "",
                    false => "; resume_with(.., strict = false) loads what fits",
                };
                return Err(Error::State(format!("{}: {name}: {misfit}{how}", path.display())));
            }
            let fitting = ours.tensors.into_iter().filter(|(name, _)| !misfits.contains_key(name));
            places.extend(fitting.map(|(name, tensor)| (prefix.clone() + &name, tensor)));
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
    /// A part that only the file or only the engine has.
    misfit: Option<String>,
}

#[derive(Default)]
struct Found {
    candidates: Vec<Candidate>,
    broken: Vec<(PathBuf, String)>,
}

impl<C, B, O> Engine<'_, C, B, O> {
    /// Finds the files that are checkpoints of an engine like this according to their headers, the newest first, and
    /// damaged files that should be checkpoints.
    fn find(&self, folder: &Path) -> Result<Found> {
        let names = match folder::names(folder) {
            Ok(names) => names,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Found::default()),
            Err(source) => return Err(Error::Io { path: folder.to_owned(), source }),
        };
        let mut found = Found::default();
        // Extensions that checkpoints have.
        let latest = folder::latest(folder).unwrap_or_default();
        let mut known: Vec<_> =
            ["a.safetensors", "a.pt", &latest].iter().filter_map(|n| extension(n)).collect();
        for name in names.iter().filter(|name| !name.starts_with('.') && !folder::is_part(name)) {
            let path = folder.join(name);
            if !path.is_file() {
                continue;
            }
            match Contents::open(&path) {
                Ok(contents) if contents.has_state() => {
                    known.extend(extension(name));
                    let (epoch, iteration, nested) = contents.progress();
                    // An evaluator may write its checkpoints into the trainer's folder.
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
        // Files are not sorted by iterations, because an older run in the same folder may have had more.
        found.candidates.sort_by_key(|c| std::cmp::Reverse((c.written, c.iteration)));
        Ok(found)
    }

    /// Describes a part or handler that only the checkpoint or only the engine has.
    fn misfit(&self, contents: &Contents) -> Option<String> {
        let (parts, handlers) = contents.parts(HANDLERS);
        let (ours, required) = self.part_names();
        let unknown = parts.iter().find(|name| !ours.iter().any(|our| our == **name));
        let missing = required.iter().find(|name| !parts.contains(&name.as_str()));
        let (known, stateful) = self.handler_names();
        let unknown_handler = handlers.iter().find(|name| !known.iter().any(|k| k == **name));
        let missing_handler = stateful.iter().find(|name| !handlers.contains(&name.as_str()));
        let misfit = None
            .or(missing.map(|name| format!("it has no part '{name}'")))
            .or(unknown.map(|name| format!("its part '{name}' is not tracked here")))
            .or(missing_handler.map(|name| format!("it has no part of handler '{name}'")))
            .or(unknown_handler.map(|name| format!("its handler '{name}' is not attached here")));
        misfit.map(|misfit| shortened(&misfit))
    }
}

fn extension(name: &str) -> Option<String> {
    Some(Path::new(name).extension()?.to_str()?.to_owned())
}

/// Whether a file begins with a plausible length and JSON, as safetensors files do.
fn begins_like_one(path: &Path) -> bool {
    let mut begin = [0; 9];
    let read = open_file(path).and_then(|mut file| file.read_exact(&mut begin));
    read.is_ok() && begin[8] == b'{' && begin[4..8] == [0; 4]
}

const NO_CHECKPOINT: &str = "it holds tensors, but is no checkpoint of this crate";

pub(super) fn broken(path: &Path, why: &str) -> Error {
    Error::State(format!("{}: {}", path.display(), shortened(why)))
}

/// Writes the variables of a store, parameters and buffers, as a plain safetensors file under their PyTorch names. The
/// file is written as safely as a checkpoint. A tensor with several names (tied weights) is written once, under the
/// first name in alphabetical order, and the metadata lists the others, as Python's `safetensors.torch.save_model`
/// does; [`load_weights`] and Python's `load_model` find all names.
///
/// # Errors
/// A variable has a type that safetensors lacks, or the disk fails.
pub fn save_weights(vs: &VarStore, path: impl AsRef<Path>) -> Result<()> {
    writer::write(path.as_ref(), &variables_of(&vs.variables_), true, &Stamp::now())
}

/// Reads the variables of a store from a safetensors file of this crate or of Python. The store's types and devices
/// stay as they are, and the saved tensors must have the same types and shapes. PyTorch's counters
/// `num_batches_tracked`, which batch norm in tch lacks, are ignored.
///
/// [`load_part`] loads the model from a training checkpoint.
///
/// Weights of a Schedule-Free optimizer are its values for evaluation: where one has stepped the store, call
/// [`optimizer.eval()`](crate::optim::Optimizer::eval) before they are loaded.
///
/// # Errors
/// The file is damaged or is a training checkpoint, or its names, shapes or types differ from the store's. Nothing is
/// changed then.
pub fn load_weights(vs: &VarStore, path: impl AsRef<Path>) -> Result<()> {
    load_weights_with(vs, path, true).map(drop)
}

/// Reads variables like [`load_weights`]. Where `strict` is false, names that only the store or only the file has are
/// allowed and returned, as PyTorch's `load_state_dict(strict=False)` does.
///
/// ```
/// # use tch::{Device, nn};
/// use tch_ignite::checkpoint::{load_weights_with, save_weights};
/// # let folder = std::env::temp_dir().join(format!("tch-ignite-keys-{}", std::process::id()));
/// # let (body, vs) = (nn::VarStore::new(Device::Cpu), nn::VarStore::new(Device::Cpu));
/// # let _ = (body.root().ones("body", &[2]), body.root().ones("old_head", &[2]));
/// # let _ = (vs.root().zeros("body", &[2]), vs.root().zeros("head", &[5]));
/// save_weights(&body, folder.join("pretrained.safetensors"))?;
/// let keys = load_weights_with(&vs, folder.join("pretrained.safetensors"), false)?;
/// assert_eq!((&*keys.missing, &*keys.unexpected), (&["head".into()][..], &["old_head".into()][..]));
/// # std::fs::remove_dir_all(folder).ok();
/// # Ok::<(), tch_ignite::Error>(())
/// ```
///
/// # Errors
/// As [`load_weights`], except for such names; a tensor of another shape or type is always an error.
pub fn load_weights_with(
    vs: &VarStore,
    path: impl AsRef<Path>,
    strict: bool,
) -> Result<IncompatibleKeys> {
    let path = path.as_ref();
    let failed = |why: String| broken(path, &why);
    let contents = Contents::open(path).map_err(failed)?;
    if contents.has_state() {
        let (parts, _) = contents.parts("");
        return Err(broken(
            path,
            &format!(
                "it is a training checkpoint: load_part(&vs, path, \"model\") loads the model that was tracked under this name; its parts are {}",
                parts.join(", ")
            ),
        ));
    }
    let ours = variables_of(&vs.variables_);
    // An other name of a tied tensor that the store does not have leaves no tensor out.
    let known = |name: &str| !contents.is_tied(name) || ours.tensors.contains_key(name);
    let saved: BTreeMap<&str, _> = contents.layouts().filter(|(name, _)| known(name)).collect();
    let mut keys = IncompatibleKeys::default();
    for (name, misfit) in layout_misfits(&ours, &saved) {
        let (here, there) = (ours.tensors.contains_key(&name), saved.contains_key(&*name));
        match (here, there) {
            (false, true) if name.rsplit('.').next() == Some("num_batches_tracked") => {}
            _ if strict || here == there => return Err(failed(misfit)),
            (true, _) => keys.missing.push(name),
            (false, _) => keys.unexpected.push(name),
        }
    }
    // Only tensors that the store has are kept in memory.
    let wanted = |name: &str| ours.tensors.contains_key(name);
    let tensors = contents.tensors(wanted, &mut BTreeMap::new()).map_err(failed)?;
    let state = StateDict { tensors, ..StateDict::default() };
    copy_variables(&vs.variables_, &state).map_err(|error| broken(path, &error.to_string()))?;
    Ok(keys)
}

/// The names that [`load_weights_with`] found only on one side.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct IncompatibleKeys {
    /// Variables of the store that the file lacks; they keep their values.
    pub missing: Vec<String>,
    /// Tensors of the file that the store lacks.
    pub unexpected: Vec<String>,
}

/// Loads one tracked part from a training checkpoint, for example the model's weights for an evaluation or fine-tuning.
/// The part is first read into new memory. A model's shapes and types are compared before that.
///
/// The model of a Schedule-Free optimizer mostly has its values for training in there: load the optimizer's part as well,
/// and then call [`optimizer.eval()`](crate::optim::Optimizer::eval).
///
/// ```
/// # use tch::{Device, nn};
/// use tch_ignite::checkpoint::load_part;
/// # use tch_ignite::checkpoint::Checkpoint;
/// # use tch_ignite::engine::{Engine, Until};
/// # let folder = std::env::temp_dir().join(format!("tch-ignite-part-{}", std::process::id()));
/// # let vs = nn::VarStore::new(Device::Cpu);
/// # let mut trainer = Engine::new(|_: &mut (), _, _: ()| Ok(()));
/// # trainer.track("model", &vs).attach(Checkpoint::new(&folder));
/// # trainer.run(&mut (), vec![(); 10], Until::epochs(1))?;
/// load_part(&vs, folder.join("checkpoint_10.safetensors"), "model")?;
/// # drop(trainer);
/// # std::fs::remove_dir_all(folder).ok();
/// # Ok::<(), tch_ignite::Error>(())
/// ```
///
/// # Errors
/// The file is damaged or no checkpoint, has no such part (the text lists its parts), or the part does not fit.
pub fn load_part<'a>(
    part: impl IntoStateful<'a>,
    path: impl AsRef<Path>,
    name: &str,
) -> Result<()> {
    let path = path.as_ref();
    let contents = Contents::open(path).map_err(|why| broken(path, &why))?;
    if !contents.has_state() {
        return Err(broken(path, NO_CHECKPOINT));
    }
    let (parts, _) = contents.parts("");
    let absent = format!("it has no part '{name}'; its parts are {}", parts.join(", "));
    let mut part = part.into_stateful();
    if part.has_fixed_tensors()
        && let Some(layouts) = contents.part_layouts(name)
        && let Some(misfit) = layout_misfits(&part.state_dict()?, &layouts).values().next()
    {
        return Err(broken(path, &format!("{name}: {misfit}")));
    }
    let state = contents.read_part(name).map_err(|why| broken(path, &why))?;
    let state = state.ok_or_else(|| broken(path, &absent))?;
    let loaded = part.load_state_dict(state);
    loaded.map_err(|error| broken(path, &format!("{name}: {error}")))
}

/// Reads a checkpoint into new CPU tensors.
///
/// # Errors
/// The file cannot be read, is damaged or is no checkpoint.
pub fn read_state(path: impl AsRef<Path>) -> Result<StateDict> {
    let path = path.as_ref();
    let contents = Contents::open(path).map_err(|why| broken(path, &why))?;
    if !contents.has_state() {
        return Err(broken(path, NO_CHECKPOINT));
    }
    contents.read(&mut BTreeMap::<String, Tensor>::new()).map_err(|why| broken(path, &why))
}

/// Writes a state as a checkpoint file: under another name, synced, then renamed.
///
/// # Errors
/// A tensor or value cannot be saved (the text names it), or the disk fails.
pub fn write_state(path: impl AsRef<Path>, state: &StateDict) -> Result<()> {
    writer::write(path.as_ref(), state, false, &Stamp::now())
}

/// Checks the checksum of a checkpoint. Reads the whole file once.
///
/// # Errors
/// The file cannot be read, is damaged or is no checkpoint.
pub fn verify(path: impl AsRef<Path>) -> Result<()> {
    let path = path.as_ref();
    let mut contents = Contents::open(path).map_err(|why| broken(path, &why))?;
    if !contents.has_state() {
        return Err(broken(path, NO_CHECKPOINT));
    }
    contents.verify().map_err(|why| broken(path, &why))
}
