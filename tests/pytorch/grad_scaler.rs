//! The scale of losses goes on here as torch's `GradScaler` would, and back.

use anyhow::Result;
use tch::{Device, nn::VarStore};
use tch_ignite::amp::GradScaler;
use tch_ignite::optim::Optimizer;
use tch_ignite::pytorch::{self, Dict, TrainingFile, Value, Weights};

use super::{python, serial};

/// Steps with a scaler, some of which overflow, and the scale after each.
fn run(scaler: &GradScaler, iterations: std::ops::Range<i64>) -> Result<Vec<f64>> {
    let vs = VarStore::new(Device::Cpu);
    let w = vs.root().ones("w", &[1]);
    let optimizer = Optimizer::sgd(&vs).build()?;
    let mut scales = vec![];
    for iteration in iterations {
        let loss = (&w * if iteration % 7 == 5 { f64::INFINITY } else { 1. }).sum(tch::Kind::Float);
        optimizer.zero_grad()?;
        scaler.scale(&loss)?.backward();
        scaler.step(&optimizer)?;
        scaler.update()?;
        scales.push(scaler.get_scale()?);
    }
    Ok(scales)
}

const RUN: &str = r#"
def run(scaler, begin, end):
    w = torch.nn.Parameter(torch.ones(1))
    optimizer, scales = torch.optim.SGD([w], 0.001), []
    for iteration in range(begin, end):
        loss = (w * (float("inf") if iteration % 7 == 5 else 1.0)).sum()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return scales
"#;

#[test]
fn a_scale_goes_on_here_and_back_in_python() -> Result<()> {
    let _guard = serial();
    let folder = tempfile::tempdir()?;
    let (path, back) = (folder.path().join("there.pt"), folder.path().join("here.pt"));
    let script = format!(
        "{RUN}{}",
        r#"
scaler = torch.amp.GradScaler("cpu", init_scale=1000.0, growth_factor=1.7, backoff_factor=0.3, growth_interval=4)
run(scaler, 0, 9)
torch.save({"model": {"w": torch.ones(1)}, "amp": scaler.state_dict()}, sys.argv[1])
print(json.dumps(run(scaler, 9, 40)))
"#
    );
    let Some(output) = python(&script, &[&path])? else { return Ok(()) };
    let expected: Vec<f64> = serde_json::from_str(&output)?;
    let saved = TrainingFile::read(&path)?;
    assert!(saved.to_string().contains("GradScaler amp"), "{saved}");
    assert!(saved.others().is_empty());
    let scaler = GradScaler::new();
    pytorch::load_grad_scaler(&scaler, saved.grad_scaler()?)?;
    assert_eq!(run(&scaler, 9..24)?, expected[..15]);
    assert_eq!(scaler.skipped()?, 2);

    let mut checkpoint = Dict::new();
    let vs = VarStore::new(Device::Cpu);
    let _ = vs.root().ones("w", &[1]);
    checkpoint.insert("model", Weights::of_store(&vs)?.to_value());
    checkpoint.insert("amp", pytorch::grad_scaler_value(&scaler)?);
    pytorch::write(&back, &checkpoint.into())?;
    let script = format!(
        "{RUN}{}",
        r#"
scaler = torch.amp.GradScaler("cpu")
saved = torch.load(sys.argv[1], weights_only=True)["amp"]
assert set(saved) == set(scaler.state_dict())
scaler.load_state_dict(saved)
print(json.dumps(run(scaler, 24, 40)))
"#
    );
    let Some(output) = python(&script, &[&back])? else { return Ok(()) };
    assert_eq!(serde_json::from_str::<Vec<f64>>(&output)?, expected[15..]);
    Ok(())
}

#[test]
fn states_of_other_things_are_refused_and_change_nothing() -> Result<()> {
    let scaler = GradScaler::new().init_scale(8.)?;
    let saved = pytorch::grad_scaler_value(&scaler)?;
    let with = |key: &str, value: Value| -> Value {
        let mut dict = saved.as_dict().cloned().unwrap_or_default();
        dict.insert(key, value);
        dict.into()
    };
    for (saved, reason) in [
        (Dict::new().into(), "enabled=False"),
        (3.into(), "it is a int"),
        (with("scale", f64::INFINITY.into()), "'scale' cannot be"),
        (with("growth_interval", 0.5.into()), "'growth_interval' cannot be 0.5"),
        (with("_growth_tracker", Value::None), "'_growth_tracker' cannot be null"),
        (with("backoff_factor", 2.0.into()), "backoff"),
    ] {
        let error = pytorch::load_grad_scaler(&scaler, &saved).unwrap_err().to_string();
        assert!(error.contains(reason), "{error}");
        assert_eq!(scaler.get_scale()?, 8.);
    }
    // A file may have nothing else.
    let mut file = Dict::new();
    file.insert("amp", saved.clone());
    let again = GradScaler::new();
    pytorch::load_grad_scaler(&again, TrainingFile::of(&file.into())?.grad_scaler()?)?;
    assert_eq!(again.get_scale()?, 8.);
    Ok(())
}
