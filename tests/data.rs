//! The loader and the other sources: order, sizes, positions and refusals.

use tch::{Device, Kind, Tensor};
use tch_ignite::data::{
    Batch, IntoSource, Loader, Source, no_data, one_shot, permutation, restartable,
};
use tch_ignite::engine::{Engine, Until};

/// Samples 0, 1, 2, …; their targets are the negatives.
fn loader(samples: i64, batch_size: usize) -> Loader {
    let x = Tensor::arange(samples, (Kind::Int64, Device::Cpu));
    Loader::new(&x, &-&x, batch_size).unwrap()
}

fn rest<B>(source: &mut dyn Source<B>) -> Vec<B> {
    std::iter::from_fn(|| source.next()).map(Result::unwrap).collect()
}

fn samples(batches: Vec<Batch>) -> Vec<Vec<i64>> {
    let pair = |(x, y): Batch| {
        let (x, y) = (Vec::<i64>::try_from(&x).unwrap(), Vec::<i64>::try_from(&y).unwrap());
        assert!(x.iter().zip(&y).all(|(x, y)| *x == -y), "targets stay with their inputs");
        x
    };
    batches.into_iter().map(pair).collect()
}

/// The batches of a pass, from batch `from` on.
fn pass(loader: &Loader, pass: u64, from: u64) -> Vec<Vec<i64>> {
    let mut source = loader.into_source();
    source.seek(pass, from).unwrap();
    samples(rest(source.as_mut()))
}

fn text<T>(result: tch_ignite::Result<T>) -> String {
    result.err().expect("an error").to_string()
}

#[test]
fn batches_come_in_order_and_the_last_is_kept_or_dropped() {
    for (len, size, kept, dropped) in [
        (6, 2, vec![2, 2, 2], vec![2, 2, 2]),
        (7, 3, vec![3, 3, 1], vec![3, 3]),
        (3, 1, vec![1, 1, 1], vec![1, 1, 1]),
        (4, 4, vec![4], vec![4]),
        (3, 100, vec![3], vec![]),
        (3, usize::MAX, vec![3], vec![]),
        (1, 1, vec![1], vec![1]),
    ] {
        for (drop_last, expected) in [(false, kept), (true, dropped)] {
            let loader = loader(len, size).drop_last(drop_last);
            let batches = pass(&loader, 0, 0);
            let sizes: Vec<_> = batches.iter().map(Vec::len).collect();
            assert_eq!(sizes, expected, "{len} by {size}");
            assert_eq!(loader.batches(), expected.len() as u64);
            assert_eq!(loader.samples(), len as u64);
            assert!(batches.concat().into_iter().eq(0..expected.iter().sum::<usize>() as i64));
        }
    }
}

#[test]
fn a_shuffled_pass_is_a_function_of_seed_and_pass() {
    let passes = |seed| {
        let loader = loader(50, 7).shuffle(seed);
        [0, 1, 2, u64::MAX].map(|number| pass(&loader, number, 0).concat())
    };
    let (one, other) = (passes(1), passes(2));
    assert_eq!(one, passes(1));
    for (index, order) in one.iter().chain(&other).enumerate() {
        let mut sorted = order.clone();
        sorted.sort();
        assert!(sorted.into_iter().eq(0..50), "every sample once");
        assert!(!one.iter().chain(&other).skip(index + 1).any(|later| later == order));
        assert_ne!(*order, (0..50).collect::<Vec<_>>());
    }
    assert_eq!(one[1], permutation(50, 1, 1));
}

#[test]
fn dropping_the_last_batch_drops_other_samples_in_each_pass() {
    let loader = loader(10, 4).shuffle(3).drop_last(true);
    let missing = |number| {
        let seen = pass(&loader, number, 0).concat();
        assert_eq!(seen.len(), 8);
        (0..10).filter(|sample| !seen.contains(sample)).collect::<Vec<_>>()
    };
    assert!((0..9).map(missing).any(|samples| samples != missing(9)));
}

#[test]
fn any_position_can_be_reached_directly() {
    for loader in
        [loader(11, 3), loader(11, 3).shuffle(9), loader(11, 3).shuffle(9).drop_last(true)]
    {
        for number in 0..3 {
            let all = pass(&loader, number, 0);
            for from in 0..=all.len() {
                assert_eq!(pass(&loader, number, from as u64), all[from..]);
            }
            assert!(pass(&loader, number, u64::MAX).is_empty());
        }
    }
}

#[test]
fn an_exhausted_pass_stays_so_until_the_next_seek() {
    let loader = loader(4, 3).shuffle(1);
    let mut source = (&loader).into_source();
    for number in [0, 1, 0] {
        source.seek(number, 0).unwrap();
        assert_eq!(samples(rest(source.as_mut())), pass(&loader, number, 0));
        assert!(source.next().is_none() && source.next().is_none());
    }
}

#[test]
fn samples_are_counted_by_batch() {
    let mut source = loader(5, 3).into_source();
    source.seek(0, 0).unwrap();
    let mut count = || source.next().and_then(|_| source.samples());
    assert_eq!([count(), count(), count()], [Some(3), Some(2), None]);
}

#[test]
fn kinds_shapes_and_device_are_kept() {
    for (x_kind, y_kind) in
        [(Kind::Float, Kind::Int64), (Kind::Double, Kind::Double), (Kind::Uint8, Kind::Bool)]
    {
        let x = Tensor::zeros([5, 2, 3], (x_kind, Device::Cpu));
        let y = Tensor::zeros([5, 1], (y_kind, Device::Cpu));
        let loader = Loader::new(&x, &y, 2).unwrap();
        for loader in [loader.clone(), loader.shuffle(1)] {
            let mut source = loader.to_device(Device::Cpu).into_source();
            source.seek(0, 0).unwrap();
            let (x, y) = source.next().unwrap().unwrap();
            assert_eq!((x.kind(), y.kind(), x.device()), (x_kind, y_kind, Device::Cpu));
            assert_eq!((x.size(), y.size()), (vec![2, 2, 3], vec![2, 1]));
        }
    }
}

#[test]
fn without_shuffling_batches_are_views_of_the_data() {
    let x = Tensor::arange(4, (Kind::Float, Device::Cpu));
    let loader = Loader::new(&x, &x, 2).unwrap();
    let first = |loader: Loader| {
        let mut source = loader.into_source();
        source.seek(0, 0).unwrap();
        source.next().unwrap().unwrap().0
    };
    assert_eq!(first(loader.clone()).data_ptr(), x.data_ptr());
    assert_ne!(first(loader.shuffle(1)).data_ptr(), x.data_ptr());
}

#[test]
fn data_that_does_not_fit_is_refused() {
    let zeros = |shape: &[i64]| Tensor::zeros(shape, (Kind::Float, Device::Cpu));
    for (x, y, size, expected) in [
        (zeros(&[3, 2]), zeros(&[3]), 0, "batch_size must be at least 1, but 0 was given"),
        (
            zeros(&[3, 2]),
            zeros(&[4]),
            1,
            "there are 3 inputs but 4 targets (shapes [3, 2] and [4])",
        ),
        (
            zeros(&[]),
            zeros(&[3]),
            1,
            "inputs and targets need a first dimension, the samples; their shapes are [] and [3]",
        ),
        (zeros(&[3]), zeros(&[]), 1, "their shapes are [3] and []"),
        (zeros(&[0, 2]), zeros(&[0]), 1, "zero size"),
    ] {
        let error = text(Loader::new(&x, &y, size));
        assert!(error.contains(expected), "{error}");
    }
    assert_eq!(
        text(loader(3, 1).set_batch_size(0)),
        "batch_size must be at least 1, but 0 was given"
    );
}

#[test]
fn a_loader_without_a_whole_batch_is_refused() {
    for until in [Until::epochs(1), Until::epochs(1).epoch_length(3)] {
        let mut engine: Engine<(), Batch, ()> = Engine::new(|_, _, _| Ok(()));
        assert_eq!(
            text(engine.run(&mut (), loader(3, 4).drop_last(true), until)),
            "the loader has no batch: it drops the last one where it is smaller than batch_size (4), and there are 3 samples; use a smaller batch_size or drop_last(false)"
        );
    }
}

#[test]
fn a_loader_can_be_run_again_and_each_run_begins_with_the_first_pass() -> anyhow::Result<()> {
    let loader = loader(7, 3).shuffle(4);
    let mut engine: Engine<Vec<Batch>, Batch, ()> =
        Engine::new(|seen: &mut Vec<Batch>, _, batch| {
            seen.push(batch);
            Ok(())
        });
    let passes = [pass(&loader, 0, 0), pass(&loader, 1, 0)].concat();
    for _ in 0..2 {
        let mut seen = vec![];
        engine.run(&mut seen, &loader, Until::epochs(2))?;
        assert_eq!(samples(seen), passes);
    }
    Ok(())
}

#[test]
fn the_batch_size_of_a_loader_and_its_clones_can_be_changed() {
    let loader = loader(7, 2);
    let clone = loader.clone();
    let mut source = (&loader).into_source();
    source.seek(0, 0).unwrap();
    let mut next = || source.next().map(|batch| samples(vec![batch.unwrap()]).concat());
    assert_eq!(next(), Some(vec![0, 1]));
    clone.set_batch_size(4).unwrap();
    assert_eq!((next(), next(), next()), (Some(vec![2, 3, 4, 5]), Some(vec![6]), None));
    assert_eq!((clone.batch_size(), clone.batches()), (4, 2));
}

#[test]
fn slices_and_iterators_are_sources() {
    let data = vec![3, 5, 7];
    let sources: [Box<dyn Source<i64> + '_>; 4] = [
        data.clone().into_source(),
        data[..].into_source(),
        (&data).into_source(),
        restartable(|| data.iter().copied()).into_source(),
    ];
    for (index, mut source) in sources.into_iter().enumerate() {
        assert_eq!(source.batches(), (index < 3).then_some(3));
        for (from, expected) in
            [(0, &data[..]), (2, &data[2..]), (3, &[]), (9, &[]), (1, &data[1..])]
        {
            source.seek(1, from).unwrap();
            assert_eq!(rest(source.as_mut()), expected);
        }
        assert!(source.samples().is_none() && source.fetches());
    }
    let mut stream = one_shot(0..5).into_source();
    stream.seek(0, 2).unwrap();
    assert_eq!(stream.next().unwrap().unwrap(), 2);
    stream.seek(1, 0).unwrap();
    assert_eq!(rest(stream.as_mut()), [3, 4], "a stream has no second pass");
    let mut nothing: Box<dyn Source<u8>> = no_data().into_source();
    assert!(!nothing.fetches() && nothing.batches().is_none());
    assert_eq!(nothing.next().unwrap().unwrap(), 0);
}
