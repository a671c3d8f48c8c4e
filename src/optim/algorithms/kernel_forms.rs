//! Tests that the forms of the kernels, which differ from processor to processor, differ in no bit of their results.

use tch::nn::VarStore;
use tch::{Device, Kind, Tensor};

use super::tests::{all, values};
use crate::bridge::{Average, Pairs, in_kernel_forms, set_gradient, set_kernel_form};
use crate::optim::{GroupOptions, LowPrecision, Optimizer};
use crate::state::Stateful;

const KINDS: [Kind; 4] = [Kind::Double, Kind::Float, Kind::Half, Kind::BFloat16];

/// Whole vectors of every width, and a rest; more than one block of f16 and bf16.
const SHAPE: [i64; 2] = [67, 31];

/// The bytes of tensors, because a NaN is not equal to itself.
fn bytes(tensors: &[Tensor]) -> Vec<Vec<u8>> {
    let bytes = |tensor: &Tensor| {
        let tensor = tensor.detach().contiguous();
        crate::bridge::bytes(&tensor).unwrap().to_vec()
    };
    tensors.iter().map(bytes).collect()
}

/// Whether this processor has all instructions that kernels are compiled for.
fn has_all_instructions() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        false
    }
}

/// Fails if one of the forms gives other bytes than the first, and says so where there are no two to compare.
fn same_in(forms: &[&str], what: &str, run: impl FnMut() -> Vec<Tensor>) {
    let found = in_kernel_forms(forms, run);
    assert!(found.len() == forms.len() || !has_all_instructions(), "{what}: {} forms", found.len());
    let Some(((first, of_first), others)) = found.split_first() else {
        println!("SKIPPED: {what}: this processor runs none of {forms:?}");
        return;
    };
    if others.is_empty() {
        println!("SKIPPED: {what}: of {forms:?} this processor runs {first:?} alone");
    }
    let of_first = bytes(of_first);
    for (form, tensors) in others {
        assert!(bytes(tensors) == of_first, "{what}: {form:?} and {first:?}");
    }
}

#[test]
fn steps_have_the_same_bits_in_vectors_of_any_width() {
    let storages = [
        None,
        Some(LowPrecision::MasterWeights),
        Some(LowPrecision::KahanSum),
        Some(LowPrecision::StochasticRounding { seed: 7 }),
    ];
    for ((build, options), storage) in
        all().into_iter().flat_map(|each| storages.map(|storage| (each.clone(), storage)))
    {
        let name = build(&VarStore::new(Device::Cpu), options.clone()).name();
        let options = options.low_precision(if name == "SparseAdam" { None } else { storage });
        let kinds = if storage.is_some() { &KINDS[2..] } else { &KINDS[..] };
        for kind in kinds.iter().copied().filter(|_| name != "SparseAdam") {
            let run = || {
                let mut vs = VarStore::new(Device::Cpu);
                vs.set_kind(kind);
                let p = vs.root().add("p", values(&SHAPE, 1., kind), true);
                let optimizer = build(&vs, options.clone());
                for step in 0..3 {
                    set_gradient(&p, Some(&values(&SHAPE, f64::from(step), kind))).unwrap();
                    optimizer.step().unwrap();
                }
                let state = optimizer.state("p").unwrap().into_iter();
                [p.detach().copy()].into_iter().chain(state.map(|(_, t)| t.copy())).collect()
            };
            let what = format!("{name} in {kind:?} {storage:?}");
            same_in(&["avx2", "avx512vl", "avx512"], &what, run);
        }
    }
}

#[test]
fn averages_have_the_same_bits_in_vectors_of_any_width() {
    for kind in KINDS {
        let run = || {
            let (average, source) = (values(&SHAPE, 1., kind), values(&SHAPE, 2., kind));
            let mut pairs = Pairs::new([(&average, &source)].into_iter()).unwrap();
            for how in [Average::Lerp(0.3), Average::Mean(3.), Average::Swap, Average::Lerp(0.6)] {
                pairs.update(how).unwrap();
            }
            vec![average, source]
        };
        same_in(&["avx2", "avx512vl", "avx512"], &format!("{kind:?}"), run);
    }
}

#[test]
fn norms_and_clipping_have_the_same_bits_in_every_form() {
    let forms = [
        "avx2 no-prefetch",
        "avx2 prefetch",
        "avx512vl no-prefetch",
        "avx512vl prefetch",
        "avx512 no-prefetch",
        "avx512 prefetch",
    ];
    for kind in KINDS {
        // More than a chunk of work, with what is fetched ahead, and a rest.
        let size = (1 << 15) + 5003;
        for odd in [None, Some(f64::NAN), Some(f64::NEG_INFINITY)] {
            let run = || {
                let mut vs = VarStore::new(Device::Cpu);
                vs.set_kind(kind);
                let p = vs.root().zeros("p", &[size]);
                let gradient = values(&[size], 1., kind);
                if let Some(odd) = odd {
                    let _ = gradient.narrow(0, size - 3, 1).fill_(odd);
                }
                set_gradient(&p, Some(&gradient)).unwrap();
                let optimizer = Optimizer::sgd(&vs).build().unwrap();
                let gradients = optimizer.gradients().unwrap();
                let found = gradients.found_inf().unwrap();
                assert_eq!(found.double_value(&[0]) != 0., odd.is_some(), "{kind:?} {odd:?}");
                let two = gradients.norm().unwrap();
                let largest = gradients.order(f64::INFINITY).norm().unwrap();
                let _ = optimizer.clip_grad_norm(0.7).unwrap();
                optimizer.clip_grad_value(0.01).unwrap();
                vec![found, two, largest, gradient.copy()]
            };
            same_in(&forms, &format!("{kind:?} {odd:?}"), run);
        }
    }
}

#[test]
fn zeros_are_written_to_gradients_and_nothing_else() {
    for kind in KINDS {
        // As many as are written past the caches in each type, with ends in the middle of a line, and few.
        let streamed = (1 << 25) / kind.elt_size_in_bytes() as i64 + 7;
        for size in [streamed, 1000] {
            let found = in_kernel_forms(&["streaming", "no-streaming"], || {
                let mut vs = VarStore::new(Device::Cpu);
                vs.set_kind(kind);
                let p = vs.root().zeros("p", &[size]);
                let memory = Tensor::ones([size + 64], (kind, Device::Cpu));
                set_gradient(&p, Some(&memory.narrow(0, 3, size))).unwrap();
                let version = p.grad().internal_version();
                Optimizer::sgd(&vs).build().unwrap().zero_grad_in_place().unwrap();
                assert_eq!(p.grad().count_nonzero(None::<i64>).int64_value(&[]), 0);
                assert_eq!(memory.count_nonzero(None::<i64>).int64_value(&[]), 64);
                assert!(p.grad().internal_version() > version);
            });
            assert_eq!(found.len(), 2);
        }
    }
}

const CHILD: &str = "TCH_IGNITE_TEST_KERNELS_CHILD";

/// Runs tests of this program in a process of its own, because the variable is read once.
fn in_child(kernels: &str, tests: &[&str]) {
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .arg("--exact")
        .args(tests)
        .env(CHILD, "1")
        .env("TCH_IGNITE_KERNELS", kernels)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let passed = format!("{} passed", tests.len());
    assert!(output.status.success() && text.contains(&passed), "{text}");
}

/// The baseline is what a processor without AVX2 runs. It rounds products before it adds to them, so its bits are its
/// own, and it must not run beside other tests of this process.
#[test]
fn the_baseline_computes_what_the_loop_computes() {
    in_child(
        "baseline",
        &[
            "optim::algorithms::tests::fused_steps_agree_with_the_loop",
            "optim::algorithms::tests::low_precision::fused_steps_compute_what_the_loop_computes",
            "optim::algorithms::tests::low_precision::fused_steps_store_what_the_loop_stores",
        ],
    );
}

#[test]
fn wrong_words_are_errors() {
    if std::env::var_os(CHILD).is_none() {
        // The words come before the processor, which may not have these instructions.
        let error = set_kernel_form("avx512 wide").unwrap_err();
        assert!(error.contains("'wide'") && error.contains("no-streaming"), "{error}");
        let name = "optim::algorithms::kernel_forms::wrong_words_are_errors";
        return in_child("no-prefetch wide", &[name]);
    }
    let vs = VarStore::new(Device::Cpu);
    let all = [vs.root().ones("matrix", &[2, 2]), vs.root().ones("vector", &[3])];
    for p in &all {
        set_gradient(p, Some(&p.detach().ones_like())).unwrap();
    }
    // Muon is stepped by the loop, which comes before the kernels; Schedule-Free counts its steps before both.
    let muon = Optimizer::muon(&vs)
        .group("matrices", |name| name == "matrix", GroupOptions::new())
        .group("others", |name| name == "vector", GroupOptions::adamw());
    for optimizer in [
        Optimizer::sgd(&vs).lr(1.).build().unwrap(),
        Optimizer::sgd_schedule_free(&vs).lr(1.).build().unwrap(),
        muon.build().unwrap(),
    ] {
        let before = optimizer.state_dict().unwrap();
        for _ in 0..2 {
            let error = optimizer.step().unwrap_err().to_string();
            assert!(error.contains("TCH_IGNITE_KERNELS") && error.contains("'wide'"), "{error}");
            for p in &all {
                assert_eq!(p.detach(), p.detach().ones_like());
            }
            assert!(optimizer.state_dict().unwrap().is_like(&before), "{}", optimizer.name());
        }
    }
}
