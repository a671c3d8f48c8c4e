//! An engine as one of several processes: how the ranks agree on stops, and how their metrics are joined.

use std::cell::RefCell;
use std::rc::Rc;

use tch::Tensor;

use super::group::Group;
use super::position::Position;
use super::{Engine, Event, Events, HANDLERS};
use crate::engine::metric::RankMetric;
use crate::error::{Error, Result};
use crate::guard::{guarded, guarded_within};
use crate::metrics::{Accumulated, Reduce, exchange};
use crate::state::StateDict;
use crate::state::tree::{from_parts, to_parts};

/// How often the ranks exchange their requests by default, in iterations.
pub(super) const PERIOD: u64 = 10;

/// The group of processes that an engine belongs to; it has at least two ranks.
#[derive(Clone)]
pub(super) struct Peers {
    group: Group,
    /// Whether ranks may have different numbers of batches. They then meet only where epochs begin and end.
    pub(super) uneven: bool,
}

impl Peers {
    #[cfg(feature = "distributed")]
    fn new(pg: &crate::distributed::ProcessGroup) -> Option<Self> {
        Group::new(pg).map(|group| Self { group, uneven: false })
    }
}

/// The ranks that call a handler and keep its state, in an engine of several processes
/// ([`HandlerSpec::ranks`](super::HandlerSpec::ranks)).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ranks {
    /// All ranks call the handler, and each keeps its own state. A checkpoint holds the states that differ from the main
    /// rank's ([`HandlerSpec::differs_by_rank`](super::HandlerSpec::differs_by_rank)).
    All,
    /// Only the main rank calls the handler and keeps its state: for handlers that write files, draw or send.
    Main,
    /// All ranks call the handler, because it exchanges something with the others; the checkpoint holds the main rank's
    /// state.
    MainWithAll,
}

/// The part of a checkpoint with the states that differ between ranks.
pub(super) const RANKS: &str = "ranks";

impl<'a, C, B, O> Engine<'a, C, B, O> {
    /// Makes this engine one of a group's, with an engine in every process. The engines run in step: all processes call
    /// `run` with the same budget and with data of equally many batches.
    ///
    /// * **Metrics** are joined exactly before they are computed, in one exchange for all of them: sums are added up,
    ///   lists concatenated. The values are those of one process with all data, are bitwise equal on all ranks, and are
    ///   there before the handlers of the event are called. Metrics that have a value in each iteration (running
    ///   averages) get one in the first iteration of an epoch, in every tenth after it, and at the end of the epoch.
    /// * **Stops** (`terminate`, `interrupt`, a signal, limits of time and samples, and all other requests of handlers)
    ///   are decided together: what one rank asks for all ranks do, at the same event. The ranks compare requests in
    ///   the iterations named above, and where an epoch begins or ends.
    /// * **Lengths** of epochs, and budgets, are compared when an epoch or a run begins. Where ranks differ, all get an
    ///   error that names both values.
    /// * **Handlers that write or draw** ([`Checkpoint`](crate::checkpoint::Checkpoint), progress bars, handlers of
    ///   loggers, [`on_main`](Self::on_main)) do so on rank 0 only.
    /// * **A checkpoint** holds the state of all ranks, and all ranks resume from the same one. It restores the random
    ///   numbers of each rank, gradients that wait for the end of an accumulation window, and states of handlers
    ///   ([`Ranks::All`]). With a larger number of ranks the new ones start without these, and with the main rank's
    ///   states of handlers.
    ///
    /// An evaluator that is attached by [`Evaluate`](crate::handlers::Evaluate) joins the group of its trainer, and may
    /// have uneven batches. Each exchange takes about 0.3 ms between two processes of one machine, and waits for the
    /// device where a metric is on one; [`agree_every`](Self::agree_every) sets how often the ranks exchange. In a
    /// group of one process this method changes nothing.
    ///
    /// ```
    /// use tch_ignite::distributed::ProcessGroup;
    /// use tch_ignite::engine::{Engine, Event, Until};
    /// use tch_ignite::metrics::Mean;
    /// # let pg = ProcessGroup::single();
    /// let mut trainer = Engine::new(|_: &mut (), _, loss: f64| Ok(loss));
    /// trainer.distributed(&pg).metric("loss", Mean::new());
    /// trainer.on_main(Event::EpochCompleted, |_, engine| {
    ///     println!("{}", engine.state.metrics.get("loss")?); // over all ranks
    ///     Ok(())
    /// });
    /// trainer.run(&mut (), vec![1.0, 2.0], Until::epochs(1))?;
    /// # Ok::<(), tch_ignite::Error>(())
    /// ```
    #[cfg(feature = "distributed")]
    pub fn distributed(&mut self, pg: &crate::distributed::ProcessGroup) -> &mut Self {
        self.peers = Peers::new(pg);
        self
    }

    /// Allows ranks to have different numbers of batches, as evaluators have whose samples are not padded. The ranks
    /// then meet only where epochs begin and end, and stops wait until then. Call this after
    /// [`distributed`](Self::distributed).
    #[cfg(feature = "distributed")]
    pub fn uneven_batches(&mut self, on: bool) -> &mut Self {
        if let Some(peers) = &mut self.peers {
            peers.uneven = on;
        }
        self
    }

    /// Sets how often, in iterations, ranks compare requests and join metrics that have a value in each iteration; the
    /// default is 10. With 1 both happen in each iteration, as in ignite. 0 counts as 1.
    #[cfg(feature = "distributed")]
    pub fn agree_every(&mut self, iterations: u64) -> &mut Self {
        self.agree_every = iterations.max(1);
        self
    }

    /// Whether this is the main process, rank 0 of its group; true for an engine without a group.
    pub fn is_main(&self) -> bool {
        self.rank() == 0
    }

    /// The number of processes: 1 for an engine without a group.
    pub(super) fn ranks(&self) -> u64 {
        self.peers.as_ref().map_or(1, |peers| peers.group.ranks() as u64)
    }

    pub(super) fn rank(&self) -> usize {
        self.peers.as_ref().map_or(0, |peers| peers.group.rank())
    }

    /// Like [`on`](Self::on), but calls the handler on the main process only, as a handler that writes files or prints
    /// needs. The handler must not do anything that waits for the other ranks.
    #[track_caller]
    pub fn on_main<F>(&mut self, events: impl Into<Events>, mut handler: F) -> &mut Self
    where
        F: FnMut(&mut C, &mut Engine<'a, C, B, O>) -> anyhow::Result<()> + 'a,
    {
        self.on(events, move |cx, engine| match engine.is_main() {
            true => handler(cx, engine),
            false => Ok(()),
        })
    }

    /// Adds an evaluator to its trainer's group, if the evaluator has no group yet.
    pub(crate) fn follow<C2, B2, O2>(&mut self, trainer: &Engine<'_, C2, B2, O2>) {
        if self.peers.is_none() {
            let uneven = |peers| Peers { uneven: true, ..peers };
            self.peers = trainer.peers.clone().map(uneven);
        }
    }

    /// Whether the engine computes the metrics (jointly for all ranks), instead of their handlers.
    pub(crate) fn joins_metrics(&self) -> bool {
        self.peers.is_some()
    }

    /// Names the point of the run at which ranks meet. The words are the same on all ranks.
    fn occasion(&self, what: &str) -> String {
        format!("{what}, epoch {}, iteration {}", self.state.epoch, self.state.iteration)
    }

    /// Checks that all ranks begin at the same position and with the same budget.
    pub(super) fn agree_on_start(&self) -> Result<()> {
        let Some(peers) = &self.peers else { return Ok(()) };
        let shown = |n: Option<u64>| n.map_or_else(|| "no".to_owned(), |n| n.to_string());
        let state = &self.state;
        let budget =
            format!("{} epochs, {} iterations", shown(state.max_epochs), shown(state.max_iters));
        let start =
            self.occasion(&format!("a run to {budget} at most from {}", self.position.start()));
        peers.group.exchange(&start, &[]).map(drop)
    }

    /// Whether the ranks meet at this event.
    fn meets_at(&self, event: Event, peers: &Peers) -> bool {
        match event {
            Event::Started | Event::EpochStarted | Event::EpochCompleted => true,
            Event::IterationCompleted if !peers.uneven => {
                (self.iteration_in_epoch().max(1) - 1).is_multiple_of(self.agree_every)
            }
            _ => false,
        }
    }

    /// Exchanges the requests that handlers of the event made, and makes what any rank asked for a request of all.
    /// Returns false where the ranks do not meet at this event.
    #[inline]
    pub(super) fn agree(&mut self, event: Event) -> Result<bool> {
        match self.peers {
            Some(_) => self.exchange_requests(event),
            None => Ok(true),
        }
    }

    fn exchange_requests(&mut self, event: Event) -> Result<bool> {
        let Some(peers) = &self.peers else { return Ok(true) };
        if !self.meets_at(event, peers) {
            return Ok(false);
        }
        if event == Event::EpochStarted && !peers.uneven {
            let length = self.state.epoch_length.map_or(-1, |length| length as i64);
            peers.group.agree(&format!("iterations in epoch {}", self.state.epoch), length)?;
        }
        let signal = self.position.signal.and_then(|signal| u8::try_from(signal).ok());
        let mut own = self.requests.to_bytes().to_vec();
        let shared = own.len();
        own.extend([signal.unwrap_or(0), u8::from(self.limit_reached_here())]);
        let skipped = own.len()..own.len() + 8;
        own.extend(self.position.skipped.to_le_bytes());
        let all = peers.group.exchange(&self.occasion(&format!("after {event}")), &own)?;
        let of_any = |index: usize| all.iter().filter_map(|one| one.get(index)).copied().max();
        let flag = |index| of_any(index).is_some_and(|value| value > 0);
        self.requests.set_shared(flag);
        self.position.signal = of_any(shared).filter(|signal| *signal > 0).map(i32::from);
        self.position.limit = flag(shared + 1);
        let is_ahead = |one: &Vec<u8>| one.get(skipped.clone()) != own.get(skipped.clone());
        if event == Event::EpochCompleted && !peers.uneven && all.iter().any(is_ahead) {
            self.warn(
                "the ranks skipped different numbers of batches (SkipBatch, skip_batch()): a rank that skipped more is ahead of the others in its data, and its passes end earlier; let all ranks skip equally many",
            );
        }
        Ok(true)
    }

    /// Joins and computes the metrics that have a value at this event, before the event's handlers are called.
    #[inline]
    pub(super) fn join_metrics(&mut self, event: Event) -> Result<()> {
        if self.peers.is_none() {
            return Ok(());
        }
        let joined = self.joined_metrics(event);
        if joined.is_err() {
            // The event is not fired after an error, so the metrics' handlers will not use up their updates.
            self.discard_pending_updates();
        }
        joined
    }

    /// Lets all metrics forget that they were updated before the handlers of an event, which are not called any more.
    pub(super) fn discard_pending_updates(&self) {
        for metric in self.living_metrics() {
            metric.borrow_mut().discard_pending_update();
        }
    }

    fn joined_metrics(&mut self, event: Event) -> Result<()> {
        let Some(peers) = &self.peers else { return Ok(()) };
        let computes = matches!(event, Event::IterationCompleted | Event::EpochCompleted);
        if !computes || !self.meets_at(event, peers) {
            return Ok(());
        }
        let due = |metric: &Rc<RefCell<dyn RankMetric<O> + 'a>>| metric.borrow().is_due(event);
        let metrics: Vec<_> = self.living_metrics().into_iter().filter(due).collect();
        if metrics.is_empty() {
            return Ok(());
        }
        let name = |index: usize| format!("'metric {}'", metrics[index].borrow().name());
        let failed = |index, error| self.handler_error(name(index), event, error);
        for (index, metric) in metrics.iter().enumerate() {
            let output = self.state.output.as_ref();
            let updated = guarded_within(|| metric.borrow_mut().update_before(event, output));
            updated.map_err(|error| failed(index, error))?;
        }
        let mut own = vec![];
        for (index, metric) in metrics.iter().enumerate() {
            let parts = guarded_within(|| metric.borrow().parts());
            own.push(parts.map_err(|error| failed(index, error))?);
        }
        let all =
            peers.share(&self.occasion(&format!("{} metrics before {event}", own.len())), &own)?;
        let mut values = vec![];
        for (index, (metric, own)) in metrics.iter().zip(&own).enumerate() {
            let ranks: Vec<_> = all.iter().filter_map(|rank| rank.get(index)).collect();
            let value = guarded(|| value_of_all(&mut *metric.borrow_mut(), event, own, &ranks));
            let value = value.map_err(|error| failed(index, error))?;
            values.push((metric.borrow().name().to_owned(), value));
        }
        for (name, value) in values {
            if let Some(value) = value {
                self.state.metrics.set(&name, value);
            }
        }
        Ok(())
    }

    /// The metrics whose handlers are still attached.
    fn living_metrics(&self) -> Vec<Rc<RefCell<dyn RankMetric<O> + 'a>>> {
        self.metrics.iter().filter_map(std::rc::Weak::upgrade).collect()
    }

    /// The peers, unless this rank failed: after an error they may not be in the exchange.
    fn others(&self) -> Option<&Peers> {
        self.peers.as_ref().filter(|_| self.exception.is_none())
    }

    /// The main process's answer to a question, on all ranks; without a group, this process's.
    pub(crate) fn as_main(&self, what: &str, yes: bool) -> Result<bool> {
        let Some(peers) = self.others() else { return Ok(yes) };
        let all = peers.group.exchange(&self.occasion(what), &[u8::from(yes)])?;
        Ok(all.first().is_some_and(|main| main == &[1]))
    }

    /// The mean of a number over all ranks, with the same bits on each. Without a group, or where ranks have different
    /// numbers of batches, it is the number itself.
    pub(crate) fn mean_of_ranks(&self, what: &str, number: f64) -> Result<f64> {
        let Some(peers) = self.others().filter(|peers| !peers.uneven) else { return Ok(number) };
        let all = peers.group.exchange(&self.occasion(what), &number.to_le_bytes())?;
        let of_rank =
            |bytes: &Vec<u8>| bytes.as_slice().try_into().map_or(f64::NAN, f64::from_le_bytes);
        Ok(all.iter().map(of_rank).sum::<f64>() / all.len() as f64)
    }

    /// The state of all ranks, in one checkpoint, and the error of logs as in
    /// [`checkpoint_within`](Self::checkpoint_within). All ranks must call this; only the main rank's result is
    /// complete, the others get an empty one.
    pub(crate) fn checkpoint_of_all(
        &self,
        cx: &C,
        caller: Option<StateDict>,
    ) -> Result<(StateDict, Result<()>)> {
        let Some(peers) = self.others() else { return self.checkpoint_within(cx, caller) };
        let metrics = self.living_metrics();
        let mut own = vec![sent(&self.rank_local_state(cx)?)?];
        for metric in &metrics {
            let parts = guarded(|| metric.borrow().parts());
            own.push(parts.map_err(|error| of_metric(&*metric.borrow(), &error))?);
        }
        let mut all = peers.share(&self.occasion("a checkpoint"), &own)?;
        if peers.group.rank() != 0 {
            return Ok((StateDict::new(), Ok(())));
        }
        let of_all = |index: usize| {
            let states: Vec<_> = all.iter().filter_map(|rank| rank.get(index + 1)).collect();
            exchange::join(&states).map_err(|error| of_metric(&*metrics[index].borrow(), &error))
        };
        let joined = (0..metrics.len()).map(of_all).collect::<Result<Vec<_>>>()?;
        // Only the checkpoint gets the joined states: each metric keeps its own.
        for (metric, joined) in metrics.iter().zip(joined) {
            metric.borrow_mut().save_as(Some(joined));
        }
        let saved = guarded(|| Ok(self.checkpoint_within(cx, caller)));
        metrics.iter().for_each(|metric| metric.borrow_mut().save_as(None));
        let saved = saved.map_err(|error| Error::State(format!("{error:#}")))?;
        let (mut saved, logs) = saved?;
        let mut ranks = StateDict::new();
        for (rank, states) in all.iter_mut().enumerate().skip(1) {
            let state = states.first_mut().map(std::mem::take).unwrap_or_default();
            let mut own = received(state)?;
            if let (Some(own), Ok(of_main)) = (own.parts.get_mut(HANDLERS), saved.part(HANDLERS)) {
                own.parts
                    .retain(|name, own| !of_main.part(name).is_ok_and(|main| main.is_like(own)));
            }
            ranks.set_part(&rank.to_string(), own);
        }
        saved.set_part(RANKS, ranks);
        Ok((saved, logs))
    }

    /// Clears, on ranks other than the main one, what would be counted twice after the joined state was loaded on all.
    pub(super) fn clear_shared_metrics(&mut self) -> Result<()> {
        if self.is_main() {
            return Ok(());
        }
        let mut left = Ok(());
        for metric in self.living_metrics() {
            let of_this = guarded(|| metric.borrow_mut().clear_shared_parts());
            left = left.and(of_this.map_err(|error| of_metric(&*metric.borrow(), &error)));
        }
        left
    }
}

impl Peers {
    /// Exchanges lists of metric states; returns the lists of all ranks, by rank.
    fn share(
        &self,
        occasion: &str,
        own: &[Vec<Accumulated>],
    ) -> Result<Vec<Vec<Vec<Accumulated>>>> {
        let failed = |error: anyhow::Error| Error::State(format!("{occasion}: {error:#}"));
        let message = exchange::write(own).map_err(failed)?;
        let all = self.group.exchange(occasion, &message)?;
        all.iter().map(|message| exchange::read(message).map_err(failed)).collect()
    }
}

fn of_metric<O>(metric: &dyn RankMetric<O>, error: &anyhow::Error) -> Error {
    Error::State(format!("metric '{}': {error:#}", metric.name()))
}

/// The metric's value over all ranks, computed on the devices of this rank's own state.
fn value_of_all<O>(
    metric: &mut dyn RankMetric<O>,
    event: Event,
    own: &[Accumulated],
    ranks: &[&Vec<Accumulated>],
) -> anyhow::Result<Option<super::MetricValue>> {
    let mut joined = exchange::join(ranks)?;
    for part in &mut joined {
        if let Some(own) = own.iter().find(|own| own.name == part.name) {
            part.value = part.value.f_to_device(own.value.device())?;
        }
    }
    guarded_within(|| metric.value_of(event, &joined, own))
}

/// Packs a state in the form of a metric's: its values as JSON bytes, then its tensors.
fn sent(state: &StateDict) -> Result<Vec<Accumulated>> {
    let failed = |error: &dyn std::fmt::Display| Error::State(format!("a rank's state: {error}"));
    let (values, tensors) = to_parts(state).map_err(|error| failed(&error))?;
    let values = Tensor::f_from_slice(values.as_bytes()).map_err(|error| failed(&error))?;
    let part = |name: String, value| Accumulated::new(name, value, Reduce::Concat);
    let tensors = tensors.into_iter().map(|(name, tensor)| part(name, tensor.shallow_clone()));
    Ok(std::iter::once(part(String::new(), values)).chain(tensors).collect())
}

/// Unpacks a state that [`sent`] packed.
fn received(state: Vec<Accumulated>) -> Result<StateDict> {
    let failed = |error: &dyn std::fmt::Display| Error::State(format!("a rank's state: {error}"));
    let mut parts = state.into_iter();
    let values = parts.next().ok_or_else(|| failed(&"it is empty"))?.value;
    let values = Vec::<u8>::try_from(values).map_err(|error| failed(&error))?;
    let values = std::str::from_utf8(&values).map_err(|error| failed(&error))?;
    from_parts(values, parts.map(|part| (part.name, part.value))).map_err(|error| failed(&error))
}

impl Position {
    /// Says in words whether a run begins anew or goes on.
    fn start(&self) -> &'static str {
        if self.is_at_start() { "its start" } else { "where it was left" }
    }
}
