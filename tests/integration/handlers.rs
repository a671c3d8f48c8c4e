//! Tests of handlers that work together: evaluators, handlers that act on their metrics, profiles, skipped batches.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::Result;
use serde_json::{Map, Value, json};
use tch::{Device, Tensor, nn};
use tch_ignite::checkpoint::{IntoStateful, StateDict, Stateful};
use tch_ignite::data::{Dataset, SplitMix64};
use tch_ignite::engine::{
    Engine, Event, Handler, HandlerSpec, Log, MetricValue, Priority, Ranks, Stop, Until,
};
use tch_ignite::handlers::{
    EMAHandler, EarlyStopping, Evaluate, History, ProgressBar, SkipBatch, TimeLimit,
};
use tch_ignite::loggers::{CsvLogger, Logger, OutputHandler};
use tch_ignite::metrics::fairness::{Grouped, SubgroupDifference, SubgroupMetric};
use tch_ignite::metrics::{Accumulated, Mean, Metric, MetricGroup, RunningAverage, Usage};
use tch_ignite::optim::Knob;
use tch_ignite::schedule::{AnySchedule, ReduceLROnPlateauScheduler, Schedule, StepLR};

type Evaluator<'a> = Engine<'a, f64, f64, f64>;

/// An evaluator whose context is the epoch; its step multiplies each number by it.
fn evaluator<'a>() -> Evaluator<'a> {
    let mut evaluator = Engine::new(|epoch: &mut f64, _, x: f64| Ok(*epoch * x));
    evaluator.metric("loss", Mean::new());
    evaluator
}

fn trainer<'a>() -> Engine<'a, f64, (), ()> {
    Engine::new(|epoch: &mut f64, _, _: ()| {
        *epoch += 1.;
        Ok(())
    })
}

#[test]
fn several_evaluators_stand_side_by_side() -> Result<()> {
    let mut trainer = trainer();
    trainer.attach(Evaluate::each_epoch("val", evaluator(), vec![1., 3.])).attach(Evaluate::on(
        Event::EpochCompleted.every(2),
        "test",
        evaluator(),
        vec![10.],
    ));
    trainer.run(&mut 0., vec![()], Until::epochs(3))?;
    let metrics = &trainer.state.metrics;
    assert_eq!((metrics.get("val/loss")?, metrics.get("test/loss")?), (6., 20.));
    Ok(())
}

#[test]
fn plateaus_of_an_evaluation_lower_the_rate() -> Result<()> {
    let rate = Arc::new(Mutex::new(1.));
    let (read, write) = (rate.clone(), rate.clone());
    let knob =
        Knob::new("lr", move || *read.lock().unwrap(), move |lr| *write.lock().unwrap() = lr);
    let mut trainer = trainer();
    // The loss grows from epoch to epoch, so the first is the best.
    trainer.attach(Evaluate::each_epoch("val", evaluator(), vec![1.])).attach(
        ReduceLROnPlateauScheduler::min("lr", knob, "val/loss")?
            .factor(0.5)
            .patience(1)
            .save_history(true),
    );
    trainer.run(&mut 0., vec![()], Until::epochs(5))?;
    let rates: Vec<_> = trainer.state.param_history["lr"].concat();
    assert_eq!(rates, [1., 1., 0.5, 0.5, 0.25]);
    Ok(())
}

#[test]
fn early_stopping_looks_when_the_evaluation_is_new() -> Result<()> {
    let every = || Event::EpochCompleted.every(2);
    let stop = Rc::new(RefCell::new(EarlyStopping::min("val/loss", 2).on(every())));
    let mut trainer = trainer();
    trainer.attach(Evaluate::on(every(), "val", evaluator(), vec![1.])).attach(stop.clone());
    let summary = trainer.run(&mut 0., vec![()], Until::epochs(100))?;
    assert_eq!((summary.epochs, summary.stop), (6, Stop::Terminated));
    assert_eq!((stop.borrow().best_score(), stop.borrow().counter()), (Some(2.), 2));
    Ok(())
}

#[test]
fn early_stopping_goes_on_in_another_process() -> Result<()> {
    let trainer = || {
        let mut trainer = trainer();
        trainer
            .attach(Evaluate::each_epoch("val", evaluator(), vec![1.]))
            .attach(EarlyStopping::min("val/loss", 5));
        trainer
    };
    let mut first = trainer();
    let mut epoch = 0.;
    first.on(Event::EpochCompleted.once(3), |_, engine| {
        engine.interrupt();
        Ok(())
    });
    first.run(&mut epoch, vec![()], Until::epochs(100))?;
    let saved = first.checkpoint(&epoch)?.copy()?;
    let mut second = trainer();
    second.restore(&mut epoch, saved, true)?;
    let summary = second.run(&mut epoch, vec![()], Until::epochs(100))?;
    assert_eq!((summary.epochs, summary.stop), (6, Stop::Terminated));
    Ok(())
}

#[test]
fn a_time_limit_counts_from_when_it_was_made() -> Result<()> {
    let limit = TimeLimit::new(Duration::from_millis(20))?;
    std::thread::sleep(Duration::from_millis(25));
    let mut trainer = trainer();
    trainer.attach(limit.on(Event::EpochCompleted));
    let summary = trainer.run(&mut 0., vec![(); 3], Until::epochs(9))?;
    assert_eq!((summary.iterations, summary.stop), (3, Stop::Terminated));
    Ok(())
}

#[test]
fn a_profile_tells_who_took_the_time() -> Result<()> {
    let mut trainer = trainer();
    let profile = trainer.profile();
    trainer.attach(Evaluate::each_epoch("val", evaluator(), vec![1.])).on(
        Event::IterationCompleted.every(2),
        |_, _| {
            std::thread::sleep(Duration::from_millis(2));
            Ok(())
        },
    );
    trainer.run(&mut 0., vec![(); 4], Until::epochs(2))?;
    let (basic, handlers) = (profile.basic(), profile.handlers());
    let counts: Vec<_> =
        basic.iter().map(|row| (row.name.as_str(), row.event, row.count)).collect();
    let (iteration, epoch) = (Some(Event::IterationCompleted), Some(Event::EpochCompleted));
    // The data is asked once more than it has batches, to learn that it is exhausted.
    let expected =
        [("data", None, 9), ("step", None, 8), ("handlers", iteration, 8), ("handlers", epoch, 2)];
    assert_eq!(counts, expected);
    assert_eq!((handlers[0].event, handlers[0].count), (iteration, 4));
    assert!(
        handlers[0].name.contains("tests/integration/handlers.rs")
            && handlers[0].total.as_millis() >= 8
    );
    assert_eq!(handlers[1].name, "'evaluator val'");
    let text = profile.to_string();
    assert!(
        text.contains("'evaluator val' EPOCH_COMPLETED") && text.lines().count() == 9,
        "{text}"
    );
    profile.reset();
    assert!(profile.handlers().is_empty());
    Ok(())
}

#[test]
fn batches_that_are_passed_over_are_no_iterations() -> Result<()> {
    let mut trainer = Engine::new(|seen: &mut Vec<i32>, _, x: i32| {
        seen.push(x);
        Ok(())
    });
    trainer.attach(SkipBatch::when(|x: &i32| x % 3 == 0));
    let mut seen = vec![];
    let summary = trainer.run(&mut seen, (0..6).collect::<Vec<_>>(), Until::epochs(2))?;
    assert_eq!(seen, [1, 2, 4, 5, 1, 2, 4, 5, 1, 2, 4, 5]);
    assert_eq!((summary.epochs, summary.iterations), (2, 12));

    let mut seen = vec![];
    trainer.reset()?;
    let summary = trainer.run(&mut seen, vec![0, 3], Until::epochs(2))?;
    assert_eq!((seen, summary.iterations), (vec![], 0));
    assert!(summary.to_string().contains("can not provide data anymore"));
    Ok(())
}

#[test]
fn only_a_batch_that_was_fetched_can_be_passed_over() {
    let mut trainer = trainer();
    trainer.on(Event::IterationStarted, |_, engine| {
        engine.skip_batch();
        Ok(())
    });
    let error = trainer.run(&mut 0., vec![()], Until::epochs(1)).unwrap_err().to_string();
    assert!(error.contains("skip_batch() was called at ITERATION_STARTED"), "{error}");
}

#[test]
fn loggers_see_what_the_others_leave() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let csv = CsvLogger::open(folder.path().join("log.csv"))?;
    let mut trainer = trainer();
    trainer
        .attach(OutputHandler::each_epoch(&csv, "").metric("val/loss"))
        .attach(Evaluate::each_epoch("val", evaluator(), vec![1.]));
    trainer.run(&mut 0., vec![()], Until::epochs(2))?;
    csv.flush()?;
    let text = std::fs::read_to_string(folder.path().join("log.csv"))?;
    let rows: Vec<_> = text.lines().skip(1).filter_map(|row| row.split_once(',')).collect();
    assert_eq!(rows.iter().map(|row| row.1).collect::<Vec<_>>(), ["1,val/loss,1", "2,val/loss,2"]);
    Ok(())
}

#[test]
fn after_a_full_disk_the_run_can_go_on() -> Result<()> {
    let full = std::path::Path::new("/dev/full");
    if !full.exists() {
        eprintln!("skipped: there is no /dev/full here");
        return Ok(());
    }
    let mut trainer = Engine::new(|sum: &mut f64, _, x: f64| {
        *sum += x;
        Ok(*sum)
    });
    let every = Event::IterationCompleted;
    let logger = OutputHandler::new(&CsvLogger::open(full)?, "t".repeat(9000), every);
    let id = trainer.add_handler(logger.output("sum", |sum: &f64| *sum))?;
    let mut sum = 0.;
    let error = trainer.run(&mut sum, vec![1.; 20], Until::epochs(1)).unwrap_err();
    let text = format!("{:#}", anyhow::Error::from(error));
    assert!(text.contains("/dev/full"), "{text}");
    trainer.remove_event_handler(id)?;
    trainer.run(&mut sum, vec![1.; 20], Until::epochs(1))?;
    assert_eq!(sum, 20.);
    Ok(())
}

#[test]
fn undefined_tensors_are_errors() {
    assert!(tch_ignite::loggers::Histogram::of(&tch::Tensor::new()).is_err());
    assert!(tch_ignite::amp::GradScaler::new().scale(&tch::Tensor::new()).is_err());
}

#[test]
fn a_running_average_of_a_metric_over_epochs_goes_on_in_mid_epoch() -> Result<()> {
    let engine = || {
        let mut engine = Engine::new(|sum: &mut f64, _, x: f64| {
            *sum += x;
            Ok(*sum)
        });
        let average = || RunningAverage::of_metric(Mean::new()).alpha(0.75);
        let group = MetricGroup::new().metric("average", average());
        engine
            .metric_with("alone", average(), Usage::RunningEpochWise)
            .metric_with("in", group, Usage::RunningEpochWise)
            .metric_with("shared", average().shared() * 1., Usage::RunningEpochWise);
        engine
    };
    let data = vec![0.1, 0.7, -0.3];
    let (mut straight, mut sum) = (engine(), 0.);
    straight.run(&mut sum, data.clone(), Until::epochs(3))?;
    let values = |metrics: &tch_ignite::engine::Metrics| -> Result<Vec<f64>> {
        ["alone", "in/average", "shared"].iter().map(|name| Ok(metrics.get(name)?)).collect()
    };
    // The expected value is ignite's running average of the mean of sums over each epoch: 0.4666…, 0.9666… and
    // 1.4666….
    let mut expected = 0.;
    let (mut sum, mut first_epoch) = (0., true);
    for _ in 0..3 {
        let mut total = 0.;
        for x in &data {
            sum += x;
            total += sum;
        }
        let mean = total / 3.;
        expected = if first_epoch { mean } else { expected * 0.75 + 0.25 * mean };
        first_epoch = false;
    }
    let straight = values(&straight.state.metrics)?;
    assert!(straight.iter().all(|value| (value - expected).abs() < 1e-15), "{straight:?}");

    let (mut first, mut sum) = (engine(), 0.);
    first.on(Event::IterationCompleted.once(5), |_, engine| {
        engine.interrupt();
        Ok(())
    });
    first.run(&mut sum, data.clone(), Until::epochs(3))?;
    let saved = first.checkpoint(&sum)?.copy()?;
    let mut second = engine();
    second.restore(&mut sum, saved, true)?;
    second.run(&mut sum, data, Until::epochs(3))?;
    assert_eq!(values(&second.state.metrics)?, straight);
    Ok(())
}

#[test]
fn a_metric_that_never_has_a_value_is_a_warning_that_lists_what_there_is() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let csv = CsvLogger::open(folder.path().join("log.csv"))?;
    let mut evaluator = evaluator();
    evaluator.attach(OutputHandler::each_epoch(&csv, "val").metric("los"));
    let mut trainer = trainer();
    trainer
        .attach(Evaluate::each_epoch("val", evaluator, vec![1., 3.]))
        .attach(OutputHandler::each_epoch(&csv, "epoch").metric("val/los").metric("val/loss"))
        .attach(OutputHandler::new(&csv, "never", Event::EpochCompleted.once(9)).metric("no"))
        .attach(History::new().metric("a").epoch_metric("b").epoch_metric("val/loss"))
        .attach(ProgressBar::new().metric("val/lose").hidden());
    // While a run is suspended, there is no warning of metrics that may still come.
    trainer.on(Event::EpochCompleted.once(1), |_, engine| {
        engine.interrupt();
        Ok(())
    });
    assert_eq!(trainer.run(&mut 0., vec![()], Until::epochs(2))?.warnings.len(), 1);
    let mut warnings = trainer.run(&mut 0., vec![()], Until::epochs(2))?.warnings;
    warnings.sort();
    let there = "never had a value when it should have been shown; there are: 'val/loss'";
    let expected = [
        "evaluator val: logger of val: metric 'los' never had a value when it should have been shown; there are: 'loss'",
        "history: metrics 'a', 'b' never had a value when they should have been shown; there are: 'val/loss'",
        &format!("logger of epoch: metric 'val/los' {there}"),
        &format!("progress bar: metric 'val/lose' {there}"),
    ];
    assert_eq!(warnings, expected);
    Ok(())
}

/// A handler whose methods all give something else than the trait's default.
struct Loud;

impl Handler<(), (), ()> for Loud {
    fn spec(&self) -> tch_ignite::Result<HandlerSpec> {
        let spec = HandlerSpec::new("loud", Event::Completed).priority(Priority::First);
        let log: Rc<dyn Log> = Rc::new(LoudLog);
        Ok(spec
            .ranks(Ranks::MainWithAll)
            .runs_in_trials(true)
            .unique_names(["loud".into()])
            .drives([Knob::new("loud", || 0., |_| {})])
            .logs([log]))
    }
    fn save_state(&self) -> tch_ignite::Result<Option<StateDict>> {
        Ok(Some(StateDict::new()))
    }
    fn load_state(&mut self, _: StateDict) -> tch_ignite::Result<()> {
        Ok(())
    }
    fn load_state_partially(&mut self, _: StateDict) -> tch_ignite::Result<Vec<String>> {
        Ok(vec!["loud".into()])
    }
    fn call(&mut self, _: Event, _: &mut (), _: &mut Engine<'_, (), (), ()>) -> Result<()> {
        anyhow::bail!("loud")
    }
}

struct LoudLog;

impl Log for LoudLog {
    fn path(&self) -> std::path::PathBuf {
        "loud".into()
    }
    fn commit(&self) -> tch_ignite::Result<Value> {
        Ok(json!(1))
    }
    fn rewind(&self, _: &Value) -> tch_ignite::Result<Option<String>> {
        Ok(None)
    }
}

/// Clippy checks that wrappers forget no method (`missing_trait_methods`); this test checks that each method calls
/// the right one.
#[test]
fn a_wrapped_handler_answers_as_the_handler_itself() -> Result<()> {
    fn check(mut handler: impl Handler<(), (), ()>) -> Result<()> {
        assert_eq!(format!("{:?}", handler.spec()?), format!("{:?}", Loud.spec()?));
        assert!(handler.save_state()?.is_some());
        handler.load_state(StateDict::new())?;
        assert_eq!(handler.load_state_partially(StateDict::new())?, ["loud"]);
        let mut engine = Engine::new(|_: &mut (), _, _: ()| Ok(()));
        assert!(handler.call(Event::Completed, &mut (), &mut engine).is_err());
        Ok(())
    }
    let vs = nn::VarStore::new(Device::Cpu);
    let _weight = vs.root().ones("weight", &[1]);
    check(Loud)?;
    check(Rc::new(RefCell::new(Loud)))?;
    check(EMAHandler::new(&vs, 0.5)?.with_averages(Loud))?;
    check(Rc::new(RefCell::new(EMAHandler::new(&vs, 0.5)?.with_averages(Loud))))
}

/// A metric that notes which of its methods are called.
#[derive(Clone, Default)]
struct LoudMetric(Rc<RefCell<Vec<&'static str>>>);

impl LoudMetric {
    fn note(&self, what: &'static str) {
        self.0.borrow_mut().push(what);
    }
}

impl<O> Metric<O> for LoudMetric {
    fn reset(&mut self) {
        self.note("reset");
    }
    fn update(&mut self, _: &O) -> Result<()> {
        self.note("update");
        Ok(())
    }
    fn observe(&mut self, _: &O) -> Result<()> {
        self.note("observe");
        Ok(())
    }
    fn compute(&self) -> Result<MetricValue> {
        self.note("compute");
        Ok(1.0.into())
    }
    fn usage(&self) -> Usage {
        self.note("usage");
        Usage::BatchWise
    }
    fn validate(&self) -> tch_ignite::Result<()> {
        self.note("validate");
        Ok(())
    }
    fn state(&self) -> Result<Vec<Accumulated>> {
        self.note("state");
        Ok(vec![])
    }
    fn load_state(&mut self, _: &[Accumulated]) -> Result<()> {
        self.note("load_state");
        Ok(())
    }
}

#[test]
fn a_metric_within_another_is_asked_everything() -> Result<()> {
    type Grouping = (Tensor, Tensor, Tensor);
    fn parts(output: &Grouping) -> Grouped<'_> {
        (&output.0, &output.1, &output.2)
    }
    fn check<O>(mut metric: impl Metric<O>, output: &O, calls: &LoudMetric, all: &str) {
        metric.reset();
        metric.update(output).unwrap();
        metric.observe(output).unwrap();
        // The value of a `SubgroupDifference` needs two groups, so an error is fine.
        let _ = metric.compute();
        metric.usage();
        metric.validate().unwrap();
        let state = metric.state().unwrap();
        metric.load_state(&state).unwrap();
        let mut called = std::mem::take(&mut *calls.0.borrow_mut());
        called.sort();
        called.dedup();
        assert_eq!(called.join(" "), all);
    }
    let loud = LoudMetric::default();
    let all = "compute load_state observe reset state update usage validate";
    check(loud.clone(), &(), &loud, all);
    check(loud.clone().shared(), &(), &loud, all);
    let one = || Tensor::from_slice(&[1i64]);
    let output = (one(), one(), one());
    let make = || loud.clone();
    check(SubgroupMetric::of([1], make, parts), &output, &loud, all);
    check(SubgroupDifference::of([1], make, parts), &output, &loud, all);
    // These metrics have a usage of their own, and the last one does not pass on `observe`, because it updates its
    // inner metric itself.
    let own = "compute load_state observe reset state update validate";
    check(MetricGroup::new().metric("a", loud.clone()), &(), &loud, own);
    let fed = "compute load_state reset state update validate";
    check(RunningAverage::of_metric(loud.clone()), &(), &loud, fed);
    Ok(())
}

struct LoudPart;

impl Stateful for LoudPart {
    fn state_dict(&self) -> tch_ignite::Result<StateDict> {
        Ok(StateDict::new())
    }
    fn load_state_dict(&mut self, _: StateDict) -> tch_ignite::Result<()> {
        Ok(())
    }
    fn settings(&self) -> Map<String, Value> {
        Map::from_iter([("loud".to_owned(), json!(1))])
    }
    fn has_fixed_tensors(&self) -> bool {
        true
    }
    fn is_read_in_place(&self) -> bool {
        true
    }
    fn differs_by_rank(&self) -> bool {
        true
    }
}

impl Dataset for LoudPart {
    type Item = usize;
    fn len(&self) -> usize {
        3
    }
    fn is_empty(&self) -> bool {
        true
    }
    fn get(&self, index: usize, _: &mut SplitMix64) -> Result<usize> {
        Ok(index)
    }
}

impl Schedule for LoudPart {
    fn at(&self, event: u64) -> f64 {
        event as f64
    }
    fn validate(&self) -> tch_ignite::Result<()> {
        Err(tch_ignite::Error::State("loud".into()))
    }
    fn end(&self) -> Option<(u64, String)> {
        Some((1, "loud".into()))
    }
    fn length(&self) -> Option<u64> {
        Some(2)
    }
    fn fits(&self, _: u64) -> tch_ignite::Result<()> {
        Ok(())
    }
    fn arguments(&self) -> Option<Value> {
        Some(json!(1))
    }
    fn save(&self, _: u64) -> Map<String, Value> {
        Map::new()
    }
    fn load(&self, _: &Map<String, Value>) -> tch_ignite::Result<u64> {
        Ok(7)
    }
    fn simulate_values(&self, _: u64) -> tch_ignite::Result<Vec<(u64, f64)>> {
        Ok(vec![(4, 2.)])
    }
}

#[test]
fn boxes_and_shared_handles_answer_as_what_is_in_them() -> Result<()> {
    fn part(part: Box<dyn Stateful + '_>) {
        assert_eq!(part.settings().len(), 1);
        let answers = [part.has_fixed_tensors(), part.is_read_in_place(), part.differs_by_rank()];
        assert_eq!(answers, [true; 3]);
    }
    part(Box::new(LoudPart));
    part(Rc::new(RefCell::new(LoudPart)).into_stateful());
    part(Arc::new(Mutex::new(LoudPart)).into_stateful());

    fn dataset(data: impl Dataset<Item = usize>) -> Result<()> {
        let sample = data.get(2, &mut SplitMix64::new(0))?;
        assert_eq!((data.len(), data.is_empty(), sample), (3, true, 2));
        Ok(())
    }
    dataset(LoudPart)?;
    dataset(Arc::new(LoudPart))?;
    dataset(Box::new(LoudPart) as Box<dyn Dataset<Item = usize>>)?;
    dataset(LoudPart.map(|index, _| Ok(index)))?;

    fn schedule(schedule: impl Schedule) -> Result<()> {
        assert_eq!((schedule.at(5), schedule.length()), (5., Some(2)));
        assert!(schedule.validate().is_err() && schedule.fits(1).is_ok());
        assert_eq!(schedule.end().map(|end| end.0), Some(1));
        assert_eq!(schedule.arguments(), Some(json!(1)));
        assert_eq!((schedule.save(1).len(), schedule.load(&Map::new())?), (0, 7));
        assert_eq!(schedule.simulate_values(1)?, [(4, 2.)]);
        Ok(())
    }
    schedule(LoudPart)?;
    schedule(Box::new(LoudPart) as Box<dyn Schedule>)?;
    let step = StepLR::new(1., 2).gamma(0.5);
    let any = AnySchedule::from(step.clone());
    assert_eq!((any.length(), any.save(3)), (step.length(), step.save(3)));
    assert_eq!(any.fits(1).is_ok(), step.fits(1).is_ok());
    Ok(())
}

#[test]
fn names_in_a_group_are_told_apart_or_refused() -> Result<()> {
    let group = || {
        let inner = MetricGroup::new().metric("x", Mean::of(|x: &f64| -x));
        MetricGroup::new()
            .metric("a", inner)
            .metric("a/b", Mean::of(|x: &f64| x * x))
            .metric("a%2Fb", Mean::of(|x: &f64| 3. * x))
    };
    let mut first = group();
    (1..=3).try_for_each(|x| first.update(&f64::from(x)))?;
    let mut second = group();
    second.load_state(&first.state()?)?;
    let values = second.compute()?.flatten("g")?;
    let value = |name: &str| values.iter().find(|(known, _)| known == name).map(|(_, v)| *v);
    assert_eq!(value("g/a/x"), Some(-2.));
    assert_eq!(value("g/a/b"), Some(14. / 3.));
    assert_eq!(value("g/a%2Fb"), Some(6.));

    let clash = MetricGroup::new()
        .metric("a", MetricGroup::new().metric("b", Mean::of(|x: &f64| *x)))
        .metric("a/b", Mean::of(|x: &f64| *x));
    let mut engine = Engine::new(|_: &mut (), _, x: f64| Ok(x));
    engine.metric("g", clash);
    let error = engine.run(&mut (), vec![1.], Until::epochs(1)).unwrap_err();
    let error = format!("{:#}", anyhow::Error::from(error));
    assert!(error.contains("two metrics of a group have a value 'a/b'"), "{error}");
    let mut engine = Engine::new(|_: &mut (), _, x: f64| Ok(x));
    engine.metric("g", MetricGroup::new().metric("a", Mean::new()).metric("a", Mean::new()));
    let error = engine.run(&mut (), vec![1.], Until::epochs(1)).unwrap_err().to_string();
    assert!(error.contains("two metrics of a group are named 'a'"), "{error}");
    Ok(())
}

#[test]
fn the_name_of_a_group_stands_for_all_of_its_values() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("log.csv");
    let csv = CsvLogger::open(&path)?;
    let mut engine = Engine::new(|_: &mut (), _, x: f64| Ok(x));
    let group = MetricGroup::new()
        .metric("mean", Mean::new())
        .metric("doubled", Mean::of(|x: &f64| 2. * x));
    engine.metric("loss", group).metric("loss2", Mean::new());
    engine.attach(OutputHandler::each_epoch(&csv, "train").metric("loss"));
    let summary = engine.run(&mut (), vec![1., 2.], Until::epochs(1))?;
    assert_eq!(summary.warnings, [""; 0]);
    let text = std::fs::read_to_string(&path)?;
    let rows: Vec<_> = text.lines().skip(1).filter_map(|row| row.split_once(',')).collect();
    let rows: Vec<_> = rows.into_iter().map(|(_, row)| row).collect();
    assert_eq!(rows, ["1,train/loss/doubled,3", "1,train/loss/mean,1.5"]);
    Ok(())
}
