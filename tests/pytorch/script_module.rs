//! TorchScript modules: parameters and buffers are in the store, the mode follows step and evaluation.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use tch::nn::{ModuleT, VarStore};
use tch::{Device, Kind, Tensor};
use tch_ignite::data::Loader;
use tch_ignite::engine::{Event, Trainer, Until};
use tch_ignite::handlers::EMAHandler;
use tch_ignite::optim::Optimizer;
use tch_ignite::pytorch::{Reader, ScriptModule};
use tch_ignite::supervised::{Supervised, create_supervised_evaluator, create_supervised_trainer};

use super::{python, serial, values};

fn file() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/script/net.pt")
}

fn batches() -> Result<(Tensor, Tensor)> {
    let x = (Tensor::arange(80, (Kind::Double, Device::Cpu)) * 0.37).sin().view([20, 4]);
    Ok((x, Tensor::arange(20, (Kind::Int64, Device::Cpu)).remainder(3)))
}

fn loss(logits: &Tensor, y: &Tensor) -> Tensor {
    logits.cross_entropy_loss::<Tensor>(y, None, tch::Reduction::Mean, -100, 0.)
}

type Context = Supervised<ScriptModule>;

fn context() -> Result<(VarStore, Context)> {
    let vs = VarStore::new(Device::Cpu);
    let net = ScriptModule::load(file(), &vs.root())?;
    let optimizer = Optimizer::adam(&vs).build()?;
    Ok((vs, Supervised::new(net, optimizer, loss)))
}

#[test]
fn parameters_and_buffers_are_in_the_store_under_their_names() -> Result<()> {
    let _guard = serial();
    let (vs, cx) = context()?;
    let mut names: Vec<_> = vs.variables().into_keys().collect();
    names.sort();
    assert_eq!(
        names,
        [
            "body.0.bias",
            "body.0.weight",
            "body.1.bias",
            "body.1.num_batches_tracked",
            "body.1.running_mean",
            "body.1.running_var",
            "body.1.weight",
            "counted.calls",
            "counted.level",
            "fc.bias",
            "fc.weight",
            "scale",
        ]
    );
    assert_eq!(vs.trainable_variables().len(), 6);
    // In evaluation mode it has no dropout and leaves its buffers alone.
    let (x, _) = batches()?;
    let before = values(&vs);
    assert!(cx.net.forward_t(&x, false).equal(&cx.net.forward_ts(&[&x], false)?));
    assert_eq!(values(&vs), before);
    let _ = cx.net.forward_t(&x, true);
    let changed: Vec<_> = values(&vs)
        .into_iter()
        .zip(before)
        .filter(|(after, before)| after != before)
        .map(|((name, _), _)| name)
        .collect();
    let buffers = [
        "body.1.num_batches_tracked",
        "body.1.running_mean",
        "body.1.running_var",
        "counted.calls",
        "counted.level",
    ];
    assert_eq!(changed, buffers);
    // A value that is written into the store is in the module, too.
    let mut vs = vs;
    vs.float();
    let _ = cx.net.forward_ts(&[&x.to_kind(Kind::Float)], true)?;
    let _ = tch::no_grad(|| vs.variables()["counted.calls"].shallow_clone().fill_(40));
    let _ = cx.net.forward_ts(&[&x.to_kind(Kind::Float)], true)?;
    assert_eq!(i64::try_from(&vs.variables()["counted.calls"])?, 41);

    // A second one needs a path of its own, and is refused as a whole otherwise.
    let error = ScriptModule::load(file(), &vs.root()).unwrap_err().to_string();
    assert!(error.contains("there is a variable 'scale' already"), "{error}");
    assert_eq!(vs.len(), 12);
    ScriptModule::load(file(), &(vs.root() / "second"))?;
    assert!(vs.variables().contains_key("second.body.0.weight"));
    let error = ScriptModule::load("none.pt", &vs.root()).unwrap_err().to_string();
    assert!(error.contains("loading the module none.pt"), "{error}");
    let error = cx.net.forward_ts(&[], false).unwrap_err().to_string();
    assert!(error.contains("calling a TorchScript module"), "{error}");
    let error = Reader::new().read(file()).unwrap_err().to_string();
    assert!(error.contains("pytorch::ScriptModule"), "{error}");
    Ok(())
}

fn trainer<'a>(vs: &VarStore, cx: &Context) -> Result<(Trainer<'a, Context>, EMAHandler)> {
    let mut trainer = create_supervised_trainer();
    let ema = EMAHandler::new(vs, 0.1)?;
    trainer.track("model", vs).track("optimizer", &cx.optimizer).attach(ema.clone());
    trainer.on(Event::IterationCompleted.once(6), |_, engine| {
        engine.interrupt();
        Ok(())
    });
    Ok((trainer, ema))
}

#[test]
fn a_run_is_resumed_bit_for_bit() -> Result<()> {
    let _guard = serial();
    let (x, y) = batches()?;
    let data = Loader::new(&x, &y, 5)?.shuffle(3);
    tch::manual_seed(1);
    let (vs, mut cx) = context()?;
    let (mut whole, ema) = trainer(&vs, &cx)?;
    whole.run(&mut cx, &data, Until::epochs(4))?;
    let saved = whole.checkpoint(&cx)?.copy()?;
    whole.run(&mut cx, &data, Until::epochs(4))?;
    let expected = values(&vs);
    let calls = expected.iter().find(|(name, _)| name == "counted.calls").map(|(_, calls)| calls);
    assert_eq!(calls, Some(&vec![16.]));

    tch::manual_seed(2);
    let (vs, mut cx) = context()?;
    let (mut resumed, other) = trainer(&vs, &cx)?;
    resumed.restore(&mut cx, saved, true)?;
    resumed.run(&mut cx, &data, Until::epochs(4))?;
    assert_eq!(values(&vs), expected);
    drop((ema, other));
    Ok(())
}

#[test]
fn python_trains_the_same_module_to_the_same_numbers() -> Result<()> {
    let _guard = serial();
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("trained.pt");
    let vs = VarStore::new(Device::Cpu);
    let net = ScriptModule::load(file(), &vs.root())?;
    let optimizer = Optimizer::builder(tch::nn::sgd(0.9, 0., 0., false), &vs).build()?;
    optimizer.knob("lr")?.set(0.1)?;
    let mut cx = Supervised::new(net, optimizer, loss);
    let (x, y) = batches()?;
    let data = Loader::new(&x, &y, 5)?;
    // The numbers of dropout are libtorch's, as are Python's.
    tch::manual_seed(7);
    let mut trainer = create_supervised_trainer();
    trainer.run(&mut cx, &data, Until::epochs(3))?;
    let mut evaluator = create_supervised_evaluator();
    evaluator.run(&mut cx, &data, Until::epochs(1))?;
    let last = evaluator.state.output.as_ref().context("an output")?;
    let outputs = Vec::<f64>::try_from(last.y_pred.flatten(0, -1))?;
    cx.net.save(&path)?;
    let script = r#"
net = torch.jit.load(sys.argv[1])
assert net.training
torch._C._set_graph_executor_optimize(False)
optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.1, 0.9)
x = (torch.arange(80, dtype=torch.float64) * 0.37).sin().view(20, 4)
y = torch.arange(20) % 3
torch.manual_seed(7)
for _ in range(3):
    for begin in range(0, 20, 5):
        loss = torch.nn.functional.cross_entropy(net(x[begin:begin + 5]), y[begin:begin + 5])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
ours = torch.jit.load(sys.argv[2])
assert ours.training
state = ours.state_dict()
assert list(state) == list(net.state_dict())
worst = max((a.double() - b.double()).abs().max().item() for a, b in zip(net.state_dict().values(), state.values()))
net.eval(), ours.eval()
worst = max(worst, (net(x) - ours(x)).abs().max().item())
assert state["counted.calls"] == state["body.1.num_batches_tracked"] == 12
print(json.dumps([worst, net(x[15:]).flatten().tolist()]))
"#;
    let Some(output) = python(script, &[&file(), &path])? else { return Ok(()) };
    let (worst, expected): (f64, Vec<f64>) = serde_json::from_str(&output)?;
    assert!(worst <= 1e-12, "{worst}");
    assert_eq!(outputs.len(), expected.len());
    let worst = outputs.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0., f64::max);
    assert!(worst <= 1e-12, "{outputs:?} instead of {expected:?}");
    Ok(())
}
