use std::borrow::Borrow;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use tch::{Device, Tensor};

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
/// A group of one ([`single`](Self::single)) opens no socket, and all its operations are identities. In a larger group
/// each operation waits for all ranks, at most for the time-out. For tensors on a GPU with gloo this is a host sync.
///
/// All ranks must make the same calls in the same order. So a handler may make calls only if it runs on all ranks, and
/// calls must come from one thread.
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

/// The connections to the other ranks.
struct Lines {
    group: ProcessGroups,
    // Declared after the group, which uses the store, so that the store is dropped later.
    store: Arc<Store>,
    /// Held during an operation, so that only one runs at a time.
    turn: Mutex<()>,
    /// The rank that serves the store; `None` if torchrun serves it.
    server: Option<usize>,
    /// The failure after which the group is dead, if there was one.
    failed: OnceLock<Failure>,
    /// Whether collectives of tensors are compared before they run.
    check: bool,
    /// Whether there is a control group.
    control: bool,
}

// Handlers and data loaders on any thread may use the groups.
const _: () = {
    const fn shared<T: Send + Sync + Clone>() {}
    shared::<ProcessGroup>();
    shared::<ControlGroup>();
};

/// libtorch may take this much longer than its time-out, because it tries to connect once more.
const SLACK: Duration = Duration::from_secs(5);

/// The operation of a joining process, in errors.
const JOIN: &str = "joining the process group";

impl ProcessGroup {
    /// Joins the group that environment variables describe: `RANK`, `WORLD_SIZE`, `MASTER_ADDR`, `MASTER_PORT` and, if
    /// it is set, `LOCAL_RANK`, as torchrun sets them; otherwise the variables of Open MPI, MPICH or Slurm's `srun`,
    /// which need `MASTER_ADDR` only if the address does not follow from them. With one process the group is
    /// [`single`](Self::single).
    ///
    /// Waits until all ranks have joined: at most the time-out and 5 seconds for the store, then at most twice the
    /// time-out and 5 seconds for the connections. Rank 0 listens on `MASTER_PORT`, or on the socket whose file
    /// descriptor is in `TCH_IGNITE_LISTEN_FD`. Neither the store nor gloo uses passwords or encryption: use trusted
    /// networks only.
    ///
    /// # Errors
    /// No variable is set, or one is missing or wrong; a time-out below a millisecond or above 24 days;
    /// [`Error::Distributed`], which names the ranks that did not join.
    pub fn from_env(options: ProcessGroupOptions) -> Result<Self> {
        check_timeouts(&options)?;
        match environment()? {
            Some(environment) => Self::join(environment, options),
            None => Err(Error::invalid(
                "RANK is not set. Start the program with torchrun, mpirun or srun, or set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; from_env_or_single also runs alone",
            )),
        }
    }

    /// [`from_env`](Self::from_env), or a group of one if none of the variables is set, so that the same program also
    /// runs alone.
    ///
    /// # Errors
    /// The errors of [`from_env`](Self::from_env), except that no variable is set.
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

    /// A group of one, with the ranks of the environment.
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

    /// The number of processes.
    pub fn world_size(&self) -> usize {
        self.shared.world_size
    }

    /// The number of this process among the processes on its machine, from 0; use it to choose a GPU. If the launcher
    /// does not set it, this is the rank if `MASTER_ADDR` is this machine, else 0.
    pub fn local_rank(&self) -> usize {
        self.shared.local_rank
    }

    /// Whether this is rank 0, which writes files and draws progress.
    pub fn is_main(&self) -> bool {
        self.shared.rank == 0
    }

    /// Reduces tensors over all ranks, element by element and in place. All ranks pass the same number of tensors, with
    /// the same shapes and dtypes in the same order. Tensors of one dtype and device travel together, so pass them in
    /// one call.
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
    /// A mismatch, if ranks pass different shapes or dtypes; an undefined or sparse tensor, or a dtype that libtorch
    /// cannot reduce; [`Error::Distributed`].
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
        lists.iter().try_for_each(|list| turn.call(|group| group.all_reduce(list, op.reduction())))
    }

    /// Gives the tensors of all ranks the values of rank `root`, in place. All ranks pass the same number of tensors,
    /// with the same shapes and dtypes in the same order.
    ///
    /// # Errors
    /// A mismatch, if ranks pass different shapes or dtypes; an undefined tensor; no rank `root`;
    /// [`Error::Distributed`].
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

    /// The tensors of all ranks, in the order of the ranks and without graphs. All ranks pass a tensor of the same
    /// shape and dtype. The results are new tensors, also for this rank's own. For data of different lengths see
    /// [`ControlGroup::all_gather_bytes`].
    ///
    /// # Errors
    /// A mismatch, if ranks pass different shapes or dtypes; an undefined tensor; [`Error::Distributed`].
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

    /// Waits until all ranks have called this: [`ControlGroup::barrier`].
    ///
    /// # Errors
    /// The errors of [`ControlGroup::barrier`].
    pub fn barrier(&self) -> Result<()> {
        self.control().barrier()
    }

    /// The group for small messages: metrics, flags, counts. It has connections of its own, so that both ranks get an
    /// error in time if one reaches its metrics while the other is still in backward.
    pub fn control(&self) -> ControlGroup {
        ControlGroup::new(self.clone())
    }

    /// Leaves the group for good. Calls in which other ranks wait then end with [`FailureKind::PeerLost`] at once, and
    /// not after their time-out. Use this on a rank that has an error of its own in a process that goes on; when a
    /// process ends, the same happens by itself. Does not wait.
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

    /// Whether the control group can send messages: false with ranks in Python, true for a group of one.
    pub(super) fn has_control(&self) -> bool {
        self.shared.lines.as_ref().is_none_or(|lines| lines.control)
    }

    /// Sums a tensor over all ranks in place, without comparing first what the ranks are about to do.
    pub(super) fn sum_unchecked(&self, op: &str, tensor: &Tensor) -> Result<()> {
        let Some(turn) = self.turn(op)? else { return Ok(()) };
        turn.call(|group| group.all_reduce(&[tensor], ReduceOp::Sum.reduction()))
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

    /// Waits for other operations of this process, and returns the right to make calls; `None` for a group of one,
    /// which makes no calls. An error if the group is dead.
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

/// One operation of a group. While it lives, no other operation of this process runs.
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

    /// The error for an exception. If the exception means a failure between processes, this closes the connections,
    /// waits for the reports of the other ranks to find out who does not answer, and marks the group as dead.
    pub(super) fn failed(&self, exception: &DistException) -> Error {
        let Some(kind) = classify(exception) else {
            return Error::libtorch(self.op, &exception.text);
        };
        let Shared { rank, world_size, .. } = *self.shared;
        self.lines.group.hang_up();
        // Ranks in Python do not report.
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

    /// Whether the control group can send messages.
    pub(super) fn has_control(&self) -> bool {
        self.lines.control
    }

    /// Compares what all ranks are about to do, unless the options switched that off.
    fn check(&self, op: impl FnOnce() -> String) -> Result<()> {
        if self.lines.check {
            self.exchange(&op(), &[])?;
        }
        Ok(())
    }

    /// The messages of all ranks. Their lengths may differ. `op` says what is being done, and must be the same on all
    /// ranks.
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

    /// The error for a difference that all ranks have found. The group can still be used.
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

/// Connects to the store, and reports there that this rank has joined.
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

/// Waits for the other ranks and connects to each.
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

/// The tensors as references; an error if one is undefined.
fn defined<'t, T: Borrow<Tensor>>(op: &str, tensors: &'t [T]) -> Result<Vec<&'t Tensor>> {
    let tensors: Vec<&Tensor> = tensors.iter().map(Borrow::borrow).collect();
    match tensors.iter().position(|tensor| !tensor.defined()) {
        Some(index) => Err(Error::invalid(format!("{op}: tensor {index} is undefined"))),
        None => Ok(tensors),
    }
}

fn described(tensors: &[&Tensor]) -> String {
    let devices: Vec<_> = tensors.iter().map(|tensor| tensor.device()).collect();
    let each = tensors
        .iter()
        .zip(place_names(&devices))
        .map(|(tensor, device)| format!("{:?} {:?}{device}", tensor.size(), tensor.kind()));
    match tensors.len() {
        1 => each.collect(),
        count => format!("{count} tensors: {}", each.collect::<Vec<_>>().join(", ")),
    }
}

/// Names the devices of a list so that equal names mean equal calls: the numbers of devices differ between ranks, but
/// which tensors share a device, and so travel together, may not.
pub(super) fn place_names(devices: &[Device]) -> Vec<String> {
    let mut known: Vec<Device> = vec![];
    let name = |device: &Device| {
        if *device == Device::Cpu {
            return String::new();
        }
        let number = known.iter().position(|other| other == device).unwrap_or_else(|| {
            known.push(*device);
            known.len() - 1
        });
        let kind = if device.is_cuda() { "Cuda".to_owned() } else { format!("{device:?}") };
        format!(" on {kind}{}", if number > 0 { format!(" #{number}") } else { String::new() })
    };
    devices.iter().map(name).collect()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_on_other_kinds_of_devices_have_other_names() {
        let on = |devices: &[Device]| place_names(devices).concat();
        let (cpu, cuda) = (Device::Cpu, Device::Cuda);
        assert_eq!(on(&[cpu, cpu]), "");
        assert_eq!(on(&[cpu, cuda(0)]), on(&[cpu, cuda(3)]));
        assert_ne!(on(&[cpu, cuda(0)]), on(&[cuda(0), cuda(0)]));
        assert_ne!(on(&[cuda(0), cuda(1)]), on(&[cuda(1), cuda(1)]));
    }
}
