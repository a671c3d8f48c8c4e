//! Reads from environment variables which rank this process is, and where the others are.

use crate::bridge::StoreAddress;
use crate::error::{Error, Result};

/// The variable with the inherited file descriptor of a listening socket, on which rank 0 serves the store.
pub(super) const LISTEN_FD: &str = "TCH_IGNITE_LISTEN_FD";

/// The place of this process among the others, from the variables that its launcher set.
#[derive(Debug, Clone)]
pub(super) struct Environment {
    pub(super) rank: usize,
    pub(super) world_size: usize,
    pub(super) local_rank: usize,
    /// `None` for a process that is alone.
    pub(super) store: Option<StoreAddress>,
    /// The rank that serves the store; `None` if torchrun serves it, or the process is alone.
    pub(super) server: Option<usize>,
}

/// A launcher, with its variables for the rank, the number of ranks and the rank on the machine.
struct Launcher {
    name: &'static str,
    rank: &'static str,
    world_size: &'static str,
    local_rank: &'static str,
}

/// The launchers that are known. The first one whose rank is set counts. Slurm's variables are those of a step
/// (`srun`), because a batch script itself is no rank.
const LAUNCHERS: [Launcher; 4] = [
    Launcher { name: "torchrun", rank: "RANK", world_size: "WORLD_SIZE", local_rank: "LOCAL_RANK" },
    Launcher {
        name: "Open MPI",
        rank: "OMPI_COMM_WORLD_RANK",
        world_size: "OMPI_COMM_WORLD_SIZE",
        local_rank: "OMPI_COMM_WORLD_LOCAL_RANK",
    },
    Launcher {
        name: "MPICH",
        rank: "PMI_RANK",
        world_size: "PMI_SIZE",
        local_rank: "MPI_LOCALRANKID",
    },
    Launcher {
        name: "Slurm",
        rank: "SLURM_PROCID",
        world_size: "SLURM_STEP_NUM_TASKS",
        local_rank: "SLURM_LOCALID",
    },
];

impl Environment {
    /// A process that is alone.
    pub(super) fn single() -> Self {
        Self { rank: 0, world_size: 1, local_rank: 0, store: None, server: None }
    }

    /// Reads the environment through `variable`; `None` if no launcher set its variables.
    pub(super) fn read(variable: impl Fn(&str) -> Option<String>) -> Result<Option<Self>> {
        // srun with PMI2 sets MPICH's variables for the same ranks, but not the rank on the machine.
        let by_srun = variable("PMI_RANK") == variable("SLURM_PROCID")
            && variable("PMI_SIZE") == variable("SLURM_STEP_NUM_TASKS");
        let Some(launcher) = LAUNCHERS.iter().find(|launcher| {
            variable(launcher.rank).is_some()
                && match launcher.name {
                    "MPICH" => !by_srun,
                    "Slurm" => variable(launcher.world_size).is_some(),
                    _ => true,
                }
        }) else {
            return Ok(None);
        };
        let given = |name: &str| number(name, variable(name));
        let missing = |name: &str| {
            Error::invalid(format!(
                "{} is set, but {name} is not. Processes find each other by RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, which torchrun sets; set {name} too",
                launcher.rank
            ))
        };
        let required = |name: &str| given(name)?.ok_or_else(|| missing(name));
        let (rank, world_size) = (required(launcher.rank)?, required(launcher.world_size)?);
        if world_size == 0 || rank >= world_size {
            return Err(Error::invalid(format!(
                "{} is {rank} and {} is {world_size}; ranks go from 0 to one below the number of processes",
                launcher.rank, launcher.world_size
            )));
        }
        if world_size == 1 {
            let local_rank = given(launcher.local_rank)?.unwrap_or(0);
            return Ok(Some(Self { local_rank, ..Self::single() }));
        }
        let slurm = || first_of_nodes(&variable("SLURM_STEP_NODELIST")?);
        // MPI says how many of its processes are on this machine. If all are, the address is known.
        let alone = || {
            let local =
                variable("OMPI_COMM_WORLD_LOCAL_SIZE").or_else(|| variable("MPI_LOCALNRANKS"))?;
            (local.trim() == world_size.to_string()).then(|| "127.0.0.1".to_owned())
        };
        let host = match launcher.name {
            "torchrun" => variable("MASTER_ADDR"),
            "Slurm" => variable("MASTER_ADDR").or_else(slurm),
            _ => variable("MASTER_ADDR").or_else(alone),
        };
        let host = host.filter(|host| !host.is_empty()).ok_or_else(|| missing("MASTER_ADDR"))?;
        let port = match (given("MASTER_PORT")?, launcher.name) {
            (Some(port), _) => port,
            (None, "torchrun") => return Err(missing("MASTER_PORT")),
            // The port depends on the job, so that jobs on the same machine use different ports.
            (None, "Slurm") => 15_000 + given("SLURM_JOB_ID")?.unwrap_or(0) % 10_000,
            (None, _) => 29_500,
        };
        let port = u16::try_from(port)
            .map_err(|_| Error::invalid(format!("MASTER_PORT is {port}; ports go up to 65535")))?;
        let here = matches!(host.as_str(), "localhost" | "::1") || host.starts_with("127.");
        let local_rank = given(launcher.local_rank)?.unwrap_or(if here { rank } else { 0 });
        let agent = variable("TORCHELASTIC_USE_AGENT_STORE").is_some_and(|value| value == "True");
        let listen_fd = given(LISTEN_FD)?.and_then(|fd| i32::try_from(fd).ok());
        let attempt = given("TORCHELASTIC_RESTART_COUNT")?.unwrap_or(0);
        let store = StoreAddress {
            host,
            port,
            serve: rank == 0 && !agent,
            listen_fd: listen_fd.filter(|_| rank == 0 && !agent),
            attempt: u32::try_from(attempt).unwrap_or(u32::MAX),
        };
        let server = (!agent).then_some(0);
        Ok(Some(Self { rank, world_size, local_rank, store: Some(store), server }))
    }
}

/// The number of processes, if a launcher started this one.
#[cfg(unix)]
pub(super) fn world_size() -> Result<Option<usize>> {
    let found = Environment::read(|name| std::env::var(name).ok())?;
    Ok(found.map(|environment| environment.world_size))
}

fn number(name: &str, value: Option<String>) -> Result<Option<usize>> {
    let Some(value) = value else { return Ok(None) };
    value
        .trim()
        .parse()
        .map(Some)
        .map_err(|_| Error::invalid(format!("{name} is '{value}'; it must be a number from 0")))
}

/// The first machine in one of Slurm's lists, such as `node[03-05,9],other` or `rack[1-2]node[1-4]`.
fn first_of_nodes(list: &str) -> Option<String> {
    let (mut name, mut rest) = (String::new(), list);
    while let Some(at) = rest.find([',', '[']).filter(|at| rest[*at..].starts_with('[')) {
        let (numbers, after) = rest[at + 1..].split_once(']')?;
        name += &rest[..at];
        name += numbers.split(['-', ',']).next()?;
        rest = after;
    }
    name += rest.split(',').next()?;
    (!name.is_empty()).then_some(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(variables: &[(&str, &str)]) -> Result<Option<Environment>> {
        Environment::read(|name| {
            variables.iter().find(|(known, _)| *known == name).map(|(_, value)| value.to_string())
        })
    }

    const FULL: [(&str, &str); 4] = [
        ("RANK", "1"),
        ("WORLD_SIZE", "2"),
        ("MASTER_ADDR", "localhost"),
        ("MASTER_PORT", "29500"),
    ];

    #[test]
    fn torchrun() {
        assert!(read(&[]).unwrap().is_none());
        let found = read(&FULL).unwrap().unwrap();
        assert_eq!((found.rank, found.world_size, found.local_rank), (1, 2, 1));
        let store = found.store.unwrap();
        assert_eq!(
            (store.host.as_str(), store.port, store.serve, store.attempt),
            ("localhost", 29500, false, 0)
        );

        let mut zero = FULL.to_vec();
        zero[0].1 = "0";
        zero.extend([("LOCAL_RANK", "3"), ("TORCHELASTIC_RESTART_COUNT", "2"), (LISTEN_FD, "0")]);
        let found = read(&zero).unwrap().unwrap();
        let store = found.store.unwrap();
        assert_eq!(
            (found.local_rank, store.serve, store.attempt, store.listen_fd),
            (3, true, 2, Some(0))
        );
        zero.push(("TORCHELASTIC_USE_AGENT_STORE", "True"));
        let found = read(&zero).unwrap().unwrap();
        let store = found.store.unwrap();
        assert_eq!((found.server, store.serve, store.listen_fd), (None, false, None));
    }

    #[test]
    fn mpi_and_slurm() {
        let mpi = [
            ("OMPI_COMM_WORLD_RANK", "2"),
            ("OMPI_COMM_WORLD_SIZE", "4"),
            ("OMPI_COMM_WORLD_LOCAL_RANK", "0"),
            ("OMPI_COMM_WORLD_LOCAL_SIZE", "4"),
        ];
        let found = read(&mpi).unwrap().unwrap();
        let store = found.store.unwrap();
        assert_eq!(
            (found.rank, found.local_rank, store.host.as_str(), store.port),
            (2, 0, "127.0.0.1", 29500)
        );
        assert!(read(&mpi[..3]).unwrap_err().to_string().contains("MASTER_ADDR"));

        let slurm = [
            ("SLURM_PROCID", "1"),
            ("SLURM_LOCALID", "1"),
            ("SLURM_JOB_ID", "123456"),
            ("SLURM_STEP_NODELIST", "gpu[07-09,12]"),
            ("SLURM_STEP_NUM_TASKS", "8"),
        ];
        let store = read(&slurm).unwrap().unwrap().store.unwrap();
        assert_eq!((store.host.as_str(), store.port), ("gpu07", 18456));
        // With PMI2 srun sets MPICH's variables too.
        let with_pmi2 = [&slurm[..], &[("PMI_RANK", "1"), ("PMI_SIZE", "8")]].concat();
        let found = read(&with_pmi2).unwrap().unwrap();
        let store = found.store.unwrap();
        assert_eq!(
            (found.rank, found.local_rank, store.host.as_str(), store.port),
            (1, 1, "gpu07", 18456)
        );
        // An mpirun within a step has ranks of its own.
        let within =
            [&slurm[..], &[("PMI_RANK", "5"), ("PMI_SIZE", "16"), ("MPI_LOCALRANKID", "3")]];
        let mut within = within.concat();
        within.push(("MASTER_ADDR", "gpu07"));
        let found = read(&within).unwrap().unwrap();
        assert_eq!((found.rank, found.world_size, found.local_rank), (5, 16, 3));
        // These are the variables of a batch script, which is no step.
        assert!(read(&slurm[..4]).unwrap().is_none());
    }

    #[test]
    fn lists_of_nodes() {
        for (list, first) in [
            ("a", "a"),
            ("a,b", "a"),
            ("n[1-3]", "n1"),
            ("n[01,3]", "n01"),
            ("n[7]-x,b", "n7-x"),
            ("a,n[1-3]", "a"),
            ("rack[1-2]node[03-4,7],b", "rack1node03"),
        ] {
            assert_eq!(first_of_nodes(list).as_deref(), Some(first), "{list}");
        }
        assert_eq!(first_of_nodes(""), None);
    }

    #[test]
    fn one_process_needs_no_address() {
        let found =
            read(&[("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "2")]).unwrap().unwrap();
        assert!(found.store.is_none() && found.local_rank == 2);
    }

    #[test]
    fn errors_say_what_to_set() {
        for (change, expected) in [
            (("RANK", "2"), "ranks go from 0"),
            (("WORLD_SIZE", "two"), "WORLD_SIZE is 'two'"),
            (("MASTER_PORT", "70000"), "up to 65535"),
            (("MASTER_ADDR", ""), "MASTER_ADDR is not"),
        ] {
            let mut variables = FULL.to_vec();
            variables.retain(|(name, _)| *name != change.0);
            variables.push(change);
            let text = read(&variables).unwrap_err().to_string();
            assert!(text.contains(expected), "{text}");
        }
        for missing in ["WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"] {
            let mut variables = FULL.to_vec();
            variables.retain(|(name, _)| *name != missing);
            let text = read(&variables).unwrap_err().to_string();
            assert!(text.contains(&format!("but {missing} is not")), "{text}");
        }
    }
}
