//! Fine-tunes a network: it learns the digits 0 to 4, and then a second network takes over its convolutions to learn
//! 5 to 9 from few pictures. First only the new layer learns, then all layers do, each group with its own schedule,
//! until the accuracy of the averaged weights has stopped getting better.
//!
//! Leaves a run folder: open `report.html` in a browser, or the folder in TensorBoard.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Parser;
use serde::Serialize;
use tch::nn::{self, ModuleT, VarStore};
use tch::{Device, Kind, Tensor};
use tch_ignite::data::Loader;
use tch_ignite::engine::{Event, Until};
use tch_ignite::handlers::{
    EMAHandler, EarlyStopping, Evaluate, GradNorm, ProgressBar, TerminateOnNan, Throughput,
};
use tch_ignite::loggers::{OptimizerParamsHandler, OutputHandler, RunFolder, WeightsHistHandler};
use tch_ignite::metrics::{Accuracy, Loss, RunningAverage};
use tch_ignite::optim::{Optimizer, lr};
use tch_ignite::schedule::{CosineAnnealingScheduler, PiecewiseLinearScheduler};
use tch_ignite::supervised::{
    Prediction, Supervised, create_supervised_evaluator, create_supervised_trainer,
};

/// Fine-tunes a network on digits it has never seen.
#[derive(Parser, Serialize)]
struct Args {
    /// Folder with the four IDX files, unzipped
    #[arg(long, value_name = "DIR", default_value = "data/mnist")]
    data: PathBuf,
    /// Epochs of fine-tuning, at most
    #[arg(long, value_name = "N", default_value_t = 20)]
    epochs: u64,
    /// Epochs in which the convolutions do not learn
    #[arg(long, value_name = "N", default_value_t = 2)]
    frozen: u64,
    /// Pictures to learn the new digits from
    #[arg(long, value_name = "N", default_value_t = 500)]
    pictures: i64,
    /// Seed of the parameters and the order of the pictures
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u32,
    /// Folder for what the run leaves behind
    #[arg(long, value_name = "DIR", default_value = "runs/finetune")]
    out: PathBuf,
    /// Only tries that everything works, on a few pictures, in seconds
    #[arg(long)]
    smoke: bool,
}

const BATCH_SIZE: usize = 50;
const LR_HEAD: f64 = 0.05;
const LR_BASE: f64 = 0.01;

/// A network whose convolutions are named `base…` and whose last layer is named `head`.
fn network(vs: &VarStore, head: &str) -> impl ModuleT + use<> {
    let root = vs.root();
    nn::seq_t()
        .add(nn::conv2d(&root / "base1", 1, 16, 5, Default::default()))
        .add_fn(|x| x.max_pool2d_default(2).relu())
        .add(nn::conv2d(&root / "base2", 16, 32, 5, Default::default()))
        .add_fn(|x| x.max_pool2d_default(2).relu().flat_view())
        .add(nn::linear(&root / head, 512, 5, Default::default()))
}

/// Pictures of the five digits from `first` on, as classes 0 to 4; at most `at_most` pictures.
fn digits(images: &Tensor, labels: &Tensor, first: i64, at_most: i64) -> Result<Loader> {
    let chosen = labels.ge(first).logical_and(&labels.lt(first + 5)).nonzero().squeeze_dim(1);
    let chosen = chosen.narrow(0, 0, at_most.min(chosen.size()[0]));
    let images = (images.index_select(0, &chosen) - 0.1307) / 0.3081;
    let labels = labels.index_select(0, &chosen) - first;
    Ok(Loader::new(&images.view([-1, 1, 28, 28]), &labels, BATCH_SIZE)?)
}

fn cross_entropy(y_pred: &Tensor, y: &Tensor) -> Tensor {
    y_pred.cross_entropy_for_logits(y)
}

/// Trains on the first five digits and saves the parameters.
fn pretrain(args: &Args, train: &Loader, bar: &ProgressBar) -> Result<PathBuf> {
    let vs = VarStore::new(Device::Cpu);
    let net = network(&vs, "digits 0 to 4");
    let optimizer = Optimizer::builder(nn::sgd(0.9, 0., 0., false), &vs).lr(0.02).build()?;
    let mut trainer = create_supervised_trainer();
    trainer.metric("loss", RunningAverage::new()).attach(bar.clone());
    let epochs = if args.smoke { 1 } else { 2 };
    trainer.run(
        &mut Supervised::new(net, optimizer, cross_entropy),
        train,
        Until::epochs(epochs),
    )?;
    let path = args.out.join("pretrained.safetensors");
    vs.save(&path)?;
    Ok(path)
}

fn train(mut args: Args) -> Result<()> {
    if args.smoke {
        (args.epochs, args.frozen) = (args.epochs.min(3), 1);
    }
    tch::manual_seed(args.seed.into());
    let run = RunFolder::create(&args.out)?;
    run.config(&args)?;
    let set = tch::vision::mnist::load_dir(&args.data).with_context(|| {
        format!("no MNIST in {} (run scripts/fetch-mnist.sh to get it)", args.data.display())
    })?;
    let (images, labels) = (&set.train_images, &set.train_labels.to_kind(Kind::Int64));
    let known = digits(images, labels, 0, if args.smoke { 500 } else { i64::MAX })?;
    let new = digits(images, labels, 5, args.pictures)?.shuffle(args.seed.into());
    let test = digits(&set.test_images, &set.test_labels.to_kind(Kind::Int64), 5, i64::MAX)?;

    let bar = ProgressBar::new().metric("loss").metric("ema/accuracy");
    let pretrained = pretrain(&args, &known.shuffle(args.seed.into()), &bar)?;
    let mut vs = VarStore::new(Device::Cpu);
    let net = network(&vs, "digits 5 to 9");
    let missing = vs.load_partial(pretrained)?;
    println!("not among the pretrained parameters: {}", missing.join(", "));

    let optimizer = Optimizer::sgd(&vs)
        .momentum(0.9)
        .weight_decay(1e-4)
        .group("base", |name| name.starts_with("base"), lr(LR_BASE))
        .group("head", |name| name.starts_with("digits"), lr(LR_HEAD))
        .build()?;
    // The learning rate of the convolutions is 0 at first, then it rises, and at the end it is as low as the new
    // layer's.
    let at = |epoch: u64| (epoch * new.batches()) as i64;
    let (thawed, end) = (args.frozen, args.epochs.max(args.frozen + 2));
    let lr_base = [(at(thawed), 0.), (at(thawed + 1), LR_BASE), (at(end), LR_BASE / 100.)];
    let (base, head) = (optimizer.group("base")?, optimizer.group("head")?);
    let whole = at(end).max(2) as u64;
    let frozen: Vec<Tensor> = {
        let variables = vs.variables().into_iter();
        variables.filter(|(name, _)| name.starts_with("base")).map(|(_, tensor)| tensor).collect()
    };
    let learn = |on: bool| frozen.iter().for_each(|tensor| drop(tensor.set_requires_grad(on)));
    learn(false);

    let evaluator = |name: &str| {
        let mut evaluator = create_supervised_evaluator();
        evaluator
            .metric("accuracy", Accuracy::of(Prediction::parts))
            .metric("loss", Loss::of(cross_entropy, Prediction::parts))
            .attach(bar.child(name));
        evaluator
    };
    // The averages follow the weights within some twenty steps, which are two epochs of so few pictures.
    let ema = EMAHandler::decay(&vs, 0.95)?.warmup_by_count();
    let mut trainer = create_supervised_trainer();
    let often = Event::IterationCompleted.every(5);
    trainer
        .metric("loss", RunningAverage::new().alpha(0.9))
        .attach(PiecewiseLinearScheduler::new(&base, "lr", lr_base))
        .attach(CosineAnnealingScheduler::new(&head, "lr", LR_HEAD, LR_HEAD / 100., whole))
        .attach(TerminateOnNan::new())
        .attach(GradNorm::new(&vs))
        .attach(Throughput::new())
        .attach(bar.clone())
        .attach(ema.clone())
        .attach(Evaluate::each_epoch("val", evaluator("val"), &test))
        .attach(ema.with_averages(Evaluate::each_epoch("ema", evaluator("ema"), &test)))
        .attach(
            OutputHandler::new(&run, "training", often.clone()).metric("loss").metric("grad_norm"),
        )
        .attach(OptimizerParamsHandler::new(&run, "", &optimizer, often).by_name())
        .attach(WeightsHistHandler::new(&run, "", &vs, Event::EpochCompleted))
        .attach(
            OutputHandler::each_epoch(&run, "")
                .metric("val/accuracy")
                .metric("val/loss")
                .metric("ema/accuracy")
                .metric("ema/loss")
                .metric("throughput/samples_per_second")
                .global_step(|state| state.iteration),
        )
        .attach(EarlyStopping::max("ema/accuracy", 4).min_evaluations(args.frozen + 4))
        .attach(run.clone())
        .on(Event::EpochStarted.once(args.frozen + 1), |_, _| {
            learn(true);
            Ok(())
        });
    let profile = trainer.profile();
    let mut model = Supervised::new(net, optimizer.clone(), cross_entropy);
    let summary = trainer.run(&mut model, &new, Until::epochs(args.epochs))?;
    println!("{summary}\n{profile}");
    let percent = |name: &str| anyhow::Ok(100. * trainer.state.metrics.get(name)?);
    println!("accuracy: {:.2} %", percent("val/accuracy")?);
    println!("accuracy of the averages: {:.2} %", percent("ema/accuracy")?);
    println!("report: {}", run.path().join("report.html").display());
    Ok(())
}

fn main() -> Result<()> {
    train(Args::parse())
}
