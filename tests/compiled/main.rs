//! Models that PyTorch compiled: gradients, checkpoints, ranks and refusals, and training beside eager PyTorch.

#[path = "../common/mod.rs"]
mod common;
#[path = "../../examples/conformance/compiled.rs"]
mod fixture;
#[cfg(all(feature = "distributed", unix))]
mod ranks_train;

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result};
use tch::nn::{ModuleT, VarStore};
use tch::{Device, Kind, Tensor};
use tch_ignite::amp::{GradScaler, autocast};
use tch_ignite::checkpoint::Checkpoint;
use tch_ignite::compiled::CompiledModel;
use tch_ignite::data::Loader;
use tch_ignite::engine::{Event, Until};
use tch_ignite::handlers::EMAHandler;
use tch_ignite::optim::Optimizer;
use tch_ignite::supervised::{Supervised, create_supervised_evaluator, create_supervised_trainer};

use common::serial;
use fixture::Expected;

fn package() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/compiled/mlp.pt2")
}

/// All values of a store, by name.
fn values(vs: &VarStore) -> Vec<(String, Vec<f64>)> {
    let mut values: Vec<_> = vs
        .variables()
        .into_iter()
        .map(|(name, tensor)| {
            (name, Vec::try_from(tensor.detach().flatten(0, -1).to_kind(Kind::Double)).unwrap())
        })
        .collect();
    values.sort_by(|(a, _), (b, _)| a.cmp(b));
    values
}

/// The folder of the golden package, and its numbers; `None` where it cannot run.
fn folder() -> Result<Option<(tempfile::TempDir, Expected)>> {
    let folder = tempfile::tempdir()?;
    let expected = Expected::beside(&package())?;
    expected.export(&package(), folder.path())?;
    if !cfg!(all(target_os = "linux", target_arch = "x86_64")) {
        common::skipped("the golden package is for Linux on x86-64");
        return Ok(None);
    }
    match CompiledModel::load(folder.path(), &VarStore::new(Device::Cpu).root()) {
        Err(error) if error.to_string().contains("need a libtorch.so") && !has_libtorch_so() => {
            common::skipped(format!("compiled models: {error}"));
            Ok(None)
        }
        Err(error) if error.to_string().contains("exported with torch") => {
            common::skipped(format!("compiled models: {error}"));
            Ok(None)
        }
        loaded => loaded.map(|_| Some((folder, expected))).map_err(Into::into),
    }
}

/// Whether libtorch.so is a shared object: linker scripts of that name begin otherwise.
fn has_libtorch_so() -> bool {
    let file = std::env::var_os("LIBTORCH").map(|root| Path::new(&root).join("lib/libtorch.so"));
    file.and_then(|file| std::fs::read(file).ok())
        .is_some_and(|bytes| bytes.starts_with(b"\x7fELF"))
}

fn gradients(vs: &VarStore) -> Vec<Tensor> {
    vs.trainable_variables().iter().map(|variable| variable.grad().copy()).collect()
}

fn assert_close(ours: &[Tensor], expected: &[Tensor], factor: f64) {
    assert_eq!(ours.len(), expected.len());
    for (ours, expected) in ours.iter().zip(expected) {
        let difference = (ours - expected * factor).abs().max().double_value(&[]);
        assert!(difference < 1e-6 * factor.abs().max(1.), "{difference:e}");
    }
}

/// Loss, gradients and 20 steps.
#[test]
fn the_golden_package_agrees_with_pytorch() -> Result<()> {
    match folder()? {
        Some(_) => fixture::compare(&package()),
        None => Ok(()),
    }
}

/// The loader of the system does not pass a program's path on to the packages that it loads.
#[test]
fn a_program_started_by_hand_loads_packages() -> Result<()> {
    if folder()?.is_none() {
        return Ok(());
    }
    let output = Command::new(std::env::current_exe()?)
        .args(["--exact", "the_golden_package_agrees_with_pytorch"])
        .env_remove("LD_LIBRARY_PATH")
        .output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    anyhow::ensure!(output.status.success() && text.contains("1 passed"), "{text}");
    Ok(())
}

#[test]
fn the_loss_has_a_backward_like_any_other() -> Result<()> {
    let _guard = serial();
    let Some((folder, expected)) = folder()? else { return Ok(()) };
    let vs = VarStore::new(Device::Cpu);
    let net = CompiledModel::load(folder.path(), &vs.root())?;
    let (x, y) = (expected.tensor("x", None)?, expected.tensor("y", None)?);
    let wanted = (0..6).map(|number| expected.tensor("grads", Some(number)));
    let wanted = wanted.collect::<Result<Vec<_>>>()?;
    let optimizer = Optimizer::sgd(&vs).lr(0.).build()?;

    let loss = net.step(&[&x, &y])?.loss;
    assert!(loss.requires_grad());
    loss.f_backward()?;
    assert_close(&gradients(&vs), &wanted, 1.);
    let error = loss.f_backward().unwrap_err().to_string();
    assert!(error.contains("a second time"), "{error}");
    // The gradients of two steps add up, each with its factor.
    (net.step(&[&x, &y])?.loss * -0.25).f_backward()?;
    assert_close(&gradients(&vs), &wanted, 0.75);
    optimizer.zero_grad()?;
    // Steps may overlap, and a graph may be kept.
    let (first, second) = (net.step(&[&x, &y])?.loss, net.step(&[&x, &y])?.loss);
    let inputs = vs.trainable_variables();
    let kept = Tensor::f_run_backward(&[&first * 3.], &inputs, true, false)?;
    assert_close(&kept, &wanted, 3.);
    (&first + second).f_backward()?;
    assert_close(&gradients(&vs), &wanted, 2.);
    optimizer.zero_grad()?;
    // The gradients have no graph.
    let loss = net.step(&[&x, &y])?.loss;
    let error = Tensor::f_run_backward(&[&loss], &inputs, true, true).unwrap_err().to_string();
    assert!(error.contains("no second derivative"), "{error}");
    // A scaler's factor is taken out again.
    let scaler = GradScaler::new();
    scaler.scale(&net.step(&[&x, &y])?.loss)?.f_backward()?;
    scaler.unscale(&optimizer)?;
    assert_close(&gradients(&vs), &wanted, 1.);
    optimizer.zero_grad()?;
    // A frozen parameter gets no gradient, and where gradients are off the loss has no backward.
    let frozen = vs.trainable_variables().remove(1);
    let _ = frozen.set_requires_grad(false);
    net.step(&[&x, &y])?.loss.f_backward()?;
    assert!(!frozen.grad().defined());
    let _ = frozen.set_requires_grad(true);
    assert!(!tch::no_grad(|| net.step(&[&x, &y]))?.loss.requires_grad());
    // Inputs that are not contiguous are the same inputs.
    let turned = x.tr().contiguous().tr();
    let losses = [net.step(&[&x, &y])?.loss, net.step(&[&turned, &y])?.loss];
    assert_eq!(losses[0], losses[1]);
    Ok(())
}

#[test]
fn what_does_not_fit_is_refused_with_what_to_do() -> Result<()> {
    let _guard = serial();
    let Some((folder, expected)) = folder()? else { return Ok(()) };
    let mut vs = VarStore::new(Device::Cpu);
    let net = CompiledModel::load(folder.path(), &vs.root())?;
    let (x, y) = (expected.tensor("x", None)?, expected.tensor("y", None)?);
    let before = values(&vs);
    let step_error = |inputs: &[&Tensor]| net.step(inputs).unwrap_err().to_string();
    let error = step_error(&[&x]);
    assert!(error.contains("1 tensors were given") && error.contains("1 targets"), "{error}");
    let error = step_error(&[&x.to_kind(Kind::Double), &y]);
    assert!(error.contains("exported as Float [16, 8]"), "{error}");
    let error = step_error(&[&x.narrow(0, 0, 7), &y]);
    assert!(error.contains("export the model anew"), "{error}");
    let error = autocast(Device::Cpu, Kind::BFloat16, || step_error(&[&x, &y]))?;
    assert!(error.contains("leave autocast out here"), "{error}");
    let error = net.evaluate(&[&x]).unwrap_err().to_string();
    assert!(error.contains("no evaluation for a batch"), "{error}");
    assert!(format!("{net:?}").contains("CompiledModel"));

    let error = CompiledModel::load(folder.path(), &vs.root()).unwrap_err().to_string();
    assert!(error.contains("there is a variable '0.weight' already"), "{error}");
    assert_eq!((vs.len(), values(&vs)), (6, before));
    vs.double();
    let error = step_error(&[&x, &y]);
    assert!(error.contains("'0.weight' is now CPUDoubleType"), "{error}");
    vs.float();
    net.step(&[&x, &y])?;

    // A second one on a path of its own.
    CompiledModel::load(folder.path(), &(vs.root() / "other"))?;
    assert!(vs.variables().contains_key("other.3.bias"));

    let vs = VarStore::new(Device::Cpu);
    let load_error = |folder: &Path| {
        let error = CompiledModel::load(folder, &vs.root()).unwrap_err().to_string();
        assert_eq!(vs.len(), 0);
        error
    };
    let error = load_error(Path::new("nowhere"));
    let advice = "nowhere/manifest.json: there is no such file. Give the folder that scripts/export_step.py wrote";
    assert_eq!(error, advice);
    std::fs::write(folder.path().join("train.pt2"), "no zip")?;
    let error = load_error(folder.path());
    assert!(error.contains("train.pt2 is not of this export"), "{error}");
    std::fs::remove_file(folder.path().join("train.pt2"))?;
    let error = load_error(folder.path());
    assert!(error.contains("there is no train.pt2 in it. Export it anew"), "{error}");
    let manifest = folder.path().join("manifest.json");
    let text = std::fs::read_to_string(&manifest)?;
    for (from, to, expected) in [
        ("[12,8]", "[8,12]", "'0.weight' is Float [12, 8] in model.safetensors"),
        ("\"2.weight\"", "\"4.weight\"", "has no '4.weight'. Copy the whole folder"),
        ("\"device\":\"cpu\"", "\"device\":\"cuda\"", "exported for cuda"),
    ] {
        std::fs::write(&manifest, text.replace(from, to))?;
        let error = load_error(folder.path());
        assert!(error.contains(expected), "{error}");
    }
    Ok(())
}

/// Trains with all that a ready trainer has, in one go or from a checkpoint in the middle.
fn resumed_equals_whole(folder: &Path, data: &Loader) -> Result<()> {
    let context = || -> Result<_> {
        let vs = VarStore::new(Device::Cpu);
        let net = CompiledModel::load(folder, &vs.root())?;
        let optimizer = Optimizer::adam(&vs).build()?;
        let cx = Supervised::compiled(net, optimizer).clip_grad_norm(0.5).accumulate(2)?;
        let mut trainer = create_supervised_trainer();
        let ema = EMAHandler::new(&vs, 0.1)?;
        trainer.track("model", &vs).track("optimizer", &cx.optimizer).attach(ema.clone());
        trainer.on(Event::IterationCompleted.once(5), |_, engine| {
            engine.interrupt();
            Ok(())
        });
        Ok((vs, cx, trainer, ema))
    };
    tch::manual_seed(1);
    let (vs, mut cx, mut whole, ema) = context()?;
    let begun = values(&vs);
    whole.run(&mut cx, data, Until::epochs(4))?;
    let saved = whole.checkpoint(&cx)?.copy()?;
    whole.run(&mut cx, data, Until::epochs(4))?;
    let expected = (values(&vs), ema.averages());
    assert_ne!(expected.0, begun);

    tch::manual_seed(2);
    let (vs, mut cx, mut resumed, ema) = context()?;
    resumed.restore(&mut cx, saved, true)?;
    resumed.run(&mut cx, data, Until::epochs(4))?;
    assert!((values(&vs), ema.averages()) == expected);
    Ok(())
}

#[test]
fn a_run_is_resumed_bit_for_bit() -> Result<()> {
    let _guard = serial();
    let Some((folder, expected)) = folder()? else { return Ok(()) };
    let (x, y) = (expected.tensor("x", None)?, expected.tensor("y", None)?);
    let (x, y) = (Tensor::cat(&[&x, &(&x * 0.5), &(&x - 1.)], 0), y.repeat([3]));
    resumed_equals_whole(folder.path(), &Loader::new(&x, &y, 16)?.shuffle(3))?;
    killed_equals_straight(folder.path(), &[&x, &y], 16)
}

/// These variables tell a process which model it trains, in which folder, with which batches, and whether it is to be
/// killed.
const MODEL: &str = "TCH_IGNITE_TEST_MODEL";
const FOLDER: &str = "TCH_IGNITE_TEST_FOLDER";
const BATCH: &str = "TCH_IGNITE_TEST_BATCH";
const WAITS: &str = "TCH_IGNITE_TEST_WAITS";

/// The processes of [`killed_equals_straight`] run this test alone: each trains from the newest checkpoint to the end.
/// It does nothing where no process was started so.
#[test]
fn process_that_trains_a_compiled_model() -> Result<()> {
    let (Some(model), Some(folder)) = (std::env::var_os(MODEL), std::env::var_os(FOLDER)) else {
        return Ok(());
    };
    let (model, folder) = (Path::new(&model), Path::new(&folder));
    let resumes = folder.join("checkpoints").exists();
    // Each process but the first begins with other random numbers and other parameters.
    tch::manual_seed(if resumes { i64::from(std::process::id()) } else { 1 });
    let vs = VarStore::new(Device::Cpu);
    let net = CompiledModel::load(model, &vs.root())?;
    if resumes {
        let trained = vs.trainable_variables();
        tch::no_grad(|| trained.into_iter().for_each(|mut it| drop(it.normal_(0., 1.))));
    }
    let data: std::collections::HashMap<_, _> =
        Tensor::read_safetensors(folder.join("data.safetensors"))?.into_iter().collect();
    let data = Loader::new(&data["x"], &data["y"], std::env::var(BATCH)?.parse()?)?.shuffle(3);
    let optimizer = Optimizer::adam(&vs).build()?;
    let mut cx = Supervised::compiled(net, optimizer).accumulate(2)?;
    let mut trainer = create_supervised_trainer();
    trainer.track("model", &vs).track("optimizer", &cx.optimizer);
    let checkpoint = Checkpoint::new(folder.join("checkpoints"));
    trainer.attach(checkpoint.on(Event::IterationCompleted));
    let begun = trainer.resume(&mut cx, folder.join("checkpoints"))?;
    anyhow::ensure!(
        begun.is_some() == resumes,
        "a checkpoint is missing, or there is one too many"
    );
    if std::env::var_os(WAITS).is_some() {
        let last = trainer.state.iteration + 5;
        trainer.on(Event::IterationStarted, move |_, engine| {
            if engine.state.iteration == last {
                println!("waiting to be killed");
                std::thread::sleep(std::time::Duration::from_secs(600));
            }
            Ok(())
        });
    }
    trainer.run(&mut cx, &data, Until::iterations(16))?;
    std::fs::write(folder.join("outcome"), format!("{:?}", values(&vs)))?;
    Ok(())
}

/// Compares a run of which three processes were killed with one that nobody killed. The kills fall into windows of
/// accumulation and into the middle of passes.
fn killed_equals_straight(model: &Path, [x, y]: &[&Tensor; 2], batch: u64) -> Result<()> {
    let process = |folder: &Path| {
        let mut process = Command::new(std::env::current_exe()?);
        process.args(["--exact", "process_that_trains_a_compiled_model", "--nocapture"]);
        process.env(MODEL, model).env(FOLDER, folder).env(BATCH, batch.to_string());
        process.stdout(Stdio::piped());
        anyhow::Ok(process)
    };
    let (straight, killed) = (tempfile::tempdir()?, tempfile::tempdir()?);
    for folder in [&straight, &killed] {
        Tensor::write_safetensors(&[("x", x), ("y", y)], folder.path().join("data.safetensors"))?;
    }
    for _ in 0..3 {
        let mut child = process(killed.path())?.env(WAITS, "1").spawn()?;
        let output = child.stdout.take().context("the output is piped")?;
        let waits = BufReader::new(output)
            .lines()
            .any(|line| line.is_ok_and(|line| line.contains("waiting to be killed")));
        child.kill()?;
        assert!(waits && !child.wait()?.success());
    }
    for folder in [&straight, &killed] {
        assert!(process(folder.path())?.stdout(Stdio::inherit()).status()?.success());
    }
    let outcome =
        |folder: &tempfile::TempDir| std::fs::read_to_string(folder.path().join("outcome"));
    assert!(outcome(&straight)? == outcome(&killed)?);
    Ok(())
}

/// The largest difference of two tensors.
fn difference(a: &Tensor, b: &Tensor) -> f64 {
    (a.to_kind(Kind::Double) - b.to_kind(Kind::Double)).abs().max().double_value(&[])
}

/// Trains as tests/compiled/eager.py does, and compares each loss and the end with eager PyTorch's.
fn trains_as_eager(folder: &Path, name: &str, tolerance: f64) -> Result<()> {
    let eager: std::collections::HashMap<_, _> =
        Tensor::read_safetensors(folder.join(format!("{name}.safetensors")))?.into_iter().collect();
    let vs = VarStore::new(Device::Cpu);
    let net = CompiledModel::load(folder.join(name), &vs.root())?;
    let optimizer = Optimizer::sgd(&vs).lr(0.05).build()?;
    optimizer.knob("momentum")?.set(0.9)?;
    let mut cx = Supervised::compiled(net, optimizer);
    let mut evaluator = create_supervised_evaluator();
    evaluator.metric(
        "mean",
        tch_ignite::metrics::Mean::of(|p: &tch_ignite::supervised::Prediction| {
            p.y_pred.mean(Kind::Float)
        }),
    );
    tch::manual_seed(7);
    for step in 0..100 {
        let batch = (eager["x"].get(step), eager["y"].get(step));
        let loss = cx.train_step(batch)?.double_value(&[]);
        let expected = eager["losses"].double_value(&[step]);
        anyhow::ensure!((loss - expected).abs() < tolerance, "{name}, {step}: {loss}, {expected}");
    }
    let mut count = 0;
    for (key, variable) in vs.variables() {
        let trained = eager.get(&format!("trained.{key}")).context("no such name in Python")?;
        let away = difference(&variable.detach(), trained);
        anyhow::ensure!(away < tolerance, "{name}, {key}: {away:e}");
        count += 1;
    }
    assert_eq!(count, eager.len() - 4, "{name}");
    // Any size of batch is evaluated by the dynamic programs, with the new statistics.
    if name != "transformer" {
        let x = eager["x"].get(0);
        let few = cx.net.forward_t(&x.narrow(0, 0, 5), false);
        assert!(difference(&few, &cx.net.forward_t(&x, false).narrow(0, 0, 5)) < 1e-5);
        let error = cx.net.evaluate(&[&x.narrow(0, 0, 1)]).unwrap_err().to_string();
        assert!(error.contains("for a batch of 1, only for 2 to"), "{error}");
        let all = Loader::new(&x, &eager["y"].get(0), 5)?.drop_last(true);
        evaluator.run(&mut cx, &all, Until::epochs(1))?;
        assert!(evaluator.state.metrics.get("mean")?.is_finite());
    }
    Ok(())
}

#[test]
fn exported_models_train_as_in_eager_pytorch() -> Result<()> {
    let _guard = serial();
    if folder()?.is_none() {
        return Ok(());
    }
    let name = std::thread::current().name().unwrap_or_default().to_owned();
    let Some(python) = common::python(&name, "TORCH_PYTHON", "torch, safetensors") else {
        return Ok(());
    };
    // A folder of an earlier run, for those who work on the tests.
    let kept = std::env::var_os("TCH_IGNITE_COMPILED");
    let new = tempfile::tempdir()?;
    let folder = kept.as_ref().map_or(new.path(), Path::new);
    if kept.is_none() {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/compiled/eager.py");
        let output = Command::new(python).arg(script).arg(folder).output()?;
        let errors = String::from_utf8_lossy(&output.stderr);
        anyhow::ensure!(output.status.success(), "Python: {errors}");
    }
    trains_as_eager(folder, "mlp", 1e-5)?;
    trains_as_eager(folder, "conv", 1e-5)?;
    trains_as_eager(folder, "transformer", 1e-5)?;
    trains_as_eager(folder, "own", 1e-5)?;
    shared_tensors_are_apart(folder)?;
    has_names_and_roles(folder)?;
    dropout_as_in_eager(folder)
}

/// Looks at outputs, names, roles, and programs for some sizes of batches.
fn has_names_and_roles(folder: &Path) -> Result<()> {
    let vs = VarStore::new(Device::Cpu);
    let net = CompiledModel::load(folder.join("transformer"), &vs.root())?;
    let variables = vs.variables();
    assert!(!variables["scale"].requires_grad() && variables["spare"].requires_grad());
    assert_eq!(vs.trainable_variables().len(), variables.len() - 2);
    assert_eq!(net.output_names().collect::<Vec<_>>(), ["['logits']", "['hidden']"]);
    let x = Tensor::arange(48, (Kind::Int64, Device::Cpu)).remainder(13).view([8, 6]);
    let step = net.step(&[&x, &x])?;
    assert_eq!(step.outputs.len(), 2);
    assert_eq!(step.outputs[0].size(), [8, 6, 13]);
    step.loss.f_backward()?;
    assert!(!variables["spare"].grad().defined() && !variables["scale"].grad().defined());
    assert_eq!(net.step(&[&x.narrow(0, 0, 3), &x.narrow(0, 0, 3)])?.outputs[1].size(), [3, 6, 16]);
    let error = net.step(&[&x.narrow(0, 0, 4), &x.narrow(0, 0, 4)]).unwrap_err().to_string();
    assert!(error.contains("for a batch of 4, only for 8, 3"), "{error}");
    let _ = tch::no_grad(|| variables["scale"].shallow_clone().set_requires_grad(true));
    let error = net.step(&[&x, &x]).unwrap_err().to_string();
    assert!(error.contains("'scale' is to be trained now, but was frozen"), "{error}");
    Ok(())
}

/// Looks at parameters that have one gradient, and at an output that is a parameter.
fn shared_tensors_are_apart(folder: &Path) -> Result<()> {
    let vs = VarStore::new(Device::Cpu);
    let net = CompiledModel::load(folder.join("own"), &vs.root())?;
    let (x, y) = (
        Tensor::randn([6, 8], (Kind::Float, Device::Cpu)),
        Tensor::arange(6, (Kind::Int64, Device::Cpu)),
    );
    let y = y.remainder(3);
    let variables = vs.variables();
    let [a, b] = ["a", "b"].map(|name| &variables[name]);
    // The statistics move with each step, so both steps begin with the same ones.
    let begun = tch::no_grad(|| variables["mean"].copy());
    net.step(&[&x, &y])?.loss.f_backward()?;
    let whole = a.grad().copy();
    assert!(whole.equal(&b.grad()) && whole.abs().max().double_value(&[]) > 0.);
    tch::no_grad(|| variables["mean"].shallow_clone().copy_(&begun));
    (net.step(&[&x, &y])?.loss * -0.5).f_backward()?;
    for parameter in [a, b] {
        assert!(difference(&parameter.grad(), &(&whole * 0.5)) < 1e-6);
    }
    let outputs = net.evaluate(&[&x])?;
    assert!(outputs[1].equal(a) && !outputs[1].requires_grad());
    Ok(())
}

/// Draws of a loss with dropout, as many as tests/compiled/eager.py makes.
const DRAWS: u32 = 1000;

/// Dropout draws other numbers than in Python, so the losses of many draws are compared.
fn dropout_as_in_eager(folder: &Path) -> Result<()> {
    let eager = Tensor::read_safetensors(folder.join("dropout.safetensors"))?;
    let eager: std::collections::HashMap<_, _> = eager.into_iter().collect();
    let vs = VarStore::new(Device::Cpu);
    let net = CompiledModel::load(folder.join("dropout"), &vs.root())?;
    let (x, y) = (eager["x"].get(0), eager["y"].get(0));
    let draws = (0..DRAWS).map(|_| net.step(&[&x, &y]).map(|step| step.loss));
    let draws = Tensor::stack(&draws.collect::<tch_ignite::Result<Vec<_>>>()?, 0);
    let [ours, theirs] = [&draws, &eager["draws"]].map(|losses| {
        (losses.mean(Kind::Double).double_value(&[]), losses.std(true).double_value(&[]))
    });
    let error = ((ours.1.powi(2) + theirs.1.powi(2)) / f64::from(DRAWS)).sqrt();
    assert!((ours.0 - theirs.0).abs() < 4. * error, "{ours:?} {theirs:?}");
    assert!((ours.1 / theirs.1 - 1.).abs() < 0.15, "{ours:?} {theirs:?}");
    // The same numbers after a seed, and none in evaluation.
    let loss = |seed: Option<i64>| {
        if let Some(seed) = seed {
            tch::manual_seed(seed);
        }
        net.step(&[&x, &y]).map(|step| step.loss.double_value(&[]))
    };
    let (first, second) = (loss(Some(5))?, loss(None)?);
    assert_ne!(first, second);
    assert_eq!((loss(Some(5))?, loss(None)?), (first, second));
    assert!(net.evaluate(&[&x])?[0].equal(&net.evaluate(&[&x])?[0]));
    let x = Tensor::arange(24 * 6, (Kind::Int64, Device::Cpu)).remainder(13).view([24, 6]);
    resumed_equals_whole(&folder.join("dropout"), &Loader::new(&x, &x, 8)?.shuffle(3))?;
    killed_equals_straight(&folder.join("dropout"), &[&x, &x], 8)
}
