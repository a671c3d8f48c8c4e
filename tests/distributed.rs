//! Tests with real processes that train together, some of which die.

#![cfg(unix)]

mod common;

#[path = "distributed/collectives.rs"]
mod collectives;
#[path = "distributed/data_parallel.rs"]
mod data_parallel;
#[path = "distributed/failures.rs"]
mod failures;
#[path = "distributed/interop.rs"]
mod interop;
#[path = "distributed/ranks.rs"]
mod ranks;

/// Our declarations of gloo's classes are only right while libtorch has the only virtual tables of these classes.
#[test]
fn no_gloo_tables_of_our_own() {
    let library = concat!(env!("OUT_DIR"), "/libtch_ignite_distributed.a");
    let Ok(output) = std::process::Command::new("nm").args(["-C", library]).output() else {
        common::skipped("there is no nm to list a library's symbols with");
        return;
    };
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let symbols = String::from_utf8_lossy(&output.stdout);
    assert!(symbols.contains("tig_dist_new"), "not our library");
    for line in symbols.lines().filter(|line| line.contains("vtable for")) {
        let ours = !line.contains("vtable for gloo::")
            && !line.contains("vtable for c10d::ProcessGroupGloo");
        assert!(ours, "{line}");
    }
}
