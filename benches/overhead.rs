//! Measures how much longer an iteration of the engine takes than one of a plain `for` loop, and how long schedules
//! take.
//!
//! `cargo bench`. The times are for 10,000 iterations; divide them for the time of one. The allocation count at the
//! start is exact: allocations of the engine in 10,000 iterations beyond those of one.

use std::alloc::{GlobalAlloc, Layout, System};
use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use tch::nn::{self, VarStore};
use tch_ignite::engine::{Engine, Event, Until};
use tch_ignite::optim::{Optimizer, lr};
use tch_ignite::schedule::*;

const ITERATIONS: u64 = 10_000;

/// An allocator that counts allocations.
struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

// SAFETY: all calls go to the system allocator, which keeps the contract.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller keeps the contract of `alloc`.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps the contract of `dealloc`.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn optimizer() -> Optimizer {
    let vs = VarStore::new(tch::Device::Cpu);
    let root = vs.root();
    let _ = nn::linear(&root / "base", 1, 1, Default::default());
    let _ = nn::linear(&root / "fc", 1, 1, Default::default());
    Optimizer::sgd(&vs)
        .group("base", |name| name.starts_with("base"), lr(0.1))
        .group("fc", |name| name.starts_with("fc"), lr(0.1))
        .build()
        .expect("two groups")
}

type Bench<'a> = Engine<'a, u64, u64, ()>;

fn step(sum: &mut u64, _: &mut Bench<'_>, batch: u64) -> anyhow::Result<()> {
    *sum = sum.wrapping_add(black_box(batch));
    Ok(())
}

fn plain() -> Bench<'static> {
    Engine::new(|sum: &mut u64, engine, batch| step(sum, engine, batch))
}

fn schedulers(engine: &mut Bench<'_>, optimizer: &Optimizer) {
    let knob = |group| optimizer.group(group).and_then(|group| group.knob("lr")).expect("lr");
    engine.attach(ParamScheduler::new(
        "lr (base)",
        knob("base"),
        LinearCyclical::new(0.1, 0.01, 500),
    ));
    engine.attach(ParamScheduler::new("lr (fc)", knob("fc"), CosineAnnealing::new(0.1, 0.01, 500)));
}

fn busy(optimizer: &Optimizer) -> Bench<'static> {
    let mut engine = plain();
    schedulers(&mut engine, optimizer);
    engine.on(Event::IterationStarted, |sum, _| {
        *sum = sum.wrapping_add(1);
        Ok(())
    });
    engine.on(Event::IterationCompleted, |sum, engine| {
        *sum = sum.wrapping_add(engine.state.iteration);
        Ok(())
    });
    engine.on(Event::IterationCompleted.every(100), |sum, _| {
        *sum = sum.wrapping_add(1);
        Ok(())
    });
    engine
}

fn run(engine: &mut Bench<'_>, iterations: u64) -> u64 {
    let mut sum = 0;
    engine.state.max_iters = None;
    engine.state.max_epochs = None;
    engine.run(&mut sum, vec![1; 1000], Until::iterations(iterations)).expect("nothing fails here");
    sum
}

/// How many allocations `ITERATIONS` more iterations make, after a first run has warmed up.
fn allocations(engine: &mut Bench<'_>) -> u64 {
    let mut count = |iterations| {
        let before = ALLOCATIONS.load(Ordering::Relaxed);
        run(engine, iterations);
        ALLOCATIONS.load(Ordering::Relaxed) - before
    };
    count(1000);
    let (few, many) = (count(1000), count(1000 + ITERATIONS));
    many - few
}

fn engine(c: &mut Criterion) {
    let optimizer = optimizer();
    println!("allocations in {ITERATIONS} iterations, no handlers: {}", allocations(&mut plain()));
    println!(
        "allocations in {ITERATIONS} iterations, 2 schedulers + 3 handlers: {}",
        allocations(&mut busy(&optimizer))
    );

    let mut group = c.benchmark_group("10000 iterations");
    group.throughput(Throughput::Elements(ITERATIONS));
    group.bench_function("plain for loop", |b| {
        let batches = vec![1u64; ITERATIONS as usize];
        b.iter(|| {
            let mut sum = 0u64;
            for batch in &batches {
                sum = sum.wrapping_add(black_box(*batch));
            }
            sum
        });
    });
    let mut empty = plain();
    group.bench_function("engine, no handlers", |b| b.iter(|| run(&mut empty, ITERATIONS)));
    let mut scheduled = plain();
    schedulers(&mut scheduled, &optimizer);
    group.bench_function("engine, 2 schedulers", |b| b.iter(|| run(&mut scheduled, ITERATIONS)));
    let mut busy = busy(&optimizer);
    group.bench_function("engine, 2 schedulers + 3 handlers", |b| {
        b.iter(|| run(&mut busy, ITERATIONS))
    });
    group.finish();
}

fn schedule(c: &mut Criterion) {
    let mut group = c.benchmark_group("10000 values");
    group.throughput(Throughput::Elements(ITERATIONS));
    // This event is far into a run: a schedule whose cycles last 2 events has gone through a million cycles, each
    // different.
    let late = 2_000_000;
    let changing =
        || CosineAnnealing::new(1., 0., 2).start_value_mult(0.999_999).end_value_mult(1.000_001);
    let warm = CosineAnnealing::new(1., 0., 500).warmup(0., 100).expect("100 events");
    let cases: [(&str, AnySchedule, u64); 19] = [
        ("LinearCyclical", LinearCyclical::new(1., 0., 500).into(), 0),
        ("CosineAnnealing", CosineAnnealing::new(1., 0., 500).into(), 0),
        ("CosineAnnealing, cycles that differ, from the start", changing().into(), 0),
        ("CosineAnnealing, cycles that differ, after 1,000,000 of them", changing().into(), late),
        ("PiecewiseLinear", PiecewiseLinear::new((0..100).map(|i| (i * 100, i as f64))).into(), 0),
        ("Concat of warm-up and CosineAnnealing", warm, late),
        ("StepLR", StepLR::new(1., 100).gamma(0.9999).into(), late),
        ("MultiStepLR", MultiStepLR::new(1., [30, 80, 3_000_000]).into(), late),
        ("ConstantLR", ConstantLR::new(1.).into(), late),
        ("LinearLR", LinearLR::new(1.).total_iters(10_000_000).into(), late),
        ("ExponentialLR", ExponentialLR::new(1., 0.999_999).into(), late),
        ("PolynomialLR", PolynomialLR::new(1.).total_iters(1_000_000_000).power(0.9).into(), late),
        ("CosineAnnealingLR", CosineAnnealingLR::new(1., 5000).into(), late),
        ("CosineAnnealingWarmRestarts", CosineAnnealingWarmRestarts::new(1., 500).into(), late),
        (
            "CyclicLR",
            CyclicLR::new(0., 1.).mode(CyclicMode::ExpRange).gamma(0.999_999).into(),
            late,
        ),
        ("OneCycleLR", OneCycleLR::new(1., 1_000_000_000).into(), late),
        ("InverseSqrt", InverseSqrt::new(1., 4000).into(), late),
        ("Noam", Noam::new(512, 4000).into(), late),
        (
            "WarmupStableDecay",
            WarmupStableDecay::new(1., 10, 10, 1 << 40).shape(Decay::Cosine).into(),
            late,
        ),
    ];
    for (name, schedule, first) in cases {
        schedule.at(first);
        let mut next = first;
        group.bench_function(name, |b| {
            b.iter(|| {
                let sum: f64 = (next..next + ITERATIONS).map(|event| schedule.at(event)).sum();
                if first > 0 {
                    next += ITERATIONS;
                }
                sum
            });
        });
    }
    group.finish();
}

fn knob(c: &mut Criterion) {
    let optimizer = optimizer();
    let knob = optimizer.group("fc").and_then(|group| group.knob("lr")).expect("lr");
    c.bench_function("one write of lr through the bridge", |b| b.iter(|| knob.set(black_box(0.1))));
    optimizer
        .with_tch(|tch| {
            c.bench_function("one write of lr through tch", |b| {
                b.iter(|| tch.set_lr_group(1, black_box(0.1)));
            });
        })
        .expect("not lent yet");
}

criterion_group!(benches, engine, schedule, knob);
criterion_main!(benches);
