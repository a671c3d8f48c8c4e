//! The report: a page that needs no scripts, fonts or pictures from elsewhere.

use std::collections::BTreeMap;
use std::fmt::Write;

use serde_json::Value;

use super::chart::{self, COLOURS, colour, escaped, short};
use super::curve::Curve;
use super::flat;

/// Largest number of tags in the report, because a file can hold any number.
pub(super) const TAGS: usize = 1000;

/// The content of the page.
pub(super) struct Report<'r> {
    pub(super) title: &'r str,
    pub(super) curves: &'r BTreeMap<String, Curve>,
    /// Whether there are more tags than `curves` holds.
    pub(super) has_more: bool,
    pub(super) config: &'r Value,
    pub(super) environment: &'r [(&'static str, String)],
    pub(super) times: &'r [(&'static str, String)],
}

/// The colours can also be told apart with colour blindness (Okabe and Ito's, lighter on dark ground).
const STYLE: &str = "
:root{color-scheme:light dark;--text:#1c2024;--faint:#667;--line:#dde1e6;--ground:#fff;--card:#f7f8fa;--bad:#c81e1e;--light:42%;
--c0:#0072b2;--c1:#d55e00;--c2:#009e73;--c3:#cc79a7;--c4:#56b4e9;--c5:#e69f00;--c6:#555;--c7:#9a9200}
@media(prefers-color-scheme:dark){:root{--text:#e4e7ea;--faint:#98a0aa;--line:#333a42;--ground:#14171a;--card:#1c2126;--bad:#ff6b6b;--light:62%;
--c0:#4aa8e0;--c1:#ff8a3d;--c2:#2fc99b;--c3:#e39cc4;--c4:#8fd0f5;--c5:#f2b632;--c6:#b0b0b0;--c7:#d6cd3a}}
*{box-sizing:border-box}
body{font:15px/1.45 system-ui,sans-serif;margin:0 auto;max-width:88rem;padding:1.5rem 1rem 3rem;color:var(--text);background:var(--ground)}
h1{font-size:1.6rem;margin:0 0 .75rem;overflow-wrap:anywhere}h2{font-size:1.1rem;margin:2rem 0 .5rem}
dl{display:flex;flex-wrap:wrap;gap:.5rem;margin:0 0 1.5rem}
dl div{background:var(--card);border:1px solid var(--line);border-radius:6px;padding:.4rem .9rem}
dt{font-size:.75rem;color:var(--faint)}dd{margin:0;font-weight:600}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(26rem,100%),1fr));gap:1rem;align-items:start}
figure{margin:0;border:1px solid var(--line);border-radius:6px;padding:.75rem;background:var(--card);min-width:0}
figcaption{font-weight:600;margin-bottom:.25rem;overflow-wrap:anywhere}
svg{display:block;width:100%;height:auto}
svg text{font-size:11px;fill:var(--faint)}.grid{stroke:var(--line)}.axis{stroke:var(--faint)}
polyline{fill:none;stroke-width:1.6;stroke-linejoin:round}.dense{stroke-width:.8}.bad{stroke:var(--bad);stroke-width:1.5}.nan{color:var(--bad)}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
td,th{padding:.1rem .9rem .1rem 0;vertical-align:top;text-align:left;font-weight:400;overflow-wrap:anywhere}
th,.facts td:first-child{color:var(--faint)}
.key{width:100%;font-size:.82rem;margin-top:.35rem}.key td+td,.key th+th{text-align:right;padding-right:0;padding-left:.75rem;white-space:nowrap}
i{display:inline-block;width:.9rem;height:.2rem;border-radius:1px;margin-right:.45rem;vertical-align:middle}
summary{cursor:pointer;font-size:.85rem;color:var(--faint);margin-top:.35rem}
.columns{display:flex;flex-wrap:wrap;gap:0 4rem}
";

/// Hyper-parameters, whose tags end in a group's name.
const HYPER_PARAMETERS: [&str; 8] =
    ["lr", "momentum", "dampening", "weight_decay", "beta1", "beta2", "eps", "alpha"];

/// The chart that a tag belongs to. `training/loss` and `val/loss` share one, and so do `lr/base` and `lr/fc`, and the
/// elements of a tensor.
fn chart(tag: &str) -> &str {
    let Some((folder, name)) = tag.rsplit_once('/') else { return tag };
    let last = folder.rsplit('/').next().unwrap_or(folder);
    match HYPER_PARAMETERS.contains(&last) || name.bytes().all(|byte| byte.is_ascii_digit()) {
        true => folder,
        false => name,
    }
}

/// The place of a chart: losses come first, hyper-parameters last.
fn rank(chart: &str) -> u8 {
    let last = chart.rsplit('/').next().unwrap_or(chart);
    match HYPER_PARAMETERS.iter().any(|name| last.split(' ').next() == Some(name)) {
        true => 2,
        false => u8::from(!chart.contains("loss")),
    }
}

/// Groups curves that end at about the same step. A curve over epochs would be a dot beside one over iterations.
fn of_one_length<'c>(mut curves: Vec<(&'c str, &'c Curve)>) -> Vec<Vec<(&'c str, &'c Curve)>> {
    let last = |curve: &Curve| curve.points.last().map_or(0, |(step, _)| *step);
    curves.sort_by_key(|(_, curve)| std::cmp::Reverse(last(curve)));
    let mut charts = curves
        .chunk_by(|(_, a), (_, b)| last(a) <= 4 * last(b).max(1))
        .map(<[_]>::to_vec)
        .collect::<Vec<_>>();
    charts.iter_mut().for_each(|chart| chart.sort_by(|(a, _), (b, _)| by_number(a, b)));
    charts
}

/// Compares tags so that `recall/2` comes before `recall/10`.
fn by_number(a: &str, b: &str) -> std::cmp::Ordering {
    let key = |tag: &str| {
        let name = tag.trim_end_matches(|c: char| c.is_ascii_digit());
        (name.to_owned(), tag[name.len()..].parse::<u64>().ok(), tag.to_owned())
    };
    key(a).cmp(&key(b))
}

/// Writes the legend of the curves, with their last, lowest and highest values.
fn key(page: &mut String, curves: &[(&str, &Curve)]) -> std::fmt::Result {
    let is_long = curves.len() > COLOURS;
    if is_long {
        writeln!(page, "<details><summary>{} curves</summary>", curves.len())?;
    }
    writeln!(
        page,
        "<table class=\"key\"><tr><th></th><th>last</th><th>lowest</th><th>highest</th></tr>"
    )?;
    for (index, (tag, curve)) in curves.iter().enumerate() {
        let values = || curve.points.iter().map(|(_, value)| *value);
        let finite = || values().filter(|value| value.is_finite());
        let number = |value: Option<f64>| value.map_or_else(|| "–".into(), short);
        let last = values().next_back();
        let class = if last.is_some_and(f64::is_finite) { "" } else { " class=\"nan\"" };
        writeln!(
            page,
            "<tr><td><i style=\"background:{}\"></i>{}</td><td{class}>{}</td><td>{}</td><td>{}</td></tr>",
            colour(index, curves.len()),
            escaped(tag),
            number(last),
            number(finite().reduce(f64::min)),
            number(finite().reduce(f64::max)),
        )?;
        let bad = curve.points.iter().filter(|(_, value)| !value.is_finite());
        if let Some((step, value)) = bad.clone().next() {
            let (count, value) = (bad.count(), short(*value));
            let more =
                if count > 1 { format!(", {count} values not finite") } else { String::new() };
            writeln!(
                page,
                "<tr><td colspan=\"4\" class=\"nan\">{value} at step {step}{more}</td></tr>"
            )?;
        }
    }
    writeln!(page, "</table>{}", if is_long { "</details>" } else { "" })
}

fn table<N: AsRef<str>>(page: &mut String, title: &str, rows: &[(N, String)]) -> std::fmt::Result {
    if rows.is_empty() {
        return Ok(());
    }
    writeln!(page, "<section><h2>{title}</h2>\n<table class=\"facts\">")?;
    for (name, value) in rows {
        let (name, value) = (escaped(name.as_ref()), escaped(value));
        writeln!(page, "<tr><td>{name}</td><td>{value}</td></tr>")?;
    }
    writeln!(page, "</table></section>")
}

fn body(page: &mut String, report: &Report<'_>) -> std::fmt::Result {
    let title = escaped(report.title);
    writeln!(page, "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">")?;
    writeln!(page, "<meta name=\"viewport\" content=\"width=device-width,initial-scale=1\">")?;
    // Without this line browsers ask the server for an icon.
    writeln!(page, "<link rel=\"icon\" href=\"data:,\">")?;
    writeln!(page, "<title>{title}</title><style>{STYLE}</style></head><body>\n<h1>{title}</h1>")?;
    if !report.times.is_empty() {
        writeln!(page, "<dl>")?;
        for (name, value) in report.times {
            writeln!(page, "<div><dt>{}</dt><dd>{}</dd></div>", escaped(name), escaped(value))?;
        }
        writeln!(page, "</dl>")?;
    }
    let mut charts = BTreeMap::<(u8, &str), Vec<(&str, &Curve)>>::new();
    for (tag, curve) in report.curves {
        let name = chart(tag);
        charts.entry((rank(name), name)).or_default().push((tag, curve));
    }
    if charts.is_empty() {
        writeln!(page, "<p>Nothing was logged yet.</p>")?;
    }
    writeln!(page, "<div class=\"charts\">")?;
    let mut charts: Vec<_> = charts.into_iter().collect();
    charts.sort_by(|((a, x), _), ((b, y), _)| a.cmp(b).then_with(|| by_number(x, y)));
    for ((_, name), curves) in charts {
        for curves in of_one_length(curves) {
            writeln!(page, "<figure><figcaption>{}</figcaption>", escaped(name))?;
            chart::draw(page, &curves)?;
            key(page, &curves)?;
            writeln!(page, "</figure>")?;
        }
    }
    writeln!(page, "</div>")?;
    if report.has_more {
        writeln!(
            page,
            "<p>These are the first {TAGS} tags; the others are in <code>scalars.csv</code>.</p>"
        )?;
    }
    writeln!(page, "<div class=\"columns\">")?;
    // The configuration is JSON already, so this cannot fail.
    let config = flat::values(report.config).unwrap_or_default().into_iter();
    let config: Vec<_> = config
        .map(|(name, value)| match value {
            Value::String(text) => (name, text),
            other => (name, other.to_string()),
        })
        .collect();
    table(page, "Configuration", &config)?;
    table(page, "Environment", report.environment)?;
    writeln!(page, "</div></body></html>")
}

pub(super) fn html(report: &Report<'_>) -> String {
    let mut page = String::new();
    // Writing into a String cannot fail.
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
    fn curves_of_epochs_have_a_chart_of_their_own() {
        let curve = |last: u64| {
            let mut curve = Curve::default();
            (1..=last).for_each(|step| curve.push(step, 1.));
            curve
        };
        let (long, short, empty) = (curve(900), curve(5), curve(0));
        let charts = of_one_length(vec![
            ("val/loss", &short),
            ("training/loss", &long),
            ("test/loss", &short),
            ("x", &empty),
        ]);
        let tags: Vec<Vec<_>> =
            charts.iter().map(|chart| chart.iter().map(|(tag, _)| *tag).collect()).collect();
        assert_eq!(tags, [vec!["training/loss"], vec!["test/loss", "val/loss"], vec!["x"]]);
        assert!(by_number("recall/2", "recall/10").is_lt() && by_number("a", "b").is_lt());
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
            has_more: false,
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
