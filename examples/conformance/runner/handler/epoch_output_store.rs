//! Runs cases of `EpochOutputStore`, which say the outputs that it stores in each epoch.

use anyhow::{Context, Result};
use serde_json::Value;
use tch_ignite::engine::{Engine, Event, Until};
use tch_ignite::handlers::EpochOutputStore;

use super::super::Outcome;
use super::super::json::{array, count, floats, same_bits};

pub fn run(config: &Value, expect: &Value) -> Result<Outcome> {
    let (length, epochs) = (count(&config["epoch_length"])?, count(&config["max_epochs"])?);
    let (length, epochs) = length.zip(epochs).context("a run with a length is expected")?;
    let store = EpochOutputStore::of(|output: &f64| *output);
    let mut engine = Engine::new(|_: &mut Vec<Vec<f64>>, _, output: f64| Ok(output));
    let outputs = store.clone();
    engine.attach(store).on(Event::EpochCompleted, move |epochs, _| {
        epochs.push(outputs.data().clone());
        Ok(())
    });
    let mut ours = vec![];
    engine.run(
        &mut ours,
        floats(&config["outputs"])?,
        Until::epochs(epochs).epoch_length(length),
    )?;
    let theirs = array(&expect["per_epoch"])?;
    let mut result = match ours.len() == theirs.len() {
        true => Ok(()),
        false => Err(format!("{} epochs instead of {}", ours.len(), theirs.len())),
    };
    for (ours, theirs) in ours.iter().zip(theirs) {
        result = result.and(same_bits("per_epoch", ours, &floats(theirs)?));
    }
    Ok(result.into())
}
