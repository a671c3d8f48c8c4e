use std::sync::mpsc;
use std::thread;
use std::time::Duration;

/// Runs `call` on a new thread and returns its result; `None` if it takes longer than `time`, or panics. A thread that
/// takes too long is left behind: a call to the store cannot be interrupted, and blocks for ever while the process that
/// serves the store is frozen.
pub(super) fn within<R: Send + 'static>(
    time: Duration,
    call: impl FnOnce() -> R + Send + 'static,
) -> Option<R> {
    let (sender, receiver) = mpsc::channel();
    // After the deadline nobody receives the result, and sending it fails.
    let work = move || drop(sender.send(call()));
    thread::Builder::new().name("tch-ignite store".into()).spawn(work).ok()?;
    receiver.recv_timeout(time).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_that_blocks_is_left_behind() {
        assert_eq!(within(Duration::from_secs(60), || 5), Some(5));
        let (_kept, blocked) = mpsc::channel::<()>();
        assert_eq!(within(Duration::from_millis(10), move || blocked.recv().is_ok()), None);
        assert_eq!(
            within(Duration::from_secs(60), || -> u8 { panic!("in a thread of its own") }),
            None
        );
    }
}
