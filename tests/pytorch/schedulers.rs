//! Schedulers of torch go on here with Python's values, and back.

use anyhow::{Context, Result, ensure};
use serde_json::Value as Json;
use tch::Device;
use tch::nn::{self, VarStore};
use tch_ignite::engine::{Engine, Event, Until};
use tch_ignite::optim::{Optimizer, lr};
use tch_ignite::pytorch::{self, Dict, Value};
use tch_ignite::schedule::*;

use super::{python, serial};

/// The schedulers, each on two groups, and a run: what the groups have before each step, from `begin` on.
const CASES: &str = r#"
from torch.optim import lr_scheduler as L
CASES = {
    "StepLR": lambda o: L.StepLR(o, 3, 0.3),
    "MultiStepLR": lambda o: L.MultiStepLR(o, [2, 9, 9, 14], 0.3),
    "ExponentialLR": lambda o: L.ExponentialLR(o, 0.9),
    "CosineAnnealingLR": lambda o: L.CosineAnnealingLR(o, 10, 0.01),
    "LinearLR": lambda o: L.LinearLR(o, 0.1, 0.8, 15),
    "ConstantLR": lambda o: L.ConstantLR(o, 0.3, 9),
    "PolynomialLR": lambda o: L.PolynomialLR(o, 30, 1.5),
    "OneCycleLR": lambda o: L.OneCycleLR(o, [1.0, 2.0], total_steps=41),
    "OneCycleLR in three": lambda o: L.OneCycleLR(o, [1.0, 2.0], total_steps=41, pct_start=0.25, three_phase=True, anneal_strategy="linear", base_momentum=0.7),
    "OneCycleLR alone": lambda o: L.OneCycleLR(o, 1.0, total_steps=41, cycle_momentum=False),
    "CyclicLR": lambda o: L.CyclicLR(o, 0.1, 0.5, step_size_up=4, step_size_down=6, mode="triangular2", base_momentum=0.6),
    "CyclicLR alone": lambda o: L.CyclicLR(o, [0.1, 0.2], 0.5, step_size_up=4, mode="exp_range", gamma=0.99, cycle_momentum=False),
    "CosineAnnealingWarmRestarts": lambda o: L.CosineAnnealingWarmRestarts(o, 3, 2, 0.01),
    "CosineAnnealingWarmRestarts alike": lambda o: L.CosineAnnealingWarmRestarts(o, 4),
    "SequentialLR": lambda o: L.SequentialLR(o, [L.LinearLR(o, 0.1, total_iters=5), L.ExponentialLR(o, 0.9), L.CosineAnnealingLR(o, 30)], [5, 15]),
    "ChainedScheduler": lambda o: L.ChainedScheduler([L.LinearLR(o, 0.1, total_iters=5), L.ExponentialLR(o, 0.9)]),
    "ReduceLROnPlateau": lambda o: L.ReduceLROnPlateau(o, "max", 0.5, 2, 1e-3, "abs", cooldown=1, min_lr=[0.01, 0.02]),
}
def groups():
    a, b = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    return torch.optim.SGD([{"params": [a], "lr": 0.1}, {"params": [b], "lr": 0.2}], momentum=0.9)
def metric(update):
    return (update * 7 % 11) / 10
def run(optimizer, scheduler, begin, end):
    seen = []
    for update in range(begin, end):
        seen.append([[group["lr"], group["momentum"]] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step(metric(update)) if isinstance(scheduler, L.ReduceLROnPlateau) else scheduler.step()
    return seen
"#;

fn metric(update: usize) -> f64 {
    (update * 7 % 11) as f64 / 10.
}

fn groups() -> Result<(VarStore, Optimizer)> {
    let vs = VarStore::new(Device::Cpu);
    let _ = (vs.root().zeros("a", &[1]), vs.root().zeros("b", &[1]));
    let optimizer = Optimizer::builder(nn::sgd(0.9, 0., 0., false), &vs)
        .group("a", |name| name == "a", lr(0.1).momentum(0.9))
        .group("b", |name| name == "b", lr(0.2).momentum(0.9))
        .build()?;
    Ok((vs, optimizer))
}

/// The schedulers of a case, made from the file: for each group, and for its momentum if Python's turns it.
fn schedulers(saved: &Value, optimizer: &Optimizer) -> Result<Vec<ParamScheduler<AnySchedule>>> {
    let (state, of_optimizer) = (saved.require("scheduler")?, saved.require("optimizer")?);
    let mut schedulers = vec![];
    for (index, group) in optimizer.groups()?.iter().enumerate() {
        let name = |knob: &str| format!("{knob} ({index})");
        let schedule = pytorch::schedule(state, of_optimizer, index)?;
        schedulers.push(ParamScheduler::new(name("lr"), group.knob("lr")?, schedule));
        if let Ok(schedule) = pytorch::momentum_schedule(state, of_optimizer, index) {
            let knob = group.knob("momentum")?;
            schedulers.push(ParamScheduler::new(name("momentum"), knob, schedule));
        }
    }
    schedulers
        .iter_mut()
        .try_for_each(|scheduler| pytorch::load_scheduler(scheduler, state, of_optimizer))?;
    Ok(schedulers)
}

fn plateau(optimizer: &Optimizer) -> Result<ReduceLROnPlateauScheduler> {
    Ok(ReduceLROnPlateauScheduler::max("lr", optimizer.knob("lr")?, "metric")?
        .factor(0.5)
        .patience(2)
        .threshold(1e-3, ThresholdMode::Abs)
        .cooldown(1)
        .min_value([0.01, 0.02]))
}

#[test]
fn rates_of_all_schedulers_go_on_here_and_back_in_python() -> Result<()> {
    let _guard = serial();
    let folder = tempfile::tempdir()?;
    let (path, back) = (folder.path().join("there.pt"), folder.path().join("here.pt"));
    let script = format!(
        "{CASES}{}",
        r#"
saved, seen = {}, {}
for name, make in CASES.items():
    optimizer = groups()
    scheduler = make(optimizer)
    run(optimizer, scheduler, 0, 7)
    saved[name] = {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
    torch.save(saved, sys.argv[1])
    saved = torch.load(sys.argv[1], weights_only=True)
    seen[name] = run(optimizer, scheduler, 7, 40)
torch.save(saved, sys.argv[1])
print(json.dumps(seen))
"#
    );
    let Some(output) = python(&script, &[&path])? else { return Ok(()) };
    let seen: serde_json::Map<String, Json> = serde_json::from_str(&output)?;
    assert_eq!(seen.len(), 17);
    let all = pytorch::read(&path)?;
    let mut written = Dict::new();
    for (name, expected) in &seen {
        let expected: Vec<[[f64; 2]; 2]> = serde_json::from_value(expected.clone())?;
        let saved = all.require(name)?;
        let (_vs, mut optimizer) = groups()?;
        pytorch::load_optimizer(&mut optimizer, saved.require("optimizer")?, &[])?;
        let check = |update: usize| -> Result<()> {
            for (group, expected) in optimizer.groups()?.iter().zip(expected[update - 7]) {
                let ours = [group.lr()?, group.get("momentum")?];
                let differ = ours.iter().zip(expected).any(|(a, b)| (a - b).abs() > 1e-12);
                ensure!(!differ, "{name}, update {update}: {ours:?} instead of {expected:?}");
            }
            Ok(())
        };
        let (mut of_optimizer, of_scheduler);
        if name == "ReduceLROnPlateau" {
            let mut plateau = plateau(&optimizer)?;
            pytorch::load_plateau(&mut plateau, saved.require("scheduler")?)?;
            for update in 7..20 {
                check(update)?;
                plateau.advance(metric(update))?;
            }
            of_optimizer = pytorch::optimizer_value(&optimizer, &[])?;
            of_scheduler = pytorch::plateau_value(&plateau)?;
        } else {
            let mut schedulers = schedulers(saved, &optimizer)?;
            assert_eq!(
                schedulers.len(),
                if name.contains("alone") || !name.contains("Cyc") { 2 } else { 4 },
                "{name}"
            );
            for update in 7..20 {
                schedulers.iter_mut().try_for_each(|scheduler| scheduler.advance().map(drop))?;
                check(update)?;
            }
            of_optimizer = pytorch::optimizer_value(&optimizer, &[])?;
            let all: Vec<_> = schedulers.iter().collect();
            of_scheduler =
                pytorch::scheduler_value(&all, &mut of_optimizer).with_context(|| name.clone())?;
        }
        let mut both = Dict::new();
        both.insert("optimizer", of_optimizer);
        both.insert("scheduler", of_scheduler);
        written.insert(name, both);
    }
    let written = Value::from(written);
    pytorch::write(&back, &written)?;
    let script = format!(
        "{CASES}{}",
        r#"
there, seen = torch.load(sys.argv[1], weights_only=True), {}
for name, make in CASES.items():
    optimizer = groups()
    scheduler = make(optimizer)
    known = set(scheduler.state_dict()) - {"lr_lambdas", "default_min_lr", "_scale_fn_ref"}
    missing = known - set(there[name]["scheduler"])
    assert not missing or name in ("CyclicLR alone",) and missing <= {"use_beta1", "base_momentums", "max_momentums"} or missing == {"use_beta1"}, (name, missing)
    optimizer.load_state_dict(there[name]["optimizer"])
    scheduler.load_state_dict(there[name]["scheduler"])
    seen[name] = run(optimizer, scheduler, 20, 40)
print(json.dumps(seen))
"#
    );
    let Some(output) = python(&script, &[&back])? else { return Ok(()) };
    let back: serde_json::Map<String, Json> = serde_json::from_str(&output)?;
    for (name, values) in &back {
        let ours: Vec<[[f64; 2]; 2]> = serde_json::from_value(values.clone())?;
        let expected: Vec<[[f64; 2]; 2]> = serde_json::from_value(seen[name].clone())?;
        for (update, (ours, expected)) in ours.iter().zip(&expected[13..]).enumerate() {
            let pairs = ours.iter().flatten().zip(expected.iter().flatten());
            let worst = pairs.map(|(a, b)| (a - b).abs()).fold(0., f64::max);
            assert!(
                worst <= 1e-12,
                "{name}, update {}: {ours:?} instead of {expected:?}",
                update + 20
            );
        }
    }
    // Reading the states that this test has written gives schedulers for both groups.
    for (name, _) in seen.iter().filter(|(name, _)| *name != "ReduceLROnPlateau") {
        let (_vs, optimizer) = groups()?;
        assert_eq!(schedulers(written.require(name)?, &optimizer)?.len() % 2, 0, "{name}");
    }
    Ok(())
}

#[test]
fn schedules_that_differ_from_the_file_are_refused() -> Result<()> {
    let _guard = serial();
    let (_vs, optimizer) = groups()?;
    let knob = optimizer.group("a")?.knob("lr")?;
    let scheduler = |schedule| ParamScheduler::<AnySchedule>::new("lr", knob.clone(), schedule);
    let mut of_optimizer = pytorch::optimizer_value(&optimizer, &[])?;
    let mut both = vec![];
    for group in optimizer.groups()? {
        both.push(ParamScheduler::new(
            group.name(),
            group.knob("lr")?,
            StepLR::new(group.lr()?, 5),
        ));
        both.iter_mut().last().context("one")?.advance()?;
    }
    let saved = pytorch::scheduler_value(&both.iter().collect::<Vec<_>>(), &mut of_optimizer)?;
    for (schedule, reason) in [
        (
            StepLR::new(0.1, 6).into(),
            "at update 5 the schedule here gives 0.1, and StepLR is 0.010",
        ),
        (
            StepLR::new(0.2, 5).into(),
            "at update 1 the schedule here gives 0.2, and Python's last rate is 0.1",
        ),
        (ExponentialLR::new(0.1, 1.).into(), "at update 5"),
    ] {
        let mut other = scheduler(schedule);
        let error =
            pytorch::load_scheduler(&mut other, &saved, &of_optimizer).unwrap_err().to_string();
        assert!(error.contains(reason), "{error}");
        assert_eq!(other.state_dict()["event_index"], 0);
    }
    // Another class with the same values will do.
    let mut same = scheduler(StepLR::new(0.1, 5).then(StepLR::new(0.1, 5), 2000).into());
    pytorch::load_scheduler(&mut same, &saved, &of_optimizer)?;
    assert_eq!(same.state_dict()["event_index"], 1);

    // A rate that the program has set after `scheduler.step()`, where there is no plateau.
    knob.set(0.05)?;
    let set_by_hand = pytorch::optimizer_value(&optimizer, &[])?;
    knob.set(0.1)?;
    let mut other = scheduler(StepLR::new(0.1, 5).into());
    let error = pytorch::load_scheduler(&mut other, &saved, &set_by_hand).unwrap_err().to_string();
    assert!(error.contains("make a plateau"), "{error}");
    assert!(error.contains("set lr of its group to 0.1 there"), "{error}");
    assert_eq!(other.state_dict()["event_index"], 0);

    let with = |key: &str, value: Value| -> Result<Value> {
        let mut dict = saved.as_dict().context("a dict")?.clone();
        dict.insert(key, value);
        Ok(dict.into())
    };
    for (saved, reason) in [
        (with("lr_lambdas", Value::list([Value::None]))?, "are in no file"),
        (with("base_lrs", Value::None)?, "no list of numbers base_lrs"),
        (with("step_size", "a".into())?, "StepLR: "),
        (Dict::new().into(), "of no scheduler"),
        (3.into(), "it is a int"),
    ] {
        let error = pytorch::schedule(&saved, &of_optimizer, 0).unwrap_err().to_string();
        assert!(error.contains(reason), "{error}");
    }
    for (saved, reason) in [
        (with("last_epoch", (-1).into())?, "no last_epoch"),
        (with("last_epoch", Value::Float(1.5))?, "no last_epoch"),
        (with("last_epoch", (1i64 << 52).into())?, "no last_epoch"),
        (with("T_cur", Value::Float(1.5))?, "between two epochs"),
    ] {
        let mut other = scheduler(StepLR::new(0.1, 5).into());
        let error = pytorch::load_scheduler(&mut other, &saved, &of_optimizer).unwrap_err();
        assert!(error.to_string().contains(reason), "{error}");
    }
    // Python saves no functions, so of a schedule by a function only the last value is known.
    let functions = with("lr_lambdas", Value::list([Value::None]))?;
    let mut lambda = ParamScheduler::new("lr", knob.clone(), LambdaLR::new(0.1, |_| 1.));
    pytorch::load_scheduler(&mut lambda, &functions, &of_optimizer)?;

    // Schedules that torch does not have are refused.
    let mut noam = ParamScheduler::<AnySchedule>::new(
        "lr",
        optimizer.knob("lr")?,
        CosineAnnealing::new(1., 0., 5).into(),
    );
    noam.advance()?;
    let error = pytorch::scheduler_value(&[&noam], &mut of_optimizer).unwrap_err().to_string();
    assert!(error.contains("torch has none like it"), "{error}");
    let error = pytorch::scheduler_value(&[&both[0]], &mut of_optimizer).unwrap_err().to_string();
    assert!(error.contains("group 1 has no scheduler"), "{error}");
    let saved = pytorch::plateau_value(&plateau(&optimizer)?)?;
    let mut plateau = plateau(&optimizer)?.patience(3);
    let error = pytorch::load_plateau(&mut plateau, &saved).unwrap_err().to_string();
    assert!(error.contains("patience is 2 there and 3 here"), "{error}");
    Ok(())
}

#[test]
fn what_a_plateau_has_reduced_here_does_not_count_after_loading() -> Result<()> {
    let (_vs, optimizer) = groups()?;
    let saved = pytorch::plateau_value(&plateau(&optimizer)?)?;
    let mut used = plateau(&optimizer)?;
    (0..4).try_for_each(|_| used.advance(0.))?;
    assert_eq!(used.state_dict()["reductions"], serde_json::json!([0.5, 0.5]));
    pytorch::load_plateau(&mut used, &saved)?;
    assert_eq!(used.state_dict()["reductions"], serde_json::json!([1., 1.]));
    assert_eq!(used.state_dict()["event_index"], 0);
    let knob = optimizer.group("a")?.knob("lr")?;
    ParamScheduler::new("lr", knob.clone(), ExponentialLR::new(0.3, 1.)).advance()?;
    assert_eq!(knob.get()?, 0.3);
    Ok(())
}

/// A plateau beside each of these schedulers of [`CASES`], stepped after it or before.
const BESIDE: &str = r#"
def both(case):
    optimizer = groups()
    scheduler = CASES[case](optimizer)
    return optimizer, scheduler, L.ReduceLROnPlateau(optimizer, "max", 0.5, 2, 1e-3, "abs", cooldown=1)
def run_both(parts, first, begin, end):
    optimizer, scheduler, plateau = parts
    seen = []
    for update in range(begin, end):
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        steps = [lambda: plateau.step(metric(update)), scheduler.step]
        for step in steps if first else reversed(steps):
            step()
    return seen
def states(parts):
    return dict(zip(("optimizer", "scheduler", "plateau"), (part.state_dict() for part in parts)))
"#;

/// Schedulers that make each rate from the one before by multiplying.
const MULTIPLY: [&str; 7] = [
    "StepLR",
    "MultiStepLR",
    "ExponentialLR",
    "LinearLR",
    "ConstantLR",
    "PolynomialLR",
    "ChainedScheduler",
];

#[test]
fn a_plateau_goes_on_beside_a_schedule_here_and_back_in_python() -> Result<()> {
    let _guard = serial();
    let folder = tempfile::tempdir()?;
    let (path, back) = (folder.path().join("there.pt"), folder.path().join("here.pt"));
    let script = format!(
        "{CASES}{BESIDE}{}",
        r#"
saved, seen = {}, {}
for name in CASES:
    for first in (False, True):
        if name == "ReduceLROnPlateau":
            continue
        parts, key = both(name), f"{name} {first}"
        run_both(parts, first, 0, 7)
        saved[key] = states(parts)
        torch.save(saved, sys.argv[1])
        saved = torch.load(sys.argv[1], weights_only=True)
        seen[key] = run_both(parts, first, 7, 40)
print(json.dumps(seen))
"#
    );
    let Some(output) = python(&script, &[&path])? else { return Ok(()) };
    let seen: serde_json::Map<String, Json> = serde_json::from_str(&output)?;
    let all = pytorch::read(&path)?;
    let plateau = |optimizer: &Optimizer| -> Result<ReduceLROnPlateauScheduler> {
        Ok(plateau(optimizer)?.min_value([0.]))
    };
    let (mut written, mut refused) = (Dict::new(), 0);
    for (name, expected) in &seen {
        let expected: Vec<[f64; 2]> = serde_json::from_value(expected.clone())?;
        let saved = all.require(name)?;
        let (state, of_optimizer) = (saved.require("scheduler")?, saved.require("optimizer")?);
        let (_vs, mut optimizer) = groups()?;
        pytorch::load_optimizer(&mut optimizer, of_optimizer, &[])?;
        let schedule = pytorch::schedule(state, of_optimizer, 0)?;
        let knob = optimizer.group("a")?.knob("lr")?;
        let mut alone = ParamScheduler::new("lr", knob, schedule);
        let without = pytorch::load_scheduler(&mut alone, state, of_optimizer);
        let mut plateau = plateau(&optimizer)?;
        pytorch::load_plateau(&mut plateau, saved.require("plateau")?)?;
        let schedulers = schedulers(saved, &optimizer);
        if !MULTIPLY.iter().any(|multiplies| name.starts_with(&format!("{multiplies} "))) {
            // Where the scheduler comes last, it has overwritten the reduction.
            if let Err(error) = schedulers {
                let error = error.to_string();
                assert!(error.contains("goes on in another way"), "{name}: {error}");
                assert_eq!(plateau.state_dict()["reductions"], serde_json::json!([1., 1.]));
                refused += 1;
            }
            continue;
        }
        let error = without.unwrap_err().to_string();
        let reason = if name.ends_with("True") { "Python's last rate" } else { "make a plateau" };
        assert!(error.contains(reason), "{name}: {error}");
        let mut schedulers = schedulers?;
        for update in 7..20 {
            schedulers.iter_mut().try_for_each(|scheduler| scheduler.advance().map(drop))?;
            for (group, expected) in optimizer.groups()?.iter().zip(expected[update - 7]) {
                let ours = group.lr()?;
                ensure!((ours - expected).abs() <= 1e-12, "{name}, {update}: {ours}, {expected}");
            }
            plateau.advance(metric(update))?;
        }
        let mut of_optimizer = pytorch::optimizer_value(&optimizer, &[])?;
        let rates: Vec<_> = schedulers.iter().collect();
        let of_scheduler = pytorch::scheduler_value(&rates, &mut of_optimizer)?;
        let mut parts = Dict::new();
        parts.insert("optimizer", of_optimizer);
        parts.insert("scheduler", of_scheduler);
        parts.insert("plateau", pytorch::plateau_value(&plateau)?);
        written.insert(name, parts);
    }
    assert_eq!(written.len(), 2 * MULTIPLY.len());
    assert!(refused > 5, "{refused}");
    pytorch::write(&back, &written.into())?;
    let script = format!(
        "{CASES}{BESIDE}{}",
        r#"
there, seen = torch.load(sys.argv[1], weights_only=True), {}
for key, saved in there.items():
    name, first = key.rsplit(" ", 1)
    parts = both(name)
    for part, state in zip(parts, saved.values()):
        part.load_state_dict(state)
    seen[key] = run_both(parts, first == "True", 20, 40)
print(json.dumps(seen))
"#
    );
    let Some(output) = python(&script, &[&back])? else { return Ok(()) };
    let back: serde_json::Map<String, Json> = serde_json::from_str(&output)?;
    assert_eq!(back.len(), 2 * MULTIPLY.len());
    for (name, values) in &back {
        let ours: Vec<[f64; 2]> = serde_json::from_value(values.clone())?;
        let expected: Vec<[f64; 2]> = serde_json::from_value(seen[name].clone())?;
        for (update, (ours, expected)) in ours.iter().zip(&expected[13..]).enumerate() {
            let differ = ours.iter().zip(expected).any(|(a, b)| (a - b).abs() > 1e-12);
            assert!(!differ, "{name}, update {}: {ours:?}, {expected:?}", update + 20);
        }
    }
    Ok(())
}

/// Update k has the same value whichever event is counted.
#[test]
fn a_position_holds_for_events_before_and_after_the_step() -> Result<()> {
    let _guard = serial();
    let (_vs, optimizer) = groups()?;
    let lr = optimizer.knob("lr")?;
    let make = || ParamScheduler::new("lr", lr.clone(), ExponentialLR::new(0.1, 0.5));
    let mut first = make();
    (0..3).try_for_each(|_| first.advance().map(drop))?;
    let mut of_optimizer = pytorch::optimizer_value(&optimizer, &[])?;
    let saved = pytorch::scheduler_value(&[&first], &mut of_optimizer)?;
    for event in [Event::IterationStarted, Event::IterationCompleted] {
        let (_vs, mut optimizer) = groups()?;
        // The rate of the next step comes with the optimizer.
        pytorch::load_optimizer(&mut optimizer, &of_optimizer, &[])?;
        let lr = optimizer.knob("lr")?;
        let schedule = pytorch::schedule(&saved, &of_optimizer, 0)?;
        let mut scheduler = ParamScheduler::new("lr", lr.clone(), schedule).on(event);
        pytorch::load_scheduler(&mut scheduler, &saved, &of_optimizer)?;
        let mut trainer = Engine::new(|rates: &mut Vec<f64>, _, _: i32| {
            rates.push(lr.get()?);
            Ok(())
        });
        trainer.attach(scheduler);
        let mut rates = vec![];
        trainer.run(&mut rates, vec![0; 3], Until::epochs(1))?;
        assert_eq!(rates, [0.0125, 0.00625, 0.003125], "{event}");
    }
    Ok(())
}
