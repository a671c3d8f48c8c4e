use std::fmt;
use std::sync::Arc;

/// How the names of tensors in a file become those of a store: rules that are applied one after the other.
///
/// ```
/// use tch_ignite::pytorch::Names;
/// let names = Names::new()
///     .strip_prefix("module.") // DataParallel puts it there; other names stay as they are
///     .skip("head.*")
///     .rename("layer*.*", "block*.*")
///     .map(|name| name.replace(".bn.", ".norm."));
/// assert_eq!(names.apply("module.layer1.bn.weight").as_deref(), Some("block1.norm.weight"));
/// assert_eq!(names.apply("module.head.bias"), None);
/// ```
///
/// For regular expressions, use a crate of your choice in [`map`](Self::map).
#[derive(Clone, Default)]
pub struct Names {
    rules: Vec<Rule>,
}

#[derive(Clone)]
enum Rule {
    StripPrefix(String),
    AddPrefix(String),
    Rename(String, String),
    Skip(String),
    Only(String),
    Map(Arc<dyn Fn(&str) -> String + Send + Sync>),
}

impl Names {
    /// Rules that leave all names as they are.
    pub fn new() -> Self {
        Self::default()
    }

    fn with(mut self, rule: Rule) -> Self {
        self.rules.push(rule);
        self
    }

    /// Removes the prefix from the names that begin with it.
    pub fn strip_prefix(self, prefix: &str) -> Self {
        self.with(Rule::StripPrefix(prefix.into()))
    }

    /// Puts the prefix before all names.
    pub fn add_prefix(self, prefix: &str) -> Self {
        self.with(Rule::AddPrefix(prefix.into()))
    }

    /// Renames tensors whose names match the pattern `from`. A `*` in it stands for any characters, also none and dots;
    /// each but the last for as few as possible. The stars of `to` are replaced, in their order, by the characters that
    /// the stars of `from` stood for.
    pub fn rename(self, from: &str, to: &str) -> Self {
        self.with(Rule::Rename(from.into(), to.into()))
    }

    /// Leaves out the tensors whose names match the pattern.
    pub fn skip(self, pattern: &str) -> Self {
        self.with(Rule::Skip(pattern.into()))
    }

    /// Leaves out the tensors whose names do not match the pattern.
    pub fn only(self, pattern: &str) -> Self {
        self.with(Rule::Only(pattern.into()))
    }

    /// Replaces each name by the one that the function returns for it.
    pub fn map(self, map: impl Fn(&str) -> String + Send + Sync + 'static) -> Self {
        self.with(Rule::Map(Arc::new(map)))
    }

    /// The name in the store for a name in the file; `None` if a rule leaves the tensor out.
    pub fn apply(&self, name: &str) -> Option<String> {
        let mut name = name.to_owned();
        for rule in &self.rules {
            name = match rule {
                Rule::StripPrefix(prefix) => name.strip_prefix(prefix).unwrap_or(&name).to_owned(),
                Rule::AddPrefix(prefix) => format!("{prefix}{name}"),
                Rule::Rename(from, to) => match matched(from, &name) {
                    Some(parts) => filled(to, &parts),
                    None => name,
                },
                Rule::Skip(pattern) if matched(pattern, &name).is_some() => return None,
                Rule::Only(pattern) if matched(pattern, &name).is_none() => return None,
                Rule::Skip(_) | Rule::Only(_) => name,
                Rule::Map(map) => map(&name),
            };
        }
        Some(name)
    }
}

impl fmt::Debug for Names {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rule = |rule: &Rule| match rule {
            Rule::StripPrefix(prefix) => format!("strip_prefix({prefix:?})"),
            Rule::AddPrefix(prefix) => format!("add_prefix({prefix:?})"),
            Rule::Rename(from, to) => format!("rename({from:?}, {to:?})"),
            Rule::Skip(pattern) => format!("skip({pattern:?})"),
            Rule::Only(pattern) => format!("only({pattern:?})"),
            Rule::Map(_) => "map(…)".into(),
        };
        f.debug_list().entries(self.rules.iter().map(rule)).finish()
    }
}

/// The characters that each star of the pattern stands for in a name; `None` if the name does not match.
fn matched<'n>(pattern: &str, name: &'n str) -> Option<Vec<&'n str>> {
    let mut literals = pattern.split('*');
    let mut rest = name.strip_prefix(literals.next()?)?;
    let mut parts = vec![];
    let mut literals = literals.peekable();
    if literals.peek().is_none() {
        return rest.is_empty().then_some(parts);
    }
    while let Some(literal) = literals.next() {
        let at = match literals.peek() {
            // The last literal must be the end of the name.
            None => rest.len().checked_sub(literal.len()).filter(|_| rest.ends_with(literal))?,
            Some(_) => rest.find(literal)?,
        };
        parts.push(&rest[..at]);
        rest = &rest[at + literal.len()..];
    }
    Some(parts)
}

fn filled(pattern: &str, parts: &[&str]) -> String {
    let mut parts = parts.iter();
    let mut name = String::new();
    for (index, literal) in pattern.split('*').enumerate() {
        if index > 0 {
            name.push_str(parts.next().unwrap_or(&""));
        }
        name.push_str(literal);
    }
    name
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stars_stand_for_what_is_between() {
        for (pattern, name, parts) in [
            ("a", "a", Some(vec![])),
            ("a", "ab", None),
            ("*", "", Some(vec![""])),
            ("*", "a.b", Some(vec!["a.b"])),
            ("a.*", "a.", Some(vec![""])),
            ("a.*.w", "a.w", None),
            ("*.*", "a.b.c", Some(vec!["a", "b.c"])),
            ("*ab", "abab", Some(vec!["ab"])),
            ("*ü*", "aüb", Some(vec!["a", "b"])),
            ("**", "ab", Some(vec!["", "ab"])),
        ] {
            assert_eq!(matched(pattern, name), parts, "{pattern} {name}");
        }
        assert_eq!(filled("x*y*z*", &["1", "2"]), "x1y2z");
    }
}
