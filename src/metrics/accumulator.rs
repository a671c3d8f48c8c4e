use serde::{Deserialize, Serialize};
use tch::{TchError, Tensor};

/// How several processes, or several batches, join a part of a metric's state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reduce {
    /// The sum.
    Sum,
    /// The mean: what does not add up, such as a running average.
    Mean,
    /// The larger, element by element.
    Max,
    /// The smaller, element by element.
    Min,
    /// One after the other, along the first dimension.
    Concat,
}

/// A part of a metric's accumulated state.
#[derive(Debug)]
pub struct Accumulated {
    /// Its name, unique within the metric.
    pub name: String,
    /// What was accumulated, on the device where it is.
    pub value: Tensor,
    /// How processes join it.
    pub reduce: Reduce,
}

impl Accumulated {
    /// A part.
    pub fn new(name: impl Into<String>, value: Tensor, reduce: Reduce) -> Self {
        Self { name: name.into(), value, reduce }
    }

    /// The part of that name, or an error that says that it is missing.
    pub fn find(state: &[Self], name: &str) -> anyhow::Result<Tensor> {
        let part = state.iter().find(|part| part.name == name);
        let part = part.ok_or_else(|| anyhow::anyhow!("'{name}' is missing in the state"))?;
        Ok(part.value.shallow_clone())
    }

    /// The same part; the tensor is shared.
    pub(super) fn share(&self) -> Self {
        Self::new(self.name.clone(), self.value.shallow_clone(), self.reduce)
    }

    /// The parts under `prefix/`, with the rest of their names.
    pub(super) fn within(state: &[Self], prefix: &str) -> Vec<Self> {
        let part = |part: &Self| {
            let name = part.name.strip_prefix(prefix)?.strip_prefix('/')?.to_owned();
            Some(Self { name, value: part.value.shallow_clone(), reduce: part.reduce })
        };
        state.iter().filter_map(part).collect()
    }
}

/// The name under which the number of samples is listed.
const SAMPLES: &str = "samples";

/// Tensors that are added up, or gathered, batch by batch.
pub(super) struct Accumulator {
    parts: &'static [(&'static str, Reduce)],
    /// For each part what it is, in several tensors only while it is gathered.
    held: Vec<Vec<Tensor>>,
    samples: u64,
}

impl Accumulator {
    pub(super) fn new(parts: &'static [(&'static str, Reduce)]) -> Self {
        Self { parts, held: vec![], samples: 0 }
    }

    pub(super) fn reset(&mut self) {
        self.held.clear();
        self.samples = 0;
    }

    pub(super) fn samples(&self) -> u64 {
        self.samples
    }

    /// Takes in one tensor for each part.
    pub(super) fn add(&mut self, batch: Vec<Tensor>, samples: u64) -> anyhow::Result<()> {
        debug_assert_eq!(batch.len(), self.parts.len());
        if self.held.is_empty() {
            self.held = batch.into_iter().map(|part| vec![part]).collect();
        } else {
            for (held, part) in self.held.iter_mut().zip(&batch) {
                let device = part.device();
                if held.last().is_some_and(|held| held.device() != device) {
                    // Loaded from a checkpoint.
                    *held = held.iter().map(|t| t.f_to_device(device)).collect::<Result<_, _>>()?;
                }
            }
            // All or nothing: an error leaves the sums as they were.
            let mut joined = Vec::with_capacity(batch.len());
            for ((held, part), (name, reduce)) in self.held.iter().zip(&batch).zip(self.parts) {
                joined.push(match (held.last(), reduce) {
                    (Some(last), Reduce::Concat) => {
                        check_alike(name, last, part)?;
                        part.shallow_clone()
                    }
                    (Some(sum), Reduce::Sum | Reduce::Mean) => sum.f_add(part)?,
                    (Some(max), Reduce::Max) => max.f_maximum(part)?,
                    (Some(min), Reduce::Min) => min.f_minimum(part)?,
                    (None, _) => part.shallow_clone(),
                });
            }
            for ((held, part), (_, reduce)) in self.held.iter_mut().zip(joined).zip(self.parts) {
                match reduce {
                    Reduce::Concat => held.push(part),
                    _ => *held = vec![part],
                }
            }
        }
        self.samples += samples;
        Ok(())
    }

    /// One tensor for each part; empty before the first batch.
    pub(super) fn tensors(&self) -> Result<Vec<Tensor>, TchError> {
        let joined = |held: &Vec<Tensor>| match held.as_slice() {
            [one] => Ok(one.shallow_clone()),
            many => Tensor::f_cat(many, 0),
        };
        self.held.iter().map(joined).collect()
    }

    pub(super) fn state(&self) -> anyhow::Result<Vec<Accumulated>> {
        if self.held.is_empty() {
            return Ok(vec![]);
        }
        let tensors = self.tensors()?.into_iter().zip(self.parts);
        let part =
            |(value, (name, reduce)): (_, &(&str, _))| Accumulated::new(*name, value, *reduce);
        let samples = Tensor::from(self.samples as i64);
        let samples = Accumulated::new(SAMPLES, samples, Reduce::Sum);
        Ok(tensors.map(part).chain([samples]).collect())
    }

    /// Nothing is changed on error. What comes from a checkpoint is on the CPU; it moves with the next
    /// batch.
    pub(super) fn load_state(&mut self, state: &[Accumulated]) -> anyhow::Result<()> {
        if state.is_empty() {
            self.reset();
            return Ok(());
        }
        let known =
            |name: &str| name == SAMPLES || self.parts.iter().any(|(part, _)| *part == name);
        if let Some(part) = state.iter().find(|part| !known(&part.name)) {
            anyhow::bail!("this metric keeps no '{}'", part.name);
        }
        let held = self.parts.iter().map(|(name, _)| Ok(vec![Accumulated::find(state, name)?]));
        let held = held.collect::<anyhow::Result<_>>()?;
        let samples = u64::try_from(Accumulated::find(state, SAMPLES)?.f_int64_value(&[])?)?;
        self.held = held;
        self.samples = samples;
        Ok(())
    }
}

/// Gathered batches must fit together.
fn check_alike(name: &str, stored: &Tensor, new: &Tensor) -> anyhow::Result<()> {
    anyhow::ensure!(
        stored.kind() == new.kind(),
        "Incoherent types between input {name} and stored {name}: {:?} vs {:?}",
        stored.kind(),
        new.kind()
    );
    anyhow::ensure!(
        stored.dim() == new.dim() && stored.size().get(1..) == new.size().get(1..),
        "the shape of {name} has changed from {:?} to {:?}",
        stored.size(),
        new.size()
    );
    Ok(())
}
