//! Changes of pictures: torchvision's `transforms`, with its numbers.
//!
//! Pictures are tensors (…, C, H, W): bytes, or floats from 0 to 1. With more dimensions in front, all pictures are
//! changed alike; [`each`] changes them one by one. Sizes are `[height, width]`.
//!
//! The functions that begin with `random_`, [`ColorJitter`], [`mixup`] and [`cutmix`] draw from the `rng` that
//! [`Dataset::map`](super::Dataset::map) and [`Loader::map_batches`](super::Loader::map_batches) give. It belongs to the
//! sample or batch, so that a resumed run, with any number of workers, sees the same pictures.
//!
//! ```
//! use tch::{Device, Kind, Tensor};
//! use tch_ignite::data::transforms::{ColorJitter, random_horizontal_flip, random_resized_crop};
//! use tch_ignite::data::{DataLoader, Dataset, from_fn};
//!
//! // `ImageFolder` gives such samples from files.
//! let pictures = from_fn(8, |_, _| Ok((Tensor::f_zeros([3, 48, 64], (Kind::Uint8, Device::Cpu))?, 0i64)));
//! let jitter = ColorJitter::new().brightness(0.4).contrast(0.4).saturation(0.4).hue(0.1);
//! let augmented = pictures.map(move |(picture, class), rng| {
//!     let picture = random_resized_crop(&picture, [32, 32], 0.08..=1., 3. / 4. ..=4. / 3., rng)?;
//!     let picture = random_horizontal_flip(&picture, 0.5, rng)?;
//!     Ok((jitter.apply(&picture, rng)?, class))
//! });
//! let train = DataLoader::new(augmented, 4)?
//!     .shuffle(42)
//!     .num_workers(2)
//!     .normalize(&[0.485, 0.456, 0.406], &[0.229, 0.224, 0.225])?;
//! # Ok::<(), tch_ignite::Error>(())
//! ```

mod color;
mod color_jitter;
mod crop;
mod cutmix;
mod flip;
mod mixup;
mod random_resized_crop;
mod resize;

use anyhow::{Result, ensure};
use tch::Tensor;

pub use color::{adjust_brightness, adjust_contrast, adjust_hue, adjust_saturation};
pub use color_jitter::ColorJitter;
pub use crop::{center_crop, crop, pad, random_crop};
pub use cutmix::cutmix;
pub use flip::{horizontal_flip, random_horizontal_flip};
pub use mixup::mixup;
pub use random_resized_crop::random_resized_crop;
pub use resize::{resize, resize_shorter_edge};

/// Changes the pictures of a batch one by one, and stacks what comes out.
///
/// ```
/// # use tch::{Device, Kind, Tensor};
/// use tch_ignite::data::{SplitMix64, transforms};
/// # let (batch, mut rng) = (Tensor::zeros([4, 3, 8, 8], (Kind::Float, Device::Cpu)), SplitMix64::new(0));
/// let flipped = transforms::each(&batch, |image| transforms::random_horizontal_flip(image, 0.5, &mut rng))?;
/// assert_eq!(flipped.size(), [4, 3, 8, 8]);
/// # anyhow::Ok(())
/// ```
///
/// Costs a copy of the batch, and what the changes cost.
///
/// # Errors
/// Errors of `change`, a tensor without a first dimension, or results of different shapes.
pub fn each(batch: &Tensor, mut change: impl FnMut(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
    let size = batch.size();
    ensure!(
        !size.is_empty(),
        "transforms::each needs a batch, but got a tensor without dimensions"
    );
    let images =
        (0..size[0]).map(|place| change(&batch.f_get(place)?)).collect::<Result<Vec<_>>>()?;
    super::Collate::collate(images)
}

/// Returns channels, height and width of a picture.
fn shape_of(image: &Tensor) -> Result<[i64; 3]> {
    let size = image.size();
    match size.last_chunk() {
        Some(shape) if shape.iter().all(|length| *length > 0) => Ok(*shape),
        _ => anyhow::bail!(
            "a picture needs the shape [channels, height, width], with any dimensions in front and none of 0, but it is {size:?}"
        ),
    }
}

/// Checks a size that a picture is to have.
fn check_size(name: &str, [height, width]: [i64; 2]) -> Result<()> {
    ensure!(
        height > 0 && width > 0,
        "{name} needs a height and a width of at least 1, but [{height}, {width}] was given"
    );
    Ok(())
}
