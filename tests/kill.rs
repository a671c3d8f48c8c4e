//! Tests of processes that are killed at any instant, in training and while a checkpoint is written: no kill leaves
//! the folder without a whole checkpoint, and a resumed run ends as if there had been no kill, in its logs too. Other
//! tests ask processes to end by a signal.

#![cfg(unix)]

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use tch::nn::{self, ModuleT, VarStore};
use tch::{Device, Kind, Tensor};
use tch_ignite::checkpoint::{Checkpoint, verify};
use tch_ignite::data::{Batch, Loader};
use tch_ignite::engine::{Engine, Event, Stop, Until};
#[cfg(feature = "signals")]
use tch_ignite::handlers::{EarlyStopping, Evaluate, History, InterruptOn};
use tch_ignite::loggers::{
    CsvLogger, JsonLinesLogger, Logger, OutputHandler, RunFolder, TensorBoard,
};
use tch_ignite::metrics::Mean;
use tch_ignite::optim::{GroupOptions, LowPrecision, Optimizer};
use tch_ignite::schedule::{CosineAnnealing, ParamScheduler};

/// These variables say what a process is to do, and in which folder.
const ROLE: &str = "TCH_IGNITE_TEST_ROLE";
const FOLDER: &str = "TCH_IGNITE_TEST_FOLDER";
const ITERATIONS: &str = "TCH_IGNITE_TEST_ITERATIONS";
/// Set for a process that is to be killed: it waits in its last iteration until that happens.
const WAITS: &str = "TCH_IGNITE_TEST_WAITS";

fn long() -> bool {
    std::env::var_os("TCH_IGNITE_LONG_TESTS").is_some()
}

/// Trains from the newest checkpoint to the end, and writes the bits of the parameters to a file.
fn train(folder: &Path, background: bool) -> anyhow::Result<()> {
    tch::set_num_threads(1);
    let iterations: u64 = std::env::var(ITERATIONS)?.parse()?;
    // Each process but the first starts from other parameters, so the result is right only if the checkpoint restores
    // them.
    let begun_before = folder.join("begun").exists();
    tch::manual_seed(if begun_before { i64::from(std::process::id()) } else { 1 });
    let vs = VarStore::new(Device::Cpu);
    let root = vs.root();
    let halves = ["master", "kahan", "stochastic"].map(|name| {
        let value = Tensor::ones([16], (Kind::BFloat16, Device::Cpu));
        (&root / "half").add(name, value, true)
    });
    let net = nn::seq_t()
        .add(nn::linear(&root / "a", 8, 16, Default::default()))
        .add_fn_t(|x, train| x.relu().dropout(0.2, train))
        .add_fn(move |x| halves.iter().fold(x.shallow_clone(), |x, half| x * half))
        .add(nn::linear(&root / "b", 16, 1, Default::default()));
    // Four algorithms, of which one counts for the group and one keeps numbers of its own, and each storage of bf16.
    let stored = |storage| GroupOptions::new().low_precision(storage);
    let optimizer = Optimizer::adamw_schedule_free(&vs)
        .group("a.weight", |name| name == "a.weight", GroupOptions::muon())
        .group("a.bias", |name| name == "a.bias", GroupOptions::nadam())
        .group("b.weight", |name| name == "b.weight", GroupOptions::new().warmup_steps(9))
        .group("b.bias", |name| name == "b.bias", GroupOptions::ademamix().alpha_warmup(30))
        .group("master", |name| name == "half.master", stored(LowPrecision::MasterWeights))
        .group("kahan", |name| name == "half.kahan", stored(LowPrecision::KahanSum))
        .group(
            "stochastic",
            |name| name == "half.stochastic",
            stored(LowPrecision::StochasticRounding { seed: 4 }),
        )
        .build()?;
    let x = (Tensor::arange(400, (Kind::Float, Device::Cpu)) * 0.7).sin().view([50, 8]);
    let y = x.sum_dim_intlist(1i64, true, Kind::Float);
    let data = Loader::new(&x, &y, 7)?.shuffle(3);
    let mut trainer =
        Engine::new(|(net, optimizer): &mut (nn::SequentialT, Optimizer), _, (x, y): Batch| {
            let loss = net.forward_t(&x, true).mse_loss(&y, tch::Reduction::Mean);
            optimizer.backward_step(&loss)?;
            Ok(())
        });
    let lr = optimizer.knob("lr")?;
    trainer.track("model", &vs).track("optimizer", &optimizer);
    trainer.attach(ParamScheduler::new("lr", lr, CosineAnnealing::new(1e-2, 1e-4, 30)));
    let checkpoint = Checkpoint::new(folder.join("checkpoints")).n_saved(2).background(background);
    trainer.attach(checkpoint.on(Event::IterationCompleted));
    let mut cx = (net, optimizer);
    let resumed = trainer.resume(&mut cx, folder.join("checkpoints"))?;
    // A process that begins anew, although an earlier one had a checkpoint, must fail here.
    anyhow::ensure!(resumed.is_some() || !begun_before, "nothing to resume");
    if resumed.is_none() {
        trainer.on(Event::IterationStarted.once(4), {
            let begun = folder.join("begun");
            move |_, _| Ok(std::fs::write(&begun, "")?)
        });
    }
    println!("training");
    tell_progress(&mut trainer, iterations);
    trainer.run(&mut cx, &data, Until::iterations(iterations))?;
    let mut bits = String::new();
    let mut variables: Vec<_> = vs.variables().into_iter().collect();
    variables.sort_by(|(a, _), (b, _)| a.cmp(b));
    for (name, tensor) in variables {
        let values = Vec::<f32>::try_from(tensor.detach().to_kind(Kind::Float).view([-1]))?;
        bits += &format!("{name} {:x?}\n", values.iter().map(|v| v.to_bits()).collect::<Vec<_>>());
    }
    std::fs::write(folder.join("outcome"), bits)?;
    Ok(())
}

fn command(test: &str, role: &str, folder: &Path, iterations: u64) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", test, "--nocapture", "--test-threads=1"])
        .env(ROLE, role)
        .env(FOLDER, folder)
        .env(ITERATIONS, iterations.to_string())
        .stdout(Stdio::piped());
    command
}

fn spawn(test: &str, role: &str, folder: &Path, iterations: u64) -> Child {
    command(test, role, folder, iterations).spawn().unwrap()
}

/// In a process that is to be killed: writes a line for each iteration, and waits in the last one.
fn tell_progress<C: 'static, B: 'static, O: 'static>(
    trainer: &mut Engine<'_, C, B, O>,
    iterations: u64,
) {
    if std::env::var_os(WAITS).is_none() {
        return;
    }
    trainer.on(Event::IterationStarted, move |_, engine| {
        println!("iteration");
        if engine.state.iteration == iterations {
            std::thread::sleep(Duration::from_secs(600));
        }
        Ok(())
    });
}

/// A run that is killed at random instants. Iterations are counted, so that neither a fast machine gets to the end
/// before the last kill, nor a slow one never gets past the start.
struct Killer {
    random: u64,
    killed: u64,
}

impl Killer {
    fn new() -> Self {
        Self { random: 88_172_645_463_325_252, killed: 0 }
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random % bound
    }

    /// Starts the process, lets it do less than `most` iterations, and kills it up to `micros` later.
    fn kill(&mut self, mut command: Command, most: u64, micros: u64) {
        let mut child = command.env(WAITS, "1").spawn().unwrap();
        let output = child.stdout.take().unwrap();
        let mut lines = BufReader::new(output).lines().map(Result::unwrap);
        assert!(lines.any(|line| line.contains("training")), "after {} kills", self.killed);
        let iterations = self.below(most);
        // In its last iteration the process waits, and writes no further line: time runs out there.
        let (told, done) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let mut begun = 0;
            while begun < iterations && lines.next().is_some() {
                begun += 1;
            }
            let _ = told.send(());
            lines.for_each(drop);
        });
        let _ = done.recv_timeout(Duration::from_secs(2));
        std::thread::sleep(Duration::from_micros(self.below(micros)));
        child.kill().unwrap();
        assert!(!child.wait().unwrap().success(), "the process ended before it was killed");
        self.killed += 1;
    }
}

/// Waits until the process prints the line; false if the process ended before that.
fn says(child: &mut Child, line: &str) -> bool {
    let output = child.stdout.as_mut().unwrap();
    BufReader::new(output).lines().any(|read| read.unwrap().contains(line))
}

fn role() -> Option<(String, PathBuf)> {
    Some((std::env::var(ROLE).ok()?, PathBuf::from(std::env::var_os(FOLDER)?)))
}

fn whole_checkpoints(folder: &Path) -> usize {
    let entries = std::fs::read_dir(folder.join("checkpoints")).into_iter().flatten().flatten();
    entries
        .filter(|entry| entry.path().extension().is_some_and(|ext| ext == "safetensors"))
        .filter(|entry| verify(entry.path()).is_ok())
        .count()
}

#[test]
fn a_run_killed_again_and_again_ends_bit_for_bit_the_same() {
    const NAME: &str = "a_run_killed_again_and_again_ends_bit_for_bit_the_same";
    if let Some((role, folder)) = role() {
        return train(&folder, role == "background").unwrap();
    }
    let kills = if long() { 1000 } else { 200 };
    for (role, kills) in [("here", kills / 2), ("background", kills / 2)] {
        // Half of the processes do 10 iterations or more.
        let iterations = 20 * kills;
        let straight = tempfile::tempdir().unwrap();
        assert!(spawn(NAME, role, straight.path(), iterations).wait().unwrap().success());
        let expected = std::fs::read_to_string(straight.path().join("outcome")).unwrap();

        let folder = tempfile::tempdir().unwrap();
        let mut killer = Killer::new();
        while killer.killed < kills {
            killer.kill(command(NAME, role, folder.path(), iterations), 20, 2000);
            if folder.path().join("begun").exists() {
                let killed = killer.killed;
                assert!(whole_checkpoints(folder.path()) > 0, "kill {killed} left none");
                let checkpoints = folder.path().join("checkpoints");
                let latest = std::fs::read_to_string(checkpoints.join("latest")).unwrap();
                verify(checkpoints.join(latest.trim())).unwrap();
            }
        }
        assert!(spawn(NAME, role, folder.path(), iterations).wait().unwrap().success());
        let outcome = std::fs::read_to_string(folder.path().join("outcome")).unwrap();
        assert!(outcome == expected, "after {kills} kills, {role}");
        // Files that were about to be removed when the process was killed do not stay for ever.
        assert_eq!(whole_checkpoints(folder.path()), 2);
    }
}

#[cfg(feature = "signals")]
#[test]
fn a_signal_ends_the_run_in_good_order_and_a_second_at_once() {
    const NAME: &str = "a_signal_ends_the_run_in_good_order_and_a_second_at_once";
    if let Some((role, folder)) = role() {
        let mut trainer = Engine::new(move |_: &mut (), _, _: ()| {
            if role == "slow" {
                println!("training");
                std::thread::sleep(Duration::from_secs(60));
            }
            std::thread::sleep(Duration::from_millis(1));
            Ok(())
        });
        trainer.attach(InterruptOn::signals().unwrap());
        trainer.attach(Checkpoint::new(&folder).on(Event::Completed));
        trainer.on(Event::IterationCompleted.once(3), |_, _| {
            println!("training");
            Ok(())
        });
        let summary = trainer.run(&mut (), vec![(); 100_000], Until::epochs(1)).unwrap();
        println!("{summary}");
        assert!(matches!(summary.stop, Stop::Signal(15)));
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let mut child = spawn(NAME, "quick", folder.path(), 0);
    assert!(says(&mut child, "training"));
    send(&child, "-TERM");
    assert!(child.wait().unwrap().success());
    verify(folder.path().join("interrupted.safetensors")).unwrap();

    let mut child = spawn(NAME, "slow", folder.path(), 0);
    assert!(says(&mut child, "training"));
    send(&child, "-TERM");
    std::thread::sleep(Duration::from_millis(50));
    assert!(child.try_wait().unwrap().is_none(), "the step is finished first");
    send(&child, "-TERM");
    use std::os::unix::process::ExitStatusExt;
    assert_eq!(child.wait().unwrap().signal(), Some(15));
}

#[cfg(feature = "signals")]
fn send(child: &Child, signal: &str) {
    let id = child.id().to_string();
    assert!(Command::new("kill").args([signal, &id]).status().unwrap().success());
}

/// Runs from the newest checkpoint to the end, and logs to every kind of logger.
fn log(folder: &Path, role: &str) -> anyhow::Result<()> {
    let iterations: u64 = std::env::var(ITERATIONS)?.parse()?;
    let run = RunFolder::create(folder.join("run"))?;
    run.config(&serde_json::json!({"lr": 0.1}))?;
    let (csv, json) = (
        CsvLogger::open(folder.join("a/own.csv"))?,
        JsonLinesLogger::open(folder.join("b/own.jsonl"))?,
    );
    let board = TensorBoard::create(folder.join("board"))?;
    let mut trainer = Engine::new(|_: &mut (), engine: &mut Engine<'_, _, _, f64>, x: f64| {
        std::thread::sleep(Duration::from_micros(200));
        Ok(x * engine.state.iteration as f64)
    });
    let mut evaluator = Engine::new(|_: &mut (), _, x: f64| Ok(x));
    evaluator.metric("mean", Mean::new());
    let at = |run: &RunFolder| OutputHandler::each_epoch(run, "within").metric("mean");
    evaluator.attach(at(&run));
    let every = Event::IterationCompleted;
    // The checkpoint is attached before loggers, and saves what they log at its events all the same.
    let checkpoint = Checkpoint::new(folder.join("checkpoints")).n_saved(2);
    trainer
        .attach(checkpoint.on(every.every(7) | Event::EpochCompleted))
        .metric("mean", Mean::new())
        .attach(OutputHandler::new(&run, "training", every).output("loss", |x: &f64| *x))
        .attach(OutputHandler::each_epoch(&run, "epoch").metric("mean"))
        .attach(
            OutputHandler::new(&board, "samples", every)
                .output("loss", |x: &f64| *x)
                .global_step(|state| 64 * state.iteration),
        )
        .attach(tch_ignite::handlers::Evaluate::each_epoch("val", evaluator, vec![1., 2.]))
        .attach(csv.clone())
        .attach(json.clone())
        .attach(run.clone());
    // Logs are flushed between checkpoints, so that a resumed run has rows to remove.
    let flushed = run.clone();
    trainer.on(every.every(3), move |_, _| {
        board.flush()?;
        Ok(flushed.flush()?)
    });
    trainer.on(every, move |_, engine| {
        if engine.state.iteration % 3 == 0 {
            csv.flush()?;
            json.flush()?;
        }
        csv.scalar("a \"tag\"\nof two lines", 0.5, engine.state.iteration)?;
        Ok(json.text("note", &format!("iteration {}", engine.state.iteration), 0)?)
    });
    #[cfg(feature = "signals")]
    if role == "exits" {
        trainer.attach(InterruptOn::signals()?);
    }
    println!("training");
    trainer.resume(&mut (), folder.join("checkpoints"))?;
    tell_progress(&mut trainer, iterations);
    let summary = trainer.run(&mut (), vec![1.; 10], Until::iterations(iterations))?;
    if role == "exits" {
        // The process exits at once, so that no destructor runs.
        std::process::exit(if let Stop::Signal(number) = summary.stop { 128 + number } else { 0 });
    }
    Ok(())
}

/// The rows of each log file, without their times.
fn rows(folder: &Path) -> Vec<(&'static str, Vec<String>)> {
    let csv = |text: &str| {
        text.lines().map(|row| row.split_once(',').map_or(row, |row| row.1).to_owned()).collect()
    };
    let json = |text: &str| {
        let row = |row: &str| {
            let mut row: serde_json::Value = serde_json::from_str(row).unwrap();
            row.as_object_mut().unwrap().remove("time");
            row.to_string()
        };
        text.lines().map(row).collect()
    };
    ["run/scalars.csv", "run/scalars.jsonl", "a/own.csv", "b/own.jsonl"]
        .map(|name| {
            let text = std::fs::read_to_string(folder.join(name)).unwrap();
            (name, if name.ends_with(".csv") { csv(&text) } else { json(&text) })
        })
        .into()
}

const READER: &str = r#"
import sys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
for folder in sys.argv[1:]:
    events = EventAccumulator(folder, size_guidance={"scalars": 0})
    events.Reload()
    for tag in sorted(events.Tags()["scalars"]):
        for scalar in events.Scalars(tag):
            print(tag, scalar.step, scalar.value)
"#;

/// All scalars that TensorBoard's own reader finds; `None` where TensorBoard is not installed.
fn seen_by_tensorboard(folder: &Path) -> Option<String> {
    let python = std::env::var("TENSORBOARD_PYTHON").unwrap_or_else(|_| "python3".into());
    let has = Command::new(&python).args(["-c", "import tensorboard"]).output();
    if !has.is_ok_and(|output| output.status.success()) {
        // The test runner does not capture what is written to stderr directly.
        let text = format!("SKIPPED: {python} has no tensorboard (pip install tensorboard)\n");
        let _ = std::io::Write::write_all(&mut std::io::stderr(), text.as_bytes());
        return None;
    }
    let folders = [folder.join("run"), folder.join("board")];
    let output = Command::new(python).args(["-c", READER]).args(folders).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Some(String::from_utf8(output.stdout).unwrap())
}

#[track_caller]
fn assert_same_logs(folder: &Path, straight: &Path) {
    for ((name, rows), (_, expected)) in rows(folder).into_iter().zip(rows(straight)) {
        assert_eq!(rows, expected, "{name}");
    }
    let (seen, expected) = (seen_by_tensorboard(folder), seen_by_tensorboard(straight));
    if let (Some(seen), Some(expected)) = (seen, expected) {
        assert!(expected.lines().count() > 100, "{expected}");
        assert!(seen == expected, "{seen}");
    }
    let report = std::fs::read_to_string(folder.join("run/report.html")).unwrap();
    assert!(report.contains("training/loss"));
    for part in ["run", "a", "b", "board"] {
        for file in std::fs::read_dir(folder.join(part)).unwrap() {
            let name = file.unwrap().file_name().into_string().unwrap();
            assert!(!name.contains(".part-"), "{name}");
        }
    }
}

#[test]
fn logs_of_a_run_killed_again_and_again_have_each_step_once() {
    const NAME: &str = "logs_of_a_run_killed_again_and_again_have_each_step_once";
    if let Some((role, folder)) = role() {
        return log(&folder, &role).unwrap();
    }
    let kills = if long() { 200 } else { 16 };
    let iterations = 25 * kills;
    let straight = tempfile::tempdir().unwrap();
    assert!(spawn(NAME, "", straight.path(), iterations).wait().unwrap().success());
    assert_eq!(rows(straight.path())[2].1.len() as u64, 1 + 2 * iterations);

    let folder = tempfile::tempdir().unwrap();
    let mut killer = Killer::new();
    while killer.killed < kills {
        // Some kills come before the first checkpoint, most after it.
        let most = if killer.killed < 4 { 5 } else { 50 };
        killer.kill(command(NAME, "", folder.path(), iterations), most, 2000);
    }
    assert!(spawn(NAME, "", folder.path(), iterations).wait().unwrap().success());
    let boards = std::fs::read_dir(folder.path().join("board")).unwrap().count();
    assert!(boards > 3, "most processes were killed before their first checkpoint");
    assert_same_logs(folder.path(), straight.path());
}

#[cfg(feature = "signals")]
#[test]
fn logs_are_whole_when_a_program_exits_after_a_signal() {
    const NAME: &str = "logs_are_whole_when_a_program_exits_after_a_signal";
    if let Some((role, folder)) = role() {
        return log(&folder, &role).unwrap();
    }
    let straight = tempfile::tempdir().unwrap();
    assert!(spawn(NAME, "exits", straight.path(), 200).wait().unwrap().success());
    let folder = tempfile::tempdir().unwrap();
    for wait in [1, 10, 20] {
        let mut child = spawn(NAME, "exits", folder.path(), 200);
        assert!(says(&mut child, "training"));
        std::thread::sleep(Duration::from_millis(wait));
        send(&child, "-TERM");
        assert!(matches!(child.wait().unwrap().code(), Some(0 | 143)));
        // After a signal, even before a process resumes, every logger has a row for each iteration.
        let rows = rows(folder.path());
        let losses = rows[0].1.iter().filter(|row| row.contains("training/loss")).count();
        let (own, notes) = ((rows[2].1.len() - 1) / 2, rows[3].1.len());
        assert_eq!((losses, losses), (own, notes));
    }
    assert!(spawn(NAME, "exits", folder.path(), 200).wait().unwrap().success());
    assert_same_logs(folder.path(), straight.path());
}

#[test]
fn a_second_process_in_a_run_folder_is_refused_at_the_start() {
    const NAME: &str = "a_second_process_in_a_run_folder_is_refused_at_the_start";
    if let Some((_, folder)) = role() {
        let run = RunFolder::create(folder.join("run")).unwrap();
        let csv = CsvLogger::open(folder.join("own.csv")).unwrap();
        println!("training");
        std::thread::sleep(Duration::from_secs(60));
        drop((run, csv));
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let mut child = spawn(NAME, "", folder.path(), 0);
    assert!(says(&mut child, "training"));
    let id = child.id().to_string();
    let error = RunFolder::create(folder.path().join("run")).err().unwrap().to_string();
    assert!(error.contains(&id) && error.contains("folder of its own"), "{error}");
    for file in ["run/scalars.csv", "own.csv"] {
        let error = CsvLogger::open(folder.path().join(file)).err().unwrap().to_string();
        assert!(error.contains("another process") && error.contains(file), "{error}");
    }
    child.kill().unwrap();
    child.wait().unwrap();
    RunFolder::create(folder.path().join("run")).unwrap();
    CsvLogger::open(folder.path().join("own.csv")).unwrap();
}

#[cfg(feature = "signals")]
#[test]
fn engines_listen_to_signals_one_after_the_other() {
    const NAME: &str = "engines_listen_to_signals_one_after_the_other";
    if let Some((role, folder)) = role() {
        let mut first = Engine::new(|_: &mut (), _, x: f64| Ok(x));
        first.attach(InterruptOn::signals().unwrap());
        first.run(&mut (), vec![1.; 3], Until::epochs(1)).unwrap();
        drop(first);
        if role == "nobody listens" {
            println!("training");
            std::thread::sleep(Duration::from_secs(60));
        }
        let mut second = Engine::new(|_: &mut (), _, _: ()| {
            std::thread::sleep(Duration::from_millis(1));
            Ok(())
        });
        second.attach(InterruptOn::signals().unwrap()).attach(Checkpoint::new(&folder));
        second.on(Event::IterationCompleted.once(3), |_, _| {
            println!("training");
            Ok(())
        });
        let data = || vec![(); 100_000];
        let summary = second.run(&mut (), data(), Until::epochs(1)).unwrap();
        assert!(matches!(summary.stop, Stop::Signal(15)));
        println!("saved");
        // The same engine goes on, and the next signal again only suspends the run.
        second.on(Event::IterationCompleted.once(summary.iterations + 3), |_, _| {
            println!("goes on");
            Ok(())
        });
        let summary = second.run(&mut (), data(), Until::epochs(1)).unwrap();
        assert!(matches!(summary.stop, Stop::Signal(15)));
        println!("saved again");
        return;
    }
    use std::os::unix::process::ExitStatusExt;
    let folder = tempfile::tempdir().unwrap();
    let mut child = spawn(NAME, "", folder.path(), 0);
    let output = child.stdout.take().unwrap();
    let mut lines = BufReader::new(output).lines().map(Result::unwrap);
    let mut says = |line: &str| lines.any(|read| read.contains(line));
    assert!(says("training"));
    send(&child, "-TERM");
    assert!(says("saved"));
    verify(folder.path().join("interrupted.safetensors")).unwrap();
    assert!(says("goes on"));
    send(&child, "-TERM");
    assert!(says("saved again"));
    assert!(child.wait().unwrap().success());

    let mut child = spawn(NAME, "nobody listens", folder.path(), 0);
    assert!(self::says(&mut child, "training"));
    send(&child, "-TERM");
    assert_eq!(child.wait().unwrap().signal(), Some(15));
}

#[cfg(feature = "signals")]
#[test]
fn an_old_signal_does_not_stop_a_run_of_a_new_thread() {
    const NAME: &str = "an_old_signal_does_not_stop_a_run_of_a_new_thread";
    if role().is_some() {
        let run = |steps, wait| {
            let mut evaluator = Engine::new(|_: &mut (), _, x: f64| Ok(x));
            evaluator.metric("mean", Mean::new());
            let mut trainer = Engine::new(move |_: &mut (), _, _: ()| {
                std::thread::sleep(Duration::from_millis(wait));
                Ok(())
            });
            trainer.attach(InterruptOn::signals().unwrap());
            trainer.attach(Evaluate::on(Event::Started, "val", evaluator, vec![1.; 3]));
            trainer.on(Event::IterationCompleted.once(3), |_, _| {
                println!("training");
                Ok(())
            });
            trainer.run(&mut (), vec![(); steps], Until::epochs(1)).unwrap().stop
        };
        assert!(matches!(run(100_000, 1), Stop::Signal(15)));
        let stop = std::thread::spawn(move || run(5, 0)).join().unwrap();
        assert!(matches!(stop, Stop::Completed), "{stop:?}");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let mut child = spawn(NAME, "", folder.path(), 0);
    let output = child.stdout.take().unwrap();
    let mut lines = BufReader::new(output).lines().map(Result::unwrap);
    assert!(lines.any(|line| line.contains("training")));
    send(&child, "-TERM");
    lines.for_each(drop);
    assert!(child.wait().unwrap().success());
}

#[cfg(feature = "signals")]
#[test]
fn a_signal_in_an_engine_that_a_handler_runs_stops_both_and_a_second_one_ends_the_process() {
    const NAME: &str =
        "a_signal_in_an_engine_that_a_handler_runs_stops_both_and_a_second_one_ends_the_process";
    if role().is_some() {
        let evaluator = || {
            let mut evaluator =
                Engine::new(|_: &mut (), engine: &mut Engine<'_, _, _, _>, _: ()| {
                    if engine.state.iteration == 3 {
                        println!("evaluating");
                    }
                    std::thread::sleep(Duration::from_millis(1));
                    Ok(())
                });
            evaluator.attach(InterruptOn::signals().unwrap());
            evaluator
        };
        let mut trainer = Engine::new(|_: &mut (), _, _: ()| Ok(()));
        trainer.attach(InterruptOn::signals().unwrap());
        let (mut first, mut second) = (evaluator(), evaluator());
        trainer.on(Event::EpochCompleted.once(1), move |_, _| {
            let stop = first.run(&mut (), vec![(); 100_000], Until::epochs(1))?.stop;
            anyhow::ensure!(matches!(stop, Stop::Signal(15)), "{stop:?}");
            Ok(())
        });
        trainer.on(Event::Interrupt, move |_, _| {
            println!("the trainer stops");
            let stop = second.run(&mut (), vec![(); 5000], Until::epochs(1))?.stop;
            println!("the evaluation after it ended: {stop:?}");
            Ok(())
        });
        trainer.run(&mut (), vec![(); 3], Until::epochs(10)).unwrap();
        return;
    }
    use std::os::unix::process::ExitStatusExt;
    let folder = tempfile::tempdir().unwrap();
    let mut child = spawn(NAME, "", folder.path(), 0);
    let output = child.stdout.take().unwrap();
    let mut lines = BufReader::new(output).lines().map(Result::unwrap);
    let mut says = |line: &str| lines.any(|read| read.contains(line));
    assert!(says("evaluating"));
    send(&child, "-TERM");
    assert!(says("the trainer stops"));
    assert!(says("evaluating"));
    send(&child, "-TERM");
    assert_eq!(child.wait().unwrap().signal(), Some(15));
}

/// How many batches an evaluation has.
#[cfg(feature = "signals")]
const BATCHES: u64 = 20;

/// Trains from the newest checkpoint to the end or a signal, evaluates at several events, and draws random numbers in
/// both.
#[cfg(feature = "signals")]
fn train_and_evaluate(folder: &Path, role: &str) -> anyhow::Result<()> {
    tch::set_num_threads(1);
    tch::manual_seed(3);
    let vs = VarStore::new(Device::Cpu);
    let net = nn::linear(vs.root(), 4, 1, Default::default());
    // The parameters have other values in evaluations.
    let optimizer = Optimizer::adamw_schedule_free(&vs).build()?;
    type Cx = (nn::Linear, Optimizer);
    let noise = || Tensor::rand([3, 4], (Kind::Float, Device::Cpu));
    let evaluator = |name: &'static str| -> anyhow::Result<Engine<'static, Cx, f64, Tensor>> {
        let mut evaluator =
            Engine::new(move |(net, _): &mut Cx, engine: &mut Engine<'_, _, _, _>, _: f64| {
                if engine.state.iteration == 3 {
                    println!("evaluating {name}");
                    if name == "at the end" {
                        // The process ends after this evaluation, so it waits until the signal has come.
                        std::thread::sleep(Duration::from_secs(1));
                    }
                }
                std::thread::sleep(Duration::from_millis(2));
                Ok(tch::no_grad(|| noise().apply(net).square().mean(Kind::Float)))
            });
        evaluator.metric("loss", Mean::new());
        Ok(evaluator)
    };
    let mut own = evaluator("with its own")?;
    own.attach(InterruptOn::signals()?);
    let mut trainer = Engine::new(|(net, optimizer): &mut Cx, _, _: f64| {
        let loss = noise().apply(net).square().mean(Kind::Float);
        optimizer.backward_step(&loss)?;
        Ok(loss)
    });
    let batches = vec![0.; BATCHES as usize];
    let history =
        History::new().epoch_metric("val/loss").epoch_metric("own/loss").metric("often/loss");
    // This one sees the end of an epoch before the evaluations whose values belong to it.
    let early = History::new().epoch_metric("val/loss").epoch_metric("own/loss");
    let mut often = evaluator("often")?;
    let rows = CsvLogger::open(folder.join("often.csv"))?;
    let loss = OutputHandler::new(&rows, "often", Event::IterationCompleted);
    often.attach(loss.output("loss", |loss: &Tensor| loss.double_value(&[])));
    if role != "only the evaluator" {
        trainer.attach(InterruptOn::signals()?);
    }
    trainer
        .track("model", &vs)
        .track("optimizer", &optimizer)
        .metric("loss", Mean::new())
        .attach(early.clone())
        .attach(Evaluate::on(Event::Started, "first", evaluator("at the start")?, batches.clone()))
        .attach(Evaluate::on(Event::IterationCompleted.every(4), "often", often, batches.clone()))
        .attach(Evaluate::each_epoch("val", evaluator("each epoch")?, batches.clone()))
        .attach(Evaluate::each_epoch("own", own, batches.clone()))
        .attach(EarlyStopping::min("val/loss", 100))
        .attach(history.clone())
        .attach(Evaluate::on(Event::Completed, "last", evaluator("at the end")?, batches))
        .attach(
            OutputHandler::each_epoch(&CsvLogger::open(folder.join("log.csv"))?, "").all_metrics(),
        )
        .attach(Checkpoint::new(folder.join("checkpoints")));
    let mut called = std::collections::BTreeMap::new();
    trainer.on(Event::EpochCompleted, {
        let path = folder.join("calls");
        move |_, engine| {
            *called.entry(engine.state.epoch).or_insert(0) += 1;
            let mut calls = std::fs::read_to_string(&path).unwrap_or_default();
            calls += &format!("{}\n", engine.state.epoch);
            Ok(std::fs::write(&path, calls)?)
        }
    });
    let mut cx = (net, optimizer);
    trainer.resume(&mut cx, folder.join("checkpoints"))?;
    let mut summary = trainer.run(&mut cx, vec![0.; 6], Until::epochs(3))?;
    if role == "in one process" {
        while let Stop::Signal(_) = summary.stop {
            println!("stopped");
            summary = trainer.run(&mut cx, vec![0.; 6], Until::epochs(3))?;
        }
    }
    println!("{summary}");
    if let Stop::Signal(number) = summary.stop {
        std::process::exit(128 + number);
    }
    let mut bits = String::new();
    for (name, tensor) in trainer_values(&vs) {
        bits += &format!("{name} {tensor:x?}\n");
    }
    for (history, name) in [&history, &early]
        .into_iter()
        .flat_map(|history| history.names().into_iter().map(move |name| (history, name)))
    {
        let series: Vec<_> =
            history.series(&name)?.into_iter().map(|(at, value)| (at, value.to_bits())).collect();
        bits += &format!("{name} {series:x?}\n");
    }
    for (name, value) in trainer.state.metrics.iter() {
        bits += &format!("{name} {:x}\n", value.read()?.to_bits());
    }
    std::fs::write(folder.join("outcome"), bits)?;
    Ok(())
}

#[cfg(feature = "signals")]
fn trainer_values(vs: &VarStore) -> std::collections::BTreeMap<String, Vec<u32>> {
    let values = |tensor: Tensor| Vec::<f32>::try_from(tensor.detach().view([-1])).unwrap();
    let bits = |tensor| values(tensor).into_iter().map(f32::to_bits).collect();
    vs.variables().into_iter().map(|(name, tensor)| (name, bits(tensor))).collect()
}

#[cfg(feature = "signals")]
#[test]
fn a_signal_in_an_evaluation_stops_it_at_once_and_the_resumed_run_repeats_it() {
    const NAME: &str = "a_signal_in_an_evaluation_stops_it_at_once_and_the_resumed_run_repeats_it";
    if let Some((role, folder)) = role() {
        return train_and_evaluate(&folder, &role).unwrap();
    }
    let outcome = |folder: &Path| {
        let text = |name: &str| std::fs::read_to_string(folder.join(name)).unwrap();
        let rows = |name: &str| {
            let csv = text(name);
            csv.lines().map(|row| row.split_once(',').unwrap().1.to_owned()).collect::<Vec<_>>()
        };
        (text("outcome"), text("calls"), rows("log.csv"), rows("often.csv"))
    };
    let straight = tempfile::tempdir().unwrap();
    assert!(spawn(NAME, "", straight.path(), 0).wait().unwrap().success());
    let expected = outcome(straight.path());
    assert!(expected.0.contains("last/loss") && expected.1 == "1\n2\n3\n");
    for role in ["", "only the evaluator"] {
        let folder = tempfile::tempdir().unwrap();
        for evaluation in ["at the start", "often", "each epoch", "with its own", "at the end"] {
            let mut child = spawn(NAME, role, folder.path(), 0);
            let said = says(&mut child, &format!("evaluating {evaluation}"));
            assert!(said, "{evaluation}");
            send(&child, "-TERM");
            assert_eq!(child.wait().unwrap().code(), Some(143), "{role}: {evaluation}");
            verify(folder.path().join("checkpoints/interrupted.safetensors")).unwrap();
        }
        assert!(spawn(NAME, role, folder.path(), 0).wait().unwrap().success());
        assert_eq!(outcome(folder.path()), expected, "{role}");
    }

    let folder = tempfile::tempdir().unwrap();
    let mut child = spawn(NAME, "in one process", folder.path(), 0);
    let output = child.stdout.take().unwrap();
    let mut lines = BufReader::new(output).lines().map(Result::unwrap);
    let mut says = |line: &str| lines.any(|read| read.contains(line));
    for evaluation in ["at the start", "often", "each epoch", "with its own", "at the end"] {
        assert!(says(&format!("evaluating {evaluation}")), "{evaluation}");
        send(&child, "-TERM");
        assert!(says("stopped"), "{evaluation}");
    }
    assert!(lines.all(|line| !line.contains("stopped")));
    assert!(child.wait().unwrap().success());
    assert_eq!(outcome(folder.path()), expected);
}
