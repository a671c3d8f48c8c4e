//! Checks that the imports of `src` keep to the floors that docs/ARCHITECTURE.md draws: a room imports only from
//! floors below its own.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// The floor of each room, a file or folder directly below `src`, by the room's name.
type Floors = BTreeMap<String, usize>;

/// Reads the block of docs/ARCHITECTURE.md that is fenced as `floors`: one line a floor, the highest first.
fn floors() -> Floors {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/ARCHITECTURE.md");
    let page = fs::read_to_string(page).unwrap();
    let (_, block) =
        page.split_once("```floors\n").expect("docs/ARCHITECTURE.md has no block ```floors");
    let (block, _) = block.split_once("```").unwrap();
    let mut floors = Floors::new();
    for (height, line) in block.lines().rev().enumerate() {
        for room in line.split_whitespace().skip(1) {
            let drawn = floors.insert(room.to_owned(), height);
            assert!(drawn.is_none(), "'{room}' is drawn on two floors");
        }
    }
    floors
}

/// The name of the room that a file below `src` belongs to.
fn room_of(file: &Path) -> String {
    let first = file.iter().next().unwrap().to_str().unwrap();
    first.strip_suffix(".rs").unwrap_or(first).to_owned()
}

/// The rooms that a source text names after `crate::`, outside comments, and the line of each.
fn imports(text: &str) -> Vec<(usize, String)> {
    let mut found = vec![];
    for (index, line) in text.lines().enumerate() {
        let code = line.split("//").next().unwrap_or_default();
        for (at, _) in code.match_indices("crate::") {
            let path = &code[at + "crate::".len()..];
            let name =
                path.split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap_or_default();
            found.push((index + 1, name.to_owned()));
        }
    }
    found
}

/// One sentence for each import of a file that breaks the rule.
fn violations(floors: &Floors, file: &Path, text: &str) -> Vec<String> {
    let room = room_of(file);
    let Some(own) = floors.get(&room) else {
        return vec![format!("src/{}: '{room}' is on no floor", file.display())];
    };
    let mut wrong = vec![];
    for (line, name) in imports(text) {
        let place = format!("src/{}:{line}", file.display());
        match floors.get(&name) {
            _ if name == room => {}
            None => wrong.push(format!(
                "{place} imports '{name}' through lib.rs or an unknown room: import from where it lives"
            )),
            Some(other) if other >= own => wrong.push(format!(
                "{place}: '{room}' (floor {own}) imports '{name}' (floor {other}), which is not below it"
            )),
            Some(_) => {}
        }
    }
    wrong
}

fn rust_files(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            rust_files(&path, files);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
}

#[test]
fn every_import_of_the_crate_goes_to_a_lower_floor() {
    let (floors, src) = (floors(), Path::new(env!("CARGO_MANIFEST_DIR")).join("src"));
    let mut files = vec![];
    rust_files(&src, &mut files);
    let mut wrong = vec![];
    for path in &files {
        let file = path.strip_prefix(&src).unwrap();
        if file != Path::new("lib.rs") {
            wrong.extend(violations(&floors, file, &fs::read_to_string(path).unwrap()));
        }
    }
    assert!(files.len() > 200 && wrong.is_empty(), "{}", wrong.join("\n"));
}

/// CONTRIBUTING.md shows how an optimizer is added with the files of one, which must be quoted as they are.
#[test]
fn the_walk_quotes_lion_as_it_is() {
    let read =
        |file: &str| fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(file)).unwrap();
    let page = read("CONTRIBUTING.md");
    for (fence, file) in
        [("```cpp\n", "src/bridge/rules/lion.h"), ("```rust\n", "src/optim/algorithms/lion.rs")]
    {
        let (_, block) = page.split_once(fence).unwrap();
        let (block, _) = block.split_once("```").unwrap();
        let is_code = |line: &&str| !line.trim_start().starts_with("//");
        let code: Vec<_> = read(file).lines().filter(is_code).map(str::to_owned).collect();
        assert!(code.join("\n").contains(block.trim_end()), "CONTRIBUTING.md differs from {file}");
    }
}

#[test]
fn every_room_that_is_drawn_exists() {
    for room in floors().keys() {
        let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
        let exists = src.join(room).is_dir() || src.join(format!("{room}.rs")).is_file();
        assert!(exists, "docs/ARCHITECTURE.md draws '{room}', which is not in src");
    }
}

#[test]
fn an_import_from_a_higher_floor_is_found() {
    let floors = floors();
    let metrics = Path::new("metrics/mean.rs");
    let planted = "//! crate::loggers in a comment is no import\nuse crate::error::Result;\nuse crate::engine::{\n    Engine,\n};\n";
    let wrong = violations(&floors, metrics, planted);
    assert_eq!(wrong.len(), 1, "{wrong:?}");
    assert!(wrong[0].starts_with("src/metrics/mean.rs:3: 'metrics'"), "{wrong:?}");
    let inline = "fn f() { crate::supervised::g() }";
    assert_eq!(violations(&floors, metrics, inline).len(), 1);
    assert_eq!(violations(&floors, metrics, "use crate::{Error, Result};").len(), 1);
    assert_eq!(violations(&floors, Path::new("attic/x.rs"), "").len(), 1);
    assert!(violations(&floors, metrics, "use crate::event::Event;").is_empty());
}
