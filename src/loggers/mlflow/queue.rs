use std::collections::{HashSet, VecDeque};
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::super::json_lines::number;
use super::now;
use super::rest::{Client, Failure};

/// Largest number of values in the queue.
const ROOM: usize = 10_000;
/// Largest number of bytes of files in the queue.
const ROOM_FOR_FILES: usize = 64 << 20;
/// Largest number of metrics, and of parameters or tags, that MLflow takes in one request.
const METRICS: usize = 1000;
const PARAMS: usize = 100;
/// Time between two requests.
const PERIOD: Duration = Duration::from_secs(1);
/// Longest time between two tries of a request.
const PAUSE: Duration = Duration::from_secs(10);

/// Something to send to the server.
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

    /// The name of a parameter or tag, of which a run has one.
    fn unique_name(&self) -> Option<&str> {
        match self {
            Self::Param(name, _) | Self::Tag(name, _) => Some(name),
            _ => None,
        }
    }
}

/// The queue of the thread that talks to the server. No lock is held during a request.
#[derive(Default)]
pub(super) struct Queue {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    items: VecDeque<Item>,
    /// Number of bytes of the files in `items`.
    bytes: usize,
    /// Number of items in the request under way.
    sending: usize,
    hurry: bool,
    failed: bool,
    /// When the logger was closed: the time after which nothing is sent.
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

    /// Counts everything that is left as lost.
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
            // Otherwise the reason is that of the request that is tried again.
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

    /// A text about all values lost so far; `None` if there are none.
    pub(super) fn trouble(&self) -> Option<String> {
        let mut state = self.state();
        state.told = state.lost;
        state.trouble()
    }

    /// A text about all values lost, if more were lost since the last text.
    pub(super) fn untold_trouble(&self) -> Option<String> {
        let mut state = self.state();
        let news = state.lost > state.told;
        state.told = state.lost;
        if news { state.trouble() } else { None }
    }

    /// Waits until everything is sent, or this time has come.
    pub(super) fn wait(&self, until: Instant) {
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

    /// Closes the queue and sends the rest, for at most this long. Returns true when the thread is
    /// done.
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

    /// Waits for the items of the next request, all of one kind, and each parameter and tag once, because MLflow
    /// refuses a request that names one twice. Returns `None` after the end.
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
        let mut names = HashSet::new();
        let alike = state.items.iter().take(most).take_while(|&item| {
            let is_new = item.unique_name().is_none_or(|name| names.insert(name));
            is_new && Some(std::mem::discriminant(item)) == kind
        });
        let count = alike.count();
        let batch: Vec<_> = state.items.drain(..count).collect();
        state.sending = count;
        state.bytes = state.bytes.saturating_sub(batch.iter().map(Item::bytes).sum());
        Some(batch)
    }

    /// Tries the request until it succeeds, is refused, or there is no time left. A refused request is sent again in two
    /// halves, so that in the end only the items that the server objects to are lost.
    fn send(&self, batch: &[Item], request: impl Fn(&[Item]) -> Result<Value, Failure> + Copy) {
        let mut pause = Duration::from_millis(250);
        // Nothing is under way any more where the rest was given up at the end.
        while self.state().sending > 0 {
            let answer = request(batch);
            let mut state = self.state();
            match answer {
                _ if state.sending == 0 => return,
                Err(failure) if !failure.passes && batch.len() > 1 => {
                    drop(state);
                    let (first, second) = batch.split_at(batch.len() / 2);
                    self.send(first, request);
                    return self.send(second, request);
                }
                Err(failure) if failure.passes => state.reason = failure.reason,
                answer => {
                    state.sending = state.sending.saturating_sub(batch.len());
                    if let Err(failure) = answer {
                        state.lose(batch.len(), failure.reason);
                    }
                    self.changed.notify_all();
                    return;
                }
            }
            pause = (pause * 2).min(PAUSE);
            let again = Instant::now() + pause;
            // A call of `wait` or `end` wakes this up.
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
