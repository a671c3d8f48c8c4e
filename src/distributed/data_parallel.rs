use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use tch::Tensor;
use tch::nn::{VarStore, Variables};

use super::process_group::Turn;
use super::{Outputs, ProcessGroup, ReduceOp};
use crate::bridge::{Reducer, ReducerOptions};
use crate::error::{Error, Result};
use crate::optim;
use crate::variables;
use crate::variables::Variable;

/// How gradients travel between ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum Compression {
    /// In their own type.
    #[default]
    None,
    /// As f16, divided by the number of ranks before they are added: half the bytes, and gradients below 6e-8 are lost.
    Fp16,
    /// As bf16, likewise: half the bytes, the range of f32, 8 bits of precision.
    Bf16,
}

/// How a model is made parallel; the same on all ranks. The defaults are torch's.
///
/// ```
/// use tch_ignite::distributed::DdpOptions;
///
/// let options = DdpOptions::new().bucket_cap_mb(10.0).find_unused_parameters(true);
/// # let _ = options;
/// ```
#[derive(Debug, Clone)]
pub struct DdpOptions {
    find_unused_parameters: bool,
    bucket_cap_mb: Option<f64>,
    gradient_as_bucket_view: bool,
    broadcast_buffers: bool,
    compression: Compression,
}

impl Default for DdpOptions {
    fn default() -> Self {
        Self::new()
    }
}

impl DdpOptions {
    /// Buckets of 25 MiB, the first, which leaves first, of 1 MiB; buffers follow rank 0; every parameter has a gradient in
    /// each backward.
    pub fn new() -> Self {
        Self {
            find_unused_parameters: false,
            bucket_cap_mb: None,
            gradient_as_bucket_view: false,
            broadcast_buffers: true,
            compression: Compression::None,
        }
    }

    /// Looks through the graph after each forward for parameters that take no part; they then need no gradient. One that
    /// is used on some ranks has a gradient on all; one that is used on none stays without. Costs a walk over the graph
    /// and a small collective for each step. Without it, a parameter without a gradient is an error at the next forward.
    pub fn find_unused_parameters(mut self, on: bool) -> Self {
        self.find_unused_parameters = on;
        self
    }

    /// MiB of gradients that travel together; they leave as soon as the last of them is computed, while backward goes on.
    /// In the first step all travel together.
    pub fn bucket_cap_mb(mut self, megabytes: f64) -> Self {
        self.bucket_cap_mb = Some(megabytes);
        self
    }

    /// Gradients are views into the buckets: their memory once instead of twice, and a copy less. Then tch's own
    /// `zero_grad` panics; those of [`Optimizer`](crate::optim::Optimizer) and [`DistributedDataParallel::backward`]
    /// work.
    pub fn gradient_as_bucket_view(mut self, on: bool) -> Self {
        self.gradient_as_bucket_view = on;
        self
    }

    /// Whether all ranks get rank 0's buffers (running averages of batch normalisation) before each forward.
    pub fn broadcast_buffers(mut self, on: bool) -> Self {
        self.broadcast_buffers = on;
        self
    }

    /// How gradients travel.
    pub fn compression(mut self, compression: Compression) -> Self {
        self.compression = compression;
        self
    }

    fn checked(&self) -> Result<ReducerOptions> {
        let megabytes = self.bucket_cap_mb.unwrap_or(25.);
        let bytes = megabytes * 1024. * 1024.;
        if !(bytes >= 1. && bytes < i64::MAX as f64) {
            return Err(Error::invalid(format!(
                "bucket_cap_mb must be positive, but {megabytes} was given"
            )));
        }
        let bytes = bytes as i64;
        Ok(ReducerOptions {
            bucket_bytes: bytes,
            first_bucket_bytes: if self.bucket_cap_mb.is_some() { bytes } else { 1 << 20 },
            find_unused: self.find_unused_parameters.into(),
            bucket_view: self.gradient_as_bucket_view.into(),
            broadcast_buffers: self.broadcast_buffers.into(),
            compression: match self.compression {
                Compression::None => 0,
                Compression::Fp16 => 1,
                Compression::Bf16 => 2,
            },
        })
    }
}

/// A model that several processes train as one: after backward each gradient is the mean over all ranks, so that
/// steps, clipping, scaling and averages of the weights work as they are, with the same bits on all ranks. It is
/// libtorch's own reducer, with torch's order of calls; gradients travel while backward goes on.
///
/// Clones share one model. Where the loss is a mean over the local batch, and local batches are of one size, a step is
/// that of one process with the joined batch. For batches of different size, or a mean over tokens with padding,
/// [`GradientAccumulator::data_parallel`](crate::GradientAccumulator::data_parallel) and
/// [`Supervised::data_parallel`](crate::supervised::Supervised::data_parallel) weigh the ranks. In a group of one everything is
/// as without it.
///
/// ```
/// use tch::nn::{self, Module};
/// use tch::{Device, Kind, Tensor};
/// use tch_ignite::distributed::{DdpOptions, DistributedDataParallel, ProcessGroup, ProcessGroupOptions};
/// use tch_ignite::optim::Optimizer;
///
/// let pg = ProcessGroup::from_env_or_single(ProcessGroupOptions::new())?;
/// let vs = nn::VarStore::new(Device::Cpu);
/// let net = nn::linear(vs.root(), 4, 1, Default::default());
/// let optimizer = Optimizer::sgd(&vs).lr(0.1).build()?;
/// let ddp = DistributedDataParallel::new(&pg, &vs, DdpOptions::new())?; // all ranks have rank 0's weights now
///
/// let x = Tensor::ones([2, 4], (Kind::Float, Device::Cpu));
/// let y_pred = ddp.forward(|| net.forward(&x))?;
/// optimizer.zero_grad()?;
/// ddp.backward(&y_pred.mean(Kind::Float))?; // gradients are averaged in here
/// optimizer.step()?;
/// # Ok::<(), tch_ignite::Error>(())
/// ```
///
/// # What must hold
/// All ranks make the model in the same order, and call [`forward`](Self::forward) and [`backward`](Self::backward) the
/// same number of times. The parameters are those that the store has, and that require a gradient, when this is made.
/// Batch normalisation sees the local batch only.
#[derive(Clone)]
pub struct DistributedDataParallel {
    shared: Arc<Shared>,
}

struct Shared {
    /// `None` in a group of one.
    reducer: Option<Reducer>,
    // After the reducer, which uses it.
    pg: ProcessGroup,
    variables: Arc<Mutex<Variables>>,
    /// How many parameters the store listed when this was made, a tied one for each of its names.
    listed: usize,
    parameters: usize,
    /// How many `NoSync` there are.
    no_sync: AtomicUsize,
}

// For contexts that move to other threads.
const _: () = {
    const fn shared<T: Send + Sync + Clone>() {}
    shared::<DistributedDataParallel>();
};

const FORWARD: &str = "DistributedDataParallel::forward";
const BACKWARD: &str = "DistributedDataParallel::backward";

impl DistributedDataParallel {
    /// Makes the model of this store parallel: all ranks get the parameters and buffers of rank 0. Loads, casts and moves
    /// of the model come before.
    ///
    /// # Errors
    /// Mismatch, which names the first parameter or buffer that differs; no parameter requires a gradient; an option that
    /// cannot be.
    pub fn new(pg: &ProcessGroup, vs: &VarStore, options: DdpOptions) -> Result<Self> {
        const OP: &str = "DistributedDataParallel::new";
        let options = options.checked()?;
        let variables = vs.variables_.clone();
        let (parameters, buffers) = named(&variables);
        let reducer = match pg.turn(OP)? {
            None => None,
            Some(turn) => {
                if turn.has_control() {
                    same_model(&turn, &options, &parameters, &buffers)?;
                }
                let make = |group: &_| Reducer::new(group, &parameters, &buffers, &options);
                Some(turn.call(make)?)
            }
        };
        let shared = Shared {
            reducer,
            pg: pg.clone(),
            listed: listed(&variables),
            variables,
            parameters: parameters.len(),
            no_sync: AtomicUsize::new(0),
        };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// The group.
    pub fn process_group(&self) -> &ProcessGroup {
        &self.shared.pg
    }

    /// Calls `forward`, in training, and makes the backward that follows reduce the gradients. Where buffers follow rank 0
    /// they are sent before. A forward without a backward is fine.
    ///
    /// # Errors
    /// A parameter had no gradient in the backward before (see [`DdpOptions::find_unused_parameters`]); variables were
    /// added to the store; [`Error::Distributed`].
    pub fn forward<R: Outputs>(&self, forward: impl FnOnce() -> R) -> Result<R> {
        let Shared { reducer, variables, listed: then, .. } = &*self.shared;
        let Some(reducer) = reducer else { return Ok(forward()) };
        let now = listed(variables);
        if now != *then {
            return Err(Error::invalid(format!(
                "the store had {then} parameters when DistributedDataParallel was made and has {now} now; make it after the whole model"
            )));
        }
        let sync = self.syncs();
        self.call(FORWARD, || reducer.before_forward(sync))?;
        // No lock is held while user code runs.
        let outputs = forward();
        self.call(FORWARD, || reducer.after_forward(sync, &outputs.tensors()))?;
        Ok(outputs)
    }

    /// Backward from the scalar `loss`, made by a forward in [`forward`](Self::forward), with the gradients averaged over all
    /// ranks at its end. tch's own `backward` does the same, but panics where this returns [`Error::Distributed`].
    pub fn backward(&self, loss: &Tensor) -> Result<()> {
        let Some(reducer) = &self.shared.reducer else { return optim::backward(loss) };
        if !loss.defined() {
            return Err(Error::invalid("the loss is an undefined tensor"));
        }
        self.call(BACKWARD, || reducer.backward(loss))
    }

    /// While the guard lives, forwards and backwards add up gradients without sending them, as accumulation needs them
    /// for all but the last batch of a window. Both forward and backward of a batch must be within.
    ///
    /// ```
    /// # use tch::nn::{self, Module};
    /// # use tch::{Device, Kind, Tensor};
    /// # use tch_ignite::distributed::{DdpOptions, DistributedDataParallel, ProcessGroup};
    /// # let pg = ProcessGroup::single();
    /// # let vs = nn::VarStore::new(Device::Cpu);
    /// # let net = nn::linear(vs.root(), 4, 1, Default::default());
    /// # let ddp = DistributedDataParallel::new(&pg, &vs, DdpOptions::new())?;
    /// # let x = Tensor::ones([2, 4], (Kind::Float, Device::Cpu));
    /// for batch in 0..4 {
    ///     let _local = (batch < 3).then(|| ddp.no_sync());
    ///     let loss = ddp.forward(|| net.forward(&x))?.mean(Kind::Float) / 4.;
    ///     ddp.backward(&loss)?;
    /// }
    /// # Ok::<(), tch_ignite::Error>(())
    /// ```
    #[must_use = "gradients are sent again when the guard is dropped"]
    pub fn no_sync(&self) -> NoSync {
        self.shared.no_sync.fetch_add(1, Ordering::Relaxed);
        NoSync { ddp: self.clone() }
    }

    /// Averages the gradients over all ranks now: for what [`no_sync`](Self::no_sync) left behind at the end of an epoch.
    /// Parameters without a gradient are passed over, so they must be the same on all ranks.
    pub fn reduce_gradients(&self) -> Result<()> {
        let Shared { reducer, variables, pg, .. } = &*self.shared;
        if reducer.is_none() {
            return Ok(());
        }
        let mut gradients = vec![];
        for (_, parameter) in named(variables).0 {
            let gradient = parameter.f_grad().map_err(|e| Error::libtorch("gradients", e))?;
            if gradient.defined() {
                gradients.push(gradient);
            }
        }
        pg.all_reduce(&gradients, ReduceOp::Avg)
    }

    /// Whether there are other ranks.
    pub(crate) fn reduces(&self) -> bool {
        self.shared.reducer.is_some()
    }

    /// Whether there are other ranks, none of them in Python, with which more than gradients can be exchanged.
    pub(crate) fn exchanges(&self) -> bool {
        self.reduces() && self.shared.pg.has_control()
    }

    /// Makes a tensor the sum over all ranks, and returns their number.
    pub(crate) fn sum(&self, tensor: &Tensor) -> Result<u64> {
        // For those who read errors it is a part of backward.
        self.shared.pg.sum_unchecked(BACKWARD, tensor)?;
        Ok(self.shared.pg.world_size() as u64)
    }

    /// Where the parameters are.
    pub(crate) fn device(&self) -> tch::Device {
        let variables = self.shared.variables.lock().unwrap_or_else(PoisonError::into_inner);
        let first = variables.trainable_variables.first();
        first.map_or(tch::Device::Cpu, |variable| variable.tensor.device())
    }

    /// What libtorch's reducer has measured in sampled iterations (the first 10, then every 100th), by torch's names:
    /// times such as `avg_backward_comm_time` and `avg_backward_compute_comm_overlap_time` in nanoseconds, sizes in
    /// bytes. Empty in a group of one.
    pub fn logging_data(&self) -> Result<HashMap<String, i64>> {
        let Some(reducer) = &self.shared.reducer else { return Ok(HashMap::new()) };
        let data = self.call("DistributedDataParallel::logging_data", || reducer.logging_data())?;
        Ok(data.into_iter().collect())
    }

    /// Whether gradients are sent.
    fn syncs(&self) -> bool {
        self.shared.no_sync.load(Ordering::Relaxed) == 0
    }

    fn call<R>(
        &self,
        op: &str,
        call: impl FnOnce() -> Result<R, crate::bridge::DistException>,
    ) -> Result<R> {
        let turn = self.shared.pg.turn(op)?;
        // There is a reducer, so there is a group.
        let turn = turn.ok_or_else(|| Error::invalid("a group of one has no reducer"))?;
        turn.call(|_| call())
    }
}

impl fmt::Debug for DistributedDataParallel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DistributedDataParallel")
            .field("process_group", &self.shared.pg)
            .field("parameters", &self.shared.parameters)
            .finish_non_exhaustive()
    }
}

/// Gradients stay on their rank while this lives: [`DistributedDataParallel::no_sync`].
#[derive(Debug)]
pub struct NoSync {
    ddp: DistributedDataParallel,
}

impl Drop for NoSync {
    fn drop(&mut self) {
        self.ddp.shared.no_sync.fetch_sub(1, Ordering::Relaxed);
    }
}

type Named = Vec<(String, Tensor)>;

fn listed(store: &Mutex<Variables>) -> usize {
    store.lock().unwrap_or_else(PoisonError::into_inner).trainable_variables.len()
}

/// Parameters in the order in which they were made, which is the same on all ranks, and buffers by name. A tensor with
/// several names is there once.
fn named(store: &Mutex<Variables>) -> (Named, Named) {
    let all = variables::variables(store).into_iter();
    let (parameters, buffers): (Vec<_>, Vec<_>) = all.partition(|variable| variable.trainable);
    let named = |variables: Vec<Variable>| {
        variables.into_iter().map(|variable| (variable.name, variable.tensor)).collect()
    };
    (named(parameters), named(buffers))
}

/// Compares models and options of all ranks with rank 0's.
fn same_model(
    turn: &Turn<'_>,
    options: &ReducerOptions,
    parameters: &Named,
    buffers: &Named,
) -> Result<()> {
    let line = |(name, tensor): &(String, Tensor)| {
        let frozen = if tensor.requires_grad() { "" } else { ", without gradient" };
        format!("{name} {:?} {:?}{frozen}", tensor.size(), tensor.kind())
    };
    let tensors = parameters.iter().chain(buffers).map(line);
    let lines: Vec<_> = std::iter::once(format!("{options:?}")).chain(tensors).collect();
    let all = turn.exchange("DistributedDataParallel::new", lines.join("\n").as_bytes())?;
    let texts: Vec<_> = all.iter().map(|bytes| String::from_utf8_lossy(bytes)).collect();
    let Some(rank) = texts.iter().position(|text| *text != texts[0]) else { return Ok(()) };
    let (mut first, mut other) = (texts[0].lines(), texts[rank].lines());
    let found = std::iter::from_fn(|| match (first.next(), other.next()) {
        (None, None) => None,
        pair => Some(pair),
    })
    .find(|(a, b)| a != b);
    let (a, b) = found.unwrap_or_default();
    let shown = |line: Option<&str>| line.unwrap_or("nothing more").to_owned();
    Err(turn.mismatch(format!(
        "the models are not alike: rank 0 has {}, rank {rank} has {}",
        shown(a),
        shown(b)
    )))
}
