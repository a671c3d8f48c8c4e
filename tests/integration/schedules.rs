//! Tests of schedules and schedulers: against ignite's own algorithm step by step, resumed at every position, and in
//! a run.

use serde_json::{Map, Value, json};
use tch::nn::{self, VarStore};
use tch::{Device, Kind, Tensor};
use tch_ignite::data::SplitMix64;
use tch_ignite::engine::{Engine, Event, Events, Until};
use tch_ignite::metrics::Mean;
use tch_ignite::optim::{Knob, Optimizer};
use tch_ignite::schedule::*;
use tch_ignite::{Error, Result};

/// Arguments of a cyclical schedule, drawn at random.
#[derive(Debug, Clone, Copy)]
struct Arguments {
    start: f64,
    end: f64,
    size: u64,
    size_mult: f64,
    start_mult: f64,
    end_mult: f64,
    warmup: u64,
    kind: u64,
}

impl Arguments {
    fn random(rng: &mut SplitMix64) -> Self {
        let mut pick = |values: &[f64]| values[rng.below(values.len() as u64) as usize];
        let kind = pick(&[0., 1., 2.]) as u64;
        Self {
            start: pick(&[1., 0.3, 1e-3]),
            end: pick(&[0., 0.1, 2.]),
            size: pick(&[2., 3., 7., 10.]) as u64,
            size_mult: pick(&[1., 0.5, 0.8, 1.5, 2.]),
            start_mult: pick(&[1., 0.7, 1.1]),
            end_mult: pick(&[1., 0.7, 1.1]),
            // Kind 1, which goes there and back, has no warm-up.
            warmup: if kind == 1 { 0 } else { pick(&[0., 1., 4.]) as u64 },
            kind,
        }
    }

    fn schedule(self) -> AnySchedule {
        let Self { start, end, size, size_mult, start_mult, end_mult, warmup, kind } = self;
        if kind == 0 {
            return CosineAnnealing::new(start, end, size)
                .cycle_mult(size_mult)
                .start_value_mult(start_mult)
                .end_value_mult(end_mult)
                .warmup_duration(warmup)
                .into();
        }
        LinearCyclical::new(start, end, size)
            .cycle_mult(size_mult)
            .start_value_mult(start_mult)
            .end_value_mult(end_mult)
            .warmup_duration(warmup)
            .monotonic(kind == 2)
            .into()
    }

    /// Computes the values as ignite's `CyclicalScheduler` does, one event after the other. They end where a cycle
    /// would be empty.
    fn walk(mut self, events: usize) -> Vec<f64> {
        let mut values = vec![];
        let mut index = 0;
        while values.len() < events {
            if index != 0 && index == self.size {
                self.start *= self.start_mult;
            }
            if index != 0 && index == self.size + self.warmup {
                index = 0;
                self.size = (self.size as f64 * self.size_mult) as u64;
                self.warmup = (self.warmup as f64 * self.size_mult) as u64;
                self.end *= self.end_mult;
                if self.size == 0 {
                    break;
                }
            }
            let (start, end) = (self.start, self.end);
            let progress = index as f64 / self.size as f64;
            values.push(if index > self.size {
                end + (start - end) * ((index - self.size) as f64 / self.warmup as f64)
            } else {
                match self.kind {
                    0 => {
                        let cosine = (std::f64::consts::PI * progress).cos();
                        start + ((end - start) / 2.) * (1. - cosine)
                    }
                    1 => end + (start - end) * (progress - 0.5).abs() * 2.,
                    _ => start + (end - start) * progress,
                }
            });
            index += 1;
        }
        values
    }
}

const EVENTS: usize = 60;

fn random_arguments() -> impl Iterator<Item = Arguments> {
    let mut rng = SplitMix64::new(2026);
    std::iter::repeat_with(move || Arguments::random(&mut rng)).take(300)
}

fn text<T>(result: Result<T>) -> String {
    result.err().expect("an error").to_string()
}

fn chain<T>(result: Result<T>) -> String {
    format!("{:#}", anyhow::Error::from(result.err().expect("an error")))
}

fn idle() -> Knob {
    Knob::new("value", || 0., |_| {})
}

/// A weight of one element that starts at 1, and plain SGD on it.
fn sgd() -> (Tensor, Optimizer) {
    let mut vs = VarStore::new(Device::Cpu);
    vs.set_kind(Kind::Double);
    let w = vs.root().ones("w", &[1]);
    (w, Optimizer::sgd(&vs).lr(0.5).build().unwrap())
}

type Rates<'a> = Engine<'a, Vec<f64>, (), f64>;

/// An engine that writes down the learning rate that each step sees.
fn rates(optimizer: &Optimizer) -> Rates<'static> {
    let optimizer = optimizer.clone();
    Engine::new(move |rates: &mut Vec<f64>, _, ()| {
        let rate = optimizer.group_at(0)?.lr()?;
        rates.push(rate);
        Ok(rate)
    })
}

#[test]
fn cycles_are_ignites_at_every_event_in_any_order() {
    let mut rng = SplitMix64::new(1);
    let mut ended = 0;
    for arguments in random_arguments() {
        let (schedule, expected) = (arguments.schedule(), arguments.walk(EVENTS));
        schedule.validate().unwrap();
        for (event, value) in expected.iter().enumerate() {
            assert_eq!(
                schedule.at(event as u64).to_bits(),
                value.to_bits(),
                "{arguments:?} {event}"
            );
        }
        let end = schedule.end().map(|(end, _)| end as usize);
        assert_eq!(
            end.filter(|end| *end < EVENTS),
            (expected.len() < EVENTS).then_some(expected.len())
        );
        ended += usize::from(expected.len() < EVENTS);
        for _ in 0..EVENTS {
            let event = rng.below(EVENTS as u64);
            let value = expected.get(event as usize).copied().unwrap_or(f64::NAN);
            assert_eq!(schedule.at(event).to_bits(), value.to_bits(), "{arguments:?} {event}");
        }
    }
    assert!(ended > 30, "shrinking cycles were among them");
}

#[test]
fn a_shrinking_cycle_ends_with_an_error_that_says_why() -> Result<()> {
    let schedule = LinearCyclical::new(1., 0., 4).cycle_mult(0.5);
    // The schedule has cycles of 4, 2 and 1 events.
    let why = "the schedule ends after 7 events (cycle_mult 0.5 shrinks the cycle of 4 events to 0 after cycle 2), but event 7 was asked for";
    assert_eq!(schedule.simulate_values(7)?.len(), 7);
    assert_eq!(text(schedule.simulate_values(8)), why);
    assert!(schedule.at(7).is_nan());
    assert!(text(schedule.fits(8)).contains("ends after 7 events"));
    schedule.fits(7)?;
    let mut scheduler = ParamScheduler::new("x", idle(), schedule.clone());
    for _ in 0..7 {
        scheduler.advance()?;
    }
    for _ in 0..2 {
        assert_eq!(text(scheduler.advance()), why);
        assert_eq!(text(scheduler.get_param()), why);
    }
    let (_w, optimizer) = sgd();
    let mut engine = rates(&optimizer);
    engine.attach(ParamScheduler::new("lr", optimizer.knob("lr")?, schedule));
    let mut seen = vec![];
    let error = chain(engine.run(&mut seen, vec![(); 4], Until::epochs(3)));
    let expected =
        format!("handler 'lr' of ITERATION_STARTED failed at iteration 8 (epoch 2): {why}");
    assert_eq!((error, seen.len()), (expected, 7));
    Ok(())
}

#[test]
fn files_bring_back_the_same_sequence_and_unknown_keys_are_errors() {
    for arguments in random_arguments() {
        let schedule = arguments.schedule();
        let _ = schedule.at(33);
        let json = serde_json::to_string(&schedule).unwrap();
        let back: AnySchedule = serde_json::from_str(&json).unwrap();
        assert_eq!(back, schedule);
        for event in 0..EVENTS as u64 {
            assert_eq!(back.at(event).to_bits(), schedule.at(event).to_bits());
        }
        let mut object: Map<String, Value> = serde_json::from_str(&json).unwrap();
        object.insert("cycle_sise".into(), 3.into());
        let error = serde_json::from_value::<AnySchedule>(Value::Object(object)).unwrap_err();
        assert!(error.to_string().contains("unknown field `cycle_sise`"), "{error}");
    }
}

#[test]
fn files_name_what_is_missing_or_unknown_and_take_defaults() {
    let read = serde_json::from_value::<AnySchedule>;
    for (value, expected) in [
        (
            json!({"type": "CosineAnnealing", "start_value": 1., "end_value": 0.}),
            "missing field `cycle_size`",
        ),
        (json!({"type": "Cosinus"}), "unknown variant `Cosinus`, expected one of `LinearCyclical`"),
        (json!({"start_value": 1.}), "missing field `type`"),
        (json!({"type": "StepLR", "base": 1., "step_size": -1}), "invalid value: integer `-1`"),
        (json!({"type": "StepLR", "base": "a", "step_size": 1}), "invalid type: string \"a\""),
        (
            json!({"type": "StepLR", "base": 1., "step_size": 1, "walk": null}),
            "unknown field `walk`",
        ),
    ] {
        let error = read(value).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
    let plain =
        json!({"type": "LinearCyclical", "start_value": 1., "end_value": 0., "cycle_size": 4});
    assert_eq!(read(plain).unwrap(), LinearCyclical::new(1., 0., 4).into());
}

#[test]
fn simulated_values_are_what_the_steps_see() -> Result<()> {
    for arguments in random_arguments().take(40) {
        let schedule = arguments.schedule();
        let events = arguments.walk(12).len() as u64;
        let (_w, optimizer) = sgd();
        let mut engine = rates(&optimizer);
        engine.attach(ParamScheduler::new("lr", optimizer.knob("lr")?, schedule.clone()));
        let mut seen = vec![];
        engine.run(&mut seen, vec![(); 5], Until::iterations(events))?;
        let simulated = schedule.simulate_values(events)?;
        assert!(simulated.into_iter().eq((0..).zip(seen)), "{arguments:?}");
    }
    Ok(())
}

#[test]
fn a_scheduled_rate_is_what_libtorch_steps_with() -> Result<()> {
    let (w, optimizer) = sgd();
    let mut engine: Engine<f64, (), ()> = Engine::new(|sum: &mut f64, _, ()| {
        optimizer.backward_step(&w.sum(Kind::Double))?;
        *sum = w.double_value(&[0]);
        Ok(())
    });
    let schedule = LinearCyclical::new(0.25, 0.0625, 8);
    engine.attach(ParamScheduler::new("lr", optimizer.knob("lr")?, schedule.clone()));
    let mut weight = 1.;
    for iterations in 1..=8 {
        let before = weight;
        engine.run(&mut weight, vec![(); 8], Until::iterations(iterations))?;
        assert_eq!(weight, before - schedule.at(iterations - 1), "all are binary fractions");
    }
    Ok(())
}

#[test]
fn schedulers_act_before_or_after_the_step_by_iteration_or_epoch() -> Result<()> {
    let schedule = || PiecewiseLinear::new([(0, 0.), (10, 10.)]);
    let none: Vec<Vec<f64>> = vec![];
    for (event, seen, history) in [
        (
            Events::from(Event::IterationStarted),
            [0., 1., 2., 3.],
            vec![vec![0.], vec![1.], vec![2.], vec![3.]],
        ),
        (
            Event::IterationCompleted.into(),
            [0., 1., 2., 3.],
            vec![vec![0.], vec![1.], vec![2.], vec![3.], vec![4.]],
        ),
        (Event::EpochStarted.into(), [0., 0., 1., 1.], vec![vec![0.], vec![1.]]),
        (Event::EpochCompleted.into(), [0., 0., 1., 1.], vec![vec![0.], vec![1.], vec![2.]]),
        (
            Event::IterationCompleted.every(2).into(),
            [0., 0., 1., 1.],
            vec![vec![0.], vec![1.], vec![2.]],
        ),
        (Event::IterationStarted.every(2).into(), [0.5, 0., 0., 1.], vec![vec![0.], vec![1.]]),
        (Event::IterationStarted.once(9).into(), [0.5; 4], none),
    ] {
        let (_w, optimizer) = sgd();
        let mut engine = rates(&optimizer);
        let knob = optimizer.group_at(0)?.knob("lr")?;
        let scheduler =
            ParamScheduler::new("lr", knob, schedule()).save_history(true).on(event.clone());
        engine.attach(scheduler);
        let mut rates = vec![];
        engine.run(&mut rates, vec![(); 2], Until::epochs(2))?;
        assert_eq!(rates, seen, "{event:?}");
        let recorded = engine.state.param_history.get("lr").cloned().unwrap_or_default();
        assert_eq!(recorded, history, "{event:?}");
    }
    Ok(())
}

#[test]
fn the_history_has_a_value_for_each_group_of_a_knob() -> Result<()> {
    let vs = VarStore::new(Device::Cpu);
    let _layers =
        [0, 1].map(|group| nn::linear(vs.root().set_group(group), 1, 1, Default::default()));
    let optimizer = Optimizer::sgd(&vs).build()?;
    let mut engine = rates(&optimizer);
    let all = ParamScheduler::new("lr", optimizer.knob("lr")?, ExponentialLR::new(1., 0.5));
    engine.attach(all.save_history(true));
    engine.run(&mut vec![], vec![(); 2], Until::epochs(1))?;
    assert_eq!(engine.state.param_history["lr"], [[1., 1.], [0.5, 0.5]]);
    Ok(())
}

#[test]
fn a_schedule_that_leaves_the_bounds_fails_at_that_event() -> Result<()> {
    let (_w, optimizer) = sgd();
    for (hyper, schedule, iteration, cause) in [
        (
            "lr",
            PiecewiseLinear::new([(0, 1.), (4, -1.)]),
            4,
            "lr must be finite and not negative, but -0.5 was given",
        ),
        (
            "momentum",
            PiecewiseLinear::new([(0, 0.5), (1, 0.5), (2, -0.25)]),
            3,
            "momentum must be finite and not negative, but -0.25 was given",
        ),
    ] {
        let mut engine = rates(&optimizer);
        engine.attach(ParamScheduler::new("of mine", optimizer.knob(hyper)?, schedule));
        let mut seen = vec![];
        let error = chain(engine.run(&mut seen, vec![(); 9], Until::epochs(1)));
        let expected = format!(
            "handler 'of mine' of ITERATION_STARTED failed at iteration {iteration} (epoch 1): {cause}"
        );
        assert_eq!(error, expected);
        assert_eq!(seen.len(), iteration - 1, "the step was not made");
        assert!(optimizer.group_at(0)?.get(hyper)? >= 0.);
    }
    Ok(())
}

#[test]
fn a_scheduler_goes_on_from_any_saved_position() -> Result<()> {
    for arguments in random_arguments().take(60) {
        let values = arguments.walk(40);
        let fresh = || ParamScheduler::new("a", idle(), arguments.schedule());
        let mut scheduler = fresh();
        for position in 0..values.len() {
            let saved = serde_json::to_string(&scheduler.state_dict()).unwrap();
            let mut other = fresh();
            other.load_state_dict(&serde_json::from_str(&saved).unwrap())?;
            assert_eq!(other.state_dict(), scheduler.state_dict(), "{arguments:?} at {position}");
            let ahead = (position + 15).min(values.len());
            for value in &values[position..ahead] {
                assert_eq!(other.get_param()?.to_bits(), value.to_bits());
                assert_eq!(
                    other.advance()?.to_bits(),
                    value.to_bits(),
                    "{arguments:?} from {position}"
                );
            }
            scheduler.advance()?;
        }
        // A state from the end of the schedule can be loaded too.
        let mut other = fresh();
        other.load_state_dict(&scheduler.state_dict())?;
        assert_eq!(other.advance().is_ok(), arguments.walk(41).len() > 40, "{arguments:?}");
    }
    Ok(())
}

#[test]
fn states_that_do_not_fit_are_refused_and_change_nothing() -> Result<()> {
    let schedule = || CosineAnnealing::new(1., 0., 4).cycle_mult(2.).start_value_mult(0.5);
    let mut scheduler = ParamScheduler::new("a", idle(), schedule());
    for _ in 0..6 {
        scheduler.advance()?;
    }
    let saved = scheduler.state_dict();
    let with = |key: &str, value: Value| {
        let mut state = saved.clone();
        state.insert(key.into(), value);
        state
    };
    let mut without = saved.clone();
    without.remove("cycle");
    for (state, expected) in [
        (Map::new(), "Required state attribute 'event_index' is absent"),
        (without, "Required state attribute 'cycle' is absent"),
        (with("event_index", json!(-1)), "state attribute 'event_index' is -1"),
        (
            with("event_index", json!(9)),
            "'event_index' is 9, but cycle 1 of this schedule has 8 events",
        ),
        (with("start_value", json!(0.7)), "'start_value' is 0.7, but 0.5 in this schedule"),
        (with("cycle_size", json!(5)), "'cycle_size' is 5, but 8 in this schedule"),
        (with("cycle", json!(0)), "in this schedule: it was saved from one with other arguments"),
        (
            with("param_name", json!("lr")),
            "the state is of 'lr' in group None, but scheduler 'a' drives 'value'",
        ),
        (with("param_group_index", json!(1)), "in group Some(1)"),
        (with("save_history", json!("yes")), "state attribute 'save_history' is \"yes\""),
    ] {
        let mut other = ParamScheduler::new("a", idle(), schedule());
        other.advance()?;
        let before = other.state_dict();
        let error = other.load_state_dict(&state);
        assert!(matches!(error, Err(Error::State(_))));
        let error = text(error);
        assert!(error.contains(expected), "{error}");
        assert_eq!(other.state_dict(), before);
    }
    let mut ending =
        ParamScheduler::new("a", idle(), CosineAnnealing::new(1., 0., 4).cycle_mult(0.5));
    let error = text(ending.load_state_dict(&with("cycle", json!(3))));
    assert_eq!(error, "state attribute 'cycle' is 3, but this schedule ends in cycle 2");
    Ok(())
}

#[test]
fn wrong_arguments_are_refused_before_the_first_event() -> Result<()> {
    let cosine = || CosineAnnealing::new(1., 0., 4);
    let linear = || LinearCyclical::new(1., 0., 4);
    let cases: Vec<(AnySchedule, &str)> = vec![
        (
            CosineAnnealing::new(1., 0., 1).into(),
            "Argument cycle_size should be positive and larger than 1, but given 1",
        ),
        (CosineAnnealing::new(1., 0., 0).into(), "but given 0"),
        (
            CosineAnnealing::new(f64::NAN, 0., 4).into(),
            "Argument start_value should be finite, but given NaN",
        ),
        (
            LinearCyclical::new(1., f64::INFINITY, 4).into(),
            "Argument end_value should be finite, but given inf",
        ),
        (cosine().cycle_mult(0.).into(), "Argument cycle_mult should be positive, but given 0"),
        (cosine().end_value_mult(f64::NAN).into(), "Argument end_value_mult should be finite"),
        (
            linear().warmup_duration(2).into(),
            "Invalid combination when warmup_duration > 0 and monotonic=False",
        ),
        (PiecewiseLinear::new([]).into(), "at least one value, but given []"),
        (
            PiecewiseLinear::new([(3, 1.), (2, 1.)]).into(),
            "given 2 is smaller than the previous milestone 3",
        ),
        (StepLR::new(1., 0).into(), "Argument step_size should be positive, but given 0"),
        (
            ConstantLR::new(1.).factor(1.5).into(),
            "Argument factor should be above 0 and at most 1, but given 1.5",
        ),
        (CosineAnnealingLR::new(1., 0).into(), "Argument T_max should be positive"),
        (
            OneCycleLR::new(1., 10).pct_start(1.5).into(),
            "Argument pct_start should be from 0 to 1, but given 1.5",
        ),
        (Concat::new([cosine()], []).into(), "more than one parameter schedulers, but given 1"),
        (Concat::new([cosine(), cosine()], []).into(), "given 2 and 0"),
        (linear().then(CosineAnnealing::new(1., 0., 0), 4).into(), "cycle_size should be positive"),
        (cosine().scale(f64::NAN).into(), "Argument factor should be finite"),
        (
            ChainedScheduler::new([ExponentialLR::new(1., 0.5), ExponentialLR::new(2., 0.5)])
                .into(),
            "same base, but given 1 and 2",
        ),
        (ChainedScheduler::new([cosine()]).into(), "CosineAnnealing cannot be chained"),
    ];
    for (schedule, expected) in cases {
        let check =
            |error: String| assert!(error.contains(expected), "'{error}', not '{expected}'");
        check(text(schedule.validate()));
        check(text(schedule.simulate_values(3)));
        check(text(schedule.fits(100)));
        let mut scheduler = ParamScheduler::new("x", idle(), schedule);
        check(text(scheduler.advance()));
        check(text(scheduler.get_param()));
        let mut engine: Rates = Engine::new(|_, _, ()| Ok(0.));
        engine.attach(scheduler);
        check(text(engine.run(&mut vec![], vec![()], Until::epochs(1))));
    }
    let error = text(cosine().warmup(0., 1));
    assert!(error.contains("warmup_duration should be at least 2 events, but given 1"), "{error}");
    Ok(())
}

#[test]
fn schedules_compose() -> Result<()> {
    let line = || PiecewiseLinear::new([(0, 0.), (100, 100.)]);
    let take = |schedule: AnySchedule, events: u64| -> Vec<f64> {
        schedule.validate().unwrap();
        // Values are asked for in reverse, because they must not depend on the order of the calls.
        let mut values: Vec<_> = (0..events).rev().map(|event| schedule.at(event)).collect();
        values.reverse();
        values
    };
    assert_eq!(take(line().skip(3).into(), 3), [3., 4., 5.]);
    assert_eq!(take(line().scale(0.5).into(), 3), [0., 0.5, 1.]);
    assert_eq!(take(line().then(line().scale(-1.), 2).into(), 5), [0., 1., 0., -1., -2.]);
    let three = Concat::new([line(), line(), line()], [1, 2]);
    assert_eq!(take(three.into(), 5), [0., 0., 1., 0., 1.]);
    let sequential = Concat::sequential([line(), line(), line()], [1, 3]);
    assert_eq!(take(sequential.into(), 5), [0., 0., 1., 0., 1.]);
    let warm = CosineAnnealing::new(1., 0., 4).warmup(0., 5)?;
    let after: Vec<_> = take(CosineAnnealing::new(1., 0., 4).into(), 4);
    assert_eq!(take(warm, 8), [&[0., 0.25, 0.5, 0.75], &after[..]].concat());
    let shrinking = LinearCyclical::new(1., 0., 4).cycle_mult(0.5);
    assert_eq!(shrinking.clone().skip(2).end().map(|(end, _)| end), Some(5));
    assert_eq!(line().then(shrinking.clone(), 3).end().map(|(end, _)| end), Some(10));
    assert_eq!(shrinking.clone().then(line(), 7).end(), None);
    assert_eq!(shrinking.then(line(), 8).end().map(|(end, _)| end), Some(7));
    Ok(())
}

#[test]
fn several_schedulers_in_one_advance_save_and_load_together() -> Result<()> {
    let group = || {
        ParamGroupScheduler::new([
            ParamScheduler::new("a", idle(), AnySchedule::from(LinearCyclical::new(1., 0., 4))),
            ParamScheduler::new("b", idle(), CosineAnnealing::new(1., 0., 6).into()),
        ])
    };
    let mut one = group();
    for _ in 0..5 {
        one.advance()?;
    }
    let saved = one.state_dict();
    let mut other = group();
    other.load_state_dict(&saved)?;
    one.advance()?;
    other.advance()?;
    assert_eq!(one.state_dict(), other.state_dict());
    let swap = |from: &str, to: &str| serde_json::to_string(&saved).unwrap().replace(from, to);
    let mut renamed: Map<String, Value> = serde_json::from_str(&swap("\"a\"", "\"c\"")).unwrap();
    assert!(text(group().load_state_dict(&renamed)).ends_with("c vs a"));
    renamed["schedulers"].as_array_mut().unwrap().pop();
    let error = text(group().load_state_dict(&renamed));
    assert!(
        error.contains("contains 1 state_dicts of param group schedulers, but 2 needed"),
        "{error}"
    );
    Ok(())
}

#[test]
fn the_rate_falls_when_a_metric_stays() -> Result<()> {
    let (_w, optimizer) = sgd();
    let mut losses = [5., 4., 4., 4., 1., 1., 1., 1.].into_iter();
    let optimizer_of_step = optimizer.clone();
    let mut engine: Rates = Engine::new(move |rates: &mut Vec<f64>, _, ()| {
        rates.push(optimizer_of_step.group_at(0)?.lr()?);
        Ok(losses.next().unwrap_or(f64::NAN))
    });
    let plateau = || -> Result<_> {
        let knob = optimizer.group_at(0)?.knob("lr")?;
        Ok(ReduceLROnPlateauScheduler::min("lr", knob, "loss")?.factor(0.5).patience(1))
    };
    engine.metric("loss", Mean::new()).attach(plateau()?.min_value([0.2]));
    let mut rates = vec![];
    engine.run(&mut rates, vec![()], Until::epochs(8))?;
    assert_eq!(rates, [0.5, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25, 0.2]);
    let mut engine: Rates = Engine::new(|_, _, ()| Ok(0.));
    engine.attach(plateau()?);
    let error = chain(engine.run(&mut vec![], vec![()], Until::epochs(1)));
    assert!(
        error.contains("handler 'lr' of EPOCH_COMPLETED")
            && error.contains("no metric 'loss' has a value yet"),
        "{error}"
    );
    assert!(
        text(plateau()?.factor(1.).advance(1.))
            .contains("Argument factor should be above 0 and below 1, but given 1")
    );
    Ok(())
}

/// Runs of one iteration each that go on where the last one ended. The step fires a custom event after its update.
#[test]
fn update_k_uses_value_k_on_any_event_after_the_step() -> Result<()> {
    const STEPPED: Event = Event::custom("stepped");
    let line = || AnySchedule::from(PiecewiseLinear::new([(0, 0.), (100, 100.)]));
    let warmup = || -> Result<AnySchedule> { CosineAnnealing::new(1., 0., 8).warmup(0., 5) };
    let after: [Events; 4] = [
        STEPPED.into(),
        Event::IterationCompleted.into(),
        Event::EpochCompleted.into(),
        Event::IterationCompleted | Event::Terminate,
    ];
    for (schedule, events) in after.iter().flat_map(|e| [(line(), e), (warmup().unwrap(), e)]) {
        for group in [false, true] {
            let (_w, optimizer) = sgd();
            let of_step = optimizer.clone();
            let mut engine: Rates = Engine::new(move |rates: &mut Vec<f64>, engine, ()| {
                rates.push(of_step.group_at(0)?.lr()?);
                engine.fire_event(STEPPED, rates)?;
                Ok(0.)
            });
            engine.register_events([STEPPED])?;
            let one = ParamScheduler::new("lr", optimizer.knob("lr")?, schedule.clone());
            if group {
                engine.add_handler(ParamGroupScheduler::new([one]).on(events.clone()))?;
            } else {
                engine.add_handler(one.on(events.clone()))?;
            }
            let mut rates = vec![];
            for epochs in [2, 6] {
                engine.run(&mut rates, vec![()], Until::epochs(epochs))?;
            }
            let expected: Vec<_> = (0..6).map(|update| schedule.at(update)).collect();
            assert_eq!(rates, expected, "{events:?}");
        }
    }
    // With `write_at_start(false)`, as in ignite, nothing is written before the first event.
    let (_w, optimizer) = sgd();
    let mut engine = rates(&optimizer);
    let scheduler = ParamScheduler::new("lr", optimizer.knob("lr")?, line());
    engine.attach(scheduler.on(Event::IterationCompleted).write_at_start(false));
    let mut seen = vec![];
    engine.run(&mut seen, vec![(); 3], Until::epochs(1))?;
    assert_eq!(seen, [0.5, 0., 1.]);
    Ok(())
}

#[test]
fn a_schedule_of_as_many_values_as_updates_ends_with_the_last_of_them() -> Result<()> {
    let (_w, optimizer) = sgd();
    let shrinking = CosineAnnealing::new(1., 0., 4).cycle_mult(0.5); // 7 events
    assert_eq!(shrinking.end().map(|(end, _)| end), Some(7));
    let mut engine = rates(&optimizer);
    let scheduler = ParamScheduler::new("lr", optimizer.knob("lr")?, shrinking.clone());
    engine.attach(scheduler.on(Event::IterationCompleted));
    let mut seen = vec![];
    engine.run(&mut seen, vec![(); 7], Until::epochs(1))?;
    assert_eq!(seen, (0..7).map(|update| shrinking.at(update)).collect::<Vec<_>>());
    let error = chain(engine.run(&mut seen, vec![(); 7], Until::epochs(2)));
    assert!(error.contains("the schedule ends after 7 events"), "{error}");
    Ok(())
}

/// The numbers are those of torch 2.13 with LinearLR (start_factor 0.1, total_iters 4) and ReduceLROnPlateau (patience 0,
/// factor 0.5) on one optimizer, in either order.
#[test]
fn a_plateau_and_another_schedule_on_one_knob_multiply() -> Result<()> {
    let torch = [0.1, 0.325, 0.275, 0.19375, 0.125, 0.0625, 0.03125];
    for (event, plateau_first) in [
        (Event::EpochStarted, false),
        (Event::EpochStarted, true),
        (Event::EpochCompleted, false),
        (Event::EpochCompleted, true),
    ] {
        for all_groups in [true, false] {
            let (_w, optimizer) = sgd();
            let all = optimizer.knob("lr")?;
            let knob = if all_groups { all.clone() } else { optimizer.group_at(0)?.knob("lr")? };
            let plateau = ReduceLROnPlateauScheduler::min("plateau", all, "m")?;
            let plateau = plateau.patience(0).factor(0.5);
            let linear = LinearLR::new(1.).start_factor(0.1).total_iters(4);
            let linear = ParamScheduler::new("lr", knob, linear).on(event);
            let mut engine = rates(&optimizer);
            engine.state.metrics.set("m", 1.);
            if plateau_first {
                engine.attach(plateau).attach(linear);
            } else {
                engine.attach(linear).attach(plateau);
            }
            let mut seen = vec![];
            engine.run(&mut seen, vec![()], Until::epochs(7))?;
            for (seen, torch) in seen.iter().zip(torch) {
                assert!((seen - torch).abs() < 1e-15, "{seen} {torch} {event}");
            }
            assert_eq!(seen.len(), torch.len());
        }
    }
    // A saved state has the plateau's reductions. Without a plateau there are none.
    let value = std::sync::Arc::new(std::sync::Mutex::new(8.));
    let (read, write) = (value.clone(), value.clone());
    let own = Knob::new("x", move || *read.lock().unwrap(), move |v| *write.lock().unwrap() = v);
    let plateau = || -> Result<_> {
        let plateau = ReduceLROnPlateauScheduler::min("plateau", own.clone(), "m")?;
        Ok(plateau.patience(0).factor(0.5))
    };
    let mut first = plateau()?;
    (0..3).try_for_each(|_| first.advance(1.))?;
    let saved = first.state_dict();
    let mut schedule = ParamScheduler::new("x", own.clone(), LambdaLR::new(8., |_| 1.));
    assert_eq!((schedule.advance()?, own.get()?), (2., 2.));
    drop(first);
    assert_eq!(schedule.advance()?, 8.);
    let mut second = plateau()?;
    second.load_state_dict(&saved)?;
    assert_eq!(schedule.advance()?, 2.);
    Ok(())
}

#[test]
fn two_schedulers_that_set_one_knob_are_refused() -> Result<()> {
    let vs = VarStore::new(Device::Cpu);
    let _layers =
        [0, 1].map(|group| nn::linear(vs.root().set_group(group), 1, 1, Default::default()));
    let optimizer = Optimizer::sgd(&vs).build()?;
    let all = || optimizer.knob("lr").unwrap();
    let group = |index| optimizer.group_at(index).unwrap().knob("lr").unwrap();
    let scheduler = |name: &str, knob| ParamScheduler::new(name, knob, StepLR::new(1., 2));
    let own = idle();
    let momentum = || optimizer.knob("momentum").unwrap();
    for (first, second, refused) in [
        (all(), all(), true),
        (all(), group(1), true),
        (group(0), all(), true),
        (group(0), group(0), true),
        (own.clone(), own.clone(), true),
        (group(0), group(1), false),
        (all(), momentum(), false),
        (idle(), idle(), false),
    ] {
        let mut engine = rates(&optimizer);
        engine.add_handler(scheduler("a", first.clone()))?;
        let added = engine.add_handler(scheduler("b", second.clone()).on(Event::EpochStarted));
        let mut engine = rates(&optimizer);
        let group = ParamGroupScheduler::new([scheduler("a", first), scheduler("b", second)]);
        let as_group = engine.add_handler(group);
        if refused {
            for error in [text(added), text(as_group)] {
                assert!(error.contains("schedulers 'a' and 'b' both set"), "{error}");
                assert!(error.contains("first.then(second, events)"), "{error}");
            }
        } else {
            added?;
            as_group?;
        }
    }
    // Two schedulers may drive one value in different parts of the run.
    let mut engine = rates(&optimizer);
    engine
        .attach(scheduler("a", all()).on(Event::IterationStarted.before(3)))
        .attach(scheduler("b", all()).on(Event::IterationStarted.after(2)));
    engine.run(&mut vec![], vec![(); 4], Until::epochs(1))?;
    // A removed scheduler frees its value, and another engine has its own schedulers.
    let mut engine = rates(&optimizer);
    let id = engine.add_handler(scheduler("a", all()))?;
    engine.remove_event_handler(id)?;
    engine.add_handler(scheduler("b", all()))?;
    Ok(())
}

/// The numbers are those of torch 2.13.
#[test]
fn a_first_metric_that_is_infinite_is_no_better_than_none() -> Result<()> {
    let torch = [1., 0.5, 0.5, 0.5, 0.25, 0.25, 0.125];
    let (inf, nan) = (f64::INFINITY, f64::NAN);
    for (max, first) in [(false, inf), (true, -inf), (false, nan), (true, nan)] {
        let (_w, optimizer) = sgd();
        let knob = optimizer.knob("lr")?;
        knob.set(1.)?;
        let plateau = match max {
            true => ReduceLROnPlateauScheduler::max("lr", knob.clone(), "m")?,
            false => ReduceLROnPlateauScheduler::min("lr", knob.clone(), "m")?,
        };
        let mut plateau = plateau.factor(0.5).patience(1);
        for (metric, torch) in [first, first, 1., 1., 1., 1., 1.].into_iter().zip(torch) {
            plateau.advance(metric)?;
            assert_eq!(knob.get()?, torch, "{max} {first}");
        }
    }
    Ok(())
}

/// torch divides by zero in this case.
#[test]
fn one_cycle_is_refused_where_it_rises_within_no_events() {
    for (steps, share) in [(10, 0.1), (4, 0.25), (1, 1.)] {
        for three in [false, true] {
            let schedule = OneCycleLR::new(1., steps).pct_start(share).three_phase(three);
            for error in [text(schedule.validate()), text(schedule.fits(steps))] {
                assert!(
                    error.contains("pct_start should be other than 1 / total_steps"),
                    "{error}"
                );
            }
            assert!(schedule.momentum(0.8, 0.9).validate().is_err());
        }
    }
    // With a share of 1 the schedule only rises, up to its last event.
    let rising = OneCycleLR::new(1., 10).pct_start(1.);
    assert_eq!((rising.at(9), rising.end().map(|(end, _)| end)), (1., Some(10)));
    rising.fits(10).unwrap();
}

#[test]
fn values_that_are_no_numbers_are_found_before_a_run() {
    let growing = ExponentialLR::new(1., 10.);
    growing.fits(300).unwrap();
    assert!(text(growing.fits(400)).contains("gives inf after 309 events"));
    let lambda = LambdaLR::new(1., |event| (3. - event as f64).sqrt());
    assert!(text(lambda.fits(9)).contains("gives NaN after 4 events"));
    for (schedule, expected) in [
        (AnySchedule::from(LambdaLR::new(1., |_| f64::NAN)), "give NaN at event 0"),
        (OneCycleLR::new(1., 4).skip(9).into(), "ends before its first event"),
        (CosineAnnealing::new(1e308, 0., 4).scale(1e10).into(), "give inf at event 0"),
        (CyclicLR::new(0., 1.).step_size_up(1e-300).into(), "comparable with step_size_down"),
        (PolynomialLR::new(1.).power(-1.).into(), "power should be at least 0"),
        (ConstantLR::new(1.).factor(1e-310).into(), "1 / factor should be finite"),
    ] {
        for error in [text(schedule.validate()), text(schedule.fits(2))] {
            assert!(error.contains(expected), "'{error}', not '{expected}'");
        }
    }
}

/// Counts how often a value is computed. The schedule ends after four events.
struct Counted(std::sync::Arc<std::sync::atomic::AtomicU64>);

impl Schedule for Counted {
    fn at(&self, event: u64) -> f64 {
        self.0.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        if event < 4 { event as f64 + 1. } else { f64::NAN }
    }

    fn validate(&self) -> Result<()> {
        Ok(())
    }

    fn end(&self) -> Option<(u64, String)> {
        Some((4, "it has four values".into()))
    }
}

#[test]
fn a_value_is_computed_once_for_each_event() -> Result<()> {
    for event in [Event::IterationStarted, Event::IterationCompleted] {
        let count = std::sync::Arc::<std::sync::atomic::AtomicU64>::default();
        let knob = Knob::new("own", || 0., |_| {});
        let mut trainer = Engine::new(|_: &mut (), _, _: ()| Ok(()));
        trainer.attach(ParamScheduler::new("own", knob, Counted(count.clone())).on(event));
        trainer.run(&mut (), vec![(); 3], Until::epochs(1))?;
        // After the step, the first of four values is that of STARTED.
        let expected = if event == Event::IterationStarted { 3 } else { 4 };
        assert_eq!(count.load(std::sync::atomic::Ordering::Relaxed), expected, "{event}");
    }
    Ok(())
}

#[test]
fn one_loader_has_one_scheduler_of_its_batch_size() -> Result<()> {
    let x = Tensor::zeros([8], (Kind::Float, Device::Cpu));
    let loader = tch_ignite::data::Loader::new(&x, &x, 2)?;
    let (clone, other) = (loader.clone(), tch_ignite::data::Loader::new(&x, &x, 2)?);
    let scheduler = |loader| BatchSizeScheduler::new(loader, StepLR::new(2., 1).gamma(2.));
    let trainer = || Engine::new(|_: &mut (), _, _: tch_ignite::data::Batch| Ok(()));
    let mut twice = trainer();
    twice.attach(scheduler(&loader)).attach(scheduler(&clone));
    let error = twice.run(&mut (), &loader, Until::epochs(1)).unwrap_err().to_string();
    assert!(error.contains("both set batch_size"), "{error}");
    let mut fine = trainer();
    fine.attach(scheduler(&loader)).attach(scheduler(&other));
    fine.run(&mut (), &loader, Until::epochs(1))?;
    let mut filtered = trainer();
    filtered
        .attach(scheduler(&loader).on(Event::EpochStarted.before(2)))
        .attach(scheduler(&loader).on(Event::EpochStarted.after(1)));
    filtered.run(&mut (), &loader, Until::epochs(2))?;
    Ok(())
}

#[test]
fn a_plateau_reduces_only_by_more_than_eps() -> Result<()> {
    for (value, eps, reduced) in [
        (1., Some(0.5), false),
        (1., Some(0.499), true),
        // The default is 1e-8.
        (2e-8, None, false),
        (2.1e-8, None, true),
    ] {
        let own = std::sync::Arc::new(std::sync::Mutex::new(value));
        let (read, write) = (own.clone(), own.clone());
        let knob =
            Knob::new("lr", move || *read.lock().unwrap(), move |v| *write.lock().unwrap() = v);
        let plateau = ReduceLROnPlateauScheduler::min("lr", knob, "m")?.factor(0.5).patience(0);
        let mut plateau = match eps {
            Some(eps) => plateau.eps(eps),
            None => plateau,
        };
        plateau.advance(1.)?;
        plateau.advance(1.)?;
        let expected = if reduced { value / 2. } else { value };
        assert_eq!(*own.lock().unwrap(), expected, "{value} {eps:?}");
    }
    Ok(())
}
