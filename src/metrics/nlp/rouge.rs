use std::hash::Hash;

use super::ngrams::{common, lcs, ngrams};
use super::{listed, unlisted};
use crate::error::{Error, Result};
use crate::metrics::MetricValue;
use crate::metrics::{Accumulated, Metric};

/// How [`Rouge`] compares a summary with a reference.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RougeVariant {
    /// Compares runs of so many tokens.
    N(usize),
    /// Compares by the longest common subsequence.
    L,
}

/// How [`Rouge`] treats several references.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum MultiRef {
    /// Adds up the counts of all references.
    #[default]
    Average,
    /// Takes the reference with the highest recall.
    Best,
}

/// How much a summary and its references have in common: ignite's `Rouge` (Lin, 2004).
///
/// For each variant the value has the means over summaries of precision, recall and F-measure, as
/// `Rouge-1-P`, `Rouge-1-R`, `Rouge-1-F`, …, `Rouge-L-F`. Tokens are of any type that can be hashed.
///
/// ```
/// use tch_ignite::metrics::{Metric, nlp::{Rouge, RougeVariant}};
/// type Output = (Vec<Vec<&'static str>>, Vec<Vec<Vec<&'static str>>>);
/// let mut rouge = Rouge::of(|output: &Output| (&output.0[..], &output.1[..]))
///     .variants([RougeVariant::N(1), RougeVariant::L]);
/// let (candidate, reference) = (vec!["the", "cat"], vec!["the", "black", "cat", "sat"]);
/// rouge.update(&(vec![candidate], vec![vec![reference]]))?;
/// let numbers = rouge.compute()?.flatten("rouge")?;
/// assert_eq!(numbers[1], ("rouge/Rouge-1-R".into(), 0.5));
/// assert_eq!(numbers[3], ("rouge/Rouge-L-P".into(), 1.));
/// # anyhow::Ok(())
/// ```
pub struct Rouge<F> {
    tokens: F,
    variants: Vec<RougeVariant>,
    multiref: MultiRef,
    alpha: f64,
    /// For each variant the sums of precision, recall and F, then the number of summaries.
    sums: Vec<f64>,
}

crate::debug::opaque_debug!(Rouge<F>);

impl<F> Rouge<F> {
    /// Makes the metric; `tokens` takes the summaries, and for each a list of references, out of the output.
    pub fn of<O, T>(tokens: F) -> Self
    where
        F: for<'o> Fn(&'o O) -> (&'o [Vec<T>], &'o [Vec<Vec<T>>]),
    {
        use RougeVariant::{L, N};
        let (multiref, alpha) = (MultiRef::default(), 0.);
        Self { tokens, variants: vec![], multiref, alpha, sums: vec![] }.variants([
            N(1),
            N(2),
            N(4),
            L,
        ])
    }

    /// Sets the variants; runs of 1, 2 and 4 tokens and the longest common subsequence unless given.
    pub fn variants(mut self, variants: impl Into<Vec<RougeVariant>>) -> Self {
        self.variants = variants.into();
        self.sums = vec![0.; 3 * self.variants.len() + 1];
        self
    }

    /// Sets how several references are treated; their counts are added unless given.
    pub fn multiref(mut self, multiref: MultiRef) -> Self {
        self.multiref = multiref;
        self
    }

    /// Sets the weight of recall against precision in F = p r / ((1 − α) p + α r), in [0, 1]. The default is 0, which
    /// makes F the recall.
    pub fn alpha(mut self, alpha: f64) -> Self {
        self.alpha = alpha;
        self
    }

    /// Computes precision and recall of a candidate against all references.
    fn rates<T: Eq + Hash>(
        &self,
        variant: RougeVariant,
        candidate: &[T],
        references: &[Vec<T>],
    ) -> (f64, f64) {
        // Three counts for each reference: in common, of the candidate, of the reference.
        let counts = references.iter().map(|reference| match variant {
            RougeVariant::N(n) => {
                let (a, b) = (ngrams(candidate, n), ngrams(reference, n));
                let (both, all) = common(&a, &b);
                [both, all, b.values().sum()]
            }
            RougeVariant::L => {
                [lcs(candidate, reference), candidate.len() as u64, reference.len() as u64]
            }
        });
        let share = |part: u64, all: u64| if all > 0 { part as f64 / all as f64 } else { 0. };
        let [both, of_candidate, of_reference] = match self.multiref {
            MultiRef::Average => counts.fold([0; 3], |[a, b, c], [x, y, z]| [a + x, b + y, c + z]),
            MultiRef::Best => {
                let better = |best: [u64; 3], new: [u64; 3]| {
                    if share(new[0], new[2]) > share(best[0], best[2]) { new } else { best }
                };
                counts.reduce(better).unwrap_or_default()
            }
        };
        (share(both, of_candidate), share(both, of_reference))
    }
}

impl<O, T, F> Metric<O> for Rouge<F>
where
    T: Eq + Hash + 'static,
    F: for<'o> Fn(&'o O) -> (&'o [Vec<T>], &'o [Vec<Vec<T>>]),
{
    fn reset(&mut self) {
        self.sums.fill(0.);
    }

    fn update(&mut self, output: &O) -> anyhow::Result<()> {
        <Self as Metric<O>>::validate(self)?;
        let (candidates, references) = (self.tokens)(output);
        anyhow::ensure!(
            candidates.len() == references.len(),
            "nb of candidates should be equal to nb of reference lists ({} != {})",
            candidates.len(),
            references.len()
        );
        for (candidate, references) in candidates.iter().zip(references) {
            let mut added = vec![];
            for variant in &self.variants {
                let (precision, recall) = self.rates(*variant, candidate, references);
                let below = (1. - self.alpha) * precision + self.alpha * recall;
                let f = if precision * recall > 0. { precision * recall / below } else { 0. };
                added.extend([precision, recall, f]);
            }
            added.push(1.);
            self.sums.iter_mut().zip(added).for_each(|(sum, added)| *sum += added);
        }
        Ok(())
    }

    fn compute(&self) -> anyhow::Result<MetricValue> {
        let (summaries, sums) = self.sums.split_last().unwrap_or((&0., &[]));
        anyhow::ensure!(
            *summaries > 0.,
            "Rouge metric must have at least one example before being computed"
        );
        let mut values = vec![];
        for (variant, sums) in self.variants.iter().zip(sums.chunks(3)) {
            let name = match variant {
                RougeVariant::N(n) => n.to_string(),
                RougeVariant::L => "L".into(),
            };
            for (letter, sum) in ["P", "R", "F"].iter().zip(sums) {
                values.push((format!("Rouge-{name}-{letter}"), (sum / summaries).into()));
            }
        }
        Ok(MetricValue::Named(values))
    }

    fn validate(&self) -> Result<()> {
        if !(0. ..=1.).contains(&self.alpha) {
            return Err(Error::invalid(format!(
                "alpha must be in interval [0, 1] (got : {})",
                self.alpha
            )));
        }
        if self.variants.contains(&RougeVariant::N(0)) {
            return Err(Error::invalid("ngram order must be greater than zero (got : 0)"));
        }
        Ok(())
    }

    fn state(&self) -> anyhow::Result<Vec<Accumulated>> {
        listed("sums", &self.sums)
    }

    fn load_state(&mut self, state: &[Accumulated]) -> anyhow::Result<()> {
        self.sums = unlisted("sums", state, self.sums.len())?;
        Ok(())
    }
}
