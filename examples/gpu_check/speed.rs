//! How much is done in a second. benches/gpu.py does the same in PyTorch.

use std::time::{Duration, Instant};

use anyhow::Result;
use tch::nn::{self, ModuleT, VarStore};
use tch::{Cuda, Device, Kind, Tensor};
use tch_ignite::prelude::*;

use crate::model::{Config, Gpt};

/// Batches of a pass.
const PASS: i64 = 20;

/// Prints a line for each thing that is measured, as benches/gpu.py does. Large batches are for GPUs.
pub fn speed(device: Device) -> Result<String> {
    let mut speeds = vec![("AdamW on ResNet-18, steps", steps(device)?)];
    speeds.push(("convolutions, batch 64, samples", convolutions(device, 64)?));
    speeds.push(("chargpt, batch 12, tokens", chargpt(device, 12)?));
    if device.is_cuda() {
        speeds.push(("convolutions, batch 1024, samples", convolutions(device, 1024)?));
        speeds.push(("chargpt, batch 256 in bf16, tokens", chargpt(device, 256)?));
    }
    for (name, each_second) in &speeds {
        println!("speed\t{name}\tours\t{each_second}");
    }
    Ok(format!("{} speeds", speeds.len()))
}

fn synchronize(device: Device) {
    if let Device::Cuda(index) = device {
        Cuda::synchronize(index as i64);
    }
}

/// On the CPU all is only tried.
fn time(device: Device) -> Duration {
    Duration::from_millis(if device.is_cuda() { 1500 } else { 100 })
}

/// Calls until the time is over, and returns how many calls are made in a second.
fn rate(device: Device, mut call: impl FnMut() -> Result<()>) -> Result<f64> {
    (0..3).try_for_each(|_| call())?;
    synchronize(device);
    let (start, mut calls) = (Instant::now(), 0u32);
    while start.elapsed() < time(device) {
        // The device may lag behind, but not by more than this.
        (0..20).try_for_each(|_| call())?;
        synchronize(device);
        calls += 20;
    }
    Ok(f64::from(calls) / start.elapsed().as_secs_f64())
}

/// The shapes of ResNet-18's parameters, as benches/steps.py has them.
fn resnet18() -> Vec<Vec<i64>> {
    let mut shapes = vec![vec![64, 3, 7, 7], vec![64], vec![64]];
    for (from, to) in [(64, 64), (64, 128), (128, 256), (256, 512)] {
        for from in [from, to] {
            shapes.extend([vec![to, from, 3, 3], vec![to], vec![to]]);
            shapes.extend([vec![to, to, 3, 3], vec![to], vec![to]]);
            if from != to {
                shapes.extend([vec![to, from, 1, 1], vec![to], vec![to]]);
            }
        }
    }
    shapes.extend([vec![1000, 512], vec![1000]]);
    shapes
}

fn steps(device: Device) -> Result<f64> {
    let vs = VarStore::new(device);
    let mut loss = Tensor::zeros([], (Kind::Float, device));
    for (index, shape) in resnet18().iter().enumerate() {
        let parameter = vs.root().randn(&format!("p{index}"), shape, 0., 0.1);
        loss += (parameter * Tensor::randn(shape, (Kind::Float, device))).sum(Kind::Float);
    }
    loss.f_backward()?;
    let optimizer = Optimizer::adamw(&vs).lr(1e-6).build()?;
    rate(device, || Ok(optimizer.step()?))
}

/// The network of benches/training.py, with the running loss as its metric: whole iterations of a run.
fn convolutions(device: Device, batch: usize) -> Result<f64> {
    let vs = VarStore::new(device);
    let root = vs.root();
    let net = nn::seq_t()
        .add(nn::conv2d(&root / "conv1", 1, 32, 5, Default::default()))
        .add_fn(|x| x.max_pool2d_default(2).relu())
        .add(nn::conv2d(&root / "conv2", 32, 64, 5, Default::default()))
        .add_fn(|x| x.max_pool2d_default(2).relu().flatten(1, -1))
        .add(nn::linear(&root / "fc1", 1024, 256, Default::default()))
        .add_fn(|x| x.relu())
        .add(nn::linear(&root / "fc2", 256, 10, Default::default()));
    let optimizer = Optimizer::adam(&vs).lr(1e-3).build()?;
    let x = Tensor::rand([PASS * batch as i64, 1, 28, 28], (Kind::Float, device));
    let y = Tensor::randint(10, [PASS * batch as i64], (Kind::Int64, device));
    let cx = Supervised::new(net, optimizer, |y_pred, y| y_pred.cross_entropy_for_logits(y));
    run(device, cx, &Loader::new(&x, &y, batch)?.shuffle(1), batch)
}

fn chargpt(device: Device, batch: usize) -> Result<f64> {
    let vs = VarStore::new(device);
    let config =
        Config { vocabulary: 65, context: 64, layers: 4, heads: 4, width: 128, dropout: 0. };
    let net = Gpt::new(&vs.root(), config);
    let optimizer = Optimizer::adamw(&vs).lr(1e-3).build()?;
    let tokens = Tensor::randint(65, [PASS * batch as i64, 65], (Kind::Int64, device));
    let (x, y) = (tokens.narrow(1, 0, 64), tokens.narrow(1, 1, 64));
    let loss = |y_pred: &Tensor, y: &Tensor| {
        y_pred.flatten(0, 1).cross_entropy_for_logits(&y.flatten(0, 1))
    };
    let mut cx = Supervised::new(net, optimizer, loss).clip_grad_norm(1.);
    if batch > 12 {
        cx = cx.autocast(Kind::BFloat16);
    }
    Ok(64. * run(device, cx, &Loader::new(&x, &y, batch)?.shuffle(1), batch)?)
}

/// The samples that are trained with in a second, in passes of `PASS` batches.
fn run<N: ModuleT>(
    device: Device,
    mut cx: Supervised<N>,
    data: &Loader,
    batch: usize,
) -> Result<f64> {
    let mut trainer = create_supervised_trainer();
    trainer.metric("loss", RunningAverage::new());
    let mut epochs = 1;
    trainer.run(&mut cx, data, Until::epochs(epochs))?;
    synchronize(device);
    let start = Instant::now();
    while start.elapsed() < time(device) {
        epochs += 1;
        trainer.run(&mut cx, data, Until::epochs(epochs))?;
        synchronize(device);
    }
    Ok((epochs - 1) as f64 * PASS as f64 * batch as f64 / start.elapsed().as_secs_f64())
}
