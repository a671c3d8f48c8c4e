//! Tests of schedulers that consist of several schedules: a resumed run must equal an uninterrupted one.

use std::sync::{Arc, Mutex};

use tch::{Device, Kind, Tensor};
use tch_ignite::Result;
use tch_ignite::checkpoint::StateDict;
use tch_ignite::data::{Batch, Loader};
use tch_ignite::engine::{Engine, Event, Handler, Until};
use tch_ignite::optim::Knob;
use tch_ignite::schedule::*;

type Cell = Arc<Mutex<f64>>;

fn knob(cell: &Cell) -> Knob {
    let (read, write) = (cell.clone(), cell.clone());
    Knob::new("value", move || *read.lock().unwrap(), move |value| *write.lock().unwrap() = value)
}

fn value(cell: &Cell) -> u64 {
    cell.lock().unwrap().to_bits()
}

#[test]
fn functions_and_chains_resume() -> Result<()> {
    let schedules: [fn() -> AnySchedule; 3] = [
        || LambdaLR::new(2., |event| (event as f64).sin()).into(),
        || MultiplicativeLR::new(2., |event| 1. - 1. / (event + 2) as f64).into(),
        || {
            let parts: [AnySchedule; 3] = [
                ConstantLR::new(0.3).factor(0.5).total_iters(7).into(),
                CosineAnnealingLR::new(0.3, 9).into(),
                MultiStepLR::new(0.3, [3, 11]).into(),
            ];
            ChainedScheduler::new(parts).into()
        },
    ];
    for schedule in schedules {
        let sequence = schedule().simulate_values(30)?;
        for k in 0..30 {
            let cell = Cell::default();
            let mut first = ParamScheduler::new("a", knob(&cell), schedule());
            for _ in 0..k {
                first.advance()?;
            }
            let mut second = ParamScheduler::new("a", knob(&cell), schedule());
            second.load_state_dict(&first.state_dict())?;
            for (_, expected) in &sequence[k..] {
                second.advance()?;
                assert_eq!(value(&cell), expected.to_bits());
            }
        }
    }
    Ok(())
}

#[test]
fn a_group_of_schedulers_resumes() -> Result<()> {
    let make = |cells: &[Cell; 2]| {
        ParamGroupScheduler::new([
            ParamScheduler::new("a", knob(&cells[0]), AnySchedule::from(StepLR::new(1., 3))),
            ParamScheduler::new("b", knob(&cells[1]), CosineAnnealing::new(1., 0., 7).into()),
        ])
    };
    let both = |cells: &[Cell; 2]| cells.each_ref().map(value);
    let (straight, resumed) = (<[Cell; 2]>::default(), <[Cell; 2]>::default());
    let mut first = make(&straight);
    for _ in 0..10 {
        first.advance()?;
    }
    let mut second = make(&resumed);
    second.load_state_dict(&first.state_dict())?;
    for _ in 10..40 {
        first.advance()?;
        second.advance()?;
        assert_eq!(both(&straight), both(&resumed));
    }
    Ok(())
}

#[test]
fn a_plateau_scheduler_resumes_with_its_best_and_its_cooldown() -> Result<()> {
    let metrics: Vec<f64> = (0..60).map(|i| (f64::from(i) * 0.7).sin() + 2.).collect();
    let make = |cell: &Cell| {
        Ok::<_, tch_ignite::Error>(
            ReduceLROnPlateauScheduler::min("lr", knob(cell), "loss")?
                .factor(0.7)
                .patience(1)
                .cooldown(2),
        )
    };
    for k in [0, 1, 5, 17, 30] {
        let cell = Cell::default();
        *cell.lock().unwrap() = 1.;
        let mut first = make(&cell)?;
        for metric in &metrics[..k] {
            first.advance(*metric)?;
        }
        let other = Cell::default();
        *other.lock().unwrap() = *cell.lock().unwrap();
        let mut second = make(&other)?;
        second.load_state_dict(&first.state_dict())?;
        for metric in &metrics[k..] {
            first.advance(*metric)?;
            second.advance(*metric)?;
            assert_eq!(value(&cell), value(&other));
        }
        assert!(*cell.lock().unwrap() < 1.);
    }
    let mut state = make(&Cell::default())?.state_dict();
    state.remove("best");
    state.remove("cooldown_counter");
    let error = make(&Cell::default())?.load_state_dict(&state).unwrap_err().to_string();
    assert!(error.contains("cooldown_counter"), "{error}");
    Ok(())
}

#[test]
fn a_batch_size_scheduler_resumes() -> Result<()> {
    let x = Tensor::arange(100, (Kind::Float, Device::Cpu));
    let schedule = || StepLR::new(4., 2).gamma(2.);
    let sizes = |scheduler: BatchSizeScheduler<StepLR>, loader: &Loader, epochs| {
        let mut engine = Engine::new(|_: &mut (), _, _: ()| Ok(()));
        let mut seen = vec![];
        let scheduler = std::rc::Rc::new(std::cell::RefCell::new(scheduler));
        let attached = scheduler.clone();
        let mut attached: Box<dyn Handler<(), (), ()>> = Box::new(attached);
        for _ in 0..epochs {
            attached.call(Event::EpochStarted, &mut (), &mut engine)?;
            seen.push((loader.batch_size(), engine.state.epoch_length));
        }
        let state = scheduler.borrow().state_dict();
        anyhow::Ok((seen, state))
    };
    let loader = Loader::new(&x, &x, 1)?;
    let (all, _) = sizes(BatchSizeScheduler::new(&loader, schedule()), &loader, 7).unwrap();
    assert_eq!(all[..3], [(4, Some(25)), (4, Some(25)), (8, Some(13))]);
    let loader = Loader::new(&x, &x, 1)?;
    let (before, state) = sizes(BatchSizeScheduler::new(&loader, schedule()), &loader, 3).unwrap();
    let loader = Loader::new(&x, &x, 1)?;
    let mut second = BatchSizeScheduler::new(&loader, schedule());
    second.load_state_dict(&state)?;
    assert_eq!(loader.batch_size(), 8);
    let (after, _) = sizes(second, &loader, 4).unwrap();
    assert_eq!([before, after].concat(), all);
    let mut other = BatchSizeScheduler::new(&loader, StepLR::new(4., 3).gamma(2.));
    assert!(other.load_state_dict(&state).is_err());
    Ok(())
}

#[test]
fn epochs_follow_the_batch_size() -> Result<()> {
    let x = Tensor::arange(24, (Kind::Float, Device::Cpu));
    let loader = Loader::new(&x, &x, 6)?.shuffle(1);
    let mut trainer = Engine::new(|seen: &mut Vec<Vec<f64>>, engine, (x, _): Batch| {
        let x: Vec<f64> = Vec::try_from(x.to_kind(Kind::Double))?;
        seen.resize(engine.state.epoch as usize, vec![]);
        seen[engine.state.epoch as usize - 1].extend(x);
        Ok(())
    });
    trainer.attach(BatchSizeScheduler::new(&loader, StepLR::new(6., 1).gamma(0.5)));
    let mut seen = vec![];
    let summary = trainer.run(&mut seen, &loader, Until::epochs(3))?;
    // The batches have 6, 3 and 2 samples, and every epoch is one pass.
    assert_eq!(summary.iterations, 4 + 8 + 12);
    for epoch in &mut seen {
        epoch.sort_by(f64::total_cmp);
        assert_eq!(*epoch, (0..24).map(f64::from).collect::<Vec<_>>());
    }
    Ok(())
}

#[test]
fn a_batch_size_that_is_refused_does_not_stay() -> Result<()> {
    let x = Tensor::arange(24, (Kind::Float, Device::Cpu));
    let loader = Loader::new(&x, &x, 8)?.drop_last(true);
    let mut trainer = Engine::new(|_: &mut (), _, _: Batch| Ok(()));
    trainer.attach(BatchSizeScheduler::new(&loader, StepLR::new(12., 1).gamma(4.)));
    let error = trainer.run(&mut (), &loader, Until::epochs(2)).unwrap_err();
    assert!(format!("{error:?}").contains("make no batch of that size"), "{error:?}");
    assert_eq!((loader.batch_size(), trainer.state.epoch_length), (12, Some(2)));
    Ok(())
}

#[test]
fn an_epoch_gone_on_with_keeps_its_batch_size() -> Result<()> {
    let x = Tensor::arange(24, (Kind::Float, Device::Cpu));
    let run = |fails_at: Option<u64>| -> Result<Vec<Vec<f64>>> {
        let loader = Loader::new(&x, &x, 6)?.shuffle(1);
        let mut trainer = Engine::new(|seen: &mut Vec<Vec<f64>>, _, (x, _): Batch| {
            seen.push(Vec::try_from(x.to_kind(Kind::Double))?);
            Ok(())
        });
        trainer.attach(BatchSizeScheduler::new(&loader, StepLR::new(6., 1).gamma(0.5)));
        let mut seen = vec![];
        if let Some(iteration) = fails_at {
            trainer.on(Event::IterationCompleted.once(iteration), |_, _| anyhow::bail!("once"));
            assert!(trainer.run(&mut seen, &loader, Until::epochs(3)).is_err());
        }
        trainer.run(&mut seen, &loader, Until::epochs(3))?;
        Ok(seen)
    };
    let all = run(None)?;
    for iteration in 1..=all.len() as u64 {
        assert_eq!(run(Some(iteration))?, all, "{iteration}");
    }
    Ok(())
}

#[test]
fn an_epoch_resumed_in_another_process_keeps_its_batch_size() -> Result<()> {
    let x = Tensor::arange(24, (Kind::Float, Device::Cpu));
    let make = || -> Result<_> {
        let loader = Loader::new(&x, &x, 6)?.shuffle(1);
        let mut trainer = Engine::new(|seen: &mut Vec<Vec<f64>>, _, (x, _): Batch| {
            seen.push(Vec::try_from(x.to_kind(Kind::Double))?);
            Ok(())
        });
        trainer.attach(BatchSizeScheduler::new(&loader, StepLR::new(6., 1).gamma(0.5)));
        Ok((trainer, loader))
    };
    let (mut trainer, loader) = make()?;
    let mut all = vec![];
    trainer.run(&mut all, &loader, Until::epochs(3))?;
    for iteration in 1..=all.len() {
        let (mut trainer, loader) = make()?;
        let mut seen = vec![];
        trainer.on(Event::IterationCompleted.once(iteration as u64), |_, engine| {
            engine.interrupt();
            Ok(())
        });
        trainer.run(&mut seen, &loader, Until::epochs(3))?;
        let state = trainer.checkpoint(&seen)?;
        let (mut next, loader) = make()?;
        next.restore(&mut seen, state, true)?;
        let summary = next.run(&mut seen, &loader, Until::epochs(3))?;
        assert_eq!(summary.warnings, [""; 0]);
        assert_eq!(seen, all, "{iteration}");
    }
    Ok(())
}

#[test]
fn arguments_changed_after_a_look_count() {
    let cosine = CosineAnnealing::new(1., 0., 10);
    cosine.at(25);
    assert_eq!(
        cosine.cycle_mult(2.).at(25),
        CosineAnnealing::new(1., 0., 10).cycle_mult(2.).at(25)
    );
    let step = StepLR::new(1., 2);
    step.at(4);
    assert_eq!(step.gamma(0.5).at(4), 0.25);
    let constant = ConstantLR::new(1.);
    constant.at(0);
    assert_eq!(constant.factor(0.5).at(0), 0.5);
    let restarts = CosineAnnealingWarmRestarts::new(1., 2);
    restarts.at(5);
    let fresh = CosineAnnealingWarmRestarts::new(1., 2).t_mult(2);
    assert_eq!(restarts.t_mult(2).at(5), fresh.at(5));
}

#[test]
fn a_batch_size_that_changes_after_epochs_is_that_of_the_whole_epoch() -> Result<()> {
    let x = Tensor::arange(12, (Kind::Float, Device::Cpu));
    for event in [Event::EpochStarted, Event::EpochCompleted] {
        let loader = Loader::new(&x, &x, 2)?;
        let mut trainer = Engine::new(|sizes: &mut Vec<i64>, _, (x, _): Batch| {
            sizes.push(x.size()[0]);
            Ok(())
        });
        trainer.attach(BatchSizeScheduler::new(&loader, StepLR::new(4., 1).gamma(1.5)).on(event));
        let mut sizes = vec![];
        trainer.run(&mut sizes, &loader, Until::epochs(3))?;
        assert_eq!(sizes, [4, 4, 4, 6, 6, 9, 3], "{event}");
    }
    Ok(())
}

#[test]
fn a_plateau_with_other_arguments_is_told_from_the_saved_one() -> Result<()> {
    type Plateau = ReduceLROnPlateauScheduler;
    fn save(plateau: &Plateau) -> Result<StateDict> {
        <Plateau as Handler<(), (), ()>>::save_state(plateau)?
            .ok_or_else(|| tch_ignite::Error::State("no state".into()))
    }
    let cell = Cell::default();
    *cell.lock().unwrap() = 1.;
    let make = || ReduceLROnPlateauScheduler::min("lr", knob(&cell), "loss");
    let mut first = make()?.patience(0);
    first.advance(1.)?;
    first.advance(2.)?;
    let load = |mut plateau: Plateau, state: StateDict, strict: bool| match strict {
        true => <Plateau as Handler<(), (), ()>>::load_state(&mut plateau, state).map(|()| vec![]),
        false => <Plateau as Handler<(), (), ()>>::load_state_partially(&mut plateau, state),
    };
    assert_eq!(load(make()?.patience(0), save(&first)?, true)?, [""; 0]);
    let other = || -> Result<Plateau> {
        Ok(ReduceLROnPlateauScheduler::max("lr", knob(&cell), "accuracy")?.patience(0))
    };
    let error = load(other()?, save(&first)?, true).unwrap_err().to_string();
    assert!(error.contains("metric was \"loss\"") && error.contains("mode was \"min\""), "{error}");
    assert_eq!(load(other()?, save(&first)?, false)?.len(), 2);
    // A state is refused if it has another number of groups, or a factor that no reduction makes.
    for reductions in [vec![0.1, 0.1], vec![0.], vec![2.]] {
        let mut state = save(&first)?;
        state.set_value("reductions", &reductions)?;
        assert!(load(make()?.patience(0), state, true).is_err(), "{reductions:?}");
    }
    for refused in [make()?.eps(f64::NAN), make()?.min_value([f64::INFINITY])] {
        assert!(<Plateau as Handler<(), (), ()>>::spec(&refused).is_err());
    }
    Ok(())
}

#[test]
fn whether_a_history_is_saved_is_said_by_the_program() -> Result<()> {
    let cell = Cell::default();
    let make = |on| ParamScheduler::new("lr", knob(&cell), StepLR::new(1., 2)).save_history(on);
    let mut scheduler = make(true);
    scheduler.load_state_dict(&make(false).state_dict())?;
    assert_eq!(scheduler.state_dict()["save_history"], true);
    Ok(())
}
