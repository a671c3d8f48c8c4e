//! Shows that a run that is killed and resumed ends with bit for bit the parameters of an uninterrupted one.
//!
//! The program starts itself three times: once to be killed in mid epoch, as by a power cut, once to go on from
//! there, and once to train without a break. Then it compares every bit of the parameters.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use tch::nn::{self, ModuleT, VarStore};
use tch::{Device, Kind, Tensor};
use tch_ignite::checkpoint::{Checkpoint, load_weights, save_weights};
use tch_ignite::data::{Batch, Loader};
use tch_ignite::engine::{Engine, Event, Until};
use tch_ignite::handlers::InterruptOn;
use tch_ignite::metrics::RunningAverage;
use tch_ignite::optim::Optimizer;
use tch_ignite::schedule::CosineAnnealingScheduler;

/// Trains, gets killed, resumes, compares.
#[derive(Parser)]
struct Args {
    /// Folder for the checkpoints [default: a new one]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Only train in that folder, from the newest checkpoint if there is one
    #[arg(long)]
    train: bool,
    /// Iterations in all
    #[arg(long, default_value_t = 400)]
    iterations: u64,
    /// Fewer iterations
    #[arg(long)]
    smoke: bool,
}

fn train(folder: &Path, iterations: u64) -> Result<()> {
    tch::set_num_threads(1);
    tch::manual_seed(1);
    let vs = VarStore::new(Device::Cpu);
    let root = vs.root();
    let net = nn::seq_t()
        .add(nn::linear(&root / "fc1", 16, 64, Default::default()))
        // Dropout draws random numbers in every step; these are resumed too.
        .add_fn_t(|x, train| x.relu().dropout(0.2, train))
        .add(nn::linear(&root / "fc2", 64, 1, Default::default()));
    let optimizer = Optimizer::adam(&vs).build()?;
    let x = (Tensor::arange(16_000, (Kind::Float, Device::Cpu)) * 0.1).sin().view([1000, 16]);
    let y = x.square().sum_dim_intlist(1i64, true, Kind::Float);
    let data = Loader::new(&x, &y, 32)?.shuffle(5);

    let mut trainer = Engine::new(|net: &mut (nn::SequentialT, Optimizer), _, (x, y): Batch| {
        let loss = net.0.forward_t(&x, true).mse_loss(&y, tch::Reduction::Mean);
        net.1.backward_step(&loss)?;
        Ok(loss.detach())
    });
    trainer
        .metric("loss", RunningAverage::new())
        .attach(CosineAnnealingScheduler::new(&optimizer, "lr", 1e-2, 1e-4, 150))
        .attach(InterruptOn::signals()?)
        .attach(Checkpoint::new(folder).n_saved(2).on(Event::IterationCompleted.every(25)))
        .track("model", &vs)
        .track("optimizer", &optimizer);
    let mut cx = (net, optimizer);
    if let Some(resumed) = trainer.resume(&mut cx, folder)? {
        println!("{resumed}");
    }
    let summary = trainer.run(&mut cx, &data, Until::iterations(iterations))?;
    println!("{summary}, loss {:.6}", trainer.state.metrics.get("loss")?);
    save_weights(&vs, folder.join("weights.bin"))?;
    Ok(())
}

/// The command that starts this program again, to train in `folder`.
fn start(folder: &Path, iterations: u64) -> Result<Command> {
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("--train").arg("--out").arg(folder).args(["--iterations", &iterations.to_string()]);
    Ok(command)
}

fn compare(folder: &Path, iterations: u64) -> Result<()> {
    let (killed, straight) = (folder.join("killed"), folder.join("straight"));
    for part in [&killed, &straight] {
        std::fs::create_dir_all(part)?;
        for file in std::fs::read_dir(part)? {
            std::fs::remove_file(file?.path())?;
        }
    }
    let mut child = start(&killed, iterations)?.stdout(Stdio::null()).spawn()?;
    let begun = Instant::now();
    while !killed.join("latest").exists() {
        ensure!(begun.elapsed() < Duration::from_secs(60), "no checkpoint within a minute");
        std::thread::sleep(Duration::from_millis(1));
    }
    child.kill().context("cannot kill the first run")?;
    child.wait()?;
    let latest = std::fs::read_to_string(killed.join("latest"))?;
    println!("killed when {} was the latest checkpoint", latest.trim());
    ensure!(start(&killed, iterations)?.status()?.success(), "the resumed run failed");
    println!("and without a break:");
    ensure!(start(&straight, iterations)?.status()?.success(), "the straight run failed");
    let bytes = |folder: &Path| std::fs::read(folder.join("weights.bin"));
    ensure!(bytes(&killed)? == bytes(&straight)?, "the parameters differ");
    // The saved parameters can be loaded.
    let vs = VarStore::new(Device::Cpu);
    let root = vs.root();
    let _layers = (
        nn::linear(&root / "fc1", 16, 64, Default::default()),
        nn::linear(&root / "fc2", 64, 1, Default::default()),
    );
    load_weights(&vs, killed.join("weights.bin"))?;
    println!("the same parameters, bit for bit");
    Ok(())
}

fn main() -> ExitCode {
    let args = Args::parse();
    let iterations = if args.smoke { 100 } else { args.iterations };
    let run = || match &args.out {
        Some(folder) if args.train => train(folder, iterations),
        Some(folder) => compare(folder, iterations),
        None => {
            let folder = std::env::temp_dir().join(format!("resume-{}", std::process::id()));
            let result = compare(&folder, iterations);
            let _ = std::fs::remove_dir_all(&folder);
            result
        }
    };
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
