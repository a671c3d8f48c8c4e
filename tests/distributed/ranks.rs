//! Processes of one group, on this machine: the test's own executable, started anew for every rank with the name of
//! the test that is to play it.

use std::io::Read;
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// What a rank is to do.
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
    /// Read while it runs: a full pipe would stop it.
    out: Option<JoinHandle<String>>,
    err: Option<JoinHandle<String>>,
}

/// How a rank ended, and what it printed.
pub struct Ended {
    pub status: ExitStatus,
    pub out: String,
    pub err: String,
}

fn reader(mut pipe: impl Read + Send + 'static) -> Option<JoinHandle<String>> {
    Some(std::thread::spawn(move || {
        let mut bytes = vec![];
        pipe.read_to_end(&mut bytes).unwrap();
        String::from_utf8_lossy(&bytes).into_owned()
    }))
}

impl Rank {
    fn running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    fn end(&mut self) -> Ended {
        let status = self.child.wait().unwrap();
        let [out, err] =
            [self.out.take(), self.err.take()].map(|text| text.unwrap().join().unwrap());
        Ended { status, out, err }
    }
}

impl Ranks {
    /// Starts `world` processes that play `role` of the test.
    pub fn start(test: &str, role: &str, world: usize) -> Self {
        Self::start_with(test, role, world, |_, _| {})
    }

    /// The same; `change` changes the command of a rank.
    pub fn start_with(
        test: &str,
        role: &str,
        world: usize,
        change: impl Fn(usize, &mut Command),
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let mut listener = Some(listener);
        let start = |rank: usize| {
            let mut command = Command::new(std::env::current_exe().unwrap());
            command.args(["--exact", test, "--nocapture", "--test-threads=1"]);
            change(rank, &mut command);
            command
                .env(ROLE, role)
                .envs([("RANK", rank.to_string()), ("WORLD_SIZE", world.to_string())])
                .envs([("MASTER_ADDR", "127.0.0.1".into()), ("MASTER_PORT", port.to_string())])
                .env("GLOO_SOCKET_IFNAME", "lo")
                .stdout(Stdio::piped())
                .stderr(Stdio::piped());
            // Rank 0 takes the socket over, as its standard input.
            match listener.take().filter(|_| rank == 0) {
                Some(socket) => {
                    command.stdin(OwnedFd::from(socket)).env("TCH_IGNITE_LISTEN_FD", "0")
                }
                None => command.stdin(Stdio::null()),
            };
            let mut child = command.spawn().unwrap();
            let out = reader(child.stdout.take().unwrap());
            let err = reader(child.stderr.take().unwrap());
            Rank { child, out, err }
        };
        Self { ranks: (0..world).map(start).collect() }
    }

    pub fn signal(&self, rank: usize, signal: &str) {
        let id = self.ranks[rank].child.id().to_string();
        assert!(Command::new("kill").args([signal, &id]).status().unwrap().success());
    }

    /// How each rank ended; `None` for those that had not ended after that time. None is left.
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

    /// What each rank printed; all have to succeed.
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
