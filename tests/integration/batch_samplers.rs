//! Tests of batches that a sampler chooses: their sizes, positions, shares of processes, and padding.

use anyhow::Result;
use tch::{Kind, Tensor};
use tch_ignite::data::{
    BatchSampler, BucketBatchSampler, Collate, DataLoader, Dataset, DistributedBatchSampler,
    IntoSource, Padded, RandomSampler, Source, SplitMix64, from_fn,
};
use tch_ignite::engine::{Engine, Event, Until};
use tch_ignite::schedule::{BatchSizeScheduler, StepLR};

/// Batches as a list says.
#[derive(Clone)]
struct Listed(Vec<Vec<usize>>);

impl BatchSampler for Listed {
    fn num_batches(&self) -> usize {
        3
    }

    fn batches(&self, _pass: u64) -> Result<Vec<Vec<usize>>> {
        Ok(self.0.clone())
    }
}

fn numbers(len: usize) -> impl Dataset<Item = i64> + 'static {
    from_fn(len, |index, _| Ok(index as i64))
}

fn rest(source: &mut dyn Source<Tensor>) -> Vec<Vec<i64>> {
    std::iter::from_fn(|| source.next())
        .map(|batch| Vec::try_from(batch.unwrap()).unwrap())
        .collect()
}

fn text<T>(result: Result<T, impl Into<anyhow::Error>>) -> String {
    format!("{:#}", result.err().expect("an error").into())
}

fn lengths(len: usize) -> Vec<usize> {
    let mut rng = SplitMix64::new(4);
    (0..len).map(|_| 1 + rng.below(60) as usize).collect()
}

#[test]
fn the_batches_are_those_of_the_sampler_from_any_position() -> Result<()> {
    let listed = Listed(vec![vec![4, 0, 2], vec![1], vec![3, 3, 1, 0]]);
    let expected = [vec![4, 0, 2], vec![1], vec![3, 3, 1, 0]];
    for workers in [0, 1, 3] {
        let loader =
            DataLoader::new(numbers(5), 1)?.batch_sampler(listed.clone()).num_workers(workers);
        assert_eq!(loader.batches(), 3);
        let mut source = (&loader).into_source();
        source.validate()?;
        for from in [0, 2, 1, 3, 9] {
            source.seek(1, from)?;
            assert_eq!(source.batches_left(), Some(3u64.saturating_sub(from)));
            assert_eq!(rest(source.as_mut()), expected[(from as usize).min(3)..]);
            assert!(source.next().is_none());
        }
        source.seek(0, 1)?;
        drop(source.next().unwrap()?);
        assert_eq!((source.samples(), source.sample_position(false)), (Some(1), None));
    }
    Ok(())
}

#[test]
fn batches_that_do_not_fit_are_refused() -> Result<()> {
    for (batches, expected) in [
        (vec![vec![0]], "a pass has 3 batches, but gives 1 in pass 2"),
        (vec![vec![0], vec![], vec![1]], "an empty batch 1 in pass 2"),
        (vec![vec![0], vec![5], vec![1]], "index 5 in pass 2, but the data has 5 samples"),
    ] {
        let loader = DataLoader::new(numbers(5), 1)?.batch_sampler(Listed(batches));
        let error = text(loader.into_source().seek(2, 0));
        assert!(error.contains(expected), "{error}");
    }
    let listed = || {
        Ok::<_, tch_ignite::Error>(DataLoader::new(numbers(5), 2)?.batch_sampler(Listed(vec![
            vec![
                0
            ];
            3
        ])))
    };
    for loader in [
        listed()?.shuffle(1),
        listed()?.drop_last(true),
        listed()?.sampler(RandomSampler::new(5, 1)),
    ] {
        let error = text(loader.into_source().validate());
        assert!(error.contains("shuffle in the batch sampler"), "{error}");
    }
    let loader = listed()?;
    assert!(text(loader.set_batch_size(4)).contains("no batch size to change"));
    let mut engine = Engine::new(|_: &mut (), _, _: Tensor| Ok(()));
    engine.attach(BatchSizeScheduler::new(&loader, StepLR::new(4., 1)).on(Event::IterationStarted));
    let error = text(engine.run(&mut (), &loader, Until::epochs(1)));
    assert!(error.contains("no batch size to change"), "{error}");
    // A schedule that keeps the size is refused too, before it changes the length of the epoch.
    let mut engine = Engine::new(|_: &mut (), _, _: Tensor| Ok(()));
    engine.attach(BatchSizeScheduler::new(&loader, StepLR::new(2., 1).gamma(1.)));
    let error = text(engine.run(&mut (), &loader, Until::epochs(1)));
    assert!(error.contains("no batch size to change"), "{error}");
    assert!(text(BucketBatchSampler::by_tokens(&[3, 9, 4], 8)).contains("sample 1 alone has 9"));
    assert!(text(BucketBatchSampler::by_samples(&[], 8)).contains("at least one sample"));
    assert!(text(BucketBatchSampler::by_samples(&[1], 0)).contains("at least 1"));
    Ok(())
}

#[test]
fn buckets_have_each_sample_once_and_keep_to_their_budget() -> Result<()> {
    let lengths = lengths(500);
    for sampler in [
        BucketBatchSampler::by_samples(&lengths, 16)?.shuffle(1),
        BucketBatchSampler::by_tokens(&lengths, 200)?.shuffle(1),
        BucketBatchSampler::by_tokens(&lengths, 60)?.buckets(usize::MAX).shuffle(1),
        BucketBatchSampler::by_samples(&lengths, 16)?.buckets(0),
    ] {
        let padded = |batch: &Vec<usize>| {
            batch.len() * batch.iter().map(|index| lengths[*index]).max().unwrap()
        };
        for pass in 0..3 {
            let batches = sampler.batches(pass)?;
            assert_eq!(batches.len(), sampler.num_batches());
            let mut all = batches.concat();
            all.sort();
            assert!(all.into_iter().eq(0..500));
            assert_eq!(batches, sampler.batches(pass)?);
        }
        if sampler.seed().is_some() {
            assert_ne!(sampler.batches(0)?, sampler.batches(1)?);
            let total: usize = sampler.batches(0)?.iter().map(padded).sum();
            let used: usize = lengths.iter().sum();
            assert!((total as f64) < 1.2 * used as f64, "{total} for {used}");
        }
    }
    let tokens = BucketBatchSampler::by_tokens(&lengths, 200)?.shuffle(1);
    for batch in tokens.batches(7)? {
        assert!(batch.len() * batch.iter().map(|index| lengths[*index]).max().unwrap() <= 200);
    }
    Ok(())
}

#[test]
fn ranks_share_the_batches() -> Result<()> {
    let all = BucketBatchSampler::by_tokens(&lengths(100), 120)?.shuffle(3);
    let shares = (0..3)
        .map(|rank| Ok(DistributedBatchSampler::new(all.clone(), rank, 3)?))
        .collect::<Result<Vec<_>>>()?;
    for pass in 0..2 {
        let (batches, mut seen) = (all.batches(pass)?, vec![]);
        for (rank, share) in shares.iter().enumerate() {
            let own = share.batches(pass)?;
            assert_eq!(own.len(), share.num_batches());
            assert_eq!(own.len(), batches.len().div_ceil(3));
            assert_eq!(own[0], batches[rank]);
            seen.extend(own);
        }
        assert!(batches.iter().all(|batch| seen.contains(batch)));
    }
    assert_eq!(shares[1].seed(), Some(3));
    Ok(())
}

/// One sample, three times in a pass.
struct Thrice;

impl BatchSampler for Thrice {
    fn num_batches(&self) -> usize {
        2
    }

    fn batches(&self, _pass: u64) -> Result<Vec<Vec<usize>>> {
        Ok(vec![vec![0, 0], vec![0]])
    }

    fn repeats(&self) -> bool {
        true
    }
}

#[test]
fn a_sample_that_comes_again_is_augmented_anew() -> Result<()> {
    let sampler = DistributedBatchSampler::new(Thrice, 0, 1)?;
    assert!(sampler.repeats() && !Listed(vec![]).repeats());
    let dataset = from_fn(1, |_, rng| Ok(rng.uniform()));
    let mut source = DataLoader::new(dataset, 1)?.batch_sampler(sampler).into_source();
    let mut drawn = vec![];
    while let Some(batch) = source.next() {
        drawn.extend(Vec::<f64>::try_from(batch?)?);
    }
    drawn.sort_by(f64::total_cmp);
    drawn.dedup();
    assert_eq!(drawn.len(), 3);
    Ok(())
}

#[test]
fn another_number_of_ranks_is_warned_about() -> Result<()> {
    let loader = |ranks| -> Result<_> {
        let all = BucketBatchSampler::by_samples(&lengths(60), 3)?.shuffle(2);
        let share = DistributedBatchSampler::new(all, 0, ranks)?;
        Ok(DataLoader::new(numbers(60), 1)?.batch_sampler(share))
    };
    let engine = || Engine::new(|_: &mut (), _, _: Tensor| Ok(()));
    let mut first = engine();
    first.on(Event::IterationCompleted.once(3), |_, engine| {
        engine.interrupt();
        Ok(())
    });
    first.run(&mut (), loader(1)?, Until::epochs(2))?;
    let mut second = engine();
    second.restore(&mut (), first.checkpoint(&())?, true)?;
    let warnings = second.run(&mut (), loader(2)?, Until::epochs(2))?.warnings.join("\n");
    assert!(warnings.contains("number of batches, which count the place in a pass"), "{warnings}");
    Ok(())
}

#[test]
fn a_run_over_buckets_goes_on_where_it_was() -> Result<()> {
    let lengths = lengths(60);
    let loader = |workers| -> Result<_> {
        let buckets = BucketBatchSampler::by_tokens(&lengths, 100)?.shuffle(2);
        let texts = from_fn(60, {
            let lengths = lengths.clone();
            move |index, rng| {
                let tokens = vec![rng.uniform(); lengths[index]];
                Ok(Padded::new(Tensor::f_from_slice(&tokens)?).value(-1.))
            }
        });
        Ok(DataLoader::new(texts, 1)?.batch_sampler(buckets).num_workers(workers))
    };
    let engine = || {
        Engine::new(|seen: &mut Vec<(Vec<i64>, u64)>, _, batch: Tensor| {
            seen.push((batch.size(), batch.sum(Kind::Double).double_value(&[]).to_bits()));
            Ok(())
        })
    };
    let mut straight = vec![];
    engine().run(&mut straight, loader(0)?, Until::epochs(2))?;
    for stop in [1, 7, 20] {
        let (mut seen, mut first) = (vec![], engine());
        first.on(Event::IterationCompleted.once(stop), |_, engine| {
            engine.interrupt();
            Ok(())
        });
        first.run(&mut seen, loader(2)?, Until::epochs(2))?;
        let mut second = engine();
        second.restore(&mut vec![], first.checkpoint(&seen)?, true)?;
        second.run(&mut seen, loader(1)?, Until::epochs(2))?;
        assert_eq!(seen, straight, "stopped at {stop}");
    }
    Ok(())
}

/// The expected values are those of torch 2.13's `pad_sequence(batch_first=True, padding_value=-1)`.
#[test]
fn padding_is_torchs() -> Result<()> {
    let sample = |rows: i64| {
        Padded::new(Tensor::full([rows, 2], rows, (Kind::Float, tch::Device::Cpu))).value(-1.)
    };
    let padded = Padded::collate(vec![sample(2), sample(1), sample(3)])?;
    let expected = [2., 2., 2., 2., -1., -1., 1., 1., -1., -1., -1., -1., 3., 3., 3., 3., 3., 3.];
    assert_eq!(padded.size(), [3, 3, 2]);
    assert_eq!(Vec::<f64>::try_from(padded.view(-1).to_kind(Kind::Double))?, expected);
    let refused = |other| text(Padded::collate(vec![sample(2), other]));
    assert!(refused(sample(2).value(0.)).contains("says -1 and sample 1 0"));
    assert!(
        refused(Padded::new(Tensor::from(1f32)).value(-1.))
            .contains("differ in their first dimension only")
    );
    assert!(
        refused(Padded::new(Tensor::from_slice(&[1f32])).value(-1.))
            .contains("[2, 2] and sample 1 Float [1]")
    );
    let doubles = Tensor::zeros([2, 2], (Kind::Double, tch::Device::Cpu));
    assert!(refused(Padded::new(doubles).value(-1.)).contains("Double"));
    for (kind, value) in [
        (Kind::Int64, 0.5),
        (Kind::Int64, f64::NAN),
        (Kind::Uint8, -1.),
        (Kind::Int8, 128.),
        (Kind::Bool, 2.),
    ] {
        let sample = Padded::new(Tensor::zeros([2], (kind, tch::Device::Cpu))).value(value);
        let error = text(Padded::collate(vec![sample]));
        assert!(error.contains(&format!("cannot be filled up with {value:?}")), "{error}");
    }
    let texts =
        [1i64, 3].map(|len| Padded::new(Tensor::arange(len, (Kind::Int64, tch::Device::Cpu))));
    let padded = Padded::collate(texts.map(|text| text.value(-100.)).to_vec())?;
    assert_eq!(Vec::<Vec<i64>>::try_from(padded)?, [[0, -100, -100], [0, 1, 2]]);
    Ok(())
}
