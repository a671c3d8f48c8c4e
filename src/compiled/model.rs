use std::fmt;
use std::fs::File;
use std::io::{ErrorKind, Read as _};
use std::path::Path;

use tch::nn::{self, ModuleT};
use tch::{Device, Tensor};

use super::manifest::{Manifest, Mode, OfBatch};
use crate::bridge::{Bound, CompiledProgram, Role};
use crate::error::{Error, Result};
use crate::pytorch::{StoredTensor, read_pretrained};
use crate::variables::place;

/// A model that PyTorch compiled with its loss and backward: see [the module](crate::compiled).
///
/// Parameters and buffers of the model are in the store, and programs work on the store's own memory. Train it with
/// [`Supervised::compiled`](crate::supervised::Supervised::compiled), or call [`step`](Self::step) in a step of your own:
///
/// ```no_run
/// # use tch::{Device, Tensor, nn};
/// # use tch_ignite::compiled::CompiledModel;
/// # use tch_ignite::prelude::*;
/// # fn main() -> anyhow::Result<()> {
/// # let vs = nn::VarStore::new(Device::Cpu);
/// # let net = CompiledModel::load("net", &vs.root())?;
/// # let optimizer = Optimizer::adam(&vs).build()?;
/// let trainer = Engine::new(move |_: &mut (), _, (x, y): Batch| {
///     let loss = net.step(&[&x, &y])?.loss;
///     optimizer.backward_step(&loss)?;
///     Ok(loss.detach())
/// });
/// # let _ = trainer;
/// # Ok(())
/// # }
/// ```
///
/// Random numbers (dropout) come from libtorch's generator of the device, so they are other ones in each step, follow
/// `tch::manual_seed`, and go on where a resumed run was. A program runs at once on the threads that libtorch has;
/// calls of one program from several threads wait for each other.
pub struct CompiledModel {
    manifest: Manifest,
    device: Device,
    /// The programs, in the manifest's order.
    programs: Vec<CompiledProgram>,
}

/// The result of a training step of a [`CompiledModel`].
#[derive(Debug)]
#[non_exhaustive]
pub struct StepOutput {
    /// The loss, a scalar. Its backward adds the gradients, which the step has computed already, to those of the parameters.
    pub loss: Tensor,
    /// The model's outputs, without gradients, if it was exported with `train_outputs`; else empty.
    pub outputs: Vec<Tensor>,
}

impl CompiledModel {
    /// Loads an exported folder to the device of a path, and adds parameters and buffers there under their names in
    /// Python, with their initial values. Parameters that were frozen stay so; a parameter with several names is trained
    /// once. Groups of the export are tch's group numbers.
    ///
    /// This runs machine code of the folder: see [Trust](crate::compiled#trust). Cost: PyTorch unpacks each program into a
    /// temporary folder.
    ///
    /// # Errors
    /// A file is missing or damaged; the model was exported for another device or processor, or with another release of
    /// torch; the path has a variable of such a name already. The store is then as it was.
    pub fn load(folder: impl AsRef<Path>, path: &nn::Path<'_>) -> Result<Self> {
        let folder = folder.as_ref();
        let manifest = Manifest::read(folder)?;
        let failed = |why: String| {
            Error::State(format!("the compiled model {} cannot be loaded: {why}", folder.display()))
        };
        let device = path.device();
        if !is_kind(device, &manifest.device) {
            return Err(failed(format!(
                "it was exported for {}, and the store is on {device:?}. Export it anew with the module there, or choose a store on the other device",
                manifest.device
            )));
        }
        let names = manifest.parameters.iter().map(|parameter| &parameter.name);
        let names = names.chain(manifest.buffers.iter().map(|buffer| &buffer.name));
        for name in names.chain(manifest.tied.keys()) {
            let (inner, name_there) = place(path, name);
            if inner.as_ref().unwrap_or(path).get(name_there).is_some() {
                return Err(failed(format!(
                    "there is a variable '{name}' already. Load it into a path of its own, such as vs.root() / \"compiled\""
                )));
            }
        }
        let bound = tensors(folder, &manifest, device)
            .map_err(|why| failed(format!("{why}. Copy the whole folder, or export it anew")))?;
        let programs = manifest.programs.iter().map(|program| {
            let package = folder.join(&program.file);
            if !package.is_file() {
                return Err(failed(format!("there is no {} in it. Export it anew", program.file)));
            }
            let (length, crc32) = checksum(&package)?;
            if (length, crc32) != (program.length, program.crc32) {
                return Err(failed(format!(
                    "{} is not of this export, or damaged. Copy the whole folder, or export it anew",
                    program.file
                )));
            }
            CompiledProgram::load(&package, device, &bound)
                .map_err(|text| failed(format!("{}: {}", program.file, with_advice(&text))))
        });
        let programs = programs.collect::<Result<_>>()?;
        add_to_store(path, &manifest, &bound);
        Ok(Self { manifest, device, programs })
    }

    /// Runs forward, loss and backward for the inputs and targets of a batch, in the order of the export, and updates the
    /// buffers (the statistics of batch normalisation). Gradients reach the parameters with `loss.backward()`, once.
    ///
    /// Inputs that are not contiguous are copied. Under `tch::no_grad` the loss has no backward. A parameter that was frozen
    /// after the export gets no gradient. No host sync but those of the model.
    ///
    /// # Errors
    /// Other tensors than were exported (number, shape, type, device); no program is for a batch of this size; a parameter
    /// has changed its shape, type or device, or is trained but was exported frozen; this thread is in a region of
    /// autocast, which belongs into the export. Parameters and buffers are then as they were.
    pub fn step(&self, inputs: &[&Tensor]) -> Result<StepOutput> {
        let program = self.program(Mode::Train, inputs)?;
        let outputs = if self.manifest.train_outputs { self.manifest.outputs.len() } else { 0 };
        let failed = |text| Error::libtorch("the training step of a compiled model", text);
        let mut results = program.step(inputs, outputs).map_err(failed)?;
        if results.len() != 1 + outputs {
            return Err(failed("it returned no loss".to_owned()));
        }
        let outputs = results.split_off(1);
        match results.pop() {
            Some(loss) => Ok(StepOutput { loss, outputs }),
            None => Err(failed("it returned no loss".to_owned())),
        }
    }

    /// Runs forward in evaluation mode: the outputs, in the order of [`output_names`](Self::output_names), without gradients.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn evaluate(&self, inputs: &[&Tensor]) -> Result<Vec<Tensor>> {
        let program = self.program(Mode::Eval, inputs)?;
        let failed = |text| Error::libtorch("the evaluation of a compiled model", text);
        program.run(inputs).map_err(failed)
    }

    /// The names of the outputs within the value that the module returned in Python, such as `['logits']` or `[0]`; an
    /// empty name where it was one tensor.
    pub fn output_names(&self) -> impl Iterator<Item = &str> {
        self.manifest.outputs.iter().map(String::as_str)
    }

    /// The program for a batch.
    fn program(&self, mode: Mode, inputs: &[&Tensor]) -> Result<&CompiledProgram> {
        let targets = if mode == Mode::Train { &self.manifest.targets[..] } else { &[] };
        let count = self.manifest.inputs.len() + targets.len();
        if inputs.len() != count {
            return Err(Error::invalid(format!(
                "{} tensors were given to a compiled model, which was exported with {} inputs{}",
                inputs.len(),
                self.manifest.inputs.len(),
                match mode {
                    Mode::Train => format!(" and {} targets", targets.len()),
                    Mode::Eval => " (an evaluation takes no targets)".into(),
                }
            )));
        }
        let mut batch = None;
        for (given, expected) in inputs.iter().zip(self.manifest.inputs.iter().chain(targets)) {
            self.check(given, expected, &mut batch)?;
        }
        let size = batch.unwrap_or(1);
        let mut all = self.manifest.programs.iter().zip(&self.programs);
        let fits = all.find(|(program, _)| {
            program.mode == mode && (program.batch.0..=program.batch.1).contains(&size)
        });
        fits.map(|(_, program)| program).ok_or_else(|| self.no_program(mode, size))
    }

    fn no_program(&self, mode: Mode, size: i64) -> Error {
        let programs = self.manifest.programs.iter().filter(|program| program.mode == mode);
        let sizes: Vec<_> = programs
            .map(|program| match program.batch {
                (from, to) if from == to => from.to_string(),
                (from, to) => format!("{from} to {to}"),
            })
            .collect();
        let what = if mode == Mode::Train { "training step" } else { "evaluation" };
        Error::invalid(format!(
            "the compiled model has no {what} for a batch of {size}, only for {}. Leave such a batch out (`drop_last`), or export the model with `batch_sizes` that have it",
            if sizes.is_empty() { "none".into() } else { sizes.join(", ") }
        ))
    }

    /// Compares a tensor with what was exported. The size of the batch is that of the first tensor that has one.
    fn check(&self, given: &Tensor, expected: &OfBatch, batch: &mut Option<i64>) -> Result<()> {
        let shape = given.size();
        let fits = shape.len() == expected.shape.len()
            && shape.iter().zip(&expected.shape).all(|(given, expected)| match expected {
                Some(size) => given == size,
                None => given == batch.get_or_insert(*given),
            });
        if fits && given.kind() == expected.dtype && given.device() == self.device {
            return Ok(());
        }
        let sizes = expected.shape.iter().map(|size| match (*size, *batch) {
            (Some(size), _) | (None, Some(size)) => size.to_string(),
            (None, None) => "batch".into(),
        });
        Err(Error::invalid(format!(
            "{} of a compiled model is {:?} {:?} on {:?}, but it was exported as {:?} [{}] on {:?}. Give it such a tensor, or export the model anew",
            expected.name,
            given.kind(),
            shape,
            given.device(),
            expected.dtype,
            sizes.collect::<Vec<_>>().join(", "),
            self.device
        )))
    }
}

fn is_kind(device: Device, name: &str) -> bool {
    match device {
        Device::Cpu => name == "cpu",
        Device::Cuda(_) => name == "cuda",
        _ => false,
    }
}

/// The length of a file and its CRC-32.
fn checksum(path: &Path) -> Result<(u64, u32)> {
    let io = |source| Error::Io { path: path.to_owned(), source };
    let mut file = File::open(path).map_err(io)?;
    let (mut crc, mut length, mut part) = (crc32fast::Hasher::new(), 0, vec![0; 1 << 20]);
    loop {
        let count = match file.read(&mut part) {
            Ok(0) => return Ok((length, crc.finalize())),
            Ok(count) => count,
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) => return Err(io(error)),
        };
        crc.update(&part[..count]);
        length += count as u64;
    }
}

/// Adds what the loader of the system does not say.
fn with_advice(text: &str) -> String {
    let advice = if text.contains("libtorch.so") {
        ". Compiled packages need a libtorch.so that is a shared object: run scripts/setup-libtorch.sh, or use libtorch as it is published"
    } else {
        ""
    };
    format!("{text}{advice}")
}

/// The parameters and buffers with their initial values, in the order in which programs get them.
fn tensors(
    folder: &Path,
    manifest: &Manifest,
    device: Device,
) -> std::result::Result<Vec<Bound>, String> {
    const FILE: &str = "model.safetensors";
    let weights = read_pretrained(folder.join(FILE)).map_err(|error| error.to_string())?;
    let parameters = manifest.parameters.iter().map(|p| (&p.name, &p.shape, p.dtype));
    let buffers = manifest.buffers.iter().map(|b| (&b.name, &b.shape, b.dtype));
    let described = parameters.chain(buffers).zip(manifest.roles());
    described
        .map(|((name, shape, kind), role)| {
            let stored = weights.get(name).ok_or_else(|| format!("{FILE} has no '{name}'"))?;
            let tensor = StoredTensor::tensor(stored).map_err(|error| error.to_string())?;
            if tensor.size() != *shape || tensor.kind() != kind {
                return Err(format!(
                    "'{name}' is {:?} {:?} in {FILE}, and {kind:?} {shape:?} in the manifest",
                    tensor.kind(),
                    tensor.size()
                ));
            }
            let tensor = tensor.f_to_device(device).map_err(|error| error.to_string())?;
            Ok(Bound { name: name.clone(), tensor, role })
        })
        .collect()
}

fn add_to_store(path: &nn::Path<'_>, manifest: &Manifest, bound: &[Bound]) {
    let groups = manifest.parameters.iter().map(|parameter| parameter.group);
    let add = |name: &str, tensor: &Tensor, group: Option<usize>, trainable: bool| {
        let (inner, name) = place(path, name);
        let there = inner.as_ref().unwrap_or(path);
        let grouped = group.map(|group| there.set_group(group));
        let _ = grouped.as_ref().unwrap_or(there).add(name, tensor.shallow_clone(), trainable);
    };
    for (bound, group) in bound.iter().zip(groups.chain(std::iter::repeat(None))) {
        let trainable = matches!(bound.role, Role::Trained | Role::Unused);
        add(&bound.name, &bound.tensor, group, trainable);
    }
    for (name, kept) in &manifest.tied {
        if let Some(bound) = bound.iter().find(|bound| bound.name == *kept) {
            add(name, &bound.tensor, None, false);
        }
    }
}

/// # Panics
/// Errors of [`CompiledModel::evaluate`] become panics, as in tch's modules, and so does training mode, because forward
/// alone has no backward: an engine makes an error of them.
impl ModuleT for CompiledModel {
    #[expect(clippy::panic, reason = "the trait has no errors")]
    fn forward_t(&self, input: &Tensor, train: bool) -> Tensor {
        if train {
            panic!(
                "a compiled model computes its loss itself: use `Supervised::compiled`, or `CompiledModel::step`"
            );
        }
        let outputs = self.evaluate(&[input]).map(|outputs| outputs.into_iter().next());
        match outputs {
            Ok(Some(output)) => output,
            Ok(None) => panic!("the compiled model has no output"),
            Err(error) => panic!("{error}"),
        }
    }
}

impl fmt::Debug for CompiledModel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CompiledModel")
            .field("device", &self.device)
            .field("programs", &self.programs.len())
            .finish_non_exhaustive()
    }
}
