use crate::bridge::BatchNormWatch;
use crate::data::IntoSource;
use crate::error::{Error, Result};
use crate::guard::guarded;

/// Computes the running averages of batch normalisation anew, as averages over all batches of the data: torch's
/// `update_bn`. Use it for weights that no training step has run with, such as those of
/// [`SWAHandler`](super::SWAHandler) and [`EMAHandler`](super::EMAHandler).
///
/// `forward` calls the model in training mode, for each batch of one pass over the data; gradients are off. Each layer
/// gets the plain mean of the statistics of all its calls, whatever its momentum is. Layers that run in evaluation
/// mode, or not at all, keep their averages. Returns the number of layers that were updated.
///
/// With averaged weights swapped in, this computes the running averages for these weights, and they are swapped back
/// together:
///
/// ```
/// use tch::nn::{self, ModuleT};
/// # use tch::{Device, Kind, Tensor};
/// use tch_ignite::data::{Batch, Loader};
/// use tch_ignite::handlers::{SWAHandler, update_bn};
///
/// # let vs = nn::VarStore::new(Device::Cpu);
/// let net = nn::seq_t()
///     .add(nn::linear(vs.root() / "a", 2, 3, Default::default()))
///     .add(nn::batch_norm1d(vs.root() / "bn", 3, Default::default()));
/// # let x = Tensor::arange(12, (Kind::Float, Device::Cpu)).view([6, 2]);
/// let loader = Loader::new(&x, &x, 2)?;
/// let swa = SWAHandler::new(&vs)?;
/// // … train, then:
/// swa.update()?;
/// let averages = swa.swap()?;
/// assert_eq!(update_bn(&loader, |(x, _): &Batch| net.forward_t(x, true))?, 1);
/// // Evaluate or save here: until `averages` is dropped the model is the averaged one.
/// # drop(averages);
/// # Ok::<(), tch_ignite::Error>(())
/// ```
///
/// Costs a pass over the data. No host sync.
///
/// # Errors
/// The data or the model returned an error or panicked, or all layers ran in evaluation mode. The running averages are
/// then as they were.
pub fn update_bn<'a, B, R>(
    data: impl IntoSource<'a, B>,
    mut forward: impl FnMut(&B) -> R,
) -> Result<usize> {
    let failed = |text| Error::libtorch("update_bn", text);
    let wrong = |error: anyhow::Error| Error::invalid(format!("update_bn: {error:#}"));
    let mut source = data.into_source();
    source.validate().map_err(wrong)?;
    let watch = BatchNormWatch::averaging().map_err(failed)?;
    guarded(|| {
        let _no_grad = tch::no_grad_guard();
        source.seek(0, 0)?;
        while let Some(batch) = source.next() {
            drop(forward(&batch?));
        }
        Ok(())
    })
    .map_err(wrong)?;
    let layers = watch.layers();
    if layers == 0 && watch.evaluated() {
        return Err(Error::invalid(
            "update_bn: all layers of batch normalisation ran in evaluation mode, in which they compute no averages; call the model with `forward_t(x, true)`",
        ));
    }
    watch.keep().map_err(failed)?;
    Ok(layers)
}
