//! The outcome of a program, and the comparison of two outcomes.

use serde::{Deserialize, Serialize};
use tch::Tensor;
use tch_ignite::Result;
use tch_ignite::checkpoint::{StateDict, Stateful};

/// The values at one point of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    pub what: String,
    pub number: u64,
    pub values: Vec<(String, Vec<f64>)>,
}

/// The records of a run, and where the run is. The trace is a part of the engine's checkpoints, so a resumed run
/// replaces the records that were made after its checkpoint.
#[derive(Debug, Default, Clone, Serialize, Deserialize)]
pub struct Trace {
    pub records: Vec<Record>,
    /// Which of the planted breaks that leave a trace have happened.
    pub happened: Vec<bool>,
    /// The position of the run, which decides whether a planted break is due.
    pub epoch: u64,
    pub iteration: u64,
    /// How many of the program's budgets are used up.
    pub budgets: usize,
    /// Whether a batch is being fetched for the first time.
    pub fetching: bool,
    /// How often the loss was computed in the iteration.
    pub evaluations: u32,
}

impl Trace {
    pub fn record(&mut self, what: impl Into<String>, number: u64, values: Vec<(&str, Vec<f64>)>) {
        let values = values.into_iter().map(|(name, values)| (name.to_owned(), values)).collect();
        self.records.push(Record { what: what.into(), number, values });
    }
}

impl Stateful for Trace {
    fn state_dict(&self) -> Result<StateDict> {
        let mut state = StateDict::new();
        state.set_value("trace", self)?;
        Ok(state)
    }

    fn load_state_dict(&mut self, state: StateDict) -> Result<()> {
        *self = state.value("trace")?;
        Ok(())
    }
}

/// Everything that a program leaves.
#[derive(Debug, Default, Clone, Serialize, Deserialize)]
pub struct Outcome {
    pub trace: Vec<Record>,
    /// How the program ended, in words.
    pub end: String,
    /// Tag, step and value of each line.
    pub log: Vec<(String, u64, f64)>,
    /// Names of the files of the best epochs.
    pub best: Vec<String>,
    /// The iteration at which a resume gave batches another size.
    pub other_size_after: Option<u64>,
}

/// The elements of tensors.
pub fn numbers<'t>(tensors: impl IntoIterator<Item = &'t Tensor>) -> Vec<f64> {
    let flat = |tensor: &Tensor| {
        Vec::<f64>::try_from(tensor.detach().to_kind(tch::Kind::Double).reshape([-1])).unwrap()
    };
    tensors.into_iter().flat_map(flat).collect()
}

/// Whether numbers differ by no more than this share of the largest of them, or of 1 if that is larger. The data and
/// parameters are about as large as 1, and a weight or a loss may be the small difference of such numbers.
fn all_same(a: &[f64], b: &[f64], tolerance: f64) -> bool {
    let finite = a.iter().chain(b).filter(|value| value.is_finite());
    let largest = finite.fold(1f64, |largest, value| largest.max(value.abs()));
    let same = |(a, b): (&f64, &f64)| {
        a == b || a.is_nan() && b.is_nan() || (a - b).abs() <= tolerance * largest
    };
    a.len() == b.len() && a.iter().zip(b).all(same)
}

/// A difference between two outcomes.
pub struct Difference {
    /// The number of the first record that differs; larger than all numbers if only something else than the records
    /// differs.
    pub place: usize,
    pub text: String,
}

/// The first difference between two outcomes, if there is one.
pub fn difference(expected: &Outcome, got: &Outcome, tolerance: f64) -> Option<Difference> {
    for (place, right) in expected.trace.iter().enumerate() {
        let differs = |text| Some(Difference { place, text });
        let before = before(&got.trace, place);
        let Some(record) = got.trace.get(place) else {
            return differs(format!(
                "nothing comes after {before}; right is {} {}\n  the engine: {}\n  right is: {}",
                right.what, right.number, got.end, expected.end
            ));
        };
        let Record { what, number, values } = record;
        if (what, *number) != (&right.what, right.number) {
            return differs(format!(
                "after {before} comes {what} {number}; right is {} {}",
                right.what, right.number
            ));
        }
        let names = |values: &[(String, Vec<f64>)]| -> Vec<String> {
            values.iter().map(|(name, _)| name.clone()).collect()
        };
        if names(values) != names(&right.values) {
            let (got, right) = (names(values), names(&right.values));
            return differs(format!("{what} {number} has {got:?}; right is {right:?}"));
        }
        for ((name, got), (_, right)) in values.iter().zip(&right.values) {
            if !all_same(got, right, tolerance) {
                return differs(format!("{what} {number}: {name} {got:?}; right is {right:?}"));
            }
        }
    }
    let place = usize::MAX;
    let differs = |text| Some(Difference { place, text });
    if let Some(more) = got.trace.get(expected.trace.len()) {
        let Record { what, number, .. } = more;
        return differs(format!("after the end comes {what} {number}; right is: {}", expected.end));
    }
    if expected.end != got.end {
        return differs(format!("{}; right is: {}", got.end, expected.end));
    }
    for place in 0..expected.log.len().max(got.log.len()) {
        let (right, line) = (expected.log.get(place), got.log.get(place));
        let equal = right.zip(line).is_some_and(|((tag, step, value), line)| {
            (tag, step) == (&line.0, &line.1) && all_same(&[*value], &[line.2], tolerance)
        });
        if !equal {
            return differs(format!("line {place} of the log: {line:?}; right is {right:?}"));
        }
    }
    // The losses are compared and not the epochs, because epochs may be equally good but for rounding.
    let losses = |names: &[String]| -> Vec<String> {
        let loss = |name: &String| name.split_once("loss=").map_or("", |(_, loss)| loss).to_owned();
        names.iter().map(loss).collect()
    };
    let (mut best, mut right) = (losses(&got.best), losses(&expected.best));
    best.sort();
    right.sort();
    if best != right {
        return differs(format!("the best are {:?}; right is {:?}", got.best, expected.best));
    }
    None
}

fn before(trace: &[Record], place: usize) -> String {
    match place.checked_sub(1).and_then(|place| trace.get(place)) {
        Some(record) => format!("{} {}", record.what, record.number),
        None => "the beginning".into(),
    }
}
