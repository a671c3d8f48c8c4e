//! Measures the time to load a sample with our loader and with tch's `Iter2`, in one run: shuffled batches of
//! Fashion-MNIST's size (60,000 x 1 x 28 x 28), with labels. Making the random order counts too.
//!
//! `OMP_NUM_THREADS=1 cargo bench --bench data_loading`. The contenders take turns, a pass each; the best and the
//! median of the rounds are shown. `benches/data_loading.py` measures PyTorch's DataLoader.

use std::hint::black_box;
use std::time::Instant;

use tch::data::Iter2;
use tch::{Device, Kind, Tensor};
use tch_ignite::data::{Batch, DataLoader, Dataset, IntoSource, Loader, TensorDataset};

const SAMPLES: i64 = 60_000;
const ROUNDS: u64 = 15;

struct Contender<'a> {
    name: String,
    pass: Box<dyn FnMut(u64) -> anyhow::Result<i64> + 'a>,
    /// Nanoseconds for each sample, one number for each round.
    times: Vec<f64>,
}

impl<'a> Contender<'a> {
    fn new(name: String, pass: impl FnMut(u64) -> anyhow::Result<i64> + 'a) -> Self {
        Self { name, pass: Box::new(pass), times: vec![] }
    }

    fn source(name: String, data: impl IntoSource<'a, Batch>) -> Self {
        let mut source = data.into_source();
        Self::new(name, move |pass| {
            source.seek(pass, 0)?;
            let mut samples = 0;
            while let Some(batch) = source.next() {
                samples += black_box(batch?).0.size()[0];
            }
            Ok(samples)
        })
    }
}

fn main() -> anyhow::Result<()> {
    let bytes = Tensor::randint(256, [SAMPLES, 1, 28, 28], (Kind::Uint8, Device::Cpu));
    let labels = Tensor::randint(10, [SAMPLES], (Kind::Int64, Device::Cpu));
    let floats = (bytes.to_kind(Kind::Float) / 255. - 0.2860) / 0.3530;
    println!("ns a sample, best and median of {ROUNDS} passes; {} threads", tch::get_num_threads());
    for size in [64, 256] {
        let normalized = Loader::new(&bytes, &labels, size)?.normalize(&[0.2860], &[0.3530])?;
        let samples = || -> anyhow::Result<_> {
            Ok(DataLoader::new(TensorDataset::new(&floats, &labels)?, size)?.shuffle(1))
        };
        let mut contenders = vec![
            Contender::source("Loader, bytes normalised".into(), normalized.clone().shuffle(1)),
            Contender::source("Loader, bytes normalised, in order".into(), normalized),
            Contender::source(
                "Loader, floats".into(),
                Loader::new(&floats, &labels, size)?.shuffle(1),
            ),
            Contender::new("tch Iter2, floats".into(), |_| {
                let mut batches = Iter2::new(&floats, &labels, size as i64);
                let batches = batches.shuffle().return_smaller_last_batch();
                Ok(batches.map(|batch| black_box(batch).0.size()[0]).sum())
            }),
            Contender::source("DataLoader, floats, 0 workers".into(), samples()?),
            Contender::source("DataLoader, floats, 2 workers".into(), samples()?.num_workers(2)),
            Contender::source(
                "DataLoader, mirrored at random, 0 workers".into(),
                DataLoader::new(mirrored(&floats, &labels)?, size)?.shuffle(1),
            ),
            Contender::source(
                "DataLoader, mirrored at random, 2 workers".into(),
                DataLoader::new(mirrored(&floats, &labels)?, size)?.shuffle(1).num_workers(2),
            ),
        ];
        for round in 0..=ROUNDS {
            for contender in &mut contenders {
                let start = Instant::now();
                let samples = (contender.pass)(round)?;
                let time = start.elapsed().as_nanos() as f64 / samples as f64;
                anyhow::ensure!(samples == SAMPLES, "{}: {samples} samples", contender.name);
                // The first round only warms up.
                if round > 0 {
                    contender.times.push(time);
                }
            }
        }
        println!("\nbatches of {size}");
        for contender in &mut contenders {
            contender.times.sort_by(f64::total_cmp);
            let (best, median) = (contender.times[0], contender.times[contender.times.len() / 2]);
            println!("{best:8.0} {median:8.0}  {}", contender.name);
        }
    }
    Ok(())
}

fn mirrored(
    floats: &Tensor,
    labels: &Tensor,
) -> anyhow::Result<impl Dataset<Item = Batch> + 'static> {
    let mirror = |(x, y): Batch, rng: &mut tch_ignite::data::SplitMix64| {
        Ok((if rng.uniform() < 0.5 { x.f_flip([2])? } else { x }, y))
    };
    Ok(TensorDataset::new(floats, labels)?.map(mirror))
}
