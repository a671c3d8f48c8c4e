//! Properties that every schedule has, also in random compositions.

use proptest::prelude::*;
use tch_ignite::optim::Knob;
use tch_ignite::schedule::*;

fn value() -> impl Strategy<Value = f64> {
    0.0..1.0f64
}

/// A schedule by itself, with arguments that are allowed.
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

const EVENTS: u64 = 120;

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
