//! Tests of folders of checkpoints: which files are in them after kills between two steps of a write, full disks,
//! several handlers, and files of other programs.

use std::cell::RefCell;
use std::path::Path;
use std::process::Command;
use std::rc::Rc;
use std::time::Duration;

use tch::nn::VarStore;
use tch::{Device, Tensor};
use tch_ignite::Result;
use tch_ignite::checkpoint::{Checkpoint, Mode, read_state, save_weights, verify, write_state};
use tch_ignite::engine::{Engine, Event, Until};
use tch_ignite::handlers::{EMAHandler, Evaluate, History};
use tch_ignite::loggers::{CsvLogger, JsonLinesLogger, Logger, RunFolder, TensorBoard};
use tch_ignite::metrics::Mean;

use crate::common;
use crate::common::serial;

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

#[test]
fn a_folder_that_is_removed_or_replaced_in_a_run_is_an_error() {
    for (word, replace) in [("removed", false), ("replaced", true)] {
        let _one = serial();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("checkpoints");
        let mut trainer = small();
        trainer.attach(Checkpoint::new(&path));
        let removed = path.clone();
        trainer.on(Event::EpochStarted.once(2), move |_, _| {
            std::fs::remove_dir_all(&removed)?;
            if replace {
                std::fs::create_dir(&removed)?;
                std::fs::write(removed.join(".lock"), "")?;
            }
            Ok(())
        });
        let error = text(trainer.run(&mut (), vec![1], Until::epochs(3)).unwrap_err());
        assert!(error.contains("checkpoints") && error.contains(word), "{error}");
        assert_eq!(path.exists(), replace, "it is not made again");
        assert!(!replace || files(&path).is_empty());
    }
}

#[test]
fn a_folder_that_was_removed_between_two_runs_is_made_again() -> Result<()> {
    let _one = serial();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("checkpoints");
    let mut trainer = small();
    trainer.attach(Checkpoint::new(&path));
    trainer.run(&mut (), vec![1], Until::epochs(1))?;
    std::fs::remove_dir_all(&path).unwrap();
    trainer.run(&mut (), vec![1], Until::epochs(2))?;
    assert!(files(&path).contains(&"checkpoint_2.safetensors".to_owned()), "{:?}", files(&path));
    // A handler that is made meanwhile shares the new folder.
    std::fs::remove_dir_all(&path).unwrap();
    let mut other = small();
    other.attach(Checkpoint::new(&path));
    other.run(&mut (), vec![1], Until::epochs(1))?;
    assert!(files(&path).contains(&"checkpoint_1.safetensors".to_owned()));
    Ok(())
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

/// Sets the metric "score" to the next of these values at the end of each epoch.
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
    // The folder now looks as if the process had been killed between the rename of the third file and the removal of
    // the first.
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
    // A damaged file, and one of another run, must not be adopted and removed.
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
        // The first handler writes its checkpoint before the second one has chosen the best.
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
fn the_best_counts_when_there_are_more_files_than_asked_for() -> Result<()> {
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
    // The folder now looks as if the process had been killed before it removed the worse file.
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
    // Files are recognised by their content, whatever their names.
    std::fs::write(&newest, &whole).unwrap();
    std::fs::write(folder.path().join("odd.bin"), &whole[..whole.len() / 2]).unwrap();
    let resumed = make().resume(&mut (), folder.path())?.unwrap();
    assert_eq!((resumed.iteration, resumed.skipped.len()), (2, 1), "{resumed}");
    Ok(())
}

#[test]
fn a_file_instead_of_a_folder_is_an_error_but_no_folder_is_not() -> Result<()> {
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
        // The mean grows from evaluation to evaluation.
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
        // This handler does nothing, at the trainer's last event.
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
    // If no checkpoint fits, the error is that of the newest.
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
    // The first score, at 90 ms, is NaN and not saved; so at 130 ms a checkpoint is still due, and the next not
    // before 210 ms.
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
    // The file now looks as if it had been written in a hundred years.
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
        // The pass has 8 samples left, and so has the epoch.
        assert_eq!(summary.warnings, ["batch_size of the data: 4 then, 2 now"]);
        assert_eq!((seen.len(), summary.iterations), (20, 7));
        let mut distinct = seen.clone();
        distinct.sort();
        distinct.dedup();
        assert_eq!(distinct.len(), 20, "{seen:?}");
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
            // A failed step is not repeated, but a failed fetch is, so that its mean is the same.
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

/// Runs a test of this file in a namespace of its own, where the test can mount disks. Returns false if the system
/// does not allow this.
fn in_namespace(test: &str, script: &str) -> bool {
    let allowed = Command::new("unshare").args(["-rm", "true"]).output();
    if !allowed.is_ok_and(|output| output.status.success()) {
        common::skipped(format!(
            "{test}: no namespaces here (unshare -rm), so no disk that is full or read-only"
        ));
        return false;
    }
    let folder = tempfile::tempdir().unwrap();
    let output = Command::new("unshare")
        .args(["-rm", "sh", "-ec", script, "sh"])
        .arg(folder.path())
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", &common::exact(module_path!(), test), "--nocapture"])
        .env(DISK, folder.path())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && text.contains("1 passed"), "{output:?}");
    true
}

/// The module path of this file's tests, by which the test runner knows them.
const PATH: &str = module_path!();

const DISK: &str = "TCH_IGNITE_TEST_DISK";

type Writes = (&'static str, Box<dyn Fn() -> Result<()>>);

/// The name of each way of writing a file, and a function that does so.
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
    // Loggers that were opened before the disk was full keep the values that they could not write.
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
    // Training goes on from where it was as soon as there is room.
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
        let before = folder.join("checkpoint_2.safetensors");
        trainer.on(Event::EpochStarted.once(3), move |_, _| {
            // In the background the last checkpoint may not be written yet, and the removal of the one before would
            // make room on the disk. So both are waited for.
            let is_latest = || std::fs::read_to_string(&latest).is_ok_and(|n| n.contains("_4."));
            while !is_latest() || before.exists() {
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
    // A run that only reads checkpoints needs no lock.
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

#[test]
fn a_damaged_file_does_not_go_on_the_list() -> Result<()> {
    let _serial = serial();
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let make = || {
        let mut trainer = small();
        let checkpoint = Rc::new(RefCell::new(Checkpoint::new(folder.path()).n_saved(2)));
        trainer.attach(checkpoint.clone());
        (trainer, checkpoint)
    };
    let (mut trainer, _) = make();
    let (from, to) = (path("checkpoint_1.safetensors"), path("aside"));
    trainer.on(Event::EpochCompleted.once(2), move |_, _| Ok(_ = std::fs::copy(&from, &to)?));
    trainer.run(&mut (), vec![1], Until::epochs(3))?;
    drop(trainer);
    for damaged in [false, true] {
        // The folder now looks as if the process had been killed before it removed its first file.
        let mut bytes = std::fs::read(path("aside")).unwrap();
        *bytes.last_mut().unwrap() ^= u8::from(damaged);
        std::fs::write(path("checkpoint_1.safetensors"), bytes).unwrap();
        let (mut trainer, checkpoint) = make();
        trainer.load_checkpoint(&mut (), path("checkpoint_3.safetensors"), true)?;
        trainer.on(Event::IterationStarted, |_, _| anyhow::bail!("stop"));
        trainer.run(&mut (), vec![1], Until::epochs(4)).unwrap_err();
        let names: Vec<_> = checkpoint.borrow().saved().map(|(_, name)| name.to_owned()).collect();
        let whole =
            ["checkpoint_1.safetensors", "checkpoint_2.safetensors", "checkpoint_3.safetensors"];
        assert_eq!(names, if damaged { &whole[1..] } else { &whole });
    }
    Ok(())
}

#[test]
fn a_list_in_a_checkpoint_removes_only_files_with_the_stamp_of_its_run() -> Result<()> {
    let _serial = serial();
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let make = |folder: &Path, name: &str| {
        let mut trainer = small();
        trainer.attach(Checkpoint::new(folder).name(name));
        trainer
    };
    make(folder.path(), "checkpoint").run(&mut (), vec![1], Until::epochs(1))?;
    // The folder gets files of somebody else, of another run and of another handler, and a copy of a checkpoint.
    std::fs::write(path("notes.txt"), "notes").unwrap();
    save_weights(&store(), path("weights.safetensors"))?;
    let other = tempfile::tempdir().unwrap();
    make(other.path(), "checkpoint").run(&mut (), vec![1], Until::epochs(9))?;
    let foreign = "checkpoint_9.safetensors";
    std::fs::copy(other.path().join(foreign), path(foreign)).unwrap();
    std::fs::copy(path("checkpoint_1.safetensors"), path("copy.safetensors")).unwrap();
    make(folder.path(), "other").run(&mut (), vec![1], Until::epochs(1))?;
    let theirs =
        ["notes.txt", "weights.safetensors", foreign, "copy.safetensors", "other_1.safetensors"];
    let mut state = read_state(path("checkpoint_1.safetensors"))?;
    let mut handlers = state.take_part("handlers")?;
    let mut list = handlers.take_part("checkpoint")?;
    let entries: Vec<_> = theirs.iter().map(|name| (0, *name)).collect();
    list.set_value("_saved", entries)?;
    handlers.set_part("checkpoint", list);
    state.set_part("handlers", handlers);
    write_state(path("hostile.safetensors"), &state)?;
    let mut next = make(folder.path(), "checkpoint");
    next.load_checkpoint(&mut (), path("hostile.safetensors"), true)?;
    next.run(&mut (), vec![1], Until::epochs(4))?;
    let there = files(folder.path());
    for name in theirs {
        assert!(there.iter().any(|file| file == name), "{name} is gone: {there:?}");
    }
    assert!(path("checkpoint_4.safetensors").exists());
    assert!(!path("checkpoint_1.safetensors").exists(), "its own is removed");
    // A file that has replaced one of the handler's own files must not be removed either.
    let mut next = make(folder.path(), "checkpoint");
    next.load_checkpoint(&mut (), path("checkpoint_4.safetensors"), true)?;
    let (from, to) = (path("notes.txt"), path("checkpoint_4.safetensors"));
    next.on(Event::EpochCompleted, move |_, _| Ok(_ = std::fs::copy(&from, &to)?));
    next.run(&mut (), vec![1], Until::epochs(5))?;
    assert_eq!(std::fs::read_to_string(path("checkpoint_4.safetensors")).unwrap(), "notes");
    Ok(())
}

#[cfg(unix)]
#[test]
fn pipes_and_links_in_a_folder_are_neither_waited_for_nor_followed() -> Result<()> {
    let _serial = serial();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().to_owned();
    let pipe = |name: &str| {
        let made = Command::new("mkfifo").arg(path.join(name)).status().unwrap();
        assert!(made.success());
    };
    pipe("latest");
    pipe("checkpoint_7.safetensors");
    let (done, finished) = std::sync::mpsc::channel();
    let read = path.clone();
    std::thread::spawn(move || {
        let mut trainer = small();
        trainer.attach(Checkpoint::new(&read));
        let resumed = trainer.resume(&mut (), &read).map(|resumed| resumed.is_some());
        let file = read_state(read.join("checkpoint_7.safetensors")).map(drop);
        let ran = trainer.run(&mut (), vec![1], Until::epochs(1)).map(drop);
        done.send((resumed.map_err(text), file.map_err(text), ran.map_err(text))).unwrap();
    });
    let (resumed, file, ran) =
        finished.recv_timeout(Duration::from_secs(60)).expect("it does not hang");
    assert_eq!(resumed, Ok(false));
    assert!(file.unwrap_err().contains("no plain file"));
    assert_eq!(ran, Ok(()));
    assert_eq!(std::fs::read_to_string(path.join("latest")).unwrap(), "checkpoint_1.safetensors\n");

    for hard in [false, true] {
        let folder = tempfile::tempdir().unwrap();
        let (precious, lock) = (folder.path().join("precious"), folder.path().join("run/.lock"));
        std::fs::create_dir(folder.path().join("run")).unwrap();
        std::fs::write(&precious, "what may not be written over").unwrap();
        match hard {
            true => std::fs::hard_link(&precious, &lock).unwrap(),
            false => std::os::unix::fs::symlink(&precious, &lock).unwrap(),
        }
        let mut trainer = small();
        trainer.attach(Checkpoint::new(folder.path().join("run")));
        let error = text(trainer.run(&mut (), vec![1], Until::epochs(1)).unwrap_err());
        assert!(error.contains(".lock"), "{error}");
        assert_eq!(std::fs::read_to_string(&precious).unwrap(), "what may not be written over");
    }
    Ok(())
}

#[test]
fn two_handlers_of_the_same_files_are_refused() -> Result<()> {
    let _serial = serial();
    let folder = tempfile::tempdir().unwrap();
    let here = || Checkpoint::new(folder.path());
    let mut trainer = small();
    trainer.attach(here().on(Event::IterationCompleted));
    let error = text(trainer.add_handler(here()).unwrap_err());
    assert!(
        error.contains("'checkpoint_0.safetensors'") && error.contains("another name"),
        "{error}"
    );
    // A handler with other arguments that would use the same file names is refused.
    let by_score = here().score_function(|_| Ok(1));
    assert!(trainer.add_handler(by_score).is_err());
    trainer.attach(here().name("other")).attach(here().best(1, "mean", Mode::Max));
    trainer.attach(here().filename_prefix("more"));
    trainer.run(&mut (), vec![1], Until::epochs(1))?;

    // Two engines of one run must not write the same files either, even if their paths are written differently; one
    // engine after the other may.
    let mut evaluator = small();
    evaluator
        .attach(Checkpoint::new(folder.path().join("..").join(folder.path().file_name().unwrap())));
    evaluator.run(&mut (), vec![1], Until::epochs(1))?;
    trainer.attach(Evaluate::each_epoch("val", evaluator, vec![1]));
    let error = text(trainer.run(&mut (), vec![1], Until::epochs(3)).unwrap_err());
    assert!(error.contains("another Checkpoint writes files such as"), "{error}");
    Ok(())
}

/// A library that is loaded before the system's C library. It writes down the calls that make files safe, in their
/// order, and lets some of them fail.
#[cfg(target_os = "linux")]
mod shim {
    use std::path::{Path, PathBuf};
    use std::process::Command;

    /// This variable names the file to which the calls are written.
    pub const LOG: &str = "TCH_IGNITE_TEST_CALLS";
    /// This variable names a file that lists the calls that are to fail.
    pub const FAILING: &str = "TCH_IGNITE_TEST_FAILING";

    const SOURCE: &str = r#"
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <dirent.h>

static int fails(const char *call) {
    const char *path = getenv("TCH_IGNITE_TEST_FAILING");
    char text[200] = {0};
    int fd = path ? open(path, O_RDONLY) : -1;
    if (fd < 0) return 0;
    ssize_t n = read(fd, text, sizeof text - 1);
    close(fd);
    return n > 0 && strstr(text, call) != NULL;
}
static void note(const char *call, const char *path) {
    const char *log = getenv("TCH_IGNITE_TEST_CALLS");
    char line[5000];
    int fd = log ? open(log, O_WRONLY | O_CREAT | O_APPEND, 0600) : -1;
    if (fd < 0) return;
    int n = snprintf(line, sizeof line, "%s %s\n", call, path);
    if (write(fd, line, n) != n) abort();
    close(fd);
}
static void note_fd(const char *call, int fd) {
    char link[64], path[4096] = {0};
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    if (readlink(link, path, sizeof path - 1) < 0) return;
    note(call, path);
}
#define REAL(name) ((typeof(&name))dlsym(RTLD_NEXT, #name))
int fsync(int fd) { note_fd("fsync", fd); return REAL(fsync)(fd); }
int fdatasync(int fd) { note_fd("fsync", fd); return REAL(fdatasync)(fd); }
int rename(const char *from, const char *to) {
    if (fails("rename")) { errno = EIO; return -1; }
    note("rename", to);
    return REAL(rename)(from, to);
}
int unlink(const char *path) {
    if (fails("unlink")) { errno = EBUSY; return -1; }
    note("unlink", path);
    return REAL(unlink)(path);
}
DIR *opendir(const char *path) {
    if (fails("opendir")) { errno = EACCES; return NULL; }
    return REAL(opendir)(path);
}
int pthread_create(pthread_t *thread, const pthread_attr_t *attr, void *(*start)(void *), void *arg) {
    if (fails("pthread_create")) return EAGAIN;
    return REAL(pthread_create)(thread, attr, start, arg);
}
"#;

    /// Runs a test of this file in a new process with the library.
    pub fn run(test: &str) {
        let folder = tempfile::tempdir().unwrap();
        let (source, library) = (folder.path().join("shim.c"), folder.path().join("shim.so"));
        std::fs::write(&source, SOURCE).unwrap();
        // Whoever builds this crate has a C compiler.
        let compiler = std::env::var("CC").unwrap_or_else(|_| "cc".into());
        let built = Command::new(compiler)
            .args(["-shared", "-fPIC", "-O1", "-o"])
            .args([&library, &source])
            .arg("-ldl")
            .output()
            .unwrap();
        assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", &crate::common::exact(super::PATH, test), "--nocapture"])
            .env("LD_PRELOAD", &library)
            .env(LOG, folder.path().join("calls"))
            .env(FAILING, folder.path().join("failing"))
            .output()
            .unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        assert!(
            output.status.success() && text(&output.stdout).contains("1 passed"),
            "{}
{}",
            text(&output.stdout),
            text(&output.stderr)
        );
    }

    fn path(name: &str) -> Option<PathBuf> {
        std::env::var_os(name).map(PathBuf::from)
    }

    /// Whether the library is loaded into this process.
    pub fn is_loaded() -> bool {
        path(LOG).is_some()
    }

    /// Lets calls of these functions fail from now on.
    pub fn fail(calls: &str) {
        std::fs::write(path(FAILING).unwrap(), calls).unwrap();
    }

    /// The calls about files below a folder since `calls` was last called, with names relative to the folder.
    pub fn calls(folder: &Path) -> Vec<String> {
        let log = path(LOG).unwrap();
        let text = std::fs::read_to_string(&log).unwrap_or_default();
        std::fs::write(&log, "").unwrap();
        let folder = folder.canonicalize().unwrap();
        let below = |line: &str| {
            let (call, path) = line.split_once(' ')?;
            let name = Path::new(path).strip_prefix(&folder).ok()?.to_string_lossy().into_owned();
            let name = name.split(".part-").next().map(str::to_owned).filter(|n| !n.is_empty());
            Some(format!("{call} {}", name.unwrap_or_else(|| "folder".into())))
        };
        text.lines().filter_map(below).collect()
    }
}

#[cfg(target_os = "linux")]
#[test]
fn files_and_their_folder_are_on_the_disk_before_old_files_go() -> Result<()> {
    if !shim::is_loaded() {
        shim::run("files_and_their_folder_are_on_the_disk_before_old_files_go");
        return Ok(());
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("new/run");
    let mut trainer = small();
    trainer.attach(Checkpoint::new(&path));
    shim::calls(folder.path());
    trainer.run(&mut (), vec![1], Until::epochs(2))?;
    let calls = shim::calls(folder.path());
    // Each new folder is synced into the one above it, then each file into its folder.
    let written = |name: &str| {
        ["fsync new/run/", "rename new/run/"]
            .map(|call| call.to_owned() + name)
            .into_iter()
            .chain(["fsync new/run".to_owned()])
    };
    let mut expected = vec!["fsync folder".to_owned(), "fsync new".to_owned()];
    for name in ["checkpoint_1.safetensors", "latest", "checkpoint_2.safetensors", "latest"] {
        expected.extend(written(name));
    }
    expected.push("unlink new/run/checkpoint_1.safetensors".into());
    assert_eq!(calls, expected);
    let weights = folder.path().join("w.safetensors");
    save_weights(&store(), weights)?;
    let calls = shim::calls(folder.path());
    assert_eq!(calls, ["fsync w.safetensors", "rename w.safetensors", "fsync folder"]);
    Ok(())
}

#[cfg(target_os = "linux")]
#[test]
fn errors_of_a_write_and_of_tidying_are_both_told() -> Result<()> {
    if !shim::is_loaded() {
        shim::run("errors_of_a_write_and_of_tidying_are_both_told");
        return Ok(());
    }
    for background in [false, true] {
        for (failing, at, told) in [
            // The new file cannot be renamed into place, and after that the folder cannot be listed.
            ("rename opendir", 4, ["checkpoint_4.safetensors: Input/output", "Permission denied"]),
            // The new file can be written, but two old ones cannot be removed.
            ("unlink", 3, ["checkpoint_1.safetensors: Device or resource busy", "checkpoint_2"]),
        ] {
            let folder = tempfile::tempdir().unwrap();
            let path = |name: &str| folder.path().join(name);
            let make = |files| {
                let mut trainer = small();
                let checkpoint = Checkpoint::new(folder.path()).n_saved(files);
                trainer.attach(checkpoint.background(background));
                trainer
            };
            make(2).run(&mut (), vec![1], Until::epochs(2))?;
            let mut trainer = make(1);
            trainer.resume(&mut (), folder.path())?.unwrap();
            let latest = path("latest");
            trainer.on(Event::IterationCompleted.once(at), move |_, _| {
                // In the background the last checkpoint may not be written yet.
                let last = format!("checkpoint_{}.", at - 1);
                while !std::fs::read_to_string(&latest).is_ok_and(|name| name.starts_with(&last)) {
                    std::thread::sleep(Duration::from_millis(5));
                }
                shim::fail(failing);
                Ok(())
            });
            let error = text(trainer.run(&mut (), vec![1], Until::epochs(at)).unwrap_err());
            shim::fail("");
            for told in told {
                assert!(error.contains(told), "{background} {failing}: {error}");
            }
            // The newest checkpoint that could be written is whole.
            verify(path("checkpoint_3.safetensors"))?;
            assert!(!path("checkpoint_4.safetensors").exists());
        }
    }
    Ok(())
}

#[cfg(target_os = "linux")]
#[test]
fn where_no_thread_can_be_started_reading_and_writing_go_on_without() -> Result<()> {
    if !shim::is_loaded() {
        shim::run("where_no_thread_can_be_started_reading_and_writing_go_on_without");
        return Ok(());
    }
    let folder = tempfile::tempdir().unwrap();
    let make = || {
        let mut trainer = small();
        let large = VarStore::new(Device::Cpu);
        let _ = large.root().ones("weight", &[5_000_000]);
        trainer.track("large", &large);
        trainer.attach(Checkpoint::new(folder.path()).background(true));
        trainer
    };
    make().run(&mut (), vec![1], Until::epochs(1))?;
    shim::fail("pthread_create");
    assert!(std::thread::Builder::new().spawn(|| ()).is_err());
    let mut trainer = make();
    assert_eq!(trainer.resume(&mut (), folder.path())?.unwrap().iteration, 1);
    trainer.run(&mut (), vec![1], Until::epochs(2))?;
    verify(folder.path().join("checkpoint_2.safetensors"))
}
