use tch::{TchError, Tensor};

/// A tensor that several threads read.
#[derive(Debug)]
pub(crate) struct SharedTensor(Tensor);

// SAFETY: what is reached through it reads the tensor: its shape, and views of it, whose counts of
// references are atomic. libtorch allows that from any number of threads. The tensor has no graph, so
// that views add nothing to one. (Threads that write into views of one tensor are as unguarded as with
// tch's own `shallow_clone`, which goes to other threads too.)
unsafe impl Sync for SharedTensor {}

impl SharedTensor {
    /// Shares the memory of `tensor`, without its graph.
    pub(crate) fn new(tensor: &Tensor) -> Result<Self, TchError> {
        tensor.f_detach().map(Self)
    }

    /// A view of this place of the first dimension.
    pub(crate) fn row(&self, index: i64) -> Result<Tensor, TchError> {
        self.0.f_select(0, index)
    }
}
