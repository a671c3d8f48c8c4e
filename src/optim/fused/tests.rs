//! Compares fused steps with libtorch's own loop, and with libtorch's fused kernels, which CUDA uses, on the CPU.

use tch::nn::{self, OptimizerConfig, VarStore};
use tch::{Device, Kind, Tensor};

use super::super::{GroupOptions, OptimizerSnapshot};
use super::*;
use crate::bridge::{TensorId, set_gradient};
use crate::host_syncs;

use Kind::{BFloat16, Double, Float, Half};

/// Values without a pattern, between -1 and 1.
fn values(shape: &[i64], seed: f64, kind: Kind) -> Tensor {
    let count = shape.iter().product::<i64>();
    let ramp = Tensor::arange(count, (Double, Device::Cpu)) * 12.9898 + seed * 78.233;
    (ramp.sin() * 43758.5453).frac().reshape(shape).to_kind(kind)
}

fn set_mode(optimizer: &Optimizer, mode: Mode) {
    let set = |native: &mut crate::bridge::Native| {
        native.mode = mode;
        Ok(())
    };
    optimizer.native(set).unwrap();
}

struct Net {
    vs: VarStore,
    optimizer: Optimizer,
    parameters: Vec<Tensor>,
    kind: Kind,
}

/// A parameter by its index: dense ones, one of a single element, an empty one, one with other strides, and one whose
/// memory has gaps (which only the loop can step).
fn parameter(index: usize, kind: Kind) -> Tensor {
    let seed = index as f64;
    match index {
        0 => values(&[], seed, kind),
        1 => values(&[7], seed, kind),
        2 => values(&[16, 33], seed, kind),
        3 => values(&[2, 4, 5, 3], seed, kind).permute([0, 3, 1, 2]),
        4 => values(&[0, 3], seed, kind),
        5 => values(&[6, 8], seed, kind).narrow(1, 1, 5),
        _ => values(&[1100], seed, kind),
    }
}

const FIRST: usize = 6;
const ALL: usize = 7;

impl Net {
    fn new(config: impl OptimizerConfig, options: &GroupOptions, kind: Kind) -> Self {
        let mut vs = VarStore::new(Device::Cpu);
        vs.set_kind(kind);
        let mut parameters = vec![];
        for index in 0..FIRST {
            parameters.push(vs.root().add(&format!("p{index}"), parameter(index, kind), true));
        }
        let optimizer = Optimizer::builder(config, &vs)
            .lr(0.05)
            .group("even", |name| name.ends_with(['0', '2', '4', '6']), GroupOptions::new())
            .group("odd", |name| name.ends_with(['1', '3', '5']), options.clone())
            .build()
            .unwrap();
        Self { vs, optimizer, parameters, kind }
    }

    fn mode(&self, mode: Mode) {
        set_mode(&self.optimizer, mode);
    }

    /// Makes a step. One parameter is added at step 3, and not every parameter has a gradient in every step.
    fn step(&mut self, step: usize) {
        self.gradients(step);
        self.optimizer.step().unwrap();
    }

    fn gradients(&mut self, step: usize) {
        if step == 3 {
            let late = self.vs.root().add("p6", parameter(6, self.kind), true);
            self.parameters.push(late);
        }
        self.optimizer.zero_grad().unwrap();
        for (index, parameter) in self.parameters.iter().enumerate() {
            if (step + index) % 4 == 3 {
                continue;
            }
            let seed = (step * ALL + index) as f64 * 0.37;
            let gradient = values(&parameter.size(), seed, self.kind) * 0.5;
            // In even steps the gradient of parameter 3 has other strides than the parameter.
            let gradient = match (index, step % 2) {
                (3, 0) => gradient,
                (3, _) => {
                    let same = parameter.detach().empty_like();
                    same.shallow_clone().copy_(&gradient);
                    same
                }
                _ => gradient,
            };
            set_gradient(parameter, Some(&gradient)).unwrap();
        }
    }

    /// Copies of all parameters and state tensors, as f64 vectors.
    fn all(&self) -> Vec<Tensor> {
        let mut all = vec![];
        for (index, parameter) in self.parameters.iter().enumerate() {
            all.push(parameter.detach().copy());
            let state = self.optimizer.state(&format!("p{index}")).unwrap();
            all.extend(state.into_iter().map(|(_, tensor)| tensor.copy()));
        }
        all.into_iter().map(|tensor| tensor.to_kind(Double).reshape([-1])).collect()
    }
}

/// The largest difference between two lists of tensors: relative for values above 1, otherwise absolute.
fn difference(a: &[Tensor], b: &[Tensor]) -> f64 {
    assert_eq!(a.len(), b.len());
    let pairs = a.iter().zip(b).filter(|(a, _)| a.numel() > 0);
    pairs.fold(0., |most: f64, (a, b)| {
        assert_eq!(a.size(), b.size());
        let largest = ((a - b).abs() / b.abs().clamp_min(1.)).max().double_value(&[]);
        assert!(largest.is_finite(), "{a:?} against {b:?}");
        most.max(largest)
    })
}

const STEPS: usize = 12;

fn trained(
    config: impl OptimizerConfig,
    options: &GroupOptions,
    kind: Kind,
    mode: impl Fn(usize) -> Mode,
) -> Vec<Tensor> {
    let mut net = Net::new(config, options, kind);
    for step in 0..STEPS {
        net.mode(mode(step));
        net.step(step);
    }
    net.all()
}

fn agrees(config: impl OptimizerConfig + Copy, options: GroupOptions, what: &str) {
    agrees_in(&[(Double, 1e-12), (Float, 1e-6), (BFloat16, 0.1)], config, options, what);
}

fn agrees_in(
    kinds: &[(Kind, f64)],
    config: impl OptimizerConfig + Copy,
    options: GroupOptions,
    what: &str,
) {
    for &(kind, bound) in kinds {
        // For f16 and bf16, libtorch's kernels on the CPU do not compute as those on CUDA do.
        let kernels = matches!(kind, Double | Float);
        let run = |mode: &dyn Fn(usize) -> Mode| trained(config, &options, kind, mode);
        let looped = run(&|_| Mode::Loop);
        for (name, mode) in [
            ("fused", &(|_| Mode::Fused) as &dyn Fn(usize) -> Mode),
            ("fused, then the loop", &|step| if step < 5 { Mode::Fused } else { Mode::Loop }),
            ("the loop, then fused", &|step| if step < 5 { Mode::Loop } else { Mode::Fused }),
            ("kernels", &|_| Mode::Kernels),
        ] {
            if name == "kernels" && !kernels {
                continue;
            }
            let difference = difference(&run(mode), &looped);
            // libtorch's kernels have an order of operations of their own, so they differ more.
            let bound = if name == "kernels" { bound * 20. } else { bound };
            assert!(difference <= bound, "{what} in {kind:?}, {name}: {difference:e}");
        }
    }
}

#[test]
fn sgd() {
    let own = GroupOptions::new;
    agrees(nn::sgd(0., 0., 0., false), own().lr(0.2), "plain");
    agrees(nn::sgd(0.9, 0., 0., false), own().momentum(0.), "momentum");
    agrees(nn::sgd(0.9, 0.3, 1e-2, false), own().lr(0.01).momentum(0.5), "dampening, decay");
    agrees(nn::sgd(0.9, 0., 0., true), own().weight_decay(0.1).nesterov(false), "Nesterov");
}

#[test]
fn adam() {
    let own = GroupOptions::new;
    agrees(nn::Adam::default(), own().betas(0.8, 0.9).eps(1e-4), "Adam");
    agrees(
        nn::Adam { wd: 0.1, amsgrad: true, ..Default::default() },
        own().amsgrad(false),
        "AMSGrad",
    );
}

#[test]
fn adamw() {
    let own = GroupOptions::new;
    agrees(nn::AdamW::default(), own().betas(0.8, 0.9).weight_decay(0.), "AdamW");
    agrees(nn::AdamW { wd: 0.1, amsgrad: true, ..Default::default() }, own().lr(0.1), "AMSGrad");
}

#[test]
fn rmsprop() {
    let own = GroupOptions::new;
    agrees(nn::RmsProp::default(), own().alpha(0.8), "RMSprop");
    agrees(nn::rms_prop(0.9, 1e-6, 0.1, 0.9, true), own().momentum(0.).centered(false), "all");
    agrees(nn::rms_prop(0.9, 1e-6, 0., 0.9, false), own().weight_decay(0.1), "momentum");
    agrees(nn::rms_prop(0.9, 1e-6, 0., 0., true), own().lr(0.01), "centered");
}

/// eps is large here, because in f16 the default eps is 0, and the loop would divide by it.
#[test]
fn f16() {
    let (own, half) = (GroupOptions::new, &[(Half, 0.02)]);
    agrees_in(half, nn::sgd(0.9, 0., 0.01, true), own().nesterov(false), "SGD");
    agrees_in(half, nn::Adam { eps: 1e-2, ..Default::default() }, own().weight_decay(0.1), "Adam");
    agrees_in(half, nn::AdamW { eps: 1e-2, ..Default::default() }, own(), "AdamW");
    agrees_in(half, nn::rms_prop(0.9, 1e-2, 0., 0.5, true), own().momentum(0.), "RMSprop");
}

#[test]
fn sgd_is_bit_identical_to_the_loop() {
    for kind in [Double, Float] {
        let config = nn::sgd(0.9, 0.3, 1e-2, false);
        let run = |mode| trained(config, &GroupOptions::new().lr(0.01), kind, |_| mode);
        assert_eq!(run(Mode::Fused), run(Mode::Loop));
    }
}

/// The fast paths must leave such gradients to the loop: libtorch's kernels would compute wrong values without an
/// error.
#[test]
fn other_strides_than_the_parameters_take_the_loop() {
    for config in [0.0, 0.9] {
        let run = |mode| {
            let mut vs = VarStore::new(Device::Cpu);
            vs.set_kind(Double);
            let p = vs.root().add("p", parameter(3, Double), true);
            assert!(!p.is_contiguous());
            let optimizer =
                Optimizer::builder(nn::sgd(config, 0., 0., false), &vs).build().unwrap();
            set_mode(&optimizer, mode);
            for step in 0..3 {
                let gradient = values(&p.size(), f64::from(step), Double);
                assert!(gradient.is_contiguous());
                set_gradient(&p, Some(&gradient)).unwrap();
                optimizer.step().unwrap();
            }
            p.detach().copy()
        };
        assert_eq!(run(Mode::Fused), run(Mode::Loop));
        assert_eq!(run(Mode::Kernels), run(Mode::Loop));
    }
}

#[test]
fn large_tensors_are_updated_alike_by_any_number_of_threads() {
    let run = |mode, threads| {
        let vs = VarStore::new(Device::Cpu);
        let p = vs.root().add("p", values(&[400_001], 1., Float), true);
        let q = vs.root().add("q", values(&[300], 2., Float), true);
        let optimizer = Optimizer::adamw(&vs).build().unwrap();
        set_mode(&optimizer, mode);
        tch::set_num_threads(threads);
        for step in 0..3 {
            for p in [&p, &q] {
                set_gradient(p, Some(&values(&p.size(), f64::from(step), Float))).unwrap();
            }
            let _ = optimizer.step_clipped(0.1).unwrap();
        }
        tch::set_num_threads(1);
        [p.detach().copy(), q.detach().copy()]
    };
    let alone = run(Mode::Fused, 1);
    assert_eq!(run(Mode::Fused, 3), alone);
    let looped = run(Mode::Loop, 1).map(|tensor| tensor.to_kind(Double));
    assert!(difference(&alone.map(|tensor| tensor.to_kind(Double)), &looped) < 1e-6);
}

#[test]
fn sparse_gradients_go_through_the_loop() {
    for factor in [None, Some(0.5)] {
        let run = |mode| {
            let mut vs = VarStore::new(Device::Cpu);
            vs.set_kind(Double);
            let table = vs.root().add("table", values(&[5, 3], 1., Double), true);
            let dense = vs.root().add("dense", values(&[3], 2., Double), true);
            let optimizer = Optimizer::sgd(&vs).lr(0.1).build().unwrap();
            set_mode(&optimizer, mode);
            let rows = Tensor::from_slice(&[1i64, 3, 1]);
            let found = Tensor::embedding(&table, &rows, -1, false, true);
            (found * &dense).sum(Double).backward();
            assert!(table.grad().is_sparse());
            let factor = factor.map(|factor: f64| Tensor::from(factor));
            optimizer.update(factor.as_ref(), None).unwrap();
            [table.detach().copy(), dense.detach().copy()]
        };
        assert_eq!(run(Mode::Fused), run(Mode::Loop));
    }
    let vs = VarStore::new(Device::Cpu);
    let table = vs.root().zeros("table", &[5, 3]);
    let optimizer = Optimizer::adam(&vs).build().unwrap();
    Tensor::embedding(&table, &Tensor::from_slice(&[1i64]), -1, false, true).sum(Float).backward();
    let error = optimizer.step().unwrap_err().to_string();
    assert!(error.contains("sparse"), "{error}");
}

/// Runs CUDA's path on the CPU: no step reads a value, clipped or not.
#[test]
fn steps_do_not_wait_for_the_device() {
    let configs: [fn(&VarStore) -> Optimizer; 4] = [
        |vs| Optimizer::builder(nn::sgd(0.9, 0., 1e-2, true), vs).lr(0.1).build().unwrap(),
        |vs| Optimizer::adam(vs).build().unwrap(),
        |vs| Optimizer::adamw(vs).build().unwrap(),
        |vs| Optimizer::rms_prop(vs).build().unwrap(),
    ];
    for build in configs {
        let vs = VarStore::new(Device::Cpu);
        let parameters = [1, 2].map(|i| vs.root().add(&format!("p{i}"), parameter(i, Float), true));
        let optimizer = build(&vs);
        set_mode(&optimizer, Mode::Kernels);
        let step = |clip: bool| {
            for p in &parameters {
                // The pass on the CPU cannot handle gradients with these strides, so clipping takes CUDA's path.
                let gradient = values(&[2 * p.numel() as i64], 1., Float).slice(0, 0, None, 2);
                set_gradient(p, Some(&gradient.view_as(p))).unwrap();
            }
            let clipped =
                || if clip { optimizer.step_clipped(0.1).map(drop) } else { optimizer.step() };
            let (result, waits) = host_syncs(clipped).unwrap();
            result.unwrap();
            waits
        };
        step(false);
        assert_eq!(step(false), [""; 0], "{optimizer:?}");
        assert_eq!(step(true), [""; 0], "{optimizer:?}");
    }
}

/// Tests both ways to skip a step: the host knows at once (CPU), or only the device knows (CUDA).
#[test]
fn skipped_steps_leave_everything_as_it_was() {
    let configs: [fn(&VarStore) -> Optimizer; 4] = [
        |vs| Optimizer::builder(nn::sgd(0.9, 0.2, 0., false), vs).lr(0.1).build().unwrap(),
        |vs| Optimizer::builder(nn::sgd(0.9, 0., 0., true), vs).lr(0.1).build().unwrap(),
        |vs| Optimizer::adamw(vs).lr(0.1).build().unwrap(),
        |vs| Optimizer::rms_prop(vs).build().unwrap(),
    ];
    for build in configs {
        let run = |mode, skip: &[usize]| {
            let vs = VarStore::new(Device::Cpu);
            let parameters =
                [1, 2].map(|i| vs.root().add(&format!("p{i}"), parameter(i, Float), true));
            let optimizer = build(&vs);
            set_mode(&optimizer, mode);
            let factor = Tensor::from_slice(&[0.5f32]);
            for step in 0..9usize {
                let inf = skip.contains(&step);
                if inf && mode == Mode::Loop {
                    continue;
                }
                for (index, p) in parameters.iter().enumerate() {
                    // The second parameter has no gradient in some steps, so the two step counts differ.
                    let none = index == 1 && matches!(step, 4 | 5);
                    let gradient = values(&p.size(), step as f64, Float);
                    let gradient = if inf { gradient * f64::INFINITY } else { gradient };
                    set_gradient(p, (!none).then_some(&gradient)).unwrap();
                }
                let found = Tensor::from_slice(&[f32::from(u8::from(inf))]);
                optimizer.update(Some(&factor), Some(&found)).unwrap();
            }
            let mut all: Vec<_> = parameters.iter().map(|p| p.detach().to_kind(Double)).collect();
            for name in ["p1", "p2"] {
                let state = optimizer.state(name).unwrap();
                all.extend(state.iter().map(|(_, tensor)| tensor.to_kind(Double)));
            }
            all
        };
        for skip in [&[][..], &[0], &[0, 1, 5], &[3, 4, 8], &[2, 6]] {
            let looped = run(Mode::Loop, skip);
            for mode in [Mode::Fused, Mode::Kernels] {
                let difference = difference(&run(mode, skip), &looped);
                assert!(difference < 1e-6, "{skip:?} {mode:?}: {difference:e}");
            }
        }
    }
}

/// A parameter whose state has other strides goes to the loop, which does not know of `found_inf`.
#[test]
fn a_step_that_is_skipped_is_skipped_by_the_loop_too() {
    for config in [0., 0.9] {
        let vs = VarStore::new(Device::Cpu);
        let other = vs.root().add("other", values(&[3], 1., Float), true);
        let mut p = vs.root().add("p", values(&[4, 5], 2., Float), true);
        let adam = nn::Adam { beta1: config, ..nn::Adam::default() };
        let optimizer = Optimizer::builder(adam, &vs).build().unwrap();
        set_mode(&optimizer, Mode::Kernels);
        let step = |p: &Tensor, number: f64, found: f32| {
            set_gradient(&other, Some(&(other.ones_like() * number))).unwrap();
            set_gradient(p, Some(&(p.detach().ones_like() * number))).unwrap();
            optimizer.update(None, Some(&Tensor::from_slice(&[found]))).unwrap();
        };
        step(&p, 1., 0.);
        p.set_data(&values(&[5, 4], 2., Float).tr());
        let before = (p.detach().copy(), other.detach().copy());
        step(&p, f64::INFINITY, 1.);
        assert_eq!((p.detach().copy(), other.detach().copy()), before);
        step(&p, 1., 0.);
        assert_ne!(p.detach().copy(), before.0);
        let steps = |name| optimizer.state(name).unwrap().into_iter().find(|(n, _)| *n == "step");
        for name in ["p", "other"] {
            assert_eq!(steps(name).unwrap().1.double_value(&[]), 2.);
        }
    }
}

#[test]
fn state_saved_by_the_one_goes_on_with_the_other() {
    for (first, then) in [(Mode::Fused, Mode::Loop), (Mode::Loop, Mode::Fused)] {
        let mut net = Net::new(nn::Adam::default(), &GroupOptions::new(), Double);
        net.mode(first);
        (0..5).for_each(|step| net.step(step));
        let saved: OptimizerSnapshot = net.optimizer.snapshot().unwrap();
        let values: Vec<_> = net.parameters.iter().map(|p| p.detach().copy()).collect();
        (5..9).for_each(|step| net.step(step));
        let straight = net.all();

        net.optimizer.restore(&saved).unwrap();
        tch::no_grad(|| {
            for (p, value) in net.parameters.iter_mut().zip(&values) {
                p.copy_(value);
            }
        });
        net.mode(then);
        (5..9).for_each(|step| net.step(step));
        assert!(difference(&net.all(), &straight) < 1e-12);
    }
}

#[test]
fn one_variable_under_two_names_is_updated_once() {
    for mode in [Mode::Fused, Mode::Loop, Mode::Kernels] {
        let vs = VarStore::new(Device::Cpu);
        let p = vs.root().add("p", values(&[200_000], 1., Float), true);
        let _ = vs.root().add("again", p.shallow_clone(), true);
        assert_eq!(TensorId::of(&p), TensorId::of(&vs.variables()["again"]));
        let optimizer = Optimizer::sgd(&vs).lr(0.5).build().unwrap();
        set_mode(&optimizer, mode);
        let (before, gradient) = (p.detach().copy(), values(&[200_000], 3., Float));
        set_gradient(&p, Some(&gradient)).unwrap();
        optimizer.step().unwrap();
        assert_eq!(p.detach(), before - gradient * 0.5, "{mode:?}");
    }
}

/// All numbers here are exact in every type.
#[test]
fn the_factor_counts_in_every_type() {
    for kind in [Double, Float, Half, BFloat16] {
        for mode in [Mode::Fused, Mode::Loop] {
            let mut vs = VarStore::new(Device::Cpu);
            vs.set_kind(kind);
            // 1100 elements are more than one block of the conversion to f32, and a rest.
            let p = vs.root().add("p", Tensor::full([1100], 3., (kind, Device::Cpu)), true);
            let optimizer = Optimizer::sgd(&vs).lr(0.5).build().unwrap();
            set_mode(&optimizer, mode);
            for after in [2.5, 2.0] {
                set_gradient(&p, Some(&Tensor::full([1100], 4., (kind, Device::Cpu)))).unwrap();
                optimizer.update(Some(&Tensor::from(0.25)), None).unwrap();
                assert_eq!(p.detach().to_kind(Double), Tensor::from(after).expand([1100], false));
            }
            // A norm of 64 is clipped to 1 (up to the 1e-6 that torch adds).
            set_gradient(&p, Some(&(p.zeros_like() + 64. / 1100f64.sqrt()))).unwrap();
            let _ = optimizer.step_clipped(1.).unwrap();
            let moved = 2. - p.double_value(&[1099]);
            let bound = if matches!(kind, BFloat16) { 0.01 } else { 2e-3 };
            assert!((moved - 0.5 / 1100f64.sqrt()).abs() < bound, "{kind:?} {mode:?}: {moved}");
        }
    }
}

const CHILD: &str = "TCH_IGNITE_OVERLAPPING_CHILD";

/// Variables that share memory, or whose gradient shares memory with another variable, must be stepped in order;
/// several threads would step them at once. The test starts itself in a process of its own, to set the number of
/// threads there.
#[test]
fn overlapping_variables_are_updated_in_order_with_several_threads() {
    if std::env::var_os(CHILD).is_none() {
        let name =
            "optim::fused::tests::overlapping_variables_are_updated_in_order_with_several_threads";
        let output = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", name])
            .env(CHILD, "1")
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && text.contains("1 passed"), "{text}");
        return;
    }
    tch::set_num_threads(4);
    const SIZE: i64 = 1 << 15; // the size of a chunk of work for a thread
    let memory = |count: i64| values(&[count], 1., Float);
    // The cases: all variables share one memory; each shares half of its memory with the next; each has its own memory,
    // and its gradient lies in that of the variable before.
    for case in ["one", "halves", "gradients"] {
        let run = |mode| {
            let vs = VarStore::new(Device::Cpu);
            let all = memory(SIZE * 65);
            let memories: Vec<_> = (0..64)
                .map(|i| match case {
                    "one" => all.shallow_clone(),
                    "halves" => all.narrow(0, i * SIZE / 2, SIZE),
                    _ => memory(SIZE * 2),
                })
                .collect();
            let parameters: Vec<_> = memories
                .iter()
                .enumerate()
                .map(|(i, memory)| {
                    vs.root().add(&format!("p{i:02}"), memory.narrow(0, 0, SIZE).detach(), true)
                })
                .collect();
            // With weight decay, two updates of one element give different values in a different order.
            let optimizer =
                Optimizer::builder(nn::sgd(0., 0., 0.5, false), &vs).lr(0.5).build().unwrap();
            set_mode(&optimizer, mode);
            let gradients: Vec<_> = parameters
                .iter()
                .enumerate()
                .map(|(i, p)| p.zeros_like() + i as f64 * 0.1)
                .collect();
            for step in 0..60 {
                for (i, p) in parameters.iter().enumerate() {
                    // The gradients move only in some steps, so that the tasks of the step before are used again.
                    let of_before = case == "gradients" && step % 3 > 0 && i > 0;
                    let gradient = match of_before {
                        // A second thread would read elements here that the first has yet to write.
                        true => &memories[i - 1].narrow(0, SIZE / 2, SIZE),
                        false => &gradients[i],
                    };
                    set_gradient(p, Some(gradient)).unwrap();
                }
                optimizer.step().unwrap();
            }
            Tensor::cat(&parameters.iter().map(Tensor::detach).collect::<Vec<_>>(), 0)
        };
        assert_eq!(run(Mode::Fused), run(Mode::Loop), "{case}");
    }
}

/// Dense parameters that have a gradient in every step, so that their tasks are made once and then used again.
struct Steady {
    vs: VarStore,
    optimizer: Optimizer,
    parameters: Vec<Tensor>,
    step: f64,
}

impl Steady {
    fn new(config: impl OptimizerConfig, mode: Mode, kind: Kind) -> Self {
        let mut vs = VarStore::new(Device::Cpu);
        vs.set_kind(kind);
        let add = |index| vs.root().add(&format!("p{index}"), parameter(index, kind), true);
        let parameters = [1, 2, 3, 4].map(add).into();
        let optimizer = Optimizer::builder(config, &vs)
            .lr(0.05)
            .group("first", |name| name == "p1", GroupOptions::new())
            .group("others", |name| name != "p1", GroupOptions::new())
            .build()
            .unwrap();
        set_mode(&optimizer, mode);
        Self { vs, optimizer, parameters, step: 0. }
    }

    fn gradients(&mut self) {
        self.step += 1.;
        for parameter in &self.parameters {
            let gradient = parameter.detach().empty_like();
            let values = values(&parameter.size(), self.step, gradient.kind());
            gradient.shallow_clone().copy_(&values);
            set_gradient(parameter, Some(&gradient)).unwrap();
        }
    }

    fn steps(&mut self, count: usize) {
        for _ in 0..count {
            self.gradients();
            self.optimizer.step().unwrap();
        }
    }

    /// Copies of all parameters and state tensors, as f64 vectors.
    fn all(&self) -> Vec<Tensor> {
        let parameters = self.parameters.iter().map(|p| p.detach().copy());
        let state = |index: &usize| self.optimizer.state(&format!("p{index}")).unwrap();
        let state = [1, 2, 3, 4].iter().flat_map(state).map(|(_, tensor)| tensor.copy());
        parameters.chain(state).map(|tensor| tensor.to_kind(Double).reshape([-1])).collect()
    }
}

type Change = fn(&mut Steady);

/// Changes that may happen between two steps.
const CHANGES: [(&str, Change); 14] = [
    ("nothing", |_| {}),
    ("options", |net| {
        let groups = net.optimizer.groups().unwrap();
        groups[0].set_lr(0.01).unwrap();
        groups[1].set_weight_decay(0.1).unwrap();
    }),
    ("a gradient is missing", |net| {
        net.gradients();
        set_gradient(&net.parameters[1], None).unwrap();
        net.optimizer.step().unwrap();
    }),
    ("a gradient has other strides", |net| {
        net.gradients();
        let contiguous = values(&net.parameters[2].size(), 5., net.parameters[2].kind());
        set_gradient(&net.parameters[2], Some(&contiguous)).unwrap();
        net.optimizer.step().unwrap();
    }),
    ("a gradient is sparse", |net| {
        net.gradients();
        let sparse = net.parameters[1].grad().to_sparse_sparse_dim(1);
        set_gradient(&net.parameters[1], Some(&sparse)).unwrap();
        net.optimizer.step().unwrap();
    }),
    ("a step of the loop", |net| {
        let fused = net.optimizer.fused().unwrap();
        net.optimizer.set_fused(false).unwrap();
        net.steps(1);
        net.optimizer.set_fused(fused).unwrap();
    }),
    ("a step through tch", |net| {
        net.gradients();
        net.optimizer.with_tch(|tch| tch.step()).unwrap();
    }),
    ("a restored snapshot", |net| {
        let before = net.optimizer.snapshot().unwrap();
        net.steps(2);
        net.optimizer.restore(&before).unwrap();
    }),
    ("a parameter's memory", |net| {
        let other = net.parameters[1].detach().copy() * 0.5;
        net.parameters[1].set_data(&other);
    }),
    ("the state's memory", |net| {
        for (name, mut tensor) in net.optimizer.state("p2").unwrap() {
            if name != "step" {
                let other = &tensor * 0.5;
                tensor.set_data(&other);
            }
        }
    }),
    // The state keeps its address, so a step with the old tasks would write values of the old type there.
    ("the state's type", |net| {
        for (name, mut tensor) in net.optimizer.state("p1").unwrap() {
            if name != "step" {
                let values = tensor.copy();
                let mut other = tensor.view_dtype(Float).narrow(0, 0, 7);
                other.copy_(&values);
                tensor.set_data(&other);
            }
        }
    }),
    ("the state's memory is the parameter's", |net| {
        let p = net.parameters[0].detach();
        for (name, mut tensor) in net.optimizer.state("p1").unwrap() {
            if matches!(name, "exp_avg" | "momentum_buffer") {
                tensor.set_data(&p);
            }
        }
    }),
    ("a gradient's memory is the parameter's", |net| {
        net.gradients();
        let p = net.parameters[0].detach();
        set_gradient(&net.parameters[0], Some(&p)).unwrap();
        net.optimizer.step().unwrap();
    }),
    ("a new parameter", |net| {
        let late = net.vs.root().add("p6", parameter(6, net.parameters[0].kind()), true);
        net.parameters.push(late);
    }),
];

#[test]
fn tasks_of_the_last_step_are_used_only_while_they_hold() {
    fn check(config: impl OptimizerConfig + Copy, what: &str) {
        for (name, change) in CHANGES {
            let run = |mode| {
                let mut net = Steady::new(config, mode, Double);
                net.steps(3);
                change(&mut net);
                net.steps(3);
                net.all()
            };
            // Only SGD supports sparse gradients.
            if name == "a gradient is sparse" && !what.starts_with("SGD") {
                continue;
            }
            let difference = difference(&run(Mode::Fused), &run(Mode::Loop));
            assert!(difference < 1e-12, "{what}, {name}: {difference:e}");
        }
    }
    check(nn::sgd(0., 0., 0., false), "SGD");
    check(nn::sgd(0.9, 0.3, 0., false), "SGD with momentum");
    check(nn::Adam { amsgrad: true, ..Default::default() }, "Adam");
    check(nn::AdamW::default(), "AdamW");
    check(nn::rms_prop(0.9, 1e-6, 0., 0.5, true), "RMSprop");
}

/// The kernel divides by multiplying with the reciprocal and correcting by the remainder.
#[test]
fn adam_divides_as_the_loop_does() {
    for (kind, bound) in [(Double, 4e-16), (Float, 2e-7)] {
        let run = |mode| {
            let mut vs = VarStore::new(Device::Cpu);
            vs.set_kind(kind);
            let p = vs.root().add("p", values(&[100_003], 1., kind), true);
            let optimizer = Optimizer::adam(&vs).lr(0.01).build().unwrap();
            set_mode(&optimizer, mode);
            for step in 0..4 {
                // The values go from the smallest ones to ones that overflow when they are squared.
                let exponents = Tensor::linspace(-45., 38., p.size()[0], (Double, Device::Cpu));
                let sizes = Tensor::from(10.).pow(&exponents).to_kind(kind);
                let gradient = values(&p.size(), f64::from(step), kind) * sizes;
                set_gradient(&p, Some(&gradient)).unwrap();
                optimizer.step().unwrap();
            }
            p.detach().to_kind(Double)
        };
        let difference = difference(&[run(Mode::Fused)], &[run(Mode::Loop)]);
        assert!(difference < bound, "{kind:?}: {difference:e}");
    }
}
