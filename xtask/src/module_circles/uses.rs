//! Reads the `use` declarations of a source file. The reader knows only as much of Rust as these declarations need.

/// What one source file imports.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Uses {
    pub(super) imports: Vec<Import>,
    /// The modules that exist only in tests or in the documentation (`#[cfg(test)] mod a;`), each with the inline
    /// modules around the declaration.
    pub(super) left_out: Vec<Vec<String>>,
}

/// One name of a `use` declaration.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Import {
    /// The inline modules (`mod a { ... }`) around the declaration, the outermost first.
    pub(super) inside: Vec<String>,
    /// The segments of the path: `["super", "a", "B"]`.
    pub(super) path: Vec<String>,
    /// The name that the declaration gives to the item.
    pub(super) name: String,
    /// Whether the declaration has a visibility, such as `pub(crate)`: other modules can then import the name from here.
    pub(super) is_exported: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Token<'s> {
    Word(&'s str),
    Mark(char),
}

use Token::{Mark, Word};

/// Reads a file. Leaves out items with `#[cfg(test)]` or `#[cfg(doc)]`.
pub(super) fn read(source: &str) -> Uses {
    let tokens = tokens(source);
    let mut uses = Uses::default();
    // One entry for each open brace, with the name if it is that of an inline module.
    let mut braces: Vec<Option<String>> = Vec::new();
    let mut at = 0;
    while let Some(&token) = tokens.get(at) {
        let inside = || braces.iter().flatten().cloned().collect::<Vec<_>>();
        at += 1;
        match (token, &tokens[at..]) {
            (Mark('#'), [Mark('['), ..]) => {
                let end = end_of_group(&tokens, at);
                if is_left_out(&tokens[at..end]) {
                    at = end_of_item(&tokens, end);
                    if let Some(name) = module_name(&tokens[end..at]) {
                        uses.left_out.push([inside(), vec![name.to_owned()]].concat());
                    }
                } else {
                    at = end;
                }
            }
            (Word("mod"), [Word(name), Mark('{'), ..]) => {
                braces.push(Some((*name).to_owned()));
                at += 2;
            }
            (Word("use"), [next, ..]) if *next != Mark('<') => {
                let len = tokens[at..].iter().position(|token| *token == Mark(';')).unwrap_or(tokens.len() - at);
                let is_exported = is_exported(&tokens[..at - 1]);
                for (path, name) in paths(&tokens[at..at + len]) {
                    uses.imports.push(Import { inside: inside(), path, name, is_exported });
                }
                at += len;
            }
            (Mark('{'), _) => braces.push(None),
            (Mark('}'), _) => drop(braces.pop()),
            _ => {}
        }
    }
    uses
}

/// Whether the tokens before a `use` end with a visibility.
fn is_exported(before: &[Token<'_>]) -> bool {
    match before {
        [.., Word("pub")] => true,
        [head @ .., Mark(')')] => {
            let open = head.iter().rposition(|token| *token == Mark('('));
            open.is_some_and(|open| head[..open].last() == Some(&Word("pub")))
        }
        _ => false,
    }
}

/// The paths of a use tree, each with the name that it declares.
fn paths(tree: &[Token<'_>]) -> Vec<(Vec<String>, String)> {
    let open = tree.iter().position(|token| *token == Mark('{'));
    let prefix = words(&tree[..open.unwrap_or(tree.len())]);
    let Some(open) = open else {
        let (path, alias) = match prefix.as_slice() {
            [path @ .., keyword, alias] if keyword == "as" => (path.to_vec(), Some(alias.clone())),
            path => (path.to_vec(), None),
        };
        let Some(last) = path.last() else { return Vec::new() };
        let name = alias.unwrap_or_else(|| last.clone());
        return vec![(path, name)];
    };
    let body = &tree[open + 1..end_of_group(tree, open) - 1];
    let mut found = Vec::new();
    let (mut depth, mut start) = (0, 0);
    for (index, token) in body.iter().chain([&Mark(',')]).enumerate() {
        match token {
            Mark('{') => depth += 1,
            Mark('}') => depth -= 1,
            Mark(',') if depth == 0 => {
                for (path, name) in paths(&body[start..index]) {
                    found.push(([prefix.clone(), path].concat(), name));
                }
                start = index + 1;
            }
            _ => {}
        }
    }
    found
}

/// The words of a path; a glob counts as one.
fn words(tokens: &[Token<'_>]) -> Vec<String> {
    let word = |token: &Token<'_>| match token {
        Word(word) => Some((*word).to_owned()),
        Mark('*') => Some("*".to_owned()),
        Mark(_) => None,
    };
    tokens.iter().filter_map(word).collect()
}

/// Whether an attribute, from its bracket on, is a `cfg` that asks for tests or for the documentation.
fn is_left_out(attribute: &[Token<'_>]) -> bool {
    let [Mark('['), Word("cfg"), condition @ ..] = attribute else { return false };
    let mut at = 0;
    while let Some(token) = condition.get(at) {
        match token {
            Word("test" | "doc") => return true,
            Word("not") => at = end_of_group(condition, at + 1),
            _ => at += 1,
        }
    }
    false
}

/// The module that the item of these tokens declares in a file of its own.
fn module_name<'s>(item: &[Token<'s>]) -> Option<&'s str> {
    match item {
        [.., Word("mod"), Word(name), Mark(';')] => Some(*name),
        _ => None,
    }
}

/// The position behind the group that opens at `open`.
fn end_of_group(tokens: &[Token<'_>], open: usize) -> usize {
    let mut depth = 0;
    for (index, token) in tokens.iter().enumerate().skip(open) {
        match token {
            Mark('(' | '[' | '{') => depth += 1,
            Mark(')' | ']' | '}') => depth -= 1,
            _ => {}
        }
        if depth <= 0 {
            return index + 1;
        }
    }
    tokens.len()
}

/// The position behind the item, field or statement that begins at `start`: behind its semicolon or its block, or, if
/// it has neither, at the end of the block around it.
fn end_of_item(tokens: &[Token<'_>], start: usize) -> usize {
    let is_use = |token: &&Token<'_>| **token == Word("use");
    let mut at = start;
    while let Some(token) = tokens.get(at) {
        match token {
            Mark(';') => return at + 1,
            Mark('}') => return at,
            // The braces of a use tree are not the end of the declaration.
            Mark('{') if tokens[start..at].iter().find(is_use).is_none() => return end_of_group(tokens, at),
            Mark('(' | '[' | '{') => at = end_of_group(tokens, at),
            _ => at += 1,
        }
    }
    at
}

/// The words and marks of a source text, without comments and literals.
fn tokens(source: &str) -> Vec<Token<'_>> {
    let mut tokens = Vec::new();
    let mut rest = source;
    while let Some(first) = rest.chars().next() {
        let len = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if rest.starts_with("/*") {
            block_comment_len(rest)
        } else if let Some(len) = raw_string_len(rest) {
            len
        } else if first == '"' {
            literal_len(rest, '"')
        } else if first == '\'' && is_character(rest) {
            literal_len(rest, '\'')
        } else if first.is_alphanumeric() || first == '_' {
            let len = rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len());
            tokens.push(Word(&rest[..len]));
            len
        } else {
            if !first.is_whitespace() {
                tokens.push(Mark(first));
            }
            first.len_utf8()
        };
        rest = &rest[len..];
    }
    tokens
}

/// Block comments nest.
fn block_comment_len(text: &str) -> usize {
    let (mut depth, mut len) = (0, 0);
    while len < text.len() {
        let rest = &text[len..];
        if rest.starts_with("/*") {
            (depth, len) = (depth + 1, len + 2);
        } else if rest.starts_with("*/") {
            (depth, len) = (depth - 1, len + 2);
            if depth == 0 {
                break;
            }
        } else {
            len += rest.chars().next().map_or(0, char::len_utf8);
        }
    }
    len
}

/// The length of the raw string at the start of `text`, if there is one.
fn raw_string_len(text: &str) -> Option<usize> {
    let prefix = ["r", "br", "cr"]
        .into_iter()
        .find(|prefix| text.strip_prefix(prefix).is_some_and(|rest| rest.trim_start_matches('#').starts_with('"')))?;
    let hashes = text[prefix.len()..].find('"')?;
    let start = prefix.len() + hashes + 1;
    let end = format!("\"{}", "#".repeat(hashes));
    Some(text[start..].find(&end).map_or(text.len(), |len| start + len + end.len()))
}

/// The length of a string or character literal with escapes.
fn literal_len(text: &str, quote: char) -> usize {
    let mut is_escaped = false;
    for (index, c) in text.char_indices().skip(1) {
        match c {
            _ if is_escaped => is_escaped = false,
            '\\' => is_escaped = true,
            c if c == quote => return index + 1,
            _ => {}
        }
    }
    text.len()
}

/// Whether a quote begins a character and not a lifetime.
fn is_character(text: &str) -> bool {
    let mut following = text.chars().skip(1);
    following.next() == Some('\\') || following.next() == Some('\'')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn imported(source: &str) -> Vec<String> {
        read(source).imports.into_iter().map(|import| import.path.join("::")).collect()
    }

    #[test]
    fn a_tree_gives_one_import_for_each_name() {
        assert_eq!(
            imported("use crate::{a::{self, B}, c::D as E, f::*};\nuse super::G;"),
            ["crate::a::self", "crate::a::B", "crate::c::D", "crate::f::*", "super::G"]
        );
        let names: Vec<_> =
            read("use a::{B as C, D};").imports.into_iter().map(|import| (import.name, import.is_exported)).collect();
        assert_eq!(names, [("C".to_owned(), false), ("D".to_owned(), false)]);
    }

    #[test]
    fn a_visibility_makes_a_re_export() {
        for source in ["pub use a::B;", "pub(crate) use a::B;", "pub(in crate::c) use a::B;"] {
            assert!(read(source).imports[0].is_exported, "{source}");
        }
        assert!(!read("fn f() {} use a::B;").imports[0].is_exported);
        assert!(!read("fn f(); use a::B;").imports[0].is_exported);
    }

    #[test]
    fn tests_and_documentation_import_what_they_like() {
        let source = "
            #[cfg(test)] use crate::a;
            #[cfg(doc)] pub use crate::b::{B, C};
            #[cfg(any(test, feature = \"f\"))] #[allow(unused)] use crate::c;
            #[cfg(test)] impl<A, B> X for Y<A, B> { fn f() { use crate::d; } }
            #[cfg(not(test))] use crate::e;
            #[cfg(feature = \"test\")] use crate::f;
            #[cfg_attr(test, allow(unused))] use crate::g;
            struct S { #[cfg(test)] a: u32, b: u32 }
            #[cfg(test)] mod tests { use crate::h; }
            use crate::i;
        ";
        assert_eq!(imported(source), ["crate::e", "crate::f", "crate::g", "crate::i"]);
    }

    #[test]
    fn modules_of_tests_in_files_of_their_own_are_named() {
        let source = "#[cfg(test)] mod a; #[cfg(test)] pub(crate) mod b; mod c; mod d { #[cfg(test)] mod e; }";
        assert_eq!(read(source).left_out, [vec!["a"], vec!["b"], vec!["d", "e"]]);
    }

    #[test]
    fn imports_know_the_inline_modules_around_them() {
        let imports = read("mod a { fn f() { if x { use super::B; } } mod c { use super::D; } } use e::F;").imports;
        let inside: Vec<_> = imports.iter().map(|import| import.inside.join("::")).collect();
        assert_eq!(inside, ["a", "a::c", ""]);
    }

    #[test]
    fn comments_and_literals_import_nothing() {
        let source = r##"
            // use crate::a;
            /* use crate::b; /* use crate::c; */ use crate::d; */
            const S: &str = "use crate::e; \" use crate::f;";
            const R: &str = r#"use crate::g; " use crate::h;"#;
            fn f<'a>(x: &'a str) -> impl Iterator + use<'a> { ['"', '\'', '{', b'"'] }
            use crate::i;
        "##;
        assert_eq!(imported(source), ["crate::i"]);
    }
}
