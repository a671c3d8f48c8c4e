//! Two networks against each other (Goodfellow and others 2014): one draws digits, the other tells
//! them from real ones. Two optimizers, an event of our own between their steps, and pictures for
//! TensorBoard.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Parser;
use serde::Serialize;
use tch::nn::{self, Module, VarStore};
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
    #[arg(long, value_name = "N", default_value_t = 30)]
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
const PIXELS: i64 = 28 * 28;
/// Fired when the discriminator has made its step and the generator has not.
const DISC_STEPPED: Event = Event::custom("disc_stepped");

struct Gan {
    generator: nn::Sequential,
    discriminator: nn::Sequential,
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

/// Pixels from -1 (black) to 1.
fn generator(vs: &VarStore) -> nn::Sequential {
    let root = vs.root();
    nn::seq()
        .add(nn::linear(&root / "fc1", NOISE, 256, Default::default()))
        .add_fn(|x| x.leaky_relu())
        .add(nn::linear(&root / "fc2", 256, 512, Default::default()))
        .add_fn(|x| x.leaky_relu())
        .add(nn::linear(&root / "fc3", 512, PIXELS, Default::default()))
        .add_fn(|x| x.tanh())
}

/// One score a picture, above 0 for a real one.
fn discriminator(vs: &VarStore) -> nn::Sequential {
    let root = vs.root();
    nn::seq()
        .add(nn::linear(&root / "fc1", PIXELS, 256, Default::default()))
        .add_fn(|x| x.leaky_relu())
        .add(nn::linear(&root / "fc2", 256, 1, Default::default()))
}

fn adam(vs: &VarStore) -> Result<Optimizer> {
    let config = nn::Adam::default().beta1(0.5);
    Ok(Optimizer::builder(config, vs).lr(2e-4).build()?)
}

/// `-log(sigmoid(score))`, or of its complement, so that it stays finite.
fn loss(scores: &Tensor, real: bool) -> Tensor {
    let scores = if real { -scores } else { scores.shallow_clone() };
    scores.softplus().mean(Kind::Float)
}

fn step<'a>(
    gan: &mut Gan,
    engine: &mut Engine<'a, Gan, Batch, Losses>,
    (real, _): Batch,
) -> Result<Losses> {
    let fake = gan.generator.forward(&noise(real.size()[0]));
    let on_real = loss(&gan.discriminator.forward(&real), true);
    let on_fake = loss(&gan.discriminator.forward(&fake.detach()), false);
    let d = on_real + on_fake;
    gan.opt_d.backward_step(&d)?;
    engine.fire_event(DISC_STEPPED, gan)?;
    let g = loss(&gan.discriminator.forward(&fake), true);
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
    Ok(Loader::new(&images.view([-1, PIXELS]), &labels, 64)?.shuffle(args.seed.into()))
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
        // Later, the generator's loss would have gone through these parameters too.
        .attach(GradNorm::new(&vs_d).name("grad_norm_d").on(DISC_STEPPED.every(10)))
        .attach(ProgressBar::new().metric("g").metric("d"))
        .attach(OutputHandler::new(&run, "loss", often.clone()).metric("g").metric("d"))
        .attach(OutputHandler::new(&run, "", often).metric("grad_norm_d"))
        .on(Event::EpochCompleted, move |gan, engine| {
            let drawn = tch::no_grad(|| gan.generator.forward(&same_noise));
            let drawn = (drawn + 1.) / 2.;
            let grid = Image::grid(&drawn.view([-1, 1, 28, 28]), 8)?;
            Ok(pictures.image("digits", &grid, engine.state.epoch)?)
        })
        .attach(run.clone());
    let summary = trainer.run(&mut gan, &data, Until::epochs(args.epochs))?;
    println!("{summary}\npictures: tensorboard --logdir {}", run.path().display());
    Ok(())
}
