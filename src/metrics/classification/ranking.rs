//! Curves and areas from sorted scores and the number of positives above each score.

use tch::{TchError, Tensor};

use super::{double, host};

/// Makes rows of scores and of 0/1 labels in the accumulator's type, one row for each class: (N,) or (N, C) to (C,
/// N).
pub(super) fn class_rows(scores: &Tensor, y: &Tensor) -> anyhow::Result<(Tensor, Tensor)> {
    anyhow::ensure!(
        scores.size() == y.size(),
        "y_pred and y must have the same shape, (N,) or (N, C), but given {:?} and {:?}",
        scores.size(),
        y.size()
    );
    let rows = |tensor: &Tensor| -> Result<Tensor, TchError> {
        match tensor.dim() {
            1 => tensor.f_unsqueeze(0),
            _ => tensor.f_transpose(0, 1)?.f_contiguous(),
        }
    };
    Ok((rows(&double(scores)?)?, rows(&double(y)?)?))
}

/// Counts for each value the elements of its sorted row that are smaller, or, with `right`, not larger.
fn searchsorted(sorted: &Tensor, values: &Tensor, right: bool) -> Result<Tensor, TchError> {
    let side = if right { "right" } else { "left" };
    values.f_searchsorted::<Tensor>(sorted, false, right, side, None)
}

/// Ranks the elements of each row, from 1; ties share their mean rank.
pub(in crate::metrics) fn ranks(rows: &Tensor) -> Result<Tensor, TchError> {
    let (sorted, _) = rows.f_sort(-1, false)?;
    let (below, up_to) = (searchsorted(&sorted, rows, false)?, searchsorted(&sorted, rows, true)?);
    double(&below.f_add(&up_to)?)?.f_add_scalar(1.)?.f_div_scalar(2.)
}

/// Sets the values of rows with a NaN score to NaN.
fn nan_with(scores: &Tensor, values: Tensor) -> Result<Tensor, TchError> {
    values.f_masked_fill(&scores.f_isnan()?.f_any_dim(-1, false)?, f64::NAN)
}

/// Computes the area under the ROC curve of each row: the chance that a positive has a higher score than a negative,
/// where ties count half. NaN for rows with a single class.
pub(super) fn roc_auc(scores: &Tensor, y: &Tensor) -> Result<Tensor, TchError> {
    let sum = |values: &Tensor| values.f_sum_dim_intlist(-1i64, false, None);
    let positives = sum(y)?;
    let negatives = positives.f_neg()?.f_add_scalar(scores.size()[1])?;
    let least = positives.f_mul(&positives.f_add_scalar(1.)?)?.f_div_scalar(2.)?;
    let above = sum(&ranks(scores)?.f_mul(y)?)?.f_sub(&least)?;
    nan_with(scores, above.f_div(&positives.f_mul(&negatives)?)?)
}

/// The scores of each row in descending order: precision and recall of predicting all samples with at least that
/// score, and the labels in that order. Recall is 1 in rows without positives.
struct Descending {
    precision: Tensor,
    recall: Tensor,
    y: Tensor,
    positives: Tensor,
}

fn descending(scores: &Tensor, y: &Tensor) -> Result<Descending, TchError> {
    let (sorted, order) = scores.f_neg()?.f_sort(-1, false)?;
    let y = y.f_gather(-1, &order, false)?;
    // The end of each group of equal scores, counted from 1.
    let end = searchsorted(&sorted, &sorted, true)?;
    let found = y.f_cumsum(-1, None)?.f_gather(-1, &end.f_sub_scalar(1)?, false)?;
    let positives = y.f_sum_dim_intlist(-1i64, true, None)?;
    let recall = found.f_div(&positives)?.f_masked_fill(&positives.f_eq(0)?, 1.)?;
    Ok(Descending { precision: found.f_div(&double(&end)?)?, recall, y, positives })
}

/// Computes the average precision of each row, Σ (Rₙ − Rₙ₋₁) Pₙ; 0 for rows without positives.
pub(super) fn average_precision(scores: &Tensor, y: &Tensor) -> Result<Tensor, TchError> {
    let Descending { precision, y, positives, .. } = descending(scores, y)?;
    let sum = precision.f_mul(&y)?.f_sum_dim_intlist(-1i64, true, None)?;
    nan_with(scores, sum.f_div(&positives.f_clamp_min(1.)?)?.f_squeeze_dim(-1)?)
}

/// Computes the average precision of each row at these recalls, which ascend: Σ (tₙ − tₙ₋₁) Pₙ. Pₙ is the precision
/// at the first score with a recall of at least tₙ, or 0 where there is none.
pub(super) fn average_precision_at(
    scores: &Tensor,
    y: &Tensor,
    thresholds: &Tensor,
) -> Result<Tensor, TchError> {
    let Descending { precision, recall, .. } = descending(scores, y)?;
    let shape = scores.size();
    let (rows, length) = (shape[0], shape[1]);
    let wanted = thresholds.f_to_device(scores.device())?.f_unsqueeze(0)?.f_repeat([rows, 1])?;
    let places = searchsorted(&recall, &wanted, false)?;
    let beyond = places.f_ge(length)?;
    let precision = precision.f_gather(-1, &places.f_masked_fill(&beyond, 0)?, false)?;
    let steps = wanted.f_diff(1, -1, Some(wanted.f_zeros_like()?.f_narrow(1, 0, 1)?), None)?;
    let sum = precision.f_masked_fill(&beyond, 0.)?.f_mul(&steps)?;
    nan_with(scores, sum.f_sum_dim_intlist(-1i64, false, None)?)
}

/// For each distinct score, from the highest, the numbers of negatives and positives with at least that score.
#[derive(Debug, Default)]
pub(super) struct Curve {
    pub(super) false_positives: Vec<f64>,
    pub(super) true_positives: Vec<f64>,
    pub(super) thresholds: Vec<f64>,
}

/// Makes the curve of scores and labels, (N,) or (N, 1) each. Takes one host sync.
pub(super) fn curve(scores: &Tensor, y: &Tensor) -> anyhow::Result<Curve> {
    let (scores, y) = class_rows(scores, y)?;
    anyhow::ensure!(scores.size()[0] == 1, "y_pred and y must be (N,) or (N, 1): binary");
    let (sorted, order) = scores.f_sort(-1, true)?;
    let both = host::<f64>(&Tensor::f_cat(&[sorted, y.f_gather(-1, &order, false)?], 0)?)?;
    let (scores, y) = both.split_at(both.len() / 2);
    anyhow::ensure!(!scores.iter().any(|score| score.is_nan()), "y_pred contains NaN");
    let mut curve = Curve::default();
    let (mut positives, mut all) = (0., 0.);
    for (index, (score, y)) in scores.iter().zip(y).enumerate() {
        positives += y;
        all += 1.;
        if scores.get(index + 1) != Some(score) {
            curve.true_positives.push(positives);
            curve.false_positives.push(all - positives);
            curve.thresholds.push(*score);
        }
    }
    Ok(curve)
}
