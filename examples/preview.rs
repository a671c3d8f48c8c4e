//! Shows what the schedules of a file do over a run, without any training, as a table and a picture.
//!
//! `cargo run --release --example preview -- examples/schedules/mnist.toml --epoch-length 938 --epochs 8`

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;
use tch_ignite::handlers::plot::{Curve, Panel, write_svg};
use tch_ignite::schedule::{RunLength, SchedulePlan};

/// Shows what the schedules of a file do over a run.
#[derive(Parser)]
struct Args {
    /// Schedules, as JSON or TOML
    file: PathBuf,
    /// Iterations in an epoch
    #[arg(long, value_name = "N", default_value_t = 100)]
    epoch_length: u64,
    /// Epochs in the run
    #[arg(long, value_name = "N", default_value_t = 10)]
    epochs: u64,
    /// Batches that share an update of the optimizer
    #[arg(long, value_name = "N", default_value_t = 1)]
    accumulate: u64,
    /// File for the picture
    #[arg(long, value_name = "FILE", default_value = "runs/preview.svg")]
    out: PathBuf,
}

fn preview(args: &Args) -> Result<()> {
    let plan = SchedulePlan::from_path(&args.file)?;
    let run = RunLength::new(args.epoch_length, args.epochs).accumulate(args.accumulate);
    for warning in plan.check(run)? {
        eprintln!("warning: {warning}");
    }

    let mut curves: Vec<(&str, Vec<Curve>)> = vec![];
    let width = plan.entries().iter().map(|entry| entry.name().chars().count()).max().unwrap_or(0);
    println!("{:width$}  {:>12} {:>12} {:>12} {:>12}", "", "first", "lowest", "highest", "last");
    for (entry, points) in plan.entries().iter().zip(plan.simulate_values(run)?) {
        let values = || points.iter().map(|(_, value)| *value);
        let (first, last) = (values().next(), values().next_back());
        let (low, high) = (values().reduce(f64::min), values().reduce(f64::max));
        print!("{:width$} ", entry.name());
        for value in [first, low, high, last].into_iter().flatten() {
            print!(" {:>12}", short(value));
        }
        println!();

        let curve = Curve::new(entry.name(), points);
        match curves.iter_mut().find(|(param, _)| *param == entry.param()) {
            Some((_, curves)) => curves.push(curve),
            None => curves.push((entry.param(), vec![curve])),
        }
    }
    let panels: Vec<_> =
        curves.into_iter().map(|(param, curves)| Panel::new(param, curves)).collect();
    write_svg(&args.out, &panels)?;
    println!("{} iterations drawn in {}", args.epoch_length * args.epochs, args.out.display());
    Ok(())
}

/// A number with four significant digits.
fn short(value: f64) -> String {
    let zeros = |text: &str| match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => text.to_owned(),
    };
    let text = format!("{value:.3e}");
    match text.split_once('e') {
        Some((mantissa, exponent)) => match exponent.parse::<i32>() {
            Ok(exponent @ -3..=3) => zeros(&format!("{value:.*}", (3 - exponent) as usize)),
            _ => format!("{}e{exponent}", zeros(mantissa)),
        },
        None => text,
    }
}

fn main() -> ExitCode {
    match preview(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
