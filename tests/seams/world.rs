//! The things that both the engine and the textbook's loop get: data, the model's formula, its first parameters, and
//! the planted breaks.

use tch::{Device, Kind, Tensor};
use tch_ignite::data::permutation;

use super::program::{At, Break, Data, Model, Place, Program, Weights};

const INPUTS: i64 = 3;

fn waves(count: i64, phase: f64) -> Tensor {
    ((Tensor::arange(count, (Kind::Double, Device::Cpu)) + phase) * 0.7).sin()
}

/// Makes inputs and targets.
pub fn samples(count: usize, seed: u64) -> (Tensor, Tensor) {
    let (count, phase) = (count as i64, seed as f64 * 1.3);
    (waves(count * INPUTS, phase).view([count, INPUTS]), waves(count, phase * 1.7).view([count, 1]))
}

/// The names and first values of the parameters. Two names may share one tensor.
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
        Model::Table => {
            vec![("out.bias", first(1, &[1])), ("table.weight", first(2, &[INPUTS + 1, 1]))]
        }
    }
}

/// The prediction of a model, whose parameters are in the order of [`parameters`].
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
        (Model::Table, [bias, table]) => {
            let rows = Tensor::arange(INPUTS, (Kind::Int64, Device::Cpu));
            x.matmul(&Tensor::embedding(table, &rows, -1, false, true)) + bias
        }
        _ => unreachable!("the parameters of another model"),
    }
}

/// Whether a parameter is in group 1, if there are two groups.
pub fn is_bias(name: &str) -> bool {
    name.ends_with("bias")
}

/// The samples of a pass of a loader, in order. The ranks take them in turns, and the first samples are repeated
/// until all ranks have equally many.
pub fn order(program: &Program, pass: u64) -> Vec<i64> {
    let (samples, ranks) = (program.samples, program.ranks);
    let order = match &program.data {
        Data::Loader { shuffle: Some(seed), .. } => permutation(samples, *seed, pass),
        _ => (0..samples as i64).collect(),
    };
    order.iter().cycle().take(samples.next_multiple_of(ranks)).copied().collect()
}

/// The samples of each batch, if the program's data lists batches.
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
    /// Whether the break is to happen here and now.
    pub fn is_due(&self, place: Place, epoch: u64, iteration: u64) -> bool {
        let number = match place {
            Place::In(at) if at.is_of_epochs() => epoch,
            _ => iteration,
        };
        self.place == place && self.number == number
    }
}

/// The loss, and the number of samples or tokens that it is a mean over. The number of tokens of each sample is
/// computed from its target.
pub fn loss(program: &Program, prediction: &Tensor, y: &Tensor) -> (Tensor, Tensor) {
    let errors = (prediction - y).square();
    let tokens = match program.weights {
        Weights::BySamples | Weights::Equally => y.ones_like(),
        Weights::ByTokens | Weights::ByTokensInATensor => (y.abs() * 3.).floor() + 1.,
    };
    let all = tokens.sum(Kind::Double);
    ((errors * tokens).sum(Kind::Double) / &all, all)
}

/// A random factor for the loss.
pub fn noise() -> Tensor {
    Tensor::rand([], (Kind::Double, Device::Cpu)) + 0.5
}

/// Whether the loss of this iteration is infinite.
pub fn overflows(program: &Program, iteration: u64) -> bool {
    program.scaler.as_ref().is_some_and(|scaler| scaler.overflows.contains(&iteration))
}

/// The events at which values are recorded.
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
