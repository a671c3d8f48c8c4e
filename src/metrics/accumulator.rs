use serde::{Deserialize, Serialize};
use tch::{TchError, Tensor};

/// How several processes, or several batches, join a part of a metric's state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reduce {
    /// Adds the tensors.
    Sum,
    /// Takes the mean over processes, for values that do not add up, such as a running average. In a
    /// [`Pairwise`](super::Pairwise) it is the mean over samples: each batch counts by their number, in one process as in
    /// several.
    Mean,
    /// Takes the larger, element by element.
    Max,
    /// Takes the smaller, element by element.
    Min,
    /// Puts one after the other along the first dimension, in the order of batches and ranks.
    Concat,
}

/// A part of a metric's accumulated state.
#[derive(Debug)]
pub struct Accumulated {
    /// The part's name, unique within the metric.
    pub name: String,
    /// The accumulated tensor, on the device that accumulates it.
    pub value: Tensor,
    /// How processes join the part.
    pub reduce: Reduce,
}

impl Accumulated {
    /// Makes a part of a state.
    pub fn new(name: impl Into<String>, value: Tensor, reduce: Reduce) -> Self {
        Self { name: name.into(), value, reduce }
    }

    /// Finds a part by its name; the tensor is shared.
    ///
    /// # Errors
    /// A state without a part of that name.
    pub fn find(state: &[Self], name: &str) -> anyhow::Result<Tensor> {
        let part = state.iter().find(|part| part.name == name);
        let part = part.ok_or_else(|| anyhow::anyhow!("'{name}' is missing in the state"))?;
        Ok(part.value.shallow_clone())
    }

    /// Returns the same part; the tensor is shared.
    pub(super) fn share(&self) -> Self {
        Self::new(self.name.clone(), self.value.shallow_clone(), self.reduce)
    }

    /// Refuses a state with parts under other prefixes than these.
    pub(super) fn check_prefixes(state: &[Self], known: &[String]) -> anyhow::Result<()> {
        for part in state {
            let prefix = part.name.split_once('/').map_or("", |(prefix, _)| prefix);
            anyhow::ensure!(
                known.iter().any(|known| known == prefix),
                "the state has a part '{}', and this metric is made of: {}",
                part.name,
                known.join(", ")
            );
        }
        Ok(())
    }

    /// Returns the parts whose names begin with `prefix/`, named by the rest.
    pub(super) fn within(state: &[Self], prefix: &str) -> Vec<Self> {
        let part = |part: &Self| {
            let name = part.name.strip_prefix(prefix)?.strip_prefix('/')?.to_owned();
            Some(Self { name, value: part.value.shallow_clone(), reduce: part.reduce })
        };
        state.iter().filter_map(part).collect()
    }
}

/// The name of the part that holds the number of samples.
const SAMPLES: &str = "samples";

/// Tensors that are added up, or gathered, batch by batch.
pub(super) struct Accumulator {
    parts: &'static [(&'static str, Reduce)],
    /// The tensors of each part: one, or one for each batch where they are gathered; of a mean, the sum over samples.
    /// Empty before the first batch.
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

    /// Adds one tensor for each part, in the order of the parts.
    pub(super) fn add(&mut self, mut batch: Vec<Tensor>, samples: u64) -> anyhow::Result<()> {
        debug_assert_eq!(batch.len(), self.parts.len());
        for (part, (_, reduce)) in batch.iter_mut().zip(self.parts) {
            if *reduce == Reduce::Mean {
                *part = part.f_mul_scalar(samples as f64)?;
            }
        }
        if self.held.is_empty() {
            self.held = batch.into_iter().map(|part| vec![part]).collect();
        } else {
            for (held, part) in self.held.iter_mut().zip(&batch) {
                let device = part.device();
                if held.last().is_some_and(|held| held.device() != device) {
                    // A state loaded from a checkpoint is on the CPU; it moves to the device of the batch.
                    *held = held.iter().map(|t| t.f_to_device(device)).collect::<Result<_, _>>()?;
                }
            }
            // The sums change only after all have been computed, so that an error leaves them as they were.
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

    /// Returns one tensor for each part; empty before the first batch. Gathered batches are copied into one tensor.
    pub(super) fn tensors(&self) -> Result<Vec<Tensor>, TchError> {
        let joined = |(held, (_, reduce)): (_, &(&str, Reduce))| match reduce {
            Reduce::Mean => Self::joined(held)?.f_div_scalar(self.samples as f64),
            _ => Self::joined(held),
        };
        self.held.iter().zip(self.parts).map(joined).collect()
    }

    fn joined(held: &Vec<Tensor>) -> Result<Tensor, TchError> {
        match held.as_slice() {
            [one] => Ok(one.shallow_clone()),
            many => Tensor::f_cat(many, 0),
        }
    }

    pub(super) fn state(&self) -> anyhow::Result<Vec<Accumulated>> {
        if self.held.is_empty() {
            return Ok(vec![]);
        }
        let part = |(held, (name, reduce)): (_, &(&str, Reduce))| {
            // A mean is held as a sum over samples, and processes join it as such.
            let reduce = if *reduce == Reduce::Mean { Reduce::Sum } else { *reduce };
            Ok(Accumulated::new(*name, Self::joined(held)?, reduce))
        };
        let parts = self.held.iter().zip(self.parts).map(part);
        let samples = Accumulated::new(SAMPLES, Tensor::from(self.samples as i64), Reduce::Sum);
        parts.chain([Ok(samples)]).collect()
    }

    /// Takes over a state; on error nothing is changed. Tensors from a checkpoint are on the CPU, and move to the
    /// device of the next batch.
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

/// Checks that a gathered batch has the type of those before it, and their shape but for the first dimension.
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

#[cfg(test)]
mod tests {
    use super::super::exchange::join;
    use super::*;

    #[test]
    fn a_mean_is_the_same_in_one_process_and_in_several() -> anyhow::Result<()> {
        const PARTS: &[(&str, Reduce)] = &[("mean", Reduce::Mean), ("largest", Reduce::Max)];
        let of = |batches: &[(f64, u64)]| -> anyhow::Result<Accumulator> {
            let mut sums = Accumulator::new(PARTS);
            for (mean, samples) in batches {
                sums.add(vec![Tensor::from(*mean), Tensor::from(*mean)], *samples)?;
            }
            Ok(sums)
        };
        let batches = [(1., 1), (4., 2), (10., 3)];
        let values = |sums: &Accumulator| -> anyhow::Result<Vec<f64>> {
            sums.tensors()?.iter().map(|value| Ok(value.f_double_value(&[])?)).collect()
        };
        assert_eq!(values(&of(&batches)?)?, [6.5, 10.]);
        for cut in 0..=batches.len() {
            let (first, second) = (of(&batches[..cut])?.state()?, of(&batches[cut..])?.state()?);
            let mut joined = Accumulator::new(PARTS);
            joined.load_state(&join(&[&first, &second])?)?;
            assert_eq!(values(&joined)?, [6.5, 10.], "{cut}");
        }
        Ok(())
    }
}
