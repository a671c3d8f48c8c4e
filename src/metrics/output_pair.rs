use std::marker::PhantomData;

use tch::Tensor;

/// A way to take `y_pred` and `y` out of an output.
///
/// Closures and functions that return references make one: `|output: &Output| (&output.y_pred, &output.y)`. So do [`Of::map_y_pred`](super::Of::map_y_pred), [`Of::map_y`](super::Of::map_y),
/// [`Of::leave_out`](super::Of::leave_out) and `computed`, where one or both tensors are new.
#[diagnostic::on_unimplemented(
    message = "`{Self}` does not take `y_pred` and `y` out of the output `{O}`",
    note = "write the type of the output in the closure: `|output: &Output| (&output.y_pred, &output.y)`",
    note = "a closure that computes one of them is for `map_y_pred` and `map_y`: `Accuracy::of(pair).map_y_pred(|y_pred| y_pred.sigmoid().round())`"
)]
pub trait OutputPair<O> {
    /// Hands `y_pred` and `y` to `take`, and returns its result.
    ///
    /// # Errors
    /// The errors of `take`, and of what makes new tensors.
    fn with_pair<R>(
        &self,
        output: &O,
        take: impl FnOnce(&Tensor, &Tensor) -> anyhow::Result<R>,
    ) -> anyhow::Result<R>;
}

/// Both tensors are references into the output `O`, as the closures of `of` return them. The type of the output is kept,
/// so that the compiler names it where the engine has another.
pub struct References<F, O> {
    pub(super) parts: F,
    pub(super) output: PhantomData<fn(&O)>,
}

crate::debug::opaque_debug!(References<F, O>);

#[diagnostic::do_not_recommend]
impl<O, F> OutputPair<O> for References<F, O>
where
    F: for<'o> Fn(&'o O) -> (&'o Tensor, &'o Tensor),
{
    fn with_pair<R>(
        &self,
        output: &O,
        take: impl FnOnce(&Tensor, &Tensor) -> anyhow::Result<R>,
    ) -> anyhow::Result<R> {
        let (y_pred, y) = (self.parts)(output);
        take(y_pred, y)
    }
}

/// Both tensors are made by a closure, as `Accuracy::computed` and its like have it.
pub struct Computed<F>(pub(super) F);

crate::debug::opaque_debug!(Computed<F>);

impl<O, F> OutputPair<O> for Computed<F>
where
    F: Fn(&O) -> (Tensor, Tensor),
{
    fn with_pair<R>(
        &self,
        output: &O,
        take: impl FnOnce(&Tensor, &Tensor) -> anyhow::Result<R>,
    ) -> anyhow::Result<R> {
        let (y_pred, y) = (self.0)(output);
        take(&y_pred, &y)
    }
}

/// `y_pred` is what a closure makes of it: see [`Of::map_y_pred`](super::Of::map_y_pred).
pub struct MapYPred<F, G> {
    pub(super) pair: F,
    pub(super) map: G,
}

crate::debug::opaque_debug!(MapYPred<F, G>);

#[diagnostic::do_not_recommend]
impl<O, F: OutputPair<O>, G: Fn(&Tensor) -> Tensor> OutputPair<O> for MapYPred<F, G> {
    fn with_pair<R>(
        &self,
        output: &O,
        take: impl FnOnce(&Tensor, &Tensor) -> anyhow::Result<R>,
    ) -> anyhow::Result<R> {
        self.pair.with_pair(output, |y_pred, y| take(&(self.map)(y_pred), y))
    }
}

/// `y` is what a closure makes of it: see [`Of::map_y`](super::Of::map_y).
pub struct MapY<F, G> {
    pub(super) pair: F,
    pub(super) map: G,
}

crate::debug::opaque_debug!(MapY<F, G>);

#[diagnostic::do_not_recommend]
impl<O, F: OutputPair<O>, G: Fn(&Tensor) -> Tensor> OutputPair<O> for MapY<F, G> {
    fn with_pair<R>(
        &self,
        output: &O,
        take: impl FnOnce(&Tensor, &Tensor) -> anyhow::Result<R>,
    ) -> anyhow::Result<R> {
        self.pair.with_pair(output, |y_pred, y| take(y_pred, &(self.map)(y)))
    }
}

/// The places where `y` is a certain number are left out: see [`Of::leave_out`](super::Of::leave_out).
pub struct LeaveOut<F> {
    pub(super) pair: F,
    pub(super) index: i64,
}

crate::debug::opaque_debug!(LeaveOut<F>);

#[diagnostic::do_not_recommend]
impl<O, F: OutputPair<O>> OutputPair<O> for LeaveOut<F> {
    fn with_pair<R>(
        &self,
        output: &O,
        take: impl FnOnce(&Tensor, &Tensor) -> anyhow::Result<R>,
    ) -> anyhow::Result<R> {
        self.pair.with_pair(output, |y_pred, y| {
            let (y_pred, y) = without(y_pred, y, self.index)?;
            take(&y_pred, &y)
        })
    }
}

/// Leaves out the places where `y` is `index`. `y_pred` has the shape of `y`, (N, …), or that of class scores, (N, C, …).
fn without(y_pred: &Tensor, y: &Tensor, index: i64) -> anyhow::Result<(Tensor, Tensor)> {
    let (shape, scores) = (y.size(), y_pred.size());
    let has_classes = scores.len() == shape.len() + 1
        && scores.first() == shape.first()
        && scores.get(2..) == shape.get(1..);
    anyhow::ensure!(
        has_classes || scores == shape,
        "leave_out needs y of shape (N, …), and y_pred of the same shape or (N, C, …), but given y_pred: {scores:?} and y: {shape:?}"
    );
    let y = y.f_flatten(0, -1)?;
    let y_pred = match has_classes {
        true => y_pred.f_movedim_int(1, -1)?.f_flatten(0, -2)?,
        false => y_pred.f_flatten(0, -1)?,
    };
    // A mask as the index of both would be a host sync for each.
    let places = y.f_ne(index)?.f_nonzero()?.f_squeeze_dim(1)?;
    Ok((y_pred.f_index_select(0, &places)?, y.f_index_select(0, &places)?))
}
