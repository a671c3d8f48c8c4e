use std::collections::HashMap;
use std::hash::Hash;

/// Counts how often each run of `n` tokens occurs.
pub(super) fn ngrams<T: Eq + Hash>(tokens: &[T], n: usize) -> HashMap<&[T], u64> {
    let mut counts = HashMap::new();
    for ngram in tokens.windows(n) {
        *counts.entry(ngram).or_default() += 1;
    }
    counts
}

/// Counts the n-grams that `a` has in common with `b`, and all n-grams of `a`.
pub(super) fn common<T: Eq + Hash>(a: &HashMap<&[T], u64>, b: &HashMap<&[T], u64>) -> (u64, u64) {
    let both = a.iter().map(|(ngram, count)| (*count).min(b.get(ngram).copied().unwrap_or(0)));
    (both.sum(), a.values().sum())
}

/// Returns the length of the longest common subsequence.
pub(super) fn lcs<T: Eq>(a: &[T], b: &[T]) -> u64 {
    let mut row = vec![0; b.len() + 1];
    for x in a {
        let mut diagonal = 0;
        for (j, y) in b.iter().enumerate() {
            let above = row[j + 1];
            row[j + 1] = if x == y { diagonal + 1 } else { above.max(row[j]) };
            diagonal = above;
        }
    }
    row[b.len()]
}
