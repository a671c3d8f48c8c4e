//! Optimizers alone: gradients are given, and parameters and state are compared.

use anyhow::{Context, Result, bail};
use serde_json::Value;
use tch::nn::VarStore;
use tch::{Device, Kind, Tensor};
use tch_ignite::optim::{Group, Optimizer, Sam};

use super::Outcome;
use super::json::{array, count, float, floats, object, text};

/// torch's defect in cases whose groups have a value of their own for this option.
const INITIAL_VALUE: &str = "torch's Adagrad ignores the initial_accumulator_value of a group";

/// Whether a step is fused.
type Fused = fn(usize) -> bool;

/// With fused steps, with the loop, and with a switch at every other step.
pub fn run(
    config: &Value,
    expect: &Value,
    device: Device,
    defect: &mut Option<&'static str>,
) -> Result<Outcome> {
    let class = text(&config["type"])?;
    let with_closures = match class {
        "LBFGS" => Some(lbfgs(config, expect, device)?),
        "SAM" => Some(sam(config, expect, device)?),
        _ => None,
    };
    if let Some(result) = with_closures {
        return Ok(result.map_or_else(Outcome::Failed, |()| Outcome::Passed));
    }
    let ways: [(&str, Fused); 3] =
        [("fused", |_| true), ("the loop", |_| false), ("both in turn", |step| step % 2 == 0)];
    for (name, fused) in ways {
        if let Err(why) = steps(class, config, expect, device, fused, defect)? {
            return Ok(Outcome::Failed(format!("{name}: {why}")));
        }
    }
    Ok(Outcome::Passed)
}

fn steps(
    class: &str,
    config: &Value,
    expect: &Value,
    device: Device,
    fused: Fused,
    defect: &mut Option<&'static str>,
) -> Result<Result<(), String>> {
    let (kind, tolerance) = match text(&config["dtype"])? {
        "float64" => (Kind::Double, 1e-12),
        "float32" => (Kind::Float, 1e-6),
        other => bail!("no type {other}"),
    };
    // Muon multiplies matrices in bf16, and each device rounds the sums in its own order.
    let tolerance = if class == "Muon" && device.is_cuda() { 1e-2 } else { tolerance };
    let mut vs = VarStore::new(device);
    vs.set_kind(kind);
    let mut parameters = vec![];
    for spec in array(&config["params"])? {
        let (name, group) = (text(&spec["name"])?, count(&spec["group"])?.context("a group")?);
        let shape: Vec<i64> = serde_json::from_value(spec["shape"].clone())?;
        let value = Tensor::from_slice(&floats(&spec["data"])?).f_reshape(&shape[..])?;
        let value = value.to_kind(kind).to_device(device).set_requires_grad(true);
        let path = vs.root().set_group(usize::try_from(group)?.min(1 << 10));
        parameters.push((name.to_owned(), path.add(name, value, true)));
    }
    let optimizer = built(class, &vs)?;
    let groups = optimizer.groups()?;
    for (group, own) in groups.iter().zip(array(&config["groups"])?) {
        for options in [&config["defaults"], own].into_iter().filter(|options| !options.is_null()) {
            for (name, value) in object(options)? {
                if name == "initial_accumulator_value" && std::ptr::eq(options, own) {
                    *defect = Some(INITIAL_VALUE);
                    continue;
                }
                set(group, name, value).with_context(|| format!("{name} = {value}"))?;
            }
        }
    }

    let mut result = Ok(());
    for (step, gradients) in array(&config["grads"])?.iter().enumerate() {
        for change in array(&config["set"])? {
            if count(&change["step"])? == Some(step as u64) {
                let group = count(&change["group"])?.context("a group")? as usize;
                let group = groups.get(group).context("no such group")?;
                set(group, text(&change["option"])?, &change["value"])?;
            }
        }
        optimizer.zero_grad()?;
        for ((_, parameter), gradient) in parameters.iter().zip(array(gradients)?) {
            give(parameter, gradient)?;
        }
        optimizer.set_fused(fused(step))?;
        optimizer.step()?;
        let Some(expected) = expect["params"].get(step.to_string()) else { continue };
        for ((name, parameter), expected) in parameters.iter().zip(array(expected)?) {
            let what = format!("{name} after step {step}");
            result = result.and(near(&what, parameter, expected, tolerance)?);
        }
    }
    for ((name, _), expected) in parameters.iter().zip(array(&expect["state"])?) {
        let (ours, expected) = (optimizer.state(name)?, object(expected)?);
        for (key, expected) in expected.iter().filter(|(_, value)| !value.is_null()) {
            let what = format!("{key} of {name}");
            result = result.and(match ours.iter().find(|(ours, _)| ours == key) {
                Some((_, ours)) => near(&what, ours, expected, tolerance)?,
                None => Err(format!("{what} is absent")),
            });
        }
        if let Some((extra, _)) = ours.iter().find(|(key, _)| !expected.contains_key(*key)) {
            result = result.and(Err(format!("{extra} of {name} should not be there")));
        }
    }
    if !expect["eval_params"].is_null() {
        let trained: Vec<_> = parameters.iter().map(|(_, p)| p.detach().copy()).collect();
        optimizer.eval()?;
        for ((name, parameter), expected) in parameters.iter().zip(array(&expect["eval_params"])?) {
            let what = format!("{name} in evaluation");
            result = result.and(near(&what, parameter, expected, tolerance)?);
        }
        optimizer.train()?;
        if parameters.iter().zip(trained).any(|((_, p), trained)| p.detach() != trained) {
            result = result.and(Err("training does not go on with the same values".into()));
        }
    }
    Ok(result)
}

/// The function that LBFGS and SAM minimize.
struct Problem {
    a: Tensor,
    b: Tensor,
    x0: Tensor,
    quartic: f64,
}

impl Problem {
    fn of(config: &Value, device: Device) -> Result<Self> {
        let problem = &config["problem"];
        let vector =
            |value: &Value| anyhow::Ok(Tensor::from_slice(&floats(value)?).f_to_device(device)?);
        let rows = array(&problem["m"])?.iter().map(vector).collect::<Result<Vec<_>>>()?;
        let m = Tensor::f_stack(&rows, 0)?;
        let (b, x0) = (vector(&problem["b"])?, vector(&problem["x0"])?);
        let unit = Tensor::f_eye(x0.size1()?, (Kind::Double, device))?;
        let a = m.f_tr()?.f_matmul(&m)?.f_add(&unit.f_mul_scalar(0.1)?)?;
        if config["dtype"] != "float64" {
            bail!("a closure in another type than float64");
        }
        Ok(Self { a, b, x0, quartic: float(&problem["quartic"])? })
    }

    fn loss(&self, x: &Tensor) -> Result<Tensor> {
        let square = x.f_dot(&self.a.f_matmul(x)?)?.f_mul_scalar(0.5)?.f_sub(&self.b.f_dot(x)?)?;
        let fourth = x.f_pow_tensor_scalar(4)?.f_sum(Kind::Double)?;
        let loss = square.f_add(&fourth.f_mul_scalar(self.quartic)?)?;
        loss.f_backward()?;
        Ok(loss)
    }
}

fn store(device: Device) -> VarStore {
    let mut vs = VarStore::new(device);
    vs.set_kind(Kind::Double);
    vs
}

/// Minimizes the function of a case, and compares losses, points and counts of evaluations.
fn lbfgs(config: &Value, expect: &Value, device: Device) -> Result<Result<(), String>> {
    const TOLERANCE: f64 = 1e-9;
    let (problem, vs) = (Problem::of(config, device)?, store(device));
    let x = vs.root().add("x", problem.x0.copy(), true);
    let optimizer = Optimizer::lbfgs(&vs).build()?;
    let group = optimizer.group_at(0)?;
    for (name, value) in object(&config["defaults"])? {
        match name.as_str() {
            "line_search_fn" => group.set("strong_wolfe", f64::from(u8::from(!value.is_null())))?,
            name => group.set(name, float(value)?)?,
        }
    }
    let mut calls = 0;
    let mut result = Ok(());
    for (step, expected) in array(&expect["steps"])?.iter().enumerate() {
        let loss = optimizer.step_with(|| {
            calls += 1;
            optimizer.zero_grad()?;
            problem.loss(&x)
        })?;
        result = result
            .and(near(&format!("the loss of step {step}"), &loss, &expected["loss"], TOLERANCE)?)
            .and(near(&format!("x after step {step}"), &x, &expected["x"], TOLERANCE)?);
        let expected = &expected["closure_calls"];
        if count(expected)? != Some(calls) {
            let why = format!("{calls} evaluations after step {step} instead of {expected}");
            result = result.and(Err(why));
        }
    }
    Ok(result)
}

/// Sharpness-aware steps of any optimizer; the point is in two parameters.
fn sam(config: &Value, expect: &Value, device: Device) -> Result<Result<(), String>> {
    const TOLERANCE: f64 = 1e-12;
    let (problem, vs) = (Problem::of(config, device)?, store(device));
    let split = count(&config["problem"]["split"])?.context("a place to split")?;
    let split = i64::try_from(split)?;
    let size = problem.x0.size1()?;
    let part = |from, length| Ok::<_, anyhow::Error>(problem.x0.f_narrow(0, from, length)?.copy());
    let first = vs.root().add("first", part(0, split)?, true);
    let second = vs.root().add("second", part(split, size.saturating_sub(split))?, true);
    let optimizer = built(text(&config["base"])?, &vs)?;
    for (name, value) in object(&config["defaults"])? {
        set(&optimizer.group_at(0)?, name, value)?;
    }
    let sam = Sam::new(&optimizer).rho(float(&config["rho"])?)?;
    let sam = if config["adaptive"] == true { sam.adaptive() } else { sam };
    let mut result = Ok(());
    for (step, expected) in array(&expect["steps"])?.iter().enumerate() {
        let x = || Tensor::f_cat(&[&first, &second], 0);
        let loss = sam.step_with(|| {
            optimizer.zero_grad()?;
            problem.loss(&x()?)
        })?;
        result = result
            .and(near(&format!("the loss of step {step}"), &loss, &expected["loss"], TOLERANCE)?)
            .and(near(&format!("x after step {step}"), &x()?, &expected["x"], TOLERANCE)?);
    }
    Ok(result)
}

fn built(class: &str, vs: &VarStore) -> Result<Optimizer> {
    Ok(match class {
        "SGD" => Optimizer::sgd(vs).build(),
        "Adam" => Optimizer::adam(vs).build(),
        "AdamW" => Optimizer::adamw(vs).build(),
        "RMSprop" => Optimizer::rms_prop(vs).build(),
        "Adagrad" => Optimizer::adagrad(vs).build(),
        "NAdam" => Optimizer::nadam(vs).build(),
        "RAdam" => Optimizer::radam(vs).build(),
        "Adamax" => Optimizer::adamax(vs).build(),
        "Adadelta" => Optimizer::adadelta(vs).build(),
        "ASGD" => Optimizer::asgd(vs).build(),
        "Rprop" => Optimizer::rprop(vs).build(),
        "Lion" => Optimizer::lion(vs).build(),
        "Adafactor" => Optimizer::adafactor(vs).build(),
        "Muon" => Optimizer::muon(vs).build(),
        "SparseAdam" => Optimizer::sparse_adam(vs).build(),
        "AdamWScheduleFree" => Optimizer::adamw_schedule_free(vs).build(),
        "SGDScheduleFree" => Optimizer::sgd_schedule_free(vs).build(),
        "AdEMAMix" => Optimizer::ademamix(vs).build(),
        other => bail!("no optimizer {other}"),
    }?)
}

/// Sets an option under torch's name.
fn set(group: &Group, name: &str, value: &Value) -> Result<()> {
    let parts: &[&str] = match name {
        "betas" if value.as_array().is_some_and(|betas| betas.len() == 3) => {
            &["beta1", "beta2", "beta3"]
        }
        "betas" => &["beta1", "beta2"],
        "etas" => &["etaminus", "etaplus"],
        "step_sizes" => &["step_size_min", "step_size_max"],
        "eps" if value.is_array() => &["eps1", "eps2"],
        "adjust_lr_fn" => {
            let matches = value.as_str() == Some("match_rms_adamw");
            return Ok(group.set("match_rms_adamw", f64::from(u8::from(matches)))?);
        }
        name => {
            let number = value.as_bool().map(|on| f64::from(u8::from(on)));
            return Ok(group.set(name, number.map_or_else(|| float(value), Ok)?)?);
        }
    };
    let values = array(value)?;
    if values.len() != parts.len() {
        bail!("{} values", values.len());
    }
    for (part, value) in parts.iter().zip(values) {
        // torch's None for the precision of the parameter's type is 0 here.
        group.set(part, if value.is_null() { 0. } else { float(value)? })?;
    }
    Ok(())
}

/// Gives the parameter a gradient by a backward pass: dense, sparse, or none.
fn give(parameter: &Tensor, gradient: &Value) -> Result<()> {
    if gradient.is_null() {
        return Ok(());
    }
    let kind = parameter.kind();
    let given = if gradient.is_object() {
        let rows: Vec<i64> = serde_json::from_value(gradient["rows"].clone())?;
        let found = {
            let rows = Tensor::from_slice(&rows).f_to_device(parameter.device())?;
            Tensor::f_embedding(parameter, &rows, -1, false, true)?
        };
        let data = array(&gradient["data"])?.iter().map(floats).collect::<Result<Vec<_>>>()?;
        let data = Tensor::from_slice(&data.concat()).f_reshape(found.size())?;
        found.f_mul(&data.to_kind(kind).to_device(parameter.device()))?
    } else {
        let data = Tensor::from_slice(&floats(gradient)?).f_reshape(parameter.size())?;
        parameter.f_mul(&data.to_kind(kind).to_device(parameter.device()))?
    };
    Ok(given.f_sum(kind)?.f_backward()?)
}

/// Whether values agree, relative to the largest of the tensor.
fn near(what: &str, ours: &Tensor, expected: &Value, tolerance: f64) -> Result<Result<(), String>> {
    let ours = ours.detach().to_device(Device::Cpu).to_kind(Kind::Double).reshape([-1]);
    let ours = Vec::<f64>::try_from(ours)?;
    let expected = match expected {
        Value::Array(_) => floats(expected)?,
        number => vec![float(number)?],
    };
    if ours.len() != expected.len() {
        return Ok(Err(format!("{what}: {} values instead of {}", ours.len(), expected.len())));
    }
    let bound = tolerance * expected.iter().fold(0f64, |most, value| most.max(value.abs()));
    let differs = |(a, b): (&f64, &f64)| {
        a.to_bits() != b.to_bits() && ((a - b).abs() > bound || (a - b).is_nan())
    };
    Ok(match ours.iter().zip(&expected).position(differs) {
        Some(i) => Err(format!("{what}[{i}]: {:e} instead of {:e}", ours[i], expected[i])),
        None => Ok(()),
    })
}
