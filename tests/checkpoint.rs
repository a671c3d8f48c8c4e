//! Checkpoints: what is restored is what was saved, bit for bit, wherever the run was stopped.

use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use tch::nn::{self, ModuleT, VarStore};
use tch::{Device, Kind, Tensor};
use tch_ignite::checkpoint::{
    Checkpoint, Mode, StateDict, Stateful, load_weights, read_state, save_weights, verify,
    write_state,
};
use tch_ignite::data::{Batch, Loader};
use tch_ignite::engine::{Engine, Event, Events, Handler, Priority, Until};
use tch_ignite::handlers::{Evaluate, History};
use tch_ignite::metrics::{Loss, Mean, RunningAverage};
use tch_ignite::optim::{Optimizer, lr};
use tch_ignite::schedule::{
    CosineAnnealing, LinearCyclical, ParamScheduler, ReduceLROnPlateauScheduler, Schedule,
};
use tch_ignite::supervised::Prediction;
use tch_ignite::{Error, Result};

struct Net {
    net: nn::SequentialT,
    optimizer: Optimizer,
}

type Trainer<'a> = Engine<'a, Net, Batch, Tensor>;

/// Everything that a small program has.
struct Program {
    vs: VarStore,
    cx: Net,
    history: History,
    trainer: Trainer<'static>,
    data: Loader,
}

const EPOCHS: u64 = 3;
/// Another length than the data's 5 batches.
const EPOCH_LENGTH: u64 = 4;

fn until() -> Until {
    Until::epochs(EPOCHS).epoch_length(EPOCH_LENGTH)
}

fn net(vs: &VarStore, hidden: i64) -> nn::SequentialT {
    let root = vs.root();
    nn::seq_t()
        .add(nn::linear(&root / "base", 3, hidden, Default::default()))
        .add(nn::batch_norm1d(&root / "norm", hidden, Default::default()))
        .add_fn_t(|x, train| x.relu().dropout(0.3, train))
        .add(nn::linear(&root / "fc", hidden, 2, Default::default()))
}

fn optimizer(name: &str, vs: &VarStore) -> Result<Optimizer> {
    fn grouped<T: nn::OptimizerConfig>(config: T, vs: &VarStore) -> Result<Optimizer> {
        Optimizer::builder(config, vs)
            .group("base", |name| !name.starts_with("fc"), lr(1e-2))
            .group("fc", |name| name.starts_with("fc"), lr(2e-2).weight_decay(1e-2))
            .build()
    }
    match name {
        "SGD" => grouped(nn::sgd(0.9, 0., 0., true), vs),
        "Adam" => grouped(nn::Adam { amsgrad: true, ..Default::default() }, vs),
        "AdamW" => grouped(nn::AdamW::default(), vs),
        _ => grouped(nn::RmsProp { momentum: 0.5, centered: true, ..Default::default() }, vs),
    }
}

impl Program {
    /// Seeds with something else each time: nothing may depend on it when a run goes on.
    fn new(name: &str, seed: i64) -> Result<Self> {
        tch::manual_seed(seed);
        let mut vs = VarStore::new(Device::Cpu);
        let net = net(&vs, 5);
        vs.set_kind(Kind::Double);
        let optimizer = optimizer(name, &vs)?;
        let mut trainer = Engine::new(|cx: &mut Net, _, (x, y): Batch| {
            let loss = cx.net.forward_t(&x, true).mse_loss(&y, tch::Reduction::Mean);
            cx.optimizer.backward_step(&loss)?;
            Ok(loss.detach())
        });
        let mut evaluator = Engine::new(|cx: &mut Net, _, (x, y): Batch| {
            let y_pred = tch::no_grad(|| cx.net.forward_t(&x, false));
            Ok(Prediction { y_pred, y })
        });
        let mse = |y_pred: &Tensor, y: &Tensor| y_pred.mse_loss(y, tch::Reduction::Mean);
        evaluator.metric("loss", Loss::of(mse, Prediction::parts));
        let data = data()?;
        let (base, fc) = (optimizer.group("base")?, optimizer.group("fc")?);
        let cyclic = LinearCyclical::new(1e-2, 1e-3, 6).cycle_mult(1.5);
        let cosine = CosineAnnealing::new(2e-2, 1e-4, 5).warmup(0., 3)?;
        let decay = optimizer.group("fc")?.knob("weight_decay")?;
        let plateau = ReduceLROnPlateauScheduler::min("decay", decay, "val/loss")?;
        let history = History::new()
            .metric("running")
            .knob("lr (fc)", fc.knob("lr")?)
            .epoch_metric("mean")
            .epoch_metric("val/loss");
        trainer
            .attach(ParamScheduler::new("lr (base)", base.knob("lr")?, cyclic).save_history(true))
            .attach(ParamScheduler::new("lr (fc)", fc.knob("lr")?, cosine))
            .metric("running", RunningAverage::new())
            .metric("mean", Mean::new())
            .attach(Evaluate::each_epoch("val", evaluator, data.clone()))
            .attach(plateau)
            .attach(history.clone());
        trainer.track("model", &vs).track("optimizer", &optimizer);
        Ok(Self { vs, cx: Net { net, optimizer }, history, trainer, data })
    }

    fn run(&mut self) -> Result<()> {
        self.trainer.run(&mut self.cx, &self.data, until()).map(drop)
    }

    /// All bits that training leaves.
    fn outcome(&self) -> Result<String> {
        let mut state = self.trainer.checkpoint(&self.cx)?;
        // What belongs to this process.
        let _ = state.take_part("settings");
        let mut text = bits(&state);
        let folder = tempfile::tempdir().unwrap();
        let csv = folder.path().join("history.csv");
        self.history.write_csv(&csv)?;
        text += &std::fs::read_to_string(csv).unwrap();
        Ok(text)
    }
}

fn data() -> Result<Loader> {
    let values = |n: i64, k: i64| (Tensor::arange(n * k, (Kind::Double, Device::Cpu)) * 0.37).sin();
    Loader::new(&values(14, 3).view([14, 3]), &values(14, 2).view([14, 2]), 3)
        .map(|loader| loader.shuffle(11))
}

fn bits(state: &StateDict) -> String {
    let mut text = format!("{:?}\n", state.values());
    for (name, tensor) in state.tensors() {
        // A tensor's own text rounds.
        let flat = tensor.detach().reshape([-1]).to_kind(match tensor.kind() {
            Kind::Double | Kind::Float => Kind::Double,
            _ => Kind::Int64,
        });
        let bits: Vec<u64> = match flat.kind() {
            Kind::Double => {
                Vec::<f64>::try_from(&flat).unwrap().into_iter().map(f64::to_bits).collect()
            }
            _ => Vec::<i64>::try_from(&flat).unwrap().into_iter().map(|n| n as u64).collect(),
        };
        text += &format!("{name} {:?} {:?} {bits:x?}\n", tensor.kind(), tensor.size());
    }
    for (name, part) in state.parts() {
        text += &format!("[{name}]\n{}", bits(part));
    }
    text
}

fn text<T>(result: Result<T>) -> String {
    result.err().expect("an error").to_string()
}

fn files(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| !name.starts_with('.'))
        .collect();
    names.sort();
    names
}

const EVENTS: [Event; 8] = [
    Event::Started,
    Event::EpochStarted,
    Event::GetBatchStarted,
    Event::GetBatchCompleted,
    Event::IterationStarted,
    Event::IterationCompleted,
    Event::DataloaderStopIteration,
    Event::EpochCompleted,
];

/// Runs until the `n`-th time that event is fired, writes a checkpoint there and stops dead; false if
/// it is not fired so often.
fn killed_at(event: Event, n: u64, name: &str, folder: &Path) -> Result<bool> {
    let mut program = Program::new(name, 1)?;
    let path = folder.join("checkpoint.safetensors");
    program.trainer.attach(Killer { event, left: n, path: path.clone() });
    Ok(program.run().is_err() && path.exists())
}

/// Saves as the last handler of an event, and fails.
struct Killer {
    event: Event,
    left: u64,
    path: PathBuf,
}

impl Handler<Net, Batch, Tensor> for Killer {
    fn name(&self) -> String {
        "killer".into()
    }
    fn events(&self) -> Events {
        self.event.into()
    }
    fn priority(&self) -> Priority {
        Priority::Last
    }
    fn call(&mut self, _: Event, cx: &mut Net, engine: &mut Trainer<'_>) -> anyhow::Result<()> {
        self.left -= 1;
        if self.left == 0 {
            write_state(&self.path, &engine.checkpoint(cx)?)?;
            anyhow::bail!("killed");
        }
        Ok(())
    }
}

#[test]
fn a_run_stopped_at_any_event_goes_on_bit_for_bit() -> Result<()> {
    for name in ["SGD", "Adam", "AdamW", "RMSprop"] {
        let mut straight = Program::new(name, 1)?;
        straight.run()?;
        let expected = straight.outcome()?;
        for event in EVENTS {
            for n in 1.. {
                let folder = tempfile::tempdir().unwrap();
                if !killed_at(event, n, name, folder.path())? {
                    assert!(n > 1, "{event}");
                    break;
                }
                let mut program = Program::new(name, 1000 + n as i64)?;
                let resumed = program.trainer.resume(&mut program.cx, folder.path())?.unwrap();
                assert_eq!(resumed.to_string().lines().count(), 1, "{resumed}");
                program.run()?;
                let outcome = program.outcome()?;
                assert!(
                    outcome == expected,
                    "{name} killed at {event} {n}:\n{}",
                    difference(&outcome, &expected)
                );
            }
        }
    }
    Ok(())
}

fn difference(ours: &str, theirs: &str) -> String {
    let lines = ours.lines().zip(theirs.lines()).filter(|(a, b)| a != b).take(4);
    lines.map(|(a, b)| format!("- {a:.300}\n+ {b:.300}\n")).collect()
}
