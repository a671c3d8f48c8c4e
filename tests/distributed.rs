//! Real processes that train together, and some that die.

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

/// What our declarations of gloo's types rest on: that libtorch has the only tables of them.
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
