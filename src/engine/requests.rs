use serde::{Deserialize, Serialize};

/// Requests of handlers that the engine has not done yet.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct Requests {
    /// Any of the flags below is set.
    #[serde(skip)]
    pub(super) any: bool,
    pub(super) terminate: bool,
    pub(super) skip_completed: bool,
    pub(super) terminate_epoch: bool,
    pub(super) skip_epoch_completed: bool,
    pub(super) skip_batch: bool,
    /// A limit of this process was reached. The next process has limits of its own, so a checkpoint
    /// does not hold this request.
    #[serde(skip)]
    pub(super) limit: bool,
    /// The run is to be suspended: in this process, so a checkpoint does not hold this request.
    #[serde(skip)]
    pub(super) interrupt: bool,
    /// The handler that is running is to be called again when the suspended run goes on.
    #[serde(skip)]
    pub(super) repeat: bool,
    /// Who called `terminate`.
    pub(super) terminated_by: Option<String>,
}

impl Requests {
    /// Whether the run is to end.
    pub(super) fn ends(&self) -> bool {
        self.terminate || self.limit
    }

    /// The requests that ranks share, as a message.
    pub(super) fn to_bytes(&self) -> [u8; 6] {
        [
            self.terminate,
            self.skip_completed,
            self.terminate_epoch,
            self.skip_epoch_completed,
            self.interrupt,
            self.limit,
        ]
        .map(u8::from)
    }

    /// Sets the requests that ranks share: `asked` gets the index of a request in [`to_bytes`](Self::to_bytes).
    /// `skip_batch` is left as this rank has it.
    pub(super) fn set_shared(&mut self, asked: impl Fn(usize) -> bool) {
        self.terminate = asked(0);
        self.skip_completed = asked(1);
        self.terminate_epoch = asked(2);
        self.skip_epoch_completed = asked(3);
        self.interrupt = asked(4);
        self.limit = asked(5);
        self.any = self.is_any();
        if self.terminate {
            self.terminated_by.get_or_insert_with(|| "a handler of another rank".into());
        }
    }

    /// Computes the value for `any` from the other flags.
    pub(super) fn is_any(&self) -> bool {
        self.ends() || self.terminate_epoch || self.skip_batch || self.interrupt
    }

    /// The requests that still count after the run has ended.
    pub(super) fn after_the_end(&self) -> Self {
        Self { skip_completed: self.skip_completed, ..Self::default() }
    }

    /// The requests that the next run of this engine follows after an error: those that a checkpoint would hold.
    pub(super) fn of_failed_run(&self) -> Self {
        let mut kept = Self { limit: false, interrupt: false, repeat: false, ..self.clone() };
        kept.any = kept.is_any();
        kept
    }
}
