//! Files of plans, JSON or TOML: the values in them, and the line of each, for errors.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::path::Path;

use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::error::{Error, Result};

/// The values that a file has, as JSON, with their lines.
pub(crate) struct PlanFile {
    pub(crate) value: Value,
    pub(crate) lines: Lines,
}

impl PlanFile {
    /// Reads a file: `.json`, or `.toml` with that feature.
    pub(crate) fn from_path(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| Error::Io { path: path.to_owned(), source })?;
        let file = match path.extension().and_then(|extension| extension.to_str()) {
            Some("json") => Self::from_json(&text),
            #[cfg(feature = "toml")]
            Some("toml") => Self::from_toml(&text),
            #[cfg(not(feature = "toml"))]
            Some("toml") => Err(Error::invalid(
                "TOML needs the feature `toml` of tch-ignite: enable it, or write the plan as JSON",
            )),
            _ => Err(Error::invalid(
                "a plan should be a .json or .toml file: give the file's name that ending",
            )),
        };
        let mut file =
            file.map_err(|error| Error::invalid(format!("{}: {error}", path.display())))?;
        file.lines.file = Some(path.display().to_string());
        Ok(file)
    }

    pub(crate) fn from_json(text: &str) -> Result<Self> {
        let value = serde_json::from_str(text);
        let value = value.map_err(|error| Error::invalid(format!("JSON: {error}")))?;
        let mut found = BTreeMap::new();
        JsonPlaces { text: text.as_bytes(), at: 0, found: &mut found }.value(String::new());
        Ok(Self { value, lines: Lines::new(text, found) })
    }

    #[cfg(feature = "toml")]
    pub(crate) fn from_toml(text: &str) -> Result<Self> {
        let failed = |error: toml::de::Error| Error::invalid(error.to_string().trim());
        let value = toml::from_str(text).map_err(failed)?;
        let mut found = BTreeMap::new();
        let table = toml::de::DeTable::parse(text).map_err(failed)?;
        places_of_table(table.get_ref(), "", &mut found);
        Ok(Self { value, lines: Lines::new(text, found) })
    }

    /// A value that came from no file of ours, such as a part of a user's own configuration.
    pub(crate) fn from_value(value: Value) -> Self {
        Self { value, lines: Lines::default() }
    }
}

/// Line and column of each value in a file, by its path (`schedule[1].cycle_size`). Without a file there are none.
#[derive(Debug, Clone, Default)]
pub(crate) struct Lines {
    file: Option<String>,
    found: BTreeMap<String, (usize, usize)>,
}

// Two plans are equal wherever they were written.
impl PartialEq for Lines {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Lines {
    /// Makes lines and columns, from 1, of the values' positions in the text.
    fn new(text: &str, found: BTreeMap<String, usize>) -> Self {
        let line = |at: usize| {
            let before = text.get(..at).unwrap_or(text);
            let begin = before.rfind('\n').map_or(0, |newline| newline + 1);
            (before.matches('\n').count() + 1, before[begin..].chars().count() + 1)
        };
        let found = found.into_iter().map(|(path, at)| (path, line(at))).collect();
        Self { file: None, found }
    }

    /// The place of the whole file.
    pub(crate) fn root(&self) -> Place<'_> {
        Place { path: String::new(), lines: self }
    }
}

/// A part of a file.
#[derive(Clone)]
pub(crate) struct Place<'l> {
    path: String,
    lines: &'l Lines,
}

impl Place<'_> {
    /// The place of the part under this key.
    pub(crate) fn key(&self, key: &str) -> Self {
        Self { path: joined(&self.path, key), ..*self }
    }

    /// The place of this element.
    pub(crate) fn index(&self, index: usize) -> Self {
        Self { path: format!("{}[{index}]", self.path), ..*self }
    }

    /// The path in the file (`schedule[1].cycle_size`).
    pub(crate) fn path(&self) -> &str {
        &self.path
    }

    /// Makes an error about this place: file, path, text, line and column.
    pub(crate) fn error(&self, text: impl Display) -> Error {
        let mut whole = String::new();
        if let Some(file) = &self.lines.file {
            whole += &format!("{file}: ");
        }
        if !self.path.is_empty() {
            whole += &format!("{}: ", self.path);
        }
        whole += &text.to_string();
        // A part that is missing has no line, but the part that it is missing from has one.
        let mut path = self.path.as_str();
        while !path.is_empty() && !self.lines.found.contains_key(path) {
            path = &path[..path.rfind(['.', '[']).unwrap_or(0)];
        }
        if let Some((line, column)) = self.lines.found.get(path).filter(|_| !path.is_empty()) {
            whole += &format!(" (line {line}, column {column})");
        }
        Error::invalid(whole)
    }

    /// Reads this part as a value; an error is about what is wrong within it.
    pub(crate) fn read<T: DeserializeOwned>(&self, value: Value) -> Result<T> {
        serde_path_to_error::deserialize(value).map_err(|error| self.misfit(&error))
    }

    pub(crate) fn misfit(&self, error: &serde_path_to_error::Error<serde_json::Error>) -> Error {
        match error.path().to_string().as_str() {
            "." => self.error(error.inner()),
            inner => self.key(inner).error(error.inner()),
        }
    }
}

fn joined(path: &str, key: &str) -> String {
    match path.is_empty() || key.starts_with('[') {
        true => format!("{path}{key}"),
        false => format!("{path}.{key}"),
    }
}

#[cfg(feature = "toml")]
fn places_of_table(table: &toml::de::DeTable<'_>, path: &str, found: &mut BTreeMap<String, usize>) {
    for (key, value) in table {
        places_of_value(value, joined(path, key.get_ref()), found);
    }
}

#[cfg(feature = "toml")]
fn places_of_value(
    value: &toml::Spanned<toml::de::DeValue<'_>>,
    path: String,
    found: &mut BTreeMap<String, usize>,
) {
    if let Some(table) = value.get_ref().as_table() {
        places_of_table(table, &path, found);
    }
    for (index, element) in value.get_ref().as_array().into_iter().flatten().enumerate() {
        places_of_value(element, format!("{path}[{index}]"), found);
    }
    found.insert(path, value.span().start);
}

/// A walk over JSON that notes where each value begins. serde_json has read the text before, so it is well formed.
struct JsonPlaces<'t> {
    text: &'t [u8],
    at: usize,
    found: &'t mut BTreeMap<String, usize>,
}

impl JsonPlaces<'_> {
    /// The next byte that is no white space, comma or colon.
    fn next(&mut self) -> Option<u8> {
        let is_between = |byte: &u8| byte.is_ascii_whitespace() || matches!(byte, b',' | b':');
        let rest = self.text.get(self.at..)?;
        self.at += rest.iter().take_while(|byte| is_between(byte)).count();
        self.text.get(self.at).copied()
    }

    fn value(&mut self, path: String) {
        let Some(first) = self.next() else { return };
        self.found.insert(path.clone(), self.at);
        match first {
            b'{' => {
                self.at += 1;
                while self.next() == Some(b'"') {
                    let key = self.string();
                    self.value(joined(&path, &key));
                }
                self.at += 1;
            }
            b'[' => {
                self.at += 1;
                let mut index = 0;
                while self.next().is_some_and(|byte| byte != b']') {
                    self.value(format!("{path}[{index}]"));
                    index += 1;
                }
                self.at += 1;
            }
            b'"' => drop(self.string()),
            _ => {
                let rest = &self.text[self.at..];
                let is_inside = |byte: &&u8| !byte.is_ascii_whitespace() && !b",]}".contains(byte);
                self.at += rest.iter().take_while(is_inside).count();
            }
        }
    }

    /// Reads the text that begins here.
    fn string(&mut self) -> String {
        let begin = self.at;
        self.at += 1;
        while let Some(byte) = self.text.get(self.at).filter(|byte| **byte != b'"') {
            self.at += if *byte == b'\\' { 2 } else { 1 };
        }
        self.at = (self.at + 1).min(self.text.len());
        serde_json::from_slice(&self.text[begin..self.at]).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_value_of_json_has_its_line() -> Result<()> {
        let text = "{\"a\": [1, {\"b \\\" ü\": [\n  true, \"]\\\\\"]}],\n\n \"c\" : null}";
        let lines = PlanFile::from_json(text)?.lines;
        let line = |path: &str| lines.found.get(path).copied();
        assert_eq!([line("a"), line("a[0]"), line("a[1]")], [(1, 7), (1, 8), (1, 11)].map(Some));
        assert_eq!(line("a[1].b \" ü"), Some((1, 22)));
        assert_eq!([line("a[1].b \" ü[0]"), line("a[1].b \" ü[1]")], [(2, 3), (2, 9)].map(Some));
        assert_eq!(line("c"), Some((4, 8)));
        let text = lines.root().key("a").index(1).key("missing").error("x").to_string();
        assert_eq!(text, "a[1].missing: x (line 1, column 11)");
        Ok(())
    }
}
