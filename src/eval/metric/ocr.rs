//! OCRBench's metric: whether the right answer stands anywhere in the model's.

use super::Protocol;
use super::python::strip;

/// Whether one of the answers is contained in the prediction: of a formula without blanks, else
/// without case. lmms-eval also makes full-width characters narrow.
///
/// Source: arXiv:2305.07895; lmms-eval 0.7.3 `tasks/ocrbench/utils.py`, VLMEvalKit
/// `dataset/image_vqa.py` `OCRBench.evaluate`. Differs: no.
pub(super) fn is_contained(
    prediction: &str,
    answers: &[String],
    is_formula: bool,
    protocol: Protocol,
) -> bool {
    let plain = |text: &str| match (is_formula, protocol) {
        (true, _) => strip(text).replace(['\n', ' '], ""),
        (false, Protocol::LmmsEval) => line(&narrow(text)),
        (false, Protocol::VlmEvalKit) => line(text),
    };
    let prediction = plain(prediction);
    let is_in = |answer: &String| prediction.contains(&plain(answer));
    answers.iter().any(is_in)
}

fn line(text: &str) -> String {
    strip(&text.to_lowercase()).replace('\n', " ")
}

/// Full-width forms of ASCII, and the wide blank, as ASCII.
fn narrow(text: &str) -> String {
    let one = |c: char| match c {
        '\u{ff01}'..='\u{ff5e}' => char::from_u32(u32::from(c) - 0xfee0).unwrap_or(c),
        '\u{3000}' => ' ',
        _ => c,
    };
    text.chars().map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_in(prediction: &str, answer: &str, is_formula: bool, protocol: Protocol) -> bool {
        is_contained(prediction, &[answer.to_owned()], is_formula, protocol)
    }

    #[test]
    fn answers_may_stand_anywhere() {
        for protocol in [Protocol::LmmsEval, Protocol::VlmEvalKit] {
            assert!(is_in("It says CENTRE.", "centre", false, protocol));
            assert!(is_in("two\nlines", "two lines", false, protocol));
            assert!(!is_in("two  lines", "two lines", false, protocol));
            assert!(is_in("x ^ 2\n+ 1", "x^2 + 1", true, protocol));
            assert!(!is_in("X^2", "x^2", true, protocol));
            assert!(is_in("", "", false, protocol));
        }
        assert!(is_in("ＡＢ１", "ab1", false, Protocol::LmmsEval));
        assert!(!is_in("ＡＢ１", "ab1", false, Protocol::VlmEvalKit));
    }
}
