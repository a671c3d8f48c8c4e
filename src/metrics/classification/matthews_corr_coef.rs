use tch::{Kind, TchError, Tensor};

use super::labels::not_whole;
use super::{gathered, host, of_pair};
use crate::metrics::MetricValue;
use crate::metrics::{Contribution, Pairwise, Parts};

/// Matthews' correlation of predicted and actual classes, in [-1, 1]: ignite's `MatthewsCorrCoef`, with Gorodkin's
/// formula for several classes.
///
/// `y_pred` and `y` are each (N,), class numbers, or (N, C), scores. The value is 0 where one of them has a single
/// class. The metric keeps the class numbers on the device; `compute` takes one host sync.
///
/// ```
/// use tch::Tensor;
/// use tch_ignite::metrics::{MatthewsCorrCoef, Metric, pair};
/// let mut metric = MatthewsCorrCoef::of(pair);
/// metric.update(&(Tensor::from_slice(&[1i64, 0, 1, 1]), Tensor::from_slice(&[1i64, 0, 1, 0])))?;
/// assert!((metric.compute()?.read()? - 1. / 3f64.sqrt()).abs() < 1e-12);
/// # anyhow::Ok(())
/// ```
#[derive(Debug, Default)]
pub struct MatthewsCorrCoef;

of_pair!(MatthewsCorrCoef);

/// Returns class numbers: scores (N, C) become the numbers of their largest, others are taken as they are. Adds what
/// makes them wrong.
fn numbers(
    name: &str,
    tensor: &Tensor,
    wrong: &mut Vec<(Tensor, String)>,
) -> Result<Tensor, TchError> {
    match tensor.size().as_slice() {
        [_, classes] if *classes > 1 => tensor.f_argmax(1, false),
        _ => {
            wrong.extend(not_whole(name, tensor)?);
            tensor.f_reshape([-1])?.f_to_kind(Kind::Int64)
        }
    }
}

impl Pairwise for MatthewsCorrCoef {
    const NAME: &'static str = "MatthewsCorrCoef";

    fn parts(&self) -> Parts {
        gathered::PARTS
    }

    fn batch(&mut self, y_pred: &Tensor, y: &Tensor) -> anyhow::Result<Contribution> {
        let mut wrong = vec![];
        let y_pred = numbers("y_pred", y_pred, &mut wrong)?;
        let y = numbers("y", y, &mut wrong)?;
        Ok(gathered::gather(&y_pred, &y)?.wrong(wrong))
    }

    fn value(&self, parts: &[Tensor], samples: f64) -> anyhow::Result<MetricValue> {
        let both = host::<i64>(&Tensor::f_stack(parts, 0)?)?;
        let mut classes = both.clone();
        classes.sort_unstable();
        classes.dedup();
        let (y_pred, y) = both.split_at(both.len() / 2);
        let count = |numbers: &[i64]| {
            let mut counts = vec![0.; classes.len()];
            for number in numbers {
                if let Ok(class) = classes.binary_search(number) {
                    counts[class] += 1.;
                }
            }
            counts
        };
        let (predicted, actual) = (count(y_pred), count(y));
        let right = y_pred.iter().zip(y).filter(|(a, b)| a == b).count() as f64;
        let covariance = |right: f64, a: &[f64], b: &[f64]| {
            right * samples - a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>()
        };
        let both = covariance(right, &actual, &predicted);
        let variances =
            covariance(samples, &predicted, &predicted) * covariance(samples, &actual, &actual);
        Ok(if variances == 0. { 0. } else { both / variances.sqrt() }.into())
    }
}
