use std::marker::PhantomData;

use tch::{Device, Kind, Tensor};

use super::accumulator::Accumulator;
use super::output_pair::{Computed, LeaveOut, MapY, MapYPred, OutputPair, References};
use super::{Accumulated, Metric, Reduce};
use crate::error::Result;
use crate::metrics::MetricValue;

/// The parts of a metric's state: names, and how batches and processes join them.
pub type Parts = &'static [(&'static str, Reduce)];

/// The parts that a batch adds to a metric.
#[derive(Debug, Default)]
pub struct Contribution {
    /// A tensor for each of the metric's parts, in their order. They must not share memory with the step's output.
    pub parts: Vec<Tensor>,
    /// How many samples the batch counts as; with 0 nothing is added.
    pub samples: u64,
    /// Conditions that make the value wrong, each a boolean tensor of one element, with the text of the error.
    pub wrong: Vec<(Tensor, String)>,
}

impl Contribution {
    /// Makes a contribution of these parts, which stand for `samples` samples.
    pub fn new(parts: impl Into<Vec<Tensor>>, samples: u64) -> Self {
        Self { parts: parts.into(), samples, wrong: vec![] }
    }

    /// Sets the conditions that make the value wrong.
    pub fn wrong(mut self, conditions: Vec<(Tensor, String)>) -> Self {
        self.wrong = conditions;
        self
    }
}

/// A metric of predictions and targets: the parts that each batch adds, and the value of their sums.
///
/// [`Of`] makes a [`Metric`] of it. It takes `y_pred` and `y` out of the output, keeps the sums, leaves out empty
/// batches, and saves the state:
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
    /// The metric's name in errors.
    const NAME: &'static str;

    /// Returns the parts that are accumulated, and how batches (and processes) join them.
    fn parts(&self) -> Parts;

    /// Checks the arguments; called when the metric is attached, and before the first update.
    ///
    /// # Errors
    /// Wrong arguments; the error names the first.
    fn validate(&self) -> Result<()> {
        Ok(())
    }

    /// Forgets what the metric noted of earlier batches. [`Of`] resets the sums.
    fn reset(&mut self) {}

    /// Returns the parts that a batch adds. Both tensors are detached. Empty batches are left out before.
    ///
    /// # Errors
    /// A batch that the metric cannot take, for instance tensors of wrong shapes.
    fn batch(&mut self, y_pred: &Tensor, y: &Tensor) -> anyhow::Result<Contribution>;

    /// Computes the value from the accumulated parts, over at least one sample.
    ///
    /// # Errors
    /// A computation that fails.
    fn value(&self, parts: &[Tensor], samples: f64) -> anyhow::Result<MetricValue>;
}

/// The metric that a [`Pairwise`] makes of the `y_pred` and `y` in an output.
pub struct Of<M, F> {
    pub(super) metric: M,
    parts: F,
    sums: Accumulator,
    /// Whether a condition that makes the value wrong held on a device other than the CPU, where reading it would
    /// be a host sync; `None` before the first such condition. Once true, the value is NaN.
    spoiled: Option<Tensor>,
    validated: bool,
}

crate::debug::opaque_debug!(Of<M, F>);

impl<M: Pairwise, F> Of<M, F> {
    /// Makes the metric; `parts` takes `y_pred` and `y` out of the output.
    pub fn new<O>(metric: M, parts: F) -> Of<M, References<F, O>>
    where
        F: for<'o> Fn(&'o O) -> (&'o Tensor, &'o Tensor),
    {
        let sums = Accumulator::new(metric.parts());
        let parts = References { parts, output: PhantomData };
        Of { metric, parts, sums, spoiled: None, validated: false }
    }

    /// Makes the metric of a closure that computes `y_pred` and `y`.
    pub(super) fn of_computed<O>(metric: M, parts: F) -> Of<M, Computed<F>>
    where
        F: Fn(&O) -> (Tensor, Tensor),
    {
        let sums = Accumulator::new(metric.parts());
        Of { metric, parts: Computed(parts), sums, spoiled: None, validated: false }
    }

    /// Computes the metric of `map(y_pred)` instead of `y_pred`: probabilities of logits, classes of probabilities, a
    /// slice. The closure needs no types, and runs without gradients where an engine calls it.
    ///
    /// ```
    /// use tch::Tensor;
    /// use tch_ignite::metrics::{Accuracy, Metric, pair};
    /// let mut metric = Accuracy::of(pair).map_y_pred(|logits| logits.sigmoid().round());
    /// metric.update(&(Tensor::from_slice(&[-3.0, 3.0]), Tensor::from_slice(&[0.0, 0.0])))?;
    /// assert_eq!(metric.compute()?.read()?, 0.5);
    /// # anyhow::Ok(())
    /// ```
    pub fn map_y_pred<G: Fn(&Tensor) -> Tensor>(self, map: G) -> Of<M, MapYPred<F, G>> {
        self.with_parts(|pair| MapYPred { pair, map })
    }

    /// Computes the metric with `map(y)` instead of `y`: classes of one-hot rows, a slice.
    pub fn map_y<G: Fn(&Tensor) -> Tensor>(self, map: G) -> Of<M, MapY<F, G>> {
        self.with_parts(|pair| MapY { pair, map })
    }

    /// Leaves out the places where `y` is `index`, such as padding: torch's `ignore_index`. `y` has shape (N, …), and
    /// `y_pred` the same shape or that of class scores, (N, C, …). The metric gets what is left as (M,) and (M, C). A
    /// batch of which nothing is left counts nothing. Takes one host sync, because M has to be known;
    /// `Perplexity::ignore_index` takes none.
    ///
    /// ```
    /// use tch::Tensor;
    /// use tch_ignite::metrics::{Accuracy, Metric, pair};
    /// let mut metric = Accuracy::of(pair).leave_out(-100);
    /// let scores = Tensor::from_slice2(&[[0.9, 0.1], [0.2, 0.8], [0.3, 0.7]]);
    /// metric.update(&(scores, Tensor::from_slice(&[0i64, 0, -100])))?;
    /// assert_eq!(metric.compute()?.read()?, 0.5);
    /// # anyhow::Ok(())
    /// ```
    pub fn leave_out(self, index: i64) -> Of<M, LeaveOut<F>> {
        self.with_parts(|pair| LeaveOut { pair, index })
    }

    fn with_parts<P>(self, change: impl FnOnce(F) -> P) -> Of<M, P> {
        let Self { metric, parts, sums, spoiled, validated } = self;
        Of { metric, parts: change(parts), sums, spoiled, validated }
    }

    /// Changes an argument of the metric, and starts anew.
    pub(super) fn with(mut self, change: impl FnOnce(&mut M)) -> Self {
        change(&mut self.metric);
        self.sums = Accumulator::new(self.metric.parts());
        self
    }

    /// Fails with the text of the first condition that holds; conditions on devices other than the CPU are only
    /// noted.
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

#[diagnostic::do_not_recommend]
impl<O, M, F> Metric<O> for Of<M, F>
where
    M: Pairwise,
    F: OutputPair<O>,
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
        let metric = &mut self.metric;
        let added = self.parts.with_pair(output, |y_pred, y| {
            if y_pred.numel() == 0 && y.numel() == 0 {
                return Ok(Contribution::default());
            }
            metric.batch(&y_pred.f_detach()?, &y.f_detach()?)
        })?;
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
        // Every process must list the same parts, so this one is listed even if no condition was noted.
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

/// The name of the part that notes whether a condition held.
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

/// Takes `y_pred` and `y` out of an output that is a pair of them.
pub fn pair(output: &(Tensor, Tensor)) -> (&Tensor, &Tensor) {
    (&output.0, &output.1)
}

/// Makes the constructor of a metric without required arguments.
macro_rules! of_pair {
    ($metric:ident) => {
        impl $metric {
            /// Makes the metric; `parts` takes `y_pred` and `y` out of the output.
            pub fn of<O, F>(
                parts: F,
            ) -> $crate::metrics::Of<Self, $crate::metrics::References<F, O>>
            where
                F: for<'o> Fn(&'o O) -> (&'o tch::Tensor, &'o tch::Tensor),
            {
                $crate::metrics::Of::new(Self::default(), parts)
            }

            /// Makes the metric of tensors that `parts` computes from the output, such as
            /// `|output: &Output| (output.a.softmax(-1, None) + &output.b, output.y.shallow_clone())`. Where one of them
            /// is a tensor of the output, [`of`](Self::of) with
            /// [`map_y_pred`](crate::metrics::Of::map_y_pred) or [`map_y`](crate::metrics::Of::map_y) is shorter.
            pub fn computed<O, F>(
                parts: F,
            ) -> $crate::metrics::Of<Self, $crate::metrics::Computed<F>>
            where
                F: Fn(&O) -> (tch::Tensor, tch::Tensor),
            {
                $crate::metrics::Of::of_computed(Self::default(), parts)
            }
        }
    };
}
pub(super) use of_pair;
