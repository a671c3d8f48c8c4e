//! Runs the cases in folders of files that PyTorch wrote.

use std::path::Path;

use anyhow::{Context, Result};

use crate::interop;
use crate::runner::Tally;

/// Runs all files of a folder in the format of tests/golden/interop: each path of each file is a case.
pub fn run_folder(folder: &Path, tally: &mut Tally) -> Result<()> {
    let entries = std::fs::read_dir(folder).with_context(|| folder.display().to_string())?;
    let mut files = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    files.sort();
    for file in files.iter().filter(|file| file.extension().is_some_and(|ext| ext == "pt")) {
        let name = file.file_stem().unwrap_or_default().to_string_lossy();
        let failed = |error: anyhow::Error| vec![(String::new(), Err(format!("{error:#}")))];
        let kind = name.split('-').next().unwrap_or_default();
        let cases = match kind {
            "tensors" => Some(interop::tensors(file).unwrap_or_else(failed)),
            "hostile" => {
                let result = interop::hostile(file).map_err(|error| format!("{error:#}"));
                Some(vec![(String::new(), result)])
            }
            "handover" => interop::handover(file).unwrap_or_else(|error| Some(failed(error))),
            _ => None,
        };
        let Some(cases) = cases else {
            tally.skip(format!("{name} cannot be run yet"));
            continue;
        };
        for (path, result) in cases {
            match result {
                Ok(()) => tally.passed += 1,
                Err(why) => {
                    println!("{name}{path}: {why}");
                    tally.failed += 1;
                }
            }
        }
    }
    Ok(())
}
