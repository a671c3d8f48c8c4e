//! Tests of properties that every schedule has, also in random compositions.

use proptest::prelude::*;
use tch_ignite::optim::Knob;
use tch_ignite::schedule::*;

fn value() -> impl Strategy<Value = f64> {
    0.0..1.0f64
}

/// Generates a schedule that contains no other, with arguments that are allowed.
fn single() -> impl Strategy<Value = AnySchedule> {
    let factor = || 0.5..1.5f64;
    let size = || 2u64..20;
    prop_oneof![
        (value(), value(), size(), factor(), factor(), 1.0..2.0f64, 0u64..5, any::<bool>())
            .prop_map(|(start, end, size, start_mult, end_mult, mult, warmup, monotonic)| {
                LinearCyclical::new(start, end, size)
                    .start_value_mult(start_mult)
                    .end_value_mult(end_mult)
                    .cycle_mult(mult)
                    .warmup_duration(if monotonic { warmup } else { 0 })
                    .monotonic(monotonic)
                    .into()
            }),
        (value(), value(), size(), factor(), factor(), 1.0..2.0f64, 0u64..5).prop_map(
            |(start, end, size, start_mult, end_mult, mult, warmup)| {
                CosineAnnealing::new(start, end, size)
                    .start_value_mult(start_mult)
                    .end_value_mult(end_mult)
                    .cycle_mult(mult)
                    .warmup_duration(warmup)
                    .into()
            }
        ),
        prop::collection::vec((-5i64..40, value()), 1..6).prop_map(|mut points| {
            points.sort_by_key(|(milestone, _)| *milestone);
            PiecewiseLinear::new(points).into()
        }),
        (value(), size(), value()).prop_map(|(b, n, g)| StepLR::new(b, n).gamma(g).into()),
        (value(), prop::collection::vec(0u64..40, 0..4), value())
            .prop_map(|(b, m, g)| MultiStepLR::new(b, m).gamma(g).into()),
        (value(), 0.1..1.0f64, 0u64..20)
            .prop_map(|(b, f, n)| ConstantLR::new(b).factor(f).total_iters(n).into()),
        (value(), 0.1..1.0f64, value(), size()).prop_map(|(b, s, e, n)| {
            LinearLR::new(b).start_factor(s).end_factor(e).total_iters(n).into()
        }),
        (value(), value()).prop_map(|(b, g)| ExponentialLR::new(b, g).into()),
        (value(), size(), 0.5..3.0f64)
            .prop_map(|(b, n, p)| PolynomialLR::new(b).total_iters(n).power(p).into()),
        (value(), size()).prop_map(|(b, n)| CosineAnnealingLR::new(b, n).into()),
        (value(), size(), 1u64..4)
            .prop_map(|(b, n, m)| CosineAnnealingWarmRestarts::new(b, n).t_mult(m).into()),
        (value(), value(), 1.0..20.0f64, 1.0..20.0f64).prop_map(|(a, b, up, down)| {
            CyclicLR::new(a, b).step_size_up(up).step_size_down(down).into()
        }),
        (value(), 150u64..300, any::<bool>())
            .prop_map(|(m, n, three)| OneCycleLR::new(m, n).three_phase(three).into()),
        (value(), size()).prop_map(|(p, w)| InverseSqrt::new(p, w).into()),
        (1u64..1000, size()).prop_map(|(d, w)| Noam::new(d, w).into()),
        (value(), size(), size(), size())
            .prop_map(|(p, w, s, d)| WarmupStableDecay::new(p, w, s, d).into()),
        (value(), value()).prop_map(|(v, g)| ExpState::new(v, g).into()),
        (value(), value(), size()).prop_map(|(v, g, n)| StepState::new(v, g, n).into()),
        (value(), value(), size())
            .prop_map(|(v, g, n)| MultiStepState::new(v, g, [n, 2 * n]).into()),
    ]
}

fn schedule() -> impl Strategy<Value = AnySchedule> {
    single().prop_recursive(3, 8, 2, |inner| {
        prop_oneof![
            (inner.clone(), inner.clone(), 0u64..30)
                .prop_map(|(first, next, after)| first.then(next, after).into()),
            (inner.clone(), 0.1..2.0f64).prop_map(|(inner, factor)| inner.scale(factor).into()),
            (inner.clone(), 0u64..20).prop_map(|(inner, events)| inner.skip(events).into()),
            (inner, value(), 2u64..10).prop_map(|(inner, start, events)| {
                inner.warmup(start, events).expect("arguments that are allowed")
            }),
        ]
    })
}

/// A schedule that comes to a value and stays there, and whether it jumps to that value.
fn ending() -> impl Strategy<Value = (AnySchedule, bool)> {
    let (base, size) = (|| 1.0..2.0f64, || 2u64..40);
    prop_oneof![
        (base(), size(), 0.1..0.5f64).prop_map(|(b, n, s)| {
            (LinearLR::new(b).start_factor(s).end_factor(0.75).total_iters(n).into(), false)
        }),
        (base(), size(), 0.5..3.0f64)
            .prop_map(|(b, n, p)| (PolynomialLR::new(b).total_iters(n).power(p).into(), false)),
        (base(), size(), size(), size())
            .prop_map(|(p, w, s, d)| (WarmupStableDecay::new(p, w, s, d).into(), false)),
        (base(), 0i64..40, 1i64..40)
            .prop_map(|(b, m, n)| (PiecewiseLinear::new([(m, b), (m + n, 0.5)]).into(), false)),
        (base(), 1i64..40, 1i64..40).prop_map(|(b, m, n)| {
            (PiecewiseLinear::new([(m, b), (m + n, 0.75), (m + n, 0.5)]).into(), true)
        }),
        (base(), size(), 0.1..0.9f64)
            .prop_map(|(b, n, f)| (ConstantLR::new(b).factor(f).total_iters(n).into(), true)),
        (base(), prop::collection::vec(1u64..40, 1..4), 0.1..0.9f64)
            .prop_map(|(b, m, g)| (MultiStepLR::new(b, m).gamma(g).into(), true)),
        (base(), 0.1..0.9f64, size())
            .prop_map(|(v, g, n)| (MultiStepState::new(v, g, [n, 2 * n]).into(), true)),
    ]
}

const EVENTS: u64 = 120;

/// Generates numbers that are easily handled wrongly: at the edges, tiny, huge, NaN and infinity.
fn any_number() -> impl Strategy<Value = f64> {
    let edges = vec![
        0.,
        -0.,
        1.,
        -1.,
        0.1,
        0.5,
        2.,
        1e-320,
        1e-300,
        1e300,
        f64::MAX,
        f64::MIN,
        f64::INFINITY,
        f64::NAN,
    ];
    prop_oneof![prop::sample::select(edges), -2.0..2.0f64]
}

/// Generates a schedule with arguments that may be refused.
fn unchecked() -> impl Strategy<Value = AnySchedule> {
    let n = any_number;
    let size = || prop_oneof![0u64..12, Just(1 << 40)];
    prop_oneof![
        (n(), n(), size(), n(), n(), n(), 0u64..3, any::<bool>()).prop_map(
            |(start, end, size, start_mult, end_mult, mult, warmup, monotonic)| {
                LinearCyclical::new(start, end, size)
                    .start_value_mult(start_mult)
                    .end_value_mult(end_mult)
                    .cycle_mult(mult)
                    .warmup_duration(warmup)
                    .monotonic(monotonic)
                    .into()
            }
        ),
        (n(), n(), size(), n(), n()).prop_map(|(start, end, size, mult, start_mult)| {
            CosineAnnealing::new(start, end, size)
                .cycle_mult(mult)
                .start_value_mult(start_mult)
                .into()
        }),
        prop::collection::vec((-5i64..12, n()), 0..4).prop_map(|m| PiecewiseLinear::new(m).into()),
        (n(), size(), n()).prop_map(|(b, s, g)| StepLR::new(b, s).gamma(g).into()),
        (n(), prop::collection::vec(0u64..12, 0..4), n()).prop_map(|(b, m, g)| MultiStepLR::new(
            b, m
        )
        .gamma(g)
        .into()),
        (n(), n(), size()).prop_map(|(b, f, s)| ConstantLR::new(b).factor(f).total_iters(s).into()),
        (n(), n(), n(), size()).prop_map(|(b, s, e, size)| {
            LinearLR::new(b).start_factor(s).end_factor(e).total_iters(size).into()
        }),
        (n(), n()).prop_map(|(b, g)| ExponentialLR::new(b, g).into()),
        (n(), size(), n())
            .prop_map(|(b, s, p)| PolynomialLR::new(b).total_iters(s).power(p).into()),
        (n(), size(), n()).prop_map(|(b, s, e)| CosineAnnealingLR::new(b, s).eta_min(e).into()),
        (n(), size(), 0u64..3, n()).prop_map(|(b, s, m, e)| {
            CosineAnnealingWarmRestarts::new(b, s).t_mult(m).eta_min(e).into()
        }),
        (n(), n(), n(), n(), n(), 0..3usize).prop_map(|(a, b, up, down, gamma, which)| {
            let mode = [CyclicMode::Triangular, CyclicMode::Triangular2, CyclicMode::ExpRange];
            let schedule = CyclicLR::new(a, b).step_size_up(up).step_size_down(down);
            schedule.mode(mode[which]).gamma(gamma).into()
        }),
        (n(), size(), n(), n(), n(), any::<bool>(), any::<bool>()).prop_map(
            |(max, steps, share, div, last, three, momentum)| {
                let schedule = OneCycleLR::new(max, steps).pct_start(share).three_phase(three);
                match momentum {
                    true => schedule.momentum(div, last).into(),
                    false => schedule.div_factor(div).final_div_factor(last).into(),
                }
            }
        ),
        (1u64..12, 0.0..1.0f64, any::<bool>()).prop_map(|(steps, place, three)| {
            // The share is rounded to a whole number of events.
            let share = (place * steps as f64).round() / steps as f64;
            OneCycleLR::new(1., steps).pct_start(share).three_phase(three).into()
        }),
        (n(), size()).prop_map(|(p, w)| InverseSqrt::new(p, w).into()),
        (size(), size(), n()).prop_map(|(d, w, f)| Noam::new(d, w).factor(f).into()),
        (n(), size(), size(), size(), n(), n()).prop_map(|(p, w, s, d, start, end)| {
            WarmupStableDecay::new(p, w, s, d).start(start).end(end).into()
        }),
        (n(), n()).prop_map(|(v, g)| ExpState::new(v, g).into()),
        (n(), n(), size()).prop_map(|(v, g, s)| StepState::new(v, g, s).into()),
        (n(), n(), size()).prop_map(|(v, g, s)| MultiStepState::new(v, g, [s]).into()),
        (n(), n()).prop_map(|(a, b)| LambdaLR::new(a, move |_| b).into()),
        (n(), n()).prop_map(|(a, b)| MultiplicativeLR::new(a, move |_| b).into()),
    ]
}

fn values(schedule: &AnySchedule) -> Vec<u64> {
    (0..EVENTS).map(|event| schedule.at(event).to_bits()).collect()
}

fn idle() -> Knob {
    Knob::new("value", || 0., |_| {})
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn values_are_finite(schedule in schedule()) {
        schedule.validate().unwrap();
        for (event, value) in schedule.simulate_values(EVENTS).unwrap() {
            prop_assert!(value.is_finite(), "{schedule:?} at {event}: {value}");
        }
    }

    #[test]
    fn what_is_not_refused_has_a_number_at_each_event_it_is_asked_for(
        schedule in unchecked(), factor in any_number(), skipped in 0u64..12,
    ) {
        let also = [schedule.clone().scale(factor).into(), schedule.clone().skip(skipped).into()];
        for schedule in also.into_iter().chain([schedule]) {
            if schedule.validate().is_err() {
                continue;
            }
            prop_assert!(schedule.at(0).is_finite(), "{schedule:?}");
            // Values are checked up to the schedule's end. `fits` must find schedules whose values grow without
            // bounds.
            let events = schedule.end().map_or(40, |(end, _)| end.min(40));
            let finite = |events: u64| (0..events).all(|event| schedule.at(event).is_finite());
            for length in [1, events / 2, events, events + 1, 40] {
                if schedule.fits(length).is_ok() {
                    prop_assert!(finite(length), "{schedule:?} in {length}");
                }
            }
        }
    }

    #[test]
    fn a_length_is_where_a_line_ends_or_the_event_after_a_jump((schedule, jumps) in ending()) {
        let values = values(&schedule);
        let last = values[EVENTS as usize - 1];
        // The first event from which on nothing changes.
        let reached = values.iter().rposition(|value| *value != last).map_or(0, |event| event as u64 + 1);
        prop_assert_eq!(schedule.length(), Some(reached + u64::from(jumps)), "{:?}", schedule);
    }

    #[test]
    fn a_composition_is_as_long_as_its_parts((schedule, _) in ending(), n in 0u64..30) {
        let length = schedule.length().unwrap();
        prop_assert_eq!(schedule.clone().scale(2.).length(), Some(length));
        prop_assert_eq!(schedule.clone().skip(n).length(), Some(length.saturating_sub(n)));
        let flat = PiecewiseLinear::new([(0, 5.)]);
        prop_assert_eq!(flat.then(schedule, n).length(), Some(n + length.max(1)));
    }

    #[test]
    fn values_do_not_depend_on_the_order_of_asking(
        schedule in schedule(),
        events in prop::collection::vec(0..EVENTS, 1..40),
    ) {
        let sequence = values(&schedule);
        for event in events {
            prop_assert_eq!(schedule.at(event).to_bits(), sequence[event as usize]);
        }
    }

    #[test]
    fn a_file_brings_back_the_same_sequence(schedule in schedule()) {
        let json = serde_json::to_string(&schedule).unwrap();
        let back: AnySchedule = serde_json::from_str(&json).unwrap();
        prop_assert_eq!(values(&back), values(&schedule));
        prop_assert_eq!(serde_json::to_string(&back).unwrap(), json);
    }

    #[test]
    fn a_resumed_run_continues_the_sequence(schedule in schedule(), k in 0..EVENTS) {
        let sequence = values(&schedule);
        let mut first = ParamScheduler::new("a", idle(), schedule.clone());
        for _ in 0..k {
            first.advance().unwrap();
        }
        let saved = serde_json::to_string(&first.state_dict()).unwrap();
        let mut second = ParamScheduler::new("a", idle(), schedule);
        second.load_state_dict(&serde_json::from_str(&saved).unwrap()).unwrap();
        for event in k..EVENTS {
            prop_assert_eq!(second.advance().unwrap().to_bits(), sequence[event as usize]);
        }
    }

    #[test]
    fn a_state_is_only_taken_by_the_schedule_it_is_of(
        one in schedule(), other in schedule(), k in 1..EVENTS,
    ) {
        prop_assume!(one != other);
        let mut first = ParamScheduler::new("a", idle(), one);
        for _ in 0..k {
            first.advance().unwrap();
        }
        let mut second = ParamScheduler::new("a", idle(), other);
        prop_assert!(second.load_state_dict(&first.state_dict()).is_err());
    }

    #[test]
    fn shapes_between_two_values_stay_between_them(
        start in value(), end in value(), size in 2u64..50, event in 0u64..1000,
    ) {
        let (low, high) = (start.min(end), start.max(end));
        let within = |value: f64| value >= low - 1e-12 && value <= high + 1e-12;
        prop_assert!(within(LinearCyclical::new(start, end, size).at(event)));
        prop_assert!(within(CosineAnnealing::new(start, end, size).at(event)));
        prop_assert!(within(CosineAnnealingWarmRestarts::new(start, size).eta_min(end).at(event)));
        prop_assert!(within(CyclicLR::new(start, end).step_size_up(size as f64).at(event)));
        prop_assert!(within(PiecewiseLinear::new([(3, start), (3 + size as i64, end)]).at(event)));
    }
}
