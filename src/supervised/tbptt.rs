use tch::Tensor;

use super::tensors::Tensors;
use super::{Prediction, Supervised, complete_windows, fire_updated};
use crate::accumulate::WeightedLoss;
use crate::data::Batch;
use crate::engine::{Engine, Trainer};
use crate::error::{Error, Result};
use crate::event::Event;
use crate::optim::Optimizer;

/// Fired before each chunk of a batch in the trainer of [`create_supervised_tbptt_trainer`]: ignite's
/// `Tbptt_Events.TIME_ITERATION_STARTED`.
pub const TIME_ITERATION_STARTED: Event = Event::custom("time_iteration_started");

/// Fired after the step of each chunk; `engine.state.output` is then the chunk's loss: ignite's
/// `Tbptt_Events.TIME_ITERATION_COMPLETED`.
pub const TIME_ITERATION_COMPLETED: Event = Event::custom("time_iteration_completed");

/// The context of [`create_supervised_tbptt_trainer`]; [`Supervised::tbptt`] makes it. `H` is the hidden state. A batch
/// of the context is a chunk with the hidden state of the chunk before, and the output of its steps is
/// `(loss, hidden state)`.
pub type SupervisedTbptt<N, H> =
    Supervised<N, ((Tensor, Option<H>), Tensor), Prediction<(Tensor, H), Tensor>, (Tensor, H)>;

impl<N, H: Tensors> SupervisedTbptt<N, H> {
    /// Makes the context for truncated backpropagation through time. `model_fn(net, x, hidden, train)` returns the
    /// prediction for a chunk and the hidden state after it; `hidden` is the state after the chunk before, without its
    /// graph, and `None` for the first chunk of a batch. `loss(y_pred, y)` is that of [`Supervised::new`].
    pub fn tbptt<L: Into<WeightedLoss>>(
        net: N,
        optimizer: Optimizer,
        model_fn: impl Fn(&N, &Tensor, Option<&H>, bool) -> (Tensor, H) + Send + 'static,
        loss: impl Fn(&Tensor, &Tensor) -> L + Send + 'static,
    ) -> Self {
        let model = move |net: &N, (x, hidden): &(Tensor, Option<H>), train: bool| {
            model_fn(net, x, hidden.as_ref(), train)
        };
        let loss = move |(y_pred, _): &(Tensor, H), y: &Tensor| loss(y_pred, y);
        Supervised::with_model_fn(net, optimizer, model, loss)
            .output_transform(|(_, hidden), _, loss| (loss, hidden))
    }
}

/// A trainer for recurrent models by truncated backpropagation through time: ignite's `create_supervised_tbptt_trainer`.
///
/// Each batch `(x, y)` is cut along `dim` into chunks of `tbptt_step` time steps (the last may be shorter), and each
/// chunk makes a step of the optimizer. The hidden state goes on from chunk to chunk within the batch, without its graph.
/// The output of an iteration is the mean of the losses of its chunks, on their device. Options of the context
/// (clipping, autocast, accumulation, …) count chunks as batches.
///
/// With [`data_parallel`](Supervised::data_parallel) the ranks exchange gradients in each chunk, so the batches of an
/// iteration need the same number of chunks on all ranks: pad or cut sequences to one length there. Otherwise gradients
/// of different chunks are mixed, or ranks wait for each other until the exchange times out.
///
/// ```
/// use tch::nn::{self, RNN};
/// use tch::{Device, Kind, Reduction, Tensor};
/// use tch_ignite::engine::Until;
/// use tch_ignite::optim::Optimizer;
/// use tch_ignite::supervised::{Supervised, TIME_ITERATION_COMPLETED, create_supervised_tbptt_trainer};
///
/// let vs = nn::VarStore::new(Device::Cpu);
/// let net = nn::gru(vs.root(), 3, 4, Default::default());
/// let optimizer = Optimizer::sgd(&vs).lr(0.1).build()?;
/// let mut cx = Supervised::tbptt(
///     net,
///     optimizer,
///     |gru, x, hidden: Option<&Tensor>, _train| {
///         let hidden = hidden.map(Tensor::shallow_clone);
///         let first = || Tensor::zeros([1, x.size()[0], 4], (Kind::Float, x.device()));
///         let hidden = hidden.unwrap_or_else(first);
///         let (y_pred, nn::GRUState(hidden)) = gru.seq_init(x, &nn::GRUState(hidden));
///         (y_pred, hidden)
///     },
///     |y_pred, y| y_pred.mse_loss(y, Reduction::Mean),
/// );
/// let mut chunks = 0;
/// let mut trainer = create_supervised_tbptt_trainer(5, 1)?;
/// trainer.on(TIME_ITERATION_COMPLETED, |_, _| { chunks += 1; Ok(()) });
/// let zeros = |size| Tensor::zeros([2, 12, size], (Kind::Float, Device::Cpu));
/// let batch = move || (zeros(3), zeros(4));
/// let data = tch_ignite::data::restartable(move || (0..2).map(move |_| batch()));
/// trainer.run(&mut cx, data, Until::epochs(1))?;
/// drop(trainer);
/// assert_eq!(chunks, 6);
/// # Ok::<(), tch_ignite::Error>(())
/// ```
///
/// # Errors
/// `tbptt_step` is below 1. A run fails at a batch whose input and targets differ in their number of time steps, or have
/// none; no step is made for it.
pub fn create_supervised_tbptt_trainer<'a, N: 'a, H: Tensors + 'a>(
    tbptt_step: i64,
    dim: i64,
) -> Result<Trainer<'a, SupervisedTbptt<N, H>, Batch, Tensor>> {
    if tbptt_step < 1 {
        return Err(Error::invalid(format!(
            "create_supervised_tbptt_trainer: tbptt_step is the number of time steps of a chunk, at least 1, but {tbptt_step} was given"
        )));
    }
    let mut trainer = Engine::new(
        move |cx: &mut SupervisedTbptt<N, H>, engine: &mut Engine<'a, _, _, Tensor>, (x, y)| {
            let chunks = chunks(&x, &y, tbptt_step, dim)?;
            let (mut hidden, mut losses) = (None, vec![]);
            for (x, y) in chunks {
                engine.fire_event(TIME_ITERATION_STARTED, cx)?;
                let window = cx.settings.accumulator.next_window();
                let (loss, state) = cx.train_step_in(((x, hidden), y), window)?;
                if window.last {
                    fire_updated(cx, engine)?;
                }
                hidden = Some(state);
                losses.push(loss.shallow_clone());
                engine.state.output = Some(loss);
                engine.fire_event(TIME_ITERATION_COMPLETED, cx)?;
            }
            Ok(Tensor::f_stack(&losses, 0)?.f_mean(None)?)
        },
    );
    complete_windows(&mut trainer);
    // As in `complete_windows`, this cannot fail.
    let _ = trainer.register_events([TIME_ITERATION_STARTED, TIME_ITERATION_COMPLETED]);
    Ok(trainer)
}

/// Cuts both tensors into chunks along `dim`.
fn chunks(x: &Tensor, y: &Tensor, step: i64, dim: i64) -> anyhow::Result<Vec<Batch>> {
    let (xs, ys) = (x.f_split(step, dim)?, y.f_split(step, dim)?);
    // `split` has refused dimensions that the tensors lack; a negative one counts from the end.
    let steps = |tensor: &Tensor| {
        let shape = tensor.size();
        let at = if dim < 0 { dim + shape.len() as i64 } else { dim };
        usize::try_from(at).ok().and_then(|at| shape.get(at).copied()).unwrap_or(0)
    };
    anyhow::ensure!(
        steps(x) > 0 && steps(x) == steps(y),
        "inputs and targets need the same number of time steps along dimension {dim}, at least 1, but their shapes are {:?} and {:?}",
        x.size(),
        y.size()
    );
    Ok(xs.into_iter().zip(ys).collect())
}
