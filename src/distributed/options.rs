use std::time::Duration;

/// The library that sends tensors between ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum Backend {
    /// gloo, over TCP. Tensors on a GPU go through the host's memory.
    #[default]
    Gloo,
    /// NCCL for tensors on a GPU, gloo for tensors on the CPU. Needs the feature `nccl`; without it, joining is an
    /// error that says so.
    Nccl,
}

/// Options for joining a [`ProcessGroup`](super::ProcessGroup). All ranks use the same.
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
    /// Options with gloo, and torch's time-out of 30 minutes.
    pub fn new() -> Self {
        Self {
            timeout: Duration::from_secs(30 * 60),
            control_timeout: None,
            backend: Backend::Gloo,
            python_peers: false,
            check: true,
        }
    }

    /// Sets how long a collective, and joining, may wait for the other ranks. The time must be longer than the ranks
    /// ever drift apart: with a batch that takes a second, 5 minutes are plenty.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Sets the time-out of the control group (metrics, flags, barriers); the time-out of the tensors unless given. The
    /// time must be longer than any work that one rank does alone, such as writing a checkpoint.
    pub fn control_timeout(mut self, timeout: Duration) -> Self {
        self.control_timeout = Some(timeout);
        self
    }

    /// Sets the library that sends tensors; gloo unless given.
    pub fn backend(mut self, backend: Backend) -> Self {
        self.backend = backend;
        self
    }

    /// Says that some ranks are Python programs with `torch.distributed`, which have no control group. Then all calls
    /// of the [`control`](super::ProcessGroup::control) group are errors, collectives are not compared before they run,
    /// and errors do not name the ranks that did not answer.
    pub fn python_peers(mut self, on: bool) -> Self {
        self.python_peers = on;
        self
    }

    /// Says whether a collective of tensors first compares, over the control group, what each rank is about to do: true
    /// unless given. The comparison costs a message (0.3 ms between two processes of one machine). Without it, a
    /// difference in sizes makes gloo end all processes with SIGABRT. The gradients of a `DistributedDataParallel` are
    /// compared once, when it is made.
    pub fn check_collectives(mut self, on: bool) -> Self {
        self.check = on;
        self
    }
}
