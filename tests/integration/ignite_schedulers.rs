//! Tests of the schedulers that take ignite's arguments: what they drive, their names, and what is refused when they are
//! attached.

use std::cell::RefCell;
use std::rc::Rc;

use tch::{Device, nn};
use tch_ignite::engine::{Engine, Event, Until};
use tch_ignite::optim::{GroupOptions, Optimizer, lr};
use tch_ignite::schedule::*;
use tch_ignite::{Error, Result};

fn store() -> nn::VarStore {
    let vs = nn::VarStore::new(Device::Cpu);
    nn::linear(vs.root() / "conv", 1, 1, Default::default());
    nn::linear(vs.root() / "fc", 1, 1, Default::default());
    vs
}

fn two_groups() -> Result<Optimizer> {
    Optimizer::sgd(&store())
        .group("base", |name| name.starts_with("conv"), lr(1.))
        .group("fc", |name| name.starts_with("fc"), lr(2.))
        .build()
}

type Trainer<'a> = Engine<'a, Vec<(f64, f64)>, i32, ()>;

/// A trainer that notes the learning rates of both groups at each step.
fn trainer(optimizer: &Optimizer) -> Trainer<'_> {
    Engine::new(|seen: &mut Vec<(f64, f64)>, _, _| {
        seen.push((optimizer.group("base")?.lr()?, optimizer.group("fc")?.lr()?));
        Ok(())
    })
}

fn rates(mut trainer: Trainer<'_>) -> Result<Vec<(f64, f64)>> {
    let mut seen = vec![];
    trainer.run(&mut seen, vec![0; 6], Until::epochs(1))?;
    Ok(seen)
}

#[test]
fn ignites_arguments_give_the_general_form() -> Result<()> {
    let optimizer = two_groups()?;
    let (base, fc) = (optimizer.group("base")?, optimizer.group("fc")?);
    let mut ours = trainer(&optimizer);
    ours.attach(
        LinearCyclicalScheduler::new(&base, "lr", 0.1, 1., 2)
            .monotonic(true)
            .warmup_duration(1)
            .cycle_mult(2.)
            .start_value_mult(0.5)
            .end_value_mult(0.7),
    )
    .attach(CosineAnnealingScheduler::new(&optimizer, "lr", 2., 0., 6).param_group_index(1));
    let schedule = LinearCyclical::new(0.1, 1., 2).monotonic(true).warmup_duration(1);
    let schedule = schedule.cycle_mult(2.).start_value_mult(0.5).end_value_mult(0.7);
    let mut general = trainer(&optimizer);
    general
        .attach(ParamScheduler::new("lr (base)", base.knob("lr")?, schedule))
        .attach(ParamScheduler::new("lr (fc)", fc.knob("lr")?, CosineAnnealing::new(2., 0., 6)));
    let seen = rates(general)?;
    assert_eq!(rates(ours)?, seen);
    assert_eq!((seen[0], seen[3].1), ((0.1, 2.), 1.));

    let mut ours = trainer(&optimizer);
    let points = [(0, 1.), (2, 0.)];
    ours.attach(PiecewiseLinearScheduler::new(&optimizer, "lr", points).param_group("fc"));
    assert_eq!(
        rates(ours)?.iter().map(|(_, fc)| *fc).collect::<Vec<_>>(),
        [1., 0.5, 0., 0., 0., 0.]
    );
    Ok(())
}

#[test]
fn names_are_made_of_the_parameter_and_the_group() -> Result<()> {
    let optimizer = two_groups()?;
    let fc = optimizer.group("fc")?;
    let vs = store();
    let single = Optimizer::adam(&vs).build()?;
    let cosine = |optimizer: &Optimizer| CosineAnnealingScheduler::new(optimizer, "lr", 1., 0., 10);
    for (scheduler, name) in [
        (cosine(&optimizer), "lr"),
        (cosine(&optimizer).param_group("fc"), "lr (fc)"),
        (cosine(&optimizer).param_group_index(0), "lr (base)"),
        (cosine(&optimizer).name("mine").param_group("fc"), "mine"),
        (cosine(&optimizer).param_group("fc").name("mine"), "mine"),
        (CosineAnnealingScheduler::new(&fc, "lr", 1., 0., 10), "lr (fc)"),
        (cosine(&single).param_group_index(0), "lr"),
        (CosineAnnealingScheduler::new(&single, "beta1", 0.9, 0.8, 10), "beta1"),
        (CosineAnnealingScheduler::new(&single.group_at(0)?, "beta1", 0.9, 0.8, 10), "beta1"),
    ] {
        assert_eq!(ParamScheduler::from(scheduler).name(), name);
    }
    Ok(())
}

#[test]
fn events_and_histories_are_chosen_where_it_is_attached() -> Result<()> {
    let optimizer = two_groups()?;
    let mut trainer = trainer(&optimizer);
    trainer.attach(
        OptimizerScheduler::of(&optimizer, "lr", StepLR::new(1., 1).gamma(0.5))
            .on(Event::IterationStarted.every(2))
            .save_history(true),
    );
    let mut seen = vec![];
    trainer.run(&mut seen, vec![0; 4], Until::epochs(1))?;
    assert_eq!(seen[1..], [(1., 1.), (1., 1.), (0.5, 0.5)]);
    assert_eq!(trainer.state.param_history["lr"], [vec![1., 1.], vec![0.5, 0.5]]);
    Ok(())
}

#[test]
fn what_is_wrong_is_told_with_the_schedulers_name_when_it_is_attached() -> Result<()> {
    let optimizer = two_groups()?;
    let cosine = |param: &str, size| CosineAnnealingScheduler::new(&optimizer, param, 1., 0., size);
    for (scheduler, text) in [
        (
            cosine("lr", 1),
            "scheduler 'lr': Argument cycle_size should be positive and larger than 1, but given 1",
        ),
        (
            cosine("lr", 9).param_group("head"),
            "scheduler 'lr (head)': no parameter group 'head'; this optimizer has: base, fc",
        ),
        (
            cosine("lr", 9).param_group_index(7),
            "scheduler 'lr (7)': no parameter group 7; this optimizer has: 0 ('base'), 1 ('fc')",
        ),
        (cosine("beta1", 9), "scheduler 'beta1': SGD has no hyper-parameter 'beta1'; it has: lr,"),
        (
            cosine("lr", 9).cycle_mult(-1.).param_group("fc").name("mine"),
            "scheduler 'mine': Argument cycle_mult should be positive",
        ),
    ] {
        let mut trainer = trainer(&optimizer);
        let error = trainer.add_handler(scheduler).unwrap_err().to_string();
        assert!(error.starts_with(text), "{error}");
    }
    // A wrong choice that is made good is none.
    let mut trainer = trainer(&optimizer);
    trainer.add_handler(cosine("lr", 9).param_group("head").param_group("fc"))?;
    let twice = trainer.add_handler(cosine("lr", 9).name("again")).unwrap_err().to_string();
    assert!(twice.contains("schedulers 'lr (fc)' and 'again' both set lr"), "{twice}");
    let mut unattached = cosine("lr", 9).param_group("head");
    let error = unattached.advance().unwrap_err().to_string();
    assert!(error.starts_with("no parameter group 'head'"), "{error}");
    Ok(())
}

#[test]
fn the_value_to_come_is_read_by_name() -> Result<()> {
    let optimizer = two_groups()?;
    let mut trainer = trainer(&optimizer);
    let error = trainer.get_param("lr").unwrap_err().to_string();
    assert_eq!(
        error,
        "no scheduler 'lr' is attached to this engine, nor any other: attach it first"
    );
    let shared = Rc::new(RefCell::new(ParamScheduler::new(
        "shared",
        optimizer.knob("momentum")?,
        StepLR::new(0.5, 1),
    )));
    trainer
        .attach(ParamGroupScheduler::new([
            LinearCyclicalScheduler::new(&optimizer, "lr", 1., 0., 4).param_group("base").into(),
            CosineAnnealingScheduler::new(&optimizer, "lr", 1., 0., 4).param_group("fc").into(),
        ]))
        .attach(shared.clone());
    assert_eq!(trainer.get_param("shared")?, 0.5);
    let mut seen = vec![];
    trainer.run(&mut seen, vec![0; 3], Until::epochs(1))?;
    assert_eq!(
        (trainer.get_param("lr (base)")?, trainer.get_param("lr (fc)")?),
        (0.5, CosineAnnealing::new(1., 0., 4).at(3))
    );
    let error = trainer.get_param("lr").unwrap_err().to_string();
    let known = "scheduler 'lr (base)', scheduler 'lr (fc)', scheduler 'shared'";
    assert!(
        error.starts_with("no scheduler 'lr' is attached") && error.ends_with(known),
        "{error}"
    );
    // A scheduler that is borrowed mutably is not looked into.
    let _borrowed = shared.borrow_mut();
    assert!(matches!(trainer.get_param("shared"), Err(Error::InvalidArgument(_))));
    Ok(())
}

#[test]
fn a_scheduler_goes_on_from_a_saved_state() -> Result<()> {
    let optimizer = two_groups()?;
    let make = || CosineAnnealingScheduler::new(&optimizer, "lr", 1., 0., 4).param_group("fc");
    let (mut whole, mut first) = (make(), make());
    let values: Vec<_> = (0..6).map(|_| whole.advance()).collect::<Result<_>>()?;
    for value in &values[..3] {
        assert_eq!(first.advance()?, *value);
    }
    let mut second = make();
    second.load_state_dict(&first.state_dict())?;
    assert_eq!(second.get_param()?, values[3]);
    let rest: Vec<_> = (3..6).map(|_| second.advance()).collect::<Result<_>>()?;
    assert_eq!(rest, values[3..]);

    // In a checkpoint of the engine.
    let mut one = trainer(&optimizer);
    one.attach(make());
    one.run(&mut vec![], vec![0; 3], Until::epochs(1))?;
    let saved = one.checkpoint(&mut vec![])?;
    let mut other = trainer(&optimizer);
    other.attach(make());
    other.restore(&mut vec![], saved, true)?;
    assert_eq!(other.get_param("lr (fc)")?, values[3]);
    Ok(())
}

/// The numbers of torch 2.13: `CyclicLR(o, 0.1, 1.0, step_size_up=3, step_size_down=2, scale_fn=...)`.
#[test]
fn the_cycles_of_cyclic_lr_are_scaled_by_a_function() {
    let close = |ours: f64, theirs: f64| assert!((ours - theirs).abs() < 1e-15, "{ours} {theirs}");
    let cyclic = CyclicLR::new(0.1, 1.).step_size_up(3.).step_size_down(2.);
    let halved = cyclic.clone().scale_fn(|cycle| 0.5f64.powi(cycle as i32 - 1));
    let momentum = halved.momentum(0.8, 0.9);
    let lrs = [0.1, 0.4, 0.7, 1., 0.55, 0.1, 0.25, 0.4, 0.55, 0.325, 0.1, 0.175, 0.25, 0.325];
    let momenta = [0.9, 0.8666666666666667, 0.8333333333333334, 0.8, 0.85, 0.9, 0.8833333333333333];
    for (event, value) in (0..).zip(lrs) {
        close(halved.at(event), value);
    }
    for (event, value) in (0..).zip(momenta) {
        close(momentum.at(event), value);
    }
    let falling =
        cyclic.scale_fn(|event| 0.9f64.powi(event as i32)).scale_mode(ScaleMode::Iterations);
    let lrs = [0.1, 0.37, 0.586, 0.7561, 0.395245, 0.1, 0.2594323, 0.38697814, 0.487420489];
    for (event, value) in (0..).zip(lrs) {
        close(falling.at(event), value);
    }
    // A position fits only a schedule whose other arguments are the same.
    let state = halved.save(3);
    assert_eq!(halved.clone().scale_fn(|_| 1.).load(&state).unwrap(), 3);
    let higher = CyclicLR::new(0.1, 2.).step_size_up(3.).step_size_down(2.);
    for other in [
        higher.scale_fn(|_| 1.),
        halved.clone().scale_mode(ScaleMode::Iterations),
        CyclicLR::new(0.1, 1.).step_size_up(3.).step_size_down(2.),
    ] {
        let text = other.load(&state).unwrap_err().to_string();
        assert!(text.contains("other arguments"), "{text}");
    }
    let text = PlannedSchedule::new("lr", None, halved.clone()).unwrap_err().to_string();
    assert_eq!(text, "CyclicLR cannot be written to a file");
    assert!(PlannedSchedule::new("lr", None, halved.clone().scale(2.)).is_err());
    assert_eq!(halved.clone(), halved);
    assert_ne!(halved, falling);
}

/// The numbers are those of the papers' formulas, written in Python.
#[test]
fn rex_and_the_power_law_are_those_of_their_papers() -> Result<()> {
    let rex =
        [0.3, 0.27692307692307694, 0.25, 0.2181818181818182, 0.18, 0.13333333333333333, 0.075, 0.];
    for (event, value) in (0..).zip(rex) {
        assert!((Rex::new(0.3, 7).at(event) - value).abs() < 1e-16, "{event}");
    }
    assert_eq!(Rex::new(0.3, 7).at(100), 0.);
    assert!(Rex::new(0.3, 7).fits(7).is_ok() && Rex::new(0.3, 7).fits(6).is_err());
    assert!(Rex::new(0.3, 0).validate().is_err());

    let power = |batch_size| Power::new(0.02, batch_size, 2048).warmup(5).decay(40, 10);
    let events = [0, 3, 5, 6, 20, 29, 30, 35, 40, 50];
    let of_one = [
        0.,
        0.012,
        0.02,
        0.02,
        0.01777282308613414,
        0.014704786953469247,
        0.014452729544211132,
        0.007226364772105566,
        0.,
        0.,
    ];
    let of_many = [0., 0.012, 0.02, 0.02, 0.02, 0.02, 0.02, 0.01, 0., 0.];
    for (schedule, values) in [(power(1), of_one), (power(16), of_many)] {
        for (event, value) in events.into_iter().zip(values) {
            assert!((schedule.at(event) - value).abs() < 1e-16, "{event}");
        }
    }
    assert_eq!((power(1).length(), Power::new(1., 1, 1).length()), (Some(40), Some(0)));
    assert_eq!(Power::new(0.02, 16, 2048).at(0), 0.02);
    let text = power(1).warmup(31).validate().unwrap_err().to_string();
    assert_eq!(
        text,
        "Argument decay should be at most what the warm-up leaves of total_iters, which is 9, but given 10"
    );
    for wrong in
        [power(0), power(1).a(f64::NAN), Power::new(f64::INFINITY, 1, 1), Power::new(1., 1, 0)]
    {
        assert!(wrong.validate().is_err());
    }
    Ok(())
}

#[test]
fn groups_with_numbers_have_options() -> Result<()> {
    let vs = nn::VarStore::new(Device::Cpu);
    let _ = (vs.root().ones("a", &[1]), vs.root().set_group(2).ones("b", &[1]));
    let optimizer = Optimizer::muon(&vs)
        .weight_decay(0.3)
        .momentum(0.5)
        .name_group(2, "vectors", GroupOptions::adamw().betas(0.8, 0.9))
        .name_group(0, "rest", lr(0.25))
        .build()?;
    let group = |name: &str| optimizer.group(name);
    assert_eq!(optimizer.group_names()?, ["rest", "group_1", "vectors"]);
    assert_eq!((group("vectors")?.algorithm(), group("vectors")?.betas()?), ("AdamW", (0.8, 0.9)));
    assert_eq!((group("rest")?.algorithm(), group("rest")?.lr()?), ("Muon", 0.25));
    assert_eq!((group("rest")?.weight_decay()?, group("group_1")?.momentum()?), (0.3, 0.5));
    assert_eq!(group("vectors")?.weight_decay()?, 0.01);
    Ok(())
}
