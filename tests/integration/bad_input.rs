//! Tests that errors in the data, or of the disk, are reported clearly, and leave the trained model as it was.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use tch::nn::{self, VarStore};
use tch::{Device, Kind, Tensor};
use tch_ignite::data::Loader;
use tch_ignite::engine::{Engine, Event, Stop, Until};
use tch_ignite::handlers::{EarlyStopping, Evaluate, History, TerminateOnNan};
use tch_ignite::loggers::*;
use tch_ignite::metrics::*;
use tch_ignite::optim::Optimizer;
use tch_ignite::supervised::{Prediction, Supervised, create_supervised_trainer};

use crate::common;

type Model = Supervised<nn::Linear>;

/// A small model, the store of its weights, and data of two batches in a pass.
fn model() -> Result<(VarStore, Model, Loader)> {
    let vs = VarStore::new(Device::Cpu);
    let mut net = nn::linear(vs.root(), 4, 3, Default::default());
    // The weights are not drawn at random, because tests run side by side and share torch's default generator.
    tch::no_grad(|| net.ws.copy_(&(floats(&[3, 4]) * 0.7).sin()));
    if let Some(bias) = &mut net.bs {
        tch::no_grad(|| bias.copy_(&floats(&[3]).cos()));
    }
    let optimizer = Optimizer::sgd(&vs).lr(0.1).build()?;
    let loss = |y_pred: &Tensor, y: &Tensor| y_pred.cross_entropy_for_logits(y);
    let x = Tensor::arange(24, (Kind::Float, Device::Cpu)).view([6, 4]) / 10.;
    let train = Loader::new(&x, &Tensor::from_slice(&[0i64, 1, 2, 2, 1, 0]), 3)?;
    Ok((vs, Supervised::new(net, optimizer, loss), train))
}

fn weights(vs: &VarStore) -> Vec<f32> {
    let variables: std::collections::BTreeMap<_, _> = vs.variables().into_iter().collect();
    let flat: Vec<_> = variables.values().map(|tensor| tensor.detach().view([-1])).collect();
    Vec::<f32>::try_from(Tensor::cat(&flat, 0)).unwrap_or_default()
}

fn trained(epochs: u64) -> Result<Vec<f32>> {
    let (vs, mut cx, train) = model()?;
    create_supervised_trainer().run(&mut cx, &train, Until::epochs(epochs))?;
    Ok(weights(&vs))
}

/// Trains with an evaluation that gives these predictions and targets, and returns its error. Checks that training is
/// then where it would be without the evaluation, and goes on.
fn evaluated(outputs: Vec<(Tensor, Tensor)>, metric: impl Metric<Prediction>) -> Result<String> {
    let (vs, mut cx, train) = model()?;
    let batches: Vec<_> = (0..outputs.len()).collect();
    let mut evaluator = Engine::new(move |_: &mut Model, _, batch: usize| {
        let (y_pred, y) = &outputs[batch];
        Ok(Prediction { y_pred: y_pred.shallow_clone(), y: y.shallow_clone() })
    });
    evaluator.metric("metric", metric);
    let mut trainer = create_supervised_trainer();
    let id = trainer.add_handler(Evaluate::each_epoch("val", evaluator, batches))?;
    let error = trainer.run(&mut cx, &train, Until::epochs(2)).err().context("no error")?;
    assert_eq!(weights(&vs), trained(1)?);
    trainer.remove_event_handler(id)?;
    trainer.run(&mut cx, &train, Until::epochs(2))?;
    assert_eq!((trainer.state.iteration, weights(&vs)), (4, trained(2)?));
    Ok(format!("{:#}", anyhow::Error::from(error)))
}

fn floats(shape: &[i64]) -> Tensor {
    Tensor::arange(shape.iter().product::<i64>(), (Kind::Float, Device::Cpu)).view(shape)
}

fn ints(numbers: &[i64]) -> Tensor {
    Tensor::from_slice(numbers)
}

#[track_caller]
fn says(error: Result<String>, parts: &[&str]) {
    let error = error.unwrap();
    for part in parts {
        assert!(error.contains(part), "'{part}' is not in: {error}");
    }
}

#[test]
fn an_epoch_without_batches_or_samples_is_an_error_that_says_so() {
    let accuracy = || Accuracy::of(Prediction::parts);
    says(evaluated(vec![], accuracy()), &["evaluator val", "Input data has zero size"]);
    let empty = vec![(floats(&[0, 3]), ints(&[]))];
    says(evaluated(empty, accuracy()), &["metric metric", "must have at least one example"]);
}

#[test]
fn shapes_that_do_not_fit_are_errors_that_give_both() {
    let outputs = |y_pred: &[i64], y: &[i64]| vec![(floats(y_pred), ints(y))];
    let parts = Prediction::parts;
    says(
        evaluated(outputs(&[4, 3], &[0, 1, 2]), Accuracy::of(parts)),
        &["metric metric", "[4, 3]", "[3]"],
    );
    says(evaluated(outputs(&[4, 3], &[0, 1, 2]), Precision::of(parts)), &["[4, 3]", "[3]"]);
    says(
        evaluated(outputs(&[4, 3], &[0, 1, 2]), ConfusionMatrix::of(3, parts)),
        &["[4, 3]", "[3]"],
    );
    says(evaluated(outputs(&[4], &[0, 1, 2]), MeanSquaredError::of(parts)), &["[4]", "[3]"]);
    let loss = Loss::of(|y_pred: &Tensor, y: &Tensor| y_pred.cross_entropy_for_logits(y), parts);
    says(evaluated(outputs(&[4, 3], &[0, 1, 2]), loss), &["metric metric", "4", "3"]);
    says(evaluated(outputs(&[4, 2], &[0, 1, 1, 0]), ConfusionMatrix::of(3, parts)), &["3", "2"]);
}

#[test]
fn labels_out_of_range_are_errors() {
    let outputs = |y: &[i64]| vec![(floats(&[y.len() as i64, 3]), ints(y))];
    let parts = Prediction::parts;
    let loss = Loss::of(|y_pred: &Tensor, y: &Tensor| y_pred.cross_entropy_for_logits(y), parts);
    says(evaluated(outputs(&[0, 7]), loss), &["metric metric", "Target 7 is out of bounds"]);
    says(
        evaluated(outputs(&[0, 7]), Recall::of(parts)),
        &["metric metric", "fewer classes than y"],
    );
    // As in ignite, the accuracy only compares labels, and the matrix leaves out labels that are no class (such as
    // 255).
    let mut accuracy = Accuracy::of(pair);
    let mut matrix = ConfusionMatrix::of(3, pair);
    accuracy.update(&(floats(&[2, 3]), ints(&[2, 7]))).unwrap();
    matrix.update(&(floats(&[2, 3]), ints(&[2, 7]))).unwrap();
    assert_eq!(accuracy.compute().unwrap().read().unwrap(), 0.5);
    assert_eq!(i64::try_from(matrix.compute().unwrap().tensor().unwrap().sum(None)).unwrap(), 1);
}

#[test]
fn a_label_out_of_range_in_training_costs_that_iteration_only() -> Result<()> {
    let (vs, mut cx, train) = model()?;
    let bad = ints(&[0, 1, 7]);
    let x = floats(&[3, 4]);
    let before = weights(&vs);
    let mut trainer = create_supervised_trainer();
    let error = trainer.run(&mut cx, &Loader::new(&x, &bad, 3)?, Until::epochs(1)).unwrap_err();
    let text = format!("{:#}", anyhow::Error::from(error));
    assert!(text.contains("iteration 1") && text.contains("Target 7 is out of bounds"), "{text}");
    assert_eq!(weights(&vs), before);
    trainer.reset()?;
    trainer.run(&mut cx, &train, Until::epochs(1))?;
    assert_eq!(weights(&vs), trained(1)?);
    Ok(())
}

#[test]
fn predictions_that_are_nan_have_the_documented_value() -> Result<()> {
    let nan = || (Tensor::full([2, 3], f64::NAN, (Kind::Float, Device::Cpu)), ints(&[0, 2]));
    // The first NaN counts as the largest score, as in torch.
    let mut accuracy = Accuracy::of(pair);
    accuracy.update(&nan())?;
    assert_eq!(accuracy.compute()?.read()?, 0.5);
    let mut loss = Loss::of(|y_pred: &Tensor, y: &Tensor| y_pred.cross_entropy_for_logits(y), pair);
    loss.update(&nan())?;
    assert!(loss.compute()?.read()?.is_nan());

    // Early stopping does not take NaN for the best score, and TerminateOnNan ends the run.
    let mut evaluator =
        Engine::new(|epoch: &mut f64, _, (): ()| Ok(if *epoch == 1. { f64::NAN } else { *epoch }));
    evaluator.metric("loss", Mean::new());
    let mut trainer = Engine::new(|epoch: &mut f64, _, (): ()| {
        *epoch += 1.;
        Ok(*epoch)
    });
    let stop = EarlyStopping::min("val/loss", 2);
    trainer.attach(Evaluate::each_epoch("val", evaluator, vec![()])).attach(stop);
    // The losses are NaN, 2, 3 and 4. NaN is never the best; 2 is, and 3 and 4 are not better, so the run ends.
    assert_eq!(trainer.run(&mut 0., vec![()], Until::epochs(9))?.epochs, 4);
    let mut trainer = Engine::new(|_: &mut (), _, x: f64| Ok(x));
    trainer.attach(TerminateOnNan::new());
    let summary = trainer.run(&mut (), vec![1., f64::NAN, 1.], Until::epochs(2))?;
    assert_eq!((summary.iterations, summary.stop), (2, Stop::Terminated));
    Ok(())
}

#[test]
fn a_folder_that_cannot_be_written_is_told_before_training() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("file");
    std::fs::write(&file, "")?;
    let path = file.join("run");
    let errors = [
        ("run folder", RunFolder::create(&path).err()),
        ("CSV", CsvLogger::open(path.join("log.csv")).err()),
        ("JSON lines", JsonLinesLogger::open(path.join("log.jsonl")).err()),
        ("TensorBoard", TensorBoard::create(&path).err()),
        ("history", History::new().write_csv(path.join("history.csv")).err()),
    ];
    for (what, error) in errors {
        let text = format!("{:#}", anyhow::Error::from(error.context(what)?));
        assert!(text.contains("file/run") && text.contains("irectory"), "{what}: {text}");
    }
    Ok(())
}

/// A folder on a disk of 256 KiB, until it is dropped.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn mount() -> Result<Option<Self>> {
        let folder = tempfile::tempdir()?;
        let mut command = Command::new("mount");
        let mount = command.args(["-t", "tmpfs", "-o", "size=256k", "tmpfs"]).arg(folder.path());
        match mount.output() {
            Ok(output) if output.status.success() => Ok(Some(Self(folder))),
            _ => {
                common::skipped("no small disk can be mounted here (root may)");
                Ok(None)
            }
        }
    }

    fn fill(&self) -> Result<()> {
        let junk = self.0.path().join("junk");
        ensure!(std::fs::write(&junk, vec![0; 1 << 20]).is_err(), "the disk is large");
        Ok(())
    }

    fn empty(&self) -> Result<()> {
        // The file is truncated and not removed, because a process that another test starts just now may hold it
        // open.
        let junk = self.0.path().join("junk");
        Ok(std::fs::OpenOptions::new().write(true).open(junk)?.set_len(0)?)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}

/// Trains with this logger on a disk that is full from the third iteration on. That must be an error, after which
/// training goes on from where it was, and logging too, once there is room.
fn on_a_full_disk<L: Logger + Clone + 'static>(
    what: &str,
    make: impl FnOnce(&Path) -> tch_ignite::Result<L>,
) -> Result<()> {
    let Some(disk) = SmallDisk::mount()? else { return Ok(()) };
    let logger = make(&disk.0.path().join("run"))?;
    let (vs, mut cx, train) = model()?;
    let every = Event::IterationCompleted;
    // The tag is longer than the space that is left in a page of the disk.
    let tag = "t".repeat(5000);
    let flushed = logger.clone();
    let disk_full = std::cell::Cell::new(false);
    let mut trainer = create_supervised_trainer();
    trainer.attach(
        OutputHandler::new(&logger, tag.as_str(), every).output("loss", Tensor::shallow_clone),
    );
    trainer.on(every, |_, engine| {
        if engine.state.iteration == 3 {
            disk.fill()?;
            disk_full.set(true);
        }
        Ok(flushed.flush()?)
    });
    let error = trainer.run(&mut cx, &train, Until::epochs(3)).err().context("the disk is full")?;
    let text = format!("{:#}", anyhow::Error::from(error));
    assert!(disk_full.get() && text.contains("No space left"), "{what}: {text}");
    assert!(text.contains("run"), "{what}: {text} has no path");
    let (iteration, ran) = (trainer.state.iteration, weights(&vs));
    assert!((3..=5).contains(&iteration), "{what}: {iteration}");
    if iteration == 4 {
        assert_eq!(ran, trained(2)?);
    }
    disk.empty()?;
    trainer.run(&mut cx, &train, Until::epochs(3))?;
    assert_eq!((trainer.state.iteration, weights(&vs)), (6, trained(3)?), "{what}");
    logger.flush()?;
    Ok(())
}

#[test]
fn a_full_disk_is_an_error_of_each_logger_and_training_can_go_on() -> Result<()> {
    on_a_full_disk("CSV", |path| CsvLogger::open(path.join("log.csv")))?;
    on_a_full_disk("JSON lines", |path| JsonLinesLogger::open(path.join("log.jsonl")))?;
    on_a_full_disk("TensorBoard", |path| TensorBoard::create(path))?;
    on_a_full_disk("run folder", |path| RunFolder::create(path))
}

#[test]
fn a_report_on_a_full_disk_leaves_the_old_one() -> Result<()> {
    let Some(disk) = SmallDisk::mount()? else { return Ok(()) };
    let path = disk.0.path().join("run");
    let run = RunFolder::create(&path)?;
    run.write_report()?;
    let before = std::fs::read(path.join("report.html"))?;
    disk.fill()?;
    let error = run.write_report().err().context("the disk is full")?;
    let text = format!("{:#}", anyhow::Error::from(error));
    assert!(text.contains("No space left") && text.contains("report.html"), "{text}");
    assert_eq!(std::fs::read(path.join("report.html"))?, before);
    disk.empty()?;
    run.write_report().context("there is room again")
}
