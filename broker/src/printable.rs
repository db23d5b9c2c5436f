//! Text for people: shows text that others chose so that it cannot act on a terminal or make a second line.

use std::error::Error;
use std::fmt::{self, Write};

/// `text` with its control characters, and those that change the direction of writing, as escapes such as `\\u{1b}`.
///
/// For all text that others chose: names in files, names of processes, paths, answers from sockets.
pub fn printable(text: &str) -> impl fmt::Display {
    Printable(text)
}

/// An error and its causes in one line, each part once.
///
/// The errors of this crate contain their cause. Errors of other crates may leave the cause to [`Error::source`],
/// contain it, or both: this leaves out a cause whose words are there already.
#[derive(Debug)]
pub struct Chain<'a>(pub &'a (dyn Error + 'static));

struct Printable<'a>(&'a str);

impl fmt::Display for Printable<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for character in self.0.chars() {
            match character {
                '\n' => f.write_str("\\n")?,
                '\t' => f.write_str("\\t")?,
                character if acts_on_terminals(character) => write!(f, "{}", character.escape_unicode())?,
                character => f.write_char(character)?,
            }
        }
        Ok(())
    }
}

/// Control characters (C0, DEL, C1), line and paragraph separators, and the marks of bidirectional writing.
fn acts_on_terminals(character: char) -> bool {
    character.is_control()
        || matches!(character, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = printable(&self.0.to_string()).to_string();
        let mut next = self.0.source();
        while let Some(cause) = next {
            let words = printable(&cause.to_string()).to_string();
            if !text.contains(&words) {
                write!(text, ": {words}")?;
            }
            next = cause.source();
        }
        f.write_str(&text)
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use proptest::prelude::*;

    use super::*;

    /// An error of another crate, which may not contain its cause.
    #[derive(Debug)]
    struct Outer {
        text: &'static str,
        cause: io::Error,
    }

    impl fmt::Display for Outer {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str(self.text)
        }
    }

    impl Error for Outer {
        fn source(&self) -> Option<&(dyn Error + 'static)> {
            Some(&self.cause)
        }
    }

    #[test]
    fn each_cause_appears_once() {
        let error = |text| Outer { text, cause: io::Error::from_raw_os_error(2) };
        let missing = "No such file or directory (os error 2)";
        assert_eq!(Chain(&error("opening x")).to_string(), format!("opening x: {missing}"));
        let said = "opening x: No such file or directory (os error 2). Create it";
        assert_eq!(Chain(&error(said)).to_string(), said);
    }

    #[test]
    fn text_of_others_is_shown_without_effect() {
        assert_eq!(
            printable("disk \u{1b}[2J\r\n\u{9b}1m\u{202e}gpj").to_string(),
            r"disk \u{1b}[2J\u{d}\n\u{9b}1m\u{202e}gpj"
        );
        assert_eq!(printable("Gerät 7/ディスク").to_string(), "Gerät 7/ディスク");
    }

    proptest! {
        #[test]
        fn no_text_has_control_characters_or_a_second_line(text in any::<String>()) {
            let shown = printable(&text).to_string();
            prop_assert!(!shown.chars().any(acts_on_terminals));
            prop_assert!(shown.lines().count() <= 1);
        }
    }
}
