//! Kind `schedule_error`: what is refused, with ignite's words where ignite refuses it.

use anyhow::{Context, Result};
use serde_json::{Value, json};
use tch_ignite::data::no_data;
use tch_ignite::engine::{Engine, Event, FilteredEvent, Until};
use tch_ignite::schedule::{CosineAnnealing, Schedule};

use super::Outcome;
use super::json::{event_named, object, text};
use super::optimizer::{knob, optimizer, scheduler, store};

pub fn run(config: &Value, expect: &Value, defect: &mut Option<&'static str>) -> Result<Outcome> {
    let target = text(&config["target"])?;
    let args = &config["args"];
    if !KNOWN
        .iter()
        .any(|known| target == *known || target.strip_prefix(known) == Some(".load_state_dict"))
    {
        return Outcome::skipped(format!("{target} does not exist yet"));
    }
    if config["type_level"] == true {
        return Outcome::skipped(format!("the types rule out the wrong type given to {target}"));
    }
    if has_negative(args) {
        return Outcome::skipped(format!(
            "the types rule out the negative count given to {target}"
        ));
    }
    let refused = match target {
        "LinearCyclicalScheduler" | "CosineAnnealingScheduler" => {
            return cyclical(target, config, expect, defect);
        }
        "CosineAnnealingScheduler.load_state_dict" => load_cosine(args)?,
        "ParamScheduler" => {
            return Outcome::skipped("the types rule out a schedule with several values at once");
        }
        "Events.ITERATION_STARTED" if object(args)?.is_empty() => {
            return Outcome::skipped("an event without a filter is the event itself");
        }
        "Events.ITERATION_STARTED" => filter(args),
        "Engine.add_event_handler" => {
            let event = event_named(text(&args["event"])?);
            Engine::new(|_: &mut (), _, _: ()| Ok(())).add_event_handler(event, |_, _| Ok(())).err()
        }
        "Engine.fire_event" => {
            let event = event_named(text(&args["event"])?);
            Engine::new(|_: &mut (), _, _: ()| Ok(())).fire_event(event, &mut ()).err()
        }
        "Engine.remove_event_handler" => {
            return Outcome::skipped("handlers are removed by their id, not by event");
        }
        "Engine.run" => engine_run(args)?,
        "Engine.load_state_dict" if !args["user_keys"].is_null() => {
            return Outcome::skipped(
                "state_dict_user_keys do not exist: handlers save their own state",
            );
        }
        "Engine.load_state_dict" => {
            let state = object(&args["state_dict"])?;
            Engine::new(|_: &mut (), _, _: ()| Ok(())).load_state_dict(state).err()
        }
        other => anyhow::bail!("{other} is said to exist, but nothing runs it"),
    };
    Ok(said(refused.map(|error| error.to_string()), expect).into())
}

const KNOWN: [&str; 9] = [
    "LinearCyclicalScheduler",
    "CosineAnnealingScheduler",
    "ParamScheduler",
    "Events.ITERATION_STARTED",
    "Engine.add_event_handler",
    "Engine.fire_event",
    "Engine.remove_event_handler",
    "Engine.run",
    "Engine",
];

/// The error's text begins with the language-neutral head of ignite's.
fn said(ours: Option<String>, expect: &Value) -> Result<(), String> {
    let theirs = expect["match"].as_str().unwrap_or_default();
    match ours {
        Some(text) if text.starts_with(theirs) => Ok(()),
        Some(text) => Err(format!("says {text:?} instead of {theirs:?}")),
        None => Err(format!("accepts what ignite refuses with {theirs:?}")),
    }
}

/// Counts are unsigned here.
fn has_negative(value: &Value) -> bool {
    match value {
        Value::Number(number) => number.as_i64().is_some_and(|n| n < 0),
        Value::Array(list) => list.iter().any(has_negative),
        // A saved state comes from a file: there, anything can stand.
        Value::Object(map) => {
            map.iter().any(|(key, value)| key != "state_dict" && has_negative(value))
        }
        _ => false,
    }
}

fn cyclical(
    target: &str,
    config: &Value,
    expect: &Value,
    defect: &mut Option<&'static str>,
) -> Result<Outcome> {
    let mut spec = config["args"].clone();
    spec["type"] = json!(target.trim_end_matches("Scheduler"));
    for (key, value) in [("start_value", 1.), ("end_value", 0.)] {
        if spec[key].is_null() {
            spec[key] = json!(value);
        }
    }
    if spec["cycle_size"].is_null() {
        spec["cycle_size"] = json!(10);
    }
    let groups = spec["n_groups"].as_u64().unwrap_or(1);
    let optimizer_spec =
        json!({"type": "SGD", "groups": vec![json!({"lr": 0.1}); groups as usize]});
    let vs = store(&optimizer_spec)?;
    let optimizer = optimizer(&optimizer_spec, &vs)?;
    if expect["type"] == "IndexError" {
        *defect = Some("a group that does not exist is only noticed when the scheduler runs");
        let refused = knob(&spec, &optimizer).err().map(|error| error.to_string());
        let group = format!("no parameter group {}", spec["param_group_index"]);
        return Ok(said(refused, &json!({"match": group})).into());
    }
    let mut scheduler = scheduler(&spec, &optimizer)?;
    let Some(at) = config["at_event"].as_u64() else {
        return Ok(said(scheduler.advance().err().map(|error| error.to_string()), expect).into());
    };
    *defect = Some("a cycle that shrinks to nothing divides by zero");
    for event in 0..at {
        scheduler.advance().with_context(|| format!("event {event}"))?;
    }
    let refused = scheduler.advance().err().map(|error| error.to_string());
    let says = format!("the schedule ends after {at} events (cycle_mult");
    Ok(said(refused, &json!({"match": says})).into())
}

fn load_cosine(args: &Value) -> Result<Option<tch_ignite::Error>> {
    let spec = json!({"type": "SGD", "groups": [{"lr": 0.1}]});
    let vs = store(&spec)?;
    let optimizer = optimizer(&spec, &vs)?;
    let cosine: Box<dyn Schedule> = Box::new(CosineAnnealing::new(1., 0., 10));
    let knob = optimizer.knob("lr")?;
    let mut scheduler = tch_ignite::schedule::ParamScheduler::new("lr", knob, cosine);
    let mut state = match &args["state_dict"] {
        Value::Object(state) => state.clone(),
        _ => scheduler.state_dict(),
    };
    if let Some(missing) = args["missing"].as_str() {
        state.remove(missing).context("a key that is not saved")?;
    }
    Ok(scheduler.load_state_dict(&state).err())
}

fn filter(args: &Value) -> Option<tch_ignite::Error> {
    let mut event = FilteredEvent::from(Event::IterationStarted);
    if let Some(n) = args["every"].as_u64() {
        event = event.every(n);
    }
    if let Some(n) = args["before"].as_u64() {
        event = event.before(n);
    }
    if let Some(n) = args["after"].as_u64() {
        event = event.after(n);
    }
    match &args["once"] {
        Value::Array(list) => event = event.once_at(list.iter().filter_map(Value::as_u64)),
        Value::Number(n) => event = event.once_at(n.as_u64()),
        _ => {}
    }
    Engine::new(|_: &mut (), _, _: ()| Ok(())).add_event_handler(event, |_, _| Ok(())).err()
}

fn engine_run(args: &Value) -> Result<Option<tch_ignite::Error>> {
    let mut engine = Engine::new(|_: &mut (), _, _: ()| Ok(()));
    if let Value::Object(state) = &args["loaded"] {
        engine.load_state_dict(state)?;
    }
    let mut until = match args["max_epochs"].as_u64() {
        Some(epochs) => Until::epochs(epochs),
        None => Until::default(),
    };
    if let Some(iterations) = args["max_iters"].as_u64() {
        until = until.or_iterations(iterations);
    }
    if let Some(length) = args["epoch_length"].as_u64() {
        until = until.epoch_length(length);
    }
    let batches = args["data_len"].as_u64();
    Ok(match batches {
        Some(batches) => engine.run(&mut (), vec![(); batches as usize], until).err(),
        None => engine.run(&mut (), no_data(), until).err(),
    })
}
