//! Runs cases of `ProgressBar` and compares the lines that ours writes with the calls that ignite's makes to tqdm.

use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result};
use serde_json::Value;
use tch_ignite::data::restartable;
use tch_ignite::engine::{Engine, Event, Until};
use tch_ignite::handlers::ProgressBar;

use super::super::Outcome;
use super::super::json::{array, count, float};

/// ignite calls tqdm at each event; our bar draws at its own pace and reads metrics no more often (D9). So a case can
/// only check what both must show: epochs, iterations, and metrics that are numbers.
const OTHER_BAR: &str = "the progress bar redraws and reads metrics at every event, and counts from 1 \
                         in a bar of the run; ours has a bar an epoch and its own pace";

/// The bar shows four digits of a number.
const TOLERANCE: f64 = 5e-4;

pub fn run(config: &Value, expect: &Value, defect: &mut Option<&'static str>) -> Result<Outcome> {
    *defect = Some(OTHER_BAR);
    let calls = array(&expect["calls"])?;
    let named = |name: &str| calls.iter().filter(|call| call[0] == *name).collect::<Vec<_>>();
    let epochs = count(&config["max_epochs"])?.context("max_epochs")?;
    let data = count(&config["data_len"])?.context("data_len")?;
    let length = count(&config["epoch_length"])?;
    let loss = float(&config["metrics"]["loss"])?;
    let shown = match &config["metric_names"] {
        Value::Null => None,
        // The names are "all", or a list that has "loss".
        _ => Some(loss),
    };
    let postfix: Vec<_> = named("postfix").iter().map(|call| call[1]["loss"].as_f64()).collect();
    if postfix.iter().any(|theirs| *theirs != shown) {
        return Ok(Outcome::Failed(format!("the case shows {postfix:?} instead of {shown:?}")));
    }

    let lines = Arc::new(Mutex::new(Vec::<String>::new()));
    let log = lines.clone();
    let say = move |line: &str| {
        log.lock().unwrap_or_else(PoisonError::into_inner).push(line.to_owned());
    };
    let mut bar = ProgressBar::new().hidden().lines_to(say);
    if shown.is_some() {
        bar = bar.metric("loss");
    }
    let mut engine = Engine::new(|_: &mut (), _, _: u64| Ok(()));
    engine.on(Event::Started, move |_, engine| {
        engine.state.metrics.set("loss", loss);
        Ok(())
    });
    engine.attach(bar);
    match length {
        Some(length) => {
            let until = Until::epochs(epochs).epoch_length(length);
            engine.run(&mut (), (0..data).collect::<Vec<_>>(), until)?;
        }
        // The data's length is unknown, as it is to ignite.
        None => drop(engine.run(&mut (), restartable(|| 0..data), Until::epochs(epochs))?),
    }

    let lines = lines.lock().unwrap_or_else(PoisonError::into_inner);
    let length = length.unwrap_or(data);
    let mut result = match lines.len() as u64 == epochs {
        true => Ok(()),
        false => Err(format!("{lines:?} instead of {epochs} lines")),
    };
    for (epoch, line) in (1..).zip(&*lines) {
        let begin = format!("epoch {epoch}/{epochs}  {length}/{length} in ");
        let value = line.rsplit_once("loss ").and_then(|(_, value)| value.parse::<f64>().ok());
        let close = match (value, shown) {
            (Some(ours), Some(theirs)) => (ours - theirs).abs() <= TOLERANCE * theirs.abs(),
            (ours, theirs) => ours == theirs,
        };
        if !line.starts_with(&begin) || !close {
            result = result.and(Err(format!("{line:?} instead of {begin:?} and loss {shown:?}")));
        }
    }
    Ok(result.into())
}
