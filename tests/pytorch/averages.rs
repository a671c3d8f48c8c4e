//! Averages of weights go on here as torch's `AveragedModel` would, and back.

use anyhow::Result;
use tch::nn::{self, VarStore};
use tch::{Device, Tensor};
use tch_ignite::handlers::{EMAHandler, SWAHandler};
use tch_ignite::pytorch::{self, Dict, Names, TrainingFile, Value};

use super::{python, serial};

fn made() -> VarStore {
    let mut vs = VarStore::new(Device::Cpu);
    let _ = nn::linear(vs.root() / "fc", 2, 3, Default::default());
    let _ = nn::batch_norm1d(vs.root() / "bn", 3, Default::default());
    vs.double();
    vs
}

/// Gives all variables a value of the iteration.
fn set(vs: &VarStore, iteration: i64) {
    tch::no_grad(|| {
        vs.variables()
            .values_mut()
            .for_each(|tensor| drop(tensor.fill_((iteration * iteration) as f64 * 0.1)));
    });
}

fn sum(averages: &[(String, Tensor)]) -> Result<f64> {
    let sums = averages.iter().map(|(_, average)| Ok(f64::try_from(average.sum(None))?));
    sums.sum()
}

const MODELS: &str = r#"
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
net = torch.nn.ModuleDict({"fc": torch.nn.Linear(2, 3), "bn": torch.nn.BatchNorm1d(3)}).double()
models = {"ema": AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9)), "swa": AveragedModel(net)}
def run(begin, end):
    sums = []
    for iteration in range(begin, end):
        with torch.no_grad():
            for tensor in net.state_dict().values():
                tensor.fill_(iteration * iteration * 0.1)
        for model in models.values():
            model.update_parameters(net)
        sums.append([sum(t.sum().item() for name, t in model.state_dict().items() if "num" not in name and "n_av" not in name)
                     for model in models.values()])
    return sums
"#;

#[test]
fn averages_go_on_here_and_back_in_python() -> Result<()> {
    let _guard = serial();
    let folder = tempfile::tempdir()?;
    let (path, back) = (folder.path().join("there.pt"), folder.path().join("here.pt"));
    let script = format!(
        "{MODELS}{}",
        r#"
run(0, 4)
torch.save({name: model.state_dict() for name, model in models.items()}, sys.argv[1])
print(json.dumps(run(4, 12)))
"#
    );
    let Some(output) = python(&script, &[&path])? else { return Ok(()) };
    let expected: Vec<[f64; 2]> = serde_json::from_str(&output)?;
    let saved = TrainingFile::read(&path)?;
    let [(_, of_ema), (_, of_swa)] = saved.models() else { panic!("{saved}") };
    let vs = made();
    let (ema, swa) = (EMAHandler::decay(&vs, 0.9)?, SWAHandler::new(&vs)?);
    let loaded = pytorch::load_ema(&ema, of_ema, &Names::new())?;
    assert_eq!(
        (loaded.loaded.len(), loaded.unexpected),
        (6, vec!["bn.num_batches_tracked".into()])
    );
    pytorch::load_swa(&swa, of_swa, &Names::new())?;
    assert_eq!((ema.updates(), swa.n_averaged()), (4, 4));
    let mut ours = vec![];
    for iteration in 4..8 {
        set(&vs, iteration);
        ema.update()?;
        swa.update()?;
        ours.push([sum(&ema.averages())?, sum(&swa.averages())?]);
    }
    let mut checkpoint = Dict::new();
    checkpoint.insert("ema", pytorch::ema_value(&ema, &Names::new())?);
    checkpoint.insert("swa", pytorch::swa_value(&swa, &Names::new())?);
    pytorch::write(&back, &checkpoint.into())?;
    let script = format!(
        "{MODELS}{}",
        r#"
saved = torch.load(sys.argv[1], weights_only=True)
for name, model in models.items():
    model.load_state_dict(saved[name])
    assert model.n_averaged == 8
print(json.dumps(run(8, 12)))
"#
    );
    let Some(output) = python(&script, &[&back])? else { return Ok(()) };
    ours.extend(serde_json::from_str::<Vec<[f64; 2]>>(&output)?);
    assert_eq!(ours.len(), expected.len());
    for (ours, expected) in ours.iter().flatten().zip(expected.iter().flatten()) {
        assert!((ours - expected).abs() <= 1e-11, "{ours} instead of {expected}");
    }
    Ok(())
}

#[test]
fn averages_that_do_not_fit_are_refused_and_change_nothing() -> Result<()> {
    let vs = made();
    let (ema, swa) = (EMAHandler::decay(&vs, 0.9)?, SWAHandler::new(&vs)?);
    set(&vs, 1);
    let before = (sum(&ema.averages())?, sum(&swa.averages())?);
    let saved = pytorch::swa_value(&swa, &Names::new())?;
    let with = |key: &str, value: Value| -> Value {
        let mut dict = saved.as_dict().cloned().unwrap_or_default();
        dict.insert(key, value);
        dict.into()
    };
    let number = |number: f64| Value::tensor(&Tensor::from(number));
    for (saved, reason) in [
        (with("n_averaged", Value::None), "it has no n_averaged"),
        (with("n_averaged", number(-1.)?), "n_averaged is -1"),
        (with("n_averaged", number(0.5)?), "n_averaged is 0.5"),
        (with("module.fc.bias", number(1.)?), "fc.bias is [3] here and [] in the file"),
        (3.into(), "it has no n_averaged"),
    ] {
        let error = pytorch::load_swa(&swa, &saved, &Names::new()).unwrap_err().to_string();
        assert!(error.contains(reason), "{error}");
    }
    let error = pytorch::load_ema(&ema, &saved, &Names::new()).unwrap_err().to_string();
    assert!(error.contains("no averages yet"), "{error}");
    let error =
        pytorch::load_swa(&swa, &saved, &Names::new().skip("fc.*")).unwrap_err().to_string();
    assert!(error.contains("not in the file: fc.bias, fc.weight"), "{error}");
    {
        let _swapped = swa.swap()?;
        let error = pytorch::swa_value(&swa, &Names::new()).unwrap_err().to_string();
        assert!(error.contains("swapped in"), "{error}");
    }
    assert_eq!((sum(&ema.averages())?, sum(&swa.averages())?), before);
    assert_eq!(swa.n_averaged(), 0);
    Ok(())
}
