//! Tests of parameters in bf16: windows of several batches, plans, and evaluation by the ready trainer.

use tch::nn::VarStore;
use tch::{Device, Kind, Tensor};
use tch_ignite::GradientAccumulator;
use tch_ignite::checkpoint::{SavedGradients, Stateful};
use tch_ignite::optim::{GroupOptions, LowPrecision, Optimizer};
use tch_ignite::pytorch;

const ALL: [Option<LowPrecision>; 4] = [
    None,
    Some(LowPrecision::MasterWeights),
    Some(LowPrecision::KahanSum),
    Some(LowPrecision::StochasticRounding { seed: 1 }),
];

fn store() -> (VarStore, Tensor) {
    let mut vs = VarStore::new(Device::Cpu);
    vs.set_kind(Kind::BFloat16);
    let p = vs.root().zeros("p", &[2]);
    (vs, p)
}

/// The batches of one window.
fn accumulate(
    p: &Tensor,
    optimizer: &Optimizer,
    accumulator: &mut GradientAccumulator,
    gradients: &[f64],
) -> tch_ignite::Result<()> {
    for gradient in gradients {
        let window = accumulator.next_window();
        accumulator.begin(optimizer, window)?;
        let loss = (p * *gradient).sum(Kind::BFloat16);
        if accumulator.backward(optimizer, &loss, 1)? {
            optimizer.step()?;
        }
    }
    Ok(())
}

#[test]
fn windows_add_up_gradients_in_f32() {
    for storage in ALL {
        for fused in [true, false] {
            let (vs, p) = store();
            let optimizer = Optimizer::sgd(&vs).lr(1.).low_precision(storage).build().unwrap();
            optimizer.set_fused(fused).unwrap();
            let mut accumulator = GradientAccumulator::new(4).unwrap();
            accumulate(&p, &optimizer, &mut accumulator, &[1024., 4., 4., 4.]).unwrap();
            // In bf16, 256 + 1 is 256.
            let (sum, kind) = match storage {
                Some(_) => (259., Kind::Float),
                None => (256., Kind::BFloat16),
            };
            assert_eq!((p.grad().double_value(&[0]), p.grad().kind()), (sum, kind), "{storage:?}");
            if storage == Some(LowPrecision::MasterWeights) {
                assert_eq!(optimizer.state("p").unwrap()[0].1.double_value(&[0]), -259.);
            }
        }
    }
}

/// A checkpoint within a window has gradients in f32, and goes on from them.
#[test]
fn gradients_in_f32_are_saved() {
    let (vs, p) = store();
    let build = |vs: &VarStore| {
        let storage = LowPrecision::KahanSum;
        Optimizer::sgd(vs).lr(1.).low_precision(storage).build().unwrap()
    };
    let optimizer = build(&vs);
    let mut accumulator = GradientAccumulator::new(4).unwrap();
    accumulate(&p, &optimizer, &mut accumulator, &[1024., 4.]).unwrap();

    let (other, q) = store();
    let resumed = build(&other);
    let mut going_on = GradientAccumulator::new(4).unwrap();
    SavedGradients::of(&other)
        .load_state_dict(SavedGradients::of(&vs).state_dict().unwrap())
        .unwrap();
    going_on.load_state_dict(accumulator.state_dict().unwrap()).unwrap();
    assert_eq!(q.grad().double_value(&[0]), 257.);
    accumulate(&q, &resumed, &mut going_on, &[4., 4.]).unwrap();
    assert_eq!(q.grad().double_value(&[0]), 259.);
    assert_eq!(q.double_value(&[0]), -260., "-259 rounded to bf16");
}

/// A batch whose gradients cannot be widened has failed, and the next one begins a window.
#[test]
fn a_batch_that_fails_counts_no_more() {
    let (vs, p) = store();
    let storage = LowPrecision::KahanSum;
    let optimizer = Optimizer::sgd(&vs).lr(1.).low_precision(storage).build().unwrap();
    let mut accumulator = GradientAccumulator::new(2).unwrap();
    let window = accumulator.next_window();
    accumulator.begin(&optimizer, window).unwrap();
    let loss = (&p * 64.).sum(Kind::BFloat16);
    // While it is lent out, the optimizer widens nothing.
    let failed = optimizer.with_tch(|_| accumulator.backward(&optimizer, &loss, 1)).unwrap();
    assert!(failed.is_err());
    accumulate(&p, &optimizer, &mut accumulator, &[1., 3.]).unwrap();
    assert_eq!(p.grad().double_value(&[0]), 2.);
    assert_eq!(p.double_value(&[0]), -2.);
}

#[test]
fn gradients_are_widened_by_hand() {
    let (vs, p) = store();
    let optimizer = Optimizer::sgd(&vs).lr(1.).build().unwrap();
    for gradient in [256., 1., 1., 1.] {
        (&p * gradient).sum(Kind::BFloat16).backward();
        optimizer.gradients().unwrap().widen().unwrap();
    }
    assert_eq!(p.grad().double_value(&[0]), 259.);
    assert_eq!(optimizer.clip_grad_norm(1.).unwrap().kind(), Kind::Float);
}

#[cfg(feature = "toml")]
#[test]
fn plans_say_how_parameters_are_stored() {
    use tch::nn;
    use tch_ignite::optim::OptimizerPlan;

    let text = r#"
        [optimizer]
        type = "AdamW"
        low_precision = { stochastic_rounding = { seed = 9 } }

        [[optimizer.group]]
        name = "weights"
        suffix = "weight"
        low_precision = "master_weights"

        [[optimizer.group]]
        name = "biases"
        suffix = "bias"
        low_precision = "none"

        [[optimizer.group]]
        name = "rest"
    "#;
    let mut vs = VarStore::new(Device::Cpu);
    vs.set_kind(Kind::BFloat16);
    nn::linear(vs.root() / "fc", 2, 2, Default::default());
    let rest = vs.root().zeros("rest", &[2]);
    let plan = OptimizerPlan::from_toml(text).unwrap();
    let optimizer = plan.build(&vs).unwrap();
    let of = |group: &str| optimizer.group(group).unwrap().low_precision();
    assert_eq!(of("weights"), Some(LowPrecision::MasterWeights));
    assert_eq!(of("biases"), None);
    assert_eq!(of("rest"), Some(LowPrecision::StochasticRounding { seed: 9 }));
    let loss = vs.variables().values().map(|p| p.sum(Kind::Float)).sum::<Tensor>();
    optimizer.backward_step(&loss).unwrap();
    let last = |parameter: &str| optimizer.state(parameter).unwrap().pop().unwrap();
    assert_eq!(last("fc.weight").0, "master");
    assert_eq!((last("fc.bias").0, last("fc.bias").1.kind()), ("exp_avg_sq", Kind::BFloat16));
    assert_eq!((last("rest").0, rest.kind()), ("rounding", Kind::BFloat16));
    let written = serde_json::to_string(&plan).unwrap();
    assert_eq!(OptimizerPlan::from_json(&written).unwrap(), plan);

    for (wrong, says) in [
        (r#""kahan""#, "unknown variant `kahan`"),
        ("true", "optimizer.low_precision"),
        ("{ stochastic_rounding = { sed = 9 } }", "unknown field `sed`"),
        (r#""stochastic_rounding""#, "optimizer.low_precision"),
    ] {
        let text = format!("[optimizer]\ntype = \"SGD\"\nlow_precision = {wrong}");
        let error = OptimizerPlan::from_toml(&text).unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    }
    let text = "[optimizer]\ntype = \"LBFGS\"\nlow_precision = \"kahan_sum\"";
    let error = OptimizerPlan::from_toml(text).unwrap().build(&vs).unwrap_err().to_string();
    assert!(error.contains("LBFGS") && error.contains("low precision"), "{error}");
}

#[test]
fn files_of_pytorch_are_refused() {
    let (vs, _) = store();
    let storage = LowPrecision::MasterWeights;
    let mut optimizer = Optimizer::adamw(&vs).low_precision(storage).build().unwrap();
    let error = pytorch::optimizer_value(&optimizer, &[]).unwrap_err().to_string();
    assert!(error.contains("low_precision"), "{error}");
    let plain = Optimizer::adamw(&vs).build().unwrap();
    let saved = pytorch::optimizer_value(&plain, &[]).unwrap();
    let error = pytorch::load_optimizer(&mut optimizer, &saved, &[]).unwrap_err().to_string();
    assert!(error.contains("low_precision"), "{error}");

    // The same program in f32 has no such state.
    let vs = VarStore::new(Device::Cpu);
    let p = vs.root().ones("p", &[2]);
    let mut optimizer = Optimizer::adamw(&vs).low_precision(storage).build().unwrap();
    optimizer.backward_step(&p.sum(Kind::Float)).unwrap();
    let saved = pytorch::optimizer_value(&optimizer, &[]).unwrap();
    pytorch::load_optimizer(&mut optimizer, &saved, &[]).unwrap();
}

/// Settings of a run say how parameters are stored, so a changed option is told when it is resumed.
#[test]
fn the_storage_is_a_setting() {
    let (vs, _) = store();
    let optimizer = Optimizer::sgd(&vs)
        .name_group(0, "all", GroupOptions::new().low_precision(LowPrecision::KahanSum))
        .build()
        .unwrap();
    assert_eq!(optimizer.settings()["all.low_precision"], "kahan_sum");
}
