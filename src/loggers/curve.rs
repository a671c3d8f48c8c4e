/// Largest number of points kept of a curve; it must be even.
const POINTS: usize = 4000;

/// A curve whose points are thinned out by half whenever there are too many.
#[derive(Debug, Default)]
pub(super) struct Curve {
    pub(super) points: Vec<(u64, f64)>,
    /// Number of values that a point stands for. The point is the last of them.
    stride: u64,
    /// Number of values since the last point that stays.
    since: u64,
}

impl Curve {
    pub(super) fn push(&mut self, step: u64, value: f64) {
        if self.points.last().is_some_and(|(last, _)| *last >= step) {
            self.points.retain(|(earlier, _)| *earlier < step);
            self.since = 0;
        }
        let stride = self.stride.max(1);
        // The latest value is always the last point.
        match self.since == 0 || self.points.is_empty() {
            true => self.points.push((step, value)),
            false => *self.points.last_mut().unwrap_or(&mut (0, 0.)) = (step, value),
        }
        self.since = (self.since + 1) % stride;
        if self.points.len() >= POINTS && self.since == 0 {
            let mut index = 0;
            self.points.retain(|_| {
                index += 1;
                index % 2 == 0
            });
            self.stride = stride * 2;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_curves_are_thinned_out() {
        let mut curve = Curve::default();
        for step in 1..=100_000 {
            curve.push(step, step as f64);
        }
        assert!((POINTS / 2..=POINTS).contains(&curve.points.len()), "{}", curve.points.len());
        assert_eq!(curve.points.last(), Some(&(100_000, 100_000.)));
        assert!(curve.points.is_sorted_by(|a, b| a.0 < b.0));
    }
}
