//! Draws one value of several runs into one picture, from the tables that `CsvLogger` writes, and prints what it reached
//! and when. Runs of one name are averaged.
//!
//! `cargo run --release --example curves -- --tag val/loss --reach 2.0 a=runs/a0.csv,runs/a1.csv b=runs/b0.csv`

use std::path::PathBuf;
use std::str::FromStr;

use anyhow::{Context, Error, Result, ensure};
use clap::Parser;
use tch_ignite::handlers::plot::{Curve, Panel, write_svg};

/// Draws one value of several runs into one picture, and prints what it reached and when.
#[derive(Parser)]
struct Args {
    /// A curve: the mean of the runs in these tables
    #[arg(value_name = "NAME=FILE,...", required = true)]
    curves: Vec<Runs>,
    /// The tag of the value
    #[arg(long, default_value = "val/loss")]
    tag: String,
    /// Print also when the value got here
    #[arg(long, value_name = "VALUE", allow_negative_numbers = true)]
    reach: Vec<f64>,
    /// Title of the picture [default: the tag]
    #[arg(long)]
    title: Option<String>,
    /// Leave out what was before this step
    #[arg(long, value_name = "STEP", default_value_t = 0)]
    from: u64,
    /// File for the picture
    #[arg(long, value_name = "FILE", default_value = "runs/curves.svg")]
    out: PathBuf,
}

/// The tables of runs that differ in nothing but their random numbers.
#[derive(Clone)]
struct Runs {
    name: String,
    tables: Vec<PathBuf>,
}

impl FromStr for Runs {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let (name, tables) = text.split_once('=').context("a curve is NAME=FILE,...")?;
        Ok(Self { name: name.into(), tables: tables.split(',').map(PathBuf::from).collect() })
    }
}

type Points = Vec<(u64, f64)>;

/// The values of a tag in each of the tables.
fn read(runs: &Runs, tag: &str) -> Result<Vec<Points>> {
    let point = |row: &str| {
        let mut cells = row.split(',').skip(1);
        let (step, tag_of_row, value) = (cells.next()?, cells.next()?, cells.next()?);
        (tag_of_row == tag).then(|| Some((step.parse().ok()?, value.parse().ok()?)))?
    };
    let read = |table: &PathBuf| {
        let text = std::fs::read_to_string(table)
            .with_context(|| format!("no table in {}", table.display()))?;
        let points: Points = text.lines().filter_map(point).collect();
        ensure!(!points.is_empty(), "{} has no '{tag}'", table.display());
        Ok(points)
    };
    runs.tables.iter().map(read).collect()
}

/// The means over the runs, at the steps that all of them have.
fn mean(runs: &[Points]) -> Points {
    let at = |step| {
        let of = |run: &Points| run.iter().find(|point| point.0 == step).map(|point| point.1);
        let values: Option<Vec<f64>> = runs.iter().map(of).collect();
        Some((step, values?.iter().sum::<f64>() / runs.len() as f64))
    };
    runs[0].iter().filter_map(|(step, _)| at(*step)).collect()
}

/// The step at which the value first is where it was to get to, in a straight line between two steps.
fn reached(run: &Points, goal: f64) -> Option<f64> {
    let falls = run[0].1 > goal;
    let past = |value: f64| if falls { value <= goal } else { value >= goal };
    let at = run.iter().position(|point| past(point.1))?;
    let ((x, y), Some((x0, y0))) = (run[at], at.checked_sub(1).map(|before| run[before])) else {
        return Some(run[at].0 as f64);
    };
    Some(x0 as f64 + (x - x0) as f64 * (goal - y0) / (y - y0))
}

/// The mean of the values, with the lowest and the highest.
fn spread(values: Option<Vec<f64>>, digits: usize) -> String {
    let Some(values) = values else { return "not by all".into() };
    let mean = values.iter().sum::<f64>() / values.len() as f64;
    let (low, high) =
        (values.iter().copied().reduce(f64::min), values.into_iter().reduce(f64::max));
    let (low, high) = (low.unwrap_or(mean), high.unwrap_or(mean));
    format!("{mean:.digits$} ({low:.digits$} to {high:.digits$})")
}

fn main() -> Result<()> {
    let args = Args::parse();
    let reach: String = args.reach.iter().map(|goal| format!(" steps to {goal} |")).collect();
    println!("| | runs | last {} |{reach}", args.tag);
    println!("|---|---|---|{}", "---|".repeat(args.reach.len()));
    let mut curves = vec![];
    for runs in &args.curves {
        let points = read(runs, &args.tag)?;
        let last = points.iter().map(|run| run.last().map(|point| point.1)).collect();
        print!("| {} | {} | {} |", runs.name, points.len(), spread(last, 4));
        for goal in &args.reach {
            let steps = points.iter().map(|run| reached(run, *goal)).collect();
            print!(" {} |", spread(steps, 0));
        }
        println!();
        let shown = mean(&points).into_iter().filter(|point| point.0 >= args.from);
        curves.push(Curve::new(&runs.name, shown));
    }
    write_svg(&args.out, &[Panel::new(args.title.unwrap_or(args.tag), curves)])?;
    println!("\n{} is written", args.out.display());
    Ok(())
}
