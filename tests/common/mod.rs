//! Helpers that several test files use.
#![allow(dead_code)] // No test file uses all of them.

use std::fmt::Display;
use std::io::Write;
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Prints that a test did not run. The line is written past the test runner's capture, so that nobody believes that
/// the test has passed.
///
/// `scripts/test.sh` lists these lines again, and in CI fails on those that name Python.
pub fn skipped(why: impl Display) {
    let _ = std::io::stderr().lock().write_all(format!("\nSKIPPED: {why}\n").as_bytes());
}

/// The name by which the test runner knows a test of a module: `exact(module_path!(), "name")`.
pub fn exact(module: &str, test: &str) -> String {
    match module.split_once("::") {
        Some((_program, module)) => format!("{module}::{test}"),
        None => test.to_owned(),
    }
}

/// All threads of the process share libtorch's random number generator, so tests that seed it, draw from it or
/// restore it hold this lock and take turns.
pub fn serial() -> MutexGuard<'static, ()> {
    static SERIAL: Mutex<()> = Mutex::new(());
    SERIAL.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The Python that an environment variable names (`python3` unless set); an error with its name if it cannot import
/// these modules.
pub fn find_python(variable: &str, modules: &str) -> Result<String, String> {
    let python = std::env::var(variable).unwrap_or_else(|_| "python3".into());
    let has = Command::new(&python).args(["-c", &format!("import {modules}")]).output();
    if has.is_ok_and(|output| output.status.success()) { Ok(python) } else { Err(python) }
}

/// The Python that an environment variable names (`python3` unless set), if it can import these modules. Otherwise
/// this prints that the test is skipped.
pub fn python(test: &str, variable: &str, modules: &str) -> Option<String> {
    let skip = |python: String| {
        skipped(format!("{test}: {python} is no Python with {modules}; set {variable} to one"));
    };
    find_python(variable, modules).map_err(skip).ok()
}
