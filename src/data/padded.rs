use anyhow::{Result, ensure};
use tch::{Kind, Tensor};

use super::Collate;

/// A tensor of a sample whose first dimension differs from sample to sample, such as the tokens of a text. In a batch
/// all are filled up to the longest: PyTorch's `pad_sequence`, samples first.
///
/// ```
/// use tch::Tensor;
/// use tch_ignite::data::{Collate, Padded};
/// let texts = [vec![3i64, 1], vec![4], vec![1, 5, 9]];
/// let samples = texts.map(|tokens| (Padded::new(Tensor::from_slice(&tokens)), tokens.len() as i64));
/// let (tokens, lengths) = Collate::collate(samples.to_vec())?;
/// assert_eq!(Vec::<Vec<i64>>::try_from(&tokens)?, [[3, 1, 0], [4, 0, 0], [1, 5, 9]]);
/// assert_eq!(Vec::<i64>::try_from(&lengths)?, [2, 1, 3]);
/// # anyhow::Ok(())
/// ```
#[derive(Debug)]
pub struct Padded {
    tensor: Tensor,
    value: f64,
}

impl Padded {
    /// Takes a tensor (length, …) that zeros fill up.
    pub fn new(tensor: Tensor) -> Self {
        Self { tensor, value: 0. }
    }

    /// Sets the value that fills up, the same for all samples. A batch of integers or truth values needs one that its
    /// kind can hold, or is an error.
    pub fn value(mut self, value: f64) -> Self {
        self.value = value;
        self
    }
}

impl Clone for Padded {
    /// Clones share the tensor.
    fn clone(&self) -> Self {
        Self { tensor: self.tensor.shallow_clone(), ..*self }
    }
}

impl Collate for Padded {
    type Batch = Tensor;

    fn collate(samples: Vec<Self>) -> Result<Tensor> {
        let Some(first) = samples.first() else {
            anyhow::bail!("padding needs at least one sample");
        };
        let (value, kind, shape) = (first.value, first.tensor.kind(), first.tensor.size());
        for (place, sample) in samples.iter().enumerate() {
            let (other, size) = (sample.tensor.kind(), sample.tensor.size());
            ensure!(
                !size.is_empty() && size.get(1..) == shape.get(1..) && other == kind,
                "padded samples differ in their first dimension only, but sample 0 of the batch is {kind:?} {shape:?} and sample {place} {other:?} {size:?}"
            );
            ensure!(
                sample.value.to_bits() == value.to_bits(),
                "padded samples are filled up with one value, but sample 0 of the batch says {value} and sample {place} {}",
                sample.value
            );
        }
        ensure!(
            holds(kind, value),
            "padded samples of kind {kind:?} cannot be filled up with {value:?}, which the kind cannot hold; give another value, or samples of floats"
        );
        let tensors: Vec<_> = samples.into_iter().map(|sample| sample.tensor).collect();
        Ok(Tensor::f_pad_sequence(&tensors, true, value, "right")?)
    }
}

/// Returns whether a tensor of this kind can hold the value. libtorch cuts off fractions without a word.
fn holds(kind: Kind, value: f64) -> bool {
    let range = match kind {
        Kind::Bool => 0. ..=1.,
        Kind::Uint8 => 0. ..=u8::MAX.into(),
        Kind::Int8 => i8::MIN.into()..=i8::MAX.into(),
        Kind::Int16 => i16::MIN.into()..=i16::MAX.into(),
        Kind::Int => i32::MIN.into()..=i32::MAX.into(),
        Kind::Int64 => i64::MIN as f64..=(i64::MAX as f64).next_down(),
        _ => return true,
    };
    value.fract() == 0. && range.contains(&value)
}
