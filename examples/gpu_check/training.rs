//! Parts that train.

use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use tch::nn::{self, VarStore};
use tch::{Device, Kind, Tensor};
use tch_ignite::amp::GradScaler;
use tch_ignite::prelude::*;

fn cross_entropy(y_pred: &Tensor, y: &Tensor) -> Tensor {
    y_pred.cross_entropy_for_logits(y)
}

/// Points of three classes that a small network tells apart, on the device.
fn points(device: Device, batches: i64) -> Result<Loader> {
    let x = (Tensor::arange(batches * 32 * 16, (Kind::Float, Device::Cpu)) * 0.71).sin();
    let x = x.view([batches * 32, 16]);
    let y = x.narrow(1, 0, 3).argmax(1, false);
    Ok(Loader::new(&x.to_device(device), &y.to_device(device), 32)?.shuffle(1))
}

fn network(vs: &VarStore) -> nn::SequentialT {
    let root = vs.root();
    nn::seq_t()
        .add(nn::linear(&root / "fc1", 16, 64, Default::default()))
        .add_fn_t(|x, train| x.relu().dropout(0.2, train))
        .add(nn::linear(&root / "fc2", 64, 3, Default::default()))
}

/// The mean loss of the last epoch of training.
fn loss_with(
    device: Device,
    set: impl FnOnce(Supervised<nn::SequentialT>) -> Supervised<nn::SequentialT>,
) -> Result<f64> {
    tch::manual_seed(1);
    let vs = VarStore::new(device);
    let net = network(&vs);
    let optimizer = Optimizer::adamw(&vs).lr(1e-2).build()?;
    let mut cx = set(Supervised::new(net, optimizer, cross_entropy)).clip_grad_norm(1.);
    let mut trainer = create_supervised_trainer();
    trainer.metric("loss", Mean::new());
    trainer.run(&mut cx, &points(device, 30)?, Until::epochs(10))?;
    let finite = vs
        .variables()
        .values()
        .all(|value| value.isfinite().all().int64_value(&[]) == 1 && value.kind() == Kind::Float);
    ensure!(finite, "a parameter is no finite f32");
    Ok(trainer.state.metrics.get("loss")?)
}

/// Trains in f32 and with autocast: both learn as much.
fn mixed(
    device: Device,
    set: impl FnOnce(Supervised<nn::SequentialT>) -> Supervised<nn::SequentialT>,
) -> Result<String> {
    let (single, mixed) = (loss_with(device, |cx| cx)?, loss_with(device, set)?);
    ensure!(
        single < 0.4 && (mixed - single).abs() < 0.1,
        "the loss is {mixed:.3}, in f32 {single:.3}"
    );
    Ok(format!("the loss is {mixed:.3}, in f32 {single:.3}"))
}

pub fn half(device: Device) -> Result<String> {
    // The gradients are infinite in f16 until the scaler has found a scale.
    let scaler = GradScaler::new().init_scale(2f64.powi(40))?;
    let own = scaler.clone();
    let text = mixed(device, move |cx| cx.autocast(Kind::Half).grad_scaler(own))?;
    let (scale, skipped) = (scaler.get_scale()?, scaler.skipped()?);
    ensure!(
        skipped > 0 && skipped < 50 && scale < 2f64.powi(40),
        "{skipped} steps were skipped, and the scale is {scale}"
    );
    Ok(format!("{text}; {skipped} steps skipped"))
}

pub fn bfloat16(device: Device) -> Result<String> {
    mixed(device, |cx| cx.autocast(Kind::BFloat16))
}

/// The parameters after some epochs, begun from the newest checkpoint of the folder.
fn trained(device: Device, folder: &Path, epochs: u64, seed: i64) -> Result<Vec<Tensor>> {
    tch::manual_seed(seed);
    let vs = VarStore::new(device);
    let net = network(&vs);
    let optimizer = Optimizer::adamw(&vs).lr(1e-2).build()?;
    let mut trainer = create_supervised_trainer();
    trainer
        .attach(CosineAnnealingScheduler::new(&optimizer, "lr", 1e-2, 1e-4, 40))
        .attach(EMAHandler::decay(&vs, 0.9)?)
        .attach(Checkpoint::new(folder))
        .track("model", &vs)
        .track("optimizer", &optimizer);
    let mut cx = Supervised::new(net, optimizer, cross_entropy);
    trainer.resume(&mut cx, folder)?;
    trainer.run(&mut cx, &points(device, 10)?, Until::epochs(epochs))?;
    let variables = vs.variables();
    let mut names: Vec<_> = variables.keys().collect();
    names.sort();
    Ok(names.into_iter().map(|name| variables[name].detach().to_device(Device::Cpu)).collect())
}

pub fn resume(device: Device) -> Result<String> {
    let folder =
        |name| std::env::temp_dir().join(format!("gpu-check-{}-{name}", std::process::id()));
    let (whole, parts) = (folder("whole"), folder("parts"));
    let whole_run = trained(device, &whole, 4, 1);
    let resumed = trained(device, &parts, 2, 1).and_then(|_| trained(device, &parts, 4, 2));
    for folder in [whole, parts] {
        let _ = std::fs::remove_dir_all(folder);
    }
    // Dropout draws from the device's generator: the second half would differ if its state were not in the checkpoint.
    ensure!(whole_run? == resumed?, "the resumed run has other parameters");
    Ok("the same bits, dropout included".into())
}

/// A group of one rank, over NCCL on a GPU: RANK and its like are set.
#[cfg(feature = "distributed")]
pub fn process_group(device: Device) -> Result<String> {
    use tch_ignite::distributed::{
        Backend, DdpOptions, DistributedDataParallel, ProcessGroup, ProcessGroupOptions, ReduceOp,
    };
    let backend = if device.is_cuda() { Backend::Nccl } else { Backend::Gloo };
    let pg = ProcessGroup::from_env(ProcessGroupOptions::new().backend(backend))?;
    let sum = Tensor::ones([1000], (Kind::Float, device));
    pg.all_reduce(&[&sum], ReduceOp::Sum)?;
    ensure!(sum.sum(Kind::Double).double_value(&[]) == 1000., "the sum over one rank is another");
    let trained = |parallel: bool| -> Result<Vec<Tensor>> {
        tch::manual_seed(1);
        let vs = VarStore::new(device);
        let net = network(&vs);
        let optimizer = Optimizer::sgd(&vs).lr(0.1).build()?;
        let mut cx = Supervised::new(net, optimizer, cross_entropy);
        let mut trainer = create_supervised_trainer();
        if parallel {
            cx = cx.data_parallel(DistributedDataParallel::new(&pg, &vs, DdpOptions::new())?);
            trainer.distributed(&pg);
        }
        trainer.run(&mut cx, &points(device, 10)?, Until::epochs(2))?;
        Ok(vs
            .trainable_variables()
            .iter()
            .map(|value| value.detach().to_device(Device::Cpu))
            .collect())
    };
    ensure!(trained(true)? == trained(false)?, "data-parallel training of one rank differs");
    Ok(format!("{backend:?}: all_reduce and data-parallel training"))
}

#[cfg(not(feature = "distributed"))]
pub fn process_group(_: Device) -> Result<String> {
    Ok("left out: built without the feature distributed".into())
}

/// The network of the README on the digits of scripts/fetch-mnist.sh.
pub fn digits(device: Device) -> Result<String> {
    let folder = PathBuf::from(std::env::var("MNIST_DIR").unwrap_or("data/mnist".into()));
    if !folder.is_dir() {
        return Ok(format!("left out: no digits in {}", folder.display()));
    }
    let data = tch::vision::mnist::load_dir(&folder)?;
    tch::manual_seed(0);
    let vs = VarStore::new(device);
    let root = vs.root();
    let net = nn::seq_t()
        .add_fn(|x| x.view([-1, 1, 28, 28]))
        .add(nn::conv2d(&root / "conv", 1, 32, 5, Default::default()))
        .add_fn(|x| x.max_pool2d_default(4).relu().flat_view())
        .add(nn::linear(&root / "fc", 32 * 6 * 6, 10, Default::default()));
    let optimizer = Optimizer::sgd(&vs).momentum(0.9).lr(5e-2).build()?;
    let train =
        Loader::new(&data.train_images, &data.train_labels, 64)?.shuffle(42).to_device(device);
    let test = Loader::new(&data.test_images, &data.test_labels, 1000)?.to_device(device);
    let (epochs, enough) = if device.is_cuda() { (5, 95.) } else { (2, 90.) };
    let steps = epochs * train.batches();
    let mut evaluator = create_supervised_evaluator();
    evaluator.metric("accuracy", Accuracy::of(Prediction::parts));
    let mut trainer = create_supervised_trainer();
    trainer
        .attach(CosineAnnealingScheduler::new(&optimizer, "lr", 5e-2, 0., steps))
        .attach(Evaluate::each_epoch("test", evaluator, &test));
    trainer.run(
        &mut Supervised::new(net, optimizer, cross_entropy),
        &train,
        Until::epochs(epochs),
    )?;
    let accuracy = 100. * trainer.state.metrics.get("test/accuracy")?;
    let text = format!("{accuracy:.2} % after {epochs} epochs of {} digits", train.samples());
    ensure!(accuracy > enough, "{text}");
    Ok(text)
}

/// Trains with the usual handlers, all on their defaults; reads the loss in each iteration if asked to.
pub fn iterations(device: Device, iterations: u64, read: bool) -> Result<String> {
    let vs = VarStore::new(device);
    let net = network(&vs);
    let optimizer = Optimizer::adamw(&vs).lr(1e-3).build()?;
    let mut trainer = create_supervised_trainer();
    trainer
        .metric("loss", RunningAverage::new())
        .attach(LinearCyclicalScheduler::new(&optimizer, "lr", 1e-3, 1e-4, 100))
        .attach(TerminateOnNan::new())
        .attach(EMAHandler::decay(&vs, 0.99)?);
    if read {
        trainer.on(Event::IterationCompleted, |_, engine| {
            let _ = engine.state.output.as_ref().map(|loss| loss.double_value(&[]));
            Ok(())
        });
    }
    let mut cx = Supervised::new(net, optimizer, cross_entropy)
        .autocast(Kind::Half)
        .grad_scaler(GradScaler::new())
        .clip_grad_norm(1.);
    let summary = trainer.run(&mut cx, &points(device, 400)?, Until::iterations(iterations))?;
    ensure!(summary.iterations == iterations, "{summary}");
    Ok(summary.to_string())
}
