use tch::{Kind, TchError, Tensor};

/// The kinds of data that `y_pred` and `y` can be, told by their shapes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Case {
    Binary,
    Multiclass,
    Multilabel,
}

/// Tells what the batches are, and checks that this stays the same until the next reset.
#[derive(Debug, Default)]
pub(super) struct Labels {
    pub(super) multilabel: bool,
    seen: Option<(Case, i64)>,
}

impl Labels {
    pub(super) fn reset(&mut self) {
        self.seen = None;
    }

    /// Returns the case and the number of classes, which is 2 where the data is binary.
    pub(super) fn case(&mut self, y_pred: &Tensor, y: &Tensor) -> anyhow::Result<(Case, i64)> {
        let (pred, shape) = (y_pred.size(), y.size());
        let (case, classes) = match (pred.as_slice(), shape.as_slice()) {
            ([n, 1, rest @ ..], [m, others @ ..])
                if n == m && rest == others && pred.len() > shape.len() && !self.multilabel =>
            {
                // One column is no choice between classes, so the data is binary.
                (Case::Binary, 2)
            }
            ([n, classes, rest @ ..], [m, others @ ..])
                if n == m && rest == others && pred.len() > shape.len() && !self.multilabel =>
            {
                (Case::Multiclass, *classes)
            }
            ([_, classes, ..], _) if self.multilabel && pred == shape && *classes > 1 => {
                (Case::Multilabel, *classes)
            }
            ([_, ..], _) if !self.multilabel && pred == shape => (Case::Binary, 2),
            _ => anyhow::bail!(
                "y and y_pred must have compatible shapes. y_pred must be (N, C, …) and y (N, …), or both of the same shape (N, …){}; they are {pred:?} and {shape:?}",
                if self.multilabel { "; for multilabel both (N, C, …) with C > 1" } else { "" }
            ),
        };
        if let Some((before, number)) = self.seen {
            anyhow::ensure!(
                before == case,
                "Input data type has changed from {before:?} to {case:?}."
            );
            anyhow::ensure!(
                number == classes,
                "Input data number of classes has changed from {number} to {classes}"
            );
        }
        self.seen = Some((case, classes));
        Ok((case, classes))
    }
}

/// Returns the condition that a number is outside of the classes, also for kinds that cannot hold `classes`.
pub(super) fn any_outside(numbers: &Tensor, classes: i64) -> Result<Tensor, TchError> {
    let numbers = numbers.f_to_kind(Kind::Int64)?;
    numbers.f_lt(0)?.f_logical_or(&numbers.f_ge(classes)?)?.f_any()
}

/// Returns the condition that floating-point class numbers are no whole numbers, as probabilities are, with what to
/// say then; `None` for other kinds.
pub(super) fn not_whole(
    name: &str,
    numbers: &Tensor,
) -> Result<Option<(Tensor, String)>, TchError> {
    if !numbers.is_floating_point() {
        return Ok(None);
    }
    let wrong = numbers.f_ne_tensor(&numbers.f_floor()?)?.f_any()?;
    let reason = format!("{name} must hold class numbers, and has values that are not whole");
    Ok(Some((wrong, reason)))
}

/// Returns the conditions that an element of `y` or `y_pred` is neither 0 nor 1, with what to say then.
pub(super) fn both_binary(y_pred: &Tensor, y: &Tensor) -> Result<Vec<(Tensor, String)>, TchError> {
    let wrong = [not_binary("y", y)?, not_binary("y_pred", y_pred)?];
    Ok(wrong.into_iter().flatten().collect())
}

/// Returns the condition that an element is neither 0 nor 1, with what to say then; `None` for booleans.
pub(super) fn not_binary(
    name: &str,
    tensor: &Tensor,
) -> Result<Option<(Tensor, String)>, TchError> {
    if tensor.kind() == Kind::Bool {
        return Ok(None);
    }
    let other = tensor.f_mul(tensor)?.f_ne_tensor(tensor)?.f_any()?;
    Ok(Some((other, format!("For binary cases, {name} must be comprised of 0's and 1's."))))
}

/// Makes the labels of each sample, or of each place in a sample, one row: (N, C, …) to (N·…, C).
pub(super) fn rows(tensor: &Tensor) -> Result<Tensor, TchError> {
    let classes = tensor.size().get(1).copied().unwrap_or(1);
    tensor.f_movedim_int(1, -1)?.f_reshape([-1, classes])
}

/// Counts how often each number below `classes` occurs; others are not counted. The counts are (classes,), i64; no
/// host sync.
pub(super) fn occurrences(numbers: &Tensor, classes: i64) -> Result<Tensor, TchError> {
    let numbers = numbers.f_reshape([-1])?.f_to_kind(Kind::Int64)?;
    let outside = numbers.f_lt(0)?.f_logical_or(&numbers.f_ge(classes)?)?;
    let places = numbers.f_masked_fill(&outside, classes)?;
    let counts = Tensor::f_zeros([classes + 1], (Kind::Int64, numbers.device()))?;
    counts.f_scatter_add(0, &places, &places.f_ones_like()?)?.f_narrow(0, 0, classes)
}
