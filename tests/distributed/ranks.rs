//! Processes of one group, on this machine: the test's own executable, started anew for every rank with the name of
//! the test that is to play it.

use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// What a rank is to do.
pub const ROLE: &str = "TCH_IGNITE_TEST_ROLE";

/// The part of the test that this process is to play; `None` in the process that runs the tests.
pub fn role() -> Option<String> {
    std::env::var(ROLE).ok()
}

pub struct Ranks {
    children: Vec<Option<Child>>,
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
            Some(command.spawn().unwrap())
        };
        Self { children: (0..world).map(start).collect() }
    }

    pub fn id(&self, rank: usize) -> u32 {
        self.children[rank].as_ref().unwrap().id()
    }

    pub fn signal(&self, rank: usize, signal: &str) {
        let id = self.id(rank).to_string();
        assert!(Command::new("kill").args([signal, &id]).status().unwrap().success());
    }

    /// What each rank printed and how it ended, `None` for those that had not ended after that time. None is left.
    pub fn wait(mut self, time: Duration) -> Vec<Option<Output>> {
        let begin = Instant::now();
        let running = |children: &mut Vec<Option<Child>>| {
            children.iter_mut().flatten().any(|child| child.try_wait().unwrap().is_none())
        };
        while begin.elapsed() < time && running(&mut self.children) {
            std::thread::sleep(Duration::from_millis(5));
        }
        let end = |child: &mut Option<Child>| {
            let mut child = child.take().unwrap();
            let ended = child.try_wait().unwrap().is_some();
            if !ended {
                child.kill().unwrap();
            }
            let output = child.wait_with_output().unwrap();
            ended.then_some(output)
        };
        self.children.iter_mut().map(end).collect()
    }

    /// What each rank printed; all have to succeed.
    pub fn succeed(self) -> Vec<String> {
        let outputs = self.wait(Duration::from_secs(120)).into_iter().enumerate();
        let text = |(rank, output): (usize, Option<Output>)| {
            let output = output.unwrap_or_else(|| panic!("rank {rank} hangs"));
            let (out, err) = (text(&output.stdout), text(&output.stderr));
            assert!(output.status.success(), "rank {rank}: {}\n{out}\n{err}", output.status);
            out
        };
        outputs.map(text).collect()
    }
}

impl Drop for Ranks {
    fn drop(&mut self) {
        for child in self.children.iter_mut().flatten() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
