//! What a folder of checkpoints holds, whatever happened to it: kills between two steps of a write, full
//! disks, several handlers, other programs' files.

mod common;

use std::cell::RefCell;
use std::path::Path;
use std::process::Command;
use std::rc::Rc;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tch::nn::VarStore;
use tch::{Device, Tensor};
use tch_ignite::Result;
use tch_ignite::checkpoint::{Checkpoint, Mode, read_state, save_weights, verify, write_state};
use tch_ignite::engine::{Engine, Event, Until};
use tch_ignite::handlers::{EMAHandler, Evaluate, History};
use tch_ignite::loggers::{CsvLogger, JsonLinesLogger, Logger, RunFolder, TensorBoard};
use tch_ignite::metrics::Mean;

type Small = Engine<'static, (), i64, f64>;

fn store() -> VarStore {
    let vs = VarStore::new(Device::Cpu);
    let root = vs.root();
    let _variables = (root.ones("weight", &[2, 3]), root.zeros_no_train("buffer", &[4]));
    vs
}

/// A trainer that does nothing.
fn small() -> Small {
    let mut trainer = Engine::new(|_: &mut (), _, batch: i64| Ok(batch as f64));
    trainer.track("model", &store()).track_output();
    trainer.metric("mean", Mean::new());
    trainer
}

fn serial() -> MutexGuard<'static, ()> {
    static SERIAL: Mutex<()> = Mutex::new(());
    SERIAL.lock().unwrap_or_else(PoisonError::into_inner)
}

fn files(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<_> = names.filter(|name| !name.starts_with('.')).collect();
    names.sort();
    names
}

fn text(error: tch_ignite::Error) -> String {
    format!("{:#}", anyhow::Error::from(error))
}

/// Ends the epochs with these values of the metric.
fn scores(trainer: &mut Small, scores: &'static [f64]) {
    trainer.on(Event::EpochCompleted, move |_, engine| {
        engine.state.metrics.set("score", scores[engine.state.epoch as usize - 1]);
        Ok(())
    });
}

#[test]
fn files_of_a_killed_process_go_on_the_list() -> Result<()> {
    let _serial = serial();
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let make = || {
        let mut trainer = small();
        trainer.attach(Checkpoint::new(folder.path()).n_saved(2));
        trainer
    };
    make().run(&mut (), vec![1], Until::epochs(3))?;
    // Killed between the rename of the third and the removal of the first.
    std::fs::copy(path("checkpoint_3.safetensors"), path("copy")).unwrap();
    std::fs::remove_file(path("checkpoint_3.safetensors")).unwrap();
    let orphan = std::fs::read(path("checkpoint_2.safetensors")).unwrap();
    let mut next = make();
    next.resume(&mut (), folder.path())?;
    next.run(&mut (), vec![1], Until::epochs(5))?;
    assert_eq!(
        files(folder.path()),
        ["checkpoint_4.safetensors", "checkpoint_5.safetensors", "copy", "latest"]
    );
    std::fs::write(path("checkpoint_2.safetensors"), &orphan).unwrap();
    // One that is damaged, and one of another run, are nobody's.
    let mut damaged = orphan.clone();
    *damaged.last_mut().unwrap() ^= 1;
    std::fs::write(path("checkpoint_1.safetensors"), &damaged).unwrap();
    let other = tempfile::tempdir().unwrap();
    let mut foreign = small();
    foreign.attach(Checkpoint::new(other.path()));
    foreign.run(&mut (), vec![1], Until::epochs(1))?;
    std::fs::copy(other.path().join("checkpoint_1.safetensors"), path("foreign.safetensors"))
        .unwrap();
    std::fs::remove_file(path("copy")).unwrap();
    let mut next = make();
    next.load_checkpoint(&mut (), path("checkpoint_5.safetensors"), true)?;
    next.run(&mut (), vec![1], Until::epochs(6))?;
    assert_eq!(
        files(folder.path()),
        [
            "checkpoint_1.safetensors",
            "checkpoint_5.safetensors",
            "checkpoint_6.safetensors",
            "foreign.safetensors",
            "latest"
        ]
    );
    Ok(())
}

#[test]
fn handlers_at_one_event_do_not_lose_each_others_files() -> Result<()> {
    let _serial = serial();
    let folder = tempfile::tempdir().unwrap();
    let vs = store();
    let best = || Checkpoint::new(folder.path()).weights(&vs).best(1, "score", Mode::Max);
    let make = || {
        let mut trainer = small();
        scores(&mut trainer, &[0.5, 0.9, 0.7, 0.8]);
        // The first is written before the second has chosen.
        let best = Rc::new(RefCell::new(best()));
        trainer.attach(Checkpoint::new(folder.path())).attach(best.clone());
        (trainer, best)
    };
    let (mut trainer, _) = make();
    trainer.run(&mut (), vec![1], Until::epochs(2))?;
    drop(trainer);
    let (mut trainer, best) = make();
    trainer.resume(&mut (), folder.path())?.unwrap();
    trainer.run(&mut (), vec![1], Until::epochs(4))?;
    let kept: Vec<_> = best.borrow().saved().map(|(score, _)| score).collect();
    assert_eq!(kept, [0.9]);
    assert_eq!(
        files(folder.path()),
        ["checkpoint_4.safetensors", "latest", "model_score=0.9000.safetensors"]
    );
    Ok(())
}

#[test]
fn of_more_files_than_asked_for_the_best_counts() -> Result<()> {
    let _serial = serial();
    let (folder, aside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let worse = "checkpoint_score=0.5000.safetensors";
    let make = || {
        let mut trainer = small();
        scores(&mut trainer, &[0.5, 0.9, 0.7, 0.95]);
        let (from, to) = (folder.path().join(worse), aside.path().join(worse));
        trainer.on(Event::EpochCompleted.once(2), move |_, _| {
            std::fs::copy(&from, &to)?;
            Ok(())
        });
        trainer.attach(Checkpoint::new(folder.path()).best(1, "score", Mode::Max));
        trainer
    };
    make().run(&mut (), vec![1], Until::epochs(2))?;
    // Killed before the worse one was removed.
    std::fs::copy(aside.path().join(worse), folder.path().join(worse)).unwrap();
    for (epochs, expected) in [
        (3, &[worse, "checkpoint_score=0.9000.safetensors"][..]),
        (4, &["checkpoint_score=0.9500.safetensors"]),
    ] {
        let mut trainer = make();
        trainer.resume(&mut (), folder.path())?.unwrap();
        trainer.run(&mut (), vec![1], Until::epochs(epochs))?;
        assert_eq!(files(folder.path()), [expected, &["latest"]].concat());
    }
    Ok(())
}

#[test]
fn a_broken_file_with_any_extension_is_told() -> Result<()> {
    let _serial = serial();
    let folder = tempfile::tempdir().unwrap();
    let make = || {
        let mut trainer = small();
        trainer.attach(Checkpoint::new(folder.path()).n_saved(2).ext("ckpt"));
        trainer
    };
    make().run(&mut (), vec![1], Until::epochs(2))?;
    let newest = folder.path().join("checkpoint_2.ckpt");
    let whole = std::fs::read(&newest).unwrap();
    std::fs::write(folder.path().join("notes.txt"), "nothing of ours").unwrap();
    for broken in [&whole[..0], &whole[..5], &whole[..50], &whole[..whole.len() - 1]] {
        std::fs::write(&newest, broken).unwrap();
        let resumed = make().resume(&mut (), folder.path())?.unwrap();
        assert_eq!((resumed.iteration, resumed.skipped.len()), (1, 1), "{resumed}");
        assert!(resumed.to_string().contains("checkpoint_2.ckpt"), "{resumed}");
    }
    // By its content alone.
    std::fs::write(&newest, &whole).unwrap();
    std::fs::write(folder.path().join("odd.bin"), &whole[..whole.len() / 2]).unwrap();
    let resumed = make().resume(&mut (), folder.path())?.unwrap();
    assert_eq!((resumed.iteration, resumed.skipped.len()), (2, 1), "{resumed}");
    Ok(())
}

#[test]
fn what_is_no_folder_is_an_error_but_none_is_not() -> Result<()> {
    let _serial = serial();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file.safetensors");
    save_weights(&store(), &file)?;
    assert!(text(small().resume(&mut (), &file).unwrap_err()).contains("file.safetensors"));
    assert!(small().resume(&mut (), folder.path().join("missing"))?.is_none());
    Ok(())
}

#[test]
fn an_evaluators_checkpoints_are_not_the_trainers() -> Result<()> {
    let _serial = serial();
    let folder = tempfile::tempdir().unwrap();
    let make = |by_hand: bool| {
        let mut evaluator = small();
        scores(&mut evaluator, &[0.]);
        let best = Checkpoint::new(folder.path()).name("best").best(2, "mean", Mode::Max);
        let best = Rc::new(RefCell::new(best.on(Event::Completed)));
        evaluator.attach(best.clone());
        let mut trainer = small();
        trainer.attach(Checkpoint::new(folder.path()));
        // Each evaluation sees a larger mean.
        let data = Rc::new(RefCell::new(0));
        let next = move || {
            *data.borrow_mut() += 1;
            vec![*data.borrow()]
        };
        match by_hand {
            true => {
                _ = trainer.on(Event::EpochStarted, move |cx, _| {
                    evaluator.reset()?;
                    evaluator.run(cx, next(), Until::epochs(1))?;
                    Ok(())
                })
            }
            false => {
                _ = trainer.attach(Evaluate::on(Event::EpochStarted, "val", evaluator, next()))
            }
        }
        // The last that is written.
        trainer.on(Event::Completed, |_, _| Ok(()));
        (trainer, best)
    };
    for by_hand in [false, true] {
        let (mut trainer, best) = make(by_hand);
        trainer.on(Event::EpochCompleted.once(3), |_, _| anyhow::bail!("killed"));
        assert!(trainer.run(&mut (), vec![1], Until::epochs(4)).is_err());
        assert!(best.borrow().saved().count() <= 2);
        let written = files(folder.path());
        assert!(written.iter().filter(|name| name.starts_with("best")).count() <= 2, "{written:?}");
        drop((trainer, best));
        let (mut trainer, _) = make(by_hand);
        let resumed = trainer.resume(&mut (), folder.path())?.unwrap();
        assert!(resumed.path.ends_with("checkpoint_2.safetensors"), "{resumed}");
    }
    Ok(())
}

#[test]
fn checkpoints_of_another_program_are_passed_over_and_told() -> Result<()> {
    let _serial = serial();
    let folder = tempfile::tempdir().unwrap();
    let mut trainer = small();
    trainer.attach(Checkpoint::new(folder.path()));
    trainer.run(&mut (), vec![1], Until::epochs(2))?;
    let mut other = small();
    other.attach(Checkpoint::new(folder.path()).name("other"));
    other.attach(EMAHandler::new(&store(), 0.5)?);
    other.run(&mut (), vec![1], Until::epochs(1))?;
    drop((trainer, other));
    let mut next = small();
    next.attach(Checkpoint::new(folder.path()));
    let resumed = next.resume(&mut (), folder.path())?.unwrap();
    assert_eq!(resumed.iteration, 2);
    let told = resumed.to_string();
    assert!(told.contains("of another program: its handler 'ema_momentum'"), "{told}");
    // Where none fits, the newest says what does not.
    let mut misfit = small();
    misfit.attach(Checkpoint::new(folder.path())).attach(History::new());
    let error = text(misfit.resume(&mut (), folder.path()).unwrap_err());
    assert!(error.contains("ema_momentum") || error.contains("history"), "{error}");
    Ok(())
}

#[test]
fn time_passes_only_with_a_file() -> Result<()> {
    let _serial = serial();
    let folder = tempfile::tempdir().unwrap();
    let mut trainer = small();
    scores(&mut trainer, &[f64::NAN, 0.5, 0.7, 0.9]);
    let pause = Duration::from_millis(40);
    let best = Checkpoint::new(folder.path()).best(9, "score", Mode::Max).every(2 * pause);
    trainer.attach(best);
    // NaN at 90 ms; at 130 ms it is still due, then not before 210 ms.
    trainer.on(Event::EpochStarted, move |_, engine| {
        std::thread::sleep(if engine.state.epoch == 1 { 9 * pause / 4 } else { pause / 2 });
        Ok(())
    });
    trainer.run(&mut (), vec![1], Until::epochs(3))?;
    assert_eq!(files(folder.path()), ["checkpoint_score=0.5000.safetensors", "latest"]);
    Ok(())
}

#[test]
fn a_clock_that_was_put_back_does_not_make_the_old_the_newest() -> Result<()> {
    let _serial = serial();
    let folder = tempfile::tempdir().unwrap();
    let make = || {
        let mut trainer = small();
        trainer.attach(Checkpoint::new(folder.path()).n_saved(3));
        trainer
    };
    make().run(&mut (), vec![1], Until::epochs(1))?;
    // As if it had been written in a hundred years.
    let path = folder.path().join("checkpoint_1.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let key = b"\"written\":\"1";
    let at = bytes.windows(key.len()).position(|window| window == key).unwrap() + key.len() - 1;
    bytes[at] = b'4';
    fix_checksum(&mut bytes);
    std::fs::write(&path, bytes).unwrap();
    verify(&path)?;
    let mut next = make();
    next.resume(&mut (), folder.path())?;
    next.run(&mut (), vec![1], Until::epochs(2))?;
    assert_eq!(make().resume(&mut (), folder.path())?.unwrap().iteration, 2);
    Ok(())
}

fn fix_checksum(bytes: &mut [u8]) {
    let key = b"\"crc32c\":\"";
    let at = bytes.windows(key.len()).position(|window| window == key).unwrap() + key.len();
    bytes[at..at + 8].copy_from_slice(b"00000000");
    let crc = format!("{:08x}", crc32c::crc32c(&bytes[8..]));
    bytes[at..at + 8].copy_from_slice(crc.as_bytes());
}

#[test]
fn other_data_is_told_and_another_batch_size_keeps_the_place() -> Result<()> {
    use tch_ignite::data::{Batch, BatchSize, DataLoader, Loader, TensorDataset};
    let _serial = serial();
    let x = Tensor::arange(20, (tch::Kind::Int64, Device::Cpu));
    let more = Tensor::arange(24, (tch::Kind::Int64, Device::Cpu));
    let make = |folder: &Path| {
        let mut trainer =
            Engine::new(|seen: &mut Vec<i64>, _: &mut Engine<_, Batch, _>, (x, _)| {
                seen.extend(Vec::<i64>::try_from(x)?);
                Ok(())
            });
        trainer.attach(Checkpoint::new(folder).on(Event::IterationCompleted.once(3)));
        trainer
    };
    for by_worker in [false, true] {
        let folder = tempfile::tempdir().unwrap();
        let run =
            |trainer: &mut Engine<'static, _, Batch, ()>, x: &Tensor, size, seed, seen: &mut _| {
                let until = Until::epochs(1);
                match by_worker {
                    false => trainer.run(seen, Loader::new(x, x, size)?.shuffle(seed), until),
                    true => {
                        let data = TensorDataset::new(x, x)?;
                        let loader = DataLoader::new(data, size)?.shuffle(seed).num_workers(2);
                        assert_eq!(BatchSize::from(&loader).get(), size as u64);
                        trainer.run(seen, loader, until)
                    }
                }
            };
        let mut seen = vec![];
        let mut trainer = make(folder.path());
        trainer.on(Event::IterationStarted.once(4), |_, _| anyhow::bail!("killed"));
        run(&mut trainer, &x, 4, 1, &mut seen).unwrap_err();
        drop(trainer);
        let mut next = make(folder.path());
        next.resume(&mut seen, folder.path())?.unwrap();
        let summary = run(&mut next, &x, 2, 1, &mut seen)?;
        // Two batches of 2 are left of the epoch of 5 batches, and 8 samples of the pass.
        assert_eq!(summary.warnings, ["batch_size of the data: 4 then, 2 now"]);
        assert_eq!(seen.len(), 16);
        let mut distinct = seen.clone();
        distinct.sort();
        distinct.dedup();
        assert_eq!(distinct.len(), 16, "{seen:?}");
        let mut next = make(folder.path());
        next.resume(&mut seen, folder.path())?.unwrap();
        let warnings = run(&mut next, &more, 4, 2, &mut seen)?.warnings.join("; ");
        assert!(warnings.contains("samples of the data: 20 then, 24 now"), "{warnings}");
        assert!(warnings.contains("seed of the order of the data: 1 then, 2 now"), "{warnings}");
    }
    Ok(())
}

#[test]
fn what_fails_or_panics_leaves_an_emergency_checkpoint_to_go_on_from() -> Result<()> {
    let _serial = serial();
    let expected = {
        let mut trainer = small();
        trainer.run(&mut (), vec![1, 2, 3], Until::epochs(2))?;
        trainer.state.metrics.get("mean")?
    };
    let hits = |iteration: u64, of: &str, at: &str| of == at && iteration == 5;
    for at in ["step", "handler", "data", "nothing"] {
        for panics in [false, true] {
            let folder = tempfile::tempdir().unwrap();
            let make = |at: &'static str| {
                let fail = move || {
                    assert!(!panics, "panic of the {at}");
                    anyhow::bail!("error of the {at}")
                };
                let mut trainer =
                    Engine::new(move |_: &mut (), engine: &mut Engine<_, _, _>, batch: i64| {
                        if hits(engine.state.iteration, at, "step") {
                            fail()?;
                        }
                        Ok(batch as f64)
                    });
                trainer.track("model", &store()).track_output().metric("mean", Mean::new());
                trainer.on(Event::IterationStarted, move |_, engine| {
                    if hits(engine.state.iteration, at, "handler") { fail() } else { Ok(()) }
                });
                trainer
                    .attach(Checkpoint::new(folder.path()).on(Event::Completed).on_exception(true));
                trainer
            };
            let data = |at: &'static str| {
                let fetched = std::cell::Cell::new(0);
                tch_ignite::data::restartable(move || {
                    let fetched = fetched.clone();
                    (1..=3).inspect(move |_| {
                        fetched.set(fetched.get() + 1);
                        assert!(at != "data" || fetched.get() != 2, "panic of the data");
                    })
                })
            };
            let until = Until::epochs(2).epoch_length(3);
            let failed = make(at).run(&mut (), data(at), until);
            if at == "nothing" {
                failed?;
                continue;
            }
            let error = text(failed.unwrap_err());
            assert!(error.contains(&format!("of the {at}")), "{error}");
            assert_eq!(files(folder.path()), ["emergency.safetensors", "latest"], "{at} {panics}");
            let mut next = make("nothing");
            next.resume(&mut (), folder.path())?.unwrap();
            next.run(&mut (), data("nothing"), until)?;
            assert_eq!(next.state.iteration, 6, "{at} {panics}");
            // A step that failed is given up; all else is repeated.
            if at == "data" {
                assert_eq!(next.state.metrics.get("mean")?, expected, "{at} {panics}");
            }
        }
    }
    Ok(())
}

#[test]
fn an_error_in_the_background_does_not_keep_the_emergency_checkpoint() -> Result<()> {
    let _serial = serial();
    let folder = tempfile::tempdir().unwrap();
    let mut trainer = small();
    trainer.attach(Checkpoint::new(folder.path()).background(true).on_exception(true));
    let blocked = folder.path().join("checkpoint_2.safetensors");
    std::fs::create_dir_all(blocked.join("full")).unwrap();
    trainer.on(Event::IterationStarted.once(3), |_, _| anyhow::bail!("something else"));
    let error = text(trainer.run(&mut (), vec![1], Until::epochs(5)).unwrap_err());
    assert!(error.contains("something else") && error.contains("checkpoint_2"), "{error}");
    read_state(folder.path().join("emergency.safetensors"))?;
    verify(folder.path().join("checkpoint_1.safetensors"))
}

/// Runs a test of this file in a namespace of its own, where disks can be mounted; false if this system
/// does not let us.
fn in_namespace(test: &str, script: &str) -> bool {
    let allowed = Command::new("unshare").args(["-rm", "true"]).output();
    if !allowed.is_ok_and(|output| output.status.success()) {
        common::skipped(format!(
            "{test}: no namespaces here (unshare -rm), so no disk that is full or read-only"
        ));
        return false;
    }
    let folder = tempfile::tempdir().unwrap();
    let status = Command::new("unshare")
        .args(["-rm", "sh", "-ec", script, "sh"])
        .arg(folder.path())
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env(DISK, folder.path())
        .status()
        .unwrap();
    assert!(status.success());
    true
}

const DISK: &str = "TCH_IGNITE_TEST_DISK";

type Writes = (&'static str, Box<dyn Fn() -> Result<()>>);

/// Each way of writing a file, under a name.
fn writers(folder: &Path) -> Vec<Writes> {
    let vs = VarStore::new(Device::Cpu);
    let _ = vs.root().ones("weight", &[50_000]);
    let history = History::new().metric("mean");
    let mut trainer = Engine::new(|_: &mut (), _, batch: i64| Ok(batch as f64));
    trainer.metric("mean", tch_ignite::metrics::RunningAverage::new()).attach(history.clone());
    trainer.run(&mut (), vec![1; 500], Until::epochs(1)).unwrap();
    let state = move || {
        let mut state = tch_ignite::checkpoint::StateDict::new();
        state.set_tensor("weight", Tensor::ones([50_000], (tch::Kind::Float, Device::Cpu)));
        state
    };
    let path = |name: &str| folder.join(name);
    let (checkpoint, weights) = (path("a.safetensors"), path("w.safetensors"));
    let (csv, report) = (path("history.csv"), path("run"));
    #[allow(unused_mut)]
    let mut all: Vec<Writes> = vec![
        ("a.safetensors", Box::new(move || write_state(&checkpoint, &state()))),
        ("w.safetensors", Box::new(move || save_weights(&vs, &weights))),
        (
            "history.csv",
            Box::new({
                let history = history.clone();
                move || history.write_csv(&csv)
            }),
        ),
        (
            "run",
            Box::new(move || {
                let run = RunFolder::create(&report)?;
                for step in 0..100 {
                    run.scalar("a scalar with a name of some length", 0.5, step)?;
                }
                run.flush()?;
                run.write_report()
            }),
        ),
    ];
    #[cfg(feature = "plots")]
    {
        let svg = path("history.svg");
        let tags: Vec<String> =
            (0..3).map(|number| format!("{number} {}", "x".repeat(1000))).collect();
        all.push((
            "history.svg",
            Box::new(move || {
                let panels: Vec<_> = tags.iter().map(|tag| (tag.as_str(), &["mean"][..])).collect();
                history.plot(&svg, &panels)
            }),
        ));
    }
    all
}

#[test]
fn a_full_disk_is_an_error_that_leaves_what_was_there() {
    const NAME: &str = "a_full_disk_is_an_error_that_leaves_what_was_there";
    let Some(disk) = std::env::var_os(DISK) else {
        in_namespace(NAME, "mount -t tmpfs -o size=1500k tmpfs \"$1\"; shift; exec \"$@\"");
        return;
    };
    let disk = Path::new(&disk);
    let fill = || {
        let mut ballast = std::fs::File::create(disk.join("ballast")).unwrap();
        while std::io::Write::write(&mut ballast, &[7; 4096]).is_ok_and(|written| written > 0) {}
    };
    let free = || std::fs::remove_file(disk.join("ballast")).unwrap();
    for (name, write) in writers(disk) {
        fill();
        let error = text(write().expect_err(name));
        assert!(error.contains(name) && error.contains("No space left"), "{name}: {error}");
        let rest: Vec<_> = files(disk).into_iter().filter(|file| file.contains(".part-")).collect();
        assert_eq!(rest, [""; 0], "nothing half-written stays");
        free();
    }
    // Loggers that were open before keep what they could not write.
    let loggers: [(&str, Box<dyn Logger>); 3] = [
        ("scalars.csv", Box::new(CsvLogger::open(disk.join("scalars.csv")).unwrap())),
        ("scalars.jsonl", Box::new(JsonLinesLogger::open(disk.join("scalars.jsonl")).unwrap())),
        ("tfevents", Box::new(TensorBoard::create(disk.join("board")).unwrap())),
    ];
    fill();
    for (name, logger) in &loggers {
        (0..500).for_each(|step| logger.scalar("loss", 0.5, step).unwrap());
        let error = text(logger.flush().unwrap_err());
        assert!(error.contains(name) && error.contains("No space left"), "{name}: {error}");
    }
    free();
    loggers.iter().for_each(|(_, logger)| logger.flush().unwrap());
    for (name, rows) in [("scalars.csv", 501), ("scalars.jsonl", 500)] {
        assert_eq!(std::fs::read_to_string(disk.join(name)).unwrap().lines().count(), rows);
    }
    // Training goes on from where it was once there is room.
    let folder = disk.join("checkpoints");
    for background in [false, true] {
        let make = || {
            let mut trainer = small();
            let large = VarStore::new(Device::Cpu);
            let _ = large.root().ones("weight", &[50_000]);
            trainer.track("large", &large);
            trainer.attach(Checkpoint::new(&folder).background(background));
            trainer
        };
        let mut trainer = make();
        let (ballast, latest) = (disk.join("ballast"), folder.join("latest"));
        trainer.on(Event::EpochStarted.once(3), move |_, _| {
            // In the background it may still be on its way.
            while !std::fs::read_to_string(&latest).is_ok_and(|name| name.contains("_4.")) {
                std::thread::sleep(Duration::from_millis(5));
            }
            let mut file = std::fs::File::create(&ballast)?;
            while std::io::Write::write(&mut file, &[7; 4096]).is_ok_and(|written| written > 0) {}
            Ok(())
        });
        let error = text(trainer.run(&mut (), vec![1, 2], Until::epochs(5)).unwrap_err());
        assert!(error.contains("No space left"), "{error}");
        verify(folder.join("checkpoint_4.safetensors")).unwrap();
        let latest = std::fs::read_to_string(folder.join("latest")).unwrap();
        assert_eq!(latest, "checkpoint_4.safetensors\n");
        assert!(trainer.state.iteration >= 6 && trainer.state.metrics.get("mean").unwrap() == 1.5);
        free();
        trainer.run(&mut (), vec![1, 2], Until::epochs(5)).unwrap();
        assert_eq!(files(&folder), ["checkpoint_10.safetensors", "latest"]);
        drop(trainer);
        let resumed = make().resume(&mut (), &folder).unwrap().unwrap();
        assert_eq!((resumed.iteration, resumed.skipped.len()), (10, 0));
        std::fs::remove_dir_all(&folder).unwrap();
    }
}

#[test]
fn a_read_only_folder_is_an_error_that_leaves_what_was_there() {
    const NAME: &str = "a_read_only_folder_is_an_error_that_leaves_what_was_there";
    let Some(disk) = std::env::var_os(DISK) else {
        in_namespace(NAME, "mount -t tmpfs -o size=50m tmpfs \"$1\"; shift; exec \"$@\"");
        return;
    };
    let disk = Path::new(&disk);
    let mount = |how: &str| {
        let status = Command::new("mount").args(["-o", how]).arg(disk).status().unwrap();
        assert!(status.success());
    };
    let folder = disk.join("checkpoints");
    let make = || {
        let mut trainer = small();
        trainer.attach(Checkpoint::new(&folder));
        trainer
    };
    make().run(&mut (), vec![1], Until::epochs(2)).unwrap();
    mount("remount,ro");
    for (name, write) in writers(disk) {
        let error = text(write().expect_err(name));
        assert!(error.contains(name) && error.contains("Read-only"), "{name}: {error}");
    }
    // Reading needs no lock.
    let mut plain = small();
    assert_eq!(plain.resume_with(&mut (), &folder, false).unwrap().unwrap().iteration, 2);
    let error = text(make().run(&mut (), vec![1], Until::epochs(3)).unwrap_err());
    assert!(error.contains("Read-only"), "{error}");
    mount("remount,rw");
    verify(folder.join("checkpoint_2.safetensors")).unwrap();
    assert_eq!(files(&folder), ["checkpoint_2.safetensors", "latest"]);
    let mut next = make();
    next.resume(&mut (), &folder).unwrap().unwrap();
    next.run(&mut (), vec![1], Until::epochs(3)).unwrap();
    assert_eq!(files(&folder), ["checkpoint_3.safetensors", "latest"]);
}
