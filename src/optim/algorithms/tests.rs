//! Tests of each optimizer: exact resume, knobs, `maximize`, late parameters, skipped steps, refusals.

use tch::nn::{self, VarStore};
use tch::{Device, Kind, Tensor};

use super::super::{GroupOptions, Optimizer};
use crate::bridge::{Mode, set_gradient};
use crate::state::Stateful;

use Kind::{Double, Float};

mod low_precision;

pub(super) type Build = fn(&VarStore, GroupOptions) -> Optimizer;

/// Each optimizer with options that use all of its state, and what they are.
pub(super) fn all() -> Vec<(Build, GroupOptions)> {
    let own = GroupOptions::new;
    macro_rules! built {
        ($($method:ident: $options:expr,)*) => {
            vec![$((
                (|vs, options| Optimizer::$method(vs).options(options).build().unwrap()) as Build,
                $options,
            )),*]
        };
    }
    built! {
        sgd: own().momentum(0.9).dampening(0.1).weight_decay(0.1),
        adam: own().amsgrad(true).weight_decay(0.1),
        adamw: own().amsgrad(true),
        rms_prop: own().momentum(0.9).centered(true).weight_decay(0.1),
        adagrad: own().lr_decay(0.1).weight_decay(0.1).initial_accumulator_value(0.5),
        nadam: own().weight_decay(0.1).momentum_decay(0.1),
        nadam: own().weight_decay(0.1).decoupled_weight_decay(true),
        radam: own().betas(0.8, 0.9).weight_decay(0.1),
        radam: own().betas(0.8, 0.9).weight_decay(0.1).decoupled_weight_decay(true),
        adamax: own().weight_decay(0.1),
        adadelta: own().weight_decay(0.1),
        asgd: own().lambd(0.01).t0(3.).weight_decay(0.1),
        rprop: own().etas(0.4, 1.3).step_sizes(1e-3, 0.1),
        lion: own().betas(0.8, 0.9).weight_decay(0.1),
        adafactor: own().weight_decay(0.1).d(2.).eps1(1e-10),
        muon: own().ns_steps(3).match_rms_adamw(true),
        sparse_adam: own().betas(0.8, 0.9),
        sgd_schedule_free: own().lr(0.1).warmup_steps(4).r(0.5).weight_decay(0.1),
        adamw_schedule_free: own().lr(0.01).betas(0.8, 0.9).warmup_steps(3).weight_decay(0.1),
        ademamix: own().beta3(0.99).alpha(5.).beta3_warmup(8).alpha_warmup(6).weight_decay(0.1),
    }
}

pub(super) fn values(shape: &[i64], seed: f64, kind: Kind) -> Tensor {
    let ramp = Tensor::arange(shape.iter().product::<i64>(), (Double, Device::Cpu));
    ((ramp * 12.9898 + seed * 78.233).sin() * 43758.5453).frac().reshape(shape).to_kind(kind)
}

struct Run {
    vs: VarStore,
    optimizer: Optimizer,
    kind: Kind,
}

/// Matrices, because Muon steps nothing else, and one is not contiguous.
fn weight(name: &str, kind: Kind) -> Tensor {
    match name {
        "a" => values(&[4, 3], 1., kind),
        "b" => values(&[3, 5], 2., kind).tr(),
        _ => values(&[2, 6], 3., kind),
    }
}

impl Run {
    fn new((build, options): &(Build, GroupOptions), kind: Kind) -> Self {
        let mut vs = VarStore::new(Device::Cpu);
        vs.set_kind(kind);
        for name in ["a", "b"] {
            let _ = vs.root().add(name, weight(name, kind), true);
        }
        let optimizer = build(&vs, options.clone());
        Self { vs, optimizer, kind }
    }

    fn mode(self, mode: Mode) -> Self {
        let set = |native: &mut crate::bridge::Native| {
            native.mode = mode;
            Ok(())
        };
        self.optimizer.native(set).unwrap();
        self
    }

    /// Gives all parameters gradients that depend on the number of the step, times `factor`.
    fn gradients(&self, step: usize, factor: f64) {
        self.optimizer.zero_grad().unwrap();
        for (name, p) in self.vs.variables() {
            let seed = step as f64 * 0.37 + f64::from(name.as_bytes()[0]);
            if self.optimizer.name() == "SparseAdam" {
                // A row twice, and rows that are left out.
                let rows = Tensor::from_slice(&[1i64, 0, 1]);
                let found = Tensor::embedding(&p, &rows, -1, false, true);
                let weights = values(&found.size(), seed, self.kind) * factor;
                (found * weights).sum(self.kind).backward();
                continue;
            }
            let gradient = p.detach().empty_like();
            gradient.shallow_clone().copy_(&(values(&p.size(), seed, self.kind) * factor));
            set_gradient(&p, Some(&gradient)).unwrap();
        }
    }

    fn steps(&self, steps: std::ops::Range<usize>) {
        for step in steps {
            self.gradients(step, 1.);
            self.optimizer.step().unwrap();
        }
    }

    /// Copies of all parameters and state tensors.
    fn all(&self) -> Vec<Tensor> {
        let mut names: Vec<_> = self.vs.variables().into_iter().collect();
        names.sort_by(|a, b| a.0.cmp(&b.0));
        let mut all = vec![];
        for (name, p) in names {
            all.push(p.detach().copy());
            all.extend(self.optimizer.state(&name).unwrap().into_iter().map(|(_, t)| t.copy()));
        }
        all
    }

    fn what(&self) -> String {
        format!("{:?} in {:?}", self.optimizer, self.kind)
    }
}

fn difference(a: &[Tensor], b: &[Tensor]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).fold(0., |most: f64, (a, b)| {
        let (a, b) = (a.to_kind(Double), b.to_kind(Double));
        most.max(((&a - &b).abs() / b.abs().clamp_min(1.)).max().double_value(&[]))
    })
}

#[test]
fn fused_steps_agree_with_the_loop() {
    for (kind, bound) in [(Double, 1e-12), (Float, 2e-6)] {
        for each in all() {
            let run = |mode: fn(usize) -> Mode| {
                let mut run = Run::new(&each, kind);
                for step in 0..12 {
                    run = run.mode(mode(step));
                    run.steps(step..step + 1);
                }
                run
            };
            let looped = run(|_| Mode::Loop);
            for mode in [
                (|_| Mode::Fused) as fn(usize) -> Mode,
                |_| Mode::Kernels,
                |step| if step < 5 { Mode::Fused } else { Mode::Loop },
                |step| if step < 5 { Mode::Loop } else { Mode::Fused },
            ] {
                let difference = difference(&run(mode).all(), &looped.all());
                assert!(difference <= bound, "{}: {difference:e}", looped.what());
            }
        }
    }
}

/// The kernels compute in f32 and round once; the loop rounds each operation.
#[test]
fn half_precision_is_near_single_precision() {
    for each in all() {
        let run = |kind| {
            let run = Run::new(&each, kind);
            // eps is 0 in f16, and rules that look at signs make large steps of small differences.
            let name = run.optimizer.name();
            if matches!(name, "Rprop" | "Lion" | "Adadelta" | "Muon" | "SparseAdam" | "Adafactor") {
                return vec![];
            }
            if let Ok(eps) = run.optimizer.knob("eps") {
                eps.set(1e-2).unwrap();
            }
            run.steps(0..8);
            run.all()
        };
        for (kind, bound) in [(Kind::BFloat16, 0.1), (Kind::Half, 0.02)] {
            let difference = difference(&run(kind), &run(Float));
            assert!(
                difference <= bound,
                "{} in {kind:?}: {difference:e}",
                Run::new(&each, kind).what()
            );
        }
    }
}

#[test]
fn a_saved_state_goes_on_bit_for_bit() {
    for each in all() {
        for mode in [Mode::Fused, Mode::Loop] {
            let whole = Run::new(&each, Double).mode(mode);
            whole.steps(0..5);
            let lr = whole.optimizer.knob("lr").unwrap();
            lr.set(0.02).unwrap();
            let resumed = Run::new(&each, Double).mode(mode);
            let saved = whole.optimizer.state_dict().unwrap();
            // A file holds copies; the tensors of a state dict are the optimizer's own.
            let mut copied = saved;
            for tensor in copied.tensors.values_mut() {
                *tensor = tensor.copy();
            }
            tch::no_grad(|| {
                for (name, mut p) in resumed.vs.variables() {
                    p.copy_(&whole.vs.variables()[&name]);
                }
            });
            resumed.optimizer.clone().load_state_dict(copied).unwrap();
            for run in [&whole, &resumed] {
                run.steps(5..11);
            }
            assert_eq!(resumed.optimizer.knob("lr").unwrap().get().unwrap(), 0.02);
            assert_eq!(whole.all(), resumed.all(), "{}", whole.what());
        }
    }
}

#[test]
fn a_state_that_does_not_fit_is_refused() {
    for each in all() {
        let run = Run::new(&each, Double);
        run.steps(0..2);
        let before = run.all();
        let names: Vec<_> =
            run.optimizer.state("a").unwrap().into_iter().map(|(name, _)| name).collect();
        for name in names.into_iter().filter(|name| *name != "step") {
            let mut saved = run.optimizer.state_dict().unwrap();
            let tensor = saved.tensors.get_mut(&format!("a/{name}")).unwrap();
            *tensor = Tensor::zeros([7], (Double, Device::Cpu));
            let error = run.optimizer.clone().load_state_dict(saved).unwrap_err().to_string();
            assert!(error.contains(&format!("'a/{name}'")), "{error}");
        }
        assert_eq!(run.all(), before);
    }
}

#[test]
fn snapshots_go_back() {
    for each in all() {
        let run = Run::new(&each, Double);
        run.steps(0..3);
        let (weights, saved) = (run.all(), run.optimizer.snapshot().unwrap());
        let parameters: Vec<_> =
            run.vs.variables().into_values().map(|p| (p.detach().copy(), p)).collect();
        run.steps(3..6);
        let first = run.all();
        run.optimizer.restore(&saved).unwrap();
        tch::no_grad(|| {
            for (value, mut p) in parameters {
                p.copy_(&value);
            }
        });
        assert_eq!(run.all(), weights);
        run.steps(3..6);
        assert_eq!(run.all(), first, "{}", run.what());
    }
}

#[test]
fn maximize_is_a_step_of_negated_gradients() {
    for each in all() {
        for mode in [Mode::Fused, Mode::Loop, Mode::Kernels] {
            let (up, down) =
                (Run::new(&each, Double).mode(mode), Run::new(&each, Double).mode(mode));
            up.optimizer.knob("maximize").unwrap().set(1.).unwrap();
            assert!(up.optimizer.group_at(0).unwrap().maximize().unwrap());
            for step in 0..5 {
                up.gradients(step, -1.);
                down.gradients(step, 1.);
                let given = up.vs.variables()["a"].grad().to_dense(None::<Kind>, false).copy();
                for run in [&up, &down] {
                    run.optimizer.step().unwrap();
                }
                let kept = up.vs.variables()["a"].grad().to_dense(None::<Kind>, false);
                assert_eq!(kept, given, "the step changed a gradient");
            }
            assert_eq!(up.all(), down.all(), "{} {mode:?}", up.what());
            // Tasks of the last step are not used again when this changes.
            up.optimizer.knob("maximize").unwrap().set(0.).unwrap();
            for run in [&up, &down] {
                run.steps(5..7);
            }
            assert_eq!(up.all(), down.all(), "{} {mode:?}", up.what());
        }
    }
}

/// Groups that tch makes later have the options of the builder.
#[test]
fn options_reach_groups_that_are_made_later() {
    for (build, _) in all() {
        let vs = VarStore::new(Device::Cpu);
        let _ = vs.root().zeros("a", &[2, 2]);
        let optimizer = build(&vs, GroupOptions::new().maximize(true));
        let _ = vs.root().set_group(2).zeros("late", &[2, 2]);
        for group in optimizer.groups().unwrap() {
            assert!(group.maximize().unwrap(), "{optimizer:?}");
        }
        assert_eq!(optimizer.groups().unwrap().len(), 3);
    }
}

#[test]
fn parameters_may_be_added_later() {
    for each in all() {
        let run = |mode| {
            let run = Run::new(&each, Double).mode(mode);
            run.steps(0..3);
            let _ = run.vs.root().add("c", weight("c", Double), true);
            run.steps(3..6);
            run
        };
        let (fused, looped) = (run(Mode::Fused), run(Mode::Loop));
        assert!(!fused.optimizer.state("c").unwrap().is_empty(), "{}", fused.what());
        let difference = difference(&fused.all(), &looped.all());
        assert!(difference <= 1e-12, "{}: {difference:e}", fused.what());
    }
}

#[test]
fn frozen_groups_keep_parameters_and_state() {
    for each in all() {
        let run = Run::new(&each, Double);
        run.steps(0..2);
        let before = run.all();
        let group = run.optimizer.group_at(0).unwrap();
        group.freeze().unwrap();
        run.optimizer.step().unwrap();
        assert_eq!(run.all(), before, "{}", run.what());
        group.unfreeze().unwrap();
        run.steps(2..3);
        assert_ne!(run.all(), before, "{}", run.what());
    }
}

#[test]
fn skipped_and_scaled_steps() {
    for each in all() {
        for mode in [Mode::Fused, Mode::Loop, Mode::Kernels] {
            let (scaled, plain) =
                (Run::new(&each, Double).mode(mode), Run::new(&each, Double).mode(mode));
            let factor = Tensor::from_slice(&[0.125f64]);
            for step in 0..5 {
                scaled.gradients(step, f64::INFINITY);
                let found = Tensor::from_slice(&[1f32]);
                scaled.optimizer.update(Some(&factor), Some(&found)).unwrap();
                scaled.gradients(step, 8.);
                scaled.optimizer.update(Some(&factor), Some(&(found - 1.))).unwrap();
            }
            plain.steps(0..5);
            assert_eq!(scaled.all(), plain.all(), "{} {mode:?}", plain.what());
        }
    }
}

#[test]
fn every_hyper_parameter_is_a_knob_and_reaches_the_step() {
    for each in all() {
        let run = Run::new(&each, Double);
        let other = VarStore::new(Device::Cpu);
        let group = run.optimizer.group_at(0).unwrap();
        let all = run.optimizer.shared.algorithm.description().hypers;
        for (hyper, default) in all.iter().filter(|(hyper, _)| !hyper.is_counted()) {
            let knob = run.optimizer.knob(hyper.name()).unwrap();
            let value = if *default == 0. { 1. } else { default * 0.99 };
            let value = if hyper.name() == "ns_steps" { 7. } else { value };
            let value = if matches!(hyper.name(), "d" | "etaplus") { 1.5 } else { value };
            let value = if hyper.name() == "nesterov" { 1. } else { value };
            knob.set(value).unwrap();
            assert_eq!(group.get(hyper.name()).unwrap(), value, "{hyper}");
            assert!(knob.set(f64::NAN).is_err(), "{hyper}");
            assert_eq!(knob.get().unwrap(), value, "{hyper}");
        }
        // The defaults are PyTorch's.
        let _ = other.root().zeros("a", &[2, 2]);
        let fresh = each.0(&other, GroupOptions::new());
        for (hyper, default) in fresh.shared.algorithm.description().hypers {
            let value = fresh.group_at(0).unwrap().get(hyper.name()).unwrap();
            assert_eq!(value, *default, "{hyper}");
        }
    }
}

/// tch's own setters do nothing for optimizers that tch does not know.
#[test]
fn methods_of_tch_reach_every_optimizer() {
    for each in all() {
        let (lent, own) = (Run::new(&each, Double), Run::new(&each, Double));
        let algorithm = own.optimizer.shared.algorithm;
        let decays = algorithm.hypers().any(|hyper| hyper.name() == "weight_decay");
        let set = |run: &Run, name: &str, value: f64| run.optimizer.knob(name).unwrap().set(value);
        lent.optimizer
            .with_tch(|tch| {
                tch.set_lr(0.5);
                tch.set_lr_group(0, 0.03);
                if decays {
                    tch.set_weight_decay(0.2);
                    tch.set_weight_decay_group(0, 0.02);
                }
                if algorithm.momentum().is_some() {
                    tch.set_momentum(0.4);
                    tch.set_momentum_group(0, 0.7);
                }
            })
            .unwrap();
        set(&own, "lr", 0.03).unwrap();
        if decays {
            set(&own, "weight_decay", 0.02).unwrap();
        }
        if let Some(momentum) = algorithm.momentum() {
            set(&own, momentum.name(), 0.7).unwrap();
        }
        let _ = lent.vs.root().set_group(1).zeros("late", &[2, 2]);
        assert_eq!(lent.optimizer.group_at(1).unwrap().lr().unwrap(), 0.5);
        lent.gradients(0, 1.);
        own.gradients(0, 1.);
        lent.optimizer.with_tch(|tch| tch.step()).unwrap();
        own.optimizer.step().unwrap();
        assert_eq!(lent.all()[..2], own.all()[..2], "{}", own.what());
        let unknown = lent.optimizer.with_tch(|tch| tch.set_lr_group(9, 0.1));
        assert!(unknown.is_err());
    }
}

/// A parameter that cannot be stepped is named by the error, and no parameter is changed.
#[test]
fn refused_steps_change_nothing() {
    for each in all() {
        let run = Run::new(&each, Double);
        let name = run.optimizer.name();
        run.steps(0..2);
        let before = run.all();
        let refused = |what: &str| {
            let error = run.optimizer.step().unwrap_err().to_string();
            assert!(error.contains("'b'") && error.contains(what), "{name}: {error}");
            assert_eq!(run.all(), before, "{name}");
        };
        run.gradients(2, 1.);
        let b = &run.vs.variables()["b"];
        if name == "SparseAdam" {
            set_gradient(b, Some(&b.detach().ones_like())).unwrap();
            refused("dense gradients");
            continue;
        }
        if name != "SGD" {
            let found = Tensor::embedding(b, &Tensor::from_slice(&[1i64]), -1, false, true);
            set_gradient(b, None).unwrap();
            found.sum(Double).backward();
            refused("sparse gradients");
        }
    }
    let vs = VarStore::new(Device::Cpu);
    let p = vs.root().zeros("vector", &[3]);
    let muon = Optimizer::muon(&vs).build().unwrap();
    let error = muon.backward_step(&p.sum(Float)).unwrap_err().to_string();
    assert!(error.contains("'vector'") && error.contains("matrices only"), "{error}");
    for (build, _) in all().into_iter().skip(1) {
        let vs = VarStore::new(Device::Cpu);
        let value = Tensor::ones([2, 2], (Kind::ComplexDouble, Device::Cpu));
        let p = vs.root().add("complex", value, true);
        let optimizer = build(&vs, GroupOptions::new());
        set_gradient(&p, Some(&p.detach())).unwrap();
        let error = optimizer.step().unwrap_err().to_string();
        assert!(error.contains("'complex'") && error.contains("complex parameters"), "{error}");
    }
}

/// SGD is linear, so the numbers of a complex parameter are those of its two parts, as in PyTorch.
#[test]
fn sgd_steps_complex_parameters_as_their_parts() {
    let (parts, complex) = (VarStore::new(Device::Cpu), VarStore::new(Device::Cpu));
    let value = values(&[3, 2], 1., Double);
    let whole = complex.root().add("z", value.view_as_complex().copy(), true);
    let parts_of = parts.root().add("z", value, true);
    let build = |vs: &VarStore| {
        let options = GroupOptions::new().momentum(0.9).nesterov(true).weight_decay(0.1);
        Optimizer::sgd(vs).lr(0.1).options(options).build().unwrap()
    };
    let (of_complex, of_parts) = (build(&complex), build(&parts));
    for step in 0..4 {
        let gradient = values(&[3, 2], f64::from(step), Double);
        set_gradient(&whole, Some(&gradient.view_as_complex())).unwrap();
        set_gradient(&parts_of, Some(&gradient)).unwrap();
        of_complex.step().unwrap();
        of_parts.step().unwrap();
    }
    let whole = whole.detach().view_as_real().copy();
    assert!(difference(&[whole], &[parts_of.detach().copy()]) < 1e-15);
}

#[test]
fn adagrad_takes_sparse_gradients() {
    let run = |sparse: bool| {
        let mut vs = VarStore::new(Device::Cpu);
        vs.set_kind(Double);
        let table = vs.root().add("table", values(&[5, 3], 1., Double), true);
        let optimizer = Optimizer::adagrad(&vs).lr(0.1).build().unwrap();
        for step in 0..4 {
            let rows = Tensor::from_slice(&[1i64, 3, 1]);
            let found = Tensor::embedding(&table, &rows, -1, false, sparse);
            let weights = values(&found.size(), f64::from(step), Double);
            optimizer.backward_step(&(found * weights).sum(Double)).unwrap();
        }
        table.detach().copy()
    };
    assert!(difference(&[run(true)], &[run(false)]) < 1e-15);
}

/// The options of one class must not be taken for those of another.
#[test]
fn names_are_pytorchs_and_unknown_ones_are_errors() {
    let vs = VarStore::new(Device::Cpu);
    let _ = nn::linear(vs.root(), 2, 2, Default::default());
    let error = Optimizer::lion(&vs).options(GroupOptions::new().rho(0.5)).build().unwrap_err();
    let error = error.to_string();
    assert!(error.contains("rho") && error.contains("Lion") && error.contains("beta1"), "{error}");
    let refused = [
        Optimizer::adadelta(&vs).options(GroupOptions::new().rho(1.5)).build(),
        Optimizer::rprop(&vs).options(GroupOptions::new().etas(1.5, 2.)).build(),
        Optimizer::adafactor(&vs).options(GroupOptions::new().d(0.5)).build(),
        Optimizer::muon(&vs).options(GroupOptions::new().ns_steps(100)).build(),
        Optimizer::lion(&vs).lr(-1.).build(),
    ];
    for refused in refused {
        let error = refused.unwrap_err().to_string();
        assert!(error.contains("must be") && error.contains("given"), "{error}");
    }
}

/// Muon for two matrices and AdamW or another for the rest, against an optimizer of each alone.
fn mixed(vs: &VarStore, options: GroupOptions) -> Optimizer {
    Optimizer::muon(vs)
        .lr(0.02)
        .options(GroupOptions::new().ns_steps(3))
        .group("hidden", |name| name == "a" || name == "c", GroupOptions::new())
        .group("others", |name| name == "b", options)
        .build()
        .unwrap()
}

#[test]
fn groups_may_have_different_algorithms() {
    let options: [(GroupOptions, Build); 4] = [
        (GroupOptions::adamw(), |vs, _| Optimizer::adamw(vs).build().unwrap()),
        (GroupOptions::adamw().amsgrad(true), |vs, _| {
            Optimizer::adamw(vs).options(GroupOptions::new().amsgrad(true)).build().unwrap()
        }),
        (GroupOptions::nadam(), |vs, _| Optimizer::nadam(vs).build().unwrap()),
        (GroupOptions::adafactor(), |vs, _| Optimizer::adafactor(vs).build().unwrap()),
    ];
    for (others, alone) in options {
        for mode in [Mode::Fused, Mode::Loop] {
            let run = |build: Build, others: &GroupOptions| {
                Run::new(&(build, others.clone()), Double).mode(mode)
            };
            let both = run(mixed, &others);
            let muon = |vs: &VarStore, _| {
                Optimizer::muon(vs)
                    .lr(0.02)
                    .options(GroupOptions::new().ns_steps(3))
                    .build()
                    .unwrap()
            };
            let (first, second) = (run(muon, &others), run(alone, &others));
            for run in [&both, &first, &second] {
                run.steps(0..4);
            }
            let of = |run: &Run, name: &str| {
                let mut all = vec![run.vs.variables()[name].detach().copy()];
                let state = run.optimizer.state(name).unwrap().into_iter();
                all.extend(state.map(|(_, tensor)| tensor.copy()));
                all
            };
            assert_eq!(of(&both, "a"), of(&first, "a"), "{}", both.what());
            let difference = difference(&of(&both, "b"), &of(&second, "b"));
            assert!(difference < 1e-14, "{}: {difference:e}", both.what());

            // State, options and what a state does not fit.
            let resumed = run(mixed, &others);
            let mut saved = both.optimizer.state_dict().unwrap();
            for tensor in saved.tensors.values_mut() {
                *tensor = tensor.copy();
            }
            let error = first.optimizer.clone().load_state_dict(saved).unwrap_err().to_string();
            assert!(error.contains("groups are"), "{error}");
            let mut saved = both.optimizer.state_dict().unwrap();
            for tensor in saved.tensors.values_mut() {
                *tensor = tensor.copy();
            }
            tch::no_grad(|| {
                for (name, mut p) in resumed.vs.variables() {
                    p.copy_(&both.vs.variables()[&name]);
                }
            });
            resumed.optimizer.clone().load_state_dict(saved).unwrap();
            let snapshot = both.optimizer.snapshot().unwrap();
            both.optimizer.restore(&snapshot).unwrap();
            for run in [&both, &resumed] {
                run.steps(4..8);
            }
            assert_eq!(both.all(), resumed.all(), "{}", both.what());
        }
    }
}

#[test]
fn options_of_mixed_groups() {
    let run = Run::new(&(mixed, GroupOptions::adamw().lr(3e-4)), Float);
    let (hidden, others) =
        (run.optimizer.group("hidden").unwrap(), run.optimizer.group("others").unwrap());
    assert_eq!((hidden.algorithm(), others.algorithm()), ("Muon", "AdamW"));
    assert_eq!((hidden.lr().unwrap(), others.lr().unwrap()), (0.02, 3e-4));
    assert_eq!((others.betas().unwrap(), others.eps().unwrap()), ((0.9, 0.999), 1e-8));
    assert!(hidden.betas().is_err() && others.momentum().is_err());
    // A knob of all groups needs all to have it.
    run.optimizer.knob("weight_decay").unwrap().set(0.5).unwrap();
    assert_eq!((hidden.weight_decay().unwrap(), others.weight_decay().unwrap()), (0.5, 0.5));
    assert!(run.optimizer.knob("momentum").is_err() && run.optimizer.knob("beta1").is_err());
    run.optimizer.with_tch(|tch| tch.set_momentum(0.5)).unwrap();
    assert_eq!((hidden.momentum().unwrap(), others.betas().unwrap().0), (0.5, 0.5));

    let vs = VarStore::new(Device::Cpu);
    let _ = (vs.root().zeros("a", &[2, 2]), vs.root().zeros("b", &[2]));
    let error = Optimizer::adamw(&vs)
        .group("hidden", |name| name == "a", GroupOptions::muon())
        .group("others", |name| name == "b", GroupOptions::new())
        .build()
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("'hidden'") && error.contains("Muon") && error.contains("begin"),
        "{error}"
    );
    // A state of groups with other algorithms.
    let other = Run::new(&(mixed, GroupOptions::lion()), Float);
    let error = other.optimizer.clone().load_state_dict(run.optimizer.state_dict().unwrap());
    let error = error.unwrap_err().to_string();
    assert!(error.contains("'others' was stepped by AdamW, and is here by Lion"), "{error}");
}
