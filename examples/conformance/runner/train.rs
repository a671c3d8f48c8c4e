//! Runs the cases of kind `train`: a small net is trained in f64, and its losses, parameters and the optimizer's
//! state at the end are compared.

use anyhow::{Context, Result, bail};
use serde_json::Value;
use tch::nn::VarStore;
use tch::{Device, Kind, Reduction, Tensor};
use tch_ignite::engine::{Engine, Until};
use tch_ignite::optim::Optimizer;

use super::Outcome;
use super::json::{array, count, events, float, floats, object, text};
use super::optimizer::{Beside, NEGATIVE, Params, refused_negative, values};

/// The tolerance that tests/golden/README.md gives under "Tolerances".
const RELATIVE: f64 = 1e-9;
const FLOOR: f64 = 1e-11;

struct Net {
    optimizer: Optimizer,
    parameters: Vec<(&'static str, Tensor)>,
    act: String,
    loss: String,
    accumulation: u64,
    losses: Vec<f64>,
    lrs: Vec<Vec<f64>>,
    momenta: Vec<Vec<f64>>,
}

/// Reads a list of numbers, or of lists of numbers, as a tensor.
fn tensor(value: &Value) -> Result<Tensor> {
    let rows = array(value)?;
    let flat = match rows.first() {
        Some(Value::Array(_)) => rows.iter().map(floats).collect::<Result<Vec<_>>>()?.concat(),
        _ => floats(value)?,
    };
    let tensor = Tensor::from_slice(&flat);
    Ok(match rows.first() {
        Some(Value::Array(row)) => tensor.reshape([rows.len() as i64, row.len() as i64]),
        _ => tensor,
    })
}

impl Net {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let [w1, b1, w2, b2] = [0, 1, 2, 3].map(|i| &self.parameters[i].1);
        let hidden = x.matmul(&w1.tr()) + b1;
        let hidden = match self.act.as_str() {
            "tanh" => hidden.tanh(),
            "sigmoid" => hidden.sigmoid(),
            "identity" => hidden,
            other => bail!("no activation {other}"),
        };
        Ok(hidden.matmul(&w2.tr()) + b2)
    }

    fn step(&mut self, iteration: u64, (x, y): (Tensor, Tensor)) -> Result<()> {
        self.lrs.push(values(&self.optimizer, "lr")?);
        if let Ok(momenta) = values(&self.optimizer, "momentum") {
            self.momenta.push(momenta);
        }
        if (iteration - 1).is_multiple_of(self.accumulation) {
            self.optimizer.zero_grad()?;
        }
        let y_pred = self.forward(&x)?;
        let loss = match self.loss.as_str() {
            "mse" => y_pred.mse_loss(&y, Reduction::Mean),
            "l1" => y_pred.l1_loss(&y, Reduction::Mean),
            "huber" => y_pred.smooth_l1_loss(&y, Reduction::Mean, 1.),
            other => bail!("no loss {other}"),
        };
        (&loss / self.accumulation as f64).f_backward()?;
        self.losses.push(loss.double_value(&[]));
        if iteration.is_multiple_of(self.accumulation) {
            self.optimizer.step()?;
        }
        Ok(())
    }
}

/// Whether the step of an iteration is fused.
type Fused = fn(u64) -> bool;

/// Runs a case three times: with fused steps, with libtorch's own loop, and with both in turn.
pub fn run(
    config: &Value,
    expect: &Value,
    device: Device,
    defect: &mut Option<&'static str>,
) -> Result<Outcome> {
    let ways: [(&str, Fused); 3] = [
        ("fused", |_| true),
        ("the loop", |_| false),
        ("both in turn", |iteration| iteration % 2 == 0),
    ];
    for (name, fused) in ways {
        if let Err(why) = train(config, expect, device, fused, defect)? {
            return Ok(Outcome::Failed(format!("{name}: {why}")));
        }
    }
    Ok(Outcome::Passed)
}

fn train(
    config: &Value,
    expect: &Value,
    device: Device,
    fused: Fused,
    defect: &mut Option<&'static str>,
) -> Result<Result<(), String>> {
    let entries = array(&config["schedulers"])?;
    let vs = VarStore::new(device);
    let mut parameters = vec![];
    for (name, group) in [("l1.weight", 0), ("l1.bias", 0), ("l2.weight", 1), ("l2.bias", 1)] {
        let (layer, leaf) = name.split_once('.').context("no layer")?;
        let path = vs.root().sub(layer).set_group(group);
        let value = tensor(&config["model"][name])?.to_device(device).set_requires_grad(true);
        parameters.push((name, path.add(leaf, value, true)));
    }
    let specs: Vec<_> = entries.iter().map(|entry| &entry["scheduler"]).collect();
    let params = Params::new(&config["optimizer"], &vs, &specs, Beside::Unknown)?;
    let mut net = Net {
        optimizer: params.optimizer.clone(),
        parameters,
        act: text(&config["model"]["act"])?.to_owned(),
        loss: text(&config["loss"])?.to_owned(),
        accumulation: count(&config["gradient_accumulation_steps"])?.unwrap_or(1),
        losses: vec![],
        lrs: vec![],
        momenta: vec![],
    };
    let batches = array(&config["batches"])?;
    let mut trainer = Engine::new(|net: &mut Net, engine, batch: &Value| {
        let batch =
            (tensor(&batch["x"])?.to_device(device), tensor(&batch["y"])?.to_device(device));
        net.optimizer.set_fused(fused(engine.state.iteration))?;
        net.step(engine.state.iteration, batch)
    });
    for entry in entries {
        trainer.attach(params.scheduler(&entry["scheduler"])?.on(events(&entry["event"])?));
    }
    let batches: Vec<&Value> = batches.iter().collect();
    let epochs = count(&config["max_epochs"])?.unwrap_or(1);
    let ran = trainer.run(&mut net, batches, Until::epochs(epochs));
    if let Some(error) = ran.err().map(anyhow::Error::from) {
        // The optimizer refused a negative value, with which ignite goes on. Only the steps before are compared.
        refused_negative(&error).with_context(|| format!("{error:#}"))?;
        *defect = Some(NEGATIVE);
        let losses = floats(&expect["loss"])?;
        let lrs = array(&expect["lr"])?;
        let steps = net.losses.len().min(losses.len());
        return Ok(near("loss", &net.losses, &losses[..steps]).and(near_rows(
            "lr",
            &net.lrs,
            &lrs[..steps].into(),
        )?));
    }
    compare(&net, expect)
}

fn compare(net: &Net, expect: &Value) -> Result<Result<(), String>> {
    let mut result = near("loss", &net.losses, &floats(&expect["loss"])?);
    result = result.and(near_rows("lr", &net.lrs, &expect["lr"])?);
    if !expect["momentum"].is_null() {
        result = result.and(near_rows("momentum", &net.momenta, &expect["momentum"])?);
    }
    for (name, parameter) in &net.parameters {
        result = result.and(near_tensor(name, parameter, &expect["params"][name])?);
        let ours = net.optimizer.state(name)?;
        let theirs = object(&expect["optimizer_state"][name])?;
        for (key, theirs) in theirs.iter().filter(|(_, value)| !value.is_null()) {
            let what = format!("{key} of {name}");
            result = result.and(match ours.iter().find(|(ours, _)| ours == key) {
                Some((_, ours)) => near_tensor(&what, ours, theirs)?,
                None => Err(format!("{what} is absent")),
            });
        }
        if let Some((extra, _)) = ours.iter().find(|(key, _)| !theirs.contains_key(*key)) {
            result = result.and(Err(format!("{extra} of {name} should not be there")));
        }
    }
    Ok(result)
}

fn near_tensor(what: &str, ours: &Tensor, theirs: &Value) -> Result<Result<(), String>> {
    let theirs = match theirs {
        Value::Array(_) => tensor(theirs)?,
        number => Tensor::from(float(number)?),
    };
    if ours.size() != theirs.size() {
        return Ok(Err(format!("{what}: shape {:?} instead of {:?}", ours.size(), theirs.size())));
    }
    let flat = |tensor: &Tensor| -> Result<Vec<f64>> {
        Ok(tensor.detach().to_device(Device::Cpu).to_kind(Kind::Double).reshape([-1]).try_into()?)
    };
    Ok(near(what, &flat(ours)?, &flat(&theirs)?))
}

fn near_rows(what: &str, ours: &[Vec<f64>], theirs: &Value) -> Result<Result<(), String>> {
    let theirs = array(theirs)?.iter().map(floats).collect::<Result<Vec<_>>>()?;
    Ok(near(what, &ours.concat(), &theirs.concat()))
}

fn near(what: &str, ours: &[f64], theirs: &[f64]) -> Result<(), String> {
    if ours.len() != theirs.len() {
        return Err(format!("{what}: {} values instead of {}", ours.len(), theirs.len()));
    }
    for (i, (a, b)) in ours.iter().zip(theirs).enumerate() {
        let fits = (a - b).abs() <= (RELATIVE * b.abs()).max(FLOOR) || (a.is_nan() && b.is_nan());
        if !fits && a.to_bits() != b.to_bits() {
            return Err(format!("{what}[{i}]: {a:e} instead of {b:e}"));
        }
    }
    Ok(())
}
