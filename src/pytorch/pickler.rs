//! Writes values as a pickle of protocol 2, which every `torch.load` reads.

use std::collections::HashMap;
use std::mem::{Discriminant, discriminant};
use std::sync::Arc;

use super::machine::MAX_DEPTH;
use super::storages::{Placed, Storages};
use super::value::{Dict, DictClass, Object, Value};

/// Writes the pickle program that makes a value again. A shared part is written once and then referred to.
pub(super) struct Pickler<'s> {
    out: Vec<u8>,
    storages: &'s mut Storages,
    /// The memo's numbers of containers, bytes and tensors, by their address.
    shared: HashMap<(*const (), Discriminant<Value>), u32>,
    texts: HashMap<Arc<str>, u32>,
    globals: HashMap<(&'static str, String), u32>,
    next: u32,
}

impl<'s> Pickler<'s> {
    pub(super) fn new(storages: &'s mut Storages) -> Self {
        Self {
            out: vec![0x80, 2],
            storages,
            shared: HashMap::new(),
            texts: HashMap::new(),
            globals: HashMap::new(),
            next: 0,
        }
    }

    pub(super) fn pickle(mut self, value: &Value) -> Result<Vec<u8>, String> {
        self.value(value, 0)?;
        self.out.push(b'.');
        Ok(self.out)
    }

    /// Puts the top of the stack into the memo, so that later opcodes can refer to it.
    fn memoize(&mut self) -> Result<u32, String> {
        let number = self.next;
        self.next = number.checked_add(1).ok_or("the value has too many parts")?;
        match u8::try_from(number) {
            Ok(short) => self.out.extend([b'q', short]),
            Err(_) => {
                self.out.push(b'r');
                self.out.extend(number.to_le_bytes());
            }
        }
        Ok(number)
    }

    fn recall(&mut self, number: u32) {
        match u8::try_from(number) {
            Ok(short) => self.out.extend([b'h', short]),
            Err(_) => {
                self.out.push(b'j');
                self.out.extend(number.to_le_bytes());
            }
        }
    }

    fn value(&mut self, value: &Value, depth: usize) -> Result<(), String> {
        if depth > MAX_DEPTH {
            return Err(format!("its containers are more than {MAX_DEPTH} deep in each other"));
        }
        let address = match value {
            Value::None => return self.op(b'N'),
            Value::Bool(bool) => return self.op(if *bool { 0x88 } else { 0x89 }),
            Value::Int(int) => return self.int(*int),
            Value::Float(float) => {
                self.out.push(b'G');
                self.out.extend(float.to_be_bytes());
                return Ok(());
            }
            Value::BigInt(int) => return self.long(&int.bytes),
            Value::Complex(real, imaginary) => {
                self.global("__builtin__", "complex")?;
                self.out.push(b'G');
                self.out.extend(real.to_be_bytes());
                self.out.push(b'G');
                self.out.extend(imaginary.to_be_bytes());
                self.out.extend([0x86, b'R']);
                return Ok(());
            }
            Value::Str(text) => return self.text(text),
            Value::Constant(name) => return self.constant(name),
            Value::Device(name) => return self.device(name),
            Value::Bytes(bytes) => Arc::as_ptr(bytes).cast(),
            Value::List(values) | Value::Tuple(values) | Value::Set(values) => {
                Arc::as_ptr(values).cast()
            }
            Value::Dict(dict) => Arc::as_ptr(dict).cast(),
            Value::Tensor(tensor) => Arc::as_ptr(tensor).cast(),
            Value::Object(object) => Arc::as_ptr(object).cast(),
        };
        // A list and a tuple may be of the same elements in memory, and are two values.
        let address: (*const (), _) = (address, discriminant(value));
        if let Some(number) = self.shared.get(&address) {
            self.recall(*number);
            return Ok(());
        }
        match value {
            Value::Bytes(bytes) => self.bytes(bytes)?,
            Value::List(values) => {
                self.out.push(b']');
                self.items(values, depth)?;
            }
            Value::Tuple(values) => self.tuple(values, depth)?,
            Value::Set(values) => {
                self.global("__builtin__", "set")?;
                self.out.push(b']');
                self.items(values, depth)?;
                self.out.extend([0x85, b'R']);
            }
            Value::Dict(dict) => self.dict(dict, depth)?,
            Value::Tensor(tensor) => {
                let placed = self.storages.place(tensor)?;
                self.tensor(&placed)?;
            }
            Value::Object(object) => self.object(object, depth)?,
            _ => {}
        }
        let number = self.memoize()?;
        self.shared.insert(address, number);
        Ok(())
    }

    fn op(&mut self, op: u8) -> Result<(), String> {
        self.out.push(op);
        Ok(())
    }

    fn int(&mut self, int: i64) -> Result<(), String> {
        if let Ok(int) = u8::try_from(int) {
            self.out.extend([b'K', int]);
        } else if let Ok(int) = u16::try_from(int) {
            self.out.push(b'M');
            self.out.extend(int.to_le_bytes());
        } else if let Ok(int) = i32::try_from(int) {
            self.out.push(b'J');
            self.out.extend(int.to_le_bytes());
        } else {
            return self.long(&int.to_le_bytes());
        }
        Ok(())
    }

    fn long(&mut self, bytes: &[u8]) -> Result<(), String> {
        let length = u8::try_from(bytes.len()).map_err(|_| "an integer is too long")?;
        self.out.extend([0x8a, length]);
        self.out.extend(bytes);
        Ok(())
    }

    fn text(&mut self, text: &Arc<str>) -> Result<(), String> {
        if let Some(number) = self.texts.get(text) {
            self.recall(*number);
            return Ok(());
        }
        self.out.push(b'X');
        let length = u32::try_from(text.len()).map_err(|_| "a text is too long")?;
        self.out.extend(length.to_le_bytes());
        self.out.extend(text.as_bytes());
        let number = self.memoize()?;
        self.texts.insert(text.clone(), number);
        Ok(())
    }

    fn plain_text(&mut self, text: &str) -> Result<(), String> {
        self.text(&text.into())
    }

    /// Writes bytes as Python does in this protocol: as a text of the same code points.
    fn bytes(&mut self, bytes: &[u8]) -> Result<(), String> {
        if bytes.is_empty() {
            // Python writes `b''` in a way that torch.load(weights_only=True) refuses.
            self.global("__builtin__", "bytearray")?;
            self.out.extend([b')', b'R']);
            return Ok(());
        }
        self.global("_codecs", "encode")?;
        let text: String = bytes.iter().map(|byte| char::from(*byte)).collect();
        self.plain_text(&text)?;
        self.plain_text("latin1")?;
        self.out.extend([0x86, b'R']);
        Ok(())
    }

    fn global(&mut self, module: &'static str, name: &str) -> Result<(), String> {
        let key = (module, name.to_owned());
        if let Some(number) = self.globals.get(&key) {
            self.recall(*number);
            return Ok(());
        }
        self.write_global(module, name)?;
        let number = self.memoize()?;
        self.globals.insert(key, number);
        Ok(())
    }

    fn write_global(&mut self, module: &str, name: &str) -> Result<(), String> {
        if module.contains('\n') || name.contains('\n') || module.is_empty() || name.is_empty() {
            return Err(format!("'{module}.{name}' is no name"));
        }
        // Pickles of protocol 2 use Python 2's name of this module.
        let module = if module == "builtins" { "__builtin__" } else { module };
        self.out.push(b'c');
        self.out.extend(format!("{module}\n{name}\n").into_bytes());
        Ok(())
    }

    fn constant(&mut self, name: &str) -> Result<(), String> {
        let layouts =
            ["strided", "sparse_coo", "sparse_csr", "sparse_csc", "sparse_bsr", "sparse_bsc"];
        let (module, last) =
            name.rsplit_once('.').ok_or_else(|| format!("'{name}' is no full name"))?;
        if module == "torch" && layouts.contains(&last) {
            self.global("torch.serialization", "_get_layout")?;
            self.plain_text(name)?;
            self.out.extend([0x85, b'R']);
            return Ok(());
        }
        self.write_global(module, last)
    }

    fn device(&mut self, name: &str) -> Result<(), String> {
        self.global("torch", "device")?;
        match name.split_once(':') {
            None => {
                self.plain_text(name)?;
                self.out.push(0x85);
            }
            Some((kind, index)) => {
                self.plain_text(kind)?;
                self.int(index.parse().map_err(|_| format!("'{name}' is no device"))?)?;
                self.out.push(0x86);
            }
        }
        self.op(b'R')
    }

    fn items(&mut self, values: &[Value], depth: usize) -> Result<(), String> {
        if values.is_empty() {
            return Ok(());
        }
        self.out.push(b'(');
        for value in values {
            self.value(value, depth + 1)?;
        }
        self.op(b'e')
    }

    fn tuple(&mut self, values: &[Value], depth: usize) -> Result<(), String> {
        if values.len() > 3 {
            self.out.push(b'(');
        }
        for value in values {
            self.value(value, depth + 1)?;
        }
        self.op(match values.len() {
            0 => b')',
            count @ 1..=3 => 0x84 + count as u8,
            _ => b't',
        })
    }

    fn ints(&mut self, ints: &[i64]) -> Result<(), String> {
        self.out.push(b'(');
        for int in ints {
            self.int(*int)?;
        }
        self.op(b't')
    }

    fn entries(&mut self, entries: &[(Value, Value)], depth: usize) -> Result<(), String> {
        if entries.is_empty() {
            return Ok(());
        }
        self.out.push(b'(');
        for (key, value) in entries {
            self.value(key, depth + 1)?;
            self.value(value, depth + 1)?;
        }
        self.op(b'u')
    }

    fn dict(&mut self, dict: &Dict, depth: usize) -> Result<(), String> {
        match dict.class {
            DictClass::Dict => self.out.push(b'}'),
            DictClass::OrderedDict => {
                self.global("collections", "OrderedDict")?;
                self.out.extend([b')', b'R']);
            }
            DictClass::Counter => {
                self.global("collections", "Counter")?;
                self.out.extend([b')', b'R']);
            }
        }
        self.entries(&dict.entries, depth)?;
        match &dict.attributes {
            Some(state) => {
                self.value(state, depth + 1)?;
                self.op(b'b')
            }
            None => Ok(()),
        }
    }

    fn object(&mut self, object: &Object, depth: usize) -> Result<(), String> {
        let class = object.class.rsplit_once('.');
        let (module, name) = class.ok_or_else(|| format!("'{}' is no full name", object.class))?;
        self.write_global(module, name)?;
        self.value(&object.arguments, depth + 1)?;
        self.out.push(if object.new { 0x81 } else { b'R' });
        self.items(&object.elements, depth)?;
        self.entries(&object.entries, depth)?;
        match &object.state {
            Some(state) => {
                self.value(state, depth + 1)?;
                self.op(b'b')
            }
            None => Ok(()),
        }
    }

    fn storage(&mut self, placed: &Placed, class: Option<&'static str>) -> Result<(), String> {
        self.out.push(b'(');
        self.plain_text("storage")?;
        let count = match class {
            Some(class) => {
                self.global("torch", class)?;
                placed.storage_length / placed.dtype.size()
            }
            None => {
                self.global("torch.storage", "UntypedStorage")?;
                placed.storage_length
            }
        };
        self.plain_text(&placed.storage.to_string())?;
        self.plain_text("cpu")?;
        self.int(i64::try_from(count).map_err(|error| error.to_string())?)?;
        self.out.extend([b't', b'Q']);
        Ok(())
    }

    fn tensor(&mut self, placed: &Placed) -> Result<(), String> {
        // Types without a class of storages, and storages read as another type, are written as untyped ones.
        let class = placed.dtype.storage_class().filter(|_| placed.storage_dtype == placed.dtype);
        if placed.bare {
            return self.storage(placed, class);
        }
        if placed.parameter {
            self.global("torch._utils", "_rebuild_parameter")?;
            self.out.push(b'(');
        }
        let function = if class.is_some() { "_rebuild_tensor_v2" } else { "_rebuild_tensor_v3" };
        self.global("torch._utils", function)?;
        self.out.push(b'(');
        self.storage(placed, class)?;
        self.int(placed.offset)?;
        self.ints(&placed.shape)?;
        self.ints(&placed.strides)?;
        let grad = placed.requires_grad && !placed.parameter;
        self.out.push(if grad { 0x88 } else { 0x89 });
        self.hooks()?;
        if class.is_none() {
            self.constant(placed.dtype.name())?;
        }
        if placed.conjugate || placed.negative {
            self.out.push(b'}');
            for (name, is_set) in [("conj", placed.conjugate), ("neg", placed.negative)] {
                if is_set {
                    self.plain_text(name)?;
                    self.out.extend([0x88, b's']);
                }
            }
        }
        self.out.extend([b't', b'R']);
        if placed.parameter {
            self.out.push(if placed.requires_grad { 0x88 } else { 0x89 });
            self.hooks()?;
            self.out.extend([b't', b'R']);
        }
        Ok(())
    }

    /// Writes the empty `OrderedDict` that stands where PyTorch once had hooks.
    fn hooks(&mut self) -> Result<(), String> {
        self.global("collections", "OrderedDict")?;
        self.out.extend([b')', b'R']);
        Ok(())
    }
}
