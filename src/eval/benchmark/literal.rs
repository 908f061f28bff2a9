//! Lists in Python's notation, as the cells of VLMEvalKit's tables hold them.

use std::iter::Peekable;
use std::str::Chars;

/// Cells that pandas takes for missing values when it reads a table.
const NOTHING: [&str; 19] = [
    "", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN",
    "<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null",
];

/// Whether pandas reads a cell as missing.
pub(super) fn pandas_reads_nothing(cell: &str) -> bool {
    NOTHING.contains(&cell)
}

/// The items of a list of texts and numbers; `None` for everything else, which is text then.
/// Numbers become what `str` makes of them.
pub(super) fn list(text: &str) -> Option<Vec<String>> {
    let mut chars = text
        .trim_matches([' ', '\t', '\n', '\r'])
        .chars()
        .peekable();
    if chars.next()? != '[' {
        return None;
    }
    let mut items = Vec::new();
    loop {
        skip_blanks(&mut chars);
        match *chars.peek()? {
            ']' => break,
            quote @ ('\'' | '"') => {
                chars.next();
                items.push(quoted(&mut chars, quote)?);
            }
            _ => items.push(number(&mut chars)?),
        }
        skip_blanks(&mut chars);
        match chars.peek()? {
            ',' => chars.next(),
            ']' => break,
            _ => return None,
        };
    }
    chars.next();
    chars.next().is_none().then_some(items)
}

fn skip_blanks(chars: &mut Peekable<Chars>) {
    while chars.next_if(|c| c.is_ascii_whitespace()).is_some() {}
}

/// The text up to the closing quote.
fn quoted(chars: &mut Peekable<Chars>, quote: char) -> Option<String> {
    let mut text = String::new();
    loop {
        match chars.next()? {
            c if c == quote => return Some(text),
            '\n' => return None,
            '\\' => escaped(chars, &mut text)?,
            c => text.push(c),
        }
    }
}

fn escaped(chars: &mut Peekable<Chars>, text: &mut String) -> Option<()> {
    let c = match chars.next()? {
        '\n' => return Some(()),
        c @ ('\\' | '\'' | '"') => c,
        'a' => '\x07',
        'b' => '\x08',
        'f' => '\x0c',
        'n' => '\n',
        'r' => '\r',
        't' => '\t',
        'v' => '\x0b',
        'x' => code(chars, 2)?,
        'u' => code(chars, 4)?,
        'U' => code(chars, 8)?,
        // Numbers in base 8 and names of characters: no set has them.
        '0'..='7' | 'N' => return None,
        c => {
            text.push('\\');
            c
        }
    };
    text.push(c);
    Some(())
}

fn code(chars: &mut Peekable<Chars>, n_digits: usize) -> Option<char> {
    let digits = (0..n_digits).map(|_| chars.next()?.to_digit(16));
    let code = digits.collect::<Option<Vec<u32>>>()?;
    char::from_u32(code.into_iter().fold(0, |code, digit| (code << 4) | digit))
}

fn number(chars: &mut Peekable<Chars>) -> Option<String> {
    let mut text = String::new();
    while let Some(c) = chars.next_if(|c| matches!(c, '0'..='9' | '-' | '.')) {
        text.push(c);
    }
    match text.contains('.') {
        true => text.parse::<f64>().ok().map(|value| format!("{value:?}")),
        false => text.parse::<i64>().ok().map(|value| value.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_read_as_python_reads_them() {
        let read = |text| list(text).map(|items| items.join("|"));
        for (text, expected) in [
            ("['a', \"it's\"]", Some("a|it's")),
            (r"['a\'b', 'c\nd\x41\u00e9\d', ]", Some("a'b|c\ndAé\\d")),
            ("[3, -4, 3.50, 10.0]", Some("3|-4|3.5|10.0")),
            (" [] ", Some("")),
            ("[", None),
            ("['a'", None),
            ("['a' 'b']", None),
            ("['a'] + ['b']", None),
            ("[a]", None),
            ("[[1]]", None),
            ("['a\\", None),
            ("plain", None),
        ] {
            assert_eq!(read(text).as_deref(), expected, "{text}");
        }
    }
}
