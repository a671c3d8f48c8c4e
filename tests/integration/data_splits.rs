//! Tests of splits: scikit-learn's folds, torch's lengths, and parts of a loader.

use tch::{Device, Kind, Tensor};
use tch_ignite::data::{
    Dataset, IntoSource, KFold, Loader, RandomSampler, SplitMix64, StratifiedKFold, from_fn,
    permutation, random_split,
};

fn text<T>(result: tch_ignite::Result<T>) -> String {
    result.err().expect("an error").to_string()
}

fn tests(folds: tch_ignite::data::Folds) -> Vec<Vec<usize>> {
    let len = folds.size_hint().0;
    let folds: Vec<_> = folds.collect();
    assert_eq!(folds.len(), len);
    for (train, test) in &folds {
        let mut all = [&train[..], test].concat();
        all.sort();
        assert!(all.iter().copied().eq(0..all.len()), "each sample is in one of the two");
        assert!(train.is_sorted() && test.is_sorted());
    }
    folds.into_iter().map(|(_, test)| test).collect()
}

/// The expected parts are those of scikit-learn 1.9's `KFold(k).split`.
#[test]
fn folds_are_scikit_learns() -> tch_ignite::Result<()> {
    let parts = |len, k| Ok::<_, tch_ignite::Error>(tests(KFold::new(k)?.split(len)?));
    assert_eq!(parts(10, 3)?, [vec![0, 1, 2, 3], vec![4, 5, 6], vec![7, 8, 9]]);
    assert_eq!(parts(5, 5)?, [[0], [1], [2], [3], [4]]);
    assert_eq!(parts(11, 4)?, [vec![0, 1, 2], vec![3, 4, 5], vec![6, 7, 8], vec![9, 10]]);
    let shuffled =
        |seed| Ok::<_, tch_ignite::Error>(tests(KFold::new(4)?.shuffle(seed).split(11)?));
    let one = shuffled(1)?;
    assert_eq!(one.iter().map(Vec::len).collect::<Vec<_>>(), [3, 3, 3, 2]);
    assert_eq!(one, shuffled(1)?);
    assert_ne!(one, shuffled(2)?);
    assert_ne!(one, parts(11, 4)?);
    let mut first: Vec<_> = permutation(11, 1, 0)[..3].iter().map(|i| *i as usize).collect();
    first.sort();
    assert_eq!(one[0], first);
    Ok(())
}

/// The expected parts are those of scikit-learn 1.9's `StratifiedKFold(k).split`.
#[test]
fn stratified_folds_are_scikit_learns() -> tch_ignite::Result<()> {
    for (labels, k, expected) in [
        (
            vec![0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 2],
            3,
            vec![vec![0, 1, 4, 7], vec![2, 5, 8, 9], vec![3, 6, 10, 11]],
        ),
        (
            vec![2, 0, 1, 1, 0, 2, 2, 2, 0, 1, 5],
            2,
            vec![vec![0, 1, 2, 4, 5, 10], vec![3, 6, 7, 8, 9]],
        ),
        (vec![1, 1, 1, 1, 0], 4, vec![vec![0, 4], vec![1], vec![2], vec![3]]),
        (
            vec![3, 1, 3, 1, 3, 1, 3, 2, 2, 3, 1, 1, 2, 3],
            4,
            vec![vec![0, 1, 2, 7], vec![3, 4, 6, 8], vec![5, 9, 10], vec![11, 12, 13]],
        ),
    ] {
        assert_eq!(tests(StratifiedKFold::new(k)?.split(&labels)?), expected);
        let shuffled = StratifiedKFold::new(k)?.shuffle(3);
        let (one, same) = (tests(shuffled.split(&labels)?), tests(shuffled.split(&labels)?));
        assert_eq!(one, same);
        let classes = |parts: &[Vec<usize>]| -> Vec<Vec<i64>> {
            let of_part = |part: &Vec<usize>| {
                let mut labels: Vec<_> = part.iter().map(|index| labels[*index]).collect();
                labels.sort();
                labels
            };
            parts.iter().map(of_part).collect()
        };
        assert_eq!(classes(&one), classes(&expected), "shuffling keeps the numbers of members");
    }
    Ok(())
}

#[test]
fn folds_that_cannot_be_made_are_refused() -> tch_ignite::Result<()> {
    assert!(text(KFold::new(1)).contains("at least 2"));
    assert!(text(StratifiedKFold::new(0)).contains("at least 2"));
    assert!(text(KFold::new(4)?.split(3)).contains("n_splits is 4, but there are only 3 samples"));
    let few = text(StratifiedKFold::new(3)?.split(&[0, 1, 0, 1]));
    assert!(few.contains("the largest of the 2 classes has 2 members"), "{few}");
    assert!(StratifiedKFold::new(2)?.split(&[]).is_err());
    Ok(())
}

/// The expected lengths are those of torch 2.13's `random_split`.
#[test]
fn fractions_become_torchs_lengths() -> tch_ignite::Result<()> {
    fn lengths<const N: usize>(len: usize, fractions: [f64; N]) -> tch_ignite::Result<[usize; N]> {
        let parts = random_split(from_fn(len, |index, _| Ok(index)), fractions, 1)?;
        let mut all: Vec<usize> = parts
            .iter()
            .flat_map(|part| (0..part.len()).map(|i| part.get(i, &mut SplitMix64::new(0)).unwrap()))
            .collect();
        all.sort();
        assert!(all.into_iter().eq(0..len));
        Ok(parts.map(|part| part.len()))
    }
    assert_eq!(lengths(10, [0.5, 0.5])?, [5, 5]);
    assert_eq!(lengths(101, [0.9, 0.1])?, [91, 10]);
    assert_eq!(lengths(7, [0.5, 0.3, 0.2])?, [4, 2, 1]);
    assert_eq!(lengths(11, [1. / 3.; 3])?, [4, 4, 3]);
    assert_eq!(lengths(5, [0.9, 0.05, 0.05])?, [5, 0, 0]);
    assert_eq!(lengths(1, [0.5, 0.5])?, [1, 0]);
    assert_eq!(lengths(10, [0.7, 0.2, 0.1])?, [7, 2, 1]);
    assert_eq!(lengths(3, [0., 1.])?, [0, 3]);
    assert!(text(lengths(10, [0.5, 0.4])).contains("must sum up to 1, but their sum is 0.9"));
    assert!(text(lengths(10, [1.5, -0.5])).contains("between 0 and 1, but 1.5 was given"));
    assert!(text(lengths(10, [f64::NAN, 1.])).contains("NaN"));
    let numbers = from_fn(10, |index, _| Ok(index));
    let wrong = text(random_split(numbers, [7, 2], 1));
    assert!(wrong.contains("that of the dataset, 10, but their sum is 9"), "{wrong}");
    Ok(())
}

fn inputs(loader: &Loader, pass: u64) -> Vec<Vec<i64>> {
    let mut source = loader.into_source();
    source.seek(pass, 0).unwrap();
    std::iter::from_fn(|| source.next())
        .map(|batch| Vec::try_from(batch.unwrap().0).unwrap())
        .collect()
}

#[test]
fn a_part_of_a_loader_has_its_samples_in_order_or_shuffled() -> tch_ignite::Result<()> {
    let x = Tensor::arange(10, (Kind::Int64, Device::Cpu)) * 10;
    let all = Loader::new(&x, &x, 2)?;
    let part = all.subset([7, 1, 4])?;
    assert_eq!((part.samples(), part.batches()), (3, 2));
    for pass in [0, 5] {
        assert_eq!(inputs(&part, pass), [vec![70, 10], vec![40]]);
    }
    // A part of a part, without the last batch.
    assert_eq!(inputs(&part.subset([2, 0])?, 0), [[40, 70]]);
    assert_eq!(inputs(&all.clone().drop_last(true).subset([3, 2, 1])?, 0), [[30, 20]]);
    let shuffled = part.clone().shuffle(3);
    for pass in 0..4 {
        let order = permutation(3, 3, pass).into_iter().map(|place| [70, 10, 40][place as usize]);
        assert!(inputs(&shuffled, pass).concat().into_iter().eq(order));
    }
    part.set_batch_size(3)?;
    assert_eq!((all.batch_size(), inputs(&part, 0)), (2, vec![vec![70, 10, 40]]));
    let bytes = (Tensor::arange(10, (Kind::Int64, Device::Cpu))).to_kind(Kind::Uint8).view([10, 1]);
    let normalized = Loader::new(&bytes, &x, 2)?.normalize(&[0.], &[1. / 255.])?.subset([9, 4])?;
    let mut source = normalized.into_source();
    source.seek(0, 0).unwrap();
    let (values, _) = source.next().unwrap().unwrap();
    assert!(
        (values - Tensor::from_slice(&[9f32, 4.]).view([2, 1])).abs().max().double_value(&[])
            < 1e-5
    );

    assert!(text(all.subset([10])).contains("index 10, but the loader has 10 samples"));
    assert!(text(part.subset([3])).contains("index 3, but the loader has 3 samples"));
    assert!(text(all.subset([])).contains("at least one index"));
    assert!(text(shuffled.subset([0])).contains("call subset first"));
    assert!(all.clone().sampler(RandomSampler::new(10, 1)).subset([0]).is_err());
    Ok(())
}
