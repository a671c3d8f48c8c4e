//! Measures our optimizer steps, clipping and averages beside tch's own, on the shapes of real models. Of an optimizer
//! that tch does not have, "tch" is its loop by libtorch's operations.
//!
//! `scripts/bench.sh` lets this and `steps.py` take turns of less than a second, because the rate of a machine's memory
//! changes from one minute to the next. Each prints its groups and contenders as JSON lines and then an empty one. Then it
//! reads lines: `group NAME` makes the contenders of a group, calls each once and prints an empty line, and `NAME` measures one of
//! them and prints its time in ns.
//!
//! The contender "floor" of each group measures how fast memory can be updated in place, which bounds how fast the others
//! could be. With one thread the time is what that thread had of its core, so that other programs on the machine do not
//! count; with several it is wall time.

use std::cell::Cell;
use std::hint::black_box;
use std::io::BufRead;
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Parser;
use tch::nn::{self, OptimizerConfig, VarStore};
use tch::{Device, Kind, Tensor};
use tch_ignite::handlers::EMAHandler;
use tch_ignite::optim::{Optimizer, OptimizerBuilder};

#[derive(Parser)]
struct Args {
    /// 200 of 16x16, ResNet-18, 4 of 4M or GPT-2 small
    #[arg(long)]
    shape: String,
    /// Passed by `cargo bench`
    #[arg(long, hide = true)]
    bench: bool,
}

/// A bound of clipping below the norm of all these gradients, and by how much it gets smaller each time, so that all are
/// scaled; steps.py has the same.
const BOUND: f64 = 100.;
const SHRINK: f64 = 0.99;

/// A turn lasts for so long, and has so many calls at least and at most, after one that does not count. A call that takes
/// longer is a turn of its own.
const TURN: Duration = Duration::from_millis(50);
const LEAST_CALLS: usize = 3;
const MOST_CALLS: usize = 500;

struct Contender {
    name: String,
    /// A turn calls this before each measured call.
    before: Option<Box<dyn FnMut()>>,
    call: Box<dyn FnMut()>,
}

impl Contender {
    fn new(name: impl Into<String>, call: impl FnMut() + 'static) -> Self {
        Self { name: name.into(), before: None, call: Box::new(call) }
    }

    fn before(mut self, before: impl FnMut() + 'static) -> Self {
        self.before = Some(Box::new(before));
        self
    }

    /// The median time of a call in this turn.
    fn measure(&mut self) -> Duration {
        let mut times = vec![self.call()];
        if times[0] < TURN {
            times.clear();
        }
        while times.len() < LEAST_CALLS && times.first().is_none_or(|first| *first < TURN)
            || times.len() < MOST_CALLS && times.iter().sum::<Duration>() < TURN
        {
            times.push(self.call());
        }
        times.sort();
        times[times.len() / 2]
    }

    fn call(&mut self) -> Duration {
        if let Some(before) = &mut self.before {
            before();
        }
        let begun = now();
        (self.call)();
        now() - begun
    }
}

/// The time of the thread if it is the only one, or else that of the wall.
fn now() -> Duration {
    let clock = match tch::get_num_threads() {
        1 => libc::CLOCK_THREAD_CPUTIME_ID,
        _ => libc::CLOCK_MONOTONIC,
    };
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the function writes to the timespec, and nothing else.
    unsafe { libc::clock_gettime(clock, &mut now) };
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}

/// Contenders with a name in common, which are made when it is their turn.
struct Group {
    name: String,
    names: Vec<&'static str>,
    make: Box<dyn Fn() -> Result<Vec<Contender>>>,
}

type Shapes = &'static [Vec<i64>];

/// The shapes of all parameters of a model.
fn shapes(name: &str) -> Result<Shapes> {
    let shapes = match name {
        "200 of 16x16" => vec![vec![16, 16]; 200],
        "ResNet-18" => resnet18(),
        "4 of 4M" => vec![vec![2048, 2048]; 4],
        "GPT-2 small" => gpt2_small(),
        other => anyhow::bail!("there are no shapes '{other}'"),
    };
    Ok(shapes.leak())
}

fn gpt2_small() -> Vec<Vec<i64>> {
    let d = 768;
    let mut shapes = vec![vec![50257, d], vec![1024, d]];
    for _ in 0..12 {
        shapes.extend([vec![d], vec![d], vec![d, 3 * d], vec![3 * d], vec![d, d], vec![d]]);
        shapes.extend([vec![d], vec![d], vec![d, 4 * d], vec![4 * d], vec![4 * d, d], vec![d]]);
    }
    shapes.extend([vec![d], vec![d]]);
    shapes
}

fn resnet18() -> Vec<Vec<i64>> {
    let mut shapes = vec![vec![64, 3, 7, 7], vec![64], vec![64]];
    let mut block = |from: i64, to: i64| {
        shapes.extend([vec![to, from, 3, 3], vec![to], vec![to]]);
        shapes.extend([vec![to, to, 3, 3], vec![to], vec![to]]);
        if from != to {
            shapes.extend([vec![to, from, 1, 1], vec![to], vec![to]]);
        }
    };
    for (from, to) in [(64, 64), (64, 128), (128, 256), (256, 512)] {
        block(from, to);
        block(to, to);
    }
    shapes.extend([vec![1000, 512], vec![1000]]);
    shapes
}

/// A store with parameters of these shapes, all of which have gradients.
fn store(shapes: &[Vec<i64>]) -> VarStore {
    let vs = VarStore::new(Device::Cpu);
    let root = vs.root();
    let mut loss = Tensor::zeros([], (Kind::Float, Device::Cpu));
    for (index, shape) in shapes.iter().enumerate() {
        let parameter = root.randn(&format!("p{index}"), shape, 0., 0.1);
        loss += (parameter * Tensor::randn(shape, (Kind::Float, Device::Cpu))).sum(Kind::Float);
    }
    loss.backward();
    vs
}

fn groups(shape: &str, shapes: Shapes) -> Vec<Group> {
    let mut groups = vec![
        compared(shape, "SGD", shapes, |vs| Optimizer::builder(nn::sgd(0.9, 0., 0., false), vs)),
        compared(shape, "Adam", shapes, Optimizer::adam),
        compared(shape, "AdamW", shapes, Optimizer::adamw),
        compared(shape, "RMSprop", shapes, Optimizer::rms_prop),
    ];
    if shape.starts_with("GPT-2") {
        // The matrices of one of the 12 blocks.
        groups.push(alone(shape, "Muon", hidden(shapes), Optimizer::muon));
        groups.push(sparse_adam(shape));
    } else {
        groups.extend([
            compared(shape, "Adagrad", shapes, Optimizer::adagrad),
            compared(shape, "NAdam", shapes, Optimizer::nadam),
            compared(shape, "RAdam", shapes, Optimizer::radam),
            compared(shape, "Adamax", shapes, Optimizer::adamax),
            compared(shape, "Adadelta", shapes, Optimizer::adadelta),
            compared(shape, "ASGD", shapes, Optimizer::asgd),
            compared(shape, "Rprop", shapes, Optimizer::rprop),
            compared(shape, "Lion", shapes, Optimizer::lion),
            compared(shape, "SGDScheduleFree", shapes, Optimizer::sgd_schedule_free),
            compared(shape, "AdamWScheduleFree", shapes, Optimizer::adamw_schedule_free),
            compared(shape, "AdEMAMix", shapes, Optimizer::ademamix),
            alone(shape, "Adafactor", shapes, Optimizer::adafactor),
        ]);
        if !shape.starts_with("4 of") {
            groups.push(lbfgs(shape, shapes));
        }
    }
    groups.extend([gradients(shape, shapes), averages(shape, shapes)]);
    groups
}

fn hidden(shapes: Shapes) -> Shapes {
    let matrices = shapes.iter().filter(|size| size.len() == 2).skip(2).take(4);
    matrices.cloned().collect::<Vec<_>>().leak()
}

/// A builder of optimizers of one kind.
trait Build<T>: Fn(&VarStore) -> OptimizerBuilder<'_, T> + Copy + 'static {}
impl<T, F: Fn(&VarStore) -> OptimizerBuilder<'_, T> + Copy + 'static> Build<T> for F {}

/// An optimizer over parameters of its own.
fn optimizer<T: OptimizerConfig>(shapes: Shapes, build: impl Build<T>) -> Result<Optimizer> {
    Ok(build(&store(shapes)).lr(1e-6).build()?)
}

fn steps(name: &str, optimizer: Optimizer) -> Contender {
    Contender::new(name, move || optimizer.step().expect("steps"))
}

/// An optimizer whose steps are the same operations of libtorch's, fused or not.
fn alone<T: OptimizerConfig + 'static>(
    shape: &str,
    name: &str,
    shapes: Shapes,
    build: impl Build<T>,
) -> Group {
    Group {
        name: format!("{name}, {shape}"),
        names: vec!["ours"],
        make: Box::new(move || Ok(vec![steps("ours", optimizer(shapes, build)?)])),
    }
}

fn compared<T: OptimizerConfig + 'static>(
    shape: &str,
    name: &'static str,
    shapes: Shapes,
    build: impl Build<T>,
) -> Group {
    let clips = name == "AdamW";
    let mut names = vec!["ours", "tch"];
    if clips {
        names.extend(["clip + step, ours", "clip + step, tch"]);
    }
    let make = move || {
        let (ours, tch) = (optimizer(shapes, build)?, optimizer(shapes, build)?);
        tch.set_fused(false)?;
        let mut contenders = vec![steps("ours", ours.clone()), steps("tch", tch.clone())];
        if clips {
            let clipped = move || drop(black_box(ours.step_clipped(1e-9).expect("steps")));
            contenders.push(Contender::new("clip + step, ours", clipped));
            let mut max = BOUND;
            contenders.push(Contender::new("clip + step, tch", move || {
                max *= SHRINK;
                tch.with_tch(|tch| tch.clip_grad_norm(max)).expect("gradients");
                tch.step().expect("steps");
            }));
        }
        Ok(contenders)
    };
    Group { name: format!("{name}, {shape}"), names, make: Box::new(make) }
}

/// A batch of 1,024 words of GPT-2's embedding.
fn sparse_adam(shape: &str) -> Group {
    let make = || {
        let vs = VarStore::new(Device::Cpu);
        let table = vs.root().randn("table", &[50257, 768], 0., 0.1);
        let words = Tensor::randint(50257, [1024], (Kind::Int64, Device::Cpu));
        Tensor::embedding(&table, &words, -1, false, true).sum(Kind::Float).backward();
        Ok(vec![steps("ours", Optimizer::sparse_adam(&vs).lr(1e-6).build()?)])
    };
    Group { name: format!("SparseAdam, {shape}"), names: vec!["ours"], make: Box::new(make) }
}

/// A first step, of 20 iterations, down a narrow valley. The closure computes the gradient without backward, so that
/// its share is small.
fn lbfgs(shape: &str, shapes: Shapes) -> Group {
    let make = move || {
        let vs = store(shapes);
        let gradients: Vec<_> = vs.trainable_variables().iter().map(Tensor::grad).collect();
        let values: Vec<_> = vs.trainable_variables().iter().map(Tensor::detach).collect();
        let begin: Vec<_> = values.iter().map(Tensor::copy).collect();
        let slope = |v: &Tensor| {
            Tensor::linspace(1., 100., v.numel() as i64, (Kind::Float, Device::Cpu)).view_as(v)
        };
        let slopes: Vec<_> = values.iter().map(slope).collect();
        let optimizer = Rc::new(std::cell::RefCell::new(None));
        let (own, places) = (optimizer.clone(), values.iter().map(Tensor::shallow_clone));
        let places: Vec<_> = places.collect();
        let fresh = move || {
            for (v, begin) in places.iter().zip(&begin) {
                v.shallow_clone().copy_(begin);
            }
            *own.borrow_mut() = Some(Optimizer::lbfgs(&vs).build().expect("one group"));
        };
        let loss = move || {
            let mut loss = Tensor::zeros([], (Kind::Float, Device::Cpu));
            for ((v, slope), gradient) in values.iter().zip(&slopes).zip(&gradients) {
                let mut gradient = gradient.shallow_clone();
                gradient.copy_(v);
                gradient *= slope;
                loss += gradient.view([-1]).dot(&v.view([-1])) / 2.;
            }
            Ok(loss)
        };
        let step = move || {
            let optimizer = optimizer.borrow();
            drop(optimizer.as_ref().expect("made before").step_with(&loss).expect("steps"));
        };
        Ok(vec![Contender::new("ours", step).before(fresh)])
    };
    Group { name: format!("LBFGS, {shape}"), names: vec!["ours"], make: Box::new(make) }
}

fn gradients(shape: &str, shapes: Shapes) -> Group {
    let mut names = vec![
        "clip_grad_norm, below the bound, ours",
        "clip_grad_norm, below the bound, tch",
        "clip_grad_norm, clipped, ours",
        "clip_grad_norm, clipped, tch",
        "zeros, ours",
        "zeros, tch",
    ];
    let to_none = shape.starts_with("200");
    if to_none {
        names.extend(["to none, ours", "to none, tch"]);
    }
    let make = move || {
        let optimizer = Optimizer::sgd(&store(shapes)).build()?;
        let mut contenders = vec![];
        // All clip the same gradients, so they share the bound that shrinks.
        let max = Rc::new(Cell::new(BOUND));
        for (kind, clips) in [("below the bound", false), ("clipped", true)] {
            let max = max.clone();
            let bound = move || {
                max.set(max.get() * SHRINK);
                if clips { max.get() } else { 1e9 }
            };
            let (ours, tch, own) = (optimizer.clone(), optimizer.clone(), bound.clone());
            contenders.push(Contender::new(format!("clip_grad_norm, {kind}, ours"), move || {
                drop(black_box(ours.clip_grad_norm(own()).expect("clips")));
            }));
            contenders.push(Contender::new(format!("clip_grad_norm, {kind}, tch"), move || {
                tch.with_tch(|tch| tch.clip_grad_norm(bound())).expect("not lent");
            }));
        }
        let vs = store(shapes);
        let (zeros, variables) = (Optimizer::sgd(&vs).build()?, vs.trainable_variables());
        contenders.push(Contender::new("zeros, ours", move || {
            zeros.zero_grad_in_place().expect("zeros");
        }));
        contenders.push(Contender::new("zeros, tch", move || {
            variables.iter().for_each(|v| drop(v.grad().zero_()));
        }));
        if to_none {
            let vs = store(shapes);
            let optimizer = Optimizer::sgd(&vs).build()?;
            let backward = move || {
                let parts = vs.trainable_variables().into_iter().map(|v| v.sum(Kind::Float));
                Tensor::stack(&parts.collect::<Vec<_>>(), 0).sum(Kind::Float).backward();
            };
            let backward = Rc::new(backward);
            let (again, tch) = (backward.clone(), optimizer.clone());
            let none = move || optimizer.zero_grad().expect("not lent");
            contenders.push(Contender::new("to none, ours", none).before(move || again()));
            let none = move || tch.with_tch(|tch| tch.zero_grad()).expect("not lent");
            contenders.push(Contender::new("to none, tch", none).before(move || backward()));
        }
        Ok(contenders)
    };
    Group { name: format!("gradients, {shape}"), names, make: Box::new(make) }
}

fn averages(shape: &str, shapes: Shapes) -> Group {
    let make = move || {
        let vs = store(shapes);
        let variables = vs.trainable_variables();
        let mut copies: Vec<_> = variables.iter().map(|v| v.detach().copy()).collect();
        let ema = EMAHandler::new(&vs, 1e-3)?;
        let swapped = ema.clone();
        Ok(vec![
            Contender::new("ours", move || {
                ema.update().expect("averages");
            }),
            Contender::new("tch, lerp_ in a loop", move || {
                tch::no_grad(|| {
                    for (copy, variable) in copies.iter_mut().zip(&variables) {
                        let _ = copy.lerp_(variable, 1e-3);
                    }
                });
            }),
            Contender::new("swap, twice", move || drop(swapped.swap().expect("once"))),
        ])
    };
    let names = vec!["ours", "tch, lerp_ in a loop", "swap, twice"];
    Group { name: format!("EMA, {shape}"), names, make: Box::new(make) }
}

/// Updates memory in place that is larger than any cache. That reads and writes 8 bytes for each element.
fn floor() -> Contender {
    let mut large = Tensor::ones([1 << 26], (Kind::Float, Device::Cpu));
    Contender::new(FLOOR, move || drop(large.g_mul_scalar_(1.0000001)))
}
const FLOOR: &str = "floor";

fn main() -> Result<()> {
    let args = Args::parse();
    tch::manual_seed(0);
    let groups = groups(&args.shape, shapes(&args.shape)?);
    for group in &groups {
        for name in group.names.iter().chain([&FLOOR]) {
            println!("{}", serde_json::json!({ "group": group.name, "name": name }));
        }
    }
    println!();
    let mut contenders = vec![floor()];
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        if let Some(name) = line.strip_prefix("group ") {
            contenders.truncate(1);
            let group = groups.iter().find(|group| group.name == name);
            contenders.extend((group.context("no such group")?.make)()?);
            for contender in &mut contenders {
                contender.call();
            }
            println!();
            continue;
        }
        let contender = contenders.iter_mut().find(|contender| contender.name == line);
        println!("{}", contender.context("no such contender")?.measure().as_nanos());
    }
    Ok(())
}
