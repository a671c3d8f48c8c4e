//! Curves as SVG.
//!
//! [`History::plot`](crate::handlers::History::plot) draws what was recorded; this is for curves of your own.

use std::io::Write;
use std::ops::Range;
use std::path::Path;

use plotters::coord::Shift;
use plotters::coord::ranged1d::{KeyPointHint, NoDefaultFormatting, Ranged, ValueFormatter};
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::error::{Error, Result};
use crate::fs::write_atomically;

/// plotters places things on whole units; these are a quarter of a pixel.
const UNITS: i32 = 4;
const WIDTH: i32 = 900 * UNITS;
const PANEL: i32 = 260 * UNITS;
const LEFT: i32 = 72 * UNITS;
const RIGHT: i32 = 22 * UNITS;
const TITLE: i32 = 40 * UNITS;
const LEGEND_ROW: i32 = 20 * UNITS;
const X_LABELS: i32 = 26 * UNITS;
const X_TITLE: i32 = 22 * UNITS;

const INK: RGBColor = RGBColor(45, 45, 50);
const AXIS: RGBColor = RGBColor(150, 150, 158);
const GRID: RGBColor = RGBColor(230, 230, 234);
const MARK: RGBColor = RGBColor(220, 30, 45);
const COLOURS: [RGBColor; 8] = [
    RGBColor(31, 111, 180),
    RGBColor(230, 112, 20),
    RGBColor(34, 145, 80),
    RGBColor(200, 45, 60),
    RGBColor(130, 90, 185),
    RGBColor(25, 160, 175),
    RGBColor(205, 85, 150),
    RGBColor(125, 95, 60),
];

/// More points of a curve than this cannot be told apart.
const MAX_POINTS: usize = 1000;
/// Curves of few points show them.
const MAX_DOTS: usize = 60;
/// Values beyond this have differences that overflow: drawn as gaps.
const LARGEST: f64 = 1e300;

/// Curves that share a y axis.
#[derive(Debug, Clone, PartialEq)]
pub struct Panel {
    pub(crate) title: String,
    pub(crate) curves: Vec<Curve>,
}

/// A line through points.
#[derive(Debug, Clone, PartialEq)]
pub struct Curve {
    pub(crate) name: String,
    /// (iteration, value).
    pub(crate) points: Vec<(u64, f64)>,
}

impl Panel {
    /// With a title above and the curves' names in a legend.
    pub fn new(title: impl Into<String>, curves: impl IntoIterator<Item = Curve>) -> Self {
        Self { title: title.into(), curves: curves.into_iter().collect() }
    }
}

impl Curve {
    /// Through these (iteration, value). Curves of one name have the same colour in all panels.
    pub fn new(name: impl Into<String>, points: impl IntoIterator<Item = (u64, f64)>) -> Self {
        Self { name: name.into(), points: points.into_iter().collect() }
    }
}

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Drawn<'a> = std::result::Result<(), DrawingAreaErrorKind<std::io::Error>>;

/// Writes the panels as [`svg`] draws them. Makes the folders above; a file that was there is replaced
/// when the new one is complete.
pub fn write_svg(path: impl AsRef<Path>, panels: &[Panel]) -> Result<()> {
    let svg = svg(panels)?;
    write_atomically(path.as_ref(), |file| file.write_all(svg.as_bytes()))
}

/// The panels below each other, over one x axis of iterations. Values that are not finite are gaps; where
/// there are many, those that show are drawn.
///
/// ```
/// use tch_ignite::handlers::plot::{Curve, Panel, svg};
/// use tch_ignite::schedule::{CosineAnnealing, Schedule};
/// let points = CosineAnnealing::new(1.0, 0.0, 100).simulate_values(100)?;
/// assert!(svg(&[Panel::new("lr", [Curve::new("cosine", points)])])?.contains("<svg"));
/// # Ok::<(), tch_ignite::Error>(())
/// ```
///
/// # Errors
/// No panel.
pub fn svg(panels: &[Panel]) -> Result<String> {
    let line = |curve: &Curve| Line {
        name: curve.name.clone(),
        points: curve.points.iter().map(|(iteration, value)| (*iteration as f64, *value)).collect(),
        mark: None,
    };
    let sheet = |panel: &Panel| Sheet {
        title: panel.title.clone(),
        lines: panel.curves.iter().map(line).collect(),
    };
    svg_of(&panels.iter().map(sheet).collect::<Vec<_>>(), X::Iteration)
}

/// A panel over any x axis.
pub(crate) struct Sheet {
    pub(crate) title: String,
    pub(crate) lines: Vec<Line>,
}

pub(crate) struct Line {
    pub(crate) name: String,
    /// (x, value).
    pub(crate) points: Vec<(f64, f64)>,
    /// A point to show.
    pub(crate) mark: Option<(f64, f64)>,
}

/// The x axis.
#[derive(Clone, Copy)]
pub(crate) enum X {
    /// Iterations, from the one before the first.
    Iteration,
    /// Learning rates on a logarithmic scale. Those that are not above 0 have no place there.
    LogLr,
}

impl X {
    fn title(self) -> &'static str {
        match self {
            Self::Iteration => "iteration",
            Self::LogLr => "learning rate",
        }
    }

    /// Where on the axis a point is drawn.
    fn place(self, (x, y): (f64, f64)) -> (f64, f64) {
        match self {
            Self::Iteration => (x, y),
            Self::LogLr => (x.log10(), y),
        }
    }

    fn axis(self, sheets: &[Sheet]) -> Axis {
        let lines = sheets.iter().flat_map(|sheet| &sheet.lines);
        let (mut low, mut high) = (f64::INFINITY, f64::NEG_INFINITY);
        for point in lines.flat_map(|line| &line.points) {
            let (x, _) = self.place(*point);
            if is_drawn(x) {
                (low, high) = (low.min(x), high.max(x));
            }
        }
        if low > high {
            return Axis::new((0., 1.), 9., 1.);
        }
        match self {
            Self::Iteration => {
                let low = (low - 1.).max(0.);
                Axis::new((low, high + ((high - low) * 0.01).max(0.1)), 9., 1.)
            }
            Self::LogLr => {
                let margin = ((high - low) * 0.02).max(0.01);
                Axis::logarithmic((low - margin, high + margin), 9)
            }
        }
    }
}

pub(crate) fn svg_of(sheets: &[Sheet], x: X) -> Result<String> {
    let Ok(count @ 1..) = i32::try_from(sheets.len()) else {
        return Err(Error::invalid("nothing to plot: give at least one panel of series"));
    };
    let height = count * PANEL + X_TITLE;
    let mut text = String::new();
    draw(sheets, x, &mut text, height)
        .map_err(|error| Error::invalid(format!("the plot cannot be drawn: {error}")))?;
    let size = |scale| format!("width=\"{}\" height=\"{}\"", WIDTH / scale, height / scale);
    Ok(text.replacen(&size(1), &size(UNITS), 1))
}

fn draw(sheets: &[Sheet], x: X, text: &mut String, height: i32) -> Drawn<'static> {
    let root = SVGBackend::with_string(text, (WIDTH as u32, height as u32)).into_drawing_area();
    root.fill(&WHITE)?;
    // The same series has the same colour in all panels.
    let mut names: Vec<&str> = vec![];
    for line in sheets.iter().flat_map(|sheet| &sheet.lines) {
        if !names.contains(&line.name.as_str()) {
            names.push(&line.name);
        }
    }
    let colour = |name: &str| {
        let index = names.iter().position(|known| *known == name).unwrap_or(0);
        COLOURS[index % COLOURS.len()]
    };
    let (above, x_title) = root.split_vertically(height - X_TITLE);
    for (sheet, area) in sheets.iter().zip(above.split_evenly((sheets.len(), 1))) {
        draw_sheet(sheet, &area, (x, x.axis(sheets)), &colour)?;
    }
    let style = style(13).pos(Pos::new(HPos::Center, VPos::Top));
    x_title.draw_text(x.title(), &style, ((LEFT + WIDTH - RIGHT) / 2, 0))?;
    root.present()
}

fn style(pixels: i32) -> TextStyle<'static> {
    // plotters divides by 1.24 for SVG.
    TextStyle::from(("sans-serif", f64::from(pixels * UNITS) * 1.24).into_font()).color(&INK)
}

fn draw_sheet(
    sheet: &Sheet,
    area: &Area<'_>,
    (x, x_axis): (X, Axis),
    colour: &impl Fn(&str) -> RGBColor,
) -> Drawn<'static> {
    let title = TextStyle { font: style(15).font.style(FontStyle::Bold), ..style(15) }
        .pos(Pos::new(HPos::Left, VPos::Center));
    area.draw_text(&sheet.title, &title, (LEFT, TITLE / 2 + UNITS))?;
    let legend = legend(sheet);
    for (line, (left, row)) in sheet.lines.iter().zip(&legend) {
        let (colour, y) = (colour(&line.name), TITLE / 2 + UNITS + row * LEGEND_ROW);
        let sample = vec![(*left, y), (left + SAMPLE, y)];
        area.draw(&PathElement::new(sample, colour.stroke_width(2 * UNITS as u32)))?;
        let middle = (left + SAMPLE / 2, y);
        if line.mark.is_some() {
            area.draw(&Circle::new(middle, 5 * UNITS, MARK.filled()))?;
        } else if line.points.len() <= MAX_DOTS {
            area.draw(&Circle::new(middle, 3 * UNITS, colour.filled()))?;
        }
        let text = style(13).pos(Pos::new(HPos::Left, VPos::Center));
        area.draw_text(&line.name, &text, (left + SAMPLE + 6 * UNITS, y))?;
    }

    let rows = legend.last().map_or(0, |(_, row)| *row);
    let mut chart = ChartBuilder::on(area)
        .margin_top(TITLE + rows * LEGEND_ROW)
        .margin_right(RIGHT)
        .y_label_area_size(LEFT)
        .x_label_area_size(X_LABELS)
        .build_cartesian_2d(x_axis, Axis::new(y_range(sheet), 6.5, 0.))?;
    chart
        .configure_mesh()
        .bold_line_style(GRID.stroke_width(UNITS as u32))
        .axis_style(AXIS.stroke_width(UNITS as u32))
        .label_style(style(12))
        .set_all_tick_mark_size(4 * UNITS)
        .draw()?;
    for line in &sheet.lines {
        let colour = colour(&line.name);
        let points: Vec<_> = line.points.iter().map(|point| x.place(*point)).collect();
        for run in runs(&points) {
            if points.len() <= MAX_DOTS || run.len() == 1 {
                let dot = |point: &(f64, f64)| Circle::new(*point, 3 * UNITS, colour.filled());
                chart.draw_series(run.iter().map(dot))?;
            }
            let thin = (2 * UNITS - UNITS / 2) as u32;
            chart.draw_series(LineSeries::new(thinned(run), colour.stroke_width(thin)))?;
        }
    }
    // Above all lines.
    let marks = sheet.lines.iter().filter_map(|line| line.mark);
    let marks = marks.map(|point| x.place(point)).filter(|(x, y)| is_drawn(*x) && is_drawn(*y));
    chart.draw_series(marks.map(|point| Circle::new(point, 5 * UNITS, MARK.filled())))?;
    Ok(())
}

/// An axis with its own ticks.
struct Axis {
    range: Range<f64>,
    ticks: Vec<f64>,
    /// Of all labels; 0 where each has its own.
    decimals: usize,
    /// The places are logarithms.
    logarithmic: bool,
}

impl Axis {
    fn new((low, high): (f64, f64), count: f64, smallest: f64) -> Self {
        let ticks = ticks(low, high, count, smallest);
        let decimals = |tick: &f64| label(*tick).split_once('.').map_or(0, |(_, part)| part.len());
        let decimals = match ticks.iter().any(|tick| label(*tick).contains('e')) {
            true => 0,
            false => ticks.iter().map(decimals).max().unwrap_or(0),
        };
        Self { range: low..high, ticks, decimals, logarithmic: false }
    }

    /// Labels at powers of ten, at most `count`; where they are few, at 2 and 5 between them as well.
    fn logarithmic((low, high): (f64, f64), count: usize) -> Self {
        let powers = (low.floor() as i32..=high.ceil() as i32).map(f64::from);
        let within = |tick: &f64| (low..=high).contains(tick);
        let mut ticks: Vec<_> = powers.clone().filter(within).collect();
        if ticks.len() < 3 {
            let finer = powers.flat_map(|power| [1f64, 2., 5.].map(|n| power + n.log10()));
            ticks = finer.filter(within).collect();
        }
        let step = ticks.len().div_ceil(count).max(1);
        let ticks = ticks.into_iter().step_by(step).collect();
        Self { range: low..high, ticks, decimals: 0, logarithmic: true }
    }
}

impl Ranged for Axis {
    type FormatOption = NoDefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, limit: (i32, i32)) -> i32 {
        RangedCoordf64::from(self.range.clone()).map(value, limit)
    }

    fn key_points<Hint: KeyPointHint>(&self, hint: Hint) -> Vec<f64> {
        // Fine lines between the ticks are not wanted.
        if hint.weight().allow_light_points() { vec![] } else { self.ticks.clone() }
    }

    fn range(&self) -> Range<f64> {
        self.range.clone()
    }
}

impl ValueFormatter<f64> for Axis {
    fn format_ext(&self, value: &f64) -> String {
        match self.decimals {
            0 if self.logarithmic => label(10f64.powf(*value)),
            0 => label(*value),
            decimals => format!("{value:.decimals$}"),
        }
    }
}

/// Length of the piece of line in a legend.
const SAMPLE: i32 = 22 * UNITS;

/// Where the entries of the legend go: (x, row), the first row aligned to the right beside the title.
fn legend(sheet: &Sheet) -> Vec<(i32, i32)> {
    // Nothing measures fonts here: a little more than most letters take.
    let text = |text: &str, pixels: f64| {
        (text.chars().count() as f64 * pixels * 0.6 * f64::from(UNITS)) as i32
    };
    let widths: Vec<_> =
        sheet.lines.iter().map(|line| SAMPLE + 6 * UNITS + text(&line.name, 13.)).collect();
    let (gap, right) = (16 * UNITS, WIDTH - RIGHT);
    let mut left = LEFT + text(&sheet.title, 16.) + 2 * gap;
    let total: i32 = widths.iter().map(|width| width + gap).sum();
    left = left.max(right + gap - total);
    let (mut x, mut row) = (left, 0);
    let mut places = vec![];
    for width in widths {
        if x + width > right && x > left {
            (x, row) = (left, row + 1);
        }
        places.push((x, row));
        x += width + gap;
    }
    places
}

fn is_drawn(value: f64) -> bool {
    value.abs() < LARGEST
}

/// From the smallest to the largest value, with a margin that does not cross 0.
fn y_range(sheet: &Sheet) -> (f64, f64) {
    let values = sheet.lines.iter().flat_map(|line| &line.points).map(|(_, value)| *value);
    let (mut low, mut high) = (f64::INFINITY, f64::NEG_INFINITY);
    for value in values.filter(|value| is_drawn(*value)) {
        (low, high) = (low.min(value), high.max(value));
    }
    if low > high {
        return (0., 1.);
    }
    let size = low.abs().max(high.abs());
    let margin = match (high - low) * 0.06 {
        margin if margin > size * 1e-9 => margin,
        _ if size > 1. / LARGEST => size * 0.1,
        _ => 1.,
    };
    let bottom = if low >= 0. { (low - margin).max(0.) } else { low - margin };
    let top = if high <= 0. { (high + margin).min(0.) } else { high + margin };
    (bottom, top)
}

/// Round numbers in a range, about `count` of them, at least `smallest` apart.
fn ticks(low: f64, high: f64, count: f64, smallest: f64) -> Vec<f64> {
    let rough = (high - low) / count;
    let unit = 10f64.powf(rough.log10().floor());
    let step = [1., 2., 5., 10.].into_iter().find(|n| n * unit >= rough).unwrap_or(10.) * unit;
    let step = step.max(smallest);
    let (first, last) = ((low / step).ceil(), (high / step).floor());
    (0..=(last - first) as u32).map(|n| (first + f64::from(n)) * step).collect()
}

/// A number with at most six digits that count, in scientific form where that is shorter to read.
pub(crate) fn label(value: f64) -> String {
    if value != 0. && !(1e-3..1e5).contains(&value.abs()) {
        let text = format!("{value:.5e}");
        let (mantissa, exponent) = text.split_once('e').unwrap_or((&text, "0"));
        return format!("{}e{exponent}", without_zeros(mantissa));
    }
    without_zeros(&format!("{value:.7}")).to_owned()
}

fn without_zeros(number: &str) -> &str {
    number.trim_end_matches('0').trim_end_matches('.')
}

/// The stretches of a curve between values that are not drawn.
fn runs(points: &[(f64, f64)]) -> Vec<Vec<(f64, f64)>> {
    points
        .split(|(x, value)| !is_drawn(*x) || !is_drawn(*value))
        .filter(|run| !run.is_empty())
        .map(<[_]>::to_vec)
        .collect()
}

/// Smallest and largest of as many stretches as can be told apart, with both ends.
fn thinned(run: Vec<(f64, f64)>) -> Vec<(f64, f64)> {
    if run.len() <= MAX_POINTS {
        return run;
    }
    let mut kept = vec![];
    kept.extend(run.first());
    for stretch in run.chunks(run.len().div_ceil(MAX_POINTS / 2)) {
        let by_value = |a: &&(f64, f64), b: &&(f64, f64)| a.1.total_cmp(&b.1);
        let ends = [stretch.iter().min_by(by_value), stretch.iter().max_by(by_value)];
        let mut ends: Vec<_> = ends.into_iter().flatten().copied().collect();
        ends.sort_by(|a, b| a.0.total_cmp(&b.0));
        kept.extend(ends);
    }
    kept.extend(run.last());
    kept.dedup();
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    fn panel(title: &str, curves: Vec<(&str, Vec<f64>)>) -> Panel {
        let points = |values: Vec<f64>| (1u64..).zip(values).collect();
        let curves = curves.into_iter();
        let curves =
            curves.map(|(name, values)| Curve { name: name.into(), points: points(values) });
        Panel { title: title.into(), curves: curves.collect() }
    }

    fn points_drawn(svg: &str) -> usize {
        let lines = svg.split("points=\"").skip(1).filter_map(|rest| rest.split('"').next());
        lines.map(|line| line.split_whitespace().count()).max().unwrap_or(0)
    }

    #[test]
    fn strange_values_are_drawn_without_a_panic() -> Result<()> {
        for values in [
            vec![],
            vec![f64::NAN],
            vec![f64::INFINITY, 1., f64::NAN, f64::NEG_INFINITY, 2.],
            vec![0., 0.],
            vec![5.],
            vec![f64::MAX, f64::MIN],
            vec![9e299, -9e299],
            vec![f64::MIN_POSITIVE, 5e-324],
            vec![1., 1. + f64::EPSILON],
            vec![1e17, 1e17 + 16.],
            vec![-1e-4; 3],
        ] {
            let svg = svg(&[panel("a & b", vec![("<x>", values), ("none", vec![])])])?;
            assert!(svg.contains("a &amp; b") && svg.contains("&lt;x&gt;"));
            assert!(svg.trim_end().ends_with("</svg>") && !svg.contains("NaN"));
        }
        let no_curves = svg(&[panel("nothing", vec![])])?;
        assert!(no_curves.contains("width=\"900\" height=\"282\" viewBox=\"0 0 3600 1128\""));
        assert!(svg(&[]).is_err());
        Ok(())
    }

    #[test]
    fn long_curves_keep_their_extremes() -> Result<()> {
        let mut values: Vec<_> = (0..100_000).map(|n| f64::from(n).sin()).collect();
        values[77_777] = 50.;
        let points: Vec<_> = (1u32..).map(f64::from).zip(values.clone()).collect();
        let run = runs(&points);
        let thin = thinned(run.concat());
        assert!(thin.len() <= MAX_POINTS + 2 && thin.contains(&(77_778., 50.)));
        assert_eq!((thin[0].0, thin[thin.len() - 1].0), (1., 100_000.));
        assert!(thin.is_sorted_by(|a, b| a.0 < b.0));
        let svg = svg(&[panel("", vec![("a", values)])])?;
        assert!((500..=MAX_POINTS + 2).contains(&points_drawn(&svg)) && svg.len() < 40_000);
        Ok(())
    }

    #[test]
    fn ticks_are_round_and_their_labels_short() {
        let labels = |low, high, count, smallest| {
            let axis = Axis::new((low, high), count, smallest);
            axis.ticks.iter().map(|tick| axis.format_ext(tick)).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(labels(0., 1.05e-4, 5., 0.), "0 5e-5 1e-4");
        assert_eq!(labels(0., 3.2e-3, 5., 0.), "0.000 0.001 0.002 0.003");
        assert_eq!(labels(0.913, 0.987, 5., 0.), "0.92 0.94 0.96 0.98");
        assert_eq!(labels(0., 2.6, 5., 0.), "0 1 2");
        assert_eq!(labels(0., 2.4, 5., 0.), "0.0 0.5 1.0 1.5 2.0");
        assert_eq!(labels(-1., 2., 5., 0.), "-1 0 1 2");
        assert_eq!(labels(0., 3.1, 9., 1.), "0 1 2 3");
        assert_eq!(labels(0., 1_130_000., 9., 1.), "0 2e5 4e5 6e5 8e5 1e6");
    }
}
