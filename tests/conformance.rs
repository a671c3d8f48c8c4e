//! All golden cases, as in `cargo run --release --example conformance -- tests/golden/*.jsonl`.

#[path = "../examples/conformance/runner/mod.rs"]
mod runner;

use std::path::Path;

fn tally(name: &str) -> runner::Tally {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    let mut tally = runner::Tally::default();
    runner::run_file(&path, &mut tally).unwrap();
    println!("{name}: {tally}");
    tally
}

/// No case fails, and at least this many are run: fewer would mean that cases are skipped unnoticed.
fn check(name: &str, at_least: u64) {
    let tally = tally(name);
    assert_eq!(tally.failed, 0, "{name}");
    assert!(tally.passed >= at_least, "{name}: only {} passed", tally.passed);
}

#[test]
fn schedules() {
    check("schedule.jsonl", 95);
}

#[test]
fn resumed_schedules() {
    check("schedule_resume.jsonl", 48);
}

#[test]
fn refusals() {
    check("schedule_error.jsonl", 151);
}

#[test]
fn engine_traces() {
    let tally = tally("engine_trace.jsonl");
    assert_eq!((tally.passed, tally.failed, tally.skipped), (379, 0, 0));
}

#[test]
fn training() {
    check("train.jsonl", 48);
}

#[test]
fn learning_rate_finder() {
    let tally = tally("lr_finder.jsonl");
    assert_eq!((tally.passed, tally.failed, tally.skipped), (116, 0, 0));
}

#[test]
fn metrics() {
    let tally = tally("metric.jsonl");
    assert_eq!((tally.passed, tally.failed, tally.skipped), (406, 0, 0));
}

#[test]
fn kinds_to_come_are_skipped_by_name() {
    assert_eq!(tally("handler.jsonl").failed, 0);
}
