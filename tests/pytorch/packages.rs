//! Optimizers with a state of their own kind (LBFGS), or of Python's packages: their states go to Python and back.

use anyhow::Result;
use std::path::Path;
use tch::nn::{self, VarStore};
use tch::{Device, Kind, Tensor};
use tch_ignite::checkpoint::Stateful;
use tch_ignite::engine::{Engine, Until};
use tch_ignite::optim::{Group, GroupOptions, Optimizer};
use tch_ignite::pytorch::{self, Dict, LightningCheckpoint, TrainingFile, Value, Weights};

use super::{common::serial, python};

const NAMES: [(&str, &str); 4] = [
    ("LBFGS", "torch.optim"),
    ("SGDScheduleFree", "schedulefree"),
    ("AdamWScheduleFree", "schedulefree"),
    ("AdEMAMix", "ademamix"),
];

/// A network in float64, whose layers are made in another order than Python's.
fn made(name: &str) -> Result<(VarStore, Optimizer, nn::Sequential)> {
    let mut vs = VarStore::new(Device::Cpu);
    let fc = nn::linear(vs.root() / "fc", 5, 2, Default::default());
    let base = nn::linear(vs.root() / "base", 3, 5, Default::default());
    let net = nn::seq().add(base).add_fn(|x| x.tanh()).add(fc);
    vs.double();
    let optimizer = match name {
        "LBFGS" => {
            let builder = Optimizer::lbfgs(&vs).lr(0.3).max_iter(3).history_size(4);
            builder.strong_wolfe(true).build()?
        }
        "SGDScheduleFree" => Optimizer::sgd_schedule_free(&vs).warmup_steps(4).build()?,
        "AdamWScheduleFree" => {
            let builder = Optimizer::adamw_schedule_free(&vs).lr(0.02).betas(0.8, 0.99);
            builder.warmup_steps(4).weight_decay(0.1).build()?
        }
        _ => Optimizer::ademamix(&vs).alpha_warmup(6).build()?,
    };
    Ok((vs, optimizer, net))
}

/// Python's order of the parameters.
const ORDER: [&str; 4] = ["base.weight", "base.bias", "fc.weight", "fc.bias"];

fn step(optimizer: &Optimizer, net: &nn::Sequential, iteration: i64) -> Result<f64> {
    let x = Tensor::arange(12, (Kind::Double, Device::Cpu)).view([4, 3]) * 0.1
        + iteration as f64 * 0.01;
    let loss = optimizer.step_with(|| {
        optimizer.zero_grad()?;
        let loss = x.apply(net).square().mean(Kind::Double);
        loss.backward();
        Ok(loss)
    })?;
    Ok(f64::try_from(loss.detach())?)
}

fn save(vs: &VarStore, optimizer: &Optimizer, path: &Path) -> Result<()> {
    let mut checkpoint = Dict::new();
    checkpoint.insert("model", Weights::of_store(vs)?.to_value());
    checkpoint.insert("optimizer", pytorch::optimizer_value(optimizer, &ORDER)?);
    Ok(pytorch::write(path, &checkpoint.into())?)
}

fn load(vs: &VarStore, optimizer: &mut Optimizer, path: &Path) -> Result<()> {
    let saved = pytorch::read(path)?;
    Weights::of(saved.require("model")?)?.load(vs)?;
    let loaded = pytorch::load_optimizer(optimizer, saved.require("optimizer")?, &ORDER)?;
    assert_eq!(loaded.loaded.len(), 4);
    Ok(())
}

const SCRIPT: &str = r#"
import importlib
try:
    made = getattr(importlib.import_module(sys.argv[4]), sys.argv[3])
except ModuleNotFoundError:
    print("null")
    sys.exit()
saved = torch.load(sys.argv[1], weights_only=True)
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.base, self.fc = torch.nn.Linear(3, 5, dtype=torch.float64), torch.nn.Linear(5, 2, dtype=torch.float64)
    def forward(self, x):
        return self.fc(self.base(x).tanh())
net = Net()
net.load_state_dict(saved["model"])
optimizer = made(net.parameters(), lr=7.0)
optimizer.load_state_dict(saved["optimizer"])
if hasattr(optimizer, "train"):
    optimizer.train()
losses = []
for iteration in range(3, 6):
    x = torch.arange(12, dtype=torch.float64).view(4, 3) * 0.1 + iteration * 0.01
    def closure():
        optimizer.zero_grad()
        loss = net(x).square().mean()
        loss.backward()
        return loss
    losses.append(optimizer.step(closure).item())
if sys.argv[5] == "eval":
    optimizer.eval()
torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, sys.argv[2])
print(json.dumps(losses))
"#;

#[test]
fn states_go_to_files_and_to_python_and_back() -> Result<()> {
    let _guard = serial();
    let folder = tempfile::tempdir()?;
    let (path, back) = (folder.path().join("run.pt"), folder.path().join("back.pt"));
    let averaging = |name: &str| name.ends_with("ScheduleFree");
    for (name, module) in NAMES {
        for evaluates in if averaging(name) { vec![false, true] } else { vec![false] } {
            let (vs, optimizer, net) = made(name)?;
            for iteration in 0..3 {
                step(&optimizer, &net, iteration)?;
            }
            if evaluates {
                optimizer.eval()?;
            }
            save(&vs, &optimizer, &path)?;
            optimizer.train()?;
            let uninterrupted = (3..9)
                .map(|iteration| step(&optimizer, &net, iteration))
                .collect::<Result<Vec<_>>>()?;

            let (vs, mut optimizer, net) = made(name)?;
            load(&vs, &mut optimizer, &path)?;
            assert_eq!(optimizer.is_training()?, !evaluates);
            optimizer.train()?;
            for (index, expected) in uninterrupted.iter().enumerate() {
                let loss = step(&optimizer, &net, index as i64 + 3)?;
                let differs = (loss - expected).abs();
                // The way back from an evaluation rounds, because files for Python have no copy.
                let bound = if evaluates { 1e-13 } else { 0. };
                assert!(differs <= bound, "{name} {evaluates}: {loss} instead of {expected}");
            }

            let mode = if evaluates { "eval" } else { "train" };
            let arguments = [&path, &back, Path::new(name), Path::new(module), Path::new(mode)];
            let Some(output) = python(SCRIPT, &arguments)? else { return Ok(()) };
            let Some(mut losses) = serde_json::from_str::<Option<Vec<f64>>>(&output)? else {
                println!("SKIPPED {name}: Python has no {module}");
                continue;
            };
            let (vs, mut optimizer, net) = made(name)?;
            load(&vs, &mut optimizer, &back)?;
            optimizer.train()?;
            for iteration in 6..9 {
                losses.push(step(&optimizer, &net, iteration)?);
            }
            for (ours, expected) in losses.iter().zip(&uninterrupted) {
                let differs = (ours - expected).abs();
                assert!(differs <= 1e-10, "{name}: {losses:?} instead of {uninterrupted:?}");
            }
        }
    }
    Ok(())
}

/// Two biases, then a hidden matrix of another algorithm, then the head: Python has two optimizers, of two groups and of one.
fn of_two_algorithms(hidden: &str) -> Result<(VarStore, Optimizer, nn::Sequential)> {
    let (vs, _, net) = made("AdEMAMix")?;
    tch::manual_seed(5);
    for (_, mut own) in vs.variables() {
        let _ = tch::no_grad(|| own.uniform_(-0.5, 0.5));
    }
    let optimizer = Optimizer::named(hidden, &vs)?
        .lr(0.02)
        .group("biases", |name| name.ends_with("bias"), GroupOptions::adamw().lr(0.01))
        .group("hidden", |name| name == "base.weight", GroupOptions::new())
        .group("head", |name| name == "fc.weight", GroupOptions::adamw().weight_decay(0.1))
        .build()?;
    Ok((vs, optimizer, net))
}

const SCRIPT_OF_TWO: &str = r#"
saved = torch.load(sys.argv[1], weights_only=True)
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.base, self.fc = torch.nn.Linear(3, 5, dtype=torch.float64), torch.nn.Linear(5, 2, dtype=torch.float64)
    def forward(self, x):
        return self.fc(self.base(x).tanh())
net = Net()
net.load_state_dict(saved["model"])
optimizers = [
    torch.optim.AdamW([{"params": [net.base.bias, net.fc.bias]}, {"params": [net.fc.weight]}], lr=7.0),
    getattr(torch.optim, sys.argv[3])([net.base.weight], lr=7.0),
]
for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
    optimizer.load_state_dict(state)
losses = []
for iteration in range(3, 6):
    x = torch.arange(12, dtype=torch.float64).view(4, 3) * 0.1 + iteration * 0.01
    loss = net(x).square().mean()
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
    losses.append(loss.item())
torch.save({"model": net.state_dict(), "optimizers": [optimizer.state_dict() for optimizer in optimizers]}, sys.argv[2])
print(json.dumps(losses))
"#;

#[test]
fn groups_of_two_algorithms_are_two_optimizers_of_python() -> Result<()> {
    let _guard = serial();
    let folder = tempfile::tempdir()?;
    let (path, back) = (folder.path().join("run.pt"), folder.path().join("back.pt"));
    let load = |path: &Path, vs: &VarStore, optimizer: &mut Optimizer| -> Result<Vec<String>> {
        let saved = pytorch::read(path)?;
        Weights::of(saved.require("model")?)?.load(vs)?;
        Ok(pytorch::load_optimizer(optimizer, saved.require("optimizers")?, &ORDER)?.loaded)
    };
    for hidden in ["Muon", "Adafactor"] {
        let (vs, optimizer, net) = of_two_algorithms(hidden)?;
        for iteration in 0..3 {
            step(&optimizer, &net, iteration)?;
        }
        let mut checkpoint = Dict::new();
        checkpoint.insert("model", Weights::of_store(&vs)?.to_value());
        checkpoint.insert("optimizers", pytorch::optimizer_value(&optimizer, &ORDER)?);
        pytorch::write(&path, &checkpoint.into())?;
        let (resumed, mut again, same_net) = of_two_algorithms(hidden)?;
        again.group("head")?.set_lr(0.5)?;
        assert_eq!(load(&path, &resumed, &mut again)?.len(), 4);
        let rates = again.groups()?.iter().map(Group::lr).collect::<Result<Vec<_>, _>>()?;
        assert_eq!(rates, [0.01, 0.02, 1e-3]);
        let uninterrupted: Vec<f64> =
            (3..9).map(|iteration| step(&optimizer, &net, iteration)).collect::<Result<_>>()?;
        for (iteration, expected) in (3..9).zip(&uninterrupted) {
            assert_eq!(step(&again, &same_net, iteration)?, *expected, "{hidden}: {iteration}");
        }

        // States that do not fit change nothing: one of two, or both in the other order.
        let saved = pytorch::read(&path)?;
        let states = saved.require("optimizers")?.as_slice().unwrap_or_default().to_vec();

        let all = |optimizer: &Optimizer| -> Result<Vec<Tensor>> {
            Ok(optimizer.state_dict()?.tensors().map(|(_, tensor)| tensor.copy()).collect())
        };
        let before = all(&again)?;
        let error =
            pytorch::load_optimizer(&mut again, &states[0], &ORDER).unwrap_err().to_string();
        let wanted =
            format!("one state, and wanted is a list with the states of AdamW and {hidden}");
        assert!(error.contains(&wanted), "{error}");
        let swapped = Value::list(states.into_iter().rev());
        let error = pytorch::load_optimizer(&mut again, &swapped, &ORDER).unwrap_err().to_string();
        assert!(error.contains("is stepped by") && error.contains("in this order"), "{error}");
        let three = Value::list([(); 3].map(|()| saved.clone()));
        let error = pytorch::load_optimizer(&mut again, &three, &ORDER).unwrap_err().to_string();
        assert!(error.contains("a list of 3 states"), "{error}");
        assert_eq!(all(&again)?, before);

        // Lightning has a list of optimizers, too.
        let mut trainer = Engine::new(|_: &mut (), _engine, _batch: i32| Ok(()));
        trainer.run(&mut (), vec![0; 3], Until::epochs(1))?;
        let of_lightning = LightningCheckpoint::new(&Weights::of_store(&vs)?)
            .optimizers([saved.require("optimizers")?.clone()])
            .value(&trainer)?;
        let of_lightning = TrainingFile::of(&of_lightning)?;
        assert_eq!(of_lightning.optimizers().len(), 2);
        let listed = of_lightning.optimizers().iter().map(|(_, state)| state.clone());
        pytorch::load_optimizer(&mut again, &Value::list(listed), &ORDER)?;

        let arguments = [&*path, &*back, Path::new(hidden)];
        let Some(output) = python(SCRIPT_OF_TWO, &arguments)? else { return Ok(()) };
        let mut losses: Vec<f64> = serde_json::from_str(&output)?;
        let (vs, mut optimizer, net) = of_two_algorithms(hidden)?;
        load(&back, &vs, &mut optimizer)?;
        for iteration in 6..9 {
            losses.push(step(&optimizer, &net, iteration)?);
        }
        for (ours, expected) in losses.iter().zip(&uninterrupted) {
            let all = format!("{hidden}: {losses:?} instead of {uninterrupted:?}");
            assert!((ours - expected).abs() <= 1e-12, "{all}");
        }
    }
    Ok(())
}
