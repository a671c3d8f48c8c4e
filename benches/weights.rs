//! Reads 1 GB of weights from a file of `torch.save`, into new tensors or into a store, or only its bytes.
//! `scripts/bench.sh weights` runs all of these in turns, and `torch.load` in `weights.py`.
//!
//! Prints one line of JSON: the seconds, and the most memory in MB that reading has added to what was there before. The file
//! is in the page cache, because a disk would hide all else.

use std::fs::{self, File};
use std::io::{Read, copy, sink};
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result};
use clap::{Parser, ValueEnum};
use tch::nn::VarStore;
use tch::{Device, Tensor};
use tch_ignite::pytorch::{self, Names, load_weights, save_weights};

#[derive(Parser)]
struct Args {
    #[arg(long)]
    file: PathBuf,
    #[arg(long, value_enum)]
    way: Way,
    /// cargo bench always passes this option
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Clone, Copy, ValueEnum, PartialEq)]
enum Way {
    /// Writes the file
    Write,
    /// The bytes, into new memory
    Bytes,
    /// The bytes, into memory that is there
    Buffer,
    Tensors,
    Store,
}

/// 64 layers of 16 MiB.
fn store() -> VarStore {
    let vs = VarStore::new(Device::Cpu);
    for layer in 0..64 {
        // Random values touch all memory, which zeros from the system would not.
        let _ = (vs.root() / format!("layer{layer}")).randn_standard("weight", &[2048, 2048]);
    }
    vs
}

fn read_bytes(file: &Path, buffer: &mut [u8]) -> Result<()> {
    Ok(File::open(file)?.read_exact(buffer)?)
}

/// A line of what the system knows of this process, in MB.
fn memory(key: &str) -> Result<f64> {
    let status = fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix(key)).context("no such line")?;
    let kib: f64 = line.trim_matches(|c: char| !c.is_ascii_digit()).parse()?;
    Ok(kib * 1024. / 1e6)
}

/// The seconds that a call takes, and the memory that it adds. The result is dropped afterwards.
fn measured<T>(call: impl FnOnce() -> Result<T>) -> Result<(f64, f64)> {
    // Sets the highest memory so far to that of now.
    fs::write("/proc/self/clear_refs", "5")?;
    let before = memory("VmRSS:")?;
    let begin = Instant::now();
    let made = call()?;
    let seconds = begin.elapsed().as_secs_f64();
    let added = memory("VmHWM:")? - before;
    drop(made);
    Ok((seconds, added))
}

fn main() -> Result<()> {
    let args = Args::parse();
    let file = &args.file;
    if args.way == Way::Write {
        return Ok(save_weights(&store(), file, &Names::new())?);
    }
    let length = copy(&mut File::open(file)?, &mut sink())? as usize;
    let (seconds, added) = match args.way {
        Way::Write | Way::Bytes => measured(|| {
            let mut buffer = vec![0; length];
            read_bytes(file, &mut buffer)?;
            Ok(buffer)
        })?,
        Way::Buffer => {
            let mut buffer = vec![1; length];
            measured(|| read_bytes(file, &mut buffer))?
        }
        Way::Tensors => measured(|| {
            let value = pytorch::read(file)?;
            let mut tensors = vec![];
            value.walk(&mut |_, value| tensors.extend(value.as_tensor().map(|one| one.tensor())));
            Ok(tensors.into_iter().collect::<tch_ignite::Result<Vec<Tensor>>>()?)
        })?,
        Way::Store => {
            let vs = store();
            measured(|| Ok(load_weights(&vs, file, &Names::new())?))?
        }
    };
    println!(r#"{{"seconds": {seconds:.4}, "added_mb": {added:.1}}}"#);
    Ok(())
}
