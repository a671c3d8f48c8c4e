//! Metrics of classes and labels.

mod accuracy;
mod average_precision;
mod classification_report;
mod cohen_kappa;
mod confusion_matrix;
mod counts;
mod fbeta;
mod labels;
mod matthews_corr_coef;
mod mean_average_precision;
mod multilabel_confusion_matrix;
mod precision;
mod precision_recall_curve;
mod ranking;
mod recall;
mod roc_auc;
mod roc_curve;
mod selection_rate;
mod shared_confusion_matrix;
mod top_k_categorical_accuracy;

pub use accuracy::Accuracy;
pub use average_precision::AveragePrecision;
pub use classification_report::ClassificationReport;
pub use cohen_kappa::{CohenKappa, KappaWeights};
pub use confusion_matrix::{ConfusionMatrix, MatrixAverage};
pub use counts::Averaging;
pub use fbeta::Fbeta;
pub use matthews_corr_coef::MatthewsCorrCoef;
pub use mean_average_precision::{ClassMean, MeanAveragePrecision};
pub use multilabel_confusion_matrix::MultiLabelConfusionMatrix;
pub use precision::Precision;
pub use precision_recall_curve::PrecisionRecallCurve;
pub(super) use ranking::ranks;
pub use recall::Recall;
pub use roc_auc::RocAuc;
pub use roc_curve::RocCurve;
pub use selection_rate::SelectionRate;
pub use shared_confusion_matrix::SharedConfusionMatrix;
pub use top_k_categorical_accuracy::TopKCategoricalAccuracy;

use super::gathered;
use super::pairwise::of_pair;
use super::to_value::{accumulator_kind, double, host};
