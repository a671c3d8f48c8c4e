//! Tests of the engine's runs: errors, budgets, leaving early and going on, handlers within handlers.

use std::cell::{Cell, RefCell};

use std::rc::Rc;
use std::time::Duration;

use serde_json::{Map, Value, json};
use tch::{Device, Kind, Tensor};
use tch_ignite::data::{Batch, Loader, Source, no_data, one_shot, restartable, source};
use tch_ignite::engine::{Engine, Event, Events, Handler, HandlerSpec, Stop, Until};
use tch_ignite::handlers::Evaluate;
use tch_ignite::metrics::{Mean, RunningAverage};
use tch_ignite::{Error, Panicked, Result};

type Trace = Vec<String>;
type Traced<'a> = Engine<'a, Trace, i64, i64>;

const EVENTS: [Event; 13] = [
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

/// The events at which handlers may stop a run.
const STOPPABLE: [Event; 8] = [
    Event::Started,
    Event::EpochStarted,
    Event::GetBatchStarted,
    Event::GetBatchCompleted,
    Event::IterationStarted,
    Event::IterationCompleted,
    Event::DataloaderStopIteration,
    Event::EpochCompleted,
];

/// An engine that writes down steps and events, as `"step 7 at 1/2"` and `"COMPLETED at 1/2"`, with epoch and
/// iteration.
fn traced<'a>() -> Traced<'a> {
    let mut engine = Engine::new(|trace: &mut Trace, engine: &mut Traced, batch: i64| {
        let state = &engine.state;
        trace.push(format!("step {batch} at {}/{}", state.epoch, state.iteration));
        anyhow::ensure!(trace.len() < 1000, "this run does not end");
        Ok(batch)
    });
    for event in EVENTS {
        engine.on(event, move |trace, engine| {
            trace.push(format!("{event} at {}/{}", engine.state.epoch, engine.state.iteration));
            Ok(())
        });
    }
    engine
}

/// The trace with just the names of events, and the batches of steps.
fn short(trace: &Trace) -> String {
    let word = |line: &String| line.split(" at ").next().unwrap_or_default().replace("step ", "");
    trace.iter().map(word).collect::<Vec<_>>().join(" ")
}

/// An engine that writes down its batches.
fn plain<'a>() -> Engine<'a, Vec<i64>, i64, f64> {
    Engine::new(|seen: &mut Vec<i64>, _, batch| {
        seen.push(batch);
        anyhow::ensure!(seen.len() < 1000, "this run does not end");
        Ok(batch as f64)
    })
}

fn loader(samples: i64, batch_size: usize) -> Loader {
    let x = Tensor::arange(samples, (Kind::Int64, Device::Cpu));
    Loader::new(&x, &x, batch_size).unwrap().shuffle(5)
}

type Seen = Vec<Vec<i64>>;

/// An engine that writes down the samples of each batch.
fn sampled<'a>() -> Engine<'a, Seen, Batch, ()> {
    Engine::new(|seen: &mut Seen, _, (x, _)| {
        seen.push(Vec::try_from(&x)?);
        Ok(())
    })
}

fn text<T>(result: Result<T>) -> String {
    result.err().expect("an error").to_string()
}

/// The error and its causes, as `anyhow` shows them.
fn chain<T>(result: Result<T>) -> String {
    format!("{:#}", anyhow::Error::from(result.err().expect("an error")))
}

fn map(value: Value) -> Map<String, Value> {
    value.as_object().cloned().unwrap()
}

/// A source that gives `len` numbers in a pass, 0, 1, 2, …, and fails once, at one of them.
struct Failing<'c> {
    len: u64,
    next: u64,
    fails_at: &'c Cell<Option<u64>>,
    panics: bool,
}

impl Source<i64> for Failing<'_> {
    fn batches(&self) -> Option<u64> {
        Some(self.len)
    }
    fn seek(&mut self, _pass: u64, batch: u64) -> anyhow::Result<()> {
        self.next = batch;
        Ok(())
    }
    fn next(&mut self) -> Option<anyhow::Result<i64>> {
        let batch = (self.next < self.len).then_some(self.next)?;
        self.next += 1;
        if self.fails_at.get() == Some(batch) {
            self.fails_at.set(None);
            assert!(!self.panics, "the disk is gone");
            return Some(Err(anyhow::anyhow!("the disk is full").context("reading")));
        }
        Some(Ok(batch as i64))
    }
}

// These tests are about errors.

#[test]
fn a_failing_step_is_named_with_epoch_and_iteration() {
    for panics in [false, true] {
        let mut engine: Engine<(), i64, ()> = Engine::new(move |_, _, batch| match batch {
            2 if panics => panic!("no {batch}"),
            2 => Err(std::io::Error::other("no 2").into()),
            _ => Ok(()),
        });
        let error = engine.run(&mut (), vec![0, 1, 2, 3], Until::epochs(2)).unwrap_err();
        let cause = if panics { "panicked: no 2" } else { "no 2" };
        let text = format!("the step of iteration 3 (epoch 1) failed: {cause}");
        assert_eq!((error.to_string(), format!("{error:#}")), (text.clone(), text.clone()));
        let Error::Step { epoch: 1, iteration: 3, source } = error else { panic!("{error:?}") };
        assert_eq!(source.is::<Panicked>(), panics);
        assert_eq!(source.is::<std::io::Error>(), !panics);
        assert_eq!(
            format!("{:#}", anyhow::Error::from(Error::Step { epoch: 1, iteration: 3, source })),
            text
        );
    }
}

#[test]
fn a_failing_handler_is_named_by_place_or_name_and_event() {
    struct Named;
    impl Handler<Trace, i64, i64> for Named {
        fn spec(&self) -> Result<HandlerSpec> {
            Ok(HandlerSpec::new("saver", Event::EpochCompleted))
        }
        fn call(&mut self, _: Event, _: &mut Trace, _: &mut Traced) -> anyhow::Result<()> {
            panic!("disk full");
        }
    }
    let mut engine = traced();
    engine.attach(Named);
    let error = engine.run(&mut vec![], vec![1, 2], Until::epochs(2));
    assert_eq!(
        chain(error),
        "handler 'saver' of EPOCH_COMPLETED failed at iteration 2 (epoch 1): panicked: disk full"
    );
    let mut engine = traced();
    let line = line!() + 1;
    engine.on(Event::IterationStarted.once(2), |_, _| anyhow::bail!("too hot"));
    let error = engine.run(&mut vec![], vec![1, 2], Until::epochs(2)).unwrap_err();
    let place = format!("at {}:{line}", file!());
    assert_eq!(
        error.to_string(),
        format!("handler {place} of ITERATION_STARTED failed at iteration 2 (epoch 1): too hot")
    );
    assert!(
        matches!(&error, Error::Handler { event: Event::IterationStarted, handler, .. } if *handler == place)
    );
}

#[test]
fn failing_data_is_named_with_epoch_and_the_iteration_to_come() {
    for (panics, cause) in
        [(false, "reading: the disk is full"), (true, "panicked: the disk is gone")]
    {
        let fails_at = Cell::new(Some(2));
        let mut engine = plain();
        let mut seen = vec![];
        let data = || source(Failing { len: 4, next: 0, fails_at: &fails_at, panics });
        let error = engine.run(&mut seen, data(), Until::epochs(2));
        assert_eq!(chain(error), format!("no batch for iteration 3 (epoch 1): {cause}"));
        engine.run(&mut seen, data(), Until::epochs(2)).unwrap();
        assert_eq!(seen, [0, 1, 2, 3, 0, 1, 2, 3], "the next run tries again");
    }
}

#[test]
fn exception_handlers_see_the_error_that_run_returns() -> Result<()> {
    let mut engine = traced();
    let seen = Rc::new(RefCell::new(vec![]));
    for _ in 0..2 {
        let seen = seen.clone();
        engine.on(Event::ExceptionRaised, move |_, engine| {
            seen.borrow_mut().push(engine.exception().map(ToString::to_string));
            Ok(())
        });
    }
    engine.on(Event::GetBatchCompleted.once(1), |_, _| anyhow::bail!("no"));
    let mut trace = vec![];
    let error = engine.run(&mut trace, vec![5, 6], Until::epochs(1)).unwrap_err();
    assert_eq!(*seen.borrow(), [Some(error.to_string()), Some(error.to_string())]);
    assert_eq!(trace.last().unwrap(), "EXCEPTION_RAISED at 1/1");
    assert!(engine.exception().is_none(), "only for the handlers");
    Ok(())
}

#[test]
fn an_error_of_an_exception_handler_is_told_beside_the_first() {
    let mut engine = plain();
    engine.on(Event::IterationCompleted, |_, _| Err(std::io::Error::other("the first").into()));
    engine.on(Event::ExceptionRaised, |_, _| anyhow::bail!("the second"));
    let error = engine.run(&mut vec![], vec![1], Until::epochs(1)).unwrap_err();
    let Error::Handler { event: Event::IterationCompleted, source, .. } = &error else {
        panic!("{error:?}")
    };
    assert!(source.is::<std::io::Error>(), "the cause can still be looked at");
    let all = format!("{source:#}");
    assert!(all.ends_with("the first") && all.contains("of EXCEPTION_RAISED failed"), "{all}");
}

#[test]
fn nested_errors_keep_the_whole_chain() {
    const INNER: Event = Event::custom("inner");
    let mut engine = plain();
    engine.register_events([INNER]).unwrap();
    engine.on(Event::EpochStarted, |cx, engine| Ok(engine.fire_event(INNER, cx)?));
    engine.on(INNER, |_, _| anyhow::bail!("deep down"));
    let all = chain(engine.run(&mut vec![], vec![1], Until::epochs(1)));
    let at = |event| format!("of {event} failed at iteration 0 (epoch 1): ");
    assert!(all.contains(&at("EPOCH_STARTED")) && all.contains(&at("inner")), "{all}");
    assert!(all.ends_with("deep down"), "{all}");
}

#[test]
fn after_an_error_at_any_event_the_rest_of_the_run_follows() {
    let until = || Until::epochs(3).epoch_length(2);
    let mut all = vec![];
    traced().run(&mut all, vec![0, 1, 2], until()).unwrap();
    let is = |entry: &str, event: Event| entry.starts_with(&format!("{event} at"));
    for fails_at in 0..all.len() {
        let failed = Rc::new(Cell::new(false));
        let mut engine = traced();
        for event in STOPPABLE.into_iter().chain([Event::Completed]) {
            let failed = failed.clone();
            engine.on(event, move |trace: &mut Trace, _| {
                anyhow::ensure!(trace.len() != fails_at + 1 || failed.replace(true), "once");
                Ok(())
            });
        }
        let mut trace = vec![];
        let failed = engine.run(&mut trace, vec![0, 1, 2], until()).is_err();
        assert_eq!(failed, !all[fails_at].starts_with("step"), "{}", all[fails_at]);
        if !failed {
            continue;
        }
        assert_eq!(trace[..=fails_at], all[..=fails_at]);
        assert!(is(&trace[fails_at + 1], Event::ExceptionRaised), "{trace:?}");
        let rest = trace.len();
        engine.run(&mut trace, vec![0, 1, 2], until()).unwrap();

        let last = |event| all[..=fails_at].iter().rposition(|entry| is(entry, event)).unwrap();
        let at = &all[fails_at];
        let repeated = [Event::Started, Event::EpochStarted, Event::Completed];
        let goes_on = if repeated.into_iter().any(|event| is(at, event)) {
            fails_at
        } else if at.starts_with("GET_BATCH") || at.starts_with("DATALOADER") {
            last(Event::GetBatchStarted)
        } else if is(at, Event::IterationStarted) {
            // The step of the failed iteration and its ITERATION_COMPLETED are left out.
            fails_at + 3
        } else {
            fails_at + 1
        };
        let mut expected = all[goes_on..].to_vec();
        if is(at, Event::GetBatchCompleted) {
            // The data was restarted before the error, so that is not repeated.
            expected.retain({
                let mut index = goes_on;
                move |entry| {
                    index += 1;
                    index > fails_at || !is(entry, Event::DataloaderStopIteration)
                }
            });
        }
        assert_eq!(trace[rest..], expected, "after {at}");
        // The run after that one starts anew.
        let mut anew = vec![];
        engine.run(&mut anew, vec![0, 1, 2], until()).unwrap();
        assert!(is(&anew[0], Event::Started) && anew.last() == all.last(), "{anew:?}");
    }
}

#[test]
fn after_an_error_a_shuffled_loader_gives_what_an_uninterrupted_run_would_see() {
    for epoch_length in [3, 4, 6] {
        let until = || Until::epochs(3).epoch_length(epoch_length);
        let data = loader(11, 3);
        let mut all = vec![];
        sampled().run(&mut all, &data, until()).unwrap();
        for fails_at in 1..3 * epoch_length {
            for event in [Event::IterationStarted, Event::IterationCompleted] {
                let mut engine = sampled();
                engine.on(event.once(fails_at), |_, _| anyhow::bail!("once"));
                let mut seen = vec![];
                assert!(engine.run(&mut seen, &data, until()).is_err());
                let summary = engine.run(&mut seen, &data, until()).unwrap();
                let mut expected = all.clone();
                if event == Event::IterationStarted {
                    expected.remove(fails_at as usize - 1);
                }
                assert_eq!(seen, expected, "{event} {fails_at} of {epoch_length}");
                assert_eq!((summary.epochs, summary.iterations), (3, 3 * epoch_length));
            }
        }
    }
}

#[test]
fn after_an_error_runs_by_time_or_samples_go_on_too() {
    for until in [Until::time(Duration::from_secs(1000)), Until::samples(30)] {
        let mut engine = sampled();
        engine.on(Event::IterationCompleted.once(4), |_, _| anyhow::bail!("once"));
        engine.on(Event::IterationCompleted.once(9), |_, engine| {
            engine.terminate();
            Ok(())
        });
        let mut seen = vec![];
        assert!(engine.run(&mut seen, loader(9, 3), until).is_err());
        let summary = engine.run(&mut seen, loader(9, 3), until).unwrap();
        assert_eq!((summary.iterations, seen.len()), (9, 9), "{until:?}");
        let mut all = vec![];
        sampled().run(&mut all, loader(9, 3), Until::epochs(3)).unwrap();
        assert_eq!(seen, all);
    }
}

#[test]
fn a_limit_that_was_reached_leaves_something_to_go_on_with() -> Result<()> {
    let mut engine = sampled();
    let mut seen = vec![];
    for (epochs, iterations) in [(2, 4), (4, 8)] {
        let summary = engine.run(&mut seen, loader(9, 3), Until::samples(12))?;
        assert_eq!((summary.epochs, summary.iterations), (epochs, iterations));
    }
    engine.reset()?;
    assert_eq!(engine.run(&mut seen, loader(9, 3), Until::samples(12))?.iterations, 4);
    assert_eq!(seen[8..], seen[..4], "and so do the passes");
    Ok(())
}

#[test]
fn after_an_error_epochs_of_any_length_count() -> Result<()> {
    let mut engine = plain();
    engine.on(Event::EpochStarted, |_, engine| {
        engine.state.epoch_length = Some(if engine.state.epoch == 2 { 6 } else { 2 });
        Ok(())
    });
    engine.on(Event::IterationCompleted.once(7), |_, _| anyhow::bail!("once"));
    let until = Until::epochs(3);
    assert!(engine.run(&mut vec![], vec![0, 1], until).is_err());
    let summary = engine.run(&mut vec![], vec![0, 1], until)?;
    assert_eq!((summary.epochs, summary.iterations), (3, 10));
    Ok(())
}

#[test]
fn every_exception_handler_is_called() {
    let mut engine = plain();
    let called = Rc::new(Cell::new(0));
    for _ in 0..3 {
        let called = called.clone();
        engine.on(Event::ExceptionRaised, move |_, _| {
            called.set(called.get() + 1);
            anyhow::bail!("number {}", called.get())
        });
    }
    engine.on(Event::Started, |_, _| anyhow::bail!("the first"));
    let all = chain(engine.run(&mut vec![], vec![1], Until::epochs(1)));
    assert_eq!(called.get(), 3);
    assert!(all.ends_with("the first") && all.contains("number 1"), "{all}");
}

#[test]
fn a_filter_that_panics_is_an_error_that_names_its_handler() {
    let mut engine = plain();
    let id = engine
        .add_event_handler(
            Event::IterationStarted.filter(|n| if n == 2 { panic!("no {n}") } else { true }),
            |_, _| Ok(()),
        )
        .unwrap();
    let all = chain(engine.run(&mut vec![], vec![0, 1, 2], Until::epochs(1)));
    assert!(all.starts_with("handler at ") && all.ends_with("panicked: no 2"), "{all}");
    assert!(
        all.contains("of ITERATION_STARTED failed at iteration 2 (epoch 1): its filter failed")
    );
    let mut seen = vec![];
    engine.run(&mut seen, vec![0, 1, 2], Until::epochs(1)).unwrap();
    assert_eq!(seen, [2]);
    engine.remove_event_handler(id).unwrap();
    assert!(!engine.has_event_handler(id));
}

#[test]
fn the_position_cannot_be_changed_within_a_run() {
    let mut engine = plain();
    engine.on(Event::EpochStarted, |_, engine| {
        let state = engine.state_dict();
        Ok(engine.load_state_dict(&state)?)
    });
    let all = chain(engine.run(&mut vec![], vec![1], Until::epochs(1)));
    assert!(
        all.ends_with("load_state_dict() was called within a run: call it before run()"),
        "{all}"
    );
    let mut engine = plain();
    engine.on(Event::EpochStarted, |_, engine| Ok(engine.reset()?));
    let all = chain(engine.run(&mut vec![], vec![1], Until::epochs(1)));
    assert!(all.contains("reset() was called within a run"), "{all}");
}

#[test]
fn a_run_within_a_run_of_the_same_engine_is_an_error() {
    let mut engine = plain();
    engine.on(Event::EpochStarted, |cx, engine| {
        engine.run(cx, vec![1], Until::epochs(1))?;
        Ok(())
    });
    let all = chain(engine.run(&mut vec![], vec![1], Until::epochs(1)));
    assert!(all.contains("the engine is running already: its step"), "{all}");
    let mut engine: Engine<(), i64, ()> = Engine::new(|cx, engine: &mut Engine<(), i64, ()>, _| {
        engine.run(cx, vec![1], Until::epochs(1))?;
        Ok(())
    });
    for _ in 0..2 {
        let all = chain(engine.run(&mut (), vec![1, 2], Until::epochs(1)));
        assert!(all.contains("failed: the engine is running already: its step"), "{all}");
    }
}

#[test]
fn a_batch_taken_away_is_an_error_of_the_step() {
    let mut engine = plain();
    engine.on(Event::IterationStarted, |_, engine| {
        engine.state.batch = None;
        Ok(())
    });
    let all = chain(engine.run(&mut vec![], vec![1], Until::epochs(1)));
    assert!(all.ends_with("a handler took the batch away before the step"), "{all}");
}

#[test]
fn refused_registrations_come_out_of_every_run() {
    const OWN: Event = Event::custom("own");
    let cases: [(Events, &str); 7] = [
        (
            OWN.into(),
            "Event own is not a valid event for this Engine. Register it with register_events; registered are: other",
        ),
        (
            Event::IterationStarted.every(0).into(),
            "Argument every should be integer and greater than zero, but 0 was given",
        ),
        (
            Event::EpochStarted.once(0).into(),
            "Argument once should either be a positive integer or a list of positive integers, got [0]",
        ),
        (
            Event::EpochStarted.once_at([]).into(),
            "Argument once should either be a positive integer or a list of positive integers, got []",
        ),
        (
            Event::EpochStarted.every(2).once_at([1]).into(),
            "Only one of the input arguments should be specified, except before, after and every",
        ),
        (
            Event::Terminate.every(2).into(),
            "TERMINATE has no number that a filter could compare with: register the handler without a filter",
        ),
        (Events::from_iter([]), "names no event to be called at"),
    ];
    for (events, expected) in cases {
        let mut engine = plain();
        engine.register_events([Event::custom("other")]).unwrap();
        let direct = text(engine.add_event_handler(events.clone(), |_, _| Ok(())));
        assert!(direct.contains(expected), "{direct}");
        engine.on(events, |_, _| Ok(())).on(OWN.every(0), |_, _| Ok(()));
        let mut seen = vec![];
        for _ in 0..2 {
            let refused = text(engine.run(&mut seen, vec![1], Until::epochs(1)));
            assert!(refused.contains(expected), "{refused}");
        }
        assert!(seen.is_empty());
    }
    let refused = text(plain().register_events([Event::Started]));
    assert!(refused.starts_with("STARTED is there already: register"), "{refused}");
}

// These tests are about budgets.

#[test]
fn iterations_in_mid_epoch_leave_it_with_terminate() -> Result<()> {
    let mut trace = vec![];
    let mut engine = traced();
    let summary = engine.run(&mut trace, vec![0, 1, 2], Until::iterations(5))?;
    assert_eq!((summary.stop, summary.epochs, summary.iterations), (Stop::Terminated, 2, 5));
    assert!(short(&trace).ends_with("ITERATION_COMPLETED TERMINATE COMPLETED"));
    trace.clear();
    let summary = traced().run(&mut trace, vec![0, 1, 2], Until::iterations(6))?;
    assert_eq!((summary.stop, summary.epochs, summary.iterations), (Stop::Completed, 2, 6));
    assert!(short(&trace).ends_with("ITERATION_COMPLETED EPOCH_COMPLETED COMPLETED"));
    Ok(())
}

#[test]
fn a_larger_budget_goes_on_the_same_starts_anew_a_smaller_is_an_error() -> Result<()> {
    let mut engine = plain();
    let mut run = |until| {
        let mut seen = vec![];
        let summary = engine.run(&mut seen, vec![0, 1], until)?;
        Ok::<_, Error>((seen.len(), summary.epochs, summary.iterations))
    };
    assert_eq!(run(Until::default())?, (2, 1, 2), "one epoch without a budget");
    assert_eq!(run(Until::epochs(3))?, (4, 3, 6));
    assert_eq!(run(Until::epochs(3))?, (6, 3, 6));
    let error = text(run(Until::epochs(2)));
    assert!(error.contains("max_epochs should be greater than or equal to the start epoch defined in the state: 2 vs 3"), "{error}");
    let error = text(run(Until::iterations(9)));
    assert!(error.contains("To switch from max_epochs to max_iters mode"), "{error}");
    engine.state.max_epochs = None;
    let summary = engine.run(&mut vec![], vec![0, 1], Until::iterations(3))?;
    assert_eq!((summary.stop, summary.iterations), (Stop::Terminated, 3));
    Ok(())
}

#[test]
fn a_budget_in_samples_is_rounded_up_to_whole_batches() -> Result<()> {
    for (budget, iterations, samples, epochs, stop) in [
        (1, 1, 4, 1, Stop::Terminated),
        (4, 1, 4, 1, Stop::Terminated),
        (5, 2, 8, 1, Stop::Terminated),
        (10, 3, 10, 1, Stop::Completed),
        (11, 4, 14, 2, Stop::Terminated),
        (25, 8, 28, 3, Stop::Terminated),
    ] {
        let mut engine = sampled();
        let summary = engine.run(&mut vec![], loader(10, 4), Until::samples(budget))?;
        assert_eq!((summary.iterations, engine.state.samples), (iterations, samples), "{budget}");
        assert_eq!((summary.epochs, summary.stop), (epochs, stop), "{budget}");
        engine.run(&mut vec![], loader(10, 4), Until::samples(budget))?;
        assert_eq!(engine.state.samples, samples, "each call of `run` has its own");
    }
    let mut engine = sampled();
    let summary = engine.run(&mut vec![], loader(10, 4), Until::epochs(1).or_samples(1000))?;
    assert_eq!((summary.iterations, summary.stop), (3, Stop::Completed));
    Ok(())
}

#[test]
fn a_budget_in_samples_needs_data_that_counts_them() {
    for until in [Until::samples(3), Until::epochs(1).or_samples(3)] {
        let error = text(plain().run(&mut vec![], vec![1, 2], until));
        assert_eq!(
            error,
            "a budget in samples needs a data source that counts them: implement Source::samples"
        );
    }
}

#[test]
fn a_budget_in_time_ends_after_the_iteration_under_way() -> Result<()> {
    let mut engine = traced();
    let mut trace = vec![];
    let summary = engine.run(&mut trace, vec![1], Until::time(Duration::ZERO))?;
    assert_eq!(
        (summary.stop, summary.iterations, short(&trace).as_str()),
        (Stop::Completed, 0, "STARTED COMPLETED")
    );
    let mut engine = plain();
    engine.on(Event::IterationStarted.once(1), |_, _| {
        std::thread::sleep(Duration::from_millis(300));
        Ok(())
    });
    let limit = Duration::from_millis(250);
    let summary = engine.run(&mut vec![], vec![1, 2, 3], Until::time(limit))?;
    assert_eq!((summary.stop, summary.iterations), (Stop::Terminated, 1));
    assert!(summary.elapsed >= limit && engine.state.run_time >= limit);
    let mut endless: Engine<u64, (), ()> = Engine::new(|steps: &mut u64, _, ()| {
        *steps += 1;
        Ok(())
    });
    let mut steps = 0;
    let until = Until::epochs(u64::MAX).or_time(Duration::from_millis(20));
    let summary = endless.run(&mut steps, vec![(); 3], until)?;
    assert!(steps > 3 && summary.iterations == steps && summary.elapsed < Duration::from_secs(5));
    plain().run(&mut vec![], vec![1], Until::epochs(1).or_time(Duration::MAX))?;
    Ok(())
}

#[test]
fn budgets_that_make_no_sense_are_errors() {
    for (until, expected) in [
        (Until::epochs(0), "Argument max_epochs is invalid"),
        (Until::iterations(0), "Argument max_iters is invalid"),
        (Until::samples(0), "Argument max_samples is invalid"),
        (Until::epochs(1).or_iterations(1), "mutually exclusive"),
        (Until::epochs(1).epoch_length(0), "zero size"),
    ] {
        let error = text(plain().run(&mut vec![], vec![1], until));
        assert!(error.contains(expected), "{error}");
    }
    let error = text(plain().run(&mut vec![], Vec::<i64>::new(), Until::epochs(1)));
    assert_eq!(error, "Input data has zero size. Please provide non-empty data");
    let error = text(plain().run(&mut vec![], restartable(|| 0..0), Until::epochs(1)));
    assert!(error.contains("zero size"), "{error}");
    let error = text(plain().run(&mut vec![], no_data(), Until::epochs(1)));
    assert!(error.starts_with("epoch_length should be provided if data is None"), "{error}");
    assert!(error.contains("Until::epochs(3).epoch_length(100)"), "{error}");
}

// These tests are about leaving early.

#[test]
fn interrupting_anywhere_and_going_on_equals_an_uninterrupted_run() -> Result<()> {
    let data = || vec![0, 1, 2];
    // An epoch has 4 iterations and the data 3 batches, so the data is exhausted in mid epoch.
    let until = || Until::epochs(2).epoch_length(4);
    let mut uninterrupted = vec![];
    traced().run(&mut uninterrupted, data(), until())?;
    let every = STOPPABLE.iter().map(|event| (*event).into()).collect::<Events>();
    for events in STOPPABLE.into_iter().map(Events::from).chain([every]) {
        let mut engine = traced();
        engine.on(events.clone(), |_, engine| {
            engine.interrupt();
            Ok(())
        });
        let (mut trace, mut runs) = (vec![], 1);
        // A call with other data and no budget goes on with the data and the budget of the suspended run.
        let mut stop = engine.run(&mut trace, data(), until())?.stop;
        while stop == Stop::Interrupted {
            assert!(trace.pop().unwrap().starts_with("INTERRUPT"));
            runs += 1;
            stop = engine.run(&mut trace, vec![9], Until::default())?.stop;
        }
        assert_eq!(trace, uninterrupted, "{events:?}");
        assert!(runs > 1, "{events:?}");
    }
    Ok(())
}

#[test]
fn interrupting_shows_in_the_state_and_the_next_budget_may_be_larger() -> Result<()> {
    let mut engine = plain();
    engine.on(Event::IterationCompleted.once(3), |_, engine| {
        engine.interrupt();
        Ok(())
    });
    let mut seen = vec![];
    let summary = engine.run(&mut seen, vec![0, 1], Until::epochs(2))?;
    assert_eq!((summary.stop, summary.epochs, summary.iterations), (Stop::Interrupted, 2, 3));
    assert!(summary.to_string().starts_with("interrupted after 3 iterations in 2 epochs; "));
    let summary = engine.run(&mut seen, vec![0, 1], Until::epochs(3))?;
    assert_eq!((summary.stop, summary.iterations), (Stop::Completed, 6));
    assert_eq!(seen, [0, 1, 0, 1, 0, 1]);
    Ok(())
}

#[test]
fn terminate_at_any_event_ends_the_run_after_its_handlers() -> Result<()> {
    for event in STOPPABLE {
        for skip in [false, true] {
            let mut engine = traced();
            let mut first = true;
            engine.on(event, move |_, engine| {
                match std::mem::take(&mut first) {
                    true if skip => engine.terminate_skip_completed(),
                    true => engine.terminate(),
                    false => {}
                }
                Ok(())
            });
            engine.on(event, |trace, _| {
                trace.push("later handler".into());
                Ok(())
            });
            let mut trace = vec![];
            let until = || Until::epochs(2).epoch_length(4);
            let summary = engine.run(&mut trace, vec![0, 1, 2], until())?;
            let end = if skip { "TERMINATE" } else { "TERMINATE COMPLETED" };
            let trace = short(&trace);
            assert!(trace.ends_with(&format!("{event} later handler {end}")), "{trace}");
            assert_eq!(summary.stop, Stop::Terminated);
        }
    }
    for event in [Event::Terminate, Event::Completed, Event::Interrupt, Event::ExceptionRaised] {
        let mut engine = plain();
        engine.on(event, |_, engine| {
            engine.terminate();
            engine.terminate_epoch();
            Ok(())
        });
        let summary = engine.run(&mut vec![], vec![0, 1], Until::epochs(2))?;
        assert_eq!((summary.stop, summary.iterations), (Stop::Completed, 4), "{event}");
    }
    Ok(())
}

#[test]
fn after_terminate_the_broken_epoch_counts_as_done_and_the_data_restarts() -> Result<()> {
    let mut engine = plain();
    engine.on(Event::IterationCompleted.once(2), |_, engine| {
        engine.terminate();
        Ok(())
    });
    let mut seen = vec![];
    engine.run(&mut seen, vec![0, 1, 2], Until::epochs(3))?;
    let summary = engine.run(&mut seen, vec![0, 1, 2], Until::epochs(3))?;
    assert_eq!(seen, [0, 1, 0, 1, 2, 0, 1, 2]);
    assert_eq!((summary.epochs, summary.iterations), (3, 8));
    Ok(())
}

#[test]
fn terminate_epoch_at_any_event_leaves_the_epoch_and_restarts_the_data() {
    for event in STOPPABLE {
        for skip in [false, true] {
            let mut engine = traced();
            let mut first = true;
            engine.on(event, move |_, engine| {
                match std::mem::take(&mut first) {
                    true if skip => engine.terminate_epoch_skip_completed(),
                    true => engine.terminate_epoch(),
                    false => {}
                }
                Ok(())
            });
            let mut trace = vec![];
            let result = engine.run(&mut trace, vec![0, 1, 2], Until::epochs(2).epoch_length(5));
            let trace = short(&trace);
            let ended = if skip { "" } else { "EPOCH_COMPLETED " };
            match event {
                Event::Started | Event::EpochStarted => {
                    assert!(
                        text(result).contains(
                            "should not be called on Event.STARTED or Event.EPOCH_STARTED"
                        )
                    );
                }
                Event::EpochCompleted => {
                    assert!(result.is_ok() && !trace.contains("TERMINATE"), "{trace}");
                }
                _ => {
                    let expected = format!(
                        "{event} TERMINATE_SINGLE_EPOCH {ended}EPOCH_STARTED GET_BATCH_STARTED GET_BATCH_COMPLETED ITERATION_STARTED 0"
                    );
                    assert!(trace.contains(&expected), "{trace}");
                    assert_eq!(result.unwrap().stop, Stop::Completed);
                }
            }
        }
    }
}

#[test]
fn terminate_holds_in_the_handlers_of_leaving_and_interrupting() -> Result<()> {
    for (leave, event) in [
        (Traced::terminate_epoch as fn(&mut Traced<'static>), Event::TerminateSingleEpoch),
        (Traced::interrupt, Event::Interrupt),
    ] {
        let mut engine = traced();
        engine.on(Event::IterationCompleted.once(2), move |_, engine| {
            leave(engine);
            Ok(())
        });
        engine.on(event, |_, engine| {
            engine.terminate();
            Ok(())
        });
        let mut trace = vec![];
        let summary = engine.run(&mut trace, vec![0, 1, 2], Until::epochs(2))?;
        assert_eq!(summary.stop, Stop::Terminated);
        let all = short(&trace);
        assert!(
            all.ends_with(&format!("ITERATION_COMPLETED {event} TERMINATE COMPLETED")),
            "{all}"
        );
    }
    Ok(())
}

#[test]
fn an_epoch_left_without_its_end_does_not_change_the_next() -> Result<()> {
    let mut engine = traced();
    engine.on(Event::IterationCompleted, |_, engine| {
        match engine.state.iteration {
            1 => engine.terminate_epoch_skip_completed(),
            2 => engine.terminate_epoch(),
            _ => {}
        }
        Ok(())
    });
    let mut trace = vec![];
    engine.run(&mut trace, vec![0, 1], Until::epochs(3))?;
    let ends: Vec<_> = trace.iter().filter(|line| line.starts_with("EPOCH_COMPLETED")).collect();
    assert_eq!(ends, ["EPOCH_COMPLETED at 2/2", "EPOCH_COMPLETED at 3/4"]);
    Ok(())
}

// These tests are about saved positions.

#[test]
fn a_loaded_position_sees_the_batches_of_an_uninterrupted_run() -> Result<()> {
    for drop_last in [false, true] {
        let data = loader(11, 3).drop_last(drop_last);
        for until in [
            Until::epochs(3),
            Until::epochs(4).epoch_length(2),
            Until::epochs(2).epoch_length(6),
            Until::iterations(10),
            Until::iterations(9).epoch_length(2),
        ] {
            let mut all = vec![];
            sampled().run(&mut all, &data, until)?;
            for saved_at in 1..all.len() {
                let mut engine = sampled();
                engine.on(Event::IterationCompleted.once(saved_at as u64), |_, engine| {
                    engine.terminate();
                    Ok(())
                });
                engine.run(&mut vec![], &data, until)?;
                let saved = serde_json::to_string(&engine.state_dict()).unwrap();
                let mut engine = sampled();
                engine.load_state_dict(&serde_json::from_str(&saved).unwrap())?;
                let mut seen = vec![];
                let summary = engine.run(&mut seen, &data, Until::default())?;
                assert_eq!(seen, all[saved_at..], "{until:?} from {saved_at}");
                assert_eq!(summary.iterations, all.len() as u64);
            }
        }
    }
    Ok(())
}

#[test]
fn a_loaded_position_in_data_of_unknown_length_counts_its_batches() -> Result<()> {
    for epoch_length in [2, 3, 5] {
        let until = Until::epochs(4).epoch_length(epoch_length);
        let mut all = vec![];
        plain().run(&mut all, restartable(|| 0..3), until)?;
        for iteration in 0..4 * epoch_length {
            let mut engine = plain();
            engine.load_state_dict(&map(json!({
                "epoch_length": epoch_length, "iteration": iteration, "max_epochs": 4
            })))?;
            let mut rest = vec![];
            engine.run(&mut rest, restartable(|| 0..3), Until::default())?;
            assert_eq!(rest, all[iteration as usize..], "{iteration} of {epoch_length}");
        }
    }
    Ok(())
}

#[test]
fn loading_a_position_fires_the_events_of_the_rest() -> Result<()> {
    let mut engine = traced();
    engine.load_state_dict(&map(json!({"iteration": 4, "epoch_length": 3, "max_epochs": 2})))?;
    let mut trace = vec![];
    engine.run(&mut trace, vec![0, 1, 2], Until::default())?;
    assert_eq!(trace[..2], ["STARTED at 1/4", "EPOCH_STARTED at 2/4"]);
    assert_eq!(trace.iter().filter(|line| line.starts_with("step")).count(), 2);
    assert_eq!(trace[trace.len() - 2..], ["EPOCH_COMPLETED at 2/6", "COMPLETED at 2/6"]);
    assert_eq!(engine.iteration_in_epoch(), 3);
    assert_eq!(
        engine.state_dict(),
        map(json!({"epoch_length": 3, "iteration": 6, "max_epochs": 2}))
    );
    Ok(())
}

#[test]
fn positions_that_do_not_fit_are_refused_and_change_nothing() -> Result<()> {
    let mut engine = plain();
    engine.load_state_dict(&map(json!({"iteration": 4, "epoch_length": 3, "max_iters": 7})))?;
    let before = engine.state_dict();
    for (state, expected) in [
        (json!({}), "'iteration' is absent"),
        (
            json!({"iteration": 1, "epoch": 1, "epoch_length": 1, "max_epochs": 2}),
            "only one of 'iteration' or 'epoch'",
        ),
        (
            json!({"iteration": 1, "epoch_length": 1}),
            "exactly one of '('max_epochs', 'max_iters')'",
        ),
        (
            json!({"iteration": 1, "epoch_length": 1, "max_epochs": 1, "max_iters": 1}),
            "exactly one of",
        ),
        (json!({"iteration": "1", "epoch_length": 1, "max_epochs": 1}), "not \"1\""),
        (json!({"iteration": -1, "epoch_length": 1, "max_epochs": 1}), "not -1"),
        (
            json!({"iteration": 1, "epoch_length": null, "max_epochs": 1}),
            "epoch_length must be a positive integer",
        ),
        (json!({"epoch": 3, "epoch_length": 5, "max_epochs": 2}), "2 vs 3"),
        (json!({"iteration": 9, "epoch_length": 5, "max_iters": 8}), "8 vs 9"),
    ] {
        let error = text(engine.load_state_dict(&map(state)));
        assert!(error.contains(expected), "{error}");
        assert_eq!(engine.state_dict(), before);
    }
    let error = text(engine.run(&mut vec![], vec![0], Until::default().epoch_length(4)));
    assert_eq!(error, "Argument epoch_length should be same as in the state, given 4 vs 3");
    Ok(())
}

// These tests are about data.

#[test]
fn data_goes_on_over_epochs_of_another_length() -> Result<()> {
    for (epoch_length, expected) in [(2, vec![0, 1, 2, 0]), (5, vec![0, 1, 2, 0, 1, 2, 0, 1, 2, 0])]
    {
        let mut seen = vec![];
        plain().run(&mut seen, vec![0, 1, 2], Until::epochs(2).epoch_length(epoch_length))?;
        assert_eq!(seen, expected);
        let mut seen = vec![];
        plain().run(
            &mut seen,
            restartable(|| 0..3),
            Until::epochs(2).epoch_length(epoch_length),
        )?;
        assert_eq!(seen, expected);
    }
    Ok(())
}

#[test]
fn data_of_unknown_length_sets_the_epoch_length_in_its_first_pass() -> Result<()> {
    let mut engine = plain();
    let mut seen = vec![];
    let summary = engine.run(&mut seen, restartable(|| 0..3), Until::epochs(2))?;
    assert_eq!((seen.len(), summary.epochs, engine.state.epoch_length), (6, 2, Some(3)));
    Ok(())
}

#[test]
fn a_stream_that_runs_dry_is_told_in_the_summary() -> Result<()> {
    let mut seen = vec![];
    let summary = plain().run(&mut seen, one_shot(0..3), Until::epochs(3).epoch_length(2))?;
    assert_eq!((seen.len(), summary.stop, summary.warnings.len()), (3, Stop::Completed, 1));
    let warning = "Data iterator can not provide data anymore but required total number of iterations to run is not reached. Current iteration: 3 vs Total iterations to run : 6";
    assert_eq!(summary.warnings[0], warning);
    assert!(summary.to_string().ends_with(&format!("\nwarning: {warning}")));
    let mut seen = vec![];
    let summary = plain().run(&mut seen, one_shot(7..), Until::iterations(5).epoch_length(3))?;
    assert_eq!((seen, summary.warnings.len()), (vec![7, 8, 9, 10, 11], 0));
    Ok(())
}

#[test]
fn without_data_the_step_gets_defaults_and_no_batch_events_are_fired() -> Result<()> {
    let mut trace = vec![];
    traced().run(&mut trace, no_data(), Until::epochs(2).epoch_length(1))?;
    let epoch = "EPOCH_STARTED ITERATION_STARTED 0 ITERATION_COMPLETED EPOCH_COMPLETED";
    assert_eq!(short(&trace), format!("STARTED {epoch} {epoch} COMPLETED"));
    Ok(())
}

#[test]
fn data_replaced_within_a_run_is_used_from_the_next_fetch_on() -> Result<()> {
    let mut engine = plain();
    engine.on(Event::IterationCompleted.once(2), |_, engine| Ok(engine.set_data(vec![7, 8])?));
    let mut seen = vec![];
    engine.run(&mut seen, vec![0, 1, 2], Until::epochs(2))?;
    assert_eq!(seen, [0, 1, 7, 8, 7, 8]);
    Ok(())
}

#[test]
fn handlers_may_replace_batch_and_output() -> Result<()> {
    let mut engine = plain();
    engine.on(Event::GetBatchCompleted, |_, engine| {
        engine.state.batch = engine.state.batch.map(|batch| batch + 10);
        Ok(())
    });
    engine.on(Event::IterationCompleted, |_, engine| {
        engine.state.output = Some(0.5);
        Ok(())
    });
    engine.metric("mean", Mean::new());
    let mut seen = vec![];
    engine.run(&mut seen, vec![1, 2], Until::epochs(1))?;
    assert_eq!((seen, engine.state.metrics.get("mean")?), (vec![11, 12], 0.5));
    Ok(())
}

// These tests are about handlers.

#[test]
fn filters_compare_with_iteration_epoch_or_firing() -> Result<()> {
    let even = |n| n % 2 == 0;
    let cases: Vec<(Events, Vec<u64>)> = vec![
        (Event::IterationStarted.every(4).into(), vec![4, 8]),
        (Event::IterationCompleted.once(3).into(), vec![3]),
        (Event::IterationStarted.once_at([2, 9, 90]).into(), vec![2, 9]),
        (Event::IterationStarted.before(3).into(), vec![1, 2]),
        (Event::IterationStarted.after(7).into(), vec![8, 9]),
        (Event::IterationStarted.after(2).before(5).into(), vec![3, 4]),
        (Event::IterationStarted.after(2).every(3).into(), vec![3, 6, 9]),
        (Event::IterationStarted.before(6).every(2).into(), vec![1, 3, 5]),
        (Event::IterationStarted.filter(even).into(), vec![2, 4, 6, 8]),
        (Event::GetBatchStarted.once_at([1]).into(), vec![1]),
        (Event::IterationStarted.once(9) | Event::IterationStarted.every(9), vec![9, 9]),
    ];
    for (events, expected) in cases {
        let mut numbers = vec![];
        let mut engine = plain();
        engine.on(events.clone(), |_, engine| {
            numbers.push(engine.state.iteration);
            Ok(())
        });
        engine.run(&mut vec![], vec![0, 1, 2], Until::epochs(3))?;
        drop(engine);
        assert_eq!(numbers, expected, "{events:?}");
    }
    let mut epochs = vec![];
    let mut engine = plain();
    let events =
        Event::EpochStarted.every(2) | Event::EpochCompleted.once(1) | Event::Completed.after(2);
    engine.on(events, |_, engine| {
        epochs.push(engine.state.epoch);
        Ok(())
    });
    engine.run(&mut vec![], vec![0], Until::epochs(3))?;
    drop(engine);
    assert_eq!(epochs, [1, 2, 3]);
    Ok(())
}

#[test]
fn registrations_can_be_chained_and_handlers_run_in_order() -> Result<()> {
    let log = RefCell::new(String::new());
    let mut engine = plain();
    let write = |letter: char| {
        let log = &log;
        move |_: &mut Vec<i64>, _: &mut Engine<'_, Vec<i64>, i64, f64>| {
            log.borrow_mut().push(letter);
            Ok(())
        }
    };
    engine
        .on(Event::Completed, write('c'))
        .on(Event::Started | Event::Completed, write('a'))
        .metric("mean", Mean::new())
        .on(Event::Started, write('b'));
    engine.run(&mut vec![], vec![0], Until::epochs(1))?;
    assert_eq!(*log.borrow(), "abca");
    Ok(())
}

#[test]
fn handlers_can_be_removed_also_within_their_own_call() -> Result<()> {
    let mut engine = plain();
    let own = Rc::new(Cell::new(None));
    let id = own.clone();
    let itself = engine.add_event_handler(Event::IterationStarted, move |seen, engine| {
        seen.push(-1);
        id.get().map_or(Ok(()), |id| engine.remove_event_handler(id)).map_err(Into::into)
    })?;
    own.set(Some(itself));
    let late = engine.add_event_handler(Event::EpochCompleted | Event::Started, |seen, _| {
        seen.push(-2);
        Ok(())
    })?;
    engine.on(Event::IterationCompleted.once(2), move |_, engine| {
        assert!(engine.has_event_handler(late));
        engine.remove_event_handler(late)?;
        assert!(!engine.has_event_handler(late));
        Ok(())
    });
    let mut seen = vec![];
    engine.run(&mut seen, vec![5], Until::epochs(3))?;
    assert_eq!(seen, [-2, -1, 5, -2, 5, 5]);
    assert_eq!(
        text(engine.remove_event_handler(itself)),
        "this handler is not registered, or was removed already: give the id that add_event_handler of this engine returned"
    );
    Ok(())
}

#[test]
fn a_handler_removed_while_its_event_fires_is_called_a_last_time() -> Result<()> {
    let mut engine = plain();
    let later = Rc::new(Cell::new(None));
    let id = later.clone();
    engine.on(Event::EpochStarted.once(1), move |_, engine| {
        id.get().map_or(Ok(()), |id| engine.remove_event_handler(id)).map_err(Into::into)
    });
    let added = engine.add_event_handler(Event::EpochStarted, |seen, _| {
        seen.push(-1);
        Ok(())
    })?;
    later.set(Some(added));
    let mut seen = vec![];
    engine.run(&mut seen, vec![5], Until::epochs(2))?;
    assert_eq!(seen, [-1, 5, 5]);
    Ok(())
}

#[test]
fn a_handler_added_while_its_event_fires_is_called_in_the_same_firing() -> Result<()> {
    let mut engine = plain();
    engine.on(Event::EpochStarted.once(1), |_, engine| {
        engine.on(Event::EpochStarted, |seen, _| {
            seen.push(-1);
            Ok(())
        });
        Ok(())
    });
    let mut seen = vec![];
    engine.run(&mut seen, vec![5], Until::epochs(2))?;
    assert_eq!(seen, [-1, 5, -1, 5]);
    Ok(())
}

#[test]
fn custom_events_nest_and_a_running_handler_is_not_entered_again() -> Result<()> {
    const OUTER: Event = Event::custom("outer");
    const INNER: Event = Event::custom("inner");
    let mut engine: Engine<Vec<i64>, i64, ()> =
        Engine::new(|seen: &mut Vec<i64>, engine, batch| {
            seen.push(batch);
            engine.fire_event(OUTER, seen)?;
            Ok(())
        });
    engine.register_events([OUTER, INNER])?;
    engine.register_events([INNER])?;
    engine.on(OUTER, |seen, engine| {
        seen.push(-1);
        engine.fire_event(INNER, seen)?;
        engine.fire_event(OUTER, seen)?;
        seen.push(-3);
        Ok(())
    });
    engine.on(INNER.every(2), |seen, _| {
        seen.push(-2);
        Ok(())
    });
    let mut seen = vec![];
    engine.run(&mut seen, vec![1, 2], Until::epochs(1))?;
    assert_eq!(seen, [1, -1, -3, 2, -1, -2, -3]);
    let unknown = engine.fire_event(Event::custom("third"), &mut seen);
    assert!(text(unknown).ends_with("registered are: outer, inner"));
    Ok(())
}

#[test]
fn closures_borrow_and_engines_live_in_structs() -> Result<()> {
    struct Program {
        engine: Engine<'static, u64, i64, ()>,
        steps: u64,
    }
    let engine = Engine::new(|steps: &mut u64, _, _| {
        *steps += 1;
        Ok(())
    });
    let mut program = Program { engine, steps: 0 };
    program.engine.run(&mut program.steps, vec![1, 2], Until::epochs(2))?;
    assert_eq!(program.steps, 4);

    let data = vec![1, 2, 3];
    let (mut largest, offset) = (0, 10);
    let mut engine: Engine<(), i64, ()> = Engine::new(|_, _, batch| {
        largest = largest.max(batch + offset);
        Ok(())
    });
    engine.run(&mut (), &data, Until::epochs(1))?;
    engine.run(&mut (), &data[..2], Until::epochs(1))?;
    drop(engine);
    assert_eq!(largest, 13);
    Ok(())
}

#[test]
fn a_handler_kept_outside_can_be_read_after_the_run() -> Result<()> {
    struct Counter(u64);
    impl Handler<Vec<i64>, i64, f64> for Counter {
        fn spec(&self) -> Result<HandlerSpec> {
            Ok(HandlerSpec::new("counter", Event::IterationCompleted.every(2)))
        }
        fn call(
            &mut self,
            _: Event,
            _: &mut Vec<i64>,
            _: &mut Engine<'_, Vec<i64>, i64, f64>,
        ) -> anyhow::Result<()> {
            self.0 += 1;
            Ok(())
        }
    }
    let counter = Rc::new(RefCell::new(Counter(0)));
    let mut engine = plain();
    engine.attach(counter.clone());
    engine.run(&mut vec![], vec![0; 5], Until::epochs(1))?;
    assert_eq!(counter.borrow().0, 2);
    Ok(())
}

// These tests are about evaluation.

/// An engine whose step gives the batch plus the context's first entry.
fn evaluator<'a>() -> Engine<'a, Vec<i64>, i64, f64> {
    let mut engine = Engine::new(|seen: &mut Vec<i64>, _, batch: i64| {
        anyhow::ensure!(batch != 13, "unlucky");
        Ok((batch + seen.len() as i64) as f64)
    });
    engine.metric("mean", Mean::new()).metric("running", RunningAverage::new().alpha(0.5));
    engine
}

#[test]
fn an_evaluator_runs_within_the_trainer_and_leaves_its_metrics_there() -> Result<()> {
    let mut means = vec![];
    let mut trainer = plain();
    trainer.attach(Evaluate::each_epoch("val", evaluator(), vec![0, 4]));
    trainer.on(Event::EpochCompleted, |_, engine| {
        means.push((
            engine.state.metrics.get("val/mean")?,
            engine.state.metrics.get("val/running")?,
        ));
        Ok(())
    });
    trainer.run(&mut vec![], vec![1, 2], Until::epochs(2))?;
    assert_eq!((trainer.state.epoch, trainer.state.iteration), (2, 4));
    drop(trainer);
    assert_eq!(means, [(4., 4.), (6., 6.)]);
    Ok(())
}

#[test]
fn an_evaluator_can_run_at_other_events_on_a_loader() -> Result<()> {
    let mut evaluator: Engine<(), Batch, f64> =
        Engine::new(|_, _, batch: Batch| Ok(batch.0.size()[0] as f64));
    evaluator.metric("size", Mean::new());
    let runs = Rc::new(Cell::new(0));
    let count = runs.clone();
    evaluator.on(Event::Completed, move |_, _| {
        count.set(count.get() + 1);
        Ok(())
    });
    let data = loader(6, 4);
    let mut trainer: Engine<(), Batch, ()> = Engine::new(|_, _, _| Ok(()));
    trainer.attach(Evaluate::on(Event::IterationCompleted.every(2), "test", evaluator, &data));
    trainer.run(&mut (), &data, Until::epochs(3))?;
    assert_eq!((runs.get(), trainer.state.metrics.get("test/size")?), (3, 3.));
    Ok(())
}

#[test]
fn an_error_in_the_evaluator_is_told_through_the_trainer_and_the_next_run_works() {
    let mut trainer = plain();
    let added = Rc::new(Cell::new(13));
    let shared = added.clone();
    let mut inner = evaluator();
    inner.on(Event::GetBatchCompleted, move |_, engine| {
        engine.state.batch = engine.state.batch.map(|batch| batch + shared.get());
        Ok(())
    });
    trainer.attach(Evaluate::each_epoch("val", inner, vec![0, 4]));
    let all = chain(trainer.run(&mut vec![], vec![1, 2], Until::epochs(2)));
    assert_eq!(
        all,
        "handler 'evaluator val' of EPOCH_COMPLETED failed at iteration 2 (epoch 1): the step of iteration 1 (epoch 1) failed: unlucky"
    );
    added.set(0);
    trainer.run(&mut vec![], vec![1, 2], Until::epochs(2)).unwrap();
    assert_eq!(trainer.state.metrics.get("val/mean").unwrap(), 4., "of both batches");
}

#[test]
fn an_evaluator_that_terminates_early_begins_anew_the_next_time() -> Result<()> {
    let mut inner = evaluator();
    inner.on(Event::IterationCompleted.once(2), |_, engine| {
        engine.terminate();
        Ok(())
    });
    let mut running = vec![];
    let mut trainer = plain();
    trainer.attach(Evaluate::each_epoch("val", inner, vec![0, 4, 100]));
    trainer.on(Event::EpochCompleted, |_, engine| {
        running.push(engine.state.metrics.get("val/running")?);
        Ok(())
    });
    trainer.run(&mut vec![], vec![1, 2], Until::epochs(2))?;
    assert!(!trainer.state.metrics.contains("val/mean"), "its epoch was never completed");
    drop(trainer);
    assert_eq!(running, [4., 6.]);
    Ok(())
}

#[test]
fn an_evaluator_that_was_interrupted_leaves_no_values_of_an_earlier_run() -> Result<()> {
    let mut found = vec![];
    let runs = Rc::new(Cell::new(0));
    let mut inner = evaluator();
    let counted = runs.clone();
    inner.on(Event::Started, move |_, _| {
        counted.set(counted.get() + 1);
        Ok(())
    });
    let second = runs.clone();
    inner.on(Event::IterationCompleted.once(1), move |_, engine| {
        if second.get() == 2 {
            engine.interrupt();
        }
        Ok(())
    });
    let mut trainer = plain();
    trainer.attach(Evaluate::each_epoch("val", inner, vec![0, 4]));
    trainer.on(Event::EpochCompleted, |_, engine| {
        found.push(engine.state.metrics.contains("val/mean"));
        Ok(())
    });
    trainer.run(&mut vec![], vec![1, 2], Until::epochs(3))?;
    drop(trainer);
    assert_eq!(found, [true, false, true]);
    assert_eq!(runs.get(), 3, "each from the start");
    Ok(())
}

#[test]
fn two_of_one_name_are_refused_where_they_would_overwrite_each_other() -> Result<()> {
    use tch::nn::VarStore;
    use tch_ignite::handlers::{EMAHandler, GradNorm};
    use tch_ignite::optim::Knob;
    use tch_ignite::schedule::{CosineAnnealing, ParamGroupScheduler, ParamScheduler};

    let knob = || Knob::new("rate", || 0., |_| {});
    let schedule = || CosineAnnealing::new(1., 0., 4);
    let scheduler = |name: &str| ParamScheduler::new(name, knob(), schedule());
    let evaluator = || Engine::new(|_: &mut Vec<i64>, _, batch: i64| Ok(batch as f64));
    let vs = VarStore::new(Device::Cpu);
    let _w = vs.root().ones("w", &[1]);
    let mut trainer = plain();
    let first = trainer.add_handler(scheduler("lr"))?;
    trainer
        .metric("loss", Mean::new())
        .attach(Evaluate::each_epoch("val", evaluator(), vec![1]))
        .attach(GradNorm::new(&vs));
    for (refused, what) in [
        (trainer.add_handler(scheduler("lr")), "scheduler 'lr'"),
        (
            trainer.add_handler(ParamGroupScheduler::new([scheduler("other"), scheduler("lr")])),
            "scheduler 'lr'",
        ),
        (
            trainer.add_handler(Evaluate::on(Event::Completed, "val", evaluator(), vec![1])),
            "evaluation 'val'",
        ),
        (trainer.add_handler(GradNorm::new(&vs)), "metric 'grad_norm'"),
    ] {
        let error = text(refused.map(drop));
        assert!(error.contains(what) && error.contains("another name"), "{error}");
    }
    // As in ignite, two schedulers within one handler may have one name, but not one history.
    let kept = |name: &str| scheduler(name).save_history(true);
    let twice = ParamGroupScheduler::new([kept("a"), kept("a")]);
    assert!(text(trainer.add_handler(twice).map(drop)).contains("history of 'a'"));
    trainer.attach(ParamGroupScheduler::new([scheduler("a"), scheduler("a")]));
    // A removed handler frees its name. Other names, and a second average of a store, are fine.
    trainer.remove_event_handler(first)?;
    trainer
        .attach(scheduler("lr"))
        .attach(scheduler("lr (fc)"))
        .attach(GradNorm::new(&vs).name("norm"))
        .attach(EMAHandler::new(&vs, 0.5)?)
        .attach(EMAHandler::new(&vs, 0.25)?);
    trainer.run(&mut vec![], vec![1, 2], Until::epochs(1))?;
    trainer.metric("loss", RunningAverage::new());
    let error = text(trainer.run(&mut vec![], vec![1, 2], Until::epochs(1)));
    assert!(error.contains("there is a metric 'loss' already"), "{error}");
    Ok(())
}

// These tests are about what handlers find in the engine's state.

#[test]
fn the_last_output_stays_until_there_is_another() -> Result<()> {
    let outputs = |data: tch_ignite::data::Custom<'static, i64>, until| {
        let seen = Rc::new(RefCell::new(vec![]));
        let stops = Rc::new(RefCell::new(vec![]));
        let mut engine = plain();
        let (own, own_stops) = (seen.clone(), stops.clone());
        engine.on(Event::EpochCompleted, move |_, engine| {
            own.borrow_mut().push(engine.state.output);
            Ok(())
        });
        engine.on(Event::DataloaderStopIteration, move |_, engine| {
            own_stops.borrow_mut().push(engine.state.output);
            Ok(())
        });
        let usage = tch_ignite::metrics::Usage::RunningEpochWise;
        engine.metric_with("running", RunningAverage::new().alpha(0.5), usage);
        engine.run(&mut vec![], data, until)?;
        let running = engine.state.metrics.get("running")?;
        drop(engine);
        let seen = (seen.take(), stops.take(), running);
        Ok::<_, Error>(seen)
    };
    let (seen, stops, running) =
        outputs(restartable(|| vec![1, 3, 8].into_iter()), Until::epochs(3))?;
    assert_eq!(seen, [Some(8.), Some(8.), Some(8.)]);
    assert_eq!((stops, running), (vec![Some(8.), Some(8.)], 8.));
    // The data ends with the second epoch, so the third has no batch at all.
    let (seen, stops, _) = outputs(one_shot(1..=5), Until::epochs(3).epoch_length(3))?;
    assert_eq!(seen, [Some(3.), Some(5.), Some(5.)]);
    assert_eq!(stops, [Some(5.), Some(5.)]);
    Ok(())
}

#[test]
fn times_are_those_of_this_run() -> Result<()> {
    let tick = Duration::from_millis(100);
    let times = Rc::new(RefCell::new(vec![]));
    let mut engine = plain();
    for event in [Event::Started, Event::Terminate, Event::Completed] {
        let times = times.clone();
        engine.on(event, move |_, engine| {
            times.borrow_mut().push((event, engine.state.run_time, engine.state.epoch_time));
            Ok(())
        });
    }
    engine.on(Event::IterationStarted, move |seen: &mut Vec<i64>, _| {
        std::thread::sleep(if seen.is_empty() { tick } else { Duration::ZERO });
        Ok(())
    });
    let mut seen = vec![];
    for _ in 0..2 {
        engine.run(&mut seen, vec![1, 2], Until::epochs(1))?;
    }
    engine.reset()?;
    engine.run(&mut seen, vec![1, 2, 3], Until::iterations(2))?;
    let times = times.take();
    let long: Vec<_> = times.iter().map(|(event, run, _)| (*event, *run >= tick)).collect();
    assert_eq!(
        long,
        [
            (Event::Started, false),
            (Event::Completed, true),
            (Event::Started, false),
            (Event::Completed, false),
            (Event::Started, false),
            (Event::Terminate, false),
            (Event::Completed, false)
        ]
    );
    assert!(times[1].2 >= tick, "the epoch took so long");
    assert!(times[2].2.is_zero(), "no epoch of this run has ended");
    for (event, run, _) in &times[3..] {
        assert!(*event == Event::Started || !run.is_zero(), "{event}");
    }
    // The time between two runs does not count for the epoch that goes on.
    let mut engine = plain();
    engine.on(Event::IterationCompleted.once(1), |_, engine| {
        engine.interrupt();
        Ok(())
    });
    engine.on(Event::IterationStarted.once(1), move |_, _| {
        std::thread::sleep(tick);
        Ok(())
    });
    engine.run(&mut vec![], vec![1, 2], Until::epochs(1))?;
    std::thread::sleep(2 * tick);
    engine.run(&mut vec![], vec![1, 2], Until::epochs(1))?;
    let time = engine.state.epoch_time;
    assert!(time >= tick && time < 2 * tick, "{time:?}");
    Ok(())
}

#[test]
fn firings_are_counted_anew_in_each_run() -> Result<()> {
    const OWN: Event = Event::custom("own");
    let mut engine: Engine<Vec<u64>, i64, ()> =
        Engine::new(|seen, engine, _| Ok(engine.fire_event(OWN, seen)?));
    engine.register_events([OWN])?;
    engine.on(OWN.once(2), |seen, engine| {
        seen.push(engine.state.iteration);
        Ok(())
    });
    engine.on(Event::IterationCompleted.once(1), |_, engine| {
        engine.interrupt();
        Ok(())
    });
    let mut seen = vec![];
    for (epochs, expected) in [(1, vec![]), (1, vec![2]), (2, vec![2])] {
        engine.run(&mut seen, vec![1, 2, 3], Until::epochs(epochs))?;
        assert_eq!(seen, expected, "a run that goes on counts on");
    }
    // A run after a complete one starts anew, with and without reset().
    engine.run(&mut seen, vec![1, 2, 3], Until::epochs(2))?;
    engine.run(&mut seen, vec![1, 2, 3], Until::epochs(2))?;
    engine.reset()?;
    engine.run(&mut seen, vec![1, 2, 3], Until::epochs(2))?;
    engine.run(&mut seen, vec![1, 2, 3], Until::epochs(2))?;
    assert_eq!(seen, [2, 2, 2]);
    Ok(())
}

// These tests are about panics.

/// Whether gradients are recorded on this thread.
fn records_gradients() -> bool {
    let w = Tensor::ones([1], (Kind::Float, Device::Cpu)).set_requires_grad(true);
    (w * 2.).requires_grad()
}

#[test]
fn a_panic_leaves_gradients_and_autocast_of_the_thread_as_they_were() -> Result<()> {
    const OWN: Event = Event::custom("own");
    // The panic comes in the step, a handler, a handler that the step fires, the data, or an evaluator.
    for (place, within) in (0..5).flat_map(|place| [(place, false), (place, true)]) {
        let fails = Rc::new(Cell::new(true));
        let here = move |at: i32, fails: &Cell<bool>| {
            if at == place && fails.replace(false) {
                tch::no_grad(|| tch::autocast(true, || panic!("at {at}")));
            }
            anyhow::Ok(())
        };
        let (a, b, c, d, e) =
            (fails.clone(), fails.clone(), fails.clone(), fails.clone(), fails.clone());
        let mut engine: Engine<(), i64, ()> =
            Engine::new(move |cx, engine: &mut Engine<_, _, _>, _| {
                here(0, &a)?;
                Ok(engine.fire_event(OWN, cx)?)
            });
        engine.register_events([OWN])?;
        engine.on(Event::IterationStarted, move |_, _| here(1, &b));
        engine.on(OWN, move |_, _| here(2, &c));
        let evaluator: Engine<(), i64, ()> = Engine::new(move |_, _, _| here(3, &d));
        engine.attach(Evaluate::each_epoch("val", evaluator, vec![1]));
        let data = restartable(move || {
            here(4, &e).unwrap();
            0..2
        });
        let run = || {
            let failed = engine.run(&mut (), data, Until::epochs(1)).is_err();
            (failed, records_gradients())
        };
        let inside = if within { tch::no_grad(run) } else { run() };
        assert_eq!((fails.get(), inside), (false, (true, !within)), "place {place}");
        assert!(records_gradients(), "place {place}");

        // Weights are cast anew in each autocast region, so a changed weight shows that no region is still open.
        let w = Tensor::ones([2, 2], (Kind::Float, Device::Cpu)).set_requires_grad(true);
        let product = || {
            let cast = || w.matmul(&w).sum(Kind::Float).double_value(&[]);
            tch_ignite::amp::autocast(Device::Cpu, Kind::BFloat16, cast)
        };
        assert_eq!(product()?, 8.);
        tch::no_grad(|| {
            let _ = w.shallow_clone().fill_(2.);
        });
        assert_eq!(product()?, 32., "place {place}");
    }
    Ok(())
}

/// A value that panics when it is dropped while it is armed.
struct Bomb(Rc<Cell<bool>>);

impl Drop for Bomb {
    fn drop(&mut self) {
        assert!(!self.0.replace(false), "boom");
    }
}

#[test]
fn what_panics_when_it_is_dropped_is_named_and_the_engine_runs_again() -> Result<()> {
    struct Source1 {
        left: u64,
        armed: Rc<Cell<bool>>,
        _bomb: Option<Bomb>,
    }
    impl Source<Bomb> for Source1 {
        fn batches(&self) -> Option<u64> {
            Some(3)
        }
        fn seek(&mut self, _: u64, batch: u64) -> anyhow::Result<()> {
            self.left = 3 - batch;
            Ok(())
        }
        fn next(&mut self) -> Option<anyhow::Result<Bomb>> {
            self.left = self.left.checked_sub(1)?;
            Some(Ok(Bomb(self.armed.clone())))
        }
    }
    for (what, expected) in [
        (
            "batch",
            "no batch for iteration 2 (epoch 1): dropping the batch before it: panicked: boom",
        ),
        ("output", "the step of iteration 1 (epoch 1) failed: dropping its output: panicked: boom"),
        ("data", "no batch for iteration 4 (epoch 1): dropping the data: panicked: boom"),
        (
            "handler",
            "of ITERATION_COMPLETED failed at iteration 1 (epoch 1): dropping it after its removal: panicked: boom",
        ),
    ] {
        let armed = Rc::new(Cell::new(false));
        let mut engine: Engine<(), Bomb, Bomb> = Engine::new(|_, _, batch| Ok(batch));
        let removed = Bomb(armed.clone());
        let id = engine.add_event_handler(Event::Completed, move |_, _| {
            let _bomb = &removed;
            Ok(())
        })?;
        let (arm, mut runs) = (armed.clone(), 0);
        engine.on(Event::IterationCompleted, move |_, engine| {
            runs += u64::from(engine.state.iteration == 1);
            match (what, engine.state.iteration) {
                _ if runs > 1 => {}
                ("output", 1) => arm.set(true),
                ("batch", 1) => {
                    engine.state.batch = engine.state.output.take();
                    arm.set(true);
                }
                ("data", 3) => {
                    engine.state.output = None;
                    arm.set(true);
                }
                ("handler", 1) => {
                    engine.state.output = None;
                    arm.set(true);
                    engine.remove_event_handler(id)?;
                }
                _ => {}
            }
            Ok(())
        });
        let unarmed = Rc::new(Cell::new(false));
        let data = |armed: &Rc<Cell<bool>>| {
            let _bomb = (what == "data").then(|| Bomb(armed.clone()));
            source(Source1 { left: 0, armed: armed.clone(), _bomb })
        };
        let all = chain(engine.run(&mut (), data(&armed), Until::epochs(1)));
        assert!(all.ends_with(expected), "{what}: {all}");
        let summary = engine.run(&mut (), data(&unarmed), Until::epochs(2))?;
        assert_eq!((summary.epochs, summary.iterations), (2, 6), "{what}");
        engine.reset()?;
        assert_eq!(engine.run(&mut (), data(&unarmed), Until::epochs(1))?.iterations, 3, "{what}");
    }
    Ok(())
}

#[test]
fn a_panic_is_told_of_whom_it_is() {
    struct Silent(&'static str);
    impl Handler<Vec<i64>, i64, f64> for Silent {
        fn spec(&self) -> Result<HandlerSpec> {
            assert!(self.0 != "spec", "no events");
            Ok(HandlerSpec::new("silent", Event::IterationCompleted))
        }
        fn save_state(&self) -> Result<Option<tch_ignite::checkpoint::StateDict>> {
            assert!(self.0 != "save_state", "no state");
            Ok(None)
        }
        fn call(
            &mut self,
            _: Event,
            _: &mut Vec<i64>,
            _: &mut Engine<'_, Vec<i64>, i64, f64>,
        ) -> anyhow::Result<()> {
            if self.0 == "later" {
                self.0 = "save_state";
            }
            Ok(())
        }
    }
    let all = chain(plain().add_handler(Silent("spec")));
    assert!(all.starts_with("attaching ") && all.ends_with("Silent: panicked: no events"), "{all}");
    let all = chain(plain().add_handler(Silent("save_state")));
    assert_eq!(all, "attaching handler 'silent': panicked: no state");
    let mut engine = plain();
    engine.attach(Silent("later"));
    engine.run(&mut vec![], vec![1], Until::epochs(1)).unwrap();
    let all = chain(engine.checkpoint(&vec![]));
    assert_eq!(all, "handler 'silent': panicked: no state");

    struct Odd(&'static str, i64);
    impl Source<i64> for Odd {
        fn batches(&self) -> Option<u64> {
            assert!(self.0 != "batches", "no batches");
            Some(2)
        }
        fn seek(&mut self, _: u64, batch: u64) -> anyhow::Result<()> {
            self.1 = batch as i64;
            Ok(())
        }
        fn next(&mut self) -> Option<anyhow::Result<i64>> {
            self.1 += 1;
            (self.1 <= 2).then_some(Ok(self.1))
        }
        fn samples(&self) -> Option<u64> {
            assert!(self.0 != "samples", "no samples");
            None
        }
    }
    let all = chain(plain().run(&mut vec![], source(Odd("batches", 0)), Until::epochs(1)));
    assert_eq!(all, "the data source panicked: no batches");
    let all = chain(plain().run(&mut vec![], source(Odd("samples", 0)), Until::epochs(1)));
    assert_eq!(all, "no batch for iteration 1 (epoch 1): panicked: no samples");
}

#[test]
fn a_handler_that_is_refused_leaves_nothing_behind() -> Result<()> {
    struct NotYet(Rc<Cell<bool>>, Rc<Cell<u64>>);
    impl Handler<Vec<i64>, i64, f64> for NotYet {
        fn spec(&self) -> Result<HandlerSpec> {
            Ok(HandlerSpec::new("not yet", Event::IterationCompleted | Event::EpochStarted))
        }
        fn save_state(&self) -> Result<Option<tch_ignite::checkpoint::StateDict>> {
            match self.0.get() {
                true => Ok(None),
                false => Err(Error::State("not yet".into())),
            }
        }
        fn call(
            &mut self,
            _: Event,
            _: &mut Vec<i64>,
            _: &mut Engine<'_, Vec<i64>, i64, f64>,
        ) -> anyhow::Result<()> {
            self.1.set(self.1.get() + 1);
            Ok(())
        }
    }
    let (ready, calls, completed) = (Rc::default(), Rc::default(), Rc::new(Cell::new(0)));
    let new = || NotYet(Rc::clone(&ready), Rc::clone(&calls));
    let mut engine = plain();
    assert_eq!(text(engine.add_handler(new())), "not yet");
    engine.run(&mut vec![], vec![1, 2], Until::epochs(5))?;
    let count = completed.clone();
    engine.on(Event::Completed, move |_, _| {
        count.set(count.get() + 1);
        Ok(())
    });
    engine.run(&mut vec![], vec![1, 2], Until::epochs(5))?;
    assert_eq!((calls.get(), completed.get()), (0, 1));
    ready.set(true);
    engine.add_handler(new())?;
    engine.run(&mut vec![], vec![1, 2], Until::epochs(5))?;
    assert_eq!((calls.get(), completed.get()), (15, 2), "once an event");
    Ok(())
}

#[test]
fn data_replaced_at_a_batch_that_is_lost_begins_at_its_start() -> Result<()> {
    for event in [Event::GetBatchCompleted, Event::IterationStarted] {
        let mut engine = plain();
        let mut first = true;
        engine.on(event, move |_, engine| {
            if std::mem::take(&mut first) {
                engine.set_data(vec![7, 8, 9])?;
                anyhow::bail!("once");
            }
            Ok(())
        });
        let mut seen = vec![];
        assert!(engine.run(&mut seen, vec![0, 1, 2], Until::epochs(1)).is_err());
        engine.run(&mut seen, vec![7, 8, 9], Until::epochs(1))?;
        let lost = usize::from(event == Event::IterationStarted);
        assert_eq!(seen, [7, 8, 9][..3 - lost], "{event}");
    }
    let mut engine = plain();
    engine.on(Event::IterationCompleted.once(1), |_, engine| {
        let refused = text(engine.set_data(Vec::new()));
        anyhow::ensure!(refused.contains("zero size"), "{refused}");
        Ok(())
    });
    let mut seen = vec![];
    engine.run(&mut seen, vec![0, 1], Until::epochs(1))?;
    assert_eq!(seen, [0, 1], "what is refused changes nothing");
    Ok(())
}

#[test]
fn reset_works_however_the_run_was_left() -> Result<()> {
    let mut fresh = vec![];
    traced().run(&mut fresh, vec![0, 1, 2], Until::epochs(2))?;
    let mut saved = None;
    for left in
        ["error", "interrupt", "terminate", "limit", "loaded", "restored", "in part", "panic"]
    {
        let mut engine = traced();
        let on = Rc::new(Cell::new(true));
        let off = on.clone();
        engine.on(Event::IterationCompleted.once(2), move |_, engine| {
            match left {
                _ if !on.get() => {}
                "error" => anyhow::bail!("once"),
                "panic" => panic!("once"),
                "interrupt" => engine.interrupt(),
                "limit" => engine.terminate_at_limit(),
                _ => engine.terminate(),
            }
            Ok(())
        });
        let _ = engine.run(&mut vec![], vec![0, 1, 2], Until::epochs(2));
        match left {
            "interrupt" => saved = Some(engine.checkpoint(&vec![])?),
            "loaded" => engine.load_state_dict(&map(
                json!({"iteration": 4, "epoch_length": 3, "max_epochs": 2}),
            ))?,
            "restored" => {
                let state = saved.as_ref().unwrap().copy()?;
                engine.restore(&mut vec![], state, true)?;
            }
            "in part" => {
                engine.restore(&mut vec![], Default::default(), true).unwrap_err();
                let refused = text(engine.run(&mut vec![], vec![0, 1, 2], Until::epochs(2)));
                assert!(refused.contains("only in part"), "{refused}");
            }
            _ => {}
        }
        off.set(false);
        engine.reset()?;
        let mut trace = vec![];
        let summary = engine.run(&mut trace, vec![0, 1, 2], Until::epochs(2))?;
        assert_eq!(trace, fresh, "{left}");
        assert_eq!(summary.warnings.len(), usize::from(left == "in part"), "{left}: {summary}");
    }
    Ok(())
}

#[test]
fn many_handlers_are_removed_in_a_time_that_grows_with_their_number() -> Result<()> {
    let remove = |count: u64| {
        let mut engine = plain();
        let add = |engine: &mut Engine<'_, _, _, _>| {
            engine.add_event_handler(Event::IterationStarted, |_, _| Ok(()))
        };
        let ids: Vec<_> = (0..count).map(|_| add(&mut engine)).collect::<Result<_>>()?;
        let begun = std::time::Instant::now();
        ids.into_iter().try_for_each(|id| engine.remove_event_handler(id))?;
        assert_eq!(engine.run(&mut vec![], vec![1], Until::epochs(1))?.iterations, 1);
        Ok::<_, Error>(begun.elapsed())
    };
    // This takes some 20 ms. It took 100 times as long when handlers were removed one by one from a list.
    let time = remove(50_000)?;
    assert!(time < Duration::from_secs(1), "{time:?}");
    Ok(())
}
