use super::{Description, algorithm};
use crate::optim::hyper::Hyper::*;

algorithm! {
    /// L-BFGS (Liu and Nocedal 1989, <https://doi.org/10.1007/BF01589116>), a quasi-Newton method for losses without noise,
    /// with the numbers of `torch.optim.LBFGS`; built by [`Optimizer::lbfgs`](crate::optim::Optimizer::lbfgs).
    ///
    /// A step evaluates the loss and its gradient several times, so it is made by
    /// [`Optimizer::step_with`](crate::optim::Optimizer::step_with), and [`step`](crate::optim::Optimizer::step) is an
    /// error. It makes up to `max_iter` iterations, of which each goes the learning rate's share of a Newton step, or the
    /// length that a search for the strong Wolfe conditions finds (`strong_wolfe`; torch's
    /// `line_search_fn="strong_wolfe"`). It ends early after `max_eval` evaluations (0 stands for 5/4 of `max_iter`), at a
    /// gradient whose largest element is at most `tolerance_grad`, and where loss or parameters change by less than
    /// `tolerance_change`.
    ///
    /// All parameters are one vector here, so there is one group; when a parameter is added, the history begins anew. The
    /// state needs the memory of `2 · history_size + 3`
    /// copies of the parameters. Each iteration reads numbers from the device about ten times, and twice more for each step
    /// that it remembers.
    Lbfgs,
    /// L-BFGS with learning rate 1, 20 iterations in a step, the history of 100 iterations and no line search; see
    /// [`Lbfgs`].
    fn lbfgs,
    Description {
        name: "LBFGS",
        hypers: &[
            (Lr, 1.),
            (MaxIter, 20.),
            (MaxEval, 0.),
            (ToleranceGrad, 1e-7),
            (ToleranceChange, 1e-9),
            (HistorySize, 100.),
            (StrongWolfe, 0.),
            (Maximize, 0.),
        ],
        state: &[],
        counts_steps: false,
    }
}
