//! Tests of what all metrics have in common: empty batches, resets, state, sharing, values that are tensors.

use tch::{Device, Kind, Tensor};
use tch_ignite::engine::{Engine, Event, MetricValue, Until};
use tch_ignite::metrics::clustering::*;
use tch_ignite::metrics::nlp::*;
use tch_ignite::metrics::rec_sys::*;
use tch_ignite::metrics::regression::*;
use tch_ignite::metrics::*;

type Pair = (Tensor, Tensor);
type Boxed = Box<dyn Metric<Pair>>;

fn floats(n: i64, columns: i64, seed: i64) -> Tensor {
    let numbers = Tensor::arange(n * columns, (Kind::Double, Device::Cpu)) * 0.7 + seed as f64;
    let numbers = numbers.sin() + 1.5;
    if columns == 1 { numbers } else { numbers.reshape([n, columns]) }
}

fn classes(n: i64, of: i64, seed: i64) -> Tensor {
    (Tensor::arange(n, (Kind::Int64, Device::Cpu)) * 7 + seed).remainder(of)
}

/// The form of a metric's inputs.
#[derive(Clone, Copy, PartialEq)]
enum Takes {
    /// (N, 3) scores, and class numbers.
    Classes,
    /// Predictions and targets are (N,) zeros and ones.
    Binary,
    /// Predictions and targets are (N, 3) zeros and ones.
    Labels,
    /// (N,) scores, and zeros and ones.
    Scores,
    /// Predictions and targets are (N,) floats.
    Columns,
    /// Predictions and targets are (N, 3) floats.
    Rows,
    /// (N, 3) floats, and relevances of 0 or 1.
    Relevances,
    /// Predictions and targets are (N, 1, 8, 8) floats.
    Images,
}

impl Takes {
    fn batch(self, n: i64, seed: i64) -> Pair {
        match self {
            Self::Classes => (floats(n, 3, seed), classes(n, 3, seed)),
            Self::Binary => (classes(n, 2, seed), classes(n, 2, seed / 2)),
            Self::Labels => {
                let labels = |seed| classes(n * 3, 2, seed).reshape([n, 3]);
                (labels(seed), labels(seed / 2))
            }
            Self::Scores => (floats(n, 1, seed), classes(n, 2, seed)),
            Self::Columns => (floats(n, 1, seed), floats(n, 1, seed + 1)),
            Self::Rows => (floats(n, 3, seed), floats(n, 3, seed + 1)),
            Self::Relevances => (floats(n, 3, seed), classes(n * 3, 2, seed).reshape([n, 3])),
            Self::Images => {
                let images = |seed| floats(n, 64, seed).reshape([n, 1, 8, 8]);
                (images(seed), images(seed + 1))
            }
        }
    }
}

/// The name of a metric, the form of its inputs, and a function that makes one.
type Listed = (&'static str, Takes, fn() -> Boxed);

fn all() -> Vec<Listed> {
    use Takes::*;
    macro_rules! list {
        ($($takes:ident $name:literal $metric:expr),* $(,)?) => {
            vec![$(($name, $takes, (|| Box::new($metric)) as fn() -> Boxed)),*]
        };
    }
    list![
        Classes "Accuracy" Accuracy::of(pair),
        Binary "binary Accuracy" Accuracy::of(pair),
        Labels "label Accuracy" Accuracy::of(pair).is_multilabel(true),
        Classes "Precision" Precision::of(pair),
        Binary "binary Precision" Precision::of(pair),
        Binary "binary Recall of both" Recall::of(pair).average(Averaging::None),
        Binary "binary Fbeta" Fbeta::of(1., pair),
        Scores "binary MeanAveragePrecision" MeanAveragePrecision::of(pair),
        Classes "weighted Recall" Recall::of(pair).average(Averaging::Weighted),
        Labels "Recall of samples"
            Recall::of(pair).average(Averaging::Samples).is_multilabel(true),
        Classes "Fbeta" Fbeta::of(2., pair),
        Classes "ClassificationReport" ClassificationReport::of(pair),
        Classes "ConfusionMatrix" ConfusionMatrix::of(3, pair),
        Classes "IoU" ConfusionMatrix::of(3, pair).shared::<Pair>().iou(None),
        Labels "MultiLabelConfusionMatrix" MultiLabelConfusionMatrix::of(3, pair),
        Classes "TopKCategoricalAccuracy" TopKCategoricalAccuracy::of(2, pair),
        Classes "MatthewsCorrCoef" MatthewsCorrCoef::of(pair),
        Binary "CohenKappa" CohenKappa::of(pair),
        Binary "CohenKappa of classes" CohenKappa::of(pair).num_classes(2),
        Scores "RocAuc" RocAuc::of(pair),
        Scores "RocCurve" RocCurve::of(pair),
        Scores "AveragePrecision" AveragePrecision::of(pair),
        Scores "PrecisionRecallCurve" PrecisionRecallCurve::of(pair),
        Classes "MeanAveragePrecision" MeanAveragePrecision::of(pair),
        Columns "Loss"
            Loss::of(|x: &Tensor, y: &Tensor| x.mse_loss(y, tch::Reduction::Mean), pair),
        Rows "MeanAbsoluteError" MeanAbsoluteError::of(pair),
        Rows "MeanSquaredError" MeanSquaredError::of(pair),
        Rows "RootMeanSquaredError" RootMeanSquaredError::of(pair),
        Rows "MeanPairwiseDistance" MeanPairwiseDistance::of(pair),
        Rows "CosineSimilarity" CosineSimilarity::of(pair),
        Rows "Entropy" Entropy::of(pair),
        Rows "KLDivergence" KLDivergence::of(pair),
        Rows "JSDivergence" JSDivergence::of(pair),
        Rows "MutualInformation" MutualInformation::of(pair),
        Rows "MaximumMeanDiscrepancy" MaximumMeanDiscrepancy::of(pair),
        Rows "HSIC" HSIC::of(pair),
        Rows "PSNR" PSNR::of(1., pair),
        Rows "FID" gan::FID::of(3, |x: &Tensor| Ok(x.shallow_clone()), pair),
        Rows "InceptionScore"
            gan::InceptionScore::of(3, |x: &Tensor| Ok(x.f_softmax(1, Kind::Double)?), |pair: &Pair| &pair.0),
        Images "SSIM" SSIM::of(1., pair).kernel_size([3]),
        Classes "Perplexity" Perplexity::of(pair),
        Relevances "HitRate" HitRate::of([1, 2], pair),
        Relevances "NDCG" NDCG::of([1, 2], pair),
        Classes "CalinskiHarabaszScore" CalinskiHarabaszScore::of(pair),
        Classes "DaviesBouldinScore" DaviesBouldinScore::of(pair),
        Classes "SilhouetteScore" SilhouetteScore::of(pair),
        Columns "EpochMetric"
            EpochMetric::of(|x: &Tensor, y: &Tensor| Ok((x - y).abs().max().into()), pair),
        Columns "Average" Average::of(|pair: &Pair| pair.0.unsqueeze(1)),
        Columns "GeometricAverage" GeometricAverage::of(|pair: &Pair| pair.0.unsqueeze(1)),
        Columns "R2Score" R2Score::of(pair),
        Columns "CanberraMetric" CanberraMetric::of(pair),
        Columns "FractionalAbsoluteError" FractionalAbsoluteError::of(pair),
        Columns "FractionalBias" FractionalBias::of(pair),
        Columns "GeometricMeanAbsoluteError" GeometricMeanAbsoluteError::of(pair),
        Columns "GeometricMeanRelativeAbsoluteError" GeometricMeanRelativeAbsoluteError::of(pair),
        Columns "ManhattanDistance" ManhattanDistance::of(pair),
        Columns "MaximumAbsoluteError" MaximumAbsoluteError::of(pair),
        Columns "MeanAbsoluteRelativeError" MeanAbsoluteRelativeError::of(pair),
        Columns "MeanError" MeanError::of(pair),
        Columns "MeanNormalizedBias" MeanNormalizedBias::of(pair),
        Columns "MedianAbsoluteError" MedianAbsoluteError::of(pair),
        Columns "MedianAbsolutePercentageError" MedianAbsolutePercentageError::of(pair),
        Columns "MedianRelativeAbsoluteError" MedianRelativeAbsoluteError::of(pair),
        Columns "PearsonCorrelation" PearsonCorrelation::of(pair),
        Columns "SpearmanRankCorrelation" SpearmanRankCorrelation::of(pair),
        Columns "KendallRankCorrelation" KendallRankCorrelation::of(pair),
        Columns "WaveHedgesDistance" WaveHedgesDistance::of(pair),
        Columns "expression"
            (2. * MeanError::of(pair).shared() - ManhattanDistance::of(pair).shared()) / 3.,
        Classes "group"
            MetricGroup::new().metric("a", Accuracy::of(pair)).metric("e", Entropy::of(pair)),
    ]
}

fn numbers(metric: &dyn Metric<Pair>) -> Vec<f64> {
    let flat = metric.compute().unwrap().flatten("").unwrap();
    flat.into_iter().map(|(_, number)| number).collect()
}

#[track_caller]
fn same(what: &str, ours: &[f64], theirs: &[f64], relative: f64) {
    let near = |(a, b): (&f64, &f64)| {
        a == b || (a.is_nan() && b.is_nan()) || (a - b).abs() <= relative * b.abs().max(1e-3)
    };
    let same = ours.len() == theirs.len() && ours.iter().zip(theirs).all(near);
    assert!(same, "{what}: {ours:?} instead of {theirs:?}");
}

#[test]
fn an_empty_batch_counts_nothing_and_alone_cannot_be_computed() {
    for (name, takes, metric) in all() {
        let (mut metric, mut other) = (metric(), metric());
        metric.update(&takes.batch(0, 1)).unwrap_or_else(|error| panic!("{name}: {error:#}"));
        let error = metric.compute().unwrap_err().to_string();
        assert!(error.contains("must have at least one example"), "{name}: {error}");
        for n in [5, 0, 4] {
            metric.update(&takes.batch(n, n)).unwrap_or_else(|error| panic!("{name}: {error:#}"));
            if n > 0 {
                other.update(&takes.batch(n, n)).unwrap();
            }
        }
        same(name, &numbers(&*metric), &numbers(&*other), 0.);
    }
}

#[test]
fn a_reset_forgets_everything() {
    for (name, takes, metric) in all() {
        let (mut metric, mut fresh) = (metric(), metric());
        metric.update(&takes.batch(6, 3)).unwrap();
        metric.reset();
        assert!(metric.compute().is_err(), "{name}");
        assert!(metric.state().unwrap().iter().all(|part| part.value.numel() == 0), "{name}");
        metric.update(&takes.batch(5, 2)).unwrap();
        fresh.update(&takes.batch(5, 2)).unwrap();
        same(name, &numbers(&*metric), &numbers(&*fresh), 0.);
    }
}

#[test]
fn a_metric_goes_on_from_its_state_bit_for_bit() {
    for (name, takes, metric) in all() {
        let (mut straight, mut resumed) = (metric(), metric());
        straight.update(&takes.batch(6, 3)).unwrap();
        let state = straight.state().unwrap();
        assert!(!state.is_empty(), "{name} lists nothing");
        straight.update(&takes.batch(5, 2)).unwrap();
        resumed.update(&takes.batch(4, 1)).unwrap();
        resumed.load_state(&state).unwrap();
        resumed.update(&takes.batch(5, 2)).unwrap();
        same(name, &numbers(&*resumed), &numbers(&*straight), 0.);
        let unknown = [Accumulated::new("?", Tensor::from(1.), Reduce::Sum)];
        if !["group", "expression", "IoU"].contains(&name) {
            assert!(resumed.load_state(&unknown).is_err(), "{name}");
        }
    }
}

#[test]
fn a_value_that_another_process_found_wrong_makes_all_nan() -> anyhow::Result<()> {
    let mut metric = Accuracy::of(pair);
    metric.update(&Takes::Classes.batch(4, 1))?;
    let mut state = metric.state()?;
    let marks = state.iter_mut().filter(|part| part.reduce == Reduce::Max);
    marks.for_each(|mark| mark.value = Tensor::from(1i64));
    metric.load_state(&state)?;
    assert!(metric.compute()?.read()?.is_nan());
    metric.reset();
    metric.update(&Takes::Classes.batch(4, 1))?;
    assert!(!metric.compute()?.read()?.is_nan());
    Ok(())
}

#[test]
fn states_of_processes_join_to_that_of_all() {
    for (name, takes, metric) in all() {
        let (mut whole, mut joined) = (metric(), metric());
        let states: Vec<_> = [(6, 3), (5, 2)]
            .map(|(n, seed)| {
                let mut process = metric();
                process.update(&takes.batch(n, seed)).unwrap();
                whole.update(&takes.batch(n, seed)).unwrap();
                process.state().unwrap()
            })
            .into();
        let parts = states[0].iter().zip(&states[1]).map(|(a, b)| {
            assert_eq!((&a.name, a.reduce), (&b.name, b.reduce));
            let value = match a.reduce {
                Reduce::Sum => &a.value + &b.value,
                Reduce::Max => a.value.maximum(&b.value),
                Reduce::Min => a.value.minimum(&b.value),
                Reduce::Concat => Tensor::cat(&[&a.value, &b.value], 0),
                Reduce::Mean => (&a.value + &b.value) / 2.,
            };
            Accumulated::new(a.name.clone(), value, a.reduce)
        });
        joined.load_state(&parts.collect::<Vec<_>>()).unwrap();
        same(name, &numbers(&*joined), &numbers(&*whole), 1e-12);
    }
}

#[test]
fn what_is_gathered_is_kept_apart_from_the_steps_tensors() {
    for (name, takes, metric) in all() {
        let (mut metric, batch) = (metric(), takes.batch(6, 3));
        metric.update(&batch).unwrap();
        let before = numbers(&*metric);
        let (mut x, mut y) = batch;
        let (_, _) = (x.fill_(7), y.fill_(7));
        same(name, &numbers(&*metric), &before, 0.);
    }
}

#[test]
fn labels_that_are_neither_0_nor_1_are_refused_on_the_cpu() {
    let ints = |numbers: &[i64]| Tensor::from_slice(numbers);
    let refused = |mut metric: Boxed, output: Pair| metric.update(&output).unwrap_err().to_string();
    let text = "For binary cases, y_pred must be comprised of 0's and 1's.";
    assert_eq!(refused(Box::new(Accuracy::of(pair)), (ints(&[2, 0]), ints(&[1, 0]))), text);
    let scores = || floats(2, 3, 0);
    let few = refused(Box::new(Precision::of(pair)), (scores(), ints(&[3, 0])));
    assert!(few.starts_with("y_pred contains fewer classes than y."), "{few}");
    let zeros = || Tensor::zeros([2], (Kind::Double, Device::Cpu));
    let zero = refused(Box::new(MeanNormalizedBias::of(pair)), (zeros(), zeros()));
    assert_eq!(zero, "The ground truth has 0.");
    let mut accuracy = Accuracy::of(pair);
    accuracy.update(&(scores(), ints(&[1, 2]))).unwrap();
    let changed = accuracy.update(&(ints(&[1, 0]), ints(&[1, 0]))).unwrap_err().to_string();
    assert_eq!(changed, "Input data type has changed from Multiclass to Binary.");
}

#[test]
fn labels_outside_of_the_classes_are_left_out_of_a_matrix() -> anyhow::Result<()> {
    let mut matrix = ConfusionMatrix::of(2, pair);
    let scores = Tensor::from_slice2(&[[1., 0.], [0., 1.], [0., 1.], [1., 0.]]);
    matrix.update(&(scores, Tensor::from_slice(&[0i64, 1, -1, 255])))?;
    assert_eq!(matrix.compute()?.tensor()?, Tensor::from_slice2(&[[1i64, 0], [0, 1]]));
    Ok(())
}

/// A metric that counts its updates.
struct Counting<'a>(&'a std::cell::Cell<u32>);

impl Metric<f64> for Counting<'_> {
    fn reset(&mut self) {
        self.0.set(0);
    }
    fn update(&mut self, _: &f64) -> anyhow::Result<()> {
        self.0.set(self.0.get() + 1);
        Ok(())
    }
    fn compute(&self) -> anyhow::Result<MetricValue> {
        Ok(f64::from(self.0.get()).into())
    }
}

#[test]
fn a_shared_metric_is_updated_once_however_often_it_is_used() -> anyhow::Result<()> {
    let updates = std::cell::Cell::new(0);
    let counting = Counting(&updates).shared();
    let twice = &counting + &counting;
    let mean = Mean::new().shared();
    let product = counting.clone() * &mean;
    let mut engine = Engine::new(|_: &mut (), _, x: f64| Ok(x));
    engine
        .metric("twice", twice)
        .metric("product", product)
        .metric("itself", counting)
        .metric("mean", mean.clone())
        .metric("inverse", 1. / mean)
        .on(Event::EpochCompleted, |_, engine| {
            let metric = |name| engine.state.metrics.get(name);
            assert_eq!((metric("twice")?, metric("itself")?), (6., 3.));
            assert_eq!((metric("product")?, metric("mean")?), (12., 4.));
            assert_eq!(metric("inverse")?, 0.25);
            Ok(())
        });
    engine.run(&mut (), vec![2., 4., 6.], Until::epochs(2))?;
    Ok(())
}

#[test]
fn arithmetic_is_that_of_tensors() -> anyhow::Result<()> {
    let x = || Average::of(|x: &Tensor| x.shallow_clone()).shared();
    let value = |mut metric: MetricsLambda<'_, Tensor>| -> anyhow::Result<Vec<f64>> {
        metric.update(&Tensor::from_slice(&[1., -4.]))?;
        Ok(metric.compute()?.flatten("")?.into_iter().map(|(_, number)| number).collect())
    };
    assert_eq!(value(x() + 1.)?, [2., -3.]);
    assert_eq!(value(1. - x())?, [0., 5.]);
    assert_eq!(value(&x() * 2.)?, [2., -8.]);
    assert_eq!(value(8. / &x())?, [8., -2.]);
    assert_eq!(value(x() % 3.)?, [1., 2.]);
    assert_eq!(value(5. % x())?, [0., -3.]);
    assert_eq!(value(x().floor_divide(3.))?, [0., -2.]);
    assert_eq!(value(x().pow(2.))?, [1., 16.]);
    assert_eq!(value(-x())?, [-1., 4.]);
    assert_eq!(value(x().sum())?, [-3.]);
    assert_eq!(value(x().mean())?, [-1.5]);
    assert_eq!(value(x().index(-1))?, [-4.]);
    assert!(value(x().index(2)).is_err());
    Ok(())
}

#[test]
fn wrong_arguments_are_refused_when_a_metric_is_attached() {
    fn refused(metric: impl Metric<Pair>) -> String {
        let mut engine: Engine<(), (), Pair> = Engine::new(|_, _, ()| panic!("a step"));
        engine.metric("m", metric);
        engine.run(&mut (), vec![()], Until::epochs(1)).unwrap_err().to_string()
    }
    let matrix = |average| ConfusionMatrix::of(3, pair).average(average).shared::<Pair>();
    let iou = matrix(MatrixAverage::Recall).mean_iou(None);
    assert!(refused(iou).contains("average attribute either None or 'samples'"));
    assert!(refused(ConfusionMatrix::of(3, pair).shared().iou(-1)).contains("given -1"));
    assert!(refused(RunningAverage::of_metric(Accuracy::of(pair)).alpha(0.)).contains("alpha"));
    assert!(
        refused(MetricGroup::new().metric("k", TopKCategoricalAccuracy::of(0, pair))).contains("k")
    );
    assert!(refused(Fbeta::of(f64::NAN, pair).shared() + 1.).contains("Beta"));
    let mut engine: Engine<(), (), Pair> = Engine::new(|_, _, ()| panic!("a step"));
    let filtered = Usage::BatchFiltered(Event::EpochCompleted.every(2));
    engine.metric_with("m", Accuracy::of(pair), filtered);
    let error = engine.run(&mut (), vec![()], Until::epochs(1)).unwrap_err().to_string();
    assert!(error.contains("not EPOCH_COMPLETED"), "{error}");
}

#[test]
fn values_that_are_no_single_number_say_so_and_give_their_tensor() -> anyhow::Result<()> {
    let mut engine = Engine::new(|_: &mut (), _, x: f64| Ok(Tensor::from_slice(&[x, 2. * x])));
    engine.metric("v", Average::new());
    let group = MetricGroup::new().metric("first", Average::new().shared().index(0));
    engine.metric("g", group);
    engine.run(&mut (), vec![1., 3.], Until::epochs(1))?;
    let metrics = &engine.state.metrics;
    let error = metrics.get("v").unwrap_err().to_string();
    assert!(error.starts_with("metric 'v': the value has shape [2]"), "{error}");
    assert_eq!(metrics.tensor("v")?, Tensor::from_slice(&[2., 4.]));
    assert_eq!(metrics.get("g/first")?, 2.);
    let error = metrics.get("g").unwrap_err().to_string();
    assert!(error.contains("there are: 'g/first', 'v'"), "{error}");
    let matrix = MetricValue::from(Tensor::from_slice2(&[[1i64, 2], [3, 4]]));
    let names: Vec<_> = matrix.flatten("m")?.into_iter().map(|(name, _)| name).collect();
    assert_eq!(names, ["m/0/0", "m/0/1", "m/1/0", "m/1/1"]);
    Ok(())
}

#[test]
fn a_nan_score_makes_ranked_metrics_nan() -> anyhow::Result<()> {
    for mut metric in [
        Box::new(RocAuc::of(pair)) as Boxed,
        Box::new(AveragePrecision::of(pair)),
        Box::new(KendallRankCorrelation::of(|pair: &Pair| (&pair.0, &pair.0))),
    ] {
        metric.update(&(Tensor::from_slice(&[0.1, f64::NAN, 0.7]), classes(3, 2, 0)))?;
        assert!(metric.compute()?.read()?.is_nan());
    }
    let mut curve = RocCurve::of(pair);
    curve.update(&(Tensor::from_slice(&[0.1, f64::NAN, 0.7]), classes(3, 2, 0)))?;
    assert!(curve.compute().unwrap_err().to_string().contains("NaN"));
    Ok(())
}

#[test]
fn metrics_can_move_to_another_thread() {
    fn send<T: Send>(_: &T) {}
    send(&Accuracy::of(pair));
    send(&ConfusionMatrix::of(3, pair));
    send(&RunningAverage::of_metric(RocAuc::of(pair)));
    send(&Average::of(|x: &f64| *x));
    send(&Bleu::of(|o: &(Vec<Vec<u8>>, Vec<Vec<Vec<u8>>>)| (&o.0[..], &o.1[..])));
}

#[test]
fn class_numbers_of_bytes_are_compared_with_more_classes_than_a_byte_holds() -> anyhow::Result<()> {
    let scores = floats(6, 300, 1);
    let wide = Tensor::from_slice(&[0i64, 44, 99, 156, 200, 255]);
    let bytes = wide.to_kind(Kind::Uint8);
    let metrics: [fn() -> Boxed; 3] = [
        || Box::new(Perplexity::of(pair)),
        || Box::new(Precision::of(pair).average(true)),
        || Box::new(MeanAveragePrecision::of(pair)),
    ];
    for (index, make) in metrics.into_iter().enumerate() {
        let value = |y: &Tensor| -> anyhow::Result<Vec<f64>> {
            let mut metric = make();
            metric.update(&(scores.shallow_clone(), y.shallow_clone()))?;
            Ok(numbers(&*metric))
        };
        assert_eq!(value(&bytes)?, value(&wide)?, "{index}");
    }
    Ok(())
}

#[test]
fn probabilities_are_not_taken_for_class_numbers() -> anyhow::Result<()> {
    let y = Tensor::from_slice(&[1i64, 0, 1]);
    let scores = Tensor::from_slice(&[0.9, 0.2, 0.7]);
    let metrics: [Boxed; 3] = [
        Box::new(MatthewsCorrCoef::of(pair)),
        Box::new(CohenKappa::of(pair)),
        Box::new(CohenKappa::of(pair).num_classes(2)),
    ];
    for mut metric in metrics {
        let error = metric.update(&(scores.shallow_clone(), y.shallow_clone())).unwrap_err();
        let text = format!("{error:#}");
        assert!(text.contains("y_pred must hold class numbers"), "{text}");
        metric.update(&(y.to_kind(Kind::Float), y.shallow_clone()))?;
        assert_eq!(numbers(&*metric), [1.]);
    }
    Ok(())
}

#[test]
fn a_kappa_of_few_classes_with_large_numbers_takes_little_memory() -> anyhow::Result<()> {
    let pair_of = |a: [i64; 6], b: [i64; 6]| (Tensor::from_slice(&a), Tensor::from_slice(&b));
    let value = |large: i64, classes: Option<i64>| -> anyhow::Result<f64> {
        let mut kappa = CohenKappa::of(pair).weights(KappaWeights::Linear).num_classes(classes);
        kappa.update(&pair_of([0, 1, large, large, 1, 0], [0, large, large, 1, 1, 0]))?;
        Ok(kappa.compute()?.read()?)
    };
    approx::assert_abs_diff_eq!(value(7, None)?, value(7, Some(8))?, epsilon = 1e-12);
    // Observed are two disagreements of `large - 1`; by chance there are four pairs of each two classes, of six samples.
    let large = (1i64 << 40) as f64;
    let chance = 8. * (1. + large + (large - 1.)) / 6.;
    approx::assert_abs_diff_eq!(
        value(1 << 40, None)?,
        1. - 2. * (large - 1.) / chance,
        epsilon = 1e-9
    );
    Ok(())
}

#[test]
fn zeros_of_both_signs_are_ties_in_kendalls_rank_correlation() -> anyhow::Result<()> {
    let y = || Tensor::from_slice(&[5., 3., 3., 4., 5.]);
    let value = |x: [f64; 5]| -> anyhow::Result<f64> {
        let mut metric = KendallRankCorrelation::of(pair);
        metric.update(&(Tensor::from_slice(&x), y()))?;
        Ok(metric.compute()?.read()?)
    };
    assert_eq!(value([-0., 0., 1., 0., -0.])?, value([0., 0., 1., 0., 0.])?);
    Ok(())
}

#[test]
fn a_shared_metric_serves_engines_that_run_one_after_the_other() -> anyhow::Result<()> {
    let mean = Mean::of(|x: &f64| *x).shared();
    let doubled = mean.clone() * 2.;
    let make = || {
        let mut engine = Engine::new(|_: &mut (), _, x: f64| Ok(x));
        engine.metric("mean", mean.clone()).metric("doubled", doubled.clone());
        engine
    };
    let (mut train, mut val) = (make(), make());
    for (epoch, (a, b)) in [(1., 10.), (2., 20.)].into_iter().enumerate() {
        for (engine, x) in [(&mut train, a), (&mut val, b)] {
            engine.run(&mut (), vec![x, x + 2.], Until::epochs(epoch as u64 + 1))?;
            let metrics = &engine.state.metrics;
            assert_eq!((metrics.get("mean")?, metrics.get("doubled")?), (x + 1., 2. * x + 2.));
        }
    }
    Ok(())
}

#[test]
fn a_state_of_other_metrics_is_refused() -> anyhow::Result<()> {
    let group = |names: &[&str]| {
        let group = MetricGroup::new();
        names.iter().fold(group, |group, name| group.metric(*name, Mean::of(|x: &f64| *x)))
    };
    let mut both = group(&["a", "b/c"]);
    both.update(&1.)?;
    let state = both.state()?;
    group(&["a", "b/c", "new"]).load_state(&state)?;
    let error = group(&["a"]).load_state(&state).unwrap_err().to_string();
    assert!(error.contains("b%2Fc") && error.contains("made of: a"), "{error}");
    Ok(())
}

#[test]
fn an_empty_vector_counts_nothing_and_a_kept_value_is_a_copy() -> anyhow::Result<()> {
    let empty = || Tensor::zeros([0], (Kind::Double, Device::Cpu));
    let mut average = Average::of(|x: &Tensor| x.shallow_clone());
    for batch in [empty(), Tensor::from_slice(&[4.]), empty()] {
        average.update(&batch)?;
    }
    assert_eq!(average.compute()?.read()?, 4.);
    let mut last =
        VariableAccumulation::of(|_, x| Ok(x.shallow_clone()), |x: &Tensor| x.shallow_clone());
    let mut output = Tensor::from_slice(&[4.]);
    last.update(&output)?;
    last.update(&empty())?;
    let _ = output.fill_(9.);
    let values = last.compute()?.flatten("last")?;
    assert_eq!(values[0], ("last/accumulator/0".to_owned(), 4.));
    assert_eq!(values[1], ("last/num_examples".to_owned(), 1.));
    Ok(())
}

#[test]
fn arguments_that_would_make_every_value_nan_are_refused() {
    let refused: Vec<Boxed> = vec![
        Box::new(PSNR::of(f64::INFINITY, pair)),
        Box::new(SSIM::of(0., pair)),
        Box::new(SSIM::of(f64::NAN, pair)),
        Box::new(SSIM::of(1., pair).k1(0.)),
        Box::new(Fbeta::of(f64::INFINITY, pair)),
        Box::new(MaximumMeanDiscrepancy::of(pair).var(0.)),
        Box::new(HSIC::of(pair).sigma_x(0.)),
        Box::new(HSIC::of(pair).sigma_y(f64::NAN)),
    ];
    for (index, metric) in refused.iter().enumerate() {
        assert!(metric.validate().is_err(), "{index}");
    }
}
