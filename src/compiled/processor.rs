//! The processor that programs were compiled for, and the one that there is.

/// Why programs for a kind of machine with these instructions cannot run here; `None` where they can.
pub(super) fn refusal(machine: &str, instructions: &[String]) -> Option<String> {
    let here = std::env::consts::ARCH;
    // Python on macOS calls it arm64.
    if machine != here && !(machine == "arm64" && here == "aarch64") {
        return Some(format!("it was compiled for {machine}, and this is {here}"));
    }
    let missing: Vec<_> =
        instructions.iter().map(String::as_str).filter(|name| !has(name)).collect();
    (!missing.is_empty()).then(|| {
        format!(
            "it was compiled with instructions that this processor lacks: {}",
            missing.join(", ")
        )
    })
}

/// Whether the processor has some instructions, by their name in the flags of compilers. Unknown ones it has not.
#[cfg(target_arch = "x86_64")]
fn has(instructions: &str) -> bool {
    match instructions {
        "avx2" => is_x86_feature_detected!("avx2"),
        "fma" => is_x86_feature_detected!("fma"),
        "f16c" => is_x86_feature_detected!("f16c"),
        "avx512f" => is_x86_feature_detected!("avx512f"),
        "avx512dq" => is_x86_feature_detected!("avx512dq"),
        "avx512vl" => is_x86_feature_detected!("avx512vl"),
        "avx512bw" => is_x86_feature_detected!("avx512bw"),
        "avx512bf16" => is_x86_feature_detected!("avx512bf16"),
        "avx512vnni" => is_x86_feature_detected!("avx512vnni"),
        "amx-tile" | "amx-bf16" | "amx-int8" | "amx-fp16" => {
            in_cpuinfo(&instructions.replace('-', "_"))
        }
        _ => false,
    }
}

/// Looks for instructions that the standard library does not know yet.
#[cfg(target_arch = "x86_64")]
fn in_cpuinfo(flag: &str) -> bool {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags = text.lines().find_map(|line| line.strip_prefix("flags"));
    flags.is_some_and(|flags| flags.split_whitespace().any(|has| has == flag))
}

#[cfg(not(target_arch = "x86_64"))]
fn has(_instructions: &str) -> bool {
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_for_other_processors_are_refused() {
        let here = std::env::consts::ARCH;
        assert_eq!(refusal(here, &[]), None);
        let other = refusal("s390x", &[]).unwrap();
        assert!(other.contains("compiled for s390x"), "{other}");
        let lacks = refusal(here, &["mmx17".into()]).unwrap();
        assert!(lacks.contains("lacks: mmx17"), "{lacks}");
    }
}
