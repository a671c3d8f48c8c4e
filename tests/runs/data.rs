//! Tests of the loader and the other data sources: order, sizes, positions and errors.

use tch::{Device, Kind, Tensor};
use tch_ignite::data::{
    Batch, Custom, IntoSource, Loader, ShallowClone, Source, SubsetRandomSampler,
    WeightedRandomSampler, no_data, one_shot, permutation, restartable,
};
use tch_ignite::engine::{Engine, Event, Until};
use tch_ignite::handlers::Evaluate;

/// A loader of samples 0, 1, 2, …, whose targets are the negatives.
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
fn a_sampler_says_which_samples_a_pass_has() -> anyhow::Result<()> {
    let some = loader(9, 2).sampler(SubsetRandomSampler::new([8, 3, 5], 1)?);
    assert_eq!((some.samples(), some.batches()), (3, 2));
    for number in 0..3 {
        let mut seen = pass(&some, number, 0).concat();
        seen.sort();
        assert_eq!(seen, [3, 5, 8]);
        assert_eq!(pass(&some, number, 1), pass(&some, number, 0)[1..]);
    }
    let heavy = WeightedRandomSampler::new(&[0., 0., 1.], 50, 0)?;
    assert_eq!(pass(&loader(3, 60).sampler(heavy.clone()), 0, 0), [vec![2; 50]]);
    let error = loader(2, 60).sampler(heavy).into_source().seek(1, 0).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the sampler gives index 2 in pass 1, but the data has 2 samples"
    );
    Ok(())
}

/// A tensor of bytes of this shape, whose rows differ.
fn bytes(shape: &[i64]) -> Tensor {
    let count: i64 = shape.iter().product();
    let values = Tensor::arange(count, (Kind::Int64, Device::Cpu)) * 7919;
    values.remainder(251).f_add_scalar(3).unwrap().to_kind(Kind::Uint8).view(shape)
}

/// Does the same as torchvision's ToTensor and Normalize, with libtorch's operations.
fn normalized(bytes: &Tensor, mean: &[f64], std: &[f64]) -> Tensor {
    let mut shape = vec![1; bytes.dim()];
    if mean.len() > 1 {
        shape[1] = mean.len() as i64;
    }
    let column = |values: &[f64]| Tensor::from_slice(values).to_kind(Kind::Float).view(&*shape);
    (bytes.to_kind(Kind::Float) / 255. - column(mean)) / column(std)
}

fn bits(tensor: &Tensor) -> Vec<u32> {
    let values = Vec::<f32>::try_from(tensor.flatten(0, -1)).unwrap();
    values.into_iter().map(f32::to_bits).collect()
}

#[test]
fn bytes_are_normalized_bit_for_bit_as_by_libtorch() -> anyhow::Result<()> {
    let grey = (&[0.1307][..], &[0.3081][..]);
    let colour = (&[0.4914, 0.4822, 0.4465][..], &[0.2470, 0.2435, 0.2616][..]);
    let odd = (&[-3., 1e-30][..], &[1e-3, 7e5][..]);
    for (shape, (mean, std)) in [
        (&[11, 1, 28, 28][..], grey),
        (&[11, 784], grey),
        (&[300], grey),
        (&[7, 3, 5, 3], grey),
        (&[7, 3, 5, 3], colour),
        (&[5, 3], colour),
        (&[4, 3, 1, 2, 3], colour),
        (&[9, 2, 13], odd),
        (&[3, 1, 0], grey),
        (&[3, 3, 0], colour),
    ] {
        let x = bytes(shape);
        let y = Tensor::arange(shape[0], (Kind::Int64, Device::Cpu));
        let plain = Loader::new(&x, &y, 4)?.normalize(mean, std)?;
        for loader in [plain.clone(), plain.shuffle(3)] {
            for from in 0..loader.batches() {
                let mut source = (&loader).into_source();
                source.seek(1, from)?;
                for (inputs, rows) in rest(source.as_mut()) {
                    let expected = normalized(&x.index_select(0, &rows), mean, std);
                    assert_eq!((inputs.kind(), inputs.size()), (Kind::Float, expected.size()));
                    assert_eq!(bits(&inputs), bits(&expected), "{shape:?}");
                }
            }
        }
    }
    Ok(())
}

#[test]
fn every_byte_is_normalized_as_f32_arithmetic_says() -> anyhow::Result<()> {
    let x = Tensor::arange(256, (Kind::Int64, Device::Cpu)).to_kind(Kind::Uint8);
    let loader = Loader::new(&x, &x, 256)?.normalize(&[0.2860], &[0.3530])?;
    let expected = (0..=255u8).map(|byte| (f32::from(byte) / 255. - 0.2860) / 0.3530);
    let mut source = loader.into_source();
    source.seek(0, 0)?;
    let (values, _) = source.next().unwrap()?;
    assert!(bits(&values).into_iter().eq(expected.map(f32::to_bits)));
    Ok(())
}

#[test]
fn bytes_that_are_not_contiguous_are_normalized_too() -> anyhow::Result<()> {
    let x = bytes(&[3, 8, 5]).transpose(0, 1).flip([2]);
    let rows = Tensor::arange(8, (Kind::Int64, Device::Cpu));
    let loader = Loader::new(&x, &rows, 3)?.shuffle(1).normalize(&[0.5; 3], &[0.25; 3])?;
    let mut source = loader.into_source();
    source.seek(0, 0)?;
    for (inputs, rows) in rest(source.as_mut()) {
        let expected = normalized(&x.index_select(0, &rows), &[0.5; 3], &[0.25; 3]);
        assert_eq!(bits(&inputs), bits(&expected));
    }
    Ok(())
}

#[test]
fn what_cannot_be_normalized_is_refused() -> anyhow::Result<()> {
    let y = Tensor::zeros([4], (Kind::Int64, Device::Cpu));
    let try_with = |x: Tensor, mean: &[f64], std: &[f64]| {
        text(Loader::new(&x, &y, 2).unwrap().normalize(mean, std))
    };
    let images = || bytes(&[4, 3, 2]);
    for (error, expected) in [
        (try_with(images().to_kind(Kind::Float), &[0.], &[1.]), "they are Float"),
        (try_with(images(), &[], &[]), "0 and 0 were given"),
        (try_with(images(), &[0.; 3], &[1.]), "3 and 1 were given"),
        (
            try_with(images(), &[0.; 2], &[1.; 2]),
            "need images of shape [samples, 2, …], but the shape is [4, 3, 2]",
        ),
        (try_with(bytes(&[4]), &[0.; 4], &[1.; 4]), "the shape is [4]"),
        (try_with(images(), &[f64::NAN], &[1.]), "mean must be finite in f32, but NaN"),
        (try_with(images(), &[0.], &[0.]), "std must be above 0 and finite in f32, but 0"),
        (try_with(images(), &[0.], &[-1.]), "but -1.0 was given"),
        (try_with(images(), &[0.], &[f64::INFINITY]), "finite in f32, but inf was given"),
        (try_with(images(), &[1e300], &[1.]), "mean must be finite in f32, but 1e300 was given"),
        (try_with(images(), &[0.], &[1e300]), "finite in f32, but 1e300 was given"),
        (try_with(images(), &[0.], &[1e-60]), "std must be above 0"),
    ] {
        assert!(error.contains(expected), "{error}");
    }
    Ok(())
}

#[test]
fn on_a_gpu_bytes_are_normalized_there() -> anyhow::Result<()> {
    if !tch::Cuda::is_available() {
        return Ok(());
    }
    let (x, gpu) = (bytes(&[9, 3, 4]), Device::Cuda(0));
    let rows = Tensor::arange(9, (Kind::Int64, Device::Cpu));
    for data in [x.shallow_clone(), x.to_device(gpu)] {
        let loader = Loader::new(&data, &rows, 4)?.shuffle(2).normalize(&[0.5; 3], &[0.3; 3])?;
        let mut source = loader.to_device(gpu).into_source();
        source.seek(0, 0)?;
        for (inputs, rows) in rest(source.as_mut()) {
            assert_eq!(inputs.device(), gpu);
            let expected =
                normalized(&x.index_select(0, &rows.to_device(Device::Cpu)), &[0.5; 3], &[0.3; 3]);
            assert!(
                (inputs.to_device(Device::Cpu) - expected).abs().max().double_value(&[]) < 1e-6
            );
        }
    }
    Ok(())
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

/// The loader of the tests of changed batches: each input is moved by a random number, and targets become vectors.
fn changed(batch_size: usize) -> Loader {
    loader(11, batch_size).shuffle(4).map_batches(|(x, y), rng| {
        let x = x.f_to_kind(Kind::Double)?.f_add_scalar(rng.uniform())?;
        Ok((x, y.f_neg()?.f_one_hot(11)?))
    })
}

#[test]
fn changed_batches_depend_on_seed_pass_and_place_alone() -> anyhow::Result<()> {
    let from = |loader: &Loader, pass, batch| {
        let mut source = loader.into_source();
        source.seek(pass, batch).unwrap();
        rest(source.as_mut())
    };
    let (plain, loader) = (loader(11, 3).shuffle(4), changed(3));
    let mut moved = vec![];
    for number in [0, 5] {
        let all = from(&loader, number, 0);
        for ((x, y), plain) in all.iter().zip(pass(&plain, number, 0)) {
            let plain = Tensor::from_slice(&plain);
            assert_eq!(y.argmax(1, false), plain);
            let by = Vec::<f64>::try_from(x - &plain)?;
            assert!(
                (0. ..1.).contains(&by[0]) && by.iter().all(|other| (other - by[0]).abs() < 1e-9)
            );
            moved.push(by[0].to_bits());
        }
        for batch in 1..4 {
            assert_eq!(from(&loader, number, batch), all[batch as usize..]);
        }
        assert_ne!(from(&loader.clone().seed(5), number, 0)[0].0, all[0].0);
        assert_eq!(from(&loader.clone().seed(4), number, 0), all);
    }
    moved.sort();
    moved.dedup();
    assert_eq!(moved.len(), 8, "each batch has a number of its own");
    Ok(())
}

#[test]
fn a_run_over_changed_batches_goes_on_where_it_was() -> anyhow::Result<()> {
    let engine = || {
        Engine::new(|seen: &mut Vec<u64>, _, (x, _): Batch| {
            seen.extend(Vec::<f64>::try_from(x)?.into_iter().map(f64::to_bits));
            Ok(())
        })
    };
    let mut straight = vec![];
    engine().run(&mut straight, changed(3), Until::epochs(3))?;
    for stop in [1, 3, 4, 6, 9] {
        let (mut seen, mut first) = (vec![], engine());
        first.on(Event::IterationCompleted.once(stop), |_, engine| {
            engine.interrupt();
            Ok(())
        });
        first.run(&mut seen, changed(3), Until::epochs(3))?;
        let (state, same) = (first.checkpoint(&seen)?, first.checkpoint(&seen)?);
        let mut second = engine();
        second.restore(&mut seen, state, true)?;
        second.run(&mut seen, changed(3), Until::epochs(3))?;
        assert_eq!(seen, straight, "stopped at {stop}");
        // Another seed is told.
        let mut other = engine();
        other.restore(&mut vec![], same, true)?;
        let summary = other.run(&mut vec![], changed(3).seed(9), Until::epochs(3))?;
        let warned = summary.warnings.iter().any(|warning| warning.contains("seed of batches"));
        assert!(warned, "{:?}", summary.warnings);
    }
    Ok(())
}

#[test]
fn changes_follow_each_other_and_come_after_normalising() -> anyhow::Result<()> {
    let x = Tensor::from_slice(&[0u8, 255, 51, 102]).view([4, 1]);
    let y = Tensor::arange(4, (Kind::Int64, Device::Cpu));
    let weight = Tensor::ones([1], (Kind::Float, Device::Cpu)).set_requires_grad(true);
    let weight = std::sync::Mutex::new(weight);
    let loader = Loader::new(&x, &y, 2)?
        .normalize(&[0.], &[1.])?
        .map_batches(move |(x, y), _| Ok((x * 10 * &*weight.lock().unwrap(), y)))
        .map_batches(|(x, y), _| Ok((x + 1, y)));
    let mut source = loader.into_source();
    source.seek(0, 1)?;
    let (x, _) = source.next().unwrap()?;
    assert!(!x.requires_grad());
    assert!(
        (x - Tensor::from_slice(&[3f32, 5.]).view([2, 1])).abs().max().double_value(&[]) < 1e-6
    );
    Ok(())
}

#[test]
fn a_change_that_fails_is_an_error_of_its_batch() -> anyhow::Result<()> {
    let failed = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let fails = failed.clone();
    let loader = loader(6, 2).map_batches(move |batch, _| {
        let second = batch.0.int64_value(&[0]) == 2;
        if second && !fails.swap(true, std::sync::atomic::Ordering::SeqCst) {
            panic!("no such label");
        }
        Ok(batch)
    });
    let mut engine = Engine::new(|seen: &mut Vec<i64>, _, (x, _): Batch| {
        seen.extend(Vec::<i64>::try_from(x)?);
        Ok(())
    });
    let mut seen = vec![];
    let error = engine.run(&mut seen, &loader, Until::epochs(1)).unwrap_err();
    assert_eq!(
        error.to_string(),
        "no batch for iteration 2 (epoch 1): batch of the loader from sample 2: map_batches, at the batch from position 2 of pass 0: panicked: no such label"
    );
    engine.run(&mut seen, &loader, Until::default())?;
    assert_eq!(seen, [0, 1, 2, 3, 4, 5]);
    Ok(())
}

#[test]
fn batches_of_tensors_that_exist_are_data() -> anyhow::Result<()> {
    let batch = |from: i64| {
        let x = Tensor::arange_start(from, from + 2, (Kind::Int64, Device::Cpu));
        (x.shallow_clone(), -x)
    };
    let batches: Vec<(Tensor, Tensor)> = vec![batch(0), batch(2), batch(4)];
    let mut engine = Engine::new(|seen: &mut Vec<i64>, _, (x, y): (Tensor, Tensor)| {
        assert_eq!(-&x, y);
        seen.extend(Vec::<i64>::try_from(x)?);
        Ok(())
    });
    let expected: Vec<i64> = (0..6).chain(0..6).collect();
    let mut run = |data: Custom<'static, Batch>| -> anyhow::Result<Vec<i64>> {
        let mut seen = vec![];
        engine.run(&mut seen, data, Until::epochs(2))?;
        Ok(seen)
    };
    let again: Vec<Batch> = vec![batch(0), batch(2), batch(4)];
    assert_eq!(run(restartable(move || again.shallow_clone().into_iter()))?, expected);
    let mut engine = Engine::new(|seen: &mut Vec<i64>, _, (x, _): (Tensor, Tensor)| {
        seen.extend(Vec::<i64>::try_from(x)?);
        Ok(())
    });
    let mut seen = vec![];
    engine.run(&mut seen, &batches, Until::epochs(2))?;
    engine.run(&mut seen, batches.as_slice(), Until::epochs(2))?;
    engine.run(&mut seen, batches.shallow_clone(), Until::epochs(2))?;
    assert_eq!(seen, [&expected[..], &expected, &expected].concat());
    // An evaluation, and batches of one tensor.
    let ones: Vec<Tensor> = vec![Tensor::from(1i64), Tensor::from(2i64)];
    let evaluator = Engine::new(|sum: &mut i64, _, x: Tensor| {
        *sum += x.int64_value(&[]);
        Ok(())
    });
    let mut trainer = Engine::new(|_: &mut i64, _, _: Tensor| Ok(()));
    trainer.attach(Evaluate::each_epoch("validation", evaluator, &ones));
    let mut sum = 0;
    trainer.run(&mut sum, &ones, Until::epochs(2))?;
    assert_eq!(sum, 6);
    Ok(())
}
