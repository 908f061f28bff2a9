//! Average normalised Levenshtein similarity, DocVQA's metric.

use super::python::folded;

/// Below this an answer counts nothing.
const THRESHOLD: f64 = 0.5;

/// Similarity with the nearest of the right answers, 0 or from 0.5 to 1. The distance is between
/// folded texts, the length it is divided by that of the texts as they stand, in upper case.
///
/// Source: arXiv:1907.00490; lmms-eval 0.7.3 `api/metrics.py` `anls`, VLMEvalKit
/// `dataset/utils/vqa_eval.py` `anls_compute`. Differs: no.
pub(super) fn score(prediction: &str, answers: &[String]) -> f64 {
    let folded_prediction = folded(prediction);
    let n_prediction = upper_chars(prediction);
    let distance = |answer: &String| {
        let n_chars = upper_chars(answer).max(n_prediction);
        match n_chars {
            0 => 0.0,
            _ => levenshtein(&folded(answer), &folded_prediction) as f64 / n_chars as f64,
        }
    };
    let nearest = answers.iter().map(distance).fold(f64::INFINITY, f64::min);
    let similarity = 1.0 - nearest;
    match similarity < THRESHOLD {
        true => 0.0,
        false => similarity,
    }
}

/// Characters in upper case, where ß counts two.
fn upper_chars(text: &str) -> usize {
    text.chars().flat_map(char::to_uppercase).count()
}

/// Insertions, deletions and replacements of characters that turn one text into the other.
fn levenshtein(a: &str, b: &str) -> usize {
    let a: Vec<char> = a.chars().collect();
    let mut row: Vec<usize> = (0..=a.len()).collect();
    for (i, b) in b.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, a) in a.iter().enumerate() {
            let replaced = diagonal + usize::from(*a != b);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[a.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(prediction: &str, answers: &[&str]) -> f64 {
        let answers: Vec<String> = answers.iter().map(|a| (*a).to_owned()).collect();
        score(prediction, &answers)
    }

    #[test]
    fn near_answers_count_in_part() {
        assert_eq!(of("ITC", &["itc limited", "ITC"]), 1.0);
        assert_eq!(of("kitten", &["sitting"]), 1.0 - 3.0 / 7.0);
        // Half is enough, less is nothing.
        assert_eq!(of("ab", &["abcd"]), 0.5);
        assert_eq!(of("a", &["abc"]), 0.0);
        assert_eq!(of("", &["", "x"]), 1.0);
        assert_eq!(of("", &["x"]), 0.0);
    }

    #[test]
    fn lengths_are_of_the_texts_as_they_stand() {
        // "a b" and "a   c" are one letter apart once folded, of five.
        assert_eq!(of("a b", &["a   c"]), 1.0 - 1.0 / 5.0);
        // ß is two letters long in upper case.
        assert_eq!(of("x", &["ßßß"]), 1.0 - 3.0 / 6.0);
    }
}
