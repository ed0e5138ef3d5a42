//! Text that others wrote, made fit to be shown: in logs, Events, metrics, pages and on terminals.
//!
//! A region, a reason or a program's message may hold a line break that forges a log line, an escape
//! sequence that drives a terminal, or a mark such as U+202E that turns the order of what follows. All of
//! it is shown as an escape. What a text means, and whether it is taken at all, is decided elsewhere.

use std::borrow::Cow;
use std::fmt::Write as _;

/// Longest quotation in bytes, after escaping.
const MAX_QUOTE: usize = 256;

/// Whether a character shows nothing of its own, or changes how others are shown: control characters,
/// format characters (Unicode category Cf: bidirectional marks, zero-width characters, tags), separators
/// of lines, what is not assigned, and the letters that Unicode calls ignorable.
pub fn is_unsafe(c: char) -> bool {
    /// Fillers of Hangul, which are letters and show nothing.
    const FILLERS: [char; 4] = ['\u{115f}', '\u{1160}', '\u{3164}', '\u{ffa0}'];

    // The standard library keeps the table: it escapes all of the categories C and Z but the space, and
    // characters that only extend the one before. Those are part of many languages' words.
    let escapes = || {
        let mut escaped = c.escape_debug();
        escaped.next() == Some('\\') && escaped.next() == Some('u')
    };
    matches!(c, '\0'..='\u{1f}' | '\u{7f}')
        || FILLERS.contains(&c)
        || (!c.is_ascii() && escapes() && !is_mark(c))
}

/// Whether the standard library escapes a character only because it extends the one before it.
fn is_mark(c: char) -> bool {
    // Behind a letter such a character stays as it is, which is how `str` tells the two apart.
    let mut pair = String::from("a");
    pair.push(c);
    pair.escape_debug().count() == 2
}

/// Text of several lines for a terminal: every unsafe character but the line break is escaped.
pub fn lines(text: &str) -> Cow<'_, str> {
    escape(text, |c| c != '\n' && is_unsafe(c), write_rust)
}

/// Text of one line: every unsafe character is escaped.
pub fn line(text: &str) -> Cow<'_, str> {
    escape(text, is_unsafe, write_rust)
}

/// JSON whose strings hold no unsafe character: they are escaped as JSON does it.
///
/// Only characters that JSON leaves as they are in strings are touched, so the meaning is the same.
pub fn json(text: &str) -> Cow<'_, str> {
    let unsafe_in_json = |c: char| !c.is_ascii() && is_unsafe(c);
    escape(text, unsafe_in_json, |out, c| {
        for unit in c.encode_utf16(&mut [0; 2]) {
            write!(out, "\\u{unit:04x}").expect("a String takes all that is written to it");
        }
    })
}

/// Foreign text that is to stand between quotes: unsafe characters, quotes and backslashes are escaped,
/// and the result is cut to 256 bytes.
pub fn quote(text: &str) -> String {
    cut(text.chars().map(|c| match c {
        '"' | '\'' | '\\' => format!("\\{c}"),
        _ => piece(c),
    }))
}

/// Another program's message: as [`quote`], but quotes stay as they are.
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
    fn marks_that_turn_or_hide_text_are_escaped() {
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
    fn names_in_every_language_stay_as_they_are() {
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
    fn a_text_of_several_lines_keeps_its_lines_and_no_other_control() {
        assert_eq!(lines("a\nb\u{202e}c\r\n"), "a\nb\\u{202e}c\\r\n");
        assert_eq!(line("a\nb"), "a\\nb");
    }

    #[test]
    fn json_means_the_same_after_it() {
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
    fn messages_keep_their_quotes_and_nothing_else() {
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
