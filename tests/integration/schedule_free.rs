//! Schedule-Free optimizers: who sees which values of the parameters.

use std::sync::{Arc, Mutex};

use anyhow::Result;
use tch::nn::{self, VarStore};
use tch::{Device, Kind, Tensor};
use tch_ignite::checkpoint::{Checkpoint, IntoStateful};
use tch_ignite::data::Loader;
use tch_ignite::engine::{Engine, Event, Until};
use tch_ignite::handlers::{EMAHandler, Evaluate};
use tch_ignite::optim::Optimizer;
use tch_ignite::supervised::{Supervised, create_supervised_evaluator, create_supervised_trainer};

/// A store with one linear layer whose values are the same each time, and its optimizer.
fn made(name: &str) -> Result<(VarStore, nn::Linear, Optimizer)> {
    let mut vs = VarStore::new(Device::Cpu);
    let net = nn::linear(vs.root() / "fc", 3, 2, Default::default());
    vs.set_kind(Kind::Double);
    tch::no_grad(|| {
        for (index, (_, mut variable)) in sorted(&vs).into_iter().enumerate() {
            variable.copy_(&waves(&variable.size(), index as f64));
        }
    });
    let optimizer = match name {
        "SGDScheduleFree" => {
            Optimizer::sgd_schedule_free(&vs).lr(0.2).warmup_steps(3).weight_decay(0.01).build()?
        }
        _ => {
            let builder = Optimizer::adamw_schedule_free(&vs).lr(0.05);
            builder.warmup_steps(3).weight_decay(0.01).build()?
        }
    };
    assert_eq!(optimizer.name(), name);
    Ok((vs, net, optimizer))
}

const NAMES: [&str; 2] = ["SGDScheduleFree", "AdamWScheduleFree"];

fn waves(shape: &[i64], phase: f64) -> Tensor {
    let count = shape.iter().product::<i64>();
    ((Tensor::arange(count, (Kind::Double, Device::Cpu)) + phase * 1.7) * 0.9).sin().reshape(shape)
}

fn sorted(vs: &VarStore) -> Vec<(String, Tensor)> {
    let mut all: Vec<_> = vs.variables().into_iter().collect();
    all.sort_by(|a, b| a.0.cmp(&b.0));
    all
}

fn values(vs: &VarStore) -> Vec<Tensor> {
    sorted(vs).into_iter().map(|(_, variable)| variable.detach().copy()).collect()
}

fn batches() -> Vec<(Tensor, Tensor)> {
    (0..4).map(|n| (waves(&[5, 3], f64::from(n)), waves(&[5, 2], f64::from(n) + 0.5))).collect()
}

fn loader() -> Loader {
    let (x, y): (Vec<_>, Vec<_>) = batches().into_iter().unzip();
    Loader::new(&Tensor::cat(&x, 0), &Tensor::cat(&y, 0), 5).unwrap()
}

fn loss(y_pred: &Tensor, y: &Tensor) -> Tensor {
    y_pred.mse_loss(y, tch::Reduction::Mean)
}

/// Trains by hand on all batches, so many times.
fn train(net: &nn::Linear, optimizer: &Optimizer, epochs: usize) -> Result<()> {
    for _ in 0..epochs {
        for (x, y) in batches() {
            optimizer.backward_step(&loss(&x.apply(net), &y))?;
        }
    }
    Ok(())
}

fn largest_difference(a: &[Tensor], b: &[Tensor]) -> f64 {
    let difference = |(a, b): (&Tensor, &Tensor)| (a - b).abs().max().double_value(&[]);
    a.iter().zip(b).map(difference).fold(0., f64::max)
}

/// Evaluations, averages and files of weights get the averages; the training goes on bit for bit as if there were none
/// of them; checkpoints resume.
#[test]
fn everyone_sees_the_right_values() -> Result<()> {
    for name in NAMES {
        let (vs, net, optimizer) = made(name)?;
        train(&net, &optimizer, 2)?;
        let trained = values(&vs);
        optimizer.eval()?;
        let averaged = values(&vs);
        assert!(!optimizer.is_training()?);
        assert!(largest_difference(&trained, &averaged) > 1e-3);

        let (vs, net, optimizer) = made(name)?;
        let folder = tempfile::tempdir()?;
        let seen = Arc::new(Mutex::new(vec![]));
        let mut trainer = create_supervised_trainer();
        trainer.track("model", &vs).track("optimizer", &optimizer);
        let mut evaluator = create_supervised_evaluator();
        let (see, all) = (seen.clone(), sorted(&vs));
        evaluator.on(Event::IterationStarted, move |_, _| {
            let now: Vec<_> = all.iter().map(|(_, variable)| variable.detach().copy()).collect();
            see.lock().unwrap().push(now);
            Ok(())
        });
        trainer.attach(Evaluate::each_epoch("val", evaluator, loader()));
        let ema = EMAHandler::new(&vs, 0.5)?;
        trainer.attach(ema.clone());
        let evaluator = create_supervised_evaluator();
        trainer.attach(ema.with_averages(Evaluate::each_epoch("ema", evaluator, loader())));
        let weights = Checkpoint::new(folder.path()).weights(&vs).n_saved(1);
        trainer.attach(weights.on(Event::EpochCompleted));
        let mut cx = Supervised::new(net, optimizer.clone(), loss);
        trainer.run(&mut cx, loader(), Until::epochs(2))?;

        assert_eq!(values(&vs), trained, "{name}");
        assert!(optimizer.is_training()?);
        let seen = seen.lock().unwrap();
        assert_eq!(seen.len(), 8);
        assert_eq!(seen[7], averaged, "{name}");
        let file = std::fs::read_dir(folder.path())?
            .map(|entry| entry.map(|entry| entry.path()))
            .collect::<Result<Vec<_>, _>>()?;
        let file = file.iter().find(|path| path.extension().is_some_and(|e| e == "safetensors"));
        let (mut other, ..) = made(name)?;
        other.load(file.expect("a file of weights"))?;
        assert_eq!(values(&other), averaged, "{name}");

        // The moving average is of averages: one momentum of 0.5 after the other.
        let (again, net, optimizer) = made(name)?;
        let mut expected = values(&again);
        for _ in 0..2 {
            for (x, y) in batches() {
                optimizer.backward_step(&loss(&x.apply(&net), &y))?;
                optimizer.eval()?;
                for (average, value) in expected.iter_mut().zip(values(&again)) {
                    *average = &*average * 0.5 + value * 0.5;
                }
                optimizer.train()?;
            }
        }
        let averages: Vec<_> = ema.averages().into_iter().map(|(_, average)| average).collect();
        assert!(largest_difference(&averages, &expected) < 1e-14, "{name}");
    }
    Ok(())
}

/// The ready evaluator switches by itself where nobody else does, and the trainer back.
#[test]
fn ready_steps_switch_by_themselves() -> Result<()> {
    let (vs, net, optimizer) = made(NAMES[1])?;
    let mut cx = Supervised::new(net, optimizer.clone(), loss);
    let all = batches();
    let share = |n: usize| (all[n].0.shallow_clone(), all[n].1.shallow_clone());
    let _ = cx.train_step(share(0))?;
    let _ = cx.train_step(share(1))?;
    let trained = values(&vs);
    cx.eval_step(share(2))?;
    assert!(!optimizer.is_training()?);
    assert!(largest_difference(&trained, &values(&vs)) > 1e-4);
    let _ = cx.train_step(share(2))?;
    let (other, net, optimizer) = made(NAMES[1])?;
    let mut cx = Supervised::new(net, optimizer, loss);
    (0..3).try_for_each(|n| cx.train_step(share(n)).map(drop))?;
    assert_eq!(values(&vs), values(&other));
    Ok(())
}

/// A state that was saved within an evaluation goes on bit for bit, also the values for training.
#[test]
fn a_state_of_mid_evaluation_is_right() -> Result<()> {
    for name in NAMES {
        let (vs, net, optimizer) = made(name)?;
        train(&net, &optimizer, 1)?;
        optimizer.eval()?;
        let (other, other_net, resumed) = made(name)?;
        let state = (&optimizer).into_stateful().state_dict()?.copy()?;
        let model = (&vs).into_stateful().state_dict()?.copy()?;
        (&other).into_stateful().load_state_dict(model)?;
        (&resumed).into_stateful().load_state_dict(state)?;
        assert!(!resumed.is_training()?);
        let error = resumed.step().unwrap_err().to_string();
        assert!(error.contains(name) && error.contains("optimizer.train()"), "{error}");
        let refused = resumed.step_clipped(1.).is_err();
        let error = resumed.with_tch(|lent| lent.step()).unwrap_err().to_string();
        assert!(error.contains("optimizer.train()"), "{error}");
        assert!(refused && values(&other) == values(&vs));
        for (net, optimizer) in [(&net, &optimizer), (&other_net, &resumed)] {
            optimizer.train()?;
            assert!(optimizer.group_at(0)?.get("train_mode")? == 1.);
            train(net, optimizer, 1)?;
        }
        assert_eq!(values(&vs), values(&other), "{name}");
        assert_eq!(optimizer.group_at(0)?.get("k")?, 8.);
        assert_eq!(optimizer.state("fc.weight")?.len(), if name == NAMES[0] { 1 } else { 2 });
    }
    Ok(())
}

/// Weights that were loaded in evaluation are not lost: training goes on with what belongs to them, as in the package.
#[test]
fn values_given_in_evaluation_count() -> Result<()> {
    let (vs, net, optimizer) = made(NAMES[0])?;
    train(&net, &optimizer, 1)?;
    optimizer.eval()?;
    let bias = vs.variables()["fc.bias"].shallow_clone();
    let _ = tch::no_grad(|| bias.shallow_clone().fill_(7.));
    let z = optimizer.state("fc.bias")?[0].1.copy();
    optimizer.train()?;
    assert!((bias - (z * 0.1 + 7. * 0.9)).abs().max().double_value(&[]) < 1e-14);
    Ok(())
}

/// Where one parameter cannot go back to its values for training, none does.
#[test]
fn all_parameters_go_back_or_none() -> Result<()> {
    for (name, spoilt) in NAMES.iter().flat_map(|name| [(*name, "fc.weight"), (*name, "fc.bias")]) {
        let (vs, net, optimizer) = made(name)?;
        train(&net, &optimizer, 1)?;
        let trained = values(&vs);
        optimizer.eval()?;
        let averaged = values(&vs);
        let mut parameter = vs.variables()[spoilt].shallow_clone();
        let value = parameter.detach().copy();
        parameter.set_data(&waves(&[7], 0.));
        assert!(optimizer.train().is_err(), "{name} {spoilt}");
        assert!(!optimizer.is_training()?);
        parameter.set_data(&value);
        assert_eq!(values(&vs), averaged, "{name} {spoilt}");
        optimizer.train()?;
        assert_eq!(values(&vs), trained, "{name} {spoilt}");
    }
    Ok(())
}

#[test]
fn counts_can_only_be_read_and_bounds_are_those_of_the_package() -> Result<()> {
    let (vs, net, optimizer) = made(NAMES[1])?;
    train(&net, &optimizer, 1)?;
    let group = optimizer.group_at(0)?;
    assert_eq!((group.get("k")?, group.get("lr_max")?), (4., 0.05));
    for name in ["k", "weight_sum", "lr_max", "train_mode"] {
        for error in [
            group.set(name, 1.).unwrap_err(),
            group.knob(name).unwrap_err(),
            optimizer.knob(name).unwrap_err(),
        ] {
            let text = error.to_string();
            assert!(text.contains(name) && text.contains("only be read"), "{text}");
        }
    }
    let refused = [
        Optimizer::sgd_schedule_free(&vs).momentum(0.).build(),
        Optimizer::sgd_schedule_free(&vs).momentum(1.).build(),
        Optimizer::adamw_schedule_free(&vs).betas(0., 0.9).build(),
    ];
    for refused in refused {
        let error = refused.unwrap_err().to_string();
        assert!(error.contains("between 0 and 1") && error.contains("given"), "{error}");
    }
    Ok(())
}

/// A program of one's own gets the averages in `Evaluate` because the engine tracks the optimizer.
#[test]
fn evaluate_switches_for_contexts_of_ones_own() -> Result<()> {
    let (vs, net, optimizer) = made(NAMES[1])?;
    let mut evaluator = Engine::new(|_: &mut (), _, (x, _): (Tensor, Tensor)| Ok(x));
    let (weight, seen) =
        (vs.variables()["fc.weight"].shallow_clone(), Arc::new(Mutex::new(vec![])));
    let (see, mode) = (seen.clone(), optimizer.clone());
    evaluator.on(Event::Started, move |_, _| {
        see.lock().unwrap().push((weight.detach().copy(), mode.is_training()?));
        Ok(())
    });
    let step = optimizer.clone();
    let mut trainer = Engine::new(move |_: &mut (), _, (x, y): (Tensor, Tensor)| {
        Ok(step.backward_step(&loss(&x.apply(&net), &y))?)
    });
    trainer.track("optimizer", &optimizer);
    trainer.attach(Evaluate::each_epoch("val", evaluator, loader()));
    trainer.run(&mut (), loader(), Until::epochs(1))?;
    assert!(optimizer.is_training()?);
    optimizer.eval()?;
    let seen = seen.lock().unwrap();
    assert_eq!(seen[0], (vs.variables()["fc.weight"].detach().copy(), false));
    Ok(())
}
