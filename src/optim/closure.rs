//! Steps that evaluate the loss by themselves.

use tch::{TchError, Tensor};

use super::{Optimizer, lbfgs};
use crate::error::{Error, Result};

impl Optimizer {
    /// Makes a step that evaluates the loss as often as the algorithm needs: [`Lbfgs`](super::Lbfgs) several times, all
    /// others once. `closure` sets the gradients to none, computes the loss, runs backward and returns the loss, as in
    /// PyTorch. Returns the first loss.
    ///
    /// ```
    /// use tch::{Device, Kind, Tensor, nn};
    /// use tch_ignite::optim::Optimizer;
    ///
    /// let mut vs = nn::VarStore::new(Device::Cpu);
    /// vs.set_kind(Kind::Double);
    /// let x = vs.root().zeros("x", &[2]);
    /// let optimizer = Optimizer::lbfgs(&vs).strong_wolfe(true).build()?;
    /// let goal = Tensor::from_slice(&[1.0, -2.0]);
    /// optimizer.step_with(|| {
    ///     optimizer.zero_grad()?;
    ///     let loss = (&x - &goal).square().sum(Kind::Double);
    ///     loss.backward();
    ///     Ok(loss)
    /// })?;
    /// assert!((&x - goal).abs().max().double_value(&[]) < 1e-9);
    /// # Ok::<(), anyhow::Error>(())
    /// ```
    ///
    /// LBFGS reads the loss and other numbers from the device: several host syncs for each evaluation.
    ///
    /// # Errors
    /// Errors of the closure, and those of [`step`](Self::step). Parameters and state are then as they were before, also
    /// after a panic of the closure. LBFGS refuses complex parameters, and parameters of different types or devices.
    pub fn step_with(
        &self,
        mut closure: impl FnMut() -> anyhow::Result<Tensor>,
    ) -> anyhow::Result<Tensor> {
        if self.needs_closure() {
            return lbfgs::step(self, &mut closure);
        }
        let loss = tch::with_grad(closure)?;
        self.step()?;
        Ok(loss)
    }

    /// Whether steps evaluate the loss by themselves.
    pub(crate) fn needs_closure(&self) -> bool {
        self.shared.algorithm.needs_closure()
    }
}

/// The values of parameters, which come back when this is dropped, unless they were put back or given up before.
pub(super) struct Before {
    parameters: Vec<Tensor>,
    values: Vec<Tensor>,
}

impl Before {
    pub(super) fn of(parameters: &[Tensor]) -> Result<Self, TchError> {
        let values = parameters.iter().map(super::snapshot::copy).collect::<Result<_, _>>()?;
        let parameters = parameters.iter().map(Tensor::shallow_clone).collect();
        Ok(Self { parameters, values })
    }

    /// Gives the parameters their values back.
    pub(super) fn put_back(&mut self) -> Result<()> {
        let _guard = tch::no_grad_guard();
        for (parameter, value) in self.parameters.iter_mut().zip(self.values.drain(..)) {
            parameter
                .f_copy_(&value)
                .map_err(|error| Error::libtorch("giving parameters their values back", error))?;
        }
        Ok(())
    }

    /// Leaves the parameters as they are now.
    pub(super) fn give_up(mut self) {
        self.values.clear();
    }
}

impl Drop for Before {
    fn drop(&mut self) {
        // `drop` cannot return an error, and comes here only after another one.
        let _ = self.put_back();
    }
}
