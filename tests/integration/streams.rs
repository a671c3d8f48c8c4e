//! Tests of the loader over streams: torch's order, any position, errors, and threads that end.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use tch::Tensor;
use tch_ignite::data::{IntoSource, Source, StreamLoader, WorkerInfo};
use tch_ignite::engine::{Engine, Event, Until};

type Loader = StreamLoader<i64, Tensor>;

/// The numbers from 0 to 10, shared by all workers.
fn shared() -> Loader {
    StreamLoader::new(2, |pass, worker| {
        Ok(worker.share((0..11).map(move |i| Ok(i + 1000 * pass as i64))))
    })
    .unwrap()
}

/// Shares of 5, 0, 9 and 2 samples.
fn uneven() -> Loader {
    let share = |_, worker: WorkerInfo| {
        let (id, len) = (worker.id() as i64, [5, 0, 9, 2][worker.id()]);
        assert_eq!(worker.num_workers(), 4);
        Ok((0..len).map(move |i| {
            std::thread::sleep(Duration::from_micros(100 * (id as u64 * 7 % 3)));
            Ok(100 * id + i)
        }))
    };
    StreamLoader::new(2, share).unwrap().num_workers(4)
}

fn rest(source: &mut dyn Source<Tensor>) -> Vec<Vec<i64>> {
    std::iter::from_fn(|| source.next())
        .map(|batch| Vec::try_from(batch.unwrap()).unwrap())
        .collect()
}

fn pass(loader: &Loader, pass: u64, from: u64) -> Vec<Vec<i64>> {
    let mut source = loader.into_source();
    source.seek(pass, from).unwrap();
    rest(source.as_mut())
}

/// The expected batches are those of torch 2.13's `DataLoader` over an `IterableDataset` with the same shares.
#[test]
fn the_order_is_torchs() {
    let in_order = [vec![0, 1], vec![2, 3], vec![4, 5], vec![6, 7], vec![8, 9], vec![10]];
    assert_eq!(pass(&shared(), 0, 0), in_order);
    assert_eq!(pass(&shared().num_workers(1), 0, 0), in_order);
    let three = shared().num_workers(3);
    let expected = [vec![0, 3], vec![1, 4], vec![2, 5], vec![6, 9], vec![7, 10], vec![8]];
    assert_eq!(pass(&three, 0, 0), expected);
    assert_eq!(pass(&three.drop_last(true), 0, 0), expected[..5]);
    let mut expected = vec![
        vec![0, 1],
        vec![200, 201],
        vec![300, 301],
        vec![2, 3],
        vec![202, 203],
        vec![4],
        vec![204, 205],
        vec![206, 207],
        vec![208],
    ];
    for _ in 0..5 {
        assert_eq!(pass(&uneven(), 0, 0), expected);
    }
    expected.remove(8);
    expected.remove(5);
    assert_eq!(pass(&uneven().drop_last(true), 0, 0), expected);
}

#[test]
fn any_position_is_reached_by_reading_on() {
    for loader in [shared(), shared().num_workers(1), shared().num_workers(3), uneven()] {
        let mut source = (&loader).into_source();
        for number in [0, 2] {
            let all = pass(&loader, number, 0);
            for from in (0..=all.len()).rev() {
                source.seek(number, from as u64).unwrap();
                assert!(!source.may_be_beyond_end());
                assert_eq!(rest(source.as_mut()), all[from..]);
                assert!(source.next().is_none());
            }
            source.seek(number, 99).unwrap();
            assert!(source.may_be_beyond_end() && source.next().is_none());
        }
    }
}

#[test]
fn a_run_over_a_stream_goes_on_where_it_was() -> Result<()> {
    let engine = || {
        Engine::new(|seen: &mut Vec<i64>, _, batch: Tensor| {
            seen.extend(Vec::<i64>::try_from(batch)?);
            Ok(())
        })
    };
    for loader in [shared(), shared().num_workers(3)] {
        let mut straight = vec![];
        engine().run(&mut straight, &loader, Until::epochs(3))?;
        assert_eq!(straight.len(), 33);
        for stop in [1, 5, 6, 7, 14] {
            let (mut seen, mut first) = (vec![], engine());
            first.on(Event::IterationCompleted.once(stop), |_, engine| {
                engine.interrupt();
                Ok(())
            });
            first.run(&mut seen, &loader, Until::epochs(3))?;
            let mut second = engine();
            second.restore(&mut vec![], first.checkpoint(&seen)?, true)?;
            second.run(&mut seen, &loader, Until::epochs(3))?;
            assert_eq!(seen, straight, "stopped at {stop}");
            let mut other = engine();
            other.restore(&mut vec![], first.checkpoint(&seen)?, true)?;
            let summary =
                other.run(&mut vec![], loader.clone().num_workers(2), Until::epochs(3))?;
            assert!(summary.warnings.iter().any(|warning| warning.contains("num_workers")));
        }
    }
    Ok(())
}

#[test]
fn errors_and_panics_end_the_run_and_name_the_sample() -> Result<()> {
    for workers in [0, 2] {
        let fails = |kind: &'static str| {
            let make = move |_, worker: WorkerInfo| {
                Ok(worker.share((0..12).map(move |i| match (i, kind) {
                    (6, "error") => bail!("a line is broken"),
                    (6, "panic") => panic!("at all"),
                    _ => Ok(i),
                })))
            };
            StreamLoader::<i64, _>::new(2, make).unwrap().num_workers(workers).into_source()
        };
        let mut source = fails("error");
        let mut seen = vec![];
        let error = loop {
            match source.next().unwrap() {
                Ok(batch) => seen.extend(Vec::<i64>::try_from(batch)?),
                Err(error) => break format!("{error:#}"),
            }
        };
        let (place, before) =
            if workers == 0 { (6, vec![0, 1, 2, 3, 4, 5]) } else { (3, vec![0, 2, 1, 3]) };
        assert_eq!(seen, before);
        assert_eq!(
            error,
            format!("sample {place} of the share of worker 0 in pass 0: a line is broken")
        );
        assert!(!rest(source.as_mut()).is_empty(), "what follows can be read");
        let mut source = fails("panic");
        let error = std::iter::from_fn(|| source.next()).find_map(Result::err).unwrap();
        assert!(format!("{error:#}").contains("panicked: at all"));
        let refuses =
            |_, _: WorkerInfo| -> Result<std::iter::Empty<Result<i64>>> { bail!("no server") };
        let mut source = StreamLoader::new(2, refuses)?.num_workers(workers).into_source();
        let error = source.seek(1, 0).err().or_else(|| source.next()?.err()).unwrap();
        assert_eq!(format!("{error:#}"), "beginning the share of worker 0 in pass 1: no server");
    }
    assert!(Loader::new(0, |_, _| Ok(std::iter::empty())).is_err());
    for factor in [0, usize::MAX] {
        let mut source = shared().num_workers(1).prefetch_factor(factor).into_source();
        let error = source.validate().unwrap_err().to_string();
        assert!(error.contains(&format!("but {factor} was given")), "{error}");
        assert!(source.seek(0, 0).is_err());
    }
    Ok(())
}

#[test]
fn a_share_that_fails_while_it_is_passed_over_is_an_error() -> Result<()> {
    for (workers, at_once) in [(0, true), (0, false), (2, true), (2, false)] {
        let walks = AtomicUsize::new(0);
        let make = move |_, worker: WorkerInfo| {
            let again = walks.fetch_add(1, SeqCst) >= worker.num_workers();
            ensure!(!(again && at_once), "no server");
            Ok(worker.share((0..12).map(move |i| {
                ensure!(!again || i < 4, "a line is broken");
                Ok(i)
            })))
        };
        let mut source = StreamLoader::<i64, _>::new(2, make)?.num_workers(workers).into_source();
        source.seek(0, 0)?;
        assert_eq!(rest(source.as_mut()).len(), 6);
        let error = format!("{:#}", source.seek(0, 3).unwrap_err());
        let (beginning, end) = match at_once {
            false => ("passing over the batches before the position: sample", "a line is broken"),
            true if workers > 0 => ("passing over the batches before the position", "no server"),
            true => ("beginning the share of worker 0", "no server"),
        };
        assert!(error.starts_with(beginning) && error.ends_with(end), "{error}");
    }
    Ok(())
}

#[test]
fn threads_end_and_endless_streams_are_left() {
    let alive = Arc::new(AtomicUsize::new(0));
    struct Counted(Arc<AtomicUsize>, i64);
    impl Iterator for Counted {
        type Item = Result<i64>;
        fn next(&mut self) -> Option<Self::Item> {
            self.1 += 1;
            Some(Ok(self.1))
        }
    }
    impl Drop for Counted {
        fn drop(&mut self) {
            self.0.fetch_sub(1, SeqCst);
        }
    }
    let count = alive.clone();
    let make = move |_, _: WorkerInfo| {
        count.fetch_add(1, SeqCst);
        Ok(Counted(count.clone(), 0))
    };
    let loader = StreamLoader::<i64, _>::new(3, make).unwrap().num_workers(3);
    let mut source = (&loader).into_source();
    for (number, from) in [(0, 0), (0, 7), (3, 1)] {
        source.seek(number, from).unwrap();
        for batch in from..from + 5 {
            let first = 1 + 3 * (batch as i64 / 3);
            let batch = Vec::<i64>::try_from(source.next().unwrap().unwrap()).unwrap();
            assert_eq!(batch, [first, first + 1, first + 2]);
        }
        assert_eq!(alive.load(SeqCst), 3);
    }
    drop(source);
    assert_eq!(alive.load(SeqCst), 0);
    let mut engine = Engine::new(|_: &mut (), _, _: Tensor| Ok(()));
    let until = Until::epochs(2).epoch_length(4);
    assert_eq!(engine.run(&mut (), &loader, until).unwrap().iterations, 8);
    drop(engine);
    assert_eq!(alive.load(SeqCst), 0);
}
