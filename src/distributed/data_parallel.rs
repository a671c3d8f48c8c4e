use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use tch::Tensor;
use tch::nn::{VarStore, Variables};

use super::process_group::{Turn, place_names};
use super::{Outputs, ProcessGroup, ReduceOp};
use crate::bridge::{self, Reducer, ReducerOptions, set_gradient};
use crate::error::{Error, Result};
use crate::optim;
use crate::variables;
use crate::variables::Variable;

/// The format in which gradients travel between ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum Compression {
    /// Gradients travel in their own dtype.
    #[default]
    None,
    /// f16, divided by the number of ranks before they are added: half the bytes of f32, and gradients below 6e-8 are
    /// lost.
    Fp16,
    /// bf16, divided by the number of ranks before they are added: half the bytes and the full range of f32, with 8
    /// bits of precision.
    Bf16,
}

/// Options of a [`DistributedDataParallel`]. All ranks use the same. The defaults are torch's.
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
    /// The defaults: buckets of 25 MiB, but 1 MiB for the first one that is sent; buffers follow rank 0; every
    /// parameter must get a gradient in each backward.
    pub fn new() -> Self {
        Self {
            find_unused_parameters: false,
            bucket_cap_mb: None,
            gradient_as_bucket_view: false,
            broadcast_buffers: true,
            compression: Compression::None,
        }
    }

    /// Searches the graph after each forward for parameters that take no part in it; these then need no gradient. A
    /// parameter that is used on some ranks gets a gradient on all; one that is used on no rank gets none. Costs a walk
    /// over the graph and a small collective for each step. Without this option, a parameter without a gradient is an
    /// error at the next forward.
    pub fn find_unused_parameters(mut self, on: bool) -> Self {
        self.find_unused_parameters = on;
        self
    }

    /// Sets how many MiB of gradients travel together in a bucket. A bucket is sent as soon as its last gradient is
    /// computed, while backward goes on. In the first step all gradients travel together, unless
    /// [`find_unused_parameters`](Self::find_unused_parameters) is on.
    pub fn bucket_cap_mb(mut self, megabytes: f64) -> Self {
        self.bucket_cap_mb = Some(megabytes);
        self
    }

    /// Makes gradients views into the buckets, which saves a copy and half of their memory. Then tch's own `zero_grad`
    /// panics; the `zero_grad` of [`Optimizer`](crate::optim::Optimizer) works.
    pub fn gradient_as_bucket_view(mut self, on: bool) -> Self {
        self.gradient_as_bucket_view = on;
        self
    }

    /// Says whether all ranks get rank 0's buffers (running averages of batch normalisation) before a forward: true
    /// unless given.
    pub fn broadcast_buffers(mut self, on: bool) -> Self {
        self.broadcast_buffers = on;
        self
    }

    /// Sets the format in which gradients travel.
    pub fn compression(mut self, compression: Compression) -> Self {
        self.compression = compression;
        self
    }

    /// The options for libtorch's reducer; an error if the size of buckets is not possible.
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
                Compression::None => bridge::Compression::None,
                Compression::Fp16 => bridge::Compression::Fp16,
                Compression::Bf16 => bridge::Compression::Bf16,
            },
        })
    }
}

/// A model that several processes train as one. After backward each gradient is the mean over all ranks, so steps,
/// clipping, scaling and averages of the weights work without a change, with the same bits on all ranks. libtorch's own
/// reducer does this, called in torch's order; gradients travel while backward goes on.
///
/// Clones share one model. If the loss is a mean over the local batch, and all local batches have one size, a step
/// equals that of one process with the joined batch. For batches of different sizes, or a mean over tokens with
/// padding, [`GradientAccumulator::data_parallel`](crate::GradientAccumulator::data_parallel) and
/// [`Supervised::data_parallel`](crate::supervised::Supervised::data_parallel) weigh the ranks. In a group of one it
/// changes nothing.
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
    // Declared after the reducer, which uses the group, so that the group is dropped later.
    pg: ProcessGroup,
    variables: Arc<Mutex<Variables>>,
    /// The number of parameters that the store listed when this was made. A tied parameter counts once for each name.
    listed: usize,
    /// The number of parameters, for `Debug`.
    parameters: usize,
    /// The number of `NoSync` guards that live.
    no_sync: AtomicUsize,
}

// Contexts with a DistributedDataParallel may move to other threads.
const _: () = {
    const fn shared<T: Send + Sync + Clone>() {}
    shared::<DistributedDataParallel>();
};

const FORWARD: &str = "DistributedDataParallel::forward";
const BACKWARD: &str = "DistributedDataParallel::backward";

impl DistributedDataParallel {
    /// Makes the model of this store parallel, and gives all ranks the parameters and buffers of rank 0. Load, cast or
    /// move the model before.
    ///
    /// # Errors
    /// A mismatch, which names the first parameter or buffer that differs; no parameter requires a gradient; an option
    /// that is not possible; [`Error::Distributed`].
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

    /// The group of the processes that train the model.
    pub fn process_group(&self) -> &ProcessGroup {
        &self.shared.pg
    }

    /// Calls `forward` for training, and prepares the reduction of gradients in the backward that follows. If buffers
    /// follow rank 0, they are sent first. A forward without a backward is allowed.
    ///
    /// # Errors
    /// A parameter got no gradient in the backward before (see [`DdpOptions::find_unused_parameters`]); variables were
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

    /// Runs backward from the scalar `loss`, which a forward in [`forward`](Self::forward) has made, and averages the
    /// gradients over all ranks. tch's own `backward` does the same, but panics on errors.
    ///
    /// # Errors
    /// The loss is undefined, no scalar, or has no graph; [`Error::Distributed`].
    pub fn backward(&self, loss: &Tensor) -> Result<()> {
        let Some(reducer) = &self.shared.reducer else { return optim::backward(loss) };
        if !loss.defined() {
            return Err(Error::invalid("the loss is an undefined tensor"));
        }
        self.call(BACKWARD, || reducer.backward(loss))
    }

    /// Does what [`backward`](Self::backward) does, but adds nothing to the gradients of this rank, whatever the loss is.
    pub(crate) fn backward_nothing(&self, loss: &Tensor) -> Result<()> {
        let Some(reducer) = &self.shared.reducer else { return Ok(()) };
        self.call(BACKWARD, || reducer.backward_nothing(loss))
    }

    /// While the guard lives, backward adds up gradients without sending them. Accumulation needs this for all batches
    /// of a window but the last. Both forward and backward of a batch must run while the guard lives.
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

    /// Averages the gradients over all ranks now. Use this for gradients that [`no_sync`](Self::no_sync) kept on their
    /// rank, at the end of an epoch. A parameter that has a gradient on some ranks gets one on all; one that has none on
    /// any rank is skipped. With ranks in Python, which cannot say which they have, parameters without a gradient must
    /// be the same on all ranks.
    ///
    /// # Errors
    /// The errors of [`ProcessGroup::all_reduce`].
    pub fn reduce_gradients(&self) -> Result<()> {
        let Shared { reducer, variables, pg, .. } = &*self.shared;
        if reducer.is_none() {
            return Ok(());
        }
        let failed = |error| Error::libtorch("gradients", error);
        let gradient = |(_, parameter): (String, Tensor)| Ok((parameter.f_grad()?, parameter));
        let found: Result<Vec<_>, _> = named(variables).0.into_iter().map(gradient).collect();
        let found = found.map_err(failed)?;
        let own: Vec<u8> = found.iter().map(|(gradient, _)| gradient.defined().into()).collect();
        let all = match pg.has_control() {
            true => pg.control().exchange("DistributedDataParallel::reduce_gradients", &own)?,
            false => vec![own],
        };
        let mut gradients = vec![];
        for (index, (mut gradient, parameter)) in found.into_iter().enumerate() {
            if !all.iter().any(|rank| rank.get(index) == Some(&1)) {
                continue;
            }
            if !gradient.defined() {
                gradient = parameter.f_detach().and_then(|p| p.f_zeros_like()).map_err(failed)?;
                set_gradient(&parameter, Some(&gradient))
                    .map_err(|text| Error::libtorch("gradients", text))?;
            }
            gradients.push(gradient);
        }
        pg.all_reduce(&gradients, ReduceOp::Avg)
    }

    /// Whether there are other ranks, with which gradients are averaged.
    pub(crate) fn reduces(&self) -> bool {
        self.shared.reducer.is_some()
    }

    /// Whether there are other ranks, and none of them is in Python, so that the ranks can exchange more than
    /// gradients.
    pub(crate) fn exchanges(&self) -> bool {
        self.reduces() && self.shared.pg.has_control()
    }

    /// Sums a tensor over all ranks, in place, and returns the number of ranks.
    pub(crate) fn sum(&self, tensor: &Tensor) -> Result<u64> {
        // Errors call this operation backward, because it is a part of backward to the user.
        self.shared.pg.sum_unchecked(BACKWARD, tensor)?;
        Ok(self.shared.pg.world_size() as u64)
    }

    /// The device of the store's first parameter.
    pub(crate) fn device(&self) -> tch::Device {
        let variables = self.shared.variables.lock().unwrap_or_else(PoisonError::into_inner);
        let first = variables.trainable_variables.first();
        first.map_or(tch::Device::Cpu, |variable| variable.tensor.device())
    }

    /// The measurements of libtorch's reducer in sampled iterations (the first 10, then every 100th), under torch's
    /// names: times such as `avg_backward_comm_time` and `avg_backward_compute_comm_overlap_time` in nanoseconds, sizes
    /// in bytes. Empty in a group of one.
    ///
    /// # Errors
    /// The group has failed before; libtorch cannot read its measurements.
    pub fn logging_data(&self) -> Result<HashMap<String, i64>> {
        let Some(reducer) = &self.shared.reducer else { return Ok(HashMap::new()) };
        let data = self.call("DistributedDataParallel::logging_data", || reducer.logging_data())?;
        Ok(data.into_iter().collect())
    }

    /// Whether backward sends gradients: no `NoSync` guard lives.
    fn syncs(&self) -> bool {
        self.shared.no_sync.load(Ordering::Relaxed) == 0
    }

    fn call<R>(
        &self,
        op: &str,
        call: impl FnOnce() -> Result<R, crate::bridge::DistException>,
    ) -> Result<R> {
        let turn = self.shared.pg.turn(op)?;
        // There is a reducer, so there are other ranks, and `turn` is not `None`.
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

/// A guard: while it lives, gradients stay on their rank. Made by [`DistributedDataParallel::no_sync`].
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

/// The number of parameters that the store lists; a tied parameter counts once for each name.
fn listed(store: &Mutex<Variables>) -> usize {
    store.lock().unwrap_or_else(PoisonError::into_inner).trainable_variables.len()
}

/// The parameters in the order in which they were made, which is the same on all ranks, and the buffers by name. A
/// tensor with several names is listed once.
fn named(store: &Mutex<Variables>) -> (Named, Named) {
    let all = variables::variables(store).into_iter();
    let (parameters, buffers): (Vec<_>, Vec<_>) = all.partition(|variable| variable.trainable);
    let named = |variables: Vec<Variable>| {
        variables.into_iter().map(|variable| (variable.name, variable.tensor)).collect()
    };
    (named(parameters), named(buffers))
}

/// Compares the models and options of all ranks with rank 0's; an error on all ranks if they differ.
fn same_model(
    turn: &Turn<'_>,
    options: &ReducerOptions,
    parameters: &Named,
    buffers: &Named,
) -> Result<()> {
    let all = || parameters.iter().chain(buffers);
    let devices: Vec<_> = all().map(|(_, tensor)| tensor.device()).collect();
    let line = |((name, tensor), device): (&(String, Tensor), String)| {
        let frozen = if tensor.requires_grad() { "" } else { ", without gradient" };
        format!("{name} {:?} {:?}{device}{frozen}", tensor.size(), tensor.kind())
    };
    let tensors = all().zip(place_names(&devices)).map(line);
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
