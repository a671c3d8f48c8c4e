//! Runs cases of `Checkpoint` and `ModelCheckpoint`, which say which files there are after each call, and their
//! names.

use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use tch::nn::VarStore;
use tch::{Device, nn};
use tch_ignite::Error;
use tch_ignite::checkpoint::{Checkpoint, Score, read_state, setup_filename_pattern, verify};
use tch_ignite::data::no_data;
use tch_ignite::engine::{Engine, Event, Events, HandlerSpec, Priority, Until};
use tch_ignite::optim::Optimizer;

use std::cell::RefCell;
use std::rc::Rc;

use super::super::Outcome;
use super::super::json::{array, count, event_named, events, floats, text};

/// IGNITE 3.2 describes this defect. Here the new file is safe on disk before the old one is deleted.
const DELETES_FIRST: &str = "the old checkpoint is deleted before the new one is written";

type Handler = Checkpoint<(), ()>;

fn names(config: &Value) -> Result<Vec<String>> {
    array(&config["to_save"])?.iter().map(|name| Ok(text(name)?.to_owned())).collect()
}

fn handler(config: &Value, folder: &Path) -> Result<Handler> {
    let names = names(config)?;
    let mut handler = Checkpoint::new(folder)
        .ext("pt")
        .filename_prefix(config["filename_prefix"].as_str().unwrap_or_default())
        .greater_or_equal(config["greater_or_equal"] == true);
    if let [name] = &names[..] {
        handler = handler.name(name.as_str());
    }
    handler = match count(&config["n_saved"])? {
        Some(files) => handler.n_saved(usize::try_from(files)?),
        None => handler.keep_all(),
    };
    if let Some(pattern) = config["filename_pattern"].as_str() {
        handler = handler.filename_pattern(pattern);
    }
    if !config["scores"].is_null() {
        let given = array(&config["scores"])?.clone();
        let scores = floats(&config["scores"])?;
        handler = handler.score_function(move |state| {
            let index = state.epoch as usize - 1;
            let absent = || tch_ignite::Error::State(format!("no score of epoch {}", index + 1));
            let (given, score) = given.get(index).zip(scores.get(index)).ok_or_else(absent)?;
            Ok(given.as_i64().map_or(Score::Float(*score), Score::Int))
        });
        if let Some(name) = config["score_name"].as_str() {
            handler = handler.score_name(name);
        }
    }
    Ok(match config["global_step"].as_str() {
        Some("epoch") => handler.global_step(Event::EpochCompleted),
        Some(_) => handler.global_step(Event::IterationCompleted),
        None => handler,
    })
}

fn files(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut files: Vec<_> = entries
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| !name.starts_with('.') && name != "latest")
        .collect();
    files.sort();
    files
}

/// Runs a trainer with the handler and notes, after each call, the files in the folder and the checkpoints that the
/// handler keeps.
fn calls(config: &Value, folder: &Path, only_weights: bool) -> Result<Vec<Value>> {
    let vs = VarStore::new(Device::Cpu);
    let _model = nn::linear(vs.root(), 2, 1, Default::default());
    let optimizer = Optimizer::sgd(&vs).build()?;
    let event = match &config["event"] {
        Value::Null => Event::EpochCompleted.into(),
        event => events(event)?,
    };
    let mut handler = handler(config, folder)?.on(event.clone());
    if only_weights {
        handler = handler.weights(&vs);
        handler = match &names(config)?[..] {
            [name] => handler.name(name.as_str()),
            _ => handler.name("checkpoint"),
        };
    }
    let handler = Rc::new(RefCell::new(handler));
    let mut trainer = Engine::new(|_: &mut (), _, _: ()| Ok(()));
    for name in names(config)? {
        match name.as_str() {
            "optimizer" => trainer.track(name, &optimizer),
            _ => trainer.track(name, &vs),
        };
    }
    trainer.attach(handler.clone());
    let noted = Rc::new(RefCell::new(vec![]));
    trainer.attach(Note { event, handler, folder: folder.to_owned(), noted: noted.clone() });
    let epochs = count(&config["max_epochs"])?.context("max_epochs")?;
    let length = count(&config["epoch_length"])?.context("epoch_length")?;
    trainer.run(&mut (), no_data(), Until::epochs(epochs).epoch_length(length))?;
    Ok(noted.take())
}

/// A handler that runs after the checkpoint was written, and notes the files in the folder.
struct Note {
    event: Events,
    handler: Rc<RefCell<Handler>>,
    folder: std::path::PathBuf,
    noted: Rc<RefCell<Vec<Value>>>,
}

impl tch_ignite::engine::Handler<(), (), ()> for Note {
    fn spec(&self) -> tch_ignite::Result<HandlerSpec> {
        Ok(HandlerSpec::new("note", self.event.clone()).priority(Priority::Save))
    }

    fn call(&mut self, _: Event, _: &mut (), engine: &mut Engine<'_, (), (), ()>) -> Result<()> {
        let handler = self.handler.borrow();
        // The golden files write infinities as texts.
        let shown = |score: f64| match score.is_finite() {
            true => json!(score),
            false if score > 0. => json!("Infinity"),
            false => json!("-Infinity"),
        };
        let saved: Vec<_> =
            handler.saved().map(|(score, name)| json!([shown(score), name])).collect();
        let last = handler.last_checkpoint().and_then(|path| Some(path.file_name()?.to_owned()));
        self.noted.borrow_mut().push(json!({
            "epoch": engine.state.epoch,
            "iteration": engine.state.iteration,
            "saved": saved,
            "files": files(&self.folder),
            "last_checkpoint": last.and_then(|name| name.into_string().ok()),
        }));
        Ok(())
    }
}

/// Whether two values are equal. Numbers are compared by value, because 1 and 1.0 are different JSON.
fn same(ours: &Value, theirs: &Value) -> bool {
    match (ours, theirs) {
        (Value::Array(a), Value::Array(b)) => {
            a.len() == b.len() && a.iter().zip(b).all(|(a, b)| same(a, b))
        }
        (Value::Number(a), Value::Number(b)) => a.as_f64() == b.as_f64(),
        _ => ours == theirs,
    }
}

pub fn run(config: &Value, expect: &Value, defect: &mut Option<&'static str>) -> Result<Outcome> {
    let folder = tempfile::tempdir()?;
    let calls = calls(config, folder.path(), false)?;
    let theirs = array(&expect["calls"])?;
    if calls.len() != theirs.len() {
        return Ok(Err(format!("{} calls instead of {}", calls.len(), theirs.len())).into());
    }
    for (number, (ours, theirs)) in calls.iter().zip(theirs).enumerate() {
        for key in ["epoch", "iteration", "saved", "files", "last_checkpoint"] {
            if !same(&ours[key], &theirs[key]) {
                let difference =
                    format!("call {number}: {key} is {} instead of {}", ours[key], theirs[key]);
                return Ok(Err(difference).into());
            }
        }
        let ops = array(&theirs["ops"])?;
        if ops.len() > 1 && ops[0][0] == "remove" {
            *defect = Some(DELETES_FIRST);
        }
    }
    let Some(last) = calls.last() else { return Ok(Err("nothing was written".into()).into()) };
    if !same(&last["saved"], &expect["state_dict"]["_saved"]) {
        return Ok(Err(format!("the state is {}", last["saved"])).into());
    }
    for name in array(&last["files"])? {
        let path = folder.path().join(text(name)?);
        verify(&path)?;
        let state = read_state(&path)?;
        for name in names(config)? {
            state.part(&name)?;
        }
    }
    if let Some(theirs) = expect.get("checkpointer_state_in_last_checkpoint") {
        let name = theirs["_saved"]
            .as_array()
            .and_then(|saved| saved.iter().max_by_key(|saved| saved[1].to_string().len()))
            .map_or("", |saved| saved[1].as_str().unwrap_or_default());
        if files(folder.path()).is_empty() || name.is_empty() {
            return Ok(Err("the checkpoint has no state of its own".into()).into());
        }
    }
    Ok(Ok(()).into())
}

pub fn run_model(
    config: &Value,
    expect: &Value,
    defect: &mut Option<&'static str>,
) -> Result<Outcome> {
    let folder = tempfile::tempdir()?;
    let calls = calls(config, folder.path(), true)?;
    let theirs = array(&expect["files"])?;
    let ours: Vec<_> = calls.iter().map(|call| call["files"].clone()).collect();
    if ours != *theirs {
        return Ok(Err(format!("files {ours:?} instead of {theirs:?}")).into());
    }
    if ours.windows(2).any(|pair| pair[0] != pair[1]) {
        *defect = Some(DELETES_FIRST);
    }
    let last = calls.last().map_or(Value::Null, |call| call["last_checkpoint"].clone());
    if last != expect["last_checkpoint"] {
        return Ok(Err(format!("last_checkpoint is {last}")).into());
    }
    Ok(Ok(()).into())
}

/// The error for arguments that ignite's `DiskSaver` refuses, if they are refused here. A case writes `<dir>` for its
/// folder.
pub fn refused(args: &Value) -> Result<Option<String>> {
    let folder = tempfile::tempdir()?;
    let real = folder.path().to_string_lossy().into_owned();
    let path = text(&args["dirname"])?.replace("<dir>", &real);
    for file in args["files"].as_array().into_iter().flatten() {
        std::fs::write(folder.path().join(text(file)?), "")?;
    }
    let mut trainer = Engine::new(|_: &mut (), _, _: ()| Ok(()));
    let handler = Handler::new(path)
        .ext("pt")
        .require_empty(args["require_empty"] == true)
        .create_dir(args["create_dir"] != false);
    trainer.attach(handler);
    let error = trainer.run(&mut (), vec![()], Until::epochs(1)).err();
    Ok(error.map(|error| {
        let text = match error {
            Error::Handler { source, .. } => source.to_string(),
            other => other.to_string(),
        };
        text.replace(&real, "<dir>")
    }))
}

pub fn run_pattern(config: &Value, expect: &Value) -> Result<Outcome> {
    let with = |key: &str| config[key] == true;
    let pattern = setup_filename_pattern(
        with("with_prefix"),
        with("with_score"),
        with("with_score_name"),
        with("with_global_step"),
    );
    Ok(match pattern {
        Ok(pattern) if expect["pattern"] == pattern.as_str() => Ok(()),
        Ok(pattern) => Err(format!("{pattern} instead of {expect}")),
        Err(error) if expect["error"]["message"] == error.to_string().as_str() => Ok(()),
        Err(error) => Err(format!("{error} instead of {expect}")),
    }
    .into())
}

/// Compares the global step that file names get. It is read from the engine after its run, whether or not the event
/// was fired.
pub fn run_global_step(config: &Value, expect: &Value) -> Result<Outcome> {
    let mut trainer = Engine::new(|_: &mut (), _, _: ()| Ok(()));
    let event = event_named(text(&config["event"])?);
    let of = config["custom_event"].as_str().map_or(event, event_named);
    let epochs = count(&config["max_epochs"])?.context("max_epochs")?;
    let length = count(&config["epoch_length"])?.context("epoch_length")?;
    trainer.run(&mut (), no_data(), Until::epochs(epochs).epoch_length(length))?;
    let state = &trainer.state;
    let fallback = || match config["fallback_attr"].as_str() {
        Some("epoch") => Some(state.epoch),
        Some("iteration") => Some(state.iteration),
        _ => None,
    };
    let value = state.get_event_attrib_value(of).or_else(fallback);
    Ok(match value == expect["value"].as_u64() {
        true => Ok(()),
        false => Err(format!("{value:?} instead of {}", expect["value"])),
    }
    .into())
}
