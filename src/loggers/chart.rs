//! Curves as SVG, for the charts of the report.

use std::fmt::{Result, Write};

use super::curve::Curve;

const WIDTH: f64 = 480.;
const HEIGHT: f64 = 240.;
const LEFT: f64 = 58.;
const RIGHT: f64 = 14.;
const TOP: f64 = 10.;
const BOTTOM: f64 = 24.;

/// Number of distinct colours of the page; more curves share a rainbow.
pub(super) const COLOURS: usize = 8;
/// Smallest distance in pixels between drawn points, which keeps the files of long curves small.
const PIXEL: f64 = 0.5;
/// Lines of more points than this are drawn thinner.
const DENSE: usize = 600;
/// Positive values whose ratio is larger are drawn on a logarithmic axis.
const DECADES: f64 = 1000.;

pub(super) fn escaped(text: &str) -> String {
    let text = text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    text.replace('"', "&quot;")
}

/// A number with four significant digits.
pub(super) fn short(value: f64) -> String {
    let size = value.abs();
    match value {
        _ if value == 0. => "0".into(),
        _ if (1e-3..1e5).contains(&size) => {
            let decimals = (3 - size.log10().floor() as i32).max(0) as usize;
            let text = format!("{value:.decimals$}");
            match text.contains('.') {
                true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
                false => text,
            }
        }
        _ if value.is_nan() => "NaN".into(),
        _ if value.is_infinite() => if value > 0. { "∞" } else { "−∞" }.into(),
        _ => format!("{value:.2e}"),
    }
}

/// The colour of a curve, as CSS.
pub(super) fn colour(index: usize, of: usize) -> String {
    match of <= COLOURS {
        true => format!("var(--c{index})"),
        false => format!("hsl({} 70% var(--light))", 300 * index / of),
    }
}

/// An axis from the smallest to the largest value, with marks.
struct Axis {
    low: f64,
    high: f64,
    is_log: bool,
    /// Distance between marks; in decades on a logarithmic axis.
    step: f64,
}

impl Axis {
    fn of(values: impl Iterator<Item = f64>, may_be_log: bool) -> Option<Self> {
        let (low, high) = values
            .filter(|value| value.is_finite())
            .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), v| (low.min(v), high.max(v)));
        if low > high {
            return None;
        }
        if may_be_log && low > 0. && high / low > DECADES {
            let (low, high) = (low.log10(), high.log10());
            let step = ((high - low) / 5.).ceil().max(1.);
            return Some(Self { low, high, is_log: true, step });
        }
        let (low, high) = match low == high {
            true => (low - low.abs() * 0.1 - 1e-9, high + high.abs() * 0.1 + 1e-9),
            false => (low, high),
        };
        // Halving first keeps the difference of two huge numbers finite.
        let rough = (high / 2. - low / 2.) / 3.;
        let power = 10f64.powf(rough.log10().floor());
        let step = [1., 2., 5., 10.].map(|m| m * power).into_iter().find(|step| *step >= rough);
        Some(Self { low, high, is_log: false, step: step.unwrap_or(rough) })
    }

    fn share(&self, value: f64) -> f64 {
        let value = if self.is_log { value.log10() } else { value };
        (value / 2. - self.low / 2.) / (self.high / 2. - self.low / 2.)
    }

    fn marks(&self) -> impl Iterator<Item = f64> {
        let first = (self.low / self.step).ceil();
        let marks = (0..12).map(move |k| (first + f64::from(k)) * self.step);
        let marks = marks.take_while(|mark| *mark <= self.high);
        marks.map(|mark| if self.is_log { 10f64.powf(mark) } else { mark })
    }

    /// A label with as many decimals as are needed to tell two marks apart.
    fn label(&self, value: f64) -> String {
        let size = self.low.abs().max(self.high.abs());
        if self.is_log || !(1e-3..1e6).contains(&size) {
            return short(value);
        }
        let decimals = (-self.step.log10().floor()).clamp(0., 12.) as usize;
        format!("{value:.decimals$}")
    }
}

fn step_label(step: f64) -> String {
    match step {
        _ if step >= 1e6 && step % 1e5 == 0. => format!("{}M", step / 1e6),
        _ if step >= 1e4 && step % 100. == 0. => format!("{}k", step / 1e3),
        _ => step.to_string(),
    }
}

/// Draws lines between the finite points, and red marks at the bottom where a value is not finite.
pub(super) fn draw(page: &mut String, curves: &[(&str, &Curve)]) -> Result {
    let points = || curves.iter().flat_map(|(_, curve)| &curve.points);
    let steps = Axis::of(points().map(|(step, _)| *step as f64), false);
    let values = Axis::of(points().map(|(_, value)| *value), true);
    let (Some(steps), Some(values)) = (steps, values) else {
        return writeln!(page, "<p class=\"nan\">no finite numbers</p>");
    };
    let x = |step: u64| LEFT + steps.share(step as f64) * (WIDTH - LEFT - RIGHT);
    let y = |value: f64| HEIGHT - BOTTOM - values.share(value) * (HEIGHT - BOTTOM - TOP);
    writeln!(page, "<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\">")?;
    let (right, bottom) = (WIDTH - RIGHT, HEIGHT - BOTTOM);
    for value in values.marks() {
        let at = y(value);
        writeln!(page, "<path class=\"grid\" d=\"M{LEFT} {at:.1}H{right}\"/>")?;
        let (left, at, label) = (LEFT - 6., at + 3.5, values.label(value));
        writeln!(page, "<text x=\"{left}\" y=\"{at:.1}\" text-anchor=\"end\">{label}</text>")?;
    }
    for step in steps.marks().filter(|step| step.fract() == 0.) {
        let (at, below, label) = (x(step as u64), HEIGHT - 7., step_label(step));
        writeln!(page, "<path class=\"grid\" d=\"M{at:.1} {bottom}v4\"/>")?;
        writeln!(page, "<text x=\"{at:.1}\" y=\"{below}\" text-anchor=\"middle\">{label}</text>")?;
    }
    writeln!(page, "<path class=\"axis\" d=\"M{LEFT} {bottom}H{right}\"/>")?;
    for (index, (tag, curve)) in curves.iter().enumerate() {
        let (colour, tag) = (colour(index, curves.len()), escaped(tag));
        for part in curve.points.split(|(_, value)| !value.is_finite()) {
            match part {
                [] => {}
                [(step, value)] => writeln!(
                    page,
                    "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"2.5\" style=\"fill:{colour}\"><title>{tag}</title></circle>",
                    x(*step),
                    y(*value)
                )?,
                part => {
                    let class = if part.len() > DENSE { " class=\"dense\"" } else { "" };
                    write!(page, "<polyline{class} style=\"stroke:{colour}\" points=\"")?;
                    let part = part.iter().map(|(step, value)| (x(*step), y(*value)));
                    thinned_out(part, |x, y| write!(page, "{x:.1},{y:.1} "))?;
                    writeln!(page, "\"><title>{tag}</title></polyline>")?;
                }
            }
        }
    }
    let mut marks = points().filter(|(_, value)| !value.is_finite()).map(|(step, _)| x(*step));
    if let Some(first) = marks.next() {
        write!(page, "<path class=\"bad\" d=\"M{first:.1} {bottom}v-7")?;
        let mut last = first;
        for at in marks.filter(|at| {
            let is_new = (at - last).abs() >= PIXEL;
            last = if is_new { *at } else { last };
            is_new
        }) {
            write!(page, "M{at:.1} {bottom}v-7")?;
        }
        writeln!(page, "\"><title>not a finite number</title></path>")?;
    }
    writeln!(page, "</svg>")
}

/// Draws only the lowest and the highest of the points that share a pixel, in their order.
fn thinned_out(
    points: impl Iterator<Item = (f64, f64)>,
    mut draw: impl FnMut(f64, f64) -> Result,
) -> Result {
    let mut held: Option<((f64, f64), (f64, f64))> = None;
    let mut put = |(a, b): ((f64, f64), (f64, f64))| {
        let (first, second) = if a.0 <= b.0 { (a, b) } else { (b, a) };
        draw(first.0, first.1)?;
        if first == second { Ok(()) } else { draw(second.0, second.1) }
    };
    let mut begun = f64::NEG_INFINITY;
    for point in points {
        match &mut held {
            Some((low, high)) if point.0 - begun < PIXEL => {
                if point.1 < low.1 {
                    *low = point;
                }
                if point.1 > high.1 {
                    *high = point;
                }
            }
            held => {
                if let Some(pair) = held.replace((point, point)) {
                    put(pair)?;
                }
                begun = point.0;
            }
        }
    }
    held.map_or(Ok(()), put)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short() {
        let numbers = [0., 0.5, 123.456, 99999., 1e-7, -2.5e9, 1000., f64::NAN];
        let texts = ["0", "0.5", "123.5", "99999", "1.00e-7", "-2.50e9", "1000", "NaN"];
        assert_eq!(numbers.map(short), texts);
    }

    #[test]
    fn marks_are_round_and_tell_apart() {
        let labels = |values: &[f64]| {
            let axis = Axis::of(values.iter().copied(), true).unwrap();
            axis.marks().map(|mark| axis.label(mark)).collect::<Vec<_>>()
        };
        assert_eq!(labels(&[0., 1.]), ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]);
        assert_eq!(labels(&[0.13, 2.4]), ["0.5", "1.0", "1.5", "2.0"]);
        assert_eq!(labels(&[0.9991, 0.9999]), ["0.9992", "0.9994", "0.9996", "0.9998"]);
        assert_eq!(labels(&[1e-5, 0.1]), ["1.00e-5", "1.00e-4", "0.001", "0.01", "0.1"]);
        assert_eq!(labels(&[-f64::MAX, f64::MAX]), ["-1.00e308", "0", "1.00e308"]);
        assert_eq!(labels(&[-20., -20.]), ["-22", "-21", "-20", "-19", "-18"]);
        assert_eq!([900., 10_000., 12_500., 2e6].map(step_label), ["900", "10k", "12.5k", "2M"]);
    }

    #[test]
    fn long_curves_keep_their_peaks() -> Result {
        let mut drawn = vec![];
        let points = (0..1_000_000).map(|i| (f64::from(i) / 2500., f64::from(i == 123_456)));
        thinned_out(points, |x, y| {
            drawn.push((x, y));
            Ok(())
        })?;
        assert!(drawn.len() <= 2 * 801 && drawn.is_sorted_by(|a, b| a.0 <= b.0));
        assert_eq!(drawn.iter().filter(|(_, y)| *y == 1.).count(), 1);
        Ok(())
    }
}
