//! A page with everything in it: no scripts, no fonts and no pictures from elsewhere.

use std::collections::BTreeMap;
use std::fmt::Write;

use serde_json::Value;

use super::curve::Curve;

/// What the page shows.
pub(super) struct Report<'r> {
    pub(super) title: &'r str,
    pub(super) curves: &'r BTreeMap<String, Curve>,
    pub(super) config: &'r Value,
    pub(super) environment: &'r [(&'static str, String)],
    pub(super) times: &'r [(&'static str, String)],
}

const STYLE: &str = "
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:72rem;padding:0 1rem;color:#222;background:#fff}
h1{font-size:1.5rem}h2{font-size:1.1rem;margin-top:2rem}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(21rem,1fr));gap:1rem}
figure{margin:0;border:1px solid #ddd;border-radius:4px;padding:.5rem}
figcaption{font-weight:600}svg{width:100%;height:auto}
svg text{font-size:11px;fill:#555}svg .axis{stroke:#ccc}
svg polyline{fill:none;stroke-width:1.5}
.key{font-size:.85rem}.key span{margin-right:1rem;white-space:nowrap}
.key i{display:inline-block;width:.8rem;height:.2rem;margin-right:.3rem;vertical-align:middle}
table{border-collapse:collapse}td{padding:.1rem 1rem .1rem 0;vertical-align:top}td:first-child{color:#555}
pre{background:#f6f6f6;padding:.5rem;overflow:auto}
";

/// Told apart also by those who see fewer colours.
const COLOURS: [&str; 8] =
    ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#555555", "#b2a800"];

const WIDTH: f64 = 400.;
const HEIGHT: f64 = 220.;
const LEFT: f64 = 58.;
const BOTTOM: f64 = 24.;
const TOP: f64 = 8.;

fn escaped(text: &str) -> String {
    let text = text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    text.replace('"', "&quot;")
}

/// Tags of these have a group's name behind them.
const HYPER_PARAMETERS: [&str; 8] =
    ["lr", "momentum", "dampening", "weight_decay", "beta1", "beta2", "eps", "alpha"];

/// The chart that a tag belongs to: `training/loss` and `val/loss` share one, so do `lr/base` and
/// `lr/fc`, and the elements of a tensor.
fn chart(tag: &str) -> &str {
    let Some((folder, name)) = tag.rsplit_once('/') else { return tag };
    let last = folder.rsplit('/').next().unwrap_or(folder);
    match HYPER_PARAMETERS.contains(&last) || name.bytes().all(|byte| byte.is_ascii_digit()) {
        true => folder,
        false => name,
    }
}

/// A number with four digits that count.
fn short(value: f64) -> String {
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
        _ => format!("{value:.2e}"),
    }
}

fn range(values: impl Iterator<Item = f64>) -> Option<(f64, f64)> {
    let (low, high) = values
        .filter(|value| value.is_finite())
        .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), v| (low.min(v), high.max(v)));
    match low <= high {
        true if low == high => Some((low - low.abs() * 0.1 - 1e-9, high + high.abs() * 0.1 + 1e-9)),
        true => Some((low, high)),
        false => None,
    }
}

/// Lines between the points that are numbers; a gap where they are none.
fn svg(page: &mut String, curves: &[(&str, &Curve)]) -> std::fmt::Result {
    let points = || curves.iter().flat_map(|(_, curve)| &curve.points);
    let steps = range(points().map(|(step, _)| *step as f64));
    let values = range(points().map(|(_, value)| *value));
    let (Some((first, last)), Some((low, high))) = (steps, values) else {
        return writeln!(page, "<p>no numbers</p>");
    };
    let x = |step: u64| LEFT + (step as f64 - first) / (last - first) * (WIDTH - LEFT - 8.);
    let y = |value: f64| {
        // Halves: the difference of two numbers may be none.
        let share = (value / 2. - low / 2.) / (high / 2. - low / 2.);
        HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - TOP)
    };
    writeln!(page, "<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\">")?;
    for share in [0., 0.5, 1.] {
        let value = low * (1. - share) + high * share;
        let (at, text) = (y(value), short(value));
        writeln!(
            page,
            "<line class=\"axis\" x1=\"{LEFT}\" x2=\"{WIDTH}\" y1=\"{at:.1}\" y2=\"{at:.1}\"/>"
        )?;
        writeln!(
            page,
            "<text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{text}</text>",
            LEFT - 5.,
            at + 4.
        )?;
    }
    let (left, right) =
        (points().map(|(step, _)| *step).min(), points().map(|(step, _)| *step).max());
    for (step, anchor, at) in [(left, "start", LEFT), (right, "end", WIDTH - 8.)] {
        let step = step.unwrap_or(0);
        writeln!(
            page,
            "<text x=\"{at}\" y=\"{}\" text-anchor=\"{anchor}\">{step}</text>",
            HEIGHT - 6.
        )?;
    }
    for (index, (tag, curve)) in curves.iter().enumerate() {
        let colour = COLOURS[index % COLOURS.len()];
        for part in curve.points.split(|(_, value)| !value.is_finite()) {
            if let [(step, value)] = part {
                writeln!(
                    page,
                    "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"2\" fill=\"{colour}\"/>",
                    x(*step),
                    y(*value)
                )?;
            } else if !part.is_empty() {
                write!(page, "<polyline stroke=\"{colour}\" points=\"")?;
                for (step, value) in part {
                    write!(page, "{:.1},{:.1} ", x(*step), y(*value))?;
                }
                writeln!(page, "\"><title>{}</title></polyline>", escaped(tag))?;
            }
        }
    }
    writeln!(page, "</svg>")
}

fn table(page: &mut String, title: &str, rows: &[(&str, String)]) -> std::fmt::Result {
    if rows.is_empty() {
        return Ok(());
    }
    writeln!(page, "<h2>{title}</h2>\n<table>")?;
    for (name, value) in rows {
        writeln!(page, "<tr><td>{}</td><td>{}</td></tr>", escaped(name), escaped(value))?;
    }
    writeln!(page, "</table>")
}

fn body(page: &mut String, report: &Report<'_>) -> std::fmt::Result {
    let title = escaped(report.title);
    writeln!(page, "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">")?;
    writeln!(page, "<meta name=\"viewport\" content=\"width=device-width\">")?;
    writeln!(page, "<title>{title}</title><style>{STYLE}</style></head><body>\n<h1>{title}</h1>")?;
    let mut charts = BTreeMap::<&str, Vec<(&str, &Curve)>>::new();
    for (tag, curve) in report.curves {
        charts.entry(chart(tag)).or_default().push((tag, curve));
    }
    writeln!(page, "<div class=\"charts\">")?;
    for (name, curves) in &charts {
        writeln!(page, "<figure><figcaption>{}</figcaption>", escaped(name))?;
        svg(page, curves)?;
        writeln!(page, "<div class=\"key\">")?;
        for (index, (tag, curve)) in curves.iter().enumerate() {
            let last = curve.points.last().map_or_else(String::new, |(_, value)| short(*value));
            let colour = COLOURS[index % COLOURS.len()];
            writeln!(
                page,
                "<span><i style=\"background:{colour}\"></i>{} {last}</span>",
                escaped(tag)
            )?;
        }
        writeln!(page, "</div></figure>")?;
    }
    writeln!(page, "</div>")?;
    table(page, "Times", report.times)?;
    if !report.config.is_null() {
        writeln!(
            page,
            "<h2>Configuration</h2>\n<pre>{}</pre>",
            escaped(&format!("{:#}", report.config))
        )?;
    }
    table(page, "Environment", report.environment)?;
    writeln!(page, "</body></html>")
}

pub(super) fn html(report: &Report<'_>) -> String {
    let mut page = String::new();
    // A String takes everything.
    let _ = body(&mut page, report);
    page
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_meet_in_charts() {
        let tags = ["training/loss", "val/loss", "lr/group_0", "gen/lr/fc", "val/recall/3", "x"];
        assert_eq!(tags.map(chart), ["loss", "loss", "lr", "gen/lr", "val/recall", "x"]);
    }

    #[test]
    fn numbers_are_short() {
        let numbers = [0., 0.5, 123.456, 99999., 1e-7, -2.5e9, 1000.];
        let texts = ["0", "0.5", "123.5", "99999", "1.00e-7", "-2.50e9", "1000"];
        assert_eq!(numbers.map(short), texts);
    }

    #[test]
    fn odd_curves_have_a_page() {
        let curve = |values: &[f64]| {
            let mut curve = Curve::default();
            (1..).zip(values).for_each(|(step, value)| curve.push(step, *value));
            curve
        };
        let curves = BTreeMap::from([
            ("nothing".to_owned(), curve(&[])),
            ("nan".to_owned(), curve(&[f64::NAN, f64::INFINITY])),
            ("gap".to_owned(), curve(&[1., 2., f64::NAN, 3.])),
            ("constant".to_owned(), curve(&[0., 0.])),
            ("one".to_owned(), curve(&[-5.])),
            ("<tag>".to_owned(), curve(&[1., -f64::MAX, f64::MAX])),
        ]);
        let report = Report {
            title: "a & b",
            curves: &curves,
            config: &Value::Null,
            environment: &[],
            times: &[],
        };
        let page = html(&report);
        assert!(page.contains("a &amp; b") && page.contains("&lt;tag&gt;"));
        let coordinates = page.split('"').skip(1).step_by(2);
        for text in coordinates.filter(|text| text.starts_with(|first: char| first.is_numeric())) {
            assert!(!text.contains("NaN") && !text.contains("inf"), "{text}");
        }
    }
}
