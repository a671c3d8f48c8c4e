//! Checks the links of README and `docs`: in the files they lead to files, and `src/guide.rs` leads the same names to
//! modules of the documentation.

use std::fs;
use std::path::{Path, PathBuf};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn pages() -> Vec<PathBuf> {
    let mut pages = vec![root().join("README.md"), root().join("CONTRIBUTING.md")];
    for folder in ["docs", "docs/guide"] {
        let files = fs::read_dir(root().join(folder)).unwrap().map(|file| file.unwrap().path());
        pages.extend(files.filter(|path| path.extension().is_some_and(|ext| ext == "md")));
    }
    pages
}

/// The targets of the inline links in a text, and the names and targets that it defines.
fn links(text: &str) -> (Vec<&str>, Vec<(&str, &str)>) {
    let inline =
        text.split("](").skip(1).filter_map(|rest| Some(rest.split_once(')')?.0)).collect();
    let defined = text.lines().filter_map(|line| line.strip_prefix('[')?.split_once("]: "));
    (inline, defined.collect())
}

/// One sentence for each link of a page that leads nowhere; `modules` is the text of `src/guide.rs`.
fn broken(page: &Path, text: &str, modules: &str) -> Vec<String> {
    let folder = page.parent().unwrap();
    let (inline, defined) = links(text);
    let targets = inline.into_iter().chain(defined.iter().map(|(_, target)| *target));
    let files = targets.filter(|target| !target.starts_with("http") && !target.starts_with('#'));
    let missing = files.filter(|target| !folder.join(target).exists());
    let mut wrong: Vec<_> =
        missing.map(|target| format!("{}: no file '{target}'", page.display())).collect();
    let in_guide = modules.contains(page.file_name().unwrap().to_str().unwrap());
    for (name, target) in defined {
        if in_guide && !target.starts_with("http") && !modules.contains(&format!("[{name}]: ")) {
            wrong.push(format!("{}: src/guide.rs has no '{name}'", page.display()));
        }
    }
    wrong
}

#[test]
fn links_of_the_pages_lead_somewhere() {
    let modules = fs::read_to_string(root().join("src/guide.rs")).unwrap();
    let pages = pages();
    let wrong =
        pages.iter().flat_map(|page| broken(page, &fs::read_to_string(page).unwrap(), &modules));
    let wrong: Vec<_> = wrong.collect();
    assert!(pages.len() > 20 && wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn a_link_that_leads_nowhere_is_found() {
    let page = root().join("docs/guide/data.md");
    let text =
        "[a](nowhere.md) [b](metrics.md) [c](https://example.org) [d][e]\n\n[e]: ../METRICS.md\n";
    let wrong = broken(&page, text, "guide/data.md");
    assert_eq!(wrong.len(), 2, "{wrong:?}");
}
