/// Learning rates that fall from layer to layer, for fine-tuning: `base_lr` for the last of `names`, and `decay` times
/// as much for each name before it (Howard and Ruder 2018, <https://arxiv.org/abs/1801.06146>). Returns each name with
/// its learning rate, in the given order.
///
/// ```
/// # use tch::{Device, nn};
/// use tch_ignite::optim::{Optimizer, layerwise_lr_decay, lr};
///
/// # let vs = nn::VarStore::new(Device::Cpu);
/// # for name in ["embedding", "block1", "block2", "head"] {
/// #     nn::linear(vs.root() / name, 1, 1, Default::default());
/// # }
/// let mut builder = Optimizer::adamw(&vs);
/// for (name, value) in layerwise_lr_decay(["embedding", "block1", "block2", "head"], 1e-3, 0.5) {
///     let prefix = format!("{name}."); // parameters are "embedding.weight", …
///     builder = builder.group(name, move |name| name.starts_with(&prefix), lr(value));
/// }
/// let optimizer = builder.build()?;
/// assert_eq!(optimizer.group("head")?.lr()?, 1e-3);
/// assert_eq!(optimizer.group("embedding")?.lr()?, 1e-3 / 8.0);
/// # Ok::<(), tch_ignite::Error>(())
/// ```
pub fn layerwise_lr_decay<N: Into<String>>(
    names: impl IntoIterator<Item = N>,
    base_lr: f64,
    decay: f64,
) -> Vec<(String, f64)> {
    let names: Vec<String> = names.into_iter().map(Into::into).collect();
    let depths = (0..names.len()).rev();
    let lrs = depths.map(|depth| base_lr * decay.powf(depth as f64));
    names.into_iter().zip(lrs).collect()
}
