//! Tests of how features work together. Random training programs are run by the engine, with stops and resumes, and
//! by a textbook's loop that knows neither engine nor handlers. Both must have the same outcome.
//!
//! `scripts/seams.sh` runs more of them. A program whose outcomes differ is made smaller and printed as a test, which
//! can be pasted below.

#![cfg(unix)]

mod compare;
mod engine_run;
mod program;
mod reference;
mod world;

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, Once, PoisonError};
use std::time::{Duration, Instant};

use proptest::strategy::{Strategy, ValueTree};
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

use program::names::*;
use program::programs;

/// A program that takes longer than this is printed.
const SLOW: Duration = Duration::from_secs(2);

/// How much numbers may differ. The second tolerance is for programs that amplify rounding errors tenfold. Programs
/// that amplify them even more are not compared. L-BFGS, which divides by small differences of gradients, has the second
/// tolerance alone, as its golden cases have.
const TOLERANCES: [f64; 2] = [1e-12, 1e-9];

/// How long the search for a smaller program that differs may take.
const SHRINKING: Duration = Duration::from_secs(60);

/// A temporary folder, in memory where that is possible, because checkpoints are synced.
fn folder() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

/// Keeps planted panics from being printed.
fn quiet() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let usual = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            let text = info.payload().downcast_ref::<String>();
            if text.is_none_or(|text| !text.contains(engine_run::PLANTED)) {
                usual(info);
            }
        }));
    });
}

/// The difference between the outcomes of the engine and of the textbook's loop, if there is one.
fn difference(program: &Program) -> Option<String> {
    // Only one program runs at a time, because the process has one random number generator.
    static ONE: Mutex<()> = Mutex::new(());
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    quiet();
    let folder = folder();
    let run = || {
        let got = engine_run::run(program, folder.path());
        let expected = reference::run(program, 0., got.other_size_after);
        let is_lbfgs = matches!(program.optimizer, program::Algorithm::Lbfgs { .. });
        for tolerance in TOLERANCES.into_iter().skip(usize::from(is_lbfgs)) {
            let differs = compare::difference(&expected, &got, tolerance)?;
            let shaken = reference::run(program, tolerance / 10., got.other_size_after);
            let shaken = compare::difference(&expected, &shaken, tolerance);
            if shaken.is_none_or(|shaken| shaken.place > differs.place) {
                return Some(differs.text);
            }
        }
        None
    };
    // The program gets a thread of its own, because gradients may be off in the thread afterwards.
    let ran = std::thread::scope(|scope| scope.spawn(run).join());
    ran.unwrap_or_else(|payload| {
        let text = payload.downcast_ref::<String>().cloned();
        Some(format!("a panic that was not caught: {}", text.unwrap_or_default()))
    })
}

#[track_caller]
fn equals_the_reference(program: Program) {
    if let Some(difference) = difference(&program) {
        panic!("{difference}\n{}", as_a_test(&program));
    }
}

fn as_a_test(program: &Program) -> String {
    format!("#[test]\nfn a_program() {{\n    equals_the_reference(\n        {program},\n    );\n}}")
}

/// The random numbers for the program with this number. A number stands for the same program as long as the generator
/// of programs is not changed.
fn runner(seed: u64) -> TestRunner {
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &bytes);
    TestRunner::new_with_rng(Config { failure_persistence: None, ..Config::default() }, rng)
}

/// If the program with this number differs: the smallest program found that still differs, and its difference.
fn failing(seed: u64) -> Option<(Program, String)> {
    let mut smallest = programs().new_tree(&mut runner(seed)).unwrap().current();
    let mut text = difference(&smallest)?;
    let begun = Instant::now();
    while begun.elapsed() < SHRINKING {
        let smaller = smallest.smaller().into_iter();
        let found =
            smaller.map(|smaller| (difference(&smaller), smaller)).find(|(text, _)| text.is_some());
        let Some((Some(new), smaller)) = found else { break };
        (smallest, text) = (smaller, new);
    }
    Some((smallest, text))
}

/// Runs the programs with these numbers, and returns how many differ.
fn differences(seeds: impl Iterator<Item = u64>) -> usize {
    let mut differ = 0;
    for seed in seeds {
        let begun = Instant::now();
        if let Some((program, text)) = failing(seed) {
            differ += 1;
            println!("program {seed}: {text}\n\n{}\n", as_a_test(&program));
        } else if begun.elapsed() > SLOW {
            println!("program {seed} took {:?}", begun.elapsed());
        }
    }
    differ
}

/// A program that runs in processes starts this test in each of them.
#[test]
#[ignore = "is no test by itself: programs_of_fixed_seeds_equal_the_reference starts it in processes of their own (cargo test --release --features distributed,mlflow --test seams programs_of_fixed_seeds)"]
fn one_engine_of_a_program() {
    quiet();
    engine_run::child();
}

#[test]
fn a_batch_that_cannot_be_fetched_again_is_fetched_once_more() {
    equals_the_reference(Program::default().breaks(vec![
        Break { place: In(IterationStarted), number: 1, how: Interrupt, then: Resume },
        Break { place: Refetch, number: 1, how: Error, then: Again },
    ]));
}

#[test]
fn a_log_is_cut_before_a_batch_is_fetched_again_in_vain() {
    equals_the_reference(
        Program::default()
            .budget(Epochs(1))
            .epoch_length(Some(2))
            .log(Some(When { at: IterationCompleted, every: 1, after: 1 }))
            .checkpoint(When { at: IterationStarted, every: 1, after: 0 })
            .on_exception(true)
            .resumed_at_the_end(true)
            .breaks(vec![Break { place: Refetch, number: 2, how: Error, then: Resume }]),
    );
}

#[test]
fn sparse_gradients_of_a_window_come_back_sparse() {
    equals_the_reference(
        Program::default()
            .model(Table)
            .optimizer(SparseAdam { beta1: 0.9, beta2: 0.999 })
            .lr_of_biases(Some(0.1))
            .accumulate(4)
            .checkpoint(When { at: GetBatchStarted, every: 1, after: 0 })
            .resumed_at_the_end(true),
    );
}

#[test]
fn programs_of_fixed_seeds_equal_the_reference() {
    assert_eq!(differences(0..200), 0);
}

/// Runs many programs for `scripts/seams.sh`; environment variables say how many, from which number on, and in how
/// many processes.
#[test]
#[ignore = "takes as long as it is told to: scripts/seams.sh 5000"]
fn more_programs_equal_the_reference() {
    let number = |name: &str, usual: u64| {
        std::env::var(name).map_or(usual, |text| text.parse().expect("a number"))
    };
    let (count, seed) = (number("SEAMS_PROGRAMS", 1000), number("SEAMS_SEED", 0));
    let jobs = number("SEAMS_JOBS", 1).clamp(1, count.max(1));
    if jobs == 1 {
        assert_eq!(differences(seed..seed + count), 0);
        return;
    }
    let begun = Instant::now();
    // Each job runs the same share of the programs.
    let job = |job: u64| {
        let (first, next) = (count * job / jobs, count * (job + 1) / jobs);
        let mut process = Command::new(std::env::current_exe().unwrap());
        process.args(["--exact", "more_programs_equal_the_reference", "--ignored", "--nocapture"]);
        process.env("SEAMS_JOBS", "1").env("SEAMS_SEED", (seed + first).to_string());
        process.env("SEAMS_PROGRAMS", (next - first).to_string()).stdout(Stdio::piped());
        process.spawn().unwrap()
    };
    let processes: Vec<_> = (0..jobs).map(job).collect();
    let (mut differ, mut succeeded) = (0, true);
    std::thread::scope(|scope| {
        let hear = |mut process: Child| {
            let lines =
                BufReader::new(process.stdout.take().unwrap()).lines().map_while(Result::ok);
            let own = |line: &String| !["running ", "test "].iter().any(|w| line.starts_with(w));
            let mut differ = 0;
            for line in lines.filter(own).filter(|line| !line.is_empty()) {
                differ += usize::from(line.contains("fn a_program()"));
                println!("{line}");
            }
            (differ, process.wait().unwrap().success())
        };
        let heard: Vec<_> =
            processes.into_iter().map(|process| scope.spawn(move || hear(process))).collect();
        for heard in heard {
            let (of_job, success) = heard.join().unwrap();
            differ += of_job;
            succeeded &= success;
        }
    });
    println!("{count} programs from {seed} on: {differ} differences, {:.0?}", begun.elapsed());
    assert!(succeeded && differ == 0);
}
