//! Reads cases, runs each, and counts how many pass.

mod engine_trace;
mod expression;
mod handler;
mod json;
mod lr_finder;
mod metric;
mod optimizer;
mod optimizer_steps;
mod schedule;
mod schedule_error;
mod schedule_resume;
mod specs;
mod train;

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::Value;
use tch::Device;

/// The outcome of one case.
pub enum Outcome {
    Passed,
    Failed(String),
    /// The case was not run, for this reason.
    Skipped(String),
}

impl Outcome {
    fn skipped(reason: impl Into<String>) -> Result<Self> {
        Ok(Self::Skipped(reason.into()))
    }
}

/// `Err` is the first difference between our result and ignite's.
impl From<Result<(), String>> for Outcome {
    fn from(result: Result<(), String>) -> Self {
        result.map_or_else(Self::Failed, |()| Self::Passed)
    }
}

/// How many cases passed, failed and were skipped.
#[derive(Default)]
pub struct Tally {
    pub passed: u64,
    pub failed: u64,
    pub skipped: u64,
    /// How many of the failed cases panicked.
    pub panicked: u64,
    reasons: BTreeMap<String, u64>,
    /// How many cases show each of ignite's defects, by the defect's name. Such cases are held to our documented
    /// behaviour.
    defects: BTreeMap<&'static str, u64>,
}

impl Tally {
    /// Counts a case that was not run, and why.
    pub fn skip(&mut self, reason: String) {
        self.skipped += 1;
        *self.reasons.entry(reason).or_default() += 1;
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (defect, count) in &self.defects {
            writeln!(
                f,
                "held to our documented behaviour instead of ignite's defect: {count} × {defect}"
            )?;
        }
        for (reason, count) in &self.reasons {
            writeln!(f, "skipped: {count} × {reason}")?;
        }
        write!(f, "{} passed, {} failed, {} skipped", self.passed, self.failed, self.skipped)
    }
}

const PANICKED: &str = "panicked:";

/// Runs a case so that a panic fails this case and not the whole program, because a case may contain anything.
fn guarded(run: impl FnOnce() -> Result<Outcome>) -> Result<Outcome> {
    catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|payload| {
        let text = payload.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| payload.downcast_ref::<&str>().copied());
        Ok(Outcome::Failed(format!("{PANICKED} {}", text.unwrap_or("?"))))
    })
}

/// Runs all cases of a file and prints the ids of those that fail. Training, optimizers and metrics run on the device.
pub fn run_file(path: &Path, device: Device, tally: &mut Tally) -> Result<()> {
    let file = File::open(path).with_context(|| path.display().to_string())?;
    for (number, line) in BufReader::new(file).lines().enumerate() {
        let line = line?;
        if line.trim().is_empty() {
            continue;
        }
        let place = || format!("{}:{}", path.display(), number + 1);
        let case: Value = match serde_json::from_str(&line) {
            Ok(case) => case,
            Err(error) => {
                println!("{}: {error}", place());
                tally.failed += 1;
                continue;
            }
        };
        let id = case["id"].as_str().unwrap_or("without id").to_owned();
        let (config, expect) = (&case["config"], &case["expect"]);
        let mut defect = None;
        let outcome = guarded(|| match case["kind"].as_str() {
            Some("schedule") => schedule::run(config, expect, &mut defect),
            Some("schedule_resume") => schedule_resume::run(config, expect, &mut defect),
            Some("schedule_error") => schedule_error::run(config, expect, &mut defect),
            Some("engine_trace") => engine_trace::run(config, expect, &mut defect),
            Some("train") => train::run(config, expect, device, &mut defect),
            Some("handler") => handler::run(config, expect, &mut defect),
            Some("lr_finder") => lr_finder::run(config, expect, &mut defect),
            Some("metric") => metric::run(config, expect, device, &mut defect),
            Some("optimizer") => optimizer_steps::run(config, expect, device, &mut defect),
            kind => Outcome::skipped(format!("kind {} does not exist yet", kind.unwrap_or("?"))),
        });
        if let Some(defect) = defect {
            *tally.defects.entry(defect).or_default() += 1;
        }
        match outcome.unwrap_or_else(|error| Outcome::Failed(format!("{error:#}"))) {
            Outcome::Passed => tally.passed += 1,
            Outcome::Failed(why) => {
                tally.panicked += u64::from(why.starts_with(PANICKED));
                // Only the first line is printed, because libtorch's errors go on with a stack trace.
                println!("{id}: {}", why.lines().next().unwrap_or_default());
                tally.failed += 1;
            }
            Outcome::Skipped(reason) => tally.skip(reason),
        }
    }
    Ok(())
}
