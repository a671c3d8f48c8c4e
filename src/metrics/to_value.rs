use tch::kind::Element;
use tch::{Device, Kind, TchError, Tensor};

use crate::bridge::dense_on_cpu;
use crate::metrics::MetricValue;

/// Outputs that are a value themselves, for the `new` of [`Mean`](super::Mean), [`Average`](super::Average),
/// [`GeometricAverage`](super::GeometricAverage) and [`RunningAverage`](super::RunningAverage).
#[diagnostic::on_unimplemented(
    message = "`{Self}` is no value",
    note = "`new` takes the output itself, where that is a number or a tensor; `of` takes a value out of it: `Mean::of(|output: &Output| output.loss)`"
)]
pub trait ToValue {
    /// Returns the value; a tensor is shared, not copied.
    fn to_value(&self) -> MetricValue;
}

impl ToValue for Tensor {
    fn to_value(&self) -> MetricValue {
        self.shallow_clone().into()
    }
}

/// Returns the value itself; tensors are shared.
impl ToValue for MetricValue {
    fn to_value(&self) -> MetricValue {
        self.share()
    }
}

impl ToValue for f64 {
    fn to_value(&self) -> MetricValue {
        (*self).into()
    }
}

/// Returns the type to accumulate in: f64, or f32 on devices that have no f64.
pub(super) fn accumulator_kind(device: Device) -> Kind {
    match device {
        Device::Mps => Kind::Float,
        _ => Kind::Double,
    }
}

/// A single value to add up, in the accumulator's type, on the device where it is.
pub(super) enum Scalar {
    Number(f64),
    Tensor(Tensor),
}

impl Scalar {
    pub(super) fn of(value: MetricValue) -> anyhow::Result<Self> {
        let tensor = match value {
            MetricValue::Tensor(tensor) => tensor,
            value => return Ok(Self::Number(value.read()?)),
        };
        anyhow::ensure!(
            tensor.numel() == 1,
            "a single value is needed, but the tensor has shape {:?}",
            tensor.size()
        );
        let kind = accumulator_kind(tensor.device());
        // A copy, because somebody may change the step's tensor in place.
        Ok(Self::Tensor(tensor.f_detach()?.f_reshape([0i64; 0])?.f_to_dtype(kind, false, true)?))
    }

    pub(super) fn times(&self, factor: f64) -> Result<Self, TchError> {
        Ok(match self {
            Self::Number(value) => Self::Number(value * factor),
            Self::Tensor(value) => Self::Tensor(value.f_mul_scalar(factor)?),
        })
    }

    pub(super) fn over(&self, divisor: f64) -> Result<Self, TchError> {
        Ok(match self {
            Self::Number(value) => Self::Number(value / divisor),
            Self::Tensor(value) => Self::Tensor(value.f_div_scalar(divisor)?),
        })
    }

    pub(super) fn plus(&self, other: &Self) -> Result<Self, TchError> {
        Ok(match (self, other) {
            (Self::Number(a), Self::Number(b)) => Self::Number(a + b),
            (Self::Tensor(a), Self::Tensor(b)) => Self::Tensor(a.f_add(b)?),
            (Self::Tensor(tensor), Self::Number(number))
            | (Self::Number(number), Self::Tensor(tensor)) => {
                Self::Tensor(tensor.f_add_scalar(*number)?)
            }
        })
    }

    pub(super) fn value(&self) -> MetricValue {
        match self {
            Self::Number(value) => (*value).into(),
            Self::Tensor(value) => value.shallow_clone().into(),
        }
    }

    pub(super) fn tensor(&self) -> Tensor {
        match self {
            Self::Number(value) => Tensor::from(*value),
            Self::Tensor(value) => value.shallow_clone(),
        }
    }

    /// Returns the value for a state: a number becomes a tensor without dimensions, a tensor has shape (1,).
    pub(super) fn saved(&self) -> Result<Tensor, TchError> {
        match self {
            Self::Number(value) => Ok(Tensor::from(*value)),
            Self::Tensor(value) => value.f_reshape([1]),
        }
    }

    /// Reads what [`saved`](Self::saved) gave. Waits for the device where that is a number.
    pub(super) fn loaded(saved: &Tensor) -> anyhow::Result<Self> {
        match saved.dim() {
            0 => Ok(Self::Number(saved.f_double_value(&[])?)),
            _ => Self::of(saved.shallow_clone().into()),
        }
    }
}

/// Converts to the accumulator's type; a tensor of that type is shared.
pub(super) fn double(tensor: &Tensor) -> Result<Tensor, TchError> {
    tensor.f_to_kind(accumulator_kind(tensor.device()))
}

/// Copies the elements to the CPU, which takes a host sync.
pub(super) fn host<T: Element + Default + Clone>(tensor: &Tensor) -> Result<Vec<T>, TchError> {
    let tensor = dense_on_cpu(&tensor.f_to_device(Device::Cpu)?.f_to_kind(T::KIND)?)?;
    let mut elements = vec![T::default(); tensor.numel()];
    tensor.f_copy_data(&mut elements, tensor.numel())?;
    Ok(elements)
}
