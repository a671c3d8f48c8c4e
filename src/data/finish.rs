use std::sync::Arc;

use anyhow::Result;
use tch::{Device, Tensor};

use super::map_batches::{MapFn, map_batch};
use super::normalize::{Normalize, OnDevice};

/// Changes the inputs of a batch by a function.
pub(super) type OfInputs<B> = fn(B, &mut dyn FnMut(&Tensor) -> Result<Tensor>) -> Result<B>;

/// Changes whole batches after they were put together: normalises them, and calls the user's function.
pub(super) struct Finish<B> {
    pub(super) normalize: Option<(Normalize, OfInputs<B>)>,
    pub(super) map: Option<Arc<MapFn<B>>>,
}

impl<B> Default for Finish<B> {
    fn default() -> Self {
        Self { normalize: None, map: None }
    }
}

impl<B> Clone for Finish<B> {
    fn clone(&self) -> Self {
        Self { normalize: self.normalize.clone(), map: self.map.clone() }
    }
}

impl<B> Finish<B> {
    /// Finishes a batch on the CPU. `key` is what its random numbers belong to: seed, pass and first position.
    pub(super) fn on_cpu(&self, batch: B, key: [u64; 3]) -> Result<B> {
        let batch = match &self.normalize {
            Some((normalize, of_inputs)) => of_inputs(batch, &mut |x| Ok(normalize.batch(x)?))?,
            None => batch,
        };
        self.mapped(batch, key)
    }

    /// Finishes a batch on another device. `on_device` is made with the first batch, and again with one that
    /// has another number of dimensions.
    pub(super) fn on(
        &self,
        device: Device,
        on_device: &mut Option<OnDevice>,
        batch: B,
        key: [u64; 3],
    ) -> Result<B> {
        let batch = match &self.normalize {
            Some((normalize, of_inputs)) => of_inputs(batch, &mut |x| {
                normalize.check(x.kind(), &x.size())?;
                let on_device = match on_device {
                    Some(made) if made.dimensions() == x.dim() => made,
                    _ => on_device.insert(normalize.on(device, x.dim())?),
                };
                Ok(on_device.batch(x)?)
            })?,
            None => batch,
        };
        self.mapped(batch, key)
    }

    fn mapped(&self, batch: B, key: [u64; 3]) -> Result<B> {
        match &self.map {
            Some(map) => map_batch(&**map, batch, key),
            None => Ok(batch),
        }
    }
}

#[cfg(test)]
mod tests {
    use tch::Kind;

    use super::*;
    use crate::data::map_batches::after;

    /// The CPU stands for another device here, so that the test needs none.
    #[test]
    fn a_batch_is_the_same_wherever_it_is_finished() -> Result<()> {
        let bytes = Tensor::f_arange(2 * 3 * 5, (Kind::Uint8, Device::Cpu))?.f_view([2, 3, 5])?;
        let finish = Finish::<Tensor> {
            normalize: Some((Normalize::new(&[0.1, 0.2, 0.3], &[1., 2., 3.])?, |x, f| f(&x))),
            map: Some(after(None, |x: Tensor, rng| Ok(x.f_add_scalar(rng.uniform())?))),
        };
        let mut on_device = None;
        for key in [[1, 2, 3], [1, 2, 4]] {
            let here = finish.on_cpu(bytes.shallow_clone(), key)?;
            let there = finish.on(Device::Cpu, &mut on_device, bytes.shallow_clone(), key)?;
            assert_eq!(here, there);
            assert!(on_device.is_some());
        }
        let flat = bytes.f_select(2, 0)?;
        let there = finish.on(Device::Cpu, &mut on_device, flat.shallow_clone(), [3; 3])?;
        assert_eq!(there, finish.on_cpu(flat, [3; 3])?);
        let floats = bytes.f_to_kind(Kind::Float)?;
        let error = finish.on(Device::Cpu, &mut on_device, floats, [0; 3]).unwrap_err();
        assert!(error.to_string().contains("Float"));
        Ok(())
    }
}
