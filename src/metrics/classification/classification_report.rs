use tch::Tensor;

use super::counts::{self, Counts};
use super::fbeta::{check_beta, fbeta};
use super::of_pair;
use crate::error::Result;
use crate::metrics::MetricValue;
use crate::metrics::{Contribution, Of, Pairwise, Parts};

/// Precision, recall and F-score of each class and their means: ignite's `ClassificationReport`.
///
/// Shapes as for [`Accuracy`](super::Accuracy). In `state.metrics` under `name/0/precision`,
/// `name/0/recall`, `name/0/f1-score`, … (with [`labels`](Of::labels) these instead of numbers) and
/// `name/macro avg/precision`, …. Counted in i64 on the device; no host sync.
///
/// ```
/// use tch::Tensor;
/// use tch_ignite::metrics::{ClassificationReport, Metric, pair};
/// let mut report = ClassificationReport::of(pair).labels(["cat", "dog"]);
/// let scores = Tensor::from_slice2(&[[0.9, 0.1], [0.2, 0.8]]);
/// report.update(&(scores, Tensor::from_slice(&[0i64, 0])))?;
/// let numbers = report.compute()?.flatten("report")?;
/// assert_eq!(numbers[0], ("report/cat/precision".into(), 1.));
/// assert_eq!(numbers[1], ("report/cat/recall".into(), 0.5));
/// assert_eq!(numbers[7].0, "report/macro avg/recall");
/// # anyhow::Ok(())
/// ```
#[derive(Debug)]
pub struct ClassificationReport {
    beta: f64,
    labels: Vec<String>,
    counts: Counts,
}

impl Default for ClassificationReport {
    fn default() -> Self {
        Self { beta: 1., labels: vec![], counts: Counts::default() }
    }
}

of_pair!(ClassificationReport);

impl<F> Of<ClassificationReport, F> {
    /// How much more recall counts than precision in the F-score, 1 unless given.
    pub fn beta(self, beta: f64) -> Self {
        self.with(|report| report.beta = beta)
    }

    /// `y_pred` and `y` are both (N, C, …), 0 or 1 for each label.
    pub fn is_multilabel(self, on: bool) -> Self {
        self.with(|report| report.counts.labels.multilabel = on)
    }

    /// The names of the classes, in order; their numbers unless given. There must be one for each.
    pub fn labels(self, labels: impl IntoIterator<Item = impl Into<String>>) -> Self {
        self.with(|report| report.labels = labels.into_iter().map(Into::into).collect())
    }
}

impl Pairwise for ClassificationReport {
    const NAME: &'static str = "ClassificationReport";
    fn parts(&self) -> Parts {
        counts::PARTS
    }

    fn validate(&self) -> Result<()> {
        check_beta(self.beta)
    }

    fn reset(&mut self) {
        self.counts.labels.reset();
    }

    fn batch(&mut self, y_pred: &Tensor, y: &Tensor) -> anyhow::Result<Contribution> {
        self.counts.batch(y_pred, y, counts::Share::Predicted)
    }

    fn value(&self, parts: &[Tensor], _samples: f64) -> anyhow::Result<MetricValue> {
        // Binary data has one rate, of class 1, as in ignite.
        let precision = self.counts.rate(parts, counts::Share::Predicted)?.f_reshape([-1])?;
        let recall = self.counts.rate(parts, counts::Share::Actual)?.f_reshape([-1])?;
        let rates = [
            ("precision".to_owned(), precision.shallow_clone()),
            ("recall".to_owned(), recall.shallow_clone()),
            (format!("f{}-score", self.beta), fbeta(self.beta, &precision, &recall)?),
        ];
        let classes = precision.size().first().copied().unwrap_or(0);
        anyhow::ensure!(
            self.labels.is_empty() || self.labels.len() as i64 == classes,
            "ClassificationReport has {} labels for {classes} classes",
            self.labels.len()
        );
        let mut report = vec![];
        for class in 0..classes {
            let label = self.labels.get(class as usize).cloned();
            let rows = rates.iter().map(|(name, rate)| {
                Ok((name.clone(), MetricValue::from(rate.f_select(0, class)?)))
            });
            let rows = rows.collect::<Result<_, tch::TchError>>()?;
            report.push((label.unwrap_or(class.to_string()), MetricValue::Named(rows)));
        }
        let means = rates
            .iter()
            .map(|(name, rate)| Ok((name.clone(), MetricValue::from(rate.f_mean(None)?))));
        let means = means.collect::<Result<_, tch::TchError>>()?;
        report.push(("macro avg".into(), MetricValue::Named(means)));
        Ok(MetricValue::Named(report))
    }
}
