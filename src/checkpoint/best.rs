use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use super::folder::{self, RetentionStamp};
use super::format::Contents;
use super::header::shortened;
use super::resume::{broken, load_part};
use super::score::Score;
use crate::error::{Error, Result};
use crate::state::IntoStateful;

/// The file with the best score that a [`Checkpoint`](super::Checkpoint) with a score
/// ([`best`](super::Checkpoint::best), [`score_function`](super::Checkpoint::score_function)) has written in a folder,
/// in its latest run there. Of equal scores this is the file that was written last. The headers of all files in the
/// folder are read.
///
/// In a group of processes the main rank may still be writing when another rank's run has returned: let all ranks meet
/// (`barrier`) between the run and this, or they may choose different files. With
/// [`background`](super::Checkpoint::background) the file is there once the run has returned.
///
/// # Errors
/// The folder cannot be read; a `.safetensors` file in it cannot be read, so that nobody knows whether it is the best; no
/// file in it has a score; or several handlers with different scores wrote there (the text names the best file of each).
pub fn best_checkpoint(folder: impl AsRef<Path>) -> Result<PathBuf> {
    let folder = folder.as_ref();
    let names = match folder::names(folder) {
        Ok(names) => names,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(Error::State(format!(
                "{}: there is no such folder; give the one that Checkpoint::new got",
                folder.display()
            )));
        }
        Err(source) => return Err(Error::Io { path: folder.to_owned(), source }),
    };
    // This holds, for each handler by its identity, the best file of the handler's latest run.
    let mut best: BTreeMap<String, ((u64, f64, u64), String)> = BTreeMap::new();
    let mut without_score = 0;
    for name in names.into_iter().filter(|name| !folder::is_part(name)) {
        let Some((stamp, written)) = stamp(&folder.join(&name), &name)? else { continue };
        let Some(score) = score_of(&stamp) else {
            without_score += 1;
            continue;
        };
        let rank = (stamp.owner.run, score, written);
        let better = |known: &(u64, f64, u64)| {
            let by_score = rank.1.total_cmp(&known.1);
            rank.0.cmp(&known.0).then(by_score).then(rank.2.cmp(&known.2)).is_gt()
        };
        if best.get(&stamp.owner.of).is_none_or(|(known, _)| better(known)) {
            best.insert(stamp.owner.of, (rank, name));
        }
    }
    let files: Vec<_> = best.into_values().map(|(_, name)| name).collect();
    match files.as_slice() {
        [name] => Ok(folder.join(name)),
        [] => Err(Error::State(format!(
            "{}: no file in this folder has a score ({without_score} checkpoints without one); Checkpoint::best(1, \"val/accuracy\", Mode::Max) writes such files, and load_part loads from any other",
            folder.display()
        ))),
        several => Err(Error::State(format!(
            "{}: several handlers with scores wrote here, and their best files are {}: load one of these by load_part, or give each handler a folder of its own",
            folder.display(),
            shortened(&several.join(", "))
        ))),
    }
}

/// Reads the stamp of a file that carries one under its own name, and when the file was written.
///
/// # Errors
/// The file is named like a checkpoint, is there, and cannot be read.
fn stamp(path: &Path, name: &str) -> Result<Option<(RetentionStamp, u64)>> {
    let contents = match Contents::open(path) {
        Ok(contents) => contents,
        // A file that a handler has removed meanwhile is none of its best.
        Err(why) if name.ends_with(".safetensors") && path.exists() => {
            return Err(Error::State(format!(
                "{}: this file cannot be read, so nobody knows whether it is the best one: {why}. Move it out of the folder, or load another by load_part",
                path.display()
            )));
        }
        Err(_) => return Ok(None),
    };
    let kept = contents.stamp.kept.as_deref();
    let stamp: Option<RetentionStamp> = kept.and_then(|kept| serde_json::from_str(kept).ok());
    let own = stamp.filter(|stamp| stamp.name == name);
    Ok(own.map(|stamp| (stamp, contents.stamp.written)))
}

/// Returns the score of a file; `None` where the step stands for it.
fn score_of(stamp: &RetentionStamp) -> Option<f64> {
    let score = Score::loaded(&stamp.score).ok()?;
    // Stamps of older versions do not say whether the score is one. The identity of a handler has the name of its score
    // in the third place.
    let named = stamp.owner.of.split('/').nth(2).is_some_and(|name| !name.is_empty());
    (stamp.scored || named || matches!(score, Score::Float(_))).then(|| score.as_f64())
}

/// Loads one part from the [best checkpoint](best_checkpoint) in a folder, for example the model's weights once training
/// is over, and returns the file. [`load_part`] says how the part is read. A file of
/// [`Checkpoint::weights`](super::Checkpoint::weights) holds one model, which is loaded whatever `name` says.
///
/// The trainer may live on, or the program may be another one than that which trained.
///
/// A Schedule-Free optimizer has other values for evaluation than for training. A file of weights holds the former: call
/// [`optimizer.eval()`](crate::optim::Optimizer::eval) before it is loaded. A checkpoint of a run holds the parameters as
/// they were: load the optimizer's part as well, and then call `optimizer.eval()`.
///
/// ```
/// # use tch::{Device, Kind, Tensor, nn};
/// # use tch_ignite::engine::{Engine, Until};
/// use tch_ignite::checkpoint::{Checkpoint, Mode, load_best};
/// # let folder = std::env::temp_dir().join(format!("tch-ignite-best-{}", std::process::id()));
/// # let vs = nn::VarStore::new(Device::Cpu);
/// # let weight = vs.root().zeros("weight", &[1]);
/// # let mut trainer = Engine::new(|weight: &mut Tensor, engine: &mut Engine<_, f64, ()>, accuracy: f64| {
/// #     tch::no_grad(|| weight.fill_(accuracy));
/// #     engine.state.metrics.set("val/accuracy", accuracy);
/// #     Ok(())
/// # });
/// trainer.track("model", &vs);
/// trainer.attach(Checkpoint::new(&folder).best(1, "val/accuracy", Mode::Max));
/// # let mut weight = weight;
/// # let data = vec![0.25, 0.75, 0.5];
/// trainer.run(&mut weight, data, Until::epochs(3).epoch_length(1))?;
/// let file = load_best(&vs, &folder, "model")?;
/// assert!(file.ends_with("checkpoint_val_accuracy=0.7500.safetensors"));
/// assert_eq!(weight.double_value(&[0]), 0.75);
/// # drop(trainer);
/// # std::fs::remove_dir_all(folder).ok();
/// # Ok::<(), tch_ignite::Error>(())
/// ```
///
/// # Errors
/// As [`best_checkpoint`] and [`load_part`].
pub fn load_best<'a>(
    part: impl IntoStateful<'a>,
    folder: impl AsRef<Path>,
    name: &str,
) -> Result<PathBuf> {
    let path = best_checkpoint(folder)?;
    let contents = Contents::open(&path).map_err(|why| broken(&path, &why))?;
    if contents.has_state() {
        load_part(part, &path, name)?;
    } else {
        let state = contents.read(&mut BTreeMap::new()).map_err(|why| broken(&path, &why))?;
        let loaded = part.into_stateful().load_state_dict(state);
        loaded.map_err(|error| broken(&path, &error.to_string()))?;
    }
    Ok(path)
}
