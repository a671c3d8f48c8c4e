//! What both sides are given: data, the model's formula, its first parameters, and what is about to go
//! wrong.

use tch::{Device, Kind, Tensor};
use tch_ignite::data::permutation;

use super::program::{At, Break, Data, Model, Place, Program, Weights};

const INPUTS: i64 = 3;

fn waves(count: i64, phase: f64) -> Tensor {
    ((Tensor::arange(count, (Kind::Double, Device::Cpu)) + phase) * 0.7).sin()
}

/// Inputs and targets.
pub fn samples(count: usize, seed: u64) -> (Tensor, Tensor) {
    let (count, phase) = (count as i64, seed as f64 * 1.3);
    (waves(count * INPUTS, phase).view([count, INPUTS]), waves(count, phase * 1.7).view([count, 1]))
}

/// Names and first values of the parameters. Two names may have one tensor.
pub fn parameters(model: Model, seed: u64) -> Vec<(&'static str, Tensor)> {
    let first = |place: u64, shape: &[i64]| {
        let phase = (seed * 10 + place) as f64 * 2.1;
        waves(shape.iter().product(), phase).view(shape) * 0.5
    };
    match model {
        Model::Linear => vec![("fc.bias", first(1, &[1])), ("fc.weight", first(2, &[1, INPUTS]))],
        Model::TwoLayers => vec![
            ("a.bias", first(1, &[INPUTS])),
            ("a.weight", first(2, &[INPUTS, INPUTS])),
            ("b.bias", first(3, &[1])),
            ("b.weight", first(4, &[1, INPUTS])),
        ],
        Model::Tied => {
            let shared = first(1, &[INPUTS, INPUTS]);
            vec![
                ("emb.weight", shared.shallow_clone()),
                ("head.weight", shared),
                ("out.bias", first(2, &[1])),
            ]
        }
    }
}

/// The prediction, of parameters in the order of [`parameters`].
pub fn forward(model: Model, parameters: &[Tensor], x: &Tensor) -> Tensor {
    match (model, parameters) {
        (Model::Linear, [bias, weight]) => x.matmul(&weight.tr()) + bias,
        (Model::TwoLayers, [a_bias, a, b_bias, b]) => {
            (x.matmul(&a.tr()) + a_bias).tanh().matmul(&b.tr()) + b_bias
        }
        (Model::Tied, [embedding, head, bias]) => {
            let hidden = x.matmul(embedding).tanh().matmul(&head.tr());
            hidden.sum_dim_intlist(1i64, true, Kind::Double) + bias
        }
        _ => unreachable!("the parameters of another model"),
    }
}

/// Whether a parameter is in group 1, where there are two.
pub fn is_bias(name: &str) -> bool {
    name.ends_with("bias")
}

/// The samples of a pass of a loader, in order: of all ranks in turns, each of which has as many.
pub fn order(program: &Program, pass: u64) -> Vec<i64> {
    let (samples, ranks) = (program.samples, program.ranks);
    let order = match &program.data {
        Data::Loader { shuffle: Some(seed), .. } => permutation(samples, *seed, pass),
        _ => (0..samples as i64).collect(),
    };
    order.iter().cycle().take(samples.next_multiple_of(ranks)).copied().collect()
}

/// The samples of each batch, where batches are listed.
pub fn listed(program: &Program) -> Vec<Vec<i64>> {
    let (Data::Batches(sizes) | Data::Restartable(sizes) | Data::Stream(sizes)) = &program.data
    else {
        return vec![];
    };
    let mut next = 0..;
    let mut take = |size: &usize| {
        next.by_ref().take(*size).map(|index| index % program.samples as i64).collect()
    };
    sizes.iter().map(&mut take).collect()
}

impl Break {
    /// Whether it is to happen here and now.
    pub fn is_due(&self, place: Place, epoch: u64, iteration: u64) -> bool {
        let number = match place {
            Place::In(at) if at.is_of_epochs() => epoch,
            _ => iteration,
        };
        self.place == place && self.number == number
    }
}

/// The loss, and over how much it is a mean: over samples, or over the tokens that each sample is said to have.
pub fn loss(program: &Program, prediction: &Tensor, y: &Tensor) -> (Tensor, Tensor) {
    let errors = (prediction - y).square();
    let tokens = match program.weights {
        Weights::BySamples | Weights::Equally => y.ones_like(),
        Weights::ByTokens | Weights::ByTokensInATensor => (y.abs() * 3.).floor() + 1.,
    };
    let all = tokens.sum(Kind::Double);
    ((errors * tokens).sum(Kind::Double) / &all, all)
}

/// A random factor.
pub fn noise() -> Tensor {
    Tensor::rand([], (Kind::Double, Device::Cpu)) + 0.5
}

/// Whether the loss of this iteration is infinite.
pub fn overflows(program: &Program, iteration: u64) -> bool {
    program.scaler.as_ref().is_some_and(|scaler| scaler.overflows.contains(&iteration))
}

/// Events of which there is a record.
pub const RECORDED: [At; 8] = [
    At::Started,
    At::EpochStarted,
    At::IterationCompleted,
    At::DataloaderStopIteration,
    At::TerminateSingleEpoch,
    At::EpochCompleted,
    At::Terminate,
    At::Completed,
];
