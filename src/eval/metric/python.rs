//! The few operations of Python's texts that metrics are built of, where Rust's differ.
//!
//! A metric that is to agree with one written in Python has to read numbers, cut words and fold
//! case as Python does. Lower and upper case are Unicode's in both and come from the standard
//! library.
//! Source: CPython 3.11 `Objects/unicodeobject.c`, `Objects/floatobject.c`; the tables are
//! Unicode's.

/// Zeros of the decimal digits of Unicode 14; the nine others follow each.
const ZEROS: [u32; 66] = [
    0x30, 0x660, 0x6f0, 0x7c0, 0x966, 0x9e6, 0xa66, 0xae6, 0xb66, 0xbe6, 0xc66, 0xce6, 0xd66,
    0xde6, 0xe50, 0xed0, 0xf20, 0x1040, 0x1090, 0x17e0, 0x1810, 0x1946, 0x19d0, 0x1a80, 0x1a90,
    0x1b50, 0x1bb0, 0x1c40, 0x1c50, 0xa620, 0xa8d0, 0xa900, 0xa9d0, 0xa9f0, 0xaa50, 0xabf0, 0xff10,
    0x104a0, 0x10d30, 0x11066, 0x110f0, 0x11136, 0x111d0, 0x112f0, 0x11450, 0x114d0, 0x11650,
    0x116c0, 0x11730, 0x118e0, 0x11950, 0x11c50, 0x11d50, 0x11da0, 0x16a60, 0x16ac0, 0x16b50,
    0x1d7ce, 0x1d7d8, 0x1d7e2, 0x1d7ec, 0x1d7f6, 0x1e140, 0x1e2f0, 0x1e950, 0x1fbf0,
];

/// `str.isspace` of a character: Unicode's white space and the four separators of ASCII.
pub(super) fn is_space(c: char) -> bool {
    c.is_whitespace() || matches!(c, '\x1c'..='\x1f')
}

/// `str.strip`.
pub(crate) fn strip(text: &str) -> &str {
    text.trim_matches(is_space)
}

/// `str.split` without an argument.
pub(super) fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split(is_space).filter(|word| !word.is_empty())
}

/// `str.strip().lower().split()` put together with single blanks.
pub(super) fn folded(text: &str) -> String {
    let lower = strip(text).to_lowercase();
    words(&lower).collect::<Vec<_>>().join(" ")
}

/// The value of a decimal digit of any script, which is what `\d` matches too.
pub(super) fn digit(c: char) -> Option<u32> {
    let code = u32::from(c);
    let next = ZEROS.partition_point(|zero| *zero <= code);
    let value = code - ZEROS.get(next.checked_sub(1)?)?;
    (value < 10).then_some(value)
}

/// `float(text)`; `None` is `ValueError`.
pub(super) fn float(text: &str) -> Option<f64> {
    let ascii: String = match text.is_ascii() {
        true => text.to_owned(),
        false => text.chars().map(ascii).collect::<Option<_>>()?,
    };
    let is_blank = |c: char| matches!(c, '\t'..='\r' | ' ');
    let digits = without_underscores(ascii.trim_matches(is_blank))?;
    // Rust's grammar of numbers is Python's, infinity and NaN included.
    digits.parse().ok()
}

/// Digits of any script to those of ASCII, white space beyond ASCII to blanks.
fn ascii(c: char) -> Option<char> {
    match c {
        '\0'..'\x7f' => Some(c),
        _ if is_space(c) => Some(' '),
        _ => char::from_digit(digit(c)?, 10),
    }
}

/// Underscores may stand between two digits.
fn without_underscores(text: &str) -> Option<String> {
    let bytes = text.as_bytes();
    let is_digit = |i: usize| bytes.get(i).is_some_and(u8::is_ascii_digit);
    let mut kept = String::with_capacity(text.len());
    for (i, c) in text.char_indices() {
        match c {
            '_' if i > 0 && is_digit(i - 1) && is_digit(i + 1) => {}
            '_' => return None,
            _ => kept.push(c),
        }
    }
    Some(kept)
}

/// `str.capitalize`.
pub(crate) fn capitalize(text: &str) -> String {
    let Some(first) = text.chars().next() else {
        return String::new();
    };
    // Lowered as a whole, since a sigma is final or not by what stands around it.
    let lower = text.to_lowercase();
    let n_first = first.to_lowercase().map(char::len_utf8).sum::<usize>();
    title(first) + &lower[n_first..]
}

/// Title case of a character, which is upper case but for letters that are two in one.
fn title(c: char) -> String {
    let single = |c: char| c.to_string();
    match c {
        'Ǆ'..='ǆ' => single('ǅ'),
        'Ǉ'..='ǉ' => single('ǈ'),
        'Ǌ'..='ǌ' => single('ǋ'),
        'Ǳ'..='ǳ' => single('ǲ'),
        'ა'..='ჿ' => single(c),
        // Letters with an iota below keep it so.
        '\u{1f80}'..='\u{1faf}' => {
            char::from_u32(u32::from(c) | 8).map_or_else(String::new, single)
        }
        'ᾳ' | 'ᾼ' => single('ᾼ'),
        'ῃ' | 'ῌ' => single('ῌ'),
        'ῳ' | 'ῼ' => single('ῼ'),
        'ᾷ' => "ᾼ\u{342}".into(),
        'ῇ' => "ῌ\u{342}".into(),
        'ῷ' => "ῼ\u{342}".into(),
        'ᾲ' => "\u{1fba}\u{345}".into(),
        'ᾴ' => "\u{386}\u{345}".into(),
        'ῂ' => "\u{1fca}\u{345}".into(),
        'ῄ' => "\u{389}\u{345}".into(),
        'ῲ' => "\u{1ffa}\u{345}".into(),
        'ῴ' => "\u{38f}\u{345}".into(),
        // ß, և and the ligatures: the first of the letters upper, the others lower.
        'ß' | 'և' | '\u{fb00}'..='\u{fb06}' | '\u{fb13}'..='\u{fb17}' => {
            let upper: Vec<char> = c.to_uppercase().collect();
            let rest = upper[1..].iter().flat_map(|c| c.to_lowercase());
            upper[..1].iter().copied().chain(rest).collect()
        }
        _ => c.to_uppercase().collect(),
    }
}

/// Mean of numbers k ÷ 3 that float division has rounded, k from 0 to 3, each `counts[k]` times:
/// `statistics.mean`, which rounds once, at the end.
pub(super) fn mean_of_thirds(counts: [u64; 4]) -> f64 {
    let n = u128::from(counts.iter().sum::<u64>().max(1));
    // ⅓ is rounded to THIRD ÷ 2⁵⁴, ⅔ to twice that.
    const THIRD: u128 = 0x15_5555_5555_5555;
    let [_, one, two, three] = counts.map(u128::from);
    let sum = (one + 2 * two) * THIRD + (three << 54);
    // Enough digits that the odd bit for what is left can only break ties.
    let shift = sum.leading_zeros().saturating_sub(1);
    let shifted = sum << shift;
    let quotient = (shifted / n) | u128::from(!shifted.is_multiple_of(n));
    quotient as f64 * 2f64.powi(-54) * 2f64.powi(-(shift as i32))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_read_as_python_reads_them() {
        for (text, value) in [
            (" 5\n", 5.0),
            ("1e3", 1000.0),
            ("1_000", 1000.0),
            ("1_0.0_1e1_0", 10.01e10),
            (".5", 0.5),
            ("5.", 5.0),
            ("+Infinity", f64::INFINITY),
            ("-inF", f64::NEG_INFINITY),
            ("１２．5", f64::NAN),
            ("\u{3000}١٢\u{a0}", 12.0),
        ] {
            let expected = (text != "１２．5").then_some(value);
            assert_eq!(float(text), expected, "{text:?}");
        }
        assert!(float("-nan").is_some_and(f64::is_nan));
        for text in [
            "", " ", ".", "1__0", "_1", "1_", "1_.5", "1 2", "0x10", "1e", "infinit", "\x1c5",
            "1,5", "½", "5\0", "--5", "1e_5",
        ] {
            assert_eq!(float(text), None, "{text:?}");
        }
    }

    #[test]
    fn words_end_at_every_separator() {
        let found: Vec<&str> = words("\x1ca\u{85}b\u{3000} c\u{200b}d\x1f").collect();
        assert_eq!(found, ["a", "b", "c\u{200b}d"]);
    }

    #[test]
    fn only_the_first_letter_is_a_capital() {
        for (text, expected) in [
            ("", ""),
            ("what IS it?", "What is it?"),
            ("ßA", "Ssa"),
            ("ﬁN", "Fin"),
            ("ǆX", "ǅx"),
            ("ΑΣ ΣΑΣ", "Ας σας"),
            ("ΣΑ", "Σα"),
            ("İI", "İi"),
        ] {
            assert_eq!(capitalize(text), expected, "{text:?}");
        }
    }

    #[test]
    fn means_of_thirds_are_rounded_once() {
        assert_eq!(mean_of_thirds([10, 0, 0, 0]), 0.0);
        assert_eq!(mean_of_thirds([0, 0, 0, 10]), 1.0);
        assert_eq!(mean_of_thirds([0, 3, 0, 0]), 1.0 / 3.0);
        assert_eq!(mean_of_thirds([1, 0, 9, 0]), 0.6);
        assert_eq!(mean_of_thirds([0, 0, 3, 7]), 0.9);
    }
}
