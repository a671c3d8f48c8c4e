use tch::Tensor;

/// The result of a model's forward, in which
/// [`DistributedDataParallel::forward`](super::DistributedDataParallel::forward) finds the tensors. Implemented for
/// tensors, and for pairs, triples, `Vec`s, options and results of outputs; implement it for a struct of your own.
pub trait Outputs {
    /// All tensors from which a loss may be computed.
    fn tensors(&self) -> Vec<&Tensor>;
}

impl Outputs for Tensor {
    fn tensors(&self) -> Vec<&Tensor> {
        vec![self]
    }
}

impl<T: Outputs> Outputs for Vec<T> {
    fn tensors(&self) -> Vec<&Tensor> {
        self.iter().flat_map(Outputs::tensors).collect()
    }
}

impl<T: Outputs> Outputs for Option<T> {
    fn tensors(&self) -> Vec<&Tensor> {
        self.iter().flat_map(Outputs::tensors).collect()
    }
}

impl<T: Outputs, E> Outputs for Result<T, E> {
    fn tensors(&self) -> Vec<&Tensor> {
        self.iter().flat_map(Outputs::tensors).collect()
    }
}

impl<A: Outputs, B: Outputs> Outputs for (A, B) {
    fn tensors(&self) -> Vec<&Tensor> {
        [self.0.tensors(), self.1.tensors()].concat()
    }
}

impl<A: Outputs, B: Outputs, C: Outputs> Outputs for (A, B, C) {
    fn tensors(&self) -> Vec<&Tensor> {
        [self.0.tensors(), self.1.tensors(), self.2.tensors()].concat()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_tensors_are_found() {
        let t = |value: i64| Tensor::from(value);
        let outputs = (t(1), vec![t(2), t(3)], (Some(t(4)), None::<Tensor>, Err::<Tensor, _>(())));
        let values: Vec<_> =
            outputs.tensors().iter().map(|tensor| tensor.int64_value(&[])).collect();
        assert_eq!(values, [1, 2, 3, 4]);
    }
}
