use super::{listed, unlisted};
use crate::metrics::MetricValue;
use crate::metrics::{Accumulated, Metric};

/// Counts the least number of insertions, deletions and replacements that turn `a` into `b`: Levenshtein's distance.
fn edit_distance<T: PartialEq>(a: &[T], b: &[T]) -> usize {
    let mut row: Vec<_> = (0..=b.len()).collect();
    for (i, x) in a.iter().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let above = row[j + 1];
            row[j + 1] = if x == y { diagonal } else { diagonal.min(above).min(row[j]) + 1 };
            diagonal = above;
        }
    }
    row[b.len()]
}

macro_rules! error_rate {
    ($name:ident, $label:literal, $units:ident, $(#[$doc:meta])*) => {
        $(#[$doc])*
        pub struct $name<F> {
            texts: F,
            /// Edits, units (characters or words) of the references, and pairs of texts.
            sums: Vec<f64>,
        }

        crate::debug::opaque_debug!($name<F>);

        impl<F> $name<F> {
            /// Makes the metric; `texts` takes the predicted texts and as many references out of the output.
            pub fn of<O, S: AsRef<str>>(texts: F) -> Self
            where
                F: for<'o> Fn(&'o O) -> (&'o [S], &'o [S]),
            {
                Self { texts, sums: vec![0.; 3] }
            }
        }

        impl<O, S: AsRef<str> + 'static, F: for<'o> Fn(&'o O) -> (&'o [S], &'o [S])> Metric<O>
            for $name<F>
        {
            fn reset(&mut self) {
                self.sums.fill(0.);
            }

            fn update(&mut self, output: &O) -> anyhow::Result<()> {
                let (y_pred, y) = (self.texts)(output);
                anyhow::ensure!(
                    y_pred.len() == y.len(),
                    "y_pred and y must have the same length. Got y_pred of length {} and y of length {}.",
                    y_pred.len(),
                    y.len()
                );
                for (y_pred, y) in y_pred.iter().zip(y) {
                    let (y_pred, y) = ($units(y_pred.as_ref()), $units(y.as_ref()));
                    self.sums[0] += edit_distance(&y, &y_pred) as f64;
                    self.sums[1] += y.len() as f64;
                    self.sums[2] += 1.;
                }
                Ok(())
            }

            fn compute(&self) -> anyhow::Result<MetricValue> {
                let [errors, units, pairs] = self.sums[..] else { anyhow::bail!("three sums") };
                anyhow::ensure!(
                    pairs > 0.,
                    concat!($label, " must have at least one example before it can be computed.")
                );
                Ok(match (errors, units) {
                    (0., 0.) => 0.,
                    (_, 0.) => 1.,
                    _ => errors / units,
                }
                .into())
            }

            fn state(&self) -> anyhow::Result<Vec<Accumulated>> {
                listed("errors", &self.sums)
            }

            fn load_state(&mut self, state: &[Accumulated]) -> anyhow::Result<()> {
                self.sums = unlisted("errors", state, 3)?;
                Ok(())
            }
        }
    };
}

fn characters(text: &str) -> Vec<char> {
    text.chars().collect()
}

fn words(text: &str) -> Vec<&str> {
    text.split_whitespace().collect()
}

error_rate!(
    CharacterErrorRate,
    "CharacterErrorRate",
    characters,
    /// The number of edits that make the predicted text the reference, over the characters of the references:
    /// ignite's `CharacterErrorRate`. The value is 1 where the references are empty and there are edits.
    ///
    /// ```
    /// use tch_ignite::metrics::{Metric, nlp::CharacterErrorRate};
    /// type Texts = [Vec<String>; 2];
    /// let mut metric = CharacterErrorRate::of(|texts: &Texts| (&texts[0][..], &texts[1][..]));
    /// metric.update(&[vec!["kitten".into()], vec!["sitting".into()]])?;
    /// assert_eq!(metric.compute()?.read()?, 3. / 7.);
    /// # anyhow::Ok(())
    /// ```
);

error_rate!(
    WordErrorRate,
    "WordErrorRate",
    words,
    /// The number of edits that make the predicted words those of the reference, over the words of the references.
    /// White space separates words. The value is 1 where the references are empty and there are edits.
    ///
    /// ```
    /// use tch_ignite::metrics::{Metric, nlp::WordErrorRate};
    /// type Texts = [Vec<String>; 2];
    /// let mut metric = WordErrorRate::of(|texts: &Texts| (&texts[0][..], &texts[1][..]));
    /// metric.update(&[vec!["the cat".into()], vec!["the black cat".into()]])?;
    /// assert_eq!(metric.compute()?.read()?, 1. / 3.);
    /// # anyhow::Ok(())
    /// ```
);
