//! Runs cases of `RunningAverage` over outputs, and over the accuracy.

use anyhow::{Context, Result, bail};
use serde_json::Value;
use tch::Tensor;
use tch_ignite::engine::{Engine, Event, Until};
use tch_ignite::metrics::{Accuracy, RunningAverage, Usage};

use super::super::Outcome;
use super::super::json::{array, count, float, floats, text};

/// The largest relative difference, from `tests/golden/README.md`.
const TOLERANCE: f64 = 1e-12;

/// The output of a step: a value, or predictions and targets.
enum Output {
    Value(f64),
    Labels(Tensor, Tensor),
}

impl Output {
    fn value(&self) -> f64 {
        match self {
            Self::Value(value) => *value,
            Self::Labels(..) => unreachable!("the case has labels"),
        }
    }

    fn labels(&self) -> (&Tensor, &Tensor) {
        match self {
            Self::Labels(y_pred, y) => (y_pred, y),
            Self::Value(_) => unreachable!("the case has outputs"),
        }
    }
}

fn outputs(config: &Value) -> Result<Vec<Output>> {
    let labels = |value: &Value| -> Result<Tensor> { Ok(Tensor::from_slice(&floats(value)?)) };
    match text(&config["src"])? {
        "output" => Ok(floats(&config["outputs"])?.into_iter().map(Output::Value).collect()),
        "Accuracy" => array(&config["y_pred"])?
            .iter()
            .zip(array(&config["y"])?)
            .map(|(y_pred, y)| Ok(Output::Labels(labels(y_pred)?, labels(y)?)))
            .collect(),
        other => bail!("no source {other}"),
    }
}

/// The value after each iteration, and the value after each epoch; `None` where there is no value yet.
type Seen = (Vec<Option<f64>>, Vec<Option<f64>>);

pub fn run(config: &Value, expect: &Value) -> Result<Outcome> {
    let usage = match text(&config["usage"])? {
        "running_epoch_wise" => Usage::RunningEpochWise,
        "running_batch_wise" => Usage::RunningBatchWise,
        "single_epoch_running_batch_wise" => Usage::SingleEpochRunningBatchWise,
        other => bail!("no usage {other}"),
    };
    let (length, epochs) = (count(&config["epoch_length"])?, count(&config["max_epochs"])?);
    let (length, epochs) = length.zip(epochs).context("a run with a length is expected")?;
    let mut outputs = outputs(config)?.into_iter();

    let alpha = float(&config["alpha"])?;
    let mut engine = Engine::new(|_: &mut Seen, _, _: ()| outputs.next().context("an output"));
    match text(&config["src"])? {
        "output" => {
            engine.metric_with("average", RunningAverage::of(Output::value).alpha(alpha), usage)
        }
        _ => engine.metric_with(
            "average",
            RunningAverage::of_metric(Accuracy::of(Output::labels)).alpha(alpha),
            usage,
        ),
    };
    engine.on(Event::IterationCompleted, |seen, engine| {
        seen.0.push(engine.state.metrics.get("average").ok());
        Ok(())
    });
    engine.on(Event::EpochCompleted, |seen, engine| {
        seen.1.push(engine.state.metrics.get("average").ok());
        Ok(())
    });
    let mut seen = (vec![], vec![]);
    engine.run(&mut seen, vec![(); length as usize], Until::epochs(epochs))?;
    let iterations = close("after_iteration", &seen.0, &expect["after_iteration"])?;
    Ok(iterations.and(close("after_epoch", &seen.1, &expect["after_epoch"])?).into())
}

fn close(what: &str, ours: &[Option<f64>], theirs: &Value) -> Result<Result<(), String>> {
    let value = |value: &Value| (!value.is_null()).then(|| float(value)).transpose();
    let theirs = array(theirs)?.iter().map(value).collect::<Result<Vec<_>>>()?;
    if ours.len() != theirs.len() {
        return Ok(Err(format!("{what}: {} values instead of {}", ours.len(), theirs.len())));
    }
    let far = ours.iter().zip(&theirs).position(|pair| match pair {
        (Some(a), Some(b)) => (a - b).abs() > TOLERANCE * b.abs(),
        (a, b) => a.is_some() != b.is_some(),
    });
    Ok(match far {
        Some(i) => Err(format!("{what}[{i}]: {:?} instead of {:?}", ours[i], theirs[i])),
        None => Ok(()),
    })
}
