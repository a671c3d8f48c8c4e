//! Tests of the ready trainer with batches, models and outputs of the program's own.

use anyhow::{Result, ensure};
use tch::nn::{self, VarStore};
use tch::{Device, Kind, Reduction, Tensor};
use tch_ignite::data::{Batch, restartable};
use tch_ignite::engine::{Engine, Event, Until};
use tch_ignite::handlers::Evaluate;
use tch_ignite::metrics::{Accuracy, Loss, Mean, pair};
use tch_ignite::optim::Optimizer;
use tch_ignite::supervised::{
    Prediction, Supervised, TIME_ITERATION_COMPLETED, TIME_ITERATION_STARTED,
    create_supervised_evaluator, create_supervised_tbptt_trainer, create_supervised_trainer,
};

fn numbers(count: i64, shape: &[i64]) -> Tensor {
    (Tensor::arange(count, (Kind::Float, Device::Cpu)) * 0.7).sin().view(shape)
}

fn linear(vs: &VarStore) -> nn::Linear {
    let mut net = nn::linear(vs.root(), 4, 3, Default::default());
    tch::no_grad(|| net.ws.copy_(&numbers(12, &[3, 4])));
    if let Some(bias) = &mut net.bs {
        tch::no_grad(|| bias.copy_(&numbers(3, &[3])));
    }
    net
}

/// Batch `number` of three: pictures of four numbers, and classes.
fn batch(number: i64) -> Batch {
    let samples = if number == 2 { 3 } else { 5 };
    let x = numbers(60, &[15, 4]).narrow(0, 5 * number, samples);
    (x, Tensor::from_slice(&[0i64, 1, 2, 2, 1]).narrow(0, 0, samples))
}

fn loss(y_pred: &Tensor, y: &Tensor) -> Tensor {
    y_pred.cross_entropy_for_logits(y)
}

fn weights(vs: &VarStore) -> Vec<f32> {
    let variables: std::collections::BTreeMap<_, _> = vs.variables().into_iter().collect();
    let flat: Vec<_> = variables.values().map(|tensor| tensor.detach().view([-1])).collect();
    Vec::<f32>::try_from(Tensor::cat(&flat, 0)).unwrap()
}

/// The weights that a plain trainer learns, with its losses.
fn plain() -> Result<(Vec<f32>, Vec<f64>)> {
    let vs = VarStore::new(Device::Cpu);
    let optimizer = Optimizer::adam(&vs).lr(0.05).build()?;
    let net = linear(&vs);
    let mut cx = Supervised::new(net, optimizer, loss).accumulate(2)?.clip_grad_norm(0.3);
    let mut losses = vec![];
    let mut trainer = create_supervised_trainer();
    trainer.on(Event::IterationCompleted, |_, engine| {
        losses.extend(engine.state.output.as_ref().map(|loss| loss.double_value(&[])));
        Ok(())
    });
    trainer.run(&mut cx, restartable(|| (0..3).map(batch)), Until::epochs(3))?;
    drop(trainer);
    Ok((weights(&vs), losses))
}

/// A batch of a program's own: the input in two halves, with a mask of samples.
struct Halves {
    left: Tensor,
    right: Tensor,
    classes: Tensor,
}

fn halves(number: i64) -> Halves {
    let (x, classes) = batch(number);
    Halves { left: x.narrow(1, 0, 2), right: x.narrow(1, 2, 2), classes }
}

type Trained = (Tensor, Tensor, Tensor);

/// The same training as [`plain`], with batches and inputs of the program's own.
fn of_halves(vs: &VarStore) -> Result<Supervised<nn::Linear, Halves, Prediction, Trained>> {
    let optimizer = Optimizer::adam(vs).lr(0.05).build()?;
    let cx = Supervised::with_model_fn(
        linear(vs),
        optimizer,
        |net, (left, right): &(Tensor, Tensor), _train| Tensor::cat(&[left, right], 1).apply(net),
        |y_pred: &Tensor, y: &Tensor| loss(y_pred, y),
    )
    .prepare_batch(|batch: Halves| ((batch.left, batch.right), batch.classes))
    .output_transform(|y_pred, y, loss| (y_pred, y, loss));
    Ok(cx.accumulate(2)?.clip_grad_norm(0.3))
}

#[test]
fn batches_and_models_of_ones_own_train_as_the_plain_ones_do() -> Result<()> {
    let (expected, expected_losses) = plain()?;
    let vs = VarStore::new(Device::Cpu);
    let mut cx = of_halves(&vs)?;
    let mut losses = vec![];
    let mut trainer = cx.trainer();
    trainer.on(Event::IterationCompleted, |_, engine| {
        let Some((y_pred, _, loss)) = &engine.state.output else { anyhow::bail!("no output") };
        ensure!(!y_pred.requires_grad() && !loss.requires_grad(), "the graph is kept");
        losses.push(loss.double_value(&[]));
        Ok(())
    });
    trainer.run(&mut cx, restartable(|| (0..3).map(halves)), Until::epochs(3))?;
    drop(trainer);
    assert_eq!(weights(&vs), expected);
    assert_eq!(losses, expected_losses);
    Ok(())
}

#[test]
fn metrics_of_the_training_and_of_its_evaluator_read_the_outputs() -> Result<()> {
    let vs = VarStore::new(Device::Cpu);
    let mut cx = of_halves(&vs)?;
    let right = std::cell::Cell::new(0);
    let (mut trainer, mut evaluator) = (cx.trainer(), cx.evaluator());
    trainer
        .metric("accuracy", Accuracy::of(|output: &Trained| (&output.0, &output.1)))
        .metric("loss", Mean::of(|output: &Trained| output.2.shallow_clone()));
    evaluator
        .metric("accuracy", Accuracy::of(Prediction::parts))
        .metric("loss", Loss::of(loss, Prediction::parts));
    trainer.on(Event::IterationCompleted, |_, engine| {
        // The metric counts what the step itself predicted.
        let Some((y_pred, y, _)) = &engine.state.output else { anyhow::bail!("no output") };
        right.set(
            right.get() + y_pred.argmax(1, false).eq_tensor(y).sum(Kind::Int64).int64_value(&[]),
        );
        Ok(())
    });
    trainer.run(&mut cx, restartable(|| (0..3).map(halves)), Until::epochs(1))?;
    assert_eq!(trainer.state.metrics.get("accuracy")?, right.get() as f64 / 13.);
    assert!(trainer.state.metrics.get("loss")?.is_finite());
    evaluator.run(&mut cx, restartable(|| (0..3).map(halves)), Until::epochs(1))?;
    // The plain evaluator sees the same.
    let mut plain_cx = Supervised::new(
        nn::Linear {
            ws: cx.net.ws.shallow_clone(),
            bs: cx.net.bs.as_ref().map(Tensor::shallow_clone),
        },
        Optimizer::sgd(&vs).lr(0.1).build()?,
        loss,
    );
    let mut plain_evaluator = create_supervised_evaluator();
    plain_evaluator.metric("loss", Loss::of(loss, Prediction::parts));
    plain_evaluator.run(&mut plain_cx, restartable(|| (0..3).map(batch)), Until::epochs(1))?;
    let (ours, plain) =
        (evaluator.state.metrics.get("loss")?, plain_evaluator.state.metrics.get("loss")?);
    assert_eq!(ours, plain);
    Ok(())
}

#[test]
fn a_run_with_outputs_of_ones_own_resumes_exactly_within_a_window() -> Result<()> {
    let until = || Until::epochs(3);
    let whole = VarStore::new(Device::Cpu);
    let mut cx = of_halves(&whole)?;
    let mut trainer = cx.trainer();
    trainer.metric("accuracy", Accuracy::of(|output: &Trained| (&output.0, &output.1)));
    trainer.run(&mut cx, restartable(|| (0..3).map(halves)), until())?;

    let vs = VarStore::new(Device::Cpu);
    let mut cx = of_halves(&vs)?;
    let state = {
        let optimizer = cx.optimizer.clone();
        let mut first = cx.trainer();
        first.track("model", &vs).track("optimizer", &optimizer);
        first.metric("accuracy", Accuracy::of(|output: &Trained| (&output.0, &output.1)));
        // In mid window: two batches of three make a window, so the first of the second epoch waits.
        first.on(Event::IterationCompleted.once(4), |_, engine| {
            engine.interrupt();
            Ok(())
        });
        first.run(&mut cx, restartable(|| (0..3).map(halves)), until())?;
        first.checkpoint(&cx)?.copy()?
    };
    let resumed = VarStore::new(Device::Cpu);
    let mut cx = of_halves(&resumed)?;
    let optimizer = cx.optimizer.clone();
    let mut second = cx.trainer();
    second.track("model", &resumed).track("optimizer", &optimizer);
    second.metric("accuracy", Accuracy::of(|output: &Trained| (&output.0, &output.1)));
    second.restore(&mut cx, state, true)?;
    assert!(second.state.output.is_some());
    second.run(&mut cx, restartable(|| (0..3).map(halves)), until())?;
    assert_eq!(weights(&resumed), weights(&whole));
    assert_eq!(second.state.metrics.get("accuracy")?, trainer.state.metrics.get("accuracy")?);
    Ok(())
}

#[test]
fn the_error_of_a_step_says_what_the_batch_was() -> Result<()> {
    let vs = VarStore::new(Device::Cpu);
    let optimizer = Optimizer::sgd(&vs).lr(0.1).build()?;
    let mut cx = Supervised::new(linear(&vs), optimizer, loss);
    let before = weights(&vs);
    let wrong = (numbers(10, &[2, 5]), Tensor::from_slice(&[0i64, 1]));
    let mut trainer = create_supervised_trainer();
    let run = trainer.run(
        &mut cx,
        restartable(move || [(wrong.0.shallow_clone(), wrong.1.shallow_clone())].into_iter()),
        Until::epochs(1),
    );
    let text = run.unwrap_err().to_string();
    assert!(
        text.contains("libtorch: ")
            && text.contains("(input Float [2, 5] on Cpu, targets Int64 [2] on Cpu)")
            && text.lines().count() == 1,
        "{text}"
    );
    let step = cx.train_step((numbers(8, &[2, 4]), Tensor::from_slice(&[0i64, 7])));
    let text = format!("{:#}", step.unwrap_err());
    assert!(text.contains("7 is out of bounds") && text.contains("targets Int64 [2]"), "{text}");
    assert_eq!(weights(&vs), before);
    let mut inputs = of_halves(&vs)?;
    let Halves { left, classes, .. } = halves(0);
    let unequal = Halves { right: left.narrow(0, 0, 2), left, classes };
    let text = format!("{:#}", inputs.eval_step(unequal).unwrap_err());
    assert!(text.contains("(input Float [5, 2] on Cpu, Float [2, 2] on Cpu)"), "{text}");
    // A panic of the program's own stays as it is.
    let mut cx = Supervised::with_model_fn(
        linear(&vs),
        Optimizer::sgd(&vs).lr(0.1).build()?,
        |_, _: &Tensor, _| -> Tensor { panic!("my own") },
        |y_pred: &Tensor, _: &Tensor| y_pred.shallow_clone(),
    );
    assert_eq!(cx.train_step(batch(0)).unwrap_err().to_string(), "panicked: my own");
    Ok(())
}

#[test]
fn an_input_without_a_tensor_is_refused() -> Result<()> {
    let vs = VarStore::new(Device::Cpu);
    let optimizer = Optimizer::sgd(&vs).lr(0.1).build()?;
    let mut cx = Supervised::with_model_fn(
        linear(&vs),
        optimizer,
        |net, _: &Vec<Tensor>, _| numbers(4, &[1, 4]).apply(net),
        |y_pred: &Tensor, y: &Tensor| loss(y_pred, y),
    );
    let text = cx.train_step((vec![], Tensor::from_slice(&[0i64]))).unwrap_err().to_string();
    assert!(text.contains("holds no tensor"), "{text}");
    Ok(())
}

/// A recurrent model of two numbers: h = tanh(x w + h u).
struct Recurrent {
    w: Tensor,
    u: Tensor,
}

#[test]
fn truncated_backpropagation_has_ignites_numbers() -> Result<()> {
    let vs = VarStore::new(Device::Cpu);
    let (mut w, mut u) = (vs.root().zeros("w", &[1]), vs.root().zeros("u", &[1]));
    let mut vs = vs;
    vs.double();
    let _ = tch::no_grad(|| (w.fill_(0.5), u.fill_(0.25)));
    let net = Recurrent { w: w.shallow_clone(), u: u.shallow_clone() };
    let optimizer = Optimizer::builder(nn::sgd(0.9, 0., 0., false), &vs).lr(0.5).build()?;
    let mut cx = Supervised::tbptt(
        net,
        optimizer,
        |net, x, hidden: Option<&Tensor>, _train| {
            let zeros = || Tensor::zeros([x.size()[0], 1], (Kind::Double, Device::Cpu));
            let mut hidden = hidden.map_or_else(zeros, Tensor::shallow_clone);
            let mut steps = vec![];
            for time in 0..x.size()[1] {
                hidden = (x.select(1, time) * &net.w + &hidden * &net.u).tanh();
                steps.push(hidden.shallow_clone());
            }
            (Tensor::stack(&steps, 1), hidden)
        },
        |y_pred, y| y_pred.mse_loss(y, Reduction::Mean),
    );
    let batch = |k: i64| {
        let x = (Tensor::arange(10, (Kind::Double, Device::Cpu)).view([2, 5, 1]) + k) / 10.;
        let y = x.cos();
        (x, y)
    };
    let losses = std::cell::RefCell::new((vec![], vec![], 0));
    let value = |output: &Option<Tensor>| output.as_ref().map(|loss| loss.double_value(&[]));
    let mut trainer = create_supervised_tbptt_trainer(2, 1)?;
    trainer.on(Event::IterationCompleted, |_, engine| {
        losses.borrow_mut().0.extend(value(&engine.state.output));
        Ok(())
    });
    trainer.on(TIME_ITERATION_STARTED, |_, _| {
        losses.borrow_mut().2 += 1;
        Ok(())
    });
    trainer.on(TIME_ITERATION_COMPLETED, |_, engine| {
        losses.borrow_mut().1.extend(value(&engine.state.output));
        Ok(())
    });
    trainer.run(&mut cx, restartable(|| [batch(0), batch(3)].into_iter()), Until::epochs(2))?;
    // These are the numbers of ignite's create_supervised_tbptt_trainer.
    let iterations =
        [0.3601754511793224, 0.1569983318820284, 0.18610567815534906, 0.14650784196786296];
    let chunks = [
        0.6307133600976453,
        0.3205463080012377,
        0.12926668543908423,
        0.1334717011328225,
        0.1188063825908289,
        0.21871691192243387,
        0.4080832065826273,
        0.07958658386865773,
        0.0706472440147621,
        0.07223241427095883,
        0.13709092919221288,
        0.23020018244041715,
    ];
    let near = |ours: &[f64], theirs: &[f64]| {
        ours.len() == theirs.len() && ours.iter().zip(theirs).all(|(a, b)| (a - b).abs() < 1e-12)
    };
    let (ours, of_chunks, started) = losses.take();
    assert!(near(&ours, &iterations) && near(&of_chunks, &chunks), "{ours:?} {of_chunks:?}");
    assert_eq!(started, 12);
    let weights = [w.double_value(&[0]), u.double_value(&[0])];
    assert!(near(&weights, &[3.4123308516969715, 1.042049124517144]), "{weights:?}");
    Ok(())
}

#[test]
fn inputs_and_targets_of_other_lengths_are_refused_before_a_chunk() -> Result<()> {
    let vs = VarStore::new(Device::Cpu);
    let net = linear(&vs);
    let before = weights(&vs);
    // One dimension is given from the end.
    for (steps, dim) in [([12, 11], 1), ([11, 12], -2), ([0, 0], 1)] {
        let mut cx = Supervised::tbptt(
            nn::Linear {
                ws: net.ws.shallow_clone(),
                bs: net.bs.as_ref().map(Tensor::shallow_clone),
            },
            Optimizer::sgd(&vs).lr(0.1).build()?,
            |net, x, _: Option<&Tensor>, _train| {
                let y_pred = x.apply(net);
                (y_pred.shallow_clone(), y_pred)
            },
            |y_pred, y| (y_pred.sum(Kind::Float) - y.sum(Kind::Float)).square(),
        );
        let data = restartable(move || {
            let zeros =
                |steps: i64, size: i64| Tensor::zeros([2, steps, size], (Kind::Float, Device::Cpu));
            [(zeros(steps[0], 4), zeros(steps[1], 3))].into_iter()
        });
        let mut trainer = create_supervised_tbptt_trainer(5, dim)?;
        let text = trainer.run(&mut cx, data, Until::epochs(1)).unwrap_err().to_string();
        let shapes = [format!("[2, {}, 4]", steps[0]), format!("[2, {}, 3]", steps[1])];
        assert!(shapes.iter().all(|shape| text.contains(shape)), "{text}");
    }
    assert_eq!(weights(&vs), before);
    Ok(())
}

#[test]
fn an_output_that_cannot_be_made_leaves_the_model_as_it_was() -> Result<()> {
    let vs = VarStore::new(Device::Cpu);
    let net = linear(&vs);
    let before = weights(&vs);
    let model = |defined: bool| {
        move |net: &nn::Linear, x: &Tensor, _train: bool| {
            let y_pred = x.apply(net);
            let other = if defined { y_pred.shallow_clone() } else { Tensor::new() };
            (y_pred, other)
        }
    };
    for (defined, says) in [(false, "train_outputs=True"), (true, "panicked: no output")] {
        let optimizer = Optimizer::sgd(&vs).lr(0.1).momentum(0.9).build()?;
        let mut cx = Supervised::with_model_fn(
            nn::Linear {
                ws: net.ws.shallow_clone(),
                bs: net.bs.as_ref().map(Tensor::shallow_clone),
            },
            optimizer,
            model(defined),
            |(y_pred, _): &(Tensor, Tensor), y: &Tensor| loss(y_pred, y),
        )
        .output_transform(|_, _, _| -> Tensor { panic!("no output") });
        let text = format!("{:#}", cx.train_step(batch(0)).unwrap_err());
        assert!(text.contains(says), "{text}");
        assert_eq!(weights(&vs), before);
        let gradient = net.ws.grad();
        assert!(!gradient.defined() || gradient.abs().max().double_value(&[]) == 0.);
    }
    Ok(())
}

#[test]
fn a_metric_computes_what_it_needs_of_the_output() -> Result<()> {
    let output = || {
        let logits = Tensor::from_slice(&[-2f64, 1., 3., -1.]);
        (logits, Tensor::from_slice(&[0f64, 1., 0., -100.]))
    };
    let mut engine = Engine::new(move |_: &mut (), _, (): ()| Ok(output()));
    let group = tch_ignite::metrics::MetricGroup::new()
        .metric(
            "mapped",
            Accuracy::of(pair).leave_out(-100).map_y_pred(|logits| logits.sigmoid().round()),
        )
        .metric(
            "first",
            Accuracy::of(pair)
                .map_y_pred(|logits| logits.narrow(0, 0, 2).sigmoid().round())
                .map_y(|y| y.narrow(0, 0, 2)),
        );
    engine.metric("group", group).metric(
        "computed",
        Accuracy::computed(|(logits, y): &(Tensor, Tensor)| {
            (logits.slice(0, 0, 3, 1).gt(0.).to_kind(Kind::Double), y.slice(0, 0, 3, 1))
        }),
    );
    engine.run(&mut (), vec![(), ()], Until::epochs(1))?;
    let metrics = &engine.state.metrics;
    assert!((metrics.get("group/mapped")? - 2. / 3.).abs() < 1e-15);
    assert_eq!(metrics.get("group/first")?, 1.);
    assert_eq!(metrics.get("computed")?, metrics.get("group/mapped")?);
    Ok(())
}

#[test]
fn places_are_left_out_of_class_scores() -> Result<()> {
    use tch_ignite::metrics::Metric;
    // (N, C, L) and (N, L), as of tokens.
    let (scores, tokens) =
        (numbers(24, &[2, 3, 4]), Tensor::from_slice(&[0i64, 1, 2, 9, 9, 2, 1, 0]));
    let tokens = tokens.view([2, 4]);
    let mut metric = Accuracy::of(pair).leave_out(9);
    metric.update(&(scores.shallow_clone(), tokens.shallow_clone()))?;
    let right = scores.argmax(1, false).eq_tensor(&tokens).sum(Kind::Int64).int64_value(&[]);
    assert_eq!(metric.compute()?.read()?, right as f64 / 6.);
    let output = (scores.shallow_clone(), tokens.shallow_clone());
    let (updated, waits) = tch_ignite::host_syncs(|| metric.update(&output))?;
    updated?;
    assert_eq!(waits.iter().filter(|wait| *wait == "aten::nonzero").count(), 1, "{waits:?}");
    // Nothing is left, so nothing counts.
    metric.reset();
    metric.update(&(scores.shallow_clone(), tokens.fill(9)))?;
    assert!(metric.compute().is_err());
    let wrong = (numbers(24, &[4, 6]), numbers(4, &[2, 2]));
    let text = metric.update(&wrong).unwrap_err().to_string();
    assert!(text.contains("[4, 6]") && text.contains("[2, 2]"), "{text}");
    Ok(())
}

#[test]
fn the_evaluator_of_the_context_runs_within_its_trainer() -> Result<()> {
    let vs = VarStore::new(Device::Cpu);
    let mut cx = of_halves(&vs)?;
    let mut evaluator = cx.evaluator();
    evaluator.metric("accuracy", Accuracy::of(Prediction::parts));
    let mut trainer = cx.trainer();
    trainer.attach(Evaluate::each_epoch("val", evaluator, Again));
    trainer.run(&mut cx, restartable(|| (0..3).map(halves)), Until::epochs(1))?;
    assert!(trainer.state.metrics.get("val/accuracy")? > 0.);
    Ok(())
}

/// The three batches, as data that can be walked for each evaluation.
#[derive(Clone)]
struct Again;

impl<'a> tch_ignite::data::IntoSource<'a, Halves> for Again {
    fn into_source(self) -> Box<dyn tch_ignite::data::Source<Halves> + 'a> {
        restartable(|| (0..3).map(halves)).into_source()
    }
}
