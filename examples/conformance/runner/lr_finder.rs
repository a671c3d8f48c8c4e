//! Runs the cases of kind `lr_finder`: runs of the learning rate finder on given losses, and suggestions from given
//! curves.

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use tch_ignite::data::no_data;
use tch_ignite::engine::{Engine, Until};
use tch_ignite::handlers::{LrCurve, LrFinder, StepMode};
use tch_ignite::optim::Optimizer;

use super::Outcome;
use super::json::{array, count, float, floats, same_bits, text};
use super::optimizer::{optimizer, store, values};

/// ignite logs the lr of the next step, and its first step does not use start_lr (IGNITE 1.7).
const FIRST_AND_LOGGED: &str =
    "the learning rate finder's first step ignores start_lr, and its log is one step ahead";
/// ignite rounds the losses to float32 before the suggestion (1.7).
const FLOAT32: &str = "the learning rate suggestion rounds the losses to float32";
/// torch's argmin takes NaN for the smallest value.
const NAN: &str = "a NaN loss counts as the smallest, and the fall to it as the steepest";

pub fn run(config: &Value, expect: &Value, defect: &mut Option<&'static str>) -> Result<Outcome> {
    Ok(match text(&config["mode"])? {
        "suggestion" => suggestion(config, expect, defect)?,
        "run" => {
            *defect = Some(FIRST_AND_LOGGED);
            finder_run(config, expect)?
        }
        other => bail!("no mode {other}"),
    }
    .into())
}

/// Reads the curve of a case, which has a number instead of a list where there is one group.
pub fn curve(history: &Value) -> Result<LrCurve> {
    let rows = |value: &Value| -> Result<Vec<Vec<f64>>> {
        let row = |lr: &Value| if lr.is_array() { floats(lr) } else { Ok(vec![float(lr)?]) };
        array(value)?.iter().map(row).collect()
    };
    match history["lr"].is_null() {
        true => Ok(LrCurve::new(vec![], vec![])?),
        false => Ok(LrCurve::new(rows(&history["lr"])?, floats(&history["loss"])?)?),
    }
}

/// The index at which the loss falls fastest on its way to the smallest loss before the first NaN, computed in f64.
fn steepest(losses: &[f64]) -> Option<usize> {
    let end = losses.iter().position(|loss| loss.is_nan()).unwrap_or(losses.len());
    let mut smallest = 0;
    for i in 1..end {
        if losses[i] < losses[smallest] {
            smallest = i;
        }
    }
    let mut found = None;
    let mut steepest = f64::INFINITY;
    for i in 1..smallest.min(end) {
        let slope = 0.5 * (losses[i + 1] - losses[i - 1]);
        if slope < steepest {
            (found, steepest) = (Some(i), slope);
        }
    }
    found
}

fn suggestion(
    config: &Value,
    expect: &Value,
    defect: &mut Option<&'static str>,
) -> Result<Result<(), String>> {
    let curve = curve(&config["history"])?;
    let ours = curve.lr_suggestion();
    let index = match steepest(curve.loss()) {
        _ if curve.loss().iter().any(|loss| loss.is_nan()) => {
            *defect = Some(NAN);
            steepest(curve.loss())
        }
        index if index != count(&expect["index"])?.map(|index| index as usize) => {
            *defect = Some(FLOAT32);
            // Where float32 leaves ignite without a suggestion, the case has no index_f64.
            let theirs = count(&expect["index_f64"])?.map(|index| index as usize);
            theirs.or(index)
        }
        index => index,
    };
    let Some(index) = index else {
        let shape = "FastaiLRFinder got unexpected curve shape";
        let theirs = expect["error"]["match"].as_str().unwrap_or(shape);
        return Ok(match ours {
            Err(error) if error.to_string().starts_with(theirs) => Ok(()),
            other => Err(format!("{other:?} instead of {theirs:?}")),
        });
    };
    Ok(match ours {
        Ok(lrs) => same_bits("suggestion", &lrs, &curve.lr()[index]),
        Err(error) => Err(format!("{error} instead of the lr at {index}")),
    })
}

/// The finder with the arguments of a case.
pub fn finder(config: &Value, optimizer: &Optimizer, vs: &tch::nn::VarStore) -> Result<LrFinder> {
    let mut finder = LrFinder::new(optimizer, vs);
    finder = match &config["start_lr"] {
        Value::Null => finder,
        Value::Array(_) => finder.start_lrs(floats(&config["start_lr"])?),
        lr => finder.start_lr(float(lr)?),
    };
    finder = match &config["end_lr"] {
        Value::Null => finder,
        Value::Array(_) => finder.end_lrs(floats(&config["end_lr"])?),
        lr => finder.end_lr(float(lr)?),
    };
    if let Some(iterations) = count(&config["num_iter"])? {
        finder = finder.num_iter(iterations);
    }
    if !config["smooth_f"].is_null() {
        finder = finder.smooth_f(float(&config["smooth_f"])?);
    }
    if !config["diverge_th"].is_null() {
        finder = finder.diverge_th(float(&config["diverge_th"])?);
    }
    Ok(match config["step_mode"].as_str() {
        Some("linear") => finder.step_mode(StepMode::Linear),
        _ => finder,
    })
}

/// The error of running a finder with these arguments, if they are refused.
pub fn refused(args: &Value) -> Result<Option<tch_ignite::Error>> {
    let spec = json!({"type": "SGD", "groups": [{"lr": 0.1}]});
    let vs = store(&spec)?;
    let optimizer = optimizer(&spec, &vs)?;
    let mut trainer = Engine::new(|_: &mut (), _, _: ()| Ok(1.));
    let finder = finder(args, &optimizer, &vs)?.until(Until::epochs(1).epoch_length(3));
    Ok(finder.run(&mut trainer, &mut (), no_data(), |loss: &f64| *loss).err())
}

fn finder_run(config: &Value, expect: &Value) -> Result<Result<(), String>> {
    let vs = store(&config["optimizer"])?;
    let optimizer = optimizer(&config["optimizer"], &vs)?;
    let before = values(&optimizer, "lr")?;
    let losses = floats(&config["losses"])?;
    let (length, epochs) = (count(&config["epoch_length"])?, count(&config["max_epochs"])?);
    let (length, epochs) = length.zip(epochs).context("a run with a length is expected")?;
    let mut trainer = Engine::new(|seen: &mut Vec<Vec<f64>>, _, _: ()| {
        seen.push(values(&optimizer, "lr")?);
        losses.get(seen.len() - 1).copied().context("more iterations than losses")
    });
    let (state, mut seen) = (trainer.state_dict(), vec![]);
    let curve = finder(config, &optimizer, &vs)?
        .until(Until::epochs(epochs).epoch_length(length))
        .run(&mut trainer, &mut seen, no_data(), |loss: &f64| *loss)?;

    let their_loss = floats(&expect["history"]["loss"])?;
    if expect["iterations_run"] != seen.len() {
        return Ok(Err(format!(
            "{} iterations instead of {}",
            seen.len(),
            expect["iterations_run"]
        )));
    }
    if curve.lr() != seen {
        return Ok(Err("the logged lr is not what the steps used".into()));
    }
    if expect["diverged"] != curve.diverged() || curve.diverged() != curve.warnings().is_empty() {
        return Ok(Err(format!("diverged is {}, {:?}", curve.diverged(), curve.warnings())));
    }
    if trainer.state_dict() != state || trainer.state.epoch != 0 || trainer.state.output.is_some() {
        return Ok(Err(format!("the trainer is left at {:?}", trainer.state_dict())));
    }
    let start = match &config["start_lr"] {
        Value::Null => before.clone(),
        Value::Array(_) => floats(&config["start_lr"])?,
        lr => vec![float(lr)?; before.len()],
    };
    // ignite has two series of learning rates, and each is right in one mode, but for the first iteration. With "exp"
    // the steps use the right rates and the log is one ahead; with "linear" the log has the right rates and the steps
    // are one behind.
    let linear = config["step_mode"] == "linear";
    let theirs = match linear {
        true => &expect["history"]["lr"],
        false => &expect["lr_seen_by_step"],
    };
    for (i, (ours, theirs)) in seen.iter().zip(array(theirs)?).enumerate() {
        let theirs = match theirs {
            _ if i == 0 => start.clone(),
            Value::Array(_) => floats(theirs)?,
            lr => vec![float(lr)?],
        };
        if let Err(difference) = same_bits(&format!("lr of iteration {}", i + 1), ours, &theirs) {
            return Ok(Err(difference));
        }
    }
    let checked = same_bits("loss", curve.loss(), &their_loss).and(same_bits(
        "lr afterwards",
        &values(&optimizer, "lr")?,
        &before,
    ));
    let Some(index) = steepest(&their_loss) else {
        return Ok(checked.and(match curve.lr_suggestion() {
            Ok(lr) => Err(format!("suggests {lr:?} without a falling curve")),
            Err(_) => Ok(()),
        }));
    };
    curve.apply_suggested_lr(&optimizer)?;
    Ok(checked.and(same_bits("lr applied", &values(&optimizer, "lr")?, &seen[index])))
}
