//! Trains networks with this crate, compiled by PyTorch or written with tch: `scripts/bench.sh compiled` runs both, and
//! PyTorch's ways in `compiled.py`. Prints samples per second of whole training: data, forward, backward, AdamW, a
//! schedule, the loss's running average and the accuracy.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::Result;
use clap::{Parser, ValueEnum};
use tch::nn::{self, VarStore};
use tch::{Device, Kind, Tensor};
use tch_ignite::compiled::CompiledModel;
use tch_ignite::metrics::{Accuracy, RunningAverage};
use tch_ignite::prelude::*;

#[derive(Parser)]
struct Args {
    #[arg(long, value_enum)]
    way: Way,
    #[arg(long, value_enum)]
    model: Model,
    /// The folder that compiled.py exported the model to
    #[arg(long)]
    folder: PathBuf,
    /// Steps that are measured, after a fifth as many that are not; an epoch has 8
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u64).range(10..))]
    steps: u64,
    /// Passed by `cargo bench`
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Way {
    Compiled,
    Eager,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Model {
    Mlp,
    Cnn,
    Gpt,
}

/// Sizes of the networks in compiled.py.
const CHARACTERS: i64 = 128;
const CONTEXT: i64 = 64;
const WIDTH: i64 = 128;
const HEADS: i64 = 4;

/// The batch, and samples of one.
fn batch(model: Model) -> (usize, Tensor, Tensor) {
    let classes = |size: &[i64]| Tensor::randint(10, size, (Kind::Int64, Device::Cpu));
    match model {
        Model::Mlp | Model::Cnn => {
            let x = Tensor::randn([64, 1, 28, 28], (Kind::Float, Device::Cpu));
            (64, x, classes(&[64]))
        }
        Model::Gpt => {
            let all = Tensor::randint(CHARACTERS, [12, CONTEXT + 1], (Kind::Int64, Device::Cpu));
            (12, all.narrow(1, 0, CONTEXT).contiguous(), all.narrow(1, 1, CONTEXT).contiguous())
        }
    }
}

fn gpt(root: &nn::Path<'_>) -> nn::SequentialT {
    let linear = |path: nn::Path<'_>, from, to| nn::linear(path, from, to, Default::default());
    let norm = |path: nn::Path<'_>| nn::layer_norm(path, vec![WIDTH], Default::default());
    let embedding = nn::embedding(root / "embedding", CHARACTERS, WIDTH, Default::default());
    let position = root.zeros("position", &[CONTEXT, WIDTH]);
    let head = embedding.ws.shallow_clone();
    let mut net = nn::seq_t().add_fn(move |x| x.apply(&embedding) + &position);
    for number in 0..4 {
        let path = root / "blocks" / number;
        let (norm1, norm2) = (norm(&path / "norm1"), norm(&path / "norm2"));
        let (qkv, out) =
            (linear(&path / "qkv", WIDTH, 3 * WIDTH), linear(&path / "out", WIDTH, WIDTH));
        let (up, down) =
            (linear(&path / "up", WIDTH, 4 * WIDTH), linear(&path / "down", 4 * WIDTH, WIDTH));
        net = net.add_fn(move |x| {
            let size = [-1, CONTEXT, 3, HEADS, WIDTH / HEADS];
            let qkv = x.apply(&norm1).apply(&qkv).view(size).permute([2, 0, 3, 1, 4]);
            let y = Tensor::scaled_dot_product_attention::<Tensor>(
                &qkv.get(0),
                &qkv.get(1),
                &qkv.get(2),
                None,
                0.,
                true,
                None,
                false,
            );
            let x = x + y.transpose(1, 2).flatten(2, -1).apply(&out);
            &x + x.apply(&norm2).apply(&up).gelu("none").apply(&down)
        });
    }
    let last = norm(root / "norm");
    net.add_fn(move |x| x.apply(&last).matmul(&head.tr()))
}

fn network(root: &nn::Path<'_>, model: Model) -> nn::SequentialT {
    let linear = |name: &str, from, to| nn::linear(root / name, from, to, Default::default());
    match model {
        Model::Mlp => nn::seq_t()
            .add_fn(|x| x.flatten(1, -1))
            .add(linear("fc1", 784, 256))
            .add_fn(|x| x.relu())
            .add(linear("fc2", 256, 128))
            .add_fn(|x| x.relu())
            .add(linear("fc3", 128, 10)),
        // The network of examples/mnist.rs, without dropout.
        Model::Cnn => nn::seq_t()
            .add(nn::conv2d(root / "conv1", 1, 16, 5, Default::default()))
            .add_fn(|x| x.max_pool2d_default(2).relu())
            .add(nn::conv2d(root / "conv2", 16, 32, 5, Default::default()))
            .add_fn(|x| x.max_pool2d_default(2).relu().flatten(1, -1))
            .add(linear("fc1", 512, 128))
            .add_fn(|x| x.relu())
            .add(linear("fc2", 128, 10)),
        Model::Gpt => gpt(root),
    }
}

/// Trains, and returns the seconds that the steps took.
fn train<N>(cx: Supervised<N>, args: &Args) -> Result<f64> {
    let (_, x, y) = batch(args.model);
    let repeats = |tensor: &Tensor| {
        let mut times = vec![1; tensor.dim()];
        times[0] = 8;
        tensor.repeat(times)
    };
    let data = Loader::new(&repeats(&x), &repeats(&y), x.size()[0] as usize)?.shuffle(1);
    let (warm, all) = (args.steps.div_ceil(5), args.steps.div_ceil(5) + args.steps);

    let mut cx = cx.output_transform(|y_pred, y, loss| (y_pred, y, loss));
    let group = cx.optimizer.groups()?.remove(0);
    let mut trainer = cx.trainer();
    trainer
        .attach(CosineAnnealingScheduler::new(&group, "lr", 1e-3, 1e-4, all))
        .metric("loss", RunningAverage::of(|output: &Output| output.2.shallow_clone()))
        .metric("accuracy", Accuracy::computed(classified));
    trainer.run(&mut cx, &data, Until::iterations(warm))?;
    let start = Instant::now();
    trainer.run(&mut cx, &data, Until::iterations(all))?;
    let took = start.elapsed().as_secs_f64();
    let metrics = &trainer.state.metrics;
    eprintln!("loss {:.4}, accuracy {:.4}", metrics.get("loss")?, metrics.get("accuracy")?);
    Ok(took)
}

/// Scores, classes and loss of a batch.
type Output = (Tensor, Tensor, Tensor);

/// Returns a row of scores for each class that is predicted: a GPT predicts one for each character.
fn classified((y_pred, y, _): &Output) -> (Tensor, Tensor) {
    (y_pred.flatten(0, -2), y.flatten(0, -1))
}

fn main() -> Result<()> {
    let args = Args::parse();
    tch::manual_seed(0);
    let vs = VarStore::new(Device::Cpu);
    let took = match args.way {
        Way::Compiled => {
            let net = CompiledModel::load(&args.folder, &vs.root())?;
            train(Supervised::compiled(net, Optimizer::adamw(&vs).build()?), &args)?
        }
        Way::Eager => {
            let net = network(&vs.root(), args.model);
            let is_gpt = args.model == Model::Gpt;
            let loss = move |y_pred: &Tensor, y: &Tensor| match is_gpt {
                true => y_pred.flatten(0, 1).cross_entropy_for_logits(&y.flatten(0, 1)),
                false => y_pred.cross_entropy_for_logits(y),
            };
            train(Supervised::new(net, Optimizer::adamw(&vs).build()?, loss), &args)?
        }
    };
    let (size, ..) = batch(args.model);
    println!("{:.1}", args.steps as f64 * size as f64 / took);
    Ok(())
}
