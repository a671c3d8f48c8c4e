//! Kind `engine_trace`: compares every event, handler call and step of runs, in which handlers raise, terminate,
//! interrupt and so on.

use std::cell::RefCell;
use std::collections::HashMap;
use std::fmt;
use std::rc::Rc;

use anyhow::{Context, Result, bail};
use serde_json::{Map, Value, json};
use tch_ignite::Error;
use tch_ignite::data::{Custom, IntoSource, no_data, one_shot, restartable};
use tch_ignite::engine::{Engine, Event, HandlerId, Until};

use super::Outcome;
use super::json::{array, count, event_named, events, object, same_value, text};

/// A Python exception that the case raises.
#[derive(Debug, Clone, PartialEq)]
struct Raised {
    kind: String,
    message: String,
}

impl fmt::Display for Raised {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.kind, self.message)
    }
}

impl std::error::Error for Raised {}

/// The context of the runs: the trace that they write, and what handlers need to know.
#[derive(Default)]
struct Log {
    trace: Vec<Value>,
    handlers: HashMap<String, HandlerId>,
    calls: HashMap<String, u64>,
}

type Batch = Option<i64>;
type Traced = Engine<'static, Log, Batch, ()>;

const BUILT_IN: [Event; 13] = [
    Event::Started,
    Event::EpochStarted,
    Event::GetBatchStarted,
    Event::GetBatchCompleted,
    Event::IterationStarted,
    Event::IterationCompleted,
    Event::DataloaderStopIteration,
    Event::ExceptionRaised,
    Event::TerminateSingleEpoch,
    Event::EpochCompleted,
    Event::Terminate,
    Event::Completed,
    Event::Interrupt,
];

/// The result of one step of a case: the error or warnings of a run, and the state afterwards.
struct StepResult {
    error: Option<Error>,
    warnings: Vec<String>,
    ran: bool,
    state: Map<String, Value>,
    state_dict: Map<String, Value>,
    /// Index of the first entry of the trace that belongs to this step.
    first: usize,
}

pub fn run(config: &Value, expect: &Value, defect: &mut Option<&'static str>) -> Result<Outcome> {
    let outcome = compare(config, expect, defect)?;
    if let Outcome::Failed(_) = outcome
        && let Ok((trace, _)) = play(config)
        && let Some(reason) =
            differs_after(config, &heard(config, &trace), array(&expect["trace"])?)?
    {
        *defect = Some(reason);
        return Ok(Outcome::Passed);
    }
    Ok(outcome)
}

/// The trace without EXCEPTION_RAISED where only our log listens to it, because ignite fires it only where a handler
/// does.
fn heard(config: &Value, trace: &[Value]) -> Vec<Value> {
    let listens = config["handlers"].to_string().contains("EXCEPTION_RAISED");
    let is_heard = |entry: &&Value| listens || entry[1] != "EXCEPTION_RAISED";
    trace.iter().filter(is_heard).cloned().collect()
}

fn compare(config: &Value, expect: &Value, defect: &mut Option<&'static str>) -> Result<Outcome> {
    let rule = rule_for(config, expect)?;
    *defect = rule.as_ref().map(Rule::name);
    let (trace, steps) = match play(config) {
        Ok(played) => played,
        Err(error) => {
            return Ok(match (&rule, error.downcast_ref::<Error>()) {
                (Some(Rule::FilterWithoutNumber), Some(Error::InvalidArgument(text)))
                    if text.contains("no number that a filter could compare with") =>
                {
                    Outcome::Passed
                }
                _ => Outcome::Failed(format!("{error:#}")),
            });
        }
    };
    let theirs = array(&expect["trace"])?;
    let heard = heard(config, &trace);
    let affected = array(&config["steps"])?.iter().position(iterates_unknown_length);
    let refused = steps.iter().position(|step| step.ran && refused_at_once(step, &trace));
    if let (None | Some(Rule::MaxEpochsFromMaxIters), Some(number)) = (&rule, refused)
        && affected.is_none_or(|affected| number <= affected)
    {
        let before = self::heard(config, &trace[..steps[number].first]).len();
        let ours = &heard[..before];
        *defect = Some("a run that is refused changes the state");
        return Ok(up_to_refusal(ours, theirs, &steps[..=number], expect)?.into());
    }
    Ok(match rule {
        None => match same_trace(&heard, theirs).and(same_steps(&steps, expect)?) {
            Err(difference) => {
                if let Some(number) = keeps_epochs_of_before(config, expect)? {
                    *defect = Some(
                        "a run after another keeps the epochs of other data, or the rest of one",
                    );
                    begins_whole_epochs(config, &heard, theirs, &steps, expect, number)?
                } else {
                    Err(difference)
                }
            }
            Ok(()) => Ok(()),
        },
        Some(Rule::MaxEpochsFromMaxIters) => {
            ends_without_data(config, &heard, theirs, &steps, expect)?
        }
        Some(Rule::FilterWithoutNumber) => counts_firings(config, &trace, &steps)?,
        Some(Rule::DataRestartsOnResume) => resumes_in_place(config, &trace, &steps, expect)?,
        Some(Rule::Exceptions) => fails_and_goes_on(config, &trace, &steps, expect)?,
    }
    .into())
}

/// ignite's defects that a case may show. docs/DIFFERENCES.md says what this crate does instead.
enum Rule {
    /// ignite swallows exceptions, fires EXCEPTION_RAISED twice, does nothing in the next run, or counts epochs
    /// wrongly afterwards (IGNITE 2.1.8 to 2.1.11).
    Exceptions,
    /// A run that is continued in mid epoch restarts the data at item 0 (2.1.1).
    DataRestartsOnResume,
    /// A filter on an event that has no number, custom events included, is refused only when the event fires.
    FilterWithoutNumber,
    /// max_iters over data of unknown length also sets max_epochs (2.1.3).
    MaxEpochsFromMaxIters,
}

impl Rule {
    fn name(&self) -> &'static str {
        match self {
            Self::Exceptions => "exceptions are swallowed, raised twice, or leave a dead engine",
            Self::DataRestartsOnResume => "a run resumed in mid epoch restarts its data",
            Self::FilterWithoutNumber => {
                "a filter without a number to compare with fails when it fires"
            }
            Self::MaxEpochsFromMaxIters => {
                "max_iters over data of unknown length also sets max_epochs"
            }
        }
    }
}

fn rule_for(config: &Value, expect: &Value) -> Result<Option<Rule>> {
    let steps = array(&config["steps"])?;
    let handlers = array(&config["handlers"])?;
    let is = |action: &Value, kind: &str| action["type"] == kind;
    let raised = |entry: &Value| entry[1] == "EXCEPTION_RAISED";
    let misplaced = |step: &Value| {
        let text = step["error"]["match"].as_str().unwrap_or_default();
        text.starts_with("The method terminate_epoch() should not be called")
    };
    if !config["process"].is_null()
        || handlers.iter().any(|h| is(&h["action"], "raise"))
        || array(&expect["trace"])?.iter().any(raised)
        || array(&expect["steps"])?.iter().any(misplaced)
    {
        return Ok(Some(Rule::Exceptions));
    }
    let first = &expect["steps"][0];
    if first["error"]["match"].as_str().is_some_and(|text| text.starts_with("Unknown event name")) {
        return Ok(Some(Rule::FilterWithoutNumber));
    }
    for (loaded, run) in steps.iter().zip(steps.iter().skip(1)) {
        let state = &loaded["state_dict"];
        let iteration = state["iteration"].as_u64();
        let len = run["data"]["len"].as_u64();
        let epochs = run["max_epochs"].as_u64().or(state["max_epochs"].as_u64());
        let iterations = run["max_iters"].as_u64().or(state["max_iters"].as_u64());
        if let (Some(iteration), Some(len)) = (iteration, len)
            && !iteration.is_multiple_of(len)
            && (iterations.is_some_and(|max| iteration < max)
                || epochs.is_some_and(|epochs| iteration < epochs * len))
        {
            return Ok(Some(Rule::DataRestartsOnResume));
        }
    }
    Ok(steps.iter().any(iterates_unknown_length).then_some(Rule::MaxEpochsFromMaxIters))
}

// These functions play a case.

fn play(config: &Value) -> Result<(Vec<Value>, Vec<StepResult>)> {
    let raise = &config["process"];
    let raise_at = count(&raise["raise_at_iteration"])?;
    let kind = raise["exception"].as_str().unwrap_or_default().to_owned();
    let custom: Vec<(Event, Option<String>)> = config["custom_events"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|c| Ok((event_named(text(&c["name"])?), c["attr"].as_str().map(str::to_owned))))
        .collect::<Result<_>>()?;
    let fired = custom.clone();
    let mut engine: Traced = Engine::new(move |log: &mut Log, engine, batch: Batch| {
        let (epoch, iteration) = (engine.state.epoch, engine.state.iteration);
        log.trace.push(json!(["process", batch, epoch, iteration]));
        if raise_at == Some(iteration) {
            bail!(Raised { kind: kind.clone(), message: format!("boom at {iteration}") });
        }
        for (event, attr) in &fired {
            if let Some(attr) = attr {
                *log.calls.entry(attr.clone()).or_default() += 1;
            }
            engine.fire_event(*event, log)?;
        }
        Ok(())
    });
    engine.register_events(custom.iter().map(|(event, _)| *event))?;
    for event in BUILT_IN.into_iter().chain(custom.iter().map(|(event, _)| *event)) {
        engine.on(event, move |log, engine| {
            let (epoch, iteration) = (engine.state.epoch, engine.state.iteration);
            log.trace.push(json!(["event", event.to_string(), epoch, iteration]));
            Ok(())
        });
    }
    let log = Rc::new(RefCell::new(Log::default()));
    for spec in array(&config["handlers"])? {
        add_handler(&mut engine, &mut log.borrow_mut(), spec)?;
    }
    let steps = array(&config["steps"])?;
    let mut results = vec![];
    let mut log = log.take();
    for (number, step) in steps.iter().enumerate() {
        if steps.len() > 1 {
            log.trace.push(json!(["step", number, engine.state.epoch, engine.state.iteration]));
        }
        let first = log.trace.len();
        let (mut error, mut warnings, mut ran) = (None, vec![], false);
        match text(&step["op"])? {
            "run" => {
                ran = true;
                match engine.run(&mut log, data(&step["data"])?, until(step)?) {
                    Ok(summary) => warnings = summary.warnings,
                    Err(failure) => error = Some(failure),
                }
            }
            "load_state_dict" => engine.load_state_dict(object(&step["state_dict"])?)?,
            "set_state" => set_state(&mut engine, step)?,
            other => bail!("no step {other}"),
        }
        let mut state = Map::new();
        state.insert("iteration".into(), engine.state.iteration.into());
        state.insert("epoch".into(), engine.state.epoch.into());
        state.insert("epoch_length".into(), engine.state.epoch_length.into());
        state.insert("max_epochs".into(), engine.state.max_epochs.into());
        state.insert("max_iters".into(), engine.state.max_iters.into());
        for attr in custom.iter().filter_map(|(_, attr)| attr.as_ref()) {
            state.insert(attr.clone(), log.calls.get(attr).copied().unwrap_or(0).into());
        }
        let state_dict = engine.state_dict();
        results.push(StepResult { error, warnings, ran, state, state_dict, first });
    }
    Ok((log.trace, results))
}

fn until(step: &Value) -> Result<Until> {
    let mut until = match count(&step["max_epochs"])? {
        Some(epochs) => Until::epochs(epochs),
        None => Until::default(),
    };
    if let Some(iterations) = count(&step["max_iters"])? {
        until = until.or_iterations(iterations);
    }
    if let Some(length) = count(&step["epoch_length"])? {
        until = until.epoch_length(length);
    }
    Ok(until)
}

struct Data(Custom<'static, Batch>);

impl IntoSource<'static, Batch> for Data {
    fn into_source(self) -> Box<dyn tch_ignite::data::Source<Batch>> {
        self.0.into_source()
    }
}

/// A list as a data source with a known length; the number is the position.
struct List(Vec<i64>, usize);

impl tch_ignite::data::Source<Batch> for List {
    fn batches(&self) -> Option<u64> {
        Some(self.0.len() as u64)
    }
    fn seek(&mut self, _pass: u64, batch: u64) -> Result<()> {
        self.1 = batch as usize;
        Ok(())
    }
    fn next(&mut self) -> Option<Result<Batch>> {
        let item = *self.0.get(self.1)?;
        self.1 += 1;
        Some(Ok(Some(item)))
    }
}

fn data(spec: &Value) -> Result<Data> {
    let len = count(&spec["len"])?.unwrap_or(0) as i64;
    let offset = count(&spec["offset"])?.unwrap_or(0) as i64;
    Ok(Data(match text(&spec["type"])? {
        "list" => tch_ignite::data::source(List((offset..offset + len).collect(), 0)),
        "restartable" => restartable(move || (0..len).map(Some)),
        "one_shot" => one_shot((0..len).map(Some)),
        "infinite" => restartable(|| (0i64..).map(Some)),
        "none" => no_data(),
        other => bail!("no data {other}"),
    }))
}

fn set_state(engine: &mut Traced, action: &Value) -> Result<()> {
    let value = count(&action["value"])?;
    match text(&action["attr"])? {
        "epoch_length" => engine.state.epoch_length = value,
        "max_epochs" => engine.state.max_epochs = value,
        "max_iters" => engine.state.max_iters = value,
        other => bail!("no attribute {other}"),
    }
    Ok(())
}

fn add_handler(engine: &mut Traced, log: &mut Log, spec: &Value) -> Result<()> {
    let tag = text(&spec["tag"])?.to_owned();
    let events = events(&spec["event"])?;
    let spec = spec.clone();
    let id =
        engine.add_event_handler(events, move |log, engine| call_handler(&spec, log, engine))?;
    log.handlers.insert(tag, id);
    Ok(())
}

fn call_handler(spec: &Value, log: &mut Log, engine: &mut Traced) -> Result<()> {
    let tag = text(&spec["tag"])?;
    let (epoch, iteration) = (engine.state.epoch, engine.state.iteration);
    let exception = engine.exception().map(root);
    let mut entry = vec![json!("handler"), json!(tag), json!(epoch), json!(iteration)];
    if spec["on_exception"] == true {
        entry.extend(exception.as_ref().map(|raised| json!(raised.to_string())));
    }
    log.trace.push(Value::Array(entry));

    let action = &spec["action"];
    if count(&action["at_iteration"])?.is_some_and(|at| at != iteration)
        || count(&action["at_epoch"])?.is_some_and(|at| at != epoch)
    {
        return Ok(());
    }
    if let Some(max) = count(&action["max_calls"])? {
        let calls = log.calls.entry(format!("handler {tag}")).or_default();
        *calls += 1;
        if *calls > max {
            return Ok(());
        }
    }
    match action["type"].as_str() {
        None => {}
        Some("terminate") if action["skip_completed"] == true => engine.terminate_skip_completed(),
        Some("terminate") => engine.terminate(),
        Some("terminate_epoch") if action["skip_epoch_completed"] == true => {
            engine.terminate_epoch_skip_completed();
        }
        Some("terminate_epoch") => engine.terminate_epoch(),
        Some("interrupt") => engine.interrupt(),
        Some("raise") => bail!(Raised {
            kind: text(&action["exception"])?.to_owned(),
            message: text(&action["message"])?.to_owned(),
        }),
        Some("reraise") => bail!(exception.unwrap_or_else(|| root(&Error::State("none".into())))),
        Some("set_data") => engine.set_data(data(&action["data"])?)?,
        Some("add_handler") => add_handler(engine, log, &action["handler"])?,
        Some("remove") => {
            let removed = log.handlers.get(text(&action["tag"])?).copied();
            let refused = removed.and_then(|id| engine.remove_event_handler(id).err());
            if refused.is_some() {
                // ignite's message contains the function's repr.
                let function = "<function TracedCase.add_handler.<locals>.handler at 0x0>";
                bail!(Raised {
                    kind: "ValueError".into(),
                    message: format!(
                        "Input handler '{function}' is not found among registered event handlers"
                    ),
                });
            }
        }
        Some("set_state") => set_state(engine, action)?,
        Some(other) => bail!("no action {other}"),
    }
    Ok(())
}

/// The exception at the bottom of an error.
fn root(error: &Error) -> Raised {
    let source = match error {
        Error::Step { source, .. } | Error::Handler { source, .. } => source.downcast_ref(),
        _ => None,
    };
    source.cloned().unwrap_or(Raised { kind: "?".into(), message: error.to_string() })
}

// These functions compare our results with ignite's.

fn same_trace(ours: &[Value], theirs: &[Value]) -> Result<(), String> {
    let end = json!("the end");
    for i in 0..ours.len().max(theirs.len()) {
        let (a, b) = (ours.get(i).unwrap_or(&end), theirs.get(i).unwrap_or(&end));
        if a != b {
            return Err(format!("trace[{i}] is {a} instead of {b}"));
        }
    }
    Ok(())
}

fn same_steps(ours: &[StepResult], expect: &Value) -> Result<Result<(), String>> {
    let theirs = array(&expect["steps"])?;
    if ours.len() != theirs.len() {
        return Ok(Err(format!("{} steps instead of {}", ours.len(), theirs.len())));
    }
    Ok(ours.iter().zip(theirs).try_for_each(|(ours, theirs)| same_step(ours, theirs)))
}

fn same_step(ours: &StepResult, theirs: &Value) -> Result<(), String> {
    // ignite's text ends with an address for feature requests, which is not compared.
    let expected = theirs["error"]["match"]
        .as_str()
        .map(|text| text.split("If this is a desired behaviour").next().unwrap_or_default());
    let error = ours.error.as_ref().map(|error| root(error).message);
    // The number of epochs that are done, which follows, does not count one that was interrupted here.
    let head = |text: &str| text.split("defined in the state: ").next().map(str::to_owned);
    match (&error, expected) {
        (None, None) => {}
        (Some(ours), Some(theirs)) if head(ours) == head(theirs) => {}
        (Some(ours), Some(theirs)) if ours.starts_with(theirs) => {}
        _ => return Err(format!("the run gives {error:?} instead of {expected:?}")),
    }
    let mut warnings: Vec<_> =
        theirs["warnings"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    // Python shows only one of several equal warnings in a row, and so do we.
    warnings.dedup();
    if ours.warnings != warnings {
        return Err(format!("warnings {:?} instead of {warnings:?}", ours.warnings));
    }
    for (what, ours, theirs) in [
        ("state", &ours.state, &theirs["state"]),
        ("state_dict", &ours.state_dict, &theirs["state_dict"]),
    ] {
        for (key, value) in theirs.as_object().into_iter().flatten() {
            let absent = Value::Null;
            let ours = ours.get(key).unwrap_or(&absent);
            if !same_value(ours, value) {
                return Err(format!("{what}.{key} is {ours} instead of {value}"));
            }
        }
    }
    Ok(())
}

// These functions check our documented behaviour where ignite has a defect.

/// Whether a run failed before its first event.
fn refused_at_once(step: &StepResult, trace: &[Value]) -> bool {
    let next = trace.get(step.first);
    step.error.is_some() && next.is_none_or(|entry| entry[0] == "step")
}

/// Compares everything up to a run that is refused. Here a refused run must leave the state as it was, so that later
/// steps start from another state than ignite's and are not compared.
fn up_to_refusal(
    trace: &[Value],
    theirs: &[Value],
    steps: &[StepResult],
    expect: &Value,
) -> Result<Result<(), String>> {
    let mut expect = expect.clone();
    if let [.., before, refused] = steps {
        let step = &mut expect["steps"][steps.len() - 1];
        if refused.state != before.state {
            return Ok(Err(format!("the refused run leaves {:?}", refused.state)));
        }
        step["state"] = refused.state.clone().into();
        step["state_dict"] = refused.state_dict.clone().into();
    }
    let theirs = &theirs[..trace.len().min(theirs.len())];
    Ok(same_trace(trace, theirs).and(same_steps(steps, &expect)?))
}

/// Checks that filters on custom events compare with the number of firings.
fn counts_firings(
    config: &Value,
    trace: &[Value],
    steps: &[StepResult],
) -> Result<Result<(), String>> {
    if let Some(error) = steps.iter().find_map(|step| step.error.as_ref()) {
        return Ok(Err(format!("the run fails: {error}")));
    }
    for handler in array(&config["handlers"])? {
        let name = text(&handler["event"]["name"])?;
        let (tag, every) =
            (text(&handler["tag"])?, count(&handler["event"]["every"])?.unwrap_or(1));
        let mut firings = 0;
        for (entry, next) in trace.iter().zip(trace.iter().skip(1)) {
            if entry[0] == "event" && entry[1] == name {
                firings += 1;
                let called = next[0] == "handler" && next[1] == tag;
                if called != u64::is_multiple_of(firings, every) {
                    return Ok(Err(format!("{tag} at firing {firings}: called is {called}")));
                }
            }
        }
        if firings == 0 {
            return Ok(Err(format!("{name} was never fired")));
        }
    }
    Ok(Ok(()))
}

/// Whether a step of a case runs over data of unknown length.
fn unknown_length(step: &Value) -> bool {
    let known = matches!(step["data"]["type"].as_str(), Some("list" | "none"));
    step["op"] == "run" && !known && step["epoch_length"].is_null()
}

/// Whether a step runs for some iterations over data of unknown length.
fn iterates_unknown_length(step: &Value) -> bool {
    unknown_length(step) && !step["max_iters"].is_null()
}

/// Compares everything up to the end of the first run with `max_iters` over data of unknown length. Here a run whose
/// data has ended does not go on with empty epochs, and leaves `max_epochs` as it was. Later steps start from another
/// state than ignite's and are not compared.
fn ends_without_data(
    config: &Value,
    trace: &[Value],
    theirs: &[Value],
    steps: &[StepResult],
    expect: &Value,
) -> Result<Result<(), String>> {
    let all = array(&config["steps"])?;
    let number = all.iter().position(iterates_unknown_length).context("no such run")?;
    let start = json!(["step", number]);
    let next = |trace: &[Value], number: usize| {
        let is = |entry: &Value| entry[0] == "step" && entry[1] == number;
        trace.iter().position(is).unwrap_or(trace.len())
    };
    let first = if all.len() > 1 { (next(trace, number), next(theirs, number)) } else { (0, 0) };
    if let Err(difference) = same_trace(&trace[..first.0], &theirs[..first.1]) {
        return Ok(Err(format!("{difference}, before {start}")));
    }
    let ours = &trace[first.0..next(trace, number + 1)];
    let theirs = &theirs[first.1..next(theirs, number + 1)];

    let expected = array(&expect["steps"])?;
    let mut step = expected.get(number).context("a result of the step")?.clone();
    step["state"]["max_epochs"] = Value::Null;
    let before = steps.iter().zip(&expected[..number]).try_for_each(|(a, b)| same_step(a, b));
    if before.is_err() {
        return Ok(before);
    }
    let result = steps.get(number).context("our result of the step")?;
    let empty_epochs = step["warnings"].as_array().map_or(0, Vec::len);
    if empty_epochs < 2 && ours.len() >= theirs.len() {
        let missing = "Data iterator can not provide data anymore";
        let told = matches!(&result.warnings[..], [only] if only.starts_with(missing));
        let short = step["state"]["iteration"].as_f64() < step["state"]["max_iters"].as_f64();
        if empty_epochs == 0 && told && short {
            // ignite ends without a warning after the number of epochs that it derived from `max_iters`.
            step["warnings"] = json!(result.warnings);
        }
        return Ok(same_trace(ours, theirs).and(same_step(result, &step)));
    }
    let Some(end) = ours.iter().rposition(|entry| entry[0] == "event") else {
        return Ok(Err("nothing ran".into()));
    };
    let (before, last) = (&ours[..end], &ours[end]);
    if last[1] != "COMPLETED" || result.warnings.len() != 1 {
        return Ok(Err(format!("ends with {last} and {} warnings", result.warnings.len())));
    }
    Ok(same_trace(before, &theirs[..before.len().min(theirs.len())]))
}

/// The defect of ignite from which on the traces differ, if they are equal before it and ours is right at that place.
fn differs_after(config: &Value, ours: &[Value], theirs: &[Value]) -> Result<Option<&'static str>> {
    let differs = ours.iter().zip(theirs).position(|(a, b)| a != b);
    let (before, here) = ours.split_at(differs.unwrap_or(ours.len().min(theirs.len())));
    let first = here.first().unwrap_or(&Value::Null);
    let handlers = array(&config["handlers"])?;
    let called = |tag: &Value, trace: &[Value]| {
        trace.iter().any(|entry| entry[0] == "handler" && entry[1] == *tag)
    };
    for handler in handlers {
        let action = &handler["action"];
        let removed = &action["tag"];
        let of_several = handlers.iter().any(|h| h["tag"] == *removed && h["event"].is_array());
        if action["type"] == "remove"
            && of_several
            && called(&handler["tag"], before)
            && !called(removed, here)
        {
            return Ok(Some("a handler of several events cannot be removed"));
        }
        let in_epoch = before.iter().rev().take_while(|entry| entry[1] != "EPOCH_STARTED");
        let in_epoch = in_epoch.filter(|entry| entry[0] == "process").count() as u64;
        let iteration = first[3].as_u64().unwrap_or(0);
        let (event, done) = match action["attr"].as_str() {
            Some("epoch_length") => ("EPOCH_COMPLETED", in_epoch),
            Some("max_iters") => ("TERMINATE", iteration),
            _ => continue,
        };
        let is_lower = count(&action["value"])?.is_some_and(|value| value < done);
        if is_lower && first[1] == event && called(&handler["tag"], before) {
            return Ok(Some("a length that is lowered below the count never ends anything"));
        }
    }
    let ended = |entry: &Value| entry[1] == "TERMINATE_SINGLE_EPOCH";
    if before.iter().any(ended) && array(&config["steps"])?.iter().any(unknown_length) {
        // The length of such data is known when one pass of it ends, in whatever epoch.
        return Ok(Some("the length of data is counted over epochs that were ended early"));
    }
    Ok(None)
}

/// Finds the first run after another whose epochs ignite makes shorter or longer than they are: because it keeps the
/// length of other data, or because an epoch of the run before was cut short, and the next one begins in the middle.
fn keeps_epochs_of_before(config: &Value, expect: &Value) -> Result<Option<usize>> {
    let length = |data: &Value| (data["type"].clone(), data["len"].clone());
    for (number, pair) in array(&config["steps"])?.windows(2).enumerate() {
        let [before, run] = pair else { continue };
        if before["op"] != "run" || run["op"] != "run" {
            continue;
        }
        let other_data = run["epoch_length"].is_null()
            && before["epoch_length"].is_null()
            && length(&run["data"]) != length(&before["data"]);
        let state = &expect["steps"][number]["state"];
        let epochs = state["epoch"].as_u64().zip(state["epoch_length"].as_u64());
        let cut = epochs.is_some_and(|(epoch, length)| state["iteration"] != epoch * length);
        if other_data || cut {
            return Ok(Some(number + 1));
        }
    }
    Ok(None)
}

/// All is as in ignite up to this run, whose epochs are whole passes, or have the length that the program gave. The
/// steps after it begin elsewhere.
fn begins_whole_epochs(
    config: &Value,
    trace: &[Value],
    theirs: &[Value],
    steps: &[StepResult],
    expect: &Value,
    number: usize,
) -> Result<Result<(), String>> {
    let place = |trace: &[Value], number: usize| {
        let is = |entry: &Value| entry[0] == "step" && entry[1] == number;
        trace.iter().position(is).unwrap_or(trace.len())
    };
    let (first, end) = (place(trace, number), place(trace, number + 1));
    let expected = array(&expect["steps"])?;
    let before = steps.iter().zip(&expected[..number]).try_for_each(|(a, b)| same_step(a, b));
    let before = same_trace(&trace[..first], &theirs[..place(theirs, number)]).and(before);
    if before.is_err() {
        return Ok(before);
    }
    let (step, result) = (&config["steps"][number], steps.get(number).context("our result")?);
    if let Some(error) = &result.error {
        // The numbers in the error are those of the epochs here.
        let head = |text: &str| text.split(": ").next().unwrap_or_default().to_owned();
        let ours = root(error).message;
        let theirs = expected[number]["error"]["match"].as_str().unwrap_or_default();
        return Ok(match head(&ours) == head(theirs) {
            true => Ok(()),
            false => Err(format!("the run gives {ours:?} instead of {theirs:?}")),
        });
    }
    let acts = |handler: &Value| !handler["action"].is_null();
    if step["data"]["type"] != "list" || array(&config["handlers"])?.iter().any(acts) {
        // Other data tells its length only by ending, and an action may change anything.
        return Ok(Ok(()));
    }
    let len = count(&step["data"]["len"])?.context("a length")?;
    let given = config["steps"][number - 1]["epoch_length"].as_u64();
    let length = given.or(step["epoch_length"].as_u64()).unwrap_or(len);
    let (mut batches, mut all) = (0, 0);
    for entry in &trace[first..end] {
        if entry[0] == "process" {
            let item = count(&step["data"]["offset"])?.unwrap_or(0) + all % len;
            if entry[1] != item {
                return Ok(Err(format!("{} is processed instead of {item}", entry[1])));
            }
            (batches, all) = (batches + 1, all + 1);
        } else if entry[1] == "EPOCH_STARTED" {
            batches = 0;
        } else if entry[0] == "event" && entry[1] == "EPOCH_COMPLETED" && batches != length {
            return Ok(Err(format!("an epoch has {batches} batches instead of {length}")));
        }
    }
    Ok(Ok(()))
}

/// Checks that a resumed run is the rest of an uninterrupted one.
fn resumes_in_place(
    config: &Value,
    trace: &[Value],
    steps: &[StepResult],
    expect: &Value,
) -> Result<Result<(), String>> {
    let [loaded, run] = array(&config["steps"])?.as_slice() else {
        bail!("two steps are expected")
    };
    let iteration = &loaded["state_dict"]["iteration"];
    let mut straight = config.clone();
    let mut run = run.clone();
    for key in ["max_epochs", "max_iters"] {
        if run[key].is_null() && run["max_epochs"].is_null() && run["max_iters"].is_null() {
            run[key] = loaded["state_dict"][key].clone();
        }
    }
    straight["steps"] = json!([run]);
    let (whole, _) = play(&straight)?;
    let rest = |trace: &[Value]| -> Vec<Value> {
        let fetch = |entry: &Value| entry[1] == "GET_BATCH_STARTED" && &entry[3] == iteration;
        let from = trace.iter().rposition(fetch);
        from.map_or_else(Vec::new, |from| trace[from..].to_vec())
    };
    let (ours, theirs) = (rest(trace), rest(&whole));
    if theirs.is_empty() {
        return Ok(Err("nothing was left to run".into()));
    }
    // Until its first batch, the resumed run does the same as ignite's.
    let start = trace.iter().take_while(|entry| entry[1] != "GET_BATCH_STARTED").count();
    Ok(same_trace(&trace[..start], &array(&expect["trace"])?[..start])
        .and(same_trace(&ours, &theirs))
        .and(same_steps(steps, expect)?))
}

/// The length of the list and the number of iterations, if every step is the same run over a list and its handlers do
/// nothing but raise exceptions.
fn same_runs(config: &Value) -> Result<Option<(u64, u64)>> {
    let steps = array(&config["steps"])?;
    let Some(first) = steps.first() else { return Ok(None) };
    let others = ["epoch_length", "max_iters"].iter().any(|key| !first[key].is_null());
    let acts = |handler: &Value| {
        let action = &handler["action"];
        !action.is_null() && action["type"] != "raise" && action["type"] != "reraise"
    };
    if steps.iter().any(|step| step != first)
        || first["data"]["type"] != "list"
        || others
        || array(&config["handlers"])?.iter().any(acts)
    {
        return Ok(None);
    }
    let (len, epochs) = (count(&first["data"]["len"])?, count(&first["max_epochs"])?);
    Ok(len.zip(epochs).map(|(len, epochs)| (len, len * epochs)))
}

/// Checks that `run` returns an error once, after EXCEPTION_RAISED was fired once, and that the next run goes on
/// behind the failed iteration, even if only COMPLETED is left to fire.
fn fails_and_goes_on(
    config: &Value,
    trace: &[Value],
    steps: &[StepResult],
    expect: &Value,
) -> Result<Result<(), String>> {
    let process = |part: &[Value]| -> Vec<Value> {
        part.iter().filter(|entry| entry[0] == "process").cloned().collect()
    };
    // Up to the first exception, ignite does the same.
    let raised = |entry: &Value| entry[1] == "EXCEPTION_RAISED";
    let theirs = array(&expect["trace"])?;
    let own_end = trace.iter().position(raised).unwrap_or(trace.len());
    let their_end = theirs
        .iter()
        .position(raised)
        .or_else(|| theirs.iter().skip(1).position(|entry| entry[0] == "step").map(|i| i + 1))
        .unwrap_or(theirs.len());
    if let Err(difference) = same_trace(&trace[..own_end], &theirs[..their_end]) {
        return Ok(Err(difference));
    }
    if theirs.get(their_end).is_some_and(raised) {
        let handlers = |trace: &[Value], from: usize| -> Vec<Value> {
            trace[from + 1..].iter().take_while(|entry| entry[0] == "handler").cloned().collect()
        };
        if handlers(trace, own_end) != handlers(theirs, their_end) {
            return Ok(Err("handlers of EXCEPTION_RAISED differ".into()));
        }
    }
    let Some((len, total)) = same_runs(config)? else {
        // Other cases are compared only up to the first exception.
        return Ok(match steps.iter().any(|step| step.error.is_some()) {
            true => Ok(()),
            false => Err("the exception is swallowed".into()),
        });
    };
    let mut done = 0;
    for (number, step) in steps.iter().enumerate() {
        let end = steps.get(number + 1).map_or(trace.len(), |next| next.first - 1);
        let part = &trace[step.first..end];
        let count_raised = part.iter().filter(|entry| raised(entry)).count();
        if !step.ran || part.is_empty() {
            return Ok(Err(format!("run {number} does nothing")));
        }
        if count_raised != usize::from(step.error.is_some()) {
            return Ok(Err(format!("run {number} fires EXCEPTION_RAISED {count_raised} times")));
        }
        let expected: Vec<_> = (done + 1..=total)
            .map(|i| json!(["process", (i - 1) % len, (i - 1) / len + 1, i]))
            .collect();
        let ours = process(part);
        if !expected.starts_with(&ours) {
            return Ok(Err(format!("run {number} processes {ours:?} instead of {expected:?}")));
        }
        let iteration = step.state["iteration"].as_u64().unwrap_or(0);
        match &step.error {
            None if ours.len() < expected.len() => {
                return Ok(Err(format!("run {number} ends at iteration {iteration}")));
            }
            // This run is complete, so the next one starts anew.
            None => done = 0,
            Some(error) => {
                // A later run may fail only with the exception of the first run.
                let message = root(error).to_string();
                let first =
                    steps.first().and_then(|step| step.error.as_ref()).map(|e| root(e).to_string());
                if Some(&message) != first.as_ref() {
                    return Ok(Err(format!("run {number} fails with {message}")));
                }
                done = iteration;
            }
        }
    }
    if steps.first().is_none_or(|step| step.error.is_none()) {
        return Ok(Err("the exception is swallowed".into()));
    }
    Ok(Ok(()))
}
