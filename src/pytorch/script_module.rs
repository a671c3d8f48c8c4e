use std::cell::{Cell, RefCell};
use std::collections::HashSet;
use std::fmt;
use std::path::Path;

use tch::nn::{self, ModuleT};
use tch::{CModule, IValue, Tensor};

use crate::bridge::{Optimized, ScriptBuffers, TensorId, is_training, save_module};
use crate::error::{Error, Result};
use crate::fs::write_atomically;
use crate::variables::place;

/// A TorchScript module to train: `torch.jit.script(model).save(path)`.
///
/// Where `tch::TrainableCModule` knows parameters only, this one puts buffers into the store too, all under their names in
/// Python: so checkpoints, averages of the weights and ranks have the statistics of batch normalisation. Steps and
/// evaluations of [`Supervised`](crate::supervised::Supervised) switch between training and evaluation mode, because it
/// is a `ModuleT`. Saved, it is TorchScript again.
///
/// A file of TorchScript is a program, which libtorch runs: load only what you trust. What was traced
/// (`torch.jit.trace`) has the mode that it was traced in, and what was frozen has no parameters.
///
/// ```no_run
/// use tch::{Device, nn};
/// use tch_ignite::pytorch::ScriptModule;
/// use tch_ignite::prelude::*;
/// # fn main() -> anyhow::Result<()> {
/// let vs = nn::VarStore::new(Device::cuda_if_available());
/// let net = ScriptModule::load("net.pt", &vs.root())?;
/// let optimizer = Optimizer::adam(&vs).build()?;
/// let mut cx = Supervised::new(net, optimizer, |y_pred, y| y_pred.cross_entropy_for_logits(y));
/// // … training: trainer.track("model", &vs) …
/// cx.net.save("trained.pt")?; // for torch.jit.load
/// # Ok(())
/// # }
/// ```
pub struct ScriptModule {
    module: RefCell<CModule>,
    buffers: ScriptBuffers,
    /// The mode that it is in.
    training: Cell<bool>,
    /// The mode that it was saved in, which it is saved in again.
    saved_in_training: bool,
    optimized: bool,
}

impl ScriptModule {
    /// Loads a module to the device of a path, and adds its parameters and buffers there; parameters that are
    /// frozen stay so.
    ///
    /// # Errors
    /// The file cannot be read; the path has a variable of such a name already: it is as it was then.
    pub fn load(file: impl AsRef<Path>, path: &nn::Path<'_>) -> Result<Self> {
        let file = file.as_ref();
        let failed = |error: &dyn fmt::Display| {
            Error::libtorch(format!("loading the module {}", file.display()), error.to_string())
        };
        let module =
            CModule::load_on_device(file, path.device()).map_err(|error| failed(&error))?;
        let (buffers, tensors) = ScriptBuffers::of(&module).map_err(|error| failed(&error))?;
        let training = is_training(&module).map_err(|error| failed(&error))?;
        let mut names = HashSet::new();
        for one in &tensors {
            let (inner, name) = place(path, &one.name);
            if inner.as_ref().unwrap_or(path).get(name).is_some() || !names.insert(&one.name) {
                return Err(Error::invalid(format!(
                    "the module {} cannot be loaded: there is a variable '{}' already. Load it into a path of its own",
                    file.display(),
                    one.name
                )));
            }
        }
        let mut seen = HashSet::new();
        for one in tensors {
            // A tied parameter is trained once.
            let trainable = one.is_parameter
                && one.tensor.requires_grad()
                && seen.insert(TensorId::of(&one.tensor));
            let (inner, name) = place(path, &one.name);
            let _ = inner.as_ref().unwrap_or(path).add(name, one.tensor, trainable);
        }
        let module = RefCell::new(module);
        let (saved_in_training, training) = (training, training.into());
        Ok(Self { module, buffers, training, saved_in_training, optimized: false })
    }

    /// Lets libtorch optimize the module after its first calls, which may fuse operations on a GPU. The last bits of
    /// gradients then depend on how many calls went before, so that a resumed run is not that of one that was not
    /// stopped to the bit; unless it is asked for, each call runs as the module is written.
    pub fn optimized(mut self, on: bool) -> Self {
        self.optimized = on;
        self
    }

    /// Calls `forward` with values of any type.
    ///
    /// # Errors
    /// The module fails, or gives a buffer another shape or type.
    pub fn forward_is(&self, inputs: &[IValue], train: bool) -> Result<IValue> {
        self.called(train, |module| module.forward_is(inputs))
    }

    /// Calls `forward` with tensors.
    ///
    /// # Errors
    /// The errors of [`forward_is`](Self::forward_is); the result is no tensor.
    pub fn forward_ts(&self, inputs: &[&Tensor], train: bool) -> Result<Tensor> {
        let inputs: Vec<_> = inputs.iter().map(|input| input.shallow_clone()).collect();
        self.called(train, |module| module.forward_ts(&inputs))
    }

    fn called<T>(
        &self,
        train: bool,
        call: impl FnOnce(&CModule) -> std::result::Result<T, tch::TchError>,
    ) -> Result<T> {
        self.switch(train)?;
        let module = self.borrowed()?;
        let _optimized = Optimized::set(self.optimized);
        let result = call(&module)
            .map_err(|error| Error::libtorch("calling a TorchScript module", error))?;
        self.buffers
            .settle()
            .map_err(|text| Error::libtorch("calling a TorchScript module", text))?;
        Ok(result)
    }

    fn borrowed(&self) -> Result<std::cell::Ref<'_, CModule>> {
        self.module.try_borrow().map_err(|error| Error::invalid(error.to_string()))
    }

    fn switch(&self, train: bool) -> Result<()> {
        if self.training.get() == train {
            return Ok(());
        }
        let module = self.module.try_borrow_mut();
        let mut module = module.map_err(|error| Error::invalid(error.to_string()))?;
        let switched = if train { module.f_set_train() } else { module.f_set_eval() };
        switched
            .map_err(|error| Error::libtorch("switching a TorchScript module's mode", error))?;
        self.training.set(train);
        Ok(())
    }

    /// Writes the module as TorchScript, for `torch.jit.load`, in the mode that it was loaded in. The file is there whole or
    /// not at all.
    ///
    /// # Errors
    /// The disk's.
    pub fn save(&self, file: impl AsRef<Path>) -> Result<()> {
        let before = self.training.get();
        self.switch(self.saved_in_training)?;
        let module = self.borrowed()?;
        let saved = write_atomically(file.as_ref(), |to| save_module(&module, to));
        drop(module);
        self.switch(before).and(saved)
    }
}

/// # Panics
/// An error of [`ScriptModule::forward_ts`] becomes a panic, as in tch's modules; an engine makes it an error again.
impl ModuleT for ScriptModule {
    #[expect(clippy::panic, reason = "the trait has no errors")]
    fn forward_t(&self, input: &Tensor, train: bool) -> Tensor {
        match self.forward_ts(&[input], train) {
            Ok(output) => output,
            Err(error) => panic!("{error}"),
        }
    }
}

impl fmt::Debug for ScriptModule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ScriptModule")
            .field("training", &self.training.get())
            .finish_non_exhaustive()
    }
}
