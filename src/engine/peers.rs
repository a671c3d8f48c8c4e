//! An engine that is one of several processes': what they agree on, and metrics of all.

use std::cell::RefCell;
use std::rc::Rc;

use tch::Tensor;

use super::position::Position;
use super::{Engine, Event, Events};
use crate::engine::metric::RankMetric;
use crate::error::{Error, Result};
use crate::guard::{guarded, guarded_within};
use crate::metrics::{Accumulated, Reduce, exchange};
use crate::state::StateDict;
use crate::state::tree::{from_parts, to_parts};

#[cfg(feature = "distributed")]
type Group = crate::distributed::ProcessGroup;
/// There is none without the feature.
#[cfg(not(feature = "distributed"))]
type Group = std::convert::Infallible;

/// How often ranks look at each other unless told otherwise, in iterations.
pub(super) const PERIOD: u64 = 10;

/// The other processes of an engine; there is at least one.
#[derive(Clone)]
pub(super) struct Peers {
    group: Group,
    /// The ranks have different numbers of batches: they only meet where epochs begin and end.
    pub(super) uneven: bool,
}

impl Peers {
    #[cfg(feature = "distributed")]
    fn new(pg: &Group) -> Option<Self> {
        (pg.world_size() > 1).then(|| Self { group: pg.clone(), uneven: false })
    }

    fn ranks(&self) -> usize {
        #[cfg(feature = "distributed")]
        return self.group.world_size();
        #[cfg(not(feature = "distributed"))]
        match self.group {}
    }

    fn rank(&self) -> usize {
        #[cfg(feature = "distributed")]
        return self.group.rank();
        #[cfg(not(feature = "distributed"))]
        match self.group {}
    }

    /// The messages of all ranks. All must name the same occasion; the error says what each names.
    fn exchange(&self, occasion: &str, message: &[u8]) -> Result<Vec<Vec<u8>>> {
        #[cfg(feature = "distributed")]
        return self.group.control().exchange(occasion, message);
        #[cfg(not(feature = "distributed"))]
        match (self.group, occasion, message) {}
    }

    fn agree(&self, what: &str, number: i64) -> Result<()> {
        #[cfg(feature = "distributed")]
        return self.group.control().agree(what, number);
        #[cfg(not(feature = "distributed"))]
        match (self.group, what, number) {}
    }
}

/// Who calls a handler, and has its state, in an engine of several processes
/// ([`Handler::ranks`](super::Handler::ranks)).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ranks {
    /// All.
    All,
    /// The main one alone: what writes files, or draws.
    Main,
    /// All call it, because they give something to what the main one does; the state is the main one's.
    MainWithAll,
}

/// The part of a checkpoint that has what is each rank's own.
pub(super) const RANKS: &str = "ranks";

impl<'a, C, B, O> Engine<'a, C, B, O> {
    /// Makes this engine one of those of all processes of a group, which run it in step: all call `run` with data of as
    /// many batches, and the same budget.
    ///
    /// * **Metrics** are joined before they are computed, exactly, in one exchange for all of them: sums are added up,
    ///   lists put together. Their values are those of one process with all data, the same bits on all ranks, and there
    ///   before the handlers of the event are called. Metrics that have a value in each iteration (running averages)
    ///   get one in the first iteration of an epoch, in every tenth after it, and at its end.
    /// * **Stops** (`terminate`, `interrupt`, a signal, limits of time and samples, all that handlers ask for) are decided
    ///   together: what one rank asks for all do, at the same event: in those iterations, or where an epoch begins or ends.
    /// * **Lengths** of epochs and budgets are compared where they begin; ranks that differ get an error that names both.
    /// * **What writes or draws** ([`Checkpoint`](crate::checkpoint::Checkpoint), progress bars, handlers of loggers,
    ///   [`on_main`](Self::on_main)) does so on rank 0.
    /// * **A checkpoint** has what is needed of all ranks, and all resume the same one. The random numbers of each rank go on,
    ///   and gradients that wait for the end of a window; with another number of ranks those of ranks that are new do not.
    ///
    /// An evaluator that is attached by [`Evaluate`](crate::handlers::Evaluate) belongs to the group of its trainer, and
    /// may have uneven batches. Each exchange takes about 0.3 ms between two processes of one machine, and waits for the
    /// device where a metric is on one; [`agree_every`](Self::agree_every) says how often. In a group of one nothing of all
    /// this happens.
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

    /// Ranks may have different numbers of batches, as an evaluator's may whose samples are not padded. They then only meet
    /// where epochs begin and end; stops wait for that. After [`distributed`](Self::distributed).
    #[cfg(feature = "distributed")]
    pub fn uneven_batches(&mut self, on: bool) -> &mut Self {
        if let Some(peers) = &mut self.peers {
            peers.uneven = on;
        }
        self
    }

    /// How often, in iterations, ranks compare what was asked for and join metrics that have a value in each iteration: 10
    /// unless given. With 1 both happen in each iteration, as in ignite.
    #[cfg(feature = "distributed")]
    pub fn agree_every(&mut self, iterations: u64) -> &mut Self {
        self.agree_every = iterations.max(1);
        self
    }

    /// Whether this is the main process, rank 0 of its group; true for an engine without a group.
    pub fn is_main(&self) -> bool {
        self.rank() == 0
    }

    /// How many processes there are: 1 for an engine without a group.
    pub(super) fn ranks(&self) -> u64 {
        self.peers.as_ref().map_or(1, |peers| peers.ranks() as u64)
    }

    pub(super) fn rank(&self) -> usize {
        self.peers.as_ref().map_or(0, Peers::rank)
    }

    /// Like [`on`](Self::on), on the main process only: for what writes files or prints. The handler must not do anything
    /// that waits for the other ranks.
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

    /// Makes an evaluator part of its trainer's group.
    pub(crate) fn follow<C2, B2, O2>(&mut self, trainer: &Engine<'_, C2, B2, O2>) {
        if self.peers.is_none() {
            let uneven = |peers| Peers { uneven: true, ..peers };
            self.peers = trainer.peers.clone().map(uneven);
        }
    }

    /// Whether metrics are computed here, and not by their handlers.
    pub(crate) fn joins_metrics(&self) -> bool {
        self.peers.is_some()
    }

    /// Where the run is, the same words on all ranks.
    fn occasion(&self, what: &str) -> String {
        format!("{what}, epoch {}, iteration {}", self.state.epoch, self.state.iteration)
    }

    /// Compares where this run begins and how far it goes.
    pub(super) fn agree_on_start(&self) -> Result<()> {
        let Some(peers) = &self.peers else { return Ok(()) };
        let shown = |n: Option<u64>| n.map_or_else(|| "no".to_owned(), |n| n.to_string());
        let state = &self.state;
        let budget =
            format!("{} epochs, {} iterations", shown(state.max_epochs), shown(state.max_iters));
        let start =
            self.occasion(&format!("a run to {budget} at most from {}", self.position.start()));
        peers.exchange(&start, &[]).map(drop)
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

    /// Makes what handlers of the event asked for, on any rank, what is asked for on all; false where the ranks do not meet
    /// at this event.
    pub(super) fn agree(&mut self, event: Event) -> Result<bool> {
        let Some(peers) = &self.peers else { return Ok(true) };
        if !self.meets_at(event, peers) {
            return Ok(false);
        }
        if event == Event::EpochStarted && !peers.uneven {
            let length = self.state.epoch_length.map_or(-1, |length| length as i64);
            peers.agree(&format!("iterations in epoch {}", self.state.epoch), length)?;
        }
        let signal = self.position.signal.and_then(|signal| u8::try_from(signal).ok());
        let mut own = self.requests.to_bytes().to_vec();
        let shared = own.len();
        own.extend([signal.unwrap_or(0), u8::from(self.limit_reached_here())]);
        let all = peers.exchange(&self.occasion(&format!("after {event}")), &own)?;
        let of_any = |index: usize| all.iter().filter_map(|one| one.get(index)).copied().max();
        let flag = |index| of_any(index).is_some_and(|value| value > 0);
        self.requests.set_shared(flag);
        self.position.signal = of_any(shared).filter(|signal| *signal > 0).map(i32::from);
        self.position.limit = flag(shared + 1);
        Ok(true)
    }

    /// RankMetric and computes the metrics that have a value at this event, before its handlers are called.
    pub(super) fn join_metrics(&mut self, event: Event) -> Result<()> {
        let joined = self.joined_metrics(event);
        if joined.is_err() {
            // Their handlers are not called for this event.
            self.living_metrics()
                .iter()
                .for_each(|metric| metric.borrow_mut().discard_pending_update());
        }
        joined
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

    fn living_metrics(&self) -> Vec<Rc<RefCell<dyn RankMetric<O> + 'a>>> {
        self.metrics.iter().filter_map(|metric| metric.upgrade()).collect()
    }

    /// The others, if they can be counted on: not after an error.
    fn others(&self) -> Option<&Peers> {
        self.peers.as_ref().filter(|_| self.exception.is_none())
    }

    /// What the main process decides, on all; without a group what this one does.
    pub(crate) fn as_main(&self, what: &str, yes: bool) -> Result<bool> {
        let Some(peers) = self.others() else { return Ok(yes) };
        let all = peers.exchange(&self.occasion(what), &[u8::from(yes)])?;
        Ok(all.first().is_some_and(|main| main == &[1]))
    }

    /// The state with what is needed of all ranks, which all call this. Only that of the main one is whole.
    pub(crate) fn checkpoint_of_all(&self, cx: &C, caller: Option<StateDict>) -> Result<StateDict> {
        let Some(peers) = self.others() else { return self.checkpoint_within(cx, caller) };
        let metrics = self.living_metrics();
        let mut own = vec![sent(&self.rank_local_state(cx)?)?];
        for metric in &metrics {
            let parts = guarded(|| metric.borrow().parts());
            own.push(parts.map_err(|error| of_metric(&*metric.borrow(), &error))?);
        }
        let mut all = peers.share(&self.occasion("a checkpoint"), &own)?;
        if peers.rank() != 0 {
            return Ok(StateDict::new());
        }
        let mut ranks = StateDict::new();
        for (rank, states) in all.iter_mut().enumerate().skip(1) {
            let state = states.first_mut().map(std::mem::take).unwrap_or_default();
            ranks.set_part(&rank.to_string(), received(state)?);
        }
        let of_all = |index: usize| {
            let states: Vec<_> = all.iter().filter_map(|rank| rank.get(index + 1)).collect();
            exchange::join(&states).map_err(|error| of_metric(&*metrics[index].borrow(), &error))
        };
        let joined = (0..metrics.len()).map(of_all).collect::<Result<Vec<_>>>()?;
        // The metrics themselves go on with their own.
        for (metric, joined) in metrics.iter().zip(joined) {
            metric.borrow_mut().save_as(Some(joined));
        }
        let saved = guarded(|| Ok(self.checkpoint_within(cx, caller)));
        metrics.iter().for_each(|metric| metric.borrow_mut().save_as(None));
        let saved = saved.map_err(|error| Error::State(format!("{error:#}")))?;
        let mut saved = saved?;
        saved.set_part(RANKS, ranks);
        Ok(saved)
    }

    /// On other ranks than the main one, after the state of all was loaded.
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
    /// The lists of all ranks.
    fn share(
        &self,
        occasion: &str,
        own: &[Vec<Accumulated>],
    ) -> Result<Vec<Vec<Vec<Accumulated>>>> {
        let failed = |error: anyhow::Error| Error::State(format!("{occasion}: {error:#}"));
        let message = exchange::write(own).map_err(failed)?;
        let all = self.exchange(occasion, &message)?;
        all.iter().map(|message| exchange::read(message).map_err(failed)).collect()
    }
}

fn of_metric<O>(metric: &dyn RankMetric<O>, error: &anyhow::Error) -> Error {
    Error::State(format!("metric '{}': {error:#}", metric.name()))
}

/// The value of the joined state, on the devices of this rank's own.
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

/// A state among those of metrics: its values, and its tensors.
fn sent(state: &StateDict) -> Result<Vec<Accumulated>> {
    let failed = |error: &dyn std::fmt::Display| Error::State(format!("a rank's state: {error}"));
    let (values, tensors) = to_parts(state).map_err(|error| failed(&error))?;
    let values = Tensor::f_from_slice(values.as_bytes()).map_err(|error| failed(&error))?;
    let part = |name: String, value| Accumulated::new(name, value, Reduce::Concat);
    let tensors = tensors.into_iter().map(|(name, tensor)| part(name, tensor.shallow_clone()));
    Ok(std::iter::once(part(String::new(), values)).chain(tensors).collect())
}

/// What [`sent`] sent.
fn received(state: Vec<Accumulated>) -> Result<StateDict> {
    let failed = |error: &dyn std::fmt::Display| Error::State(format!("a rank's state: {error}"));
    let mut parts = state.into_iter();
    let values = parts.next().ok_or_else(|| failed(&"it is empty"))?.value;
    let values = Vec::<u8>::try_from(values).map_err(|error| failed(&error))?;
    let values = std::str::from_utf8(&values).map_err(|error| failed(&error))?;
    from_parts(values, parts.map(|part| (part.name, part.value))).map_err(|error| failed(&error))
}

impl Position {
    /// In words, whether a run begins anew or goes on.
    fn start(&self) -> &'static str {
        if self.is_at_start() { "its start" } else { "where it was left" }
    }
}
