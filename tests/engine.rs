//! Probes.

use serde_json::json;
use std::time::Duration;
use tch_ignite::Result;
use tch_ignite::data::*;
use tch_ignite::engine::*;
use tch_ignite::handlers::Evaluate;
use tch_ignite::metrics::*;

fn eng<'a>() -> Engine<'a, Vec<i64>, i64, f64> {
    Engine::new(|seen: &mut Vec<i64>, _, b| {
        seen.push(b);
        anyhow::ensure!(seen.len() < 200, "too many");
        Ok(b as f64)
    })
}
fn show<T: std::fmt::Debug>(what: &str, r: Result<T>, seen: &[i64]) {
    match r {
        Ok(s) => println!("{what}: OK {s:?} {seen:?}"),
        Err(e) => println!("{what}: ERR {:#} {} {seen:?}", anyhow::Error::from(e), seen.len()),
    }
}

#[test]
fn p01_interrupted_samples_then_default() {
    let l: Vec<i64> = (0..5).collect();
    let mut e = eng();
    e.on(Event::IterationCompleted.once(2), |_, e| {
        e.interrupt();
        Ok(())
    });
    let mut seen = vec![];
    let r = e.run(&mut seen, l.clone(), Until::time(Duration::from_secs(5)));
    show("time interrupted", r, &seen);
    let r = e.run(&mut seen, l, Until::default());
    show("then default", r, &seen);
}

#[test]
fn p02_interrupted_reset_then_iterations() {
    let l: Vec<i64> = (0..5).collect();
    let mut e = eng();
    e.on(Event::IterationCompleted.once(2), |_, e| {
        e.interrupt();
        Ok(())
    });
    let mut seen = vec![];
    let r = e.run(&mut seen, l.clone(), Until::epochs(2));
    show("epochs interrupted", r, &seen);
    e.state.max_epochs = None;
    let r = e.run(&mut seen, l, Until::iterations(4));
    show("then iterations(4)", r, &seen);
}

#[test]
fn p03_evaluator_interrupted() {
    let mut ev = eng();
    ev.on(Event::IterationCompleted.once(2), |_, e| {
        e.interrupt();
        Ok(())
    });
    let mut t = Engine::new(|_: &mut Vec<i64>, _, _: i64| Ok(0.));
    t.attach(Evaluate::each_epoch("v", ev, vec![1i64, 2, 3]));
    let mut seen = vec![];
    let r = t.run(&mut seen, vec![0i64], Until::epochs(2));
    show("evaluator interrupted", r, &seen);
}

#[test]
fn p04_time_state_resume() {
    let l: Vec<i64> = (0..5).collect();
    let mut e = eng();
    let mut seen = vec![];
    e.on(Event::IterationCompleted.once(7), |_, e| {
        println!("{:?}", e.state_dict());
        e.terminate();
        Ok(())
    });
    let _ = e.run(&mut seen, l.clone(), Until::time(Duration::from_secs(50)));
    let s = e.state_dict();
    let mut e = eng();
    let mut seen = vec![];
    e.load_state_dict(&s).unwrap();
    println!("{} {}", e.state.iteration, e.state.epoch);
    let r = e.run(&mut seen, l.clone(), Until::epochs(2));
    show("time state loaded, epochs(2)", r, &seen);
    let mut e = eng();
    let mut seen = vec![];
    e.load_state_dict(&s).unwrap();
    e.on(Event::IterationCompleted.once(9), |_, e| {
        e.terminate();
        Ok(())
    });
    let r = e.run(&mut seen, l.clone(), Until::time(Duration::from_millis(50)));
    show("time state loaded, time", r, &seen);
}

#[test]
fn p05_error_in_time_run_continues() {
    let l: Vec<i64> = (0..5).collect();
    let mut e: Engine<Vec<i64>, i64, f64> = Engine::new(|seen: &mut Vec<i64>, e, b| {
        seen.push(b);
        anyhow::ensure!(seen.len() != 2, "second");
        if seen.len() == 6 {
            e.terminate()
        }
        Ok(0.)
    });
    let mut seen = vec![];
    let r = e.run(&mut seen, l.clone(), Until::time(Duration::from_secs(50)));
    show("time: err", r, &seen);
    let r = e.run(&mut seen, l.clone(), Until::time(Duration::from_secs(50)));
    show("time: again", r, &seen);
}

#[test]
fn p06_terminate_in_tse() {
    let mut e = eng();
    e.on(Event::IterationCompleted.once(2), |_, e| {
        e.terminate_epoch();
        Ok(())
    });
    e.on(Event::TerminateSingleEpoch, |_, e| {
        e.terminate();
        Ok(())
    });
    let mut seen = vec![];
    let r = e.run(&mut seen, (0..3).collect::<Vec<i64>>(), Until::epochs(3));
    show("terminate in TSE", r, &seen);
}

#[test]
fn p07_filter_panics() {
    let mut e = eng();
    e.on(
        Event::IterationStarted.filter(|n| {
            if n == 2 {
                panic!("filter")
            };
            true
        }),
        |_, _| Ok(()),
    );
    let mut seen = vec![];
    let r = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        e.run(&mut seen, vec![1i64, 2, 3], Until::epochs(1))
    }));
    println!("filter panics: caught outside = {}", r.is_err());
    let r = e.run(&mut seen, vec![1i64, 2, 3], Until::epochs(1));
    show("after filter panic", r, &seen);
}

#[test]
fn p08_zero_batches_loaded() {
    let mut e = eng();
    let s = json!({"iteration": 1, "epoch_length": 3, "max_epochs": 2});
    e.load_state_dict(s.as_object().unwrap()).unwrap();
    let mut seen = vec![];
    let r = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        e.run(&mut seen, Vec::<i64>::new(), Until::default().epoch_length(3))
    }));
    println!("empty vec loaded: {r:?}");
    let mut e = eng();
    let r = e.run(&mut seen, Vec::<i64>::new(), Until::epochs(2).epoch_length(3));
    show("empty vec epoch_length", r, &seen);
}

#[test]
fn p09_load_in_handler() {
    let mut e = eng();
    e.on(Event::IterationCompleted.once(2), |_, e| {
        let s = json!({"iteration": 0, "epoch_length": 3, "max_epochs": 2});
        e.load_state_dict(s.as_object().unwrap())?;
        Ok(())
    });
    let mut seen = vec![];
    let r = e.run(&mut seen, vec![1i64, 2, 3], Until::epochs(2));
    show("load in handler", r, &seen);
}

#[test]
fn p10_exception_handlers() {
    let mut e = eng();
    e.on(Event::IterationCompleted.once(2), |_, _| anyhow::bail!("first"));
    e.on(Event::ExceptionRaised, |s, e| {
        s.push(100);
        println!("{}", e.exception().is_some());
        anyhow::bail!("second")
    });
    e.on(Event::ExceptionRaised, |s, _| {
        s.push(200);
        Ok(())
    });
    let mut seen = vec![];
    let r = e.run(&mut seen, vec![1i64, 2, 3], Until::epochs(2));
    show("exception handlers", r, &seen);
}

#[test]
fn p11_errors_at_each_event() {
    for ev in [
        Event::Started,
        Event::EpochStarted,
        Event::GetBatchStarted,
        Event::GetBatchCompleted,
        Event::IterationStarted,
        Event::IterationCompleted,
        Event::DataloaderStopIteration,
        Event::EpochCompleted,
        Event::Terminate,
        Event::Completed,
    ] {
        for nth in [1, 2, 3, 4, 5, 6] {
            let mut e: Engine<Vec<String>, i64, ()> = Engine::new(|s: &mut Vec<String>, e, b| {
                s.push(format!("{b}@{}/{}", e.state.iteration, e.state.epoch));
                Ok(())
            });
            for x in [Event::Started, Event::EpochStarted, Event::EpochCompleted, Event::Completed]
            {
                e.on(x, move |s: &mut Vec<String>, e| {
                    s.push(format!("{x}{}", e.state.epoch));
                    Ok(())
                });
            }
            let mut n = 0;
            e.on(ev, move |s: &mut Vec<String>, _| {
                n += 1;
                if n == nth {
                    s.push("!".into());
                    anyhow::bail!("x")
                };
                Ok(())
            });
            let mut s = vec![];
            let r1 = e.run(&mut s, restartable(|| 0..3), Until::epochs(2)).is_err();
            if !r1 {
                continue;
            }
            s.push("|".into());
            let r2 = e.run(&mut s, restartable(|| 0..3), Until::epochs(2)).is_err();
            println!("{ev} {nth} {r1} {r2} {}", s.join(" "));
        }
    }
}

#[test]
fn p12_data_error() {
    struct Bad(u64, Vec<i64>);
    impl Source<i64> for Bad {
        fn batches(&self) -> Option<u64> {
            Some(4)
        }
        fn seek(&mut self, p: u64, b: u64) -> anyhow::Result<()> {
            self.0 = b;
            self.1.push(p as i64);
            Ok(())
        }
        fn next(&mut self) -> Option<anyhow::Result<i64>> {
            if self.0 == 4 {
                return None;
            }
            self.0 += 1;
            Some(if self.0 == 3 && self.1 == [0] {
                Err(anyhow::anyhow!("bad disk"))
            } else {
                Ok(self.0 as i64)
            })
        }
    }
    let mut e = eng();
    let mut seen = vec![];
    let r = e.run(&mut seen, source(Bad(0, vec![])), Until::epochs(2));
    show("data err", r, &seen);
    seen.push(-1);
    let r = e.run(&mut seen, source(Bad(0, vec![9])), Until::epochs(2));
    show("data err again", r, &seen);
}

#[test]
fn p13_unknown_length_resume() {
    let full = {
        let mut e = eng();
        let mut s = vec![];
        e.run(&mut s, restartable(|| 0..7), Until::epochs(4).epoch_length(3)).unwrap();
        s
    };
    println!("full {full:?}");
    let mut e = eng();
    let s = json!({"iteration": 4, "epoch_length": 3, "max_epochs": 4});
    e.load_state_dict(s.as_object().unwrap()).unwrap();
    let mut seen = vec![];
    let r = e.run(&mut seen, restartable(|| 0..7), Until::default());
    show("restartable resumed at 4", r, &seen);
    let mut e = eng();
    e.load_state_dict(s.as_object().unwrap()).unwrap();
    let mut seen = vec![];
    let r = e.run(&mut seen, one_shot(0..), Until::default());
    show("one_shot resumed at 4", r, &seen);
}

#[test]
fn p14_evaluator_terminated_stale() {
    let mut calls = 0;
    let mut ev = eng();
    ev.metric("mean", Mean::new());
    ev.on(Event::Started, move |_, e| {
        calls += 1;
        if calls == 2 {
            e.terminate()
        };
        Ok(())
    });
    let mut t = Engine::new(|_: &mut Vec<i64>, _, _: i64| Ok(0.));
    t.attach(Evaluate::each_epoch("v", ev, vec![1i64, 2, 3]));
    t.on(Event::EpochCompleted, |s, e| {
        println!("metric {:?}", e.state.metrics.get("v/mean"));
        s.push(0);
        Ok(())
    });
    let mut seen = vec![];
    let r = t.run(&mut seen, vec![0i64], Until::epochs(2));
    show("evaluator terminated", r, &seen);
}

#[test]
fn p15_source_panics() {
    struct S(u8);
    impl Source<i64> for S {
        fn batches(&self) -> Option<u64> {
            if self.0 == 0 {
                panic!("batches")
            }
            Some(3)
        }
        fn seek(&mut self, _: u64, _: u64) -> anyhow::Result<()> {
            if self.0 == 1 {
                panic!("seek")
            }
            Ok(())
        }
        fn next(&mut self) -> Option<anyhow::Result<i64>> {
            if self.0 == 2 {
                panic!("next")
            }
            Some(Ok(1))
        }
        fn samples(&self) -> Option<u64> {
            if self.0 == 3 {
                panic!("samples")
            }
            Some(1)
        }
        fn fetches(&self) -> bool {
            if self.0 == 4 {
                panic!("fetches")
            }
            true
        }
    }
    for k in 0..5 {
        let mut e = eng();
        let mut seen = vec![];
        let r = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            e.run(&mut seen, source(S(k)), Until::epochs(1))
        }));
        println!(
            "source panics {k}: {:?}",
            r.map(|r| r.map_err(|e| format!("{:#}", anyhow::Error::from(e)))).map_err(|_| "PANIC")
        );
        let r = e.run(&mut seen, vec![1i64], Until::epochs(1));
        show("   after", r, &seen);
    }
}

#[test]
fn p16_add_own_event() {
    let mut e = eng();
    e.on(Event::EpochCompleted, |s, e| {
        s.push(10);
        e.on(Event::EpochCompleted, |s, _| {
            s.push(20);
            Ok(())
        });
        Ok(())
    });
    let mut seen = vec![];
    let r = e.run(&mut seen, vec![1i64], Until::epochs(2));
    show("added in own event", r, &seen);
}

#[test]
fn p17_reset_after_error() {
    let mut e = eng();
    e.on(Event::IterationCompleted.once(2), |_, _| anyhow::bail!("x"));
    let mut seen = vec![];
    let r = e.run(&mut seen, vec![1i64, 2, 3], Until::epochs(2));
    show("x", r, &seen);
    (e.state.epoch, e.state.iteration) = (0, 0);
    let r = e.run(&mut seen, vec![1i64, 2, 3], Until::epochs(2));
    show("reset epoch=0, iteration=0", r, &seen);
}

#[test]
fn p18_take_batch() {
    let mut e = eng();
    e.on(Event::IterationStarted.once(2), |_, e| {
        e.state.batch = None;
        Ok(())
    });
    let mut seen = vec![];
    let r = e.run(&mut seen, vec![1i64, 2, 3], Until::epochs(2));
    show("took", r, &seen);
}
#[test]
fn p19_exhausted_warnings() {
    let mut e = eng();
    let mut seen = vec![];
    let r = e.run(&mut seen, one_shot(0..3), Until::epochs(2000)).unwrap();
    println!("warnings {} epochs {}", r.warnings.len(), r.epochs);
    let r = e.run(&mut seen, one_shot(0..0), Until::epochs(2).epoch_length(2));
    show("empty one shot", r, &seen);
}
#[test]
fn p20_no_data_restart() {
    let mut e = eng();
    let mut seen = vec![];
    let r = e.run(&mut seen, no_data(), Until::epochs(2));
    show("no data", r, &seen);
    let r = e.run(&mut seen, no_data(), Until::samples(2).epoch_length(2));
    show("no data samples", r, &seen);
    let r = e.run(&mut seen, vec![1, 2], Until::samples(2));
    show("vec samples", r, &seen);
    let r = e.run(&mut seen, vec![1, 2], Until::time(Duration::ZERO));
    show("vec time 0", r, &seen);
}
