//! Tests of metrics against numbers computed by hand and against ignite's (tests/golden).

use serde_json::Value;
use tch::{Device, Kind, Reduction, Tensor};
use tch_ignite::engine::{Engine, Event, MetricValue, Until};
use tch_ignite::metrics::{Accuracy, Loss, Mean, Metric, RunningAverage, Usage};

type Pair = (Tensor, Tensor);

fn parts(pair: &Pair) -> (&Tensor, &Tensor) {
    (&pair.0, &pair.1)
}

fn floats(values: &[f64], shape: &[i64]) -> Tensor {
    Tensor::from_slice(values).reshape(shape)
}

fn ints(values: &[i64], shape: &[i64]) -> Tensor {
    Tensor::from_slice(values).reshape(shape)
}

/// The value of a metric over these outputs.
fn over<O>(
    mut metric: impl Metric<O>,
    outputs: impl IntoIterator<Item = O>,
) -> anyhow::Result<f64> {
    outputs.into_iter().try_for_each(|output| metric.update(&output))?;
    Ok(metric.compute()?.read()?)
}

fn refused<O>(metric: impl Metric<O>, output: O) -> String {
    over(metric, [output]).unwrap_err().to_string()
}

fn close(a: f64, b: f64, relative: f64) -> bool {
    (a - b).abs() <= relative * b.abs().max(1e-300)
}

#[test]
fn accuracy_of_classes_counts_also_over_further_dimensions() -> anyhow::Result<()> {
    let scores = floats(&[0.1, 0.9, 0.8, 0.2, 0.3, 0.7], &[3, 2]);
    let few = (scores, ints(&[1, 0, 0], &[3]));
    assert_eq!(over(Accuracy::of(parts), [few])?, 2. / 3.);
    // The scores are for one image of 2 by 2 pixels and 3 classes. The largest scores are those of classes 0, 1, 2,
    // 0.
    let scores = floats(&[9., 1., 1., 5., 2., 8., 2., 4., 3., 3., 7., 3.], &[1, 3, 2, 2]);
    let image = (scores, ints(&[0, 1, 2, 2], &[1, 2, 2]));
    assert_eq!(over(Accuracy::of(parts), [image])?, 0.75);
    Ok(())
}

#[test]
fn accuracy_counts_samples_not_batches() -> anyhow::Result<()> {
    let batch = |pred: &[i64], y: &[i64]| (ints(pred, &[-1]), ints(y, &[-1]));
    let outputs = [batch(&[1, 1, 1, 1, 0], &[1, 1, 1, 1, 1]), batch(&[0], &[1])];
    assert_eq!(over(Accuracy::of(parts), outputs)?, 4. / 6.);
    Ok(())
}

#[test]
fn accuracy_of_labels_wants_all_labels_of_a_sample() -> anyhow::Result<()> {
    let (pred, y) = ([1, 0, 1, 1, 0, 0], [1, 0, 1, 0, 0, 0]);
    let accuracy = || Accuracy::of(parts);
    let flat = || (ints(&pred, &[3, 2]), ints(&y, &[3, 2]));
    assert_eq!(over(accuracy(), [flat()])?, 5. / 6.);
    assert_eq!(over(accuracy().is_multilabel(true), [flat()])?, 2. / 3.);
    // Labels lie along dimension 1, so the columns (1, 1), (0, 1), (1, 0) are compared with (1, 0), (0, 0), (1, 0).
    let deep = (ints(&pred, &[1, 2, 3]), ints(&y, &[1, 2, 3]));
    assert_eq!(over(accuracy().is_multilabel(true), [deep])?, 2. / 3.);
    Ok(())
}

#[test]
fn accuracy_stays_exact_beyond_what_f32_can_count() -> anyhow::Result<()> {
    let n = (1 << 24) + 2;
    let ones = Tensor::ones([n], (Kind::Bool, Device::Cpu));
    let last = (ints(&[0], &[1]), ints(&[1], &[1]));
    let value = over(Accuracy::of(parts), [(ones.copy(), ones), last])?;
    assert_eq!(value, n as f64 / (n + 1) as f64);
    Ok(())
}

#[test]
fn shapes_that_do_not_fit_are_named() {
    let zeros = |shape: &[i64]| Tensor::zeros(shape, (Kind::Float, Device::Cpu));
    for (pred, y, multilabel) in [
        (vec![3, 2], vec![4], false),
        (vec![3, 2, 5], vec![3, 4], false),
        (vec![3], vec![3, 1], false),
        (vec![3, 2], vec![3, 3], false),
        (vec![3, 2, 2, 2], vec![3, 2], false),
        (vec![3], vec![3], true),
        (vec![3, 2], vec![3], true),
    ] {
        let error =
            refused(Accuracy::of(parts).is_multilabel(multilabel), (zeros(&pred), zeros(&y)));
        assert!(error.ends_with(&format!("they are {pred:?} and {y:?}")), "{error}");
    }
    let shape = "a single value is needed, but the tensor has shape [2]";
    assert_eq!(refused(Mean::new(), zeros(&[2])), shape);
    assert_eq!(refused(RunningAverage::new(), zeros(&[2])), shape);
    let unreduced = |pred: &Tensor, y: &Tensor| pred.mse_loss(y, Reduction::None);
    assert_eq!(refused(Loss::of(unreduced, parts), (zeros(&[2]), zeros(&[2]))), shape);
}

#[test]
fn a_loss_that_panics_is_an_error_naming_both_shapes() {
    let mut engine: Engine<(), i64, Pair> = Engine::new(|_, _, n: i64| {
        let zeros = |n| Tensor::zeros([n], (Kind::Float, Device::Cpu));
        Ok((zeros(n), zeros(3)))
    });
    let loss = |pred: &Tensor, y: &Tensor| pred.mse_loss(y, Reduction::Mean);
    engine.metric("loss", Loss::of(loss, parts));
    let error = engine.run(&mut (), vec![3, 2], Until::epochs(1)).unwrap_err();
    let all = format!("{:#}", anyhow::Error::from(error));
    let expected = "handler 'metric loss' of ITERATION_COMPLETED failed at iteration 2 (epoch 1): ";
    assert!(all.starts_with(expected), "{all}");
    assert!(all.contains("(2)") && all.contains("(3)"), "{all}");
}

#[test]
fn computing_without_data_is_an_error() {
    fn check<O>(mut metric: impl Metric<O>, output: O, expected: &str) {
        let text = |metric: &dyn Metric<O>| metric.compute().unwrap_err().to_string();
        assert!(text(&metric).contains(expected), "{}", text(&metric));
        metric.update(&output).unwrap();
        assert!(metric.compute().is_ok());
        metric.reset();
        assert!(text(&metric).contains(expected), "reset forgets");
    }
    let pair = || (floats(&[1.], &[1]), floats(&[1.], &[1]));
    check(
        Accuracy::of(parts),
        pair(),
        "Accuracy must have at least one example before it can be computed",
    );
    let loss = |pred: &Tensor, y: &Tensor| pred.mse_loss(y, Reduction::Mean);
    check(
        Loss::of(loss, parts),
        pair(),
        "Loss must have at least one example before it can be computed",
    );
    check(Mean::new(), 1., "Mean must have at least one example before it can be computed");
    check(RunningAverage::new(), 1., "RunningAverage has no value before the first iteration");
}

#[test]
fn the_mean_counts_iterations_and_the_loss_samples() -> anyhow::Result<()> {
    let batches = || [floats(&[1., 1., 1.], &[3, 1]), floats(&[3.], &[1, 1])];
    let loss = |pred: &Tensor, y: &Tensor| pred.l1_loss(y, Reduction::Mean);
    let zeros = |pred: Tensor| (pred.shallow_clone(), pred.zeros_like());
    assert_eq!(over(Loss::of(loss, parts), batches().map(zeros))?, 1.5);
    assert_eq!(over(Mean::new(), batches().map(|pred| pred.mean(Kind::Double)))?, 2.);
    let of_a_field = Mean::of(|output: &(f64, &str)| output.0);
    assert_eq!(over(of_a_field, [(1., "a"), (2., "b")])?, 1.5);
    Ok(())
}

#[test]
fn many_small_f32_values_are_summed_in_f64() -> anyhow::Result<()> {
    let small = || std::iter::repeat_with(|| Tensor::from(0.1f32)).take(20_000);
    let exact = f64::from(0.1f32);
    let mean = over(Mean::new(), small())?;
    assert!(close(mean, exact, 1e-12), "{mean} instead of {exact}");
    let loss =
        over(Loss::of(|pred, _| pred.shallow_clone(), parts), small().map(|x| (x.copy(), x)))?;
    assert!(close(loss, exact, 1e-12), "{loss}");
    let average = over(RunningAverage::new().alpha(0.999), small())?;
    assert!(close(average, exact, 1e-12), "{average}");
    assert!(!close(
        small().map(|x| x.double_value(&[]) as f32).sum::<f32>() as f64 / 2e4,
        exact,
        1e-6
    ));
    Ok(())
}

#[test]
fn values_of_any_kind_and_shape_with_one_element_are_taken() -> anyhow::Result<()> {
    for value in [
        Tensor::from(3i64),
        Tensor::from(3f32),
        Tensor::from_slice(&[3i32]),
        floats(&[3.], &[1, 1]),
    ] {
        assert_eq!(over(Mean::new(), [value.copy(), value.copy()])?, 3.);
        assert_eq!(over(RunningAverage::new(), [value.copy(), value])?, 3.);
    }
    Ok(())
}

#[test]
fn the_running_average_starts_with_the_first_value() -> anyhow::Result<()> {
    let of = |alpha, values: Vec<f64>| over(RunningAverage::new().alpha(alpha), values);
    assert_eq!(of(0.98, vec![5.])?, 5.);
    assert_eq!(of(0.5, vec![1., 2., 4.])?, 2.75);
    assert_eq!(of(1., vec![1., 2., 4.])?, 1.);
    let plain = over(RunningAverage::new(), vec![1., 2.])?;
    assert!(close(plain, 1.02, 1e-15), "{plain}");
    for alpha in [0., -0.5, 1.5, f64::NAN] {
        let error = of(alpha, vec![1.]).unwrap_err().to_string();
        assert_eq!(
            error,
            format!("Argument alpha should be a float between 0.0 and 1.0. Given was {alpha}")
        );
    }
    Ok(())
}

#[test]
fn values_are_detached_and_kept_apart_from_the_steps_tensors() -> anyhow::Result<()> {
    // The tensors have the kind of the accumulators, because a conversion to the same kind makes no copy.
    let weight = Tensor::ones([1], (Kind::Double, Device::Cpu)).set_requires_grad(true);
    let mut engine: Engine<(), f64, Pair> = Engine::new(|_, _, factor: f64| {
        let y_pred = &weight * factor;
        Ok((y_pred.shallow_clone(), y_pred.detach()))
    });
    let first = |pair: &Pair| pair.0.shallow_clone();
    let loss = |pred: &Tensor, y: &Tensor| {
        let loss = (pred + y).sum(Kind::Double);
        assert!(!loss.requires_grad(), "metrics are computed without gradients");
        loss
    };
    engine
        .metric_with("mean", Mean::of(first), Usage::RunningBatchWise)
        .metric("running", RunningAverage::of(first))
        .metric_with("loss", Loss::of(loss, parts), Usage::RunningBatchWise)
        .on(Event::IterationCompleted, |_, engine| {
            for (name, value) in engine.state.metrics.iter() {
                let MetricValue::Tensor(value) = value else { anyhow::bail!("{name} was read") };
                anyhow::ensure!(!value.requires_grad() && value.kind() == Kind::Double, "{name}");
            }
            if let Some((y_pred, y)) = &engine.state.output {
                let _guard = tch::no_grad_guard();
                anyhow::ensure!(y_pred.requires_grad());
                let (_, _) = (y_pred.shallow_clone().fill_(1000.), y.shallow_clone().fill_(1000.));
            }
            Ok(())
        });
    engine.run(&mut (), vec![1., 3.], Until::epochs(1))?;
    let value = |name| engine.state.metrics.get(name);
    assert_eq!((value("mean")?, value("loss")?), (2., 4.));
    assert!(close(value("running")?, 1.04, 1e-12));
    assert!(!weight.grad().defined());
    Ok(())
}

#[test]
fn values_that_do_not_exist_are_named_with_those_that_do() -> anyhow::Result<()> {
    let mut engine: Engine<(), f64, f64> = Engine::new(|_, _, x| Ok(x));
    engine.metric("b", Mean::new()).metric("a", Mean::new());
    let text = |engine: &Engine<(), f64, f64>, name| {
        engine.state.metrics.get(name).unwrap_err().to_string()
    };
    assert!(text(&engine, "a").starts_with("no metric 'a' has a value yet; none has one. "));
    engine.run(&mut (), vec![1.], Until::epochs(1))?;
    assert!(text(&engine, "c").starts_with("no metric 'c' has a value yet; there are: 'a', 'b'. "));
    let pair: Vec<_> = engine.state.metrics.iter().map(|(name, _)| name).collect();
    assert!(pair == ["a", "b"] && engine.state.metrics.contains("a"));
    Ok(())
}

/// Runs a metric over epochs of these outputs and returns its value after each iteration and each epoch; NaN where it
/// has none yet.
fn watched<O: 'static>(
    metric: impl Metric<O> + 'static,
    usage: Usage,
    epoch_length: usize,
    outputs: Vec<O>,
) -> anyhow::Result<[Vec<f64>; 2]> {
    let epochs = (outputs.len() / epoch_length) as u64;
    let mut outputs = outputs.into_iter();
    let mut engine: Engine<[Vec<f64>; 2], (), O> =
        Engine::new(move |_, _, ()| outputs.next().ok_or_else(|| anyhow::anyhow!("no more")));
    engine.metric_with("m", metric, usage);
    for (index, event) in [Event::IterationCompleted, Event::EpochCompleted].into_iter().enumerate()
    {
        engine.on(event, move |values: &mut [Vec<f64>; 2], engine| {
            values[index].push(engine.state.metrics.get("m").unwrap_or(f64::NAN));
            Ok(())
        });
    }
    let mut values = [vec![], vec![]];
    engine.run(&mut values, vec![(); epoch_length], Until::epochs(epochs))?;
    Ok(values)
}

#[test]
fn usages_say_when_a_mean_is_reset_and_computed() -> anyhow::Result<()> {
    let nan = f64::NAN;
    for (usage, iterations, epochs) in [
        (Usage::EpochWise, [nan, nan, 1.5, 1.5], [1.5, 6.]),
        (Usage::RunningEpochWise, [nan, nan, 2., 2.], [2., 5.]),
        (Usage::BatchWise, [1., 2., 4., 8.], [2., 8.]),
        (Usage::RunningBatchWise, [1., 1.5, 7. / 3., 3.75], [1.5, 3.75]),
        (Usage::SingleEpochRunningBatchWise, [1., 1.5, 4., 6.], [1.5, 6.]),
    ] {
        let [seen, at_end] = watched(Mean::new(), usage.clone(), 2, vec![1., 2., 4., 8.])?;
        let same = |a: &[f64], b: &[f64]| {
            a.iter().zip(b).all(|(a, b)| a == b || (a.is_nan() && b.is_nan()))
        };
        assert!(
            same(&seen, &iterations) && same(&at_end, &epochs),
            "{usage:?}: {seen:?} {at_end:?}"
        );
    }
    Ok(())
}

// These tests compare with ignite's numbers.

fn golden(file: &str, wanted: impl Fn(&Value) -> bool) -> Vec<Value> {
    let path = format!("{}/tests/golden/{file}", env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(path).unwrap();
    let cases = text.lines().filter(|line| !line.is_empty());
    cases.map(|line| serde_json::from_str(line).unwrap()).filter(wanted).collect()
}

fn shape(value: &Value) -> Vec<i64> {
    match value.as_array() {
        Some(list) => {
            let inner = list.first().map(shape).unwrap_or_default();
            std::iter::once(list.len() as i64).chain(inner).collect()
        }
        None => vec![],
    }
}

fn numbers(value: &Value) -> Vec<f64> {
    match value {
        Value::Array(list) => list.iter().flat_map(numbers).collect(),
        Value::Null => vec![f64::NAN],
        _ => vec![value.as_f64().unwrap()],
    }
}

fn tensor(value: &Value, kind: &Value) -> Tensor {
    let kind = if kind == "float64" { Kind::Double } else { Kind::Int64 };
    floats(&numbers(value), &shape(value)).to_kind(kind)
}

fn pairs(config: &Value) -> Vec<Pair> {
    let batches = config["batches"].as_array().unwrap();
    let pair = |batch: &Value| {
        let part = |name: &str| tensor(&batch[name], &config[format!("{name}_dtype")]);
        (part("y_pred"), part("y"))
    };
    batches.iter().map(pair).collect()
}

fn assert_all_close(case: &Value, ours: &[f64], theirs: &Value) {
    let theirs = numbers(theirs);
    let same = |(a, b): (&f64, &f64)| close(*a, *b, 1e-12) || (a.is_nan() && b.is_nan());
    let fits = ours.len() == theirs.len() && ours.iter().zip(&theirs).all(same);
    assert!(fits, "{}: {ours:?} instead of {theirs:?}", case["id"]);
}

/// Checks the value after each update.
fn check_each<O>(case: &Value, mut metric: impl Metric<O>, outputs: Vec<O>) -> anyhow::Result<()> {
    let mut values = vec![];
    for output in &outputs {
        metric.update(output)?;
        values.push(metric.compute()?.read()?);
    }
    assert_all_close(case, &values, &case["expect"]["per_batch"]);
    assert_all_close(case, &values[values.len() - 1..], &case["expect"]["value"]);
    Ok(())
}

#[test]
fn accuracy_loss_and_mean_agree_with_ignite() -> anyhow::Result<()> {
    let cases = golden("metric.jsonl", |case| {
        let config = &case["config"];
        config["usage"].is_null()
            && (config["metric"] == "Accuracy"
                || config["metric"] == "Loss"
                || (config["metric"] == "Average" && config["y_pred_dtype"] == "number"))
    });
    assert_eq!(cases.len(), 36);
    for case in &cases {
        let config = &case["config"];
        match config["metric"].as_str() {
            Some("Accuracy") => {
                let multilabel = config["args"]["is_multilabel"].as_bool().unwrap_or(false);
                check_each(case, Accuracy::of(parts).is_multilabel(multilabel), pairs(config))?;
            }
            Some("Loss") => {
                let name = config["args"]["loss_fn"].as_str().unwrap();
                let loss = |pred: &Tensor, y: &Tensor| match name {
                    "mse" => pred.mse_loss(y, Reduction::Mean),
                    "l1" => pred.l1_loss(y, Reduction::Mean),
                    // The loss is computed here, because tch's cross_entropy_for_logits computes in f32.
                    "cross_entropy" => {
                        pred.cross_entropy_loss::<Tensor>(y, None, Reduction::Mean, -100, 0.)
                    }
                    "nll" => pred.nll_loss(y),
                    "bce_with_logits" => pred.binary_cross_entropy_with_logits::<Tensor>(
                        y,
                        None,
                        None,
                        Reduction::Mean,
                    ),
                    _ => panic!("loss {name}"),
                };
                check_each(case, Loss::of(loss, parts), pairs(config))?;
            }
            _ => {
                let batches = config["batches"].as_array().unwrap();
                let values = batches.iter().flat_map(|batch| numbers(&batch["x"])).collect();
                check_each(case, Mean::new(), values)?;
            }
        }
    }
    Ok(())
}

fn usage(name: &Value) -> Option<Usage> {
    Some(match name.as_str()? {
        "epoch_wise" => Usage::EpochWise,
        "running_epoch_wise" => Usage::RunningEpochWise,
        "batch_wise" => Usage::BatchWise,
        "running_batch_wise" => Usage::RunningBatchWise,
        "single_epoch_running_batch_wise" => Usage::SingleEpochRunningBatchWise,
        _ => None?,
    })
}

fn check_watched<O: 'static>(
    case: &Value,
    metric: impl Metric<O> + 'static,
    outputs: Vec<O>,
) -> anyhow::Result<()> {
    let (config, expect) = (&case["config"], &case["expect"]);
    let epoch_length = config["epoch_length"].as_u64().unwrap() as usize;
    let usage = usage(&config["usage"]).unwrap();
    let [iterations, epochs] = watched(metric, usage, epoch_length, outputs)?;
    assert_all_close(case, &iterations, &expect["after_iteration"]);
    assert_all_close(case, &epochs, &expect["after_epoch"]);
    Ok(())
}

#[test]
fn accuracy_agrees_with_ignite_in_every_usage() -> anyhow::Result<()> {
    let cases = golden("metric.jsonl", |case| {
        case["config"]["metric"] == "Accuracy" && usage(&case["config"]["usage"]).is_some()
    });
    assert_eq!(cases.len(), 13);
    cases
        .iter()
        .try_for_each(|case| check_watched(case, Accuracy::of(parts), pairs(&case["config"])))
}

#[test]
fn running_averages_agree_with_ignite() -> anyhow::Result<()> {
    // Cases in which ignite averages the accuracy of whole epochs are left out, because there is no output to average
    // here.
    let cases = golden("handler.jsonl", |case| {
        let config = &case["config"];
        let by_epoch = config["usage"] == "running_epoch_wise";
        config["handler"] == "RunningAverage" && (config["src"] == "output" || !by_epoch)
    });
    assert_eq!(cases.len(), 22);
    for case in &cases {
        let config = &case["config"];
        let outputs = match &config["outputs"] {
            Value::Null => {
                let batch = |(pred, y): (&Value, &Value)| {
                    let (pred, y) = (numbers(pred), numbers(y));
                    let right = pred.iter().zip(&y).filter(|(a, b)| a == b).count();
                    right as f64 / y.len() as f64
                };
                let list = |name: &str| config[name].as_array().unwrap();
                list("y_pred").iter().zip(list("y")).map(batch).collect()
            }
            outputs => numbers(outputs),
        };
        let alpha = config["alpha"].as_f64().unwrap();
        // The outputs are tested as numbers and as tensors.
        let tensors = outputs.iter().map(|output| Tensor::from(*output)).collect();
        check_watched(case, RunningAverage::new().alpha(alpha), outputs)?;
        check_watched::<Tensor>(case, RunningAverage::new().alpha(alpha), tensors)?;
    }
    Ok(())
}
