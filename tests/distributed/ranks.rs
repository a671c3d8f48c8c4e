//! Starts the processes of a group on this machine. Each rank is the test's own executable, started with the name of
//! the test, which then plays the rank's role.

use std::io::Read;
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// This variable says which part of a test a rank is to play.
pub const ROLE: &str = "TCH_IGNITE_TEST_ROLE";

/// The part of the test that this process is to play; `None` in the process that runs the tests.
pub fn role() -> Option<String> {
    std::env::var(ROLE).ok()
}

pub struct Ranks {
    ranks: Vec<Rank>,
}

struct Rank {
    child: Child,
    out: Pipe,
    err: Pipe,
}

/// A pipe from a process. A thread reads it while the process runs, because a full pipe would stop the process.
struct Pipe {
    text: Arc<Mutex<Vec<u8>>>,
    reader: Option<JoinHandle<()>>,
}

/// A rank that has ended: its status, and the text that it printed.
pub struct Ended {
    pub status: ExitStatus,
    pub out: String,
    pub err: String,
}

impl Pipe {
    fn read(mut pipe: impl Read + Send + 'static) -> Self {
        let text = Arc::new(Mutex::new(vec![]));
        let to = text.clone();
        let read = move || {
            let mut bytes = [0; 1 << 16];
            while let Ok(count @ 1..) = pipe.read(&mut bytes) {
                to.lock().unwrap().extend(&bytes[..count]);
            }
        };
        Self { text, reader: Some(std::thread::spawn(read)) }
    }

    fn so_far(&self) -> String {
        String::from_utf8_lossy(&self.text.lock().unwrap()).into_owned()
    }

    /// The whole text, once the process has ended.
    fn end(&mut self) -> String {
        if let Some(reader) = self.reader.take() {
            reader.join().unwrap();
        }
        self.so_far()
    }
}

impl Rank {
    fn running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    fn end(&mut self) -> Ended {
        let status = self.child.wait().unwrap();
        Ended { status, out: self.out.end(), err: self.err.end() }
    }
}

/// The command that runs just this test of this executable.
fn own(test: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--nocapture", "--test-threads=1"]);
    command
}

impl Ranks {
    /// Starts `world` processes that play `role` of the test.
    pub fn start(test: &str, role: &str, world: usize) -> Self {
        Self::start_with(test, role, world, |_, _| {})
    }

    /// Does the same as `start`; `change` may change the command of each rank.
    pub fn start_with(
        test: &str,
        role: &str,
        world: usize,
        change: impl Fn(usize, &mut Command),
    ) -> Self {
        Self::start_commands(role, world, |_| own(test), &change)
    }

    /// Does the same as `start`; where `other` gives a command, the rank is that program.
    pub fn start_some(
        test: &str,
        role: &str,
        world: usize,
        other: impl Fn(usize) -> Option<Command>,
    ) -> Self {
        Self::start_commands(
            role,
            world,
            |rank| other(rank).unwrap_or_else(|| own(test)),
            &|_, _| {},
        )
    }

    fn start_commands(
        role: &str,
        world: usize,
        command: impl Fn(usize) -> Command,
        change: &dyn Fn(usize, &mut Command),
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let mut listener = Some(listener);
        let start = |rank: usize| {
            let mut command = command(rank);
            command
                .env(ROLE, role)
                .envs([("RANK", rank.to_string()), ("WORLD_SIZE", world.to_string())])
                .envs([("MASTER_ADDR", "127.0.0.1".into()), ("MASTER_PORT", port.to_string())])
                .env("GLOO_SOCKET_IFNAME", "lo")
                .stdout(Stdio::piped())
                .stderr(Stdio::piped());
            // Rank 0 inherits the listening socket as its standard input.
            match listener.take().filter(|_| rank == 0) {
                Some(socket) => {
                    command.stdin(OwnedFd::from(socket)).env("TCH_IGNITE_LISTEN_FD", "0")
                }
                None => command.stdin(Stdio::null()),
            };
            change(rank, &mut command);
            let mut child = command.spawn().unwrap();
            let out = Pipe::read(child.stdout.take().unwrap());
            let err = Pipe::read(child.stderr.take().unwrap());
            Rank { child, out, err }
        };
        Self { ranks: (0..world).map(start).collect() }
    }

    /// Waits until the rank prints the text; false if the rank ended, or a minute passed, before that.
    pub fn says(&mut self, rank: usize, text: &str) -> bool {
        let begin = Instant::now();
        loop {
            let running = self.ranks[rank].running();
            if self.ranks[rank].out.so_far().contains(text) {
                return true;
            }
            if !running || begin.elapsed() > Duration::from_secs(60) {
                return false;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    pub fn signal(&self, rank: usize, signal: &str) {
        let id = self.ranks[rank].child.id().to_string();
        assert!(Command::new("kill").args([signal, &id]).status().unwrap().success());
    }

    /// Waits for all ranks. The result is `None` for a rank that has not ended after `time`; such ranks are killed.
    pub fn wait(mut self, time: Duration) -> Vec<Option<Ended>> {
        let begin = Instant::now();
        while begin.elapsed() < time && self.ranks.iter_mut().any(Rank::running) {
            std::thread::sleep(Duration::from_millis(5));
        }
        let end = |rank: &mut Rank| {
            let running = rank.running();
            if running {
                rank.child.kill().unwrap();
            }
            let ended = rank.end();
            (!running).then_some(ended)
        };
        self.ranks.iter_mut().map(end).collect()
    }

    /// Waits for all ranks but `lost`, which is killed afterwards, and returns how long that took.
    pub fn wait_for_others(
        mut self,
        lost: usize,
        time: Duration,
    ) -> (Duration, Vec<Option<Ended>>) {
        let begin = Instant::now();
        let others = |ranks: &mut Vec<Rank>| {
            ranks.iter_mut().enumerate().any(|(rank, other)| rank != lost && other.running())
        };
        while begin.elapsed() < time && others(&mut self.ranks) {
            std::thread::sleep(Duration::from_millis(5));
        }
        let took = begin.elapsed();
        let _ = self.ranks[lost].child.kill();
        (took, self.wait(Duration::from_millis(200)))
    }

    /// Waits for all ranks, which must succeed, and returns the text that each printed.
    pub fn succeed(self) -> Vec<String> {
        let outputs = self.wait(Duration::from_secs(120)).into_iter().enumerate();
        let text = |(rank, ended): (usize, Option<Ended>)| {
            let ended = ended.unwrap_or_else(|| panic!("rank {rank} hangs"));
            let Ended { status, out, err } = ended;
            assert!(status.success(), "rank {rank}: {status}\n{out}\n{err}");
            out
        };
        outputs.map(text).collect()
    }
}

impl Drop for Ranks {
    fn drop(&mut self) {
        for rank in &mut self.ranks {
            let _ = rank.child.kill();
            let _ = rank.child.wait();
        }
    }
}
