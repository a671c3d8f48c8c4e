//! Tests of the storages of f16 and bf16 parameters, with each optimizer.

use super::*;
use crate::optim::{LowPrecision, StoreSnapshot};

const STORAGES: [LowPrecision; 3] = [
    LowPrecision::MasterWeights,
    LowPrecision::KahanSum,
    LowPrecision::StochasticRounding { seed: 7 },
];
const KINDS: [Kind; 2] = [Kind::BFloat16, Kind::Half];

/// Each optimizer that can have a storage of low precision.
fn each_with(storage: impl Into<Option<LowPrecision>>) -> Vec<(Build, GroupOptions)> {
    let storage = storage.into();
    let named = |(build, _): &(Build, GroupOptions)| {
        build(&VarStore::new(Device::Cpu), GroupOptions::new()).name()
    };
    let all = all().into_iter().filter(|each| named(each) != "SparseAdam");
    all.map(|(build, options)| (build, options.low_precision(storage))).collect()
}

/// A run in f32 with the values of `low`.
fn in_single_precision(each: &(Build, GroupOptions), low: &Run, mode: Mode) -> Run {
    let run = Run::new(&(each.0, each.1.clone().low_precision(None)), Float).mode(mode);
    for (name, mut p) in run.vs.variables() {
        tch::no_grad(|| p.copy_(&low.vs.variables()[&name]));
    }
    run
}

/// Steps both with the same gradients.
fn step_both(low: &Run, single: &Run, step: usize) {
    low.gradients(step, 1.);
    for (name, p) in single.vs.variables() {
        let gradient = low.vs.variables()[&name].grad().to_kind(Float);
        set_gradient(&p, Some(&gradient)).unwrap();
    }
    low.optimizer.step().unwrap();
    single.optimizer.step().unwrap();
}

/// The tensor of this name in the state of a parameter.
fn state_of(run: &Run, parameter: &str, name: &str) -> Tensor {
    let state = run.optimizer.state(parameter).unwrap();
    state.into_iter().find(|(own, _)| *own == name).expect(name).1
}

#[test]
fn master_weights_are_a_training_in_f32() {
    for kind in KINDS {
        for each in each_with(LowPrecision::MasterWeights) {
            for mode in [Mode::Fused, Mode::Loop] {
                let low = Run::new(&each, kind).mode(mode);
                let single = in_single_precision(&each, &low, mode);
                for step in 0..10 {
                    step_both(&low, &single, step);
                }
                for name in ["a", "b"] {
                    let (ours, theirs) = (&low.vs.variables()[name], &single.vs.variables()[name]);
                    let what = format!("{} {mode:?} '{name}'", low.what());
                    assert_eq!(state_of(&low, name, "master"), theirs.detach(), "{what}");
                    assert_eq!(ours.detach(), theirs.detach().to_kind(kind), "{what}");
                    let state = low.optimizer.state(name).unwrap();
                    let of_single = single.optimizer.state(name).unwrap();
                    assert_eq!(state.len(), of_single.len() + 1, "{what}");
                    for ((key, ours), (_, theirs)) in state.iter().zip(&of_single) {
                        assert_eq!((key, ours), (key, theirs), "{what}");
                    }
                }
            }
        }
    }
}

/// Compensation holds what rounding took, so both together are near the value of f32; the parameter alone is not.
#[test]
fn kahan_sums_are_near_a_training_in_f32() {
    for (kind, bound) in [(Kind::BFloat16, 1e-4), (Kind::Half, 2e-6)] {
        for each in each_with(LowPrecision::KahanSum) {
            for mode in [Mode::Fused, Mode::Loop] {
                let low = Run::new(&each, kind).mode(mode);
                let single = in_single_precision(&each, &low, mode);
                for step in 0..10 {
                    step_both(&low, &single, step);
                }
                for name in ["a", "b"] {
                    let compensation = state_of(&low, name, "compensation").to_kind(Float);
                    let value = low.vs.variables()[name].detach().to_kind(Float) + compensation;
                    assert!(bool::try_from(value.isfinite().all()).unwrap());
                    let difference =
                        difference(&[value], &[single.vs.variables()[name].detach().copy()]);
                    assert!(difference <= bound, "{} {mode:?}: {difference:e}", low.what());
                }
            }
        }
    }
}

/// A store with one parameter of many equal elements, and SGD, whose products are exact in f32 here.
fn constant(kind: Kind, value: f64, count: i64, storage: LowPrecision) -> (Tensor, Optimizer) {
    let mut vs = VarStore::new(Device::Cpu);
    vs.set_kind(kind);
    let p = vs.root().var("p", &[count], nn::Init::Const(value));
    let optimizer = Optimizer::sgd(&vs).lr(1. / 128.).low_precision(storage).build().unwrap();
    (p, optimizer)
}

fn step_by(p: &Tensor, optimizer: &Optimizer, gradient: &Tensor) {
    set_gradient(p, Some(&gradient.to_kind(p.kind()))).unwrap();
    optimizer.step().unwrap();
}

#[test]
fn kahan_sums_follow_the_formula() {
    for kind in KINDS {
        for fused in [true, false] {
            let (p, optimizer) = constant(kind, 1., 1000, LowPrecision::KahanSum);
            optimizer.set_fused(fused).unwrap();
            let (mut value, mut lost) = (p.detach().copy(), p.detach().zeros_like());
            for step in 0..20 {
                let gradient = values(&[1000], f64::from(step), kind);
                step_by(&p, &optimizer, &gradient);
                let exact = value.to_kind(Float) + lost.to_kind(Float)
                    - gradient.to_kind(Float) * (1. / 128.);
                value = exact.to_kind(kind);
                lost = (exact - value.to_kind(Float)).to_kind(kind);
                assert_eq!(p.detach(), value, "{kind:?} fused {fused} step {step}");
                assert_eq!(optimizer.state("p").unwrap()[0].1, lost, "{kind:?} step {step}");
            }
        }
    }
}

/// The generator is the optimizer's own, so the bound cannot be missed by luck: six standard deviations.
#[test]
fn stochastic_rounding_has_the_value_as_its_mean() {
    const COUNT: i64 = 1 << 16;
    let seed = LowPrecision::StochasticRounding { seed: 3 };
    for (kind, start, steps) in
        // The distance to the number below, for a number of normal and of subnormal size.
        [
            (Kind::BFloat16, 1., 2f64.powi(-8)),
            (Kind::Half, 1., 2f64.powi(-11)),
            (Kind::Half, 2f64.powi(-16), 2f64.powi(-24)),
        ]
    {
        for share in [1. / 16., 0.25, 0.5, 0.875] {
            let (p, optimizer) = constant(kind, start, COUNT, seed);
            let gradient = Tensor::full([COUNT], share * steps * 128., (Float, Device::Cpu));
            assert_eq!(gradient.to_kind(kind).to_kind(Float), gradient, "exact in {kind:?}");
            step_by(&p, &optimizer, &gradient);
            let p = p.detach().to_kind(Double);
            let below = p.eq(start - steps).sum(Kind::Int64).int64_value(&[]);
            assert_eq!(p.eq(start).sum(Kind::Int64).int64_value(&[]), COUNT - below);
            let deviation = (COUNT as f64 * share * (1. - share)).sqrt();
            let off = (below as f64 - COUNT as f64 * share).abs();
            assert!(off <= 6. * deviation, "{kind:?} {share}: {off} of {deviation}");
        }
    }
}

#[test]
fn small_steps_add_up() {
    // Steps of a sixteenth and an eighth of the distance to the next number; the compensation of the latter is subnormal.
    for (kind, start, step) in
        [(Kind::BFloat16, 1., 2f64.powi(-12)), (Kind::Half, 2f64.powi(-7), 2f64.powi(-21))]
    {
        for storage in STORAGES {
            let (p, optimizer) = constant(kind, start, 4096, storage);
            let gradient = Tensor::full([4096], 128. * step, (Float, Device::Cpu));
            for _ in 0..1024 {
                step_by(&p, &optimizer, &gradient);
            }
            let mean = p.detach().to_kind(Double).mean(Double).double_value(&[]);
            let random = matches!(storage, LowPrecision::StochasticRounding { .. });
            let bound = if random { 0.01 * start } else { 0. };
            assert!((mean - (start - 1024. * step)).abs() <= bound, "{kind:?} {storage:?}: {mean}");
        }
    }
}

/// A value beyond f16's largest is infinite, and stays it: the next step makes no NaN of it.
#[test]
fn an_overflow_is_no_nan() {
    for storage in STORAGES {
        for fused in [true, false] {
            let (p, optimizer) = constant(Kind::Half, 65504., 40, storage);
            optimizer.set_fused(fused).unwrap();
            for gradient in [-16384., 0.] {
                step_by(&p, &optimizer, &Tensor::full([40], gradient, (Float, Device::Cpu)));
                let infinite = Tensor::full([40], f64::INFINITY, (Kind::Half, Device::Cpu));
                assert_eq!(p.detach(), infinite, "{storage:?} {fused} {gradient}");
            }
            if storage == LowPrecision::KahanSum {
                let compensation = &optimizer.state("p").unwrap()[0].1;
                assert_eq!(compensation, &compensation.zeros_like());
            }
        }
    }
}

/// The compensation is of the type from before, and counts no more.
#[test]
fn a_store_may_change_its_type() {
    for storage in STORAGES {
        for fused in [true, false] {
            let mut vs = VarStore::new(Device::Cpu);
            vs.set_kind(Kind::BFloat16);
            let p = vs.root().ones("p", &[8]);
            let optimizer = Optimizer::adamw(&vs).low_precision(storage).build().unwrap();
            optimizer.set_fused(fused).unwrap();
            for kind in [Kind::BFloat16, Kind::Half, Kind::BFloat16] {
                if kind != p.kind() {
                    vs.set_kind(kind);
                }
                for _ in 0..2 {
                    step_by(&p, &optimizer, &Tensor::full([8], 0.5, (Float, Device::Cpu)));
                }
                if storage == LowPrecision::KahanSum {
                    let state = optimizer.state("p").unwrap();
                    assert_eq!(state.last().unwrap().1.kind(), kind, "{fused}");
                }
            }
        }
    }
}

/// The steps that `with_tch` lends are ours; a state of another type comes from elsewhere.
#[test]
fn moments_of_another_type_are_refused() {
    for storage in STORAGES {
        for fused in [true, false] {
            let mut vs = VarStore::new(Device::Cpu);
            vs.set_kind(Kind::BFloat16);
            let p = vs.root().ones("p", &[8]);
            let optimizer = Optimizer::adamw(&vs).low_precision(storage).build().unwrap();
            optimizer.set_fused(fused).unwrap();
            set_gradient(&p, Some(&p.detach().ones_like())).unwrap();
            optimizer.with_tch(|tch| tch.step()).unwrap();
            optimizer.step().unwrap();
            let (_, mut moment) = optimizer.state("p").unwrap().swap_remove(1);
            assert_eq!(moment.kind(), Float);
            moment.set_data(&moment.to_kind(Kind::BFloat16));
            let before = p.detach().copy();
            let error = optimizer.step().unwrap_err().to_string();
            let says = ["'p'", "not f32", "anew"];
            assert!(says.iter().all(|part| error.contains(part)), "{error}");
            assert_eq!(p.detach(), before);
        }
    }
}

/// Without a storage a widened gradient is rounded to the parameter's type, and so is what the optimizer keeps of it.
#[test]
fn widened_gradients_count_without_a_storage() {
    for each in each_with(None) {
        for mode in [Mode::Fused, Mode::Loop, Mode::Kernels] {
            let wide = Run::new(&each, Kind::BFloat16).mode(mode);
            let plain = Run::new(&each, Kind::BFloat16).mode(Mode::Loop);
            for step in 0..3 {
                wide.gradients(step, 1.);
                wide.optimizer.gradients().unwrap().widen().unwrap();
                wide.optimizer.step().unwrap();
                assert_eq!(wide.vs.variables()["a"].grad().kind(), Float);
                plain.steps(step..step + 1);
            }
            assert_eq!(wide.all(), plain.all(), "{} {mode:?}", wide.what());
            let loaded = Run::new(&each, Kind::BFloat16);
            let saved = wide.optimizer.state_dict().unwrap();
            loaded.optimizer.clone().load_state_dict(saved).unwrap();
        }
    }
}

/// Each element has its own random number and its own place in what is kept, in any block and on any thread.
#[test]
fn large_parameters_are_stored_alike_by_any_number_of_threads() {
    for kind in KINDS {
        for storage in STORAGES {
            let run = |mode, threads| {
                let mut vs = VarStore::new(Device::Cpu);
                vs.set_kind(kind);
                let _ = vs.root().add("flat", values(&[140_001], 1., kind), true);
                let _ = vs.root().add("turned", values(&[353, 397], 2., kind).tr(), true);
                let builder = Optimizer::sgd(&vs).lr(1. / 128.).low_precision(storage);
                let optimizer = builder.build().unwrap();
                let run = Run { vs, optimizer, kind }.mode(mode);
                tch::set_num_threads(threads);
                run.steps(0..3);
                tch::set_num_threads(1);
                run.all()
            };
            let looped = run(Mode::Loop, 1);
            for threads in [1, 2] {
                let fused = run(Mode::Fused, threads);
                assert!(fused == looped, "{kind:?} {storage:?} {threads}");
            }
        }
    }
}

/// Random numbers differ between steps, parameters and seeds.
#[test]
fn roundings_are_independent() {
    let gradient = Tensor::full([4096], 0.25, (Float, Device::Cpu));
    let rounded = |seed: u64, steps: usize| {
        let mut vs = VarStore::new(Device::Cpu);
        vs.set_kind(Kind::BFloat16);
        let [p, q] = ["p", "q"].map(|name| vs.root().ones(name, &[4096]));
        let storage = LowPrecision::StochasticRounding { seed };
        let optimizer = Optimizer::sgd(&vs).lr(1. / 128.).low_precision(storage).build().unwrap();
        for _ in 0..steps {
            let _ = tch::no_grad(|| [&p, &q].map(|p| p.shallow_clone().fill_(1.)));
            for p in [&p, &q] {
                set_gradient(p, Some(&gradient.to_kind(Kind::BFloat16))).unwrap();
            }
            optimizer.step().unwrap();
        }
        [p.detach().copy(), q.detach().copy()]
    };
    let [p, q] = rounded(1, 1);
    // Both halves have several blocks, which the kernel rounds one after the other.
    let halves = p.split(2048, 0);
    let same = halves[0].eq_tensor(&halves[1]).to_kind(Double).mean(Double).double_value(&[]);
    assert!((same - 0.5).abs() < 0.06, "{same}");
    let mut all = vec![p, q];
    all.extend(rounded(1, 2));
    all.extend(rounded(2, 1));
    assert_eq!(all[0], rounded(1, 1)[0]);
    for (index, one) in all.iter().enumerate() {
        for other in &all[..index] {
            // Half of all elements would agree by chance.
            let same = one.eq_tensor(other).to_kind(Double).mean(Double).double_value(&[]);
            assert!((same - 0.5).abs() < 0.06, "{same}");
        }
    }
}

/// The kernel and the loop use the same random numbers for the same elements, also where memory is in another order.
#[test]
fn fused_steps_store_what_the_loop_stores() {
    for kind in KINDS {
        for storage in STORAGES {
            let run = |mode: fn(usize) -> Mode| {
                let mut vs = VarStore::new(Device::Cpu);
                vs.set_kind(kind);
                for name in ["a", "b"] {
                    let _ = vs.root().add(name, weight(name, kind), true);
                }
                let options = GroupOptions::new().low_precision(storage);
                let optimizer = Optimizer::sgd(&vs).lr(1. / 128.).options(options).build().unwrap();
                let mut run = Run { vs, optimizer, kind };
                for step in 0..6 {
                    run = run.mode(mode(step));
                    run.steps(step..step + 1);
                }
                run.all()
            };
            let fused = run(|_| Mode::Fused);
            assert_eq!(fused, run(|_| Mode::Loop), "{storage:?} {kind:?}");
            assert_eq!(fused, run(|step| if step < 3 { Mode::Fused } else { Mode::Loop }));
            assert_eq!(fused, run(|step| if step < 3 { Mode::Kernels } else { Mode::Fused }));
        }
    }
}

/// Rules round in another order in the loop, so values differ in the last bits of f32.
#[test]
fn fused_steps_compute_what_the_loop_computes() {
    for each in each_with(LowPrecision::MasterWeights) {
        let run = |mode| {
            let run = Run::new(&each, Kind::BFloat16).mode(mode);
            run.steps(0..10);
            ["a", "b"].map(|name| state_of(&run, name, "master"))
        };
        let difference = difference(&run(Mode::Fused), &run(Mode::Loop));
        assert!(difference <= 2e-6, "{}: {difference:e}", Run::new(&each, Kind::BFloat16).what());
    }
}

#[test]
fn a_saved_state_goes_on_bit_for_bit() {
    for storage in STORAGES {
        for each in each_with(storage) {
            for mode in [Mode::Fused, Mode::Loop] {
                let whole = Run::new(&each, Kind::BFloat16).mode(mode);
                whole.steps(0..3);
                let resumed = Run::new(&each, Kind::BFloat16).mode(mode);
                let mut saved = whole.optimizer.state_dict().unwrap();
                for tensor in saved.tensors.values_mut() {
                    *tensor = tensor.copy();
                }
                for (name, mut p) in resumed.vs.variables() {
                    tch::no_grad(|| p.copy_(&whole.vs.variables()[&name]));
                }
                resumed.optimizer.clone().load_state_dict(saved).unwrap();
                for run in [&whole, &resumed] {
                    run.steps(3..7);
                }
                assert_eq!(whole.all(), resumed.all(), "{storage:?} {}", whole.what());
            }
        }
    }
}

/// Looking at the state makes the next step decide anew; without that it uses the tasks of the last one.
#[test]
fn steps_that_remember_equal_steps_that_decide() {
    for storage in STORAGES {
        for each in each_with(storage) {
            let run = |look: bool| {
                let run = Run::new(&each, Kind::Half);
                for step in 0..6 {
                    run.steps(step..step + 1);
                    if look {
                        run.optimizer.state("a").unwrap();
                    }
                }
                run.all()
            };
            assert_eq!(run(true), run(false), "{storage:?}");
        }
    }
}

#[test]
fn snapshots_go_back() {
    for storage in STORAGES {
        for each in each_with(storage) {
            let run = Run::new(&each, Kind::BFloat16);
            run.steps(0..3);
            let saved = run.optimizer.snapshot().unwrap();
            let values = StoreSnapshot::of(&run.vs.variables_).unwrap();
            run.steps(3..6);
            let first = run.all();
            run.optimizer.restore(&saved).unwrap();
            values.restore().unwrap();
            run.steps(3..6);
            assert_eq!(run.all(), first, "{storage:?} {}", run.what());
        }
    }
}

#[test]
fn skipped_and_scaled_steps() {
    for storage in STORAGES {
        for each in each_with(storage) {
            for mode in [Mode::Fused, Mode::Loop, Mode::Kernels] {
                let new = || Run::new(&each, Kind::BFloat16).mode(mode);
                let (scaled, plain) = (new(), new());
                let factor = Tensor::from_slice(&[0.125f32]);
                for step in 0..4 {
                    scaled.gradients(step, f64::INFINITY);
                    let found = Tensor::from_slice(&[1f32]);
                    scaled.optimizer.update(Some(&factor), Some(&found)).unwrap();
                    scaled.gradients(step, 8.);
                    scaled.optimizer.update(Some(&factor), Some(&(found - 1.))).unwrap();
                }
                plain.steps(0..4);
                assert_eq!(scaled.all(), plain.all(), "{storage:?} {} {mode:?}", plain.what());
            }
        }
    }
}

/// Parameters in f32 and f64 are stepped as without a storage.
#[test]
fn other_types_are_not_concerned() {
    for storage in STORAGES {
        for ((with, without), kind) in each_with(storage)
            .iter()
            .zip(&each_with(None))
            .flat_map(|both| [(both, Float), (both, Double)])
        {
            let run = |each| {
                let run = Run::new(each, kind);
                run.steps(0..4);
                run.all()
            };
            assert_eq!(run(with), run(without));
        }
    }
}

/// Values that a parameter is given count for the next step, whatever was kept of the old ones.
#[test]
fn given_values_count() {
    for kind in KINDS {
        for storage in STORAGES {
            for fused in [true, false] {
                let (mut p, optimizer) = constant(kind, 1., 8, storage);
                optimizer.set_fused(fused).unwrap();
                let gradient = Tensor::full([8], 0.03125, (Float, Device::Cpu));
                step_by(&p, &optimizer, &gradient);
                let _ = tch::no_grad(|| p.fill_(-0.015625));
                // The sum is exact in both types.
                step_by(&p, &optimizer, &Tensor::full([8], 0.5, (Float, Device::Cpu)));
                let expected = Tensor::full([8], -0.015625 - 0.5 / 128., (kind, Device::Cpu));
                assert_eq!(p.detach(), expected, "{kind:?} {storage:?} {fused}");
            }
        }
    }
}

#[test]
fn what_cannot_be_is_refused() {
    let mut vs = VarStore::new(Device::Cpu);
    vs.set_kind(Kind::BFloat16);
    let table = vs.root().ones("table", &[5, 2]);
    for storage in STORAGES {
        for build in [
            Optimizer::lbfgs(&vs).low_precision(storage).build(),
            Optimizer::sparse_adam(&vs).low_precision(storage).build(),
        ] {
            let error = build.unwrap_err().to_string();
            assert!(error.contains("low_precision(None)"), "{error}");
        }
        for optimizer in [
            Optimizer::sgd(&vs).low_precision(storage).build().unwrap(),
            Optimizer::adagrad(&vs).low_precision(storage).build().unwrap(),
        ] {
            let rows = Tensor::embedding(&table, &Tensor::from_slice(&[1i64, 3]), -1, false, true);
            optimizer.zero_grad().unwrap();
            rows.sum(Kind::BFloat16).backward();
            let before = table.detach().copy();
            let error = optimizer.step().unwrap_err().to_string();
            assert!(error.contains("'table'") && error.contains("dense"), "{error}");
            assert_eq!(table.detach(), before);
            assert!(optimizer.state("table").unwrap().is_empty());
        }
    }
    // A group may go without.
    let other = GroupOptions::sparse_adam().low_precision(None);
    Optimizer::muon(&vs)
        .low_precision(LowPrecision::KahanSum)
        .group("table", |_| true, other)
        .build()
        .unwrap();
}

#[test]
fn states_of_other_storages_do_not_fit() {
    let each = |storage: Option<LowPrecision>| {
        let adamw: Build = |vs, options| Optimizer::adamw(vs).options(options).build().unwrap();
        let run = Run::new(&(adamw, GroupOptions::new().low_precision(storage)), Kind::BFloat16);
        run.steps(0..1);
        run
    };
    let all = STORAGES.map(Some).into_iter().chain([None]);
    for (from, to) in all.clone().flat_map(|from| all.clone().map(move |to| (from, to))) {
        let loaded = each(to);
        let before = loaded.all();
        let result =
            loaded.optimizer.clone().load_state_dict(each(from).optimizer.state_dict().unwrap());
        assert_eq!(result.is_ok(), from == to, "{from:?} {to:?} {result:?}");
        assert_eq!(loaded.all(), before);
    }
}

/// Schedule-Free optimizers have other values in evaluation, and go back bit for bit.
#[test]
fn values_for_evaluation_are_of_the_values_in_f32() {
    let builds: [Build; 2] = [
        |vs, options| Optimizer::sgd_schedule_free(vs).options(options).build().unwrap(),
        |vs, options| Optimizer::adamw_schedule_free(vs).options(options).build().unwrap(),
    ];
    for build in builds {
        let each = (build, GroupOptions::new().lr(0.1).low_precision(LowPrecision::MasterWeights));
        let low = Run::new(&each, Kind::BFloat16);
        let single = in_single_precision(&each, &low, Mode::Fused);
        for step in 0..4 {
            step_both(&low, &single, step);
        }
        low.optimizer.eval().unwrap();
        single.optimizer.eval().unwrap();
        for name in ["a", "b"] {
            let rounded = single.vs.variables()[name].detach().to_kind(Kind::BFloat16);
            assert_eq!(low.vs.variables()[name].detach(), rounded);
        }
        for storage in STORAGES {
            let run =
                Run::new(&(build, GroupOptions::new().low_precision(storage)), Kind::BFloat16);
            let straight =
                Run::new(&(build, GroupOptions::new().low_precision(storage)), Kind::BFloat16);
            for step in 0..4 {
                run.steps(step..step + 1);
                straight.steps(step..step + 1);
                let before = run.all();
                run.optimizer.eval().unwrap();
                run.optimizer.train().unwrap();
                assert_eq!(run.all(), before, "{storage:?}");
            }
            assert_eq!(run.all(), straight.all(), "{storage:?}");
            // Values that are given in evaluation count.
            run.optimizer.eval().unwrap();
            tch::no_grad(|| run.vs.variables().into_values().for_each(|mut p| drop(p.fill_(2.))));
            run.optimizer.train().unwrap();
            run.steps(4..5);
            assert_ne!(run.vs.variables()["a"].detach(), straight.vs.variables()["a"].detach());
        }
    }
}
