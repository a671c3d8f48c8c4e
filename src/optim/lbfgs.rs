//! The steps of L-BFGS, as in torch.optim.LBFGS.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};
use tch::{TchError, Tensor};

use super::Optimizer;
use super::closure::Before;
use super::hyper::Hyper;
use super::locked;
use super::snapshot::copy;
use super::wolfe::{Point, Search};
use crate::error::{Error, Result};
use crate::state::StateDict;

type Closure<'c> = &'c mut dyn FnMut() -> anyhow::Result<Tensor>;

/// Two points that follow each other are remembered if their curvature is larger than this.
const LEAST_CURVATURE: f64 = 1e-10;

/// The state between steps. Its vectors hold all parameters, one behind the other.
#[derive(Debug, Default)]
pub(super) struct Memory {
    /// The numbers of evaluations and of iterations so far.
    func_evals: u64,
    n_iter: u64,
    /// The direction of the last iteration, and how far it went.
    d: Option<Tensor>,
    t: f64,
    /// The gradient and the loss before the last iteration.
    prev_flat_grad: Option<Tensor>,
    prev_loss: f64,
    /// The inverse Hessian begins with this number times the identity.
    h_diag: f64,
    history: VecDeque<Correction>,
}

/// How gradient and parameters changed in an iteration, and 1 over the product of both.
#[derive(Debug)]
struct Correction {
    y: Tensor,
    s: Tensor,
    ro: f64,
}

impl Clone for Memory {
    /// The clone shares the tensors, which are never changed.
    fn clone(&self) -> Self {
        let shared = |tensor: &Option<Tensor>| tensor.as_ref().map(Tensor::shallow_clone);
        let correction = |Correction { y, s, ro }: &Correction| Correction {
            y: y.shallow_clone(),
            s: s.shallow_clone(),
            ro: *ro,
        };
        Self {
            d: shared(&self.d),
            prev_flat_grad: shared(&self.prev_flat_grad),
            history: self.history.iter().map(correction).collect(),
            ..*self
        }
    }
}

struct Options {
    lr: f64,
    max_iter: u64,
    max_eval: u64,
    tolerance_grad: f64,
    tolerance_change: f64,
    history_size: usize,
    strong_wolfe: bool,
}

impl Options {
    fn of(optimizer: &Optimizer) -> Result<Self> {
        let get = |hyper| optimizer.get_hyper(0, hyper);
        let max_iter = get(Hyper::MaxIter)? as u64;
        let max_eval = match get(Hyper::MaxEval)? as u64 {
            0 => max_iter * 5 / 4,
            given => given,
        };
        Ok(Self {
            lr: get(Hyper::Lr)?,
            max_iter,
            max_eval,
            tolerance_grad: get(Hyper::ToleranceGrad)?,
            tolerance_change: get(Hyper::ToleranceChange)?,
            history_size: get(Hyper::HistorySize)? as usize,
            strong_wolfe: get(Hyper::StrongWolfe)? != 0.,
        })
    }
}

/// The loss as a function of one vector.
struct Objective<'c> {
    parameters: Vec<Tensor>,
    closure: Closure<'c>,
    maximize: bool,
}

impl Objective<'_> {
    /// Calls the closure. Returns what it returned, the number to be minimized and its gradient.
    fn evaluate(&mut self) -> anyhow::Result<(Tensor, Point)> {
        let loss = tch::with_grad(&mut self.closure)?;
        let value = tensor(loss.f_detach().and_then(|loss| number(&loss)))?;
        let gradient = tensor(self.gradient())?;
        let loss_and_gradient = match self.maximize {
            true => Point { loss: -value, gradient: tensor(gradient.f_neg())? },
            false => Point { loss: value, gradient },
        };
        Ok((loss, loss_and_gradient))
    }

    fn gradient(&self) -> Result<Tensor, TchError> {
        let part = |parameter: &Tensor| {
            let gradient = parameter.f_grad()?;
            if !gradient.defined() {
                return parameter.f_detach()?.f_zeros_like()?.f_reshape([-1]);
            }
            let dense = match gradient.is_sparse() {
                true => gradient.f_to_dense(None::<tch::Kind>, false)?,
                false => gradient,
            };
            dense.f_detach()?.f_reshape([-1])
        };
        let parts = self.parameters.iter().map(part).collect::<Result<Vec<_>, _>>()?;
        Tensor::f_cat(&parts, 0)
    }

    /// Goes `t` times the direction `d`.
    fn go(&mut self, t: f64, d: &Tensor) -> Result<()> {
        let mut from = 0;
        for parameter in &mut self.parameters {
            let size = parameter.size();
            let count = size.iter().product::<i64>();
            let part = d.f_narrow(0, from, count).and_then(|part| part.f_reshape(&size[..]));
            tensor(part.and_then(|part| add_scaled(parameter, t, &part)))?;
            from += count;
        }
        Ok(())
    }

    /// Makes a direction leave frozen parameters where they are.
    fn spare_frozen(&self, d: &Tensor) -> Result<(), TchError> {
        let mut from = 0;
        for parameter in &self.parameters {
            let count = parameter.numel() as i64;
            if !parameter.requires_grad() {
                let _ = d.f_narrow(0, from, count)?.f_zero_()?;
            }
            from += count;
        }
        Ok(())
    }

    /// The point that is `t` times `d` away from here; the parameters stay where they are.
    fn beside(&mut self, t: f64, d: &Tensor) -> anyhow::Result<Point> {
        let mut here = tensor(Before::of(&self.parameters))?;
        self.go(t, d)?;
        let (_, point) = self.evaluate()?;
        here.put_back()?;
        Ok(point)
    }
}

fn tensor<T>(result: Result<T, TchError>) -> Result<T> {
    result.map_err(|error| Error::libtorch("a step of LBFGS", error))
}

/// Reads a tensor of one element: a host sync.
fn number(tensor: &Tensor) -> Result<f64, TchError> {
    f64::try_from(tensor.f_reshape([0i64; 0])?)
}

fn dot(a: &Tensor, b: &Tensor) -> Result<f64, TchError> {
    number(&a.f_dot(b)?)
}

/// Adds a vector times a number, in one pass: torch's `add_(vector, alpha=factor)`, which tch does not have.
fn add_scaled(to: &mut Tensor, factor: f64, vector: &Tensor) -> Result<(), TchError> {
    let factor = Tensor::f_full([0i64; 0], factor, (to.kind(), to.device()))?;
    to.f_addcmul_(vector, &factor).map(drop)
}

/// The largest absolute value.
fn largest(vector: &Tensor) -> Result<f64, TchError> {
    number(&vector.f_abs()?.f_max()?)
}

/// Makes a step. On error parameters and state are as before.
pub(super) fn step(optimizer: &Optimizer, closure: Closure<'_>) -> anyhow::Result<Tensor> {
    let _guard = tch::no_grad_guard();
    let options = Options::of(optimizer)?;
    let parameters = optimizer.all_parameters()?;
    check(&parameters)?;
    let before = tensor(Before::of(&parameters))?;
    let maximize = optimizer.get_hyper(0, Hyper::Maximize)? != 0.;
    let mut objective = Objective { parameters, closure, maximize };
    // No lock is held while the closure runs.
    let mut memory = locked(&optimizer.shared.lbfgs).clone();
    let loss = memory.step(&mut objective, &options)?;
    *locked(&optimizer.shared.lbfgs) = memory;
    before.give_up();
    Ok(loss)
}

/// Refuses parameters that are not one vector.
fn check(parameters: &[Tensor]) -> Result<()> {
    let Some(first) = parameters.first() else {
        return Err(Error::invalid("LBFGS has no parameter: make the model before its first step"));
    };
    if first.is_complex() {
        return Err(Error::invalid("LBFGS does not support complex parameters"));
    }
    let of = |tensor: &Tensor| (tensor.kind(), tensor.device());
    match parameters.iter().find(|other| of(other) != of(first)) {
        Some(other) => Err(Error::invalid(format!(
            "LBFGS needs parameters of one type on one device, but there are {:?} and {:?}",
            of(first),
            of(other)
        ))),
        None => Ok(()),
    }
}

impl Memory {
    fn step(&mut self, objective: &mut Objective<'_>, o: &Options) -> anyhow::Result<Tensor> {
        let (first_loss, Point { mut loss, mut gradient }) = objective.evaluate()?;
        let mut evaluations = 1;
        if self.d.as_ref().is_some_and(|d| d.size() != gradient.size()) {
            // Parameters were added, so what is remembered is of another function.
            *self = Self { func_evals: self.func_evals, ..Self::default() };
        }
        self.func_evals += 1;
        if tensor(largest(&gradient))? <= o.tolerance_grad {
            return Ok(first_loss);
        }
        for iteration in 1..=o.max_iter {
            self.n_iter += 1;
            let direction = tensor(self.direction(&gradient, o))?;
            tensor(objective.spare_frozen(&direction))?;
            let before = loss;
            (self.prev_flat_grad, self.prev_loss) = (Some(gradient.shallow_clone()), loss);
            self.t = match self.n_iter {
                1 => (1. / tensor(sum_of_magnitudes(&gradient))?).min(1.) * o.lr,
                _ => o.lr,
            };
            let slope = tensor(dot(&gradient, &direction))?;
            self.d = Some(direction.shallow_clone());
            if slope > -o.tolerance_change {
                break;
            }
            let mut done = 0;
            if o.strong_wolfe {
                let search = Search {
                    d: &direction,
                    start: Point { loss, gradient: gradient.shallow_clone() },
                    slope,
                    most: o.max_eval.saturating_sub(evaluations),
                };
                let found = search.run(self.t, |t| objective.beside(t, &direction))?;
                Point { loss, gradient } = found.point;
                (self.t, done) = (found.t, found.evaluations);
                objective.go(self.t, &direction)?;
            } else {
                objective.go(self.t, &direction)?;
                // After the last iteration nobody needs the loss, and with noise it would be of no use.
                if iteration != o.max_iter {
                    Point { loss, gradient } = objective.evaluate()?.1;
                    done = 1;
                }
            }
            evaluations += done;
            self.func_evals += done;
            let moved = |d: &Tensor| largest(&d.f_mul_scalar(self.t)?);
            if iteration == o.max_iter
                || evaluations >= o.max_eval
                || tensor(largest(&gradient))? <= o.tolerance_grad
                || tensor(moved(&direction))? <= o.tolerance_change
                || (loss - before).abs() < o.tolerance_change
            {
                break;
            }
        }
        Ok(first_loss)
    }

    /// Remembers the last iteration, and returns the direction of the next one.
    fn direction(&mut self, gradient: &Tensor, o: &Options) -> Result<Tensor, TchError> {
        let (Some(d), Some(before), true) = (&self.d, &self.prev_flat_grad, self.n_iter > 1) else {
            self.history.clear();
            self.h_diag = 1.;
            return gradient.f_neg();
        };
        let y = gradient.f_sub(before)?;
        let s = d.f_mul_scalar(self.t)?;
        let ys = dot(&y, &s)?;
        if ys > LEAST_CURVATURE {
            while self.history.len() >= o.history_size {
                self.history.pop_front();
            }
            self.h_diag = ys / dot(&y, &y)?;
            self.history.push_back(Correction { y, s, ro: 1. / ys });
        }
        let mut q = gradient.f_neg()?;
        let mut al = Vec::with_capacity(self.history.len());
        for Correction { y, s, ro } in self.history.iter().rev() {
            let a = dot(s, &q)? * ro;
            add_scaled(&mut q, -a, y)?;
            al.push(a);
        }
        let mut r = q.f_mul_scalar_(self.h_diag)?;
        for (Correction { y, s, ro }, a) in self.history.iter().zip(al.iter().rev()) {
            let b = dot(y, &r)? * ro;
            add_scaled(&mut r, a - b, s)?;
        }
        Ok(r)
    }
}

fn sum_of_magnitudes(vector: &Tensor) -> Result<f64, TchError> {
    number(&vector.f_abs()?.f_sum(vector.kind())?)
}

/// The values of the state that are no tensors.
#[derive(Serialize, Deserialize)]
struct Saved {
    /// The parameters in the order in which they are in the vectors.
    parameters: Vec<String>,
    func_evals: u64,
    n_iter: u64,
    t: f64,
    prev_loss: f64,
    #[serde(rename = "H_diag")]
    h_diag: f64,
    ro: Vec<f64>,
}

/// Names of the tensors in the state.
const D: &str = "d";
const PREVIOUS: &str = "prev_flat_grad";
const DIRECTIONS: &str = "old_dirs";
const STEPS: &str = "old_stps";

impl Memory {
    /// The state under torch's names. Of the lists each is one tensor, whose rows are the list's vectors.
    pub(super) fn state_dict(&self, parameters: &[String]) -> Result<StateDict> {
        let mut state = StateDict::new();
        state.set_value(
            "values",
            Saved {
                parameters: parameters.to_vec(),
                func_evals: self.func_evals,
                n_iter: self.n_iter,
                t: self.t,
                prev_loss: self.prev_loss,
                h_diag: self.h_diag,
                ro: self.history.iter().map(|correction| correction.ro).collect(),
            },
        )?;
        for (name, vector) in [(D, &self.d), (PREVIOUS, &self.prev_flat_grad)] {
            if let Some(vector) = vector {
                state.set_tensor(name, vector.shallow_clone());
            }
        }
        if !self.history.is_empty() {
            let rows = |of: fn(&Correction) -> &Tensor| {
                let rows: Vec<_> = self.history.iter().map(of).collect();
                tensor(Tensor::f_stack(&rows, 0))
            };
            state.set_tensor(DIRECTIONS, rows(|correction| &correction.y)?);
            state.set_tensor(STEPS, rows(|correction| &correction.s)?);
        }
        Ok(state)
    }

    /// Reads a saved state, for these parameters.
    pub(super) fn of_state(
        mut state: StateDict,
        names: &[String],
        parameters: &[Tensor],
    ) -> Result<Self> {
        let saved: Saved = state.value("values")?;
        if saved.parameters != names {
            return Err(Error::State(format!(
                "LBFGS remembers the parameters {}, in this order, and here they are {}",
                saved.parameters.join(", "),
                names.join(", ")
            )));
        }
        let length: i64 = parameters.iter().map(|parameter| parameter.numel() as i64).sum();
        let mut taken = |name: &str, shape: &[i64]| -> Result<Option<Tensor>> {
            let Ok(vector) = state.take_tensor(name) else { return Ok(None) };
            let (Some(first), true) = (parameters.first(), vector.size() == shape) else {
                return Err(Error::State(format!(
                    "'{name}' of LBFGS is of shape {:?}, and here of shape {shape:?}",
                    vector.size()
                )));
            };
            if vector.kind() != first.kind() {
                return Err(Error::State(format!(
                    "'{name}' of LBFGS is {:?}, and the parameters are {:?}",
                    vector.kind(),
                    first.kind()
                )));
            }
            tensor(vector.f_to_device(first.device())).map(Some)
        };
        let count = saved.ro.len() as i64;
        let (d, prev_flat_grad) = (taken(D, &[length])?, taken(PREVIOUS, &[length])?);
        let (y, s) = (taken(DIRECTIONS, &[count, length])?, taken(STEPS, &[count, length])?);
        let mut history = VecDeque::new();
        for (row, ro) in saved.ro.iter().enumerate() {
            let (Some(y), Some(s)) = (&y, &s) else {
                return Err(Error::State("the state of LBFGS is not complete".into()));
            };
            // A row of its own is aligned as at the time of saving, and does not keep the others in memory.
            let of = |all: &Tensor| tensor(all.f_select(0, row as i64).and_then(|row| copy(&row)));
            history.push_back(Correction { y: of(y)?, s: of(s)?, ro: *ro });
        }
        if saved.n_iter > 0 && (d.is_none() || prev_flat_grad.is_none()) {
            return Err(Error::State("the state of LBFGS is not complete".into()));
        }
        Ok(Self {
            func_evals: saved.func_evals,
            n_iter: saved.n_iter,
            d,
            t: saved.t,
            prev_flat_grad,
            prev_loss: saved.prev_loss,
            h_diag: saved.h_diag,
            history,
        })
    }
}
