use tch::Tensor;

/// What a model's forward gives, for [`DistributedDataParallel::forward`](super::DistributedDataParallel::forward) to
/// look at its tensors. Implemented for tensors, tuples of up to three, lists, options and
/// results of them; implement it for a
/// struct of your own.
pub trait Outputs {
    /// All tensors of which a loss may be made.
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
