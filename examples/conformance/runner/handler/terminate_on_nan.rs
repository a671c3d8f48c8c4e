//! Runs cases of `TerminateOnNan`, which say where a run with some outputs ends.

use anyhow::{Context, Result};
use serde_json::Value;
use tch::Tensor;
use tch_ignite::engine::{Engine, MetricValue, Stop, Until};
use tch_ignite::handlers::{Numbers, TerminateOnNan};

use super::super::Outcome;
use super::super::json::{array, float};

/// An output in the JSON of a case; lists of numbers become tensors.
struct Output(Value);

impl Numbers for Output {
    fn numbers(&self, see: &mut dyn FnMut(MetricValue)) {
        match &self.0 {
            Value::Object(parts) => {
                parts.values().for_each(|part| Output(part.clone()).numbers(see))
            }
            Value::Array(parts) => {
                match parts.iter().map(float).collect::<Result<Vec<_>>>() {
                    Ok(numbers) => Tensor::from_slice(&numbers).numbers(see),
                    Err(_) => parts.iter().for_each(|part| Output(part.clone()).numbers(see)),
                };
            }
            number => see(float(number).unwrap_or(f64::NAN).into()),
        }
    }
}

pub fn run(config: &Value, expect: &Value) -> Result<Outcome> {
    let outputs = array(&config["outputs"])?.clone();
    let mut engine = Engine::new(|_: &mut (), _, output: Value| Ok(Output(output)));
    engine.attach(TerminateOnNan::new());
    let summary = engine.run(&mut (), outputs, Until::epochs(1))?;
    let ours = (summary.iterations, summary.stop == Stop::Terminated);
    let iterations = expect["iterations_run"].as_u64().context("iterations_run")?;
    let theirs = (iterations, expect["terminated"] == true);
    Ok(match ours == theirs {
        true => Outcome::Passed,
        false => {
            Outcome::Failed(format!("(iterations, terminated) {ours:?} instead of {theirs:?}"))
        }
    })
}
