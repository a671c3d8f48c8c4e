//! Clipping, mixed precision, accumulation, averages and group helpers, on the CPU.

use std::panic::{AssertUnwindSafe, catch_unwind};

use anyhow::Result;
use tch::nn::{self, VarStore};
use tch::{Device, Kind, Tensor};
use tch_ignite::amp::{GradScaler, autocast, without_autocast};
use tch_ignite::engine::{Engine, Event, Until};
use tch_ignite::handlers::{Buffers, EMAHandler, Evaluate, GradNorm, SWAHandler};
use tch_ignite::metrics::Mean;
use tch_ignite::optim::{Optimizer, lr};
use tch_ignite::supervised::{OPTIMIZER_STEPPED, Supervised, create_supervised_trainer};

fn value(tensor: &Tensor) -> f64 {
    tensor.double_value(&[])
}

fn close(a: f64, b: f64) {
    assert!((a - b).abs() <= 1e-6 * b.abs().max(1.), "{a} is not {b}");
}

/// Two groups of one parameter each, with gradients (3, 4) and (12).
fn with_gradients(kind: Kind) -> (VarStore, Optimizer, [Tensor; 2]) {
    let mut vs = VarStore::new(Device::Cpu);
    vs.set_kind(kind);
    let a = vs.root().var("a", &[2], nn::Init::Const(1.));
    let b = vs.root().var("b", &[1], nn::Init::Const(1.));
    let optimizer = Optimizer::sgd(&vs)
        .group("a", |name| name == "a", lr(1.))
        .group("b", |name| name == "b", lr(1.))
        .build()
        .unwrap();
    let weights = Tensor::from_slice(&[3., 4.]).to_kind(kind);
    ((&a * weights).sum(kind) + (&b * 12.).sum(kind)).backward();
    (vs, optimizer, [a, b])
}

#[test]
fn clipping_by_norm_scales_all_groups_or_some() -> Result<()> {
    for kind in [Kind::Float, Kind::Double, Kind::Half, Kind::BFloat16] {
        let (_vs, optimizer, [a, b]) = with_gradients(kind);
        let norm = optimizer.clip_grad_norm(6.5)?;
        assert_eq!(norm.kind(), if kind == Kind::Double { Kind::Double } else { Kind::Float });
        assert_eq!((value(&norm), norm.dim()), (13., 0));
        let rough = if matches!(kind, Kind::Half | Kind::BFloat16) { 0.01 } else { 1e-6 };
        assert!((a.grad().double_value(&[0]) - 1.5).abs() < rough);
        assert!((b.grad().double_value(&[0]) - 6.).abs() < 4. * rough);

        let (_vs, optimizer, [a, b]) = with_gradients(kind);
        let norm = optimizer.gradients()?.groups(["a"])?.clip_norm(2.5)?;
        assert_eq!((value(&norm), b.grad().double_value(&[0])), (5., 12.));
        assert!((a.grad().double_value(&[1]) - 2.).abs() < rough);
    }
    Ok(())
}

#[test]
fn a_norm_below_the_bound_changes_nothing() -> Result<()> {
    let (_vs, optimizer, [a, _b]) = with_gradients(Kind::Float);
    let before = a.grad().copy();
    let _ = optimizer.clip_grad_norm(13.1)?;
    assert_eq!(a.grad(), before);
    Ok(())
}

#[test]
fn other_norms() -> Result<()> {
    let (_vs, optimizer, _) = with_gradients(Kind::Double);
    let norm = |p| optimizer.gradients().and_then(|all| all.order(p).norm());
    assert_eq!((value(&norm(f64::INFINITY)?), value(&norm(1.)?)), (12., 19.));
    close(value(&norm(3.)?), (27. + 64. + 1728f64).cbrt());
    for p in [0., -1., f64::NAN] {
        assert!(norm(p).unwrap_err().to_string().contains("must be above 0"));
    }
    Ok(())
}

#[test]
fn without_gradients_nothing_happens() -> Result<()> {
    let (_vs, optimizer, _) = with_gradients(Kind::Float);
    optimizer.zero_grad()?;
    assert_eq!(value(&optimizer.clip_grad_norm(1.)?), 0.);
    assert_eq!(value(&optimizer.gradients()?.order(1.).norm()?), 0.);
    optimizer.clip_grad_value(1.)?;
    optimizer.gradients()?.clip_adaptive(0.1, 1e-3)?;
    optimizer.zero_grad_in_place()?;
    assert_eq!(value(&optimizer.step_clipped(1.)?), 0.);
    Ok(())
}

#[test]
fn a_norm_that_is_not_finite_is_an_error_where_asked_for() -> Result<()> {
    for bad in [f64::NAN, f64::INFINITY] {
        let (_vs, optimizer, [a, b]) = with_gradients(Kind::Float);
        let _ = b.grad().fill_(bad);
        let error = optimizer.gradients()?.error_if_nonfinite().clip_norm(1.).unwrap_err();
        assert!(error.to_string().contains("cannot be clipped"), "{error}");
        assert_eq!(a.grad().double_value(&[0]), 3., "untouched");
        assert!(!value(&optimizer.clip_grad_norm(1.)?).is_finite());
    }
    Ok(())
}

#[test]
fn clipping_by_value_keeps_nan() -> Result<()> {
    let (_vs, optimizer, [a, b]) = with_gradients(Kind::Float);
    let _ = b.grad().fill_(f64::NAN);
    let _ = a.grad().neg_();
    optimizer.clip_grad_value(3.5)?;
    assert_eq!(Vec::<f64>::try_from(a.grad())?, [-3., -3.5]);
    assert!(b.grad().double_value(&[0]).is_nan());
    assert!(optimizer.clip_grad_value(-1.).is_err() && optimizer.clip_grad_norm(f64::NAN).is_err());
    Ok(())
}

#[test]
fn a_clipped_step_is_clip_and_step() -> Result<()> {
    let (_vs, optimizer, [a, b]) = with_gradients(Kind::Double);
    assert_eq!(value(&optimizer.step_clipped(6.5)?), 13.);
    close(a.double_value(&[0]), 1. - 1.5);
    close(b.double_value(&[0]), 1. - 6.);
    assert_eq!(b.grad().double_value(&[0]), 12., "in memory it stays");
    Ok(())
}

#[test]
fn adaptive_clipping_is_by_rows_of_the_weights() -> Result<()> {
    let mut vs = VarStore::new(Device::Cpu);
    vs.set_kind(Kind::Double);
    let w = vs.root().add("w", Tensor::from_slice2(&[[3f64, 4.], [0., 0.]]), true);
    let optimizer = Optimizer::sgd(&vs).build()?;
    (&w * Tensor::from_slice2(&[[6f64, 8.], [0.3, 0.4]])).sum(Kind::Double).backward();
    optimizer.gradients()?.clip_adaptive(0.1, 1.)?;
    // Rows of norm 5 and (at least) 1 may have gradients of norm 0.5 and 0.1.
    let expected = Tensor::from_slice2(&[[0.3f64, 0.4], [0.06, 0.08]]);
    assert!(value(&(w.grad() - expected).abs().max()) < 1e-12);
    Ok(())
}

#[test]
fn zeroing_keeps_the_memory_or_drops_it() -> Result<()> {
    let (_vs, optimizer, [a, b]) = with_gradients(Kind::Float);
    let memory = a.grad().data_ptr();
    optimizer.gradients()?.groups(["b"])?.clear()?;
    assert!(!b.grad().defined());
    optimizer.zero_grad_in_place()?;
    assert_eq!((a.grad().data_ptr(), a.grad().double_value(&[1])), (memory, 0.));
    optimizer.zero_grad()?;
    assert!(!a.grad().defined());
    Ok(())
}

#[test]
fn autocast_nests_and_ends_with_a_panic() -> Result<()> {
    let x = Tensor::ones([2, 2], (Kind::Float, Device::Cpu));
    let kind = || x.matmul(&x).kind();
    autocast(Device::Cpu, Kind::BFloat16, || {
        assert_eq!(kind(), Kind::BFloat16);
        assert_eq!(autocast(Device::Cpu, Kind::Half, kind).unwrap(), Kind::Half);
        assert_eq!(without_autocast(Device::Cpu, kind).unwrap(), Kind::Float);
        assert_eq!(kind(), Kind::BFloat16);
    })?;
    let panicked = catch_unwind(AssertUnwindSafe(|| {
        autocast(Device::Cpu, Kind::BFloat16, || panic!("inside")).unwrap()
    }));
    assert!(panicked.is_err());
    assert_eq!(kind(), Kind::Float);
    let error = autocast(Device::Cpu, Kind::Double, kind).unwrap_err().to_string();
    assert!(error.contains("Half or BFloat16, but Double"), "{error}");
    assert!(autocast(Device::Mps, Kind::Half, kind).is_err());
    assert_eq!(kind(), Kind::Float);
    Ok(())
}

#[test]
fn the_scale_shrinks_after_an_overflow_and_grows_later() -> Result<()> {
    let vs = VarStore::new(Device::Cpu);
    let w = vs.root().ones("w", &[1]);
    let optimizer = Optimizer::adam(&vs).lr(0.1).build()?;
    let scaler = GradScaler::new().init_scale(8.)?.growth(4., 0.25, 2)?;
    let step = |factor: f64| -> Result<f64> {
        optimizer.zero_grad()?;
        scaler.scale(&(&w * factor).sum(Kind::Float))?.backward();
        scaler.step(&optimizer)?;
        scaler.update()?;
        Ok(scaler.get_scale()?)
    };
    assert_eq!((step(1.)?, step(1.)?), (8., 32.));
    let (before, steps) = (value(&w.squeeze()), value(&optimizer.state("w")?[0].1));
    assert_eq!(step(f64::NAN)?, 8.);
    assert!(scaler.last_skipped()? && scaler.skipped()? == 1);
    assert_eq!((value(&w.squeeze()), value(&optimizer.state("w")?[0].1)), (before, steps));

    let saved = scaler.state_dict()?;
    assert_eq!((step(1.)?, step(1.)?), (8., 32.));
    assert!(!scaler.last_skipped()?);
    scaler.load_state_dict(&saved)?;
    assert_eq!((step(1.)?, step(1.)?), (8., 32.));
    let mut bad = saved.clone();
    bad.remove("scale");
    assert!(scaler.load_state_dict(&bad).unwrap_err().to_string().contains("'scale' is absent"));
    Ok(())
}

#[test]
fn scaled_steps_are_plain_steps_and_calls_out_of_order_are_errors() -> Result<()> {
    let run = |scaler: Option<&GradScaler>, unscale: bool, max: Option<f64>| -> Result<f64> {
        let mut vs = VarStore::new(Device::Cpu);
        vs.set_kind(Kind::Double);
        let w = vs.root().ones("w", &[1]);
        let optimizer = Optimizer::builder(nn::sgd(0.9, 0., 0.1, false), &vs).lr(0.1).build()?;
        for _ in 0..3 {
            optimizer.zero_grad()?;
            let loss = (&w * &w * 3.).sum(Kind::Double);
            match scaler {
                Some(scaler) => scaler.scale(&loss)?.backward(),
                None => loss.backward(),
            }
            if let (Some(scaler), true) = (scaler, unscale) {
                scaler.unscale(&optimizer)?;
                assert!(scaler.unscale(&optimizer).is_err());
            }
            match (scaler, max) {
                (None, None) => optimizer.step()?,
                (None, Some(max)) => drop(optimizer.step_clipped(max)?),
                (Some(scaler), None) => scaler.step(&optimizer)?,
                (Some(scaler), Some(max)) => {
                    let norm = scaler.step_clipped(&optimizer, max)?;
                    close(
                        value(&norm),
                        value(&w.grad().norm()) / if unscale { 1. } else { 65536. },
                    );
                }
            }
            if let Some(scaler) = scaler {
                assert!(scaler.step(&optimizer).is_err());
                scaler.update()?;
                assert!(scaler.update().is_err());
            }
        }
        Ok(w.double_value(&[0]))
    };
    for max in [None, Some(2.)] {
        let plain = run(None, false, max)?;
        close(run(Some(&GradScaler::new()), false, max)?, plain);
        close(run(Some(&GradScaler::new()), true, max)?, plain);
    }
    Ok(())
}

type Net = Box<dyn Fn(&Tensor, bool) -> Tensor + Send>;

/// `y = w x`, mean squared error, SGD with lr 0.1.
fn supervised(vs: &VarStore) -> Supervised<nn::FuncT<'static>> {
    let w = vs.root().zeros("w", &[1, 1]);
    let forward: Net = Box::new(move |x, _| x.matmul(&w));
    let optimizer = Optimizer::sgd(vs).lr(0.1).build().unwrap();
    Supervised::new(nn::func_t(move |x, train| forward(x, train)), optimizer, |y_pred, y| {
        (y_pred - y).square().mean(Kind::Float)
    })
}

fn batches(count: i64) -> Vec<(f32, f32)> {
    (1..=count).map(|i| (i as f32 * 0.25, i as f32 * 0.3)).collect()
}

fn tensors((x, y): (f32, f32)) -> (Tensor, Tensor) {
    (Tensor::from_slice2(&[[x]]), Tensor::from_slice2(&[[y]]))
}

#[test]
fn accumulated_steps_are_those_of_the_joined_batches() -> Result<()> {
    // 7 batches by 3: windows of 3, 3 and 1. An epoch's length is known, or only learned at its end.
    for known in [true, false] {
        let vs = VarStore::new(Device::Cpu);
        let mut cx = supervised(&vs).accumulate(3)?;
        let (mut stepped, data) = (vec![], batches(7));
        let mut trainer = create_supervised_trainer();
        trainer.on(OPTIMIZER_STEPPED, |_, engine| {
            stepped.push(engine.state.iteration);
            Ok(())
        });
        let source = tch_ignite::data::restartable(|| data.iter().map(|b| tensors(*b)));
        let until = if known { Until::epochs(2).epoch_length(7) } else { Until::epochs(2) };
        trainer.run(&mut cx, source, until)?;
        drop(trainer);
        assert_eq!(stepped, [3, 6, 7, 10, 13, 14]);

        let mut w = 0f64;
        for window in [&data[0..3], &data[3..6], &data[6..7]].repeat(2) {
            let gradient: f64 = window
                .iter()
                .map(|(x, y)| (f64::from(*x), f64::from(*y)))
                .map(|(x, y)| 2. * (w * x - y) * x / window.len() as f64)
                .sum();
            w -= 0.1 * gradient;
        }
        close(vs.variables()["w"].double_value(&[0, 0]), w);
    }
    assert!(supervised(&VarStore::new(Device::Cpu)).accumulate(0).is_err());
    Ok(())
}

#[test]
fn all_options_of_the_ready_step_together() -> Result<()> {
    let vs = VarStore::new(Device::Cpu);
    let scaler = GradScaler::new();
    let mut cx = supervised(&vs)
        .autocast(Kind::BFloat16)
        .grad_scaler(scaler.clone())
        .accumulate(2)?
        .clip_grad_value(10.)
        .clip_grad_norm(0.5);
    let (mut stepped, mut data) = (0, batches(9));
    data[2].0 = f32::INFINITY; // the second of the five windows is skipped
    let mut trainer = create_supervised_trainer();
    trainer.on(OPTIMIZER_STEPPED, |_, _| {
        stepped += 1;
        Ok(())
    });
    let source = tch_ignite::data::restartable(|| data.iter().map(|b| tensors(*b)));
    trainer.run(&mut cx, source, Until::epochs(1).epoch_length(9))?;
    drop(trainer);
    assert_eq!((stepped, scaler.skipped()?, scaler.get_scale()?), (4, 1, 32768.));
    let w = vs.variables()["w"].double_value(&[0, 0]);
    assert!(w > 0.05 && w < 0.21, "{w}");
    assert!(cx.grad_norm().is_some_and(|norm| value(norm) > 0.));
    Ok(())
}

#[test]
fn averages_are_swapped_back_after_errors_and_panics() -> Result<()> {
    let vs = VarStore::new(Device::Cpu);
    let mut w = vs.root().zeros("w", &[3]);
    let ema = EMAHandler::decay(&vs, 0.75)?;
    tch::no_grad(|| drop(w.fill_(4.)));
    ema.update()?;
    let now = |w: &Tensor| w.double_value(&[1]);

    let swapped = ema.swap()?;
    assert_eq!((now(&w), now(&ema.averages()[0].1)), (1., 4.));
    assert!(ema.swap().is_err() && ema.update().is_err());
    drop(swapped);
    assert_eq!((now(&w), ema.updates()), (4., 1));
    let panicked = catch_unwind(AssertUnwindSafe(|| {
        let _swapped = ema.swap().unwrap();
        panic!("inside");
    }));
    assert!(panicked.is_err() && now(&w) == 4.);

    // An evaluator of the averages, in a trainer, whose second run fails.
    let mut evaluator = Engine::new(|w: &mut Tensor, _, fails: bool| {
        anyhow::ensure!(!fails, "as asked");
        Ok(now(w))
    });
    evaluator.metric("w", Mean::new());
    let mut trainer = Engine::new(|w: &mut Tensor, _, _: bool| {
        tch::no_grad(|| drop(w.fill_(8.)));
        Ok(())
    });
    trainer.attach(ema.clone());
    trainer.attach(ema.with_averages(Evaluate::each_epoch("ema", evaluator, vec![false])));
    trainer.run(&mut w, vec![true], Until::epochs(1))?;
    assert_eq!((trainer.state.metrics.get("ema/w")?, now(&w)), (2.75, 8.));
    Ok(())
}

#[test]
fn averages_of_buffers_integers_and_other_types() -> Result<()> {
    for kind in [Kind::Double, Kind::Float, Kind::Half, Kind::BFloat16] {
        for (buffers, expected) in [(Buffers::Copy, 8.), (Buffers::Update, 4.), (Buffers::Keep, 0.)]
        {
            let vs = VarStore::new(Device::Cpu);
            let zeros = |shape: &[i64]| Tensor::zeros(shape, (kind, Device::Cpu));
            let w = vs.root().add("w", zeros(&[4, 3]).tr(), true);
            let b = vs.root().add("b", zeros(&[2]), false);
            let n = vs.root().add("n", Tensor::from(0i64), false);
            let ema = EMAHandler::new(&vs, 0.5)?.handle_buffers(buffers);
            let _guard = tch::no_grad_guard();
            for mut variable in [w.shallow_clone(), b, n] {
                let _ = variable.fill_(8.);
            }
            assert_eq!(ema.update()?, 0.5);
            let average = |name: &str| {
                let all = ema.averages();
                let found = all.iter().find(|(known, _)| known == name).unwrap();
                (value(&found.1.to_kind(Kind::Double).min()), found.1.kind())
            };
            assert_eq!(average("w"), (4., kind));
            assert_eq!(average("b"), (expected, kind));
            let count = if buffers == Buffers::Keep { 0. } else { 8. };
            assert_eq!(average("n"), (count, Kind::Int64));
        }
    }
    Ok(())
}

/// Averages of tied weights and of views, swapped in and back.
#[test]
fn averages_of_shared_memory_are_swapped_back() -> Result<()> {
    type Share = fn(&Tensor) -> Tensor;
    let shares: [(&str, Share, bool); 4] = [
        ("tied, both trained", Tensor::shallow_clone, true),
        ("tied, one trained", Tensor::shallow_clone, false),
        ("a view of all", Tensor::detach, true),
        // Too few for the one pass, because they have gaps.
        ("a view of a part", |w| w.detach().slice(0, 0, None, 2), true),
    ];
    for (what, share, trained) in shares {
        let vs = VarStore::new(Device::Cpu);
        let mut w = (vs.root() / "emb").ones("weight", &[4]);
        let head = (vs.root() / "head").add("weight", share(&w), trained);
        let (ema, swa) = (EMAHandler::new(&vs, 0.5)?, SWAHandler::new(&vs)?);
        for value in [3., 5.] {
            tch::no_grad(|| drop(w.fill_(value)));
            ema.update()?;
            swa.update()?;
        }
        let swapped = ema.swap()?;
        assert_eq!((value(&w.min()), value(&head.max())), (3.5, 3.5), "{what}");
        drop(swapped);
        assert_eq!((value(&w.min()), value(&w.max())), (5., 5.), "{what}");
        let names: Vec<_> = ema.averages().into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["emb.weight", "head.weight"], "{what}");
        for (_, average) in ema.averages() {
            assert_eq!((value(&average.min()), value(&average.max())), (3.5, 3.5), "{what}");
        }
        let swapped = swa.swap()?;
        assert_eq!((value(&w.min()), value(&head.max())), (4., 4.), "{what}");
        drop(swapped);
        assert_eq!((value(&w.min()), value(&w.max())), (5., 5.), "{what}");
    }
    Ok(())
}

/// A variable that got another shape cannot be averaged: told, before the others are.
#[test]
fn averages_that_do_not_fit_any_more_are_refused_before_one_is_changed() -> Result<()> {
    let vs = VarStore::new(Device::Cpu);
    let (mut a, mut b) = (vs.root().ones("a", &[2]), vs.root().ones("b", &[2]));
    let ema = EMAHandler::new(&vs, 0.5)?;
    tch::no_grad(|| drop(a.fill_(3.)));
    b.set_data(&Tensor::ones([3], (Kind::Float, Device::Cpu)));
    let error = ema.update().unwrap_err().to_string();
    assert!(error.contains("[3]") && error.contains("[2]"), "{error}");
    assert!(ema.swap().is_err());
    assert_eq!((value(&ema.averages()[0].1.max()), value(&a.max())), (1., 3.));
    assert_eq!(ema.updates(), 0);
    Ok(())
}

#[test]
fn a_tied_parameter_counts_once_in_the_norm_of_all() -> Result<()> {
    let vs = VarStore::new(Device::Cpu);
    let w = (vs.root() / "head").ones("weight", &[4]);
    let _ = (vs.root() / "emb").add("weight", w.shallow_clone(), true);
    let mut trainer = Engine::new(|_: &mut (), _: &mut Engine<_, _, _>, scale: f64| {
        (&w * scale).sum(Kind::Float).backward();
        Ok(())
    });
    trainer.attach(GradNorm::new(&vs));
    trainer.attach(GradNorm::new(&vs).name("head").whitelist(|name| name.starts_with("head")));
    trainer.attach(GradNorm::new(&vs).name("other").whitelist(|name| name == "other"));
    trainer.run(&mut (), vec![3.], Until::epochs(1))?;
    assert_eq!(trainer.state.metrics.get("grad_norm")?, 6.);
    assert_eq!(trainer.state.metrics.get("head")?, 6.);
    assert!(trainer.state.metrics.get("other").is_err());
    Ok(())
}

#[test]
fn a_handler_of_a_store_that_was_merged_away_says_so() -> Result<()> {
    let vs = VarStore::new(Device::Cpu);
    let _ = vs.root().ones("w", &[1]);
    let mut trainer = Engine::new(|_: &mut (), _: &mut Engine<_, _, _>, _: ()| Ok(()));
    trainer.attach(GradNorm::new(&vs));
    let _merged = VarStore::merge(vec![(vs, None)]).unwrap();
    let error = trainer.run(&mut (), vec![()], Until::epochs(1)).unwrap_err();
    let error = format!("{:#}", anyhow::Error::from(error));
    assert!(error.contains("VarStore::merge"), "{error}");
    Ok(())
}

#[test]
fn momenta_warm_up() -> Result<()> {
    let vs = VarStore::new(Device::Cpu);
    let _ = vs.root().zeros("w", &[1]);
    let momenta = |ema: &EMAHandler, count| -> Result<Vec<f64>> {
        Ok((0..count).map(|_| ema.update()).collect::<Result<_, _>>()?)
    };
    let linear = EMAHandler::new(&vs, 0.1)?.warmup(0.5, 3)?;
    assert_eq!(momenta(&linear, 4)?, [0.5, 0.3, 0.1, 0.1]);
    let by_count = EMAHandler::decay(&vs, 0.2)?.warmup_by_count();
    assert_eq!(momenta(&by_count, 3)?, [1. - 1. / 10., 1. - 2. / 11., 0.8]);
    by_count.knob().set(0.25)?;
    assert_eq!(momenta(&by_count, 1)?, [0.25]);
    by_count.knob().set(2.)?;
    assert!(by_count.update().is_err());
    assert!(EMAHandler::decay(&vs, 1.).is_err());
    let ema = EMAHandler::new(&vs, 0.1)?;
    assert!(ema.clone().warmup(1.5, 3).is_err() && ema.warmup(0.5, 0).is_err());

    let mut engine = Engine::new(|_: &mut (), _, _: ()| Ok(()));
    let ema = EMAHandler::new(&vs, 0.1)?.named("ema").save_history(true);
    engine.attach(ema.on(Event::IterationCompleted.every(2)));
    engine.run(&mut (), vec![(); 5], Until::epochs(1))?;
    assert_eq!(engine.state.param_history["ema"], [[0.1], [0.1]]);
    Ok(())
}

#[test]
fn swa_is_the_mean_over_its_events() -> Result<()> {
    let vs = VarStore::new(Device::Cpu);
    let mut w = vs.root().var("w", &[2], nn::Init::Const(100.));
    let swa = SWAHandler::new(&vs)?.on(Event::EpochCompleted.after(1));
    let mut trainer = Engine::new(|w: &mut Tensor, engine: &mut Engine<_, _, _>, _: ()| {
        tch::no_grad(|| drop(w.fill_(engine.state.epoch as f64)));
        Ok(())
    });
    trainer.attach(swa.clone());
    trainer.run(&mut w, vec![()], Until::epochs(5))?;
    assert_eq!((swa.n_averaged(), swa.averages()[0].1.double_value(&[0])), (4, 3.5));
    let _swapped = swa.swap()?;
    assert_eq!(w.double_value(&[0]), 3.5);
    Ok(())
}

#[test]
fn frozen_groups_do_not_train_and_go_on_later() -> Result<()> {
    let (_vs, optimizer, [a, b]) = with_gradients(Kind::Double);
    let group = optimizer.group("a")?;
    group.freeze()?;
    assert!(!a.grad().defined() && !a.requires_grad());
    optimizer.step()?;
    assert_eq!((a.double_value(&[0]), b.double_value(&[0])), (1., -11.));
    group.unfreeze()?;
    optimizer.backward_step(&a.sum(Kind::Double))?;
    assert_eq!(a.double_value(&[0]), 0.);
    Ok(())
}

/// What the one pass of the CPU does not take goes the way of CUDA.
#[test]
fn memory_with_gaps_and_sparse_gradients() -> Result<()> {
    let mut vs = VarStore::new(Device::Cpu);
    vs.set_kind(Kind::Double);
    let all = Tensor::zeros([4, 6], (Kind::Double, Device::Cpu));
    let w = vs.root().add("w", all.narrow(1, 2, 3), true);
    let (ema, swa) = (EMAHandler::new(&vs, 0.25)?, SWAHandler::new(&vs)?);
    for value in [2., 4.] {
        tch::no_grad(|| drop(w.shallow_clone().fill_(value)));
        ema.update()?;
        swa.update()?;
    }
    assert_eq!(ema.averages()[0].1.double_value(&[3, 2]), 2. * 0.25 * 0.75 + 1.);
    let swapped = swa.swap()?;
    assert_eq!((w.double_value(&[3, 2]), all.double_value(&[3, 4])), (3., 3.));
    assert_eq!(all.double_value(&[3, 5]), 0., "outside");
    drop(swapped);
    assert_eq!(w.double_value(&[0, 0]), 4.);

    let table = vs.root().zeros("table", &[3, 2]);
    let optimizer = Optimizer::sgd(&vs).lr(1.).build()?;
    let scaler = GradScaler::new().init_scale(4.)?;
    for (factor, expected) in [(3., -3.), (f64::INFINITY, -3.)] {
        optimizer.zero_grad()?;
        let rows = Tensor::embedding(&table, &Tensor::from_slice(&[1i64]), -1, false, true);
        scaler.scale(&((rows * factor).sum(Kind::Double) + w.sum(Kind::Double)))?.backward();
        assert!(table.grad().is_sparse());
        let norm = value(&optimizer.gradients()?.norm()?);
        assert!(!norm.is_finite() || (norm - 4. * (12f64 + 2. * 9.).sqrt()).abs() < 1e-9);
        scaler.step(&optimizer)?;
        scaler.update()?;
        assert_eq!((table.double_value(&[1, 0]), w.double_value(&[0, 0])), (expected, 3.));
    }
    assert_eq!(scaler.skipped()?, 1);
    optimizer.zero_grad()?;
    Tensor::embedding(&table, &Tensor::from_slice(&[1i64, 1]), -1, false, true)
        .sum(Kind::Double)
        .backward();
    let norm = optimizer.clip_grad_norm(1.)?;
    assert!((value(&norm) - 8f64.sqrt()).abs() < 1e-12, "rows that are there twice add up");
    assert!((value(&optimizer.gradients()?.norm()?) - 1.).abs() < 1e-5);
    let largest = || value(&table.grad().to_dense(None, false).max());
    assert!((largest() - 0.5f64.sqrt()).abs() < 1e-5);
    optimizer.clip_grad_value(0.25)?;
    assert_eq!(largest(), 0.25);
    optimizer.zero_grad_in_place()?;
    assert_eq!(value(&optimizer.gradients()?.norm()?), 0.);
    Ok(())
}
