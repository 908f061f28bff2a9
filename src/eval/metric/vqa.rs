//! VQA accuracy, the metric of TextVQA and VizWiz, and the clean-up of answers that precedes it.

use super::Protocol;
use super::contractions::CONTRACTIONS;
use super::python::{digit, mean_of_thirds, strip, words};

const PUNCTUATION: [char; 21] = [
    ';', '/', '[', ']', '"', '{', '}', '(', ')', '=', '+', '\\', '_', '-', '>', '<', '@', '`', ',',
    '?', '!',
];
const ARTICLES: [&str; 3] = ["a", "an", "the"];
const NUMBERS: [(&str, &str); 12] = [
    ("none", "0"),
    ("zero", "0"),
    ("one", "1"),
    ("two", "2"),
    ("three", "3"),
    ("four", "4"),
    ("five", "5"),
    ("six", "6"),
    ("seven", "7"),
    ("eight", "8"),
    ("nine", "9"),
    ("ten", "10"),
];
/// Periods that are taken out: the flag for Unicode, 32, stands where the number is expected.
const MAX_PERIODS: usize = 32;

/// Mean over the answers of min(1, matches among the others ÷ 3), after the clean-up of both sides.
///
/// Source: arXiv:1505.00468; lmms-eval 0.7.3 `tasks/textvqa/utils.py`, VLMEvalKit
/// `dataset/utils/vqa_eval.py`. Differs: no.
pub(super) fn score(prediction: &str, answers: &[String], protocol: Protocol) -> f64 {
    let prediction = processed(prediction, protocol);
    let is_match = |answer: &String| processed(answer, protocol) == prediction;
    let matches: Vec<bool> = answers.iter().map(is_match).collect();
    let n_matches = matches.iter().filter(|m| **m).count();
    let others = matches.iter().map(|own| n_matches - usize::from(*own));
    match protocol {
        Protocol::LmmsEval => {
            let mut counts = [0; 4];
            others.for_each(|n| counts[n.min(3)] += 1);
            mean_of_thirds(counts)
        }
        Protocol::VlmEvalKit => {
            let parts: Vec<f64> = others.map(|n| (n as f64 / 3.0).min(1.0)).collect();
            pairwise_sum(&parts) / parts.len() as f64
        }
    }
}

/// An answer as answers are compared.
///
/// Source: mmf `pythia/tasks/processors.py` `EvalAIAnswerProcessor`, as lmms-eval 0.7.3
/// `tasks/_task_utils/vqa_eval_metric.py` has it, and VLMEvalKit's `process_answer`, which leaves
/// case, commas and `'s` to later steps and looks at the digit before a period. Differs: no.
fn processed(text: &str, protocol: Protocol) -> String {
    let text = match protocol {
        Protocol::LmmsEval => {
            let lower = text.to_lowercase();
            let plain = lower.replace([',', '?'], "").replace("'s", " 's");
            strip(&plain).to_owned()
        }
        Protocol::VlmEvalKit => text.to_owned(),
    };
    let text = text.replace(['\n', '\t'], " ");
    let text = without_punctuation(strip(&text));
    let text = without_periods(&text, protocol);
    let lower = text.to_lowercase();
    let kept = words(&lower).map(number).filter(|w| !ARTICLES.contains(w));
    kept.map(contracted).collect::<Vec<_>>().join(" ")
}

/// A mark goes where it stands beside a blank anywhere, or the text has a comma between digits;
/// elsewhere a blank takes its place.
fn without_punctuation(text: &str) -> String {
    let chars: Vec<char> = text.chars().collect();
    let is_digit = |c: char| digit(c).is_some();
    // lmms-eval lets several commas stand there, but has taken all out before.
    let has_comma = chars
        .windows(3)
        .any(|w| is_digit(w[0]) && w[1] == ',' && is_digit(w[2]));
    let mut found = text.to_owned();
    for mark in PUNCTUATION {
        let beside_blank = chars
            .windows(2)
            .any(|w| w == [mark, ' '] || w == [' ', mark]);
        let instead = match beside_blank || has_comma {
            true => "",
            false => " ",
        };
        found = found.replace(mark, instead);
    }
    found
}

/// Takes out periods before which (VLMEvalKit only: lmms-eval's look-behind is misspelt and always
/// holds) and after which no digit stands.
fn without_periods(text: &str, protocol: Protocol) -> String {
    let is_digit = |c: &Option<char>| c.is_some_and(|c| digit(c).is_some());
    let mut n_taken = 0;
    let mut before = None;
    let mut chars = text.chars().peekable();
    let mut kept = String::with_capacity(text.len());
    while let Some(c) = chars.next() {
        let follows_digit = protocol == Protocol::VlmEvalKit && is_digit(&before);
        let is_taken = c == '.'
            && n_taken < MAX_PERIODS
            && !follows_digit
            && !is_digit(&chars.peek().copied());
        match is_taken {
            true => n_taken += 1,
            false => kept.push(c),
        }
        before = Some(c);
    }
    kept
}

fn number(word: &str) -> &str {
    let known = NUMBERS.iter().find(|(name, _)| *name == word);
    known.map_or(word, |(_, number)| number)
}

fn contracted(word: &str) -> &str {
    let known = CONTRACTIONS.binary_search_by_key(&word, |(plain, _)| plain);
    known.map_or(word, |i| CONTRACTIONS[i].1)
}

/// The sum of up to 128 numbers in numpy's order: eight sums side by side, put together by twos.
/// Beyond that, halves of a multiple of eight are summed on their own.
fn pairwise_sum(values: &[f64]) -> f64 {
    if values.len() < 8 {
        return values.iter().sum();
    }
    if values.len() > 128 {
        let half = values.len() / 2;
        let (a, b) = values.split_at(half - half % 8);
        return pairwise_sum(a) + pairwise_sum(b);
    }
    let (whole, rest) = values.as_chunks::<8>();
    let mut sums = [0.0; 8];
    for chunk in whole {
        sums.iter_mut().zip(chunk).for_each(|(sum, v)| *sum += v);
    }
    let [a, b, c, d, e, f, g, h] = sums;
    let sum = ((a + b) + (c + d)) + ((e + f) + (g + h));
    rest.iter().fold(sum, |sum, v| sum + v)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contractions_are_in_order() {
        assert!(CONTRACTIONS.is_sorted_by(|a, b| a.0 < b.0));
    }

    #[test]
    fn answers_are_cleaned_up() {
        for (text, lmms_eval, vlm_eval_kit) in [
            ("The Two Dogs!", "2 dogs", "2 dogs"),
            ("Dont, please?", "don't please", "don't please"),
            ("1,000", "1000", "1000"),
            ("a-b", "b", "b"),
            ("a- b-c", "bc", "bc"),
            ("St. Mark's", "st mark 's", "st mark's"),
            ("3.5", "3.5", "3.5"),
            ("5. 6.", "5 6", "5. 6."),
        ] {
            assert_eq!(processed(text, Protocol::LmmsEval), lmms_eval, "{text}");
            assert_eq!(
                processed(text, Protocol::VlmEvalKit),
                vlm_eval_kit,
                "{text}"
            );
        }
    }

    #[test]
    fn only_32_periods_go() {
        let found = processed(&".".repeat(40), Protocol::LmmsEval);
        assert_eq!(found, ".".repeat(8));
    }

    #[test]
    fn three_others_make_an_answer_right() {
        let answers: Vec<String> = ["red"; 3]
            .into_iter()
            .chain(["blue"; 7])
            .map(Into::into)
            .collect();
        for protocol in [Protocol::LmmsEval, Protocol::VlmEvalKit] {
            assert_eq!(score("Blue", &answers, protocol), 1.0);
            assert!((score("red", &answers, protocol) - 0.9).abs() < 1e-15);
            assert_eq!(score("green", &answers, protocol), 0.0);
        }
    }
}
