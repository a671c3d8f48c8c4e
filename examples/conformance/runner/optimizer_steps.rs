//! Optimizers alone: gradients are given, and parameters and state are compared.

use anyhow::{Context, Result, bail};
use serde_json::Value;
use tch::nn::VarStore;
use tch::{Device, Kind, Tensor};
use tch_ignite::optim::{Group, Optimizer};

use super::Outcome;
use super::json::{array, count, float, floats, object, text};

/// Classes of the cases that are not here yet.
const NOT_HERE: [&str; 3] = ["LBFGS", "AdamWScheduleFree", "SGDScheduleFree"];

/// torch's defect in cases whose groups have a value of their own for this option.
const INITIAL_VALUE: &str = "torch's Adagrad ignores the initial_accumulator_value of a group";

/// Whether a step is fused.
type Fused = fn(usize) -> bool;

/// With fused steps, with the loop, and with a switch at every other step.
pub fn run(config: &Value, expect: &Value, defect: &mut Option<&'static str>) -> Result<Outcome> {
    let class = text(&config["type"])?;
    if NOT_HERE.contains(&class) {
        return Outcome::skipped(format!("{class} does not exist yet"));
    }
    let ways: [(&str, Fused); 3] =
        [("fused", |_| true), ("the loop", |_| false), ("both in turn", |step| step % 2 == 0)];
    for (name, fused) in ways {
        if let Err(why) = steps(class, config, expect, fused, defect)? {
            return Ok(Outcome::Failed(format!("{name}: {why}")));
        }
    }
    Ok(Outcome::Passed)
}

fn steps(
    class: &str,
    config: &Value,
    expect: &Value,
    fused: Fused,
    defect: &mut Option<&'static str>,
) -> Result<Result<(), String>> {
    let (kind, tolerance) = match text(&config["dtype"])? {
        "float64" => (Kind::Double, 1e-12),
        "float32" => (Kind::Float, 1e-6),
        other => bail!("no type {other}"),
    };
    let mut vs = VarStore::new(Device::Cpu);
    vs.set_kind(kind);
    let mut parameters = vec![];
    for spec in array(&config["params"])? {
        let (name, group) = (text(&spec["name"])?, count(&spec["group"])?.context("a group")?);
        let shape: Vec<i64> = serde_json::from_value(spec["shape"].clone())?;
        let value = Tensor::from_slice(&floats(&spec["data"])?).f_reshape(&shape[..])?;
        let value = value.to_kind(kind).set_requires_grad(true);
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
        other => bail!("no optimizer {other}"),
    }?)
}

/// Sets an option under torch's name.
fn set(group: &Group, name: &str, value: &Value) -> Result<()> {
    let parts: &[&str] = match name {
        "betas" => &["beta1", "beta2"],
        "etas" => &["etaminus", "etaplus"],
        "step_sizes" => &["step_size_min", "step_size_max"],
        "eps" if value.is_array() => &["eps1", "eps2"],
        "adjust_lr_fn" => {
            let matches = value.as_str() == Some("match_rms_adamw");
            return Ok(group.set("match_rms_adamw", f64::from(u8::from(matches)))?);
        }
        name => return Ok(group.set(name, float(value)?)?),
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
        let found = Tensor::f_embedding(parameter, &Tensor::from_slice(&rows), -1, false, true)?;
        let data = array(&gradient["data"])?.iter().map(floats).collect::<Result<Vec<_>>>()?;
        let data = Tensor::from_slice(&data.concat()).f_reshape(found.size())?;
        found.f_mul(&data.to_kind(kind))?
    } else {
        let data = Tensor::from_slice(&floats(gradient)?).f_reshape(parameter.size())?;
        parameter.f_mul(&data.to_kind(kind))?
    };
    Ok(given.f_sum(kind)?.f_backward()?)
}

/// Whether values agree, relative to the largest of the tensor.
fn near(what: &str, ours: &Tensor, expected: &Value, tolerance: f64) -> Result<Result<(), String>> {
    let ours: Vec<f64> = ours.detach().to_kind(Kind::Double).reshape([-1]).try_into()?;
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
