use std::fmt;
use std::sync::Arc;

use tch::Tensor;

use super::tensor::StoredTensor;
use crate::error::{Error, Result};

/// A value of a PyTorch file: plain data of Python, and tensors.
///
/// Containers are shared where Python's are: cloning a value is cheap, and a container that two others refer to
/// exists once. `Display` shows a value as Python does, and a tensor as its type and shape.
///
/// ```
/// use tch::Tensor;
/// use tch_ignite::pytorch::{Dict, Value};
/// let mut model = Dict::new();
/// model.insert("weight", Value::tensor(&Tensor::from_slice(&[1f32, 2.]))?);
/// model.insert("epochs", 3);
/// let value = Value::from(model);
/// assert_eq!(value.get("epochs").and_then(Value::as_i64), Some(3));
/// assert_eq!(value.to_string(), "{'weight': tensor(torch.float32, [2]), 'epochs': 3}");
/// # Ok::<(), tch_ignite::Error>(())
/// ```
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Value {
    /// `None`.
    None,
    /// `True` or `False`.
    Bool(bool),
    /// An integer of at most 64 bits.
    Int(i64),
    /// A longer integer.
    BigInt(BigInt),
    /// A float.
    Float(f64),
    /// A complex number: real and imaginary part.
    Complex(f64, f64),
    /// A text.
    Str(Arc<str>),
    /// `bytes` or a `bytearray`.
    Bytes(Arc<[u8]>),
    /// A list.
    List(Arc<Vec<Value>>),
    /// A tuple or `torch.Size`.
    Tuple(Arc<Vec<Value>>),
    /// A set.
    Set(Arc<Vec<Value>>),
    /// A `dict`, `OrderedDict` or `Counter`.
    Dict(Arc<Dict>),
    /// A tensor or parameter.
    Tensor(Arc<StoredTensor>),
    /// A constant of PyTorch by its full name: types such as `torch.float32`, layouts such as `torch.strided`.
    Constant(Arc<str>),
    /// A `torch.device`, such as `cuda:0`.
    Device(Arc<str>),
    /// An object that was not built; the value has everything that the file says of it.
    Object(Arc<Object>),
}

/// An integer of more than 64 bits.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct BigInt {
    /// Two's complement, the lowest byte first.
    pub(super) bytes: Arc<[u8]>,
}

/// An object whose class is no plain data, such as a sparse tensor, or a class that was
/// [allowed](super::Reader::allow): it has everything that the file says of the object. None of the class's code was
/// run.
#[derive(Clone, Debug)]
pub struct Object {
    /// The class or function by its full name.
    pub(super) class: Arc<str>,
    /// Whether the file makes the object with the class's `__new__`; otherwise it calls the class or function.
    pub(super) new: bool,
    pub(super) arguments: Value,
    pub(super) state: Option<Value>,
    /// Elements that the file appends to the object as if it were a list, and entries that it sets as if it were a
    /// dict.
    pub(super) elements: Vec<Value>,
    pub(super) entries: Vec<(Value, Value)>,
}

impl Object {
    /// The class or function by its full name.
    pub fn class(&self) -> &str {
        &self.class
    }

    /// The arguments with which the class or function is called, as a tuple.
    pub fn arguments(&self) -> &Value {
        &self.arguments
    }

    /// The state that the file sets afterwards: for most classes a dict of the object's attributes.
    pub fn state(&self) -> Option<&Value> {
        self.state.as_ref()
    }

    /// The elements that the file appends to the object, if it is like a list.
    pub fn elements(&self) -> &[Value] {
        &self.elements
    }

    /// The entries that the file sets in the object, if it is like a dict.
    pub fn entries(&self) -> &[(Value, Value)] {
        &self.entries
    }
}

/// The class that a [`Dict`] has in Python.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum DictClass {
    #[default]
    Dict,
    OrderedDict,
    Counter,
}

/// A `dict`, in the order of insertion.
#[derive(Clone, Debug, Default)]
pub struct Dict {
    pub(super) class: DictClass,
    pub(super) entries: Vec<(Value, Value)>,
    /// The object's own attributes, such as `_metadata` of a module's state.
    pub(super) attributes: Option<Value>,
}

impl Dict {
    /// An empty `dict`.
    pub fn new() -> Self {
        Self::default()
    }

    /// An empty `OrderedDict`, which PyTorch's `state_dict()` is.
    pub fn ordered() -> Self {
        Self { class: DictClass::OrderedDict, ..Self::default() }
    }

    /// Number of entries.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are no entries.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The entries in their order.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = (&Value, &Value)> {
        self.entries.iter().map(|(key, value)| (key, value))
    }

    /// The value of the key that is this text. The entries are searched one by one.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.entries.iter().find(|(k, _)| k.as_str() == Some(key)).map(|(_, value)| value)
    }

    /// The value of the key that is this integer. The entries are searched one by one.
    pub fn get_int(&self, key: i64) -> Option<&Value> {
        self.entries
            .iter()
            .find(|(k, _)| matches!(k, Value::Int(int) if *int == key))
            .map(|(_, v)| v)
    }

    /// Sets the value of a key that is a text, which may be new.
    pub fn insert(&mut self, key: &str, value: impl Into<Value>) {
        let value = value.into();
        match self.entries.iter_mut().find(|(k, _)| k.as_str() == Some(key)) {
            Some((_, place)) => *place = value,
            None => self.entries.push((key.into(), value)),
        }
    }

    /// Adds an entry without a check that its key is new. The key may be of any hashable type.
    pub fn push(&mut self, key: impl Into<Value>, value: impl Into<Value>) {
        self.entries.push((key.into(), value.into()));
    }
}

impl Value {
    /// A tensor as a value. The memory is shared, not copied: its elements are read when the value is written.
    ///
    /// # Errors
    /// A tensor that is undefined, sparse or quantized.
    pub fn tensor(tensor: &Tensor) -> Result<Self> {
        StoredTensor::new(tensor).map(|stored| Self::Tensor(Arc::new(stored)))
    }

    /// A list.
    pub fn list(values: impl IntoIterator<Item = impl Into<Value>>) -> Self {
        Self::List(Arc::new(values.into_iter().map(Into::into).collect()))
    }

    /// A tuple.
    pub fn tuple(values: impl IntoIterator<Item = impl Into<Value>>) -> Self {
        Self::Tuple(Arc::new(values.into_iter().map(Into::into).collect()))
    }

    /// The value that a dict has under this key (a text, or the text of an integer), or that a list or tuple has at
    /// this index.
    pub fn get(&self, key: &str) -> Option<&Value> {
        match self {
            Self::Dict(dict) => dict
                .get(key)
                .or_else(|| dict.get_int(key.parse().ok().filter(|i: &i64| i.to_string() == key)?)),
            Self::List(values) | Self::Tuple(values) => values.get(key.parse::<usize>().ok()?),
            _ => None,
        }
    }

    /// Like [`get`](Self::get), but a missing value is an error.
    ///
    /// # Errors
    /// There is no such value; the error's text lists what there is.
    pub fn require(&self, key: &str) -> Result<&Value> {
        self.get(key).ok_or_else(|| {
            let there = match self {
                Self::Dict(dict) => {
                    let mut keys: Vec<_> =
                        dict.iter().take(20).map(|(k, _)| k.to_string()).collect();
                    if dict.len() > keys.len() {
                        keys.push(format!("{} more", dict.len() - keys.len()));
                    }
                    format!("it has {}", keys.join(", "))
                }
                other => format!("it is a {}", other.type_name()),
            };
            Error::State(format!("there is no '{key}': {there}"))
        })
    }

    /// The name of its type in Python.
    pub fn type_name(&self) -> &str {
        match self {
            Self::None => "NoneType",
            Self::Bool(_) => "bool",
            Self::Int(_) | Self::BigInt(_) => "int",
            Self::Float(_) => "float",
            Self::Complex(..) => "complex",
            Self::Str(_) => "str",
            Self::Bytes(_) => "bytes",
            Self::List(_) => "list",
            Self::Tuple(_) => "tuple",
            Self::Set(_) => "set",
            Self::Dict(dict) => match dict.class {
                DictClass::Dict => "dict",
                DictClass::OrderedDict => "OrderedDict",
                DictClass::Counter => "Counter",
            },
            Self::Tensor(_) => "Tensor",
            Self::Constant(_) => "constant",
            Self::Device(_) => "device",
            Self::Object(object) => &object.class,
        }
    }

    /// The text, if it is one.
    pub fn as_str(&self) -> Option<&str> {
        if let Self::Str(text) = self { Some(text) } else { None }
    }

    /// The integer, if it is one of at most 64 bits.
    pub fn as_i64(&self) -> Option<i64> {
        if let Self::Int(int) = self { Some(*int) } else { None }
    }

    /// The number, if it is a float or an integer.
    pub fn as_f64(&self) -> Option<f64> {
        match self {
            Self::Float(float) => Some(*float),
            Self::Int(int) => Some(*int as f64),
            _ => None,
        }
    }

    /// Whether it is true, if it is a bool.
    pub fn as_bool(&self) -> Option<bool> {
        if let Self::Bool(bool) = self { Some(*bool) } else { None }
    }

    /// The dict, if it is one.
    pub fn as_dict(&self) -> Option<&Dict> {
        if let Self::Dict(dict) = self { Some(dict) } else { None }
    }

    /// The values of a list or tuple, if it is one.
    pub fn as_slice(&self) -> Option<&[Value]> {
        match self {
            Self::List(values) | Self::Tuple(values) => Some(values),
            _ => None,
        }
    }

    /// The tensor, if it is one.
    pub fn as_tensor(&self) -> Option<&StoredTensor> {
        if let Self::Tensor(tensor) = self { Some(tensor) } else { None }
    }

    /// Calls `visit` for this value and all in it, with the path to each: keys and indices, each behind a `/`.
    /// The path of the value itself is empty. An object's parts are `arguments`, `state`, its elements and entries.
    pub fn walk<'v>(&'v self, visit: &mut impl FnMut(&str, &'v Value)) {
        self.walk_from(&mut String::new(), visit);
    }

    fn walk_from<'v>(&'v self, path: &mut String, visit: &mut impl FnMut(&str, &'v Value)) {
        visit(path, self);
        let length = path.len();
        let mut inner = |key: &dyn fmt::Display, value: &'v Value| {
            use fmt::Write;
            // Writing to a String cannot fail.
            let _ = write!(path, "/{key}");
            value.walk_from(path, visit);
            path.truncate(length);
        };
        match self {
            Self::List(values) | Self::Tuple(values) => {
                values.iter().enumerate().for_each(|(index, value)| inner(&index, value));
            }
            Self::Dict(dict) => dict.iter().for_each(|(key, value)| inner(&Plain(key), value)),
            Self::Object(object) => {
                inner(&"arguments", &object.arguments);
                object.state.iter().for_each(|state| inner(&"state", state));
                object.elements.iter().enumerate().for_each(|(index, value)| inner(&index, value));
                object.entries.iter().for_each(|(key, value)| inner(&Plain(key), value));
            }
            _ => {}
        }
    }
}

/// Displays a value as Python's `str` does: a text has no quotes.
struct Plain<'v>(&'v Value);

impl fmt::Display for Plain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Value::Str(text) => f.write_str(text),
            other => other.fmt(f),
        }
    }
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("None"),
            Self::Bool(true) => f.write_str("True"),
            Self::Bool(false) => f.write_str("False"),
            Self::Int(int) => int.fmt(f),
            Self::BigInt(int) => int.fmt(f),
            Self::Float(float) => f.write_str(&python_float(*float)),
            Self::Complex(real, imaginary) => {
                let part = |float: f64| python_float(float).trim_end_matches(".0").to_owned();
                let sign = if imaginary.is_sign_negative() { "" } else { "+" };
                match *real == 0. && !real.is_sign_negative() {
                    true => write!(f, "{}j", part(*imaginary)),
                    false => write!(f, "({}{sign}{}j)", part(*real), part(*imaginary)),
                }
            }
            Self::Str(text) => quoted(f, text),
            Self::Bytes(bytes) => {
                let quote = quote(|quote| bytes.contains(&(quote as u8)));
                write!(f, "b{quote}")?;
                for byte in bytes.iter() {
                    match byte {
                        b'\\' => f.write_str("\\\\")?,
                        byte if char::from(*byte) == quote => write!(f, "\\{quote}")?,
                        b'\n' => f.write_str("\\n")?,
                        b'\r' => f.write_str("\\r")?,
                        b'\t' => f.write_str("\\t")?,
                        0x20..0x7f => write!(f, "{}", char::from(*byte))?,
                        _ => write!(f, "\\x{byte:02x}")?,
                    }
                }
                write!(f, "{quote}")
            }
            Self::List(values) => listed(f, "[", values, "]"),
            Self::Tuple(values) => {
                listed(f, "(", values, if values.len() == 1 { ",)" } else { ")" })
            }
            Self::Set(values) if values.is_empty() => f.write_str("set()"),
            Self::Set(values) => listed(f, "{", values, "}"),
            Self::Dict(dict) => {
                let (before, after) = match dict.class {
                    DictClass::Dict => ("{", "}"),
                    DictClass::OrderedDict => ("OrderedDict({", "})"),
                    DictClass::Counter => ("Counter({", "})"),
                };
                keyed(f, before, &dict.entries, after)
            }
            Self::Tensor(tensor) => write!(f, "{tensor:?}"),
            Self::Constant(name) => f.write_str(name),
            Self::Device(name) => f.write_str(name),
            Self::Object(object) => {
                f.write_str(&object.class)?;
                object.arguments.fmt(f)?;
                if !object.elements.is_empty() {
                    listed(f, "[", &object.elements, "]")?;
                }
                if !object.entries.is_empty() {
                    keyed(f, "{", &object.entries, "}")?;
                }
                object.state.iter().try_for_each(|state| write!(f, ".__setstate__({state})"))
            }
        }
    }
}

fn listed(f: &mut fmt::Formatter<'_>, before: &str, values: &[Value], after: &str) -> fmt::Result {
    f.write_str(before)?;
    for (index, value) in values.iter().enumerate() {
        write!(f, "{}{value}", if index == 0 { "" } else { ", " })?;
    }
    f.write_str(after)
}

fn keyed(
    f: &mut fmt::Formatter<'_>,
    before: &str,
    entries: &[(Value, Value)],
    after: &str,
) -> fmt::Result {
    f.write_str(before)?;
    for (index, (key, value)) in entries.iter().enumerate() {
        write!(f, "{}{key}: {value}", if index == 0 { "" } else { ", " })?;
    }
    f.write_str(after)
}

/// The quote that Python chooses: the double one where only the single one is in the text.
fn quote(contains: impl Fn(char) -> bool) -> char {
    if contains('\'') && !contains('"') { '"' } else { '\'' }
}

/// Writes a text in quotes and escapes control characters, which could move a terminal's cursor.
fn quoted(f: &mut fmt::Formatter<'_>, text: &str) -> fmt::Result {
    let quote = quote(|quote| text.contains(quote));
    write!(f, "{quote}")?;
    for char in text.chars() {
        match char {
            '\\' => f.write_str("\\\\")?,
            char if char == quote => write!(f, "\\{quote}")?,
            '\n' => f.write_str("\\n")?,
            '\r' => f.write_str("\\r")?,
            '\t' => f.write_str("\\t")?,
            char if char.is_control() => write!(f, "\\u{:04x}", char as u32)?,
            char => write!(f, "{char}")?,
        }
    }
    write!(f, "{quote}")
}

/// A float as Python shows it.
fn python_float(float: f64) -> String {
    if float.is_nan() {
        return "nan".into();
    }
    if float.is_infinite() {
        return if float > 0. { "inf" } else { "-inf" }.into();
    }
    let text = format!("{float:?}");
    match text.split_once('e') {
        // Python writes an exponent with a sign and at least two digits.
        Some((number, exponent)) => {
            let number = number.trim_end_matches(".0");
            match exponent.strip_prefix('-') {
                Some(digits) => format!("{number}e-{digits:0>2}"),
                None => format!("{number}e+{exponent:0>2}"),
            }
        }
        None => text,
    }
}

impl BigInt {
    /// The integer that these bytes are, without superfluous high bytes; an `Int` where 64 bits are enough.
    pub(super) fn value(bytes: &[u8]) -> Value {
        let fill = if bytes.last().is_some_and(|byte| byte & 0x80 != 0) { 0xff } else { 0 };
        if bytes.len() <= 8 {
            let mut all = [fill; 8];
            all[..bytes.len()].copy_from_slice(bytes);
            return Value::Int(i64::from_le_bytes(all));
        }
        let mut length = bytes.len();
        while length > 1 && bytes[length - 1] == fill && (bytes[length - 2] ^ fill) & 0x80 == 0 {
            length -= 1;
        }
        match length <= 8 {
            true => Self::value(&bytes[..length]),
            false => Value::BigInt(Self { bytes: bytes[..length].into() }),
        }
    }
}

impl BigInt {
    /// Whether it is below 0, and its absolute value, the lowest byte first.
    fn magnitude(&self) -> (bool, Vec<u8>) {
        let negative = self.bytes.last().is_some_and(|byte| byte & 0x80 != 0);
        let mut carry = true;
        let mut magnitude: Vec<u8> = self.bytes.to_vec();
        if negative {
            for byte in &mut magnitude {
                let (negated, carried) = (!*byte).overflowing_add(u8::from(carry));
                (*byte, carry) = (negated, carried);
            }
        }
        (negative, magnitude)
    }

    /// The float that equals it, if one does.
    pub(super) fn as_float(&self) -> Option<f64> {
        let (negative, magnitude) = self.magnitude();
        let high = magnitude.iter().rposition(|byte| *byte != 0)?;
        let low = magnitude.iter().position(|byte| *byte != 0)?;
        let first = 8 * high + magnitude[high].ilog2() as usize;
        let last = 8 * low + magnitude[low].trailing_zeros() as usize;
        // The sum is exact: no part of it has more than 53 binary digits.
        let sum = || magnitude.iter().rev().fold(0., |sum, byte| sum * 256. + f64::from(*byte));
        (first - last < 53 && first < 1024).then(|| if negative { -sum() } else { sum() })
    }
}

/// Writes the integer in decimal.
impl fmt::Display for BigInt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (negative, mut magnitude) = self.magnitude();
        let mut digits = vec![];
        while magnitude.iter().any(|byte| *byte != 0) {
            let mut rest = 0u16;
            for byte in magnitude.iter_mut().rev() {
                let part = rest << 8 | u16::from(*byte);
                (*byte, rest) = ((part / 10) as u8, part % 10);
            }
            digits.push(b'0' + rest as u8);
        }
        digits.reverse();
        f.pad_integral(!negative, "", &String::from_utf8_lossy(&digits))
    }
}

impl fmt::Debug for BigInt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl From<&str> for Value {
    fn from(text: &str) -> Self {
        Self::Str(text.into())
    }
}

impl From<String> for Value {
    fn from(text: String) -> Self {
        Self::Str(text.into())
    }
}

impl From<bool> for Value {
    fn from(bool: bool) -> Self {
        Self::Bool(bool)
    }
}

impl From<i64> for Value {
    fn from(int: i64) -> Self {
        Self::Int(int)
    }
}

impl From<i32> for Value {
    fn from(int: i32) -> Self {
        Self::Int(int.into())
    }
}

impl From<u64> for Value {
    fn from(int: u64) -> Self {
        let mut bytes = int.to_le_bytes().to_vec();
        bytes.push(0);
        BigInt::value(&bytes)
    }
}

impl From<f64> for Value {
    fn from(float: f64) -> Self {
        Self::Float(float)
    }
}

impl From<()> for Value {
    fn from((): ()) -> Self {
        Self::None
    }
}

impl From<Dict> for Value {
    fn from(dict: Dict) -> Self {
        Self::Dict(Arc::new(dict))
    }
}

impl From<StoredTensor> for Value {
    fn from(tensor: StoredTensor) -> Self {
        Self::Tensor(Arc::new(tensor))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn integers_of_any_length_are_shown_in_decimal() {
        for (bytes, text) in [
            (&[][..], "0"),
            (&[0xff], "-1"),
            (&[0, 0, 0, 0, 0, 0, 0, 0x80, 0], "9223372036854775808"),
            (&[0, 0, 0, 0, 0, 0, 0, 0x80, 0xff], "-9223372036854775808"),
            (&[0, 0, 0, 0, 0, 0, 0, 0, 0x40], "1180591620717411303424"),
            (&[0, 0, 0, 0, 0, 0, 0, 0, 0xc0], "-1180591620717411303424"),
            (&[5, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], "5"),
        ] {
            assert_eq!(BigInt::value(bytes).to_string(), text);
        }
        assert!(matches!(BigInt::value(&[0xff; 12]), Value::Int(-1)));
        let float = |bytes: &[u8]| BigInt { bytes: bytes.into() }.as_float();
        assert_eq!(float(&[0, 0, 0, 0, 0, 0, 0, 0x80, 0]), Some(2f64.powi(63)));
        assert_eq!(float(&[0, 0, 0, 0, 0, 0, 0, 0, 0xc0]), Some(-(2f64.powi(70))));
        assert_eq!(float(&[0, 8, 0, 0, 0, 0, 0, 0x80, 0]), Some(2f64.powi(63) + 2048.));
        assert_eq!(float(&[0, 4, 0, 0, 0, 0, 0, 0x80, 0]), None);
        let highest = [vec![0; 127], vec![0x80, 0]].concat();
        assert_eq!(float(&highest), Some(2f64.powi(1023)));
        assert_eq!(float(&[vec![0; 128], vec![1]].concat()), None);
        assert_eq!(Value::from(u64::MAX).to_string(), "18446744073709551615");
    }

    #[test]
    fn values_look_as_in_python() {
        for (value, text) in [
            (Value::Float(1e16), "1e+16"),
            (Value::Float(1.5e-7), "1.5e-07"),
            (Value::Float(0.1), "0.1"),
            (Value::Float(-0.), "-0.0"),
            (Value::Float(f64::NEG_INFINITY), "-inf"),
            (Value::Complex(1., -2.), "(1-2j)"),
            (Value::Complex(0., 2.5), "2.5j"),
            (Value::tuple([1]), "(1,)"),
            (Value::list(["a'", "\u{1b}\n"]), "[\"a'\", '\\u001b\\n']"),
            (Value::Bytes([b'a', 0xff].as_slice().into()), "b'a\\xff'"),
        ] {
            assert_eq!(value.to_string(), text);
        }
    }
}
