//! Processes that are killed at any instant, in training and while a checkpoint is written: no kill
//! leaves the folder without a whole checkpoint, and what is resumed ends as if there had been none.

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
use tch_ignite::optim::Optimizer;
use tch_ignite::schedule::{CosineAnnealing, ParamScheduler};

/// What the process is to do, and in which folder.
const ROLE: &str = "TCH_IGNITE_TEST_ROLE";
const FOLDER: &str = "TCH_IGNITE_TEST_FOLDER";
const ITERATIONS: &str = "TCH_IGNITE_TEST_ITERATIONS";

fn long() -> bool {
    std::env::var_os("TCH_IGNITE_LONG_TESTS").is_some()
}

/// Trains to the end, from the newest checkpoint, and leaves the bits of the parameters.
fn train(folder: &Path, background: bool) -> anyhow::Result<()> {
    tch::set_num_threads(1);
    let iterations: u64 = std::env::var(ITERATIONS)?.parse()?;
    // Another start each time: only what is restored counts.
    let begun_before = folder.join("begun").exists();
    tch::manual_seed(if begun_before { i64::from(std::process::id()) } else { 1 });
    let vs = VarStore::new(Device::Cpu);
    let root = vs.root();
    let net = nn::seq_t()
        .add(nn::linear(&root / "a", 8, 16, Default::default()))
        .add_fn_t(|x, train| x.relu().dropout(0.2, train))
        .add(nn::linear(&root / "b", 16, 1, Default::default()));
    let optimizer = Optimizer::adam(&vs).build()?;
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
    // From its first whole checkpoint on, a start without one would be seen.
    anyhow::ensure!(resumed.is_some() || !begun_before, "nothing to resume");
    if resumed.is_none() {
        trainer.on(Event::IterationStarted.once(4), {
            let begun = folder.join("begun");
            move |_, _| Ok(std::fs::write(&begun, "")?)
        });
    }
    println!("training");
    trainer.run(&mut cx, &data, Until::iterations(iterations))?;
    let mut bits = String::new();
    let mut variables: Vec<_> = vs.variables().into_iter().collect();
    variables.sort_by(|(a, _), (b, _)| a.cmp(b));
    for (name, tensor) in variables {
        let values = Vec::<f32>::try_from(tensor.detach().view([-1]))?;
        bits += &format!("{name} {:x?}\n", values.iter().map(|v| v.to_bits()).collect::<Vec<_>>());
    }
    std::fs::write(folder.join("outcome"), bits)?;
    Ok(())
}

fn spawn(test: &str, role: &str, folder: &Path, iterations: u64) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture", "--test-threads=1"])
        .env(ROLE, role)
        .env(FOLDER, folder)
        .env(ITERATIONS, iterations.to_string())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Waits for the line; false if the process ended without it.
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
        let iterations = 40 * kills;
        let straight = tempfile::tempdir().unwrap();
        assert!(spawn(NAME, role, straight.path(), iterations).wait().unwrap().success());
        let expected = std::fs::read_to_string(straight.path().join("outcome")).unwrap();

        let folder = tempfile::tempdir().unwrap();
        let mut random = 88_172_645_463_325_252_u64;
        let mut killed = 0;
        while killed < kills {
            let mut child = spawn(NAME, role, folder.path(), iterations);
            assert!(says(&mut child, "training"), "after {killed} kills");
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            std::thread::sleep(Duration::from_micros(random % 30_000));
            child.kill().unwrap();
            if child.wait().unwrap().success() {
                break;
            }
            killed += 1;
            if folder.path().join("begun").exists() {
                assert!(whole_checkpoints(folder.path()) > 0, "kill {killed} left none");
                let checkpoints = folder.path().join("checkpoints");
                let latest = std::fs::read_to_string(checkpoints.join("latest")).unwrap();
                verify(checkpoints.join(latest.trim())).unwrap();
            }
        }
        assert!(spawn(NAME, role, folder.path(), iterations).wait().unwrap().success());
        let outcome = std::fs::read_to_string(folder.path().join("outcome")).unwrap();
        assert!(outcome == expected, "after {killed} kills, {role}");
        // Nothing that was about to be removed when the process was killed stays for ever.
        assert_eq!(whole_checkpoints(folder.path()), 2);
        assert!(killed > kills / 2, "the run ended after {killed} kills: make it longer");
    }
}

#[cfg(feature = "signals")]
#[test]
fn a_signal_ends_the_run_in_good_order_and_a_second_at_once() {
    use tch_ignite::handlers::InterruptOn;

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
    let send = |child: &Child, signal: &str| {
        let id = child.id().to_string();
        assert!(Command::new("kill").args([signal, &id]).status().unwrap().success());
    };
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
