//! Tests of the optimizer's groups, options and steps, against tch's own setters and updates computed by hand.

use std::collections::BTreeMap;

use tch::nn::{self, VarStore};
use tch::{Device, Kind, Tensor};
use tch_ignite::optim::{Group, GroupOptions, Knob, Optimizer, lr};
use tch_ignite::{Error, Result};

use crate::common;

type Options = BTreeMap<&'static str, f64>;

const ONE: [i64; 1] = [1];

fn store() -> VarStore {
    let mut vs = VarStore::new(Device::Cpu);
    vs.set_kind(Kind::Double);
    vs
}

/// A store with the parameters `a.w` and `b.w` of one element each.
fn two() -> (VarStore, Tensor, Tensor) {
    let vs = store();
    let (a, b) = ((vs.root() / "a").ones("w", &ONE), (vs.root() / "b").ones("w", &ONE));
    (vs, a, b)
}

/// An optimizer with groups `a` and `b` over the parameters of [`two`].
fn grouped<T: nn::OptimizerConfig>(config: T, vs: &VarStore) -> Optimizer {
    Optimizer::builder(config, vs)
        .lr(0.1)
        .group("a", |name| name.starts_with('a'), GroupOptions::new())
        .group("b", |name| name.starts_with('b'), GroupOptions::new())
        .build()
        .unwrap()
}

fn optimizer(name: &str, vs: &VarStore) -> Optimizer {
    match name {
        "SGD" => grouped(nn::Sgd::default(), vs),
        "Adam" => grouped(nn::Adam::default(), vs),
        "AdamW" => grouped(nn::AdamW::default(), vs),
        _ => grouped(nn::RmsProp::default(), vs),
    }
}

const NAMES: [&str; 4] = ["SGD", "Adam", "AdamW", "RMSprop"];

/// PyTorch's default options, with the learning rate of [`grouped`].
fn defaults(name: &str) -> Options {
    let own: &[(&str, f64)] = match name {
        "SGD" => &[("momentum", 0.), ("dampening", 0.), ("weight_decay", 0.), ("nesterov", 0.)],
        "RMSprop" => &[
            ("alpha", 0.99),
            ("eps", 1e-8),
            ("weight_decay", 0.),
            ("momentum", 0.),
            ("centered", 0.),
        ],
        _ => &[
            ("beta1", 0.9),
            ("beta2", 0.999),
            ("eps", 1e-8),
            ("weight_decay", if name == "Adam" { 0. } else { 0.01 }),
            ("amsgrad", 0.),
        ],
    };
    own.iter().copied().chain([("lr", 0.1)]).collect()
}

/// Sets of options to try. Some options have an effect only together with others.
fn variants(name: &str) -> Vec<Options> {
    let lists: &[&[(&str, f64)]] = match name {
        "SGD" => &[
            &[("lr", 0.03)],
            &[("weight_decay", 0.2)],
            &[("momentum", 0.7)],
            &[("momentum", 0.7), ("dampening", 0.3)],
            &[("momentum", 0.7), ("nesterov", 1.)],
        ],
        "RMSprop" => &[
            &[("lr", 0.03)],
            &[("weight_decay", 0.2)],
            &[("alpha", 0.5)],
            &[("eps", 0.1)],
            &[("momentum", 0.7)],
            &[("centered", 1.)],
        ],
        _ => &[
            &[("lr", 0.03)],
            &[("weight_decay", 0.2)],
            &[("beta1", 0.5)],
            &[("beta2", 0.6)],
            &[("eps", 0.1)],
            &[("amsgrad", 1.), ("beta2", 0.6)],
        ],
    };
    lists.iter().map(|list| list.iter().copied().collect()).collect()
}

/// Gradients for three steps. The last is small, so that AMSGrad's maximum matters.
const GRADIENTS: [f64; 3] = [0.5, 2., 0.1];

/// The values of one parameter that starts at 1 and gets these gradients, by the formulas of PyTorch's documentation.
fn by_hand(name: &str, o: &Options) -> Vec<f64> {
    let (mut w, mut first, mut second, mut max, mut buffer) = (1., 0., 0., 0f64, None);
    let step = |(t, g): (usize, &f64)| {
        let t = t as i32 + 1;
        let mut g = *g;
        if name == "AdamW" {
            w *= 1. - o["lr"] * o["weight_decay"];
        } else {
            g += o["weight_decay"] * w;
        }
        match name {
            "SGD" => {
                if o["momentum"] != 0. {
                    let new =
                        buffer.map_or(g, |b: f64| o["momentum"] * b + (1. - o["dampening"]) * g);
                    buffer = Some(new);
                    g = if o["nesterov"] != 0. { g + o["momentum"] * new } else { new };
                }
                w -= o["lr"] * g;
            }
            "RMSprop" => {
                second = o["alpha"] * second + (1. - o["alpha"]) * g * g;
                first = o["alpha"] * first + (1. - o["alpha"]) * g;
                let mean = if o["centered"] != 0. { first } else { 0. };
                let new = o["momentum"] * buffer.unwrap_or(0.)
                    + g / ((second - mean * mean).sqrt() + o["eps"]);
                buffer = Some(new);
                w -= o["lr"] * new;
            }
            _ => {
                let (beta1, beta2) = (o["beta1"], o["beta2"]);
                first = beta1 * first + (1. - beta1) * g;
                second = beta2 * second + (1. - beta2) * g * g;
                max = max.max(second);
                let second = if o["amsgrad"] != 0. { max } else { second };
                let denominator = (second / (1. - beta2.powi(t))).sqrt() + o["eps"];
                w -= o["lr"] * first / (1. - beta1.powi(t)) / denominator;
            }
        }
        w
    };
    GRADIENTS.iter().enumerate().map(step).collect()
}

fn value(tensor: &Tensor) -> f64 {
    tensor.view([-1]).double_value(&[0])
}

fn step_with(optimizer: &Optimizer, parameter: &Tensor, gradient: f64) -> Result<()> {
    optimizer.backward_step(&(parameter * gradient).sum(Kind::Double))
}

fn steps(optimizer: &Optimizer, parameter: &Tensor) -> Vec<f64> {
    let step = |gradient: &f64| {
        step_with(optimizer, parameter, *gradient).unwrap();
        value(parameter)
    };
    GRADIENTS.iter().map(step).collect()
}

fn assert_close(ours: &[f64], theirs: &[f64], what: &str) {
    assert_eq!(ours.len(), theirs.len(), "{what}");
    let close = ours.iter().zip(theirs).all(|(a, b)| (a - b).abs() <= 1e-14 * b.abs().max(1.));
    assert!(close, "{what}: {ours:?} instead of {theirs:?}");
}

fn all_options(group: &Group, name: &str) -> Options {
    defaults(name).keys().map(|option| (*option, group.get(option).unwrap())).collect()
}

fn text<T: std::fmt::Debug>(result: Result<T>) -> String {
    result.unwrap_err().to_string()
}

#[test]
fn constructor_values_are_read_back_and_used() {
    fn check<T: nn::OptimizerConfig>(config: T, given: &[(&'static str, f64)]) {
        let (vs, a, _b) = two();
        let optimizer = grouped(config, &vs);
        let name = optimizer.name();
        let mut expected = defaults(name);
        expected.extend(given.iter().copied());
        for group in optimizer.groups().unwrap() {
            assert_eq!(all_options(&group, name), expected, "{name}");
        }
        assert_close(&steps(&optimizer, &a), &by_hand(name, &expected), name);
    }
    check(nn::Sgd::default(), &[]);
    check(
        nn::sgd(0.9, 0.1, 5e-4, false),
        &[("momentum", 0.9), ("dampening", 0.1), ("weight_decay", 5e-4)],
    );
    check(nn::sgd(0.9, 0., 0., true), &[("momentum", 0.9), ("nesterov", 1.)]);
    let adam = [("beta1", 0.8), ("beta2", 0.9), ("weight_decay", 0.1), ("eps", 1e-3)];
    let amsgrad = || adam.iter().copied().chain([("amsgrad", 1.)]).collect::<Vec<_>>();
    check(nn::Adam { beta1: 0.8, beta2: 0.9, wd: 0.1, eps: 1e-3, amsgrad: true }, &amsgrad());
    check(nn::adam(0.8, 0.9, 0.1).eps(1e-3), &adam);
    check(nn::AdamW { beta1: 0.8, beta2: 0.9, wd: 0.1, eps: 1e-3, amsgrad: true }, &amsgrad());
    check(nn::AdamW::default(), &[]);
    check(
        nn::rms_prop(0.8, 1e-3, 0.1, 0.7, true),
        &[
            ("alpha", 0.8),
            ("eps", 1e-3),
            ("weight_decay", 0.1),
            ("momentum", 0.7),
            ("centered", 1.),
        ],
    );
}

#[test]
fn short_constructors_have_pytorchs_defaults() {
    let (vs, ..) = two();
    for (optimizer, name, rate) in [
        (Optimizer::sgd(&vs).build(), "SGD", 1e-3),
        (Optimizer::adam(&vs).build(), "Adam", 1e-3),
        (Optimizer::adamw(&vs).build(), "AdamW", 1e-3),
        (Optimizer::rms_prop(&vs).build(), "RMSprop", 1e-2),
        (Optimizer::rms_prop(&vs).lr(0.5).build(), "RMSprop", 0.5),
    ] {
        let optimizer = optimizer.unwrap();
        assert_eq!(optimizer.name(), name);
        let mut expected = defaults(name);
        expected.insert("lr", rate);
        assert_eq!(all_options(&optimizer.group_at(0).unwrap(), name), expected);
    }
}

#[test]
fn every_option_we_set_is_what_libtorch_uses_in_that_group_only() {
    for name in NAMES {
        let plain = by_hand(name, &defaults(name));
        for variant in variants(name) {
            let (vs, a, b) = two();
            let optimizer = optimizer(name, &vs);
            let (group_a, group_b) = (optimizer.group("a").unwrap(), optimizer.group("b").unwrap());
            let mut expected = defaults(name);
            for (option, value) in &variant {
                group_a.set(option, *value).unwrap();
                expected.insert(option, *value);
            }
            assert_eq!(all_options(&group_a, name), expected, "{name}");
            assert_eq!(all_options(&group_b, name), defaults(name), "{name}");
            let by_hand = by_hand(name, &expected);
            assert_ne!(by_hand, plain, "{name}: {variant:?} has no effect");
            assert_close(&steps(&optimizer, &a), &by_hand, &format!("{name} {variant:?}"));
            assert_close(&steps(&optimizer, &b), &plain, name);
        }
    }
}

#[test]
fn group_options_given_at_build_are_what_libtorch_uses() {
    fn options(o: &Options) -> GroupOptions {
        o.iter().fold(GroupOptions::new(), |options, (name, value)| match *name {
            "lr" => options.lr(*value),
            "momentum" => options.momentum(*value),
            "dampening" => options.dampening(*value),
            "weight_decay" => options.weight_decay(*value),
            "nesterov" => options.nesterov(*value != 0.),
            "eps" => options.eps(*value),
            "amsgrad" => options.amsgrad(*value != 0.),
            "alpha" => options.alpha(*value),
            "centered" => options.centered(*value != 0.),
            _ => options.betas(
                o.get("beta1").copied().unwrap_or(0.9),
                o.get("beta2").copied().unwrap_or(0.999),
            ),
        })
    }
    fn build<T: nn::OptimizerConfig>(config: T, vs: &VarStore, o: &Options) -> Result<Optimizer> {
        Optimizer::builder(config, vs)
            .lr(0.1)
            .group("rest", |name| name != "a.w", GroupOptions::new())
            .group("a", |name| name == "a.w", options(o))
            .build()
    }
    for name in NAMES {
        for variant in variants(name) {
            let (vs, a, b) = two();
            let optimizer = match name {
                "SGD" => build(nn::Sgd::default(), &vs, &variant),
                "Adam" => build(nn::Adam::default(), &vs, &variant),
                "AdamW" => build(nn::AdamW::default(), &vs, &variant),
                _ => build(nn::RmsProp::default(), &vs, &variant),
            }
            .unwrap();
            let mut expected = defaults(name);
            expected.extend(variant);
            assert_close(&steps(&optimizer, &a), &by_hand(name, &expected), name);
            assert_close(&steps(&optimizer, &b), &by_hand(name, &defaults(name)), name);
        }
    }
}

#[test]
fn typed_methods_read_what_they_set() -> Result<()> {
    let (vs, ..) = two();
    let sgd = optimizer("SGD", &vs).group("a")?;
    sgd.set_lr(0.5)?;
    sgd.set_momentum(0.6)?;
    sgd.set_dampening(-0.7)?;
    sgd.set_weight_decay(0.8)?;
    sgd.set_nesterov(true)?;
    assert_eq!((sgd.lr()?, sgd.momentum()?, sgd.dampening()?), (0.5, 0.6, -0.7));
    assert_eq!((sgd.weight_decay()?, sgd.nesterov()?), (0.8, true));
    for name in ["Adam", "AdamW"] {
        let adam = optimizer(name, &vs).group("b")?;
        adam.set_betas(0.5, 0.6)?;
        adam.set_eps(0.7)?;
        adam.set_amsgrad(true)?;
        assert_eq!((adam.betas()?, adam.eps()?, adam.amsgrad()?), ((0.5, 0.6), 0.7, true));
        adam.set_amsgrad(false)?;
        assert!(!adam.amsgrad()?);
    }
    let rms_prop = optimizer("RMSprop", &vs).group("b")?;
    rms_prop.set_alpha(0.5)?;
    rms_prop.set_centered(true)?;
    assert_eq!((rms_prop.alpha()?, rms_prop.centered()?, rms_prop.index()), (0.5, true, 1));
    assert!(format!("{rms_prop:?}").starts_with("b { lr: 0.1, alpha: 0.5, eps: 1e-8"));
    Ok(())
}

#[test]
fn what_is_set_through_tch_is_read_here() -> Result<()> {
    for name in NAMES {
        let (vs, a, _b) = two();
        let optimizer = optimizer(name, &vs);
        let both = |option: &str| -> Result<Vec<f64>> {
            optimizer.groups()?.iter().map(|group| group.get(option)).collect()
        };
        optimizer.with_tch(|tch| tch.set_lr_group(1, 0.25))?;
        assert_eq!(both("lr")?, [0.1, 0.25]);
        optimizer.with_tch(|tch| tch.set_lr(0.5))?;
        assert_eq!(both("lr")?, [0.5, 0.5]);
        optimizer.with_tch(|tch| tch.set_weight_decay_group(0, 0.125))?;
        assert_eq!(both("weight_decay")?, [0.125, defaults(name)["weight_decay"]]);
        optimizer.with_tch(|tch| tch.set_weight_decay(0.0625))?;
        assert_eq!(both("weight_decay")?, [0.0625, 0.0625]);
        let momentum = if name.starts_with("Adam") { "beta1" } else { "momentum" };
        optimizer.with_tch(|tch| tch.set_momentum(0.75))?;
        assert_eq!(both(momentum)?, [0.75, 0.75]);
        if name == "SGD" {
            optimizer.with_tch(|tch| tch.set_momentum_group(1, 0.5))?;
            assert_eq!(both(momentum)?, [0.75, 0.5]);
        }
        // A step by tch counts like a step of ours.
        let gradient =
            || optimizer.with_tch(|tch| tch.backward_step(&(&a * 0.5).sum(Kind::Double)));
        gradient()?;
        let mut expected = defaults(name);
        expected.extend([("lr", 0.5), ("weight_decay", 0.0625), (momentum, 0.75)]);
        assert_close(&[value(&a)], &by_hand(name, &expected)[..1], name);
    }
    Ok(())
}

#[test]
fn groups_follow_predicates_over_names() -> Result<()> {
    let vs = store();
    let _conv = nn::conv2d(vs.root() / "conv", 1, 1, 1, Default::default());
    let _fc = nn::linear(vs.root() / "fc", 1, 1, Default::default());
    let optimizer = Optimizer::adam(&vs)
        .group("decay", |name| name.ends_with("weight"), lr(1e-2).weight_decay(0.1))
        .group("rest", |name| name.ends_with("bias"), GroupOptions::new())
        .build()?;
    assert_eq!(optimizer.group_names()?, ["decay", "rest"]);
    assert_eq!(optimizer.group("rest")?.index(), 1);
    assert_eq!(optimizer.group_at(1)?.name(), "rest");
    for (group, end) in optimizer.groups()?.iter().zip(["weight", "bias"]) {
        let mut names = group.parameters()?;
        names.sort();
        assert_eq!(names, [format!("conv.{end}"), format!("fc.{end}")]);
    }
    Ok(())
}

#[test]
fn groups_follow_tchs_numbers_with_given_and_default_names() -> Result<()> {
    let vs = store();
    let (root, first) = (vs.root(), vs.root().set_group(2));
    let (_u, _v) = (first.ones("u", &ONE), root.ones("v", &ONE));
    let optimizer = Optimizer::sgd(&vs).name_group(2, "special", lr(0.25)).lr(0.5).build()?;
    assert_eq!(optimizer.group_names()?, ["group_0", "group_1", "special"]);
    let parameters = |name| optimizer.group(name)?.parameters();
    assert_eq!(parameters("special")?, ["u"]);
    assert_eq!(parameters("group_0")?, ["v"]);
    assert!(parameters("group_1")?.is_empty());
    assert_eq!(optimizer.group("group_1")?.lr()?, 0.5);
    assert_eq!(optimizer.group("special")?.lr()?, 0.25);
    Ok(())
}

#[test]
fn refusals_at_build_say_what_was_given_and_what_there_is() {
    let all = |_: &str| true;
    let on = |start: char| move |name: &str| name.starts_with(start);
    let none = GroupOptions::new;
    let (vs, ..) = two();
    let sgd = || Optimizer::sgd(&vs);
    for (builder, expected) in [
        (
            sgd().group("first", on('a'), none()),
            "in no parameter group: 'b.w'; the groups are: first. Each parameter has to be in one: widen a condition, or add a group",
        ),
        (
            sgd().group("x", on('a'), none()).group("y", all, none()),
            "parameter 'a.w' is in two groups: 'x' and 'y'; let only one of their conditions hold for it",
        ),
        (
            sgd().group("x", all, none()).group("y", on('c'), none()),
            "group 'y' has no parameter; the parameters are: 'a.w', 'b.w'",
        ),
        (
            sgd().group("x", on('a'), none()).group("x", on('b'), none()),
            "two parameter groups are named 'x': give each a name of its own",
        ),
        (
            sgd().name_group(0, "x", none()).group("y", all, none()),
            "use either `group` (by name) or `name_group` (tch's numbers), not both",
        ),
        (sgd().name_group(3, "x", none()), "no parameter group 3; this optimizer has: 0"),
        (sgd().lr(-1.), "lr must be finite and not negative, but -1 was given"),
        (sgd().lr(f64::NAN), "lr must be finite and not negative, but NaN was given"),
        (sgd().group("x", all, lr(-0.5)), "lr must be finite and not negative, but -0.5 was given"),
        (sgd().group("x", all, none().dampening(f64::NAN)), "dampening must be finite, but NaN"),
        (
            sgd().group("x", all, none().alpha(0.9)),
            "SGD has no hyper-parameter 'alpha'; it has: lr, momentum, dampening, weight_decay, nesterov",
        ),
    ] {
        let error = text(builder.build());
        assert!(error.contains(expected), "'{error}' instead of '{expected}'");
    }
    let betas = Optimizer::adam(&vs).group("x", all, none().betas(0.9, 1.)).build();
    assert_eq!(text(betas), "beta2 must be in [0, 1), but 1 was given");
    let nesterov = text(Optimizer::builder(nn::sgd(0., 0., 0., true), &vs).build());
    assert!(nesterov.contains("Nesterov momentum requires a momentum and zero dampening"));
    assert!(!nesterov.contains('\n'), "{nesterov}");
}

#[test]
fn long_lists_of_parameters_are_cut() {
    let vs = store();
    let _all: Vec<_> = (0..11).map(|i| vs.root().ones(&format!("p{i:02}"), &ONE)).collect();
    let none = GroupOptions::new;
    let error = text(Optimizer::sgd(&vs).group("x", |name| name == "p00", none()).build());
    assert!(error.contains("'p08' and 2 more; the groups are: x"), "{error}");
}

#[test]
fn groups_and_options_that_do_not_exist_are_named_with_those_that_do() -> Result<()> {
    let (vs, ..) = two();
    let sgd = optimizer("SGD", &vs);
    assert_eq!(text(sgd.group("c")), "no parameter group 'c'; this optimizer has: a, b");
    let at_two = sgd.group_at(2);
    assert!(matches!(at_two, Err(Error::UnknownGroup { .. })));
    assert_eq!(text(at_two), "no parameter group 2; this optimizer has: 0 ('a'), 1 ('b')");
    assert_eq!(text(sgd.state("c.w")), "no parameter 'c.w'; there are: 'a.w', 'b.w'");
    let adam = "Adam has no hyper-parameter 'momentum'; it has: lr, beta1, beta2, eps, weight_decay, amsgrad, maximize";
    let group = optimizer("Adam", &vs).group("a")?;
    assert_eq!(text(group.momentum()), adam);
    assert_eq!(text(group.set_momentum(0.5)), adam);
    assert_eq!(text(group.knob("momentum")), adam);
    assert_eq!(text(optimizer("Adam", &vs).knob("momentum")), adam);
    assert!(text(sgd.group("a")?.betas()).starts_with("SGD has no hyper-parameter 'beta1'"));
    let group = optimizer("RMSprop", &vs).group("a")?;
    assert!(
        text(group.amsgrad())
            .ends_with("it has: lr, alpha, eps, weight_decay, momentum, centered, maximize")
    );
    Ok(())
}

#[test]
fn values_out_of_bounds_are_refused_and_change_nothing() {
    let bad = [f64::NAN, f64::INFINITY, -1e-9];
    for name in NAMES {
        let (vs, ..) = two();
        let group = optimizer(name, &vs).group("a").unwrap();
        let before = all_options(&group, name);
        for option in before.keys() {
            let bad: &[f64] = match *option {
                "beta1" | "beta2" => &[-1e-9, 1., f64::NAN],
                "dampening" => &bad[..2],
                "nesterov" | "amsgrad" | "centered" => &[0.5, -1., f64::NAN],
                _ => &bad,
            };
            for value in bad {
                let error = text(group.set(option, *value));
                assert!(error.starts_with(&format!("{option} must be ")), "{error}");
                assert!(error.ends_with(&format!("but {value} was given")), "{error}");
                assert!(group.knob(option).unwrap().set(*value).is_err());
            }
        }
        if name.starts_with("Adam") {
            assert!(group.set_betas(0.5, 1.).is_err(), "and beta1 stays too");
        }
        assert_eq!(all_options(&group, name), before, "{name}");
    }
}

#[test]
fn knobs_turn_one_group_all_groups_or_anything() -> Result<()> {
    let (vs, ..) = two();
    let optimizer = optimizer("SGD", &vs);
    let (one, all) = (optimizer.group("b")?.knob("lr")?, optimizer.knob("lr")?);
    assert_eq!((one.name(), one.group(), all.group()), ("lr", Some(1), None));
    one.set(0.5)?;
    assert_eq!(
        (one.get()?, all.get()?, all.values()?, one.values()?.len()),
        (0.5, 0.1, vec![0.1, 0.5], 1)
    );
    all.set(0.25)?;
    assert_eq!(all.values()?, [0.25, 0.25]);
    let cell = std::sync::Arc::new(std::sync::Mutex::new(1.));
    let (get, set) = (cell.clone(), cell.clone());
    let custom = Knob::new("x", move || *get.lock().unwrap(), move |v| *set.lock().unwrap() = v);
    custom.set(-2.)?;
    assert_eq!((custom.get()?, custom.group()), (-2., None));
    assert_eq!(text(custom.set(f64::NAN)), "x must be finite, but NaN was given");
    assert_eq!(custom.get()?, -2.);
    Ok(())
}

#[test]
fn variables_added_after_build_are_taken_up_in_their_group_with_state() -> Result<()> {
    type Call = fn(&Optimizer) -> Result<()>;
    let calls: [Call; 4] = [
        Optimizer::step,
        Optimizer::zero_grad,
        |optimizer| optimizer.with_tch(|tch| tch.step()),
        // This closure does nothing with tch's optimizer, but `with_tch` takes up new variables all the same.
        |optimizer| optimizer.with_tch(|_| ()).and_then(|()| optimizer.zero_grad()),
    ];
    for take_up in calls {
        let (vs, a, _b) = two();
        let optimizer = grouped(nn::sgd(0.9, 0., 0., false), &vs);
        optimizer.group("b")?.set_lr(1.)?;
        let late = (vs.root() / "b").ones("late", &ONE);
        take_up(&optimizer)?;
        assert_eq!(optimizer.group("a")?.parameters()?, ["a.w"]);
        assert_eq!(
            optimizer.group("b")?.parameters()?,
            ["b.w", "late"].map(|n| n.replace("late", "b.late"))
        );
        for _ in 0..2 {
            optimizer.backward_step(&((&late + &a) * 0.5).sum(Kind::Double))?;
        }
        assert_close(&[value(&late), value(&a)], &[1. - 0.5 - 0.95, 1. - 0.05 - 0.095], "late");
        assert_eq!(optimizer.state("b.late")?.len(), 1);
    }
    Ok(())
}

#[test]
fn variables_added_under_a_new_number_make_a_new_group() -> Result<()> {
    let (vs, ..) = two();
    let optimizer = Optimizer::sgd(&vs).lr(0.5).build()?;
    let late = vs.root().set_group(2).ones("late", &ONE);
    assert_eq!(optimizer.group_names()?, ["group_0", "group_1", "group_2"]);
    assert_eq!(optimizer.group("group_2")?.parameters()?, ["late"]);
    step_with(&optimizer, &late, 1.)?;
    assert_eq!(value(&late), 0.5);
    Ok(())
}

#[test]
fn a_late_variable_in_no_group_is_an_error_that_changes_nothing() -> Result<()> {
    let (vs, a, _b) = two();
    let optimizer = optimizer("SGD", &vs);
    (&a * 1.).sum(Kind::Double).backward();
    // The first of the two new variables fits a group's rule.
    let _late = (vs.root() / "a").ones("late", &ONE);
    let _homeless = (vs.root() / "c").ones("w", &ONE);
    let error = "in no parameter group: 'c.w'; the groups are: a, b. Each parameter has to be in one: widen a condition, or add a group";
    for _ in 0..2 {
        assert_eq!(text(optimizer.step()), error);
        assert_eq!(text(optimizer.zero_grad()), error);
        assert_eq!(text(optimizer.backward_step(&(&a * 1.))), error);
        assert_eq!(text(optimizer.with_tch(|tch| tch.step())), error);
        assert_eq!(text(optimizer.group("a")?.parameters()), error);
        assert_eq!(optimizer.group("a")?.lr()?, 0.1);
    }
    assert_eq!((value(&a), value(&a.grad())), (1., 1.), "no step was made, no gradient reset");
    Ok(())
}

#[test]
fn all_is_locked_while_tch_has_the_optimizer_also_after_a_panic_in_there() -> Result<()> {
    let (vs, a, _b) = two();
    let optimizer = optimizer("SGD", &vs);
    let group = optimizer.group("a")?;
    let inner = optimizer.with_tch(|_| {
        [
            optimizer.with_tch(|_| ()),
            optimizer.step(),
            optimizer.zero_grad(),
            group.set_lr(1.),
            group.lr().map(drop),
            optimizer.state("a.w").map(drop),
        ]
    })?;
    for refused in inner {
        assert!(text(refused).contains("lent out by `with_tch`"));
    }
    let panic = || optimizer.with_tch(|tch| tch.set_lr_group(9, 1.));
    assert!(panic().is_err());
    assert_eq!(optimizer.with_tch(|_| 7)?, 7);
    step_with(&optimizer, &a, 1.)?;
    assert_close(&[value(&a), group.lr()?], &[0.9, 0.1], "after the panic");
    Ok(())
}

#[test]
fn a_step_without_gradients_changes_nothing() -> Result<()> {
    for name in NAMES {
        let (vs, a, b) = two();
        let optimizer = optimizer(name, &vs);
        optimizer.step()?;
        optimizer.zero_grad()?;
        optimizer.step()?;
        assert_eq!((value(&a), value(&b)), (1., 1.), "{name}");
        step_with(&optimizer, &a, 1.)?;
        assert!(value(&a) < 1. && value(&b) == 1. && !b.grad().defined(), "{name}");
    }
    Ok(())
}

#[test]
fn a_loss_without_backward_is_an_error_in_libtorchs_words() {
    let (vs, a, _b) = two();
    let optimizer = optimizer("SGD", &vs);
    let ones = |n: i64| Tensor::ones([n], (Kind::Double, Device::Cpu));
    for (loss, expected) in [
        (&a * ones(3), "backward: grad can be implicitly created only for scalar outputs"),
        (ones(1), "backward: element 0 of tensors does not require grad"),
        (Tensor::new(), "backward: "),
    ] {
        let error = text(optimizer.backward_step(&loss));
        assert!(error.starts_with(expected) && !error.contains('\n'), "{error}");
    }
    step_with(&optimizer, &a, 1.).unwrap();
    assert_close(&[value(&a)], &[0.9], "after the errors");
}

#[test]
fn handles_can_be_sent_and_share_one_optimizer() -> Result<()> {
    fn sendable<T: Clone + Send + Sync>(_: &T) {}
    let (vs, ..) = two();
    let optimizer = optimizer("SGD", &vs);
    let group = optimizer.group("b")?;
    sendable(&optimizer);
    sendable(&group);
    sendable(&group.knob("lr")?);
    let clone = optimizer.clone();
    std::thread::spawn(move || clone.group("b")?.set_lr(0.5)).join().unwrap()?;
    assert_eq!((group.lr()?, optimizer.group("b")?.clone().lr()?), (0.5, 0.5));
    Ok(())
}

#[test]
fn state_has_pytorchs_names_and_none_before_the_first_step() -> Result<()> {
    fn check<T: nn::OptimizerConfig>(config: T, expected: &[&str]) -> Result<()> {
        let (vs, a, _b) = two();
        let optimizer = grouped(config, &vs);
        assert!(optimizer.state("a.w")?.is_empty());
        step_with(&optimizer, &a, 2.)?;
        step_with(&optimizer, &a, 2.)?;
        let state = optimizer.state("a.w")?;
        let names: Vec<_> = state.iter().map(|(name, _)| *name).collect();
        assert_eq!(names, expected, "{}", optimizer.name());
        for (name, tensor) in state {
            let steps = (name == "step").then(|| tensor.double_value(&[]));
            assert!(steps.is_none_or(|steps| steps == 2.) && tensor.numel() == 1);
        }
        assert!(optimizer.state("b.w")?.is_empty(), "it never had a gradient");
        Ok(())
    }
    check(nn::Sgd::default(), &[])?;
    check(nn::sgd(0.9, 0., 0., false), &["momentum_buffer"])?;
    check(nn::Adam::default(), &["step", "exp_avg", "exp_avg_sq"])?;
    check(
        nn::AdamW::default().amsgrad(true),
        &["step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"],
    )?;
    check(nn::RmsProp::default(), &["step", "square_avg"])?;
    let all = nn::rms_prop(0.9, 1e-8, 0., 0.5, true);
    check(all, &["step", "square_avg", "momentum_buffer", "grad_avg"])
}

#[test]
fn frozen_variables_stay_as_they_are() -> Result<()> {
    let (mut vs, a, _b) = two();
    let optimizer = grouped(nn::sgd(0.9, 0., 0.1, false), &vs);
    vs.freeze();
    assert!(optimizer.backward_step(&(&a * 2.)).is_err(), "nothing to learn");
    optimizer.step()?;
    assert_eq!(value(&a), 1.);
    vs.unfreeze();
    step_with(&optimizer, &a, 1.)?;
    assert_close(&[value(&a)], &[1. - 0.1 * 1.1], "unfrozen");
    Ok(())
}

#[test]
fn the_optimizer_outlives_the_store() -> Result<()> {
    let (vs, a, _b) = two();
    let optimizer = optimizer("Adam", &vs);
    drop(vs);
    step_with(&optimizer, &a, 1.)?;
    assert_eq!(optimizer.group("a")?.parameters()?, ["a.w"]);
    assert_eq!(optimizer.state("a.w")?.len(), 3);
    drop(a);
    optimizer.zero_grad()
}

#[test]
fn options_that_need_state_can_be_switched_on_later() -> Result<()> {
    for (name, option, on, tensor) in [
        ("Adam", "amsgrad", 1., "max_exp_avg_sq"),
        ("AdamW", "amsgrad", 1., "max_exp_avg_sq"),
        ("RMSprop", "centered", 1., "grad_avg"),
        ("RMSprop", "momentum", 0.9, "momentum_buffer"),
    ] {
        let (vs, a, b) = two();
        let optimizer = optimizer(name, &vs);
        let group = optimizer.group("a")?;
        group.set(option, 0.)?;
        step_with(&optimizer, &a, 1.)?;
        let kept = |parameter| {
            let names = |state: Vec<(&'static str, Tensor)>| state.into_iter().map(|(n, _)| n);
            optimizer.state(parameter).map(|state| names(state).any(|n| n == tensor))
        };
        assert!(!kept("a.w")?, "{name}");
        group.set(option, on)?;
        assert!(kept("a.w")?, "{name}: {tensor}");
        step_with(&optimizer, &a, 1.)?;
        step_with(&optimizer, &b, 1.)?;
        assert!(value(&a).is_finite() && !kept("b.w")?);
    }
    Ok(())
}

#[test]
fn rmsprop_with_momentum_from_the_second_step_is_torchs_formula() -> Result<()> {
    let (vs, a, _b) = two();
    let optimizer = Optimizer::builder(nn::RmsProp::default(), &vs).lr(0.1).build()?;
    let (mut weight, mut square, mut buffer): (f64, f64, f64) = (value(&a), 0., 0.);
    for step in 0..4 {
        let momentum = if step == 0 { 0. } else { 0.5 };
        optimizer.knob("momentum")?.set(momentum)?;
        step_with(&optimizer, &a, 2.)?;
        square = 0.99 * square + 0.01 * 4.;
        let update = 2. / (square.sqrt() + 1e-8);
        buffer = momentum * buffer + if step == 0 { 0. } else { update };
        weight -= 0.1 * if step == 0 { update } else { buffer };
        assert_close(&[value(&a)], &[weight], "momentum from the second step");
    }
    Ok(())
}

#[test]
fn settings_of_tch_are_checked_too() {
    let (vs, _a, _b) = two();
    for (config, what) in [
        (nn::sgd(f64::INFINITY, 0., 0., false), "momentum must be finite"),
        (nn::sgd(0.9, f64::NAN, 0., false), "dampening must be finite"),
        (nn::sgd(0.9, 0., f64::INFINITY, false), "weight_decay must be finite"),
    ] {
        let error = text(Optimizer::builder(config, &vs).build());
        assert!(error.contains(what), "{error}");
    }
}

#[test]
fn numbers_of_tch_are_named_once() {
    let (vs, _a, _b) = two();
    let build = |names: &[(usize, &str)]| {
        let builder = Optimizer::sgd(&vs);
        let named = names
            .iter()
            .fold(builder, |b, (number, name)| b.name_group(*number, *name, GroupOptions::new()));
        text(named.build())
    };
    assert_eq!(
        build(&[(0, "a"), (0, "b")]),
        "group 0 is named twice: 'a' and 'b'; call name_group once for each number"
    );
    assert_eq!(
        build(&[(0, "a"), (1, "a")]),
        "two parameter groups are named 'a': give each a name of its own"
    );
    assert_eq!(
        build(&[(1, "group_0")]),
        "two parameter groups are named 'group_0': give each a name of its own"
    );
    let error = build(&[(usize::MAX, "last")]);
    assert!(error.contains(&usize::MAX.to_string()), "{error}");
}

#[test]
fn rules_run_outside_the_stores_lock_and_may_fail() -> Result<()> {
    let (vs, _a, _b) = two();
    let numbers = |vs: &nn::VarStore| -> Vec<usize> {
        vs.variables_.lock().unwrap().trainable_variables.iter().map(|v| v.group).collect()
    };
    vs.variables_.lock().unwrap().trainable_variables[1].group = 7;
    let before = numbers(&vs);
    let error = text(
        Optimizer::sgd(&vs)
            .group("a", |name| name.starts_with('a'), GroupOptions::new())
            .group("b", |name| panic!("no {name}"), GroupOptions::new())
            .build(),
    );
    assert!(error.starts_with("the rule of group 'b' panicked: no "), "{error}");
    assert_eq!(numbers(&vs), before, "the lock is not poisoned");

    let store = vs.variables_.clone();
    let rules = Optimizer::sgd(&vs)
        .group(
            "a",
            move |name| store.lock().is_ok_and(|_| name.starts_with('a')),
            GroupOptions::new(),
        )
        .group("b", |name| name.starts_with('b'), GroupOptions::new())
        .build()?;
    assert_eq!(rules.group("b")?.parameters()?, ["b.w"]);
    assert_eq!(numbers(&vs), before, "other optimizers may use tch's numbers");
    Ok(())
}

#[test]
fn several_optimizers_group_one_store_each_in_its_way() -> Result<()> {
    let (vs, _a, _b) = two();
    let by = |first: &'static str| {
        Optimizer::sgd(&vs)
            .group("first", move |name| name.starts_with(first), GroupOptions::new())
            .group("second", move |name| !name.starts_with(first), GroupOptions::new())
            .build()
    };
    let (one, other) = (by("a")?, by("b")?);
    let _late = (vs.root().ones("a2", &[1]), vs.root().ones("b2", &[1]));
    other.zero_grad()?;
    one.with_tch(|tch| tch.zero_grad())?;
    for (optimizer, first, second) in
        [(&one, ["a.w", "a2"], ["b.w", "b2"]), (&other, ["b.w", "b2"], ["a.w", "a2"])]
    {
        assert_eq!(optimizer.group("first")?.parameters()?, first);
        assert_eq!(optimizer.group("second")?.parameters()?, second);
    }
    Ok(())
}

#[test]
fn a_panic_of_tchs_is_an_error_that_leaves_the_optimizer_usable() -> Result<()> {
    let (vs, a, _b) = two();
    let optimizer = optimizer("Adam", &vs);
    // tch panics where libtorch refuses something, here a group that does not exist and a loss that is no scalar.
    let error = text(optimizer.with_tch(|tch| tch.set_lr_group(7, 0.1)));
    assert!(error.starts_with("with_tch: "), "{error}");
    let two_losses = Tensor::stack(&[&a, &a], 0);
    assert!(optimizer.with_tch(|tch| tch.backward_step(&two_losses)).is_err());
    step_with(&optimizer, &a, 1.)
}

/// A store with one parameter, two ones in f64, under the names `emb.weight` and `head.weight`.
fn tied(trainable_twice: bool) -> (VarStore, Tensor) {
    let vs = store();
    let w = (vs.root() / "head").ones("weight", &[2]);
    let _ = (vs.root() / "emb").add("weight", w.shallow_clone(), trainable_twice);
    (vs, w)
}

#[test]
fn a_tensor_under_two_names_is_one_parameter() -> Result<()> {
    for twice in [true, false] {
        for fused in [true, false] {
            let (vs, w) = tied(twice);
            let sgd = Optimizer::sgd(&vs).lr(0.1).build()?;
            sgd.set_fused(fused)?;
            assert_eq!(sgd.group("group_0")?.parameters()?, ["emb.weight"]);
            // A model uses the parameter twice, so the gradient is 2 + 3.
            ((&w * 2.).sum(Kind::Double) + (&w * 3.).sum(Kind::Double)).backward();
            assert_eq!(value(&sgd.gradients()?.norm()?), 50f64.sqrt());
            sgd.step()?;
            assert_eq!(value(&w), 0.5);
            let _ = sgd.gradients()?.clip_norm(5.)?;
            approx::assert_abs_diff_eq!(value(&w.grad()), 5. / 2f64.sqrt(), epsilon = 1e-6);
            sgd.clip_grad_value(1.)?;
            assert_eq!(value(&w.grad()), 1.);
            sgd.with_tch(|tch| tch.step())?;
            approx::assert_abs_diff_eq!(value(&w), 0.4, epsilon = 1e-15);

            let adam = Optimizer::adam(&vs).lr(0.1).build()?;
            adam.set_fused(fused)?;
            for step in 1..=3 {
                adam.step()?;
                for name in ["emb.weight", "head.weight"] {
                    assert_eq!(value(&adam.state(name)?[0].1), f64::from(step));
                }
            }
            // The gradients are equal, so each step of Adam changes the value by lr.
            approx::assert_abs_diff_eq!(value(&w), 0.1, epsilon = 1e-7);
        }
    }
    Ok(())
}

/// PyTorch also warns of a parameter that an optimizer gets twice. There is no warning if the second name is not
/// trained.
#[test]
fn a_tensor_that_the_store_lists_twice_is_told_once() {
    const CHILD: &str = "TCH_IGNITE_TIED_CHILD";
    let Some(trained) = std::env::var_os(CHILD) else {
        let told = |trained: &str| {
            let output = std::process::Command::new(std::env::current_exe().unwrap())
                .arg("--exact")
                .arg(common::exact(
                    module_path!(),
                    "a_tensor_that_the_store_lists_twice_is_told_once",
                ))
                .arg("--nocapture")
                .env(CHILD, trained)
                .output()
                .unwrap();
            assert!(output.status.success(), "{output:?}");
            let text = String::from_utf8(output.stderr).unwrap();
            text.lines().filter(|line| line.contains("'emb.weight' and 'head.weight'")).count()
        };
        assert_eq!((told("twice"), told("once")), (1, 0));
        return;
    };
    let (vs, _) = tied(trained == "twice");
    for _ in 0..3 {
        let optimizer = Optimizer::sgd(&vs).build().unwrap();
        optimizer.step().unwrap();
    }
}

#[test]
fn a_name_that_is_tied_later_adds_no_parameter() -> Result<()> {
    let vs = store();
    let w = vs.root().ones("w", &ONE);
    let optimizer = Optimizer::adam(&vs).lr(0.1).build()?;
    step_with(&optimizer, &w, 1.)?;
    let _ = vs.root().add("again", w.shallow_clone(), true);
    let late = vs.root().ones("late", &ONE);
    assert_eq!(optimizer.group("group_0")?.parameters()?, ["again", "late"]);
    optimizer.zero_grad()?;
    (&w + &late).sum(Kind::Double).backward();
    optimizer.step()?;
    assert_eq!(value(&optimizer.state("w")?[0].1), 2.);
    assert_eq!(value(&optimizer.state("late")?[0].1), 1.);
    // tch's own methods take up new variables too.
    let _ = vs.root().add("once_more", w.shallow_clone(), true);
    optimizer.with_tch(|tch| {
        let _ = vs.root().add("and_more", w.shallow_clone(), true);
        tch.step();
    })?;
    assert_eq!(value(&optimizer.state("w")?[0].1), 3.);
    Ok(())
}

#[test]
fn two_names_of_one_parameter_in_two_groups_are_refused_with_both_names() {
    for twice in [true, false] {
        let (vs, _) = tied(twice);
        let refused = text(
            Optimizer::sgd(&vs)
                .group("a", |name| name.starts_with("emb"), lr(0.1))
                .group("b", |name| name.starts_with("head"), lr(0.2))
                .build(),
        );
        for part in ["'emb.weight'", "'head.weight'", "'a' and 'b'", "put both into one"] {
            assert!(refused.contains(part), "{refused}");
        }
        // A rule that matches one of the names is enough.
        let optimizer =
            Optimizer::sgd(&vs).group("a", |name| name == "head.weight", lr(0.1)).build();
        assert_eq!(optimizer.unwrap().group("a").unwrap().parameters().unwrap(), ["emb.weight"]);
    }
    let vs = store();
    let w = vs.root().ones("w", &ONE);
    let _ = vs.root().set_group(1).add("again", w.shallow_clone(), true);
    let refused = text(Optimizer::sgd(&vs).name_group(1, "head", GroupOptions::new()).build());
    for part in ["'again' and 'w'", "'group_0' and 'head'"] {
        assert!(refused.contains(part), "{refused}");
    }
}

#[test]
fn views_are_parameters_of_their_own_and_are_stepped_in_order() -> Result<()> {
    for fused in [true, false] {
        let vs = store();
        let w = vs.root().ones("w", &[2]);
        let view = vs.root().add("view", w.detach().narrow(0, 1, 1), true);
        let optimizer = Optimizer::builder(nn::sgd(0., 0., 0.5, false), &vs).lr(0.5).build()?;
        optimizer.set_fused(fused)?;
        ((&w * 2.).sum(Kind::Double) + (&view * 4.).sum(Kind::Double)).backward();
        optimizer.step()?;
        // The first step gives w - 0.5 (2 + 0.5 w). The view steps the second element once more: w - 0.5 (4 + 0.5 w).
        let first = 1. - 0.5 * (2. + 0.5);
        let second = first - 0.5 * (4. + 0.5 * first);
        assert_eq!(Vec::<f64>::try_from(&w.detach()).unwrap(), [first, second]);
    }
    Ok(())
}

#[test]
fn an_optimizer_built_before_its_variables_admits_them_first() -> Result<()> {
    use tch_ignite::checkpoint::Stateful;
    let build = || {
        let vs = store();
        let optimizer = Optimizer::adam(&vs).lr(0.1).build().unwrap();
        let w = vs.root().ones("w", &ONE);
        let _ = vs.root().set_group(1).ones("late", &ONE);
        (vs, optimizer, w)
    };
    let (_vs, trained, w) = build();
    step_with(&trained, &w, 1.)?;
    trained.knob("lr")?.set(0.3)?;

    // Each block does something else first with a new optimizer.
    let (_vs, mut optimizer, _) = build();
    optimizer.load_state_dict(trained.state_dict()?.copy()?)?;
    assert_eq!(value(&optimizer.state("w")?[0].1), 1.);
    assert_eq!(optimizer.group("group_1")?.lr()?, 0.3);
    let (_vs, optimizer, _) = build();
    assert_eq!(optimizer.group("group_0")?.parameters()?, ["w"]);
    let (_vs, optimizer, _) = build();
    assert_eq!(optimizer.group("group_1")?.parameters()?, ["late"]);
    let (_vs, optimizer, _) = build();
    assert_eq!(optimizer.group_names()?, ["group_0", "group_1"]);
    let (_vs, optimizer, _) = build();
    optimizer.knob("lr")?.set(0.5)?;
    assert_eq!(optimizer.group_at(1)?.lr()?, 0.5);
    let (_vs, optimizer, _) = build();
    assert!(optimizer.state("w")?.is_empty());
    let (_vs, optimizer, w) = build();
    let before = optimizer.snapshot()?;
    step_with(&optimizer, &w, 1.)?;
    optimizer.restore(&before)?;
    assert!(optimizer.state("w")?.is_empty());
    let (_vs, optimizer, w) = build();
    optimizer.group("group_0")?.freeze()?;
    assert!(!w.requires_grad());
    let (_vs, optimizer, w) = build();
    (&w * 3.).sum(Kind::Double).backward();
    assert_eq!(value(&optimizer.gradients()?.norm()?), 3.);
    let (_vs, optimizer, w) = build();
    (&w * 3.).sum(Kind::Double).backward();
    optimizer.with_tch(|tch| tch.step())?;
    approx::assert_abs_diff_eq!(value(&w), 0.9, epsilon = 1e-7);
    Ok(())
}

#[test]
fn a_group_rule_over_an_empty_store_says_that_it_has_no_variables_yet() {
    let vs = store();
    let refused = text(Optimizer::sgd(&vs).group("a", |_| true, lr(0.1)).build());
    assert!(refused.contains("group 'a'") && refused.contains("no variables yet"), "{refused}");
}

#[test]
fn a_refused_step_changes_nothing() -> Result<()> {
    for fused in [true, false] {
        for scaled in [false, true] {
            let vs = VarStore::new(Device::Cpu);
            let (w, e) = (vs.root().ones("a_w", &[1]), vs.root().ones("z_e", &[4, 1]));
            let optimizer = Optimizer::adam(&vs).lr(0.1).build()?;
            optimizer.set_fused(fused)?;
            let scaler = tch_ignite::amp::GradScaler::new().init_scale(4.)?;
            let step = || match scaled {
                true => scaler.step_clipped(&optimizer, 1e9).map(drop),
                false => optimizer.step(),
            };
            for _ in 0..5 {
                optimizer.zero_grad()?;
                let rows = Tensor::from_slice(&[1i64, 2]);
                let found = Tensor::embedding(&e, &rows, -1, false, true);
                (found.sum(Kind::Float) + (&w * 2.).sum(Kind::Float)).backward();
                let gradient = w.grad().copy();
                let refused = text(step());
                for part in ["'z_e'", "sparse", "Adam"] {
                    assert!(refused.contains(part), "{refused}");
                }
                assert!(optimizer.state("a_w")?.is_empty() && optimizer.state("z_e")?.is_empty());
                assert_eq!((w.double_value(&[0]), w.grad()), (1., gradient));
            }
            // The expected value is computed by Adam's formulas.
            let (mut m, mut v, mut expected) = (0., 0., 1.);
            for (step, gradient) in [1f64, 2., 3.].into_iter().enumerate() {
                (m, v) = (0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient * gradient);
                let (c1, c2) =
                    (1. - 0.9f64.powi(step as i32 + 1), 1. - 0.999f64.powi(step as i32 + 1));
                expected -= 0.1 * (m / c1) / ((v / c2).sqrt() + 1e-8);
                optimizer.zero_grad()?;
                let loss = (&w * gradient).sum(Kind::Float);
                if scaled {
                    scaler.scale(&loss)?.backward()
                } else {
                    loss.backward()
                }
                match scaled {
                    true => scaler.step(&optimizer).and_then(|()| scaler.update())?,
                    false => optimizer.step()?,
                }
            }
            approx::assert_abs_diff_eq!(expected, 0.7077f64, epsilon = 1e-4);
            approx::assert_abs_diff_eq!(w.double_value(&[0]), expected, epsilon = 1e-6);
        }
    }
    Ok(())
}

/// libtorch's loop would refuse each of these parameters in the middle of its work. Our step refuses them before it
/// changes anything, and names the parameter.
#[test]
fn what_the_loop_would_refuse_midway_is_refused_before() -> Result<()> {
    type Spoil = fn(&Optimizer);
    let cases: [(&str, Spoil, &str); 4] = [
        ("RMSprop", |_| (), "sparse"),
        (
            "Adam",
            |optimizer| {
                let mut moment = optimizer.state("b").unwrap().swap_remove(1).1;
                let other = moment.view_dtype(Kind::Int64);
                moment.set_data(&other);
            },
            "Long",
        ),
        (
            "AdamW",
            |optimizer| {
                let mut moment = optimizer.state("b").unwrap().swap_remove(2).1;
                moment.set_data(&Tensor::zeros([1], (Kind::Double, Device::Cpu)));
            },
            "[1]",
        ),
        ("SGD", |_| (), "sparse gradients with weight decay"),
    ];
    for (name, spoil, why) in cases {
        for fused in [true, false] {
            let vs = store();
            let (a, b) = (vs.root().ones("a", &[4, 1]), vs.root().ones("b", &[4, 1]));
            let optimizer = match name {
                "Adam" => Optimizer::adam(&vs).build()?,
                "AdamW" => Optimizer::adamw(&vs).build()?,
                "RMSprop" => Optimizer::rms_prop(&vs).build()?,
                _ => Optimizer::builder(nn::sgd(0.9, 0., 0.1, false), &vs).build()?,
            };
            optimizer.set_fused(fused)?;
            for _ in 0..2 {
                optimizer.backward_step(&(&a * &b).sum(Kind::Double))?;
            }
            optimizer.zero_grad()?;
            if why.contains("sparse") {
                let rows = Tensor::from_slice(&[1i64, 2]);
                let found = Tensor::embedding(&b, &rows, -1, false, true);
                (a.sum(Kind::Double) + found.sum(Kind::Double)).backward();
            } else {
                (&a * &b).sum(Kind::Double).backward();
            }
            spoil(&optimizer);
            let all = || -> Result<Vec<Tensor>> {
                let state = optimizer.state("a")?.into_iter().map(|(_, tensor)| tensor.copy());
                Ok([a.detach().copy(), b.detach().copy()].into_iter().chain(state).collect())
            };
            let before = all()?;
            for _ in 0..2 {
                let refused = text(optimizer.step());
                assert!(refused.contains("'b'") && refused.contains(why), "{name}: {refused}");
                assert_eq!(all()?, before, "{name}, fused: {fused}");
            }
        }
    }
    Ok(())
}

#[test]
fn an_optimizer_goes_on_after_its_store_was_merged_into_another() -> Result<()> {
    let (vs, a, _) = two();
    let optimizer = optimizer("Adam", &vs);
    step_with(&optimizer, &a, 1.)?;
    let merged = VarStore::merge(vec![(vs, Some("net."))]).unwrap();
    step_with(&optimizer, &a, 1.)?;
    assert_eq!(value(&optimizer.state("a.w")?[0].1), 2.);
    assert_eq!(optimizer.group("a")?.parameters()?, ["a.w"]);
    assert!(value(&merged.variables()["net.a.w"]) < 0.9);
    // An optimizer that is built on the merged store sees the new names.
    let new =
        Optimizer::sgd(&merged).group("all", |name| name.starts_with("net."), lr(0.1)).build()?;
    assert_eq!(new.group("all")?.parameters()?.len(), 2);
    Ok(())
}

#[test]
fn a_state_is_loaded_as_far_as_it_fits() -> Result<()> {
    use tch_ignite::checkpoint::{StateDict, Stateful};
    let net = |classes: i64, names: &[&str]| {
        let vs = store();
        let variables: Vec<_> = names
            .iter()
            .map(|name| vs.root().ones(name, &[if *name == "head" { classes } else { 2 }]))
            .collect();
        let optimizer = Optimizer::adam(&vs)
            .group("body", |name| name != "head", lr(0.1))
            .group("head", |name| name == "head", lr(0.2))
            .build()
            .unwrap();
        let step = || {
            let sums = variables.iter().map(|v| v.sum(Kind::Double));
            optimizer.backward_step(&sums.reduce(|a, b| a * b).unwrap()).unwrap();
        };
        step();
        step();
        (vs, optimizer)
    };
    let (_vs, before) = net(10, &["body", "head", "old"]);
    before.group("body")?.set_lr(0.7)?;
    let (_vs, now) = net(5, &["body", "head", "new"]);
    let own = |name: &str| -> Result<Vec<Tensor>> {
        Ok(now.state(name)?.into_iter().map(|(_, tensor)| tensor.copy()).collect())
    };
    let (head, new) = (own("head")?, own("new")?);
    let saved = before.state_dict()?.copy()?;
    // The state as a whole does not fit, and loading it changes nothing.
    let strict = now.clone().load_state_dict(saved.copy()?);
    assert!(strict.unwrap_err().to_string().contains("'old'"));
    assert_eq!(now.group("body")?.lr()?, 0.1);

    let mut now = now.clone();
    let left_out = now.load_state_dict_partially(saved)?;
    let expected = [
        "'old' was in group 'body', and is not here",
        "'new' is in group 'body', and was not then",
        "'head/exp_avg' is Double of shape [10], and the parameter is Double of shape [5]",
        "'old/exp_avg', Double of shape [2], is unknown here",
        "'old/exp_avg_sq', Double of shape [2], is unknown here",
    ];
    assert_eq!(left_out, expected);
    assert_eq!(now.group("body")?.lr()?, 0.7);
    assert_eq!((own("head")?, own("new")?), (head, new));
    let theirs: Vec<_> = before.state("body")?.into_iter().map(|(_, tensor)| tensor).collect();
    assert_eq!(own("body")?, theirs);

    let other = Optimizer::sgd(&store()).build()?.state_dict()?;
    assert_eq!(text(now.load_state_dict_partially(other)), "it is of SGD, and this is Adam");
    assert!(now.load_state_dict_partially(StateDict::new()).is_err());
    Ok(())
}

#[test]
fn a_state_without_the_step_counts_that_the_optimizer_needs_is_refused() -> Result<()> {
    use tch_ignite::checkpoint::Stateful;
    for name in ["SGD", "Adam", "AdamW", "RMSprop"] {
        let (vs, a, _) = two();
        let mut optimizer = optimizer(name, &vs);
        step_with(&optimizer, &a, 1.)?;
        let mut state = optimizer.state_dict()?.copy()?;
        optimizer.load_state_dict(state.copy()?)?;
        let mut steps: BTreeMap<String, Option<i64>> = state.value("steps")?;
        for step in steps.values_mut() {
            *step = if step.is_some() { None } else { Some(3) };
        }
        let stepped = !steps.is_empty();
        state.set_value("steps", steps)?;
        let loaded = optimizer.load_state_dict(state);
        if name == "SGD" && !stepped {
            continue;
        }
        let has = if name == "SGD" { "has a step count" } else { "has no step count" };
        let error = text(loaded);
        assert!(error.contains(has), "{name}: {error}");
        step_with(&optimizer, &a, 1.)?;
        assert!(value(&a.max()).is_finite(), "{name}");
    }
    Ok(())
}

/// Files of earlier versions may have a tied parameter under any of its names.
#[test]
fn a_state_saved_under_another_name_of_a_tied_parameter_is_found() -> Result<()> {
    use tch_ignite::checkpoint::Stateful;
    let vs = store();
    let w = (vs.root() / "head").ones("weight", &[2]);
    let old = Optimizer::adam(&vs).build()?;
    old.backward_step(&w.sum(Kind::Double))?;
    let (_vs, _w) = tied(true);
    let mut optimizer = Optimizer::adam(&_vs).build()?;
    optimizer.load_state_dict(old.state_dict()?.copy()?)?;
    assert_eq!(value(&optimizer.state("emb.weight")?[0].1), 1.);
    Ok(())
}

#[test]
fn nesterov_momentum_needs_momentum_and_no_dampening() -> Result<()> {
    let vs = VarStore::new(Device::Cpu);
    let _weight = vs.root().ones("weight", &[2]);
    let build = |options| Optimizer::sgd(&vs).group("all", |_| true, options).build();
    for refused in [lr(0.1).nesterov(true), lr(0.1).nesterov(true).momentum(0.9).dampening(0.1)] {
        let error = build(refused).err().map(|error| error.to_string()).unwrap_or_default();
        assert!(error.contains("Nesterov") && error.contains("group 'all'"), "{error}");
    }
    build(lr(0.1).nesterov(true).momentum(0.9))?;
    Ok(())
}
