//! Schedule-Free optimizers: the values that parameters have while they are trained, and those for evaluation.

use tch::{Kind, TchError, Tensor};

use super::Optimizer;
use super::hyper::Hyper;
use super::snapshot::copy;
use crate::bridge::{Algorithm, Native, RawState, low_precision_value};
use crate::error::{Error, Result};

/// The name of the state tensor that keeps the values for training during an evaluation.
pub(crate) const KEPT: &str = "y";

/// A parameter that changes between its two values.
struct Switched {
    parameter: Tensor,
    state: RawState,
    /// The weight of the point `z` in the interpolation that leads to the other values.
    weight: f64,
}

impl Switched {
    /// Goes from the values for training to those for evaluation by the interpolation.
    fn interpolate(&mut self) -> Result<(), TchError> {
        let Some(z) = &self.state.tensors[0] else { return Ok(()) };
        if self.state.kept.is_none() {
            return self.parameter.f_lerp_(z, self.weight).map(drop);
        }
        let values = self.wide(&self.parameter)?.f_lerp(z, self.weight)?;
        self.parameter.f_copy_(&values).map(drop)
    }

    /// The values for training that belong to those that the parameter was given in evaluation; `None` where they are the
    /// same.
    fn interpolated(&self) -> Result<Option<Tensor>, TchError> {
        let Some(z) = &self.state.tensors[0] else { return Ok(None) };
        self.parameter.f_to_kind(z.kind())?.f_lerp(z, self.weight).map(Some)
    }

    /// The values for training that a storage of low precision keeps where the parameter is `y`; `y` itself without one.
    fn wide(&self, y: &Tensor) -> Result<Tensor, TchError> {
        match &self.state.kept {
            Some(kept) => low_precision_value(&y.f_to_kind(self.parameter.kind())?, kept)
                .map_err(TchError::Torch),
            None => Ok(y.shallow_clone()),
        }
    }
}

impl Optimizer {
    /// Gives the parameters the values that are meant for evaluation. Only
    /// [Schedule-Free](super::AdamWScheduleFree) optimizers have others than those for training: with all others, and
    /// where the parameters have these values already, this does nothing.
    ///
    /// The supervised trainer and evaluator call this and [`train`](Self::train) by themselves.
    /// [`Evaluate`](crate::handlers::Evaluate), [`EMAHandler`](crate::handlers::EMAHandler),
    /// [`SWAHandler`](crate::handlers::SWAHandler) and
    /// [`Checkpoint::weights`](crate::checkpoint::Checkpoint::weights) do so too where the engine tracks the optimizer.
    /// Checkpoints of a run hold the parameters as they are, and which values these are. Call this before the model is
    /// used, saved or its averages are swapped in by hand.
    ///
    /// ```
    /// # use tch::{Device, Kind, nn};
    /// # use tch_ignite::optim::Optimizer;
    /// # let vs = nn::VarStore::new(Device::Cpu);
    /// # let w = vs.root().ones("w", &[1]);
    /// let optimizer = Optimizer::sgd_schedule_free(&vs).lr(1.0).build()?;
    /// for _ in 0..2 {
    ///     optimizer.backward_step(&w.sum(Kind::Float))?;
    /// }
    /// let trained = w.double_value(&[0]);
    /// optimizer.eval()?;
    /// assert_eq!(w.double_value(&[0]), -0.5); // the mean of 0 and -1
    /// optimizer.train()?;
    /// assert_eq!(w.double_value(&[0]), trained);
    /// # Ok::<(), tch_ignite::Error>(())
    /// ```
    ///
    /// A copy of the parameters is kept until [`train`](Self::train), so that training goes on bit for bit.
    ///
    /// Files of weights hold the values for evaluation, so call this before one is loaded
    /// ([`load_weights`](crate::checkpoint::load_weights)) into parameters that this optimizer has stepped. Checkpoints of a
    /// run hold the parameters as they were, mostly the values for training: to evaluate the model of one, load the part of
    /// the optimizer as well as that of the model ([`load_part`](crate::checkpoint::load_part)), and call this then.
    ///
    /// # Errors
    /// There is no memory for the copy; nothing is changed then. See also [`Optimizer`].
    pub fn eval(&self) -> Result<()> {
        self.to_evaluation().map(drop)
    }

    /// Gives the parameters the values for training back: those that they had before [`eval`](Self::eval), or, where
    /// other values were given to a parameter since, those that belong to these.
    ///
    /// To see whether values were given, this compares each parameter, which is a host sync on CUDA. It does nothing
    /// where the parameters have their values for training.
    ///
    /// # Errors
    /// There is no memory, or a parameter was given another shape; nothing is changed then. See also [`Optimizer`].
    pub fn train(&self) -> Result<()> {
        self.to_training(true)
    }

    /// Whether the parameters have their values for training: false between [`eval`](Self::eval) and
    /// [`train`](Self::train) of a Schedule-Free optimizer.
    ///
    /// # Errors
    /// See [`Optimizer`].
    pub fn is_training(&self) -> Result<bool> {
        self.native(|native| Ok(self.groups_that_train(native, false)?.is_empty()))
    }

    /// Refuses a step with the values for evaluation.
    #[inline]
    pub(super) fn check_training(&self, native: &Native) -> Result<()> {
        if !self.shared.averages || self.groups_that_train(native, false)?.is_empty() {
            return Ok(());
        }
        Err(Error::invalid(format!(
            "the parameters of {} have their values for evaluation, so their gradients are of no use to a step: call optimizer.train() before forward",
            self.name()
        )))
    }

    /// Goes to the values for evaluation, and returns whether the parameters had those for training.
    pub(super) fn to_evaluation(&self) -> Result<bool> {
        if !self.shared.averages {
            return Ok(false);
        }
        self.admit_new()?;
        let _guard = tch::no_grad_guard();
        self.native(|native| {
            let groups = self.groups_that_train(native, true)?;
            let mut switched = vec![];
            for &group in &groups {
                let beta = self.interpolation(native, group)?;
                switched.extend(self.switched(native, group, 1. - 1. / beta)?);
            }
            // All copies are made before anything is changed.
            for Switched { parameter, state, .. } in &mut switched {
                let kept = copy(parameter).and_then(|copy| match state.kept {
                    Some(_) => copy.f_to_kind(Kind::Float),
                    None => Ok(copy),
                });
                let kept = kept.map_err(failed_tch)?;
                if let Some(place) = kept_by(self.algorithm_of(native, parameter)?) {
                    state.tensors[place] = Some(kept);
                }
            }
            for mut switched in switched {
                native.set_state(&switched.parameter, Some(&switched.state)).map_err(failed)?;
                switched.interpolate().map_err(failed_tch)?;
            }
            for &group in &groups {
                native.set(group, Hyper::TrainMode, 0.).map_err(failed)?;
            }
            Ok(!groups.is_empty())
        })
    }

    /// Goes to the values for training. With `look`, values that were given to parameters in evaluation count.
    pub(super) fn to_training(&self, look: bool) -> Result<()> {
        if !self.shared.averages {
            return Ok(());
        }
        let _guard = tch::no_grad_guard();
        self.native(|native| {
            let groups = self.groups_that_train(native, false)?;
            // All values are computed before anything is changed.
            let mut decided = vec![];
            for &group in &groups {
                let beta = self.interpolation(native, group)?;
                let kept = kept_by(self.algorithm(group));
                for mut switched in self.switched(native, group, 1. - beta)? {
                    let y = kept.and_then(|place| switched.state.tensors[place].take());
                    let y = match y {
                        Some(y)
                            if !look
                                || is_evaluated(&switched, &y, beta).map_err(failed_tch)? =>
                        {
                            Some(y)
                        }
                        _ => switched.interpolated().map_err(failed_tch)?,
                    };
                    decided.push((switched, y));
                }
            }
            for (Switched { mut parameter, state, .. }, y) in decided {
                if let Some(y) = y {
                    parameter.f_copy_(&y).map_err(failed_tch)?;
                }
                native.set_state(&parameter, Some(&state)).map_err(failed)?;
            }
            for &group in &groups {
                native.set(group, Hyper::TrainMode, 1.).map_err(failed)?;
            }
            Ok(())
        })
    }

    /// The Schedule-Free groups whose parameters have their values for training, or those that have them not.
    fn groups_that_train(&self, native: &Native, train: bool) -> Result<Vec<usize>> {
        let mut groups = vec![];
        for group in 0..native.group_count() {
            if self.algorithm(group).interpolation().is_some()
                && (native.get(group, Hyper::TrainMode).map_err(failed)? != 0.) == train
            {
                groups.push(group);
            }
        }
        Ok(groups)
    }

    /// The value by which the group's parameters lie between their two other points.
    fn interpolation(&self, native: &Native, group: usize) -> Result<f64> {
        let hyper = self.algorithm(group).interpolation();
        hyper.map_or(Ok(1.), |hyper| native.get(group, hyper).map_err(failed))
    }

    /// The parameters of a group that were stepped.
    fn switched(&self, native: &Native, group: usize, weight: f64) -> Result<Vec<Switched>> {
        let mut switched = vec![];
        for parameter in native.parameters(group).map_err(failed)? {
            if let Some(state) = native.state(&parameter).map_err(failed)? {
                check_alike(&parameter, &state)?;
                switched.push(Switched { parameter, state, weight });
            }
        }
        Ok(switched)
    }
}

/// Whether the parameter has the values for evaluation that belong to `y`.
fn is_evaluated(switched: &Switched, y: &Tensor, beta: f64) -> Result<bool, TchError> {
    match &switched.state.tensors[0] {
        Some(z) => {
            let evaluated = switched.wide(y)?.f_lerp(z, 1. - 1. / beta)?;
            switched.parameter.f_equal(&evaluated.f_to_kind(switched.parameter.kind())?)
        }
        None => Ok(true),
    }
}

/// Refuses a parameter that was given values of another shape, type or device than its state has. This is checked
/// before, because tch panics where libtorch refuses an operation with a number.
fn check_alike(parameter: &Tensor, state: &RawState) -> Result<()> {
    let Some(z) = &state.tensors[0] else { return Ok(()) };
    let of = |tensor: &Tensor| (tensor.size(), tensor.kind(), tensor.device());
    let kind = if state.kept.is_some() { Kind::Float } else { parameter.kind() };
    match ((parameter.size(), kind, parameter.device()), of(z)) {
        (parameter, z) if parameter == z => Ok(()),
        (parameter, z) => Err(failed(format!(
            "a parameter has {parameter:?} now, but its state was made for {z:?}: give it values like those before"
        ))),
    }
}

/// The place of the values for training among the state tensors.
fn kept_by(algorithm: Algorithm) -> Option<usize> {
    algorithm.state_names().iter().position(|name| *name == KEPT)
}

fn failed(text: String) -> Error {
    Error::libtorch("switching between the values for training and evaluation", text)
}

fn failed_tch(error: TchError) -> Error {
    failed(error.to_string())
}
