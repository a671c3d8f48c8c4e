//! Names of checkpoints, as ignite makes them.

use super::folder::{LATEST, is_part};
use crate::error::{Error, Result};

/// What a name is made of.
#[derive(Debug, Clone, Default)]
pub(super) struct Parts {
    pub(super) filename_prefix: String,
    pub(super) name: String,
    pub(super) score_name: Option<String>,
    pub(super) score: Option<String>,
    pub(super) global_step: Option<u64>,
    pub(super) ext: String,
}

/// The default pattern of a checkpoint's name: ignite's `Checkpoint.setup_filename_pattern`.
///
/// ```
/// use tch_ignite::checkpoint::setup_filename_pattern;
/// let pattern = setup_filename_pattern(true, true, true, true)?;
/// assert_eq!(pattern, "{filename_prefix}_{name}_{global_step}_{score_name}={score}.{ext}");
/// # Ok::<(), tch_ignite::Error>(())
/// ```
///
/// # Errors
/// Neither score nor step, so that all names would be equal; a name of a score without a score.
pub fn setup_filename_pattern(
    with_prefix: bool,
    with_score: bool,
    with_score_name: bool,
    with_global_step: bool,
) -> Result<String> {
    if !with_score && !with_global_step {
        return Err(Error::invalid(
            "At least one of with_score and with_global_step should be True.",
        ));
    }
    if with_score_name && !with_score {
        return Err(Error::invalid("If with_score_name is True, with_score should be also True"));
    }
    let mut pattern = "{name}".to_owned();
    if with_global_step {
        pattern += "_{global_step}";
    }
    if with_score_name {
        pattern += "_{score_name}={score}";
    } else if with_score {
        pattern += "_{score}";
    }
    if with_prefix {
        pattern.insert_str(0, "{filename_prefix}_");
    }
    Ok(pattern + ".{ext}")
}

impl Parts {
    /// The default pattern for what there is.
    pub(super) fn default_pattern(&self) -> Result<String> {
        setup_filename_pattern(
            !self.filename_prefix.is_empty(),
            self.score.is_some(),
            self.score_name.is_some(),
            self.global_step.is_some(),
        )
    }

    /// The pattern with everything put in. What is not there reads `None`, as in ignite.
    pub(super) fn filled(&self, pattern: &str) -> Result<String> {
        let mut name = String::new();
        let mut rest = pattern;
        while let Some((before, after)) = rest.split_once('{') {
            let (key, after) = after.split_once('}').ok_or_else(|| unknown(pattern, after))?;
            name += before;
            let step = self.global_step.map(|step| step.to_string());
            name += match key {
                "filename_prefix" => &self.filename_prefix,
                "name" => &self.name,
                "ext" => &self.ext,
                "score_name" => self.score_name.as_deref().unwrap_or("None"),
                "score" => self.score.as_deref().unwrap_or("None"),
                "global_step" => step.as_deref().unwrap_or("None"),
                _ => return Err(unknown(pattern, key)),
            };
            rest = after;
        }
        name += rest;
        check_name(&name)?;
        Ok(name)
    }
}

/// Whether it is a plain name, of a file in the folder.
pub(super) fn check_name(name: &str) -> Result<()> {
    let plain = !name.is_empty() && !name.contains(['/', '\\', '\0']) && !name.starts_with('.');
    if plain && name != LATEST && !is_part(name) {
        return Ok(());
    }
    Err(Error::invalid(format!(
        "'{name}' cannot be the name of a checkpoint: it must be a plain file name that does not begin with a dot, and none of those used for other things"
    )))
}

fn unknown(pattern: &str, key: &str) -> Error {
    Error::invalid(format!(
        "the file name pattern '{pattern}' has '{{{key}', and knows filename_prefix, name, global_step, score_name, score and ext"
    ))
}
