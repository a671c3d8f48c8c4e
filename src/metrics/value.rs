use tch::{Kind, Tensor};

use crate::bridge::dense_on_cpu;
use crate::error::{Error, Result};

/// The value of a metric.
#[derive(Debug)]
pub enum MetricValue {
    /// A number.
    Number(f64),
    /// A tensor of any shape and numeric type, on any device. It has not been read, so it costs no host sync yet.
    Tensor(Tensor),
    /// Several values, each with its name, in order.
    Named(Vec<(String, MetricValue)>),
}

impl From<f64> for MetricValue {
    fn from(value: f64) -> Self {
        Self::Number(value)
    }
}

impl From<Tensor> for MetricValue {
    fn from(value: Tensor) -> Self {
        Self::Tensor(value)
    }
}

impl MetricValue {
    /// Returns the same value; a tensor is shared, not copied.
    pub fn share(&self) -> Self {
        match self {
            Self::Number(value) => Self::Number(*value),
            Self::Tensor(tensor) => Self::Tensor(tensor.shallow_clone()),
            Self::Named(parts) => {
                Self::Named(parts.iter().map(|(name, part)| (name.clone(), part.share())).collect())
            }
        }
    }

    /// Returns the value as a number. Waits for the device where the value is a tensor: a host sync on CUDA.
    ///
    /// # Errors
    /// A tensor that has not exactly one element, or several named values.
    pub fn read(&self) -> Result<f64> {
        match self {
            Self::Number(value) => Ok(*value),
            Self::Tensor(tensor) if tensor.numel() == 1 => tensor
                .f_reshape([1i64])
                .and_then(|tensor| tensor.f_double_value(&[0]))
                .map_err(|error| Error::libtorch("reading a metric's value", error)),
            Self::Tensor(tensor) => Err(Error::invalid(format!(
                "the value has shape {:?} and is no single number: ask for its tensor, or attach its mean or one element",
                tensor.size()
            ))),
            Self::Named(_) => Err(self.not_one()),
        }
    }

    /// Returns the value as a tensor, on the device where it is; a number becomes a tensor without dimensions, in
    /// f64 on the CPU. No host sync.
    ///
    /// # Errors
    /// Several named values.
    pub fn tensor(&self) -> Result<Tensor> {
        match self {
            Self::Number(value) => Ok(Tensor::from(*value)),
            Self::Tensor(tensor) => Ok(tensor.shallow_clone()),
            Self::Named(_) => Err(self.not_one()),
        }
    }

    /// Returns all numbers, each with its name, as loggers show them: a number under `name`, the elements of
    /// a tensor under `name/0`, `name/1` or `name/0/1`, named values under `name/part`. Takes one host sync
    /// for each tensor.
    ///
    /// ```
    /// use tch::Tensor;
    /// use tch_ignite::engine::MetricValue;
    /// let recall = MetricValue::from(Tensor::from_slice(&[0.5, 1.0]));
    /// let numbers = [("val/recall/0".to_owned(), 0.5), ("val/recall/1".to_owned(), 1.0)];
    /// assert_eq!(recall.flatten("val/recall")?, numbers);
    /// # Ok::<(), tch_ignite::Error>(())
    /// ```
    ///
    /// # Errors
    /// A tensor that libtorch cannot copy to the CPU.
    pub fn flatten(&self, name: &str) -> Result<Vec<(String, f64)>> {
        match self {
            Self::Number(value) => Ok(vec![(name.to_owned(), *value)]),
            Self::Tensor(tensor) => {
                let numbers = numbers(tensor)
                    .map_err(|error| Error::libtorch("reading a metric's value", error))?;
                let shape = tensor.size();
                let named = |(i, number)| (format!("{name}{}", place(i, &shape)), number);
                Ok(numbers.into_iter().enumerate().map(named).collect())
            }
            Self::Named(parts) => {
                let parts =
                    parts.iter().map(|(part, value)| value.flatten(&format!("{name}/{part}")));
                Ok(parts.collect::<Result<Vec<_>>>()?.concat())
            }
        }
    }

    fn not_one(&self) -> Error {
        Error::invalid(match self {
            Self::Named(parts) => format!(
                "there are several values: {}",
                parts.iter().map(|(name, _)| format!("'{name}'")).collect::<Vec<_>>().join(", ")
            ),
            _ => "the value is no single number".into(),
        })
    }
}

/// Reads the elements in f64, in the order of a contiguous tensor.
fn numbers(tensor: &Tensor) -> std::result::Result<Vec<f64>, tch::TchError> {
    let tensor = dense_on_cpu(&tensor.f_to_kind(Kind::Double)?)?;
    let mut numbers = vec![0.; tensor.numel()];
    tensor.f_copy_data(&mut numbers, tensor.numel())?;
    Ok(numbers)
}

/// Returns the indices of element `i`, each after a slash.
fn place(i: usize, shape: &[i64]) -> String {
    let mut rest = i as i64;
    let mut indices: Vec<_> = shape
        .iter()
        .rev()
        .map(|size| {
            let index = rest % size;
            rest /= size;
            format!("/{index}")
        })
        .collect();
    indices.reverse();
    indices.concat()
}
