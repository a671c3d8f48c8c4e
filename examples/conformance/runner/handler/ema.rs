//! `EMA`: averages of a weight and a buffer after each iteration.

use anyhow::Result;
use serde_json::Value;
use tch::nn::VarStore;
use tch::{Device, Tensor};
use tch_ignite::engine::{Engine, Event, Until};
use tch_ignite::handlers::{Buffers, EMAHandler};

use super::super::Outcome;
use super::super::json::{array, count, events, float, floats, text};

/// tests/golden/README.md, "Tolerances".
const RELATIVE: f64 = 1e-12;

const WARMUP_NAME: &str =
    "the warm-up of an EMA attached under another name writes to an attribute that nobody reads";
const SHARED_BUFFER: &str = "copied buffers of an EMA share the model's memory";

/// What is refused when an EMA is made.
pub fn refused(args: &Value) -> Result<Option<tch_ignite::Error>> {
    if let Some(buffers) = args["handle_buffers"].as_str() {
        return Ok(buffers.parse::<Buffers>().err());
    }
    let momentum = float(&args["momentum"])?;
    Ok(EMAHandler::new(&VarStore::new(Device::Cpu), momentum).err())
}

#[derive(Default)]
struct Seen {
    weights: Vec<f64>,
    buffers: Vec<f64>,
    momentum: Vec<f64>,
}

pub fn run(config: &Value, expect: &Value, defect: &mut Option<&'static str>) -> Result<Outcome> {
    let row = |value: &Value| Ok::<_, anyhow::Error>(Tensor::from_slice(&floats(value)?));
    let vs = VarStore::new(Device::Cpu);
    let mut model = [
        vs.root().add("w", row(&config["initial"])?, true),
        vs.root().add("b", row(&config["initial_buffer"])?, false),
    ];
    let name = text(&config["name"])?;
    let handle_buffers = text(&config["handle_buffers"])?;
    let mut ema = EMAHandler::new(&vs, float(&config["momentum"])?)?
        .handle_buffers(handle_buffers.parse()?)
        .named(name)
        .on(events(&config["event"])?);
    let warmup = count(&config["warmup_iters"])?;
    if let Some(updates) = warmup {
        ema = ema.warmup(float(&config["momentum_warmup"])?, updates)?;
    }

    let rows = array(&config["weights"])?.iter().zip(array(&config["buffers"])?);
    let batches = rows.map(|(w, b)| Ok([row(w)?, row(b)?])).collect::<Result<Vec<_>>>()?;
    let mut seen = Seen::default();
    let mut trainer = Engine::new(|model: &mut [Tensor; 2], _, index: usize| {
        let _guard = tch::no_grad_guard();
        model.iter_mut().zip(&batches[index]).for_each(|(variable, value)| variable.copy_(value));
        Ok(())
    });
    trainer.attach(ema.clone());
    trainer.on(Event::IterationCompleted, |_, _| {
        for (name, average) in ema.averages() {
            let values: Vec<f64> = average.try_into()?;
            match name.as_str() {
                "w" => seen.weights.extend(values),
                _ => seen.buffers.extend(values),
            }
        }
        seen.momentum.push(ema.momentum());
        Ok(())
    });
    trainer.run(&mut model, (0..batches.len()).collect::<Vec<_>>(), Until::epochs(1))?;
    drop(trainer);

    let flat = |key: &str| -> Result<Vec<f64>> {
        let rows = array(&expect[key])?.iter().map(floats).collect::<Result<Vec<_>>>()?;
        Ok(rows.concat())
    };
    let (mut weights, mut buffers) = (flat("ema_w")?, flat("ema_b")?);
    let mut momentum = floats(&expect["momentum"])?;
    let every = count(&config["event"]["every"])?.unwrap_or(1);
    if warmup.is_some() && name != "ema_momentum" {
        *defect = Some(WARMUP_NAME);
        momentum = floats(&expect["state_ema_momentum"])?;
        weights = averaged(config, &momentum, every)?;
        if handle_buffers == "update" {
            return Outcome::skipped("no case of this shape is known");
        }
    }
    if handle_buffers == "copy" && every > 1 {
        *defect = Some(SHARED_BUFFER);
        buffers = copied(config, every)?;
    }
    let result = near("momentum", &seen.momentum, &momentum)
        .and(near("ema_w", &seen.weights, &weights))
        .and(near("ema_b", &seen.buffers, &buffers));
    Ok(result.into())
}

/// The average of the weights after each iteration, with these momenta.
fn averaged(config: &Value, momentum: &[f64], every: u64) -> Result<Vec<f64>> {
    let mut average = floats(&config["initial"])?;
    let mut all = vec![];
    for (index, weights) in array(&config["weights"])?.iter().enumerate() {
        if (index as u64 + 1).is_multiple_of(every) {
            for (average, weight) in average.iter_mut().zip(floats(weights)?) {
                *average = *average * (1. - momentum[index]) + weight * momentum[index];
            }
        }
        all.extend(&average);
    }
    Ok(all)
}

/// The buffers as they were at the last update.
fn copied(config: &Value, every: u64) -> Result<Vec<f64>> {
    let mut last = floats(&config["initial_buffer"])?;
    let mut all = vec![];
    for (index, buffers) in array(&config["buffers"])?.iter().enumerate() {
        if (index as u64 + 1).is_multiple_of(every) {
            last = floats(buffers)?;
        }
        all.extend(&last);
    }
    Ok(all)
}

fn near(what: &str, ours: &[f64], theirs: &[f64]) -> Result<(), String> {
    if ours.len() != theirs.len() {
        return Err(format!("{what}: {} values instead of {}", ours.len(), theirs.len()));
    }
    let far =
        ours.iter().zip(theirs).position(|(a, b)| (a - b).abs() > (RELATIVE * b.abs()).max(1e-15));
    match far {
        Some(i) => Err(format!("{what}[{i}]: {:e} instead of {:e}", ours[i], theirs[i])),
        None => Ok(()),
    }
}
