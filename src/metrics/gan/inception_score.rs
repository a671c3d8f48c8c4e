use tch::Tensor;

use super::{check_num_features, extract};
use crate::error::Result;
use crate::metrics::MetricValue;
use crate::metrics::{Computed, Contribution, Of, Pairwise, Parts, Reduce};

/// ignite's `_eps`, which keeps log 0 finite.
const EPS: f64 = 1e-16;

/// The inception score of generated samples: ignite's `InceptionScore`.
///
/// The value is exp of the mean KL divergence between the class probabilities of each sample and their mean
/// (Salimans et al., 2016): from 1 to the number of classes, higher is better. The sums are kept in f64 on the
/// device; no host sync.
///
/// ```
/// use tch::{Kind, Tensor};
/// use tch_ignite::metrics::{Metric, gan::InceptionScore};
/// let classify = |images: &Tensor| Ok(images.f_softmax(1, Kind::Double)?);
/// let mut metric = InceptionScore::of(2, classify, |images: &Tensor| images);
/// metric.update(&Tensor::from_slice2(&[[100., 0.], [0., 100.]]))?;
/// assert!((metric.compute()?.read()? - 2.).abs() < 1e-12);
/// # anyhow::Ok(())
/// ```
pub struct InceptionScore<E> {
    num_features: i64,
    extractor: E,
}

crate::debug::opaque_debug!(InceptionScore<E>);

impl<E: Fn(&Tensor) -> anyhow::Result<Tensor>> InceptionScore<E> {
    /// Makes the metric: `feature_extractor` turns a batch of samples into class probabilities (N, num_features),
    /// after softmax, and runs without gradients. `samples` takes the batch out of the output.
    pub fn of<O, F>(
        num_features: i64,
        feature_extractor: E,
        samples: F,
    ) -> Of<Self, Computed<impl Fn(&O) -> (Tensor, Tensor)>>
    where
        F: for<'o> Fn(&'o O) -> &'o Tensor,
    {
        let twice = move |output: &O| {
            let samples = samples(output);
            (samples.shallow_clone(), samples.shallow_clone())
        };
        Of::of_computed(Self { num_features, extractor: feature_extractor }, twice)
    }
}

impl<E: Fn(&Tensor) -> anyhow::Result<Tensor>> Pairwise for InceptionScore<E> {
    const NAME: &'static str = "InceptionScore";

    fn parts(&self) -> Parts {
        &[("prob_total", Reduce::Sum), ("total_kl_d", Reduce::Sum)]
    }

    fn validate(&self) -> Result<()> {
        check_num_features(self.num_features)
    }

    fn batch(&mut self, samples: &Tensor, _: &Tensor) -> anyhow::Result<Contribution> {
        let probabilities = extract(&self.extractor, self.num_features, samples)?;
        let logs = probabilities.f_add_scalar(EPS)?.f_log()?;
        let divergences = probabilities.f_mul(&logs)?.f_sum_dim_intlist(0i64, false, None)?;
        let total = probabilities.f_sum_dim_intlist(0i64, false, None)?;
        Ok(Contribution::new([total, divergences], probabilities.size()[0] as u64))
    }

    fn value(&self, parts: &[Tensor], samples: f64) -> anyhow::Result<MetricValue> {
        let logs = parts[0].f_div_scalar(samples)?.f_add_scalar(EPS)?.f_log()?;
        let excess = parts[0].f_mul(&logs)?;
        let mean = parts[1].f_sub(&excess)?.f_sum(None)?.f_div_scalar(samples)?;
        Ok(mean.f_exp()?.into())
    }
}
