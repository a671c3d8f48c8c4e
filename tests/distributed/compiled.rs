//! Ranks that train a model that PyTorch compiled.

use std::path::Path;

use tch::nn::VarStore;
use tch::{Device, Tensor};
use tch_ignite::compiled::CompiledModel;
use tch_ignite::distributed::{
    DdpOptions, DistributedDataParallel, ProcessGroup, ProcessGroupOptions,
};
use tch_ignite::optim::Optimizer;
use tch_ignite::supervised::Supervised;

use crate::data_parallel::{print, printed};
use crate::ranks::{Ranks, role};

#[path = "../../examples/conformance/compiled.rs"]
mod fixture;

/// Trains with 32 samples a step, half of them from each of two ranks; alone, in two batches.
fn train(pg: &ProcessGroup) -> Tensor {
    let package = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/compiled/mlp.pt2");
    let expected = fixture::Expected::beside(&package).unwrap();
    let folder = tempfile::tempdir().unwrap();
    expected.export(&package, folder.path()).unwrap();
    let vs = VarStore::new(Device::Cpu);
    let net = CompiledModel::load(folder.path(), &vs.root()).unwrap();
    if pg.rank() > 0 {
        // All must get the values of rank 0.
        tch::no_grad(|| {
            for mut variable in vs.trainable_variables() {
                let _ = variable.zero_();
            }
        });
    }
    let optimizer = Optimizer::sgd(&vs).lr(0.1).build().unwrap();
    let options = DdpOptions::new().bucket_cap_mb(0.0004);
    let ddp = DistributedDataParallel::new(pg, &vs, options).unwrap();
    let world = pg.world_size();
    let mut cx = Supervised::compiled(net, optimizer).clip_grad_norm(0.5).data_parallel(ddp);
    cx = cx.accumulate(2 / world as u64).unwrap();
    let (x, y) = (expected.tensor("x", None).unwrap(), expected.tensor("y", None).unwrap());
    for step in 0..20 {
        for part in 0..2 {
            if world == 1 || part == pg.rank() {
                let x = &x * (1. + 0.1 * f64::from(step)) - part as f64;
                let _ = cx.train_step((x, y.shallow_clone())).unwrap();
            }
        }
    }
    let parts: Vec<_> = expected.names().unwrap();
    let variables = vs.variables();
    Tensor::cat(&parts.iter().map(|n| variables[n].detach().flatten(0, -1)).collect::<Vec<_>>(), 0)
}

#[test]
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
fn two_ranks_train_a_compiled_model_as_one_does() {
    if role().is_some() {
        tch::set_num_threads(1);
        let options = ProcessGroupOptions::new().timeout(std::time::Duration::from_secs(30));
        let pg = ProcessGroup::from_env_or_single(options).unwrap();
        print("compiled", &train(&pg));
        return;
    }
    if let Err(error) = fixture::compare(
        &Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/compiled/mlp.pt2"),
    ) {
        assert!(error.to_string().contains("need a libtorch.so"), "{error}");
        return crate::common::skipped(format!("compiled models: {error}"));
    }
    let test = "compiled::two_ranks_train_a_compiled_model_as_one_does";
    let one = Ranks::start(test, "all", 1).succeed().remove(0);
    let two = Ranks::start(test, "all", 2).succeed();
    let values = |output: &str| printed(output).remove(0).1;
    assert_eq!(values(&two[0]), values(&two[1]));
    let (one, two) = (values(&one), values(&two[0]));
    let difference = one.iter().zip(&two).map(|(a, b)| (a - b).abs()).fold(0., f64::max);
    assert!(one.len() == two.len() && difference < 1e-6, "{difference:e}");
}
