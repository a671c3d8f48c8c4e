//! Runs golden cases through the public API and tells where the results differ from pytorch-ignite's.
//!
//! `cargo run --release --example conformance -- tests/golden/*.jsonl tests/golden/interop tests/golden/compiled/mlp.pt2`

mod compiled;
mod folder;
mod interop;
mod runner;

use std::path::Path;
use std::process::ExitCode;

fn main() -> ExitCode {
    let files: Vec<_> = std::env::args_os().skip(1).collect();
    if files.is_empty() || files.iter().any(|file| file == "--help" || file == "-h") {
        println!(
            "usage: conformance FILE.jsonl… FOLDER… PACKAGE.pt2…   (the formats are those of tests/golden/README.md and tests/golden/interop/README.md)"
        );
        return if files.is_empty() { ExitCode::FAILURE } else { ExitCode::SUCCESS };
    }
    let mut tally = runner::Tally::default();
    for file in files {
        let path = Path::new(&file);
        if path.extension().is_some_and(|extension| extension == "pt2") {
            match compiled::compare(path) {
                Ok(()) => tally.passed += 1,
                Err(why) => {
                    println!("{}: {why:#}", path.display());
                    tally.failed += 1;
                }
            }
            continue;
        }
        let ran = match path.is_dir() {
            true => folder::run_folder(path, &mut tally),
            false => runner::run_file(path, tch::Device::Cpu, &mut tally),
        };
        if let Err(error) = ran {
            eprintln!("conformance: {error:#}");
            return ExitCode::FAILURE;
        }
    }
    println!("{tally}");
    if tally.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
