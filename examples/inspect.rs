//! Shows what is in a PyTorch file: a tree with types and shapes. Nothing in the file is executed.
//!
//! `cargo run --release --example inspect -- model.pt`

use std::collections::HashMap;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;
use tch_ignite::pytorch::{Reader, StoredTensor, Value};

/// Shows what is in a PyTorch file (.pt, .pth, .ckpt).
#[derive(Parser)]
struct Args {
    /// The file
    file: PathBuf,
    /// Classes that are shown as data although torch.load(weights_only=True) refuses them
    #[arg(long, value_name = "CLASS")]
    allow: Vec<String>,
    /// How many MiB everything but the tensors may take, where a file needs more than it may by itself
    #[arg(long, value_name = "MIB")]
    max_memory: Option<u32>,
    /// How many entries of a list or dict are shown
    #[arg(long, value_name = "N", default_value_t = 1000)]
    most: usize,
}

/// Texts are cut off after this many characters.
const MAX_TEXT: usize = 60;

struct Tree<'v> {
    most: usize,
    tensors: Vec<&'v StoredTensor>,
    /// The first path at which each tensor was found, to show which tensors are the same or share a storage.
    paths: HashMap<*const StoredTensor, String>,
    bytes: u64,
}

impl<'v> Tree<'v> {
    fn print(&mut self, name: &str, value: &'v Value, path: &str, indent: usize) {
        let margin = "  ".repeat(indent);
        let entries: Vec<(String, &Value)> = match value {
            Value::List(values) | Value::Tuple(values) | Value::Set(values) => {
                values.iter().enumerate().map(|(index, value)| (index.to_string(), value)).collect()
            }
            Value::Dict(dict) => dict.iter().map(|(key, value)| (key.to_string(), value)).collect(),
            Value::Object(object) => [("arguments".to_owned(), object.arguments())]
                .into_iter()
                .chain(object.state().map(|state| ("state".to_owned(), state)))
                .chain(object.entries().iter().map(|(key, value)| (key.to_string(), value)))
                .collect(),
            Value::Tensor(tensor) => {
                println!("{margin}{name}: {}", self.tensor(tensor, path));
                return;
            }
            other => {
                let text = other.to_string();
                let more = if text.chars().count() > MAX_TEXT { "…" } else { "" };
                println!(
                    "{margin}{name}: {}{more}",
                    text.chars().take(MAX_TEXT).collect::<String>()
                );
                return;
            }
        };
        println!("{margin}{name}: {} of {}", value.type_name(), entries.len());
        for (key, value) in entries.iter().take(self.most) {
            self.print(key, value, &format!("{path}/{key}"), indent + 1);
        }
        if entries.len() > self.most {
            println!("{margin}  … {} more", entries.len() - self.most);
        }
    }

    fn tensor(&mut self, tensor: &'v StoredTensor, path: &str) -> String {
        let mut text = format!("{} {:?}", tensor.dtype(), tensor.size());
        if tensor.is_parameter() {
            text.push_str(", parameter");
        }
        if tensor.requires_grad() {
            text.push_str(", requires_grad");
        }
        match self.tensors.iter().find(|other| other.shares_storage_with(tensor)) {
            Some(other) => {
                let first =
                    self.paths.get(&std::ptr::from_ref(*other)).cloned().unwrap_or_default();
                text.push_str(&format!(
                    ", strides {:?}, shares memory with {first}",
                    tensor.stride()
                ));
            }
            None => {
                self.bytes += tensor.numel() as u64 * tensor.dtype().size();
                self.tensors.push(tensor);
                self.paths.insert(std::ptr::from_ref(tensor), path.to_owned());
            }
        }
        text
    }
}

fn inspect(args: &Args) -> Result<()> {
    let mut reader = args.allow.iter().fold(Reader::new(), |reader, class| reader.allow(class));
    if let Some(mebibytes) = args.max_memory {
        reader = reader.max_memory(u64::from(mebibytes) << 20);
    }
    let value = reader.read(&args.file)?;
    let mut tree = Tree { most: args.most, tensors: vec![], paths: HashMap::new(), bytes: 0 };
    tree.print(&args.file.display().to_string(), &value, "", 0);
    println!("{} storages, {} bytes of tensors", tree.tensors.len(), tree.bytes);
    Ok(())
}

fn main() -> ExitCode {
    match inspect(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("inspect: {error:#}");
            ExitCode::FAILURE
        }
    }
}
