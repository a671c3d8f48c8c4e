use tch::{Device, Kind, Tensor};

use super::accumulator::Accumulator;
use super::{Accumulated, Metric, Reduce};
use crate::error::Result;
use crate::metrics::MetricValue;

/// The parts of a metric's state: names, and how batches and processes join them.
pub type Parts = &'static [(&'static str, Reduce)];

/// What a batch adds to a metric.
#[derive(Debug, Default)]
pub struct Contribution {
    /// A tensor for each of the metric's parts, in their order. They must not share memory with what
    /// the step returned.
    pub parts: Vec<Tensor>,
    /// How many samples they stand for; with 0 nothing is added.
    pub samples: u64,
    /// Conditions that make the value wrong, each a boolean tensor of one element, and what to say.
    pub wrong: Vec<(Tensor, String)>,
}

impl Contribution {
    /// These parts, of so many samples.
    pub fn new(parts: impl Into<Vec<Tensor>>, samples: u64) -> Self {
        Self { parts: parts.into(), samples, wrong: vec![] }
    }

    /// Says what makes the value wrong.
    pub fn wrong(mut self, conditions: Vec<(Tensor, String)>) -> Self {
        self.wrong = conditions;
        self
    }
}

/// A metric of predictions and targets: what each batch adds, and the value of the sums.
///
/// What the sums are kept in, empty batches, state, and where `y_pred` and `y` come from is done by
/// [`Of`], which makes a [`Metric`] of it:
///
/// ```
/// use tch::{Kind, Tensor};
/// use tch_ignite::engine::MetricValue;
/// use tch_ignite::metrics::{Contribution, Metric, Of, Pairwise, Parts, Reduce, pair};
///
/// /// The share of predictions that are too large.
/// struct TooLarge;
///
/// impl Pairwise for TooLarge {
///     const NAME: &'static str = "TooLarge";
///     fn parts(&self) -> Parts {
///         &[("count", Reduce::Sum)]
///     }
///
///     fn batch(&mut self, y_pred: &Tensor, y: &Tensor) -> anyhow::Result<Contribution> {
///         let count = y_pred.f_gt_tensor(y)?.f_sum(Kind::Int64)?;
///         Ok(Contribution::new([count], y.size()[0] as u64))
///     }
///
///     fn value(&self, parts: &[Tensor], samples: f64) -> anyhow::Result<MetricValue> {
///         Ok(parts[0].f_to_kind(Kind::Double)?.f_div_scalar(samples)?.into())
///     }
/// }
///
/// let mut metric = Of::new(TooLarge, pair);
/// metric.update(&(Tensor::from_slice(&[1.0, 2.0]), Tensor::from_slice(&[0.0, 3.0])))?;
/// assert_eq!(metric.compute()?.read()?, 0.5);
/// # anyhow::Ok(())
/// ```
pub trait Pairwise {
    /// Its name in errors.
    const NAME: &'static str;

    /// What is accumulated, and how batches (and processes) join it.
    fn parts(&self) -> Parts;

    /// What is wrong with its arguments, if anything.
    fn validate(&self) -> Result<()> {
        Ok(())
    }

    /// Forgets what it noted of earlier batches; the sums are reset without it.
    fn reset(&mut self) {}

    /// What a batch adds. Both tensors are detached. Not called for empty batches.
    fn batch(&mut self, y_pred: &Tensor, y: &Tensor) -> anyhow::Result<Contribution>;

    /// The value of the sums, over at least one sample.
    fn value(&self, parts: &[Tensor], samples: f64) -> anyhow::Result<MetricValue>;
}

/// A [`Pairwise`] metric of the `y_pred` and `y` in an output.
pub struct Of<M, F> {
    pub(super) metric: M,
    parts: F,
    sums: Accumulator,
    /// True once a value was wrong, on devices where that is not looked at.
    spoiled: Option<Tensor>,
    validated: bool,
}

impl<M: Pairwise, F> Of<M, F> {
    /// `parts` takes `y_pred` and `y` out of the output.
    pub fn new<O>(metric: M, parts: F) -> Self
    where
        F: for<'o> Fn(&'o O) -> (&'o Tensor, &'o Tensor),
    {
        let sums = Accumulator::new(metric.parts());
        Self { metric, parts, sums, spoiled: None, validated: false }
    }

    /// Changes an argument.
    pub(super) fn with(mut self, change: impl FnOnce(&mut M)) -> Self {
        change(&mut self.metric);
        self.sums = Accumulator::new(self.metric.parts());
        self
    }

    /// The reason of the first condition that holds; on other devices than the CPU it is noted.
    fn check(&mut self, conditions: Vec<(Tensor, String)>) -> anyhow::Result<()> {
        for (condition, reason) in conditions {
            if condition.device() == Device::Cpu {
                anyhow::ensure!(condition.f_int64_value(&[])? == 0, "{reason}");
            } else {
                self.spoiled = Some(match self.spoiled.take() {
                    Some(spoiled) => spoiled.f_logical_or(&condition)?,
                    None => condition,
                });
            }
        }
        Ok(())
    }
}

impl<O, M, F> Metric<O> for Of<M, F>
where
    M: Pairwise,
    F: for<'o> Fn(&'o O) -> (&'o Tensor, &'o Tensor),
{
    fn reset(&mut self) {
        self.metric.reset();
        self.sums.reset();
        self.spoiled = None;
    }

    fn update(&mut self, output: &O) -> anyhow::Result<()> {
        if !self.validated {
            self.metric.validate()?;
            self.validated = true;
        }
        let (y_pred, y) = (self.parts)(output);
        if y_pred.numel() == 0 && y.numel() == 0 {
            return Ok(());
        }
        let added = self.metric.batch(&y_pred.f_detach()?, &y.f_detach()?)?;
        self.check(added.wrong)?;
        match added.samples {
            0 => Ok(()),
            samples => self.sums.add(added.parts, samples),
        }
    }

    fn compute(&self) -> anyhow::Result<MetricValue> {
        let samples = self.sums.samples();
        anyhow::ensure!(
            samples > 0,
            "{} must have at least one example before it can be computed.",
            M::NAME
        );
        let value = self.metric.value(&self.sums.tensors()?, samples as f64)?;
        match &self.spoiled {
            Some(spoiled) => Ok(nan_where(spoiled, value)?),
            None => Ok(value),
        }
    }

    fn validate(&self) -> Result<()> {
        self.metric.validate()
    }

    fn state(&self) -> anyhow::Result<Vec<Accumulated>> {
        let mut state = self.sums.state()?;
        // Every process lists the same parts.
        if let Some(part) = state.first() {
            let spoiled = match &self.spoiled {
                Some(spoiled) => spoiled.f_to_kind(Kind::Int64)?,
                None => Tensor::f_zeros([] as [i64; 0], (Kind::Int64, part.value.device()))?,
            };
            state.push(Accumulated::new(SPOILED, spoiled, Reduce::Max));
        }
        Ok(state)
    }

    fn load_state(&mut self, state: &[Accumulated]) -> anyhow::Result<()> {
        let (spoiled, sums): (Vec<_>, Vec<_>) = state.iter().partition(|part| part.name == SPOILED);
        let sums: Vec<_> = sums.into_iter().map(Accumulated::share).collect();
        let spoiled = spoiled.first().map(|part| part.value.f_to_kind(Kind::Bool)).transpose()?;
        self.sums.load_state(&sums)?;
        self.spoiled = spoiled;
        Ok(())
    }
}

/// The name under which it is listed that a value was wrong.
const SPOILED: &str = "spoiled";

fn nan_where(spoiled: &Tensor, value: MetricValue) -> Result<MetricValue, tch::TchError> {
    Ok(match value {
        MetricValue::Tensor(tensor) => {
            let kind = if tensor.is_floating_point() { tensor.kind() } else { Kind::Double };
            let spoiled = spoiled.f_to_device(tensor.device())?;
            tensor.f_to_kind(kind)?.f_masked_fill(&spoiled, f64::NAN)?.into()
        }
        MetricValue::Number(number) => Tensor::from(number)
            .f_to_device(spoiled.device())?
            .f_masked_fill(spoiled, f64::NAN)?
            .into(),
        MetricValue::Named(parts) => {
            let part = |(name, part)| Ok((name, nan_where(spoiled, part)?));
            MetricValue::Named(parts.into_iter().map(part).collect::<Result<_, tch::TchError>>()?)
        }
    })
}

/// Takes `y_pred` and `y` out of an output that is just these two.
pub fn pair(output: &(Tensor, Tensor)) -> (&Tensor, &Tensor) {
    (&output.0, &output.1)
}

/// Constructors of metrics without required arguments.
macro_rules! of_pair {
    ($metric:ident) => {
        impl $metric {
            /// `parts` takes `y_pred` and `y` out of the output.
            pub fn of<O, F>(parts: F) -> $crate::metrics::Of<Self, F>
            where
                F: for<'o> Fn(&'o O) -> (&'o tch::Tensor, &'o tch::Tensor),
            {
                $crate::metrics::Of::new(Self::default(), parts)
            }
        }
    };
}
pub(super) use of_pair;
