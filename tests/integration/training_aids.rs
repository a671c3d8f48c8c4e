//! Tests of clipping, mixed precision, accumulation, averages and group helpers, on the CPU.

use std::panic::{AssertUnwindSafe, catch_unwind};

use anyhow::Result;
use tch::nn::{self, VarStore};
use tch::{Device, Kind, Tensor};
use tch_ignite::amp::{GradScaler, autocast, without_autocast};
use tch_ignite::checkpoint::{IntoStateful, SavedGradients, Stateful, read_state, write_state};
use tch_ignite::data::Loader;
use tch_ignite::engine::{Engine, Event, Events, Stop, Until};
use tch_ignite::handlers::{Buffers, EMAHandler, Evaluate, GradNorm, SWAHandler, update_bn};
use tch_ignite::metrics::Mean;
use tch_ignite::optim::{Optimizer, lr};
use tch_ignite::schedule::{ParamScheduler, PiecewiseLinear};
use tch_ignite::supervised::{
    OPTIMIZER_STEPPED, Supervised, WINDOW_COMPLETED, create_supervised_evaluator,
    create_supervised_trainer,
};
use tch_ignite::{GradientAccumulator, Weight};

fn value(tensor: &Tensor) -> f64 {
    tensor.double_value(&[])
}

fn close(a: f64, b: f64) {
    approx::assert_abs_diff_eq!(a, b, epsilon = 1e-6 * b.abs().max(1.));
}

/// An optimizer with two groups of one parameter each, whose gradients are (3, 4) and (12).
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
        approx::assert_abs_diff_eq!(a.grad().double_value(&[0]), 1.5, epsilon = rough);
        approx::assert_abs_diff_eq!(b.grad().double_value(&[0]), 6., epsilon = 4. * rough);

        let (_vs, optimizer, [a, b]) = with_gradients(kind);
        let norm = optimizer.gradients()?.groups(["a"])?.clip_norm(2.5)?;
        assert_eq!((value(&norm), b.grad().double_value(&[0])), (5., 12.));
        approx::assert_abs_diff_eq!(a.grad().double_value(&[1]), 2., epsilon = rough);
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
fn norms_are_right_from_the_smallest_to_the_largest_numbers() -> Result<()> {
    // The squares of the first numbers are 0 in f32, and those of the last infinite.
    for kind in [Kind::Float, Kind::Half, Kind::BFloat16, Kind::Double] {
        for scale in [1e-30, 1e-15, 1e-4, 1., 1e4, 1e15, 1e30] {
            for count in [1i64, 31, 5003, (1 << 15) + 5003] {
                let mut vs = VarStore::new(Device::Cpu);
                vs.set_kind(kind);
                let w = vs.root().zeros("w", &[count]);
                let waves = Tensor::arange(count, (Kind::Double, Device::Cpu)).cos();
                let gradient = (waves * scale).to_kind(kind);
                (&w * &gradient).sum(kind).backward();
                let exact = value(&gradient.to_kind(Kind::Double).norm());
                let norm = value(&Optimizer::sgd(&vs).build()?.gradients()?.norm()?);
                let same = if kind == Kind::Double { 1e-13 } else { 2e-7 };
                assert!(
                    norm == exact || (norm - exact).abs() <= same * exact,
                    "{count} of {kind:?} times {scale}: {norm}, and {exact} in f64"
                );
            }
        }
    }
    Ok(())
}

#[test]
fn norms_of_other_orders_are_computed_or_refused() -> Result<()> {
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
    // The rows have norms of 5 and less than 1, which counts as 1. So their gradients may have norms of 0.5 and 0.1.
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

/// The model `y = w x` with the mean squared error and SGD with lr 0.1.
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
    // The 7 batches are accumulated in windows of 3, 3 and 1. The epoch's length is known, or only learned at its
    // end.
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
fn all_options_of_the_ready_step_work_together() -> Result<()> {
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

    // An evaluator of the averages runs in a trainer, and its second run fails.
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
fn buffers_integers_and_other_types_are_averaged_as_asked() -> Result<()> {
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

/// The averages of tied weights and of views are swapped in and back.
#[test]
fn averages_of_shared_memory_are_swapped_back() -> Result<()> {
    type Share = fn(&Tensor) -> Tensor;
    let shares: [(&str, Share, bool); 4] = [
        ("tied, both trained", Tensor::shallow_clone, true),
        ("tied, one trained", Tensor::shallow_clone, false),
        ("a view of all", Tensor::detach, true),
        // The one pass refuses this view, because its memory has gaps.
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

/// A variable whose shape has changed cannot be averaged. The error comes before the other averages are changed.
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
    let ema = EMAHandler::new(&vs, 0.5)?.warmup(0.25, 3)?;
    b.set_data(&Tensor::ones([2], (Kind::Float, Device::Cpu)));
    assert!(ema.update().is_err());
    assert_eq!((ema.updates(), ema.momentum()), (0, 0.5));
    Ok(())
}

/// A refused update changes no average, also not those of parameters where a buffer does not fit.
#[test]
fn averages_of_buffers_that_do_not_fit_are_refused_before_one_is_changed() -> Result<()> {
    let vs = VarStore::new(Device::Cpu);
    let mut a = vs.root().ones("a", &[2]);
    let (mut b, mut c) = (vs.root().ones_no_train("b", &[2]), vs.root().ones_no_train("c", &[2]));
    let ema = EMAHandler::new(&vs, 0.5)?.handle_buffers(Buffers::Update);
    tch::no_grad(|| drop((a.fill_(3.), b.fill_(3.))));
    for odd in [Tensor::ones([3], (Kind::Float, Device::Cpu)), c.to_kind(Kind::Bool)] {
        c.set_data(&odd);
        assert!(ema.update().is_err(), "{odd:?}");
        for (name, average) in ema.averages() {
            assert_eq!(value(&average.max()), 1., "{name}");
        }
    }
    Ok(())
}

/// An average in f32 of a variable that is bf16 now is rounded while it is swapped in, and only then.
#[test]
fn averages_of_another_type_come_back_bit_for_bit() -> Result<()> {
    let vs = VarStore::new(Device::Cpu);
    let values = |from: f64| (Tensor::arange(7, (Kind::Float, Device::Cpu)) + from).sin();
    let mut w = vs.root().add("w", values(0.), true);
    let mut wide = vs.root().add("wide", values(1.), true);
    let ema = EMAHandler::new(&vs, 0.3)?;
    w.set_data(&values(2.).to_kind(Kind::BFloat16));
    wide.set_data(&values(3.).to_kind(Kind::Double).cos());
    ema.update()?;
    let all = || {
        let averages = ema.averages().into_iter().map(|(_, average)| average.copy());
        averages.chain([w.detach().copy(), wide.detach().copy()]).collect::<Vec<_>>()
    };
    let before = all();
    let swapped = ema.swap()?;
    assert_eq!(w.detach(), before[0].to_kind(Kind::BFloat16));
    assert_eq!(wide.detach(), before[1].to_kind(Kind::Double));
    drop(swapped);
    assert_eq!(all(), before);
    // A value that is written into the model while the averages are swapped in goes into the averages.
    let swapped = ema.swap()?;
    tch::no_grad(|| drop(w.get(1).fill_(0.5)));
    drop(swapped);
    let after = all();
    assert_eq!((after[0].double_value(&[1]), after[0].get(2)), (0.5, before[0].get(2)));
    assert_eq!(after[1..], before[1..]);
    Ok(())
}

#[test]
fn averages_that_cannot_be_swapped_back_stay_known_as_swapped_in() -> Result<()> {
    let vs = VarStore::new(Device::Cpu);
    let (mut a, mut b) = (vs.root().ones("a", &[2]), vs.root().ones("b", &[2]));
    let ema = EMAHandler::new(&vs, 0.5)?;
    tch::no_grad(|| drop(a.fill_(3.)));
    let swapped = ema.swap()?;
    b.set_data(&Tensor::ones([3], (Kind::Float, Device::Cpu)));
    drop(swapped);
    assert_eq!((value(&ema.averages()[0].1.max()), value(&a.max())), (3., 1.));
    let errors = [ema.update().map(drop), ema.swap().map(drop)];
    for error in errors.map(|result| result.unwrap_err().to_string()) {
        assert!(error.contains("swapping back was refused"), "{error}");
    }
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

/// Tensors that the CPU's one pass cannot handle, because their memory has gaps or they are sparse, go through
/// libtorch's kernels, as on CUDA.
#[test]
fn sparse_gradients_are_saved_as_they_are() -> Result<()> {
    let model = || {
        let vs = VarStore::new(Device::Cpu);
        let table = vs.root().ones("table", &[5, 2]);
        (vs, table)
    };
    let backward = |table: &Tensor, row: i64| {
        let rows = Tensor::embedding(table, &Tensor::from_slice(&[row, 3]), -1, false, true);
        (rows * 0.3).sum(Kind::Float).backward();
    };
    let parts = |table: &Tensor| {
        let gradient = table.grad();
        (gradient.internal_indices(), gradient.internal_values(), gradient.is_coalesced())
    };
    let (vs, table) = model();
    backward(&table, 1);
    backward(&table, 3);
    let (indices, values, coalesced) = parts(&table);
    assert_eq!((indices.size(), coalesced), (vec![1, 3], false), "row 3 is there twice");

    let folder = tempfile::tempdir()?;
    let path = folder.path().join("gradients");
    write_state(&path, &SavedGradients::of(&vs).state_dict()?)?;
    let (other, same) = model();
    SavedGradients::of(&other).load_state_dict(read_state(&path)?)?;
    assert_eq!(parts(&same), (indices, values, coalesced));

    let of = |values: &[i64]| Tensor::from_slice(values).view([1, -1]);
    for (name, wrong) in [
        ("indices", of(&[1, 3, 5])),
        ("indices", of(&[1, -1, 3])),
        ("indices", of(&[1, 3])),
        ("indices", of(&[1, 3, 3]).to_kind(Kind::Float)),
        ("indices", of(&[1, 3, 3]).view([3])),
        ("indices", Tensor::zeros([3, 3], (Kind::Int64, Device::Cpu))),
        ("indices", Tensor::zeros([0, 3], (Kind::Int64, Device::Cpu))),
        ("values", Tensor::ones([3, 3], (Kind::Float, Device::Cpu))),
    ] {
        let mut state = SavedGradients::of(&vs).state_dict()?;
        let mut part = state.take_part("table")?;
        part.set_tensor(name, wrong);
        state.set_part("table", part);
        let error = SavedGradients::of(&other).load_state_dict(state).unwrap_err().to_string();
        assert!(error.contains("a sparse gradient is damaged"), "{error}");
    }
    let mut state = SavedGradients::of(&vs).state_dict()?;
    let mut part = state.take_part("table")?;
    part.set_value("coalesced", true)?;
    state.set_part("table", part);
    assert!(SavedGradients::of(&other).load_state_dict(state).is_err(), "not in order");
    assert_eq!(parts(&same), parts(&table), "refused is untouched");
    Ok(())
}

#[test]
fn memory_with_gaps_and_sparse_gradients_are_handled() -> Result<()> {
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
    approx::assert_abs_diff_eq!(value(&optimizer.gradients()?.norm()?), 1., epsilon = 1e-5);
    let largest = || value(&table.grad().to_dense(None, false).max());
    approx::assert_abs_diff_eq!(largest(), 0.5f64.sqrt(), epsilon = 1e-5);
    optimizer.clip_grad_value(0.25)?;
    assert_eq!(largest(), 0.25);
    optimizer.zero_grad_in_place()?;
    assert_eq!(value(&optimizer.gradients()?.norm()?), 0.);
    Ok(())
}

#[test]
fn a_batch_whose_step_is_refused_leaves_the_scaler_ready_for_the_next() -> Result<()> {
    for max_norm in [None, Some(10.)] {
        let vs = VarStore::new(Device::Cpu);
        let (w, table) = (vs.root().ones("w", &[1]), vs.root().ones("table", &[3, 1]));
        let net = nn::func_t(move |x, _| match x.double_value(&[0]) < 0. {
            true => Tensor::embedding(&table, &Tensor::from_slice(&[1i64]), -1, false, true) * &w,
            false => x * &w,
        });
        let optimizer = Optimizer::adam(&vs).lr(0.125).build()?;
        let mut cx = Supervised::new(net, optimizer, |y_pred, _| y_pred.mean(Kind::Float))
            .grad_scaler(GradScaler::new())
            .clip_grad_value(1.);
        if let Some(max) = max_norm {
            cx = cx.clip_grad_norm(max);
        }
        let error = format!("{:#}", cx.train_step(batch(&[-1.])).unwrap_err());
        assert!(error.contains("sparse"), "{error}");
        assert_eq!(weight(&vs), 1.);
        for steps in 1..3 {
            let _ = cx.train_step(tensors((1., 0.)))?;
            close(weight(&vs), 1. - 0.125 * f64::from(steps));
        }
    }
    Ok(())
}

/// A model with one weight `w` in f64 that starts at 1, and plain SGD with lr 1. The loss of a batch is the mean of `w
/// * x`, so its gradient is the mean of the batch. A batch that holds an infinity makes the model panic.
fn linear(vs: &mut VarStore) -> Supervised<nn::FuncT<'static>> {
    vs.set_kind(Kind::Double);
    let w = vs.root().ones("w", &[1]);
    let net = nn::func_t(move |x, _| {
        assert!(x.isfinite().all().int64_value(&[]) == 1, "a broken batch");
        x * &w
    });
    let optimizer = Optimizer::sgd(vs).lr(1.).build().unwrap();
    Supervised::new(net, optimizer, |y_pred, _| y_pred.mean(Kind::Double))
}

fn batch(x: &[f64]) -> (Tensor, Tensor) {
    (Tensor::from_slice(x), Tensor::from(0.))
}

fn weight(vs: &VarStore) -> f64 {
    vs.variables()["w"].double_value(&[0])
}

fn near(a: f64, b: f64) {
    approx::assert_abs_diff_eq!(a, b, epsilon = 1e-12 * b.abs().max(1.));
}

#[test]
fn a_window_that_loses_batches_to_errors_is_the_mean_of_the_others() -> Result<()> {
    // There are two windows of 4 batches, whose gradients are 1 to 8.
    for lost in
        [vec![0], vec![1], vec![3], vec![3, 4], vec![0, 1, 2, 3], vec![2, 7], vec![4, 5, 6, 7]]
    {
        let mut vs = VarStore::new(Device::Cpu);
        let mut cx = linear(&mut vs).accumulate(4)?;
        let data: Vec<_> = (0..8)
            .map(|i| batch(&[if lost.contains(&i) { f64::INFINITY } else { i as f64 + 1. }]))
            .collect();
        let data =
            || data.iter().map(|(x, y)| (x.shallow_clone(), y.shallow_clone())).collect::<Vec<_>>();
        let (mut stepped, mut errors) = (0, 0);
        let mut trainer = create_supervised_trainer();
        trainer.on(OPTIMIZER_STEPPED, |_, _| {
            stepped += 1;
            Ok(())
        });
        while trainer
            .run(
                &mut cx,
                tch_ignite::data::restartable(|| data().into_iter()),
                Until::epochs(1).epoch_length(8),
            )
            .is_err()
        {
            errors += 1;
        }
        drop(trainer);
        assert_eq!(errors, lost.len());
        let means: Vec<_> = [0..4, 4..8]
            .into_iter()
            .map(|window| {
                window.filter(|i| !lost.contains(i)).map(|i| i as f64 + 1.).collect::<Vec<_>>()
            })
            .filter(|window| !window.is_empty())
            .map(|window| window.iter().sum::<f64>() / window.len() as f64)
            .collect();
        assert_eq!(stepped, means.len(), "{lost:?}");
        near(weight(&vs), 1. - means.iter().sum::<f64>());
    }
    Ok(())
}

#[test]
fn a_run_that_starts_anew_tells_of_the_window_that_it_drops() -> Result<()> {
    let mut vs = VarStore::new(Device::Cpu);
    let mut cx = linear(&mut vs).accumulate(4)?;
    let data = |third: f64| clones([1., 2., third, 4.].iter().map(|x| batch(&[*x])).collect());
    let mut trainer = create_supervised_trainer();
    let until = || Until::epochs(1).epoch_length(4);
    assert!(trainer.run(&mut cx, data(f64::INFINITY), until()).is_err());
    trainer.reset()?;
    let summary = trainer.run(&mut cx, data(3.), until())?;
    assert!(summary.warnings[0].contains("the gradients of 2 batches"), "{:?}", summary.warnings);
    near(weight(&vs), 1. - 2.5);
    let summary = trainer.run(&mut cx, data(3.), Until::epochs(2))?;
    assert!(summary.warnings.is_empty());
    Ok(())
}

#[test]
fn a_window_that_is_cut_short_is_stepped_for_what_there_is() -> Result<()> {
    type Ends = fn(&mut tch_ignite::engine::Trainer<'_, Supervised<nn::FuncT<'static>>>);
    let cuts: [(&str, Until, Option<Ends>, u64, Stop); 5] = [
        ("budget", Until::iterations(5), None, 1, Stop::Terminated),
        ("terminate", Until::epochs(1), Some(|e| e.terminate()), 1, Stop::Terminated),
        (
            "terminate, skip",
            Until::epochs(1),
            Some(|e| e.terminate_skip_completed()),
            1,
            Stop::Terminated,
        ),
        ("epoch", Until::epochs(2), Some(|e| e.terminate_epoch()), 2, Stop::Completed),
        (
            "epoch, skip",
            Until::epochs(2),
            Some(|e| e.terminate_epoch_skip_completed()),
            2,
            Stop::Completed,
        ),
    ];
    for (what, until, end, runs, stop) in cuts {
        let mut vs = VarStore::new(Device::Cpu);
        // The gradients 1 to 8 are accumulated by 4, so after 5 batches the second window has one.
        let mut cx = linear(&mut vs).accumulate(4)?;
        let mut stepped = vec![];
        let mut trainer = create_supervised_trainer();
        if let Some(end) = end {
            trainer.on(Event::IterationCompleted, move |_, engine| {
                if engine.iteration_in_epoch() == 5 {
                    end(engine);
                }
                Ok(())
            });
        }
        trainer.on(OPTIMIZER_STEPPED, |_, engine| {
            stepped.push(engine.state.iteration);
            Ok(())
        });
        let data = clones((1..=8).map(|i| batch(&[f64::from(i)])).collect());
        let summary = trainer.run(&mut cx, data, until.epoch_length(8))?;
        drop(trainer);
        assert_eq!(summary.stop, stop, "{what}");
        assert_eq!(stepped, if runs == 1 { vec![4, 5] } else { vec![4, 5, 9, 10] }, "{what}");
        near(weight(&vs), 1. - runs as f64 * (2.5 + 5.));
        assert!(!cx.finish_window()?);
    }
    Ok(())
}

/// The samples of each batch. Three batches are accumulated at a time, so steps have 8, 8 and 2 samples.
const SIZES: [usize; 7] = [1, 5, 2, 3, 1, 4, 2];

fn samples() -> (Tensor, Tensor) {
    let x = (Tensor::arange(18 * 5, (Kind::Double, Device::Cpu)) * 0.7).sin().view([18, 5]);
    let y = (Tensor::arange(18, (Kind::Double, Device::Cpu)) * 0.3).cos().view([18, 1]);
    (x, y)
}

fn batches_of(sizes: &[usize]) -> Vec<(Tensor, Tensor)> {
    let (x, y) = samples();
    let mut begin = 0;
    let mut next = |size: usize| {
        begin += size as i64;
        let (from, size) = (begin - size as i64, size as i64);
        (x.narrow(0, from, size), y.narrow(0, from, size))
    };
    sizes.iter().map(|size| next(*size)).collect()
}

/// A data source of these batches. It makes shallow clones, because tensors do not implement `Clone`.
fn clones(batches: Vec<(Tensor, Tensor)>) -> tch_ignite::data::Custom<'static, (Tensor, Tensor)> {
    tch_ignite::data::restartable(move || {
        let shared = |(x, y): &(Tensor, Tensor)| (x.shallow_clone(), y.shallow_clone());
        batches.iter().map(shared).collect::<Vec<_>>().into_iter()
    })
}

/// Gives the variables fixed values from a formula, because other tests share the random number generator.
fn fill(vs: &VarStore) {
    let variables = vs.variables().into_iter().collect::<std::collections::BTreeMap<_, _>>();
    for (index, (_, mut variable)) in variables.into_iter().enumerate() {
        let values = Tensor::arange(variable.numel() as i64, (Kind::Double, Device::Cpu));
        let values = (values + 3. * index as f64).sin().view_as(&variable) * 0.5;
        tch::no_grad(|| variable.copy_(&values));
    }
}

/// Trains two layers in f64, which start the same at each call, for two epochs, and returns their weights in one row.
fn two_layers(
    sizes: &[usize],
    set_up: impl FnOnce(Supervised<nn::Sequential>) -> Supervised<nn::Sequential>,
    loss: impl Fn(&Tensor, &Tensor) -> tch_ignite::WeightedLoss + Send + 'static,
) -> Result<Tensor> {
    let mut vs = VarStore::new(Device::Cpu);
    let layer = |name: &str, from, to| nn::linear(vs.root() / name, from, to, Default::default());
    let net = nn::seq().add(layer("a", 5, 4)).add_fn(|x| x.tanh()).add(layer("b", 4, 1));
    vs.double();
    fill(&vs);
    let optimizer = Optimizer::builder(nn::sgd(0.9, 0., 1e-3, false), &vs).lr(0.1).build()?;
    let mut cx = set_up(Supervised::new(net, optimizer, loss));
    let mut trainer = create_supervised_trainer();
    trainer.run(&mut cx, clones(batches_of(sizes)), Until::epochs(2))?;
    let mut variables: Vec<_> = vs.variables().into_iter().collect();
    variables.sort_by(|(a, _), (b, _)| a.cmp(b));
    let rows: Vec<_> = variables.iter().map(|(_, tensor)| tensor.detach().reshape([-1])).collect();
    Ok(Tensor::cat(&rows, 0))
}

fn largest_difference(a: &Tensor, b: &Tensor) -> f64 {
    (a - b).abs().max().double_value(&[])
}

/// The mean over samples. The function below takes the mean over tokens, where targets below -0.5 are padding.
fn of_samples(y_pred: &Tensor, y: &Tensor) -> tch_ignite::WeightedLoss {
    (y_pred - y).square().mean(Kind::Double).into()
}

fn of_tokens(y_pred: &Tensor, y: &Tensor) -> tch_ignite::WeightedLoss {
    let mask = y.ge(-0.5).to_kind(Kind::Double);
    let tokens = mask.sum(Kind::Double);
    let sum = ((y_pred - y).square() * mask).sum(Kind::Double);
    // A batch without tokens has the weight 0 and the loss NaN, as torch's cross-entropy gives it.
    (sum / &tokens, tokens).into()
}

#[test]
fn batches_of_unequal_size_make_the_step_of_one_large_batch() -> Result<()> {
    type Loss = fn(&Tensor, &Tensor) -> tch_ignite::WeightedLoss;
    type SetUp = fn(Supervised<nn::Sequential>) -> Supervised<nn::Sequential>;
    let set_ups: [SetUp; 3] = [
        |cx| cx,
        |cx| cx.clip_grad_value(0.5).clip_grad_norm(0.2),
        |cx| cx.grad_scaler(GradScaler::new()).clip_grad_norm(0.2),
    ];
    for (loss, set_up) in
        [of_samples as Loss, of_tokens].into_iter().flat_map(|l| set_ups.map(|s| (l, s)))
    {
        let large = two_layers(&[8, 8, 2], set_up, loss)?;
        let small = two_layers(&SIZES, |cx| set_up(cx).accumulate(3).unwrap(), loss)?;
        assert!(largest_difference(&large, &small) < 1e-12, "{}", &large - &small);
        let means =
            two_layers(&SIZES, |cx| set_up(cx).accumulate(3).unwrap().equal_weights(), loss)?;
        // The mean of a batch without tokens is NaN.
        let difference = largest_difference(&large, &means);
        assert!(difference.is_nan() || difference > 1e-6, "the test would not notice");
    }
    // The first batch of a window has no tokens, or its only batch, or all of its batches.
    let token = |x: f64, tokens: i64| {
        let loss = Tensor::from(if tokens == 0 { f64::NAN } else { x });
        (loss, tokens)
    };
    let w = || Tensor::from(1.).set_requires_grad(true);
    for (batches, expected) in [
        (vec![token(5., 0), token(2., 6), token(8., 3)], 4.),
        (vec![token(2., 6), token(5., 0), token(8., 3)], 4.),
        (vec![token(2., 6), token(8., 3), token(5., 0)], 4.),
    ] {
        let vs = VarStore::new(Device::Cpu);
        let w = vs.root().add("w", w(), true);
        let optimizer = Optimizer::sgd(&vs).lr(1.).build()?;
        let mut accumulator = GradientAccumulator::new(3)?;
        for (loss, tokens) in batches {
            accumulator.begin(&optimizer, accumulator.next_window())?;
            let loss = accumulator.forward(|| &w * &loss)?;
            accumulator.backward(&optimizer, &loss, tokens)?;
        }
        near(value(&w.grad()), expected);
    }
    let vs = VarStore::new(Device::Cpu);
    let w = vs.root().add("w", w(), true);
    let optimizer = Optimizer::sgd(&vs).build()?;
    // A window of one batch is no exception: its weights would become NaN.
    for accumulator in [GradientAccumulator::new(1)?, GradientAccumulator::new(1)?.equal_weights()]
    {
        let mut accumulator = accumulator;
        for weight in [Weight::from(0), Tensor::from(0i64).into()] {
            accumulator.begin(&optimizer, accumulator.next_window())?;
            let result = accumulator.backward(&optimizer, &(&w * 2.), weight);
            match format!("{accumulator:?}").contains("equal: true") {
                true => assert!(result?),
                false => {
                    let error = result.unwrap_err().to_string();
                    assert!(error.contains("the only batch of the window has weight 0"), "{error}");
                }
            }
        }
    }
    let mut accumulator = GradientAccumulator::new(2)?;
    let mut step = |weight: Weight| -> tch_ignite::Result<bool> {
        accumulator.begin(&optimizer, accumulator.next_window())?;
        accumulator.backward(&optimizer, &(&w * 2.), weight)
    };
    for wrong in [
        Weight::from(-1.),
        f64::NAN.into(),
        f64::INFINITY.into(),
        Tensor::zeros([2], (Kind::Float, Device::Cpu)).into(),
    ] {
        let error = step(wrong).unwrap_err().to_string();
        assert!(error.contains("the weight of a batch must be"), "{error}");
    }
    assert!(!step(0.into())?);
    let error = step(Tensor::from(0i64).into()).unwrap_err().to_string();
    assert!(error.contains("all 2 batches of the window have weight 0"), "{error}");
    Ok(())
}

#[test]
fn equal_batches_are_divided_by_their_number_and_nothing_else() -> Result<()> {
    for kind in [Kind::Float, Kind::Double] {
        let (x, y) = samples();
        let (x, y) = (x.to_kind(kind), y.to_kind(kind));
        let batch = |i: i64| (x.narrow(0, 3 * i, 3), y.narrow(0, 3 * i, 3));
        let make = || {
            let mut vs = VarStore::new(Device::Cpu);
            let net = nn::linear(vs.root(), 5, 1, Default::default());
            if kind == Kind::Double {
                vs.double();
            }
            fill(&vs);
            let optimizer = Optimizer::sgd(&vs).lr(0.1).build().unwrap();
            (vs, net, optimizer)
        };
        let (ours, net, optimizer) = make();
        let mut cx = Supervised::new(net, optimizer, |p, y| p.mse_loss(y, tch::Reduction::Mean))
            .accumulate(3)?;
        (0..6).try_for_each(|i| cx.train_step(batch(i)).map(drop))?;
        let (theirs, net, optimizer) = make();
        for i in 0..6 {
            if i % 3 == 0 {
                optimizer.zero_grad()?;
            }
            let (x, y) = batch(i);
            (nn::Module::forward(&net, &x).mse_loss(&y, tch::Reduction::Mean) / 3.).backward();
            if i % 3 == 2 {
                optimizer.step()?;
            }
        }
        for (name, tensor) in ours.variables() {
            assert_eq!(tensor, theirs.variables()[&name]);
        }
    }
    Ok(())
}

#[test]
fn a_state_that_is_refused_changes_nothing() -> Result<()> {
    use tch_ignite::checkpoint::StateDict;
    let make = |scale: f64| -> Result<_> {
        let mut vs = VarStore::new(Device::Cpu);
        let scaler = GradScaler::new().init_scale(scale)?;
        let mut cx = linear(&mut vs).accumulate(3)?.grad_scaler(scaler.clone());
        let _ = cx.train_step(batch(&[scale]))?;
        Ok((vs, cx, scaler))
    };
    let gradient = |vs: &VarStore| vs.variables()["w"].grad().double_value(&[0]);
    let (_vs, theirs, _) = make(8.)?;
    let (vs, mut cx, scaler) = make(4.)?;
    let before = gradient(&vs);
    for key in ["scale", "growth_interval", "_growth_tracker", "skipped", "last_skipped"] {
        let mut state = theirs.state_dict()?.copy()?;
        let mut part: StateDict = state.take_part("scaler")?;
        part.set_value(key, -1.5)?;
        state.set_part("scaler", part);
        assert!(cx.load_state_dict(state).is_err(), "{key}");
        assert_eq!((gradient(&vs), scaler.get_scale()?), (before, 4.), "{key}");
    }
    for part in ["scaler", "gradients"] {
        let mut state = theirs.state_dict()?.copy()?;
        state.take_part(part)?;
        assert!(cx.load_state_dict(state).is_err(), "{part}");
        assert_eq!((gradient(&vs), scaler.get_scale()?), (before, 4.), "{part}");
    }
    cx.load_state_dict(theirs.state_dict()?.copy()?)?;
    assert_ne!(gradient(&vs), before);
    assert_eq!(scaler.get_scale()?, 8.);
    Ok(())
}

#[test]
fn a_scaler_refuses_counts_that_are_not_whole_or_too_large() -> Result<()> {
    let scaler = GradScaler::new();
    let good = scaler.state_dict()?;
    for (key, value) in [
        ("growth_interval", 2.5),
        ("growth_interval", 2f64.powi(32)),
        ("_growth_tracker", 0.5),
        ("_growth_tracker", 2f64.powi(31)),
        ("skipped", 1.5),
    ] {
        let mut state = good.clone();
        state.insert("scale".into(), 2.0.into());
        state.insert(key.into(), value.into());
        let error = scaler.load_state_dict(&state).unwrap_err().to_string();
        assert!(error.contains(key), "{error}");
        assert_eq!(scaler.state_dict()?, good);
    }
    // A whole number in the state may be written as a float.
    let mut state = good.clone();
    state.insert("growth_interval".into(), 500.0.into());
    scaler.load_state_dict(&state)?;
    assert_eq!(scaler.state_dict()?["growth_interval"], 500);
    Ok(())
}

#[test]
fn a_window_goes_on_after_its_state_is_restored() -> Result<()> {
    for saved_after in 1..3 {
        let mut results = vec![];
        for restored in [false, true] {
            let mut vs = VarStore::new(Device::Cpu);
            let mut cx = linear(&mut vs).accumulate(3)?;
            let data = [batch(&[1.]), batch(&[2., 4., 6.]), batch(&[5., 1.])];
            for (index, (x, y)) in data.into_iter().enumerate() {
                if restored && index == saved_after {
                    let (state, model) = (cx.state_dict()?, (&vs).into_stateful().state_dict()?);
                    vs = VarStore::new(Device::Cpu);
                    cx = linear(&mut vs).accumulate(3)?;
                    (&vs).into_stateful().load_state_dict(model)?;
                    cx.load_state_dict(state)?;
                    assert!(cx.differs_by_rank());
                }
                let _ = cx.train_step((x, y))?;
            }
            results.push(weight(&vs));
        }
        assert_eq!(results[0], results[1]);
        near(results[0], 1. - 19. / 6.);
    }
    Ok(())
}

#[test]
fn averages_follow_the_updates_of_the_optimizer() -> Result<()> {
    let data = || clones((1..=6).map(|i| batch(&[f64::from(i)])).collect());
    let mut vs = VarStore::new(Device::Cpu);
    let mut cx = linear(&mut vs).accumulate(4)?;
    let ema = EMAHandler::new(&vs, 0.5)?;
    let mut trainer = create_supervised_trainer();
    trainer.attach(ema.clone());
    trainer.run(&mut cx, data(), Until::epochs(1).epoch_length(6))?;
    // w is 1, then -1.5 after a step of 2.5, then -7 after one of 5.5. Each step has an update of the averages.
    assert_eq!(ema.updates(), 2);
    let first = 0.5 + 0.5 * -1.5;
    near(ema.averages()[0].1.double_value(&[0]), 0.5 * first + 0.5 * -7.);

    // The first loss overflows when it is scaled, so that step is skipped. The averages count it unless they are
    // updated on OPTIMIZER_STEPPED.
    for (on, updates) in [(None, 3), (Some(OPTIMIZER_STEPPED), 2), (Some(WINDOW_COMPLETED), 3)] {
        let mut vs = VarStore::new(Device::Cpu);
        let scaler = GradScaler::new();
        let mut cx = linear(&mut vs).accumulate(2)?.grad_scaler(scaler.clone());
        let mut ema = EMAHandler::new(&vs, 0.5)?;
        if let Some(event) = on {
            ema = ema.on(event);
        }
        let mut trainer = create_supervised_trainer();
        trainer.attach(ema.clone());
        let data: Vec<_> = [1e308, 2., 3., 4., 5., 6.].iter().map(|x| batch(&[*x])).collect();
        trainer.run(&mut cx, clones(data), Until::epochs(1))?;
        assert_eq!((ema.updates(), scaler.skipped()?), (updates, 1));
    }

    // A user's own engine fires OPTIMIZER_STEPPED where it steps; without that event, each iteration has one update.
    for registers in [true, false] {
        let mut vs = VarStore::new(Device::Cpu);
        let _ = linear(&mut vs);
        let mut trainer = Engine::new(move |_: &mut (), engine: &mut Engine<'_, _, (), ()>, ()| {
            if registers && engine.state.iteration % 3 == 0 {
                engine.fire_event(OPTIMIZER_STEPPED, &mut ())?;
            }
            Ok(())
        });
        if registers {
            trainer.register_events([OPTIMIZER_STEPPED])?;
        }
        let ema = EMAHandler::new(&vs, 0.5)?;
        trainer.attach(ema.clone());
        trainer.run(&mut (), vec![(); 6], Until::epochs(1))?;
        assert_eq!(ema.updates(), if registers { 2 } else { 6 });
    }
    Ok(())
}

#[test]
fn a_schedule_that_counts_updates_gives_update_k_value_k() -> Result<()> {
    let line = || PiecewiseLinear::new([(0, 1.), (10, 11.)]);
    for skipped in [0, 2] {
        for events in [Events::from(OPTIMIZER_STEPPED), OPTIMIZER_STEPPED | Event::Terminate] {
            let mut vs = VarStore::new(Device::Cpu);
            // Every gradient is 1, so that the weight shows the learning rates.
            let scaler = GradScaler::new();
            let mut cx = linear(&mut vs).accumulate(2)?.grad_scaler(scaler.clone());
            let optimizer = cx.optimizer.clone();
            let mut trainer = create_supervised_trainer();
            trainer.attach(ParamScheduler::new("lr", optimizer.knob("lr")?, line()).on(events));
            let overflowing = std::iter::repeat_n(1e308, 2 * skipped);
            let data: Vec<_> = overflowing.chain([1.; 9]).map(|x| batch(&[x])).collect();
            trainer.run(&mut cx, clones(data), Until::epochs(1))?;
            // There are five updates, the last of which has one batch.
            assert_eq!(scaler.skipped()?, skipped as u64);
            near(weight(&vs), 1. - (1. + 2. + 3. + 4. + 5.));
            near(optimizer.group_at(0)?.lr()?, 6.);
        }
    }
    Ok(())
}

#[test]
fn a_resumed_schedule_of_updates_goes_on_at_its_place() -> Result<()> {
    let run = |stop: Option<u64>| -> Result<f64> {
        let make = || -> Result<_> {
            let mut vs = VarStore::new(Device::Cpu);
            let cx = linear(&mut vs).accumulate(2)?;
            let mut trainer = create_supervised_trainer();
            let knob = cx.optimizer.knob("lr")?;
            let line = PiecewiseLinear::new([(0, 1.), (10, 11.)]);
            trainer.track("model", &vs).track("optimizer", &cx.optimizer);
            trainer.attach(ParamScheduler::new("lr", knob, line).on(OPTIMIZER_STEPPED));
            Ok((vs, cx, trainer))
        };
        let data = || clones((1..=7).map(|i| batch(&[f64::from(i)])).collect());
        let until = || Until::epochs(2).epoch_length(7);
        let (mut vs, mut cx, mut trainer) = make()?;
        if let Some(stop) = stop {
            trainer.on(Event::IterationCompleted.once(stop), |_, engine| {
                engine.interrupt();
                Ok(())
            });
            trainer.run(&mut cx, data(), until())?;
            let state = trainer.checkpoint(&cx)?;
            drop(trainer);
            (vs, cx, trainer) = make()?;
            trainer.restore(&mut cx, state, true)?;
        }
        trainer.run(&mut cx, data(), until())?;
        Ok(weight(&vs))
    };
    let whole = run(None)?;
    // Learning rates 1 to 8 are multiplied by the windows' gradients 1.5, 3.5, 5.5 and 7, twice in turn.
    near(whole, 1. - (1.5 + 7. + 16.5 + 28. + 7.5 + 21. + 38.5 + 56.));
    for stop in 1..14 {
        assert_eq!(run(Some(stop))?, whole, "{stop}");
    }
    Ok(())
}

#[test]
fn training_and_evaluation_call_the_model_in_their_modes() -> Result<()> {
    use std::sync::{Arc, Mutex};
    let calls: Arc<Mutex<Vec<(bool, bool)>>> = Arc::default();
    let seen = calls.clone();
    let vs = VarStore::new(Device::Cpu);
    let w = vs.root().ones("w", &[1]);
    let net = nn::func_t(move |x, train| {
        let y = x * &w;
        seen.lock().unwrap().push((train, y.requires_grad()));
        y
    });
    let optimizer = Optimizer::sgd(&vs).build()?;
    let mut cx = Supervised::new(net, optimizer, |y_pred, _| y_pred.mean(Kind::Float));
    let data = || clones(vec![(Tensor::from_slice(&[1f32]), Tensor::from(0.))]);
    create_supervised_trainer().run(&mut cx, data(), Until::epochs(1))?;
    assert_eq!(std::mem::take(&mut *calls.lock().unwrap()), [(true, true)]);
    let mut evaluator = create_supervised_evaluator();
    evaluator.on(Event::IterationCompleted, |_, engine| {
        let prediction = engine.state.output.as_ref().unwrap();
        assert!(!prediction.y_pred.requires_grad());
        Ok(())
    });
    evaluator.run(&mut cx, data(), Until::epochs(1))?;
    assert_eq!(std::mem::take(&mut *calls.lock().unwrap()), [(false, false)]);
    assert!(
        tch::Tensor::from(1.).set_requires_grad(true).square().requires_grad(),
        "gradients are on again"
    );
    Ok(())
}

fn numbers(tensor: &Tensor) -> Vec<f64> {
    Vec::try_from(tensor.to_kind(Kind::Double)).unwrap()
}

/// The numbers are those of torch 2.13's `update_bn`.
#[test]
fn update_bn_computes_torchs_averages() -> Result<()> {
    use nn::ModuleT;
    let mean = [1.0078214339152392, 1.1697504114521182, 1.2518431180597218];
    let var = [6.021375988641054, 6.343750850149826, 6.715931850538415];
    let twice_mean = [1.0039107169576198, 1.084875205726059, 1.125921559029861];
    let twice_var = [5.899569829933034, 6.060757721597707, 6.2468485855157905];
    for (kind, tolerance) in [(Kind::Double, 1e-15), (Kind::Float, 3e-7)] {
        let x =
            (Tensor::arange(30, (Kind::Double, Device::Cpu)) * 0.7).sin().view([10, 3]) * 3. + 1.;
        let x = x.to_kind(kind);
        let data = || {
            let parts = [(0, 4), (4, 3), (7, 3)].map(|(from, size)| x.narrow(0, from, size));
            tch_ignite::data::one_shot(parts)
        };
        let close = |tensor: &Tensor, expected: [f64; 3]| {
            for (ours, theirs) in numbers(tensor).into_iter().zip(expected) {
                approx::assert_abs_diff_eq!(ours, theirs, epsilon = tolerance * theirs);
            }
        };
        for momentum in [0., 0.1, 0.3, 1.] {
            let mut vs = VarStore::new(Device::Cpu);
            let ws_init = nn::Init::Const(1.);
            let config = nn::BatchNormConfig { momentum, ws_init, ..Default::default() };
            let bn = nn::batch_norm1d(vs.root() / "bn", 3, config);
            if kind == Kind::Double {
                vs.double();
            }
            let _ = tch::no_grad(|| bn.running_var.shallow_clone().fill_(9.));
            assert_eq!(update_bn(data(), |x| bn.forward_t(x, true))?, 1);
            close(&bn.running_mean, mean);
            close(&bn.running_var, var);
            // A layer that is called twice counts each call.
            let twice = |x: &Tensor| bn.forward_t(&(bn.forward_t(x, true) * 2. + 1.), true);
            assert_eq!(update_bn(data(), twice)?, 1);
            close(&bn.running_mean, twice_mean);
            close(&bn.running_var, twice_var);
            // An `update_bn` that fails changes nothing.
            let mut calls = 0;
            let error = update_bn(data(), |x| {
                calls += 1;
                assert!(calls < 2, "as asked");
                bn.forward_t(x, true)
            });
            assert!(error.unwrap_err().to_string().contains("as asked"));
            let error = update_bn(data(), |x| bn.forward_t(x, false)).unwrap_err().to_string();
            assert!(
                error.contains("evaluation mode") && error.contains("forward_t(x, true)"),
                "{error}"
            );
            assert_eq!(update_bn(data(), |_| ())?, 0);
            close(&bn.running_var, twice_var);
            assert!(x.set_requires_grad(true).square().requires_grad());
        }
    }

    // Averaged weights get batch norm statistics of their own, and the model keeps its statistics.
    let vs = VarStore::new(Device::Cpu);
    let net = nn::seq_t()
        .add(nn::linear(vs.root() / "a", 2, 2, Default::default()))
        .add(nn::batch_norm1d(vs.root() / "bn", 2, Default::default()));
    let running = || numbers(&vs.variables()["bn.running_mean"]);
    let x = Tensor::from_slice2(&[[1f32, 2.], [3., 5.], [8., 1.], [2., 2.]]);
    let _ = net.forward_t(&x, true);
    let (swa, own) = (SWAHandler::new(&vs)?, running());
    tch::no_grad(|| drop(vs.variables()["a.bias"].shallow_clone().fill_(3.)));
    swa.update()?;
    tch::no_grad(|| drop(vs.variables()["a.bias"].shallow_clone().fill_(-9.)));
    {
        let _averages = swa.swap()?;
        assert_eq!(update_bn(tch_ignite::data::one_shot([x]), |x| net.forward_t(x, true))?, 1);
    }
    assert_eq!(running(), own);
    let _averages = swa.swap()?;
    let computed = running();
    let expected = {
        let variables = vs.variables();
        Tensor::from_slice(&[3.5f32, 2.5]).matmul(&variables["a.weight"].tr())
            + &variables["a.bias"]
    };
    for (ours, theirs) in computed.into_iter().zip(numbers(&expected.detach())) {
        close(ours, theirs);
    }
    Ok(())
}

#[test]
fn a_refused_batch_leaves_the_running_averages_of_all_layers() -> Result<()> {
    let vs = VarStore::new(Device::Cpu);
    let path = vs.root();
    let padding = nn::ConvConfig { padding: 1, ..Default::default() };
    let net = nn::seq_t()
        .add(nn::conv2d(&path / "conv", 3, 4, 3, padding))
        .add(nn::batch_norm2d(&path / "wide", 4, Default::default()))
        .add_fn(|x| x.mean_dim([2i64, 3].as_slice(), false, None::<Kind>))
        .add(nn::batch_norm1d(&path / "narrow", 4, Default::default()))
        .add(nn::linear(&path / "head", 4, 1, Default::default()));
    let optimizer = Optimizer::sgd(&vs).lr(0.1).build()?;
    let loss = |y_pred: &Tensor, y: &Tensor| y_pred.mse_loss(y, tch::Reduction::Mean);
    let mut cx = Supervised::new(net, optimizer, loss);
    let batch = |samples: i64| {
        let options = (Kind::Float, Device::Cpu);
        (Tensor::randn([samples, 3, 8, 8], options), Tensor::zeros([samples, 1], options))
    };
    let all = || {
        let variables = vs.variables();
        let mut all: Vec<_> = variables
            .iter()
            .map(|(name, v)| (name.clone(), numbers(&v.detach().flatten(0, -1))))
            .collect();
        all.sort_by(|a, b| a.0.cmp(&b.0));
        all
    };
    let start = all();
    let _ = cx.train_step(batch(4))?;
    let before = all();
    assert_ne!(before, start);
    let error = format!("{:#}", cx.train_step(batch(1)).unwrap_err());
    assert!(error.contains("'narrow'") && !error.contains("'wide'"), "{error}");
    assert_eq!(all(), before);
    let _ = cx.train_step(batch(4))?;
    assert_ne!(all(), before);
    Ok(())
}

#[test]
fn a_last_batch_of_one_sample_is_refused_where_batch_normalisation_needs_more() -> Result<()> {
    let x = Tensor::randn([5, 3, 2, 2], (Kind::Float, Device::Cpu));
    let y = Tensor::zeros([5, 1], (Kind::Float, Device::Cpu));
    let loader = || Loader::new(&x, &y, 2).unwrap();
    for pooled in [true, false] {
        let vs = VarStore::new(Device::Cpu);
        let mut net = nn::seq_t();
        if pooled {
            net = net.add_fn(|x| x.mean_dim([2i64, 3].as_slice(), true, None::<Kind>));
        }
        let net = net
            .add(nn::batch_norm2d(vs.root() / "block" / "bn", 3, Default::default()))
            .add_fn(|x| x.flatten(1, -1).mean_dim([1i64].as_slice(), true, None::<Kind>));
        let optimizer = Optimizer::sgd(&vs).lr(0.1).build()?;
        let loss = |y_pred: &Tensor, y: &Tensor| y_pred.mse_loss(y, tch::Reduction::Mean);
        let mut cx = Supervised::new(net, optimizer, loss);
        let running = |vs: &VarStore| numbers(&vs.variables()["block.bn.running_var"]);
        let mut trainer = create_supervised_trainer();
        let run = trainer.run(&mut cx, loader(), Until::epochs(2));
        assert!(running(&vs).iter().all(|value| value.is_finite()), "{:?}", running(&vs));
        if !pooled {
            // Four pixels of one sample are four values, so this is no error.
            run?;
            continue;
        }
        let error = format!("{:#}", anyhow::Error::from(run.unwrap_err()));
        for part in ["epoch 1", "iteration 3", "'block.bn'", "drop_last"] {
            assert!(error.contains(part), "{error}");
        }
        // Without the last batch, the run succeeds.
        let (before, two) = (running(&vs), loader().drop_last(true));
        create_supervised_trainer().run(&mut cx, &two, Until::epochs(1))?;
        assert_ne!(running(&vs), before);
    }
    Ok(())
}
