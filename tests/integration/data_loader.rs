//! Tests of the loader over datasets: it gives the same batches whatever the number of workers, from any position,
//! also after errors, and leaves no thread behind.

use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use tch::{Device, Kind, Tensor};
use tch_ignite::data::{
    Batch, BatchSize, Collate, ConcatDataset, DataLoader, Dataset, IntoSource, RandomSampler,
    Sampler, SequentialSampler, Source, SplitMix64, Subset, SubsetRandomSampler, TensorDataset,
    Transfer, WeightedRandomSampler, from_fn, permutation, random_split,
};
use tch_ignite::engine::{Engine, Event, Until};
use tch_ignite::schedule::{BatchSizeScheduler, StepLR};

/// The numbers of workers with which tests are run; they must make no difference.
const WORKERS: [usize; 4] = [0, 1, 2, 5];

/// A dataset of the samples 0, 1, 2, …
fn numbers(len: usize) -> impl Dataset<Item = i64> + 'static {
    from_fn(len, |index, _| Ok(index as i64))
}

fn loader(len: usize, batch_size: usize) -> DataLoader<impl Dataset<Item = i64>, Tensor> {
    DataLoader::new(numbers(len), batch_size).unwrap()
}

fn ints(batch: &Tensor) -> Vec<i64> {
    batch.try_into().unwrap()
}

fn rest<B>(source: &mut dyn Source<B>) -> Vec<B> {
    std::iter::from_fn(|| source.next()).map(Result::unwrap).collect()
}

/// The batches of a pass, from batch `from` on.
fn pass<D, B>(loader: &DataLoader<D, B>, pass: u64, from: u64) -> Vec<B>
where
    D: Dataset + 'static,
    B: Send + 'static,
{
    let mut source = loader.into_source();
    source.seek(pass, from).unwrap();
    rest(source.as_mut())
}

fn text<T>(result: Result<T, impl Into<anyhow::Error>>) -> String {
    format!("{:#}", result.err().expect("an error").into())
}

fn batches(pass: Vec<Tensor>) -> Vec<Vec<i64>> {
    pass.iter().map(ints).collect()
}

#[test]
fn the_number_of_workers_makes_no_difference() {
    for (len, size, drop_last) in [(23, 4, false), (23, 4, true), (8, 4, false), (1, 9, false)] {
        let passes = WORKERS.map(|workers| {
            let loader = loader(len, size).shuffle(7).drop_last(drop_last).num_workers(workers);
            [0, 1, 9].map(|number| batches(pass(&loader, number, 0)))
        });
        assert!(passes.iter().all(|same| *same == passes[0]));
        let [first, second, _] = &passes[0];
        let kept = if drop_last { len / size * size } else { len };
        assert_eq!(first.concat(), permutation(len, 7, 0)[..kept]);
        assert_eq!(second.concat(), permutation(len, 7, 1)[..kept]);
    }
    for workers in WORKERS {
        let in_order = batches(pass(&loader(5, 2).num_workers(workers), 3, 0));
        assert_eq!(in_order, [vec![0, 1], vec![2, 3], vec![4]]);
    }
}

#[test]
fn slow_samples_do_not_change_the_order() {
    let uneven = from_fn(24, |index, rng| {
        std::thread::sleep(Duration::from_millis(rng.below(4)));
        Ok(index as i64)
    });
    let loader = DataLoader::new(uneven, 2).unwrap().num_workers(4).prefetch_factor(3);
    assert_eq!(batches(pass(&loader, 0, 0)).concat(), (0..24).collect::<Vec<_>>());
}

#[test]
fn any_position_is_reached_directly() {
    for workers in WORKERS {
        let loader = loader(11, 3).shuffle(5).num_workers(workers);
        let mut source = (&loader).into_source();
        for number in [2, 0, 1, u64::MAX] {
            let all = batches(pass(&loader, number, 0));
            for from in [2, 0, 4, 1, 3, 99, u64::MAX] {
                source.seek(number, from).unwrap();
                let first = (from as usize).min(all.len());
                assert_eq!(batches(rest(source.as_mut())), all[first..]);
                assert!(source.next().is_none(), "an exhausted pass stays so");
            }
        }
    }
}

#[test]
fn no_sample_before_a_position_is_read() {
    for workers in [0, 2] {
        let seen = Arc::new(Mutex::new(vec![]));
        let dataset = from_fn(1_000_000, {
            let seen = seen.clone();
            move |index, _| {
                seen.lock().unwrap().push(index);
                Ok(index as i64)
            }
        });
        let loader = DataLoader::new(dataset, 10).unwrap().num_workers(workers);
        let mut source = (&loader).into_source();
        source.seek(0, 70_000).unwrap();
        assert_eq!(ints(&source.next().unwrap().unwrap())[0], 700_000);
        drop(source);
        assert!(seen.lock().unwrap().iter().all(|index| *index >= 700_000));
    }
}

#[test]
fn a_source_that_was_left_in_the_middle_can_go_anywhere() {
    let loader = loader(40, 2).shuffle(1).num_workers(3);
    let mut source = (&loader).into_source();
    let mut rng = SplitMix64::new(0);
    for _ in 0..200 {
        let (number, from) = (rng.below(3), rng.below(20));
        source.seek(number, from).unwrap();
        let expected = permutation(40, 1, number);
        for place in 0..rng.below(4).min(20 - from) {
            let first = 2 * (from + place) as usize;
            assert_eq!(ints(&source.next().unwrap().unwrap()), expected[first..first + 2]);
        }
    }
}

#[test]
fn augmentation_depends_on_seed_pass_and_index_alone() {
    let loader = |workers: usize, batch_size: usize| {
        let dataset = numbers(30).map(|index, rng| Ok((index, rng.uniform())));
        DataLoader::new(dataset, batch_size).unwrap().num_workers(workers)
    };
    // The random number of each sample, in the order of the samples' indices.
    let drawn = |batches: Vec<(Tensor, Tensor)>| {
        let mut all = vec![];
        for (index, number) in batches {
            all.extend(ints(&index).into_iter().zip(Vec::<f64>::try_from(number).unwrap()));
        }
        all.sort_by_key(|(index, _)| *index);
        all
    };
    let one = drawn(pass(&loader(0, 4).shuffle(3), 1, 0));
    for workers in WORKERS {
        for size in [1, 7, 30] {
            assert_eq!(drawn(pass(&loader(workers, size).shuffle(3), 1, 0)), one);
        }
        // Read from the middle of the pass on, each sample still has the same number.
        let late = drawn(pass(&loader(workers, 5).shuffle(3), 1, 4));
        assert!(late.len() == 10 && late.iter().all(|sample| one.contains(sample)));
    }
    // The numbers do not depend on the order, but on seed and pass.
    assert_eq!(drawn(pass(&loader(2, 4).seed(3), 1, 0)), one);
    assert_eq!(drawn(pass(&loader(2, 4).seed(3).shuffle(8), 1, 0)), one);
    assert_eq!(drawn(pass(&loader(2, 4).shuffle(8).seed(3), 1, 0)), one);
    for other in [
        drawn(pass(&loader(0, 4).shuffle(3), 0, 0)),
        drawn(pass(&loader(0, 4).shuffle(4), 1, 0)),
        drawn(pass(&loader(0, 4), 1, 0)),
    ] {
        assert!(one.iter().zip(&other).all(|(a, b)| a.1 != b.1));
    }
    let mut numbers: Vec<_> = one.iter().map(|(_, number)| number.to_bits()).collect();
    numbers.sort();
    numbers.dedup();
    assert_eq!(numbers.len(), 30);
}

#[test]
fn a_sample_drawn_twice_is_augmented_twice() {
    let dataset = from_fn(1, |_, rng| Ok(rng.uniform()));
    let sampler = WeightedRandomSampler::new(&[1.], 6, 0).unwrap();
    let loader = DataLoader::new(dataset, 6).unwrap().sampler(sampler);
    let one = Vec::<f64>::try_from(&pass(&loader, 0, 0)[0]).unwrap();
    let mut sorted = one.clone();
    sorted.sort_by(f64::total_cmp);
    sorted.dedup();
    assert_eq!(sorted.len(), 6);
    assert_eq!(Vec::<f64>::try_from(&pass(&loader.num_workers(2), 0, 0)[0]).unwrap(), one);
}

/// Adds the bits of each augmented sample of a batch to those that the run has seen.
fn augmented(seen: &mut Vec<u64>, batch: &Tensor) {
    let values = Vec::<f64>::try_from(batch).unwrap();
    seen.extend(values.into_iter().map(f64::to_bits));
}

#[test]
fn a_run_that_is_continued_sees_what_it_would_have_seen() -> anyhow::Result<()> {
    let loader = |workers| {
        let noisy = numbers(17).map(|index, rng| Ok(index as f64 + rng.uniform()));
        DataLoader::new(noisy, 3).unwrap().shuffle(6).num_workers(workers)
    };
    let engine = || {
        Engine::new(|seen: &mut Vec<u64>, _, batch: Tensor| {
            augmented(seen, &batch);
            Ok(())
        })
    };
    let mut straight = vec![];
    engine().run(&mut straight, loader(0), Until::epochs(3))?;
    for stop in [1, 5, 6, 7, 11, 12, 17] {
        let mut seen = vec![];
        let mut first = engine();
        first.on(Event::IterationCompleted.once(stop), |_, engine| {
            engine.interrupt();
            Ok(())
        });
        first.run(&mut seen, loader(3), Until::epochs(3))?;
        let state = first.state_dict();
        drop(first);
        let mut second = engine();
        second.load_state_dict(&state)?;
        second.run(&mut seen, loader(2), Until::epochs(3))?;
        assert_eq!(seen, straight, "stopped at {stop}");
    }
    Ok(())
}

fn failing(kind: &'static str) -> impl Dataset<Item = i64> + 'static {
    from_fn(20, move |index, _| {
        match kind {
            "error" if index == 7 => bail!("no such file"),
            "io" if index == 7 => std::fs::read("/no/such/file").map(|_| ())?,
            "panic" if index == 7 => panic!("the file is odd"),
            _ => {}
        }
        Ok(index as i64)
    })
}

#[test]
fn an_error_names_its_sample_and_comes_with_its_batch() {
    for workers in WORKERS {
        for (kind, expected) in [
            ("error", "sample 7 of the dataset: no such file"),
            ("panic", "sample 7 of the dataset: panicked: the file is odd"),
        ] {
            let loader = DataLoader::new(failing(kind), 3).unwrap().num_workers(workers);
            let mut source = (&loader).into_source();
            for _ in 0..3 {
                source.seek(0, 0).unwrap();
                for first in [0, 3] {
                    assert_eq!(ints(&source.next().unwrap().unwrap())[0], first);
                }
                assert_eq!(text(source.next().unwrap()), expected);
                // After the error, the next batch can be read, and so can any other position.
                assert_eq!(ints(&source.next().unwrap().unwrap()), [9, 10, 11]);
                source.seek(4, 1).unwrap();
                assert_eq!(ints(&source.next().unwrap().unwrap()), [3, 4, 5]);
            }
        }
        let loader = DataLoader::new(failing("io"), 20).unwrap().num_workers(workers);
        let error = loader.into_source().next().unwrap().unwrap_err();
        let cause = error.downcast_ref::<std::io::Error>().expect("the cause is kept");
        assert_eq!(cause.kind(), std::io::ErrorKind::NotFound);
    }
}

#[test]
fn a_run_ends_with_the_error_and_goes_on_behind_it() -> anyhow::Result<()> {
    for workers in [0, 2] {
        let broken = Arc::new(AtomicUsize::new(7));
        let dataset = from_fn(12, {
            let broken = broken.clone();
            move |index, _| {
                ensure!(index != broken.load(SeqCst), "cannot be read");
                Ok(index as i64)
            }
        });
        let loader = DataLoader::new(dataset, 3)?.num_workers(workers);
        let mut engine = Engine::new(|seen: &mut Vec<i64>, _, batch: Tensor| {
            seen.extend(ints(&batch));
            Ok(())
        });
        let mut seen = vec![];
        let error = text(engine.run(&mut seen, &loader, Until::epochs(2)));
        assert_eq!(
            error,
            "no batch for iteration 3 (epoch 1): sample 7 of the dataset: cannot be read"
        );
        broken.store(99, SeqCst);
        engine.run(&mut seen, &loader, Until::default())?;
        assert_eq!(seen, (0..12).chain(0..12).collect::<Vec<_>>());
    }
    Ok(())
}

#[test]
fn samples_that_fail_can_be_left_out_and_are_counted() -> anyhow::Result<()> {
    for workers in WORKERS {
        let thirds = from_fn(10, |index, _| {
            ensure!(index % 3 != 0, "sample of threes");
            Ok(index as i64)
        });
        let loader = DataLoader::new(thirds, 4)?.num_workers(workers).skip_errors(true);
        assert_eq!((loader.skipped(), loader.last_skipped()), (0, None));
        let mut source = (&loader).into_source();
        source.seek(0, 0)?;
        let mut next = || (ints(&source.next().unwrap().unwrap()), source.samples().unwrap());
        assert_eq!(next(), (vec![1, 2], 2));
        assert_eq!(loader.skipped(), 2, "what was made ahead does not count");
        assert_eq!(next(), (vec![4, 5, 7], 3));
        assert_eq!(next(), (vec![8], 1));
        assert_eq!(loader.clone().skipped(), 4);
        assert_eq!(
            loader.last_skipped().as_deref(),
            Some("sample 9 of the dataset: sample of threes")
        );
        // Positions and the number of batches are counted as if no sample had been skipped.
        assert_eq!(batches(pass(&loader, 0, 1)), [vec![4, 5, 7], vec![8]]);
        let panics = DataLoader::new(failing("panic"), 20)?.num_workers(workers).skip_errors(true);
        assert!(text(panics.into_source().next().unwrap()).contains("sample 7"));
        let none = from_fn(3, |index, _| -> anyhow::Result<i64> { bail!("gone: {index}") });
        let none = DataLoader::new(none, 2)?.num_workers(workers).skip_errors(true);
        assert_eq!(
            text(none.into_source().next().unwrap()),
            "none of the 2 samples of a batch could be read: sample 1 of the dataset: gone: 1"
        );
    }
    Ok(())
}

#[test]
fn a_collate_function_that_fails_is_an_error() {
    for workers in WORKERS {
        let fails = |samples: Vec<i64>| match samples[0] {
            0 => Ok(samples),
            3 => bail!("do not fit"),
            _ => panic!("at all"),
        };
        let loader =
            DataLoader::with_collate(numbers(8), 3, fails).unwrap().num_workers(workers).clone();
        let mut source = loader.into_source();
        source.seek(2, 0).unwrap();
        assert_eq!(source.next().unwrap().unwrap(), [0, 1, 2]);
        let mut next = || text(source.next().unwrap());
        assert_eq!(next(), "collating 3 samples from position 3 of pass 2: do not fit");
        assert_eq!(next(), "collating 2 samples from position 6 of pass 2: panicked: at all");
    }
}

/// A part of datasets and samples that counts how many of them are alive.
struct Alive(Arc<AtomicUsize>);

impl Alive {
    fn new(count: &Arc<AtomicUsize>) -> Self {
        count.fetch_add(1, SeqCst);
        Self(count.clone())
    }
}

impl Drop for Alive {
    fn drop(&mut self) {
        self.0.fetch_sub(1, SeqCst);
    }
}

#[test]
fn dropping_a_source_ends_its_threads_and_frees_all_it_made() {
    for (read, before_drop) in [(0, 0), (1, 0), (3, 5), (1, 20)] {
        let alive = Arc::new(AtomicUsize::new(0));
        let inside = Arc::new(AtomicUsize::new(0));
        let dataset = from_fn(10_000, {
            let (token, alive, inside) = (Alive::new(&alive), alive.clone(), inside.clone());
            move |_, _| {
                let _ = &token;
                inside.fetch_add(1, SeqCst);
                std::thread::sleep(Duration::from_millis(2));
                inside.fetch_sub(1, SeqCst);
                Ok(Alive::new(&alive))
            }
        });
        let loader = DataLoader::with_collate(dataset, 2000, Ok).unwrap();
        let loader = loader.num_workers(4).prefetch_factor(2);
        // Small batches come first, so that some can be read soon; large ones are under way when the loader is
        // dropped.
        loader.set_batch_size(1).unwrap();
        let mut source = (&loader).into_source();
        source.seek(0, 0).unwrap();
        for _ in 0..read {
            source.next().unwrap().unwrap();
        }
        loader.set_batch_size(2000).unwrap();
        source.seek(1, 0).unwrap();
        std::thread::sleep(Duration::from_millis(before_drop));
        let start = Instant::now();
        drop(source);
        assert!(start.elapsed() < Duration::from_secs(2), "the rest of a batch is not read");
        assert_eq!(inside.load(SeqCst), 0, "threads have ended");
        assert_eq!(alive.load(SeqCst), 1, "only the dataset is left");
        drop(loader);
        assert_eq!(alive.load(SeqCst), 0);
    }
}

#[test]
fn threads_and_memory_are_bounded() {
    let begun = Arc::new(AtomicUsize::new(0));
    let dataset = from_fn(1000, {
        let begun = begun.clone();
        move |index, _| {
            begun.fetch_add(1, SeqCst);
            Ok(index as i64)
        }
    });
    let loader = DataLoader::new(dataset, 5).unwrap().num_workers(3).prefetch_factor(2);
    let mut source = (&loader).into_source();
    source.seek(0, 0).unwrap();
    for delivered in 1..=4 {
        let _batch = source.next().unwrap().unwrap();
        // Workers begin six batches ahead of the delivered ones, and no more.
        let (enough, start) = (5 * (delivered + 6), Instant::now());
        while begun.load(SeqCst) < enough && start.elapsed() < Duration::from_secs(20) {
            std::thread::yield_now();
        }
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(begun.load(SeqCst), enough);
    }
}

#[test]
fn runs_leave_no_thread_behind() -> anyhow::Result<()> {
    let alive = Arc::new(AtomicUsize::new(0));
    for round in 0..20 {
        let token = Alive::new(&alive);
        let dataset = from_fn(50, move |index, _| {
            let _ = &token;
            ensure!(round % 2 == 0 || index != 33, "an error ends the run");
            Ok(index as i64)
        });
        let loader = DataLoader::new(dataset, 2)?.shuffle(round).num_workers(3);
        let mut engine: Engine<(), Tensor, ()> = Engine::new(|_, _, _| Ok(()));
        if round % 4 == 0 {
            engine.on(Event::IterationCompleted.once(5), |_, engine| {
                engine.terminate();
                Ok(())
            });
        }
        assert_eq!(engine.run(&mut (), loader, Until::epochs(2)).is_ok(), round % 2 == 0);
        drop(engine);
        assert_eq!(alive.load(SeqCst), 0, "the threads shared the dataset");
    }
    Ok(())
}

#[test]
fn an_unreasonable_number_of_workers_is_an_error_or_works() {
    assert_eq!(
        text(loader(3, 1).num_workers(2).prefetch_factor(0).into_source().validate()),
        "prefetch_factor must be at least 1 with workers, but 0 was given"
    );
    let loader = loader(3, 1).num_workers(64).prefetch_factor(usize::MAX);
    assert_eq!(batches(pass(&loader, 0, 0)).concat(), [0, 1, 2]);
}

#[test]
fn the_batch_size_can_be_changed_in_mid_run() -> anyhow::Result<()> {
    for workers in WORKERS {
        let loader = loader(20, 2).num_workers(workers);
        let mut source = (&loader).into_source();
        source.seek(0, 0)?;
        let mut next = || source.next().map(|batch| ints(&batch.unwrap()));
        assert_eq!((next(), next()), (Some(vec![0, 1]), Some(vec![2, 3])));
        loader.clone().set_batch_size(5)?;
        assert_eq!((next(), loader.batches()), (Some(vec![4, 5, 6, 7, 8]), 4));
        loader.set_batch_size(1)?;
        assert_eq!((next(), next()), (Some(vec![9]), Some(vec![10])));
        loader.set_batch_size(100)?;
        assert_eq!((next(), next()), (Some((11..20).collect()), None));
        assert!(text(loader.set_batch_size(0)).contains("at least 1"));

        let mut trainer = Engine::new(|sizes: &mut Vec<usize>, _, batch: Tensor| {
            sizes.push(ints(&batch).len());
            Ok(())
        });
        trainer.attach(BatchSizeScheduler::new(&loader, StepLR::new(8.0, 1).gamma(1.5)));
        let mut sizes = vec![];
        trainer.run(&mut sizes, &loader, Until::epochs(2))?;
        assert_eq!(sizes, [8, 8, 4, 12, 8]);
        assert_eq!(BatchSize::from(&loader).get(), 12);
    }
    Ok(())
}

/// A batch whose move to a device fails the first time that it begins with sample 4.
struct Stubborn(Vec<i64>);

static MOVES: AtomicUsize = AtomicUsize::new(0);

impl Transfer for Stubborn {
    fn transfer(self, _: Device, _: bool) -> anyhow::Result<Self> {
        ensure!(self.0[0] != 4 || MOVES.fetch_add(1, SeqCst) % 2 == 1, "no room on the device");
        Ok(self)
    }

    fn pin_memory(self) -> anyhow::Result<Self> {
        Ok(self)
    }
}

#[test]
fn a_batch_that_cannot_be_moved_to_its_device_is_not_lost() -> anyhow::Result<()> {
    for workers in WORKERS {
        let odd = |index: usize, _: &mut SplitMix64| {
            ensure!(index != 5, "it cannot be read");
            Ok(index as i64)
        };
        let make = |samples| Ok(Stubborn(samples));
        let loader = DataLoader::with_collate(from_fn(10, odd), 2, make)?
            .num_workers(workers)
            .skip_errors(true)
            .to_device(Device::Cpu);
        let mut trainer = Engine::new(|seen: &mut Vec<i64>, _, batch: Stubborn| {
            seen.extend(batch.0);
            Ok(())
        });
        let mut seen = vec![];
        let failed = trainer.run(&mut seen, &loader, Until::epochs(1));
        assert!(text(failed).contains("no room on the device"));
        trainer.run(&mut seen, &loader, Until::epochs(1))?;
        assert_eq!(seen, [0, 1, 2, 3, 4, 6, 7, 8, 9], "{workers} workers");
        assert_eq!(loader.skipped(), 1);
    }
    Ok(())
}

#[test]
fn a_position_has_the_batch_size_also_where_it_is_the_one_given_at_first() -> anyhow::Result<()> {
    let made = loader(20, 4);
    let mut source = (&made).into_source();
    source.seek(0, 0)?;
    let _ = source.next().context("a batch")??;
    let place = source.sample_position(false).context("a position")?;
    made.set_batch_size(7)?;
    assert!(source.seek_samples(0, &place)?);
    assert_eq!(ints(&source.next().context("a batch")??), [4, 5, 6, 7]);
    Ok(())
}

#[test]
fn default_batches_are_tensors_of_the_samples_kind() -> anyhow::Result<()> {
    let shapes = |tensor: &Tensor| (tensor.kind(), tensor.size());
    let image = |index: usize| Tensor::full([1, 2], index as f64, (Kind::Float, Device::Cpu));
    let dataset = from_fn(3, move |index, _| Ok((image(index), (index as u8, index > 0))));
    let loader = DataLoader::new(dataset, 2)?;
    let (x, (n, flag)) = pass(&loader, 0, 0).remove(0);
    assert_eq!(shapes(&x), (Kind::Float, vec![2, 1, 2]));
    assert_eq!((shapes(&n), shapes(&flag)), ((Kind::Uint8, vec![2]), (Kind::Bool, vec![2])));
    let (a, b, c) = Collate::collate(vec![(1f32, 2f64, "x".to_owned()), (3., 4., "y".into())])?;
    assert_eq!((a.kind(), b.kind(), c), (Kind::Float, Kind::Double, vec!["x".into(), "y".into()]));
    let uneven =
        from_fn(2, |index, _| Ok(Tensor::zeros([index as i64], (Kind::Float, Device::Cpu))));
    let error = text(DataLoader::new(uneven, 2)?.into_source().next().unwrap());
    assert_eq!(
        error,
        "collating 2 samples from position 0 of pass 0: the samples of a batch need one shape, but sample 0 of it has [0] and sample 1 has [1]; make them equal in the dataset, or give the loader a collate function"
    );
    Ok(())
}

#[test]
fn a_tensor_dataset_gives_what_the_tensors_hold() -> anyhow::Result<()> {
    let x = Tensor::arange(24, (Kind::Float, Device::Cpu)).view([6, 2, 2]).set_requires_grad(true);
    let y = Tensor::arange(6, (Kind::Int64, Device::Cpu));
    for workers in WORKERS {
        let loader = DataLoader::new(TensorDataset::new(&x, &y)?, 4)?.shuffle(1);
        let batches: Vec<Batch> = pass(&loader.num_workers(workers), 0, 0);
        let order = Tensor::from_slice(&permutation(6, 1, 0));
        let parts = |part: fn(&Batch) -> &Tensor| {
            Tensor::cat(&batches.iter().map(part).collect::<Vec<_>>(), 0)
        };
        assert_eq!(parts(|batch| &batch.0), x.index_select(0, &order).detach());
        assert_eq!(parts(|batch| &batch.1), order);
        assert!(!batches[0].0.requires_grad());
    }
    let set = TensorDataset::new(&x, &y)?;
    assert!(set.get(6, &mut SplitMix64::new(0)).is_err() && set.len() == 6 && !set.is_empty());
    assert!(text(TensorDataset::new(&x, &y.narrow(0, 0, 5))).contains("6 inputs but 5 targets"));
    Ok(())
}

#[test]
fn subsets_splits_and_concatenations_name_the_right_samples() -> anyhow::Result<()> {
    let mut rng = SplitMix64::new(0);
    let mut all = |dataset: &dyn Dataset<Item = i64>| -> anyhow::Result<Vec<i64>> {
        (0..dataset.len()).map(|index| dataset.get(index, &mut rng)).collect()
    };
    let subset = Subset::new(numbers(10), [9, 0, 0])?;
    assert_eq!(all(&subset)?, [9, 0, 0]);
    assert_eq!(
        text(Subset::new(numbers(10), [3, 10])),
        "the subset has index 10, but the dataset has 10 samples"
    );
    let boxed: [Box<dyn Dataset<Item = i64>>; 4] = [
        Box::new(numbers(2)),
        Box::new(numbers(0)),
        Box::new(subset),
        Box::new(numbers(1).map(|n, _| Ok(n + 50))),
    ];
    let concat = ConcatDataset::new(boxed);
    assert_eq!(all(&concat)?, [0, 1, 9, 0, 0, 50]);
    assert!(concat.get(6, &mut SplitMix64::new(0)).is_err());
    assert!(ConcatDataset::new(Vec::<Arc<dyn Dataset<Item = i64>>>::new()).is_empty());

    let [a, b, c] = random_split(numbers(10), [7, 3, 0], 5)?;
    let mut both = [all(&a)?, all(&b)?].concat();
    assert_eq!(both, permutation(10, 5, 0));
    both.sort();
    assert_eq!(both, (0..10).collect::<Vec<_>>());
    assert!(c.is_empty());
    for lengths in [[7, 2], [8, 3], [usize::MAX, 11]] {
        assert!(text(random_split(numbers(10), lengths, 5)).contains("must sum up to"));
    }
    Ok(())
}

#[test]
fn samplers_give_their_orders() -> anyhow::Result<()> {
    assert_eq!(SequentialSampler::new(3).order(5)?, [0, 1, 2]);
    let expected: Vec<_> = permutation(9, 4, 2).into_iter().map(|index| index as usize).collect();
    assert_eq!(RandomSampler::new(9, 4).order(2)?, expected);
    let some = SubsetRandomSampler::new([5, 7, 7, 1], 4)?;
    let orders = [0, 1, 2, 3].map(|pass| some.order(pass).unwrap());
    for order in &orders {
        let mut sorted = order.clone();
        sorted.sort();
        assert_eq!(sorted, [1, 5, 7, 7]);
    }
    assert!(orders.iter().any(|order| *order != orders[0]));
    assert!(text(SubsetRandomSampler::new([], 0)).contains("at least one index"));
    for workers in WORKERS {
        let loader = loader(8, 3).sampler(some.clone()).num_workers(workers);
        assert_eq!((loader.samples(), loader.batches()), (4, 2));
        let seen = batches(pass(&loader, 1, 0)).concat();
        assert!(seen.into_iter().eq(orders[1].iter().map(|index| *index as i64)));
    }
    Ok(())
}

#[test]
fn weighted_samples_come_as_often_as_their_weights_say() -> anyhow::Result<()> {
    let weights = [0., 1., 0., 3., 6., 0.];
    let sampler = WeightedRandomSampler::new(&weights, 100_000, 9)?;
    assert!(sampler.repeats());
    let mut counts = [0f64; 6];
    for index in sampler.order(0)? {
        counts[index] += 1.;
    }
    for (count, weight) in counts.iter().zip(weights) {
        let p = weight / 10.;
        // The counts may differ from the expected ones by four standard deviations.
        let bound = 4. * (1e5 * p * (1f64 - p)).sqrt();
        assert!((count - 1e5 * p).abs() <= bound, "{counts:?}");
    }
    assert_eq!(sampler.order(3)?, sampler.clone().order(3)?);
    assert_ne!(sampler.order(3)?, sampler.order(4)?);
    // With weights as small and large as these, rounding could choose an index beyond the last.
    let extreme = WeightedRandomSampler::new(&[1e-300, 1e300, 1e-300, 0.], 10_000, 1)?;
    assert!(extreme.order(0)?.iter().all(|index| *index == 1));
    let last = WeightedRandomSampler::new(&[0., f64::MIN_POSITIVE, 0.], 1000, 1)?;
    assert!(last.order(0)?.iter().all(|index| *index == 1));
    for (weights, num_samples, expected) in [
        (&[1., -1.][..], 1, "that of index 1 is -1"),
        (&[f64::NAN], 1, "that of index 0 is NaN"),
        (&[f64::INFINITY], 1, "that of index 0 is inf"),
        (&[f64::MAX, f64::MAX], 1, "is inf"),
        (&[0., 0.], 1, "that of the 2 given is 0"),
        (&[], 1, "that of the 0 given is 0"),
        (&[1.], 0, "num_samples must be at least 1"),
    ] {
        let error = text(WeightedRandomSampler::new(weights, num_samples, 0));
        assert!(error.contains(expected), "{error}");
    }
    Ok(())
}

struct Odd {
    says: usize,
    gives: Vec<usize>,
}

impl Sampler for Odd {
    fn num_samples(&self) -> usize {
        self.says
    }

    fn order(&self, _pass: u64) -> anyhow::Result<Vec<usize>> {
        ensure!(self.gives.len() < 9, "no order today");
        Ok(self.gives.clone())
    }
}

#[test]
fn samplers_that_do_not_fit_are_refused() {
    for (says, gives, expected) in [
        (2, vec![0, 5], "the sampler gives index 5 in pass 3, but the data has 5 samples"),
        (3, vec![0, 1], "the sampler says that a pass has 3 samples, but gives 2 in pass 3"),
        (9, vec![0; 9], "no order today"),
    ] {
        for workers in [0, 2] {
            let sampler = Odd { says, gives: gives.clone() };
            let loader = loader(5, 2).sampler(sampler).num_workers(workers);
            assert_eq!(text(loader.into_source().seek(3, 0)), expected);
        }
    }
    let empty = loader(5, 2).sampler(Odd { says: 0, gives: vec![] });
    assert_eq!(text(empty.into_source().validate()), "the sampler gives no samples");
    assert!(text(DataLoader::new(numbers(0), 2)).contains("zero size"));
    assert!(text(DataLoader::new(numbers(2), 0)).contains("at least 1"));
    let error = text(loader(3, 4).drop_last(true).into_source().validate());
    assert!(error.contains("the loader has no batch"), "{error}");
}

/// A batch that notes to which devices it was moved.
#[derive(Debug, PartialEq)]
struct Told(Vec<(Device, bool)>);

impl Transfer for Told {
    fn transfer(mut self, device: Device, non_blocking: bool) -> anyhow::Result<Self> {
        self.0.push((device, non_blocking));
        Ok(self)
    }

    fn pin_memory(self) -> anyhow::Result<Self> {
        Ok(self)
    }
}

#[test]
fn batches_are_moved_to_the_device() -> anyhow::Result<()> {
    for workers in [0, 2] {
        let loader = DataLoader::with_collate(numbers(4), 2, |_| Ok(Told(vec![])))?;
        let loader = loader.num_workers(workers).pin_memory(true);
        assert_eq!(pass(&loader, 0, 1), [Told(vec![])]);
        let pinned = tch::Cuda::is_available();
        let moved = pass(&loader.to_device(Device::Mps), 0, 1);
        assert_eq!(moved, [Told(vec![(Device::Mps, pinned)])]);
    }
    let nested =
        || (Tensor::from(1i64), vec![(Tensor::from(2i64), "text".to_owned(), Tensor::from(3.))]);
    let (a, list) = nested().transfer(Device::Cpu, true)?;
    assert_eq!((a.int64_value(&[]), list[0].1.as_str(), list.len()), (1, "text", 1));
    if tch::Cuda::is_available() {
        let (a, list) = nested().pin_memory()?.transfer(Device::Cuda(0), true)?;
        assert_eq!((a.device(), list[0].2.device()), (Device::Cuda(0), Device::Cuda(0)));
        assert_eq!(a.int64_value(&[]), 1);
    } else {
        let loader = loader(4, 2).to_device(Device::Cuda(0)).num_workers(1);
        let error = text(loader.into_source().next().unwrap());
        assert!(error.starts_with("moving a batch to Cuda(0)"), "{error}");
        assert!(nested().pin_memory().is_err());
    }
    Ok(())
}

#[test]
fn samples_are_made_without_gradients_and_with_one_thread_each() -> anyhow::Result<()> {
    let before = tch::get_num_threads();
    tch::set_num_threads(3);
    let weight = Mutex::new(Tensor::ones([1], (Kind::Float, Device::Cpu)).set_requires_grad(true));
    let dataset = from_fn(4, move |_, _| {
        let product = &*weight.lock().unwrap() * 2.;
        Ok((i64::from(product.requires_grad()), i64::from(tch::get_num_threads())))
    });
    let loader = DataLoader::new(dataset, 2)?;
    for loader in [loader.clone(), loader.num_workers(2)] {
        for (gradients, threads) in pass(&loader, 0, 0) {
            assert_eq!((ints(&gradients), ints(&threads)), (vec![0, 0], vec![1, 1]));
        }
        assert_eq!(tch::get_num_threads(), 3, "ours are left alone");
    }
    tch::set_num_threads(before);
    Ok(())
}

#[test]
fn loaders_can_be_sent_and_shared() {
    fn is_send_and_sync<T: Send + Sync>(_: &T) {}
    fn is_send<T: Send>(_: &T) {}
    is_send_and_sync(&loader(3, 1).shuffle(1));
    is_send(&tch_ignite::data::Loader::new(
        &Tensor::from_slice(&[1]),
        &Tensor::from_slice(&[1]),
        1,
    ));
}
