//! Tests of ranks that die, freeze, or have fewer batches: the other ranks must end with an error, in time.

use std::time::{Duration, Instant};

use tch::nn::{self, VarStore};
use tch::{Device, Kind, Tensor};
use tch_ignite::Error;
use tch_ignite::distributed::{
    DdpOptions, DistributedDataParallel, FailureKind, ProcessGroup, ProcessGroupOptions, ReduceOp,
};
use tch_ignite::optim::Optimizer;
use tch_ignite::supervised::Supervised;

use crate::ranks::{Ended, Ranks, role};

const TIMEOUT: Duration = Duration::from_secs(3);
/// A rank that takes longer hangs. Joining may take 8 seconds for the store and 11 for the connections, each survivor
/// looks for the others for 2 seconds, and the machine may be busy.
const LATEST: Duration = Duration::from_secs(40);

fn join() -> Result<ProcessGroup, Error> {
    tch::set_num_threads(1);
    ProcessGroup::from_env(ProcessGroupOptions::new().timeout(TIMEOUT))
}

/// Trains until something fails. Now and then there is a metric, a barrier or a gathering between the steps.
fn train() -> anyhow::Result<()> {
    let pg = join()?;
    tch::manual_seed(1);
    let vs = VarStore::new(Device::Cpu);
    let layer = |name: &str, from, to| nn::linear(vs.root() / name, from, to, Default::default());
    let net = nn::seq()
        .add(layer("a", 8, 256))
        .add_fn(|x| x.relu())
        .add(layer("b", 256, 256))
        .add_fn(|x| x.relu())
        .add(layer("c", 256, 1));
    let optimizer = Optimizer::adamw(&vs).build()?;
    let ddp = DistributedDataParallel::new(&pg, &vs, DdpOptions::new().bucket_cap_mb(0.1))?;
    let mut cx =
        Supervised::new(net, optimizer, |y_pred, y| y_pred.mse_loss(y, tch::Reduction::Mean))
            .data_parallel(ddp);
    let x = Tensor::ones([16, 8], (Kind::Float, Device::Cpu));
    let y = Tensor::ones([16, 1], (Kind::Float, Device::Cpu));
    println!("training");
    for iteration in 0..1_000_000u64 {
        let loss = cx.train_step((x.shallow_clone(), y.shallow_clone()))?;
        match iteration % 8 {
            1 => pg.all_reduce(&[&loss], ReduceOp::Avg)?,
            3 => pg.control().all_reduce_f64(&mut [1., 2.], ReduceOp::Sum)?,
            5 => pg.barrier()?,
            7 => drop(pg.all_gather(&loss)?),
            _ => {}
        }
    }
    Ok(())
}

/// Runs `body` as the `main` of a program: an error ends the process with a code other than 0.
fn main_of(body: impl FnOnce() -> anyhow::Result<()>) {
    if let Err(error) = body() {
        println!("ERROR {error:?}");
        let distributed = error.downcast_ref::<Error>();
        if let Some(Error::Distributed { kind, missing, .. }) = distributed {
            println!("DISTRIBUTED {kind:?} {missing:?}");
        }
        std::process::exit(3);
    }
}

fn assert_survivor(rank: usize, ended: Option<Ended>, what: &str) -> Ended {
    let ended = ended.unwrap_or_else(|| panic!("{what}: rank {rank} hangs"));
    let shown = format!("{what}: rank {rank}: {}\n{}\n{}", ended.status, ended.out, ended.err);
    assert_eq!(ended.status.code(), Some(3), "{shown}");
    assert!(ended.out.contains("DISTRIBUTED"), "{shown}");
    ended
}

fn random(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

/// Kills or freezes ranks after random times, `count` times for each number of ranks.
fn lose_ranks(test: &str, signal: &str, count: u64) {
    if role().is_some() {
        return main_of(train);
    }
    let mut state =
        signal.bytes().fold(0x9e37_79b9_7f4a_7c15, |state, byte| (state << 7) ^ u64::from(byte));
    let mut named = 0;
    for world in [2, 4] {
        for trial in 0..count {
            let mut ranks = Ranks::start(test, "train", world);
            let lost = random(&mut state) as usize % world;
            // The rank is lost at any instant of joining, or of training.
            let (phase, most) = if trial % 3 == 0 {
                ("start", 600_000)
            } else {
                assert!(ranks.says(lost, "training"));
                ("training", 100_000)
            };
            let wait = Duration::from_micros(random(&mut state) % most);
            std::thread::sleep(wait);
            ranks.signal(lost, signal);
            let begin = Instant::now();
            let what = format!("{signal} of rank {lost} of {world}, {wait:?} after {phase}");
            let (latest, ended) = ranks.wait_for_others(lost, LATEST);
            println!("{what}: {:?}", begin.elapsed());
            assert!(latest < LATEST, "{what}: {latest:?}");
            for (rank, ended) in ended.into_iter().enumerate().filter(|(rank, _)| *rank != lost) {
                let ended = assert_survivor(rank, ended, &what);
                let line = ended.out.lines().find(|line| line.starts_with("DISTRIBUTED")).unwrap();
                println!("    rank {rank}: {line}");
                named += u64::from(line.ends_with(&format!("[{lost}]")));
            }
        }
    }
    // Survivors cannot name the lost rank if rank 0 and its store were gone before they could ask.
    let survivors = 4 * count;
    assert!(named * 10 >= survivors * 8, "{named} of {survivors} named just the lost rank");
}

fn count() -> u64 {
    if std::env::var_os("TCH_IGNITE_LONG_TESTS").is_some() { 25 } else { 2 }
}

#[test]
fn survivors_of_a_killed_rank_end_with_an_error() {
    lose_ranks("failures::survivors_of_a_killed_rank_end_with_an_error", "-KILL", count());
}

#[test]
fn survivors_of_a_frozen_rank_end_with_an_error() {
    lose_ranks("failures::survivors_of_a_frozen_rank_end_with_an_error", "-STOP", count());
}

fn fields(error: Error) -> (FailureKind, String, Vec<usize>, String) {
    match error {
        Error::Distributed { kind, op, missing, message, .. } => (kind, op, missing, message),
        other => panic!("{other}"),
    }
}

#[test]
fn uneven_numbers_of_batches_are_an_error_that_says_so() {
    const NAME: &str = "failures::uneven_numbers_of_batches_are_an_error_that_says_so";
    let Some(role) = role() else {
        for role in ["agree", "step"] {
            Ranks::start(NAME, role, 2).succeed();
        }
        return;
    };
    let pg = join().unwrap();
    let batches = 5 + pg.rank() as i64;
    if role == "agree" {
        let error = pg.control().agree("batches in an epoch", batches).unwrap_err();
        let (kind, _, missing, message) = fields(error);
        assert_eq!((kind, missing), (FailureKind::Mismatch, vec![]));
        assert_eq!(message, "batches in an epoch: rank 0 has 5, rank 1 has 6");
        return;
    }
    let vs = VarStore::new(Device::Cpu);
    let net = nn::seq().add(nn::linear(vs.root(), 8, 1, Default::default()));
    let optimizer = Optimizer::sgd(&vs).lr(0.1).build().unwrap();
    let ddp = DistributedDataParallel::new(&pg, &vs, DdpOptions::new()).unwrap();
    let mut cx =
        Supervised::new(net, optimizer, |y_pred, _| y_pred.mean(Kind::Float)).data_parallel(ddp);
    let x = Tensor::ones([4, 8], (Kind::Float, Device::Cpu));
    let mut epoch = || -> anyhow::Result<()> {
        for _ in 0..batches {
            let _ = cx.train_step((x.shallow_clone(), x.shallow_clone()))?;
        }
        Ok(pg.control().all_reduce_f64(&mut [1.], ReduceOp::Sum)?)
    };
    let begin = Instant::now();
    let error = epoch().unwrap_err().downcast::<Error>().unwrap();
    assert!(begin.elapsed() < LATEST);
    let (kind, _, missing, message) = fields(error);
    assert_eq!((kind, missing), (FailureKind::Mismatch, vec![]), "{message}");
    let each = "rank 0 was in all_reduce_f64, rank 1 was in DistributedDataParallel::backward";
    assert!(message.contains("another number of batches") && message.contains(each), "{message}");
    // Later calls of the failed group say why it failed.
    let text = pg.barrier().unwrap_err().to_string();
    assert!(text.contains("barrier") && text.contains("the group failed before"), "{text}");
}

/// The other rank waits in an exchange or in a step when this one aborts. Its time-out is much longer than the test
/// waits.
#[test]
fn a_rank_that_aborts_and_lives_on_is_noticed_at_once() {
    const NAME: &str = "failures::a_rank_that_aborts_and_lives_on_is_noticed_at_once";
    let Some(role) = role() else {
        for role in ["barrier", "step"] {
            Ranks::start(NAME, role, 2).succeed();
        }
        return;
    };
    tch::set_num_threads(1);
    let options = ProcessGroupOptions::new().timeout(Duration::from_secs(300));
    let pg = ProcessGroup::from_env(options).unwrap();
    let vs = VarStore::new(Device::Cpu);
    let net = nn::linear(vs.root(), 8, 1, Default::default());
    let ddp = DistributedDataParallel::new(&pg, &vs, DdpOptions::new()).unwrap();
    let x = Tensor::ones([4, 8], (Kind::Float, Device::Cpu));
    let forward = || ddp.forward(|| nn::Module::forward(&net, &x)).map(|y| y.mean(Kind::Float));
    if pg.rank() == 1 {
        let _loss = forward().unwrap();
        pg.abort();
        let error = pg.barrier().unwrap_err().to_string();
        assert!(error.contains("abort"), "{error}");
        // This rank lives on for longer than the other one may take to notice.
        return std::thread::sleep(Duration::from_secs(8));
    }
    let begin = Instant::now();
    let error = match role.as_str() {
        "barrier" => {
            let _loss = forward().unwrap();
            pg.barrier().unwrap_err()
        }
        _ => forward().and_then(|loss| ddp.backward(&loss)).unwrap_err(),
    };
    let waited = begin.elapsed();
    let (kind, _, missing, message) = fields(error);
    assert_eq!((kind, missing), (FailureKind::PeerLost, vec![1]), "{message}");
    assert!(waited < Duration::from_secs(7), "{waited:?}");
}

#[test]
fn with_debug_detail_libtorch_finds_a_difference_itself() {
    if role().is_some() {
        let options = ProcessGroupOptions::new().timeout(TIMEOUT).check_collectives(false);
        let pg = ProcessGroup::from_env(options).unwrap();
        let vs = VarStore::new(Device::Cpu);
        let net = nn::linear(vs.root(), 2, 1, Default::default());
        let ddp = DistributedDataParallel::new(&pg, &vs, DdpOptions::new()).unwrap();
        let x = Tensor::ones([4, 2], (Kind::Float, Device::Cpu));
        for _ in 0..3 {
            let loss = ddp.forward(|| nn::Module::forward(&net, &x)).unwrap().mean(Kind::Float);
            ddp.backward(&loss).unwrap();
        }
        let tensor = Tensor::ones([3 + pg.rank() as i64], (Kind::Float, Device::Cpu));
        let error = pg.all_reduce(&[&tensor], ReduceOp::Sum).unwrap_err();
        let (kind, _, _, message) = fields(error);
        assert_eq!(kind, FailureKind::Mismatch, "{message}");
        return;
    }
    let test = "failures::with_debug_detail_libtorch_finds_a_difference_itself";
    let detail = |_: usize, command: &mut std::process::Command| {
        command.env("TORCH_DISTRIBUTED_DEBUG", "DETAIL");
    };
    Ranks::start_with(test, "all", 2, detail).succeed();
}

#[test]
fn a_group_that_does_not_come_together_says_who_is_missing() {
    const NAME: &str = "failures::a_group_that_does_not_come_together_says_who_is_missing";
    let Some(role) = role() else {
        let taken = std::net::TcpListener::bind("[::]:0").unwrap();
        let port = taken.local_addr().unwrap().port().to_string();
        for role in ["only 0", "only 1", "interface", "port"] {
            let change = |_: usize, command: &mut std::process::Command| {
                let _ = match role {
                    "only 1" => command.env("MASTER_PORT", "9"),
                    "interface" => command.env("GLOO_SOCKET_IFNAME", "nope0"),
                    "port" => command.env("MASTER_PORT", &port).env_remove("TCH_IGNITE_LISTEN_FD"),
                    _ => command,
                };
            };
            Ranks::start_with(NAME, role, 2, change).succeed();
        }
        return;
    };
    let rank = std::env::var("RANK").unwrap();
    let begin = Instant::now();
    match (role.as_str(), rank.as_str()) {
        ("only 0", "0") => {
            let (kind, op, missing, message) = fields(join().unwrap_err());
            assert_eq!((kind, missing), (FailureKind::Timeout, vec![1]), "{message}");
            assert_eq!(op, "joining the process group");
        }
        ("only 1", "1") => {
            let (kind, _, missing, message) = fields(join().unwrap_err());
            assert_eq!((kind, missing), (FailureKind::Timeout, vec![0]), "{message}");
            assert!(message.contains("store at 127.0.0.1:9"), "{message}");
        }
        ("interface", _) => {
            let text = join().unwrap_err().to_string();
            assert!(text.contains("nope0"), "{text}");
        }
        ("port", "0") => {
            let (kind, _, _, message) = fields(join().unwrap_err());
            assert_eq!(kind, FailureKind::Store, "{message}");
            assert!(message.contains("EADDRINUSE") || message.contains("in use"), "{message}");
        }
        _ => {}
    }
    assert!(begin.elapsed() < LATEST);
}
