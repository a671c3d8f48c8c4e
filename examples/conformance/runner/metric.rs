//! Runs the cases of kind `metric`, which say the values of metrics over given batches.

use anyhow::{Context, Result, bail};
use serde_json::Value;
use tch::{Device, Kind, Reduction, Tensor};
use tch_ignite::engine::{Engine, Event, MetricValue, Until};
use tch_ignite::metrics::*;

use super::json::{array, count, float, floats, text};
use super::{Outcome, expression};

pub type Pair = (Tensor, Tensor);

/// ignite makes the matrix float32 before it divides.
const FLOAT32: &str = "a confusion matrix with an average is rounded to float32";

/// A metric of `(y_pred, y)`, attached or called by hand.
pub type Boxed = MetricsLambda<'static, Pair>;

pub fn run(
    config: &Value,
    expect: &Value,
    device: Device,
    defect: &mut Option<&'static str>,
) -> Result<Outcome> {
    if expect["dtype"] == "float32" {
        *defect = Some(FLOAT32);
    }
    let (name, args) = (text(&config["metric"])?, &config["args"]);
    if !config["usage"].is_null() {
        return with_usage(config, expect, device);
    }
    let batches = array(&config["batches"])?;
    let compared = if config["y_dtype"].is_null() {
        let values = batches.iter().map(|batch| averaged(&batch["x"])).collect::<Result<_>>()?;
        match name {
            "Average" => compare(Average::new(), values, expect)?,
            "GeometricAverage" => compare(GeometricAverage::new(), values, expect)?,
            other => bail!("no average {other}"),
        }
    } else {
        compare(build(name, args)?, pairs(config, device)?, expect)?
    };
    Ok(compared.into())
}

/// The metric of a case.
pub fn build(name: &str, args: &Value) -> Result<Boxed> {
    if let Some(name) = name.strip_prefix("regression.") {
        return regression(name, args);
    }
    let number = |key: &str| float(&args[key]).context(key.to_owned());
    let whole = |key: &str| args[key].as_i64().context(key.to_owned());
    let on = |key: &str| args[key].as_bool().unwrap_or(false);
    let matrix = || anyhow::Ok(ConfusionMatrix::of(whole("num_classes")?, pair).shared());
    let ignored = args["ignore_index"].as_i64();
    Ok(match name {
        "Accuracy" => Accuracy::of(pair).is_multilabel(on("is_multilabel")).shared(),
        "Precision" => Precision::of(pair)
            .average(averaging(&args["average"])?)
            .is_multilabel(on("is_multilabel"))
            .shared(),
        "Recall" => Recall::of(pair)
            .average(averaging(&args["average"])?)
            .is_multilabel(on("is_multilabel"))
            .shared(),
        "Fbeta" => {
            let average = args["average"].as_bool().unwrap_or(true);
            Fbeta::of(number("beta")?, pair).average(average).shared()
        }
        "ConfusionMatrix" => {
            let average = matrix_average(&args["average"])?;
            ConfusionMatrix::of(whole("num_classes")?, pair).average(average).shared().matrix()
        }
        "IoU" => matrix()?.iou(ignored),
        "mIoU" => matrix()?.mean_iou(ignored),
        "JaccardIndex" => matrix()?.jaccard_index(ignored),
        "DiceCoefficient" => matrix()?.dice_coefficient(ignored),
        "cmAccuracy" => matrix()?.accuracy(),
        "cmPrecision" => matrix()?.precision(on("average")),
        "cmRecall" => matrix()?.recall(on("average")),
        "MultiLabelConfusionMatrix" => {
            let matrix = MultiLabelConfusionMatrix::of(whole("num_classes")?, pair);
            matrix.normalized(on("normalized")).shared()
        }
        "TopKCategoricalAccuracy" => {
            TopKCategoricalAccuracy::of(args["k"].as_i64().unwrap_or(5), pair).shared()
        }
        "ROC_AUC" => RocAuc::of(pair).shared(),
        "RocCurve" => RocCurve::of(pair).shared(),
        "AveragePrecision" => AveragePrecision::of(pair).shared(),
        "PrecisionRecallCurve" => PrecisionRecallCurve::of(pair).shared(),
        "MatthewsCorrCoef" => MatthewsCorrCoef::of(pair).shared(),
        "CohenKappa" => {
            let weights = match args["weights"].as_str() {
                None => None,
                Some("linear") => Some(KappaWeights::Linear),
                Some("quadratic") => Some(KappaWeights::Quadratic),
                Some(other) => bail!("no weights {other}"),
            };
            let classes = args["num_classes"].as_i64();
            CohenKappa::of(pair).weights(weights).num_classes(classes).shared()
        }
        "Loss" => Loss::of(loss(text(&args["loss_fn"])?)?, pair).shared(),
        "MeanAbsoluteError" => MeanAbsoluteError::of(pair).shared(),
        "MeanSquaredError" => MeanSquaredError::of(pair).shared(),
        "RootMeanSquaredError" => RootMeanSquaredError::of(pair).shared(),
        "MeanPairwiseDistance" => {
            MeanPairwiseDistance::of(pair).p(number("p")?).eps(number("eps")?).shared()
        }
        "CosineSimilarity" => CosineSimilarity::of(pair).eps(number("eps")?).shared(),
        "Entropy" => Entropy::of(pair).shared(),
        "KLDivergence" => KLDivergence::of(pair).shared(),
        "JSDivergence" => JSDivergence::of(pair).shared(),
        "PSNR" => PSNR::of(number("data_range")?, pair).shared(),
        "MetricsLambda" => expression::parse(
            text(&args["expr"])?,
            [("P", Precision::of(pair).shared()), ("R", Recall::of(pair).shared())],
        )?,
        other => bail!("no metric {other}"),
    })
}

fn averaging(value: &Value) -> Result<Averaging> {
    Ok(match value {
        Value::Bool(on) => (*on).into(),
        Value::Null => Averaging::None,
        other => match text(other)? {
            "macro" => Averaging::Macro,
            "micro" => Averaging::Micro,
            "weighted" => Averaging::Weighted,
            "samples" => Averaging::Samples,
            other => bail!("no average {other}"),
        },
    })
}

fn matrix_average(value: &Value) -> Result<Option<MatrixAverage>> {
    Ok(match value.as_str() {
        None => None,
        Some("samples") => Some(MatrixAverage::Samples),
        Some("recall") => Some(MatrixAverage::Recall),
        Some("precision") => Some(MatrixAverage::Precision),
        Some(other) => bail!("no average {other}"),
    })
}

fn loss(name: &str) -> Result<fn(&Tensor, &Tensor) -> Tensor> {
    Ok(match name {
        "mse" => |y_pred, y| y_pred.mse_loss(y, Reduction::Mean),
        "l1" => |y_pred, y| y_pred.l1_loss(y, Reduction::Mean),
        // tch's cross_entropy_for_logits computes in f32.
        "cross_entropy" => {
            |y_pred, y| y_pred.cross_entropy_loss::<Tensor>(y, None, Reduction::Mean, -100, 0.)
        }
        "nll" => |y_pred, y| y_pred.nll_loss(y),
        "bce_with_logits" => |y_pred, y| {
            y_pred.binary_cross_entropy_with_logits::<Tensor>(y, None, None, Reduction::Mean)
        },
        other => bail!("no loss {other}"),
    })
}

/// Compares the value after every update.
fn compare<O>(
    mut metric: impl Metric<O>,
    outputs: Vec<O>,
    expect: &Value,
) -> Result<Result<(), String>> {
    metric.validate()?;
    let relative = if expect["dtype"] == "float32" { 1e-6 } else { 1e-12 };
    let per_batch = array(&expect["per_batch"])?;
    if outputs.len() != per_batch.len() {
        return Ok(Err(format!("{} batches, but {} values", outputs.len(), per_batch.len())));
    }
    let mut value = None;
    for (number, (output, theirs)) in outputs.iter().zip(per_batch).enumerate() {
        metric.update(output)?;
        let ours = metric.compute()?;
        if let Err(difference) = same(&ours, theirs, relative)? {
            return Ok(Err(format!("after batch {}: {difference}", number + 1)));
        }
        value = Some(ours);
    }
    let value = value.context("no batches")?;
    let kind = match expect["dtype"].as_str() {
        Some("float64" | "float32") => Some(Kind::Double),
        Some("int64") => Some(Kind::Int64),
        _ => None,
    };
    if let (MetricValue::Tensor(tensor), Some(kind)) = (&value, kind)
        && tensor.kind() != kind
    {
        return Ok(Err(format!("is {:?} instead of {kind:?}", tensor.kind())));
    }
    same(&value, &expect["value"], relative)
}

/// Whether the shapes are equal and the numbers agree within the relative tolerance.
fn same(ours: &MetricValue, theirs: &Value, relative: f64) -> Result<Result<(), String>> {
    let shape_of_ours = match ours {
        MetricValue::Number(_) => vec![],
        MetricValue::Tensor(tensor) => tensor.size(),
        // ignite's value is a list of vectors. Each is compared with ours, its length included.
        MetricValue::Named(parts) => {
            let theirs = array(theirs)?;
            if parts.len() != theirs.len() {
                return Ok(Err(format!("{} parts instead of {}", parts.len(), theirs.len())));
            }
            for ((name, part), theirs) in parts.iter().zip(theirs) {
                if let Err(difference) = same(part, theirs, relative)? {
                    return Ok(Err(format!("{name}: {difference}")));
                }
            }
            return Ok(Ok(()));
        }
    };
    if shape_of_ours != shape(theirs) {
        return Ok(Err(format!("has shape {shape_of_ours:?} instead of {:?}", shape(theirs))));
    }
    let (ours, theirs) = (ours.flatten("value")?, numbers(theirs)?);
    let close = |a: f64, b: f64| {
        a == b || (a.is_nan() && b.is_nan()) || (a - b).abs() <= relative * b.abs()
    };
    Ok(match ours.iter().zip(&theirs).find(|((_, a), b)| !close(*a, **b)) {
        Some(((place, a), b)) => Err(format!("{place} is {a:e} instead of {b:e}")),
        None => Ok(()),
    })
}

/// Compares the values of an attached metric after each iteration and each epoch.
fn with_usage(config: &Value, expect: &Value, device: Device) -> Result<Outcome> {
    let usage = match &config["usage"] {
        Value::Object(filtered) => {
            let filter = &filtered["batch_filtered"];
            Usage::BatchFiltered(super::json::filtered(Event::IterationCompleted, filter)?)
        }
        name => match text(name)? {
            "epoch_wise" => Usage::EpochWise,
            "running_epoch_wise" => Usage::RunningEpochWise,
            "batch_wise" => Usage::BatchWise,
            "running_batch_wise" => Usage::RunningBatchWise,
            "single_epoch_running_batch_wise" => Usage::SingleEpochRunningBatchWise,
            other => bail!("no usage {other}"),
        },
    };
    let length = count(&config["epoch_length"])?.context("epoch_length")?;
    let epochs = count(&config["max_epochs"])?.context("max_epochs")?;
    let mut outputs = pairs(config, device)?.into_iter();
    let mut engine: Engine<[Vec<Option<f64>>; 2], (), Pair> =
        Engine::new(move |_, _, ()| outputs.next().context("more iterations than outputs"));
    engine.metric_with("metric", build(text(&config["metric"])?, &Value::Null)?, usage);
    for (index, event) in [Event::IterationCompleted, Event::EpochCompleted].into_iter().enumerate()
    {
        engine.on(event, move |seen: &mut [Vec<Option<f64>>; 2], engine| {
            seen[index].push(engine.state.metrics.value("metric").map(|m| m.read()).transpose()?);
            Ok(())
        });
    }
    let mut seen = [vec![], vec![]];
    engine.run(&mut seen, vec![(); length as usize], Until::epochs(epochs))?;
    for (ours, key) in seen.iter().zip(["after_iteration", "after_epoch"]) {
        let theirs = array(&expect[key])?;
        if ours.len() != theirs.len() {
            return Ok(Outcome::Failed(format!("{key}: {} values", ours.len())));
        }
        for (ours, theirs) in ours.iter().zip(theirs) {
            let same = match ours {
                None if theirs.is_null() => Ok(()),
                Some(value) if !theirs.is_null() => same(&(*value).into(), theirs, 1e-12)?,
                _ => Err(format!("{ours:?} instead of {theirs}")),
            };
            if let Err(difference) = same {
                return Ok(Outcome::Failed(format!("{key}: {difference}")));
            }
        }
    }
    Ok(Outcome::Passed)
}

/// Reads a value to average: a number, or a tensor.
fn averaged(value: &Value) -> Result<MetricValue> {
    Ok(match value {
        Value::Array(_) => tensor(value, Kind::Double)?.into(),
        number => float(number)?.into(),
    })
}

fn pairs(config: &Value, device: Device) -> Result<Vec<Pair>> {
    let kind = |key: &str| match config[key].as_str() {
        Some("float64") => Kind::Double,
        _ => Kind::Int64,
    };
    let pair = |batch: &Value| {
        let of = |key, kind| anyhow::Ok(tensor(&batch[key], kind)?.f_to_device(device)?);
        Ok((of("y_pred", kind("y_pred_dtype"))?, of("y", kind("y_dtype"))?))
    };
    array(&config["batches"])?.iter().map(pair).collect()
}

pub fn tensor(value: &Value, kind: Kind) -> Result<Tensor> {
    Ok(Tensor::f_from_slice(&numbers(value)?)?.f_reshape(shape(value))?.f_to_kind(kind)?)
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

fn numbers(value: &Value) -> Result<Vec<f64>> {
    match value {
        Value::Array(list) if list.iter().any(Value::is_array) => {
            Ok(list.iter().map(numbers).collect::<Result<Vec<_>>>()?.concat())
        }
        Value::Array(_) => floats(value),
        number => Ok(vec![float(number)?]),
    }
}

fn regression(name: &str, _args: &Value) -> Result<Boxed> {
    use tch_ignite::metrics::regression::*;
    Ok(match name {
        "R2Score" => R2Score::of(pair).shared(),
        "CanberraMetric" => CanberraMetric::of(pair).shared(),
        "FractionalAbsoluteError" => FractionalAbsoluteError::of(pair).shared(),
        "FractionalBias" => FractionalBias::of(pair).shared(),
        "GeometricMeanAbsoluteError" => GeometricMeanAbsoluteError::of(pair).shared(),
        "GeometricMeanRelativeAbsoluteError" => {
            GeometricMeanRelativeAbsoluteError::of(pair).shared()
        }
        "ManhattanDistance" => ManhattanDistance::of(pair).shared(),
        "MaximumAbsoluteError" => MaximumAbsoluteError::of(pair).shared(),
        "MeanAbsoluteRelativeError" => MeanAbsoluteRelativeError::of(pair).shared(),
        "MeanError" => MeanError::of(pair).shared(),
        "MeanNormalizedBias" => MeanNormalizedBias::of(pair).shared(),
        "MedianAbsoluteError" => MedianAbsoluteError::of(pair).shared(),
        "MedianAbsolutePercentageError" => MedianAbsolutePercentageError::of(pair).shared(),
        "MedianRelativeAbsoluteError" => MedianRelativeAbsoluteError::of(pair).shared(),
        "PearsonCorrelation" => PearsonCorrelation::of(pair).shared(),
        "SpearmanRankCorrelation" => SpearmanRankCorrelation::of(pair).shared(),
        "KendallRankCorrelation" => KendallRankCorrelation::of(pair).shared(),
        "WaveHedgesDistance" => WaveHedgesDistance::of(pair).shared(),
        other => bail!("no metric regression.{other}"),
    })
}

/// The error of a metric with these arguments or batches, if they are refused.
pub fn refused(target: &str, args: &Value) -> Result<Option<String>> {
    let text = |error: &dyn std::fmt::Display| Some(error.to_string());
    let (name, call) = target.split_once('.').unwrap_or((target, ""));
    match (name, call) {
        ("RunningAverage", _) => {
            let metric = RunningAverage::of(|x: &f64| *x).alpha(float(&args["alpha"])?);
            Ok(metric.validate().err().and_then(|error| text(&error)))
        }
        ("Average", _) => {
            Ok(Average::of(|x: &f64| *x).compute().err().and_then(|error| text(&error)))
        }
        (_, "update") => {
            let zeros = |shape: &Value| {
                let shape = floats(shape)?.iter().map(|n| *n as i64).collect::<Vec<_>>();
                Ok::<_, anyhow::Error>(Tensor::f_zeros(shape, (Kind::Float, Device::Cpu))?)
            };
            let output = match args["y_shape"].is_null() {
                true => (tensor(&args["y_pred"], Kind::Int64)?, tensor(&args["y"], Kind::Int64)?),
                false => (zeros(&args["y_pred_shape"])?, zeros(&args["y_shape"])?),
            };
            Ok(build(name, args)?.update(&output).err().and_then(|error| text(&error)))
        }
        (_, "compute") => Ok(build(name, args)?.compute().err().and_then(|error| text(&error))),
        // An engine validates an attached metric when it runs.
        _ => {
            let mut engine: Engine<(), (), Pair> = Engine::new(|_, _, ()| bail!("no step"));
            engine.metric("metric", build(name, args)?);
            let error = engine.run(&mut (), vec![()], Until::epochs(1)).err();
            Ok(error.and_then(|error| text(&error)))
        }
    }
}
