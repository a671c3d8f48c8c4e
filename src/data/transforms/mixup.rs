use anyhow::{Result, ensure};
use tch::{Kind, Tensor};

use crate::data::SplitMix64;

/// Mixes each sample of a batch with the one before it, and their targets alike (Zhang et al. 2018, "mixup: Beyond
/// Empirical Risk Minimization"): torchvision's `MixUp`.
///
/// The share of a sample is drawn from Beta(`alpha`, `alpha`), once for the batch. Inputs are floats of any shape,
/// samples first. Targets are class numbers (N,), which become vectors of `num_classes` shares (N, `num_classes`), or
/// such vectors already. Use a loss that takes shares, such as `cross_entropy_loss`.
///
/// ```
/// # use tch::{Device, Kind, Tensor};
/// use tch_ignite::data::{Loader, transforms::mixup};
/// # let x = Tensor::rand([8, 3, 4, 4], (Kind::Float, Device::Cpu));
/// # let y = Tensor::zeros([8], (Kind::Int64, Device::Cpu));
/// let train = Loader::new(&x, &y, 4)?.shuffle(42).map_batches(|(x, y), rng| mixup(&x, &y, 10, 0.2, rng));
/// # Ok::<(), tch_ignite::Error>(())
/// ```
///
/// # Errors
/// Inputs that are not floats, targets that do not fit, or an `alpha` that is not from 0.001 to 1000.
pub fn mixup(
    inputs: &Tensor,
    targets: &Tensor,
    num_classes: i64,
    alpha: f64,
    rng: &mut SplitMix64,
) -> Result<(Tensor, Tensor)> {
    ensure!(
        inputs.is_floating_point(),
        "mixup needs inputs of floats, but their kind is {:?}; normalise them first",
        inputs.kind()
    );
    let targets = as_shares("mixup", inputs, targets, num_classes)?;
    let share = beta("mixup", alpha, rng)?;
    Ok((mix(inputs, share)?, mix(&targets, share)?))
}

/// Returns `share` of each sample and the rest of the one before it.
pub(super) fn mix(samples: &Tensor, share: f64) -> Result<Tensor> {
    let before = samples.f_roll([1], [0])?.f_mul_scalar(1. - share)?;
    Ok(before.f_add(&samples.f_mul_scalar(share)?)?)
}

/// Returns targets as vectors of shares, where they are class numbers.
pub(super) fn as_shares(
    name: &str,
    inputs: &Tensor,
    targets: &Tensor,
    num_classes: i64,
) -> Result<Tensor> {
    let (x, y) = (inputs.size(), targets.size());
    ensure!(
        matches!(y.len(), 1 | 2) && x.first() == y.first(),
        "{name} needs targets of shape [samples] or [samples, classes], but they are {y:?}, and the inputs {x:?}"
    );
    if y.len() == 1 {
        ensure!(
            targets.kind() == Kind::Int64 && num_classes > 0,
            "{name} needs class numbers of kind Int64 and at least 1 class; {:?} and {num_classes} classes were given",
            targets.kind()
        );
        return Ok(targets.f_one_hot(num_classes)?.f_to_kind(Kind::Float)?);
    }
    ensure!(
        y[1] == num_classes,
        "{name} was given {num_classes} classes, but the targets have {}",
        y[1]
    );
    match targets.is_floating_point() {
        true => Ok(targets.shallow_clone()),
        false => Ok(targets.f_to_kind(Kind::Float)?),
    }
}

/// Draws from Beta(alpha, alpha): for alpha up to 1 by Jöhnk's method (1964), and above by rejection from a uniform
/// distribution.
pub(super) fn beta(name: &str, alpha: f64, rng: &mut SplitMix64) -> Result<f64> {
    ensure!(
        (1e-3..=1e3).contains(&alpha),
        "{name} needs an alpha from 0.001 to 1000, but {alpha} was given"
    );
    loop {
        // Both are in (0, 1].
        let (u, v) = (1. - rng.uniform(), 1. - rng.uniform());
        if alpha > 1. {
            if v <= (4. * u * (1. - u)).powf(alpha - 1.) {
                return Ok(u);
            }
            continue;
        }
        // Powers of 1 / alpha would become 0, so logarithms stand for them.
        let (a, b) = (u.ln() / alpha, v.ln() / alpha);
        let larger = a.max(b);
        let sum = (a - larger).exp() + (b - larger).exp();
        if larger + sum.ln() <= 0. {
            return Ok((a - larger).exp() / sum);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Beta(a, a) has mean 1/2 and variance 1 / (4 (2 a + 1)).
    #[test]
    fn shares_have_the_moments_of_their_distribution() -> Result<()> {
        for alpha in [1e-3, 0.05, 0.2, 0.7, 1., 1.5, 8., 1e3] {
            let mut rng = SplitMix64::new(5);
            let draws =
                (0..20_000).map(|_| beta("", alpha, &mut rng)).collect::<Result<Vec<_>>>()?;
            assert!(draws.iter().all(|share| (0. ..=1.).contains(share)));
            let variance = 1. / (4. * (2. * alpha + 1.));
            let mean = draws.iter().sum::<f64>() / 2e4;
            let found = draws.iter().map(|share| (share - 0.5f64).powi(2)).sum::<f64>() / 2e4;
            // The standard deviation of the mean is the root of variance / 20,000.
            assert!((mean - 0.5).abs() < 4. * (variance / 2e4).sqrt(), "{alpha}: {mean}");
            assert!((found / variance - 1.).abs() < 0.05, "{alpha}: {found} for {variance}");
        }
        assert!(beta("mixup", 0., &mut SplitMix64::new(0)).is_err());
        assert!(beta("mixup", f64::NAN, &mut SplitMix64::new(0)).is_err());
        Ok(())
    }
}
