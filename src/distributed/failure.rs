use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use super::deadline::within;
use crate::bridge::{Cause, DistException, Store};
use crate::error::Error;
use crate::failure_kind::FailureKind;

/// After a failure was noticed, a rank waits this long for the reports of the other ranks.
const REPORTS: Duration = Duration::from_secs(2);
/// The time between two looks at the store while a rank waits for reports.
const POLL: Duration = Duration::from_millis(20);

/// The kind of failure that an exception means; `None` if it is no failure between processes. gloo's exceptions have no
/// types of their own, so they are recognised by their texts.
pub(super) fn classify(exception: &DistException) -> Option<FailureKind> {
    let text = exception.text.as_str();
    let has = |parts: &[&str]| parts.iter().any(|part| text.contains(part));
    let mismatches = [
        "Detected mismatch between collectives",
        "DDP expects same model across all ranks",
        "appears not to match",
    ];
    let timeouts =
        ["Timed out", "timed out", "wait timeout", "Application timeout caused pair closure"];
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

/// The text of an exception without its backtrace.
pub(super) fn words(text: &str) -> String {
    text.split("\nException raised from").next().unwrap_or_default().trim().to_owned()
}

/// A failure between processes: the fields of [`Error::Distributed`] without the operation.
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

/// The reports of the other ranks after a failure.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Reports {
    /// The ranks that did not report.
    pub(super) missing: Vec<usize>,
    /// The operation in which each other rank failed.
    pub(super) doing: Vec<(usize, String)>,
}

impl Reports {
    /// Reports in the store that this rank is alive and failed in `op`, and waits up to 2 seconds for the reports of
    /// the other ranks. If the store does not answer, the rank that serves it counts as missing.
    pub(super) fn gather(
        store: &Arc<Store>,
        rank: usize,
        world: usize,
        server: Option<usize>,
        op: &str,
    ) -> Self {
        let (store, op) = (store.clone(), op.to_owned());
        let found = within(REPORTS + Duration::from_millis(500), move || {
            store.set(&format!("failed/{rank}"), &op).ok()?;
            let begin = Instant::now();
            let mut missing = absent(&store, "failed", rank, world)?;
            // The rank that serves the store stays the whole time, because the others may still ask.
            while begin.elapsed() < REPORTS && (!missing.is_empty() || server == Some(rank)) {
                thread::sleep(POLL);
                // If the store is gone now, its server has ended after it reported, so it is not missing.
                let Some(now) = absent(&store, "failed", rank, world) else { break };
                missing = now;
            }
            let others = (0..world).filter(|other| *other != rank && !missing.contains(other));
            let doing = others
                .map_while(|other| Some((other, store.get(&format!("failed/{other}")).ok()?)));
            let doing = doing.collect();
            Some(Self { missing, doing })
        });
        found
            .flatten()
            .unwrap_or_else(|| Self { missing: without_store(rank, server), doing: vec![] })
    }

    /// Says which operation each rank was in, if all ranks are alive and the operations differ.
    pub(super) fn out_of_step(&self, rank: usize, op: &str) -> Option<String> {
        let mut all = self.doing.clone();
        all.push((rank, op.to_owned()));
        all.sort();
        let differs = all.iter().any(|(_, doing)| *doing != all[0].1);
        (self.missing.is_empty() && differs).then(|| {
            let each: Vec<_> =
                all.iter().map(|(rank, doing)| format!("rank {rank} was in {doing}")).collect();
            format!(
                "the ranks are out of step, as with another number of batches on each: {}",
                each.join(", ")
            )
        })
    }
}

/// The ranks that have not reported in the store that they joined.
pub(super) fn not_joined(
    store: &Arc<Store>,
    rank: usize,
    world: usize,
    server: Option<usize>,
) -> Vec<usize> {
    let store = store.clone();
    let found = within(REPORTS, move || absent(&store, "joined", rank, world));
    found.flatten().unwrap_or_else(|| without_store(rank, server))
}

/// The missing ranks if the store does not answer: the rank that serves it.
pub(super) fn without_store(rank: usize, server: Option<usize>) -> Vec<usize> {
    server.into_iter().filter(|server| *server != rank).collect()
}

/// The other ranks that have not set `"<key>/<rank>"` in the store; `None` if the store fails.
fn absent(store: &Store, key: &str, rank: usize, world: usize) -> Option<Vec<usize>> {
    let mut missing = vec![];
    for other in (0..world).filter(|other| *other != rank) {
        if !store.has(&format!("{key}/{other}")).ok()? {
            missing.push(other);
        }
    }
    Some(missing)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_that_do_different_things_are_told_from_late_ones() {
        let reports = |missing: &[usize], doing: &[(usize, &str)]| Reports {
            missing: missing.to_vec(),
            doing: doing.iter().map(|(rank, op)| (*rank, op.to_string())).collect(),
        };
        let text = reports(&[], &[(0, "barrier")]).out_of_step(1, "backward").unwrap();
        assert!(text.ends_with("rank 0 was in barrier, rank 1 was in backward"), "{text}");
        assert_eq!(reports(&[], &[(0, "barrier")]).out_of_step(1, "barrier"), None);
        assert_eq!(reports(&[2], &[(0, "barrier")]).out_of_step(1, "backward"), None);
    }

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
