//! Tests that nothing in a training step waits for a GPU. They run on the CPU, where libtorch's observers see the
//! same operations.

use anyhow::{Context, Result};
use tch::nn::{self, VarStore};
use tch::{Device, Kind, Reduction, Tensor};
use tch_ignite::data::Loader;
use tch_ignite::engine::{Event, Until};
use tch_ignite::handlers::EMAHandler;
use tch_ignite::host_syncs;
use tch_ignite::metrics::{Mean, RunningAverage};
use tch_ignite::optim::Optimizer;
use tch_ignite::schedule::{CosineAnnealing, LinearCyclical, ParamScheduler};
use tch_ignite::supervised::{OPTIMIZER_STEPPED, Supervised, create_supervised_trainer};

/// The operations that wait, in a run of `epochs` epochs of ten batches. Clipping, gradient scaling and
/// `TerminateOnNan` are left out: they read CPU tensors at once, because that costs nothing, and leave tensors of other
/// devices there.
fn waits(
    epochs: u64,
    build: fn(&VarStore) -> Result<Optimizer>,
    read: bool,
) -> Result<Vec<String>> {
    let vs = VarStore::new(Device::Cpu);
    let net = nn::seq()
        .add(nn::linear(vs.root() / "a", 4, 8, Default::default()))
        .add_fn(|x| x.relu())
        .add(nn::linear(vs.root() / "b", 8, 1, Default::default()));
    let optimizer = build(&vs)?;
    let group = optimizer.groups()?.pop().context("a group")?;
    // The loss has a weight that is a tensor and differs from batch to batch, so that on a GPU only the device knows
    // it.
    let mse = |y_pred: &Tensor, y: &Tensor| {
        (y_pred.mse_loss(y, Reduction::Mean), y.ge(0.).sum(Kind::Int64).clamp_min(1))
    };
    let mut cx = Supervised::new(net, optimizer.clone(), mse)
        .autocast(Kind::BFloat16)
        .accumulate(2)?
        .clip_grad_value(1.);
    let mut trainer = create_supervised_trainer();
    trainer
        .metric("loss", Mean::new())
        .metric("running", RunningAverage::new())
        .attach(EMAHandler::decay(&vs, 0.99)?)
        .attach(ParamScheduler::new("lr", group.knob("lr")?, CosineAnnealing::new(1e-2, 1e-3, 10)))
        .attach(
            ParamScheduler::new(
                "weight_decay",
                group.knob("weight_decay")?,
                LinearCyclical::new(1e-2, 1e-3, 10),
            )
            .on(OPTIMIZER_STEPPED),
        );
    if read {
        trainer.on(Event::IterationCompleted, |_, engine| {
            let _ = engine.state.output.as_ref().map(|loss| loss.double_value(&[]));
            Ok(())
        });
    }
    let x = (Tensor::arange(160, (Kind::Float, Device::Cpu)) * 0.1).sin().view([40, 4]);
    let y = x.sum_dim_intlist(1, true, Kind::Float);
    let data = Loader::new(&x, &y, 4)?.shuffle(1);
    let (summary, waits) = host_syncs(|| trainer.run(&mut cx, &data, Until::epochs(epochs)))?;
    assert_eq!(summary?.iterations, 10 * epochs);
    Ok(waits)
}

#[test]
fn iterations_do_not_wait() -> Result<()> {
    let builds: [fn(&VarStore) -> Result<Optimizer>; 4] = [
        |vs| Ok(Optimizer::sgd(vs).lr(0.1).build()?),
        |vs| Ok(Optimizer::adam(vs).build()?),
        |vs| Ok(Optimizer::adamw(vs).build()?),
        |vs| Ok(Optimizer::rms_prop(vs).build()?),
    ];
    for build in builds {
        assert_eq!(waits(2, build, false)?, [""; 0]);
        assert_eq!(waits(2, build, true)?.len(), 20);
    }
    Ok(())
}

#[test]
fn calls_do_not_nest_and_survive_panics() {
    let (inner, waits) = host_syncs(|| host_syncs(|| ()).map(drop)).unwrap();
    assert!(inner.unwrap_err().to_string().contains("within") && waits.is_empty());
    assert!(std::panic::catch_unwind(|| host_syncs(|| panic!("on purpose"))).is_err());
    let x = Tensor::from_slice(&[1f32, 2.]);
    let (_, waits) = host_syncs(|| x.double_value(&[0])).unwrap();
    assert_eq!(waits, ["aten::_local_scalar_dense"]);
    // A mask as an index makes the host wait too.
    let mask = Tensor::from_slice(&[true, false]);
    let (_, waits) = host_syncs(|| x.index(&[Some(mask)])).unwrap();
    assert_eq!(waits, ["aten::nonzero"]);
}
