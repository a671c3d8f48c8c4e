//! Lightning itself goes on with runs that began here, and back, also where several batches share a step.

use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use anyhow::{Context, Result};
use tch::nn::{self, VarStore};
use tch::{Device, Kind, Tensor};
use tch_ignite::GradientAccumulator;
use tch_ignite::amp::GradScaler;
use tch_ignite::engine::{Engine, Event, Trainer, Until};
use tch_ignite::optim::Optimizer;
use tch_ignite::pytorch::{
    self, Dict, Layout, LightningCheckpoint, Names, TrainingFile, Value, Weights,
};
use tch_ignite::schedule::{ExponentialLR, ParamScheduler};

use super::{python_of_libraries, serial};

/// Batches of an epoch.
const BATCHES: i64 = 6;

type Losses = Vec<(f64, f64)>;
type Scheduler = Rc<RefCell<ParamScheduler<ExponentialLR>>>;

struct Run {
    vs: VarStore,
    net: nn::Linear,
    optimizer: Optimizer,
    scheduler: Scheduler,
}

fn made() -> Result<Run> {
    let mut vs = VarStore::new(Device::Cpu);
    let net = nn::linear(vs.root(), 2, 1, Default::default());
    vs.double();
    let optimizer = Optimizer::adam(&vs).lr(0.1).build()?;
    let scheduler = ParamScheduler::new("lr", optimizer.knob("lr")?, ExponentialLR::new(0.1, 0.8));
    Ok(Run { vs, net, optimizer, scheduler: Rc::new(RefCell::new(scheduler)) })
}

/// Losses, and the rates after each batch. The scheduler is stepped as often as the optimizer.
fn trainer(run: &Run, steps: u64) -> Result<Trainer<'_, Losses, i64, ()>> {
    let mut accumulator = GradientAccumulator::new(steps)?;
    Ok(Engine::new(move |losses: &mut Losses, engine, index: i64| {
        let window = accumulator.window_of(engine);
        accumulator.begin(&run.optimizer, window)?;
        if window.first {
            run.scheduler.borrow_mut().advance()?;
        }
        let x =
            Tensor::arange(8, (Kind::Double, Device::Cpu)).view([4, 2]) * 0.1 - index as f64 * 0.15;
        let loss = x.apply(&run.net).square().mean(Kind::Double);
        if accumulator.backward(&run.optimizer, &loss, 4.)? {
            run.optimizer.step()?;
        }
        losses.push((f64::try_from(loss)?, run.optimizer.group_at(0)?.lr()?));
        Ok(())
    }))
}

fn data() -> Vec<i64> {
    (0..BATCHES).collect()
}

/// Runs of Lightning, each of which begins anew or with a file, and saves another after so many batches.
const LIGHTNING: &str = r#"
import logging
import pytorch_lightning as pl
for name in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric"):
    logging.getLogger(name).setLevel(logging.ERROR)
class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net, self.losses = torch.nn.Linear(2, 1, dtype=torch.float64), []
    def training_step(self, batch, batch_idx):
        # Lightning begins its data anew where it goes on in mid epoch.
        x = torch.arange(8, dtype=torch.float64).view(4, 2) * 0.1 - batch_idx * 0.15
        loss = self.net(x).square().mean()
        self.losses.append([loss.item(), self.optimizers().param_groups[0]["lr"]])
        return loss
    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), 0.1)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.trainer.current_epoch * 6 + batch_idx + 1 == save_after:
            self.trainer.save_checkpoint(saved)
def fit(begin, epochs, accumulate):
    torch.manual_seed(3)
    net = Net()
    trainer = pl.Trainer(max_epochs=epochs, accumulate_grad_batches=accumulate, accelerator="cpu", logger=False,
                         enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    loader = torch.utils.data.DataLoader(torch.zeros(6, 1), batch_size=1)
    trainer.fit(net, loader, ckpt_path=begin)
    return net, trainer
results = []
for begin, saved, save_after, accumulate in json.loads(sys.argv[1]):
    net, trainer = fit(begin, 4, accumulate)
    scaler = torch.amp.GradScaler("cpu")
    state = torch.load(begin, weights_only=True).get("MixedPrecision") if begin else None
    if state:
        pl.plugins.MixedPrecision("16-mixed", "cpu", scaler).load_state_dict(state)
    results.append([net.losses, trainer.global_step, scaler.get_scale()])
print(json.dumps(results))
"#;

fn assert_same(ours: &[(f64, f64)], expected: &[(f64, f64)], what: &str) {
    assert_eq!(ours.len(), expected.len(), "{what}");
    let worst = ours.iter().zip(expected).map(|(a, b)| (a.0 - b.0).abs().max((a.1 - b.1).abs()));
    let worst = worst.fold(0., f64::max);
    assert!(worst <= 1e-12, "{what}: {worst:e}, {ours:?} instead of {expected:?}");
}

/// A run of Lightning: the file it begins with, the one that it saves and after how many batches, and how many batches share
/// a step.
type Case = (Option<PathBuf>, PathBuf, u64, u64);

/// Losses and rates of each run, its steps, and the scale of its scaler.
fn lightning(cases: &[Case]) -> Result<Option<Vec<(Losses, u64, f64)>>> {
    let cases = serde_json::to_string(cases)?;
    let output = python_of_libraries("pytorch_lightning", LIGHTNING, &[Path::new(&cases)])?;
    let last = output.as_ref().and_then(|output| output.lines().last());
    Ok(last.map(serde_json::from_str).transpose()?)
}

#[test]
fn lightning_goes_on_with_a_run_that_began_here_and_back() -> Result<()> {
    let _guard = serial();
    let folder = tempfile::tempdir()?;
    let names = Names::new().add_prefix("net.");
    // In mid epoch and at its end, with a step for each batch and for two or three.
    let begun = [(1, 8), (1, 12), (2, 8), (2, 12), (3, 9), (3, 6)];
    let (mut cases, mut all) = (vec![], vec![]);
    for (steps, begun) in begun {
        let path = |name: &str| folder.path().join(format!("{name} {steps} {begun}.ckpt"));
        let run = made()?;
        let mut engine = trainer(&run, steps)?;
        let mut expected = vec![];
        engine.on(Event::IterationCompleted.once(begun), |_, engine| {
            engine.interrupt();
            Ok(())
        });
        engine.run(&mut expected, data(), Until::epochs(4))?;
        let weights = Weights::of_store(&run.vs)?.rename(&names)?;
        let mut of_optimizer = pytorch::optimizer_value(&run.optimizer, &[])?;
        let of_scheduler =
            pytorch::scheduler_value(&[&*run.scheduler.borrow()], &mut of_optimizer)?;
        let scaler = GradScaler::new().init_scale(128.)?;
        let checkpoint = LightningCheckpoint::new(&weights)
            .optimizers([of_optimizer])
            .schedulers([of_scheduler])
            .grad_scaler(pytorch::grad_scaler_value(&scaler)?)
            .accumulate(steps);
        pytorch::write(path("here"), &checkpoint.value(&engine)?)?;
        engine.run(&mut expected, data(), Until::epochs(4))?;
        cases.push((Some(path("here")), path("there"), 18, steps));
        all.push(expected.split_off(begun as usize));
    }
    let Some(runs) = lightning(&cases)? else { return Ok(()) };
    for ((case, expected), (mut losses, made_steps, scale)) in cases.iter().zip(&all).zip(runs) {
        let ((_, back, _, steps), what) = (case, format!("{case:?}"));
        assert_same(&losses, expected, &what);
        assert_eq!((made_steps, scale), (24 / steps, 128.), "{what}");

        // Lightning's own file goes on here.
        losses.truncate(losses.len() - 6);
        let saved = TrainingFile::read(back)?;
        assert_eq!((saved.layout(), saved.iteration()), (Layout::Lightning, Some(18)), "{what}");
        let mut run = made()?;
        let weights = saved.weights()?.rename(&Names::new().strip_prefix("net."))?;
        weights.load(&run.vs)?;
        pytorch::load_optimizer(&mut run.optimizer, saved.optimizer()?, &weights.names())?;
        pytorch::load_scheduler(
            &mut *run.scheduler.borrow_mut(),
            saved.scheduler()?,
            saved.optimizer()?,
        )?;
        let mut engine = trainer(&run, *steps)?;
        saved.load_position(&mut engine)?;
        engine.run(&mut losses, data(), Until::epochs(4))?;
        assert_same(&losses, expected, &what);
    }
    Ok(())
}

/// Counts of a file of Lightning's own, and of ours at the same place.
#[test]
fn windows_are_counted_as_lightning_counts_them() -> Result<()> {
    let _guard = serial();
    let folder = tempfile::tempdir()?;
    let places = [(1, 7), (2, 9), (2, 12), (4, 9), (4, 10), (4, 11), (4, 12)];
    let case = |(steps, after)| -> Case {
        (None, folder.path().join(format!("{steps} {after}.ckpt")), after, steps)
    };
    let cases = places.map(case);
    if lightning(&cases)?.is_none() {
        return Ok(());
    }
    for (_, theirs, after, steps) in cases {
        let run = made()?;
        let mut engine = trainer(&run, steps)?;
        engine.run(&mut vec![], data(), Until::iterations(after))?;
        let weights = Weights::of_store(&run.vs)?;
        let of_optimizer = pytorch::optimizer_value(&run.optimizer, &[])?;
        let ours = LightningCheckpoint::new(&weights)
            .optimizers([of_optimizer])
            .schedulers([Dict::new().into()])
            .accumulate(steps)
            .value(&engine)?;
        let theirs = pytorch::read(&theirs)?;
        let fit = |value: &Value| -> Result<Value> {
            Ok(value.require("loops")?.require("fit_loop")?.clone())
        };
        let (ours, theirs) = (fit(&ours)?, fit(&theirs)?);
        for path in [
            "epoch_loop.scheduler_progress",
            "epoch_loop.automatic_optimization.optim_progress",
            "epoch_loop.batch_progress",
        ] {
            let counts = |value: &Value| -> Result<Vec<(String, i64)>> {
                let mut counts = vec![];
                // Lightning counts a batch as completed when its callbacks, one of which saved this file, are done.
                let counts_callbacks = path.ends_with("batch_progress");
                value.require(path)?.walk(&mut |path, value| {
                    if !(counts_callbacks && path.ends_with("completed")) {
                        counts.extend(value.as_i64().map(|count| (path.to_owned(), count)));
                    }
                });
                counts.sort();
                Ok(counts)
            };
            assert_eq!(
                counts(&ours)?,
                counts(&theirs)?,
                "{path} after {after}, a step for {steps}"
            );
        }
    }
    let run = made()?;
    let weights = Weights::of_store(&run.vs)?;
    let engine = trainer(&run, 1)?;
    let error = LightningCheckpoint::new(&weights).accumulate(0).value(&engine).unwrap_err();
    assert!(error.to_string().contains("strictly positive"), "{error}");
    let error = LightningCheckpoint::new(&weights).accumulate(u64::MAX).value(&engine).unwrap_err();
    assert!(error.to_string().contains("cannot share a step"), "{error}");
    let global = LightningCheckpoint::new(&weights).accumulate(2).value(&engine)?;
    assert_eq!(global.get("global_step").and_then(Value::as_i64).context("a step")?, 0);
    Ok(())
}
