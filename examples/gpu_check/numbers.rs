//! Parts that compute the same on the CPU and on the device.

use std::path::Path;

use anyhow::{Result, ensure};
use tch::nn::VarStore;
use tch::{Device, Kind, Tensor};
use tch_ignite::data::{Batch, DataLoader, Loader, from_fn};
use tch_ignite::engine::{Engine, Until};
use tch_ignite::handlers::EMAHandler;
use tch_ignite::optim::Optimizer;

use crate::runner::{Tally, run_file};

/// Runs golden cases on the device, which PyTorch and ignite computed on the CPU.
fn golden(device: Device, files: &[&str]) -> Result<String> {
    let mut tally = Tally::default();
    for file in files {
        run_file(&Path::new("tests/golden").join(file), device, &mut tally)?;
    }
    let text = tally.to_string();
    ensure!(tally.failed == 0 && tally.passed > 0, "{text}");
    Ok(text.lines().last().unwrap_or_default().to_owned())
}

pub fn golden_training(device: Device) -> Result<String> {
    golden(device, &["train.jsonl"])
}

pub fn golden_optimizers(device: Device) -> Result<String> {
    golden(device, &["optimizer.jsonl", "optimizer_package.jsonl"])
}

pub fn golden_metrics(device: Device) -> Result<String> {
    golden(device, &["metric.jsonl"])
}

/// How far the elements of two tensors are apart, relative to the largest value of the second.
fn distances(ours: &Tensor, expected: &Tensor) -> Tensor {
    let on_cpu = |tensor: &Tensor| tensor.detach().to_device(Device::Cpu).to_kind(Kind::Double);
    let (ours, expected) = (on_cpu(ours), on_cpu(expected));
    let largest = expected.abs().max().double_value(&[]).max(f64::MIN_POSITIVE);
    (ours - expected).abs() / largest
}

/// How far the tensors are apart, relative to the largest value of each; an error where that is more than the tolerance.
fn apart(ours: &[Tensor], expected: &[Tensor], tolerance: f64) -> Result<f64> {
    ensure!(ours.len() == expected.len() && !ours.is_empty(), "other tensors");
    ours.iter().zip(expected).enumerate().try_fold(0f64, |most, (index, (ours, expected))| {
        ensure!(ours.size() == expected.size(), "tensor {index} is {ours:?}, not {expected:?}");
        let apart = distances(ours, expected).max().double_value(&[]);
        // A NaN fails too.
        ensure!(
            apart <= tolerance,
            "tensor {index} is {apart:.1e} off; {tolerance:.0e} is allowed"
        );
        Ok(most.max(apart))
    })
}

/// Compares what `make` returns for the device and for the CPU.
fn on_both(
    device: Device,
    tolerance: f64,
    make: impl Fn(Device) -> Result<Vec<Tensor>>,
) -> Result<String> {
    let here = make(device)?;
    ensure!(here.iter().all(|tensor| tensor.device() == device), "a tensor is not on {device:?}");
    let apart = apart(&here, &make(Device::Cpu)?, tolerance)?;
    Ok(format!("at most {apart:.1e} from the CPU's"))
}

/// The same numbers on any device.
fn numbers(device: Device, kind: Kind, shape: &[i64], seed: f64) -> Tensor {
    let count = shape.iter().product::<i64>();
    let numbers = (Tensor::arange(count, (Kind::Double, Device::Cpu)) * 0.37 + seed).sin();
    numbers.view(shape).to_kind(kind).to_device(device)
}

/// Small and large parameters, of sizes that are no multiples of anything.
fn parameters(device: Device, kind: Kind) -> VarStore {
    let mut vs = VarStore::new(device);
    vs.set_kind(kind);
    for (index, shape) in
        [vec![3], vec![17, 5], vec![8, 3, 5, 5], vec![1031, 257]].iter().enumerate()
    {
        let value = numbers(device, kind, shape, index as f64);
        let _ = vs.root().add(&format!("p{index}"), value.set_requires_grad(true), true);
    }
    vs
}

fn values(vs: &VarStore) -> Vec<Tensor> {
    let variables = vs.variables();
    let mut names: Vec<_> = variables.keys().collect();
    names.sort();
    names.into_iter().map(|name| variables[name].shallow_clone()).collect()
}

/// Gives each parameter a gradient, another one for each seed.
fn backward(vs: &VarStore, optimizer: &Optimizer, seed: f64) -> Result<()> {
    optimizer.zero_grad()?;
    let loss = values(vs).iter().fold(Tensor::from(0f32).to_device(vs.device()), |loss, value| {
        let given = numbers(vs.device(), value.kind(), &value.size(), 0.1 + seed);
        loss + (value * given).sum(value.kind())
    });
    Ok(loss.f_backward()?)
}

pub fn fused(device: Device) -> Result<String> {
    const OPTIMIZERS: [&str; 15] = [
        "SGD",
        "Adam",
        "AdamW",
        "RMSprop",
        "Adagrad",
        "NAdam",
        "RAdam",
        "Adamax",
        "Adadelta",
        "ASGD",
        "Rprop",
        "Lion",
        "Adafactor",
        "AdEMAMix",
        "AdamWScheduleFree",
    ];
    let mut most = 0f64;
    for name in OPTIMIZERS {
        for (kind, tolerance) in [(Kind::Double, 1e-12), (Kind::Float, 1e-5)] {
            let stepped = |fused: bool| -> Result<Vec<Tensor>> {
                let vs = parameters(device, kind);
                let optimizer = Optimizer::named(name, &vs)?.lr(1e-2).build()?;
                optimizer.set_fused(fused)?;
                for step in 0..5 {
                    backward(&vs, &optimizer, f64::from(step))?;
                    optimizer.step()?;
                }
                Ok(values(&vs))
            };
            let (ours, expected) = (stepped(true)?, stepped(false)?);
            if name == "Lion" && kind == Kind::Float {
                // Lion steps by the sign of 0.9 m + 0.1 g. Where that is 0 but for rounding, a kernel that multiplies
                // and adds at once may have the other sign; of these 265,000 elements hardly one is so close to 0.
                let others = ours.iter().zip(&expected).map(|(ours, expected)| {
                    let within = distances(ours, expected).le(tolerance);
                    within.logical_not().sum(Kind::Int64).int64_value(&[])
                });
                let others: i64 = others.sum();
                ensure!(others <= 4, "Lion, Float: {others} elements are more than rounding off");
                continue;
            }
            let apart = apart(&ours, &expected, tolerance);
            let apart = apart.map_err(|error| error.context(format!("{name}, {kind:?}")))?;
            if kind == Kind::Double {
                most = most.max(apart);
            }
        }
    }
    Ok(format!("{} optimizers, at most {most:.1e} apart in f64", OPTIMIZERS.len()))
}

pub fn clipping(device: Device) -> Result<String> {
    on_both(device, 1e-12, |device| {
        let vs = parameters(device, Kind::Double);
        let optimizer = Optimizer::sgd(&vs).momentum(0.9).lr(0.1).build()?;
        let mut found = vec![];
        let gradients = || values(&vs).iter().map(|value| value.grad().copy()).collect::<Vec<_>>();
        backward(&vs, &optimizer, 0.)?;
        found.push(optimizer.gradients()?.norm()?);
        found.push(optimizer.gradients()?.order(1.).norm()?);
        found.push(optimizer.gradients()?.order(f64::INFINITY).norm()?);
        found.push(optimizer.clip_grad_norm(0.5)?);
        found.extend(gradients());
        optimizer.clip_grad_value(1e-3)?;
        found.extend(gradients());
        backward(&vs, &optimizer, 1.)?;
        optimizer.gradients()?.clip_adaptive(0.01, 1e-3)?;
        found.extend(gradients());
        backward(&vs, &optimizer, 2.)?;
        found.push(optimizer.step_clipped(0.3)?);
        found.extend(values(&vs));
        Ok(found)
    })
}

pub fn averages(device: Device) -> Result<String> {
    on_both(device, 1e-12, |device| {
        let vs = parameters(device, Kind::Double);
        let optimizer = Optimizer::sgd(&vs).lr(0.1).build()?;
        let ema = EMAHandler::decay(&vs, 0.9)?.warmup(0.5, 3)?;
        for step in 0..5 {
            backward(&vs, &optimizer, f64::from(step))?;
            optimizer.step()?;
            ema.update()?;
        }
        let mut averages = ema.averages();
        averages.sort_by(|(a, _), (b, _)| a.cmp(b));
        Ok(averages.into_iter().map(|(_, average)| average).collect())
    })
}

/// The tensors of two passes.
fn batches<S>(source: S) -> Result<Vec<Tensor>>
where
    S: tch_ignite::data::IntoSource<'static, Batch> + 'static,
{
    let mut engine = Engine::new(|seen: &mut Vec<Tensor>, _, (x, y): Batch| {
        seen.extend([x, y]);
        Ok(())
    });
    let mut seen = vec![];
    engine.run(&mut seen, source, Until::epochs(2))?;
    Ok(seen)
}

pub fn pinned_memory(device: Device) -> Result<String> {
    on_both(device, 0., |device| {
        let samples = from_fn(50, |index, rng| {
            let x = Tensor::f_from_slice(&[index as f64, rng.uniform()])?;
            Ok((x, index as i64))
        });
        let loader = DataLoader::new(samples, 8)?.shuffle(1).num_workers(2).pin_memory(true);
        batches(loader.to_device(device))
    })
}

pub fn normalizing(device: Device) -> Result<String> {
    on_both(device, 1e-6, |device| {
        let bytes = numbers(Device::Cpu, Kind::Double, &[40, 3, 8, 8], 0.) * 127. + 128.;
        let (bytes, rows) =
            (bytes.to_kind(Kind::Uint8), Tensor::arange(40, (Kind::Int64, Device::Cpu)));
        let (mean, std) = ([0.4, 0.5, 0.6], [0.2, 0.3, 0.4]);
        let loader = Loader::new(&bytes, &rows, 16)?.shuffle(2).normalize(&mean, &std)?;
        let mut seen = batches(loader.to_device(device))?;
        let samples = from_fn(40, |index, _| {
            let picture = numbers(Device::Cpu, Kind::Double, &[3, 8, 8], index as f64);
            Ok(((picture * 127. + 128.).to_kind(Kind::Uint8), index as i64))
        });
        let loader = DataLoader::new(samples, 16)?.num_workers(1).normalize(&mean, &std)?;
        seen.extend(batches(loader.pin_memory(true).to_device(device))?);
        Ok(seen)
    })
}
