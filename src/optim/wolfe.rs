//! The search of L-BFGS for a length of its step that satisfies the strong Wolfe conditions, as in torch.optim.LBFGS.

use tch::Tensor;

use crate::error::Error;

/// The conditions: the loss falls at least by this share of what the slope promises, and the slope falls to this share.
const C1: f64 = 1e-4;
const C2: f64 = 0.9;

/// The search ends where no parameter would move by more than this between the ends of the bracket. torch has this number
/// whatever its `tolerance_change` is.
const LEAST_CHANGE: f64 = 1e-9;

/// The loss and its gradient at one point.
pub(super) struct Point {
    pub(super) loss: f64,
    pub(super) gradient: Tensor,
}

/// A point on the line, `t` from the start.
struct Tried {
    t: f64,
    slope: f64,
    point: Point,
}

/// The point that a search found.
pub(super) struct Found {
    pub(super) t: f64,
    pub(super) point: Point,
    /// How often the loss was evaluated.
    pub(super) evaluations: u64,
}

/// A search along the direction `d`.
pub(super) struct Search<'d> {
    pub(super) d: &'d Tensor,
    pub(super) start: Point,
    /// The slope at the start, which is below 0.
    pub(super) slope: f64,
    /// The most points that are tried, after the first.
    pub(super) most: u64,
}

impl Search<'_> {
    /// Searches from the length `t`; `evaluate` gives the point of a length.
    pub(super) fn run(
        self,
        t: f64,
        mut evaluate: impl FnMut(f64) -> anyhow::Result<Point>,
    ) -> anyhow::Result<Found> {
        let failed = |error| Error::libtorch("a step of LBFGS", error);
        let d = self.d;
        let mut evaluations = 0;
        let mut tried = |t: f64| -> anyhow::Result<Tried> {
            evaluations += 1;
            let point = evaluate(t)?;
            let slope = point.gradient.f_dot(d).and_then(f64::try_from).map_err(failed)?;
            Ok(Tried { t, slope, point })
        };
        let length = d.f_abs().and_then(|d| d.f_max()).and_then(f64::try_from).map_err(failed)?;
        let (loss, slope) = (self.start.loss, self.slope);
        let is_too_high = |now: &Tried| now.point.loss > loss + C1 * now.t * slope;
        let is_flat = |now: &Tried| now.slope.abs() <= -C2 * slope;
        let start = |point: Point| Tried { t: 0., slope, point };
        let gradient = self.start.gradient.shallow_clone();
        let again = move || start(Point { loss, gradient: gradient.shallow_clone() });

        // First a bracket is sought in which there must be a point that satisfies the conditions.
        let mut before = again();
        let mut now = tried(t)?;
        let mut tries = 0;
        let mut bracket = loop {
            if tries == self.most {
                break [again(), now];
            }
            if is_too_high(&now) || (tries > 1 && now.point.loss >= before.point.loss) {
                break [before, now];
            }
            if is_flat(&now) {
                return Ok(Found { t: now.t, point: now.point, evaluations });
            }
            if now.slope >= 0. {
                break [before, now];
            }
            let bounds = (now.t + 0.01 * (now.t - before.t), now.t * 10.);
            let next = interpolated(&before, &now, bounds);
            (before, now) = (now, tried(next)?);
            tries += 1;
        };

        // Then it is made smaller. `low` is the place of its end with the smaller loss.
        let lower = |bracket: &[Tried; 2]| match bracket[0].point.loss <= bracket[1].point.loss {
            true => 0,
            false => 1,
        };
        let mut low = lower(&bracket);
        let mut was_near_an_end = false;
        while tries < self.most {
            let ends = (bracket[0].t.min(bracket[1].t), bracket[0].t.max(bracket[1].t));
            let width = ends.1 - ends.0;
            if width * length < LEAST_CHANGE {
                break;
            }
            let mut next = interpolated(&bracket[0], &bracket[1], ends);
            // A point near an end makes little progress: the second time it is moved away from there.
            let margin = 0.1 * width;
            if (ends.1 - next).min(next - ends.0) < margin {
                if was_near_an_end || next >= ends.1 || next <= ends.0 {
                    next = match (next - ends.1).abs() < (next - ends.0).abs() {
                        true => ends.1 - margin,
                        false => ends.0 + margin,
                    };
                    was_near_an_end = false;
                } else {
                    was_near_an_end = true;
                }
            } else {
                was_near_an_end = false;
            }
            let now = tried(next)?;
            tries += 1;
            let high = 1 - low;
            if is_too_high(&now) || now.point.loss >= bracket[low].point.loss {
                bracket[high] = now;
                low = lower(&bracket);
                continue;
            }
            let is_found = is_flat(&now);
            let turns = now.slope * (bracket[high].t - bracket[low].t) >= 0.;
            let old_low = std::mem::replace(&mut bracket[low], now);
            if is_found {
                break;
            }
            if turns {
                bracket[high] = old_low;
            }
        }
        let [first, second] = bracket;
        let Tried { t, point, .. } = if low == 0 { first } else { second };
        Ok(Found { t, point, evaluations })
    }
}

/// The lowest point of the cubic through two points with these slopes, within the bounds.
fn interpolated(a: &Tried, b: &Tried, (least, most): (f64, f64)) -> f64 {
    let d1 = a.slope + b.slope - 3. * (a.point.loss - b.point.loss) / (a.t - b.t);
    let square = d1 * d1 - a.slope * b.slope;
    if square.is_nan() || square < 0. {
        return (least + most) / 2.;
    }
    let d2 = square.sqrt();
    let (near, far) = if a.t <= b.t { (a, b) } else { (b, a) };
    let share = (far.slope + d2 - d1) / (far.slope - near.slope + 2. * d2);
    let place = far.t - (far.t - near.t) * share;
    // NaN stays, as in Python.
    let place = if least > place { least } else { place };
    if most < place { most } else { place }
}
