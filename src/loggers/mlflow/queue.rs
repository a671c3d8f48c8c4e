use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::super::json_lines::number;
use super::now;
use super::rest::{Client, Failure};

/// Kept while the server does not answer.
const ROOM: usize = 10_000;
/// Bytes of files kept.
const ROOM_FOR_FILES: usize = 64 << 20;
/// What MLflow takes in one request.
const METRICS: usize = 1000;
const PARAMS: usize = 100;
/// Between requests.
const PERIOD: Duration = Duration::from_secs(1);
/// Between tries, at most.
const PAUSE: Duration = Duration::from_secs(10);

/// Something to send.
pub(super) enum Item {
    Metric { name: String, value: f64, step: u64, time: u64 },
    Param(String, String),
    Tag(String, String),
    Artifact(String, Vec<u8>),
}

impl Item {
    fn bytes(&self) -> usize {
        match self {
            Self::Artifact(_, bytes) => bytes.len(),
            _ => 0,
        }
    }
}

/// What waits for the thread that talks to the server. No lock is held during a request.
#[derive(Default)]
pub(super) struct Queue {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    items: VecDeque<Item>,
    /// Of the files among them.
    bytes: usize,
    /// Items of the request that is under way.
    sending: usize,
    hurry: bool,
    failed: bool,
    /// Nothing is sent after this.
    until: Option<Instant>,
    ended: bool,
    lost: u64,
    told: u64,
    reason: String,
}

impl State {
    fn is_late(&self) -> bool {
        self.until.is_some_and(|until| Instant::now() >= until)
    }

    fn lose(&mut self, count: usize, reason: String) {
        self.lost += count as u64;
        self.reason = reason;
    }

    /// Gives up what is there.
    fn lose_rest(&mut self) {
        let rest = self.items.len() + self.sending;
        self.items.clear();
        (self.sending, self.bytes) = (0, 0);
        if rest > 0 {
            let reason = match self.reason.is_empty() {
                true => "there was no time left to send it".into(),
                false => std::mem::take(&mut self.reason),
            };
            self.lose(rest, reason);
        }
    }

    fn trouble(&self) -> Option<String> {
        let values = if self.lost == 1 { "value was" } else { "values were" };
        (self.lost > 0)
            .then(|| format!("MLflow: {} {values} lost; the last: {}", self.lost, self.reason))
    }
}

impl Queue {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn push(&self, item: Item) {
        let mut state = self.state();
        let bytes = item.bytes();
        if state.until.is_some() {
            state.lose(1, "the logger was closed".into());
        } else if state.items.len() >= ROOM || state.bytes + bytes > ROOM_FOR_FILES {
            if state.reason.is_empty() {
                state.reason = "more came than could be sent".into();
            }
            // Else the reason is that of the request that is tried again.
            state.lost += 1;
        } else {
            state.items.push_back(item);
            state.bytes += bytes;
            if state.items.len() == METRICS {
                self.changed.notify_all();
            }
        }
    }

    pub(super) fn lose(&self, count: usize, reason: String) {
        self.state().lose(count, reason);
    }

    pub(super) fn hurry(&self) {
        self.state().hurry = true;
        self.changed.notify_all();
    }

    pub(super) fn set_failed(&self, failed: bool) {
        self.state().failed = failed;
    }

    /// What was lost since the beginning.
    pub(super) fn trouble(&self) -> Option<String> {
        let mut state = self.state();
        state.told = state.lost;
        state.trouble()
    }

    /// The same, if something was lost since it was last told.
    pub(super) fn untold_trouble(&self) -> Option<String> {
        let mut state = self.state();
        let news = state.lost > state.told;
        state.told = state.lost;
        if news { state.trouble() } else { None }
    }

    /// Waits until all is sent, so long at most.
    pub(super) fn wait(&self, at_most: Duration) {
        let until = Instant::now() + at_most;
        let mut state = self.state();
        state.hurry = true;
        self.changed.notify_all();
        while !state.ended && (state.sending > 0 || !state.items.is_empty()) {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            state = self.wait_on(state, left);
        }
    }

    /// Sends the rest, so long at most. True when the thread is done.
    pub(super) fn end(&self, at_most: Duration) -> bool {
        let until = Instant::now() + at_most;
        let mut state = self.state();
        state.until.get_or_insert(until);
        state.hurry = true;
        self.changed.notify_all();
        while !state.ended {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                state.lose_rest();
                return false;
            }
            state = self.wait_on(state, left);
        }
        true
    }

    fn wait_on<'s>(
        &self,
        state: MutexGuard<'s, State>,
        at_most: Duration,
    ) -> MutexGuard<'s, State> {
        self.changed.wait_timeout(state, at_most).unwrap_or_else(PoisonError::into_inner).0
    }

    /// Starts the thread that talks to the server.
    pub(super) fn serve(
        self: Arc<Self>,
        client: Client,
        run: String,
        artifacts: String,
    ) -> io::Result<JoinHandle<()>> {
        thread::Builder::new().name("mlflow".into()).spawn(move || {
            while let Some(batch) = self.next() {
                self.send(&batch, |batch| request(&client, &run, &artifacts, batch));
            }
            let status = if self.state().failed { "FAILED" } else { "FINISHED" };
            let end = json!({"run_id": run, "status": status, "end_time": now()});
            if let Err(failure) = client.post("runs/update", &end) {
                self.lose(1, failure.reason);
            }
            self.state().ended = true;
            self.changed.notify_all();
        })
    }

    /// What goes into the next request, all of one kind. None after the end.
    fn next(&self) -> Option<Vec<Item>> {
        let mut state = self.state();
        let begun = Instant::now();
        loop {
            if state.is_late() {
                state.lose_rest();
            }
            if state.until.is_some() && state.items.is_empty() {
                return None;
            }
            let left = PERIOD.saturating_sub(begun.elapsed());
            let due = state.until.is_some() || state.hurry || left.is_zero();
            if state.items.len() >= METRICS || (due && !state.items.is_empty()) {
                break;
            }
            state.hurry = false;
            state = self.wait_on(state, if left.is_zero() { PERIOD } else { left });
        }
        let kind = state.items.front().map(std::mem::discriminant);
        let most = match state.items.front() {
            Some(Item::Metric { .. }) => METRICS,
            Some(Item::Artifact(..)) => 1,
            _ => PARAMS,
        };
        let alike = |item: &&Item| Some(std::mem::discriminant(*item)) == kind;
        let count = state.items.iter().take(most).take_while(alike).count();
        let batch: Vec<_> = state.items.drain(..count).collect();
        state.sending = count;
        state.bytes = state.bytes.saturating_sub(batch.iter().map(Item::bytes).sum());
        Some(batch)
    }

    /// Tries until it works, is refused, or there is no time left.
    fn send(&self, batch: &[Item], request: impl Fn(&[Item]) -> Result<Value, Failure>) {
        let mut pause = Duration::from_millis(250);
        loop {
            let answer = request(batch);
            let mut state = self.state();
            match answer {
                Ok(_) => {
                    state.sending = 0;
                    self.changed.notify_all();
                    return;
                }
                Err(failure) if !failure.passes => {
                    let lost = std::mem::take(&mut state.sending);
                    state.lose(lost, failure.reason);
                    self.changed.notify_all();
                    return;
                }
                Err(failure) => state.reason = failure.reason,
            }
            pause = (pause * 2).min(PAUSE);
            let again = Instant::now() + pause;
            // Who waits, or closes the logger, wakes this up.
            while !state.hurry && Instant::now() < again {
                if state.is_late() {
                    return state.lose_rest();
                }
                let soon = state.until.unwrap_or(again).min(again);
                let left = soon.saturating_duration_since(Instant::now());
                state = self.wait_on(state, left);
            }
            state.hurry = false;
        }
    }
}

fn request(client: &Client, run: &str, artifacts: &str, batch: &[Item]) -> Result<Value, Failure> {
    let (mut metrics, mut params, mut tags) = (vec![], vec![], vec![]);
    for item in batch {
        match item {
            Item::Metric { name, value, step, time } => metrics.push(
                json!({"key": name, "value": number(*value), "step": step, "timestamp": time}),
            ),
            Item::Param(name, value) => params.push(json!({"key": name, "value": value})),
            Item::Tag(name, value) => tags.push(json!({"key": name, "value": value})),
            Item::Artifact(path, bytes) => return client.put_artifact(artifacts, path, bytes),
        }
    }
    let body = json!({"run_id": run, "metrics": metrics, "params": params, "tags": tags});
    client.post("runs/log-batch", &body)
}
