use tch::{Device, TchError, Tensor};

use super::{check_num_features, extract};
use crate::error::Result;
use crate::metrics::MetricValue;
use crate::metrics::{Contribution, Of, Pairwise, Parts, Reduce, References};

/// The Fréchet inception distance of generated from real samples: ignite's `FID`.
///
/// |µ₁ − µ₂|² + tr(Σ₁ + Σ₂ − 2 √(Σ₁ Σ₂)), with the means and covariances of features (Heusel et al., 2017). Both sets
/// need the same number of samples, at least two: the value is NaN for one sample, and where a feature is not finite.
///
/// The metric keeps sums of num_features² numbers in f64 on the device. `compute` finds the eigenvalues of two
/// matrices of that size on the CPU: a host sync, and seconds for 2048 features. ignite takes scipy's `sqrtm`. Both
/// agree up to rounding, but where a covariance is singular only up to the square root of the rounding errors.
///
/// ```
/// use tch::Tensor;
/// use tch_ignite::metrics::{Metric, gan::FID, pair};
/// let features = |images: &Tensor| Ok(images.f_flatten(1, -1)?);
/// let mut metric = FID::of(2, features, pair);
/// let real = Tensor::from_slice2(&[[0., 0.], [2., 0.], [0., 2.], [2., 2.]]);
/// metric.update(&(real.shallow_clone(), real + 3.))?;
/// assert!((metric.compute()?.read()? - 18.).abs() < 1e-12);
/// # anyhow::Ok(())
/// ```
pub struct FID<E> {
    num_features: i64,
    extractor: E,
}

crate::debug::opaque_debug!(FID<E>);

impl<E: Fn(&Tensor) -> anyhow::Result<Tensor>> FID<E> {
    /// Makes the metric: `feature_extractor` turns a batch of samples into features (N, num_features), and runs
    /// without gradients. `parts` takes real and generated samples out of the output, in either order.
    pub fn of<O, F>(num_features: i64, feature_extractor: E, parts: F) -> Of<Self, References<F, O>>
    where
        F: for<'o> Fn(&'o O) -> (&'o Tensor, &'o Tensor),
    {
        Of::new(Self { num_features, extractor: feature_extractor }, parts)
    }
}

impl<E: Fn(&Tensor) -> anyhow::Result<Tensor>> Pairwise for FID<E> {
    const NAME: &'static str = "FID";

    fn parts(&self) -> Parts {
        &[
            ("train_total", Reduce::Sum),
            ("train_sigma", Reduce::Sum),
            ("test_total", Reduce::Sum),
            ("test_sigma", Reduce::Sum),
        ]
    }

    fn validate(&self) -> Result<()> {
        check_num_features(self.num_features)
    }

    fn batch(&mut self, train: &Tensor, test: &Tensor) -> anyhow::Result<Contribution> {
        let train = extract(&self.extractor, self.num_features, train)?;
        let test = extract(&self.extractor, self.num_features, test)?;
        anyhow::ensure!(
            train.size() == test.size(),
            "Number of Training Features and Testing Features should be equal ({:?} != {:?})",
            train.size(),
            test.size()
        );
        let (total, sigma) = sums(&train)?;
        let (test_total, test_sigma) = sums(&test)?;
        let samples = train.size()[0] as u64;
        Ok(Contribution::new([total, sigma, test_total, test_sigma], samples))
    }

    fn value(&self, parts: &[Tensor], samples: f64) -> anyhow::Result<MetricValue> {
        let parts: Vec<_> =
            parts.iter().map(|part| part.f_to_device(Device::Cpu)).collect::<Result<_, _>>()?;
        let finite = |part: &Tensor| part.f_isfinite()?.f_all()?.f_int64_value(&[]);
        if samples < 2. || parts.iter().map(finite).collect::<Result<Vec<_>, _>>()?.contains(&0) {
            return Ok(f64::NAN.into());
        }
        let sigma = covariance(&parts[0], &parts[1], samples)?;
        let test_sigma = covariance(&parts[2], &parts[3], samples)?;
        let means = parts[0].f_sub(&parts[2])?.f_div_scalar(samples)?;
        let distance = means.f_square()?.f_sum(None)?.f_double_value(&[])?;
        let traces = sigma.f_trace()?.f_add(&test_sigma.f_trace()?)?.f_double_value(&[])?;
        Ok((distance + traces - 2. * trace_of_root(&sigma, &test_sigma)?).into())
    }
}

/// Returns the sum of the rows, and the sum of their outer products.
fn sums(features: &Tensor) -> Result<(Tensor, Tensor), TchError> {
    let sigma = features.f_transpose(0, 1)?.f_matmul(features)?;
    Ok((features.f_sum_dim_intlist(0i64, false, None)?, sigma))
}

fn covariance(total: &Tensor, sigma: &Tensor, samples: f64) -> Result<Tensor, TchError> {
    let outer = total.f_outer(total)?.f_div_scalar(samples)?;
    sigma.f_sub(&outer)?.f_div_scalar(samples - 1.)
}

/// Computes tr √(A B) of covariances: A B has the eigenvalues of √A B √A, which is symmetric.
fn trace_of_root(a: &Tensor, b: &Tensor) -> Result<f64, TchError> {
    let (values, vectors) = a.f_linalg_eigh("L")?;
    let roots = values.f_clamp_min(0.)?.f_sqrt()?;
    let root = vectors.f_mul(&roots)?.f_matmul(&vectors.f_transpose(0, 1)?)?;
    let (values, _) = root.f_matmul(b)?.f_matmul(&root)?.f_linalg_eigh("L")?;
    values.f_clamp_min(0.)?.f_sqrt()?.f_sum(None)?.f_double_value(&[])
}
