//! Runs the cases of kind `schedule_error`: arguments and states that are refused, with ignite's words where ignite
//! refuses them.

use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use tch_ignite::data::no_data;
use tch_ignite::engine::{Engine, Event, FilteredEvent, Until};
use tch_ignite::handlers::{EarlyStopping, TimeLimit};
use tch_ignite::optim::Knob;
use tch_ignite::schedule::*;

use super::Outcome;
use super::json::{event_named, object, text};
use super::optimizer::{Beside, Params, knob, optimizer, store};
use super::{handler, lr_finder, metric};

pub fn run(config: &Value, expect: &Value, defect: &mut Option<&'static str>) -> Result<Outcome> {
    let target = text(&config["target"])?;
    let args = &config["args"];
    if config["type_level"] == true {
        return Outcome::skipped(format!("the types rule out the wrong type given to {target}"));
    }
    if config["area"] == "metric" && !args_ruled_out(args) {
        return Ok(said(metric::refused(target, args)?, expect).into());
    }
    if let Some(reason) = ruled_out(target, args) {
        return Outcome::skipped(reason);
    }
    let refused = match target {
        "LinearCyclicalScheduler" | "CosineAnnealingScheduler" => {
            return cyclical(target, config, expect, defect);
        }
        "CosineAnnealingScheduler.load_state_dict" => load_cosine(args)?,
        "PiecewiseLinear" | "PiecewiseLinearStateScheduler" => {
            piecewise(&args["milestones_values"])?.validate().err()
        }
        "ConcatScheduler" => concat(args)?.validate().err(),
        "create_lr_scheduler_with_warmup" => {
            let duration = args["warmup_duration"].as_u64().unwrap_or(0);
            create_lr_scheduler_with_warmup(CosineAnnealing::new(1., 0., 10), 0., duration, 1.)
                .err()
        }
        "LRScheduler" => return one_cycle(config),
        "ReduceLROnPlateauScheduler" => return plateau(args),
        "PiecewiseLinear.load_state_dict"
        | "ConcatScheduler.load_state_dict"
        | "StepStateScheduler.load_state_dict" => return load(target, args, expect),
        "ParamGroupScheduler.load_state_dict" => load_group(args)?,
        "Events.ITERATION_STARTED" => filter(args),
        "Engine.add_event_handler" => {
            let event = event_named(text(&args["event"])?);
            Engine::new(|_: &mut (), _, _: ()| Ok(())).add_event_handler(event, |_, _| Ok(())).err()
        }
        "Engine.fire_event" => {
            let event = event_named(text(&args["event"])?);
            Engine::new(|_: &mut (), _, _: ()| Ok(())).fire_event(event, &mut ()).err()
        }
        "Engine.run" => engine_run(args)?,
        "Engine.load_state_dict" => {
            let state = object(&args["state_dict"])?;
            Engine::new(|_: &mut (), _, _: ()| Ok(())).load_state_dict(state).err()
        }
        "FastaiLRFinder.attach" => lr_finder::refused(args)?,
        "FastaiLRFinder.lr_suggestion" => lr_finder::curve(&args["history"])?.lr_suggestion().err(),
        "EarlyStopping" => {
            let patience = args["patience"].as_u64().unwrap_or(1);
            let threshold = args["threshold"].as_f64().unwrap_or(0.);
            let stop = EarlyStopping::max("score", patience);
            stop.threshold(threshold, ThresholdMode::Abs).advance(0.).err()
        }
        "TimeLimit" => {
            let seconds = args["limit_sec"].as_u64().context("limit_sec")?;
            TimeLimit::new(Duration::from_secs(seconds)).err()
        }
        "DiskSaver" => return Ok(said(handler::checkpoint::refused(args)?, expect).into()),
        "EMAHandler" => handler::ema::refused(args)?,
        other => return Outcome::skipped(format!("{other} does not exist yet")),
    };
    Ok(said(refused.map(|error| error.to_string()), expect).into())
}

/// Whether an argument of a metric is a text for which the enum here has no variant.
fn args_ruled_out(args: &Value) -> bool {
    args["average"] == "x" || args["weights"] == "x"
}

/// The reason why a bad argument cannot be written in Rust, if the types rule it out.
fn ruled_out(target: &str, args: &Value) -> Option<String> {
    let has = |key: &str, text: &str| args[key].to_string().contains(text);
    let reason = match target {
        "Precision" | "ConfusionMatrix" => "an unknown average",
        "CohenKappa" => "unknown weights",
        "ParamScheduler" => "a schedule with several values at once",
        "Events.ITERATION_STARTED" if args.as_object().is_some_and(|args| args.is_empty()) => {
            "an event called without a filter"
        }
        "Engine.remove_event_handler" => "removal by event: handlers are removed by their id",
        "Engine.load_state_dict" if !args["user_keys"].is_null() => {
            "state_dict_user_keys: handlers save their own state"
        }
        "ConcatScheduler" if has("schedulers", "different optimizers") => {
            "a Concat over two optimizers: schedules drive nothing by themselves"
        }
        "ConcatScheduler" if has("schedulers", "param_name") => {
            "a Concat over two parameters: schedules drive nothing by themselves"
        }
        "ParamGroupScheduler" => "another number of names than schedulers: each brings its own",
        "LRScheduler" if args["torch"]["type"] != "OneCycleLR" => {
            "a wrapper that cannot take SequentialLR and ReduceLROnPlateau: they exist"
        }
        "ReduceLROnPlateauScheduler"
            if !args["mode"].is_null() || !args["threshold_mode"].is_null() =>
        {
            "an unknown mode"
        }
        "ReduceLROnPlateauScheduler.simulate_values" => {
            "metrics of another length than the simulation: each is given by a call"
        }
        "EarlyStopping" if !args["mode"].is_null() => "an unknown mode",
        "EarlyStopping" if !args["threshold_mode"].is_null() => "an unknown threshold mode",
        "Checkpoint" if args["include_self"] == true => {
            "an object of the same name as the handler's own state: each kind of part has its own place"
        }
        "Checkpoint.get_default_score_fn" => "another sign than those of Mode::Min and Mode::Max",
        "ModelCheckpoint" => "a handler without a model: weights() takes one",
        "FastaiLRFinder.attach" if !args["step_mode"].is_null() => "an unknown step mode",
        "FastaiLRFinder.attach" if !args["to_save_keys"].is_null() => {
            "a finder without an optimizer"
        }
        "StateParamScheduler.attach" => "an attribute of that name: knobs have no names to clash",
        "PiecewiseLinear.load_state_dict" if args["missing"] == "_index" => {
            "a cursor in the state: it follows from the position"
        }
        _ if has_negative(args) => {
            return Some(format!("the types rule out the negative count given to {target}"));
        }
        _ => return None,
    };
    Some(format!("the types rule out {reason}"))
}

/// Checks that the error's text begins with the part of ignite's text that the case gives, after the name of the handler
/// or metric that ours may say first (`LrFinder: …`).
fn said(ours: Option<String>, expect: &Value) -> Result<(), String> {
    let theirs = expect["match"].as_str().unwrap_or_default();
    let begins = |text: &str| text.starts_with(theirs);
    let begins_after_name =
        |text: &str| text.split_once(": ").is_some_and(|(_, rest)| begins(rest));
    match ours {
        Some(text) if begins(&text) || begins_after_name(&text) => Ok(()),
        Some(text) => Err(format!("says {text:?} instead of {theirs:?}")),
        None => Err(format!("accepts what ignite refuses with {theirs:?}")),
    }
}

/// Whether a value has a negative number outside of saved states. The types rule out negative counts.
fn has_negative(value: &Value) -> bool {
    match value {
        Value::Number(number) => number.as_i64().is_some_and(|n| n < 0),
        Value::Array(list) => list.iter().any(has_negative),
        // A saved state comes from a file, which may contain anything, so it is tried.
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
    let mut spec = Value::Object(object(&config["args"])?.clone());
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
    let mut scheduler =
        Params::new(&optimizer_spec, &vs, &[], Beside::Unknown)?.scheduler(&spec)?;
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

fn piecewise(points: &Value) -> Result<PiecewiseLinear> {
    Ok(serde_json::from_value(json!({"milestones_values": points}))?)
}

fn concat(args: &Value) -> Result<Concat> {
    let count: usize = text(&args["schedulers"])?[..1].parse()?;
    let durations: Vec<u64> = serde_json::from_value(args["durations"].clone())?;
    Ok(Concat::new(vec![CosineAnnealing::new(1., 0., 10); count], durations))
}

/// A knob that ignores all values.
fn idle() -> Knob {
    Knob::new("lr", || 0., |_| {})
}

/// Checks that a OneCycleLR refuses to advance beyond `total_steps`, as torch's does.
fn one_cycle(config: &Value) -> Result<Outcome> {
    let total = config["args"]["torch"]["total_steps"].as_u64().context("total_steps")?;
    let at = config["at_event"].as_u64().context("at_event")?;
    let mut scheduler = ParamScheduler::new("lr", idle(), OneCycleLR::new(1., total));
    for event in 0..at {
        scheduler.advance().with_context(|| format!("event {event}"))?;
    }
    let says = format!("the schedule ends after {at} events (total_steps is {total})");
    let refused = scheduler.advance().err().map(|error| error.to_string());
    Ok(said(refused, &json!({"match": says})).into())
}

fn plateau(args: &Value) -> Result<Outcome> {
    let metric = args["metric_name"].as_str().unwrap_or("loss");
    let mut scheduler = ReduceLROnPlateauScheduler::min("lr", idle(), metric)?;
    if let Some(factor) = args["factor"].as_f64() {
        scheduler = scheduler.factor(factor);
    }
    let mut engine = Engine::new(|_: &mut (), _, _: ()| Ok(()));
    engine.attach(scheduler);
    let refused = engine.run(&mut (), vec![()], Until::epochs(1)).err();
    let text = refused.map(|error| format!("{:#}", anyhow::Error::from(error)));
    let says = match args["factor"].as_f64() {
        Some(factor) => {
            format!("Argument factor should be above 0 and below 1, but given {factor}")
        }
        None => format!("no metric '{metric}' has a value yet"),
    };
    Ok(match text {
        Some(text) if text.contains(&says) => Outcome::Passed,
        text => Outcome::Failed(format!("says {text:?} instead of {says:?}")),
    })
}

/// Loads a bad state into a scheduler. A state here is the position and the schedule's arguments; the error must name
/// a missing part, or say that the arguments are those of another schedule.
fn load(target: &str, args: &Value, expect: &Value) -> Result<Outcome> {
    let schedule = |count: usize| -> AnySchedule {
        match target {
            "PiecewiseLinear.load_state_dict" => PiecewiseLinear::new([(0, 1.), (9, 0.)]).into(),
            "ConcatScheduler.load_state_dict" => {
                let parts = vec![CosineAnnealing::new(1., 0., 10); count];
                Concat::new(parts, vec![5; count - 1]).into()
            }
            _ => StepState::new(1., 0.5, 3).into(),
        }
    };
    let mut scheduler = ParamScheduler::new("lr", idle(), schedule(2));
    let mut state = scheduler.state_dict();
    let mut says = expect["match"].as_str().unwrap_or_default().to_owned();
    if let Some(missing) = args["missing"].as_str() {
        if state.remove(missing).is_none() {
            // The missing part is an argument of the schedule, and these are saved together.
            state.remove("schedule").context("arguments in the state")?;
            says = "Required state attribute 'schedule' is absent".into();
        }
    } else if let Value::Object(given) = &args["state_dict"] {
        state = given.clone();
        says = "Required state attribute 'event_index' is absent".into();
    } else {
        state = ParamScheduler::new("lr", idle(), schedule(3)).state_dict();
        says = "the state is of a schedule with other arguments".into();
    }
    let refused = scheduler.load_state_dict(&state).err().map(|error| error.to_string());
    Ok(said(refused, &json!({"match": says})).into())
}

fn load_group(args: &Value) -> Result<Option<tch_ignite::Error>> {
    let named = |names: &Value| {
        let name = |index: usize| names[index].as_str().unwrap_or("lr").to_owned();
        let one =
            |index| ParamScheduler::new(name(index), idle(), CosineAnnealing::new(1., 0., 10));
        ParamGroupScheduler::new([one(0), one(1)])
    };
    let state = match &args["state_dict"] {
        Value::Object(state) => state.clone(),
        _ => named(&args["names_saved"]).state_dict(),
    };
    Ok(named(&args["names_own"]).load_state_dict(&state).err())
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
