//! Starts the ranks of a job on this machine, as torchrun does, but from within the program itself.
//!
//! ```no_run
//! use std::process::ExitCode;
//! use tch_ignite::distributed::{ProcessGroup, ProcessGroupOptions, launch};
//!
//! fn main() -> anyhow::Result<ExitCode> {
//!     // The process that was started by hand starts two of this program, and waits for them.
//!     if let Some(ended) = launch::spawn(2)? {
//!         return Ok(ended.exit_code());
//!     }
//!     let pg = ProcessGroup::from_env(ProcessGroupOptions::new())?;
//!     println!("rank {} of {}", pg.rank(), pg.world_size());
//!     Ok(ExitCode::SUCCESS)
//! }
//! ```

use std::ffi::OsString;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{JoinHandle, sleep};
use std::time::{Duration, Instant};

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::{SigId, flag, low_level};

use super::environment::{self, LISTEN_FD};
use crate::bridge::send_signal;
use crate::error::{Error, Result};

/// The time between two looks at the ranks.
const PERIOD: Duration = Duration::from_millis(20);
/// How long the output of ranks that have ended is waited for.
const OUTPUT: Duration = Duration::from_secs(5);

/// Starts `ranks` processes of this program with its arguments, waits for all of them, and returns how they ended.
/// Returns `None` at once in the started processes, and in processes that another launcher started. [`Launch`] has
/// options.
///
/// # Errors
/// A process cannot be started (the processes that were started are killed); `ranks` is 0; another launcher has started
/// a different number of ranks.
pub fn spawn(ranks: usize) -> Result<Option<Ended>> {
    if let Some(world_size) = environment::world_size()? {
        return match world_size == ranks {
            true => Ok(None),
            false => Err(Error::invalid(format!(
                "{ranks} ranks are to be started, but this process is one of {world_size} already: leave the number to one of the two launchers"
            ))),
        };
    }
    Launch::new(ranks)?.run().map(Some)
}

/// A job to start on this machine: a number of processes, each of which is a rank.
///
/// The ranks find each other on 127.0.0.1 at a free port. Rank 0 inherits the listening socket (as its standard input),
/// so no other process can take the port. Each rank is in a process group of its own. SIGTERM and SIGINT are handed on
/// to all ranks, so that [`InterruptOn`](crate::handlers::InterruptOn) works in them. When a rank fails, the others
/// have 5 seconds to end; then they are killed.
///
/// `OMP_NUM_THREADS` is set to the number of cores divided by the number of ranks, and `GLOO_SOCKET_IFNAME` to the
/// loopback interface, unless they are set already. Lines that ranks other than 0 print begin with `[rank]`.
#[derive(Debug)]
pub struct Launch {
    ranks: usize,
    program: PathBuf,
    args: Vec<OsString>,
    env: Vec<(OsString, OsString)>,
    logs: Option<PathBuf>,
    grace: Duration,
}

/// How the ranks ended.
#[derive(Debug)]
pub struct Ended {
    /// The exit status of each rank, by rank.
    pub statuses: Vec<ExitStatus>,
    /// The rank that failed first; `None` if none failed.
    pub failed: Option<usize>,
}

impl Ended {
    /// The exit code of the rank that failed first, or 128 plus the number of the signal that killed it; 0 if no rank
    /// failed.
    pub fn code(&self) -> u8 {
        let Some(status) = self.failed.and_then(|rank| self.statuses.get(rank)) else { return 0 };
        let code = status.code().or(status.signal().map(|signal| 128 + signal));
        code.and_then(|code| u8::try_from(code).ok()).unwrap_or(1)
    }

    /// [`code`](Self::code), for `main` to return.
    pub fn exit_code(&self) -> ExitCode {
        self.code().into()
    }
}

impl Launch {
    /// A job of `ranks` processes of this program, with this process's arguments.
    ///
    /// # Errors
    /// `ranks` is 0; the system does not say which program this is.
    pub fn new(ranks: usize) -> Result<Self> {
        if ranks == 0 {
            return Err(Error::invalid("the number of ranks must be at least 1, but 0 was given"));
        }
        let program = std::env::current_exe().map_err(|error| {
            Error::invalid(format!("cannot find the program that is running: {error}"))
        })?;
        let args = std::env::args_os().skip(1).collect();
        let grace = Duration::from_secs(5);
        Ok(Self { ranks, program, args, env: vec![], logs: None, grace })
    }

    /// Starts the ranks with these arguments instead of this process's.
    pub fn args(mut self, args: impl IntoIterator<Item = impl Into<OsString>>) -> Self {
        self.args = args.into_iter().map(Into::into).collect();
        self
    }

    /// Adds an environment variable for all ranks.
    pub fn env(mut self, name: impl Into<OsString>, value: impl Into<OsString>) -> Self {
        self.env.push((name.into(), value.into()));
        self
    }

    /// Writes the output of the ranks to `rank-0.log`, `rank-1.log` … in this folder, which is made if it does not
    /// exist.
    pub fn logs(mut self, folder: impl Into<PathBuf>) -> Self {
        self.logs = Some(folder.into());
        self
    }

    /// Sets how long the other ranks may take to end after a rank has failed: 5 seconds unless given.
    pub fn grace(mut self, time: Duration) -> Self {
        self.grace = time;
        self
    }

    /// Starts the ranks and waits until all have ended.
    ///
    /// # Errors
    /// A rank cannot be started, or a log cannot be made. Ranks that were started are killed.
    pub fn run(self) -> Result<Ended> {
        let signals = Signals::listen()?;
        let mut ranks = Ranks::default();
        self.start(&mut ranks)?;
        let mut failure: Option<(usize, Instant)> = None;
        let mut statuses = vec![None; self.ranks];
        while statuses.contains(&None) {
            if let Some(signal) = signals.take() {
                // The number of a process that was waited for may belong to another process by now.
                let lives = ranks.children.iter().zip(&statuses).filter(|(_, s)| s.is_none());
                lives.for_each(|(child, _)| send_signal(child, signal));
            }
            for (rank, child) in ranks.children.iter_mut().enumerate() {
                if statuses[rank].is_some() {
                    continue;
                }
                statuses[rank] = child.try_wait().map_err(|source| self.io(source))?;
                if let Some(status) = statuses[rank].filter(|status| !status.success())
                    && failure.is_none()
                {
                    failure = Some((rank, Instant::now()));
                    let grace = self.grace.as_secs_f64();
                    eprintln!("rank {rank} failed ({status}); the others end within {grace} s");
                }
            }
            if failure.is_some_and(|(_, since)| since.elapsed() >= self.grace) {
                ranks.kill();
            }
            sleep(PERIOD);
        }
        ranks.finish();
        let statuses = statuses.into_iter().flatten().collect();
        Ok(Ended { statuses, failed: failure.map(|(rank, _)| rank) })
    }

    fn start(&self, ranks: &mut Ranks) -> Result<()> {
        let socket = TcpListener::bind("127.0.0.1:0").map_err(|error| {
            Error::invalid(format!("no port of this machine can be listened at: {error}"))
        })?;
        let port = socket.local_addr().map_err(|source| self.io(source))?.port();
        // This process closes the socket when rank 0 has inherited it, so that it closes when rank 0 ends.
        let mut socket = Some(OwnedFd::from(socket));
        if let Some(folder) = &self.logs {
            std::fs::create_dir_all(folder)
                .map_err(|source| Error::Io { path: folder.clone(), source })?;
        }
        for rank in 0..self.ranks {
            let mut command = self.command(rank, port);
            command.stdin(socket.take().map_or_else(Stdio::null, Stdio::from));
            if let Some(folder) = &self.logs {
                let path = folder.join(format!("rank-{rank}.log"));
                let file = File::create(&path).and_then(|file| Ok((file.try_clone()?, file)));
                let (out, err) = file.map_err(|source| Error::Io { path, source })?;
                command.stdout(out).stderr(err);
            } else if rank > 0 {
                command.stdout(Stdio::piped()).stderr(Stdio::piped());
            }
            let mut child = command.spawn().map_err(|source| self.io(source))?;
            let (out, err) = (child.stdout.take(), child.stderr.take());
            ranks.children.push(child);
            ranks.pipes.extend(out.map(|pipe| prefixed(rank, pipe, std::io::stdout)));
            ranks.pipes.extend(err.map(|pipe| prefixed(rank, pipe, std::io::stderr)));
        }
        Ok(())
    }

    fn command(&self, rank: usize, port: u16) -> Command {
        let mut command = Command::new(&self.program);
        command.args(&self.args).process_group(0);
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = (cores / self.ranks).max(1).to_string();
        let loopback = if cfg!(target_os = "macos") { "lo0" } else { "lo" };
        for (name, value) in
            [("OMP_NUM_THREADS", threads.as_str()), ("GLOO_SOCKET_IFNAME", loopback)]
        {
            if std::env::var_os(name).is_none() {
                command.env(name, value);
            }
        }
        let ranks = self.ranks.to_string();
        command
            .envs(self.env.iter().map(|(name, value)| (name, value)))
            .env("RANK", rank.to_string())
            .env("LOCAL_RANK", rank.to_string())
            .env("WORLD_SIZE", &ranks)
            .env("LOCAL_WORLD_SIZE", &ranks)
            .env("MASTER_ADDR", "127.0.0.1")
            .env("MASTER_PORT", port.to_string());
        match rank {
            0 => command.env(LISTEN_FD, "0"),
            _ => command.env_remove(LISTEN_FD),
        };
        command
    }

    fn io(&self, source: std::io::Error) -> Error {
        Error::Io { path: self.program.clone(), source }
    }
}

/// The processes of the ranks. Dropping this kills the processes that have not ended.
#[derive(Default)]
struct Ranks {
    children: Vec<Child>,
    pipes: Vec<JoinHandle<()>>,
}

impl Ranks {
    fn kill(&mut self) {
        for child in &mut self.children {
            // This fails only if the process has ended.
            let _ = child.kill();
        }
    }

    /// Waits until all output of the ranks is shown, but not for ever, because a process that a rank left behind may
    /// hold the other end of a pipe.
    fn finish(&mut self) {
        let begin = Instant::now();
        while self.pipes.iter().any(|pipe| !pipe.is_finished()) && begin.elapsed() < OUTPUT {
            sleep(Duration::from_millis(5));
        }
        self.pipes.clear();
    }
}

impl Drop for Ranks {
    fn drop(&mut self) {
        self.kill();
        for child in &mut self.children {
            let _ = child.wait();
        }
    }
}

/// Starts a thread that copies whole lines from a rank's pipe, each with `[rank]` before it.
fn prefixed<W: Write + 'static>(
    rank: usize,
    pipe: impl Read + Send + 'static,
    to: fn() -> W,
) -> JoinHandle<()> {
    std::thread::spawn(move || {
        let mut lines = BufReader::new(pipe);
        let mut line = vec![];
        loop {
            line.clear();
            line.extend(format!("[{rank}] ").bytes());
            let prefix = line.len();
            match lines.read_until(b'\n', &mut line) {
                Ok(_) if line.len() > prefix => {
                    if line.last() != Some(&b'\n') {
                        line.push(b'\n');
                    }
                    // Reading goes on even if the lines cannot be written, because a full pipe would stop the rank.
                    let _ = to().write_all(&line);
                }
                _ => return,
            }
        }
    })
}

/// While a value of this type lives, SIGTERM and SIGINT are noted and do not end this process.
struct Signals {
    number: Arc<AtomicUsize>,
    registered: Vec<SigId>,
}

/// This flag decides whether a signal ends the process. A system's default action that was replaced cannot be brought back,
/// so it is done by hand when no job runs.
struct DefaultAction {
    /// Whether a signal ends the process. `None` until the first job.
    ends: Option<Arc<AtomicBool>>,
    /// The number of jobs that run.
    jobs: usize,
    /// Whether [`leave_default`] was called.
    left: bool,
}

static DEFAULT: Mutex<DefaultAction> =
    Mutex::new(DefaultAction { ends: None, jobs: 0, left: false });

impl DefaultAction {
    fn change<R>(change: impl FnOnce(&mut Self) -> R) -> R {
        let mut this = DEFAULT.lock().unwrap_or_else(PoisonError::into_inner);
        let changed = change(&mut this);
        let ends = this.jobs == 0 && !this.left;
        this.ends.iter().for_each(|flag| flag.store(ends, Ordering::Relaxed));
        changed
    }
}

/// Leaves it to the caller whether a signal ends this process when no job runs. Engines that listen to signals decide
/// that themselves.
pub(crate) fn leave_default() {
    DefaultAction::change(|default| default.left = true);
}

impl Signals {
    fn listen() -> Result<Self> {
        let failed = |error| Error::invalid(format!("cannot listen to signals: {error}"));
        let mut signals = Self { number: Arc::default(), registered: vec![] };
        DefaultAction::change(|default| {
            default.jobs += 1;
            if default.ends.is_some() {
                return Ok(());
            }
            let ends = Arc::new(AtomicBool::new(false));
            for signal in [SIGTERM, SIGINT] {
                flag::register_conditional_default(signal, ends.clone())?;
            }
            default.ends = Some(ends);
            Ok(())
        })
        .map_err(failed)?;
        for signal in [SIGTERM, SIGINT] {
            let number = signals.number.clone();
            let registered = flag::register_usize(signal, number, signal as usize);
            signals.registered.push(registered.map_err(failed)?);
        }
        Ok(signals)
    }

    /// The last signal since the last call, if there was one.
    fn take(&self) -> Option<i32> {
        match self.number.swap(0, Ordering::Relaxed) {
            0 => None,
            signal => i32::try_from(signal).ok(),
        }
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        DefaultAction::change(|default| default.jobs -= 1);
        for id in self.registered.drain(..) {
            low_level::unregister(id);
        }
    }
}
