//! Checks on a GPU what the tests check on the CPU. This is a library that `scripts/gpu_check.py` loads into the process
//! of Python's PyTorch, so that no Rust is needed there and PyTorch's profiler sees what is trained here;
//! `scripts/gpu-check.sh --help` says how.

#[expect(dead_code, reason = "nothing is written here")]
#[path = "../chargpt/model.rs"]
mod model;
mod numbers;
#[path = "../conformance/runner/mod.rs"]
mod runner;
mod speed;
mod training;

use anyhow::Result;
use tch::Device;

/// A part of the check, which runs in a process of its own.
struct Part {
    name: &'static str,
    /// How long it may take.
    seconds: u32,
    /// Says in a line what was found; an error is a difference.
    run: fn(Device) -> Result<String>,
}

const fn part(name: &'static str, seconds: u32, run: fn(Device) -> Result<String>) -> Part {
    Part { name, seconds, run }
}

const PARTS: &[Part] = &[
    part("golden training", 40, numbers::golden_training),
    part("golden optimizers", 40, numbers::golden_optimizers),
    part("golden metrics", 40, numbers::golden_metrics),
    part("fused steps against the loop", 20, numbers::fused),
    part("norms and clipping", 15, numbers::clipping),
    part("averages of the weights", 15, numbers::averages),
    part("pinned memory", 15, numbers::pinned_memory),
    part("normalising bytes", 15, numbers::normalizing),
    part("f16 with a GradScaler", 15, training::half),
    part("bf16", 15, training::bfloat16),
    part("exact resume", 15, training::resume),
    part("a process group of one", 20, training::process_group),
    part("digits", 40, training::digits),
    part("speed", 30, speed::speed),
];

fn device(cuda: bool) -> Device {
    if cuda { Device::Cuda(0) } else { Device::Cpu }
}

/// Prints the result and returns the exit status of the process.
fn ended(result: Result<String>) -> i32 {
    match result {
        Ok(text) => {
            println!("{text}");
            0
        }
        Err(error) => {
            println!("{error:#}");
            1
        }
    }
}

/// Prints name and time limit of each part.
// SAFETY (of the three names): no other library of the process has functions that are named so.
#[unsafe(no_mangle)]
pub extern "C" fn gpu_check_parts() {
    for Part { name, seconds, .. } in PARTS {
        println!("{name}\t{seconds}");
    }
}

/// Runs the part of this number.
#[unsafe(no_mangle)]
pub extern "C" fn gpu_check_run(part: usize, cuda: bool) -> i32 {
    ended(PARTS.get(part).map_or_else(
        || Err(anyhow::anyhow!("there is no part {part}")),
        |part| (part.run)(device(cuda)),
    ))
}

/// Trains for so many iterations, with the loss read in each or not. Python's profiler counts what waits.
#[unsafe(no_mangle)]
pub extern "C" fn gpu_check_train(iterations: u64, read: bool, cuda: bool) -> i32 {
    ended(training::iterations(device(cuda), iterations, read))
}
