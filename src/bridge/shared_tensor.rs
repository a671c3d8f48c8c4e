use tch::{TchError, Tensor};

/// A tensor that several threads read.
#[derive(Debug)]
pub(crate) struct SharedTensor(Tensor);

// SAFETY: the methods of SharedTensor only read the tensor and make views of it, whose reference counts
// are atomic. libtorch allows both from any number of threads. The tensor has no graph, so views add
// nothing to one. (Threads that write into views of one tensor are as unguarded as with tch's own
// `shallow_clone`, which may be sent to other threads too.)
unsafe impl Sync for SharedTensor {}

impl SharedTensor {
    /// Shares the memory of `tensor`, without its graph.
    pub(crate) fn new(tensor: &Tensor) -> Result<Self, TchError> {
        tensor.f_detach().map(Self)
    }

    /// A view of row `index` of the first dimension.
    pub(crate) fn row(&self, index: i64) -> Result<Tensor, TchError> {
        self.0.f_select(0, index)
    }
}
