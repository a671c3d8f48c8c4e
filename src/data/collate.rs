use anyhow::{Context, Result};
use tch::Tensor;

/// Samples that can be put together into a batch: PyTorch's `default_collate`.
///
/// Tensors of one shape are stacked along a new first dimension, numbers become a tensor (N,) of their own kind,
/// tuples are collated part by part, strings become a list.
///
/// ```
/// use tch_ignite::data::Collate;
/// let (x, y) = Collate::collate(vec![(0.5f32, 1i64), (1.5, 2)])?;
/// assert_eq!(Vec::<f32>::try_from(&x)?, [0.5, 1.5]);
/// assert_eq!(y.kind(), tch::Kind::Int64);
/// # anyhow::Ok(())
/// ```
#[diagnostic::on_unimplemented(
    message = "samples `{Self}` cannot be put together into a batch",
    note = "tensors, numbers, texts and tuples of them can; for a type of your own implement `Collate`, or give the loader a function by `with_collate`"
)]
pub trait Collate: Sized {
    /// The type of a batch.
    type Batch;

    /// Makes a batch of these samples, of which there is at least one.
    ///
    /// # Errors
    /// Samples that do not fit together, for instance tensors of different shapes.
    fn collate(samples: Vec<Self>) -> Result<Self::Batch>;
}

impl Collate for Tensor {
    type Batch = Tensor;

    fn collate(samples: Vec<Self>) -> Result<Tensor> {
        if let Some(first) = samples.first().map(Tensor::size)
            && let Some((place, other)) =
                samples.iter().map(Tensor::size).enumerate().find(|(_, size)| *size != first)
        {
            anyhow::bail!(
                "the samples of a batch need one shape, but sample 0 of it has {first:?} and sample {place} has {other:?}; make them equal in the dataset, or give the loader a collate function"
            );
        }
        Tensor::f_stack(&samples, 0).context("stacking the samples of a batch")
    }
}

macro_rules! collate_numbers {
    ($($number:ty),*) => {$(
        impl Collate for $number {
            type Batch = Tensor;

            fn collate(samples: Vec<Self>) -> Result<Tensor> {
                Ok(Tensor::f_from_slice(&samples)?)
            }
        }
    )*};
}
collate_numbers!(f32, f64, i8, i16, i32, i64, u8, bool);

impl Collate for String {
    type Batch = Vec<String>;

    fn collate(samples: Vec<Self>) -> Result<Vec<String>> {
        Ok(samples)
    }
}

impl<A: Collate, B: Collate> Collate for (A, B) {
    type Batch = (A::Batch, B::Batch);

    fn collate(samples: Vec<Self>) -> Result<Self::Batch> {
        let (a, b) = samples.into_iter().unzip();
        Ok((A::collate(a)?, B::collate(b)?))
    }
}

impl<A: Collate, B: Collate, C: Collate> Collate for (A, B, C) {
    type Batch = (A::Batch, B::Batch, C::Batch);

    fn collate(samples: Vec<Self>) -> Result<Self::Batch> {
        let (a, rest): (Vec<A>, Vec<(B, C)>) =
            samples.into_iter().map(|(a, b, c)| (a, (b, c))).unzip();
        let (b, c) = Collate::collate(rest)?;
        Ok((A::collate(a)?, b, c))
    }
}
