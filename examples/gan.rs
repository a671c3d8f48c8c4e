//! Trains two networks against each other (Goodfellow and others 2014): one draws digits, the other tells them from
//! real ones. There are two optimizers, a custom event between their steps, and pictures for TensorBoard.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Parser;
use serde::Serialize;
use tch::nn::{self, ModuleT, VarStore};
use tch::{Device, Kind, Tensor};
use tch_ignite::data::{Batch, Loader};
use tch_ignite::engine::{Engine, Event, Until};
use tch_ignite::handlers::{GradNorm, ProgressBar, TerminateOnNan};
use tch_ignite::loggers::{Image, Logger, OutputHandler, RunFolder};
use tch_ignite::metrics::RunningAverage;
use tch_ignite::optim::Optimizer;

/// Teaches a network to draw digits.
#[derive(Parser, Serialize)]
struct Args {
    /// Folder with the four IDX files, unzipped
    #[arg(long, value_name = "DIR", default_value = "data/mnist")]
    data: PathBuf,
    /// Passes over the digits
    #[arg(long, value_name = "N", default_value_t = 12)]
    epochs: u64,
    /// Seed of the parameters, the noise and the order of the pictures
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u32,
    /// Folder for what the run leaves behind
    #[arg(long, value_name = "DIR", default_value = "runs/gan")]
    out: PathBuf,
    /// Only tries that everything works, on a few pictures, in seconds
    #[arg(long)]
    smoke: bool,
}

const NOISE: i64 = 64;
/// Fired when the discriminator has made its step and the generator has not.
const DISC_STEPPED: Event = Event::custom("disc_stepped");

struct Gan {
    generator: nn::SequentialT,
    discriminator: nn::SequentialT,
    opt_g: Optimizer,
    opt_d: Optimizer,
}

struct Losses {
    g: Tensor,
    d: Tensor,
}

fn noise(pictures: i64) -> Tensor {
    Tensor::randn([pictures, NOISE], (Kind::Float, Device::Cpu))
}

/// Initial weights as in DCGAN (Radford and others 2015).
const SMALL: nn::Init = nn::Init::Randn { mean: 0., stdev: 0.02 };

/// A layer that doubles height and width.
fn doubled(path: nn::Path, from: i64, to: i64) -> nn::ConvTranspose2D {
    let config =
        nn::ConvTransposeConfig { stride: 2, padding: 1, ws_init: SMALL, ..Default::default() };
    nn::conv_transpose2d(path, from, to, 4, config)
}

/// A layer that halves height and width.
fn halved(path: nn::Path, from: i64, to: i64) -> nn::Conv2D {
    let config = nn::ConvConfig { stride: 2, padding: 1, ws_init: SMALL, ..Default::default() };
    nn::conv2d(path, from, to, 4, config)
}

fn leaky(x: &Tensor) -> Tensor {
    x.maximum(&(x * 0.2))
}

/// The network that draws; its pixels are from -1 (black) to 1.
fn generator(vs: &VarStore) -> nn::SequentialT {
    let root = vs.root();
    let normed = nn::BatchNormConfig::default();
    nn::seq_t()
        .add(nn::linear(&root / "fc", NOISE, 64 * 7 * 7, Default::default()))
        .add_fn(|x| x.view([-1, 64, 7, 7]))
        .add(nn::batch_norm2d(&root / "norm1", 64, normed))
        .add_fn(|x| x.relu())
        .add(doubled(&root / "up1", 64, 32))
        .add(nn::batch_norm2d(&root / "norm2", 32, normed))
        .add_fn(|x| x.relu())
        .add(doubled(&root / "up2", 32, 1))
        .add_fn(|x| x.tanh())
}

/// The network that scores each picture, above 0 if it takes the picture for real.
fn discriminator(vs: &VarStore) -> nn::SequentialT {
    let root = vs.root();
    nn::seq_t()
        .add(halved(&root / "down1", 1, 32))
        .add_fn(leaky)
        .add(halved(&root / "down2", 32, 64))
        .add_fn(leaky)
        .add_fn(|x| x.flat_view())
        .add(nn::linear(&root / "fc", 64 * 7 * 7, 1, Default::default()))
}

fn adam(vs: &VarStore) -> Result<Optimizer> {
    let config = nn::Adam::default().beta1(0.5);
    Ok(Optimizer::builder(config, vs).lr(2e-4).build()?)
}

/// The mean of `-log(sigmoid(score))` for real pictures and of `-log(1 - sigmoid(score))` for others, computed with
/// softplus so that it stays finite.
fn loss(scores: &Tensor, real: bool) -> Tensor {
    let scores = if real { -scores } else { scores.shallow_clone() };
    scores.softplus().mean(Kind::Float)
}

fn step<'a>(
    gan: &mut Gan,
    engine: &mut Engine<'a, Gan, Batch, Losses>,
    (real, _): Batch,
) -> Result<Losses> {
    let fake = gan.generator.forward_t(&noise(real.size()[0]), true);
    let on_real = loss(&gan.discriminator.forward_t(&real, true), true);
    let on_fake = loss(&gan.discriminator.forward_t(&fake.detach(), true), false);
    let d = on_real + on_fake;
    gan.opt_d.backward_step(&d)?;
    engine.fire_event(DISC_STEPPED, gan)?;
    let g = loss(&gan.discriminator.forward_t(&fake, true), true);
    gan.opt_g.backward_step(&g)?;
    Ok(Losses { g: g.detach(), d: d.detach() })
}

fn digits(args: &Args) -> Result<Loader> {
    let set = tch::vision::mnist::load_dir(&args.data).with_context(|| {
        format!("no MNIST in {} (run scripts/fetch-mnist.sh to get it)", args.data.display())
    })?;
    let count = if args.smoke { 640 } else { set.train_images.size()[0] };
    let images = set.train_images.narrow(0, 0, count) * 2. - 1.;
    let labels = set.train_labels.narrow(0, 0, count);
    Ok(Loader::new(&images.view([-1, 1, 28, 28]), &labels, 64)?.shuffle(args.seed.into()))
}

fn main() -> Result<()> {
    let mut args = Args::parse();
    if args.smoke {
        args.epochs = args.epochs.min(2);
    }
    tch::manual_seed(args.seed.into());
    let run = RunFolder::create(&args.out)?;
    run.config(&args)?;
    let data = digits(&args)?;
    let (vs_g, vs_d) = (VarStore::new(Device::Cpu), VarStore::new(Device::Cpu));
    let mut gan = Gan {
        generator: generator(&vs_g),
        discriminator: discriminator(&vs_d),
        opt_g: adam(&vs_g)?,
        opt_d: adam(&vs_d)?,
    };

    let same_noise = noise(64);
    let often = Event::IterationCompleted.every(10);
    let mut trainer = Engine::new(step);
    trainer.register_events([DISC_STEPPED])?;
    let pictures = run.clone();
    trainer
        .metric("g", RunningAverage::of(|losses: &Losses| losses.g.shallow_clone()))
        .metric("d", RunningAverage::of(|losses: &Losses| losses.d.shallow_clone()))
        .attach(TerminateOnNan::of(|losses: &Losses| {
            [losses.g.shallow_clone(), losses.d.shallow_clone()]
        }))
        // The norm is taken at this event, because later the generator's loss has added to the gradients of these
        // parameters.
        .attach(GradNorm::new(&vs_d).name("grad_norm_d").on(DISC_STEPPED.every(10)))
        .attach(ProgressBar::new().metric("g").metric("d"))
        .attach(OutputHandler::new(&run, "loss", often.clone()).metric("g").metric("d"))
        .attach(OutputHandler::new(&run, "", often).metric("grad_norm_d"))
        .on(Event::EpochCompleted, move |gan, engine| {
            let drawn = tch::no_grad(|| gan.generator.forward_t(&same_noise, false));
            let drawn = (drawn + 1.) / 2.;
            let grid = Image::grid(&drawn, 8)?;
            Ok(pictures.image("digits", &grid, engine.state.epoch)?)
        })
        .attach(run.clone());
    let summary = trainer.run(&mut gan, &data, Until::epochs(args.epochs))?;
    println!("{summary}\npictures: tensorboard --logdir {}", run.path().display());
    Ok(())
}
