use std::time::Duration;

/// What carries the tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum Backend {
    /// TCP: tensors on the CPU; those on a GPU go through the memory of the host.
    #[default]
    Gloo,
    /// NCCL for tensors on a GPU, gloo for those on the CPU. Needs the feature `nccl`; without it, joining is an error
    /// that says so.
    Nccl,
}

/// How a [`ProcessGroup`](super::ProcessGroup) is joined. The same on all ranks.
///
/// ```
/// use std::time::Duration;
/// use tch_ignite::distributed::ProcessGroupOptions;
///
/// let options = ProcessGroupOptions::new()
///     .timeout(Duration::from_secs(5 * 60))
///     .control_timeout(Duration::from_secs(60));
/// # let _ = options;
/// ```
#[derive(Debug, Clone)]
pub struct ProcessGroupOptions {
    pub(super) timeout: Duration,
    pub(super) control_timeout: Option<Duration>,
    pub(super) backend: Backend,
    pub(super) python_peers: bool,
    pub(super) check: bool,
}

impl Default for ProcessGroupOptions {
    fn default() -> Self {
        Self::new()
    }
}

impl ProcessGroupOptions {
    /// Gloo, and torch's time-out of 30 minutes.
    pub fn new() -> Self {
        Self {
            timeout: Duration::from_secs(30 * 60),
            control_timeout: None,
            backend: Backend::Gloo,
            python_peers: false,
            check: true,
        }
    }

    /// How long a collective, and joining, may wait for the other ranks. It must be longer than the ranks ever drift
    /// apart: with a batch that takes a second, 5 minutes are plenty.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// The same for the control group (metrics, flags, barriers); that of the tensors unless given. It must be longer
    /// than what one rank does alone, such as writing a checkpoint.
    pub fn control_timeout(mut self, timeout: Duration) -> Self {
        self.control_timeout = Some(timeout);
        self
    }

    /// What carries the tensors; gloo unless given.
    pub fn backend(mut self, backend: Backend) -> Self {
        self.backend = backend;
        self
    }

    /// Some ranks are Python programs with `torch.distributed`, which have no control group: then
    /// [`control`](super::ProcessGroup::control) only gives errors, collectives are not compared before they run, and
    /// errors do not name the ranks that did not answer.
    pub fn python_peers(mut self, on: bool) -> Self {
        self.python_peers = on;
        self
    }

    /// Whether a collective of tensors first compares, over the control group, what each rank is about to do: true unless
    /// given. It costs a message (0.3 ms between two processes of one machine). Without it a difference in sizes ends all
    /// processes in gloo's thread, with SIGABRT. The gradients of a `DistributedDataParallel` are compared once, when it
    /// is made.
    pub fn check_collectives(mut self, on: bool) -> Self {
        self.check = on;
        self
    }
}
