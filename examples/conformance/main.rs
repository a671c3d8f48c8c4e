//! Runs golden cases through the public API and tells where the results differ from pytorch-ignite's.
//!
//! `cargo run --release --example conformance -- tests/golden/*.jsonl`

mod runner;

use std::process::ExitCode;

fn main() -> ExitCode {
    let files: Vec<_> = std::env::args_os().skip(1).collect();
    if files.is_empty() || files.iter().any(|file| file == "--help" || file == "-h") {
        println!("usage: conformance FILE.jsonl…   (the format is that of tests/golden/README.md)");
        return if files.is_empty() { ExitCode::FAILURE } else { ExitCode::SUCCESS };
    }
    let mut tally = runner::Tally::default();
    for file in files {
        if let Err(error) = runner::run_file(file.as_ref(), &mut tally) {
            eprintln!("conformance: {error:#}");
            return ExitCode::FAILURE;
        }
    }
    println!("{tally}");
    if tally.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
