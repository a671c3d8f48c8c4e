//! Curves as SVG.

use std::ops::Range;

use plotters::coord::Shift;
use plotters::coord::ranged1d::{KeyPointHint, NoDefaultFormatting, Ranged, ValueFormatter};
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::{Error, Result};

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
pub(super) struct Panel {
    pub(super) title: String,
    pub(super) curves: Vec<Curve>,
}

pub(super) struct Curve {
    pub(super) name: String,
    /// (iteration, value).
    pub(super) points: Vec<(u64, f64)>,
}

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Drawn<'a> = std::result::Result<(), DrawingAreaErrorKind<std::io::Error>>;

/// The panels below each other, over one x axis.
pub(super) fn svg(panels: &[Panel]) -> Result<String> {
    let Ok(count @ 1..) = i32::try_from(panels.len()) else {
        return Err(Error::invalid("nothing to plot: give at least one panel of series"));
    };
    let height = count * PANEL + X_TITLE;
    let mut text = String::new();
    draw(panels, &mut text, height)
        .map_err(|error| Error::invalid(format!("the plot cannot be drawn: {error}")))?;
    let size = |scale| format!("width=\"{}\" height=\"{}\"", WIDTH / scale, height / scale);
    Ok(text.replacen(&size(1), &size(UNITS), 1))
}

fn draw(panels: &[Panel], text: &mut String, height: i32) -> Drawn<'static> {
    let root = SVGBackend::with_string(text, (WIDTH as u32, height as u32)).into_drawing_area();
    root.fill(&WHITE)?;
    // The same series has the same colour in all panels.
    let mut names: Vec<&str> = vec![];
    for curve in panels.iter().flat_map(|panel| &panel.curves) {
        if !names.contains(&curve.name.as_str()) {
            names.push(&curve.name);
        }
    }
    let colour = |name: &str| {
        let index = names.iter().position(|known| *known == name).unwrap_or(0);
        COLOURS[index % COLOURS.len()]
    };
    let (above, x_title) = root.split_vertically(height - X_TITLE);
    for (panel, area) in panels.iter().zip(above.split_evenly((panels.len(), 1))) {
        draw_panel(panel, &area, x_range(panels), &colour)?;
    }
    let style = style(13).pos(Pos::new(HPos::Center, VPos::Top));
    x_title.draw_text("iteration", &style, ((LEFT + WIDTH - RIGHT) / 2, 0))?;
    root.present()
}

fn style(pixels: i32) -> TextStyle<'static> {
    // plotters divides by 1.24 for SVG.
    TextStyle::from(("sans-serif", f64::from(pixels * UNITS) * 1.24).into_font()).color(&INK)
}

fn draw_panel(
    panel: &Panel,
    area: &Area<'_>,
    x_range: (f64, f64),
    colour: &impl Fn(&str) -> RGBColor,
) -> Drawn<'static> {
    let title = TextStyle { font: style(15).font.style(FontStyle::Bold), ..style(15) }
        .pos(Pos::new(HPos::Left, VPos::Center));
    area.draw_text(&panel.title, &title, (LEFT, TITLE / 2 + UNITS))?;
    let legend = legend(panel);
    for (curve, (x, row)) in panel.curves.iter().zip(&legend) {
        let (colour, y) = (colour(&curve.name), TITLE / 2 + UNITS + row * LEGEND_ROW);
        let line = vec![(*x, y), (x + SAMPLE, y)];
        area.draw(&PathElement::new(line, colour.stroke_width(2 * UNITS as u32)))?;
        if curve.points.len() <= MAX_DOTS {
            area.draw(&Circle::new((x + SAMPLE / 2, y), 3 * UNITS, colour.filled()))?;
        }
        let text = style(13).pos(Pos::new(HPos::Left, VPos::Center));
        area.draw_text(&curve.name, &text, (x + SAMPLE + 6 * UNITS, y))?;
    }

    let rows = legend.last().map_or(0, |(_, row)| *row);
    let mut chart = ChartBuilder::on(area)
        .margin_top(TITLE + rows * LEGEND_ROW)
        .margin_right(RIGHT)
        .y_label_area_size(LEFT)
        .x_label_area_size(X_LABELS)
        .build_cartesian_2d(Axis::new(x_range, 9., 1.), Axis::new(y_range(panel), 6.5, 0.))?;
    chart
        .configure_mesh()
        .bold_line_style(GRID.stroke_width(UNITS as u32))
        .axis_style(AXIS.stroke_width(UNITS as u32))
        .label_style(style(12))
        .set_all_tick_mark_size(4 * UNITS)
        .draw()?;
    for curve in &panel.curves {
        let colour = colour(&curve.name);
        for run in runs(&curve.points) {
            if curve.points.len() <= MAX_DOTS || run.len() == 1 {
                let dot = |point: &(f64, f64)| Circle::new(*point, 3 * UNITS, colour.filled());
                chart.draw_series(run.iter().map(dot))?;
            }
            let thin = (2 * UNITS - UNITS / 2) as u32;
            chart.draw_series(LineSeries::new(thinned(run), colour.stroke_width(thin)))?;
        }
    }
    Ok(())
}

/// A linear axis with its own ticks.
struct Axis {
    range: Range<f64>,
    ticks: Vec<f64>,
    /// Of all labels; 0 where each has its own.
    decimals: usize,
}

impl Axis {
    fn new((low, high): (f64, f64), count: f64, smallest: f64) -> Self {
        let ticks = ticks(low, high, count, smallest);
        let decimals = |tick: &f64| label(*tick).split_once('.').map_or(0, |(_, part)| part.len());
        let decimals = match ticks.iter().any(|tick| label(*tick).contains('e')) {
            true => 0,
            false => ticks.iter().map(decimals).max().unwrap_or(0),
        };
        Self { range: low..high, ticks, decimals }
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
            0 => label(*value),
            decimals => format!("{value:.decimals$}"),
        }
    }
}

/// Length of the piece of line in a legend.
const SAMPLE: i32 = 22 * UNITS;

/// Where the entries of the legend go: (x, row), the first row aligned to the right beside the title.
fn legend(panel: &Panel) -> Vec<(i32, i32)> {
    // Nothing measures fonts here: a little more than most letters take.
    let text = |text: &str, pixels: f64| {
        (text.chars().count() as f64 * pixels * 0.6 * f64::from(UNITS)) as i32
    };
    let widths: Vec<_> =
        panel.curves.iter().map(|c| SAMPLE + 6 * UNITS + text(&c.name, 13.)).collect();
    let (gap, right) = (16 * UNITS, WIDTH - RIGHT);
    let mut left = LEFT + text(&panel.title, 16.) + 2 * gap;
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

fn x_range(panels: &[Panel]) -> (f64, f64) {
    let curves = panels.iter().flat_map(|panel| &panel.curves);
    let (mut low, mut high) = (u64::MAX, 0);
    for (iteration, _) in curves.flat_map(|curve| &curve.points) {
        (low, high) = (low.min(*iteration), high.max(*iteration));
    }
    if low > high {
        return (0., 1.);
    }
    let (low, high) = (low.saturating_sub(1) as f64, high as f64);
    (low, high + ((high - low) * 0.01).max(0.1))
}

/// From the smallest to the largest value, with a margin that does not cross 0.
fn y_range(panel: &Panel) -> (f64, f64) {
    let values = panel.curves.iter().flat_map(|curve| &curve.points).map(|(_, value)| *value);
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
fn label(value: f64) -> String {
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
fn runs(points: &[(u64, f64)]) -> Vec<Vec<(f64, f64)>> {
    points
        .split(|(_, value)| !is_drawn(*value))
        .filter(|run| !run.is_empty())
        .map(|run| run.iter().map(|(iteration, value)| (*iteration as f64, *value)).collect())
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
        let run = runs(&panel("", vec![("a", values.clone())]).curves[0].points);
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
