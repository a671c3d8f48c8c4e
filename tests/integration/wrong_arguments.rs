//! Programs that are wrong only when they run: the error says what was wrong, what was given, and what to do.

use std::time::Duration;

use anyhow::Result;
use tch::nn::{self, VarStore};
use tch::{Device, Kind, Tensor};
use tch_ignite::amp::GradScaler;
use tch_ignite::checkpoint::Checkpoint;
use tch_ignite::compiled::CompiledModel;
use tch_ignite::data::transforms::{pad, random_horizontal_flip};
use tch_ignite::data::{Loader, SplitMix64, no_data};
use tch_ignite::engine::{Engine, Event, Until};
use tch_ignite::handlers::*;
use tch_ignite::metrics::*;
use tch_ignite::optim::{GroupOptions, Optimizer, OptimizerPlan, var_store_of};
use tch_ignite::supervised::{
    Supervised, create_supervised_tbptt_trainer, create_supervised_trainer,
};
use tch_ignite::{Accumulation, Error, TargetNetwork, host_syncs};

type Numbers<'a> = Engine<'a, (), f64, f64>;

fn numbers<'a>() -> Numbers<'a> {
    Engine::new(|_: &mut (), _, x: f64| Ok(x))
}

/// The error of a run with this attached.
fn attached(attach: impl FnOnce(&mut Numbers<'_>)) -> Error {
    let mut engine = numbers();
    attach(&mut engine);
    engine.run(&mut (), vec![1.0], Until::epochs(1)).unwrap_err()
}

fn linear(vs: &VarStore) -> nn::Linear {
    nn::linear(vs.root(), 4, 3, Default::default())
}

fn stepped(change: impl FnOnce(Supervised<nn::Linear>) -> Supervised<nn::Linear>) -> Error {
    let vs = VarStore::new(Device::Cpu);
    let optimizer = Optimizer::sgd(&vs).lr(0.1).build().unwrap();
    let loss = |y_pred: &Tensor, y: &Tensor| y_pred.cross_entropy_for_logits(y);
    let mut cx = change(Supervised::new(linear(&vs), optimizer, loss));
    let x = Tensor::zeros([2, 4], (Kind::Float, Device::Cpu));
    let data = Loader::new(&x, &Tensor::from_slice(&[0i64, 1]), 2).unwrap();
    create_supervised_trainer().run(&mut cx, &data, Until::epochs(1)).unwrap_err()
}

#[test]
fn each_wrong_argument_is_named_with_what_was_given_and_what_to_do() -> Result<()> {
    let vs = VarStore::new(Device::Cpu);
    let _ = linear(&vs);
    let folder = tempfile::tempdir()?;
    let folder = folder.path();
    let again = |first: Until, second: Until| {
        let mut engine = numbers();
        engine.on(Event::EpochCompleted.once(2), |_, engine| {
            engine.interrupt();
            Ok(())
        });
        engine.run(&mut (), vec![1.0; 2], first).unwrap();
        engine.run(&mut (), vec![1.0; 2], second).unwrap_err()
    };
    let text = |error: Error| error.to_string();
    let picture = Tensor::zeros([3, 4, 4], (Kind::Uint8, Device::Cpu));
    std::fs::write(folder.join("plan.yaml"), "")?;
    let cases: Vec<(String, &[&str])> = vec![
        (text(Accumulation::new(0).unwrap_err()), &["accumulate(0)", "how many batches"]),
        (
            text(attached(|engine| {
                engine.attach(EarlyStopping::min("loss", 0));
            })),
            &["EarlyStopping", "patience", "Given 0", "1 stops at the first"],
        ),
        (text(TimeLimit::new(Duration::ZERO).unwrap_err()), &["TimeLimit", "zero", "Duration"]),
        (text(EMAHandler::new(&vs, 1.5).unwrap_err()), &["EMAHandler", "1.5", "below 1"]),
        (
            text(EMAHandler::new(&vs, 0.5)?.warmup(0.5, 0).unwrap_err()),
            &["EMAHandler", "warmup_iters: 0", "number of updates"],
        ),
        (
            text(attached(|engine| {
                engine.attach(Checkpoint::new(folder).n_saved(0));
            })),
            &["Checkpoint", "n_saved", "got 0", "keep_all()"],
        ),
        (
            text(attached(|engine| {
                engine.metric("running", RunningAverage::new().alpha(2.));
            })),
            &["metric 'running'", "alpha", "2"],
        ),
        (
            text(attached(|engine| {
                let filter = Usage::BatchFiltered(Event::EpochCompleted.every(2));
                engine.metric_with("mean", Mean::new(), filter);
            })),
            &["ITERATION_COMPLETED", "EPOCH_COMPLETED"],
        ),
        (
            text(attached(|engine| {
                engine.metric("mean", Mean::new()).metric("mean", Mean::new());
            })),
            &["'mean'", "another name"],
        ),
        (
            text(attached(|engine| {
                engine.on(Event::IterationCompleted.every(0), |_, _| Ok(()));
            })),
            &["every", "0 was given"],
        ),
        (
            text(attached(|engine| {
                engine.on(Event::custom("mine"), |_, _| Ok(()));
            })),
            &["mine", "register_events"],
        ),
        (
            text({
                let mut engine = Engine::new(|_: &mut (), _, ()| Ok(()));
                engine.run(&mut (), no_data(), Until::epochs(2)).unwrap_err()
            }),
            &["epoch_length", "Until::epochs(3).epoch_length(100)"],
        ),
        (
            text(numbers().run(&mut (), Vec::<f64>::new(), Until::epochs(2)).unwrap_err()),
            &["zero size", "non-empty"],
        ),
        (
            text(numbers().run(&mut (), vec![1.0], Until::epochs(0)).unwrap_err()),
            &["max_epochs", "0 was given"],
        ),
        (
            text(again(Until::epochs(5), Until::epochs(1))),
            &["max_epochs", "1 vs 2", "Engine::reset", "a larger budget"],
        ),
        (
            text(again(Until::epochs(5), Until::iterations(9))),
            &["max_epochs", "max_iters", "Engine::reset"],
        ),
        (
            text(numbers().state.metrics.get("loss").unwrap_err()),
            &["no metric 'loss' has a value yet", "none has one", "after the first epoch"],
        ),
        (
            text(create_supervised_tbptt_trainer::<(), Tensor>(0, 1).unwrap_err()),
            &["tbptt_step", "0 was given", "at least 1"],
        ),
        (text(stepped(|cx| cx.clip_grad_norm(-1.))), &["largest norm or value", "-1"]),
        (text(stepped(|cx| cx.autocast(Kind::Double))), &["autocast", "Double", "BFloat16"]),
        (text(stepped(Supervised::channels_last)), &["[2, 4]", "(N, C, H, W)"]),
        (
            text(
                Loader::new(
                    &Tensor::zeros([3, 4], (Kind::Float, Device::Cpu)),
                    &Tensor::from_slice(&[0i64]),
                    2,
                )
                .unwrap_err(),
            ),
            &["3 inputs but 1 targets"],
        ),
        (
            text(
                Optimizer::sgd(&vs)
                    .group("a", |name| name == "bias", GroupOptions::new())
                    .build()
                    .unwrap_err(),
            ),
            &["'weight'", "the groups are: a", "widen a condition, or add a group"],
        ),
        (
            text(
                Optimizer::sgd(&vs)
                    .group("a", |_| true, GroupOptions::new())
                    .group("b", |name| name == "bias", GroupOptions::new())
                    .build()
                    .unwrap_err(),
            ),
            &["'bias'", "'a' and 'b'", "only one of their conditions"],
        ),
        (
            text({
                let x = Tensor::zeros([1], (Kind::Float, Device::Cpu));
                var_store_of([("w", &x), ("w", &x.copy())]).unwrap_err()
            }),
            &["'w'", "a name of its own"],
        ),
        (
            text(OptimizerPlan::from_path(folder.join("plan.yaml")).unwrap_err()),
            &["plan.yaml", ".json or .toml", "give the file's name"],
        ),
        (
            text(CompiledModel::load(folder.join("net"), &vs.root()).unwrap_err()),
            &["net/manifest.json", "scripts/export_step.py"],
        ),
        (text(LrCurve::default().lr_suggestion().unwrap_err()), &["LrFinder::run"]),
        (text(numbers().get_param("lr").unwrap_err()), &["'lr'", "attach it first"]),
        (
            text(numbers().register_events([Event::Started]).unwrap_err()),
            &["STARTED is there already", "a name of its own"],
        ),
        (
            text({
                let mut engine = numbers();
                engine.on(Event::Started, |cx, engine| {
                    engine.run(cx, vec![1.0], Until::epochs(1))?;
                    Ok(())
                });
                engine.run(&mut (), vec![1.0], Until::epochs(1)).unwrap_err()
            }),
            &["running already", "another engine"],
        ),
        (
            text(host_syncs(|| host_syncs(|| ()).unwrap_err()).unwrap().0),
            &["host_syncs", "call it once, around all"],
        ),
        (
            text({
                let other = VarStore::new(Device::Cpu);
                let _ = linear(&other);
                TargetNetwork::new(&vs, &other)?.soft_update(1.5).unwrap_err()
            }),
            &["soft_update", "tau", "from 0 to 1", "1.5"],
        ),
        (
            text({
                let scaler = GradScaler::new();
                let optimizer = Optimizer::sgd(&vs).build()?;
                scaler.step(&optimizer)?;
                scaler.step(&optimizer).unwrap_err()
            }),
            &["GradScaler", "call update() once, after the steps of all optimizers"],
        ),
        (
            format!(
                "{:#}",
                random_horizontal_flip(&picture, 2., &mut SplitMix64::new(0)).unwrap_err()
            ),
            &["random_horizontal_flip", "between 0 and 1", "2"],
        ),
        (format!("{:#}", pad(&picture, [-1, 0, 0, 0]).unwrap_err()), &["pad", "-1", "crop"]),
        (text(Optimizer::sgd(&vs).lr(-0.1).build().unwrap_err()), &["lr", "-0.1"]),
    ];
    for (text, parts) in cases {
        for part in parts {
            assert!(text.contains(part), "'{part}' is not in: {text}");
        }
        assert!(text.lines().count() == 1, "{text}");
    }
    Ok(())
}

#[test]
fn a_device_that_is_not_there_is_one_line() {
    if tch::Cuda::is_available() {
        return;
    }
    let mut engine =
        Engine::new(|_: &mut (), _, (): ()| Ok(Tensor::zeros([2], (Kind::Float, Device::Cuda(0)))));
    let text = engine.run(&mut (), vec![()], Until::epochs(1)).unwrap_err().to_string();
    assert!(text.contains("CUDA") && text.lines().count() == 1, "{text}");
    let mut engine = Engine::new(|_: &mut (), _, (): ()| {
        Ok(Tensor::zeros([2], (Kind::Float, Device::Cpu)).to_device(Device::Cuda(0)))
    });
    let text = engine.run(&mut (), vec![()], Until::epochs(1)).unwrap_err().to_string();
    assert!(text.to_lowercase().contains("cuda") && text.lines().count() == 1, "{text}");
}

/// The child process of the next test.
#[test]
#[ignore = "is no test by itself: a_panic_of_tch_in_a_step_prints_no_stack_trace starts it in a process of its own (cargo test --release --features distributed,mlflow --test integration a_panic_of_tch_in_a_step)"]
fn a_step_that_panics() {
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        eprintln!("the program's own hook");
        before(info);
    }));
    for of in ["tch", "program", "unwrap"] {
        let mut engine = Engine::new(|_: &mut (), _, of: &str| {
            assert!(of != "program", "the program's own panic");
            let zeros = |size| Tensor::zeros([size], (Kind::Float, Device::Cpu));
            Ok(match of {
                "unwrap" => zeros(2).f_view([5]).unwrap(),
                _ => zeros(2) + zeros(3),
            })
        });
        let error = engine.run(&mut (), vec![of], Until::epochs(1)).unwrap_err();
        eprintln!("error: {error}");
    }
    // Outside of an engine everything is as it was.
    let _ = std::panic::catch_unwind(|| Tensor::from(1.).view([5]));
    eprintln!("the end");
}

#[test]
fn a_panic_of_tch_in_a_step_prints_no_stack_trace() -> Result<()> {
    let child = |backtrace: &str| -> Result<String> {
        let name = crate::common::exact(module_path!(), "a_step_that_panics");
        let output = std::process::Command::new(std::env::current_exe()?)
            .args(["--exact", &name, "--ignored", "--nocapture", "--test-threads=1"])
            .env("RUST_BACKTRACE", backtrace)
            .output()?;
        Ok(String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let printed = child("0")?;
    let (of_tch, rest) = printed.split_once("error: ").unwrap_or_default();
    assert!(of_tch.is_empty(), "{printed}");
    let (of_program, rest) = rest.split_once("error: ").unwrap_or_default();
    assert!(of_program.starts_with("the step of iteration 1"), "{printed}");
    assert!(of_program.contains("the program's own hook"), "{printed}");
    assert!(of_program.contains("the program's own panic"), "{printed}");
    assert!(!of_program.contains("Exception raised from"), "{printed}");
    // An error of tch that the program itself unwraps has its place in the program.
    let (of_unwrap, rest) = rest.split_once("error: ").unwrap_or_default();
    assert!(of_unwrap.contains("the program's own hook"), "{printed}");
    assert!(of_unwrap.contains("wrong_arguments.rs:"), "{printed}");
    // The panic that no engine catches goes to the hook that was there before.
    assert!(rest.contains("the program's own hook") && rest.ends_with("the end\n"), "{printed}");
    // Whoever asks for backtraces gets everything.
    let (of_tch, _) =
        child("1")?.split_once("error: ").map(|(a, b)| (a.to_owned(), b.len())).unwrap_or_default();
    assert!(of_tch.contains("the program's own hook") && of_tch.contains("Exception raised from"));
    Ok(())
}
