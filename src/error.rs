use std::path::PathBuf;

use crate::event::Event;

/// Errors of this crate. They say who failed, where and when.
///
/// Step functions and handlers return [`anyhow::Result`], so that any error passes with `?`. The engine wraps these
/// errors into [`Error::Step`] or [`Error::Handler`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An argument is not allowed. The text says which argument, its value and what to do.
    #[error("{0}")]
    InvalidArgument(String),

    /// There is no parameter group of this name or number.
    #[error("no parameter group {group}; this optimizer has: {}", available.join(", "))]
    UnknownGroup {
        /// The name or number that was asked for.
        group: String,
        /// The groups that exist.
        available: Vec<String>,
    },

    /// The optimizer has no hyper-parameter of that name.
    #[error("{optimizer} has no hyper-parameter '{name}'; it has: {}", available.join(", "))]
    UnknownHyperParameter {
        /// The hyper-parameter that was asked for.
        name: String,
        /// The optimizer, by its PyTorch name.
        optimizer: &'static str,
        /// The hyper-parameters that the optimizer has.
        available: Vec<&'static str>,
    },

    /// libtorch (or tch) refused an operation.
    #[error("{operation}: {message}")]
    Libtorch {
        /// The operation that failed.
        operation: String,
        /// libtorch's message, without its C++ stack trace.
        message: String,
    },

    /// The step function returned an error or panicked.
    #[error("the step of iteration {iteration} (epoch {epoch}) failed")]
    Step {
        /// Epoch, from 1.
        epoch: u64,
        /// Iteration, from 1.
        iteration: u64,
        /// The error that the step returned, or its panic.
        source: anyhow::Error,
    },

    /// A handler returned an error or panicked.
    #[error("handler {handler} of {event} failed at iteration {iteration} (epoch {epoch})")]
    Handler {
        /// The handler's name; for a closure, the place where it was registered.
        handler: String,
        /// The event that was fired.
        event: Event,
        /// Epoch, from 1 once running.
        epoch: u64,
        /// Iteration, from 1 once running.
        iteration: u64,
        /// The error that the handler returned, or its panic.
        source: anyhow::Error,
    },

    /// The data source could not give a batch.
    #[error("no batch for iteration {} (epoch {epoch})", iteration + 1)]
    Data {
        /// Epoch, from 1.
        epoch: u64,
        /// The last iteration that had its batch.
        iteration: u64,
        /// The error that the source returned, or its panic.
        source: anyhow::Error,
    },

    /// A saved state does not fit or cannot be made. The text names the part.
    #[error("{0}")]
    State(String),

    /// A file could not be read or written.
    #[error("{}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The error of the system.
        source: std::io::Error,
    },

    /// An operation between the processes of a [`ProcessGroup`](crate::distributed::ProcessGroup) failed. End the
    /// process with an exit code other than 0.
    #[cfg(feature = "distributed")]
    #[error("rank {rank}, {op}: {kind}: {message}{}", crate::failure_kind::unanswered(missing))]
    Distributed {
        /// The kind of failure.
        kind: crate::failure_kind::FailureKind,
        /// The rank that reports the failure: this process.
        rank: usize,
        /// The operation that failed.
        op: String,
        /// Other ranks that did not answer within 2 seconds of the failure, or did not join. They may have been busy
        /// with something else for so long.
        missing: Vec<usize>,
        /// libtorch's message, or how the ranks differ.
        message: String,
    },
}

/// A panic caught in user code, as an error with the panic's message.
#[derive(Debug, thiserror::Error)]
#[error("panicked: {0}")]
pub struct Panicked(pub String);

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    pub(crate) fn invalid(text: impl Into<String>) -> Self {
        Self::InvalidArgument(text.into())
    }

    pub(crate) fn libtorch(operation: impl Into<String>, message: impl ToString) -> Self {
        let message = message.to_string();
        // libtorch's C++ stack trace follows.
        let message =
            message.split("\nException raised from").next().unwrap_or_default().to_owned();
        Self::Libtorch { operation: operation.into(), message }
    }

    /// Returns this error, extended by the text of another that was caused by it or happened beside it.
    pub(crate) fn besides(mut self, other: Self) -> Self {
        let text = format!("(besides: {:#})", anyhow::Error::from(other));
        match &mut self {
            Self::Step { source, .. }
            | Self::Handler { source, .. }
            | Self::Data { source, .. } => {
                let cause = std::mem::replace(source, anyhow::Error::msg(""));
                *source = cause.context(text);
            }
            Self::InvalidArgument(message)
            | Self::State(message)
            | Self::Libtorch { message, .. } => {
                message.push(' ');
                message.push_str(&text);
            }
            #[cfg(feature = "distributed")]
            Self::Distributed { message, .. } => {
                message.push(' ');
                message.push_str(&text);
            }
            Self::Io { source, .. } => {
                *source = std::io::Error::new(source.kind(), format!("{source} {text}"));
            }
            Self::UnknownGroup { .. } | Self::UnknownHyperParameter { .. } => {
                self = Self::InvalidArgument(format!("{self} {text}"));
            }
        }
        self
    }
}
