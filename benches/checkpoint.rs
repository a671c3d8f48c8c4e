//! Compares saving and loading a model of 100 million parameters with Adam's state to writing (with fsync) and
//! reading the same bytes, on the same disk in the same run. `cargo bench --bench checkpoint -- FOLDER` says where
//! the files go; a number behind it, as in `-- FOLDER 10`, sets the millions of parameters.

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use tch::nn::VarStore;
use tch::{Device, Kind};
use tch_ignite::checkpoint::write_state;
use tch_ignite::engine::Engine;
use tch_ignite::optim::Optimizer;

const ROUNDS: usize = 5;

fn seconds<T>(call: impl FnOnce() -> T) -> f64 {
    let begun = Instant::now();
    drop(call());
    begun.elapsed().as_secs_f64()
}

/// Writes the bytes as checkpoints are written: to a new file, which replaces the old one at the end. The old file
/// must exist until then in both measurements, because its pages stay in memory, and writing to reused pages of the
/// page cache is much faster than to new ones.
fn plain_write(path: &Path, bytes: &[u8]) {
    let beside = path.with_extension("new");
    let mut file = File::create(&beside).unwrap();
    file.write_all(bytes).unwrap();
    file.sync_all().unwrap();
    std::fs::rename(beside, path).unwrap();
}

fn plain_read(path: &Path, buffer: &mut [u8]) {
    File::open(path).unwrap().read_exact(buffer).unwrap();
}

fn main() {
    let mut args = std::env::args().skip(1).filter(|arg| !arg.starts_with('-'));
    let folder = args.next().map_or_else(std::env::temp_dir, PathBuf::from);
    let millions: i64 = args.next().and_then(|arg| arg.parse().ok()).unwrap_or(100);
    let folder = folder.join(format!("checkpoint-bench-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let vs = VarStore::new(Device::Cpu);
    for layer in 0..25 {
        let _ = vs.root().randn_standard(&format!("layer{layer}"), &[millions * 40, 1000]);
    }
    let optimizer = Optimizer::adam(&vs).build().unwrap();
    let loss = vs.trainable_variables().iter().map(|v| v.sum(Kind::Float)).sum();
    optimizer.backward_step(&loss).unwrap();
    optimizer.zero_grad().unwrap();
    let mut trainer = Engine::new(|_: &mut (), _, _: ()| Ok(()));
    trainer.track("model", &vs).track("optimizer", &optimizer);

    let (ours, plain) = (folder.join("checkpoint.safetensors"), folder.join("plain"));
    write_state(&ours, &trainer.checkpoint(&()).unwrap()).unwrap();
    let mut bytes = std::fs::read(&ours).unwrap();
    println!("{:.2} GB, best and median of {ROUNDS}, in turn", bytes.len() as f64 / 1e9);
    let mut times = [const { vec![] }; 4];
    plain_write(&plain, &bytes);
    for _ in 0..ROUNDS {
        times[0].push(seconds(|| plain_write(&plain, &bytes)));
        times[1].push(seconds(|| write_state(&ours, &trainer.checkpoint(&()).unwrap()).unwrap()));
        times[2].push(seconds(|| plain_read(&plain, &mut bytes)));
        times[3].push(seconds(|| trainer.load_checkpoint(&mut (), &ours, true).unwrap()));
    }
    for times in &mut times {
        times.sort_by(f64::total_cmp);
    }
    for (what, base, ours) in [("save", 0, 1), ("load", 2, 3)] {
        let at = |index: usize| (times[base][index], times[ours][index]);
        let (best, median) = (at(0), at(ROUNDS / 2));
        println!(
            "{what}: plain {:.3} s, checkpoint {:.3} s, ratio {:.2} (medians {:.3}, {:.3}: {:.2})",
            best.0,
            best.1,
            best.1 / best.0,
            median.0,
            median.1,
            median.1 / median.0
        );
    }
    std::fs::remove_dir_all(&folder).unwrap();
}
