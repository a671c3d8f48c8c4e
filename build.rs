//! Compiles the C++ side of `src/bridge` against the libtorch that torch-sys found.

use std::env;
use std::path::{Path, PathBuf};

fn main() {
    println!("cargo:rerun-if-changed=src/bridge");
    println!("cargo:rerun-if-env-changed=LIBTORCH_INCLUDE");
    println!("cargo:rerun-if-env-changed=LIBTORCH_CXX11_ABI");
    if env::var_os("CARGO_FEATURE_DOC_ONLY").is_some() {
        return;
    }
    let lib = PathBuf::from(env::var_os("DEP_TCH_LIBTORCH_LIB").unwrap_or_else(|| {
        fail("torch-sys did not say where libtorch lives; this platform is not supported yet (Linux and macOS are)")
    }));
    let root = env::var_os("LIBTORCH_INCLUDE")
        .map(PathBuf::from)
        .or_else(|| lib.parent().map(Path::to_path_buf))
        .unwrap_or_else(|| PathBuf::from("/usr"));
    let include = root.join("include");
    let api = include.join("torch/csrc/api/include");
    if !api.join("torch/optim.h").exists() {
        fail(&format!(
            "no libtorch headers at {}. Set LIBTORCH (or LIBTORCH_INCLUDE) to a folder that holds include/ and lib/",
            api.display()
        ));
    }

    let abi = env::var("LIBTORCH_CXX11_ABI").unwrap_or_else(|_| "1".into());
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .pic(true)
        .warnings(false)
        .opt_level(2)
        .include(include)
        .include(api)
        .define("_GLIBCXX_USE_CXX11_ABI", abi.as_str())
        .define("GLOG_USE_GLOG_EXPORT", None)
        .file("src/bridge/bridge.cpp")
        .file("src/bridge/generator.cpp")
        .file("src/bridge/normalize.cpp")
        .compile("tch_ignite_bridge");

    // For binaries of this package that are started by hand.
    println!("cargo:rustc-link-arg=-Wl,-rpath,{}", lib.display());
    link_into_target(&lib);
}

/// Cargo puts search paths inside the target folder on the loader's path of all that it runs
/// (tests, doc tests, examples), in crates that depend on this one too. So libtorch is shown there.
/// A link to the folder, not to its files: libtorch looks for its own libraries relative to itself.
fn link_into_target(lib: &Path) {
    #[cfg(unix)]
    if let Some(out) = env::var_os("OUT_DIR") {
        let link = PathBuf::from(out).join("libtorch");
        let _ = std::fs::remove_file(&link);
        if std::os::unix::fs::symlink(lib, &link).is_ok() {
            println!("cargo:rustc-link-search=native={}", link.display());
        }
    }
    #[cfg(not(unix))]
    let _ = lib;
}

fn fail(message: &str) -> ! {
    eprintln!("tch-ignite: {message}");
    std::process::exit(1)
}
