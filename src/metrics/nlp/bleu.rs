use std::collections::HashMap;
use std::hash::Hash;

use super::ngrams::{common, ngrams};
use super::{listed, unlisted};
use crate::error::{Error, Result};
use crate::metrics::MetricValue;
use crate::metrics::{Accumulated, Metric};

/// How [`Bleu`] treats n-grams that do not occur.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Smooth {
    /// No smoothing: the score is 0.
    #[default]
    NoSmooth,
    /// Counts 0.1 matches for each n that has none.
    Smooth1,
    /// Adds 1 to numerator and denominator for n of 2 and more; no denominator is less than 1.
    NltkSmooth2,
    /// Adds 1 to numerator and denominator for n of 2 and more.
    Smooth2,
}

/// How [`Bleu`] averages over sentences.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum BleuAverage {
    /// Takes the mean of the sentences' scores.
    #[default]
    Macro,
    /// Sums the counts over sentences, and scores the sums once.
    Micro,
}

/// How many n-grams of a translation occur in its references: ignite's `Bleu`, the geometric mean of
/// the clipped precisions of 1 to n tokens, times the penalty of being too short (Papineni and others,
/// 2002), in [0, 1].
///
/// Tokens are of any type that can be hashed. The score is computed in f64, where ignite rounds to float32 without
/// smoothing.
///
/// ```
/// use tch_ignite::metrics::{Metric, nlp::Bleu};
/// type Output = (Vec<Vec<&'static str>>, Vec<Vec<Vec<&'static str>>>);
/// let mut bleu = Bleu::of(|output: &Output| (&output.0[..], &output.1[..])).ngram(2);
/// let (candidate, reference) = (vec!["the", "black", "cat"], vec!["the", "black", "dog"]);
/// bleu.update(&(vec![candidate], vec![vec![reference]]))?;
/// assert!((bleu.compute()?.read()? - (2f64 / 3. * 1. / 2.).sqrt()).abs() < 1e-12);
/// # anyhow::Ok(())
/// ```
pub struct Bleu<F> {
    tokens: F,
    ngram: usize,
    smooth: Smooth,
    average: BleuAverage,
    /// The sum of the sentences' scores, and the number of sentences.
    scores: [f64; 2],
    counts: Counts,
}

crate::debug::opaque_debug!(Bleu<F>);

/// Matches and n-grams of the candidates for each n, and the lengths of candidates and closest references.
#[derive(Debug, Clone, Default)]
struct Counts {
    matches: Vec<f64>,
    all: Vec<f64>,
    lengths: [f64; 2],
}

impl<F> Bleu<F> {
    /// Makes the metric; `tokens` takes the candidates, and for each a list of references, out of the output.
    pub fn of<O, T>(tokens: F) -> Self
    where
        F: for<'o> Fn(&'o O) -> (&'o [Vec<T>], &'o [Vec<Vec<T>>]),
    {
        let (smooth, average) = (Smooth::default(), BleuAverage::default());
        Self { tokens, ngram: 4, smooth, average, scores: [0.; 2], counts: Counts::default() }
    }

    /// Sets the longest run of tokens that is looked at, 4 unless given.
    pub fn ngram(mut self, ngram: usize) -> Self {
        self.ngram = ngram;
        self
    }

    /// Sets how n-grams that do not occur are treated; no smoothing unless given.
    pub fn smooth(mut self, smooth: Smooth) -> Self {
        self.smooth = smooth;
        self
    }

    /// Sets how sentences are averaged; the mean of their scores unless given.
    pub fn average(mut self, average: BleuAverage) -> Self {
        self.average = average;
        self
    }

    fn score(&self, counts: &Counts) -> f64 {
        let none = |matches: &f64| *matches == 0.;
        let unsmoothed = self.smooth == Smooth::NoSmooth && counts.matches.iter().any(none);
        if unsmoothed || counts.matches.first().is_none_or(none) {
            return 0.;
        }
        let precision = |(n, (matches, all)): (usize, (&f64, &f64))| match self.smooth {
            Smooth::Smooth1 if *matches == 0. => 0.1 / all.max(1.),
            Smooth::NoSmooth | Smooth::Smooth1 => matches / all.max(1.),
            Smooth::NltkSmooth2 if n > 0 => (matches + 1.) / (all.max(1.) + 1.),
            Smooth::Smooth2 if n > 0 => (matches + 1.) / (all + 1.),
            Smooth::NltkSmooth2 | Smooth::Smooth2 => matches / all,
        };
        let precisions = counts.matches.iter().zip(&counts.all).enumerate().map(precision);
        let logarithm = precisions.map(f64::ln).sum::<f64>() / self.ngram as f64;
        let [length, reference] = counts.lengths;
        let penalty = if length < reference { (1. - reference / length).exp() } else { 1. };
        penalty * logarithm.exp()
    }
}

impl Counts {
    fn new<T: Eq + Hash>(candidate: &[T], references: &[Vec<T>], ngram: usize) -> Self {
        let length = candidate.len();
        let closest = references.iter().map(Vec::len).min_by_key(|n| (n.abs_diff(length), *n));
        let lengths = [length as f64, closest.unwrap_or(0) as f64];
        let mut counts = Self { lengths, ..Self::default() };
        for n in 1..=ngram {
            let mut most: HashMap<&[T], u64> = HashMap::new();
            for reference in references {
                for (ngram, count) in ngrams(reference, n) {
                    let most = most.entry(ngram).or_default();
                    *most = count.max(*most);
                }
            }
            let (matches, all) = common(&ngrams(candidate, n), &most);
            counts.matches.push(matches as f64);
            counts.all.push(all as f64);
        }
        counts
    }

    fn add(&mut self, other: &Self) {
        fn add(a: &mut [f64], b: &[f64]) {
            a.iter_mut().zip(b).for_each(|(a, b)| *a += b);
        }
        self.matches.resize(other.matches.len(), 0.);
        self.all.resize(other.all.len(), 0.);
        add(&mut self.matches, &other.matches);
        add(&mut self.all, &other.all);
        add(&mut self.lengths, &other.lengths);
    }
}

impl<O, T, F> Metric<O> for Bleu<F>
where
    T: Eq + Hash + 'static,
    F: for<'o> Fn(&'o O) -> (&'o [Vec<T>], &'o [Vec<Vec<T>>]),
{
    fn reset(&mut self) {
        self.scores = [0.; 2];
        self.counts = Counts::default();
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
        let sentences = candidates.iter().zip(references);
        let sentences: Vec<_> =
            sentences.map(|(text, known)| Counts::new(text, known, self.ngram)).collect();
        for counts in sentences {
            match self.average {
                BleuAverage::Macro => self.scores[0] += self.score(&counts),
                BleuAverage::Micro => self.counts.add(&counts),
            }
            self.scores[1] += 1.;
        }
        Ok(())
    }

    fn compute(&self) -> anyhow::Result<MetricValue> {
        let [sum, sentences] = self.scores;
        anyhow::ensure!(
            sentences > 0.,
            "Bleu must have at least one example before it can be computed."
        );
        Ok(match self.average {
            BleuAverage::Macro => sum / sentences,
            BleuAverage::Micro => self.score(&self.counts),
        }
        .into())
    }

    fn validate(&self) -> Result<()> {
        match self.ngram > 0 {
            true => Ok(()),
            false => Err(Error::invalid("ngram order must be greater than zero (got: 0)")),
        }
    }

    fn state(&self) -> anyhow::Result<Vec<Accumulated>> {
        let Counts { matches, all, lengths } = &self.counts;
        let mut counts = [&matches[..], &all[..]].concat();
        counts.resize(2 * self.ngram, 0.);
        listed("sums", &[&counts[..], &lengths[..], &self.scores[..]].concat())
    }

    fn load_state(&mut self, state: &[Accumulated]) -> anyhow::Result<()> {
        let n = self.ngram;
        let sums = unlisted("sums", state, 2 * n + 4)?;
        let lengths = [sums[2 * n], sums[2 * n + 1]];
        self.counts = Counts { matches: sums[..n].into(), all: sums[n..2 * n].into(), lengths };
        self.scores = [sums[2 * n + 2], sums[2 * n + 3]];
        Ok(())
    }
}
