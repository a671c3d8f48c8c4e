//! Training checkpoints of any layout: what is a model, an optimizer or a position is found, and written back.

use std::cell::RefCell;
use std::rc::Rc;

use anyhow::Result;
use tch::nn::{self, VarStore};
use tch::{Device, Kind, Tensor};
use tch_ignite::engine::{Engine, Event, Trainer, Until};
use tch_ignite::optim::Optimizer;
use tch_ignite::pytorch::{
    self, Dict, Layout, LightningCheckpoint, Names, TrainingFile, Value, Weights,
};
use tch_ignite::schedule::{CosineAnnealing, ParamScheduler, StepLR};

use super::{golden, python, serial};

#[test]
fn the_layout_of_each_fixture_is_found() -> Result<()> {
    for (name, layout, shown) in [
        (
            "handover-ignite",
            Layout::Ignite,
            "checkpoint of ignite after 12 iterations\n  model model: 2 tensors\n  optimizer optimizer\n  scheduler lr_scheduler",
        ),
        (
            "handover-lightning",
            Layout::Lightning,
            "checkpoint of Lightning after 12 iterations\n  model state_dict: 2 tensors\n  optimizer optimizer_states/0\n  scheduler lr_schedulers/0",
        ),
        (
            "handover-adam",
            Layout::Dict,
            "dict after 20 iterations\n  model model: 4 tensors\n  optimizer optimizer\n  scheduler scheduler\n  state of the random numbers",
        ),
        (
            "tensors-module-prefix",
            Layout::Dict,
            "dict after 3 epochs\n  model state_dict: 9 tensors, without _orig_mod., module.\n  without a place: best_acc1, arch",
        ),
        ("tensors-state-dict", Layout::StateDict, "state_dict\n  model : "),
    ] {
        let path = golden().join(format!("{name}.pt"));
        let saved = TrainingFile::read(&path)?;
        assert_eq!(saved.layout(), layout, "{name}");
        println!("{saved}");
        assert!(saved.to_string().starts_with(shown), "{saved}");
    }
    Ok(())
}

#[test]
fn what_is_missing_or_has_no_place_is_told_by_name() -> Result<()> {
    let tensor = || Value::tensor(&Tensor::from_slice(&[1f32, 2.]));
    let mut net = Dict::ordered();
    net.insert("w", tensor()?);
    let mut optimizer = Dict::new();
    optimizer.insert("state", Dict::new());
    optimizer.insert("param_groups", Value::list([0i64; 0]));
    let mut gan = Dict::new();
    gan.insert("generator", net.clone());
    gan.insert("discriminator", net.clone());
    gan.insert("optimizers", Value::list([optimizer.clone(), optimizer]));
    gan.insert("step", 7);
    gan.insert("epoch", 2);
    gan.insert("args", "--lr 3");
    gan.insert("scaler", Value::list([1.5]));
    gan.insert("nothing", Dict::new());
    let saved = TrainingFile::of(&gan.into())?;
    let names = |parts: &[(String, Value)]| -> Vec<String> {
        parts.iter().map(|(name, _)| name.clone()).collect()
    };
    assert_eq!(names(saved.models()), ["generator", "discriminator"]);
    assert_eq!(names(saved.optimizers()), ["optimizers/0", "optimizers/1"]);
    assert_eq!(saved.others(), ["args", "scaler", "epoch = 2"]);
    assert_eq!((saved.iteration(), saved.weights_of("generator")?.names()), (Some(7), vec!["w"]));
    for (error, reason) in [
        (saved.weights().map(drop), "there are several models: generator, discriminator"),
        (
            saved.weights_of("net").map(drop),
            "no model 'net': it has generator, discriminator, args",
        ),
        (saved.optimizer().map(drop), "several optimizers: optimizers/0, optimizers/1"),
        (saved.scheduler().map(drop), "the dict has no scheduler: it has args, scaler"),
        (TrainingFile::of(&3.into()).map(drop), "a int is no checkpoint"),
        (
            TrainingFile::of(&Dict::new().into()).map(drop),
            "no model, optimizer, scheduler, GradScaler, position or state of random numbers in it; it has nothing",
        ),
    ] {
        let error = error.unwrap_err().to_string();
        assert!(error.contains(reason), "{error}");
    }
    let mut engine = Engine::new(|_: &mut (), _, _: i32| Ok(()));
    let error = saved.load_position(&mut engine).unwrap_err().to_string();
    assert!(error.contains("how many batches an epoch has"), "{error}");
    engine.state.epoch_length = Some(3);
    saved.load_position(&mut engine)?;
    engine.run(&mut (), vec![0; 3], Until::epochs(3))?;
    assert_eq!((engine.state.epoch, engine.state.iteration), (3, 9));
    Ok(())
}

#[test]
fn names_of_wrapped_models_are_those_of_the_model() -> Result<()> {
    let _guard = serial();
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("wrapped.pt");
    let script = r#"
from torch.optim.swa_utils import AveragedModel
def net():
    return torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
model = net()
part = net()
part[0] = torch.compile(part[0])
class Named(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.module, self.other = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)
torch.save({
    "plain": model.state_dict(), "parallel": torch.nn.DataParallel(model).state_dict(),
    "compiled": torch.compile(model).state_dict(), "part": part.state_dict(),
    "both": torch.compile(torch.nn.DataParallel(model)).state_dict(),
    "averaged": AveragedModel(torch.nn.DataParallel(model)).state_dict(),
    "named": Named().state_dict(),
}, sys.argv[1])
print()
"#;
    if python(script, &[&path])?.is_none() {
        return Ok(());
    }
    let saved = TrainingFile::read(&path)?;
    let plain = saved.weights_of("plain")?;
    assert_eq!(plain.names().len(), 7);
    for name in ["parallel", "compiled", "part", "both", "averaged"] {
        assert_eq!(saved.weights_of(name)?.names(), plain.names(), "{name}");
    }
    // A module of the model's own that is called so keeps its name.
    let names = ["module.weight", "module.bias", "other.weight", "other.bias"];
    assert_eq!(saved.weights_of("named")?.names(), names);
    let shown = saved.to_string();
    assert!(shown.contains("model both: 7 tensors, without _orig_mod., module."), "{shown}");
    assert!(shown.contains("averaged: 8 tensors, without n_averaged, module., module."), "{shown}");
    Ok(())
}

/// The run of the fixtures: Linear 2-1 in float64.
fn linear() -> (VarStore, nn::Linear) {
    let mut vs = VarStore::new(Device::Cpu);
    let net = nn::linear(vs.root(), 2, 1, Default::default());
    vs.double();
    (vs, net)
}

type Losses = Vec<(f64, f64)>;

fn trainer<'a>(
    optimizer: &'a Optimizer,
    net: &'a nn::Linear,
) -> Result<Trainer<'a, Losses, i64, ()>> {
    let lr = optimizer.knob("lr")?;
    Ok(Engine::new(move |losses: &mut Losses, _engine, index: i64| {
        let x =
            Tensor::arange(8, (Kind::Double, Device::Cpu)).view([4, 2]) * 0.1 - index as f64 * 0.15;
        let loss = x.apply(net).square().mean(Kind::Double);
        optimizer.backward_step(&loss)?;
        losses.push((f64::try_from(loss)?, lr.get()?));
        Ok(())
    }))
}

fn data() -> Vec<i64> {
    (0..5).collect()
}

fn assert_same(ours: &[(f64, f64)], expected: &[(f64, f64)]) {
    assert_eq!(ours.len(), expected.len());
    let differ = |((a, b), (c, d)): (&(f64, f64), &(f64, f64))| {
        (a - c).abs() > 1e-12 || (b - d).abs() > 1e-12
    };
    assert!(!ours.iter().zip(expected).any(differ), "{ours:?} instead of {expected:?}");
}

#[test]
fn ignite_goes_on_with_a_run_that_began_here_and_back() -> Result<()> {
    let _guard = serial();
    let folder = tempfile::tempdir()?;
    let (path, back) = (folder.path().join("here.pt"), folder.path().join("there.pt"));
    let schedule = || CosineAnnealing::new(0.1, 0.001, 8);
    let (vs, net) = linear();
    let optimizer = Optimizer::builder(nn::sgd(0.5, 0., 0., false), &vs).build()?;
    // The scheduler is shared with the engine.
    let scheduler = ParamScheduler::new("lr", optimizer.knob("lr")?, schedule());
    let scheduler = Rc::new(RefCell::new(scheduler));
    let mut engine = trainer(&optimizer, &net)?;
    engine.attach(scheduler.clone());
    engine.on(Event::IterationCompleted.once(7), |_, engine| {
        engine.interrupt();
        Ok(())
    });
    let mut expected = vec![];
    engine.run(&mut expected, data(), Until::epochs(4))?;
    let mut checkpoint = Dict::new();
    checkpoint.insert("model", Weights::of_store(&vs)?.to_value());
    checkpoint.insert("optimizer", pytorch::optimizer_value(&optimizer, &[])?);
    checkpoint.insert("lr_scheduler", pytorch::ignite_scheduler_value(&scheduler.borrow()));
    checkpoint.insert("trainer", pytorch::position_value(&engine));
    pytorch::write(&path, &checkpoint.into())?;
    engine.run(&mut expected, data(), Until::epochs(4))?;
    assert_eq!(expected.len(), 20);

    let script = r#"
from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint, CosineAnnealingScheduler
net = torch.nn.Linear(2, 1, dtype=torch.float64)
optimizer = torch.optim.SGD(net.parameters(), 7.0, 0.5)
scheduler = CosineAnnealingScheduler(optimizer, "lr", 0.1, 0.001, 8)
losses = []
def step(engine, index):
    # ignite begins its data anew where it goes on in mid epoch.
    index = (engine.state.iteration - 1) % 5
    x = torch.arange(8, dtype=torch.float64).view(4, 2) * 0.1 - index * 0.15
    loss = net(x).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append([loss.item(), optimizer.param_groups[0]["lr"]])
trainer = Engine(step)
trainer.add_event_handler(Events.ITERATION_STARTED, scheduler)
objects = {"model": net, "optimizer": optimizer, "lr_scheduler": scheduler, "trainer": trainer}
Checkpoint.load_objects(objects, torch.load(sys.argv[1], weights_only=True))
@trainer.on(Events.ITERATION_COMPLETED(once=13))
def stop(engine):
    torch.save({name: part.state_dict() for name, part in objects.items()}, sys.argv[2])
    engine.terminate()
trainer.run(list(range(5)), max_epochs=4)
print(json.dumps(losses))
"#;
    let Some(output) = python(script, &[&path, &back])? else { return Ok(()) };
    let mut losses: Losses = serde_json::from_str(&output)?;
    assert_same(&losses, &expected[7..13]);

    let saved = TrainingFile::read(&back)?;
    assert_eq!((saved.layout(), saved.iteration()), (Layout::Ignite, Some(13)));
    let (vs, net) = linear();
    let mut optimizer = Optimizer::builder(nn::sgd(0.5, 0., 0., false), &vs).build()?;
    let weights = saved.weights()?;
    weights.load(&vs)?;
    pytorch::load_optimizer(&mut optimizer, saved.optimizer()?, &weights.names())?;
    let mut scheduler = ParamScheduler::new("lr", optimizer.knob("lr")?, schedule());
    pytorch::load_scheduler(&mut scheduler, saved.scheduler()?, saved.optimizer()?)?;
    let mut engine = trainer(&optimizer, &net)?;
    saved.load_position(&mut engine)?;
    engine.attach(scheduler);
    engine.run(&mut losses, data(), Until::epochs(4))?;
    assert_same(&losses, &expected[7..]);
    Ok(())
}

/// The layout of Lightning's own files is that of its fixture; how torch reads it is looked at here, and how Lightning
/// does in `lightning.rs`.
#[test]
fn python_reads_what_is_written_for_lightning() -> Result<()> {
    let _guard = serial();
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("last.ckpt");
    let (vs, net) = linear();
    let optimizer = Optimizer::adam(&vs).build()?;
    let scheduler = ParamScheduler::new("lr", optimizer.knob("lr")?, StepLR::new(0.1, 3));
    let scheduler = Rc::new(RefCell::new(scheduler));
    let mut engine = trainer(&optimizer, &net)?;
    engine.attach(scheduler.clone());
    let mut losses = vec![];
    let names = Names::new().add_prefix("net.");
    // In mid epoch, and at its end.
    for (iterations, within, is_last) in [(12, 2, false), (15, 5, true)] {
        engine.run(&mut losses, data(), Until::iterations(iterations))?;
        let weights = Weights::of_store(&vs)?.rename(&names)?;
        let mut of_optimizer = pytorch::optimizer_value(&optimizer, &[])?;
        let of_scheduler = pytorch::scheduler_value(&[&*scheduler.borrow()], &mut of_optimizer)?;
        let checkpoint = LightningCheckpoint::new(&weights)
            .optimizers([of_optimizer])
            .schedulers([of_scheduler]);
        let value = checkpoint.value(&engine)?;
        pytorch::write(&path, &value)?;
        // It has the paths of a file of Lightning's own, but for those of other schedulers and the run's names.
        let paths = |value: &Value| -> Vec<String> {
            let mut paths = vec![];
            value.walk(&mut |path, _| paths.push(path.to_owned()));
            paths.retain(|path| {
                !path.contains("/lr_schedulers/0/") && !path.contains("param_groups")
            });
            paths.sort();
            paths
        };
        let theirs = pytorch::read(golden().join("handover-lightning.pt"))?;
        assert_eq!(paths(&value), paths(&theirs));

        let saved = TrainingFile::read(&path)?;
        assert_eq!((saved.layout(), saved.iteration()), (Layout::Lightning, Some(iterations)));
        let mut other = Engine::new(|_: &mut (), _, _: i32| Ok(()));
        saved.load_position(&mut other)?;
        let state = (other.state.iteration, other.state.epoch_length);
        assert_eq!(state, (iterations, Some(5)), "{saved}");

        let script = r#"
saved = torch.load(sys.argv[1], weights_only=True, mmap=True)
net = torch.nn.ModuleDict({"net": torch.nn.Linear(2, 1, dtype=torch.float64)})
optimizer = torch.optim.Adam(net.parameters(), 7.0)
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 9)
net.load_state_dict(saved["state_dict"])
optimizer.load_state_dict(saved["optimizer_states"][0])
scheduler.load_state_dict(saved["lr_schedulers"][0])
fit = saved["loops"]["fit_loop"]
assert optimizer.state[net["net"].bias]["step"] == saved["global_step"] == scheduler.last_epoch
print(json.dumps([saved["global_step"], fit["epoch_loop.batch_progress"]["current"]["processed"], fit["epoch_loop.batch_progress"]["is_last_batch"]]))
"#;
        let Some(output) = python(script, &[&path])? else { return Ok(()) };
        let found: (u64, u64, bool) = serde_json::from_str(&output)?;
        assert_eq!(found, (iterations, within, is_last));
    }
    Ok(())
}
