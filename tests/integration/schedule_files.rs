//! Tests of plans of schedules from JSON and TOML files: what is read, and what is refused with which place in the
//! file.
#![cfg(feature = "toml")]

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use tch::{Device, nn};
use tch_ignite::engine::{Engine, Event, OPTIMIZER_STEPPED, Until};
use tch_ignite::optim::{Knob, Optimizer, lr};
use tch_ignite::schedule::{
    AnySchedule, Concat, ConstantLR, CosineAnnealing, ExponentialLR, LambdaLR, LinearCyclical,
    LinearLR, MultiStepLR, OneCycleLR, PiecewiseLinear, PlannedSchedule, RunLength, Schedule,
    SchedulePlan, StepLR, WarmupStableDecay, create_lr_scheduler_with_warmup,
};

const RUN: RunLength = RunLength::new(100, 10);

fn toml(entry: &str) -> Result<SchedulePlan, String> {
    SchedulePlan::from_toml(&format!("[[schedule]]\n{entry}")).map_err(|error| error.to_string())
}

/// The error of a plan of one entry, when it is read or resolved.
fn refused(entry: &str) -> String {
    match toml(entry) {
        Ok(plan) => plan.resolve(RUN).unwrap_err().to_string(),
        Err(error) => error,
    }
}

fn resolved(entry: &str) -> AnySchedule {
    toml(entry).unwrap().resolve(RUN).unwrap().remove(0)
}

fn optimizer() -> Optimizer {
    let vs = nn::VarStore::new(Device::Cpu);
    nn::linear(vs.root() / "conv", 1, 1, Default::default());
    nn::linear(vs.root() / "fc", 1, 1, Default::default());
    Optimizer::sgd(&vs)
        .group("base", |name| name.starts_with("conv"), lr(1.))
        .group("fc", |name| name.starts_with("fc"), lr(2.))
        .build()
        .unwrap()
}

fn examples() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/schedules");
    let files = std::fs::read_dir(folder).unwrap();
    files.map(|file| file.unwrap().path()).collect()
}

#[test]
fn schedules_make_the_round_trip() {
    let entry = |index: usize, schedule: AnySchedule| {
        let group = format!("group {index}");
        PlannedSchedule::new("lr", Some(&group), schedule).unwrap()
    };
    let warmup = create_lr_scheduler_with_warmup(ExponentialLR::new(0.1, 0.9), 0., 5, 0.1).unwrap();
    let schedules: Vec<AnySchedule> = vec![
        LinearCyclical::new(0.1 + 0.2, 1. / 3., 100).end_value_mult(0.7).into(),
        CosineAnnealing::new(1., 0., 100).warmup_duration(3).into(),
        PiecewiseLinear::new([(0, 0.), (3, 1e-300), (9, 0.25)]).into(),
        OneCycleLR::new(1., 100).into(),
        OneCycleLR::new(1., 100).momentum(0.85, 0.95).into(),
        MultiStepLR::new(1., [3, 7]).into(),
        WarmupStableDecay::new(1., 2, 3, 4).into(),
        StepLR::new(1., 10).scale(0.5).skip(3).into(),
        warmup,
    ];
    let entries: Vec<_> =
        schedules.iter().cloned().enumerate().map(|(i, schedule)| entry(i, schedule)).collect();
    let plan = SchedulePlan::new(entries).unwrap();
    let from_toml = SchedulePlan::from_toml(&plan.to_toml().unwrap()).unwrap();
    let from_json = SchedulePlan::from_json(&plan.to_json().unwrap()).unwrap();
    assert_eq!(from_toml, plan);
    assert_eq!(from_json, plan);
    assert_eq!(from_toml.resolve(RunLength::default()).unwrap(), schedules);
    // A plan can also be read as a part of a user's own configuration.
    let own: SchedulePlan = serde_json::from_value(serde_json::to_value(&plan).unwrap()).unwrap();
    assert_eq!(own, plan);
}

#[test]
fn every_key_makes_the_round_trip() {
    let plan = SchedulePlan::new([
        PlannedSchedule::new("lr", Some("fc"), StepLR::new(1., 10)).unwrap().named("of my own"),
        PlannedSchedule::new("momentum", None, StepLR::new(1., 10)).unwrap().each_epoch(),
        PlannedSchedule::new("weight_decay", None, StepLR::new(1., 10)).unwrap().allow_longer(),
    ])
    .unwrap();
    let text = plan.to_toml().unwrap();
    assert_eq!(SchedulePlan::from_toml(&text).unwrap(), plan);
    assert_eq!(SchedulePlan::from_json(&plan.to_json().unwrap()).unwrap(), plan);
    let [own, momentum, _] = plan.entries() else { panic!() };
    assert_eq!((own.name().as_str(), own.group(), own.param()), ("of my own", Some("fc"), "lr"));
    assert_eq!((momentum.name().as_str(), momentum.group()), ("momentum", None));
    assert_eq!((own.event(), momentum.event()), (Event::IterationStarted, Event::EpochStarted));
}

#[test]
fn example_files_keep_their_lengths_as_written() {
    assert!(examples().len() >= 2);
    for path in examples() {
        let plan = SchedulePlan::from_path(&path).unwrap();
        plan.check(RunLength::new(938, 20)).unwrap();
        let text = plan.to_toml().unwrap();
        assert!(text.contains("\"1ep\"") && text.contains("\"1run\""), "{text}");
        assert_eq!(SchedulePlan::from_toml(&text).unwrap(), plan);
        assert_eq!(SchedulePlan::from_json(&plan.to_json().unwrap()).unwrap(), plan);
    }
}

#[test]
fn the_mnist_plan_is_what_the_example_does() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/schedules/mnist.toml");
    let plan = SchedulePlan::from_path(path).unwrap();
    let expected: [AnySchedule; 2] = [
        LinearCyclical::new(0.05 / 20., 0.05, 938).end_value_mult(0.7).into(),
        CosineAnnealing::new(0.05, 0., 8 * 938).into(),
    ];
    assert_eq!(plan.resolve(RunLength::new(938, 8)).unwrap(), expected);
    let names: Vec<_> = plan.entries().iter().map(PlannedSchedule::name).collect();
    assert_eq!(names, ["lr (base)", "lr (fc)"]);
}

#[test]
fn lengths_are_resolved_wherever_they_stand() {
    assert_eq!(
        resolved("type = 'CosineAnnealing'\nstart_value = 1.0\nend_value = 0\ncycle_size = '2ep'"),
        CosineAnnealing::new(1., 0., 200).into()
    );
    assert_eq!(
        resolved("type = 'StepLR'\nevent = 'epoch'\nbase = 1.0\nstep_size = '30%'"),
        StepLR::new(1., 3).into()
    );
    assert_eq!(
        resolved("type = 'PiecewiseLinear'\nmilestones_values = [[0, 1.0], ['0.3run', 0.5]]"),
        PiecewiseLinear::new([(0, 1.), (300, 0.5)]).into()
    );
    assert_eq!(
        resolved("type = 'MultiStepLR'\nbase = 1.0\nmilestones = ['50%', 600, '7ep']"),
        MultiStepLR::new(1., [500, 600, 700]).into()
    );
    let nested = r#"
        type = "Concat"
        durations = ["5%"]
        [[schedule.schedules]]
        type = "LinearLR"
        base = 1.0
        total_iters = "50it"
        [[schedule.schedules]]
        type = "Scaled"
        factor = 2.0
        schedule = { type = "CosineAnnealing", start_value = 0.5, end_value = 0.0, cycle_size = "1run - 5%" }
    "#;
    let rest = CosineAnnealing::new(0.5, 0., 950).scale(2.);
    assert_eq!(resolved(nested), LinearLR::new(1.).total_iters(50).then(rest, 50).into());
}

#[test]
fn code_reads_lengths_as_files_do() {
    let run = RunLength::new(938, 8);
    assert_eq!(run.iterations(), Some(7504));
    assert_eq!((run.epochs(0.5).unwrap(), run.fraction(1.).unwrap()), (469, 7504));
    for (text, iterations) in [
        ("2ep", 1876),
        (" 2 ep ", 1876),
        ("500it", 500),
        ("30%", 2251),
        ("0.3run", 2251),
        ("1run - 500it", 7004),
        ("1ep+1it-0.5ep", 470),
        ("0it", 0),
    ] {
        assert_eq!(run.length(text).unwrap(), iterations, "{text}");
    }
    // Percentages that give whole numbers are exact, and percentages that add up to 100 never give more than the
    // whole.
    let hundred = RunLength::of_iterations(100);
    for percent in 0..=100u32 {
        assert_eq!(hundred.length(&format!("{percent}%")).unwrap(), u64::from(percent));
    }
    let odd = RunLength::of_iterations(1130);
    assert!(odd.length("5%").unwrap() + odd.length("95%").unwrap() <= 1130);

    for text in ["", "2", "ep", "2 epo", "-2ep", "2ep-", "1run--1it", "nanep", "infit", "1e400it"] {
        let error = run.length(text).unwrap_err().to_string();
        assert!(error.starts_with(&format!("{text:?} is no length")), "{error}");
    }
    assert_eq!(
        run.length("1it - 1run").unwrap_err().to_string(),
        "\"1it - 1run\" is less than nothing: -7503 iterations"
    );
    assert_eq!(
        hundred.epochs(2.).unwrap_err().to_string(),
        "\"2ep\" cannot be turned into iterations: the number of iterations in an epoch is not known"
    );
    assert_eq!(
        RunLength::default().epoch_length(5).fraction(0.5).unwrap_err().to_string(),
        "\"0.5run\" cannot be turned into iterations: the length of the run is not known"
    );
    assert!(run.epochs(f64::NAN).is_err() && run.fraction(-1.).is_err());
}

#[test]
fn what_is_missing_of_the_run_is_said() {
    let cosine = "type = 'CosineAnnealing'\nstart_value = 1.0\nend_value = 0.0\n";
    let plan = toml(&format!("{cosine}cycle_size = '2ep'")).unwrap();
    assert_eq!(
        plan.resolve(RunLength::of_iterations(100)).unwrap_err().to_string(),
        "schedule[0].cycle_size: \"2ep\" cannot be turned into iterations: the number of iterations in an epoch is not known (line 5, column 14)"
    );
    let plan = toml(&format!("event = 'epoch'\n{cosine}cycle_size = '50%'")).unwrap();
    assert_eq!(
        plan.resolve(RunLength::default()).unwrap_err().to_string(),
        "schedule[0].cycle_size: \"50%\" cannot be turned into epochs: the length of the run is not known (line 6, column 14)"
    );
    let plan = toml(&format!("{cosine}cycle_size = 50")).unwrap();
    plan.resolve(RunLength::default()).unwrap();
    assert_eq!(
        plan.simulate_values(RunLength::default()).unwrap_err().to_string(),
        "schedule[0]: the number of iterations in the run is not known (line 1, column 1)"
    );
    assert_eq!(
        plan.check(RunLength::new(0, 5)).unwrap_err().to_string(),
        "the run's epoch_length should be positive, but given 0"
    );
}

#[test]
fn errors_name_the_place_in_the_file() {
    let linear = "type = 'LinearCyclical'\nstart_value = 1.0\nend_value = 0.0\n";
    for (entry, path, text) in [
        // These have unknown keys.
        (format!("{linear}cycle_size = 5\ncycle = 1"), ".cycle", "unknown field `cycle`, expected"),
        // These have values of wrong types.
        (format!("{linear}cycle_size = 1.5"), ".cycle_size", "invalid type: floating point `1.5`"),
        (format!("{linear}cycle_size = true"), ".cycle_size", "invalid type: boolean `true`"),
        (format!("{linear}cycle_size = -3"), ".cycle_size", "invalid value: integer `-3`"),
        (format!("{linear}cycle_size = 5\ncycle_mult = '1ep'"), ".cycle_mult", "invalid type: string \"1ep\", expected f64"),
        (format!("{linear}cycle_size = 5\nmonotonic = 1"), ".monotonic", "invalid type: integer `1`"),
        ("type = 'PiecewiseLinear'\nmilestones_values = [[0, 1.0], [5]]".into(), ".milestones_values[1]", "invalid length 1"),
        ("type = 'PiecewiseLinear'\nmilestones_values = [[0, 1.0], [5, '1ep']]".into(), ".milestones_values[1][1]", "invalid type: string \"1ep\""),
        ("type = 'CyclicLR'\nbase_lr = 0.1\nmax_lr = 1.0\nmode = 'square'".into(), ".mode", "unknown variant `square`"),
        (format!("{linear}cycle_size = 5\nparam = 3"), ".param", "invalid type: integer `3`, expected a string"),
        (format!("{linear}cycle_size = 5\nevent = 'batch'"), ".event", "unknown variant `batch`, expected one of `iteration`, `update`, `epoch`"),
        (format!("{linear}cycle_size = 5\nlonger = 'ignore'"), ".longer", "unknown variant `ignore`"),
        // These lack a key.
        (linear.into(), "", "missing field `cycle_size`"),
        ("base = 1.0".into(), "", "missing field `type`: there are: LinearCyclical, CosineAnnealing"),
        // These have wrong classes.
        ("type = 'Cosine'".into(), ".type", "no schedule class 'Cosine'; there are: LinearCyclical"),
        ("type = 3".into(), ".type", "3 is no schedule class"),
        ("type = 'LambdaLR'\nbase = 1.0".into(), ".type", "no schedule class 'LambdaLR'"),
        // These have wrong values.
        (format!("{linear}cycle_size = 0"), ".cycle_size", "Argument cycle_size should be positive and larger than 1, but given 0"),
        (format!("{linear}cycle_size = '0.1%'"), ".cycle_size", "Argument cycle_size should be positive and larger than 1, but given 1, which is \"0.1%\" of this run"),
        (format!("{linear}cycle_size = 5\ncycle_mult = 0.0"), ".cycle_mult", "Argument cycle_mult should be positive"),
        ("type = 'StepLR'\nbase = 1.0\nstep_size = 0".into(), ".step_size", "Argument step_size should be positive, but given 0"),
        ("type = 'PiecewiseLinear'\nmilestones_values = [['50%', 1.0], ['2ep', 0.5]]".into(), "", "Milestones should be increasing integers, but given 200"),
        // These have wrong lengths.
        (format!("{linear}cycle_size = '2 days'"), ".cycle_size", "\"2 days\" is no length: give a whole number, or"),
        ("type = 'MultiStepLR'\nbase = 1.0\nmilestones = ['1ep', 'x']".into(), ".milestones[1]", "\"x\" is no length"),
        ("type = 'PiecewiseLinear'\nmilestones_values = [['0', 1.0]]".into(), ".milestones_values[0][0]", "\"0\" is no length"),
        // These have errors in schedules within others.
        ("type = 'Concat'\ndurations = [1]\nschedules = [{ type = 'StepLR', base = 1.0, step_size = 5 }, { type = 'StepLR', base = 1.0, step = 3 }]".to_string(), ".schedules[1].step", "unknown field `step`"),
        ("type = 'Concat'\ndurations = [1]\nschedules = [{ type = 'StepLR', base = 1.0, step_size = 5 }, { type = 'StepLR', base = 1.0, step_size = 0 }]".to_string(), ".schedules[1].step_size", "Argument step_size"),
        ("type = 'Concat'\ndurations = [1]\nschedules = [{ type = 'StepLR', base = 1.0, step_size = 5 }, 7]".into(), ".schedules[1]", "invalid type: expected a schedule, but given 7"),
        ("type = 'Concat'\ndurations = []\nschedules = [{ type = 'StepLR', base = 1.0, step_size = 5 }]".into(), "", "Argument schedulers should be of more than one"),
        ("type = 'Scaled'\nfactor = 2.0\nschedule = { type = 'Skipped', events = 2, schedule = { type = 'Nothing' } }".into(), ".schedule.schedule.type", "no schedule class 'Nothing'"),
    ] {
        let error = refused(&entry);
        assert!(error.starts_with(&format!("schedule[0]{path}: {text}")), "{entry}\n{error}");
    }
}

#[test]
fn errors_outside_of_entries_name_their_place() {
    let json = |text: &str| SchedulePlan::from_json(text).unwrap_err().to_string();
    assert!(json("{\"schedule\": [}").starts_with("JSON: expected value at line 1 column 15"));
    assert_eq!(json("{}"), "missing field `schedule`");
    assert_eq!(
        json("{\"schedule\": [3]}"),
        "schedule[0]: invalid type: integer `3`, expected a map (line 1, column 15)"
    );
    assert!(
        json("{\"schedule\": [], \"scheduler\": 1}")
            .starts_with("scheduler: unknown field `scheduler`")
    );
    let toml = SchedulePlan::from_toml("[[schedule]]\ngroup = base").unwrap_err().to_string();
    assert!(toml.contains("line 2"), "{toml}");

    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        SchedulePlan::from_path(&path).unwrap_err().to_string()
    };
    assert!(file("a.yaml", "").ends_with(
        "a.yaml: a plan should be a .json or .toml file: give the file's name that ending"
    ));
    let error = file("a.toml", "[[schedule]]\ntype = 'StepLR'\nbase = 1.0\nstep_size = 'x'");
    assert!(error.contains("a.toml: schedule[0].step_size: \"x\" is no length"), "{error}");
    let missing = SchedulePlan::from_path(folder.path().join("none.json")).unwrap_err();
    assert!(missing.to_string().contains("none.json: No such file"), "{missing}");
}

#[test]
fn one_knob_has_one_schedule() {
    let pair = |first: &str, second: &str| {
        let entry = |place: &str| {
            format!("[[schedule]]\n{place}\ntype = 'StepLR'\nbase = 1.0\nstep_size = 5\n")
        };
        SchedulePlan::from_toml(&(entry(first) + &entry(second))).map_err(|error| error.to_string())
    };
    assert_eq!(
        pair("group = 'base'", "group = 'base'").unwrap_err(),
        "schedule[1]: drives lr of group 'base', as schedule[0] does already; join them with a Concat (line 6, column 1)"
    );
    assert_eq!(
        pair("group = 'base'", "").unwrap_err(),
        "schedule[1]: drives lr of group 'base', as schedule[0] does already; join them with a Concat (line 6, column 1)"
    );
    assert!(pair("", "event = 'epoch'").unwrap_err().contains("drives lr of all groups"));
    assert_eq!(
        pair("name = 'x'", "name = 'x'\nparam = 'momentum'").unwrap_err(),
        "schedule[1].name: schedule[0] is named 'x' too (line 7, column 8)"
    );
    assert!(pair("group = 'base'", "group = 'fc'").is_ok());
    assert!(pair("group = 'base'", "param = 'momentum'").is_ok());
}

#[test]
fn schedules_longer_than_the_run_are_refused_or_cut() {
    let cosine = "type = 'CosineAnnealing'\nstart_value = 1.0\nend_value = 0.0\ncycle_size = 2000";
    assert_eq!(
        refused(cosine),
        "schedule[0]: CosineAnnealing takes 2000 iterations, but the run has only 1000; shorten it, or say `longer = \"warn\"` to have it cut off (line 1, column 1)"
    );
    assert!(
        refused(&format!("event = 'epoch'\n{}", cosine.replace("2000", "11")))
            .contains("takes 11 epochs, but the run has only 10")
    );
    let warned = ["schedule[0]: CosineAnnealing takes 2000 iterations, but the run has only 1000"];
    let plan = toml(&format!("longer = 'warn'\n{cosine}")).unwrap();
    assert_eq!(plan.check(RUN).unwrap(), warned);
    assert_eq!(plan.simulate_values(RUN).unwrap()[0].len(), 1000);
    assert_eq!(toml(cosine).unwrap().allow_longer().check(RUN).unwrap(), warned);
    assert!(toml(&cosine.replace("2000", "1000")).unwrap().check(RUN).unwrap().is_empty());
    // A schedule that ends before the run would fail in the middle of the run, whatever `longer` says.
    assert_eq!(
        refused("longer = 'warn'\ntype = 'OneCycleLR'\nmax_lr = 1.0\ntotal_steps = 500"),
        "schedule[0]: OneCycleLR ends after 501 iterations (total_steps is 500), but the run has 1000 (line 1, column 1)"
    );
}

#[test]
fn every_schedule_knows_its_length() {
    let cosine = CosineAnnealing::new(1., 0., 100);
    let cases: Vec<(AnySchedule, Option<u64>)> = vec![
        (LinearCyclical::new(1., 0., 100).into(), Some(100)),
        (cosine.clone().into(), Some(100)),
        (PiecewiseLinear::new([(5, 1.), (70, 0.)]).into(), Some(70)),
        // The last jump needs an event that has its value, as the last step of MultiStepLR does.
        (PiecewiseLinear::new([(5, 1.), (70, 0.5), (70, 0.)]).into(), Some(71)),
        (PiecewiseLinear::new([(5, 1.), (70, 0.), (70, 0.)]).into(), Some(70)),
        (ConstantLR::new(1.).total_iters(30).into(), Some(31)),
        (OneCycleLR::new(1., 100).into(), Some(100)),
        (OneCycleLR::new(1., 100).momentum(0.8, 0.9).into(), Some(100)),
        (LinearLR::new(1.).total_iters(30).into(), Some(30)),
        (StepLR::new(1., 30).into(), Some(30)),
        (MultiStepLR::new(1., [30, 10]).into(), Some(31)),
        (WarmupStableDecay::new(1., 2, 3, 4).into(), Some(9)),
        (ExponentialLR::new(1., 0.9).into(), None),
        (LambdaLR::new(1., |_| 1.).into(), None),
        (cosine.clone().skip(30).into(), Some(70)),
        (cosine.clone().scale(2.).into(), Some(100)),
        (cosine.clone().then(StepLR::new(1., 30), 50).into(), Some(80)),
        (
            Concat::new([ExponentialLR::new(1., 0.9), ExponentialLR::new(1., 0.9)], [50]).into(),
            Some(51),
        ),
        (cosine.clone().warmup(0., 11).unwrap(), Some(110)),
    ];
    for (schedule, length) in cases {
        assert_eq!(schedule.length(), length, "{schedule:?}");
        let length = length.unwrap_or(1);
        schedule.fits(length).unwrap();
        assert!(length == 1 || schedule.fits(length - 1).is_err());
    }
    let long: Box<dyn Schedule> = Box::new(cosine);
    assert_eq!(
        long.fits(99).unwrap_err().to_string(),
        "the schedule takes 100 events, but the run has only 99"
    );
}

#[test]
fn a_bound_plan_drives_the_optimizer() {
    let plan = SchedulePlan::from_toml(
        r#"
        [[schedule]]
        group = "base"
        type = "LinearCyclical"
        start_value = 1.0
        end_value = 0.0
        cycle_size = "1ep"

        [[schedule]]
        param = "momentum"
        event = "epoch"
        type = "PiecewiseLinear"
        milestones_values = [[0, 0.5], ["50%", 0.25]]
        "#,
    )
    .unwrap();
    let optimizer = optimizer();
    let run = RunLength::new(4, 2);
    let mut trainer = Engine::new(|seen: &mut Vec<(f64, f64, f64)>, _, _: i32| {
        let (base, fc) = (optimizer.group("base")?, optimizer.group("fc")?);
        seen.push((base.lr()?, fc.lr()?, fc.momentum()?));
        Ok(())
    });
    for scheduler in plan.bind(&optimizer, run).unwrap() {
        trainer.attach(scheduler.save_history(true));
    }
    let mut seen = vec![];
    trainer.run(&mut seen, vec![0; 4], Until::epochs(2)).unwrap();
    let expected: Vec<_> = [0.5, 0.25]
        .into_iter()
        .flat_map(|momentum| [1., 0.5, 0., 0.5].map(|lr| (lr, 2., momentum)))
        .collect();
    assert_eq!(seen, expected);
    let lrs: Vec<_> = (1..).zip(seen.iter().map(|(lr, ..)| *lr)).collect();
    let momentums = vec![(1, 0.5), (4, 0.5), (5, 0.25), (8, 0.25)];
    assert_eq!(plan.simulate_values(run).unwrap(), [lrs, momentums]);
    assert!(trainer.state.param_history.contains_key("lr (base)"));
    assert!(trainer.state.param_history.contains_key("momentum"));
}

#[test]
fn what_the_optimizer_lacks_is_refused() {
    let step = "type = 'StepLR'\nbase = 1.0\nstep_size = 5";
    let bound = |place: &str| {
        let plan = toml(&format!("{place}\n{step}")).unwrap();
        plan.bind(&optimizer(), RUN).map(|bound| bound.len()).map_err(|error| error.to_string())
    };
    assert_eq!(
        bound("group = 'head'").unwrap_err(),
        "schedule[0].group: no parameter group 'head'; this optimizer has: base, fc (line 2, column 9)"
    );
    assert_eq!(
        bound("param = 'beta1'").unwrap_err(),
        "schedule[0].param: SGD has no hyper-parameter 'beta1'; it has: lr, momentum, dampening, weight_decay, nesterov, maximize (line 2, column 9)"
    );
    assert_eq!(bound("group = 'fc'\nparam = 'weight_decay'"), Ok(1));
}

#[test]
fn a_plan_drives_knobs_of_ones_own() {
    let dropout = Arc::new(Mutex::new(0.));
    let plan = toml("param = 'dropout'\ntype = 'StepLR'\nbase = 0.5\nstep_size = '1ep'").unwrap();
    let mut bound = plan
        .bind_with(RUN, |param, group| {
            assert_eq!((param, group), ("dropout", None));
            let (read, write) = (dropout.clone(), dropout.clone());
            Ok(Knob::new(param, move || *read.lock().unwrap(), move |v| *write.lock().unwrap() = v))
        })
        .unwrap();
    bound[0].advance().unwrap();
    assert_eq!(*dropout.lock().unwrap(), 0.5);
}

#[test]
fn a_plan_in_code_is_checked_too() {
    let error = PlannedSchedule::new("lr", None, LambdaLR::new(1., |_| 1.)).unwrap_err();
    assert_eq!(error.to_string(), "LambdaLR cannot be written to a file");
    assert!(PlannedSchedule::new("lr", None, StepLR::new(1., 0)).is_err());
    let step = || PlannedSchedule::new("lr", None, StepLR::new(1., 5)).unwrap();
    assert!(SchedulePlan::new([step(), step()]).is_err());
}

/// The 10 batches of an epoch are accumulated in windows of 4, 4 and 2, so the run has 30 iterations and 9 updates.
#[test]
fn a_term_with_minus_is_as_long_as_one_with_plus() {
    let run = RunLength::new(10, 3).accumulate(4);
    let events = |event: &str, length: &str| {
        let plan = toml(&format!(
            "event = '{event}'\ntype = 'LinearCyclical'\nstart_value = 1.0\nend_value = 0.0\nmonotonic = true\ncycle_size = '{length}'"
        ))
        .unwrap();
        plan.resolve(run).unwrap().remove(0).length().unwrap()
    };
    for (term, iterations, updates) in [
        ("8it", 8, 2),
        ("14it", 14, 4),
        ("2up", 8, 2),
        ("4up", 14, 4),
        ("5up", 18, 5),
        ("2ep", 20, 6),
    ] {
        let length = format!("1run - {term}");
        assert_eq!(run.length(term).unwrap(), iterations, "{term}");
        assert_eq!(events("iteration", &length), 30 - iterations, "{length}");
        assert_eq!(events("update", &length), 9 - updates, "{length}");
    }
    assert_eq!(events("update", "1run - 50%"), 4);
    assert_eq!(events("iteration", "1run - 50%"), 15);
    for length in ["3ep - 10it", "3ep - 3up", "3ep - 1ep", "60it - 40it"] {
        assert_eq!(events("epoch", length), 2, "{length}");
    }
    let mnist = RunLength::new(938, 8).accumulate(4);
    assert_eq!(mnist.length("1run - 100up").unwrap(), 7504 - 400);
}

#[test]
fn a_plan_counts_updates() {
    // The 10 batches of an epoch are accumulated in windows of 4, 4 and 2.
    let run = RunLength::new(10, 3).accumulate(4);
    assert_eq!((run.iterations(), run.updates()), (Some(30), Some(9)));
    assert_eq!(RunLength::of_iterations(25).epoch_length(10).accumulate(4).updates(), Some(8));
    assert_eq!(RunLength::of_iterations(25).updates(), Some(25));
    assert_eq!(RunLength::of_iterations(25).accumulate(4).updates(), None);
    assert_eq!(run.length("4up").unwrap(), 14);
    assert_eq!(run.length("2up").unwrap(), 8);
    assert_eq!(RUN.length("7up").unwrap(), 7);
    let plan = |length: &str| {
        toml(&format!(
            "event = 'update'\ntype = 'LinearCyclical'\nstart_value = 1.0\nend_value = 0.0\nmonotonic = true\ncycle_size = {length}"
        ))
        .unwrap()
    };
    for (length, events) in [
        ("9", 9),
        ("'1run'", 9),
        ("'3ep'", 9),
        ("'2ep'", 6),
        ("'50%'", 4),
        ("'5up'", 5),
        ("'1run - 2up'", 7),
        ("'10it'", 3),
        ("'14it'", 4),
        ("'13it'", 3),
    ] {
        let schedule = plan(length).resolve(run).unwrap().remove(0);
        assert_eq!(schedule.length(), Some(events), "{length}");
    }
    let error = plan("'10ep'").resolve(run).unwrap_err().to_string();
    assert!(error.contains("takes 30 updates, but the run has only 9"), "{error}");
    let unknown = RunLength::of_iterations(30).accumulate(4);
    let error = plan("'1run'").resolve(unknown).unwrap_err().to_string();
    assert!(error.contains("the length of the run is not known"), "{error}");
    assert!(RunLength::new(10, 3).accumulate(0).updates().is_some());
    assert!(plan("'1run'").resolve(RunLength::new(10, 3).accumulate(0)).is_err());

    let plan = plan("'1run'");
    assert_eq!(plan.entries()[0].event(), OPTIMIZER_STEPPED);
    let values = plan.simulate_values(run).unwrap().remove(0);
    let at = |update: u64| 1. - update as f64 / 9.;
    let shown: Vec<_> = values.iter().map(|(iteration, _)| *iteration).collect();
    assert_eq!(shown, [1, 4, 5, 8, 9, 10, 11, 14, 15, 18, 19, 20, 21, 24, 25, 28, 29, 30]);
    for (index, (_, value)) in values.iter().enumerate() {
        approx::assert_abs_diff_eq!(*value, at(index as u64 / 2), epsilon = 1e-15);
    }
    let step = PlannedSchedule::new("lr", None, StepLR::new(1., 5)).unwrap().each_update();
    let written = SchedulePlan::new([step]).unwrap().to_toml().unwrap();
    assert!(written.contains("event = \"update\""), "{written}");
    assert_eq!(SchedulePlan::from_toml(&written).unwrap().to_toml().unwrap(), written);
}

#[test]
fn values_outside_their_bounds_are_found_before_the_run() {
    let checked = |entry: &str| text_of(toml(entry).unwrap().check(RUN));
    assert_eq!(
        checked(
            "type = 'CosineAnnealing'\nstart_value = -0.1\nend_value = 0.0\ncycle_size = '1run'"
        ),
        "schedule[0].start_value: CosineAnnealing after 0 iterations: lr must be finite and not negative, but -0.1 was given (line 3, column 15)"
    );
    assert_eq!(
        checked(
            "event = 'epoch'\ntype = 'LinearCyclical'\nmonotonic = true\nstart_value = 1\nend_value = -1\ncycle_size = 10"
        ),
        "schedule[0]: LinearCyclical after 6 epochs: lr must be finite and not negative, but -0.19999999999999996 was given (line 1, column 1)"
    );
    let beta = "param = 'beta1'\ntype = 'ExponentialLR'\ngamma = 1.0\nbase = 1.0";
    assert!(
        checked(beta).starts_with(
            "schedule[0].base: ExponentialLR after 0 iterations: beta1 must be in [0, 1)"
        ) || checked(beta).starts_with("schedule[0].gamma: ")
    );
    let plan = toml(beta).unwrap();
    assert!(plan.check(RunLength::default()).is_err() && plan.resolve(RUN).is_ok());
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.json");
    let json = "{\n \"schedule\": [{\"type\": \"StepLR\",\n  \"base\": -0.5, \"step_size\": 5}]}";
    std::fs::write(&path, json).unwrap();
    let error = text_of(SchedulePlan::from_path(&path).unwrap().bind(&optimizer(), RUN));
    let expected = "a.json: schedule[0].base: StepLR after 0 iterations: lr must be finite and not negative, but -0.5 was given (line 3, column 11)";
    assert!(error.ends_with(expected), "{error}");
    // A knob of one's own has no bounds.
    assert!(
        toml("param = 'mine'\ntype = 'StepLR'\nbase = -1.0\nstep_size = 5")
            .unwrap()
            .check(RUN)
            .is_ok()
    );
}

fn text_of<T>(result: tch_ignite::Result<T>) -> String {
    result.map(drop).unwrap_err().to_string()
}

#[test]
fn rex_and_power_are_read_from_files() {
    assert_eq!(
        resolved("type = 'Rex'\nbase = 0.1\ntotal_iters = '1run'"),
        tch_ignite::schedule::Rex::new(0.1, 1000).into()
    );
    assert_eq!(
        resolved(
            "type = 'Power'\nlr_max = 0.02\nbatch_size = 64\ntokens = 65536\nwarmup = '10%'\ntotal_iters = '1run'\ndecay = '2ep'\nshape = 'cosine'"
        ),
        tch_ignite::schedule::Power::new(0.02, 64, 65536)
            .warmup(100)
            .decay(1000, 200)
            .shape(tch_ignite::schedule::Decay::Cosine)
            .into()
    );
}
