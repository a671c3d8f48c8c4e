//! Ranks that train a model that PyTorch compiled.

use tch::nn::VarStore;
use tch::{Device, Tensor};
use tch_ignite::compiled::CompiledModel;
use tch_ignite::distributed::{
    DdpOptions, DistributedDataParallel, ProcessGroup, ProcessGroupOptions,
};
use tch_ignite::optim::Optimizer;
use tch_ignite::supervised::Supervised;

use crate::fixture::Expected;

#[allow(dead_code)] // The tests of distributed training use all of it.
#[path = "../distributed/ranks.rs"]
mod ranks;

use ranks::{Ranks, role};

/// Trains with 32 samples a step, half of them from each of two ranks; alone, in two batches. Returns the bits of all
/// parameters.
fn train(pg: &ProcessGroup) -> Vec<String> {
    let expected = Expected::beside(&super::package()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    expected.export(&super::package(), folder.path()).unwrap();
    let vs = VarStore::new(Device::Cpu);
    let net = CompiledModel::load(folder.path(), &vs.root()).unwrap();
    if pg.rank() > 0 {
        // All must get the values of rank 0.
        tch::no_grad(|| vs.trainable_variables().iter_mut().for_each(|v| drop(v.zero_())));
    }
    let optimizer = Optimizer::sgd(&vs).lr(0.1).build().unwrap();
    // Several buckets are sent while backward goes on.
    let options = DdpOptions::new().bucket_cap_mb(0.0004);
    let ddp = DistributedDataParallel::new(pg, &vs, options).unwrap();
    let world = pg.world_size();
    let mut cx = Supervised::compiled(net, optimizer).clip_grad_norm(0.5).data_parallel(ddp);
    cx = cx.accumulate(2 / world as u64).unwrap();
    let (x, y) = (expected.tensor("x", None).unwrap(), expected.tensor("y", None).unwrap());
    for step in 0..20 {
        for part in 0..2 {
            if world == 1 || part == pg.rank() {
                let x: Tensor = &x * (1. + 0.1 * f64::from(step)) - part as f64;
                let _ = cx.train_step((x, y.shallow_clone())).unwrap();
            }
        }
    }
    let values = super::values(&vs).into_iter().flat_map(|(_, values)| values);
    values.map(|value| format!("{:016x}", value.to_bits())).collect()
}

#[test]
fn two_ranks_train_a_compiled_model_as_one_does() {
    const NAME: &str = "ranks_train::two_ranks_train_a_compiled_model_as_one_does";
    if role().is_some() {
        tch::set_num_threads(1);
        let options = ProcessGroupOptions::new().timeout(std::time::Duration::from_secs(60));
        let pg = ProcessGroup::from_env_or_single(options).unwrap();
        println!("\nBITS {}", train(&pg).join(" "));
        return;
    }
    if super::folder().unwrap().is_none() {
        return;
    }
    let values = |output: &String| -> Vec<f64> {
        let bits = output.lines().find_map(|line| line.strip_prefix("BITS ")).unwrap();
        bits.split(' ').map(|b| f64::from_bits(u64::from_str_radix(b, 16).unwrap())).collect()
    };
    let one = values(&Ranks::start(NAME, "all", 1).succeed()[0]);
    let two = Ranks::start(NAME, "all", 2).succeed();
    assert_eq!(values(&two[0]), values(&two[1]));
    let differences = one.iter().zip(values(&two[0])).map(|(a, b)| (a - b).abs());
    let difference = differences.fold(0., f64::max);
    assert!(one.len() == 171 && difference < 1e-6, "{} {difference:e}", one.len());
}
