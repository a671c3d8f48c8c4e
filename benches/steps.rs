//! Compares our optimizer steps, clipping and averages with tch's own, on the shapes of real models. Of an optimizer that
//! tch does not have, "tch" is its loop by libtorch's operations.
//!
//! `scripts/bench.sh` runs this and `steps.py` with one and with two threads, shape by shape (`BENCH_SHAPE` has the name
//! of one), and makes a table. The group "floor" measures how fast memory can be updated in place, which bounds how fast
//! the others could be. With one thread the time is what that thread had of its core, so that other programs on the
//! machine do not count; with several it is wall time.

use std::hint::black_box;
use std::time::Duration;

use criterion::measurement::{Measurement, ValueFormatter, WallTime};
use criterion::{
    BatchSize, BenchmarkGroup, Criterion, SamplingMode, criterion_group, criterion_main,
};
use tch::nn::{self, OptimizerConfig, VarStore};
use tch::{Device, Kind, Tensor};
use tch_ignite::handlers::EMAHandler;
use tch_ignite::optim::{Optimizer, OptimizerBuilder};

/// A bound of clipping below the norm of all these gradients, and by how much it gets smaller each time, so that all are
/// scaled; steps.py has the same.
const BOUND: f64 = 100.;
const SHRINK: f64 = 0.9999;

/// Time by one of the system's clocks.
struct Clock(libc::clockid_t);

impl Clock {
    fn of_the_threads() -> Self {
        let one = tch::get_num_threads() == 1;
        Self(if one { libc::CLOCK_THREAD_CPUTIME_ID } else { libc::CLOCK_MONOTONIC })
    }
}

impl Measurement for Clock {
    type Intermediate = Duration;
    type Value = Duration;

    fn start(&self) -> Duration {
        let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: the function writes to the timespec, and nothing else.
        unsafe { libc::clock_gettime(self.0, &mut now) };
        Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
    }

    fn end(&self, start: Duration) -> Duration {
        self.start() - start
    }

    fn add(&self, a: &Duration, b: &Duration) -> Duration {
        *a + *b
    }

    fn zero(&self) -> Duration {
        Duration::ZERO
    }

    fn to_f64(&self, value: &Duration) -> f64 {
        value.as_nanos() as f64
    }

    fn formatter(&self) -> &dyn ValueFormatter {
        WallTime.formatter()
    }
}

/// The names of models and the shapes of all their parameters; only the one that `BENCH_SHAPE` names, if it is set.
fn shapes() -> Vec<(&'static str, Vec<Vec<i64>>)> {
    let only = std::env::var("BENCH_SHAPE");
    let mut all = vec![
        ("200 of 16x16", vec![vec![16, 16]; 200]),
        ("ResNet-18", resnet18()),
        ("4 of 4M", vec![vec![2048, 2048]; 4]),
        ("GPT-2 small", gpt2_small()),
    ];
    all.retain(|(name, _)| only.as_deref().is_ok_and(|only| only == *name) || only.is_err());
    assert!(!all.is_empty(), "BENCH_SHAPE is {only:?}, and no shapes have this name");
    all
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

/// Makes a benchmark group that takes fewer samples of large models, because each takes long.
fn group<'c>(
    c: &'c mut Criterion<Clock>,
    name: String,
    shapes: &[Vec<i64>],
) -> BenchmarkGroup<'c, Clock> {
    let mut group = c.benchmark_group(name);
    let elements: i64 = shapes.iter().map(|shape| shape.iter().product::<i64>()).sum();
    group.warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(1));
    if elements > 1 << 26 {
        group.sample_size(10).sampling_mode(SamplingMode::Flat);
    } else {
        group.sample_size(20);
    }
    group
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

fn steps(c: &mut Criterion<Clock>) {
    for (name, shapes) in shapes() {
        compare(c, name, &shapes, |vs| Optimizer::builder(nn::sgd(0.9, 0., 0., false), vs));
        compare(c, name, &shapes, Optimizer::adam);
        compare(c, name, &shapes, Optimizer::adamw);
        compare(c, name, &shapes, Optimizer::rms_prop);
        if name.starts_with("GPT-2") {
            // The matrices of one of the 12 blocks.
            let hidden = shapes.into_iter().filter(|size| size.len() == 2).skip(2).take(4);
            alone(c, name, &hidden.collect::<Vec<_>>(), Optimizer::muon);
            sparse_adam(c, name);
            continue;
        }
        compare(c, name, &shapes, Optimizer::adagrad);
        compare(c, name, &shapes, Optimizer::nadam);
        compare(c, name, &shapes, Optimizer::radam);
        compare(c, name, &shapes, Optimizer::adamax);
        compare(c, name, &shapes, Optimizer::adadelta);
        compare(c, name, &shapes, Optimizer::asgd);
        compare(c, name, &shapes, Optimizer::rprop);
        compare(c, name, &shapes, Optimizer::lion);
        compare(c, name, &shapes, Optimizer::sgd_schedule_free);
        compare(c, name, &shapes, Optimizer::adamw_schedule_free);
        compare(c, name, &shapes, Optimizer::ademamix);
        alone(c, name, &shapes, Optimizer::adafactor);
        if !name.starts_with("4 of") {
            lbfgs(c, name, &shapes);
        }
    }
}

/// An optimizer whose steps are the same operations of libtorch's, fused or not.
fn alone<T: OptimizerConfig>(
    c: &mut Criterion<Clock>,
    shape: &str,
    shapes: &[Vec<i64>],
    builder: impl Fn(&VarStore) -> OptimizerBuilder<'_, T>,
) {
    let vs = store(shapes);
    let optimizer = builder(&vs).lr(1e-6).build().expect("one group");
    let mut group = group(c, format!("{}, {shape}", optimizer.name()), shapes);
    group.bench_function("ours", |b| b.iter(|| optimizer.step().expect("steps")));
    group.finish();
}

/// A batch of 1,024 words of GPT-2's embedding.
fn sparse_adam(c: &mut Criterion<Clock>, shape: &str) {
    let vs = VarStore::new(Device::Cpu);
    let table = vs.root().randn("table", &[50257, 768], 0., 0.1);
    let words = Tensor::randint(50257, [1024], (Kind::Int64, Device::Cpu));
    Tensor::embedding(&table, &words, -1, false, true).sum(Kind::Float).backward();
    let optimizer = Optimizer::sparse_adam(&vs).lr(1e-6).build().expect("one group");
    let mut group = group(c, format!("SparseAdam, {shape}"), &[]);
    group.bench_function("ours", |b| b.iter(|| optimizer.step().expect("steps")));
    group.finish();
}

/// A first step, of 20 iterations, down a narrow valley. The closure computes the gradient without backward, so that
/// its share is small.
fn lbfgs(c: &mut Criterion<Clock>, shape: &str, shapes: &[Vec<i64>]) {
    let vs = store(shapes);
    let gradients: Vec<_> = vs.trainable_variables().iter().map(Tensor::grad).collect();
    let values: Vec<_> = vs.trainable_variables().iter().map(Tensor::detach).collect();
    let begin: Vec<_> = values.iter().map(Tensor::copy).collect();
    let slope = |v: &Tensor| {
        Tensor::linspace(1., 100., v.numel() as i64, (Kind::Float, Device::Cpu)).view_as(v)
    };
    let slopes: Vec<_> = values.iter().map(slope).collect();
    let fresh = || {
        for (v, begin) in values.iter().zip(&begin) {
            v.shallow_clone().copy_(begin);
        }
        Optimizer::lbfgs(&vs).build().expect("one group")
    };
    let loss = || {
        let mut loss = Tensor::zeros([], (Kind::Float, Device::Cpu));
        for ((v, slope), gradient) in values.iter().zip(&slopes).zip(&gradients) {
            let mut gradient = gradient.shallow_clone();
            gradient.copy_(v);
            gradient *= slope;
            loss += gradient.view([-1]).dot(&v.view([-1])) / 2.;
        }
        Ok(loss)
    };
    let mut group = group(c, format!("LBFGS, {shape}"), shapes);
    group.bench_function("ours", |b| {
        let step = |optimizer: Optimizer| optimizer.step_with(loss).expect("steps");
        b.iter_batched(fresh, step, BatchSize::PerIteration);
    });
    group.finish();
}

fn compare<T: OptimizerConfig>(
    c: &mut Criterion<Clock>,
    shape: &str,
    shapes: &[Vec<i64>],
    builder: impl Fn(&VarStore) -> OptimizerBuilder<'_, T>,
) {
    let vs = store(shapes);
    let optimizer = builder(&vs).lr(1e-6).build().expect("one group");
    let name = optimizer.name();
    let mut group = group(c, format!("{name}, {shape}"), shapes);
    for fused in [false, true] {
        optimizer.set_fused(fused).expect("not lent");
        let way = if fused { "ours" } else { "tch" };
        group.bench_function(way, |b| b.iter(|| optimizer.step().expect("steps")));
    }
    if name == "AdamW" {
        // The bound shrinks a little every time, so that clipping always has to scale the gradients.
        optimizer.set_fused(false).expect("not lent");
        let mut max = BOUND;
        group.bench_function("clip + step, tch", |b| {
            b.iter(|| {
                max *= SHRINK;
                optimizer.with_tch(|tch| tch.clip_grad_norm(max)).expect("gradients");
                optimizer.step().expect("steps")
            });
        });
        optimizer.set_fused(true).expect("not lent");
        group.bench_function("clip + step, ours", |b| {
            b.iter(|| black_box(optimizer.step_clipped(1e-9).expect("steps")));
        });
    }
    group.finish();
}

fn gradients(c: &mut Criterion<Clock>) {
    for (name, shapes) in shapes() {
        let vs = store(&shapes);
        let optimizer = Optimizer::sgd(&vs).build().expect("one group");
        let mut group = group(c, format!("gradients, {name}"), &shapes);
        for (kind, clips) in [("below the bound", false), ("clipped", true)] {
            let max = std::cell::Cell::new(BOUND);
            let bound = || {
                max.set(max.get() * SHRINK);
                if clips { max.get() } else { 1e9 }
            };
            group.bench_function(format!("clip_grad_norm, {kind}, tch"), |b| {
                optimizer.with_tch(|tch| b.iter(|| tch.clip_grad_norm(bound()))).expect("not lent");
            });
            group.bench_function(format!("clip_grad_norm, {kind}, ours"), |b| {
                b.iter(|| black_box(optimizer.clip_grad_norm(bound()).expect("clips")));
            });
        }
        group.bench_function("zeros, tch", |b| {
            let variables = vs.trainable_variables();
            b.iter(|| variables.iter().for_each(|v| drop(v.grad().zero_())));
        });
        group.bench_function("zeros, ours", |b| {
            b.iter(|| optimizer.zero_grad_in_place().expect("zeros"));
        });
        if name.starts_with("200") {
            let backward = || {
                let parts: Vec<_> =
                    vs.trainable_variables().iter().map(|v| v.sum(Kind::Float)).collect();
                Tensor::stack(&parts, 0).sum(Kind::Float).backward();
            };
            group.bench_function("to none, tch", |b| {
                let clear = |()| optimizer.with_tch(|tch| tch.zero_grad()).expect("not lent");
                b.iter_batched(backward, clear, BatchSize::PerIteration);
            });
            group.bench_function("to none, ours", |b| {
                let clear = |()| optimizer.zero_grad().expect("not lent");
                b.iter_batched(backward, clear, BatchSize::PerIteration);
            });
        }
        group.finish();
    }
}

fn averages(c: &mut Criterion<Clock>) {
    for (name, shapes) in shapes() {
        let vs = store(&shapes);
        let variables = vs.trainable_variables();
        let mut copies: Vec<_> = variables.iter().map(|v| v.detach().copy()).collect();
        let ema = EMAHandler::new(&vs, 1e-3).expect("a momentum");
        let mut group = group(c, format!("EMA, {name}"), &shapes);
        group.bench_function("tch, lerp_ in a loop", |b| {
            b.iter(|| {
                tch::no_grad(|| {
                    for (copy, variable) in copies.iter_mut().zip(&variables) {
                        let _ = copy.lerp_(variable, 1e-3);
                    }
                });
            });
        });
        group.bench_function("ours", |b| b.iter(|| ema.update().expect("averages")));
        group.bench_function("swap, twice", |b| b.iter(|| drop(ema.swap().expect("once"))));
        group.finish();
    }
}

fn floor(c: &mut Criterion<Clock>) {
    // The tensor is larger than any cache. An update in place reads and writes 8 bytes for each element.
    let mut large = Tensor::ones([1 << 26], (Kind::Float, Device::Cpu));
    // Shapes that are measured alone have a rate of their own, because the machine may be another half an hour later.
    let shape = std::env::var("BENCH_SHAPE").map(|shape| format!(", {shape}")).unwrap_or_default();
    let mut group = c.benchmark_group(format!("floor{shape}"));
    group.measurement_time(Duration::from_secs(2)).sample_size(10);
    group.bench_function("in place, 256 MiB", |b| b.iter(|| drop(large.g_mul_scalar_(1.0000001))));
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default().with_measurement(Clock::of_the_threads());
    targets = floor, steps, gradients, averages
}
criterion_main!(benches);
