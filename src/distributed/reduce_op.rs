use crate::bridge::Reduction;

/// A way to combine the values of all ranks into one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ReduceOp {
    /// The sum.
    Sum,
    /// The mean.
    Avg,
    /// The product.
    Product,
    /// The smallest.
    Min,
    /// The largest.
    Max,
}

impl ReduceOp {
    /// The bridge's name for this reduction.
    pub(super) fn reduction(self) -> Reduction {
        match self {
            Self::Sum => Reduction::Sum,
            Self::Avg => Reduction::Avg,
            Self::Product => Reduction::Product,
            Self::Min => Reduction::Min,
            Self::Max => Reduction::Max,
        }
    }

    /// Combines the values of all ranks in the order of the ranks, so that all ranks get the same bits. NaN if a value
    /// is NaN.
    pub(super) fn fold(self, values: impl ExactSizeIterator<Item = f64>) -> f64 {
        let count = values.len() as f64;
        let keep_nan =
            |a: f64, b: f64, pick: f64| if a.is_nan() || b.is_nan() { f64::NAN } else { pick };
        let folded = values.reduce(|a, b| match self {
            Self::Sum | Self::Avg => a + b,
            Self::Product => a * b,
            Self::Min => keep_nan(a, b, a.min(b)),
            Self::Max => keep_nan(a, b, a.max(b)),
        });
        let folded = folded.unwrap_or(f64::NAN);
        if self == Self::Avg { folded / count } else { folded }
    }
}

#[cfg(test)]
mod tests {
    use super::ReduceOp::*;

    #[test]
    fn values_are_folded_in_order() {
        let of = |op: super::ReduceOp, values: &[f64]| op.fold(values.iter().copied());
        let values = [3., 1., 2.];
        for (op, expected) in [(Sum, 6.), (Avg, 2.), (Product, 6.), (Min, 1.), (Max, 3.)] {
            assert_eq!(of(op, &values), expected, "{op:?}");
            assert!(of(op, &[1., f64::NAN, 2.]).is_nan(), "{op:?}");
            assert_eq!(of(op, &[7.]), 7., "{op:?}");
        }
        assert_eq!(of(Sum, &[1e16, 1., -1e16]), (1e16 + 1.) - 1e16);
    }
}
