//! Tests of optimizers from files, of optimizers by name and over tensors, and of target networks.

use tch::{Device, Kind, Tensor, nn};
use tch_ignite::optim::{GroupOptions, Optimizer, OptimizerPlan, lr, var_store_of};
use tch_ignite::schedule::{RunLength, SchedulePlan};
use tch_ignite::{Result, TargetNetwork};

fn store() -> nn::VarStore {
    let vs = nn::VarStore::new(Device::Cpu);
    let root = vs.root();
    nn::embedding(&root / "embedding", 3, 2, Default::default());
    nn::linear(&root / "fc1", 2, 2, Default::default());
    nn::layer_norm(&root / "norm", vec![2], Default::default());
    nn::linear(&root / "fc2", 2, 1, Default::default());
    vs
}

fn text<T>(result: Result<T>) -> String {
    result.map(drop).unwrap_err().to_string()
}

/// The error of reading a plan, or of building it over the store.
fn refused(toml: &str) -> String {
    match OptimizerPlan::from_toml(toml) {
        Ok(plan) => text(plan.build(&store())),
        Err(error) => error.to_string(),
    }
}

const PLAN: &str = r#"
[optimizer]
type = "adamw"
lr = 1e-3
betas = [0.9, 0.95]
weight_decay = 0.1

[[optimizer.group]]
name = "frozen"
prefix = ["embedding", "position"]
frozen = true

[[optimizer.group]]
name = "no decay"
bias_or_norm = true
weight_decay = 0

[[optimizer.group]]
name = "last"
prefix = "fc2"
suffix = "weight"
lr = 1e-2
amsgrad = true

[[optimizer.group]]
name = "rest"

[[schedule]]
group = "last"
type = "StepLR"
base = 1e-2
step_size = 5
"#;

#[test]
fn a_plan_builds_what_code_builds() -> Result<()> {
    let (vs, plan) = (store(), OptimizerPlan::from_toml(PLAN)?);
    let optimizer = plan.build(&vs)?;
    assert_eq!(optimizer.name(), "AdamW");
    assert_eq!(optimizer.group_names()?, ["frozen", "no decay", "last", "rest"]);
    let group = |name: &str| optimizer.group(name);
    let names = |name: &str| {
        let mut names = group(name)?.parameters()?;
        names.sort();
        Result::Ok(names)
    };
    assert_eq!(names("frozen")?, ["embedding.weight"]);
    assert_eq!(names("no decay")?, ["fc1.bias", "fc2.bias", "norm.bias", "norm.weight"]);
    assert_eq!(
        (names("last")?, names("rest")?),
        (vec!["fc2.weight".into()], vec!["fc1.weight".into()])
    );
    assert!(!vs.variables()["embedding.weight"].requires_grad());
    assert!(vs.variables()["fc1.weight"].requires_grad());
    for (name, lr, decay, amsgrad) in
        [("no decay", 1e-3, 0., false), ("last", 1e-2, 0.1, true), ("rest", 1e-3, 0.1, false)]
    {
        let group = group(name)?;
        assert_eq!((group.lr()?, group.weight_decay()?, group.amsgrad()?), (lr, decay, amsgrad));
        assert_eq!(group.betas()?, (0.9, 0.95));
    }
    // The schedules of the same file drive it.
    let schedules = SchedulePlan::from_toml(PLAN)?;
    assert_eq!(schedules.bind(&optimizer, RunLength::new(10, 1))?.len(), 1);
    // It makes the round trip, also as a part of a user's own configuration.
    let written = serde_json::to_string(&plan).unwrap();
    let again = OptimizerPlan::from_json(&written)?;
    assert_eq!(again, plan);
    assert_eq!(serde_json::from_str::<OptimizerPlan>(&written).unwrap(), plan);
    assert_eq!(again.build(&store())?.group("last")?.lr()?, 1e-2);
    Ok(())
}

#[test]
fn lists_and_groups_of_other_algorithms_are_read() -> Result<()> {
    let plan = r#"{"optimizer": {
        "type": "Muon", "ns_coefficients": [3, -4, 2], "nesterov": false, "group": [
            {"name": "matrices", "matrix": true, "prefix": "fc"},
            {"name": "factored", "type": "Adafactor", "prefix": "embedding", "eps": [0.5, 0.25]},
            {"name": "others", "type": "AdamW", "beta2": 0.5}
        ]
    }}"#;
    let optimizer = OptimizerPlan::from_json(plan)?.build(&store())?;
    let group = |name: &str| optimizer.group(name);
    assert_eq!(group("matrices")?.parameters()?.len(), 2);
    assert_eq!(
        (group("matrices")?.get("ns_coefficient_b")?, group("matrices")?.nesterov()?),
        (-4., false)
    );
    assert_eq!(
        (group("factored")?.algorithm(), group("factored")?.get("eps2")?),
        ("Adafactor", 0.25)
    );
    assert_eq!((group("others")?.algorithm(), group("others")?.betas()?), ("AdamW", (0.9, 0.5)));
    let plan = r#"{"optimizer": {"type": "AdEMAMix", "betas": [0.5, 0.25, 0.75]}}"#;
    let optimizer = OptimizerPlan::from_json(plan)?.build(&store())?;
    let group = optimizer.group_at(0)?;
    assert_eq!((group.betas()?, group.get("beta3")?), ((0.5, 0.25), 0.75));
    Ok(())
}

#[test]
fn mistakes_are_told_with_their_place() {
    let sgd = "[optimizer]\ntype = 'SGD'\n";
    let group = |text: &str| format!("{sgd}[[optimizer.group]]\nname = 'a'\n{text}");
    for (plan, expected) in [
        (
            "lr = 1".to_string(),
            "lr: unknown field `lr`, expected `optimizer` or `schedule` (line 1, column 6)",
        ),
        ("[[schedule]]\ntype = 'StepLR'".into(), "missing field `optimizer`"),
        (
            "[optimizer]\nlr = 1".into(),
            "optimizer: missing field `type`: PyTorch's name of the optimizer (line 1, column 1)",
        ),
        (
            "[optimizer]\ntype = 'Sgdd'".into(),
            "optimizer.type: no optimizer 'Sgdd'; there are: SGD, Adam,",
        ),
        (
            "[optimizer]\ntype = 3".into(),
            "optimizer.type: invalid type: integer `3`, expected a string (line 2, column 8)",
        ),
        (
            format!("{sgd}lr = -0.5"),
            "optimizer.lr: lr must be finite and not negative, but -0.5 was given (line 3, column 6)",
        ),
        (
            format!("{sgd}betas = [0.9, 0.9]"),
            "optimizer.betas[0]: SGD has no hyper-parameter 'beta1'; it has: lr, momentum",
        ),
        (
            format!("{sgd}rate = 0.9"),
            "optimizer.rate: SGD has no hyper-parameter 'rate'; it has: lr, momentum",
        ),
        (
            format!("{sgd}momentum = 'high'"),
            "optimizer.momentum: invalid type: expected a number, but given \"high\" (line 3, column 12)",
        ),
        (
            format!("{sgd}momentum = [0.9]"),
            "optimizer.momentum: invalid type: expected a number, but given [0.9] (line 3, column 12)",
        ),
        (
            format!("{sgd}lr = true"),
            "optimizer.lr: invalid type: expected a number, but given true (line 3, column 6)",
        ),
        (
            format!("{sgd}nesterov = 'yes'"),
            "optimizer.nesterov: invalid type: expected true or false, but given \"yes\"",
        ),
        (
            "[optimizer]\ntype = 'SGDScheduleFree'\nmomentum = 0".into(),
            "optimizer.momentum: momentum of SGDScheduleFree must be between 0 and 1, but 0 was given (line 3, column 12)",
        ),
        (
            "[optimizer]\ntype = 'SGDScheduleFree'\nk = 3".into(),
            "optimizer.k: k is counted by the steps of SGDScheduleFree, and can only be read (line 3, column 5)",
        ),
        (
            "[optimizer]\ntype = 'AdEMAMix'\nbetas = [0.9, 0.99]".into(),
            "optimizer.betas: expected a list of 3 numbers, but given [0.9,0.99] (line 3, column 9)",
        ),
        (
            "[optimizer]\ntype = 'Adam'\nbetas = [0.9]".into(),
            "optimizer.betas: expected a list of 2 numbers, but given [0.9] (line 3, column 9)",
        ),
        (
            "[optimizer]\ntype = 'Adam'\nbetas = [0.9, 1.5]".into(),
            "optimizer.betas[1]: beta2 must be in [0, 1), but 1.5 was given (line 3, column 15)",
        ),
        (
            format!("{sgd}[[optimizer.group]]\nprefix = 'fc'"),
            "optimizer.group[0]: missing field `name` (line 3, column 1)",
        ),
        (
            group("prefix = 3"),
            "optimizer.group[0].prefix: expected a text or a list of texts (line 5, column 10)",
        ),
        (
            group("frozen = 'yes'"),
            "optimizer.group[0].frozen: invalid type: string \"yes\", expected a boolean (line 5, column 10)",
        ),
        (
            group("lr = -1"),
            "optimizer.group[0].lr: lr must be finite and not negative, but -1 was given (line 5, column 6)",
        ),
        (group("type = 'x'"), "optimizer.group[0].type: no optimizer 'x'; there are:"),
        (
            group("[[optimizer.group]]\nname = 'b'"),
            "optimizer.group[0]: group 'a' has no condition, so it takes all parameters that are left",
        ),
        (
            group(
                "prefix = 'fc'\n[[optimizer.group]]\nname = 'b'\n[[optimizer.group]]\nname = 'c'",
            ),
            "optimizer.group[1]: group 'b' has no condition, so it takes all parameters that are left",
        ),
        (group("prefix = 'fc'"), "optimizer: in no parameter group: 'embedding.weight'"),
        (
            group("prefix = 'conv'\n[[optimizer.group]]\nname = 'b'"),
            "optimizer: group 'a' has no parameter; the parameters are:",
        ),
        (group("[[optimizer.group"), "TOML parse error at line 5"),
    ] {
        let error = refused(&plan);
        assert!(error.starts_with(expected), "{plan}\n{error}");
    }
    let json =
        r#"{"optimizer": {"type": "SGD", "group": [{"name": "a"}, {"name": "a", "lr": -1}]}}"#;
    let error = text(OptimizerPlan::from_json(json));
    assert!(error.ends_with("but -1 was given (line 1, column 76)"), "{error}");
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("plan.toml");
    std::fs::write(&path, format!("{sgd}lr = -0.5")).unwrap();
    let error = text(OptimizerPlan::from_path(&path));
    assert!(error.ends_with("plan.toml: optimizer.lr: lr must be finite and not negative, but -0.5 was given (line 3, column 6)"), "{error}");
}

#[test]
fn optimizers_by_name_are_those_of_their_methods() -> Result<()> {
    let vs = var_store_of([(
        "w",
        &Tensor::ones([2], (Kind::Float, Device::Cpu)).set_requires_grad(true),
    )])?;
    for (named, own) in [
        ("SGD", Optimizer::sgd(&vs).build()?),
        ("adam", Optimizer::adam(&vs).build()?),
        ("AdamW", Optimizer::adamw(&vs).build()?),
        ("RMSprop", Optimizer::rms_prop(&vs).build()?),
        ("nadam", Optimizer::nadam(&vs).build()?),
        ("Adadelta", Optimizer::adadelta(&vs).build()?),
    ] {
        let named = Optimizer::named(named, &vs)?.build()?;
        assert_eq!(format!("{named:?}"), format!("{own:?}"));
    }
    assert!(
        text(Optimizer::named("Adamm", &vs))
            .starts_with("no optimizer 'Adamm'; there are: SGD, Adam")
    );
    Ok(())
}

#[test]
fn options_of_the_builder_are_those_of_all_groups() -> Result<()> {
    let vs = store();
    let optimizer = Optimizer::nadam(&vs)
        .betas(0.8, 0.9)
        .weight_decay(0.1)
        .decoupled_weight_decay(true)
        .group("fc", |name| name.starts_with("fc"), lr(1.).weight_decay(0.))
        .group("rest", |name| !name.starts_with("fc"), GroupOptions::new())
        .build()?;
    let (fc, rest) = (optimizer.group("fc")?, optimizer.group("rest")?);
    assert_eq!((fc.betas()?, fc.weight_decay()?), ((0.8, 0.9), 0.));
    assert_eq!((rest.weight_decay()?, rest.get("decoupled_weight_decay")?), (0.1, 1.));
    assert!(
        text(Optimizer::sgd(&vs).rho(0.5).build()).starts_with("SGD has no hyper-parameter 'rho'")
    );
    assert!(text(Optimizer::sgd(&vs).momentum(-1.).build()).starts_with("momentum must be finite"));
    Ok(())
}

#[test]
fn steps_with_clipping_are_their_parts() -> Result<()> {
    let run = |clip: &dyn Fn(&Optimizer, &Tensor) -> Result<()>| {
        let w = Tensor::from_slice(&[3f64, -4., 0.5]).set_requires_grad(true);
        let vs = var_store_of([("w", &w)])?;
        let optimizer = Optimizer::sgd(&vs).lr(0.1).momentum(0.9).build()?;
        for _ in 0..3 {
            clip(&optimizer, &w.square().sum(Kind::Double))?;
        }
        Result::Ok(Vec::<f64>::try_from(w.detach()).unwrap())
    };
    let parts = |by_norm: bool| {
        run(&|optimizer, loss| {
            optimizer.zero_grad()?;
            loss.backward();
            if by_norm {
                let _ = optimizer.clip_grad_norm(2.)?;
            } else {
                optimizer.clip_grad_value(2.)?;
            }
            optimizer.step()
        })
    };
    assert_eq!(run(&|optimizer, loss| optimizer.backward_step_clip(loss, 2.))?, parts(false)?);
    let by_norm = run(&|optimizer, loss| optimizer.backward_step_clip_norm(loss, 2.).map(drop))?;
    for (ours, expected) in by_norm.iter().zip(parts(true)?) {
        assert!((ours - expected).abs() < 1e-14, "{ours} {expected}");
    }
    // A step that is refused leaves the gradients.
    let w = Tensor::ones([1], (Kind::Float, Device::Cpu)).set_requires_grad(true);
    let vs = var_store_of([("w", &w)])?;
    let optimizer = Optimizer::sgd(&vs).build()?;
    w.sum(Kind::Float).backward();
    let loss = w.sum(Kind::Float);
    assert!(text(optimizer.backward_step_clip(&loss, -1.)).contains("must not be negative"));
    assert!(
        text(optimizer.backward_step_clip_norm(&loss, f64::NAN)).contains("must not be negative")
    );
    assert_eq!(w.grad().double_value(&[0]), 1.);
    Ok(())
}

#[test]
fn tensors_without_a_store_have_parts_in_their_names() -> Result<()> {
    let tensor = || Tensor::ones([1], (Kind::Float, Device::Cpu));
    let (weight, mean) = (tensor().set_requires_grad(true), tensor());
    let vs = var_store_of([("fc.0.weight".to_owned(), &weight), ("bn.mean".to_owned(), &mean)])?;
    let optimizer = Optimizer::adam(&vs).build()?;
    assert_eq!(optimizer.group_at(0)?.parameters()?, ["fc.0.weight"]);
    assert!(vs.variables()["bn.mean"].data_ptr() == mean.data_ptr());
    let refused = |tensors: &[(&str, &Tensor)]| text(var_store_of(tensors.iter().copied()));
    assert_eq!(
        refused(&[("a", &weight), ("a", &mean)]),
        "two tensors are named 'a': give each a name of its own"
    );
    assert_eq!(refused(&[("", &mean)]), "a tensor has an empty name: give it another");
    assert!(refused(&[("a", &(&weight * 2.))]).contains("cannot be a parameter"));
    Ok(())
}

#[test]
fn a_target_network_follows_by_name() -> Result<()> {
    let network = |start: f64, frozen: bool| {
        let mut vs = nn::VarStore::new(Device::Cpu);
        let w = vs.root().var("w", &[2, 2], nn::Init::Const(start));
        let mean =
            vs.root().add("mean", Tensor::full([1], start, (Kind::Float, Device::Cpu)), false);
        let count = vs.root().add("count", Tensor::from_slice(&[start as i64]), false);
        if frozen {
            vs.freeze();
        }
        (vs, w, mean, count)
    };
    for frozen in [false, true] {
        let ((online, ..), (target, w, mean, count)) = (network(8., false), network(0., frozen));
        let mut network = TargetNetwork::new(&target, &online)?;
        assert_eq!(w.double_value(&[1, 1]), 0.);
        network.soft_update(0.25)?;
        network.soft_update(0.5)?;
        let values = [w.double_value(&[1, 1]), mean.double_value(&[0]), count.double_value(&[0])];
        assert_eq!(values, [5., 8., 8.]);
        network.hard_update()?;
        assert_eq!(w.double_value(&[0, 1]), 8.);
        let refused = text(network.soft_update(1.5));
        assert!(
            refused.starts_with("soft_update: tau") && refused.ends_with("given 1.5"),
            "{refused}"
        );
        assert!(network.soft_update(f64::NAN).is_err());
    }
    let (a, b) = (store(), nn::VarStore::new(Device::Cpu));
    assert!(text(TargetNetwork::new(&b, &a)).starts_with("the target has no 'embedding.weight'"));
    assert!(text(TargetNetwork::new(&a, &b)).contains("the other network has not"));
    let _ = a.root().ones("x", &[2]);
    let c = store();
    let _ = c.root().ones("x", &[3]);
    let sizes = "'x' has size [3] in the target, and [2] in the other network";
    assert_eq!(text(TargetNetwork::new(&c, &a)), sizes);
    // A variable with two names cannot follow two variables; two can follow one.
    let (tied, untied) = (nn::VarStore::new(Device::Cpu), nn::VarStore::new(Device::Cpu));
    let one = tied.root().ones("a", &[2]);
    let _ = tied.root().add("b", one.shallow_clone(), true);
    let (_, b) = (untied.root().zeros("a", &[2]), untied.root().zeros("b", &[2]));
    assert_eq!(
        text(TargetNetwork::new(&tied, &untied)),
        "'a' and 'b' are one variable in the target and two in the other network: tie them in both, or in neither"
    );
    TargetNetwork::new(&untied, &tied)?.hard_update()?;
    assert_eq!(b.double_value(&[1]), 1.);
    Ok(())
}
