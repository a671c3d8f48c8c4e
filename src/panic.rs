//! The text of a panic, and of libtorch's exceptions.

use std::borrow::Cow;

/// The message that the panic was raised with.
pub(crate) fn message(payload: &(dyn std::any::Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().map(std::string::ToString::to_string);
    let text = text.or_else(|| payload.downcast_ref::<String>().cloned());
    text.map_or_else(|| "no message".into(), |text| of_tch(&text).unwrap_or(text))
}

/// Whether the panic is one of a method of tch, which unwraps a `TchError`.
pub(crate) fn is_of_tch(payload: &(dyn std::any::Any + Send)) -> bool {
    payload.downcast_ref::<String>().is_some_and(|text| text.starts_with(TCH))
}

/// How the message of tch's panics begins.
const TCH: &str = "called `Result::unwrap()` on an `Err` value: Torch(\"";

/// The message of libtorch in the panic of a method of tch, which unwraps a `TchError`.
fn of_tch(text: &str) -> Option<String> {
    let debug = text.strip_prefix(TCH)?;
    let message = debug.strip_suffix("\")").unwrap_or(debug);
    let message = message.replace("\\n", "\n").replace("\\\"", "\"").replace("\\\\", "\\");
    Some(format!("libtorch: {}", without_stack(&message)))
}

/// A text of libtorch without the C++ stack trace, and without the list of backends where the one that was asked for is
/// not there.
pub(crate) fn without_stack(text: &str) -> Cow<'_, str> {
    let text = text.split("\nException raised from").next().unwrap_or_default();
    match text.split_once(" is only available for these backends: ") {
        Some((first, _)) if first.contains("'CUDA' backend") => {
            let operator = first.split('\'').nth(1).unwrap_or("an operator");
            format!("{operator}: this libtorch has no CUDA, or the operator has none").into()
        }
        Some((first, _)) => first.to_owned().into(),
        None => text.into(),
    }
}
