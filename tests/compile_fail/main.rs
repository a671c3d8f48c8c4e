//! Programs that must not compile: the compiler's message has the sentences that the program's first lines say after
//! `//~`. Only these are compared, so that another version of the compiler may write the rest as it likes.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The library that this test was built with: the newest one beside the test's own program.
fn library(deps: &Path) -> PathBuf {
    let is_library = |path: &PathBuf| {
        let name = path.file_name().unwrap().to_string_lossy();
        name.starts_with("libtch_ignite-") && name.ends_with(".rlib")
    };
    let files = fs::read_dir(deps).unwrap().map(|entry| entry.unwrap().path());
    let changed = |path: &PathBuf| fs::metadata(path).unwrap().modified().unwrap();
    files.filter(is_library).max_by_key(changed).expect("no library beside the test")
}

/// The message of the compiler about a program; `None` where it compiles.
fn compiled(program: &Path, deps: &Path, library: &Path, out: &Path) -> Option<String> {
    let compiler = std::env::var("RUSTC").unwrap_or_else(|_| "rustc".into());
    let output = Command::new(compiler)
        .args(["--edition", "2024", "--crate-type", "lib", "--emit", "metadata"])
        .args(["--color", "never", "--diagnostic-width", "10000"])
        .arg("--extern")
        .arg(format!("tch_ignite={}", library.display()))
        .arg("-L")
        .arg(format!("dependency={}", deps.display()))
        .arg("--out-dir")
        .args([out, program])
        .output()
        .unwrap();
    (!output.status.success()).then(|| String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn wrong_programs_do_not_compile_and_the_message_says_why() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/compile_fail");
    let deps = std::env::current_exe().unwrap().parent().unwrap().to_owned();
    let library = library(&deps);
    let out = tempfile::tempdir().unwrap();
    let right = out.path().join("right.rs");
    fs::write(&right, "pub fn f() -> tch_ignite::engine::Metrics { Default::default() }").unwrap();
    // Otherwise all programs would fail, and for the wrong reason.
    assert_eq!(compiled(&right, &deps, &library, out.path()), None);
    let mut programs: Vec<_> =
        fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    programs.retain(|path| path.file_name().is_some_and(|name| name != "main.rs"));
    programs.sort();
    assert!(programs.len() >= 20, "{programs:?}");
    let mut wrong = vec![];
    for program in &programs {
        let name = program.file_stem().unwrap().to_string_lossy();
        let source = fs::read_to_string(program).unwrap();
        let sentences: Vec<_> =
            source.lines().filter_map(|line| line.strip_prefix("//~ ")).collect();
        assert!(!sentences.is_empty(), "{name} says no sentence");
        match compiled(program, &deps, &library, out.path()) {
            None => wrong.push(format!("{name} compiles")),
            Some(message) => wrong.extend(
                sentences
                    .iter()
                    .filter(|sentence| !message.contains(**sentence))
                    .map(|sentence| format!("{name}: '{sentence}' is not in\n{message}")),
            ),
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
