//! Escapes foreign text for logs, Events, metrics, pages and terminals.
//!
//! A region, a reason or a program's message may hold a line break that forges a log line, an escape
//! sequence that controls a terminal, or a mark such as U+202E that reorders the text after it. All of these
//! are escaped. Other modules decide what a text means and whether it is valid.

use std::borrow::Cow;
use std::fmt::Write as _;

/// Longest quotation in bytes, after escaping.
const MAX_QUOTE: usize = 256;

/// Whether a character is invisible, or changes how others are displayed: control characters, format
/// characters (Unicode category Cf: bidirectional marks, zero-width characters, tags), line separators,
/// unassigned characters, and the letters that Unicode calls ignorable.
pub fn is_unsafe(c: char) -> bool {
    /// Fillers of Hangul: invisible letters.
    const FILLERS: [char; 4] = ['\u{115f}', '\u{1160}', '\u{3164}', '\u{ffa0}'];

    // The standard library has the table: it escapes the categories C and Z except the space, and
    // characters that extend the previous one. The latter are part of words in many languages.
    let escapes = || {
        let mut escaped = c.escape_debug();
        escaped.next() == Some('\\') && escaped.next() == Some('u')
    };
    matches!(c, '\0'..='\u{1f}' | '\u{7f}')
        || FILLERS.contains(&c)
        || (!c.is_ascii() && escapes() && !is_mark(c))
}

/// Whether the standard library escapes a character only because it extends the previous one.
fn is_mark(c: char) -> bool {
    // After a letter `str` does not escape such a character.
    let mut pair = String::from("a");
    pair.push(c);
    pair.escape_debug().count() == 2
}

/// Escapes text of several lines for a terminal: every unsafe character except the line break.
pub fn lines(text: &str) -> Cow<'_, str> {
    escape(text, |c| c != '\n' && is_unsafe(c), write_rust)
}

/// Escapes text of one line: every unsafe character.
pub fn line(text: &str) -> Cow<'_, str> {
    escape(text, is_unsafe, write_rust)
}

/// Escapes unsafe characters in the strings of a JSON text, with JSON's escapes.
///
/// Only characters that JSON allows unescaped in strings are changed, so the value stays the same.
pub fn json(text: &str) -> Cow<'_, str> {
    let unsafe_in_json = |c: char| !c.is_ascii() && is_unsafe(c);
    escape(text, unsafe_in_json, |out, c| {
        for unit in c.encode_utf16(&mut [0; 2]) {
            write!(out, "\\u{unit:04x}").expect("writing to a String does not fail");
        }
    })
}

/// Escapes foreign text for use between quotes: unsafe characters, quotes and backslashes. The result is cut
/// to 256 bytes.
pub fn quote(text: &str) -> String {
    cut(text.chars().map(|c| match c {
        '"' | '\'' | '\\' => format!("\\{c}"),
        _ => piece(c),
    }))
}

/// Escapes another program's message: as [`quote`], but quotes stay unchanged.
pub fn message(text: &str) -> String {
    cut(text.chars().map(|c| match c {
        '\\' => "\\\\".to_owned(),
        _ => piece(c),
    }))
}

/// One character, escaped if it is unsafe.
fn piece(c: char) -> String {
    let mut out = String::new();
    if is_unsafe(c) {
        write_rust(&mut out, c);
    } else {
        out.push(c);
    }
    out
}

/// Writes an escape as Rust's `{:?}` does.
fn write_rust(out: &mut String, c: char) {
    match c {
        '\n' => out.push_str("\\n"),
        '\r' => out.push_str("\\r"),
        '\t' => out.push_str("\\t"),
        _ => out.extend(c.escape_unicode()),
    }
}

fn escape(
    text: &str,
    wanted: impl Fn(char) -> bool,
    write: impl Fn(&mut String, char),
) -> Cow<'_, str> {
    if !text.contains(&wanted) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        if wanted(c) {
            write(&mut out, c);
        } else {
            out.push(c);
        }
    }
    Cow::Owned(out)
}

fn cut(pieces: impl Iterator<Item = String>) -> String {
    let mut text = String::new();
    for piece in pieces {
        if text.len() + piece.len() > MAX_QUOTE {
            let end = text
                .char_indices()
                .map(|(at, _)| at)
                .take_while(|at| at + '…'.len_utf8() <= MAX_QUOTE)
                .last();
            text.truncate(end.unwrap_or(0));
            text.push('…');
            break;
        }
        text.push_str(&piece);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bidirectional_and_invisible_characters_are_escaped() {
        for c in [
            '\u{202e}',
            '\u{202a}',
            '\u{2066}',
            '\u{2069}',
            '\u{200e}',
            '\u{061c}',
            '\u{200b}',
            '\u{200d}',
            '\u{2060}',
            '\u{feff}',
            '\u{ad}',
            '\u{e0041}',
            '\u{2028}',
            '\u{85}',
            '\u{1b}',
            '\r',
            '\u{7f}',
            '\u{3164}',
            '\u{e000}',
            '\u{180e}',
        ] {
            assert!(is_unsafe(c), "{c:?}");
            let text = format!("a{c}b");
            for shown in [line(&text).into_owned(), quote(&text), message(&text)] {
                assert!(!shown.contains(c), "{shown:?}");
                assert!(shown.starts_with("a\\") && shown.ends_with('b'), "{shown}");
            }
        }
    }

    #[test]
    fn names_in_every_language_stay_unchanged() {
        for text in [
            "nd",
            "Hönö",
            "東京",
            "Ελλάδα",
            "अमरावती",
            "กรุงเทพ",
            "e\u{301}",
            "a b_c-d",
            "…",
        ] {
            assert_eq!(line(text), text);
        }
    }

    #[test]
    fn a_text_of_several_lines_keeps_only_its_line_breaks() {
        assert_eq!(lines("a\nb\u{202e}c\r\n"), "a\nb\\u{202e}c\\r\n");
        assert_eq!(line("a\nb"), "a\\nb");
    }

    #[test]
    fn escaped_json_has_the_same_value() {
        let value = serde_json::json!({"na\u{202e}me": "x\u{e0041}\n\u{200b}"});
        let text = serde_json::to_string_pretty(&value).unwrap();
        let shown = json(&text);
        assert!(shown.is_ascii(), "{shown}");
        assert!(
            shown.contains("\\u202e") && shown.contains("\\udb40\\udc41"),
            "{shown}"
        );
        let read: serde_json::Value = serde_json::from_str(&shown).unwrap();
        assert_eq!(read, value);
    }

    #[test]
    fn quotations_escape_control_characters() {
        assert_eq!(
            quote("a\r\n\u{1b}[31m\"\u{202e}"),
            "a\\r\\n\\u{1b}[31m\\\"\\u{202e}"
        );
    }

    #[test]
    fn messages_keep_their_quotes() {
        assert_eq!(message("no \"file\"\u{7}"), "no \"file\"\\u{7}");
    }

    #[test]
    fn quotations_are_cut_at_256_bytes() {
        assert_eq!(quote(&"a".repeat(256)).len(), 256);
        for text in [
            "a".repeat(100_000),
            "ä".repeat(100_000),
            "\u{1b}".repeat(100_000),
        ] {
            let quoted = quote(&text);
            assert!(quoted.len() <= 256, "{}", quoted.len());
            assert!(quoted.ends_with('…'));
        }
    }
}
