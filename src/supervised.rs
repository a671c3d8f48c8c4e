//! A ready context for supervised learning, with its training and evaluation steps.

use tch::Tensor;
use tch::nn::ModuleT;

use crate::data::Batch;
use crate::engine::{Engine, Evaluator, Trainer};
use crate::optim::{Optimizer, backward};

/// What an evaluation step returns.
#[derive(Debug)]
pub struct Prediction {
    /// What the model gave, without gradients.
    pub y_pred: Tensor,
    /// The targets of the batch.
    pub y: Tensor,
}

impl Prediction {
    /// Both, as metrics take them.
    pub fn parts(&self) -> (&Tensor, &Tensor) {
        (&self.y_pred, &self.y)
    }
}

type LossFn = Box<dyn Fn(&Tensor, &Tensor) -> Tensor + Send>;

/// A model, its optimizer and a loss: the context of small programs.
pub struct Supervised<N> {
    /// The model.
    pub net: N,
    /// Its optimizer.
    pub optimizer: Optimizer,
    loss: LossFn,
}

impl<N: ModuleT> Supervised<N> {
    /// `loss(y_pred, y)` gives one value, such as `|y_pred, y| y_pred.cross_entropy_for_logits(y)`.
    pub fn new(
        net: N,
        optimizer: Optimizer,
        loss: impl Fn(&Tensor, &Tensor) -> Tensor + Send + 'static,
    ) -> Self {
        Self { net, optimizer, loss: Box::new(loss) }
    }

    /// Forward in training mode, loss, backward, one step of the optimizer. Returns the loss, detached
    /// and on its device: no host sync.
    pub fn train_step(&mut self, (x, y): Batch) -> anyhow::Result<Tensor> {
        self.optimizer.zero_grad()?;
        let loss = (self.loss)(&self.net.forward_t(&x, true), &y);
        backward(&loss)?;
        self.optimizer.step()?;
        Ok(loss.f_detach()?)
    }

    /// Forward in evaluation mode, without gradients.
    pub fn eval_step(&mut self, (x, y): Batch) -> anyhow::Result<Prediction> {
        let _guard = tch::no_grad_guard();
        Ok(Prediction { y_pred: self.net.forward_t(&x, false), y })
    }
}

/// A trainer with [`Supervised::train_step`]: ignite's `create_supervised_trainer`.
pub fn create_supervised_trainer<'a, N: ModuleT + 'a>() -> Trainer<'a, Supervised<N>> {
    Engine::new(|cx: &mut Supervised<N>, _, batch| cx.train_step(batch))
}

/// An evaluator with [`Supervised::eval_step`]: ignite's `create_supervised_evaluator`.
pub fn create_supervised_evaluator<'a, N: ModuleT + 'a>() -> Evaluator<'a, Supervised<N>> {
    Engine::new(|cx: &mut Supervised<N>, _, batch| cx.eval_step(batch))
}
