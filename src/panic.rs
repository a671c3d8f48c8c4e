//! The text of a panic, and of libtorch's exceptions.

use std::borrow::Cow;
use std::panic::PanicHookInfo;

/// The message that the panic was raised with.
pub(crate) fn message(payload: &(dyn std::any::Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().map(std::string::ToString::to_string);
    let text = text.or_else(|| payload.downcast_ref::<String>().cloned());
    text.map_or_else(|| "no message".into(), |text| of_tch(&text).unwrap_or(text))
}

/// Whether the panic was raised within tch, by a method that unwraps a `TchError`.
pub(crate) fn is_of_tch(info: &PanicHookInfo<'_>) -> bool {
    let text = info.payload().downcast_ref::<String>();
    text.is_some_and(|text| text.starts_with(TCH))
        && info.location().is_some_and(|place| is_file_of_tch(place.file()))
}

/// Whether a source file is one of tch's as a registry has it, in a folder `tch-<version>`. Of a copy of tch elsewhere
/// nobody can tell, so its files count as the program's.
fn is_file_of_tch(file: &str) -> bool {
    let versioned = |part: &str| {
        let version = part.strip_prefix("tch-");
        version.is_some_and(|version| version.starts_with(|c: char| c.is_ascii_digit()))
    };
    let mut parts = file.split(['/', '\\']);
    parts.any(versioned) && parts.next() == Some("src")
}

/// tch's panics begin with this text.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_files_of_a_released_tch_are_tchs() {
        for file in [
            "/home/me/.cargo/registry/src/index.crates.io-1949cf8c6b5b557f/tch-0.26.0/src/wrappers/tensor_generated.rs",
            "C:\\cargo\\registry\\src\\index\\tch-0.24.0\\src\\tensor\\index.rs",
        ] {
            assert!(is_file_of_tch(file), "{file}");
        }
        for file in [
            "src/main.rs",
            "tch-ignite/src/main.rs",
            "vendor/tch/src/wrappers/tensor.rs",
            "tch-2/main.rs",
        ] {
            assert!(!is_file_of_tch(file), "{file}");
        }
    }
}
