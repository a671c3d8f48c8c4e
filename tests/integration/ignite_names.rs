//! Tests that this crate has every class of ignite's metrics and handlers, and that a page of the documentation names
//! each.

/// Makes a list of pairs of ignite's name and ours. The code compiles only if ours exists.
macro_rules! names {
    ($list:ident: $($ignite:literal $($ours:ident)::+;)*) => {
        $(const _: () = {
            #[allow(unused_imports)]
            use tch_ignite::$($ours)::+;
        };)*
        const $list: &[(&str, &str)] = &[$(($ignite, stringify!($($ours)::+))),*];
    };
}

names! { METRICS:
    "Accuracy" metrics::Accuracy;
    "Precision" metrics::Precision;
    "Recall" metrics::Recall;
    "Fbeta" metrics::Fbeta;
    "ConfusionMatrix" metrics::ConfusionMatrix;
    "MultiLabelConfusionMatrix" metrics::MultiLabelConfusionMatrix;
    "ClassificationReport" metrics::ClassificationReport;
    "TopKCategoricalAccuracy" metrics::TopKCategoricalAccuracy;
    "Loss" metrics::Loss;
    "MeanAbsoluteError" metrics::MeanAbsoluteError;
    "MeanSquaredError" metrics::MeanSquaredError;
    "RootMeanSquaredError" metrics::RootMeanSquaredError;
    "MeanPairwiseDistance" metrics::MeanPairwiseDistance;
    "CosineSimilarity" metrics::CosineSimilarity;
    "Entropy" metrics::Entropy;
    "KLDivergence" metrics::KLDivergence;
    "JSDivergence" metrics::JSDivergence;
    "MaximumMeanDiscrepancy" metrics::MaximumMeanDiscrepancy;
    "HSIC" metrics::HSIC;
    "MutualInformation" metrics::MutualInformation;
    "PSNR" metrics::PSNR;
    "SSIM" metrics::SSIM;
    "FID" metrics::gan::FID;
    "InceptionScore" metrics::gan::InceptionScore;
    "Bleu" metrics::nlp::Bleu;
    "Rouge" metrics::nlp::Rouge;
    "RougeN" metrics::nlp::Rouge;
    "RougeL" metrics::nlp::Rouge;
    "Perplexity" metrics::nlp::Perplexity;
    "CharacterErrorRate" metrics::nlp::CharacterErrorRate;
    "ROC_AUC" metrics::RocAuc;
    "RocCurve" metrics::RocCurve;
    "AveragePrecision" metrics::AveragePrecision;
    "PrecisionRecallCurve" metrics::PrecisionRecallCurve;
    "MeanAveragePrecision" metrics::MeanAveragePrecision;
    "MatthewsCorrCoef" metrics::MatthewsCorrCoef;
    "CohenKappa" metrics::CohenKappa;
    "HitRate" metrics::rec_sys::HitRate;
    "NDCG" metrics::rec_sys::NDCG;
    "SilhouetteScore" metrics::clustering::SilhouetteScore;
    "DaviesBouldinScore" metrics::clustering::DaviesBouldinScore;
    "CalinskiHarabaszScore" metrics::clustering::CalinskiHarabaszScore;
    "SubgroupMetric" metrics::fairness::SubgroupMetric;
    "SubgroupDifference" metrics::fairness::SubgroupDifference;
    "SubgroupAccuracyDifference" metrics::fairness::SubgroupAccuracyDifference;
    "DemographicParityDifference" metrics::fairness::DemographicParityDifference;
    "SelectionRate" metrics::fairness::SelectionRate;
    "Frequency" metrics::Frequency;
    "Average" metrics::Average;
    "GeometricAverage" metrics::GeometricAverage;
    "VariableAccumulation" metrics::VariableAccumulation;
    "RunningAverage" metrics::RunningAverage;
    "MetricGroup" metrics::MetricGroup;
    "EpochMetric" metrics::EpochMetric;
    "MetricsLambda" metrics::MetricsLambda;
    "Metric" metrics::Metric;
    "CanberraMetric" metrics::regression::CanberraMetric;
    "FractionalAbsoluteError" metrics::regression::FractionalAbsoluteError;
    "FractionalBias" metrics::regression::FractionalBias;
    "GeometricMeanAbsoluteError" metrics::regression::GeometricMeanAbsoluteError;
    "GeometricMeanRelativeAbsoluteError" metrics::regression::GeometricMeanRelativeAbsoluteError;
    "KendallRankCorrelation" metrics::regression::KendallRankCorrelation;
    "ManhattanDistance" metrics::regression::ManhattanDistance;
    "MaximumAbsoluteError" metrics::regression::MaximumAbsoluteError;
    "MeanAbsoluteRelativeError" metrics::regression::MeanAbsoluteRelativeError;
    "MeanError" metrics::regression::MeanError;
    "MeanNormalizedBias" metrics::regression::MeanNormalizedBias;
    "MedianAbsoluteError" metrics::regression::MedianAbsoluteError;
    "MedianAbsolutePercentageError" metrics::regression::MedianAbsolutePercentageError;
    "MedianRelativeAbsoluteError" metrics::regression::MedianRelativeAbsoluteError;
    "PearsonCorrelation" metrics::regression::PearsonCorrelation;
    "R2Score" metrics::regression::R2Score;
    "SpearmanRankCorrelation" metrics::regression::SpearmanRankCorrelation;
    "WaveHedgesDistance" metrics::regression::WaveHedgesDistance;
    "BatchFiltered" metrics::Usage;
}

/// ignite's names that are methods here, or that the page says this crate does not have.
const METRICS_ELSEWHERE: [&str; 13] = [
    "IoU",
    "mIoU",
    "JaccardIndex",
    "DiceCoefficient",
    "cmAccuracy",
    "cmPrecision",
    "cmRecall",
    "EpochWise",
    "RunningEpochWise",
    "SingleEpochRunningBatchWise",
    "GpuInfo",
    "ObjectDetectionAvgPrecisionRecall",
    "CommonObjectDetectionMetrics",
];

names! { HANDLERS:
    "Checkpoint" checkpoint::Checkpoint;
    "ModelCheckpoint" checkpoint::Checkpoint;
    "DiskSaver" checkpoint::Checkpoint;
    "EarlyStopping" handlers::EarlyStopping;
    "EMAHandler" handlers::EMAHandler;
    "TerminateOnNan" handlers::TerminateOnNan;
    "TimeLimit" handlers::TimeLimit;
    "Timer" handlers::Timer;
    "EpochOutputStore" handlers::EpochOutputStore;
    "FastaiLRFinder" handlers::LrFinder;
    "TensorboardLogger" loggers::TensorBoard;
    "OutputHandler" loggers::OutputHandler;
    "OptimizerParamsHandler" loggers::OptimizerParamsHandler;
    "WeightsScalarHandler" loggers::WeightsScalarHandler;
    "WeightsHistHandler" loggers::WeightsHistHandler;
    "GradsScalarHandler" loggers::GradsScalarHandler;
    "GradsHistHandler" loggers::GradsHistHandler;
    "setup_tb_logging" loggers::RunFolder;
}

const HANDLERS_ELSEWHERE: [&str; 11] = [
    "BasicTimeProfiler",
    "HandlersTimeProfiler",
    "ProgressBar",
    "FBResearchLogger",
    "MLflowLogger",
    "VisdomLogger",
    "WandBLogger",
    "NeptuneLogger",
    "ClearMLLogger",
    "PolyaxonLogger",
    "global_step_from_engine",
];

/// Whether a table of the page has ignite's name in its left column and our name beside it.
fn is_told(page: &str, ignite: &str, ours: &str) -> bool {
    let is_name = |c: char| c.is_alphanumeric() || c == '_';
    let has = |cell: &str, name: &str| cell.split(|c| !is_name(c)).any(|word| word == name);
    let mut rows = page.lines().filter_map(|line| line.strip_prefix("| ")?.split_once(" | "));
    let ours = ours.rsplit(':').next().unwrap_or(ours).trim();
    rows.any(|(left, right)| has(left, ignite) && (ours.is_empty() || has(right, ours)))
}

#[track_caller]
fn all_told(page: &str, here: &[(&str, &str)], elsewhere: &[&str]) {
    let names = here.iter().copied().chain(elsewhere.iter().map(|name| (*name, "")));
    let missing: Vec<_> = names.filter(|(ignite, ours)| !is_told(page, ignite, ours)).collect();
    assert!(missing.is_empty(), "the page has no row for {missing:?}");
}

#[test]
fn every_metric_of_ignite_has_its_place() {
    all_told(include_str!("../../docs/METRICS.md"), METRICS, &METRICS_ELSEWHERE);
}

#[test]
fn every_handler_of_ignite_has_its_place() {
    all_told(include_str!("../../docs/HANDLERS.md"), HANDLERS, &HANDLERS_ELSEWHERE);
}
