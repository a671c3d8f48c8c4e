//! Tests that ranks in Rust and ranks in Python, with torch's own `DistributedDataParallel`, can train in one group.
//!
//! `TORCH_PYTHON` names a Python whose torch has the version of our libtorch; it is `python3` unless set.

use std::process::Command;
use std::time::Duration;

use tch::nn::{self, Module, VarStore};
use tch::{Device, Kind, Reduction, Tensor};
use tch_ignite::distributed::{
    DdpOptions, DistributedDataParallel, ProcessGroup, ProcessGroupOptions,
};
use tch_ignite::optim::Optimizer;

use crate::common::python;
use crate::data_parallel::{data, print, printed};
use crate::ranks::{Ranks, role};

const STEPS: i64 = 12;
const LOCAL: i64 = 8;

fn train() {
    tch::set_num_threads(1);
    let options = ProcessGroupOptions::new().timeout(Duration::from_secs(30)).python_peers(true);
    let pg = ProcessGroup::from_env(options).unwrap();
    let mut vs = VarStore::new(Device::Cpu);
    let layer = |name: &str, from, to| nn::linear(vs.root() / name, from, to, Default::default());
    let net = nn::seq().add(layer("a", 6, 16)).add_fn(|x| x.tanh()).add(layer("b", 16, 1));
    vs.double();
    let parameters = vs.trainable_variables();
    tch::no_grad(|| {
        for (index, parameter) in parameters.iter().enumerate() {
            let values = Tensor::arange(parameter.numel() as i64, (Kind::Double, Device::Cpu));
            let values = (values + index as f64).sin().view_as(parameter) * 0.3;
            parameter.shallow_clone().copy_(&values);
        }
    });
    let options = DdpOptions::new().bucket_cap_mb(0.0005);
    let ddp = DistributedDataParallel::new(&pg, &vs, options).unwrap();
    let momentum = nn::Sgd { momentum: 0.9, ..Default::default() };
    let optimizer = Optimizer::builder(momentum, &vs).lr(0.05).build().unwrap();
    let (x, y) = data(Kind::Double);
    let (rank, world) = (pg.rank() as i64, pg.world_size() as i64);
    for step in 0..STEPS {
        let begin = (step * LOCAL * world) % 96 + rank * LOCAL;
        let y_pred = ddp.forward(|| net.forward(&x.narrow(0, begin, LOCAL))).unwrap();
        optimizer.zero_grad().unwrap();
        ddp.backward(&y_pred.mse_loss(&y.narrow(0, begin, LOCAL), Reduction::Mean)).unwrap();
        optimizer.step().unwrap();
    }
    let rows: Vec<_> = parameters.iter().map(|tensor| tensor.detach().reshape([-1])).collect();
    print("interop", &Tensor::cat(&rows, 0));
    assert!(pg.barrier().unwrap_err().to_string().contains("ranks in Python"));
}

#[test]
fn python_and_rust_train_in_one_group() {
    const NAME: &str = "interop::python_and_rust_train_in_one_group";
    if role().is_some() {
        return train();
    }
    let Some(python) = python(NAME, "TORCH_PYTHON", "torch.distributed") else { return };
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/distributed/peer.py");
    // In these texts each letter is a rank: r in Rust, p in Python.
    let mut results = vec![];
    for group in ["rr", "pp", "rp", "pr", "rppr"] {
        let is_python = |rank: usize| group.as_bytes()[rank] == b'p';
        let outputs = Ranks::start_some(NAME, group, group.len(), |rank| {
            is_python(rank).then(|| {
                let mut command = Command::new(&python);
                command.arg(script);
                command
            })
        });
        let outputs = outputs.succeed();
        let values: Vec<_> = outputs.iter().map(|output| printed(output).remove(0).1).collect();
        for rank in 1..group.len() {
            assert!(values[rank] == values[0], "{group}: rank {rank} has other bits");
        }
        results.push((group, values[0].clone()));
    }
    let two = |group: &str| &results.iter().find(|(name, _)| *name == group).unwrap().1;
    for group in ["pp", "rp", "pr"] {
        let difference =
            two("rr").iter().zip(two(group)).map(|(a, b)| (a - b).abs()).fold(0., f64::max);
        println!("rr and {group}: {difference:e}");
        assert!(difference < 1e-12, "{group}: {difference}");
    }
}
