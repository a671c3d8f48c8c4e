use std::fmt;
use std::path::PathBuf;

use crate::event::Event;
use crate::panic::without_stack;

/// Errors of this crate. They say who failed, where and when.
///
/// Step functions and handlers return [`anyhow::Result`], so that any error passes with `?`. The engine wraps these
/// errors into [`Error::Step`] or [`Error::Handler`].
///
/// The text has all causes, so `{}` is enough to print an error. For the same reason
/// [`source`](std::error::Error::source) gives none; match on the variant to get at the cause.
#[derive(Debug)]
#[non_exhaustive]
pub enum Error {
    /// An argument is not allowed. The text says which argument, its value and what to do.
    InvalidArgument(String),

    /// There is no parameter group of this name or number.
    UnknownGroup {
        /// The name or number that was asked for.
        group: String,
        /// The groups that exist.
        available: Vec<String>,
    },

    /// The optimizer has no hyper-parameter of that name.
    UnknownHyperParameter {
        /// The hyper-parameter that was asked for.
        name: String,
        /// The optimizer, by its PyTorch name.
        optimizer: &'static str,
        /// The hyper-parameters that the optimizer has.
        available: Vec<&'static str>,
    },

    /// libtorch (or tch) refused an operation.
    Libtorch {
        /// The operation that failed.
        operation: String,
        /// libtorch's message, without its C++ stack trace.
        message: String,
    },

    /// The step function returned an error or panicked.
    Step {
        /// Epoch, from 1.
        epoch: u64,
        /// Iteration, from 1.
        iteration: u64,
        /// The error that the step returned, or its panic.
        source: anyhow::Error,
    },

    /// A handler returned an error or panicked.
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
    Data {
        /// Epoch, from 1.
        epoch: u64,
        /// The last iteration that had its batch.
        iteration: u64,
        /// The error that the source returned, or its panic.
        source: anyhow::Error,
    },

    /// A saved state does not fit or cannot be made. The text names the part.
    State(String),

    /// A file could not be read or written.
    Io {
        /// The file.
        path: PathBuf,
        /// The error of the system.
        source: std::io::Error,
    },

    /// An operation between the processes of a [`ProcessGroup`](crate::distributed::ProcessGroup) failed. End the
    /// process with an exit code other than 0.
    #[cfg(feature = "distributed")]
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

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::InvalidArgument(text) | Self::State(text) => f.write_str(text),
            Self::UnknownGroup { group, available } => write!(
                f,
                "no parameter group {group}; this optimizer has: {}",
                available.join(", ")
            ),
            Self::UnknownHyperParameter { name, optimizer, available } => write!(
                f,
                "{optimizer} has no hyper-parameter '{name}'; it has: {}",
                available.join(", ")
            ),
            Self::Libtorch { operation, message } => write!(f, "{operation}: {message}"),
            Self::Step { epoch, iteration, source } => write!(
                f,
                "the step of iteration {iteration} (epoch {epoch}) failed: {}",
                Causes(source)
            ),
            Self::Handler { handler, event, epoch, iteration, source } => write!(
                f,
                "handler {handler} of {event} failed at iteration {iteration} (epoch {epoch}): {}",
                Causes(source)
            ),
            Self::Data { epoch, iteration, source } => write!(
                f,
                "no batch for iteration {} (epoch {epoch}): {}",
                iteration + 1,
                Causes(source)
            ),
            Self::Io { path, source } => write!(f, "{}: {source}", path.display()),
            #[cfg(feature = "distributed")]
            Self::Distributed { kind, rank, op, missing, message } => write!(
                f,
                "rank {rank}, {op}: {kind}: {message}{}",
                crate::failure_kind::unanswered(missing)
            ),
        }
    }
}

impl std::error::Error for Error {}

/// Shows an error with all its causes, without libtorch's stack traces.
struct Causes<'e>(&'e anyhow::Error);

impl fmt::Display for Causes<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, cause) in self.0.chain().enumerate() {
            let separator = if index > 0 { ": " } else { "" };
            write!(f, "{separator}{}", without_stack(&cause.to_string()))?;
        }
        Ok(())
    }
}

/// A panic caught in user code, as an error with the panic's message.
///
/// tch's methods without `f_` panic where libtorch refuses an operation. The message is then libtorch's sentence, and the
/// panic itself prints nothing, unless `RUST_BACKTRACE` is set. The first call of user code whose panics become errors (by
/// a run of an engine, a step of [`Supervised`](crate::supervised::Supervised), …) installs a panic hook for that, except
/// where panics abort. All other panics go to the hook that was there before: also those of an `unwrap` in the program,
/// and those of tch where it is no release from a registry. A program that sets a hook of its own later replaces it.
#[derive(Debug)]
pub struct Panicked(pub String);

impl fmt::Display for Panicked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "panicked: {}", self.0)
    }
}

impl std::error::Error for Panicked {}

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    pub(crate) fn invalid(text: impl Into<String>) -> Self {
        Self::InvalidArgument(text.into())
    }

    pub(crate) fn libtorch(operation: impl Into<String>, message: impl ToString) -> Self {
        let message = without_stack(&message.to_string()).into_owned();
        Self::Libtorch { operation: operation.into(), message }
    }

    /// Returns this error, extended by the text of another that was caused by it or happened beside it.
    pub(crate) fn besides(mut self, other: Self) -> Self {
        let text = format!("(besides: {other})");
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
