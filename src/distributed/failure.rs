use std::fmt;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use super::deadline::within;
use crate::Error;
use crate::bridge::{Cause, DistException, Store};

/// What went wrong between processes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum FailureKind {
    /// A rank did not answer within the time-out: it is frozen, late, or does something else.
    Timeout,
    /// A connection to another rank was closed: it has ended, or gave up because of yet another.
    PeerLost,
    /// The store through which the ranks find each other could not be reached or used.
    Store,
    /// The ranks are not doing the same: other operations, sizes, models, numbers of batches.
    Mismatch,
}

impl fmt::Display for FailureKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Timeout => "timed out",
            Self::PeerLost => "another rank is lost",
            Self::Store => "the store cannot be used",
            Self::Mismatch => "the ranks differ",
        })
    }
}

/// How long a rank waits for the others to say that they are alive, too.
const REPORTS: Duration = Duration::from_secs(2);
const POLL: Duration = Duration::from_millis(20);

/// What it was, if it was between processes. gloo's exceptions have no type that could be caught, only texts.
pub(super) fn classify(exception: &DistException) -> Option<FailureKind> {
    let text = exception.text.as_str();
    let has = |parts: &[&str]| parts.iter().any(|part| text.contains(part));
    let mismatches = [
        "Detected mismatch between collectives",
        "DDP expects same model across all ranks",
        "appears not to match",
    ];
    let timeouts = ["Timed out", "timed out", "Application timeout caused pair closure"];
    let lost = ["gloo/transport", "Connection closed by peer", "Connection reset by peer"];
    if has(&mismatches) {
        Some(FailureKind::Mismatch)
    } else if exception.cause == Cause::TimedOut || has(&timeouts) {
        Some(FailureKind::Timeout)
    } else if exception.cause == Cause::Store {
        Some(FailureKind::Store)
    } else if exception.cause == Cause::Network || has(&lost) {
        Some(FailureKind::PeerLost)
    } else {
        None
    }
}

/// The first words of an exception.
pub(super) fn words(text: &str) -> String {
    text.split("\nException raised from").next().unwrap_or_default().trim().to_owned()
}

/// A failure with all that its error says but for the operation.
#[derive(Debug, Clone)]
pub(super) struct Failure {
    pub(super) kind: FailureKind,
    pub(super) rank: usize,
    pub(super) missing: Vec<usize>,
    pub(super) message: String,
}

impl Failure {
    pub(super) fn error(self, op: impl Into<String>) -> Error {
        let Self { kind, rank, missing, message } = self;
        Error::Distributed { kind, rank, op: op.into(), missing, message }
    }
}

/// Says in the store that this rank is alive and has failed, and looks for 2 seconds who else says so: those that do
/// not, without this rank. Where the store does not answer it is rank 0, which serves it.
pub(super) fn unreported(store: &Arc<Store>, rank: usize, world: usize) -> Vec<usize> {
    let own = format!("failed/{rank}");
    let others = move |store: &Store| absent(store, "failed", rank, world);
    let store = store.clone();
    let found = within(REPORTS + Duration::from_millis(500), move || {
        store.set(&own, "1").ok()?;
        let begin = Instant::now();
        let mut missing = others(&store)?;
        // Rank 0 serves the store to the others, so it stays for as long as they may ask.
        while begin.elapsed() < REPORTS && (!missing.is_empty() || rank == 0) {
            thread::sleep(POLL);
            // A store that has gone now has gone with rank 0, which was alive.
            let Some(now) = others(&store) else { break };
            missing = now;
        }
        Some(missing)
    });
    found.flatten().unwrap_or_else(|| if rank == 0 { vec![] } else { vec![0] })
}

/// Ranks that did not come to the point where they say that they have joined.
pub(super) fn not_joined(store: &Arc<Store>, rank: usize, world: usize) -> Vec<usize> {
    let store = store.clone();
    let found = within(REPORTS, move || absent(&store, "joined", rank, world));
    found.flatten().unwrap_or_else(|| if rank == 0 { vec![] } else { vec![0] })
}

fn absent(store: &Store, key: &str, rank: usize, world: usize) -> Option<Vec<usize>> {
    let mut missing = vec![];
    for other in (0..world).filter(|other| *other != rank) {
        if !store.has(&format!("{key}/{other}")).ok()? {
            missing.push(other);
        }
    }
    Some(missing)
}

/// For the end of an error's text.
pub(crate) fn unanswered(missing: &[usize]) -> String {
    match missing {
        [] => String::new(),
        _ => format!("; ranks that did not answer: {missing:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_of_gloo_have_a_kind() {
        let of = |cause, text: &str| classify(&DistException { cause, text: text.into() });
        let gloo = "[/pytorch/third_party/gloo/gloo/transport/tcp/";
        for (cause, text, kind) in [
            (
                Cause::Other,
                &format!(
                    "{gloo}unbound_buffer.cc:81] Timed out waiting 3000ms for recv operation to complete"
                )[..],
                Some(FailureKind::Timeout),
            ),
            (
                Cause::Other,
                &format!("{gloo}pair.cc:547] Connection closed by peer [127.0.0.1]:5000"),
                Some(FailureKind::PeerLost),
            ),
            (Cause::TimedOut, "whatever", Some(FailureKind::Timeout)),
            (
                Cause::Store,
                "Timed out after 4 seconds waiting for clients. 1/2 clients joined.",
                Some(FailureKind::Timeout),
            ),
            (Cause::Store, "the store is gone", Some(FailureKind::Store)),
            (Cause::Network, "recvValue failed", Some(FailureKind::PeerLost)),
            (
                Cause::Other,
                "Detected mismatch between collectives on ranks. Rank 0 is running",
                Some(FailureKind::Mismatch),
            ),
            (Cause::Other, "Invalid scalar type", None),
        ] {
            assert_eq!(of(cause, text), kind, "{text}");
        }
    }
}
