//! Compiles the C++ side of `src/bridge` against the libtorch that torch-sys found.

use std::env;
use std::path::{Path, PathBuf};

const FILES: &[&str] = &[
    "src/bridge/autocast.cpp",
    "src/bridge/average.cpp",
    "src/bridge/batch_norm.cpp",
    "src/bridge/bridge.cpp",
    "src/bridge/compiled.cpp",
    "src/bridge/fused.cpp",
    "src/bridge/generator.cpp",
    "src/bridge/gradients.cpp",
    "src/bridge/host_syncs.cpp",
    "src/bridge/low_precision.cpp",
    "src/bridge/normalize.cpp",
    "src/bridge/own.cpp",
    "src/bridge/script.cpp",
    "src/bridge/thread_state.cpp",
];
const DISTRIBUTED: &[&str] = &["src/bridge/dist.cpp", "src/bridge/reducer.cpp"];
const KERNELS: &[&str] = &["src/bridge/kernel_form.cpp", "src/bridge/one_pass.cpp"];

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
    let mut build = cc::Build::new();
    build
        .cpp(true)
        .std("c++17")
        .pic(true)
        .warnings(false)
        .include(&include)
        .include(api)
        .define("_GLIBCXX_USE_CXX11_ABI", abi.as_str())
        .define("GLOG_USE_GLOG_EXPORT", None);
    // The compiler has to vectorise the loops of these files. It must round products and sums as they are written, so
    // that results do not depend on the compiler.
    build
        .clone()
        .opt_level(3)
        .flag("-ffp-contract=off")
        .flag("-fno-math-errno")
        .flag("-fno-trapping-math")
        .files(KERNELS)
        .compile("tch_ignite_kernels");
    build.opt_level(2);
    if env::var_os("CARGO_FEATURE_DISTRIBUTED").is_some() {
        compile_distributed(build.clone(), &include);
    }
    // The linker gets the libraries in the reverse of this order, and a library must come before the ones that it
    // calls. So this one is compiled last.
    build.files(FILES).compile("tch_ignite_bridge");

    // Binaries of this package that are started by hand find libtorch by this path.
    println!("cargo:rustc-link-arg=-Wl,-rpath,{}", lib.display());
    link_into_target(&lib);
}

/// Compiles the code that calls libtorch's process groups. libtorch comes without gloo's headers, so
/// `src/bridge/declarations` declares the few classes of gloo that libtorch's headers name.
fn compile_distributed(mut build: cc::Build, include: &Path) {
    let header = "torch/csrc/distributed/c10d/ProcessGroupGloo.hpp";
    if !include.join(header).exists() {
        fail(&format!(
            "the feature `distributed` needs {header}, which this libtorch does not have (in {}). Use one with torch.distributed, such as the torch wheel of PyPI for Linux, or leave the feature out",
            include.display()
        ));
    }
    build.include("src/bridge/declarations").files(DISTRIBUTED);
    if env::var_os("CARGO_FEATURE_NCCL").is_some() {
        nccl(&mut build);
    }
    build.compile("tch_ignite_distributed");
}

/// Adds the code for NCCL. Its process group is in the CUDA half of libtorch, which also brings NCCL itself.
fn nccl(build: &mut cc::Build) {
    println!("cargo:rerun-if-env-changed=NCCL_INCLUDE");
    println!("cargo:rerun-if-env-changed=CUDA_INCLUDE");
    let folders = |variable: &str, default: &str| -> Vec<PathBuf> {
        let given = env::var_os(variable).unwrap_or_else(|| default.into());
        env::split_paths(&given).collect()
    };
    let (cuda, nccl) = (
        folders("CUDA_INCLUDE", "/usr/local/cuda/include"),
        folders("NCCL_INCLUDE", "/usr/include"),
    );
    for (variable, folders, header) in
        [("CUDA_INCLUDE", &cuda, "cuda_runtime.h"), ("NCCL_INCLUDE", &nccl, "nccl.h")]
    {
        if !folders.iter().any(|folder| folder.join(header).exists()) {
            fail(&format!(
                "the feature `nccl` needs {header}, which is not in {}. Set {variable} to its folder (or folders, as in PATH)",
                folders
                    .iter()
                    .map(|folder| folder.display().to_string())
                    .collect::<Vec<_>>()
                    .join(" or ")
            ));
        }
    }
    build.includes(nccl).includes(cuda).define("TCH_IGNITE_NCCL", None);
    build.file("src/bridge/dist_nccl.cpp");
    println!("cargo:rustc-link-lib=torch_cuda");
    println!("cargo:rustc-link-lib=c10_cuda");
}

/// Links libtorch's folder into the target folder. Cargo puts search paths inside the target folder on the loader's
/// path of everything that it runs (tests, doc tests, examples), also in crates that depend on this one, so all of
/// these find libtorch. The link is to the folder and not to its files, because libtorch looks for its own libraries
/// relative to itself.
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
