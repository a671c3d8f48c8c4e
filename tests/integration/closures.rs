//! Steps that evaluate the loss by themselves: LBFGS, SAM, and all others with a closure.

use std::panic::{AssertUnwindSafe, catch_unwind};

use anyhow::{Result, bail};
use tch::nn::{self, VarStore};
use tch::{Device, Kind, Tensor};
use tch_ignite::amp::GradScaler;
use tch_ignite::checkpoint::IntoStateful;
use tch_ignite::data::Loader;
use tch_ignite::engine::Until;
use tch_ignite::optim::{GroupOptions, Optimizer, Sam, lr};
use tch_ignite::supervised::{Supervised, create_supervised_trainer};

/// A store with a vector at which the loss is not flat.
fn vector(kind: Kind) -> (VarStore, Tensor) {
    let mut vs = VarStore::new(Device::Cpu);
    vs.set_kind(kind);
    let x = vs.root().add("x", Tensor::from_slice(&[1.5, -0.7, 0.2]).to_kind(kind), true);
    let _ = vs.root().add("unused", Tensor::zeros([2], (kind, Device::Cpu)), true);
    (vs, x)
}

/// A loss whose Newton steps are not exact.
fn loss(x: &Tensor) -> Tensor {
    let scales = Tensor::from_slice(&[1., 5., 0.3]).to_kind(x.kind());
    let goal = Tensor::from_slice(&[0.5, 0.1, -2.]).to_kind(x.kind());
    let away = x - goal;
    (away.square() * scales).sum(x.kind()) + away.pow_tensor_scalar(4).sum(x.kind()) * 0.1
}

fn lbfgs(vs: &VarStore, search: bool) -> Result<Optimizer> {
    let builder = Optimizer::lbfgs(vs).lr(0.5).max_iter(3).history_size(4);
    Ok(builder.strong_wolfe(search).build()?)
}

fn evaluate(optimizer: &Optimizer, x: &Tensor, sign: f64) -> Result<Tensor> {
    optimizer.zero_grad()?;
    let loss = loss(x) * sign;
    loss.backward();
    Ok(loss)
}

#[test]
fn lbfgs_without_a_closure_and_with_groups_is_refused() -> Result<()> {
    let (vs, x) = vector(Kind::Double);
    let optimizer = lbfgs(&vs, false)?;
    let scaler = GradScaler::new();
    let scaled = || -> Result<()> {
        scaler.scale(&loss(&x))?.backward();
        Ok(scaler.step(&optimizer)?)
    };
    let before = x.copy();
    for refused in [
        optimizer.step().unwrap_err().into(),
        optimizer.backward_step(&loss(&x)).unwrap_err().into(),
        optimizer.step_clipped(1.).unwrap_err().into(),
        scaled().unwrap_err(),
    ] {
        let text = format!("{refused:#}");
        assert!(text.contains("step_with(closure)"), "{text}");
    }
    assert_eq!(x, before);
    let groups = [
        Optimizer::lbfgs(&vs)
            .group("a", |name| name == "x", lr(0.1))
            .group("b", |name| name != "x", lr(0.1))
            .build(),
        Optimizer::muon(&vs)
            .group("a", |name| name == "x", GroupOptions::lbfgs())
            .group("b", |name| name != "x", lr(0.1))
            .build(),
    ];
    for refused in groups {
        let text = refused.unwrap_err().to_string();
        assert!(text.contains("one group"), "{text}");
    }
    let mut complex = VarStore::new(Device::Cpu);
    complex.set_kind(Kind::ComplexDouble);
    let z = complex.root().add("z", Tensor::ones([2], (Kind::ComplexDouble, Device::Cpu)), true);
    let optimizer = Optimizer::lbfgs(&complex).build()?;
    let text = optimizer.step_with(|| Ok(z.abs().sum(Kind::Double))).unwrap_err().to_string();
    assert!(text.contains("complex"), "{text}");
    Ok(())
}

#[test]
fn lbfgs_goes_on_bit_for_bit_after_a_state_and_a_snapshot() -> Result<()> {
    for (kind, search) in [(Kind::Double, false), (Kind::Double, true), (Kind::Float, true)] {
        let (vs, x) = vector(kind);
        let optimizer = lbfgs(&vs, search)?;
        let step = |optimizer: &Optimizer, x: &Tensor| -> Result<f64> {
            let loss = optimizer.step_with(|| evaluate(optimizer, x, 1.))?;
            Ok(loss.double_value(&[]))
        };
        let first = (step(&optimizer, &x)?, step(&optimizer, &x)?);
        assert!(first.1 < first.0);
        let (other, y) = vector(kind);
        let resumed = lbfgs(&other, search)?;
        let state = (&optimizer).into_stateful().state_dict()?.copy()?;
        tch::no_grad(|| y.shallow_clone().copy_(&x));
        (&resumed).into_stateful().load_state_dict(state)?;
        let (snapshot, here) = (optimizer.snapshot()?, x.detach().copy());
        let ahead: Vec<_> = (0..3).map(|_| step(&optimizer, &x)).collect::<Result<_>>()?;
        let there = x.detach().copy();
        for _ in &ahead {
            step(&resumed, &y)?;
        }
        assert_eq!(y.detach(), there, "{kind:?} {search}");
        optimizer.restore(&snapshot)?;
        tch::no_grad(|| x.shallow_clone().copy_(&here));
        for expected in &ahead {
            assert_eq!(step(&optimizer, &x)?, *expected, "{kind:?} {search}");
        }
        assert_eq!(x.detach(), there, "{kind:?} {search}");
        // A state whose vectors do not fit is refused, and changes nothing.
        let mut state = (&optimizer).into_stateful().state_dict()?.copy()?;
        let mut part = state.take_part("lbfgs")?;
        part.set_tensor("old_dirs", Tensor::zeros([1, 9], (kind, Device::Cpu)));
        state.set_part("lbfgs", part);
        let error = (&optimizer).into_stateful().load_state_dict(state).unwrap_err().to_string();
        assert!(error.contains("old_dirs"), "{error}");
    }
    Ok(())
}

/// The vectors of the history are rows of one tensor in a state, and rows of this length are not aligned there.
#[test]
fn lbfgs_goes_on_bit_for_bit_with_vectors_of_any_length() -> Result<()> {
    let made = || -> Result<(VarStore, Tensor, Optimizer)> {
        let vs = VarStore::new(Device::Cpu);
        let x = vs.root().add("x", waves(&[37], 0.3).to_kind(Kind::Float), true);
        let optimizer = Optimizer::lbfgs(&vs).max_iter(4).strong_wolfe(true).build()?;
        Ok((vs, x, optimizer))
    };
    let step = |optimizer: &Optimizer, x: &Tensor| {
        optimizer.step_with(|| {
            optimizer.zero_grad()?;
            let away = x - waves(&[37], 1.).to_kind(Kind::Float);
            let scales = Tensor::arange(37i64, (Kind::Float, Device::Cpu)) * 0.1 + 0.2;
            let quartic = away.pow_tensor_scalar(4).sum(Kind::Float) * 0.1;
            let loss = (away.square() * scales).sum(Kind::Float) + quartic;
            loss.backward();
            Ok(loss)
        })
    };
    let (_vs, x, optimizer) = made()?;
    let _ = (step(&optimizer, &x)?, step(&optimizer, &x)?);
    let (_other, y, resumed) = made()?;
    let state = (&optimizer).into_stateful().state_dict()?.copy()?;
    tch::no_grad(|| y.shallow_clone().copy_(&x));
    (&resumed).into_stateful().load_state_dict(state)?;
    for n in 0..3 {
        let _ = (step(&optimizer, &x)?, step(&resumed, &y)?);
        assert_eq!(x.detach(), y.detach(), "{n}");
    }
    Ok(())
}

#[test]
fn frozen_parameters_stay_and_new_ones_come_along() -> Result<()> {
    let (vs, x) = vector(Kind::Double);
    let other = vs.root().add("other", Tensor::from_slice(&[0.3f64, 0.9, -1.]), true);
    let optimizer = lbfgs(&vs, true)?;
    let step = |late: Option<&Tensor>| {
        optimizer.step_with(|| {
            optimizer.zero_grad()?;
            let all = loss(&(&x + &other)) + x.square().sum(Kind::Double);
            let all =
                late.map_or(all.shallow_clone(), |late| all + late.square().sum(Kind::Double));
            all.backward();
            Ok(all)
        })
    };
    let _ = step(None)?;
    let _ = step(None)?;
    let (before, moved) = (other.detach().copy(), x.detach().copy());
    let _ = other.set_requires_grad(false);
    let _ = step(None)?;
    let _ = step(None)?;
    assert!(other == before && x.detach() != moved);
    let late = vs.root().add("late", Tensor::from_slice(&[2.0f64]), true);
    let first = step(Some(&late))?;
    assert!(step(Some(&late))?.double_value(&[]) < first.double_value(&[]));
    assert_ne!(late.double_value(&[0]), 2.);
    Ok(())
}

#[test]
fn to_maximize_is_to_minimize_the_negative() -> Result<()> {
    let run = |maximize: bool| -> Result<Tensor> {
        let (vs, x) = vector(Kind::Double);
        let optimizer = lbfgs(&vs, true)?;
        optimizer.group_at(0)?.set_maximize(maximize)?;
        let sign = if maximize { -1. } else { 1. };
        for _ in 0..3 {
            let _ = optimizer.step_with(|| evaluate(&optimizer, &x, sign))?;
        }
        Ok(x.detach().copy())
    };
    assert_eq!(run(true)?, run(false)?);
    Ok(())
}

/// Errors and panics of a closure leave parameters and state as they were, at whichever evaluation they come.
#[test]
fn a_closure_that_fails_changes_nothing() -> Result<()> {
    for panics in [false, true] {
        for fails_at in 1..4 {
            let (vs, x) = vector(Kind::Double);
            let optimizer = lbfgs(&vs, true)?;
            let _ = optimizer.step_with(|| evaluate(&optimizer, &x, 1.))?;
            let before = x.detach().copy();
            let mut calls = 0;
            let mut fail = || {
                calls += 1;
                match (calls == fails_at, panics) {
                    (true, true) => panic!("planted"),
                    (true, false) => bail!("planted"),
                    _ => evaluate(&optimizer, &x, 1.),
                }
            };
            let failed = catch_unwind(AssertUnwindSafe(|| optimizer.step_with(&mut fail)));
            assert!(failed.map_or(panics, |step| step.is_err() && !panics));
            assert_eq!(x.detach(), before, "{panics} {fails_at}");
            let (other, y) = vector(Kind::Double);
            let untroubled = lbfgs(&other, true)?;
            let _ = untroubled.step_with(|| evaluate(&untroubled, &y, 1.))?;
            let _ = optimizer.step_with(|| evaluate(&optimizer, &x, 1.))?;
            let _ = untroubled.step_with(|| evaluate(&untroubled, &y, 1.))?;
            assert_eq!(x.detach(), y.detach());

            let (vs, x) = vector(Kind::Double);
            let optimizer = Optimizer::adam(&vs).build()?;
            let sam = Sam::new(&optimizer);
            let before = x.detach().copy();
            let mut calls = 0;
            let mut fail = || {
                calls += 1;
                match (calls == fails_at.min(2), panics) {
                    (true, true) => panic!("planted"),
                    (true, false) => bail!("planted"),
                    _ => evaluate(&optimizer, &x, 1.),
                }
            };
            let failed = catch_unwind(AssertUnwindSafe(|| sam.step_with(&mut fail)));
            assert!(failed.map_or(panics, |step| step.is_err() && !panics));
            assert_eq!(x.detach(), before);
            assert!(optimizer.state("x")?.is_empty());
        }
    }
    Ok(())
}

#[test]
fn a_closure_is_evaluated_once_by_all_others() -> Result<()> {
    let ((one, x), (two, y)) = (vector(Kind::Double), vector(Kind::Double));
    let (with, without) = (Optimizer::adam(&one).build()?, Optimizer::adam(&two).build()?);
    for _ in 0..3 {
        let mut calls = 0;
        let first = with.step_with(|| {
            calls += 1;
            evaluate(&with, &x, 1.)
        })?;
        let expected = loss(&y);
        without.backward_step(&expected)?;
        assert_eq!((calls, first), (1, expected));
    }
    assert_eq!(x, y);
    Ok(())
}

#[test]
fn sam_refuses_what_it_cannot_do() -> Result<()> {
    let (vs, x) = vector(Kind::Double);
    let sgd = Optimizer::sgd(&vs).build()?;
    assert!(Sam::new(&sgd).rho(-1.).is_err() && Sam::new(&sgd).rho(f64::NAN).is_err());
    let sam = Sam::new(&sgd);
    sam.knob().set(-1.)?;
    let refused = |sam: &Sam| {
        let text = sam.step_with(|| evaluate(sam.optimizer(), &x, 1.)).unwrap_err().to_string();
        assert_eq!(x, vector(Kind::Double).1, "{text}");
        text
    };
    assert!(refused(&sam).contains("rho"));
    assert!(refused(&Sam::new(&lbfgs(&vs, false)?)).contains("LBFGS"));
    let sparse = Sam::new(&sgd).step_with(|| {
        let table = vs.root().zeros("table", &[3, 2]);
        let rows = Tensor::from_slice(&[1i64, 1]);
        let found = Tensor::embedding(&table, &rows, -1, false, true).sum(Kind::Float);
        found.backward();
        Ok(found)
    });
    assert!(sparse.unwrap_err().to_string().contains("sparse"));
    Ok(())
}

fn waves(shape: &[i64], phase: f64) -> Tensor {
    let count = shape.iter().product::<i64>();
    ((Tensor::arange(count, (Kind::Double, Device::Cpu)) + phase * 1.7) * 0.9).sin().reshape(shape)
}

fn batches() -> Vec<(Tensor, Tensor)> {
    (0..3).map(|n| (waves(&[6, 3], f64::from(n)), waves(&[6, 2], f64::from(n) + 0.5))).collect()
}

fn loader() -> Loader {
    let (x, y): (Vec<_>, Vec<_>) = batches().into_iter().unzip();
    Loader::new(&Tensor::cat(&x, 0), &Tensor::cat(&y, 0), 6).unwrap()
}

fn net() -> (VarStore, nn::Linear) {
    let mut vs = VarStore::new(Device::Cpu);
    let net = nn::linear(vs.root() / "fc", 3, 2, Default::default());
    vs.set_kind(Kind::Double);
    tch::no_grad(|| {
        for (name, mut variable) in vs.variables() {
            variable.copy_(&waves(&variable.size(), name.len() as f64));
        }
    });
    (vs, net)
}

fn mean(y_pred: &Tensor, y: &Tensor) -> Tensor {
    y_pred.mse_loss(y, tch::Reduction::Mean)
}

/// The ready trainer evaluates a batch again, as a loop by hand does.
#[test]
fn the_ready_trainer_takes_closures() -> Result<()> {
    type Make = fn(&VarStore) -> Result<(Optimizer, Option<Sam>)>;
    let all: [Make; 3] = [
        |vs| Ok((lbfgs(vs, true)?, None)),
        |vs| {
            let optimizer = Optimizer::adamw(vs).build()?;
            let sam = Sam::new(&optimizer);
            Ok((optimizer, Some(sam)))
        },
        |vs| {
            let optimizer = Optimizer::sgd_schedule_free(vs).lr(0.1).build()?;
            let sam = Sam::new(&optimizer).rho(0.5)?.adaptive();
            Ok((optimizer, Some(sam)))
        },
    ];
    for make in all {
        let (vs, layer) = net();
        let (optimizer, sam) = make(&vs)?;
        let mut by_hand = vec![];
        for (x, y) in batches().iter().chain(&batches()) {
            let closure = || {
                optimizer.zero_grad()?;
                let loss = mean(&x.apply(&layer), y);
                loss.backward();
                Ok(loss)
            };
            let loss = match &sam {
                Some(sam) => sam.step_with(closure)?,
                None => optimizer.step_with(closure)?,
            };
            by_hand.push(loss.double_value(&[]));
        }
        let expected = vs.variables()["fc.weight"].detach().copy();

        // An engine resumes the state of another after the first epoch.
        let mut losses = vec![];
        let mut saved = None;
        for until in [1, 2] {
            let (vs, layer) = net();
            let (optimizer, sam) = make(&vs)?;
            let mut trainer = create_supervised_trainer();
            trainer.track("model", &vs).track("optimizer", &optimizer);
            let mut cx = Supervised::new(layer, optimizer, mean);
            if let Some(sam) = sam {
                cx = cx.sam(sam);
            }
            if let Some(state) = saved.take() {
                trainer.restore(&mut cx, state, true)?;
            }
            trainer.run(&mut cx, loader(), Until::epochs(until))?;
            let last = trainer.state.output.as_ref().expect("a loss");
            losses.push(last.double_value(&[]));
            saved = Some(trainer.checkpoint(&cx)?.copy()?);
            if until == 2 {
                assert_eq!(vs.variables()["fc.weight"].detach(), expected);
            }
        }
        assert_eq!(losses, [by_hand[2], by_hand[5]]);
    }
    Ok(())
}

#[test]
fn options_that_do_not_go_with_closures_are_refused() -> Result<()> {
    let batch = || batches().swap_remove(0);
    let made = |sam: bool| -> Result<(VarStore, Supervised<nn::Linear>)> {
        let (vs, layer) = net();
        let optimizer = if sam { Optimizer::sgd(&vs).build()? } else { lbfgs(&vs, false)? };
        let of = Sam::new(&optimizer);
        let cx = Supervised::new(layer, optimizer, mean);
        Ok((vs, if sam { cx.sam(of) } else { cx }))
    };
    for sam in [false, true] {
        let name = if sam { "SAM" } else { "LBFGS" };
        let refused = |cx: Supervised<nn::Linear>, what: &str| {
            let mut cx = cx;
            let text = cx.train_step(batch()).unwrap_err().to_string();
            assert!(text.contains(name) && text.contains(what), "{text}");
        };
        refused(made(sam)?.1.accumulate(2)?, "accumulation");
        refused(made(sam)?.1.grad_scaler(GradScaler::new()), "GradScaler");
        if !sam {
            refused(made(sam)?.1.clip_grad_norm(1.), "clipping");
            refused(made(sam)?.1.clip_grad_value(1.), "clipping");
        }
    }
    let mut cx = made(true)?.1.clip_grad_norm(0.1);
    let _ = cx.train_step(batch())?;
    assert!(cx.grad_norm().is_some());
    let other = Optimizer::sgd(&net().0).build()?;
    let mut cx = made(true)?.1.sam(Sam::new(&other));
    let text = cx.train_step(batch()).unwrap_err().to_string();
    assert!(text.contains("another optimizer"), "{text}");
    Ok(())
}
