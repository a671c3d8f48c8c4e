use tch::nn::VarStore;
use tch::{Kind, Tensor};

use crate::engine::{Engine, Handler, HandlerSpec};
use crate::error::Result;
use crate::event::Event;
use crate::event_filter::Events;
use crate::optim::Parameters;

/// Sets the metric `grad_norm` to the Euclidean norm of all gradients together.
///
/// By default the norm is computed after each step. It is that of the step if the step clears the gradients at its
/// beginning, and not at its end. The value stays on the device until it is read. Costs a small kernel for each
/// parameter and two more, in f32 or better, and no host sync. Where no parameter has a gradient the metric has no
/// value.
///
/// ```
/// # use tch::{Device, Kind, Tensor, nn};
/// use tch_ignite::engine::{Engine, Event, Until};
/// use tch_ignite::handlers::GradNorm;
/// let vs = nn::VarStore::new(Device::Cpu);
/// let w = vs.root().ones("w", &[4]);
/// let mut trainer = Engine::new(|_: &mut (), _, scale: f64| {
///     (w.sum(Kind::Float) * scale).backward();
///     Ok(())
/// });
/// trainer.attach(GradNorm::new(&vs).on(Event::IterationCompleted.every(2)));
/// trainer.run(&mut (), vec![1.0, 2.0], Until::epochs(1))?;
/// assert_eq!(trainer.state.metrics.get("grad_norm")?, 6.0); // of 1 + 2, four times
/// # Ok::<(), tch_ignite::Error>(())
/// ```
#[doc(alias = "grad_norm")]
#[must_use = "a handler is called only once it is attached: `Engine::attach`"]
pub struct GradNorm {
    name: String,
    parameters: Parameters,
    events: Events,
}

crate::debug::opaque_debug!(GradNorm);

impl GradNorm {
    /// Measures the gradients of all parameters of the store.
    pub fn new(vs: &VarStore) -> Self {
        Self {
            name: "grad_norm".into(),
            parameters: Parameters::of(vs),
            events: Event::IterationCompleted.into(),
        }
    }

    /// Measures only parameters whose name passes, such as `|name| name.starts_with("fc")`.
    pub fn whitelist(mut self, passes: impl Fn(&str) -> bool + 'static) -> Self {
        self.parameters.whitelist = Box::new(passes);
        self
    }

    /// Sets the name of the metric; the default is `"grad_norm"`.
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = name.into();
        self
    }

    /// Computes the norm at these events instead of each iteration.
    pub fn on(mut self, events: impl Into<Events>) -> Self {
        self.events = events.into();
        self
    }
}

impl<C, B, O> Handler<C, B, O> for GradNorm {
    fn spec(&self) -> Result<HandlerSpec> {
        let spec = HandlerSpec::new(format!("monitor {}", self.name), self.events.clone());
        Ok(spec.unique_names([format!("metric '{}'", self.name)]))
    }

    fn call(
        &mut self,
        _event: Event,
        _cx: &mut C,
        engine: &mut Engine<'_, C, B, O>,
    ) -> anyhow::Result<()> {
        let _guard = tch::no_grad_guard();
        let (_, norms) = self.parameters.norms(true)?;
        if norms.is_empty() {
            engine.state.metrics.remove(&self.name);
            return Ok(());
        }
        // The sum is computed on the device of the first norm.
        let device = norms[0].device();
        let norms = norms.iter().map(|norm| norm.f_to_device(device));
        let norms = Tensor::f_stack(&norms.collect::<Result<Vec<_>, _>>()?, 0)?;
        let norm = norms.f_norm_scalaropt_dtype(2, Kind::Double)?;
        engine.state.metrics.set(&self.name, norm);
        Ok(())
    }
}
