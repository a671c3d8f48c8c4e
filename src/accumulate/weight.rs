use tch::{Device, Kind, TchError, Tensor};

use crate::error::{Error, Result};

/// How much the loss of a batch counts among the batches that share a step: the number by which the loss was divided.
/// For a mean over samples this is the number of samples, for a mean over tokens the number of tokens that are not
/// padding.
///
/// Only the proportions of weights matter. A tensor of one element may be on any device and is not read: no host sync.
#[derive(Debug)]
#[non_exhaustive]
pub enum Weight {
    /// A number on the host.
    Number(f64),
    /// A tensor of one element, on any device.
    Tensor(Tensor),
}

impl From<f64> for Weight {
    fn from(weight: f64) -> Self {
        Self::Number(weight)
    }
}

macro_rules! from_integers {
    ($($integer:ty)*) => {
        $(impl From<$integer> for Weight {
            fn from(weight: $integer) -> Self {
                Self::Number(weight as f64)
            }
        })*
    };
}

from_integers!(i32 u32 i64 u64 usize);

impl From<Tensor> for Weight {
    fn from(weight: Tensor) -> Self {
        Self::Tensor(weight)
    }
}

impl From<&Tensor> for Weight {
    fn from(weight: &Tensor) -> Self {
        Self::Tensor(weight.shallow_clone())
    }
}

/// The result of the loss function of a [`Supervised`](crate::supervised::Supervised) context: the loss alone, if it is
/// a mean over the samples of the batch, or `(loss, weight)`, where the weight is the number by which the loss was
/// divided.
#[derive(Debug)]
pub struct WeightedLoss {
    pub(crate) loss: Tensor,
    /// `None` stands for the number of samples of the batch.
    pub(crate) weight: Option<Weight>,
}

impl From<Tensor> for WeightedLoss {
    fn from(loss: Tensor) -> Self {
        Self { loss, weight: None }
    }
}

impl<W: Into<Weight>> From<(Tensor, W)> for WeightedLoss {
    fn from((loss, weight): (Tensor, W)) -> Self {
        Self { loss, weight: Some(weight.into()) }
    }
}

fn failed(error: TchError) -> Error {
    Error::libtorch("weighing the losses of a window", error)
}

/// A weight or a product of weights: a number, or a tensor of one f64 element on a device where reading it would be a
/// host sync.
#[derive(Debug)]
pub(crate) enum Amount {
    Number(f64),
    Tensor(Tensor),
}

impl Amount {
    /// The amount of a weight, for a loss on `device`.
    ///
    /// # Errors
    /// A number that is negative or not finite; a tensor that does not have exactly one element.
    pub(crate) fn of(weight: Weight, device: Device) -> Result<Self> {
        let number = match weight {
            Weight::Number(number) => number,
            Weight::Tensor(tensor) => {
                if !tensor.defined() || tensor.numel() != 1 {
                    return Err(Error::invalid(format!(
                        "the weight of a batch must be one number, but a tensor of shape {:?} was given",
                        tensor.size()
                    )));
                }
                let tensor =
                    tensor.f_detach().and_then(|t| t.f_reshape([0i64; 0])).map_err(failed)?;
                match Self::from_tensor(&tensor, device)? {
                    Self::Number(number) => number,
                    amount => return Ok(amount),
                }
            }
        };
        if number >= 0. && number.is_finite() {
            return Ok(Self::Number(number));
        }
        Err(Error::invalid(format!(
            "the weight of a batch must be finite and not negative, but {number} was given"
        )))
    }

    /// The amount of a tensor of one element. A tensor on the CPU is read; another one is moved to `device`.
    pub(crate) fn from_tensor(tensor: &Tensor, device: Device) -> Result<Self> {
        let tensor = tensor.f_to_kind(Kind::Double).map_err(failed)?;
        if tensor.device() != Device::Cpu {
            return tensor.f_to_device(device).map(Self::Tensor).map_err(failed);
        }
        let mut number = [0.];
        tensor.f_copy_data(&mut number, 1).map_err(failed)?;
        Ok(Self::Number(number[0]))
    }

    /// The amount as a tensor of one f64 element on `device`.
    pub(crate) fn tensor(&self, device: Device) -> Result<Tensor> {
        match self {
            // Unlike a copy from the host, filling is no host sync.
            Self::Number(number) => Tensor::f_full([0i64; 0], *number, (Kind::Double, device)),
            Self::Tensor(tensor) => tensor.f_to_device(device),
        }
        .map_err(failed)
    }

    /// Whether the amount is known to be this number. False for tensors, which are not read.
    pub(crate) fn is(&self, number: f64) -> bool {
        matches!(self, Self::Number(ours) if *ours == number)
    }

    /// The amount itself, or 1 if it is 0.
    pub(crate) fn or_one(&self) -> Result<Self> {
        match self {
            Self::Number(number) => Ok(Self::Number(if *number == 0. { 1. } else { *number })),
            Self::Tensor(tensor) => {
                let zero = tensor.f_eq(0.).and_then(|zero| zero.f_to_kind(Kind::Double));
                zero.and_then(|zero| tensor.f_add(&zero)).map(Self::Tensor).map_err(failed)
            }
        }
    }

    pub(crate) fn add(&self, other: &Self) -> Result<Self> {
        self.with(other, |a, b| a + b, tch::Tensor::f_add)
    }

    pub(crate) fn mul(&self, other: &Self) -> Result<Self> {
        self.with(other, |a, b| a * b, tch::Tensor::f_mul)
    }

    pub(crate) fn div(&self, other: &Self) -> Result<Self> {
        self.with(other, |a, b| a / b, tch::Tensor::f_div)
    }

    /// Combines two amounts: as numbers if both are numbers, otherwise on the device of a tensor.
    fn with(
        &self,
        other: &Self,
        numbers: impl FnOnce(f64, f64) -> f64,
        tensors: impl FnOnce(&Tensor, &Tensor) -> Result<Tensor, TchError>,
    ) -> Result<Self> {
        let device = match (self, other) {
            (Self::Number(a), Self::Number(b)) => return Ok(Self::Number(numbers(*a, *b))),
            (Self::Tensor(tensor), _) | (_, Self::Tensor(tensor)) => tensor.device(),
        };
        tensors(&self.tensor(device)?, &other.tensor(device)?).map(Self::Tensor).map_err(failed)
    }

    /// The loss times this amount. A loss in f16 or bf16 becomes f32 (unless the amount is the number 1), so that the
    /// amount keeps its digits.
    pub(crate) fn times(&self, loss: &Tensor) -> Result<Tensor> {
        match self {
            Self::Number(number) if *number == 1. => Ok(loss.shallow_clone()),
            Self::Number(number) => wide(loss)?.f_mul_scalar(*number).map_err(failed),
            Self::Tensor(tensor) => {
                let loss = wide(loss)?;
                let factor =
                    tensor.f_to_device(loss.device()).and_then(|t| t.f_to_kind(loss.kind()));
                factor.and_then(|factor| loss.f_mul(&factor)).map_err(failed)
            }
        }
    }
}

/// The loss in f32 if it is f16 or bf16, otherwise the loss itself.
fn wide(loss: &Tensor) -> Result<Tensor> {
    match loss.kind() {
        Kind::Half | Kind::BFloat16 => loss.f_to_kind(Kind::Float).map_err(failed),
        _ => Ok(loss.shallow_clone()),
    }
}
