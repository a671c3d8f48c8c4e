//! Handlers at work together: evaluators, what acts on their metrics, profiles, batches passed over.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::Result;
use tch_ignite::engine::{Engine, Event, Stop, Until};
use tch_ignite::handlers::{EarlyStopping, Evaluate, SkipBatch, TimeLimit};
use tch_ignite::loggers::{CsvLogger, Logger, OutputHandler};
use tch_ignite::metrics::{Mean, Metric, MetricGroup, RunningAverage, Usage};
use tch_ignite::optim::Knob;
use tch_ignite::schedule::ReduceLROnPlateauScheduler;

type Evaluator<'a> = Engine<'a, f64, f64, f64>;

/// Gives `epoch` times each number.
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
    // The loss grows from epoch to epoch: the first is best.
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
    // The data is asked once more when it is exhausted.
    let expected =
        [("data", None, 9), ("step", None, 8), ("handlers", iteration, 8), ("handlers", epoch, 2)];
    assert_eq!(counts, expected);
    assert_eq!((handlers[0].event, handlers[0].count), (iteration, 4));
    assert!(handlers[0].name.contains("tests/handlers.rs") && handlers[0].total.as_millis() >= 8);
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
    // The mean of sums over each epoch: 0.4666…, 0.9666… and 1.4666…, and ignite's average of them.
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
