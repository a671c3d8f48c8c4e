//! Tests of what an engine tells about itself: metrics, the last event, the time, the best checkpoint.

use anyhow::Result;
use tch::nn::VarStore;
use tch::{Device, Kind, Tensor};
use tch_ignite::checkpoint::{Checkpoint, Mode, best_checkpoint, load_best};
use tch_ignite::engine::{Engine, Event, Metrics, State, Until, keep_random_state};
use tch_ignite::handlers::Evaluate;
use tch_ignite::metrics::Mean;

use crate::common;

#[test]
fn metrics_print_themselves_in_one_line() {
    let mut metrics = Metrics::default();
    assert_eq!(metrics.to_string(), "");
    metrics.set("loss", 0.22174);
    metrics.set("lr", 1e-5);
    metrics.set("nan", f64::NAN);
    metrics.set("recall", Tensor::from_slice(&[0.5, 1.]));
    metrics.set("matrix", Tensor::zeros([3, 3], (Kind::Double, Device::Cpu)));
    metrics.set("big", 12_345_678.);
    assert_eq!(
        metrics.to_string(),
        "big: 1.235e7, loss: 0.2217, lr: 1.000e-5, matrix: a tensor of shape [3, 3], nan: NaN, recall: [0.5000, 1.0000]"
    );
}

#[test]
fn a_metric_can_be_detached_by_its_id() -> Result<()> {
    let mut engine = Engine::new(|_: &mut (), _, x: f64| Ok(x));
    let id = engine.add_metric("mean", Mean::new())?;
    assert!(engine.has_event_handler(id));
    let twice = engine.add_metric("mean", Mean::new()).unwrap_err().to_string();
    assert!(twice.contains("'mean'") && twice.contains("another name"), "{twice}");
    engine.run(&mut (), vec![1.0, 3.0], Until::epochs(1))?;
    engine.remove_event_handler(id)?;
    engine.metric("other", Mean::new());
    engine.run(&mut (), vec![5.0], Until::epochs(1))?;
    assert_eq!(engine.state.metrics.get("mean")?, 2.);
    assert_eq!(engine.state.metrics.get("other")?, 5.);
    // The name is free again.
    engine.add_metric("mean", Mean::new())?;
    Ok(())
}

#[test]
fn the_engine_knows_the_event_that_it_fired_last() -> Result<()> {
    const OWN: Event = Event::custom("own");
    let mut engine = Engine::new(|_: &mut Vec<Event>, _: &mut Engine<_, f64, f64>, x: f64| Ok(x));
    assert_eq!(engine.last_event_name(), None);
    engine.register_events([OWN])?;
    engine.on(Event::EpochCompleted, |seen, engine| {
        seen.extend(engine.last_event_name());
        engine.fire_event(OWN, seen)?;
        seen.extend(engine.last_event_name());
        Ok(())
    });
    engine.on(OWN, |seen, engine| {
        seen.extend(engine.last_event_name());
        Ok(())
    });
    let mut seen = vec![];
    engine.run(&mut seen, vec![1.0], Until::epochs(1))?;
    assert_eq!(seen, [Event::EpochCompleted, OWN, Event::EpochCompleted]);
    assert_eq!(engine.last_event_name(), Some(Event::Completed));
    engine.fire_event(OWN, &mut seen)?;
    assert_eq!(engine.last_event_name(), Some(OWN));
    Ok(())
}

#[test]
fn the_summary_says_where_the_time_went() -> Result<()> {
    let pause = |millis| std::thread::sleep(std::time::Duration::from_millis(millis));
    let mut engine = Engine::new(move |_: &mut (), _, _: i32| {
        pause(12);
        Ok(())
    });
    engine.on(Event::EpochCompleted, move |_, _| {
        pause(10);
        Ok(())
    });
    let plain = engine.run(&mut (), vec![0; 2], Until::epochs(1))?;
    assert!(plain.time.is_none() && !plain.to_string().contains('%'), "{plain}");
    engine.profile();
    for _ in 0..2 {
        // The second run does not count the first one.
        let summary = engine.run(&mut (), vec![0; 2], Until::epochs(1))?;
        let time = summary.time.unwrap_or_default();
        assert!((24..80).contains(&time.steps.as_millis()), "{time:?}");
        assert!((10..60).contains(&time.handlers.as_millis()), "{time:?}");
        let text = summary.to_string();
        assert!(text.contains("steps ") && text.lines().count() == 1, "{text}");
    }
    Ok(())
}

#[test]
fn an_evaluation_may_leave_the_random_numbers_as_they_were() -> Result<()> {
    let _serial = common::serial();
    let draw = || Tensor::rand([1], (Kind::Double, Device::Cpu)).double_value(&[0]);
    let trained = |evaluates: bool, keeps: bool| -> Result<Vec<f64>> {
        tch::manual_seed(3);
        let mut trainer = Engine::new(|drawn: &mut Vec<f64>, _, (): ()| {
            drawn.push(Tensor::rand([1], (Kind::Double, Device::Cpu)).double_value(&[0]));
            Ok(())
        });
        if evaluates {
            let evaluator = Engine::new(move |_: &mut Vec<f64>, _, (): ()| Ok(draw()));
            let evaluate = Evaluate::each_epoch("val", evaluator, vec![(); 3]);
            trainer.attach(evaluate.keep_random_state(keeps));
        }
        let mut drawn = vec![];
        trainer.run(&mut drawn, vec![(); 2], Until::epochs(3))?;
        Ok(drawn)
    };
    let alone = trained(false, false)?;
    assert_eq!(trained(true, true)?, alone);
    assert_ne!(trained(true, false)?, alone);
    // After an error and a panic, too.
    tch::manual_seed(4);
    let expected = draw();
    tch::manual_seed(4);
    let failed = keep_random_state(|| -> tch_ignite::Result<()> {
        draw();
        Err(tch_ignite::Error::State("no".into()))
    });
    assert_eq!(failed.unwrap_err().to_string(), "no");
    let panicked = std::panic::catch_unwind(|| {
        keep_random_state(|| -> tch_ignite::Result<()> {
            draw();
            std::panic::resume_unwind(Box::new("no"))
        })
    });
    assert!(panicked.is_err());
    assert_eq!(draw(), expected);
    Ok(())
}

/// Runs epochs whose weight and metric are these numbers.
fn run_with(
    folder: &std::path::Path,
    values: &[f64],
    attach: impl FnOnce(&mut Engine<Tensor, f64, ()>, &VarStore),
) -> Result<VarStore> {
    let vs = VarStore::new(Device::Cpu);
    let mut weight = vs.root().zeros("weight", &[1]);
    let mut trainer = Engine::new(|weight: &mut Tensor, engine: &mut Engine<_, _, ()>, value| {
        let _ = tch::no_grad(|| weight.fill_(value));
        engine.state.metrics.set("accuracy", value);
        engine.state.metrics.set("loss", 1. - value);
        Ok(())
    });
    trainer.track("model", &vs);
    attach(&mut trainer, &vs);
    let epochs = values.len() as u64;
    trainer.run(&mut weight, values.to_vec(), Until::epochs(epochs).epoch_length(1))?;
    assert!(folder.exists());
    Ok(vs)
}

fn weight(vs: &VarStore) -> f64 {
    vs.variables()["weight"].double_value(&[0])
}

#[test]
fn the_best_checkpoint_is_loaded_after_the_run_and_from_the_folder() -> Result<()> {
    let root = tempfile::tempdir()?;
    let other = || {
        let vs = VarStore::new(Device::Cpu);
        let _ = vs.root().zeros("weight", &[1]);
        vs
    };
    for (name, mode, metric) in [("max", Mode::Max, "accuracy"), ("min", Mode::Min, "loss")] {
        let folder = root.path().join(name);
        let vs = run_with(&folder, &[0.25, 0.75, 0.5], |trainer, _| {
            // The newest checkpoints, without a score, are in the same folder.
            trainer.attach(Checkpoint::new(&folder).best(2, metric, mode).name("best"));
            trainer.attach(Checkpoint::new(&folder).n_saved(2));
        })?;
        assert_eq!(weight(&vs), 0.5);
        let path = load_best(&vs, &folder, "model")?;
        assert_eq!(weight(&vs), 0.75);
        assert_eq!(path, best_checkpoint(&folder)?);
        let fresh = other();
        load_best(&fresh, &folder, "model")?;
        assert_eq!(weight(&fresh), 0.75);
        let text = load_best(&fresh, &folder, "net").unwrap_err().to_string();
        assert!(text.contains("no part 'net'") && text.contains("model"), "{text}");
    }
    Ok(())
}

#[test]
fn the_best_of_weights_and_of_the_latest_run_counts() -> Result<()> {
    let root = tempfile::tempdir()?;
    let folder = root.path().join("weights");
    let scored = |trainer: &mut Engine<Tensor, f64, ()>, vs: &VarStore| {
        let score = |state: &State<f64, ()>| state.metrics.get("accuracy");
        trainer.attach(Checkpoint::new(&folder).score_function(score).weights(vs));
    };
    let _ = run_with(&folder, &[0.25, 0.9], scored)?;
    let vs = run_with(&folder, &[0.25, 0.75, 0.5], scored)?;
    load_best(&vs, &folder, "whatever")?;
    // An earlier run had a better one, which is not this run's.
    assert_eq!(weight(&vs), 0.75);
    Ok(())
}

#[test]
fn a_whole_number_without_a_name_is_a_score_too() -> Result<()> {
    let root = tempfile::tempdir()?;
    let folder = root.path().join("whole");
    let vs = run_with(&folder, &[0.25, 0.75, 0.5], |trainer, _| {
        let percent = |state: &State<f64, ()>| {
            state.metrics.get("accuracy").map(|accuracy| (accuracy * 100.) as i64)
        };
        trainer.attach(Checkpoint::new(&folder).score_function(percent).n_saved(2));
    })?;
    load_best(&vs, &folder, "model")?;
    assert_eq!(weight(&vs), 0.75);
    Ok(())
}

#[test]
fn a_folder_without_one_best_file_says_why() -> Result<()> {
    let root = tempfile::tempdir()?;
    let text = |folder: &std::path::Path| best_checkpoint(folder).unwrap_err().to_string();
    assert!(text(&root.path().join("none")).contains("there is no such folder"));
    let plain = root.path().join("plain");
    run_with(&plain, &[0.5], |trainer, _| {
        trainer.attach(Checkpoint::new(&plain));
    })?;
    let says_plain = text(&plain);
    assert!(
        says_plain.contains("no file in this folder has a score (1 checkpoints"),
        "{says_plain}"
    );
    let two = root.path().join("two");
    run_with(&two, &[0.5], |trainer, _| {
        trainer.attach(Checkpoint::new(&two).best(1, "accuracy", Mode::Max));
        trainer.attach(Checkpoint::new(&two).best(1, "loss", Mode::Min));
    })?;
    let says = text(&two);
    assert!(says.contains("accuracy=0.5000") && says.contains("loss=0.5000"), "{says}");
    // The files of other programs do not matter; one that may be the best does.
    std::fs::write(plain.join("notes.txt"), "half")?;
    assert_eq!(text(&plain), says_plain);
    std::fs::write(plain.join("damaged.safetensors"), "half")?;
    let says = text(&plain);
    assert!(says.contains("damaged.safetensors") && says.contains("cannot be read"), "{says}");
    Ok(())
}
