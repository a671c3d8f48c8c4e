use serde_json::Value;

use super::StateDict;
use super::filename::check_name;
use super::folder::{Folder, Owner};
use super::score::Score;
use crate::error::Result;

/// A file on the list.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Saved {
    pub(super) priority: Score,
    pub(super) name: String,
}

/// The list of a handler's files, and the rule by which files go.
#[derive(Debug, Clone)]
pub(super) struct Retention {
    /// The files, the one with the smallest score first.
    files: Vec<Saved>,
    /// How many files stay; `None` for all.
    pub(super) most: Option<usize>,
    /// Whether a file whose score equals the smallest one on the list replaces that one.
    pub(super) greater_or_equal: bool,
}

impl Retention {
    /// An empty list, of one file at most.
    pub(super) fn new() -> Self {
        Self { files: vec![], most: Some(1), greater_or_equal: false }
    }

    pub(super) fn files(&self) -> &[Saved] {
        &self.files
    }

    pub(super) fn clear(&mut self) {
        self.files.clear();
    }

    /// Whether a file with this score belongs on the list. Without `scored` the score is the step, and the newest file
    /// always does.
    pub(super) fn takes(&self, score: Score, scored: bool) -> bool {
        let value = score.as_f64();
        // The list may be longer than `most`, with files that a killed process left.
        let most = self.most.unwrap_or(usize::MAX);
        let smallest = self.files.len().checked_sub(most).and_then(|index| self.files.get(index));
        match smallest.map(|smallest| smallest.priority.as_f64()) {
            _ if value.is_nan() => false,
            Some(smallest) if scored && self.greater_or_equal => value >= smallest,
            Some(smallest) if scored => value > smallest,
            _ => true,
        }
    }

    /// Adds a file, and takes those off that it replaces or that are too many. Returns the names of the files to
    /// remove.
    pub(super) fn keep(&mut self, new: Saved) -> Vec<String> {
        let mut goes = vec![];
        self.files.retain(|saved| {
            let same = saved.name == new.name;
            if same {
                goes.push(saved.name.clone());
            }
            !same
        });
        let most = self.most.unwrap_or(usize::MAX);
        while !self.files.is_empty() && self.files.len() >= most {
            goes.push(self.files.remove(0).name);
        }
        self.insert(new);
        goes
    }

    fn insert(&mut self, new: Saved) {
        let priority = new.priority.as_f64();
        let at = self.files.partition_point(|other| other.priority.as_f64() <= priority);
        self.files.insert(at, new);
    }

    /// Makes the list agree with the folder: files that are gone are taken off, and whole files with the stamp of the
    /// owner are added. Such files were written, or should have been removed, right before a process was killed or
    /// after the restored checkpoint was written. An added file is read once to verify its checksum.
    pub(super) fn reconcile(&mut self, folder: &Folder, owner: &Owner) -> Result<()> {
        let names = folder.names()?;
        let listed = std::mem::take(&mut self.files);
        for name in names.into_iter().filter(|name| check_name(name).is_ok()) {
            let Some((kept, mut contents)) = folder.kept(&name) else { continue };
            let known = listed.iter().find(|saved| saved.name == name);
            if kept.owner == *owner && (known.is_some() || contents.verify().is_ok()) {
                let score = known.map_or_else(|| Score::loaded(&kept.score), |k| Ok(k.priority))?;
                self.insert(Saved { priority: score, name });
            }
        }
        Ok(())
    }

    pub(super) fn save(&self, state: &mut StateDict) -> Result<()> {
        let saved: Vec<(Value, &str)> =
            self.files.iter().map(|saved| (saved.priority.saved(), saved.name.as_str())).collect();
        state.set_value("_saved", saved)
    }

    /// Takes over a saved list. On error nothing is changed.
    pub(super) fn load(&mut self, state: &StateDict) -> Result<()> {
        let saved: Vec<(Value, String)> = state.value("_saved")?;
        let mut files: Vec<_> = saved
            .into_iter()
            .map(|(score, name)| {
                // Listed files are removed one day, so no name may lead out of the folder.
                check_name(&name)?;
                Ok(Saved { priority: Score::loaded(&score)?, name })
            })
            .collect::<Result<_>>()?;
        files.sort_by(|a, b| a.priority.as_f64().total_cmp(&b.priority.as_f64()));
        self.files = files;
        Ok(())
    }
}
