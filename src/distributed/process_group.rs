use std::borrow::Borrow;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use tch::Tensor;

use super::control_group::ControlGroup;
use super::deadline::within;
use super::environment::Environment;
use super::failure::{Failure, Reports, classify, not_joined, without_store, words};
use super::frame;
use super::{Backend, ProcessGroupOptions, ReduceOp};
use crate::bridge::{DistException, ProcessGroups, Store, StoreAddress};
use crate::error::{Error, Result};
use crate::failure_kind::FailureKind;

/// All processes that train together, and their collective operations. Clones share one group; it is `Send` and `Sync`.
///
/// A group of one ([`single`](Self::single)) opens no socket, and all operations are identities. Among several each
/// operation waits for all ranks, at most for the time-out. With tensors on a GPU and gloo that is a host sync.
///
/// All ranks make the same calls in the same order: in handlers only where all ranks run them, and not from several
/// threads.
#[derive(Clone)]
pub struct ProcessGroup {
    shared: Arc<Shared>,
}

struct Shared {
    rank: usize,
    world_size: usize,
    local_rank: usize,
    /// `None` for a group of one.
    lines: Option<Lines>,
}

/// The connections to the others.
struct Lines {
    group: ProcessGroups,
    // After the group, which uses it.
    store: Arc<Store>,
    /// One operation at a time.
    turn: Mutex<()>,
    /// The rank that serves the store; `None` where torchrun does.
    server: Option<usize>,
    /// Why the group is dead.
    failed: OnceLock<Failure>,
    check: bool,
    control: bool,
}

// For handlers and data loaders of any thread.
const _: () = {
    const fn shared<T: Send + Sync + Clone>() {}
    shared::<ProcessGroup>();
    shared::<ControlGroup>();
};

/// What libtorch takes longer than its time-out: it tries again once more.
const SLACK: Duration = Duration::from_secs(5);

/// What a joining process does: for errors.
const JOIN: &str = "joining the process group";

impl ProcessGroup {
    /// Joins the group that the environment describes: `RANK`, `WORLD_SIZE`, `MASTER_ADDR`, `MASTER_PORT` and, if it is set,
    /// `LOCAL_RANK`, as torchrun sets them; else the variables of Open MPI, MPICH and Slurm's `srun`, whose
    /// `MASTER_ADDR` is only needed where it cannot be told from them. With one process it is [`single`](Self::single).
    ///
    /// Waits until all ranks are there: for the store at most the time-out and 5 seconds, for connections then at most twice
    /// the time-out and 5 seconds. Rank 0 listens on `MASTER_PORT`, or on the socket whose
    /// file descriptor is in `TCH_IGNITE_LISTEN_FD`. Neither it nor gloo knows passwords or encryption: trusted networks
    /// only.
    ///
    /// # Errors
    /// No variable is set, or one is missing or wrong; [`Error::Distributed`], which names ranks that did not come.
    pub fn from_env(options: ProcessGroupOptions) -> Result<Self> {
        check_timeouts(&options)?;
        match environment()? {
            Some(environment) => Self::join(environment, options),
            None => Err(Error::invalid(
                "RANK is not set. Start the program with torchrun, mpirun or srun, or set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; from_env_or_single also runs alone",
            )),
        }
    }

    /// [`from_env`](Self::from_env); without any of the variables a group of one, so that the same program runs alone.
    pub fn from_env_or_single(options: ProcessGroupOptions) -> Result<Self> {
        check_timeouts(&options)?;
        match environment()? {
            Some(environment) => Self::join(environment, options),
            None => Ok(Self::single()),
        }
    }

    /// A group of one process, without sockets. All operations are identities.
    pub fn single() -> Self {
        Self::alone(&Environment::single())
    }

    fn alone(environment: &Environment) -> Self {
        let Environment { rank, world_size, local_rank, .. } = *environment;
        Self { shared: Arc::new(Shared { rank, world_size, local_rank, lines: None }) }
    }

    fn join(environment: Environment, options: ProcessGroupOptions) -> Result<Self> {
        let Some(address) = environment.store.clone() else {
            return Ok(Self::alone(&environment));
        };
        let Environment { rank, world_size, local_rank, server, .. } = environment;
        let store = connect(&address, &environment, &options)?;
        let group = assemble(&store, &environment, &options)?;
        let lines = Lines {
            group,
            store,
            turn: Mutex::new(()),
            server,
            failed: OnceLock::new(),
            check: options.check && !options.python_peers,
            control: !options.python_peers,
        };
        Ok(Self { shared: Arc::new(Shared { rank, world_size, local_rank, lines: Some(lines) }) })
    }

    /// The number of this process, from 0.
    pub fn rank(&self) -> usize {
        self.shared.rank
    }

    /// How many processes there are.
    pub fn world_size(&self) -> usize {
        self.shared.world_size
    }

    /// The number of this process among those on its machine, from 0: which GPU it takes. Where the launcher does not say,
    /// it is the rank if `MASTER_ADDR` is this machine, else 0.
    pub fn local_rank(&self) -> usize {
        self.shared.local_rank
    }

    /// Whether this is rank 0, which writes files and draws progress.
    pub fn is_main(&self) -> bool {
        self.shared.rank == 0
    }

    /// Makes the tensors those of all ranks, reduced, in place: of the same shapes and types on all ranks, and in the same
    /// order. Those of one type and device travel together, so pass them together.
    ///
    /// ```
    /// # use tch::{Device, Kind, Tensor};
    /// # use tch_ignite::distributed::{ProcessGroup, ReduceOp};
    /// # let pg = ProcessGroup::single();
    /// let (a, b) = (Tensor::ones([3], (Kind::Float, Device::Cpu)), Tensor::from(2i64));
    /// pg.all_reduce(&[&a, &b], ReduceOp::Sum)?;
    /// # Ok::<(), tch_ignite::Error>(())
    /// ```
    ///
    /// # Errors
    /// Mismatch, if ranks pass other shapes or types; types that libtorch cannot reduce; sparse tensors.
    pub fn all_reduce<T: Borrow<Tensor>>(&self, tensors: &[T], op: ReduceOp) -> Result<()> {
        let tensors = defined("all_reduce", tensors)?;
        let Some(turn) = self.turn("all_reduce")? else { return Ok(()) };
        turn.check(|| format!("all_reduce {op:?} of {}", described(&tensors)))?;
        let mut lists: Vec<Vec<&Tensor>> = vec![];
        for tensor in tensors {
            let same = |list: &&mut Vec<&Tensor>| {
                list[0].kind() == tensor.kind() && list[0].device() == tensor.device()
            };
            match lists.iter_mut().find(same) {
                Some(list) => list.push(tensor),
                None => lists.push(vec![tensor]),
            }
        }
        lists.iter().try_for_each(|list| turn.call(|group| group.all_reduce(list, op.number())))
    }

    /// Makes the tensors those of rank `root`, in place: of the same shapes and types on all ranks, and in the same order.
    ///
    /// # Errors
    /// Mismatch, if ranks pass other shapes or types; no such rank.
    pub fn broadcast<T: Borrow<Tensor>>(&self, tensors: &[T], root: usize) -> Result<()> {
        let tensors = defined("broadcast", tensors)?;
        self.check_rank(root)?;
        let Some(turn) = self.turn("broadcast")? else { return Ok(()) };
        turn.check(|| format!("broadcast from {root} of {}", described(&tensors)))?;
        if tensors.is_empty() {
            return Ok(());
        }
        turn.call(|group| group.broadcast(&tensors, root))
    }

    /// The tensors of all ranks, in their order, without graph: of the same shape and type on all. New memory, also for the
    /// own one. For what differs in length see [`ControlGroup::all_gather_bytes`].
    ///
    /// # Errors
    /// Mismatch, if ranks pass other shapes or types.
    pub fn all_gather(&self, tensor: &Tensor) -> Result<Vec<Tensor>> {
        let own = [tensor];
        let tensors = defined("all_gather", &own)?;
        let Some(turn) = self.turn("all_gather")? else {
            let copy =
                tensor.f_detach_copy().map_err(|error| Error::libtorch("all_gather", error))?;
            return Ok(vec![copy]);
        };
        turn.check(|| format!("all_gather of {}", described(&tensors)))?;
        turn.call(|group| group.all_gather(tensor))
    }

    /// Waits until all ranks are here: [`ControlGroup::barrier`].
    pub fn barrier(&self) -> Result<()> {
        self.control().barrier()
    }

    /// The group for small messages: metrics, flags, counts. It does not share connections with the tensors, so that a rank
    /// which reaches its metrics while another is still in backward gives an error on both, in time.
    pub fn control(&self) -> ControlGroup {
        ControlGroup::new(self.clone())
    }

    /// Leaves the group for good: the calls in which other ranks wait end with [`FailureKind::PeerLost`] at once, and not at
    /// their time-out. For a rank that has an error of its own and a process that lives on; where the process ends this
    /// happens anyway. Does not wait.
    ///
    /// ```
    /// # use tch_ignite::distributed::ProcessGroup;
    /// # let (pg, result) = (ProcessGroup::single(), Ok::<(), tch_ignite::Error>(()));
    /// if let Err(error) = result {
    ///     pg.abort();
    ///     eprintln!("this model could not be trained: {error}");
    /// }
    /// ```
    pub fn abort(&self) {
        let Shared { rank, lines, .. } = &*self.shared;
        let Some(lines) = lines else { return };
        let message = "this rank left it (ProcessGroup::abort)".to_owned();
        let (kind, rank) = (FailureKind::PeerLost, *rank);
        let _ = lines.failed.set(Failure { kind, rank, missing: vec![], message });
        lines.group.hang_up();
    }

    /// Whether messages can be sent: not with ranks in Python. True for a group of one.
    pub(super) fn has_control(&self) -> bool {
        self.shared.lines.as_ref().is_none_or(|lines| lines.control)
    }

    /// Makes a tensor the sum over all ranks, without comparing what they are about to do.
    pub(super) fn sum_unchecked(&self, op: &str, tensor: &Tensor) -> Result<()> {
        let Some(turn) = self.turn(op)? else { return Ok(()) };
        turn.call(|group| group.all_reduce(&[tensor], ReduceOp::Sum.number()))
    }

    pub(super) fn check_rank(&self, rank: usize) -> Result<()> {
        if rank < self.world_size() {
            return Ok(());
        }
        Err(Error::invalid(format!(
            "there is no rank {rank}; there are {}, from 0",
            self.world_size()
        )))
    }

    /// The right to make calls; `None` for a group of one, which makes none.
    pub(super) fn turn<'g>(&'g self, op: &'g str) -> Result<Option<Turn<'g>>> {
        let Some(lines) = &self.shared.lines else { return Ok(None) };
        let guard = lines.turn.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(failure) = lines.failed.get() {
            let mut failure = failure.clone();
            failure.message = format!("the group failed before: {}", failure.message);
            return Err(failure.error(op));
        }
        Ok(Some(Turn { shared: &self.shared, lines, op, _guard: guard }))
    }
}

/// One operation of a group. No other runs while it lives.
pub(super) struct Turn<'g> {
    shared: &'g Shared,
    lines: &'g Lines,
    op: &'g str,
    _guard: MutexGuard<'g, ()>,
}

impl Turn<'_> {
    /// Makes a call that waits for the other ranks.
    pub(super) fn call<R>(
        &self,
        call: impl FnOnce(&ProcessGroups) -> Result<R, DistException>,
    ) -> Result<R> {
        call(&self.lines.group).map_err(|exception| self.failed(&exception))
    }

    /// The error for an exception. If it was between processes: lets the others know, finds out who does not answer, and
    /// lets the group be dead.
    pub(super) fn failed(&self, exception: &DistException) -> Error {
        let Some(kind) = classify(exception) else {
            return Error::libtorch(self.op, &exception.text);
        };
        let Shared { rank, world_size, .. } = *self.shared;
        self.lines.group.hang_up();
        // Python's ranks do not report.
        let reports = match self.lines.control {
            true => {
                Reports::gather(&self.lines.store, rank, world_size, self.lines.server, self.op)
            }
            false => Reports::default(),
        };
        let message = words(&exception.text);
        let (kind, message) = match reports.out_of_step(rank, self.op) {
            Some(difference) => (FailureKind::Mismatch, format!("{difference} ({message})")),
            None => (kind, message),
        };
        let failure = Failure { kind, rank, missing: reports.missing, message };
        let _ = self.lines.failed.set(failure.clone());
        failure.error(self.op)
    }

    /// Whether messages can be sent.
    pub(super) fn has_control(&self) -> bool {
        self.lines.control
    }

    /// Compares what all ranks are about to do, if that is wanted.
    fn check(&self, op: impl FnOnce() -> String) -> Result<()> {
        if self.lines.check {
            self.exchange(&op(), &[])?;
        }
        Ok(())
    }

    /// The messages of all ranks. They may differ in length, but `op`, which says what is being done, must not differ.
    pub(super) fn exchange(&self, op: &str, message: &[u8]) -> Result<Vec<Vec<u8>>> {
        if !self.lines.control {
            return Err(Error::invalid(format!(
                "{op}: there is no control group in a job with ranks in Python (ProcessGroupOptions::python_peers)"
            )));
        }
        let all = self.call(|group| group.exchange(&frame::write(op, message)))?;
        let frames: Option<Vec<_>> = all.chunks_exact(frame::SIZE).map(frame::read).collect();
        let frames = frames.ok_or_else(|| self.mismatch("a message that is no frame".into()))?;
        if let Some(difference) = frame::difference(&frames) {
            return Err(self.mismatch(difference));
        }
        let longest = frames.iter().map(|frame| frame.length).max().unwrap_or(0);
        if longest <= frame::ROOM {
            return Ok(frames.into_iter().map(|frame| frame.inline.to_vec()).collect());
        }
        let mut padded = message.to_vec();
        padded.resize(longest, 0);
        let all = self.call(|group| group.exchange(&padded))?;
        let messages = all.chunks_exact(longest).zip(&frames);
        Ok(messages.map(|(bytes, frame)| bytes[..frame.length].to_vec()).collect())
    }

    /// All ranks know of it, so the group lives on.
    pub(super) fn mismatch(&self, message: String) -> Error {
        let Shared { rank, .. } = *self.shared;
        let failure = Failure { kind: FailureKind::Mismatch, rank, missing: vec![], message };
        failure.error(self.op)
    }
}

fn environment() -> Result<Option<Environment>> {
    Environment::read(|name| std::env::var(name).ok())
}

fn check_timeouts(options: &ProcessGroupOptions) -> Result<()> {
    for timeout in [Some(options.timeout), options.control_timeout].into_iter().flatten() {
        // gloo counts milliseconds in 32 bits.
        if timeout < Duration::from_millis(1) || timeout.as_millis() > i32::MAX as u128 {
            return Err(Error::invalid(format!(
                "a time-out must be at least a millisecond and at most 24 days, but {timeout:?} was given"
            )));
        }
    }
    Ok(())
}

fn milliseconds(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}

/// Connects to the store and says so in it.
fn connect(
    address: &StoreAddress,
    environment: &Environment,
    options: &ProcessGroupOptions,
) -> Result<Arc<Store>> {
    let Environment { rank, world_size, server, .. } = *environment;
    let timeout = options.timeout;
    let failed = |kind, message: String| {
        let missing = match kind {
            FailureKind::Timeout => without_store(rank, server),
            _ => vec![],
        };
        let message = format!("{message} (store at {}:{})", address.host, address.port);
        Failure { kind, rank, missing, message }.error(JOIN)
    };
    let to = address.clone();
    let connected = within(timeout + SLACK, move || {
        let store = Store::connect(&to, world_size, milliseconds(timeout))?;
        store.set(&format!("joined/{rank}"), "1")?;
        Ok::<_, DistException>(store)
    });
    match connected {
        Some(Ok(store)) => Ok(Arc::new(store)),
        Some(Err(exception)) => {
            let kind = match classify(&exception) {
                Some(FailureKind::Timeout) => FailureKind::Timeout,
                _ => FailureKind::Store,
            };
            Err(failed(kind, words(&exception.text)))
        }
        None => Err(failed(FailureKind::Timeout, "no answer".into())),
    }
}

/// Waits for the others and connects to each.
fn assemble(
    store: &Arc<Store>,
    environment: &Environment,
    options: &ProcessGroupOptions,
) -> Result<ProcessGroups> {
    let Environment { rank, world_size, server, .. } = *environment;
    let ProcessGroupOptions { timeout, control_timeout, backend, python_peers, .. } = *options;
    let control = (!python_peers).then(|| milliseconds(control_timeout.unwrap_or(timeout)));
    let with = store.clone();
    let made = within(timeout * 2 + SLACK, move || {
        with.wait_for_workers()?;
        let nccl = backend == Backend::Nccl;
        ProcessGroups::new(&with, rank, world_size, nccl, milliseconds(timeout), control)
    });
    let (kind, message) = match made {
        Some(Ok(group)) => return Ok(group),
        Some(Err(exception)) => match classify(&exception) {
            Some(kind) => (kind, words(&exception.text)),
            None => return Err(Error::libtorch(JOIN, exception.text)),
        },
        None => (FailureKind::Timeout, "no answer".into()),
    };
    let missing = if python_peers { vec![] } else { not_joined(store, rank, world_size, server) };
    Err(Failure { kind, rank, missing, message }.error(JOIN))
}

fn defined<'t, T: Borrow<Tensor>>(op: &str, tensors: &'t [T]) -> Result<Vec<&'t Tensor>> {
    let tensors: Vec<&Tensor> = tensors.iter().map(Borrow::borrow).collect();
    match tensors.iter().position(|tensor| !tensor.defined()) {
        Some(index) => Err(Error::invalid(format!("{op}: tensor {index} is undefined"))),
        None => Ok(tensors),
    }
}

fn described(tensors: &[&Tensor]) -> String {
    let each = tensors.iter().map(|tensor| format!("{:?} {:?}", tensor.size(), tensor.kind()));
    match tensors.len() {
        1 => each.collect(),
        count => format!("{count} tensors: {}", each.collect::<Vec<_>>().join(", ")),
    }
}

impl fmt::Debug for ProcessGroup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ProcessGroup")
            .field("rank", &self.rank())
            .field("world_size", &self.world_size())
            .field("local_rank", &self.local_rank())
            .finish_non_exhaustive()
    }
}
