//! Runs on MNIST and Fashion-MNIST beside ignite's own, step for step: weights and order are the same, nothing is drawn
//! after that, and everything is computed in f64.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use tch::nn::{self, ModuleT, VarStore};
use tch::{Device, Kind, Reduction, Tensor, vision};
use tch_ignite::data::{Loader, RandomSampler, Sampler};
use tch_ignite::engine::{Event, Until};
use tch_ignite::handlers::Evaluate;
use tch_ignite::metrics::{Accuracy, Loss};
use tch_ignite::optim::{Optimizer, lr};
use tch_ignite::pytorch::{self, Names, Value, save_weights};
use tch_ignite::schedule::CosineAnnealingScheduler;
use tch_ignite::supervised::{
    Prediction, Supervised, create_supervised_evaluator, create_supervised_trainer,
};

use super::{common, python, serial};

const ITERATIONS: u64 = 500;
const BATCH: usize = 120;
const TOLERANCE: f64 = 1e-9;

const IGNITE: &str = r#"
from ignite.engine import Engine, Events, create_supervised_evaluator
from ignite.handlers import CosineAnnealingScheduler
from ignite.metrics import Accuracy, Loss
from torch import nn

data, weights, orders = sys.argv[1:]
torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)

def read(name, offset):
    with open(f"{data}/{name}-ubyte", "rb") as file:
        return torch.frombuffer(bytearray(file.read()), dtype=torch.uint8, offset=offset)

def pictures(split):
    return read(f"{split}-images-idx3", 16).view(-1, 1, 28, 28), read(f"{split}-labels-idx1", 8).long()

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 4, 5, 2), nn.Conv2d(4, 8, 5, 2)
        self.fc = nn.Linear(128, 10)
    def forward(self, x):
        x = self.conv1(x.double() / 255).relu()
        return self.fc(self.conv2(x).relu().flatten(1))

(x, y), test = pictures("train"), pictures("t10k")
orders = torch.load(orders)
net = Net()
net.load_state_dict(torch.load(weights))
convolutions = [*net.conv1.parameters(), *net.conv2.parameters()]
optimizer = torch.optim.SGD([
    {"params": convolutions, "lr": 0.05},
    {"params": net.fc.parameters(), "lr": 0.02},
], momentum=0.9, weight_decay=5e-4)

def step(engine, rows):
    net.train()
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(net(x[rows]), y[rows])
    loss.backward()
    optimizer.step()
    return loss.item()

trainer = Engine(step)
base, fc = optimizer.param_groups
trainer.add_event_handler(Events.ITERATION_STARTED, CosineAnnealingScheduler(optimizer, "lr", 0.05, 0.001, 500, param_group_index=0))
trainer.add_event_handler(Events.ITERATION_STARTED, CosineAnnealingScheduler(optimizer, "lr", 0.02, 0.002, 125, param_group_index=1))
seen = {"losses": [], "rates": []}

@trainer.on(Events.ITERATION_COMPLETED)
def note(engine):
    seen["losses"].append(engine.state.output)
    seen["rates"].append([base["lr"], fc["lr"]])

# Each epoch has an order of its own.
@trainer.on(Events.EPOCH_STARTED)
def shuffle(engine):
    engine.set_data(orders[engine.state.epoch - 1].split(120))

batches = orders[0].split(120)
trainer.run(batches, max_iters=500)
metrics = {"accuracy": Accuracy(), "loss": Loss(nn.functional.cross_entropy)}
evaluator = create_supervised_evaluator(net, metrics)
evaluator.run(list(zip(*(part.split(500) for part in test))))
print(json.dumps(seen | evaluator.state.metrics))
"#;

/// A run: the loss of each iteration with the rates that it trained with, and the metrics of the whole test set.
#[derive(Deserialize)]
struct Run {
    losses: Vec<f64>,
    rates: Vec<[f64; 2]>,
    accuracy: f64,
    loss: f64,
}

fn network(vs: &mut VarStore) -> impl ModuleT + use<> {
    vs.set_kind(Kind::Double);
    let root = vs.root();
    let _guard = serial();
    tch::manual_seed(18);
    let by_two = nn::ConvConfig { stride: 2, ..Default::default() };
    nn::seq()
        .add_fn(|x| x.to_kind(Kind::Double) / 255.)
        .add(nn::conv2d(&root / "conv1", 1, 4, 5, by_two))
        .add_fn(Tensor::relu)
        .add(nn::conv2d(&root / "conv2", 4, 8, 5, by_two))
        .add_fn(|x| x.relu().flat_view())
        .add(nn::linear(&root / "fc", 128, 10, Default::default()))
}

/// Batches of bytes: tch has divided them by 255, in f32.
fn loader(images: &Tensor, labels: &Tensor, batch_size: usize) -> Result<Loader> {
    let images = (images * 255.).round().to_kind(Kind::Uint8).view([-1, 1, 28, 28]);
    Ok(Loader::new(&images, labels, batch_size)?)
}

/// tch's `cross_entropy_for_logits` computes in f32.
fn cross_entropy(y_pred: &Tensor, y: &Tensor) -> Tensor {
    y_pred.cross_entropy_loss::<Tensor>(y, None, Reduction::Mean, -100, 0.)
}

/// Trains on the set in this folder, where it is, and compares each number with ignite's.
fn beside_ignite(folder: &str, default: &str, name: &str, fetch: &str) -> Result<()> {
    let data = std::env::var_os(folder).map_or_else(|| default.into(), PathBuf::from);
    if !data.join("train-images-idx3-ubyte").exists() {
        common::skipped(format!("no {name} in {} ({fetch})", data.display()));
        return Ok(());
    }
    let set = vision::mnist::load_dir(&data)?;
    let train = loader(&set.train_images, &set.train_labels, BATCH)?.shuffle(18);
    let test = loader(&set.test_images, &set.test_labels, 500)?;

    let mut vs = VarStore::new(Device::Cpu);
    let net = network(&mut vs);
    let scratch = tempfile::tempdir()?;
    let (weights, orders) = (scratch.path().join("weights.pt"), scratch.path().join("orders.pt"));
    save_weights(&vs, &weights, &Names::new())?;
    let sampler = RandomSampler::new(train.samples() as usize, 18);
    let order = |pass| anyhow::Ok(sampler.order(pass)?.iter().map(|row| *row as i64).collect());
    let passes = (0..ITERATIONS.div_ceil(train.batches())).map(order);
    let passes = passes.collect::<Result<Vec<Vec<i64>>>>()?;
    pytorch::write(&orders, &Value::tensor(&Tensor::from_slice2(&passes))?)?;
    let Some(output) = python(IGNITE, &[&data, &weights, &orders])? else { return Ok(()) };
    let theirs: Run = serde_json::from_str(&output)?;

    let optimizer = Optimizer::sgd(&vs)
        .momentum(0.9)
        .weight_decay(5e-4)
        .group("base", |name| name.starts_with("conv"), lr(0.05))
        .group("fc", |name| name.starts_with("fc"), lr(0.02))
        .build()?;
    let (base, fc) = (optimizer.group("base")?, optimizer.group("fc")?);
    let mut evaluator = create_supervised_evaluator();
    evaluator
        .metric("accuracy", Accuracy::of(Prediction::parts))
        .metric("loss", Loss::of(cross_entropy, Prediction::parts));
    let (mut losses, mut rates) = (vec![], vec![]);
    let mut trainer = create_supervised_trainer();
    trainer
        .attach(CosineAnnealingScheduler::new(&base, "lr", 0.05, 0.001, ITERATIONS))
        .attach(CosineAnnealingScheduler::new(&fc, "lr", 0.02, 0.002, 125))
        .attach(Evaluate::on(Event::Completed, "test", evaluator, &test))
        .on(Event::IterationCompleted, |_, engine| {
            losses.extend(engine.state.output.as_ref().map(|loss| loss.double_value(&[])));
            rates.push([base.lr()?, fc.lr()?]);
            Ok(())
        });
    let mut cx = Supervised::new(net, optimizer.clone(), cross_entropy);
    trainer.run(&mut cx, &train, Until::iterations(ITERATIONS))?;
    let (accuracy, loss) =
        (trainer.state.metrics.get("test/accuracy")?, trainer.state.metrics.get("test/loss")?);
    drop(trainer);

    ensure!(losses.len() == 500 && theirs.losses.len() == 500 && theirs.rates.len() == 500);
    let mut farthest = 0f64;
    for (i, (ours, theirs)) in losses.iter().zip(&theirs.losses).enumerate() {
        let apart = (ours - theirs).abs();
        farthest = farthest.max(apart);
        ensure!(apart <= TOLERANCE, "iteration {}: a loss of {ours}, ignite's {theirs}", i + 1);
    }
    println!("{name}: losses are up to {farthest:e} apart, the accuracy is {accuracy}");
    for (ours, theirs) in rates.iter().flatten().zip(theirs.rates.iter().flatten()) {
        approx::assert_relative_eq!(*ours, *theirs, max_relative = 1e-14);
    }
    approx::assert_abs_diff_eq!(loss, theirs.loss, epsilon = TOLERANCE);
    assert_eq!(accuracy, theirs.accuracy);
    // Both have learnt, so that equal numbers say something.
    let last = losses.last().context("a loss")?;
    ensure!(accuracy > 0.7 && losses[0] > 2. && *last < 1., "{accuracy}, {} to {last}", losses[0]);
    Ok(())
}

#[test]
fn mnist_is_trained_as_ignite_trains_it() -> Result<()> {
    // scripts/test.sh fetches the digits, so in CI this has to run: the line names Python.
    let fetch = "scripts/fetch-mnist.sh fetches it, to train beside Python";
    beside_ignite("MNIST_DIR", "data/mnist", "MNIST", fetch)
}

#[test]
fn fashion_mnist_is_trained_as_ignite_trains_it() -> Result<()> {
    let fetch = "apt-get install dataset-fashion-mnist && scripts/fetch-mnist.sh --fashion";
    beside_ignite("FASHION_MNIST_DIR", "data/fashion-mnist", "Fashion-MNIST", fetch)
}
