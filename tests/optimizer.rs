//! Probes.
use std::panic::{AssertUnwindSafe, catch_unwind};
use tch::{Device, Kind, Tensor, nn, nn::OptimizerConfig};
use tch_ignite::optim::*;

fn vs2() -> (nn::VarStore, Tensor, Tensor) {
    let mut vs = nn::VarStore::new(Device::Cpu);
    vs.set_kind(Kind::Double);
    let a = (vs.root() / "a").ones("w", &[1]);
    let b = (vs.root() / "b").ones("w", &[1]);
    (vs, a, b)
}
fn bw(o: &Optimizer, t: &Tensor) -> String {
    format!(
        "{:?}",
        catch_unwind(AssertUnwindSafe(|| o
            .backward_step(&(t * 2.).sum(Kind::Double))
            .map_err(|e| e.to_string())))
    )
}

#[test]
fn q1_swap() {
    let (vs, a, _) = vs2();
    let o = Optimizer::sgd(&vs).lr(0.1).build().unwrap();
    let mut other = nn::Adam::default().build(&vs, 0.7).unwrap();
    o.with_tch(|t| std::mem::swap(t, &mut other)).unwrap();
    println!("swap: {:?} {:?}", o.group_at(0).unwrap().lr(), o.name());
    println!("{}", bw(&o, &a));
    a.print();
}
#[test]
fn q2_rms_momentum() {
    let (vs, a, _) = vs2();
    let o = Optimizer::rms_prop(&vs).lr(0.1).build().unwrap();
    println!("{}", bw(&o, &a));
    o.group_at(0).unwrap().set_momentum(0.9).unwrap();
    println!("rms momentum later: {}", bw(&o, &a));
    let (vs, a, _) = vs2();
    let o = Optimizer::rms_prop(&vs).lr(0.1).build().unwrap();
    println!("{}", bw(&o, &a));
    o.group_at(0).unwrap().set_centered(true).unwrap();
    println!("rms centered later: {}", bw(&o, &a));
    let (vs, a, _) = vs2();
    let o = Optimizer::adam(&vs).lr(0.1).build().unwrap();
    println!("{}", bw(&o, &a));
    o.group_at(0).unwrap().set_amsgrad(true).unwrap();
    println!("adam amsgrad later: {}", bw(&o, &a));
    println!("{:?}", o.state("a.w").unwrap());
    let (vs, a, _) = vs2();
    let o = Optimizer::sgd(&vs).lr(0.1).build().unwrap();
    println!("{}", bw(&o, &a));
    o.group_at(0).unwrap().set_momentum(0.9).unwrap();
    println!("sgd momentum later: {} {:?}", bw(&o, &a), o.state("a.w").unwrap());
}
#[test]
fn q3_predicate_panics() {
    let (vs, _, _) = vs2();
    let r = catch_unwind(AssertUnwindSafe(|| {
        Optimizer::sgd(&vs).group("x", |_| panic!("pred"), lr(0.1)).build().map(|_| ())
    }));
    println!("panicking predicate: {}", r.is_err());
    let r = catch_unwind(AssertUnwindSafe(|| vs.len()));
    println!("vs usable after: {:?}", r.is_ok());
}
#[test]
fn q4_failed_build_changes_groups() {
    let vs = nn::VarStore::new(Device::Cpu);
    vs.root().set_group(1).ones("w", &[1]);
    vs.root().set_group(0).ones("v", &[1]);
    let r = Optimizer::sgd(&vs)
        .group("all", |_| true, lr(0.1))
        .group("none", |_| false, lr(0.1))
        .build();
    println!("{}", r.err().unwrap());
    let o = Optimizer::sgd(&vs).build().unwrap();
    for g in o.groups().unwrap() {
        println!("{} {:?}", g.name(), g.parameters())
    }
}
#[test]
fn q5_new_in_with_tch() {
    let (vs, _, _) = vs2();
    let o = Optimizer::sgd(&vs)
        .group("a", |n| n.starts_with("a"), lr(0.1))
        .group("b", |n| n.starts_with("b"), lr(0.2))
        .build()
        .unwrap();
    o.with_tch(|t| {
        (vs.root() / "b").ones("new", &[1]);
        t.step();
    })
    .unwrap();
    o.step().unwrap();
    for g in o.groups().unwrap() {
        println!("{} {:?}", g.name(), g.parameters())
    }
}
#[test]
fn q6_names() {
    let (vs, _, _) = vs2();
    let r = Optimizer::sgd(&vs).name_group(0, "x").name_group(0, "y").build();
    println!("same number twice: {:?}", r.map(|o| o.group_names()));
    let vs = nn::VarStore::new(Device::Cpu);
    vs.root().set_group(1).ones("w", &[1]);
    vs.root().set_group(0).ones("v", &[1]);
    let r = Optimizer::sgd(&vs).name_group(1, "group_0").build();
    println!("default name taken: {:?}", r.map(|o| o.group_names()));
    let r = Optimizer::sgd(&vs).name_group(7, "x").build();
    println!("beyond: {}", r.err().unwrap());
    let r = Optimizer::sgd(&vs).name_group(usize::MAX, "x").build();
    println!("MAX: {:?}", r.map_err(|e| e.to_string()));
}
#[test]
fn q7_constructor_errors() {
    let (vs, _, _) = vs2();
    println!(
        "{:?}",
        Optimizer::builder(nn::sgd(0., 0., 0., true), &vs).build().map_err(|e| e.to_string())
    );
    println!(
        "{:?}",
        Optimizer::builder(nn::adam(1.5, 0.9, 0.), &vs).build().map_err(|e| e.to_string())
    );
    println!(
        "{:?}",
        Optimizer::builder(nn::sgd(f64::INFINITY, 0., 0., false), &vs)
            .build()
            .map_err(|e| e.to_string())
    );
    println!(
        "{:?}",
        Optimizer::builder(nn::rms_prop(0.9, 1e-8, f64::NAN, 0., false), &vs)
            .build()
            .map_err(|e| e.to_string())
    );
    println!(
        "{:?}",
        Optimizer::builder(nn::rms_prop(0.9, f64::NAN, 0., 0., false), &vs)
            .build()
            .map_err(|e| e.to_string())
    );
    println!(
        "{:?}",
        Optimizer::builder(nn::adam(f64::NAN, 0.9, 0.), &vs).build().map_err(|e| e.to_string())
    );
    println!(
        "{:?}",
        Optimizer::builder(nn::sgd(0.9, f64::NAN, 0., false), &vs)
            .build()
            .map_err(|e| e.to_string())
    );
}
#[test]
fn q8_loss_errors() {
    let (vs, a, _) = vs2();
    let o = Optimizer::sgd(&vs).build().unwrap();
    println!(
        "{:?}",
        o.backward_step(&Tensor::ones([2], (Kind::Float, Device::Cpu))).map_err(|e| e.to_string())
    );
    println!(
        "{:?}",
        o.backward_step(&Tensor::ones([1], (Kind::Float, Device::Cpu))).map_err(|e| e.to_string())
    );
    println!(
        "{:?}",
        o.backward_step(&(&a * Tensor::ones([2], (Kind::Float, Device::Cpu))))
            .map_err(|e| e.to_string())
    );
    let l = (&a * 2.).sum(Kind::Double);
    println!("{:?}", o.backward_step(&l).map_err(|e| e.to_string()));
    println!("twice {:?}", o.backward_step(&l).map_err(|e| e.to_string()));
    println!("undefined {:?}", o.backward_step(&Tensor::new()).map_err(|e| e.to_string()));
    println!("{:?}", o);
    println!("{:?}", o.group("nope").map_err(|e| e.to_string()));
    println!("{:?}", o.group_at(3).map_err(|e| e.to_string()));
    println!("{:?}", o.group_at(0).unwrap().alpha().map_err(|e| e.to_string()));
    println!("{:?}", o.state("zzz").map_err(|e| e.to_string()));
}
#[test]
fn q9_tch_setters_before_new_group() {
    // tch group numbers: variable in a new group appears after build
    let (vs, _, _) = vs2();
    let o = Optimizer::sgd(&vs).lr(0.1).build().unwrap();
    vs.root().set_group(2).ones("late", &[1]);
    println!("{:?}", o.group_names());
    o.zero_grad().unwrap();
    println!(
        "{:?} {:?}",
        o.group_names(),
        o.groups().unwrap().iter().map(|g| g.parameters().unwrap()).collect::<Vec<_>>()
    );
    o.group_at(0).unwrap().set_lr(0.5).unwrap();
    vs.root().set_group(3).ones("late2", &[1]);
    o.step().unwrap();
    println!("{:?}", o.groups().unwrap().iter().map(|g| g.lr().unwrap()).collect::<Vec<_>>());
    o.knob("lr").unwrap().set(0.25).unwrap();
    println!("{:?}", o.knob("lr").unwrap().values());
    vs.root().set_group(4).ones("late3", &[1]);
    o.step().unwrap();
    println!("{:?}", o.knob("lr").unwrap().values());
}
