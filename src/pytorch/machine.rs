//! The pickle machine: runs the opcodes that plain data and tensors need, and no others.
//!
//! A pickle is a program. This machine has no way to import, call or open anything: the names a program may use are
//! those of [`globals`](super::globals), and each stands for building a value here. What a program builds is bounded:
//! containers are nodes of a list and refer to each other by number, so that sharing costs nothing, and cycles and depth
//! are found before a value is made. The machine asks a [`Budget`] for memory before it takes any, and copies no more
//! than a multiple of what it has read.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use super::budget::{Budget, table};
use super::dtype::DType;
use super::globals::{self, Global, Rebuild};
use super::source::Input;
use super::storage::Storage;
use super::tensor::{Memory, StoredTensor};
use super::value::{BigInt, DictClass, Value};

/// How deep containers may be nested. Checkpoints are some ten deep.
pub(super) const MAX_DEPTH: usize = 200;
/// The most dimensions that libtorch's own loops can go over.
const MAX_DIMENSIONS: usize = 64;
/// How many bytes a program may copy before its length counts, so that small files may repeat names.
const FREE_COPIES: u64 = 1 << 16;
/// How many refused names an error lists.
const MAX_REFUSED: usize = 10;

/// An entry of the machine's stack.
#[derive(Clone)]
pub(super) enum Item {
    /// A value that is no container.
    Plain(Value),
    /// A container, by its number.
    Node(u32),
    Global(Arc<str>, Global),
    /// A storage or a part of one, by its number.
    Storage(u32),
}

/// A container. The program may change it as long as it runs, through each item that has its number.
pub(super) enum Node {
    List(Vec<Item>),
    Tuple(Vec<Item>),
    Set(Vec<Item>),
    Dict(Box<DictNode>),
    Object(Box<ObjectNode>),
}

pub(super) struct DictNode {
    pub(super) class: DictClass,
    pub(super) entries: Vec<(Item, Item)>,
    pub(super) attributes: Option<Item>,
}

pub(super) struct ObjectNode {
    pub(super) class: Arc<str>,
    pub(super) new: bool,
    pub(super) arguments: Item,
    pub(super) state: Option<Item>,
    pub(super) elements: Vec<Item>,
    pub(super) entries: Vec<(Item, Item)>,
}

/// A storage that a program referred to, and where its bytes are to be found.
pub(super) struct Referred {
    pub(super) key: Arc<str>,
    pub(super) storage: Arc<Storage>,
}

/// A part of a storage, in bytes.
#[derive(Clone, Copy)]
pub(super) struct Part {
    storage: usize,
    begin: u64,
    length: u64,
}

/// The result of a program, and the containers and storages that it refers to by number.
pub(super) struct Made {
    pub(super) nodes: Vec<Node>,
    pub(super) result: Item,
    pub(super) storages: Vec<Referred>,
    pub(super) parts: Vec<Part>,
    /// Length of the program in bytes.
    pub(super) length: u64,
}

pub(super) struct Machine<'i, 's> {
    input: &'i mut Input<'s>,
    allowed: &'i BTreeSet<String>,
    begin: u64,
    stack: Vec<Item>,
    marks: Vec<usize>,
    memo: HashMap<u32, Item>,
    nodes: Vec<Node>,
    storages: Vec<Referred>,
    by_key: HashMap<Arc<str>, usize>,
    parts: Vec<Part>,
    copied: u64,
    /// Nodes, texts and tensors take their memory from it. What one program leaves is for the next.
    budget: &'i mut Budget,
    refused: BTreeSet<Arc<str>>,
}

impl<'i, 's> Machine<'i, 's> {
    pub(super) fn new(
        input: &'i mut Input<'s>,
        allowed: &'i BTreeSet<String>,
        budget: &'i mut Budget,
    ) -> Self {
        let begin = input.position();
        Self {
            input,
            allowed,
            begin,
            stack: vec![],
            marks: vec![],
            memo: HashMap::new(),
            nodes: vec![],
            storages: vec![],
            by_key: HashMap::new(),
            parts: vec![],
            copied: 0,
            budget,
            refused: BTreeSet::new(),
        }
    }

    /// Runs one program to its end.
    pub(super) fn run(mut self) -> Result<Made, String> {
        let result = self.steps();
        if !self.refused.is_empty() {
            let names: Vec<_> = self.refused.iter().map(|name| &**name).collect();
            return Err(format!(
                "it uses {}, which is not plain data: refused (torch.load(weights_only=True) does the same). \
                 If a class only holds data, allow its name",
                names.join(", ")
            ));
        }
        let length = self.input.position() - self.begin;
        let result = result.map_err(|why| match self.budget.is_exceeded() {
            true => why,
            false => format!("the pickle is damaged at byte {length}: {why}"),
        })?;
        let Self { stack, memo, nodes, storages, parts, budget, .. } = self;
        budget.give_back(stack.capacity() * size_of::<Item>());
        budget.give_back(table::<u32, Item>(memo.len()));
        Ok(Made { nodes, result, storages, parts, length })
    }

    fn steps(&mut self) -> Result<Item, String> {
        loop {
            if let Some(result) = self.step()? {
                return Ok(result);
            }
        }
    }

    /// Runs one opcode. Only the last one, STOP, returns the program's result.
    fn step(&mut self) -> Result<Option<Item>, String> {
        match self.input.byte()? {
            // PROTO, FRAME
            0x80 => match self.input.byte()? {
                2..=5 => {}
                version => return Err(format!("it is of protocol {version}")),
            },
            0x95 => {
                self.input.array::<8>()?;
            }
            // STOP
            b'.' => {
                let result = self.pop()?;
                return match self.stack.is_empty() && self.marks.is_empty() {
                    true => Ok(Some(result)),
                    false => Err("it leaves values over".into()),
                };
            }
            // NONE, NEWTRUE, NEWFALSE
            b'N' => self.plain(Value::None)?,
            0x88 => self.plain(Value::Bool(true))?,
            0x89 => self.plain(Value::Bool(false))?,
            // BININT, BININT1, BININT2, LONG1, BINFLOAT
            b'J' => {
                let int = i32::from_le_bytes(self.input.array()?);
                self.plain(Value::Int(int.into()))?;
            }
            b'K' => {
                let int = self.input.byte()?;
                self.plain(Value::Int(int.into()))?;
            }
            b'M' => {
                let int = u16::from_le_bytes(self.input.array()?);
                self.plain(Value::Int(int.into()))?;
            }
            0x8a => {
                let length = self.input.byte()?;
                let int = self.kept(length.into(), |bytes| Ok(BigInt::value(&bytes)))?;
                self.plain(int)?;
            }
            b'G' => {
                let float = f64::from_be_bytes(self.input.array()?);
                self.plain(Value::Float(float))?;
            }
            // BINUNICODE, SHORT_BINUNICODE, BINUNICODE8, SHORT_BINSTRING
            b'X' => self.text(4)?,
            0x8c => self.text(1)?,
            0x8d => self.text(8)?,
            b'U' => self.text(1)?,
            // SHORT_BINBYTES, BINBYTES, BINBYTES8, BYTEARRAY8
            b'C' => self.bytes(1)?,
            b'B' => self.bytes(4)?,
            0x8e | 0x96 => self.bytes(8)?,
            // EMPTY_LIST, EMPTY_TUPLE, EMPTY_DICT, EMPTY_SET
            b']' => self.node(Node::List(vec![]))?,
            b')' => self.node(Node::Tuple(vec![]))?,
            b'}' => self.node(Node::dict(DictClass::Dict))?,
            0x8f => self.node(Node::Set(vec![]))?,
            // TUPLE1, TUPLE2, TUPLE3, TUPLE
            count @ 0x85..=0x87 => {
                let items = self.pop_last(usize::from(count - 0x84))?;
                self.node(Node::Tuple(items))?;
            }
            b't' => {
                let items = self.pop_mark()?;
                // The node counts them again.
                self.budget.give_back(memory(&items));
                self.node(Node::Tuple(items))?;
            }
            // MARK
            b'(' => {
                if self.marks.len() == 2 * MAX_DEPTH {
                    return Err(too_deep());
                }
                self.marks.push(self.stack.len());
            }
            // APPEND, APPENDS, ADDITEMS, SETITEM, SETITEMS
            b'a' => {
                let items = vec![self.pop()?];
                self.budget.take(memory(&items))?;
                self.append(items)?;
            }
            b'e' => {
                let items = self.pop_mark()?;
                self.append(items)?;
            }
            0x90 => {
                let items = self.pop_mark()?;
                let bytes = memory(&items);
                if let Some(number) = self.top_node()? {
                    let Some(Node::Set(elements)) = self.nodes.get_mut(number) else {
                        return Err("elements are added to what is no set".into());
                    };
                    self.budget.reserve(elements, items.len())?;
                    elements.extend(items);
                }
                self.budget.give_back(bytes);
            }
            b's' => {
                let items = self.pop_last(2)?;
                self.budget.take(memory(&items))?;
                self.set_items(items)?;
            }
            b'u' => {
                let items = self.pop_mark()?;
                self.set_items(items)?;
            }
            // BINGET, LONG_BINGET
            b'h' => {
                let index = self.input.byte()?;
                self.recall(index.into())?;
            }
            b'j' => {
                let index = u32::from_le_bytes(self.input.array()?);
                self.recall(index)?;
            }
            // BINPUT, LONG_BINPUT, MEMOIZE
            b'q' => {
                let index = self.input.byte()?;
                self.memoize(index.into())?;
            }
            b'r' => {
                let index = u32::from_le_bytes(self.input.array()?);
                self.memoize(index)?;
            }
            0x94 => {
                let index = u32::try_from(self.memo.len()).map_err(|error| error.to_string())?;
                self.memoize(index)?;
            }
            // GLOBAL, STACK_GLOBAL
            b'c' => {
                let (module, name) = (self.input.line()?, self.input.line()?);
                self.global(&module, &name)?;
            }
            0x93 => {
                let names = self.pop_last(2)?;
                let [Item::Plain(Value::Str(module)), Item::Plain(Value::Str(name))] = &names[..]
                else {
                    return Err("a name is no text".into());
                };
                if module.len() + name.len() > 2048 {
                    return Err("a name in it is too long".into());
                }
                // A few bytes may use both texts again and again.
                self.copies(module.len() + name.len())?;
                self.global(module, name)?;
            }
            // REDUCE, NEWOBJ, BUILD, BINPERSID
            b'R' => {
                let (arguments, called) = (self.pop()?, self.pop()?);
                let made = self.call(called, &arguments)?;
                self.push(made)?;
            }
            0x81 => {
                let (arguments, class) = (self.pop()?, self.pop()?);
                let made = self.new_object(class, arguments)?;
                self.push(made)?;
            }
            b'b' => {
                let state = self.pop()?;
                self.build(state)?;
            }
            b'Q' => {
                let id = self.pop()?;
                let storage = self.storage(&id)?;
                self.push(storage)?;
            }
            other => {
                return Err(format!("opcode {:?} is not one that plain data needs", other as char));
            }
        }
        Ok(None)
    }

    // The stack

    fn push(&mut self, item: Item) -> Result<(), String> {
        // A program that writes plain data keeps a container, a key and a value for each level of nesting, so more
        // entries without a mark mean that it nests too deeply.
        if self.marks.is_empty() && self.stack.len() > 4 * MAX_DEPTH {
            return Err(too_deep());
        }
        self.budget.reserve(&mut self.stack, 1)?;
        self.stack.push(item);
        Ok(())
    }

    fn plain(&mut self, value: Value) -> Result<(), String> {
        self.push(Item::Plain(value))
    }

    fn node(&mut self, node: Node) -> Result<(), String> {
        let item = self.added(node)?;
        self.push(item)
    }

    fn added(&mut self, node: Node) -> Result<Item, String> {
        let number = u32::try_from(self.nodes.len()).map_err(|_| "it has too many containers")?;
        self.budget.take(node.memory())?;
        self.budget.reserve(&mut self.nodes, 1)?;
        self.nodes.push(node);
        Ok(Item::Node(number))
    }

    /// Takes the top item; an item below the last mark cannot be taken.
    fn pop(&mut self) -> Result<Item, String> {
        let floor = self.marks.last().copied().unwrap_or(0);
        match self.stack.len() > floor {
            true => self.stack.pop().ok_or_else(empty),
            false => Err(empty()),
        }
    }

    fn pop_last(&mut self, count: usize) -> Result<Vec<Item>, String> {
        let floor = self.marks.last().copied().unwrap_or(0);
        match self.stack.len().checked_sub(count).filter(|from| *from >= floor) {
            Some(from) => Ok(self.stack.drain(from..).collect()),
            None => Err(empty()),
        }
    }

    /// Takes what is behind the last mark. Its memory is counted; whoever moves the items elsewhere gives it back.
    fn pop_mark(&mut self) -> Result<Vec<Item>, String> {
        let mark = self.marks.pop().ok_or("a mark is missing")?;
        self.budget.take(self.stack.len().saturating_sub(mark) * size_of::<Item>())?;
        // `split_off` would allocate as much as the whole stack where the mark is at its beginning.
        Ok(self.stack.drain(mark..).collect())
    }

    fn top(&self) -> Result<&Item, String> {
        let floor = self.marks.last().copied().unwrap_or(0);
        self.stack.get(floor..).and_then(<[Item]>::last).ok_or_else(empty)
    }

    /// The number of the container on top; `None` where something refused is there instead.
    fn top_node(&self) -> Result<Option<usize>, String> {
        match self.top()? {
            Item::Node(number) => Ok(Some(*number as usize)),
            Item::Global(_, Global::Refused) => Ok(None),
            _ => Err("something is put into what is no container".into()),
        }
    }

    /// Appends items whose memory is counted.
    fn append(&mut self, items: Vec<Item>) -> Result<(), String> {
        let bytes = memory(&items);
        let Some(number) = self.top_node()? else {
            self.budget.give_back(bytes);
            return Ok(());
        };
        let elements = match self.nodes.get_mut(number) {
            Some(Node::List(elements)) => elements,
            Some(Node::Object(object)) => &mut object.elements,
            _ => return Err("something is appended to what is no list".into()),
        };
        if elements.capacity() == 0 {
            *elements = items;
            return Ok(());
        }
        self.budget.reserve(elements, items.len())?;
        elements.extend(items);
        self.budget.give_back(bytes);
        Ok(())
    }

    /// Sets keys and values whose memory is counted.
    fn set_items(&mut self, items: Vec<Item>) -> Result<(), String> {
        let bytes = memory(&items);
        if !items.len().is_multiple_of(2) {
            return Err("a key has no value".into());
        }
        let Some(number) = self.top_node()? else {
            self.budget.give_back(bytes);
            return Ok(());
        };
        let entries = match self.nodes.get_mut(number) {
            Some(Node::Dict(dict)) => &mut dict.entries,
            Some(Node::Object(object)) => &mut object.entries,
            _ => return Err("a key is set in what is no dict".into()),
        };
        self.budget.reserve(entries, items.len() / 2)?;
        let mut items = items.into_iter();
        while let (Some(key), Some(value)) = (items.next(), items.next()) {
            entries.push((key, value));
        }
        self.budget.give_back(bytes);
        Ok(())
    }

    fn recall(&mut self, index: u32) -> Result<(), String> {
        let item = self.memo.get(&index).cloned();
        self.push(item.ok_or_else(|| format!("nothing was put at {index}"))?)
    }

    fn memoize(&mut self, index: u32) -> Result<(), String> {
        let item = self.top()?.clone();
        if self.memo.len() == self.memo.capacity() {
            let (now, then) = (self.memo.len(), self.memo.len() + 1);
            let now = if now == 0 { 0 } else { table::<u32, Item>(now) };
            self.budget.take(table::<u32, Item>(then))?;
            self.memo.reserve(1);
            self.budget.give_back(now);
        }
        self.memo.insert(index, item);
        Ok(())
    }

    /// Counts bytes that the machine copies although the program holds them once. In a real file each part is used
    /// once, so that too many copies mean an attack on memory.
    fn copies(&mut self, bytes: usize) -> Result<(), String> {
        self.copied = self.copied.saturating_add(bytes as u64);
        let read = self.input.position() - self.begin;
        match self.copied > FREE_COPIES.saturating_add(read.saturating_mul(16)) {
            true => Err("it copies more than it holds".into()),
            false => Ok(()),
        }
    }

    /// Checks that a copy of items is allowed and has room. The node that is made of it counts it.
    fn room_for_a_copy(&mut self, bytes: usize) -> Result<(), String> {
        self.copies(bytes)?;
        self.budget.take(bytes)?;
        self.budget.give_back(bytes);
        Ok(())
    }

    // Values

    fn length(&mut self, size: usize) -> Result<u64, String> {
        let mut bytes = [0; 8];
        for byte in &mut bytes[..size] {
            *byte = self.input.byte()?;
        }
        Ok(u64::from_le_bytes(bytes))
    }

    /// Reads so many bytes and makes what is kept of them, while both are there.
    fn kept<T>(
        &mut self,
        length: u64,
        make: impl FnOnce(Vec<u8>) -> Result<T, String>,
    ) -> Result<T, String> {
        self.input.expect(length)?;
        self.budget.take(length as usize)?;
        self.budget.take_piece(length as usize)?;
        let kept = make(self.input.take(length)?)?;
        self.budget.give_back(length as usize);
        Ok(kept)
    }

    /// Makes room for bytes where they are to stay.
    fn zeros(&mut self, length: usize) -> Result<Arc<[u8]>, String> {
        self.budget.take_piece(length)?;
        Ok(std::iter::repeat_n(0, length).collect())
    }

    fn text(&mut self, size: usize) -> Result<(), String> {
        let length = self.length(size)?;
        let text = |bytes| String::from_utf8(bytes).map_err(|_| "a text is not UTF-8".to_owned());
        let text = self.kept(length, |bytes| Ok(Value::Str(text(bytes)?.into())))?;
        self.plain(text)
    }

    fn bytes(&mut self, size: usize) -> Result<(), String> {
        let length = self.length(size)?;
        self.input.expect(length)?;
        let mut bytes = self.zeros(length as usize)?;
        if let Some(bytes) = Arc::get_mut(&mut bytes) {
            self.input.fill(bytes)?;
        }
        self.plain(Value::Bytes(bytes))
    }

    fn global(&mut self, module: &str, name: &str) -> Result<(), String> {
        let (full, global) = globals::find(module, name, self.allowed);
        self.budget.take_piece(full.len())?;
        if global == Global::Refused && self.refused.len() < MAX_REFUSED {
            self.refused.insert(full.chars().take(100).collect::<String>().into());
        }
        match global {
            Global::Constant => self.plain(Value::Constant(full)),
            // `refused` keeps the names for the error.
            Global::Refused => self.push(Item::Global("".into(), global)),
            global => self.push(Item::Global(full, global)),
        }
    }

    /// The items of the tuple that an item refers to.
    fn tuple(&self, item: &Item) -> Result<&[Item], String> {
        match item {
            Item::Node(number) => match self.nodes.get(*number as usize) {
                Some(Node::Tuple(items)) => Ok(items),
                _ => Err("a tuple is expected".into()),
            },
            _ => Err("a tuple is expected".into()),
        }
    }

    /// A copy of a call's arguments, of which there are few.
    fn arguments(&mut self, item: &Item) -> Result<Vec<Item>, String> {
        let items = self.tuple(item)?;
        if items.len() > 16 {
            return Err("a call has too many arguments".into());
        }
        Ok(items.to_vec())
    }

    fn call(&mut self, called: Item, arguments: &Item) -> Result<Item, String> {
        let Item::Global(name, global) = called else {
            return Err("what is called is no name".into());
        };
        match global {
            Global::Refused => return Ok(Item::Global(name, Global::Refused)),
            Global::Inert => {
                self.tuple(arguments)?;
                return self.object(name, false, arguments.clone());
            }
            Global::Rebuild(Rebuild::FromType) => {
                let items = self.arguments(arguments)?;
                let [function, _, arguments, _] = &items[..] else { return Err(wrong(&name)) };
                return match function {
                    Item::Global(_, Global::Rebuild(Rebuild::FromType)) => Err(wrong(&name)),
                    // The last argument, the attributes that Python code set on the tensor, is left out.
                    Item::Global(_, Global::Rebuild(_)) => self.call(function.clone(), arguments),
                    Item::Global(_, Global::Refused) => Ok(function.clone()),
                    _ => Err(wrong(&name)),
                };
            }
            _ => {}
        }
        let items = self.arguments(arguments)?;
        match (&global, &items[..]) {
            (Global::OrderedDict, []) => self.added(Node::dict(DictClass::OrderedDict)),
            (Global::Counter, []) => self.added(Node::dict(DictClass::Counter)),
            (Global::OrderedDict, [pairs]) => {
                let entries = self.pairs(pairs)?;
                self.added(Node::Dict(Box::new(DictNode {
                    class: DictClass::OrderedDict,
                    entries,
                    attributes: None,
                })))
            }
            (Global::Counter, [counts]) => {
                let length = match self.list_or_dict(counts) {
                    Some(Node::Dict(dict)) => dict.entries.len(),
                    _ => return Err(wrong(&name)),
                };
                self.room_for_a_copy(length * size_of::<(Item, Item)>())?;
                let entries = match self.list_or_dict(counts) {
                    Some(Node::Dict(dict)) => dict.entries.clone(),
                    _ => vec![],
                };
                let (class, attributes) = (DictClass::Counter, None);
                self.added(Node::Dict(Box::new(DictNode { class, entries, attributes })))
            }
            (Global::Set, []) => self.added(Node::Set(vec![])),
            (Global::Set, [list]) => {
                let length = match self.list_or_dict(list) {
                    Some(Node::List(elements)) => elements.len(),
                    _ => return Err(wrong(&name)),
                };
                self.room_for_a_copy(length * size_of::<Item>())?;
                let elements = match self.list_or_dict(list) {
                    Some(Node::List(elements)) => elements.clone(),
                    _ => vec![],
                };
                self.added(Node::Set(elements))
            }
            (Global::Complex, [real, imaginary]) => {
                let (real, imaginary) = (number(real)?, number(imaginary)?);
                Ok(Item::Plain(Value::Complex(real, imaginary)))
            }
            (Global::Encode, [text, encoding]) => self.encoded(text, Some(encoding)),
            (Global::ByteArray, []) => Ok(Item::Plain(Value::Bytes([].into()))),
            (Global::ByteArray, [bytes @ Item::Plain(Value::Bytes(_))]) => Ok(bytes.clone()),
            (Global::ByteArray, [text, encoding]) => self.encoded(text, Some(encoding)),
            (Global::Size, [size]) => {
                self.tuple(size)?;
                Ok(size.clone())
            }
            (Global::Device, [Item::Plain(Value::Str(kind)), index @ ..]) if kind.len() < 32 => {
                let device = match index {
                    [] => kind.clone(),
                    [Item::Plain(Value::Int(index))] => format!("{kind}:{index}").into(),
                    _ => return Err(wrong(&name)),
                };
                self.budget.take_piece(device.len())?;
                Ok(Item::Plain(Value::Device(device)))
            }
            (Global::Layout, [Item::Plain(Value::Str(layout))])
                if layout.starts_with("torch.") && layout.len() < 32 =>
            {
                Ok(Item::Plain(Value::Constant(layout.clone())))
            }
            (Global::Rebuild(how), items) => self.rebuilt(&name, *how, items),
            (Global::Parameter, items) => self.rebuilt(&name, Rebuild::Parameter, items),
            _ => Err(wrong(&name)),
        }
    }

    fn list_or_dict(&self, item: &Item) -> Option<&Node> {
        match item {
            Item::Node(number) => self.nodes.get(*number as usize),
            _ => None,
        }
    }

    /// The entries of an `OrderedDict` as Python 2 wrote them: a list of lists or tuples of two.
    fn pairs(&mut self, list: &Item) -> Result<Vec<(Item, Item)>, String> {
        let wrong = || wrong("collections.OrderedDict");
        let Some(Node::List(pairs)) = self.list_or_dict(list) else { return Err(wrong()) };
        self.room_for_a_copy(pairs.len() * size_of::<(Item, Item)>())?;
        let Some(Node::List(pairs)) = self.list_or_dict(list) else { return Err(wrong()) };
        pairs
            .iter()
            .map(|pair| match self.list_or_dict(pair) {
                Some(Node::List(pair) | Node::Tuple(pair)) if pair.len() == 2 => {
                    Ok((pair[0].clone(), pair[1].clone()))
                }
                _ => Err(wrong()),
            })
            .collect()
    }

    fn encoded(&mut self, text: &Item, encoding: Option<&Item>) -> Result<Item, String> {
        let wrong = || "bytes are written in a way that plain data never is".to_owned();
        let Item::Plain(Value::Str(text)) = text else { return Err(wrong()) };
        match encoding {
            Some(Item::Plain(Value::Str(name))) if matches!(&**name, "latin1" | "latin-1") => {}
            _ => return Err(wrong()),
        }
        self.copies(text.len())?;
        let mut bytes = self.zeros(text.chars().count())?;
        for (byte, letter) in Arc::get_mut(&mut bytes).into_iter().flatten().zip(text.chars()) {
            *byte = u8::try_from(letter).map_err(|_| wrong())?;
        }
        Ok(Item::Plain(Value::Bytes(bytes)))
    }

    fn object(&mut self, class: Arc<str>, new: bool, arguments: Item) -> Result<Item, String> {
        let (elements, entries) = (vec![], vec![]);
        let object = ObjectNode { class, new, arguments, state: None, elements, entries };
        self.added(Node::Object(Box::new(object)))
    }

    fn new_object(&mut self, class: Item, arguments: Item) -> Result<Item, String> {
        match class {
            Item::Global(name, Global::Inert) => {
                self.tuple(&arguments)?;
                self.object(name, true, arguments)
            }
            refused @ Item::Global(_, Global::Refused) => Ok(refused),
            class @ Item::Global(_, Global::Parameter | Global::OrderedDict | Global::Counter) => {
                self.call(class, &arguments)
            }
            Item::Global(name, _) => Err(wrong(&name)),
            _ => Err("an object's class is no name".into()),
        }
    }

    fn build(&mut self, state: Item) -> Result<(), String> {
        // Attributes that a program gave the tensor are left out.
        if let Item::Plain(Value::Tensor(_)) = self.top()? {
            return Ok(());
        }
        let Some(number) = self.top_node()? else { return Ok(()) };
        match self.nodes.get_mut(number) {
            Some(Node::Dict(dict)) if dict.class != DictClass::Dict => {
                dict.attributes = Some(state);
                Ok(())
            }
            Some(Node::Object(object)) => {
                object.state = Some(state);
                Ok(())
            }
            _ => Err("a state is set of what has none".into()),
        }
    }

    // Tensors

    /// The storage with an id of this form: `("storage", class, key, location, number of elements)`. In old files a
    /// sixth item names a part of the storage: `(key of the part, first element, number of elements)`.
    fn storage(&mut self, id: &Item) -> Result<Item, String> {
        let wrong = || "a storage's id is damaged".to_owned();
        let items = self.arguments(id)?;
        let [Item::Plain(Value::Str(tag)), class, key, _, count, rest @ ..] = &items[..] else {
            return Err(wrong());
        };
        let dtype = match class {
            Item::Global(_, Global::Storage(dtype)) => *dtype,
            Item::Global(_, Global::UntypedStorage) => DType::UInt8,
            // The error at the program's end lists the name.
            refused @ Item::Global(_, Global::Refused) => return Ok(refused.clone()),
            _ => return Err(wrong()),
        };
        let key: Arc<str> = match key {
            Item::Plain(Value::Str(key)) => key.clone(),
            Item::Plain(Value::Int(key)) => key.to_string().into(),
            _ => return Err(wrong()),
        };
        let bytes = |count: &Item| match count {
            Item::Plain(Value::Int(count)) => u64::try_from(*count)
                .ok()
                .and_then(|count| count.checked_mul(dtype.size()))
                .ok_or_else(wrong),
            _ => Err(wrong()),
        };
        let length = bytes(count)?;
        if &**tag != "storage" {
            return Err(wrong());
        }
        let storage = match self.by_key.get(&key) {
            Some(number) => *number,
            None => {
                self.budget.take_piece(size_of::<Storage>() + key.len())?;
                self.budget.take(2 * table::<Arc<str>, usize>(1))?;
                self.budget.reserve(&mut self.storages, 1)?;
                let storage = Arc::new(Storage::new(dtype, length));
                self.storages.push(Referred { key: key.clone(), storage });
                self.by_key.insert(key, self.storages.len() - 1);
                self.storages.len() - 1
            }
        };
        let known = &self.storages[storage].storage;
        if known.dtype != dtype || known.length != length {
            return Err("a storage is of two types or lengths".into());
        }
        let (begin, length) = match rest {
            [] | [Item::Plain(Value::None)] => (0, length),
            [part] => {
                let part = self.arguments(part)?;
                let [_, first, count] = &part[..] else { return Err(wrong()) };
                (bytes(first)?, bytes(count)?)
            }
            _ => return Err(wrong()),
        };
        let within = begin
            .checked_add(length)
            .is_some_and(|end| end <= self.storages[storage].storage.length);
        if !within {
            return Err("a part of a storage lies outside it".into());
        }
        let number = u32::try_from(self.parts.len()).map_err(|error| error.to_string())?;
        self.budget.reserve(&mut self.parts, 1)?;
        self.parts.push(Part { storage, begin, length });
        Ok(Item::Storage(number))
    }

    fn rebuilt(&mut self, name: &str, how: Rebuild, items: &[Item]) -> Result<Item, String> {
        match (how, items) {
            (Rebuild::Tensor, [storage, offset, shape, strides]) => {
                self.view(storage, offset, shape, strides, None, None, None)
            }
            (Rebuild::V2, [storage, offset, shape, strides, requires_grad, _]) => {
                self.view(storage, offset, shape, strides, Some(requires_grad), None, None)
            }
            (Rebuild::V2, [storage, offset, shape, strides, requires_grad, _, bits]) => {
                self.view(storage, offset, shape, strides, Some(requires_grad), None, Some(bits))
            }
            (Rebuild::V3, [storage, offset, shape, strides, requires_grad, _, dtype]) => {
                self.view(storage, offset, shape, strides, Some(requires_grad), Some(dtype), None)
            }
            (Rebuild::V3, [storage, offset, shape, strides, requires_grad, _, dtype, bits]) => {
                let (grad, dtype, bits) = (Some(requires_grad), Some(dtype), Some(bits));
                self.view(storage, offset, shape, strides, grad, dtype, bits)
            }
            (Rebuild::Parameter | Rebuild::ParameterWithState, [data, flags @ ..]) => {
                let requires_grad = match flags.first() {
                    None => true,
                    Some(Item::Plain(Value::Bool(requires_grad))) => *requires_grad,
                    Some(_) => return Err(wrong(name)),
                };
                let tensor = match data {
                    Item::Plain(Value::Tensor(tensor)) => tensor,
                    Item::Global(_, Global::Refused) => return Ok(data.clone()),
                    // A quantized or sparse parameter comes out as the object that its tensor is.
                    Item::Node(_) => return Ok(data.clone()),
                    _ => return Err(wrong(name)),
                };
                let Memory::File(storage) = &tensor.memory else { return Err(wrong(name)) };
                self.tensor_of(tensor.shape.len())?;
                Ok(Item::Plain(Value::Tensor(Arc::new(StoredTensor {
                    memory: Memory::File(storage.clone()),
                    shape: tensor.shape.clone(),
                    strides: tensor.strides.clone(),
                    requires_grad,
                    parameter: true,
                    ..**tensor
                }))))
            }
            _ => Err(wrong(name)),
        }
    }

    #[expect(clippy::too_many_arguments, reason = "the arguments of PyTorch's function")]
    fn view(
        &mut self,
        storage: &Item,
        offset: &Item,
        shape: &Item,
        strides: &Item,
        requires_grad: Option<&Item>,
        dtype: Option<&Item>,
        bits: Option<&Item>,
    ) -> Result<Item, String> {
        let number = match storage {
            Item::Storage(number) => *number as usize,
            Item::Global(_, Global::Refused) => return Ok(storage.clone()),
            _ => return Err("a tensor has no storage".into()),
        };
        let (shape, strides) = (self.dimensions(shape)?, self.dimensions(strides)?);
        self.tensor_of(shape.len())?;
        let Part { storage, begin, length } = self.parts[number];
        let storage = self.storages[storage].storage.clone();
        let dtype = match dtype {
            None => storage.dtype,
            Some(Item::Plain(Value::Constant(name))) => {
                DType::named(name).ok_or_else(|| format!("tensors of {name} cannot be read"))?
            }
            Some(_) => return Err("a tensor's type is damaged".into()),
        };
        let offset = match offset {
            Item::Plain(Value::Int(offset)) if *offset >= 0 => *offset,
            _ => return Err("a tensor's place in its storage is damaged".into()),
        };
        let requires_grad = match requires_grad {
            None => false,
            Some(Item::Plain(Value::Bool(requires_grad))) => *requires_grad,
            Some(_) => return Err("a tensor's requires_grad is damaged".into()),
        };
        let (conjugate, negative) = (self.bit(bits, "conj"), self.bit(bits, "neg"));
        check_bounds(&shape, &strides, offset, length / dtype.size())?;
        // A part of an UntypedStorage may begin at any byte.
        let begin = begin.is_multiple_of(dtype.size()).then(|| begin / dtype.size());
        let begin = begin.and_then(|begin| i64::try_from(begin).ok());
        let offset = begin
            .and_then(|begin| offset.checked_add(begin))
            .ok_or("a tensor does not begin at an element of its storage")?;
        let tensor = StoredTensor {
            memory: Memory::File(storage),
            dtype,
            shape,
            strides,
            offset,
            requires_grad,
            parameter: false,
            conjugate: conjugate && dtype.is_complex(),
            negative,
            bare: false,
        };
        Ok(Item::Plain(Value::Tensor(Arc::new(tensor))))
    }

    /// Counts a tensor of so many dimensions.
    fn tensor_of(&mut self, dimensions: usize) -> Result<(), String> {
        self.copies(16 * dimensions)?;
        self.budget.take_piece(size_of::<StoredTensor>() + 16 * dimensions)
    }

    fn dimensions(&self, item: &Item) -> Result<Vec<i64>, String> {
        let items = self.tuple(item)?;
        if items.len() > MAX_DIMENSIONS {
            return Err(format!("a tensor has {} dimensions", items.len()));
        }
        let dimension = |item: &Item| match item {
            Item::Plain(Value::Int(length)) if *length >= 0 => Ok(*length),
            _ => Err("a tensor's shape is damaged".to_owned()),
        };
        items.iter().map(dimension).collect()
    }

    /// Whether PyTorch's dict for a lazily conjugated or negated tensor sets the bit `name`, "conj" or "neg".
    fn bit(&self, bits: Option<&Item>, name: &str) -> bool {
        let Some(Node::Dict(dict)) = bits.and_then(|bits| self.list_or_dict(bits)) else {
            return false;
        };
        let is_set = |(key, value): &(Item, Item)| {
            matches!(key, Item::Plain(Value::Str(key)) if &**key == name)
                && matches!(value, Item::Plain(Value::Bool(true)))
        };
        dict.entries.iter().take(8).any(is_set)
    }
}

impl Made {
    /// A storage that stands where a value does, as it does among the arguments of a quantized tensor.
    pub(super) fn bare_storage(&self, number: u32) -> Option<StoredTensor> {
        let Part { storage, begin, length } = *self.parts.get(number as usize)?;
        let storage = self.storages.get(storage)?.storage.clone();
        let (dtype, size) = (storage.dtype, storage.dtype.size());
        Some(StoredTensor {
            memory: Memory::File(storage),
            dtype,
            shape: vec![i64::try_from(length / size).ok()?],
            strides: vec![1],
            offset: i64::try_from(begin / size).ok()?,
            requires_grad: false,
            parameter: false,
            conjugate: false,
            negative: false,
            bare: true,
        })
    }
}

fn memory(items: &Vec<Item>) -> usize {
    items.capacity() * size_of::<Item>()
}

impl Node {
    fn dict(class: DictClass) -> Self {
        Self::Dict(Box::new(DictNode { class, entries: vec![], attributes: None }))
    }

    /// The memory that the node has taken beside its place among the others.
    pub(super) fn memory(&self) -> usize {
        const ITEM: usize = size_of::<Item>();
        match self {
            Self::List(items) | Self::Tuple(items) | Self::Set(items) => ITEM * items.capacity(),
            Self::Dict(dict) => size_of::<DictNode>() + 2 * ITEM * dict.entries.capacity(),
            Self::Object(object) => {
                let elements = object.elements.capacity() + 2 * object.entries.capacity();
                size_of::<ObjectNode>() + ITEM * elements
            }
        }
    }
}

/// Fails unless all elements of the tensor lie within a storage of `elements` elements.
fn check_bounds(shape: &[i64], strides: &[i64], offset: i64, elements: u64) -> Result<(), String> {
    let outside =
        || format!("a tensor of shape {shape:?} lies outside its storage of {elements} elements");
    if shape.len() != strides.len() {
        return Err("a tensor has not one stride for each dimension".into());
    }
    // The number of elements and the highest place must be numbers that libtorch can hold.
    let count = shape.iter().try_fold(1i64, |count, length| count.checked_mul((*length).max(1)));
    let count = count.filter(|count| count.checked_mul(16).is_some()).ok_or_else(outside)?;
    let last = shape.iter().zip(strides).try_fold(offset, |last, (length, stride)| {
        last.checked_add((length - 1).max(0).checked_mul(*stride)?)
    });
    let last = last.ok_or_else(outside)?;
    let within = match shape.contains(&0) {
        true => offset as u64 <= elements,
        false => count > 0 && (last as u64) < elements,
    };
    if within { Ok(()) } else { Err(outside()) }
}

fn number(item: &Item) -> Result<f64, String> {
    match item {
        Item::Plain(value) => value.as_f64().ok_or_else(|| wrong("builtins.complex")),
        _ => Err(wrong("builtins.complex")),
    }
}

fn wrong(name: &str) -> String {
    format!("{name} is used in a way that plain data never does")
}

fn empty() -> String {
    "a value is missing".into()
}

fn too_deep() -> String {
    format!("its containers are more than {MAX_DEPTH} deep in each other")
}
