//! Runs all golden cases, as `cargo run --release --example conformance -- tests/golden/*.jsonl` does.

#[path = "../examples/conformance/runner/mod.rs"]
mod runner;

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tch::Device;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

/// Checks that every case of a file passes, but for `skipped` cases, which cannot be compared with this crate.
fn check(name: &str, skipped: u64) {
    let mut tally = runner::Tally::default();
    runner::run_file(&golden(name), Device::Cpu, &mut tally).unwrap();
    println!("{name}: {tally}");
    let cases = std::fs::read_to_string(golden(name)).unwrap().lines().count() as u64;
    let all = (cases - skipped, 0, skipped);
    assert_eq!((tally.passed, tally.failed, tally.skipped), all, "{name}");
}

#[test]
fn schedules_agree_with_ignite() {
    check("schedule.jsonl", 0);
}

#[test]
fn resumed_schedules_agree_with_ignite() {
    check("schedule_resume.jsonl", 0);
}

/// The skipped cases have arguments that Rust's types rule out.
#[test]
fn refusals_agree_with_ignite() {
    check("schedule_error.jsonl", 111);
}

#[test]
fn engine_traces_agree_with_ignite() {
    check("engine_trace.jsonl", 0);
}

#[test]
fn training_agrees_with_ignite() {
    check("train.jsonl", 0);
}

#[test]
fn optimizers() {
    check("optimizer.jsonl", 0);
}

#[test]
fn optimizers_of_python_packages() {
    check("optimizer_package.jsonl", 0);
}

#[test]
fn the_learning_rate_finder_agrees_with_ignite() {
    check("lr_finder.jsonl", 0);
}

#[test]
fn handlers_agree_with_ignite() {
    check("handler.jsonl", 0);
}

#[test]
fn metrics_agree_with_ignite() {
    check("metric.jsonl", 0);
}

/// A case that lacks a field, or has one of another type, fails or is skipped alone: nothing panics, and the cases
/// behind it are run.
#[test]
fn cases_of_any_shape_end_in_a_line_each() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("odd.jsonl");
    for file in std::fs::read_dir(golden("")).unwrap() {
        let file = file.unwrap().path();
        if file.extension().is_none_or(|extension| extension != "jsonl") {
            continue;
        }
        let mut odd = vec!["no JSON".to_owned(), r#"{"kind":"another"}"#.to_owned()];
        for line in std::fs::read_to_string(&file).unwrap().lines().step_by(23) {
            let case: Value = serde_json::from_str(line).unwrap();
            let keys: Vec<_> = case["config"].as_object().unwrap().keys().cloned().collect();
            for key in keys {
                for value in [json!("text"), json!({"type": "text"}), json!([]), json!([[]])] {
                    let mut case = case.clone();
                    case["config"][&key] = value;
                    odd.push(case.to_string());
                }
            }
            let mut without = case.clone();
            without["expect"] = json!({});
            odd.push(without.to_string());
        }
        std::fs::write(&path, odd.join("\n")).unwrap();
        let mut tally = runner::Tally::default();
        runner::run_file(&path, Device::Cpu, &mut tally).unwrap();
        assert_eq!(tally.panicked, 0, "{}", file.display());
        let ran = tally.passed + tally.failed + tally.skipped;
        assert_eq!(ran, odd.len() as u64, "{}", file.display());
    }
}
